"""A pickle that runs something when it is loaded: it makes a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


class Touch:
    """Pickles as a call that creates `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, (str(self.path), "w")
