"""Evaluation of a model on held-out targets, with counting baselines beside it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from recgrela_ext.arguments import check_whole, is_whole
from recgrela_ext.data.sequences import Sequences, Targets
from recgrela_ext.errors import shown
from recgrela_ext.evaluation.baselines import make_baselines
from recgrela_ext.evaluation.metrics import bootstrap_interval, metric_values
from recgrela_ext.evaluation.ranking import Ranks, Scorer, rank_targets
from recgrela_ext.evaluation.result import machine_info


def evaluate(
    model: Any,
    targets: Targets,
    *,
    k: Iterable[int] = (5, 10),
    max_seq_len: int | None = None,
    batch_size: int | None = None,
    baselines: Mapping[str, Scorer] | Sequences | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    model_seed: int | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Rank every target among all items and average HR, NDCG and MRR at ``k`` (paper section 4.1).

    The rank is pessimistic and the scores are float32 (see ``evaluation.ranking``). Both views
    come from one pass: ``seen_included`` as RecBole and the paper do, ``seen_excluded`` with the
    items of the history out of the way.

    Args:
        model: a ``RecGRELA``, or any object with ``score(histories) -> float32 [b, n_items]``.
        targets: the validation or test targets of a split.
        k: cut-offs, any iterable of ints from 1.
        max_seq_len: items of a history a model reads; ``None``: its own ``config.max_seq_len``.
        batch_size: histories per call; ``None``: chosen by length.
        baselines: the training ``Sequences`` to count Popularity and Markov in; ``None``: they are
            counted in everything before the part of the targets; a dict of named scorers; ``{}``:
            none.
        bootstrap: resamples of the users for the 95 % intervals; 0: no intervals.
        seed: of the bootstrap.
        model_seed: training seed of the model, recorded in the result.
        progress: a bar on stderr; ``None``: only on a terminal.

    Returns:
        The result, a dict that JSON can hold (``evaluation.result``): ``result["mean"]["ndcg@10"]``
        is NDCG@10 of the view ``seen_included``. ``seconds`` is the model's ranking time.

    Raises:
        ValueError: NaN scores, no targets, no or bad cut-offs, catalogues that differ.
        TypeError: an argument of another kind.
    """
    if not isinstance(targets, Targets):
        raise TypeError(f"evaluate: targets must be Targets, got {shown(targets)}")
    try:
        cutoffs = list(k)
    except TypeError:  # a number, also as an array without a dimension
        cutoffs = []
    if not cutoffs or not all(is_whole(one) and one >= 1 for one in cutoffs):
        raise ValueError(f"evaluate: k must be cut-offs from 1, got {shown(k)}")
    ks = sorted({int(one) for one in cutoffs})
    check_whole(bootstrap, "evaluate", "bootstrap", low=0)
    if not is_whole(seed) or seed < 0:
        raise ValueError(f"evaluate: seed must be an int of at least 0, got {shown(seed)}")
    others = make_baselines(baselines, targets)
    start = time.perf_counter()
    ranks = rank_targets(
        model, targets, max_seq_len=max_seq_len, batch_size=batch_size, progress=progress
    )
    seconds = time.perf_counter() - start
    values = _values(ranks, ks)
    interval = (
        bootstrap_interval(values, targets.user, samples=bootstrap, seed=seed) if bootstrap else {}
    )
    metrics = _mean(values)
    result: dict[str, Any] = {
        "model": type(model).__name__,
        "variant": str(getattr(model, "variant", "baseline")),
        "data": targets.name,
        "order": targets.order,
        "order_seed": int(targets.order_seed),
        "split": targets.split,
        "target_sha256": targets.target_sha256,
        "seeds": [model_seed],
        "per_seed": [metrics],
        "mean": dict(metrics),
        "interval": interval,
        "baselines": {
            name: _mean(_values(rank_targets(scorer, targets, progress=progress), ks))
            for name, scorer in others.items()
        },
        "targets": len(targets),
        "users": len(np.unique(targets.user)),
        "n_items": targets.n_items,
        "max_seq_len": max_seq_len or getattr(getattr(model, "config", None), "max_seq_len", None),
        "seconds": seconds,
        "machine": machine_info(_device(model)),
    }
    return result


def _values(ranks: Ranks, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Per-target values of both views and, under the plain names, of seen_included."""
    included = metric_values(ranks.seen_included, ks)
    excluded = metric_values(ranks.seen_excluded, ks)
    return {
        **{f"seen_included/{name}": value for name, value in included.items()},
        **{f"seen_excluded/{name}": value for name, value in excluded.items()},
        **included,
    }


def _mean(values: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: float(value.mean()) for name, value in values.items()}


def _device(model: Any) -> torch.device:
    embedding = getattr(model, "item_embedding", None)
    return torch.device("cpu") if embedding is None else embedding.weight.device
