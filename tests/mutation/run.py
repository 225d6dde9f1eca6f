"""Breaks the kernels in one place at a time; the tests must notice.

    python -m tests.mutation.run --cpu 60 --cuda 40          # goes on where it was stopped
    python -m tests.mutation.run --list --cpu 60 --cuda 40   # the places, nothing is run
    python -m tests.mutation.run --again --cpu 60 --cuda 40  # survivors again, after a new test

A mutant is an arithmetic, comparison or logical operator that became another, or a number that is
off by one. The places are drawn from all of csrc/cpu and csrc/cuda by a hash of their lines' text,
so that a queue stopped anywhere goes on, also when other lines have changed; what is known of lines
that are gone is dropped. A CPU mutant is compiled for one instruction set and meets the C++ tests,
the likeliest first; those that live meet the operator's tests in Python when the queue has ended,
the C++ tests under the address and undefined-behaviour sanitizers, and all of tests/ops. A CUDA
mutant meets the shim's tests. One whose machine code is what it was before is no mutant, and
another is drawn in its place.

Outcomes are written to tests/trust/results/mutations-*.json; tests/mutation/explained.py says of a
survivor why it is no gap.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.cuda_shim.mutations import FLAGS as SHIM_FLAGS
from tests.cuda_shim.mutations import includes
from tests.mutation.explained import EXPLAINED
from tests.trust import records
from tests.trust.checks import NO_DISASSEMBLY

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build/mutation"
CPU_FLAGS = ["-std=c++20", "-O1", "-w", "-fPIC", "-fopenmp-simd", "-fno-math-errno"]
CPU_FLAGS += ["-fno-trapping-math", "-Icsrc"]
LEVELS = ("avx2", "avx512", "baseline")  # the first whose code a mutant changes is tested
TESTS = {  # cheapest first, but for the file's own
    "test_kernels": [],
    "test_activation_dropout": [],
    "test_tiles": [],
    "test_topk_scores": [],
    "test_stream": ["2000"],
    "test_shapes": [],
}
LIKELY = {
    "activation_dropout.h": ("test_activation_dropout", "test_activation_dropout.py"),
    "gelu.h": ("test_activation_dropout", "test_activation_dropout.py"),
    "topk_heap.h": ("test_topk_scores", "test_topk_scores.py"),
    "topk_scores.h": ("test_topk_scores", "test_topk_scores.py"),
    "encoder_step.h": ("test_stream", "test_encoder_step.py"),
    "gated_rela_step.h": ("test_kernels", "test_gated_rela_step.py"),
}
OTHERS = ("test_kernels", "test_gated_rela.py")
SURVIVED = "survived"
NONE = ("does not compile", "same machine code")  # no mutant
CPU_SECONDS = {"cpu": 30, "cuda": 120}  # of one test; a mutant that does not end is killed
SECONDS = 1800  # by the clock, against one that waits for ever
MEMORY = 8 << 30

# Files that no kernel is in.
SKIPPED = {"kernels.h", "level.h", "level_headers.h", "parallel.h", "tensor_params.h"}
SKIPPED |= {"mma_probe.cu", "params.h", "run.h", "stream.h"}
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
    file: str  # under csrc
    line: int  # from 1
    column: int
    old: str
    new: str
    text: str  # the line as it is: its number changes too often to be part of the name
    which: int = 1  # of the same change to the same text in this file

    @property
    def name(self) -> str:
        change = f"{self.file}:{self.column} {self.old.strip()} -> {self.new.strip()}"
        return f"{change} | {self.text.strip()}" + (f" ({self.which})" if self.which > 1 else "")

    @property
    def base(self) -> str:
        return self.file.partition("/")[2]

    def apply(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        line, end = lines[self.line - 1], self.column + len(self.old)
        assert line[self.column : end] == self.old
        lines[self.line - 1] = line[: self.column] + self.new + line[end:]
        path.write_text("".join(lines), encoding="utf-8")


def places(kind: str) -> list[Mutant]:
    """Every mutant there could be of csrc/cpu or csrc/cuda, in the order of the files."""
    folder, found = ROOT / "csrc" / kind, list[Mutant]()
    known: Counter[str] = Counter()
    paths = [*folder.glob("*.h"), *folder.glob("*.cu*"), *folder.glob("levels.cpp")]
    for path in sorted(paths):
        if path.name in SKIPPED:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            code = line.partition("//")[0]
            if code.lstrip().startswith(("#", "template", "static_assert", "using")):
                continue
            for old, new in CHANGES:
                for hit in re.finditer(re.escape(old), code):
                    file = f"{kind}/{path.name}"
                    mutant = Mutant(file, number, hit.start(), old, new, line)
                    known[mutant.name] += 1
                    found.append(replace(mutant, which=known[mutant.name]))
    return found


def shuffled(kind: str) -> list[Mutant]:
    return sorted(places(kind), key=lambda x: hashlib.sha256(x.name.encode()).digest())


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def build(tree: Path, flags: tuple[str, ...], source: str, target: Path) -> bool:
    command = [compiler(), *flags, "-c", source, "-o", str(target)]
    return subprocess.run(command, cwd=tree, capture_output=True).returncode == 0


def link(objects: list[Path], target: Path, *options: str) -> None:
    command = [compiler(), *map(str, objects), *options, "-pthread", "-o", str(target)]
    subprocess.run(command, check=True)


def verdict(
    command: list[str], cwd: Path, what: str, seconds: int, memory: int = MEMORY, **settings: str
) -> str:
    """survived, or that `what` failed."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

    try:
        run = subprocess.run(
            command, cwd=cwd, capture_output=True, timeout=SECONDS,
            env={**os.environ, **settings}, preexec_fn=limit,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"killed by {what} (never ended)"
    if run.returncode == 0:
        return SURVIVED
    return f"killed by {what}" + (" (crash)" if run.returncode < 0 else "")


class Bench(ABC):
    """Unbroken objects, kept under build/, and what a mutant replaces of them."""

    kind: str
    flags: tuple[str, ...]
    one_is_all = False  # each object has the whole of a kernel, for another instruction set

    def __init__(self) -> None:
        digest = hashlib.sha256(repr((self.flags, compiler())).encode())
        for path in sorted(self.sources()):
            digest.update(path.read_bytes())
        self.folder = WORK / f"{self.kind}-{digest.hexdigest()[:12]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        for source in self.units():
            target = self.object_of(source)
            if not target.exists():
                assert build(ROOT, self.flags, source, target), f"{source} must compile"

    def sources(self) -> Iterator[Path]:
        for folder in ("csrc", "tests/cpp", "tests/cuda_shim"):
            yield from (p for p in (ROOT / folder).rglob("*") if p.suffix != ".pyc" and p.is_file())

    @abstractmethod
    def units(self) -> list[str]:
        """The sources of all objects."""

    @abstractmethod
    def broken(self, tree: Path, mutant: Mutant) -> list[str]:
        """The sources that a mutant's file is compiled in, those to be tried first in front."""

    @abstractmethod
    def judge(self, tree: Path, mutant: Mutant, changed: dict[str, Path]) -> str:
        """What the quick tests say of a mutant."""

    def judge_survivor(self, tree: Path, mutant: Mutant, changed: dict[str, Path]) -> str:
        """Tests that take minutes."""
        return SURVIVED

    def object_of(self, source: str) -> Path:
        return self.folder / f"{Path(source).name}.o"

    def compiled(self, tree: Path, source: str) -> Path | str | None:
        """The mutant's object, None where it is what it was, or the word for a failure."""
        target = tree / f"{Path(source).name}.o"
        if not build(tree, self.flags, source, target):
            return NONE[0]
        same = target.read_bytes() == self.object_of(source).read_bytes()
        return None if same else target

    def run(self, mutant: Mutant, survivor: bool) -> str:
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            tree = Path(name)
            for folder in ("csrc", "tests/cuda_shim"):
                shutil.copytree(ROOT / folder, tree / folder)
            mutant.apply(tree / "csrc" / mutant.file)
            judge = self.judge_survivor if survivor else self.judge
            changed: dict[str, Path] = {}
            found = NONE[1]
            for source in self.broken(tree, mutant):
                target = self.compiled(tree, source)
                if isinstance(target, str):
                    return target
                if target is not None:
                    changed[source] = target
                    if len(changed) == 1:  # one object is enough for most
                        found = judge(tree, mutant, changed)
                        if self.one_is_all or found != SURVIVED:
                            return found
            return judge(tree, mutant, changed) if len(changed) > 1 else found


class CpuBench(Bench):
    kind, flags = "cpu", tuple(CPU_FLAGS)
    one_is_all = True
    link_flags: tuple[str, ...] = ()
    seconds, memory, suffix = CPU_SECONDS["cpu"], MEMORY, ""

    def units(self) -> list[str]:
        kernels = [f"csrc/cpu/{name}.cpp" for name in ("levels", *(f"level_{x}" for x in LEVELS))]
        return [*kernels, *(f"tests/cpp/{name}.cpp" for name in TESTS)]

    def broken(self, tree: Path, mutant: Mutant) -> list[str]:
        names = ["levels"] if mutant.base == "levels.cpp" else [f"level_{x}" for x in LEVELS]
        return [f"csrc/cpu/{name}.cpp" for name in names]

    def kernels(self, changed: dict[str, Path]) -> tuple[list[Path], str]:
        """Objects, and the level that changed."""
        stem = Path(next(iter(changed), "")).stem
        level = stem.removeprefix("level_") if stem.startswith("level_") else LEVELS[0]
        return [changed.get(x, self.object_of(x)) for x in self.units() if "csrc" in x], level

    def judge(self, tree: Path, mutant: Mutant, changed: dict[str, Path]) -> str:
        kernels, level = self.kernels(changed)
        first = LIKELY.get(mutant.base, OTHERS)[0]
        for name in sorted(TESTS, key=lambda test: test != first):
            link([self.object_of(name + ".cpp"), *kernels], tree / name, *self.link_flags)
            command = [str(tree / name), *TESTS[name]]
            what = name + self.suffix
            found = verdict(
                command, tree, what, self.seconds, self.memory, RECGRELA_CPU_LEVEL=level
            )
            if found != SURVIVED:
                return found
        return SURVIVED

    def judge_survivor(self, tree: Path, mutant: Mutant, changed: dict[str, Path]) -> str:
        first = ROOT / "tests/ops" / LIKELY.get(mutant.base, OTHERS)[1]
        others = sorted(path for path in first.parent.glob("test_*.py") if path != first)
        others += [ROOT / f"tests/trust/test_{name}.py" for name in ("isolation", "extremes")]
        found = self.in_python(tree, [first], changed)
        if found == SURVIVED:
            bench = SanitizedBench()
            unbroken(bench)
            found = bench.run(mutant, survivor=False)
        return found if found != SURVIVED else self.in_python(tree, others, changed)

    def in_python(self, tree: Path, tests: list[Path], changed: dict[str, Path]) -> str:
        """Tests on a copy of the package with the mutant's library."""
        import torch

        shutil.copytree(ROOT / "recgrela_ext", tree / "recgrela_ext", dirs_exist_ok=True)
        shutil.copytree(ROOT / "tests", tree / "tests", dirs_exist_ok=True)
        shutil.copy(ROOT / "pyproject.toml", tree)
        native = ROOT / "build/native/csrc"
        wrappers = sorted([*native.glob("*.o"), *native.glob("cpu/*.o")])
        wrappers = [x for x in wrappers if "level" not in x.name and "module" not in x.name]
        assert wrappers, "python setup.py build_ext --inplace must run first"
        folder = Path(torch.__path__[0]) / "lib"
        kernels, level = self.kernels(changed)
        target = tree / "recgrela_ext/librecgrela.so"
        options = ["-shared", f"-L{folder}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
        link([*wrappers, *kernels], target, *options)
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        command += ["-k", NO_DISASSEMBLY]  # that is of -O3
        chosen = [str(path.relative_to(ROOT)) for path in tests]
        try:
            run = subprocess.run(
                [*command, *chosen], cwd=tree, capture_output=True, text=True, timeout=2 * SECONDS,
                env={**os.environ, "RECGRELA_CPU_LEVEL": level},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return "killed by tests/ops (never ended)"
        if run.returncode == 0:
            return SURVIVED
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+?)(?:\[| - |$)", run.stdout, flags=re.MULTILINE)
        return f"killed by {failed[0]}" if failed else "killed by tests/ops (crash)"


class SanitizedBench(CpuBench):
    """The same C++ tests; what is read outside its memory changes no number."""

    kind = "sanitized"
    link_flags = ("-fsanitize=address,undefined",)
    flags = (*CPU_FLAGS, *link_flags, "-fno-sanitize-recover=all")
    seconds, memory, suffix = 5 * CPU_SECONDS["cpu"], resource.RLIM_INFINITY, ", sanitized"


class CudaBench(Bench):
    kind, flags = "cuda", tuple(SHIM_FLAGS)

    def units(self) -> list[str]:
        paths = [*(ROOT / "csrc/cuda").glob("*.cu"), *(ROOT / "tests/cuda_shim").glob("*.cpp")]
        return sorted(str(path.relative_to(ROOT)) for path in paths)

    def broken(self, tree: Path, mutant: Mutant) -> list[str]:
        units = [x for x in self.units() if x.endswith(".cu")]
        found = [x for x in units if mutant.base in includes(tree / x, tree / "csrc/cuda")]
        return sorted(found, key=lambda x: ("_d16." not in x, "_d64." not in x, x))

    def judge(self, tree: Path, mutant: Mutant, changed: dict[str, Path]) -> str:
        link([changed.get(x, self.object_of(x)) for x in self.units()], tree / "test_cuda")
        command = [str(tree / "test_cuda"), "first"]
        return verdict(command, tree, "test_cuda", CPU_SECONDS["cuda"])


BENCHES: dict[str, type[Bench]] = {"cpu": CpuBench, "cuda": CudaBench}


def summary(outcomes: dict[str, Any]) -> dict[str, Any]:
    runs = [one for one in outcomes.values() if one["outcome"] not in NONE]
    survivors = [one for one in runs if one["outcome"] == SURVIVED]
    return {
        "mutants": len(runs),
        "killed": len(runs) - len(survivors),
        "survived": len(survivors),
        "explained": len([one for one in survivors if one.get("why")]),
        "no_mutants": len(outcomes) - len(runs),
    }


def unbroken(bench: Bench) -> None:
    """The kernels as they are pass; asked once for a state of the sources."""
    passed = bench.folder / "passed"
    if passed.exists():
        return
    anything = Mutant(f"{bench.kind}/", 0, 0, "", "", "")
    with tempfile.TemporaryDirectory(dir=bench.folder) as tree:
        found = bench.judge(Path(tree), anything, {})
    assert found == SURVIVED, f"the kernels as they are: {found}"
    passed.touch()


class Queue:
    """One kind's places, in their order, and what became of them."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.out = records.FOLDER / f"mutations-{kind}.json"
        earlier = records.read(self.out) if self.out.exists() else {}
        there = {mutant.name for mutant in places(kind)}
        self.outcomes: dict[str, dict[str, Any]] = {
            name: one for name, one in earlier.get("outcomes", {}).items() if name in there
        }
        self.bench: Bench | None = None

    def go(self, count: int, again: bool) -> None:
        before = {n for n, one in self.outcomes.items() if one["outcome"] == SURVIVED}
        survivors = []
        known_first = sorted(shuffled(self.kind), key=lambda x: x.name not in self.outcomes)
        for mutant in known_first:
            if not count:
                break
            if mutant.name not in self.outcomes or (again and mutant.name in before):
                self.run(mutant, survivor=False)
            one = self.outcomes[mutant.name]
            count -= one["outcome"] not in NONE
            if one["outcome"] == SURVIVED and not one["survivor_tests"]:
                survivors.append(mutant)
        for mutant in sorted(survivors, key=lambda x: x.base not in LIKELY):  # cheap ones first
            if mutant.name not in EXPLAINED:
                self.run(mutant, survivor=True)
        self.write()
        print(self.kind, summary(self.outcomes))

    def run(self, mutant: Mutant, survivor: bool) -> None:
        if self.bench is None:
            self.bench = BENCHES[self.kind]()
            unbroken(self.bench)
        start, before = time.monotonic(), self.outcomes.get(mutant.name, {})
        outcome = self.bench.run(mutant, survivor)
        self.outcomes[mutant.name] = {
            "outcome": outcome,
            "commit": records.commit(),
            "seconds": round(time.monotonic() - start) + before.get("seconds", 0),
            "survivor_tests": survivor,
        }
        print(f"{mutant.name}: {outcome}", flush=True)
        self.write()

    def write(self) -> None:
        for name, one in self.outcomes.items():
            one.pop("why", None)
            if one["outcome"] == SURVIVED and name in EXPLAINED:
                one["why"] = EXPLAINED[name]
        facts = {"kind": "mutation", **summary(self.outcomes), "versions": records.versions()}
        records.write(self.out, {**facts, "outcomes": self.outcomes})


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cpu", type=int, default=60, help="mutants of csrc/cpu")
    parser.add_argument("--cuda", type=int, default=40, help="mutants of csrc/cuda")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--again", action="store_true", help="survivors once more")
    options = parser.parse_args()
    for kind, count in {"cpu": options.cpu, "cuda": options.cuda}.items():
        if options.list:
            print(*(mutant.name for mutant in shuffled(kind)[:count]), sep="\n")
        elif count:
            Queue(kind).go(count, options.again)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
