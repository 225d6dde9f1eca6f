"""The order of a user's events, ties in time included.

Time rarely orders events completely: rating sites store one second for many clicks, and whatever
breaks the tie (the row order of a file, say) can carry information that no model should read.
So the rule has a name, and it is part of every result:

``hash``             seeded hash of (user, item): knows nothing of the file. The default.
``file``             position in the file. Without a time column, the whole order is the file's.
``item_id``          ascending raw item id.
``recbole_float32``  time rounded to float32 (64 s steps for Unix seconds around 1e9), then file
                     position: what RecBole 1.2 does.
``shuffled``         first ``file``; then every run of ascending file position within that order
                     is permuted by the seeded hash. For data whose time is a rank with its ties
                     already resolved in file order, such as a rebuilt ML-1M: the ties themselves
                     are gone there, but each of them lies inside such a run.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from recgrela_ext.arguments import is_one_of, is_whole
from recgrela_ext.data.ids import id_hashes, mix
from recgrela_ext.errors import DataError, shown

ORDERS = ("hash", "file", "item_id", "recbole_float32", "shuffled")


class Ordered(NamedTuple):
    """``rows`` int64 [N]: row numbers by (user, time, rule); ``tied``: share of adjacent ties."""

    rows: np.ndarray
    tied: float


def check_order(order: str, has_time: bool, where: str) -> None:
    if not is_one_of(order, ORDERS):
        raise DataError(f"{where}: order must be one of {', '.join(ORDERS)}, got {shown(order)}")
    if not has_time and order not in ("file", "shuffled"):
        raise DataError(
            f"{where}: order must be 'file' (or 'shuffled') when there is no time column, "
            f"got {shown(order)}"
        )


def check_seed(seed: int, where: str) -> None:
    if not is_whole(seed):
        raise DataError(f"{where}: seed must be an int, got {shown(seed)}")


def rule_time(time: np.ndarray | None, order: str) -> np.ndarray | None:
    """The time that the rule compares."""
    if time is None or order != "recbole_float32":
        return time
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and ties, there too
        return time.astype(np.float32)


def sort_rows(
    user: np.ndarray,
    item: np.ndarray,
    time: np.ndarray | None,
    user_ids: np.ndarray,
    item_ids: np.ndarray,
    order: str,
    seed: int,
) -> Ordered:
    """Rows of a log, user by user, in time order, ties broken by ``order``."""
    time = rule_time(time, order)
    index = _stable_sort(user, time)
    sorted_user = user[index]
    starts = np.ones(len(index), dtype=bool)  # True where a group of interchangeable rows begins
    tied = 0.0
    if time is not None:
        np.not_equal(sorted_user[1:], sorted_user[:-1], out=starts[1:])
        pairs = len(index) - int(np.count_nonzero(starts))
        sorted_time = time[index]
        starts[1:] |= sorted_time[1:] != sorted_time[:-1]
        del sorted_time
        tied = (len(index) - int(np.count_nonzero(starts))) / max(pairs, 1)
    if order == "shuffled":
        starts[1:] = (index[1:] < index[:-1]) | (sorted_user[1:] != sorted_user[:-1])
    del sorted_user
    if order in ("hash", "item_id", "shuffled"):
        places = _in_groups(starts)
        rows = index[places]
        if order == "item_id":
            key = item[rows].astype(np.uint64)
        else:
            users, items = id_hashes(user_ids, seed), id_hashes(item_ids, seed + 1)
            key = mix(users[user[rows]] ^ items[item[rows]])
            if order == "shuffled":
                # A repeat of an item has the same hash; its time (or position) parts the two.
                apart = rows if time is None else _distinct_ints(time[rows])
                key = mix(key ^ apart.astype(np.uint64))
        group = np.cumsum(starts, dtype=np.int64)[places]
        index[places] = rows[np.lexsort((key, group))]
    return Ordered(index, tied)


def _distinct_ints(time: np.ndarray) -> np.ndarray:
    """Whole times as they are, others by their bits: int64 that differ where the times do."""
    if time.dtype.kind != "f":
        return time.astype(np.int64)
    time = time.astype(np.float64)
    ints = time.view(np.int64).copy()
    whole = (np.abs(time) < 2.0**63) & (time == np.floor(time))
    ints[whole] = time[whole].astype(np.int64)
    return ints


def _in_groups(starts: np.ndarray) -> np.ndarray:
    """Places that share a group with a neighbour."""
    shared = ~starts
    shared[:-1] |= ~starts[1:]
    return np.flatnonzero(shared)


def _stable_sort(user: np.ndarray, time: np.ndarray | None) -> np.ndarray:
    if time is None:
        return np.argsort(user, kind="stable")
    if time.dtype.kind == "i" and len(time):
        earliest = int(time.min())
        span = int(time.max()) - earliest + 1
        if span * (int(user.max()) + 1) < 2**63:
            key = user.astype(np.int64)
            key *= span
            key += time
            key -= earliest
            return np.argsort(key, kind="stable")
    return np.lexsort((time, user))
