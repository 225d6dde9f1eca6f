"""The bias of repeats, against the sum written down."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.peer_models import GRU4Rec, PeerConfig
from benchmarks.quality_queue import Run
from benchmarks.quality_run import build
from benchmarks.repeat_bias import BUCKETS, SCALE, WithRepeatBias, bucket, repeat_bias
from recgrela_ext import RecGRELA, evaluate, fit
from recgrela_ext.data.sequences import Sequences, Targets
from recgrela_ext.model.losses import softmax_loss
from recgrela_ext.training import TrainConfig

N = 20


def value_of(lag: int, bias: torch.Tensor) -> torch.Tensor:
    return SCALE * bias[min(math.ceil(math.log2(lag)), BUCKETS - 1)]


def biased(history: list[int], scores: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`scores` [N] after the whole history, item by item."""
    added = torch.zeros_like(scores)
    for item in set(history):
        lag = len(history) - max(i for i, other in enumerate(history) if other == item)
        added[item] = value_of(lag, bias)
    return scores + added


def test_buckets() -> None:
    lags = torch.tensor([1, 2, 3, 4, 5, 8, 9, 128, 129, 5000])
    assert bucket(lags).tolist() == [0, 1, 2, 2, 3, 3, 4, 7, 8, 8]


@pytest.fixture
def model() -> WithRepeatBias:
    torch.manual_seed(0)
    inner = GRU4Rec(PeerConfig(N, max_seq_len=16))
    torch.nn.init.normal_(inner.item_embedding.weight, std=0.3)
    found = WithRepeatBias(inner)
    torch.nn.init.normal_(found.bias, std=0.1)
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
            scores = biased(item_seq[b, : t + 1].tolist(), scores, model.bias)[1:]
            losses.append(torch.nn.functional.cross_entropy(scores, targets[b, t] - 1))
    expected = torch.stack(losses).mean()
    found = model.loss(item_seq, torch.tensor([13, 9]), targets)
    torch.testing.assert_close(found, expected)
    grads, wanted = (torch.autograd.grad(x, list(model.parameters())) for x in (found, expected))
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-6)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    items = torch.tensor([[1, 2, 1, 3], [2, 2, 4, 0]])
    targets = torch.tensor([1, 3, 2, 4, 1, 2, 3, 0])
    hidden, table = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (8, 6))
    bias = torch.randn(BUCKETS, dtype=torch.float64, requires_grad=True)

    def loss(h: torch.Tensor, t: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return softmax_loss(h, t, targets, bias=repeat_bias(b, items, targets.view(2, 4)))

    assert torch.autograd.gradcheck(loss, (hidden, table, bias))


def test_scores_hold_the_bias_of_the_whole_history(model) -> None:
    rng = np.random.default_rng(0)
    histories = [rng.integers(1, N, length).astype(np.int32) for length in (3, 40, 1)]
    found = model.score(histories)
    for row, history in zip(found, histories, strict=True):
        hidden = model(torch.from_numpy(history[None, -16:].astype(np.int64)))[0]
        scores = hidden @ model.item_embedding.weight.t()
        torch.testing.assert_close(row, biased(history.tolist(), scores, model.bias))


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
    assert (SCALE * model.bias[:4] < -2).all()
    result = evaluate(model, Targets.last_of(log), baselines={}, bootstrap=0)
    views = result["mean"]["seen_included/hit@10"], result["mean"]["seen_excluded/hit@10"]
    assert views[0] > 0.9 * views[1]
