"""Dropout in one pass with what stands around it, where there is a kernel for that.

On a CPU `F.dropout` draws one float per element, a sixth of a training step, and keeps a mask.
`ops.activation_dropout` takes one number from torch's default generator per call instead.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _library, ops
from ..ops.checks import values_are_there

_LOWEST = torch.iinfo(torch.int64).min


def dropout(
    x: Tensor, p: float, training: bool, residual: Tensor | None = None, gelu: bool = False
) -> Tensor:
    """residual + dropout(act(x)), act GELU or the identity; no dropout in evaluation.

    Each element is 0 with probability p, else scaled by 1 / (1 - p). Compiled and exported
    graphs, other devices and an installation without kernels use torch's own dropout.
    """
    if training and p > 0.0 and has_kernel(x):
        seed = draw_seed()
        if residual is None or residual.dtype == x.dtype:
            return ops.activation_dropout(x, residual, gelu, p, seed)
        x = ops.activation_dropout(x, None, gelu, p, seed)
    else:
        x = F.gelu(x) if gelu else x
        x = F.dropout(x, p) if training and p > 0.0 else x
    return x if residual is None else residual + x


def draw_seed() -> int:
    """One number of torch's default generator."""
    return int(torch.empty((), dtype=torch.int64).random_(_LOWEST, None))


def has_kernel(x: Tensor) -> bool:
    """Whether an operator that draws numbers may run on x now."""
    # In a graph a number drawn now would become a constant, or cannot be drawn.
    return values_are_there(x) and _library.has_kernels(x.device)
