"""Softmax losses that treat a user's already seen items differently from the rest.

    unseen    -log softmax over the target and the items the user has not seen before it

Ranking with seen items left out asks only for that: what the full softmax spends on pushing seen
items down is spent on the others. The rows are taken in chunks as in model/losses.py; what changes
the logits of a chunk is an `Adjustment`.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recgrela_ext.model.losses import default_chunk_rows
from recgrela_ext.training.windows import Batch

NEVER = np.iinfo(np.int32).max
UNDERFLOW = 1e-30  # below it -log(p) of a float32 probability loses digits


class Adjustment(Protocol):
    """What is done to logits before the softmax."""

    parameter: Tensor | None  # what it learns, if anything

    def apply(self, logits: Tensor, rows: Tensor, targets: Tensor) -> None:
        """Changes logits [c, n_items] of the positions `rows` [c] with `targets` [c], in place."""

    def gradient(self, d_logits: Tensor, rows: Tensor) -> Tensor | None:
        """Of the parameter, from that of the adjusted logits."""


def adjusted_softmax_loss(
    hidden: Tensor, table: Tensor, targets: Tensor, adjustment: Adjustment, ignore_index: int = 0
) -> Tensor:
    """Mean cross-entropy in nats over adjusted logits; the padding item is no class.

    Args:
        hidden: `[T, hidden_size]`.
        table: `[n_items, hidden_size]`.
        targets: `[T]` int64; rows with `ignore_index` are not computed and get a zero gradient.
        adjustment: applied to the logits of every chunk.
        ignore_index: the padding item.

    Returns:
        Scalar in float32 (float64 for float64 input); 0 when no row has a target.
    """
    rows = (targets != ignore_index).nonzero().squeeze(1)
    loss: Tensor = _AdjustedSoftmax.apply(
        hidden, table, adjustment.parameter, targets, rows, adjustment, ignore_index
    )
    return loss


class _AdjustedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        table: Tensor,
        parameter: Tensor | None,
        targets: Tensor,
        rows: Tensor,
        adjustment: Adjustment,
        ignore_index: int,
    ) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, table.dtype), torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            wide = table.to(dtype)
            grad_hidden = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            grad_table = torch.zeros_like(wide)
            grad_parameter = None if parameter is None else torch.zeros_like(parameter)
            total = wide.new_zeros((), dtype=torch.float64)
            share = 1.0 / max(rows.numel(), 1)
            size = default_chunk_rows(len(table), hidden.device.type)
            logits = wide.new_empty(min(size, rows.numel()), len(table))
            for index in rows.split(size):
                h = hidden.index_select(0, index).to(dtype)
                y = targets.index_select(0, index)
                p = torch.mm(h, wide.t(), out=logits[: len(index)])
                adjustment.apply(p, index, y)
                p[:, ignore_index] = -torch.inf
                torch.softmax(p, 1, out=p)
                picked = p.gather(1, y[:, None])
                small = (picked.squeeze(1) < UNDERFLOW).nonzero().squeeze(1)
                if small.numel():
                    picked[small] = 1.0
                    again = h[small] @ wide.t()
                    adjustment.apply(again, index[small], y[small])
                    again[:, ignore_index] = -torch.inf
                    total += F.cross_entropy(again, y[small], reduction="sum")
                total -= picked.log().sum(dtype=torch.float64)
                p.scatter_add_(1, y[:, None], p.new_full((len(y), 1), -1.0))
                grad_hidden.index_copy_(0, index, (p @ wide).mul_(share))
                grad_table.addmm_(p.t(), h)
                if grad_parameter is not None:
                    found = adjustment.gradient(p, index)
                    assert found is not None
                    grad_parameter += found
            grad_table.mul_(share)
            if grad_parameter is not None:
                grad_parameter.mul_(share)
        ctx.save_for_backward(grad_hidden, grad_table, grad_parameter)
        ctx.dtypes = hidden.dtype, table.dtype
        return (total * share).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_table, grad_parameter = ctx.saved_tensors
        return (
            (grad_hidden * grad).to(ctx.dtypes[0]),
            (grad_table * grad).to(ctx.dtypes[1]),
            None if grad_parameter is None else grad_parameter * grad,
            *([None] * 4),
        )


class LeaveOutSeen:
    """Items of the user's history up to a position are no classes there; its target always is.

    Args:
        first: int32 `[B, n_items]`, the place in its window at which each item was first seen:
            below 0 before the window, `NEVER` for an item that was not.
        window, place: `[T]`, window and place in it of every position.
    """

    parameter: Tensor | None = None

    def __init__(self, first: Tensor, window: Tensor, place: Tensor) -> None:
        self.first, self.window, self.place = first, window, place

    def apply(self, logits: Tensor, rows: Tensor, targets: Tensor) -> None:
        place = self.place[rows].to(torch.int32)[:, None]
        seen = torch.empty(logits.shape, dtype=torch.bool, device=logits.device)
        windows, counts = torch.unique_consecutive(self.window[rows], return_counts=True)
        start = 0
        for window, count in zip(windows.tolist(), counts.tolist(), strict=True):
            part = slice(start, start + count)
            torch.le(self.first[window], place[part], out=seen[part])
            start += count
        seen.scatter_(1, targets[:, None], False)
        logits.masked_fill_(seen, -torch.inf)

    def gradient(self, d_logits: Tensor, rows: Tensor) -> None:
        return None


def first_places(batch: Batch, items: np.ndarray, offsets: np.ndarray, n_items: int) -> np.ndarray:
    """`first` of `LeaveOutSeen` for the windows of a batch of the log `items`, `offsets`.

    The whole history counts, also what lies before the window.
    """
    lengths = np.diff(batch.cu_seqlens)
    first = np.full((len(lengths), n_items), NEVER, dtype=np.int32)
    user = np.searchsorted(offsets, batch.start, side="right") - 1
    for row, begin, start, length in zip(first, offsets[user], batch.start, lengths, strict=True):
        place = np.arange(begin, start + length) - start
        row[items[begin : start + length][::-1]] = place[::-1]  # the earliest is written last
    return first
