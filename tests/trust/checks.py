"""Long checks that are programs of their own; `python -m tests.trust --run NAME` keeps the outcome.

sanitizers   the C++ tests of kernels and CUDA sources under address and undefined behaviour
operators    tests/ops, in Python, on a library built with the same two sanitizers
threads      every kernel in threads of our own, random shapes (`--seed`) and events among them,
             under ThreadSanitizer; torch itself is not built with it, so that tests in Python would
             report its threads, and what the operators do around the kernels is left out
valgrind     the step's events under valgrind
service      the example service killed, its Redis gone and back, its SQLite file damaged
streaming    ten million events of one user, two thousand random shapes (`--seed`)
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NO_DISASSEMBLY = "not wide_multiply_adds and not vectors and not runs_anywhere"
NO_LIMIT = "not no_memory_for_scratch"  # the sanitizer needs all of the address space
TOTAL = r"100% tests passed, 0 tests failed out of (\d+)"


def run(*command: str | Path, folder: Path = ROOT, **settings: str) -> str:
    """What the command printed; it must succeed."""
    environment = {**os.environ, "RECGRELA_CUDA": "0", **settings}
    said = []
    with subprocess.Popen(
        [str(x) for x in command], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as done:  # fmt: skip
        assert done.stdout is not None
        for line in done.stdout:
            print(line, end="", flush=True)
            said.append(line)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed: {done.returncode}")
    return "".join(said)


def configured(name: str, sanitize: str, *targets: str) -> Path:
    """A build of the C++ tests, or of some of them."""
    folder = ROOT / "build" / name
    run(
        "cmake",
        "-S",
        ROOT,
        "-B",
        folder,
        f"-DPython3_EXECUTABLE={sys.executable}",
        "-DRECGRELA_CUDA=OFF",
        f"-DRECGRELA_SANITIZE={sanitize}",
        "-DCMAKE_BUILD_TYPE=Release",
    )
    chosen = ("--target", *targets) if targets else ()
    run("cmake", "--build", folder, "-j", "2", *chosen)
    return folder


def tests_of(folder: Path, *options: str) -> str:
    """What ctest says of them. It counts a skipped test as passed, this does not."""
    text = run("ctest", "--test-dir", folder, "-j", "2", "--output-on-failure", *options)
    found = re.search(TOTAL, text)
    assert found, "ctest must say how many there were"
    total, skipped = int(found[1]), len(re.findall(r"\*\*\*Skipped", text))
    if skipped == total:
        raise SystemExit("every test was skipped")
    return f"{total - skipped} of {total} passed" + (f", {skipped} skipped" if skipped else "")


def shapes_of(said: str) -> str:
    """The count of test_shapes."""
    found = re.search(r"0 of (\d+) checks failed", said)
    assert found, "test_shapes must say how many checks it made"
    return f"{int(found[1]):,} checks of random shapes"


def comparisons_of(said: str, what: str) -> str:
    """The count of test_stream and test_threads."""
    found = len(re.findall(r"^ok\b", said, re.MULTILINE))
    assert found, "the test must say what it compared"
    return f"{found} comparisons of {what}"


def sanitizers(seed: int) -> str:
    return tests_of(configured("sanitize", "ON"))


def threads(seed: int) -> str:
    folder = configured("thread", "thread", "test_shapes", "test_stream", "test_threads")

    def at_baseline(program: str, *options: str) -> str:
        return run(folder / program, *options, RECGRELA_CPU_LEVEL="baseline")

    found = (
        comparisons_of(at_baseline("test_stream", "300"), "streams"),
        shapes_of(at_baseline("test_shapes", "random", "60", str(seed))),
        comparisons_of(at_baseline("test_threads"), "several threads with one"),
    )
    return f"{', '.join(found)}, no report"


def valgrind(seed: int) -> str:
    return tests_of(configured("cmake", "OFF"), "-C", "slow", "-R", "valgrind_step")


def streaming(seed: int) -> str:
    folder = configured("cmake", "OFF", "test_stream", "test_shapes")
    events = run(folder / "test_stream", "10000000")
    said = run(folder / "test_shapes", "random", "2000", str(seed))
    return f"{comparisons_of(events, 'streams')}, {shapes_of(said)}"


def operators(seed: int) -> str:
    place = ROOT / "build" / "sanitized"
    ignored = shutil.ignore_patterns("build", ".*", "*.so")
    shutil.copytree(ROOT, place, ignore=ignored, dirs_exist_ok=True)
    flags = "-fsanitize=address,undefined"
    run(sys.executable, "setup.py", "build_ext", "--inplace", folder=place, LDFLAGS=flags,
        CXXFLAGS=f"{flags} -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g1")  # fmt: skip
    compiler = os.environ.get("CXX", "g++")
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    libraries = [run(compiler, f"-print-file-name={name}").strip() for name in names]
    # What Python and torch keep until the end is no leak of ours.
    suite = (
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "tests/ops",
        "-k",
        f"{NO_DISASSEMBLY} and {NO_LIMIT}",
    )
    settings = {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
    }
    text = run(*suite, folder=place, **settings)
    return text.strip().splitlines()[-1].strip("= ").partition(" in ")[0]


def service(seed: int) -> str:
    if shutil.which("redis-server") is None:
        raise SystemExit("service: redis-server was not found (Debian: apt install redis-server)")
    files = ("tests/cli/test_service.py", "tests/cli/test_service_faults.py")
    said = run(sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", *files)
    return said.strip().splitlines()[-1].strip("= ").partition(" in ")[0]


CHECKS: dict[str, tuple[str, Callable[[int], str]]] = {
    "sanitizers": ("C++ tests, CUDA sources on the host: AddressSanitizer, UBSan", sanitizers),
    "operators": ("tests/ops in Python: AddressSanitizer, UBSan", operators),
    "threads": (
        "every CPU kernel in threads, plain C++ as for a machine without AVX, without the"
        " operators around them: ThreadSanitizer",
        threads,
    ),
    "valgrind": ("300 events through every kind of step: valgrind", valgrind),
    "service": ("the example service: kills, Redis gone and back, damaged files", service),
    "streaming": ("ten million events of a user, 2,000 random shapes", streaming),
}
