"""What each user has seen, the latest last: kept beside a `UserState`, which holds no ids."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..arguments import as_array, usable_device
from ..errors import StateError, shown
from . import blob as storage
from .inputs import check_integers

STATE_MAGIC = b"RGUS"
_MAGIC = b"RGSI"
_LAST_ROW = np.iinfo(np.int32).max
_OFFSET = struct.Struct("<I")


class SeenItems:
    """Per user the distinct item rows seen so far, int32, in the order in which they were last met.

    `seen[i:j]` shares its users with `seen`. Not thread-safe.
    """

    def __init__(self, batch_size: int) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 0:
            raise ValueError(f"SeenItems: batch_size must be an int >= 0, got {shown(batch_size)}")
        if batch_size > _LAST_ROW:
            raise ValueError(f"SeenItems: batch_size must be below 2**31, got {shown(batch_size)}")
        self._users = [_User() for _ in range(batch_size)]

    @classmethod
    def from_lists(cls, items: Iterable[Sequence[int] | np.ndarray]) -> SeenItems:
        """One user for every sequence of item rows, oldest first; ValueError or TypeError for other
        values."""
        caller = "SeenItems.from_lists"
        if not isinstance(items, Iterable) or isinstance(items, (str, bytes)):
            raise TypeError(f"{caller}: items must be a list per user, got {shown(items)}")
        seen = cls(0)
        for values in items:
            row = as_array(values, caller, "items of a user")
            if row.ndim != 1:
                raise ValueError(
                    f"{caller}: items must be a list [n] per user, got {shown(values)}"
                )
            _check_rows(caller, row)
            seen._users.append(_User(_last_of_each(row.astype(np.int32))))
        return seen

    @classmethod
    def from_sequences(
        cls, item_seq: Tensor, item_seq_len: Tensor | None = None, padding_idx: int = 0
    ) -> SeenItems:
        """From right-padded histories [B, L]; without lengths every item but the padding counts.

        Raises:
            ValueError, TypeError: other shapes or types, a length beyond L.
        """
        check_integers("SeenItems.from_sequences", "item_seq", item_seq)
        if item_seq.dim() != 2:
            raise ValueError(
                f"SeenItems.from_sequences: item_seq must be [B, L], got {list(item_seq.shape)}"
            )
        rows = as_array(item_seq, "SeenItems.from_sequences", "item_seq")
        if item_seq_len is None:
            return cls.from_lists(row[row != padding_idx] for row in rows)
        check_integers("SeenItems.from_sequences", "item_seq_len", item_seq_len)
        if item_seq_len.shape != item_seq.shape[:1]:
            raise ValueError(
                f"SeenItems.from_sequences: item_seq_len must be [{len(rows)}], "
                f"got {list(item_seq_len.shape)}"
            )
        lengths = as_array(item_seq_len, "SeenItems.from_sequences", "item_seq_len").tolist()
        for length in lengths:
            if not 0 <= length <= rows.shape[1]:
                raise ValueError(
                    f"SeenItems.from_sequences: item_seq_len must lie in 0..{rows.shape[1]}, "
                    f"got {length}"
                )
        return cls.from_lists(row[:n] for row, n in zip(rows, lengths, strict=True))

    @classmethod
    def of_recent(cls, ids: Iterable[np.ndarray]) -> SeenItems:
        """One user for every array as `recent` returns it, which is taken as it is."""
        seen = cls(0)
        seen._users = [_User(row) for row in ids]
        return seen

    def __len__(self) -> int:
        return len(self._users)

    def __getitem__(self, users: int | slice) -> SeenItems:
        if not isinstance(users, (int, slice)):
            raise TypeError(f"SeenItems: index must be int or slice, got {type(users).__name__}")
        part = SeenItems(0)
        part._users = self._users[users] if isinstance(users, slice) else [self._users[users]]
        return part

    def select(self, users: np.ndarray) -> SeenItems:
        """The users with these indices [n], in this order; they stay shared."""
        part = SeenItems(0)
        part._users = [self._users[i] for i in users.tolist()]
        return part

    @staticmethod
    def cat(parts: Sequence[SeenItems]) -> SeenItems:
        """All users of all parts; they stay shared. TypeError for what is no `SeenItems`."""
        if not isinstance(parts, Sequence) or not all(isinstance(x, SeenItems) for x in parts):
            raise TypeError(f"SeenItems.cat: parts must be a list of SeenItems, got {shown(parts)}")
        whole = SeenItems(0)
        whole._users = [user for part in parts for user in part._users]
        return whole

    def add(self, items: Tensor | np.ndarray | Sequence[int], padding_idx: int = 0) -> None:
        """One more item [B], or several [B, n] in their order, per user; the padding item adds
        nothing."""
        new = as_array(items, "SeenItems.add", "items")
        if new.ndim not in (1, 2) or new.shape[0] != len(self):
            raise ValueError(
                f"SeenItems.add: items must be [{len(self)}] or [{len(self)}, n], "
                f"got {list(new.shape)}"
            )
        _check_rows("SeenItems.add", new)
        for user, row in zip(self._users, new.reshape(len(self), -1), strict=True):
            user.add(row[row != padding_idx].astype(np.int32))

    def ids(self, i: int) -> np.ndarray:
        """Sorted item rows of user `i`, int32, read-only."""
        return _read_only(np.sort(self._user("SeenItems.ids", i).ids))

    def recent(self, i: int) -> np.ndarray:
        """Item rows of user `i`, the one met last at the end, int32, read-only."""
        return _read_only(self._user("SeenItems.recent", i).ids.view())

    def _user(self, caller: str, i: int) -> _User:
        if not -len(self) <= i < len(self):
            raise IndexError(f"{caller}: i must be below {len(self)} users, got {i}")
        return self._users[i]

    def padded(self, padding_idx: int = 0, device: torch.device | str | None = None) -> Tensor:
        """int64 [B, longest], oldest first, the rest filled with `padding_idx`."""
        longest = max((len(user.ids) for user in self._users), default=0)
        rows = np.full((len(self), longest), padding_idx, dtype=np.int64)
        for row, user in zip(rows, self._users, strict=True):
            row[: len(user.ids)] = user.ids
        found = torch.from_numpy(rows)
        return found if device is None else found.to(usable_device(device, "SeenItems.padded"))

    @property
    def nbytes(self) -> int:
        """Bytes of all ids."""
        return sum(user.ids.nbytes for user in self._users)

    def to_bytes(self, i: int) -> bytes:
        """User `i` as bytes; `UserState.to_bytes(i, seen=...)` stores both together."""
        return storage.seal(_MAGIC, self.recent(i).tobytes())

    @classmethod
    def from_bytes(cls, blob: bytes) -> SeenItems:
        """One user from either `to_bytes`. StateError for damaged bytes, or a state without ids."""
        magic, body = storage.unseal("SeenItems.from_bytes", blob, (_MAGIC, STATE_MAGIC), 0)
        if magic == STATE_MAGIC:
            offset = _OFFSET.unpack_from(body)[0] if len(body) >= _OFFSET.size else len(body) + 1
            if offset > len(body):
                raise StateError(
                    "SeenItems.from_bytes: blob must be whole, got seen items that begin at byte "
                    f"{offset} of {len(body)}"
                )
            if offset == 0:
                raise StateError(
                    "SeenItems.from_bytes: blob must be stored with seen items, got a state alone"
                )
            body = body[offset:]
        if len(body) % 4:
            raise StateError(f"SeenItems.from_bytes: ids must be int32, got {len(body)} bytes")
        rows = np.frombuffer(body, dtype=np.int32)
        if rows.size and int(rows.min()) < 0:
            raise StateError(
                f"SeenItems.from_bytes: items must lie in 0..{_LAST_ROW}, got {int(rows.min())}"
            )
        return cls.from_lists([rows])


class _User:
    __slots__ = ("ids",)

    def __init__(self, ids: np.ndarray | None = None) -> None:
        self.ids = np.empty(0, dtype=np.int32) if ids is None else ids

    def add(self, items: np.ndarray) -> None:
        """Item rows, int32, in the order in which they were met."""
        if len(items) == 1:
            self._add_one(items[0])
        elif len(items):
            new = _last_of_each(items)
            others = self.ids[np.isin(self.ids, new, invert=True)]
            self.ids = np.concatenate((others, new))

    # As above, faster: this is done at every event.
    def _add_one(self, item: np.int32) -> None:
        old = self.ids
        if len(old) and old[-1] == item:
            return
        there = (old == item).nonzero()[0]
        at = int(there[0]) if len(there) else len(old)
        new = np.empty(len(old) + 1 - len(there), dtype=np.int32)
        new[:at] = old[:at]
        new[at:-1] = old[at + 1 :]
        new[-1] = item
        self.ids = new


def _check_rows(caller: str, items: np.ndarray) -> None:
    """Item rows, which are kept as int32."""
    if not items.size:
        return
    if items.dtype.kind not in "iu":
        raise TypeError(f"{caller}: items must be integers, got {items.dtype}")
    low, high = int(items.min()), int(items.max())
    if low < 0 or high > _LAST_ROW:
        raise ValueError(
            f"{caller}: items must lie in 0..{_LAST_ROW}, got {low if low < 0 else high}"
        )


def _last_of_each(items: np.ndarray) -> np.ndarray:
    """The distinct items, in the order in which they come last."""
    if len(items) < 2:
        return items
    behind = np.unique(items[::-1], return_index=True)[1]
    return items[np.sort(len(items) - 1 - behind)]


def _read_only(ids: np.ndarray) -> np.ndarray:
    ids.flags.writeable = False
    return ids
