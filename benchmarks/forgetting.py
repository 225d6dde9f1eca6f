"""What the far past is worth: NDCG@10 of states that read everything, or the last items alone.

The model is the one memory_quality.py trained on ml-100k, on windows of 200 items, or any other
(heavy_users.py). Users with many items; the last two items of each are the targets (validation and
test). A state that followed every
event is the state rebuilt from all items, so its line is "all"; a state rebuilt from the last W has
forgotten the rest. Differences are paired, target by target, with 95 % intervals over 2,000
resamplings of the users. Seen items are left out of the ranking.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.memory_quality import OURS, Data, collect, load
from recgrela_ext import Targets
from recgrela_ext.evaluation.ranking import rank_targets

HEAVY = (200, 400)  # users with more items than these
WINDOWS = (20, 50, 100, 200, 500)
ALL = 10**9
RESAMPLES = 2000


def measure(work: Path) -> dict[str, Any]:
    """Of the model on ml-100k; the mean over its trained seeds."""
    data = Data()
    runs = collect(work, OURS)
    models = [load(OURS, runs["rate"], seed, data.train.n_items, work) for seed in runs["seeds"]]
    found = compare(models, [data.valid, data.test], HEAVY, WINDOWS)
    return {"data": data.test.name, "model": OURS, "seeds": runs["seeds"], "groups": found}


def compare(
    models: Sequence[Any],
    targets: Sequence[Targets],
    heavy_users: Sequence[int],
    windows: Sequence[int],
) -> list[dict[str, Any]]:
    """Per group of users and window; the mean over the models."""
    groups = []
    for heavy in heavy_users:
        parts = [longer_than(t, heavy) for t in targets]
        users = np.concatenate([part.user for part in parts])
        value = {
            w: np.mean([np.concatenate([_ndcg(m, p, w) for p in parts]) for m in models], 0)
            for w in (*windows, ALL)
        }
        rows = [
            {"window": w, "ndcg@10": float(v.mean()), **_difference(v - value[ALL], users)}
            for w, v in value.items()
            if w != ALL
        ]
        everything = float(value[ALL].mean())
        groups.append({"more_than": heavy, "users": len(np.unique(users)), "targets": len(users),
                       "all": everything, "windows": rows})  # fmt: skip
    return groups


def longer_than(targets: Targets, items: int) -> Targets:
    """The targets whose history has more than `items` items."""
    lengths = targets.position - targets.offsets[targets.user]
    chosen = np.flatnonzero(lengths > items)
    return dataclasses.replace(
        targets, position=targets.position[chosen], user=targets.user[chosen]
    )


def _ndcg(model: Any, targets: Targets, window: int) -> np.ndarray:
    ranks = rank_targets(model, targets, max_seq_len=window, progress=False).seen_excluded
    return np.where(ranks <= 10, 1 / np.log2(ranks + 1.0), 0.0)


def _difference(values: np.ndarray, users: np.ndarray) -> dict[str, Any]:
    """Mean over all targets, and its interval over resampled users."""
    rng = np.random.default_rng(0)
    _, owner = np.unique(users, return_inverse=True)
    sums, counts = np.bincount(owner, values), np.bincount(owner)
    drawn = rng.integers(0, len(sums), (RESAMPLES, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = (float(x) for x in np.percentile(means, (2.5, 97.5)))
    return {"minus_all": float(values.mean()), "interval": [low, high]}
