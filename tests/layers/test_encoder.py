from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from recgrela_ext import ops
from recgrela_ext.layers import (
    DropPath,
    FeedForward,
    GRELABlock,
    GRELAEncoder,
    RotaryEnhancedLinearAttention,
)
from recgrela_ext.layers.encoder import shift_rows

B, L, WIDTH = 4, 9, 16
LENGTHS = torch.tensor([9, 4, 0, 1])
REAL = torch.arange(L) < LENGTHS[:, None]


def encoder(**changes: Any) -> GRELAEncoder:
    options = {"drop_path": 0.0, "dropout": 0.0, **changes}
    module = GRELAEncoder(WIDTH, 2, 2, **options)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3)
    return module.double()


def x(fill: float = 0.0) -> Tensor:
    rows = torch.randn(B, L, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return torch.where(REAL.unsqueeze(-1), rows, fill)


@pytest.mark.parametrize("fill", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("selector", ["silu", "balance"])
def test_padding_may_hold_anything(fill: float, causal: bool, selector: str) -> None:
    module = encoder(causal=causal, selector=selector)
    results = []
    for value in (0.0, fill):
        module.zero_grad()
        rows = x(value).requires_grad_()
        out = module(rows, LENGTHS)
        out.square().sum().backward()
        assert not out[~REAL].any()
        assert not rows.grad[~REAL].any()
        results.append([out, rows.grad, *(p.grad for p in module.parameters())])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def test_mask_moves_the_run_anywhere() -> None:
    module = encoder()
    want = module(x(), LENGTHS)
    by = torch.tensor([0, 3, 5, 8])
    mask = shift_rows(REAL, -by)
    assert mask.sum(1).tolist() == LENGTHS.tolist()
    dirty = shift_rows(x(float("nan")), -by)
    out = module(dirty, mask=mask)
    assert torch.equal(shift_rows(out, by), want)
    states = module(x(), LENGTHS, return_state=True)[1]
    moved = module(dirty, mask=mask, return_state=True)[1]
    for one, other in zip(states, moved, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    gap = torch.tensor([[True, False, True]])
    with pytest.raises(ValueError, match=r"mask must have one run of True .* a gap in row 0"):
        module(torch.zeros(1, 3, WIDTH, dtype=torch.float64), mask=gap)
    empty = module(torch.zeros(2, 0, WIDTH, dtype=torch.float64), mask=REAL[:2, :0])
    assert empty.shape == (2, 0, WIDTH)


@pytest.mark.parametrize("options", [{}, {"selector": "balance"}, {"conv_width": 1}])
def test_packed_and_state(options: dict[str, Any]) -> None:
    module = encoder(**options)
    want, states = module(x(), LENGTHS, return_state=True)
    bounds = torch.nn.functional.pad(LENGTHS.cumsum(0), (1, 0))
    got, packed_states = module(x()[REAL], cu_seqlens=bounds, return_state=True)
    torch.testing.assert_close(got, want[REAL], rtol=1e-12, atol=1e-13)
    split = torch.tensor([5, 4, 0, 0])
    first, middle = module(x(), split, return_state=True)
    later = shift_rows(x(), split)
    kept = [tuple(t.clone() for t in state) for state in middle]
    second, end = module(later, LENGTHS - split, state=middle, return_state=True)
    joined = torch.where(
        (torch.arange(L) < split[:, None]).unsqueeze(-1), first, shift_rows(second, -split)
    )
    torch.testing.assert_close(joined, want, rtol=1e-12, atol=1e-13)
    for other in (packed_states, end):
        for a, b in zip(states, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    for before, after in zip(kept, middle, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    tail = module(
        later[LENGTHS[0] - split[0] :][:0].new_zeros(0, WIDTH),
        cu_seqlens=torch.zeros(B + 1, dtype=torch.int64),
        state=middle,
        return_state=True,
    )[1]
    for a, b in zip(middle, tail, strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_step_continues_a_state() -> None:
    for options in ({}, {"selector": "balance"}, {"gate_activation": "relu"}):
        module = encoder(**options)
        rows = x()[:1]
        want = module(rows)
        _, states = module(rows[:, :0], return_state=True)
        for t in range(L):
            out = module.step(rows[:, t], states)
            torch.testing.assert_close(out, want[:, t], rtol=1e-12, atol=1e-13)
            for state in states:
                state[3].add_(1)


def test_one_of_three_descriptions() -> None:
    module = encoder()
    with pytest.raises(ValueError, match="only one of lengths, mask and cu_seqlens"):
        module(x(), LENGTHS, REAL)
    with pytest.raises(ValueError, match=r"x must be \[B, L, 16\], got \[4, 9, 8\]"):
        module(x()[..., :8])
    with pytest.raises(ValueError, match=r"x must be \[T, 16\], got \[4, 9, 16\]"):
        module(x(), cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"lengths must be \[4\], got \[3\]"):
        module(x(), LENGTHS[:3])
    with pytest.raises(ValueError, match=r"mask must be \[4, 9\], got \[4, 8\]"):
        module(x(), mask=REAL[:, :8])
    with pytest.raises(ValueError, match="state must have 2 layers, got 1"):
        module(x(), state=[()])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: GRELAEncoder(16, 0, 2), "num_layers must be at least 1, got 0"),
        (lambda: GRELABlock(18, 4), "hidden_size must be a multiple of 2"),
        (lambda: GRELABlock(16, 2, selector="max"), "selector must be silu or balance"),
        (lambda: GRELABlock(16, 2, gate_activation="tanh"), "gate_activation must be one of"),
        (lambda: GRELABlock(16, 2, mlp_activation="tanh"), "activation must be one of"),
        (lambda: GRELABlock(16, 2, rotary="half"), "rotary must be"),
        (lambda: GRELABlock(16, 2, conv_width=0), "conv_width must be at least 1, got 0"),
        (lambda: DropPath(1.0), r"p must lie in \[0, 1\), got 1.0"),
    ],
)
def test_bad_options(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_block_equals_its_formula() -> None:
    block = encoder().layers[0]
    rows = x()
    out = block(rows)
    h = block.norm1(rows)
    u = block.in_proj(h)
    q, k = (t.unflatten(-1, (2, 8)) for t in block.attention.qk_proj(u).split(WIDTH, -1))
    gate = block.modulator.gate_proj(h).unflatten(-1, (2, 8))
    y = ops.reference.gated_rela(
        q,
        k,
        u.unflatten(-1, (2, 8)),
        gate,
        block.attention.inv_freq,
        block.modulator.conv_weight,
        block.modulator.conv_bias,
    )
    middle = rows + block.out_proj(y.flatten(-2))
    torch.testing.assert_close(out, middle + block.mlp(block.norm2(middle)))


def test_balance_equals_its_formula() -> None:
    block = encoder(selector="balance").layers[0]
    attention, modulator = block.attention, block.modulator
    q, k, v, gate = (
        t[..., :WIDTH].unflatten(-1, (2, 8)) for t in torch.randn(4, B, L, WIDTH).double()
    )
    got, _ = modulator(q, k, v, gate, attention, LENGTHS)
    attended = ops.reference.rela(q, k, v, attention.inv_freq, LENGTHS)
    both = ops.reference.gated_rela(
        q, k, v, None, attention.inv_freq, modulator.conv_weight, modulator.conv_bias, LENGTHS
    )
    share = gate.sigmoid()
    want = share * attended + (1 - share) * (both - attended)
    torch.testing.assert_close(got[REAL], want[REAL])


def test_attention_layer_alone() -> None:
    module = RotaryEnhancedLinearAttention(WIDTH, 2, v_projection=True).double()
    rows = x()
    out, state = module(rows, LENGTHS, return_final_state=True)
    q, k, v = module.project(rows)
    want = ops.reference.rela(q, k, v, module.inv_freq, LENGTHS)
    torch.testing.assert_close(out, want.flatten(-2))
    assert state[3].tolist() == LENGTHS.tolist()
    assert torch.equal(module(rows, LENGTHS), out)


def test_drop_path_drops_whole_sequences() -> None:
    drop = DropPath(0.5).train()
    branch, zeros = torch.ones(64 * 3, 2), torch.zeros(64 * 3, 2)
    kept = drop(zeros, branch, None, 64).view(64, 3, 2)
    assert {float(v) for v in kept.unique()} == {0.0, 2.0}
    assert torch.equal(kept, kept[:, :1, :1].expand_as(kept))
    sequence = torch.arange(64).repeat_interleave(3)
    packed = drop(None, branch, sequence, 64).view(64, 3, 2)
    assert torch.equal(packed, packed[:, :1, :1].expand_as(packed))
    assert 0 < float(packed.sum()) < 64 * 12
    assert torch.equal(drop.eval()(zeros, branch, None, 64), branch)


def test_feed_forward_without_dropout_is_plain() -> None:
    mlp = FeedForward(4, dropout=0.0).train()
    rows = torch.randn(3, 4)
    want = mlp.fc2(torch.nn.functional.gelu(mlp.fc1(rows)))
    assert torch.equal(mlp(rows), want)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_in_one_graph_with_gradients(backend: str) -> None:
    module = encoder().float()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    rows = x().float()
    for given in ({"lengths": LENGTHS}, {"mask": REAL}, {}):
        module.zero_grad()
        want = module(rows, **given)
        want.square().sum().backward()
        want_grad = [p.grad.clone() for p in module.parameters()]
        module.zero_grad()
        got = compiled(rows, **given)
        got.square().sum().backward()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        for parameter, grad in zip(module.parameters(), want_grad, strict=True):
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=1e-3)


def test_frequencies_follow_the_device_and_survive_meta() -> None:
    with torch.device("meta"):
        module = GRELAEncoder(WIDTH, 1, 2)
    assert module.layers[0].attention.inv_freq.device.type == "meta"
    module.to_empty(device="cpu")
    assert torch.equal(module.layers[0].attention.inv_freq, ops.inv_freq(2, 8))


def test_parameters_start_anew() -> None:
    module = encoder()
    fresh = GRELAEncoder(WIDTH, 2, 2)
    module.reset_parameters(std=0.5)
    for (name, x), (_, plain) in zip(
        module.named_parameters(), fresh.named_parameters(), strict=True
    ):
        if name.endswith("conv_weight"):
            assert x.abs().max() <= 0.5
            assert x.std() > 0.2
        elif name.endswith("bias") or "norm" in name:
            assert torch.equal(x, torch.full_like(x, float("norm" in name and "weight" in name)))
        else:
            assert plain.shape == x.shape
            assert 0.4 < x.std() < 0.6
