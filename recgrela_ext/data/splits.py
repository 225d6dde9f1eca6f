"""Splits of a log. The log is sorted once; targets are positions in it, prefixes are views."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from recgrela_ext.arguments import is_one_of
from recgrela_ext.data.order import rule_time
from recgrela_ext.data.sequences import Sequences, Targets, repeat_share, target_digest
from recgrela_ext.errors import DataError, shown

if TYPE_CHECKING:
    from recgrela_ext.data.interactions import Interactions, Split

TARGET_CHOICES = ("all", "first", "last")


def sequences(log: Interactions) -> Sequences:
    items, offsets, _ = _sorted_items(log)
    return _as_sequences(log, items, offsets)


def leave_one_out(log: Interactions) -> Split:
    items, offsets, _ = _sorted_items(log)
    lengths = np.diff(offsets)
    has_test, has_valid = lengths > 1, lengths > 2
    if not has_test.any():
        raise DataError(
            f"leave_one_out: {log.name} must have a user with two events, got none among "
            f"{len(lengths)} users"
        )
    ends = offsets[1:]
    keep = np.ones(len(items), dtype=bool)
    keep[ends[has_test] - 1] = False
    keep[ends[has_valid] - 2] = False
    train = _as_sequences(log, items[keep], _offsets(lengths - has_test - has_valid))
    users = np.flatnonzero(has_valid)
    valid = _targets(
        train,
        items,
        offsets,
        ends[users] - 2,
        users,
        "valid",
        {"short_users": int((~has_valid).sum())},
        ends - has_test - has_valid,
    )
    users = np.flatnonzero(has_test)
    test = _targets(
        train,
        items,
        offsets,
        ends[users] - 1,
        users,
        "test",
        {"short_users": int((~has_test).sum())},
        ends - has_test,
    )
    return train, valid, test


def split_by_time(log: Interactions, shares: tuple[float, float, float], targets: str) -> Split:
    part = _parts(log, shares, targets)
    cold = np.ones(log.num_items, dtype=bool)
    cold[log.item[part == 0]] = False
    warm_rows = ~cold[log.item]
    dropped = {
        "cold_items": int(np.count_nonzero(cold)),
        "cold_events": len(log) - int(np.count_nonzero(warm_rows)),
    }
    log, part = log.subset(warm_rows), part[warm_rows]
    items, offsets, index = _sorted_items(log)
    part = part[index]
    del index
    in_train = part == 0
    trained = np.concatenate([[0], np.cumsum(in_train)])
    train = _as_sequences(log, items[in_train], trained[offsets].astype(np.int64))
    del trained
    result = []
    for number, split in ((1, "valid"), (2, "test")):
        before = np.concatenate([[0], np.cumsum(part < number)])
        part_start = offsets[:-1] + np.diff(before[offsets])
        del before
        position = np.flatnonzero(part == number)
        user = np.searchsorted(offsets, position, side="right") - 1
        known = position > offsets[user]
        counts = {**dropped, "no_history": int(np.count_nonzero(~known))}
        position, user = position[known], user[known]
        if not len(position):
            raise DataError(
                f"split_by_time: the {split} part of {log.name} must hold a target, got none "
                f"({dropped['cold_events']} events of unseen items dropped)"
            )
        if targets != "all":
            chosen = np.ones(len(user), dtype=bool)
            changes = user[1:] != user[:-1]
            chosen[1 if targets == "first" else 0 : None if targets == "first" else -1] = changes
            position, user = position[chosen], user[chosen]
        result.append(_targets(train, items, offsets, position, user, split, counts, part_start))
    return train, result[0], result[1]


def _parts(log: Interactions, shares: tuple[float, float, float], targets: str) -> np.ndarray:
    """0, 1 or 2 for every row: training, validation, test."""
    where = "split_by_time"
    if not is_one_of(targets, TARGET_CHOICES):
        raise DataError(f"{where}: targets must be 'all', 'first' or 'last', got {shown(targets)}")
    for name, share in zip(("train", "valid", "test"), shares, strict=True):
        if isinstance(share, bool) or not isinstance(share, (int, float, np.floating)):
            raise DataError(f"{where}: {name} must be a number, got {shown(share)}")
    if not (all(share > 0 for share in shares) and abs(sum(shares) - 1) <= 1e-6):
        raise DataError(f"{where}: train, valid, test must be positive with sum 1, got {shares}")
    time = rule_time(log.time, log.order)
    if time is None:
        raise DataError(f"{where}: {log.name} must have a time column, got none")
    if log.order == "shuffled":
        raise DataError(
            f"{where}: order must not be 'shuffled', which moves events over the boundaries"
        )
    if log.has_rank_time:
        raise DataError(
            f"{where}: time must be comparable between users, got a rank 1..n for each user"
        )
    ordered = np.sort(time)
    first, second = (
        ordered[min(int(np.ceil(share * len(ordered) - 1e-9)), len(ordered) - 1)]
        for share in (shares[0], shares[0] + shares[1])
    )
    part = (time >= first).astype(np.int8)
    part += time >= second
    if not (part == 0).any():
        raise DataError(f"{where}: the training part of {log.name} must hold events, got none")
    return part


def _sorted_items(log: Interactions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    index = log.order_rows()
    items = log.item[index]
    items += 1
    return items, _offsets(np.bincount(log.user, minlength=log.num_users)), index


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _as_sequences(log: Interactions, items: np.ndarray, offsets: np.ndarray) -> Sequences:
    share = repeat_share(items, offsets)
    return Sequences(items, offsets, log.id_map, log.order, log.seed, log.name, share)


def _targets(
    train: Sequences,
    items: np.ndarray,
    offsets: np.ndarray,
    position: np.ndarray,
    user: np.ndarray,
    split: str,
    dropped: dict[str, int],
    part_start: np.ndarray,
) -> Targets:
    return Targets(
        items,
        offsets,
        position,
        user,
        split,
        train.id_map,
        train.order,
        train.order_seed,
        train.name,
        train.repeat_share,
        target_digest(train.id_map, user, items[position]),
        dropped,
        part_start,
    )
