"""Full softmax against F.cross_entropy; sampled losses against what they estimate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recgrela_ext.model import losses as model_losses
from recgrela_ext.training.losses import (
    NegativeSampler,
    bpr_loss,
    sampled_softmax_loss,
    softmax_loss,
)


def make_case(
    rows: int, n_items: int, dtype: torch.dtype, ignore_index: int = 0, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = (torch.randn(rows, 16, dtype=torch.float64) * scale).to(dtype).requires_grad_()
    table = torch.randn(n_items, 16, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, n_items, (rows,))
    targets[::4] = ignore_index
    return hidden, table, targets


def reference_loss(
    hidden: Tensor, table: Tensor, targets: Tensor, ignore_index: int, excluded: bool
) -> Tensor:
    logits = F.linear(hidden, table)
    if excluded:
        mask = torch.zeros(table.shape[0], dtype=torch.bool)
        mask[ignore_index] = True
        logits = logits.masked_fill(mask, -torch.inf)
    return F.cross_entropy(logits, targets, ignore_index=ignore_index)


def gradients(loss: Tensor, hidden: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    grads = torch.autograd.grad(loss, (hidden, table))
    return grads[0], grads[1]


@pytest.mark.parametrize("ignore_index", [0, 4, 36], ids=["first", "middle", "last"])
@pytest.mark.parametrize("excluded", [True, False])
@pytest.mark.parametrize("chunk_rows", [None, 1, 7, 1000])
def test_softmax_matches_cross_entropy(
    ignore_index: int, excluded: bool, chunk_rows: int | None
) -> None:
    hidden, table, targets = make_case(50, 37, torch.float64, ignore_index)
    loss = softmax_loss(hidden, table, targets, ignore_index, excluded, chunk_rows)
    expected = reference_loss(hidden, table, targets, ignore_index, excluded)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    found = gradients(loss, hidden, table)
    for grad, wanted in zip(found, gradients(expected, hidden, table), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-15)
    assert not found[0][targets == ignore_index].any()
    if excluded:
        assert not found[1][ignore_index].any()


@pytest.mark.parametrize("scale", [1.0, 40.0], ids=["usual", "probabilities underflow"])
def test_float32_is_as_exact_as_torch(scale: float) -> None:
    hidden, table, targets = make_case(300, 500, torch.float32, scale=scale)
    wide = [t.detach().double().requires_grad_() for t in (hidden, table)]
    exact = reference_loss(wide[0], wide[1], targets, 0, True)
    torches = reference_loss(hidden, table, targets, 0, True)
    ours = softmax_loss(hidden, table, targets)
    allowed = 2 * abs(torches.item() - exact.item()) + 4 * 1.2e-7 * exact.item()
    assert abs(ours.item() - exact.item()) <= allowed
    wanted = gradients(exact, wide[0], wide[1])
    theirs = gradients(torches, hidden, table)
    for grad, want, their in zip(gradients(ours, hidden, table), wanted, theirs, strict=True):
        error, torch_error = ((g.double() - want).abs().max().item() for g in (grad, their))
        assert error <= 2 * torch_error + 4 * 1.2e-7 * want.abs().max().item()


def test_same_bits_twice_and_on_a_strided_table() -> None:
    hidden, table, targets = make_case(700, 400, torch.float32)
    first = gradients(softmax_loss(hidden, table, targets), hidden, table)
    again = gradients(softmax_loss(hidden, table, targets), hidden, table)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    wide = torch.zeros(400, 32)
    wide[:, ::2] = table.detach()
    strided = wide[:, ::2].requires_grad_()
    torch.testing.assert_close(
        softmax_loss(hidden, strided, targets), softmax_loss(hidden, table, targets)
    )


def test_gradcheck_and_only_the_needed_gradient() -> None:
    hidden, table, targets = make_case(6, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda h, t: softmax_loss(h, t, targets), (hidden, table))
    loss = softmax_loss(hidden, table.detach(), targets)
    loss.backward()
    assert hidden.grad is not None
    assert table.grad is None
    with torch.no_grad():
        assert not softmax_loss(hidden, table, targets).requires_grad


def test_no_target_gives_zero() -> None:
    hidden, table, _ = make_case(5, 6, torch.float32)
    loss = softmax_loss(hidden, table, torch.zeros(5, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0.0
    assert not hidden.grad.any()
    assert not table.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32(dtype: torch.dtype) -> None:
    hidden, table, targets = make_case(60, 50, torch.float32)
    low = hidden.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = softmax_loss(low, table, targets)
    expected = reference_loss(low.float(), table, targets, 0, True)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_bfloat16_autocast_rounds_only_the_gradients_factors() -> None:
    hidden, table, targets = make_case(400, 300, torch.float32, scale=0.5)
    plain = softmax_loss(hidden, table, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = softmax_loss(hidden, table, targets)
    assert torch.equal(low, plain)
    pairs = zip(gradients(low, hidden, table), gradients(plain, hidden, table), strict=True)
    for mine, exact in pairs:
        assert not torch.equal(mine, exact)
        assert mine.dtype == torch.float32
        assert (mine - exact).norm() < 2**-7 * exact.norm()


def test_small_float16_gradients_survive_a_loss_scale() -> None:
    hidden, table, targets = make_case(60, 50, torch.float32)
    low = hidden.detach().half().requires_grad_()
    small = table.detach() * 1e-7  # gradients of the hidden states round to zero in float16
    grad = torch.autograd.grad(softmax_loss(low, small, targets) * 2.0**16, low)[0]
    wide = low.detach().float().requires_grad_()
    expected = torch.autograd.grad(softmax_loss(wide, small, targets) * 2.0**16, wide)[0]
    torch.testing.assert_close(grad, expected.half())
    assert grad.any()


def test_never_all_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    softmax = torch.softmax
    monkeypatch.setattr(
        model_losses.torch,
        "softmax",
        lambda x, *a, **k: sizes.append(len(x)) or softmax(x, *a, **k),
    )
    hidden, table, targets = make_case(1000, 20, torch.float32)
    softmax_loss(hidden, table, targets, method="chunked")
    assert max(sizes) <= 256
    assert sum(sizes) == int((targets != 0).sum())


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch 2.13 has it first")
@pytest.mark.parametrize("excluded", [True, False])
def test_torch_method_agrees(excluded: bool) -> None:
    hidden, table, targets = make_case(90, 60, torch.float32)
    ours = softmax_loss(hidden, table, targets, 0, excluded)
    torches = softmax_loss(hidden, table, targets, 0, excluded, method="torch")
    torch.testing.assert_close(ours, torches)
    pairs = zip(gradients(ours, hidden, table), gradients(torches, hidden, table), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


def test_bad_arguments_give_one_line() -> None:
    hidden, table, targets = make_case(5, 6, torch.float32)
    cases = [
        ((hidden[:, :3], table, targets), {}, "hidden_size"),
        ((hidden, table, targets[:4]), {}, "targets must be"),
        ((hidden, table, targets + 6), {}, "below n_items=6"),
        ((hidden, table, targets - 9), {}, "got -9"),
        ((hidden, table, targets), {"ignore_index": -100}, "ignore_index"),
        ((hidden, table, targets), {"chunk_rows": 0}, "chunk_rows"),
        ((hidden, table, targets), {"method": "fast"}, "method"),
    ]
    for arguments, options, word in cases:
        with pytest.raises(ValueError, match=word):
            softmax_loss(*arguments, **options)
    with pytest.raises(TypeError, match="int64"):
        softmax_loss(hidden, table, targets.int())


@pytest.mark.parametrize("strategy", ["uniform", "popularity"])
def test_sampled_softmax_tends_to_the_full_one(strategy: str) -> None:
    torch.manual_seed(0)
    hidden, table, targets = make_case(40, 60, torch.float64, scale=0.3)
    sampler = NegativeSampler(60, strategy, counts=np.arange(60) + 3, power=0.75)
    sampled = sampled_softmax_loss(hidden, table, targets, sampler, 400_000)
    full = softmax_loss(hidden, table, targets)
    torch.testing.assert_close(sampled, full, rtol=5e-3, atol=0)
    pairs = zip(gradients(sampled, hidden, table), gradients(full, hidden, table), strict=True)
    for mine, theirs in pairs:
        assert (mine - theirs).abs().max() < 0.05 * theirs.abs().max()


def test_in_batch_negatives_leave_out_the_target_itself() -> None:
    hidden = torch.randn(3, 4, dtype=torch.float64)
    table = torch.randn(6, 4, dtype=torch.float64)
    targets = torch.tensor([2, 2, 5])
    counts = np.array([0, 1, 3, 1, 1, 4])
    sampler = NegativeSampler(6, "in_batch", counts)
    loss = sampled_softmax_loss(hidden, table, targets, sampler, 10)
    scores, log_q = hidden @ table.t(), torch.tensor(counts).double().div(10).log()
    corrected = scores - log_q - np.log(3)
    rows = [
        F.cross_entropy(torch.stack([scores[0, 2], corrected[0, 5]])[None], torch.tensor([0])),
        F.cross_entropy(torch.stack([scores[1, 2], corrected[1, 5]])[None], torch.tensor([0])),
        F.cross_entropy(
            torch.stack([scores[2, 5], corrected[2, 2], corrected[2, 2]])[None], torch.tensor([0])
        ),
    ]
    torch.testing.assert_close(loss, torch.stack(rows).mean(), rtol=1e-6, atol=0)


def test_draws_follow_the_strategy_and_never_hit_padding() -> None:
    counts = np.array([7, 1, 0, 6])
    sampler = NegativeSampler(4, "popularity", counts)
    drawn = sampler.draw(20_000, torch.empty(0, dtype=torch.int64))
    shares = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0, 1 / 8, 1 / 8, 6 / 8]), atol=0.02, rtol=0)
    torch.testing.assert_close(sampler.log_q[1:].exp(), torch.tensor([1 / 8, 1 / 8, 6 / 8]))
    targets = torch.arange(1, 9)
    assert torch.equal(NegativeSampler(9, "in_batch", np.ones(9)).draw(20, targets), targets)


def test_bpr_matches_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, table, targets = make_case(8, 6, torch.float64)
    sampler = NegativeSampler(6)
    drawn = torch.tensor([3, 1, 2, 5, 4, 3])
    kept = targets[targets != 0]
    drawn = drawn[: len(kept)]
    monkeypatch.setattr(sampler, "draw", lambda count, y: drawn)
    loss = bpr_loss(hidden, table, targets, sampler)
    scores = (hidden @ table.t())[targets != 0]
    margin = (scores.gather(1, kept[:, None]) - scores.gather(1, drawn[:, None]))[:, 0]
    expected = -F.logsigmoid(margin[drawn != kept]).mean()
    torch.testing.assert_close(loss, expected)


def test_sampler_names_a_bad_argument() -> None:
    with pytest.raises(ValueError, match="strategy"):
        NegativeSampler(5, "best")
    with pytest.raises(ValueError, match="counts must have n_items=5 entries, got none"):
        NegativeSampler(5, "popularity")
