"""The reference against results by hand, the formulas stated independently (exact.py), and outputs
of the published implementation. Everything else is compared with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from recgrela_ext.ops import inv_freq
from recgrela_ext.ops.reference import (
    feature_map,
    gated_rela,
    gated_rela_step,
    rela,
    rotate,
    zero_state,
)
from tests.ops.exact import exact
from tests.ops.problems import Problem, gradients, make_problem, outputs, random_gradients
from tests.tolerance import assert_same_bits, assert_same_history


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def test_feature_map_by_hand() -> None:
    x = torch.tensor([-800.0, -1.0, -0.0, 0.0, 2.0, 800.0], dtype=torch.float64)
    assert feature_map(x).tolist() == [0.0, math.exp(-1), 1.0, 1.0, 3.0, 801.0]


def test_feature_map_has_a_gradient_everywhere() -> None:
    x = torch.tensor([-800.0, -1.0, 0.0, 2.0, 800.0], dtype=torch.float64, requires_grad=True)
    feature_map(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, math.exp(-1), 1.0, 1.0, 1.0]


def test_quarter_turn_by_hand() -> None:
    x = torch.tensor([[[[3.0, 4.0]]]], dtype=torch.float64)
    frequency = torch.tensor([[math.pi / 2]], dtype=torch.float64)
    turned = rotate(x, torch.tensor([[1]]), frequency).flatten().tolist()
    assert turned == pytest.approx([-4.0, 3.0])


def one_head(*rows: tuple[float, float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)[None, :, None, :]  # [1, L, 1, 2]


def test_two_items_by_hand() -> None:
    """H = 1, D = 2, W = 2, a quarter turn per position, eps = 0.5."""
    q, k = one_head((0, 1), (1, 0)), one_head((1, 0), (0, 2))
    v, gate = one_head((2, -1), (4, 3)), one_head((1, -1), (2, 0.5))
    weight = torch.tensor([[0.5, 1.0], [-1.0, 2.0]], dtype=torch.float64)
    bias = torch.tensor([0.25, -0.5], dtype=torch.float64)
    frequency = torch.tensor([[math.pi / 2]], dtype=torch.float64)
    out, (kv, k_sum, conv, position) = gated_rela(
        q, k, v, gate, frequency, weight, bias, return_final_state=True, eps=0.5
    )
    # phi(q) = (1, 2), (2, 1) and phi(k) = (2, 1), (1, 3); item 1 turned: (-1, 2) and (-3, 1).
    # Item 0: score 1*2 + 2*1 = 4, not turned as well.
    first = [4 * x / (4 + 0.5) for x in (2, -1)]
    # Item 1: scores with R q = (-1, 2): key (2, 1) gives 0, key (-3, 1) gives 5; den 5 + 5.
    second = [5 * x / (10 + 0.5 * 2) for x in (4, 3)]
    shortcut = [
        [silu(0.25 + 1.0 * 2), silu(-0.5 + 2.0 * -1)],
        [silu(0.25 + 0.5 * 2 + 1.0 * 4), silu(-0.5 - 1.0 * -1 + 2.0 * 3)],
    ]
    expected = [
        silu(g) * (o + a)
        for g, o, a in zip(
            [1, -1, 2, 0.5], [*first, *second], [*shortcut[0], *shortcut[1]], strict=True
        )
    ]
    assert out.flatten().tolist() == pytest.approx(expected, rel=1e-14)
    # kv = (2, 1)^T (2, -1) + (-3, 1)^T (4, 3), key dimension first.
    assert kv.flatten().tolist() == pytest.approx([4 - 12, -2 - 9, 2 + 4, -1 + 3], abs=1e-14)
    assert k_sum.flatten().tolist() == [3, 4]
    assert conv.tolist() == [[[4, 3]]]
    assert position.tolist() == [2]


def test_one_item_gives_its_value_back() -> None:
    q, k, v = (torch.randn(3, 1, 2, 4, dtype=torch.float64) for _ in range(3))
    out = rela(q, k, v, inv_freq(2, 4), eps=0.0)
    assert isinstance(out, torch.Tensor)
    torch.testing.assert_close(out, v, rtol=1e-14, atol=1e-14)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "longer than a chunk": {"L": 70},
    "right-padded": {"lengths": [5, 0]},
    "packed": {"packed": [3, 0, 7]},
    "state": {"state": True, "return_final_state": True},
    "packed with state": {"packed": [3, 0, 7], "state": True, "return_final_state": True},
    "without convolution": {"W": 0},
    "convolution of width 1": {"W": 1, "state": True, "return_final_state": True},
    "without bias": {"bias": False},
    "without gate": {"gate": False},
    "bidirectional": {"causal": False},
    "bidirectional, right-padded": {"causal": False, "lengths": [5, 0]},
    "bidirectional, packed": {"causal": False, "packed": [3, 0, 7]},
    "large eps": {"eps": 0.3},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_against_the_formulas(options: dict[str, Any]) -> None:
    problem = make_problem(**options)
    found = outputs(problem.run(gated_rela))
    wanted = exact(problem, random_gradients(found)) if problem.causal else exact(problem)
    assert found.keys() == wanted.outputs.keys()
    for name, x in found.items():
        torch.testing.assert_close(x, wanted.outputs[name], rtol=1e-12, atol=1e-13)
    if problem.causal:
        for name, x in gradients(problem, gated_rela).items():
            torch.testing.assert_close(x, wanted.gradients[name], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head_dim", [8, 16])
def test_against_the_published_attention(golden_dir: Path, head_dim: int, causal: bool) -> None:
    with safe_open(golden_dir / f"attention_causal_d{head_dim}.safetensors", "pt") as file:
        golden = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        num_heads = int(file.metadata()["num_heads"])
    rows = {n: golden[n].unflatten(-1, (num_heads, head_dim)) for n in ("q", "k", "x")}
    out = gated_rela(
        rows["q"], rows["k"], rows["x"], None, inv_freq(num_heads, head_dim),
        golden["conv_weight"].squeeze(1), golden["conv_bias"], causal=causal,
    )  # fmt: skip
    assert isinstance(out, torch.Tensor)
    expected = golden["out_causal" if causal else "out_bidirectional"]
    torch.testing.assert_close(out.flatten(-2), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
def test_padded_is_packed_is_one_by_one(causal: bool) -> None:
    lengths = [70, 0, 1, 9]
    padded = make_problem(4, 70, lengths=lengths, causal=causal)
    keep = torch.arange(70) < torch.tensor(lengths)[:, None]
    rows = {n: getattr(padded, n)[keep] for n in ("q", "k", "v", "gate")}
    starts = torch.tensor([0, *lengths]).cumsum(0)
    packed = padded.but(**rows, lengths=None, cu_seqlens=starts)
    out = packed.run(gated_rela)
    assert_same_history("packed", out, padded.run(gated_rela)[keep])
    for b, n in enumerate(lengths):
        alone = {name: getattr(padded, name)[b : b + 1, :n] for name in ("q", "k", "v", "gate")}
        one = padded.but(**alone, lengths=None).run(gated_rela)
        assert_same_history(f"sequence {b}", out[starts[b] : starts[b + 1]], one[0])


def test_padding_may_hold_anything() -> None:
    lengths = [5, 0]
    problem = make_problem(lengths=lengths)
    keep = (torch.arange(9) < torch.tensor(lengths)[:, None])[:, :, None, None]
    rows = {n: torch.where(keep, getattr(problem, n), math.nan) for n in ("q", "k", "v", "gate")}
    poisoned = problem.but(**rows)
    out = poisoned.run(gated_rela)
    assert_same_bits("out", out, problem.run(gated_rela))
    assert torch.equal(out[~keep.squeeze()], torch.zeros(13, 2, 8, dtype=torch.float64))
    clean = gradients(problem, gated_rela)
    for name, x in gradients(poisoned, gated_rela).items():
        assert_same_bits(name, x, clean[name])


@pytest.mark.parametrize("split", [0, 1, 3, 8, 9])
def test_states_split_anywhere(split: int) -> None:
    problem = make_problem(state=True, return_final_state=True)
    whole = outputs(problem.run(gated_rela))
    names = ("q", "k", "v", "gate")
    first, state = problem.but(**{n: getattr(problem, n)[:, :split] for n in names}).run(gated_rela)
    rest = problem.but(**{n: getattr(problem, n)[:, split:] for n in names}, initial_state=state)
    second = outputs(rest.run(gated_rela))
    assert_same_history("out", torch.cat((first, second.pop("out")), 1), whole.pop("out"))
    for name, x in second.items():
        torch.testing.assert_close(x, whole[name], rtol=1e-12, atol=1e-12)


def test_step_by_step() -> None:
    problem = make_problem(return_final_state=True)
    whole = outputs(problem.run(gated_rela))
    *state, position = zero_state(2, 2, 8, 4, torch.float64)
    for t in range(9):
        rows = [getattr(problem, n)[:, t] for n in ("q", "k", "v", "gate")]
        parameters = problem.inv_freq, problem.conv_weight, problem.conv_bias
        out = gated_rela_step(*rows, *parameters, (*state, position + t))
        assert_same_history(f"item {t}", out, whole["out"][:, t])
    for name, x in zip(("kv", "k_sum", "conv"), state, strict=True):
        torch.testing.assert_close(x, whole[f"final {name}"], rtol=1e-12, atol=1e-12)


def test_step_leaves_inactive_rows() -> None:
    problem = make_problem(3, 1, state=True)
    assert problem.initial_state is not None
    before = [x.clone() for x in problem.initial_state]
    rows = [getattr(problem, n)[:, 0] for n in ("q", "k", "v", "gate")]
    active = torch.tensor([True, False, True])
    parameters = problem.inv_freq, problem.conv_weight, problem.conv_bias
    out = gated_rela_step(*rows, *parameters, problem.initial_state, active=active)
    assert not out[1].any()
    for old, x in zip(before[:3], problem.initial_state[:3], strict=True):
        assert_same_bits("inactive", x[1], old[1])
        assert not torch.equal(x[0], old[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotation_far_out(dtype: torch.dtype) -> None:
    """Against integer arithmetic: p * omega taken modulo a turn without rounding the product."""
    frequencies = inv_freq(4, 16)
    positions = torch.tensor([[0, 1, 999_983, 1_000_000]])
    x = torch.randn(1, 4, 4, 16, dtype=torch.float64)
    turned = rotate(x.to(dtype), positions, frequencies).double()
    for t, p in enumerate(positions[0].tolist()):
        for h in range(4):
            for i in range(8):
                phase = math.fmod(p * float(frequencies[h, i]), 2 * math.pi)
                even, odd = x[0, t, h, 2 * i : 2 * i + 2].tolist()
                expected = (
                    even * math.cos(phase) - odd * math.sin(phase),
                    even * math.sin(phase) + odd * math.cos(phase),
                )
                got = turned[0, t, h, 2 * i : 2 * i + 2].tolist()
                assert got == pytest.approx(expected, abs=1e-4 if p > 1 else 1e-6)


def test_inv_freq_full_width() -> None:
    found = inv_freq(2, 4)
    assert found.dtype == torch.float64
    assert found.flatten().tolist() == pytest.approx([1, 0.1, 0.01, 0.001])


def test_inv_freq_per_head() -> None:
    assert inv_freq(2, 4, "per_head").tolist() == [pytest.approx([1, 0.01])] * 2


def test_inv_freq_base_and_none() -> None:
    assert inv_freq(1, 4, base=16.0).flatten().tolist() == pytest.approx([1, 0.25])
    assert not inv_freq(3, 4, "none").any()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0, 8), "num_heads must be at least 1, got 0"),
        ((2, 7), "head_dim must be even and at least 2, got 7"),
        ((2, 0), "head_dim must be even and at least 2, got 0"),
        ((2, 8, "adjacent"), "rotary must be 'full_width', 'per_head' or 'none', got 'adjacent'"),
        ((2, 8, "full_width", 0.0), "base must be a finite number above 0, got 0.0"),
        ((2, 8, "full_width", math.nan), "base must be a finite number above 0, got nan"),
    ],
)
def test_inv_freq_refuses(arguments: tuple[Any, ...], text: str) -> None:
    with pytest.raises(ValueError, match=f"^inv_freq: {text}$"):
        inv_freq(*arguments)


def test_half_precision_rounds_once() -> None:
    problem = make_problem(dtype=torch.bfloat16, state=True, return_final_state=True)
    out, state = problem.run(gated_rela)
    wide: Problem = problem.map_floats(lambda x: x.float(), lambda x: x)
    expected, final = wide.run(gated_rela)
    assert_same_bits("out", out, expected.bfloat16())
    for found, x in zip(state[:3], final[:3], strict=True):
        assert_same_bits("state", found, x)
