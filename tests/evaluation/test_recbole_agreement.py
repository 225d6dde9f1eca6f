"""RecBole 1.2.1's own evaluator and ours give the same HR, NDCG and MRR on tie-free scores.

RECBOLE holds what `recbole.evaluator` printed for `modular_scores()`; the live tests, run where
RecBole is installed, repeat that comparison and so check the recorded numbers too. RecBole 1.2.1
wants an environment of its own: torch, then `"numpy<2" "setuptools<81" "pandas<3" recbole==1.2.1`.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recgrela_ext.data.sequences import Sequences, Targets
from recgrela_ext.evaluation import evaluate

KS = (5, 10, 20)
USERS, N_ITEMS = 80, 100
RECBOLE = {
    "hit@5": 0.1375,
    "hit@10": 0.2625,
    "hit@20": 0.525,
    "ndcg@5": 0.0785,
    "ndcg@10": 0.1184,
    "ndcg@20": 0.1834,
    "mrr@5": 0.0596,
    "mrr@10": 0.0756,
    "mrr@20": 0.0928,
}


class FixedScores:
    def __init__(self, scores: torch.Tensor) -> None:
        self.scores = scores
        self.at = 0

    def score(self, histories: list[np.ndarray]) -> torch.Tensor:
        self.at += len(histories)
        return self.scores[self.at - len(histories) : self.at]


def modular_scores() -> tuple[torch.Tensor, np.ndarray]:
    """Scores without ties in a row (101 is a prime) and a target per row."""
    user, item = np.arange(USERS)[:, None], np.arange(N_ITEMS)[None]
    scores = ((37 * (item + 1) * (user + 1) + 11 * user) % 101).astype(np.float32)
    target = 1 + (3 * np.arange(USERS) ** 2 + 5 * np.arange(USERS)) % (N_ITEMS - 1)
    scores[np.arange(USERS), target] = 100.5 - 37 * np.arange(USERS) % 40  # ranks of about 1 to 40
    return torch.from_numpy(scores), target


def random_scores() -> tuple[torch.Tensor, np.ndarray]:
    rng = np.random.default_rng(5)
    scores = rng.permuted(np.tile(np.arange(2000, dtype=np.float32), (300, 1)), axis=1)
    target = rng.integers(1, 2000, 300)
    scores[np.arange(300), target] = 1999.5 - rng.integers(0, 40, 300)
    return torch.from_numpy(scores), target


def our_metrics(scores: torch.Tensor, target: np.ndarray) -> dict[str, float]:
    # The history is some other item: RecBole lets seen items compete, so it must not matter.
    histories = [[1 + int(item) % (scores.shape[1] - 1), int(item)] for item in target]
    targets = Targets.last_of(Sequences.from_lists(histories, scores.shape[1] - 1))
    result = evaluate(FixedScores(scores), targets, k=KS, baselines={}, bootstrap=0)
    return {name: round(value, 4) for name, value in result["mean"].items() if "/" not in name}


def recbole_metrics(scores: torch.Tensor, target: np.ndarray) -> dict[str, float]:
    evaluator = pytest.importorskip(
        "recbole.evaluator", reason="RecBole is not installed (it needs its own environment)"
    )
    config = {
        "metrics": ["Recall", "Hit", "NDCG", "MRR"],
        "topk": list(KS),
        "metric_decimal_place": 4,
        "eval_args": {"mode": {"valid": "full", "test": "full"}},
        "device": torch.device("cpu"),
    }
    scores = scores.clone()
    scores[:, 0] = -np.inf  # as RecBole's trainer does with the padding item
    collector = evaluator.Collector(config)
    rows = torch.arange(len(scores))
    collector.eval_batch_collect(scores, None, rows, torch.from_numpy(target))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "float", float, raising=False)  # RecBole's Config sets this alias too
        found = evaluator.Evaluator(config).evaluate(collector.get_data_struct())
    assert all(found[f"recall@{k}"] == found[f"hit@{k}"] for k in KS)
    return {name: float(value) for name, value in found.items() if not name.startswith("recall")}


def test_scores_have_no_ties() -> None:
    for scores, _ in (modular_scores(), random_scores()):
        ordered = scores.sort(dim=1).values
        assert bool((ordered[:, 1:] > ordered[:, :-1]).all())


def test_agrees_with_recorded_recbole_numbers() -> None:
    assert our_metrics(*modular_scores()) == RECBOLE


def test_agrees_with_recbole_and_recorded_numbers_are_recboles() -> None:
    recbole = recbole_metrics(*modular_scores())
    assert recbole == RECBOLE
    assert our_metrics(*modular_scores()) == recbole


def test_agrees_with_recbole_on_random_scores() -> None:
    assert our_metrics(*random_scores()) == recbole_metrics(*random_scores())
