"""What a mutant is compiled into, and the tests it meets there."""

from __future__ import annotations

import hashlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cuda_shim.mutations import FLAGS as SHIM_FLAGS
from tests.mutation.places import CSRC, NONE, ROOT, SURVIVED, Mutant, included
from tests.trust.checks import NO_DISASSEMBLY

WORK = ROOT / "build/mutation"
CPU_FLAGS = ["-std=c++20", "-O1", "-w", "-fPIC", "-fvisibility=hidden", "-fopenmp-simd"]
CPU_FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-Icsrc"]
CPU_FLAGS += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
ASAN = "-fsanitize=address"
LEVELS = ("avx2", "avx512", "baseline")  # the first whose code a mutant changes is tested
PROGRAMS = {  # cheapest first, but for the file's own
    "test_kernels": [],
    "test_activation_dropout": [],
    "test_tiles": [],
    "test_topk_scores": [],
    "test_stream": ["2000"],
    "test_shapes": [],
}
# By a word at the start of a file's name: the likeliest program, the tests in Python that come
# before all others.
LIKELY: dict[str, tuple[str, tuple[str, ...]]] = {
    "activation_dropout": ("test_activation_dropout", ("activation_dropout",)),
    "arguments": ("", ("bad_inputs", "gated_rela", "gated_rela_step")),
    "checks": ("", ("bad_inputs", "topk_scores", "softmax_loss")),
    "encoder_step": ("test_stream", ("encoder_step", "bad_inputs")),
    "feed_forward": ("test_tiles", ("feed_forward",)),
    "gated_rela_step": ("test_kernels", ("gated_rela_step", "bad_inputs")),
    "gelu": ("test_activation_dropout", ("activation_dropout", "feed_forward")),
    "kernels": ("", ("gated_rela", "topk_scores")),
    "matrix_blocks": ("test_tiles", ("feed_forward", "softmax_loss")),
    "params": ("", ("gated_rela", "torch_features")),
    "recent_items": ("", ("recent_items",)),
    "rela": ("", ("rela", "bad_inputs")),
    "softmax_loss": ("test_tiles", ("softmax_loss",)),
    "storage": ("test_kernels", ("gated_rela", "topk_scores")),
    "topk": ("test_topk_scores", ("topk_scores",)),
}
OTHERS = ("test_kernels", ("gated_rela", "bad_inputs"))
# Of one test; a mutant that does not end is killed. Seconds of CPU: a busy machine kills no mutant.
SECONDS = {"cpu": 60, "sanitized": 300, "cuda": 120, "python": 300, "all": 1500}
WAITING = 8  # times as many by the clock, against one that waits for ever
MEMORY = {"cpu": 8 << 30, "sanitized": resource.RLIM_INFINITY, "cuda": 8 << 30, "python": 16 << 30}
OUTPUT = 1 << 30  # bytes of a file
NO_LEVEL = 77  # exit code of a program on a machine without the instruction set


def likely(mutant: Mutant) -> tuple[str, tuple[str, ...]]:
    words = [word for word in LIKELY if mutant.base.startswith(word)]
    return LIKELY[max(words, key=len)] if words else OTHERS


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def build(tree: Path, flags: tuple[str, ...], source: str, target: Path) -> bool:
    command = [compiler(), *flags, "-c", source, "-o", str(target)]
    return subprocess.run(command, cwd=tree, capture_output=True).returncode == 0


def link(objects: list[Path], target: Path, *options: str) -> None:
    command = [compiler(), *map(str, objects), *options, "-pthread", "-o", str(target)]
    subprocess.run(command, check=True)


def run_limited(
    command: list[str], cwd: Path, seconds: int, memory: int, **settings: str
) -> tuple[int | None, str]:
    """The exit code, None where it never ended, and what was printed."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_FSIZE, (OUTPUT, OUTPUT))

    environment = {
        name: value for name, value in os.environ.items() if name != "RECGRELA_CPU_LEVEL"
    }
    with (cwd / "said.txt").open("w+b") as said:
        run = subprocess.Popen(
            command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT,
            env={**environment, **settings}, preexec_fn=limit, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = run.wait(WAITING * seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if run.returncode is None:
                os.killpg(run.pid, signal.SIGKILL)  # and what it started
                run.wait()
        said.seek(max(0, said.seek(0, os.SEEK_END) - 100_000))
        text = said.read().decode(errors="replace")
    return (None if code in (-signal.SIGXCPU, -signal.SIGKILL) else code), text


def verdict(what: str, code: int | None) -> str:
    """survived, or that `what` failed."""
    if code == 0:
        return SURVIVED
    how = " (never ended)" if code is None else " (crash)" if code < 0 else ""
    return f"killed by {what}{how}"


class Bench(ABC):
    """Unbroken objects, kept under build/, and what a mutant replaces of them."""

    kind: str
    flags: tuple[str, ...]

    def __init__(self) -> None:
        self.folder = WORK / self.kind
        self.folder.mkdir(parents=True, exist_ok=True)
        units = self.units()
        self.kept = {source: self.folder / self.name_of(source) for source in units}
        for source, target in self.kept.items():
            if not target.exists():
                assert build(ROOT, self.flags, source, target), f"{source} must compile"
        digest = hashlib.sha256(repr(sorted(map(str, self.kept.values()))).encode())
        passed = self.folder / f"passed-{digest.hexdigest()[:12]}"
        if not passed.exists():  # asked once for a state of the sources
            with tempfile.TemporaryDirectory(dir=self.folder) as tree:
                found = self.unbroken(Path(tree))
            assert found == SURVIVED, f"the kernels as they are: {found}"
            passed.touch()

    def name_of(self, source: str) -> str:
        """The object's name holds what it is made of."""
        digest = hashlib.sha256(repr((self.flags, compiler())).encode())
        for path in sorted(included(ROOT / source, (CSRC, ROOT / "tests/cuda_shim"))):
            digest.update(path.read_bytes())
        return f"{Path(source).name}-{digest.hexdigest()[:12]}.o"

    @abstractmethod
    def units(self) -> list[str]:
        """The sources of all objects."""

    @abstractmethod
    def unbroken(self, tree: Path) -> str:
        """What the tests say of the kernels as they are."""

    @abstractmethod
    def judge(self, tree: Path, mutant: Mutant, survivor: bool) -> str:
        """What the quick tests say of a mutant; of a survivor those that take minutes."""

    def object_of(self, source: str) -> Path:
        return self.kept[source]

    def users(self, mutant: Mutant) -> list[str]:
        return [x for x in self.units() if CSRC / mutant.file in included(ROOT / x)]

    def objects(self, changed: dict[str, Path], units: list[str]) -> list[Path]:
        """The mutant's come first: of an inline function the linker takes the first it meets."""
        mutated = [changed[x] for x in units if x in changed]
        return [*mutated, *(self.object_of(x) for x in units if x not in changed)]

    def compiled(self, tree: Path, source: str) -> Path | str | None:
        """The mutant's object, None where it is what it was, or the word for a failure."""
        target = tree / f"{Path(source).name}.o"
        if not build(tree, self.flags, source, target):
            return NONE[0]
        same = target.read_bytes() == self.object_of(source).read_bytes()
        return None if same else target

    def run(self, mutant: Mutant, survivor: bool) -> str:
        with self.broken(mutant) as tree:
            return self.judge(tree, mutant, survivor)

    @contextmanager
    def broken(self, mutant: Mutant) -> Iterator[Path]:
        """A copy of the sources with the mutant in it."""
        with tempfile.TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True) as name:
            tree = Path(name)
            for folder in ("csrc", "tests/cuda_shim"):
                shutil.copytree(ROOT / folder, tree / folder)
            mutant.apply(tree / "csrc" / mutant.file)
            yield tree


def level_of(source: str) -> str:
    """The instruction set of a source; empty of one that has none."""
    stem = Path(source).stem
    return stem.removeprefix("level_") if stem.startswith("level_") else ""


class CpuBench(Bench):
    kind, flags = "cpu", tuple(CPU_FLAGS)

    def __init__(self) -> None:
        import torch

        from recgrela_ext import build_info

        here = build_info()["cpu_levels"]
        assert here, "python setup.py build_ext --inplace must run first"
        self.levels = [level for level in LEVELS if level in here]
        self.torch = Path(torch.__path__[0])
        self.flags = (*self.flags, "-isystem", str(self.torch / "include"))
        super().__init__()

    def units(self) -> list[str]:
        paths = [*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp")]
        names = sorted(str(path.relative_to(ROOT)) for path in paths if path.stem != "module")
        return [*names, *(f"tests/cpp/{name}.cpp" for name in PROGRAMS)]

    def unbroken(self, tree: Path) -> str:
        for level in self.levels:
            found = self.in_cpp(tree, {}, level, "")
            if found != SURVIVED:
                return found
        return self.in_python(tree, sorted((ROOT / "tests/ops").glob("test_*.py")), {}, "all")

    def changes(self, tree: Path, mutant: Mutant) -> dict[str, Path] | str:
        """The objects that a mutant changes, of one level alone."""
        changed: dict[str, Path] = {}
        users = [x for x in self.users(mutant) if x.startswith("csrc/")]
        skipped = {f"csrc/cpu/level_{x}.cpp" for x in LEVELS if x not in self.levels}
        order = [f"csrc/cpu/level_{x}.cpp" for x in self.levels]
        for source in sorted(users, key=lambda x: order.index(x) if x in order else -1):
            if source in skipped or (level_of(source) and any(map(level_of, changed))):
                continue
            target = self.compiled(tree, source)
            if isinstance(target, str):
                return target
            if target is not None:
                changed[source] = target
        return changed or NONE[1]

    def judge(self, tree: Path, mutant: Mutant, survivor: bool) -> str:
        changed = self.changes(tree, mutant)
        if isinstance(changed, str):
            return changed
        # A program that includes the file itself would be half broken: those meet Python alone.
        programs = not any(x.startswith("tests/") for x in self.users(mutant))
        programs &= any(level_of(x) or x.endswith("levels.cpp") for x in changed)
        first, names = likely(mutant)
        own = [ROOT / f"tests/ops/test_{name}.py" for name in names]
        if not survivor:
            level = next(filter(None, map(level_of, changed)), "")
            found = self.in_cpp(tree, changed, level, first) if programs else SURVIVED
            return found if found != SURVIVED else self.in_python(tree, own, changed, "python")
        for source in filter(level_of, changed if programs else ()):
            found = self.sanitized(tree, source, first)
            if found != SURVIVED:
                return found
        others = sorted(path for path in own[0].parent.glob("test_*.py") if path not in own)
        others += [ROOT / f"tests/trust/test_{name}.py" for name in ("isolation", "extremes")]
        return self.in_python(tree, [*own, *others], changed, "all")

    def sanitized(self, tree: Path, source: str, first: str) -> str:
        """The programs on one level that shows reads and writes outside of what it was given."""
        flags = (*self.flags, ASAN)
        passed = self.kept[source].with_suffix(".sanitized")
        if not passed.exists():
            usual = tree / "usual.o"
            assert build(ROOT, flags, source, usual)
            found = self.in_cpp(tree, {source: usual}, level_of(source), first, "sanitized")
            assert found == SURVIVED, f"the kernels as they are: {found}"
            passed.touch()
        target = tree / "sanitized.o"
        if not build(tree, flags, source, target):
            return SURVIVED
        return self.in_cpp(tree, {source: target}, level_of(source), first, "sanitized")

    def in_cpp(
        self, tree: Path, changed: dict[str, Path], level: str, first: str, how: str = "cpu"
    ) -> str:
        """The programs of tests/cpp."""
        kernels = [x for x in self.units() if x.startswith("csrc/cpu/level")]
        settings = {"RECGRELA_CPU_LEVEL": level} if level else {}
        settings["ASAN_OPTIONS"] = "hard_rss_limit_mb=8000"  # it cannot live with RLIMIT_AS
        options = [] if how == "cpu" else [ASAN]
        for name in sorted(PROGRAMS, key=lambda test: test != first):
            objects = [*self.objects(changed, kernels), self.object_of(f"tests/cpp/{name}.cpp")]
            link(objects, tree / name, *options)
            command = [str(tree / name), *PROGRAMS[name]]
            code, _ = run_limited(command, tree, SECONDS[how], MEMORY[how], **settings)
            assert code != NO_LEVEL, f"this machine has no {level}"
            found = verdict(name if how == "cpu" else f"{name}, {how}", code)
            if found != SURVIVED:
                return found
        return SURVIVED

    def in_python(self, tree: Path, tests: list[Path], changed: dict[str, Path], limit: str) -> str:
        """Tests on a copy of the package with the mutant's library."""
        skipped = shutil.ignore_patterns("__pycache__", "results", "corpus")
        for folder in ("recgrela_ext", "tests"):
            shutil.copytree(ROOT / folder, tree / folder, ignore=skipped, dirs_exist_ok=True)
        shutil.copy(ROOT / "pyproject.toml", tree)
        units = [x for x in self.units() if x.startswith("csrc/")]
        libraries = [f"-L{self.torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
        target = tree / "recgrela_ext/librecgrela.so"
        target.unlink(missing_ok=True)
        link(self.objects(changed, units), target, "-shared", *libraries)
        # The machine code the disassembly looks for is that of -O3. A library that does not load
        # is an error, and no reason to run without it.
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        command += ["-k", NO_DISASSEMBLY, "-W", "error:recgrela_ext"]
        command += [str(path.relative_to(ROOT)) for path in tests]
        level = next(filter(None, map(level_of, changed)), "")
        settings = {"CI": "true", **({"RECGRELA_CPU_LEVEL": level} if level else {})}
        code, text = run_limited(command, tree, SECONDS[limit], MEMORY["python"], **settings)
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+?)(?:\[| - |$)", text, flags=re.MULTILINE)
        return verdict(failed[0] if failed else "tests/ops", code)


class CudaBench(Bench):
    kind, flags = "cuda", tuple(SHIM_FLAGS)

    def units(self) -> list[str]:
        paths = [*CSRC.glob("cuda/*.cu"), *(ROOT / "tests/cuda_shim").glob("*.cpp")]
        return sorted(str(path.relative_to(ROOT)) for path in paths)

    def unbroken(self, tree: Path) -> str:
        return self.in_shim(tree, {})

    def judge(self, tree: Path, mutant: Mutant, survivor: bool) -> str:
        if survivor:
            return SURVIVED  # there are no other tests
        users = [x for x in self.users(mutant) if x.endswith(".cu")]
        changed: dict[str, Path] = {}
        found = NONE[1]
        for source in sorted(users, key=lambda x: ("_d16." not in x, "_d64." not in x, x)):
            target = self.compiled(tree, source)
            if isinstance(target, str):
                return target
            if target is not None:
                changed[source] = target
                if len(changed) == 1:  # one object is enough for most
                    found = self.in_shim(tree, changed)
                    if found != SURVIVED:
                        return found
        return self.in_shim(tree, changed) if len(changed) > 1 else found

    def in_shim(self, tree: Path, changed: dict[str, Path]) -> str:
        link(self.objects(changed, self.units()), tree / "test_cuda")
        command = [str(tree / "test_cuda"), "first"]
        code, _ = run_limited(command, tree, SECONDS["cuda"], MEMORY["cuda"])
        return verdict("test_cuda", code)


BENCHES: dict[str, type[Bench]] = {"cpu": CpuBench, "cuda": CudaBench}
