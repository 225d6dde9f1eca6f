"""Ranking metrics of one relevant item per target, from 1-based ranks.

    hit@k  = [rank <= k]
    ndcg@k = [rank <= k] / log2(rank + 1)
    mrr@k  = [rank <= k] / rank

With a single relevant item hit@k is recall@k and the ideal DCG is 1. A metric of a data set is the
mean over its targets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

METRIC_NAMES = ("hit", "ndcg", "mrr")


def hit_at_k(ranks: np.ndarray, k: int) -> np.ndarray:
    """``[rank <= k]``, float64 of the shape of ``ranks``."""
    return (_check(ranks, k) <= k).astype(np.float64)


def ndcg_at_k(ranks: np.ndarray, k: int) -> np.ndarray:
    """``[rank <= k] / log2(rank + 1)``, float64 of the shape of ``ranks``."""
    ranks = _check(ranks, k)
    return np.where(ranks <= k, 1.0 / np.log2(ranks + 1.0), 0.0)


def mrr_at_k(ranks: np.ndarray, k: int) -> np.ndarray:
    """``[rank <= k] / rank``, float64 of the shape of ``ranks``."""
    ranks = _check(ranks, k)
    return np.where(ranks <= k, 1.0 / ranks, 0.0)


def metric_values(ranks: np.ndarray, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Every metric of every target: ``{"hit@5": [n], "ndcg@5": [n], "mrr@5": [n], ...}``.

    Args:
        ranks: ``[n]``, integers from 1.
        ks: cut-offs, integers from 1.

    Raises:
        ValueError: a rank or a cut-off below 1.
    """
    table = {"hit": hit_at_k, "ndcg": ndcg_at_k, "mrr": mrr_at_k}
    return {f"{name}@{k}": table[name](ranks, k) for k in ks for name in METRIC_NAMES}


def mean_metrics(ranks: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """Mean over the targets of :func:`metric_values`; ValueError without targets."""
    if not len(ranks):
        raise ValueError("mean_metrics: ranks must hold at least one rank, got none")
    return {name: float(values.mean()) for name, values in metric_values(ranks, ks).items()}


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
        ValueError: no targets, ``samples`` < 1, or ``level`` outside (0, 1).
    """
    table = np.stack(list(values.values()), axis=1)  # [n, metrics]
    if not len(table):
        raise ValueError("bootstrap_interval: values must hold at least one target, got none")
    if samples < 1:
        raise ValueError(f"bootstrap_interval: samples must be at least 1, got {samples}")
    if not 0.0 < level < 1.0:
        raise ValueError(f"bootstrap_interval: level must lie in (0, 1), got {level}")
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
        _, user = np.unique(np.asarray(users), return_inverse=True)
        rows = np.stack([np.bincount(user, weights=column) for column in rows.T], axis=1)
    return np.unique(rows, axis=0, return_counts=True)


def _check(ranks: np.ndarray, k: int) -> np.ndarray:
    ranks = np.asarray(ranks)
    if k < 1:
        raise ValueError(f"metrics: k must be at least 1, got {k}")
    if ranks.size and ranks.min() < 1:
        raise ValueError(f"metrics: ranks must be at least 1, got {ranks.min()}")
    return ranks
