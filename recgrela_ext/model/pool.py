"""A preallocated table of user rows in one storage format, found by user id."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import blob as storage
from .recency import Recency
from .state import StateLayout

Users = NDArray[np.int64]


class Rows(NamedTuple):
    """Users as they rest: sums in the pool's format."""

    data: Tensor  # [n, F]
    scale: Tensor | None  # [n, F / head_dim] float16, with int8 alone
    position: Tensor  # [n] int64
    hidden: Tensor  # [n, hidden_size]

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self if t is not None)


class Pool:
    """`capacity` rows in `dtype`; which user holds which row, and who was used longest ago.

    The row is a fixed number of bytes. The index beside it is a dict, some 100 bytes per user.
    """

    def __init__(
        self,
        capacity: int,
        layout: StateLayout,
        hidden_size: int,
        dtype: torch.dtype,
        in_use: torch.dtype,
        device: torch.device,
    ) -> None:
        self.capacity = capacity
        self.dtype, self.in_use = dtype, in_use
        self.group = layout.head_dim
        scales = layout.row_size // self.group
        int8 = dtype == torch.int8
        hidden = storage.hidden_dtype(dtype, in_use)
        with torch.inference_mode(False):  # else nothing could be written outside of it
            self.rows = Rows(
                torch.zeros(capacity, layout.row_size, dtype=dtype, device=device),
                torch.zeros(capacity, scales, dtype=torch.float16, device=device) if int8 else None,
                torch.zeros(capacity, dtype=torch.int64, device=device),
                torch.zeros(capacity, hidden_size, dtype=hidden, device=device),
            )
        self.owner = np.zeros(capacity, dtype=np.int64)  # user of each slot in use
        self.recency = Recency(capacity)
        self._slots: dict[int, int] = {}
        self._free: list[int] = []
        self.taken = 0  # slots from here on were never used

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def free(self) -> int:
        return self.capacity - len(self._slots)

    def users(self) -> Users:
        """Ids of all users, in no particular order."""
        return np.fromiter(self._slots, dtype=np.int64, count=len(self._slots))

    def find(self, users: Users) -> Users:
        """The slot of each user, -1 for one who is not here."""
        found = map(self._slots.get, users.tolist(), [-1] * len(users))
        return np.fromiter(found, dtype=np.int64, count=len(users))

    def oldest(self, count: int) -> Users:
        """The users used longest ago, oldest first."""
        return self.owner[self.recency.oldest(count)]

    def read(self, slots: Users) -> tuple[Tensor, Tensor, Tensor]:
        """(sums, position, hidden) as in use, a copy."""
        index = self._index(slots)
        data, scale, position, hidden = self.rows
        sums = storage.from_rest(
            data.index_select(0, index),
            None if scale is None else scale.index_select(0, index),
            self.group,
        )
        hidden = hidden.index_select(0, index).to(self.in_use)
        return sums.to(self.in_use), position.index_select(0, index), hidden

    def encode(self, sums: Tensor, position: Tensor, hidden: Tensor) -> Rows:
        """Rows in this pool's format; StateError for what float16 cannot hold."""
        data, scale = storage.to_rest(sums, self.dtype, self.group)
        return Rows(data, scale, position, hidden.to(self.rows.hidden.dtype))

    def write(self, users: Users, rows: Rows) -> None:
        """Store distinct users, the last one as the most recently used; there must be room."""
        slots = self.find(users)
        new = np.flatnonzero(slots < 0)
        slots[new] = self._take(len(new))
        self._slots.update(zip(users[new].tolist(), slots[new].tolist(), strict=True))
        self.owner[slots] = users
        index = self._index(slots)
        for kept, given in zip(self.rows, rows, strict=True):
            if kept is not None and given is not None:
                kept.index_copy_(0, index, given.to(kept.device))
        self.recency.touch(slots)

    def remove(self, users: Users) -> None:
        """Forget users who are here."""
        slots = [self._slots.pop(user) for user in users.tolist()]
        self._free += slots
        self.recency.forget(np.asarray(slots, dtype=np.int64))

    def restore(self, owner: Users, order: Users) -> None:
        """Rows were filled from outside: their owners, and the slots in use, oldest first."""
        self.taken = len(owner)
        self.owner[: len(owner)] = owner
        self._slots = dict(zip(owner[order].tolist(), order.tolist(), strict=True))
        self._free = np.setdiff1d(np.arange(self.taken), order).tolist()
        self.recency.touch(order)

    def _take(self, count: int) -> list[int]:
        assert count <= self.free
        reused = min(count, len(self._free))
        taken = [self._free.pop() for _ in range(reused)]
        taken += range(self.taken, self.taken + count - reused)
        self.taken += count - reused
        return taken

    def _index(self, slots: Users) -> Tensor:
        return torch.from_numpy(slots).to(self.rows.position.device)
