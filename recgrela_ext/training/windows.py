"""Which items a training step reads: windows of next-item pairs, or prefixes with one target.

A user's n items x_0 .. x_{n-1} give n - 1 pairs (x_i, x_{i+1}). A plan of one epoch holds every
pair once, as pieces of the item log (end, width, num_loss): a piece reads items[end-width : end]
and has the targets items[end-num_loss+1 : end+1]; what stands before is context. Nothing is copied
before its step comes. A plan depends on (seed, epoch) alone, so a restart finds the step again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from recgrela_ext.errors import shown

_BUCKET_STEPS = 64  # steps whose windows are sorted by length together, when batches are padded


@dataclass(frozen=True)
class Batch:
    """The windows of one step, back to back.

    Args:
        items: int64 `[T]`, input items.
        targets: int64 `[T]`, next items; `padding_idx` where there is no loss.
        cu_seqlens: int64 `[B + 1]`, bounds of the windows in `items`.
        num_targets: positions with a loss.
        padding_idx: the padding item.
        start: int64 `[B]`, where in the log each window begins; empty for made-up batches.
    """

    items: np.ndarray
    targets: np.ndarray
    cu_seqlens: np.ndarray
    num_targets: int
    padding_idx: int = 0
    start: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))

    def packed(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """`items [T]`, `cu_seqlens [B + 1]` and `targets [T]` as int64 tensors."""
        arrays = (self.items, self.cu_seqlens, self.targets)
        items, cu_seqlens, targets = (
            torch.from_numpy(a).to(device, non_blocking=True) for a in arrays
        )
        return items, cu_seqlens, targets

    def padded(
        self, device: torch.device, length: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`item_seq [B, L]` right-padded, `item_seq_len [B]` and `targets [B, L]`, int64.

        L is `length`, or that of the longest window where it is longer or `length` is None.
        """
        lengths = np.diff(self.cu_seqlens)
        shape = (len(lengths), max(length or 0, int(lengths.max(initial=0))))
        row = np.repeat(np.arange(len(lengths)), lengths)
        column = np.arange(len(self.items)) - np.repeat(self.cu_seqlens[:-1], lengths)
        tensors = []
        for values in (self.items, self.targets):
            padded = np.full(shape, self.padding_idx, dtype=np.int64)
            padded[row, column] = values
            tensors.append(torch.from_numpy(padded).to(device, non_blocking=True))
        return tensors[0], torch.from_numpy(lengths).to(device), tensors[1]

    def split(self, parts: int) -> list[Batch]:
        """Up to `parts` batches of neighbouring windows, of about equal numbers of items."""
        edges = np.linspace(0, len(self.items), parts + 1)
        cuts = np.unique(np.searchsorted(self.cu_seqlens, edges))
        pieces = []
        for first, last in pairwise(cuts):
            begin, end = self.cu_seqlens[first], self.cu_seqlens[last]
            targets = self.targets[begin:end]
            pieces.append(
                Batch(
                    self.items[begin:end],
                    targets,
                    self.cu_seqlens[first : last + 1] - begin,
                    int(np.count_nonzero(targets != self.padding_idx)),
                    self.padding_idx,
                    self.start[first:last],
                )
            )
        return pieces


class EpochPlan:
    """The steps of one epoch in order; `plan[i]` builds the batch of step i."""

    def __init__(
        self,
        items: np.ndarray,
        end: np.ndarray,
        width: np.ndarray,
        num_loss: np.ndarray,
        bounds: np.ndarray,
        padding_idx: int,
    ) -> None:
        self._items = items
        self._end, self._width, self._num_loss = end, width, num_loss
        self._bounds = bounds
        self._padding_idx = padding_idx

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __iter__(self) -> Iterator[Batch]:
        return (self[step] for step in range(len(self)))

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < len(self):
            raise IndexError(f"EpochPlan: step must be below {len(self)}, got {step}")
        pieces = slice(self._bounds[step], self._bounds[step + 1])
        end = self._end[pieces].astype(np.int64)
        width = self._width[pieces].astype(np.int64)
        context = width - self._num_loss[pieces]
        cu_seqlens = np.zeros(len(end) + 1, dtype=np.int64)
        np.cumsum(width, out=cu_seqlens[1:])
        place = np.arange(cu_seqlens[-1])  # place in the batch, then in the log
        has_loss = place - np.repeat(cu_seqlens[:-1] + context, width) >= 0
        position = place + np.repeat(end - cu_seqlens[1:], width)
        targets = np.full(len(place), self._padding_idx, dtype=np.int64)
        targets[has_loss] = self._items[position[has_loss] + 1]
        return Batch(
            self._items[position].astype(np.int64),
            targets,
            cu_seqlens,
            int(has_loss.sum()),
            self._padding_idx,
            end - width,
        )


class TrainingWindows:
    """Plans of epochs over the histories of all users.

    Args:
        items: int32 `[N]`, all histories back to back.
        offsets: int64 `[U + 1]`, bounds of the users.
        max_seq_len: longest window (of targets), or prefix; None: whole histories.
        targets_per_step: about so many targets a step; exactly, for prefixes.
        context: items without a loss that a window reads before its first pair, at most.
        objective: "dense" (every position of a window predicts the next item; the windows of a
            long history start at a phase drawn anew each epoch) or "prefix" (as published: one
            target per sequence, read from its last `max_seq_len` items).
        bucket: batches hold windows of similar length, for padded batches.
        seed: a plan depends on seed and epoch alone.

    Raises:
        ValueError: an argument is out of range, or no user has two items.
    """

    def __init__(
        self,
        items: np.ndarray,
        offsets: np.ndarray,
        *,
        max_seq_len: int | None = 200,
        targets_per_step: int = 3000,
        context: int = 0,
        objective: str = "dense",
        bucket: bool = False,
        seed: int = 0,
        padding_idx: int = 0,
    ) -> None:
        if objective not in ("dense", "prefix"):
            raise ValueError(
                f"TrainingWindows: objective must be dense or prefix, got {shown(objective)}"
            )
        for name, value, low in (
            ("max_seq_len", max_seq_len, 1),
            ("targets_per_step", targets_per_step, 1),
            ("context", context, 0),
        ):
            if value is not None and value < low:
                raise ValueError(f"TrainingWindows: {name} must be at least {low}, got {value}")
        self.items = items
        self.offsets = np.asarray(offsets, dtype=np.int64)
        self.targets_per_step = targets_per_step
        self.context = context
        self.objective = objective
        self.bucket = bucket
        self.seed = seed
        self.padding_idx = padding_idx
        pairs = np.diff(self.offsets) - 1
        self._users = np.flatnonzero(pairs > 0)
        self._pairs = pairs[self._users]
        self.num_targets = int(self._pairs.sum())
        if not self.num_targets:
            raise ValueError("TrainingWindows: a user must have at least two items, none has")
        self.max_seq_len = int(self._pairs.max()) if max_seq_len is None else max_seq_len
        self._index_dtype = np.int32 if len(items) < 2**31 else np.int64

    def epoch(self, epoch: int) -> EpochPlan:
        """The plan of epoch `epoch` (from 0): every interaction but each user's first, once."""
        rng = np.random.default_rng([self.seed, epoch])
        if self.objective == "prefix":
            end, width = self._prefixes()
            num_loss = np.broadcast_to(np.int32(1), end.shape)
        else:
            end, width, num_loss = self._windows(rng)
        order = rng.permutation(len(end)).astype(self._index_dtype)
        if self.bucket:
            block = np.cumsum(num_loss[order], dtype=np.int64)
            block //= _BUCKET_STEPS * self.targets_per_step
            order = order[np.lexsort((width[order], block))]
        step = (np.cumsum(num_loss[order], dtype=np.int64) - 1) // self.targets_per_step
        bounds = np.concatenate(([0], np.flatnonzero(np.diff(step)) + 1, [len(step)]))
        if self.bucket:
            order, bounds = _shuffle_steps(order, bounds, rng)
        return EpochPlan(
            self.items, end[order], width[order], num_loss[order], bounds, self.padding_idx
        )

    def _windows(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        size, pairs = self.max_seq_len, self._pairs
        phase = rng.integers(1, size + 1, len(pairs))
        first = np.where(pairs <= size, pairs, phase)  # pairs of a user's first window
        count = 1 + -(-(pairs - first) // size)
        user = np.repeat(np.arange(len(pairs)), count)
        number = np.arange(len(user)) - np.repeat(np.cumsum(count) - count, count)
        high = np.minimum(first[user] + number * size, pairs[user])
        low = np.where(number == 0, 0, first[user] + (number - 1) * size)
        num_loss = (high - low).astype(np.int32)
        width = (num_loss + np.minimum(self.context, low)).astype(np.int32)
        end = (self.offsets[self._users[user]] + high).astype(self._index_dtype)
        return end, width, num_loss

    def _prefixes(self) -> tuple[np.ndarray, np.ndarray]:
        bound = np.cumsum(self._pairs)
        length = np.arange(1, self.num_targets + 1, dtype=self._index_dtype)
        length -= np.repeat((bound - self._pairs).astype(self._index_dtype), self._pairs)
        start = self.offsets[self._users].astype(self._index_dtype)
        end = np.repeat(start, self._pairs) + length
        return end, np.minimum(length, self.max_seq_len).astype(np.int32)


def _shuffle_steps(
    order: np.ndarray, bounds: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    steps = rng.permutation(len(bounds) - 1)
    size = np.diff(bounds)[steps]
    moved = np.concatenate(([0], np.cumsum(size)))
    place = np.arange(len(order)) + np.repeat(bounds[:-1][steps] - moved[:-1], size)
    return order[place], moved
