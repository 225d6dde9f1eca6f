"""A wheel per Python, loaded on every torch, the operator suite run there.

    make matrix                                     # every Python found, every torch of TORCHES
    python -m tests.matrix --python 3.11 --torch 2.13.0     # one cell; needs uv

Each cell is an environment of its own under build/matrix, removed afterwards; uv keeps what it
unpacked in build/matrix/cache and links it, since a torch with CUDA is gigabytes. What the index
does not have is left out, and that is said. Results: tests/trust/results/matrix.json. Also said:
the newest symbol of glibc and of libstdc++ the library asks for, which is the oldest system it
loads on, and each symbol of torch that it asks for and this torch does not have.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from tests.trust import records

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "matrix"
OUT = records.FOLDER / "matrix.json"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TORCHES = ("2.11.0", "2.13.0", "newest")


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], check=True, text=True, **options)


def find_python(version: str) -> str | None:
    """A `python3.x` that starts, also one of pyenv."""
    places = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"))
    for name in (*map(str, places), shutil.which(f"python{version}")):
        if name and subprocess.run([name, "-c", ""], capture_output=True).returncode == 0:
            return name
    return None


def requirement(torch: str) -> str:
    return "torch" if torch == "newest" else f"torch=={torch}"


def uv(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    tool = ROOT / "build/tools/bin/uv"
    program = str(tool) if tool.exists() else shutil.which("uv")
    if program is None:
        raise SystemExit("tests.matrix: needs uv: `make matrix` installs it, or `pip install uv`")
    settings = {**os.environ, "UV_CACHE_DIR": str(WORK / "cache"), "RECGRELA_CUDA": "0"}
    try:
        return run(program, *arguments, env=settings, capture_output=True)
    except subprocess.CalledProcessError as error:
        print(error.stdout[-2000:], error.stderr[-2000:], sep="\n", flush=True)
        raise


def environment(python: str, name: str) -> Path:
    """An empty virtual environment; its python."""
    folder = WORK / name
    shutil.rmtree(folder, ignore_errors=True)
    uv("venv", "--python", python, folder)
    return folder / "bin" / "python"


def build_wheel(python: Path, version: str) -> Path:
    """For the Python of `python`, whose environment has a torch; kept for this commit."""
    folder = WORK / f"wheel-{version}-{records.commit()}"
    if "dirty" not in folder.name and (built := list(folder.glob("*.whl"))):
        return built[0]
    uv("pip", "install", "--python", python, "setuptools>=77", "pybind11>=2.13", "ninja>=1.11")
    source = WORK / "source"
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns("build", ".*", "*.so"))
    uv("build", "--wheel", "--no-build-isolation", "--python", python, "-o", folder, source)
    return next(folder.glob("*.whl"))


def libraries(wheel: Path) -> list[Path]:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".so")]
        return [Path(archive.extract(name, WORK / "unpacked")) for name in names]


def missing_symbols(python: Path, wheel: Path) -> list[str]:
    """Symbols of torch that the wheel asks for and the torch of `python` does not have."""
    place = "import os, torch; print(os.path.join(torch.__path__[0], 'lib'))"
    folder = Path(run(python, "-c", place, capture_output=True).stdout.strip())
    there: set[str] = set()
    for name in ("libtorch_cpu.so", "libtorch.so", "libc10.so"):
        listed = run("nm", "-D", "--defined-only", folder / name, capture_output=True).stdout
        there |= {line.split()[-1].partition("@")[0] for line in listed.splitlines()}
    asked: set[str] = set()
    for library in libraries(wheel):
        listed = run("nm", "-D", "--undefined-only", library, capture_output=True).stdout
        asked |= {line.split()[-1] for line in listed.splitlines()}
    ours = {name for name in asked if name.startswith(("aoti_torch_", "torch_"))}
    assert ours, "the library must ask for some"
    return sorted(ours - there)


def newest_symbols(wheel: Path) -> dict[str, str]:
    """By kind, the newest version the libraries of a wheel ask for."""
    newest: dict[str, tuple[int, ...]] = {}
    for path in libraries(wheel):
        listed = run("objdump", "-T", path, capture_output=True).stdout
        for kind, version in re.findall(r"\b(GLIBC|GLIBCXX|CXXABI)_([0-9.]+)\b", listed):
            numbers = tuple(map(int, version.split(".")))
            newest[kind] = max(newest.get(kind, ()), numbers)
    return {kind: ".".join(map(str, numbers)) for kind, numbers in sorted(newest.items())}


def cell(python: Path, wheel: Path) -> dict[str, Any]:
    """The operator suite of the checkout on the installed wheel. Left out: the one test that runs
    parts of it again for each instruction set, which has no torch's or Python's share in it."""
    uv("pip", "install", "--python", python, wheel, "pytest", "hypothesis", "pandas", "pyarrow")
    told = "import torch; print(torch.__version__)"
    version = run(python, "-c", told, capture_output=True).stdout.strip()
    # Tests import `tests`, and the package must not come from the checkout.
    place = WORK / "suite"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(ROOT / "tests", place / "tests")
    shutil.copy(ROOT / "pyproject.toml", place)
    suite = subprocess.run(
        [str(python), "-m", "pytest", "-q", "tests/ops", "-k", "not every_level"],
        cwd=place, capture_output=True, text=True,
    )  # fmt: skip
    last = (suite.stdout.strip().splitlines() or [suite.stderr[-200:]])[-1]
    passed = suite.returncode == 0
    if not passed:
        print(suite.stdout[-3000:], suite.stderr[-1000:], sep="\n", flush=True)
    return {
        "torch": version,
        "passed": passed,
        "date": records.today(),
        "summary": last.strip("= "),
        "symbols_missing": missing_symbols(python, wheel),
        "commit": records.commit(),
    }


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    several = "may come several times (default: {})"
    parser.add_argument("--python", action="append", metavar="VERSION",
                        help=f"such as 3.11; {several.format(', '.join(PYTHONS))}")  # fmt: skip
    parser.add_argument("--torch", action="append", metavar="VERSION",
                        help=f"such as 2.13.0; {several.format(', '.join(TORCHES))}")  # fmt: skip
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    record = records.read(OUT) if OUT.exists() else {"kind": "matrix", "cells": {}}
    bad = 0
    for version in options.python or PYTHONS:
        base = find_python(version)
        if base is None:
            print(f"Python {version} was not found: left out")
            continue
        wheel: Path | None = None
        for torch in options.torch or TORCHES:
            python = environment(base, f"{version}-{torch}")
            try:
                uv("pip", "install", "--python", python, requirement(torch))
            except subprocess.CalledProcessError:
                print(f"Python {version}, torch {torch}: cannot be installed here, left out")
                continue
            if wheel is None:  # built once a Python, against the first torch
                wheel = build_wheel(python, version)
                if torch == TORCHES[0]:  # newer headers ask for newer symbols
                    record["symbols"] = newest_symbols(wheel)
                    record["versions"] = {"commit": records.commit(), "date": records.today()}
            found = cell(python, wheel)
            record["cells"][f"{version} {torch}"] = found
            records.write(OUT, record)
            print(f"Python {version}, torch {found['torch']}: {found['summary']}", flush=True)
            bad += not found["passed"] or bool(found["symbols_missing"])
            shutil.rmtree(WORK / f"{version}-{torch}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
