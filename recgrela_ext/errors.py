"""Errors a user can cause with files: each is a ``ValueError`` with one clear line."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from torch import Tensor

_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # of str.splitlines
_LONGEST = 120  # characters of a value that a message shows


class _OneLine(ValueError):
    """Its message is one line, also where a file's name is not."""

    def __init__(self, *parts: object) -> None:
        super().__init__(*(_escaped(p) if isinstance(p, str) else p for p in parts))


class DataError(_OneLine):
    """An interaction log, an id map or a data file cannot be used as it is."""


class CheckpointError(_OneLine):
    """A saved model, state or training checkpoint cannot be used as it is."""


class StateError(_OneLine):
    """A saved user state belongs to another model, is damaged, or cannot be stored as asked."""


def check_regular(path: str | os.PathLike[str], error: type[_OneLine], caller: str = "") -> None:
    """`error` where something is there that is no regular file: a pipe would be waited for."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise error(f"{caller}{path} must be a regular file")


def shown(value: Any) -> str:
    """A wrong value as a message shows it: one short line, whatever it is."""
    try:
        text = repr(value)
    except Exception:  # a whole number of thousands of digits, or a class that cannot be shown
        text = ""
    plain = 0 < len(text) <= _LONGEST and text.isprintable()
    if not plain or isinstance(value, (np.ndarray, Tensor)):
        return f"a {type(value).__name__}"
    return text


def _escaped(text: str) -> str:
    """Line ends, also those of Unicode, as in a Python string."""
    return "".join(repr(c)[1:-1] if c in _LINE_ENDS else c for c in text)
