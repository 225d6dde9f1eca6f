"""The library must load beside any torch >= 2.11 and without Python: its symbols say whether."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import recgrela_ext

# Torch's stable ABI, and what every shared object may lack.
STABLE_PREFIXES = ("aoti_torch_", "torch_")
START_UP = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
SYSTEM_VERSIONS = ("@GLIBC_", "@GLIBCXX_", "@CXXABI_", "@GCC_")


@pytest.fixture(scope="module")
def library() -> Path:
    path = Path(recgrela_ext.__file__).with_name("librecgrela.so")
    if not path.is_file():
        pytest.skip("librecgrela.so was not built")
    return path


def nm(library: Path, *arguments: str) -> list[str]:
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) was not found")
    command = ["nm", "--dynamic", "--format=posix", *arguments, str(library)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return [line.split()[0] for line in answer.stdout.splitlines()]


def test_only_the_stable_abi_is_needed(library: Path) -> None:
    needed = nm(library, "--undefined-only")
    foreign = [
        name
        for name in needed
        if not name.startswith(STABLE_PREFIXES)
        and name not in START_UP
        and not any(version in name for version in SYSTEM_VERSIONS)
    ]
    assert foreign == []
    assert any(name.startswith(STABLE_PREFIXES) for name in needed)


def test_no_operator_code_is_exported(library: Path) -> None:
    """Hidden symbols cannot clash with another extension's, nor with torch's CUDA runtime.

    Plain C functions named recgrela_* are meant to be called from Python.
    """
    exported = [name for name in nm(library, "--defined-only") if not name.startswith("recgrela_")]
    assert [name for name in exported if "recgrela" in name or name.startswith("cuda")] == []
