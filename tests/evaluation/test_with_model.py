"""Evaluation and lists of the package's own model, both variants."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recgrela_ext import RecGRELA, RecGRELAConfig
from recgrela_ext.data.sequences import Sequences, Targets
from recgrela_ext.evaluation import evaluate, rank_targets, recommend_for_users

NUM_ITEMS = 60


def histories(users: int = 25) -> list[list[int]]:
    rng = np.random.default_rng(3)
    lengths = rng.integers(2, 30, users)
    return [rng.integers(1, NUM_ITEMS + 1, length).tolist() for length in lengths]


def small_model(variant: str = "causal") -> RecGRELA:
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_seq_len": 12}
    make = RecGRELAConfig.paper if variant == "paper" else RecGRELAConfig
    torch.manual_seed(4)
    model = RecGRELA(make(n_items=NUM_ITEMS + 1, **sizes))
    with torch.no_grad():
        model.item_embedding.weight.mul_(20)
    return model


@pytest.mark.parametrize("variant", ["causal", "paper"])
def test_ranks_are_those_of_the_models_scores(variant: str) -> None:
    model = small_model(variant).eval()
    targets = Targets.last_of(Sequences.from_lists(histories(), NUM_ITEMS))
    # As the published evaluation pads: every row to max_seq_len.
    item_seq = torch.zeros(len(targets), 12, dtype=torch.int64)
    for i in range(len(targets)):
        window = torch.from_numpy(targets.history(i)[-12:].astype(np.int64))
        item_seq[i, : len(window)] = window
    with torch.no_grad():
        scores = model.scores(model(item_seq, (item_seq != 0).sum(1)))[:, 1:]
    own = scores.gather(1, torch.from_numpy(targets.target_items.astype(np.int64))[:, None] - 1)
    expected = (scores >= own).sum(1)
    assert rank_targets(model, targets, batch_size=4).seen_included.tolist() == expected.tolist()


def test_lists_hold_the_items_that_rank_first() -> None:
    model = small_model()
    log = Sequences.from_lists(histories(), NUM_ITEMS)
    lines = recommend_for_users(model, log, [3, 8, 11], k=4)
    assert [line["user"] for line in lines] == [3] * 4 + [8] * 4 + [11] * 4
    for line in lines:
        extended = [[*log.history(line["user"]).tolist(), line["item"]]]
        targets = Targets.last_of(Sequences.from_lists(extended, NUM_ITEMS))
        assert rank_targets(model, targets).seen_excluded.tolist() == [line["rank"]]


@pytest.mark.gpu
def test_device_does_not_change_the_result() -> None:
    targets = Targets.last_of(Sequences.from_lists(histories(), NUM_ITEMS))
    log = Sequences.from_lists(histories(), NUM_ITEMS)
    model = small_model()
    on_cpu = evaluate(model, targets)
    lists = recommend_for_users(model, log, [1, 2], k=5)
    on_device = evaluate(model.cuda(), targets)
    assert on_device["mean"] == pytest.approx(on_cpu["mean"], abs=1e-6)
    assert on_device["machine"]["device"] == "cuda"
    again = recommend_for_users(model, log, [1, 2], k=5)
    assert [line["item"] for line in again] == [line["item"] for line in lists]
