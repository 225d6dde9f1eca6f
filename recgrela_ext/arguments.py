"""What callers pass, before it is used: paths, arrays, whole numbers, devices. A wrong one is
refused in one line that names it."""

from __future__ import annotations

import os
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import shown


def as_path(path: Any, caller: str, name: str = "path") -> Path:
    """A path a system can have; TypeError or ValueError for another."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{caller}: {name} must be a path, got {shown(path)}")
    try:
        encoded = os.fsencode(path)
        possible = bool(encoded) and b"\0" not in encoded
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise ValueError(f"{caller}: {name} must be a path, got {shown(os.fspath(path))}")
    return Path(path)


def as_array(values: Any, caller: str, name: str, error: type[Exception] = TypeError) -> np.ndarray:
    """A list, an array or a tensor on any device as an array."""
    try:
        if isinstance(values, Tensor):
            return values.detach().cpu().numpy()
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError):  # lists of several lengths; nested, meta, float8
        raise error(
            f"{caller}: {name} must be a plain list, array or tensor, got {shown(values)}"
        ) from None
    if np.ma.is_masked(values):
        raise error(f"{caller}: {name} must have no masked values, got {shown(values)}")
    return array


def check_same_items(model: Any, id_map: Any, caller: str) -> None:
    """ValueError where the model's rows are known to be of other items than those of the data."""
    own = getattr(model, "id_map", None)
    if own is None or own is id_map:
        return
    mine, given = own.item_ids, id_map.item_ids
    if mine.dtype.kind != given.dtype.kind or not np.array_equal(mine, given):
        raise ValueError(
            f"{caller}: model must have been made for the items of the data, got one whose id map "
            "has others (`id_map.encode_items` gives its rows)"
        )


def is_one_of(value: Any, choices: Container[Any]) -> bool:
    """`value in choices`, and no for lists and arrays, which cannot be looked for."""
    try:
        return value in choices
    except (TypeError, ValueError, RuntimeError):
        return False


def is_whole(value: Any) -> bool:
    """An int of Python or NumPy; True and False are none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def check_whole(value: Any, caller: str, name: str, low: int = 1) -> None:
    """TypeError for what is no int, ValueError for one below `low` or from 2**31 on."""
    if not is_whole(value):
        raise TypeError(f"{caller}: {name} must be an int, got {shown(value)}")
    if value < low:
        raise ValueError(f"{caller}: {name} must be at least {low}, got {shown(value)}")
    if value >= 2**31:
        raise ValueError(f"{caller}: {name} must be below 2**31, got {shown(value)}")


def usable_device(device: Any, caller: str, name: str = "device") -> torch.device:
    """The device; ValueError where this torch or this machine has none of that name."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        reason = "" if isinstance(error, TypeError) else f" ({str(error).splitlines()[0]})"
        raise ValueError(f"{caller}: {name} must be usable, got {shown(device)}{reason}") from None
