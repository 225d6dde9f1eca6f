"""The fuzz targets by name.

A target is made with an empty folder and called with bytes: it returns what kind of input it
accepted, REFUSED where none, or an exception says what it found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path

CORPUS = Path(__file__).with_name("corpus")
Target = Callable[[bytes], str]

# name -> module, class; imported when asked for: each needs other packages
TARGETS = {
    "readers": ("readers", "Readers"),
    "states": ("saved", "States"),
    "models": ("saved", "Models"),
    "stores": ("saved", "Stores"),
    "checkpoints": ("saved", "Checkpoints"),
    "resumes": ("resumed", "Resumes"),
    "published": ("published", "Published"),
    "frames": ("frames", "Frames"),
    "requests": ("requests", "Requests"),
    "operators": ("operators", "Operators"),
}


def make(name: str, folder: Path) -> Target:
    module, kind = TARGETS[name]
    target: Target = getattr(import_module(f"tests.fuzz.{module}"), kind)(folder)
    return target


def corpus(name: str) -> list[bytes]:
    """Inputs kept for a target: every case that was found, while it shows something, and those
    that coverage-guided runs grew."""
    found = sorted(path for path in (CORPUS / name).glob("*") if path.is_file())
    return [*(path.read_bytes() for path in found), *grown(name)]


def grown(name: str) -> list[bytes]:
    """Inputs that reach different parts of the code."""
    path = CORPUS / f"{name}.hex"
    return [bytes.fromhex(x) for x in path.read_text("ascii").splitlines()] if path.exists() else []


def keep_grown(name: str, inputs: Iterable[bytes]) -> int:
    """Adds to `grown`; how many are new."""
    before = set(grown(name))
    after = sorted({*before, *inputs} - {b""}, key=lambda data: (len(data), data))
    path = CORPUS / f"{name}.hex"
    path.write_text("".join(f"{data.hex()}\n" for data in after), "ascii")
    return len(after) - len(before)


def case_name(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
