"""A peer with the bias of repeats; the bias itself is tested in tests/model/test_repeat_bias.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.peer_models import GRU4Rec, PeerConfig
from benchmarks.quality_queue import Run
from benchmarks.quality_run import build
from benchmarks.repeat_bias import WithRepeatBias
from recgrela_ext import RecGRELA, evaluate, fit
from recgrela_ext.data.sequences import Sequences, Targets
from recgrela_ext.evaluation.ranking import rank_targets
from recgrela_ext.training import TrainConfig
from tests.model.dense_bias import biased

N = 20


@pytest.fixture
def model() -> WithRepeatBias:
    torch.manual_seed(0)
    inner = GRU4Rec(PeerConfig(N, max_seq_len=16))
    torch.nn.init.normal_(inner.item_embedding.weight, std=0.3)
    found = WithRepeatBias(inner)
    torch.nn.init.normal_(found.repeat_bias.weight, std=0.1)
    return found.eval()


def test_loss_and_gradients(model) -> None:
    """Windows with repeats, one of them shorter than the other."""
    torch.manual_seed(1)
    item_seq, targets = torch.randint(1, 8, (2, 2, 13)).unbind(0)
    item_seq[1, 9:], targets[1, 9:] = 0, 0
    hidden = model.encode(item_seq)
    losses = []
    for b, length in enumerate((13, 9)):
        for t in range(length):
            scores = hidden[b, t] @ model.item_embedding.weight.t()
            scores = biased(item_seq[b, : t + 1].tolist(), scores, model.repeat_bias.weight)[1:]
            losses.append(torch.nn.functional.cross_entropy(scores, targets[b, t] - 1))
    expected = torch.stack(losses).mean()
    found = model.loss(item_seq, torch.tensor([13, 9]), targets)
    torch.testing.assert_close(found, expected)
    grads, wanted = (torch.autograd.grad(x, list(model.parameters())) for x in (found, expected))
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-6)


def test_ranks_go_by_the_whole_history(model) -> None:
    """The model reads the last 16 items, the bias all of them."""
    rng = np.random.default_rng(0)
    log = Sequences.from_lists([rng.integers(1, N, length) for length in (4, 41, 2)], N - 1)
    targets = Targets.last_of(log)
    ranks = rank_targets(model, targets)
    for i, item in enumerate(targets.target_items):
        history = targets.history(i)
        hidden = model(torch.from_numpy(history[None, -16:].astype(np.int64)))[0]
        scores = hidden @ model.item_embedding.weight.t()
        scores = biased(history.tolist(), scores, model.repeat_bias.weight)[1:]
        assert ranks.seen_included[i] == int((scores >= scores[item - 1]).sum())


def test_fit_learns_that_nothing_repeats(tmp_path: Path) -> None:
    """Random items without repeats: nothing but the bias can tell seen items from others."""
    rng = np.random.default_rng(0)
    log = Sequences.from_lists([rng.permutation(N - 1)[:12] + 1 for _ in range(80)], N - 1)
    config = {"hidden_size": 8, "num_layers": 1, "num_heads": 1, "repeat_bias": True}
    run = Run("RecGRELA", "x", "file", "leave_one_out", 0, config, {}, {}, "")
    model = build(run, log)
    assert isinstance(model, WithRepeatBias)
    assert isinstance(model.model, RecGRELA)
    recipe = TrainConfig(lr=0.01, targets_per_step=100, patience=None)
    fit(model, log, epochs=6, config=recipe, checkpoint_dir=tmp_path)
    assert (model.repeat_bias(torch.tensor([1, 2, 3, 5])) < -2).all()
    result = evaluate(model, Targets.last_of(log), baselines={}, bootstrap=0)
    views = result["mean"]["seen_included/hit@10"], result["mean"]["seen_excluded/hit@10"]
    assert views[0] > 0.9 * views[1]
