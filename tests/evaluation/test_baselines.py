from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from recgrela_ext.data.sequences import IdMap, Sequences, Targets
from recgrela_ext.evaluation import Markov, Popularity, mean_metrics, rank_targets
from recgrela_ext.evaluation.baselines import visible_part

TRAIN = Sequences.from_lists([[1, 2, 3], [1, 2], [2, 3, 3], [4]], 5)


def test_popularity_counts_events() -> None:
    scores = Popularity(TRAIN).score([np.array([1]), np.array([], np.int32)])
    assert scores.tolist() == [[0, 2, 3, 3, 1, 0]] * 2


def test_markov_by_hand() -> None:
    # Lag 1: 1->2 twice, 2->3 twice, 3->3 once. Lag 2: 1->3 once, 2->3 once.
    prior, popularity = 10.0, np.array([0, 2, 3, 3, 1, 0]) / 9
    scores = Markov(TRAIN, lags=2, prior=prior).score([np.array([1, 2])])[0].numpy()
    first = (np.array([0, 0, 0, 2, 0, 0]) + prior * popularity) / (2 + prior)
    second = (np.array([0, 0, 0, 1, 0, 0]) + prior * popularity) / (1 + prior)
    np.testing.assert_allclose(scores, first + second / np.sqrt(2), rtol=1e-5)


def test_markov_does_not_count_across_users() -> None:
    train = Sequences.from_lists([[1], [2], [1], [2]], 2)
    alone = Markov(train, lags=3).score([np.array([1])])[0]
    assert alone[1] == alone[2]


def test_markov_without_a_history_is_popularity() -> None:
    scores = Markov(TRAIN).score([np.array([], np.int32)])[0].numpy()
    assert np.argsort(-scores, kind="stable").tolist() == [2, 3, 1, 4, 0, 5]


def test_markov_in_a_large_catalogue_keeps_only_pairs() -> None:
    rng = np.random.default_rng(0)
    items = rng.integers(1, 200_001, 5000)
    markov = Markov(Sequences.from_lists([items.tolist()], 200_000))
    assert sum(len(counts.item) for counts in markov.rows) <= 6 * 5000
    scores = markov.score([items[:50]])[0]
    assert int(scores.argmax()) == items[50]


@pytest.mark.parametrize(
    ("options", "text"),
    [({"lags": 0}, "lags must be at least 1, got 0"), ({"prior": 0.0}, "prior must be above 0")],
)
def test_bad_options(options: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Markov(TRAIN, **options)  # type: ignore[arg-type]


def test_visible_part_stops_before_the_first_target() -> None:
    log = Sequences.from_lists([[1, 2, 3, 4], [5, 5, 2], [3]], 5)
    targets = Targets(
        log.items, log.offsets, np.array([2, 3, 6]), np.array([0, 0, 1]), "test", log.id_map,
        "file", 0, "lists", 0.0, "",
    )  # fmt: skip
    part = visible_part(targets)
    assert [part.history(u).tolist() for u in range(3)] == [[1, 2], [5, 5], [3]]
    assert part.repeat_share == pytest.approx(1 / 5)


def test_markov_on_movielens(real_data: Path) -> None:
    """The figure the model has to beat: leave-one-out test of ML-1M in the order of its file."""
    table = np.loadtxt(real_data / "ml-1m" / "ml-1m.inter", skiprows=1, dtype=np.int64)
    table = table[np.lexsort((table[:, 2], table[:, 0]))]
    users, lengths = np.unique(table[:, 0], return_counts=True)
    item_ids, rows = np.unique(table[:, 1], return_inverse=True)
    items = (rows + 1).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    id_map = IdMap(users, item_ids)
    log = Sequences(items, offsets, id_map, "file", 0, "ml-1m", 0.0)
    targets = Targets.last_of(log)
    train_items = np.concatenate([log.history(user)[:-2] for user in range(len(log))])
    train_offsets = offsets - 2 * np.arange(len(offsets))
    train = Sequences(train_items, train_offsets, id_map, "file", 0, "ml-1m", 0.0)
    ranks = rank_targets(Markov(train, lags=6), targets)
    assert targets.target_sha256.startswith("43f79849b8da")
    assert mean_metrics(ranks.seen_included, [10])["ndcg@10"] == pytest.approx(0.1278, abs=1e-4)
    assert mean_metrics(ranks.seen_excluded, [10])["ndcg@10"] == pytest.approx(0.1532, abs=1e-4)
