"""Breaks the CPU kernels in one place at a time; the C++ tests must notice.

    python -m tests.mutation.run --count 120          # goes on where it was stopped
    python -m tests.mutation.run --list --count 120   # the places, nothing is run
    python -m tests.mutation.run --again              # survivors once more, after a new test

A mutant is an arithmetic, comparison or logical operator of csrc/cpu that became another, or a
number that is off by one. The places are drawn from all of them by a fixed seed, so that a queue
stopped anywhere goes on. Each mutant costs one compilation at -O1 and the C++ tests. Outcomes are
written to tests/trust/results/mutations-cpu.json; `EXPLAINED` says why a survivor is no gap.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import resource
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.trust import records

ROOT = Path(__file__).resolve().parents[2]
OUT = records.FOLDER / "mutations-cpu.json"
FLAGS = ["-std=c++20", "-O1", "-w", "-fPIC", "-fopenmp-simd", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", "-Icsrc"]
LEVEL = "avx2"
TESTS = {  # cheapest first
    "test_kernels": [],
    "test_activation_dropout": [],
    "test_tiles": [],
    "test_topk_scores": [],
    "test_stream": ["2000"],
    "test_shapes": [],
}
CPU_SECONDS = 120  # of a test; a mutant that does not end is killed

# Files whose code every level compiles, and those that are compiled once.
SKIPPED = {"kernels.h", "level.h", "level_headers.h", "parallel.h", "tensor_params.h"}
CHANGES: list[tuple[str, str]] = [
    (" + ", " - "),
    (" - ", " + "),
    (" * ", " + "),
    (" / ", " * "),
    (" < ", " <= "),
    (" <= ", " < "),
    (" > ", " >= "),
    (" >= ", " > "),
    (" == ", " != "),
    (" != ", " == "),
    (" && ", " || "),
    (" || ", " && "),
    (" += ", " -= "),
    (" + 1", " + 2"),
    (" - 1", ""),
    ("std::min", "std::max"),
    ("std::max", "std::min"),
    (" % ", " / "),
]


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int  # from 1
    column: int
    old: str
    new: str

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line}:{self.column} {self.old.strip()} -> {self.new.strip()}"

    def source(self, text: str) -> str:
        lines = text.splitlines(keepends=True)
        line = lines[self.line - 1]
        end = self.column + len(self.old)
        assert line[self.column : end] == self.old
        lines[self.line - 1] = line[: self.column] + self.new + line[end:]
        return "".join(lines)


def places() -> list[Mutant]:
    """Every mutant there could be, in the order of the files."""
    found = []
    for path in [*sorted((ROOT / "csrc/cpu").glob("*.h")), ROOT / "csrc/cpu/levels.cpp"]:
        if path.name in SKIPPED:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            code = line.partition("//")[0]
            if code.lstrip().startswith(("#", "template", "static_assert", "using")):
                continue
            for old, new in CHANGES:
                for hit in re.finditer(re.escape(old), code):
                    found.append(Mutant(path.name, number, hit.start(), old, new))
    return found


def chosen(count: int) -> list[Mutant]:
    everything = places()
    random.Random(0).shuffle(everything)
    return everything[:count]


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def build(tree: Path, source: str, target: Path) -> bool:
    command = [compiler(), *FLAGS, "-c", source, "-o", str(target)]
    return subprocess.run(command, cwd=tree, capture_output=True).returncode == 0


class Bench:
    """Unbroken objects, and what a mutant replaces of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        sources = ["levels", "level_baseline", "level_avx512", f"level_{LEVEL}"]
        self.objects = {name: folder / f"{name}.o" for name in sources}
        for name, target in self.objects.items():
            assert build(ROOT, f"csrc/cpu/{name}.cpp", target), f"{name} must compile"
        for name in TESTS:
            assert build(ROOT, f"tests/cpp/{name}.cpp", folder / f"{name}.o"), name

    def outcome(self, objects: dict[str, Path], tree: Path) -> str:
        """survived, or the test that failed."""
        for name, arguments in TESTS.items():
            program = tree / name
            linked = [str(self.folder / f"{name}.o"), *map(str, objects.values())]
            command = [compiler(), *linked, "-pthread", "-o", str(program)]
            subprocess.run(command, check=True)
            limit = (resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
            run = subprocess.run(
                [str(program), *arguments],
                capture_output=True,
                env={**os.environ, "RECGRELA_CPU_LEVEL": LEVEL},
                preexec_fn=lambda: resource.setrlimit(*limit),  # noqa: B023
            )
            program.unlink()
            if run.returncode != 0:
                return f"killed by {name}" + (" (crash)" if run.returncode < 0 else "")
        return "survived"

    def run(self, mutant: Mutant) -> str:
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            tree = Path(name)
            shutil.copytree(ROOT / "csrc/cpu", tree / "csrc/cpu")
            path = tree / "csrc/cpu" / mutant.file
            path.write_text(mutant.source(path.read_text(encoding="utf-8")), encoding="utf-8")
            broken = "levels" if mutant.file == "levels.cpp" else f"level_{LEVEL}"
            target = tree / f"{broken}.o"
            if not build(tree, f"csrc/cpu/{broken}.cpp", target):
                return "does not compile"
            return self.outcome({**self.objects, broken: target}, tree)


# Survivors that no test can tell, by the text of their line; each was looked at.
EXPLAINED: dict[str, str] = {}


def explained(line: str) -> str | None:
    return next((why for text, why in EXPLAINED.items() if text in line), None)


def summary(outcomes: dict[str, Any]) -> dict[str, Any]:
    runs = [one for one in outcomes.values() if one["outcome"] != "does not compile"]
    survivors = [one for one in runs if one["outcome"] == "survived"]
    told = [one for one in survivors if one.get("why")]
    return {
        "mutants": len(runs),
        "killed": len(runs) - len(survivors),
        "survived": len(survivors),
        "explained": len(told),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--again", action="store_true", help="survivors once more")
    options = parser.parse_args()
    queue = chosen(options.count)
    if options.list:
        print(*(mutant.name for mutant in queue), sep="\n")
        return 0
    record = records.read(OUT) if OUT.exists() else {"kind": "mutation", "outcomes": {}}
    outcomes = record["outcomes"]
    if options.again:
        outcomes = {n: one for n, one in outcomes.items() if one["outcome"] != "survived"}
    lines = {p.name: p.read_text().splitlines() for p in (ROOT / "csrc/cpu").iterdir()}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        unbroken = bench.outcome(bench.objects, Path(folder))
        assert unbroken == "survived", f"the kernels as they are: {unbroken}"
        for mutant in queue:
            line = lines[mutant.file][mutant.line - 1].strip()
            # The source may have moved on since: the line itself is part of the name.
            name = f"{mutant.name} | {line}"
            if name in outcomes:
                continue
            found = {"outcome": bench.run(mutant)}
            why = explained(line) if found["outcome"] == "survived" else None
            outcomes[name] = {**found, **({"why": why} if why else {})}
            record |= {"outcomes": outcomes, **summary(outcomes), "versions": records.versions()}
            records.write(OUT, record)
            print(f"{name}: {outcomes[name]['outcome']}", flush=True)
    print(summary(outcomes))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
