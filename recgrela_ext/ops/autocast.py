"""How the operators behave under torch.autocast: rows are cast, states and parameters are not."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def cast_rows(*rows: Tensor | None) -> tuple[Tensor | None, ...]:
    """The rows in the autocast dtype of their device, unchanged when autocast is off there.

    float64 rows are left alone, as torch's own operators do.
    """
    first = rows[0]
    if not isinstance(first, Tensor) or not _enabled(first):
        return rows
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(
        x.to(dtype)
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        else x
        for x in rows
    )


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """For the reference: autocast off on the device of ``x``, or its sums would be cast as well."""
    return torch.autocast(x.device.type, enabled=False) if _enabled(x) else nullcontext()


def _enabled(x: Tensor) -> bool:
    # torch.is_autocast_enabled raises for the meta device.
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
