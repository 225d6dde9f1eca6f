"""How the operators behave under torch.autocast: rows are cast, states and parameters are not."""

from __future__ import annotations

import torch
from torch import Tensor


def cast_rows(*rows: Tensor | None) -> tuple[Tensor | None, ...]:
    """The rows in the autocast dtype of their device, unchanged when autocast is off there.

    float64 rows are left alone, as torch's own operators do.
    """
    first = rows[0]
    if not isinstance(first, Tensor) or first.device.type == "meta":
        return rows
    if not torch.is_autocast_enabled(first.device.type):
        return rows
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(
        x.to(dtype)
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        else x
        for x in rows
    )
