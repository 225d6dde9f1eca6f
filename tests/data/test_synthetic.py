from __future__ import annotations

import numpy as np
import pytest
import torch

from recgrela_ext.data.synthetic import LAGS, make_synthetic
from recgrela_ext.errors import DataError


@pytest.fixture(scope="module")
def small():
    return make_synthetic(num_users=400, num_items=120, seed=3, mean_length=40, num_types=5)


def by_hand(oracle, songs, chosen_type):
    """P(x | songs, type), one song at a time."""
    out = np.zeros(oracle.num_items)
    for x in range(oracle.num_items):
        own = (1 - oracle.stray) * oracle.taste[chosen_type, x] + oracle.stray * oracle.common[x]
        out[x] = own
        if songs:
            recent = songs[::-1][:3]
            near = [LAGS[j] * oracle.in_genre[oracle.genre[s], x] for j, s in enumerate(recent)]
            near_share = sum(near) / sum(LAGS[: len(recent)])
            out[x] = oracle.burst * near_share + (1 - oracle.burst) * own
    return out


@pytest.mark.parametrize("length", [0, 1, 2, 3, 7])
def test_oracle_is_bayes_by_hand(small, length):
    log, oracle = small
    songs = log.item[log.user == 0][:length].astype(int).tolist()
    odds = np.ones(5)
    for t, song in enumerate(songs):
        odds *= [by_hand(oracle, songs[:t], z)[song] for z in range(5)]
    odds /= odds.sum()
    expected = sum(odds[z] * by_hand(oracle, songs, z) for z in range(5))
    np.testing.assert_allclose(oracle.posterior(np.array(songs, int)), odds, rtol=1e-9)
    np.testing.assert_allclose(oracle.next_item(np.array(songs, int)), expected, rtol=1e-9)
    scores = oracle.score([np.array(songs, np.int32) + 1])
    assert scores.dtype == torch.float32
    assert scores.shape == (1, 121)
    assert scores[0, 0] == -torch.inf
    assert float(scores[0, 1:].double().exp().sum()) == pytest.approx(1, abs=1e-5)


def test_log_follows_the_oracle(small):
    """The oracle's own log-likelihood is the entropy it expects: the log came from it."""
    log, oracle = small
    surprise, entropy = [], []
    for user in range(60):
        songs = log.item[log.user == user].astype(int)
        for t in range(0, len(songs), 2):
            p = oracle.next_item(songs[:t])
            entropy.append(-(p * np.log(p)).sum())
            surprise.append(-np.log(p[songs[t]]))
    difference = np.array(surprise) - np.array(entropy)
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(len(difference))


def test_posterior_finds_the_type(small):
    log, oracle = small
    guesses = [oracle.posterior(log.item[log.user == u]).argmax() for u in range(log.num_users)]
    assert (np.array(guesses) == oracle.user_type).mean() > 0.95


def test_same_seed_same_log_and_readable_titles(small):
    log, _ = small
    again, _ = make_synthetic(num_users=400, num_items=120, seed=3, mean_length=40, num_types=5)
    other, _ = make_synthetic(num_users=400, num_items=120, seed=4, mean_length=40, num_types=5)
    assert np.array_equal(log.item, again.item)
    assert np.array_equal(log.time, again.time)
    assert not np.array_equal(log.item[:400], other.item[:400])
    assert len(set(log.item_titles.values())) == 120
    lengths = np.bincount(log.user)
    assert (lengths.min(), lengths.max()) == (20, 60)
    assert (np.diff(log.time)[np.diff(log.user) == 0] > 0).all()


def ndcg(scores, targets):
    own = scores[np.arange(len(targets)), targets]
    rank = (scores[:, 1:] >= own[:, None]).sum(axis=1)
    return float(np.where(rank <= 10, 1 / np.log2(rank + 1), 0).mean())


def test_long_history_matters_in_the_default_log():
    """Six events of history, or popularity, stay well below the whole history."""
    log, oracle = make_synthetic(num_users=600)
    train, _, test = log.leave_one_out()
    histories = [test.history(i) for i in range(len(test))]
    whole = ndcg(oracle.score(histories).numpy(), test.target_items)
    six = ndcg(oracle.score([h[-6:] for h in histories]).numpy(), test.target_items)
    counts = np.bincount(train.items, minlength=train.n_items).astype(float)
    popular = ndcg(np.tile(counts, (len(test), 1)), test.target_items)
    assert popular < 0.4 * whole
    assert six < 0.95 * whole
    assert whole > 0.17


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_items": 10}, "num_items must be at least 120, got 10"),
        ({"num_users": 0}, "num_users must be at least 1"),
        ({"burst": 1.0}, "burst must lie in"),
        ({"stray": 0.0}, "stray in"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(DataError, match=message):
        make_synthetic(**options)
