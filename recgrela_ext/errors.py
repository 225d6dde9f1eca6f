"""Errors a user can cause with files: each is a ``ValueError`` with one clear line."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

_LONGEST = 120  # characters of a value that a message shows


class DataError(ValueError):
    """An interaction log, an id map or a data file cannot be used as it is."""


class CheckpointError(ValueError):
    """A saved model, state or training checkpoint cannot be used as it is."""


class StateError(ValueError):
    """A saved user state belongs to another model, is damaged, or cannot be stored as asked."""


def shown(value: Any) -> str:
    """A wrong value as a message shows it: one short line, whatever it is."""
    try:
        text = repr(value)
    except Exception:  # a whole number of thousands of digits, or a class that cannot be shown
        text = ""
    if not text or len(text) > _LONGEST or "\n" in text or isinstance(value, (np.ndarray, Tensor)):
        return f"a {type(value).__name__}"
    return text
