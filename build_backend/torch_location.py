"""Where the torch to compile against lies; it is never imported."""

from __future__ import annotations

import importlib.util
import re
import site
import sys
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

MINIMUM = (2, 11)


@dataclass(frozen=True)
class Torch:
    root: Path
    version: str

    @property
    def include(self) -> Path:
        return self.root / "include"

    @property
    def lib(self) -> Path:
        return self.root / "lib"


def find_torch() -> Torch | None:
    """The first usable torch among what can be imported and what an isolated build hides."""
    hidden = list(site.getsitepackages())
    if sys.base_prefix in site.PREFIXES:  # a virtual environment does not see the user's packages
        hidden.append(site.getusersitepackages())
    for spec in (importlib.util.find_spec("torch"), PathFinder.find_spec("torch", hidden)):
        if spec is not None and spec.origin is not None:
            torch = _read(Path(spec.origin).parent)
            if torch is not None:
                return torch
    return None


def _read(root: Path) -> Torch | None:
    """`root` as a Torch when it is recent enough and has headers and libraries."""
    try:
        text = (root / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"__version__\s*=\s*['\"]((\d+)\.(\d+)[^'\"]*)['\"]", text)
    if match is None or (int(match[2]), int(match[3])) < MINIMUM:
        return None
    torch = Torch(root, match[1])
    complete = (torch.include / "torch/csrc/stable/library.h").is_file() and torch.lib.is_dir()
    return torch if complete else None
