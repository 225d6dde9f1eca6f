"""What is added to the logits of items by how recently a row has met them.

Here: the tuple and its checks. `softmax_loss` takes it as it is on a CPU with kernels
(csrc/cpu/recency_bias.h): no list of what the rows have met is made, and rows that follow each
other in a window share the walk over it. Elsewhere, item by item.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import shown
from .checks import check_bias, check_same_device, check_shape, check_tensor
from .recent_items import recent_items
from .reference import LogitBias

_MOST = 254  # values, kMostBuckets of csrc/cpu/softmax_loss.cpp


class RecencyBias(NamedTuple):
    """What is added to some logits ``[T, N]`` before a softmax, by recency.

    Row t has met ``items[begin[t]:end[t]]``. The item met last of them has recency 1, the distinct
    one before it 2, and so on; to the logit of an item of recency r comes ``values[b]``, b the
    number of bounds in ``up_to`` that are below r.
    """

    items: Tensor  # [S] int64, 0 to N - 1: a log
    begin: Tensor  # [T] int64; a span whose end is not above its begin is empty
    end: Tensor  # [T] int64
    up_to: tuple[int, ...]  # ascending from 1 or more, one less than values
    values: Tensor  # [K] in the dtype of the logits

    def listed(self) -> LogitBias:
        """The same item by item, differentiable in the values; memory: see `recent_items`."""
        offsets, items, bucket = self.entries()
        return LogitBias(offsets, items, self.values.index_select(0, bucket))

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """As `recent_items`, with the place in `values` instead of the recency."""
        offsets, items, recency = recent_items(self.items, self.begin, self.end)
        return offsets, items, buckets(recency, self.up_to)


def buckets(recency: Tensor, up_to: tuple[int, ...]) -> Tensor:
    """How many bounds in `up_to` are below each recency, int64 of any shape: of that shape."""
    return torch.bucketize(recency, torch.tensor(up_to, dtype=torch.int64, device=recency.device))


def check_either(op: str, bias: Any, hidden: Tensor) -> None:
    """A LogitBias or a RecencyBias for these rows; values are checked by the kernels, or where the
    plain version runs."""
    if not isinstance(bias, RecencyBias):
        check_bias(op, bias, hidden)
        return
    items, begin, end, up_to, values = bias
    tensors = {"items": items, "begin": begin, "end": end, "values": values}
    for name, x in tensors.items():
        check_tensor(op, f"bias.{name}", x)
        check_same_device(op, f"bias.{name}", x, hidden)
        if x.dim() != 1:
            raise ValueError(f"{op}: bias.{name} must have one dimension, got {list(x.shape)}")
        if name != "values" and x.dtype != torch.int64:
            raise TypeError(f"{op}: bias.{name} must have dtype int64, got {x.dtype}")
    for name in ("begin", "end"):
        check_shape(op, f"bias.{name}", tensors[name], (hidden.shape[0],), "of the rows")
    if not values.is_floating_point():
        raise ValueError(f"{op}: bias.values must have a floating dtype, got {values.dtype}")
    whole = isinstance(up_to, tuple) and all(type(x) is int and x < 2**63 for x in up_to)
    if not whole or any(a >= b for a, b in zip((0, *up_to), up_to, strict=False)):
        raise ValueError(
            f"{op}: bias.up_to must be a tuple of ints that rise from 1 or more, got {shown(up_to)}"
        )
    if values.shape[0] != len(up_to) + 1 or len(up_to) >= _MOST:
        raise ValueError(
            f"{op}: bias.values must be one more than up_to, {_MOST} at most, got "
            f"{values.shape[0]} and {len(up_to)}"
        )
