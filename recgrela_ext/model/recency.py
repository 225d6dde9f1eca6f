"""Exact least-recently-used order of slots, a batch at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Slots = NDArray[np.int64]

_FREE = np.iinfo(np.int64).max
_QUEUE = 4096  # oldest slots sorted at once


class Recency:
    """Which of `capacity` slots were used longest ago.

    A slot's time of use only grows, so a sorted queue of the oldest slots stays right: what was
    used since is skipped, and nothing outside the queue is older than what is left in it. Finding
    the oldest therefore costs one pass over all slots per `_QUEUE` of them.
    """

    def __init__(self, capacity: int) -> None:
        self.used = np.full(capacity, _FREE, dtype=np.int64)
        self._clock = 0
        self._queue = np.empty(0, dtype=np.int64)
        self._times = np.empty(0, dtype=np.int64)

    def touch(self, slots: Slots) -> None:
        """The slots were used now, in this order."""
        self.used[slots] = np.arange(self._clock, self._clock + len(slots))
        self._clock += len(slots)

    def forget(self, slots: Slots) -> None:
        """The slots are free."""
        self.used[slots] = _FREE

    def oldest(self, count: int) -> Slots:
        """The `count` slots used longest ago, oldest first; at most as many as are in use."""
        valid = self.used[self._queue] == self._times
        self._queue, self._times = self._queue[valid], self._times[valid]
        if len(self._queue) < count:
            self._fill(count)
        return self._queue[:count].copy()

    def order(self) -> Slots:
        """All slots in use, oldest first."""
        slots = np.flatnonzero(self.used != _FREE)
        return slots[np.argsort(self.used[slots])]

    def _fill(self, count: int) -> None:
        wanted = min(max(count, _QUEUE), len(self.used))
        oldest = np.argpartition(self.used, wanted - 1)[:wanted] if wanted else self._queue
        times = self.used[oldest]
        oldest, times = oldest[times != _FREE], times[times != _FREE]
        order = np.argsort(times)
        self._queue, self._times = oldest[order], times[order]
