from __future__ import annotations

import math

import numpy as np
import pytest

from recgrela_ext.evaluation.metrics import bootstrap_interval, mean_metrics, metric_values


def test_metrics_by_hand() -> None:
    values = metric_values(np.array([1, 2, 3, 5, 6]), [3, 5])
    log3, log4, log6 = 1 / math.log2(3), 1 / 2, 1 / math.log2(6)
    assert values["hit@3"].tolist() == [1, 1, 1, 0, 0]
    assert values["hit@5"].tolist() == [1, 1, 1, 1, 0]
    np.testing.assert_allclose(values["ndcg@3"], [1, log3, log4, 0, 0])
    np.testing.assert_allclose(values["ndcg@5"], [1, log3, log4, log6, 0])
    np.testing.assert_allclose(values["mrr@3"], [1, 1 / 2, 1 / 3, 0, 0])
    np.testing.assert_allclose(values["mrr@5"], [1, 1 / 2, 1 / 3, 1 / 5, 0])


def test_mean_metrics_by_hand() -> None:
    assert mean_metrics(np.array([1, 4]), [2]) == {"hit@2": 0.5, "ndcg@2": 0.5, "mrr@2": 0.5}


@pytest.mark.parametrize(
    ("ranks", "k", "text"),
    [
        ([0, 1], 5, "ranks must be at least 1, got 0"),
        ([1], 0, "k must be at least 1, got 0"),
    ],
)
def test_bad_ranks_and_cutoffs(ranks: list[int], k: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        metric_values(np.array(ranks), [k])


def test_no_ranks() -> None:
    with pytest.raises(ValueError, match="at least one rank"):
        mean_metrics(np.array([], np.int64), [5])


def test_bootstrap_is_a_function_of_its_seed() -> None:
    values = metric_values(np.random.default_rng(0).integers(1, 30, 200), [5, 10])
    first = bootstrap_interval(values, seed=3)
    assert first == bootstrap_interval(values, seed=3)
    assert first != bootstrap_interval(values, seed=4)


def test_bootstrap_has_the_width_of_the_standard_error() -> None:
    ranks = np.repeat([1, 100], [300, 700])
    low, high = bootstrap_interval(metric_values(ranks, [1]), samples=4000)["hit@1"]
    error = math.sqrt(0.3 * 0.7 / 1000)
    assert low == pytest.approx(0.3 - 1.96 * error, abs=0.004)
    assert high == pytest.approx(0.3 + 1.96 * error, abs=0.004)


def test_bootstrap_keeps_a_users_targets_together() -> None:
    # Ten targets that always agree within a user hold as much as one target of the user.
    once = np.repeat([1, 100], [30, 70])
    single = bootstrap_interval(metric_values(once, [1]), samples=2000)["hit@1"]
    tenfold = bootstrap_interval(
        metric_values(np.repeat(once, 10), [1]), np.repeat(np.arange(100), 10), samples=2000
    )["hit@1"]
    apart = bootstrap_interval(metric_values(np.repeat(once, 10), [1]), samples=2000)["hit@1"]
    assert tenfold == pytest.approx(single, abs=0.02)
    assert apart[1] - apart[0] < 0.5 * (tenfold[1] - tenfold[0])


def test_bootstrap_of_a_constant_is_the_constant() -> None:
    assert bootstrap_interval(metric_values(np.ones(7, np.int64), [5]))["mrr@5"] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "text"),
    [({"samples": 0}, "samples must be at least 1"), ({"level": 1.0}, "level must lie in")],
)
def test_bad_bootstrap_options(options: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        bootstrap_interval({"hit@1": np.ones(3)}, **options)  # type: ignore[arg-type]
