"""The places a kernel can be broken in, which of them are the sample, and what one depends on."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
SURVIVED = "survived"
NONE = ("does not compile", "same machine code")  # no mutant
EACH = 2  # of every file, where it has as many

# The wrappers csrc/cuda/*.cpp are not among them: they need a CUDA toolkit and a GPU.
SOURCES = {
    "cpu": ("*.h", "*.cpp", "cpu/*.h", "cpu/*.cpp"),
    "cuda": ("cuda/*.cu", "cuda/*.cuh"),
}
# What a survivor has met.
TESTS = {
    "cpu": (
        "tests/cpp/*.cpp",
        "tests/ops/*.py",
        "tests/trust/test_isolation.py",
        "tests/trust/test_extremes.py",
    ),
    "cuda": ("tests/cuda_shim/*.cpp", "tests/cuda_shim/*.h"),
}
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
    (" << ", " >> "),
    (" >> ", " << "),
    (" & ", " | "),
    (" | ", " & "),
    (" ^ ", " | "),
]
NO_CODE = ("#", "template", "static_assert", "using")
TEXT = re.compile(r'"(?:[^"\\]|\\.)*"')


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
        return self.file.rpartition("/")[2]

    def apply(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        line, end = lines[self.line - 1], self.column + len(self.old)
        assert line[self.column : end] == self.old
        lines[self.line - 1] = line[: self.column] + self.new + line[end:]
        path.write_text("".join(lines), encoding="utf-8")


def code_of(line: str) -> str:
    """The line without its comment, nor what stands in quotes; columns stay."""
    return TEXT.sub(lambda text: "_" * len(text[0]), line).partition("//")[0]


def places_in(file: str, text: str) -> list[Mutant]:
    """Every mutant there could be of a file, from top to bottom."""
    found, known = list[Mutant](), Counter[str]()
    for number, line in enumerate(text.splitlines(), start=1):
        code = code_of(line)
        if code.lstrip().startswith(NO_CODE):
            continue
        for old, new in CHANGES:
            for hit in re.finditer(re.escape(old), code):
                mutant = Mutant(file, number, hit.start(), old, new, line)
                known[mutant.name] += 1
                found.append(replace(mutant, which=known[mutant.name]))
    return found


def places(kind: str) -> list[Mutant]:
    """Every mutant there could be of a kind, file after file."""
    found: list[Mutant] = []
    for path in sorted(path for pattern in SOURCES[kind] for path in CSRC.glob(pattern)):
        found += places_in(str(path.relative_to(CSRC)), path.read_text(encoding="utf-8"))
    return found


def draw(mutants: list[Mutant], outcome: Callable[[Mutant], str]) -> Iterator[Mutant]:
    """The sample, as far as it is asked for: one of every file, a second one, then any.

    `outcome` is asked once of each, in this order; what turns out to be no mutant is replaced by
    the next of the same file or, after those, the next of all.
    """
    by_hash = sorted(mutants, key=lambda x: hashlib.sha256(x.name.encode()).digest())
    left = {
        file: iter([x for x in by_hash if x.file == file]) for file in {x.file for x in mutants}
    }
    drawn: set[Mutant] = set()
    for _ in range(EACH):
        for file in sorted(left):
            for mutant in left[file]:
                drawn.add(mutant)
                if outcome(mutant) not in NONE:
                    yield mutant
                    break
    for mutant in by_hash:
        if mutant not in drawn and outcome(mutant) not in NONE:
            yield mutant


@cache
def included(path: Path, roots: tuple[Path, ...] = (CSRC,)) -> frozenset[Path]:
    """The file and what it includes of its own folder and `roots`, and so on."""
    found, todo = set[Path](), [path]
    while todo:
        one = todo.pop()
        if one in found:
            continue
        found.add(one)
        for name in re.findall(r'^#include ["<](.+)[">]', one.read_text(encoding="utf-8"), re.M):
            near = [folder / name for folder in (one.parent, *roots)]
            todo += [x.resolve() for x in near if x.is_file()][:1]
    return frozenset(found)


def source_digest(file: str) -> str:
    """Of a file of csrc and what it includes; comments and white space do not count."""
    digest = hashlib.sha256()
    for path in sorted(included(CSRC / file)):
        text = re.sub(r"//.*", "", path.read_text(encoding="utf-8"))
        digest.update(" ".join([path.name, *text.split()]).encode())
    return digest.hexdigest()[:16]


def tests_digest(kind: str) -> str:
    """Of the tests a survivor of this kind has met."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in TESTS[kind] for path in ROOT.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def killer_is_there(outcome: str) -> bool:
    """Whether the test that killed a mutant still exists."""
    name = outcome.removeprefix("killed by ").split()[0].rstrip(",")
    if not name.startswith("tests/"):
        return any(
            (ROOT / folder / f"{name}.cpp").exists() for folder in ("tests/cpp", "tests/cuda_shim")
        )
    file, _, test = name.partition("::")
    path = ROOT / file
    return path.exists() and (not test or f"def {test}(" in path.read_text(encoding="utf-8"))
