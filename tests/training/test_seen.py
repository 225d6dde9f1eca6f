"""The loss without seen items, against masked cross-entropy and through `fit`."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recgrela_ext import RecGRELA, RecGRELAConfig
from recgrela_ext.data.sequences import Sequences
from recgrela_ext.model.losses import softmax_loss
from recgrela_ext.ops import LogitBias
from recgrela_ext.training import TrainConfig, fit
from recgrela_ext.training.seen import leave_out_seen
from recgrela_ext.training.stepper import Stepper
from recgrela_ext.training.windows import TrainingWindows
from tests.training.conftest import NUM_ITEMS, make_model

N = NUM_ITEMS + 1


def masked_loss(hidden: Tensor, table: Tensor, targets: Tensor, seen: list[set[int]]) -> Tensor:
    """Cross-entropy, one row after the other."""
    losses = []
    for row, target, known in zip(hidden, targets.tolist(), seen, strict=True):
        if target:
            left = [i for i in range(1, len(table)) if i == target or i not in known]
            losses.append(F.cross_entropy(table[left] @ row, torch.tensor(left.index(target))))
    return torch.stack(losses).mean()


def known_before(train: Sequences, batch, padded: int | None) -> list[set[int]]:
    """What the user of every row has seen, the row's own item included."""
    seen = []
    for b, start in enumerate(batch.start):
        user = int(np.searchsorted(train.offsets, start, side="right")) - 1
        length = int(np.diff(batch.cu_seqlens)[b])
        for t in range(padded or length):
            history = train.items[train.offsets[user] : start + min(t + 1, length)]
            seen.append(set(history.tolist()))
    return seen


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("context", [0, 3])
def test_loss_of_a_batch_is_the_masked_one(train: Sequences, padded: bool, context: int) -> None:
    """Windows shorter than the histories, so that seen items lie before them too."""
    torch.manual_seed(0)
    lengths = [(len(set(train.history(u).tolist())), len(train.history(u))) for u in range(40)]
    assert any(distinct < length for distinct, length in lengths)  # some items repeat
    windows = TrainingWindows(
        train.items, train.offsets, max_seq_len=4, targets_per_step=30, context=context
    )
    batch = windows.epoch(0)[1]
    model = (
        make_model() if padded else RecGRELA(RecGRELAConfig(n_items=N, hidden_size=8, num_heads=1))
    )
    model.eval()
    found = Stepper(model, train, TrainConfig(loss="unseen"))._loss(batch)
    if padded:
        item_seq, lengths, targets = batch.padded(torch.device("cpu"))
        hidden, targets = model.encode(item_seq, lengths).flatten(0, 1), targets.flatten()
        seen = known_before(train, batch, item_seq.shape[1])
    else:
        items, cu_seqlens, targets = batch.packed(torch.device("cpu"))
        hidden, seen = model.encode_packed(items, cu_seqlens), known_before(train, batch, None)
    expected = masked_loss(hidden, model.item_embedding.weight, targets, seen)
    torch.testing.assert_close(found, expected)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for grad, wanted in zip(
        torch.autograd.grad(found, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6)
    parts = batch.split(3)
    assert len(parts) > 1
    assert np.concatenate([part.start for part in parts]).tolist() == batch.start.tolist()


def test_by_hand() -> None:
    train = Sequences.from_lists([np.array([3, 1, 3, 2, 1]), np.array([2, 2])], 4)
    windows = TrainingWindows(train.items, train.offsets, max_seq_len=2, targets_per_step=100)
    batch = windows.epoch(0)[0]
    history = {0: [3, 1, 3, 2, 1], 5: [2, 2]}
    for length in (None, 7):
        bias = leave_out_seen(batch, train.items, train.offsets, length)
        assert (bias.values == -torch.inf).all()
        row = 0
        for start, (low, high) in zip(batch.start, pairwise(batch.cu_seqlens), strict=True):
            begin = 0 if start < 5 else 5
            for t in range(length or high - low):
                found = bias.items[bias.offsets[row] : bias.offsets[row + 1]].tolist()
                known = set(history[begin][: start - begin + t + 1]) if t < high - low else set()
                target = batch.targets[low + t] if t < high - low else 0
                assert found == (sorted(known - {target}) if target else [])
                row += 1
        assert row == len(bias.offsets) - 1


def some_seen(rows: list[set[int]], targets: Tensor, dtype: torch.dtype) -> LogitBias:
    left = [sorted(seen - {target}) for seen, target in zip(rows, targets.tolist(), strict=True)]
    ends = np.cumsum([0, *map(len, left)])
    items = torch.tensor([item for row in left for item in row])
    values = torch.full((len(items),), -torch.inf, dtype=dtype)
    return LogitBias(torch.from_numpy(ends), items, values)


def test_gradients_and_repeats() -> None:
    """In float64; the last target repeats a seen item and stays a class."""
    torch.manual_seed(0)
    hidden, table = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (5, 7))
    targets, seen = torch.tensor([3, 0, 4, 5, 2]), [{2}, {2}, {5}, {5}, {2}]
    bias = some_seen(seen, targets, torch.float64)

    def loss(h: Tensor, t: Tensor) -> Tensor:
        return softmax_loss(h, t, targets, bias=bias)

    torch.testing.assert_close(loss(hidden, table), masked_loss(hidden, table, targets, seen))
    assert torch.autograd.gradcheck(loss, (hidden, table))


@pytest.mark.parametrize("rows", [40, 128])
def test_probabilities_that_underflow(rows: int) -> None:
    """In chunks, and enough rows for the kernel."""
    torch.manual_seed(0)
    hidden, table = torch.randn(rows, 16) * 40, torch.randn(30, 16)
    targets = torch.randint(1, 30, (rows,))
    seen = [set(torch.randint(1, 30, (10,)).tolist()) for _ in range(rows)]
    exact = masked_loss(hidden.double(), table.double(), targets, seen)
    found = softmax_loss(hidden, table, targets, bias=some_seen(seen, targets, torch.float32))
    assert exact > 100  # most targets have probability 0 in float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


def test_no_target_no_loss() -> None:
    hidden, table = torch.randn(2, 4, requires_grad=True), torch.randn(5, 4)
    nothing = torch.zeros(2, dtype=torch.int64)
    loss = softmax_loss(hidden, table, nothing, bias=some_seen([{1}, {2}], nothing, torch.float32))
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()


def test_fit_learns_to_rank_unseen_items() -> None:
    """Items come in ascending order and do not repeat: after training the next one leads."""
    rng = np.random.default_rng(0)
    starts = rng.integers(1, NUM_ITEMS - 12, 60)
    train = Sequences.from_lists([np.arange(start, start + 12) for start in starts], NUM_ITEMS)
    model = make_model()
    history = fit(
        model, train, epochs=30, config=TrainConfig(lr=0.03, loss="unseen", targets_per_step=100)
    ).history
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    scores = (
        model(torch.tensor([[4, 5, 6, 7]]), torch.tensor([4])) @ model.item_embedding.weight.t()
    )
    scores[:, :8] = -torch.inf
    assert scores.argmax() == 8


def test_unseen_loss_is_below_the_softmax(train: Sequences) -> None:
    model = make_model().eval()
    batch = TrainingWindows(train.items, train.offsets, max_seq_len=6).epoch(0)[0]
    full, unseen = (
        Stepper(model, train, TrainConfig(loss=loss))._loss(batch) for loss in ("softmax", "unseen")
    )
    assert unseen < full
