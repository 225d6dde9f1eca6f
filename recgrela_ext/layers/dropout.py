"""Dropout whose random bits do not cost more than the layer it follows.

On a CPU `F.dropout` draws one float per element, a sixth of a training step. Sixteen bits decide as
well: p is rounded to 1/65536, and the scale 1 / (1 - p) belongs to the rounded one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LEVELS = 1 << 16
_LOWEST = torch.iinfo(torch.int64).min


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Each element is 0 with probability p, else scaled by 1 / (1 - p); x itself in evaluation."""
    if not training or p == 0.0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    dropped = min(round(p * _LEVELS), _LEVELS - 1)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(_LOWEST, None)
    kept = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - _LEVELS // 2
    # x * kept * scale in one pass, and so is its gradient
    out: Tensor = torch.ops.aten.native_dropout_backward(x, kept, _LEVELS / (_LEVELS - dropped))
    return out
