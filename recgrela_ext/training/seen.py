"""Softmax losses that treat a user's already seen items differently from the rest.

    unseen    -log softmax over the target and the items the user has not seen before it

Ranking with seen items left out asks only for that: what the full softmax spends on pushing seen
items down is spent on the others. It is an `adjustment` of `softmax_loss` (model/losses.py).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from recgrela_ext.training.windows import Batch

NEVER = np.iinfo(np.int32).max


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
