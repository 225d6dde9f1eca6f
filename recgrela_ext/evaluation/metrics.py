"""Ranking metrics of one relevant item per target, from 1-based ranks.

    hit@k  = [rank <= k]
    ndcg@k = [rank <= k] / log2(rank + 1)
    mrr@k  = [rank <= k] / rank

With a single relevant item hit@k is recall@k and the ideal DCG is 1. A metric of a data set is the
mean over its targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from recgrela_ext.arguments import as_array, check_whole, is_whole
from recgrela_ext.errors import shown

METRIC_NAMES = ("hit", "ndcg", "mrr")


def hit_at_k(ranks: np.ndarray, k: int) -> np.ndarray:
    """``[rank <= k]``, float64 of the shape of ``ranks``."""
    return _hit(*_checked(ranks, k, "hit_at_k"))


def ndcg_at_k(ranks: np.ndarray, k: int) -> np.ndarray:
    """``[rank <= k] / log2(rank + 1)``, float64 of the shape of ``ranks``."""
    return _ndcg(*_checked(ranks, k, "ndcg_at_k"))


def mrr_at_k(ranks: np.ndarray, k: int) -> np.ndarray:
    """``[rank <= k] / rank``, float64 of the shape of ``ranks``."""
    return _mrr(*_checked(ranks, k, "mrr_at_k"))


def metric_values(ranks: np.ndarray, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Every metric of every target: ``{"hit@5": [n], "ndcg@5": [n], "mrr@5": [n], ...}``.

    Args:
        ranks: ``[n]``, integers from 1.
        ks: cut-offs, integers from 1.

    Raises:
        ValueError: a rank or a cut-off below 1, or a rank that is not whole.
        TypeError: ranks that are no numbers, or a cut-off that is no int.
    """
    return _metric_values(ranks, ks, "metric_values")


def mean_metrics(ranks: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """Mean over the targets of :func:`metric_values`; ValueError without targets."""
    ranks = _whole_ranks(ranks, "mean_metrics")
    values = _metric_values(ranks, ks, "mean_metrics")
    if not ranks.size:
        raise ValueError("mean_metrics: ranks must hold at least one rank, got none")
    return {name: float(value.mean()) for name, value in values.items()}


def bootstrap_interval(
    values: dict[str, np.ndarray],
    users: np.ndarray | None = None,
    *,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Percentile bootstrap intervals ``{name: [low, high]}`` of the mean, resampling users.

    A resample draws U users with replacement and takes the mean over all their targets, so several
    targets of one user stay together. All metrics share the resamples. Users whose targets have the
    same values are exchangeable, so whole groups of them are drawn at once: the distribution is the
    plain bootstrap's, the cost that of the number of different users.

    Args:
        values: metric name -> ``[n]`` values, as :func:`metric_values` gives them. The difference
            of two models' values gives the paired interval of their difference.
        users: ``[n]`` user of each target; ``None``: every target is a user of its own.
        samples: number of resamples.
        level: coverage.
        seed: of numpy's default generator; equal input and seed give equal intervals.

    Raises:
        ValueError: no metrics or targets, arrays of several lengths, ``samples`` < 1, ``level``
            outside (0, 1), or ``seed`` < 0.
        TypeError: an argument of another kind.
    """
    caller = "bootstrap_interval"
    table = _table(values, caller)
    if users is not None:
        users = as_array(users, caller, "users")
        if users.shape != (len(table),):
            raise ValueError(
                f"{caller}: users must be one for each target [{len(table)}], "
                f"got shape {list(users.shape)}"
            )
    check_whole(samples, caller, "samples")
    if isinstance(level, bool) or not isinstance(level, (int, float, np.floating)):
        raise TypeError(f"{caller}: level must be a number, got {shown(level)}")
    if not 0.0 < level < 1.0:
        raise ValueError(f"{caller}: level must lie in (0, 1), got {level}")
    if not is_whole(seed) or seed < 0:
        raise ValueError(f"{caller}: seed must be an int of at least 0, got {shown(seed)}")
    groups, group_users = _groups(table, users)
    num_users = int(group_users.sum())
    means = np.empty((samples, table.shape[1]))
    rng = np.random.default_rng(seed)
    rows = max(1, 4_000_000 // len(groups))  # bounds the drawn counts to 32 MB
    for start in range(0, samples, rows):
        size = min(rows, samples - start)
        drawn = rng.multinomial(num_users, group_users / num_users, size=size)
        sums = drawn @ groups  # [size, metrics + 1]; the last column counts targets
        means[start : start + size] = sums[:, :-1] / sums[:, -1:]
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail], axis=0)
    return {name: [float(low[i]), float(high[i])] for i, name in enumerate(values)}


def _groups(table: np.ndarray, users: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Different users as rows ``[sums of the metrics, targets]``, and how many users each is."""
    rows = np.concatenate([table, np.ones((len(table), 1))], axis=1)
    if users is not None:
        try:
            _, user = np.unique(users, return_inverse=True)
        except TypeError:
            raise TypeError("bootstrap_interval: users must be of one type") from None
        rows = np.stack([np.bincount(user, weights=column) for column in rows.T], axis=1)
    return np.unique(rows, axis=0, return_counts=True)


def _hit(ranks: np.ndarray, k: int) -> np.ndarray:
    return (ranks <= k).astype(np.float64)


def _ndcg(ranks: np.ndarray, k: int) -> np.ndarray:
    return np.where(ranks <= k, 1.0 / np.log2(ranks + 1.0), 0.0)


def _mrr(ranks: np.ndarray, k: int) -> np.ndarray:
    return np.where(ranks <= k, 1.0 / ranks, 0.0)


def _metric_values(ranks: Any, ks: Any, caller: str) -> dict[str, np.ndarray]:
    if not isinstance(ks, Iterable) or isinstance(ks, (str, bytes)):
        raise TypeError(f"{caller}: ks must be a list of ints, got {shown(ks)}")
    cutoffs = list(ks)
    for k in cutoffs:
        check_whole(k, caller, "k")
    ranks = _whole_ranks(ranks, caller)
    table = {"hit": _hit, "ndcg": _ndcg, "mrr": _mrr}
    return {f"{name}@{k}": table[name](ranks, k) for k in cutoffs for name in METRIC_NAMES}


def _checked(ranks: Any, k: Any, caller: str) -> tuple[np.ndarray, int]:
    check_whole(k, caller, "k")
    return _whole_ranks(ranks, caller), k


def _whole_ranks(ranks: Any, caller: str) -> np.ndarray:
    array = as_array(ranks, caller, "ranks")
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{caller}: ranks must be whole numbers, got dtype {array.dtype}")
    if array.dtype.kind == "f":
        array = array.astype(np.float64, copy=False)
        other = array[~np.isfinite(array) | (array != np.floor(array))]
        if other.size:
            raise ValueError(f"{caller}: ranks must be whole numbers, got {other.flat[0]}")
    if array.size and array.min() < 1:
        raise ValueError(f"{caller}: ranks must be at least 1, got {array.min()}")
    return array


def _table(values: Any, caller: str) -> np.ndarray:
    """``[n, metrics]``."""
    if not isinstance(values, Mapping):
        raise TypeError(f"{caller}: values must be a dict of arrays [n], got {shown(values)}")
    if not values:
        raise ValueError(f"{caller}: values must hold at least one metric, got none")
    columns = {name: as_array(one, caller, "values") for name, one in values.items()}
    for name, column in columns.items():
        if column.ndim != 1 or column.dtype.kind not in "iufb":
            raise TypeError(
                f"{caller}: values must be numbers [n], got {column.dtype} {list(column.shape)} "
                f"for {name}"
            )
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{caller}: values must have one length, got {lengths}")
    table = np.stack(list(columns.values()), axis=1)
    if not len(table):
        raise ValueError(f"{caller}: values must hold at least one target, got none")
    return table
