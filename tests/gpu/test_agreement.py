"""The CUDA kernels against the reference and exact sums, by the rule of tests/tolerance.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from recgrela_ext import ops
from tests.gpu.device import DEVICE, DRY_RUN
from tests.ops.agreement import assert_agrees
from tests.ops.problems import ROWS, Problem, gradients, make_problem, outputs
from tests.ops.test_gated_rela import CASES, EMPTY, LAYOUTS
from tests.ops.test_gated_rela_step import stepwise
from tests.ops.test_rela import BARE, as_gated
from tests.ops.test_rela import CASES as RELA_CASES
from tests.tolerance import assert_same_bits, assert_same_history

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def on_device(*args: Any, **options: Any) -> Problem:
    return make_problem(*args, **options).on(DEVICE)


@every_dtype
@pytest.mark.parametrize("head_dim", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200, 1000, 4097])
def test_lengths(length: int, head_dim: int, dtype: torch.dtype) -> None:
    B, H = (2, 3) if length <= 200 else (1, 1)
    assert_agrees(on_device(B, length, H, head_dim, dtype=dtype), ops.gated_rela)


@every_dtype
@pytest.mark.parametrize("head_dim", [2, 6, 10, 24, 40, 48, 136])
def test_other_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    assert_agrees(on_device(2, 65, 2, head_dim, dtype=dtype), ops.gated_rela)


@every_dtype
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_modes(options: dict[str, Any], head_dim: int, dtype: torch.dtype) -> None:
    """Padded, packed, with states, without parts."""
    assert_agrees(on_device(**options, D=head_dim, dtype=dtype), ops.gated_rela)


LONG: dict[str, dict[str, Any]] = {
    "right-padded": {"B": 4, "L": 700, "lengths": [700, 0, 257, 512]},
    "packed": {"packed": [700, 0, 1, 513, 64]},
    "state": {"B": 1, "L": 700, "state": True, "return_final_state": True},
    "state, packed": {"packed": [300, 0, 257], "state": True, "return_final_state": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("options", LONG.values(), ids=LONG.keys())
def test_long_modes(options: dict[str, Any], head_dim: int, dtype: torch.dtype) -> None:
    """Where a sequence is no longer held on the chip as a whole."""
    assert_agrees(on_device(**options, H=1, D=head_dim, dtype=dtype), ops.gated_rela)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [None, [65, 0, 7]], ids=["padded", "packed"])
@pytest.mark.parametrize("head_dim", [16, 24, 64, 128])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_layouts(
    layout: Callable[..., dict[str, Tensor]],
    head_dim: int,
    packed: list[int] | None,
    dtype: torch.dtype,
) -> None:
    """Strided rows, aligned or not, are read in place."""
    problem = on_device(L=70, D=head_dim, dtype=dtype, packed=packed)
    strided = problem.but(**layout({n: getattr(problem, n) for n in ROWS}))
    assert not strided.q.is_contiguous()
    assert_agrees(strided, ops.gated_rela)


def test_gradient_layouts() -> None:
    """An expanded and a transposed gradient of the output."""
    problem = on_device(L=70, D=16, dtype=torch.float32).requiring_grad()
    out = problem.run(ops.gated_rela)
    leaves = list(problem.leaves().values())
    one = torch.ones((), device=DEVICE).expand(out.shape)
    weights = torch.randn(*out.shape[::-1], device=DEVICE).permute(3, 2, 1, 0)
    for gradient in (one, weights):
        found = torch.autograd.grad(out, leaves, gradient, retain_graph=True)
        wanted = torch.autograd.grad(out, leaves, gradient.contiguous(), retain_graph=True)
        for x, y in zip(found, wanted, strict=True):
            assert_same_bits("gradient", x, y)


@pytest.mark.parametrize("options", RELA_CASES.values(), ids=RELA_CASES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rela(options: dict[str, Any], dtype: torch.dtype) -> None:
    assert_agrees(on_device(**options, **BARE, D=16, dtype=dtype), as_gated)


@pytest.mark.parametrize("start", [1_000_003, 2**40])
def test_positions_far_out(start: int) -> None:
    problem = make_problem(L=70, D=16, dtype=torch.float32, state=True, return_final_state=True)
    assert problem.initial_state is not None
    state = (*problem.initial_state[:3], torch.tensor([start, start + 12345]))
    far = problem.but(initial_state=state).on(DEVICE)
    assert_agrees(far, ops.gated_rela, backward=start < 2**30)


def test_float64() -> None:
    assert_agrees(on_device(L=70, D=16, dtype=torch.float64), ops.gated_rela)


@pytest.mark.parametrize("options", EMPTY.values(), ids=EMPTY.keys())
def test_empty(options: dict[str, Any]) -> None:
    problem = on_device(**options, dtype=torch.float32, state=True, return_final_state=True)
    assert problem.initial_state is not None
    out, final = problem.run(ops.gated_rela)
    assert out.shape == problem.q.shape
    assert not out.any()
    for x, y in zip(final, problem.initial_state, strict=True):
        assert_same_bits("state", x, y)
    for name, x in gradients(problem, ops.gated_rela).items():
        assert x.shape == problem.leaves()[name].shape
        assert name in ("kv", "k_sum", "conv") or not x.any()


@every_dtype
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_padding_may_hold_anything(head_dim: int, dtype: torch.dtype) -> None:
    lengths = [70, 3, 0]
    problem = on_device(3, 70, D=head_dim, lengths=lengths, dtype=dtype)
    pad = torch.arange(70) >= torch.tensor(lengths)[:, None]
    pad = pad[:, :, None, None].to(DEVICE)
    poison = {n: getattr(problem, n).masked_fill(pad, math.nan) for n in ROWS}
    results = []
    for p in (problem, problem.but(**poison)):
        leaf = p.requiring_grad()
        out = leaf.run(ops.gated_rela)
        given = torch.ones_like(out).masked_fill(pad, math.nan)
        results.append([out, *torch.autograd.grad(out, list(leaf.leaves().values()), given)])
    for name, x, y in zip(("out", *problem.leaves()), *results, strict=True):
        assert_same_bits(name, y, x)
        if name in ("out", *ROWS):
            assert not x.masked_select(pad).any()


@pytest.mark.parametrize("where", [*ROWS, "kv", "k_sum", "conv"])
@pytest.mark.parametrize("packed", [None, [70, 9, 70]], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(16, torch.float32), (64, torch.bfloat16), (128, torch.float16)],
    ids=str,
)
def test_nan_stays_with_its_user(
    where: str, packed: list[int] | None, head_dim: int, dtype: torch.dtype
) -> None:
    options: dict[str, Any] = {"state": True, "return_final_state": True, "dtype": dtype}
    problem = on_device(3, 70, D=head_dim, packed=packed, **options)
    sick = problem.map_floats(torch.clone, torch.clone)
    x = sick.leaves()[where]
    per_user = packed is None or where not in ROWS
    (x[1] if per_user else x[70:79]).flatten()[5] = math.nan
    found, wanted = outputs(sick.run(ops.gated_rela)), outputs(problem.run(ops.gated_rela))
    grads, clean = gradients(sick, ops.gated_rela), gradients(problem, ops.gated_rela)
    leaves = [*ROWS, "kv", "k_sum", "conv"]
    found |= {n: grads[n] for n in leaves}
    wanted |= {n: clean[n] for n in leaves}
    assert found["out"].isnan().any()
    for name, y in found.items():
        by_row = packed is not None and name in (*ROWS, "out")
        others = [*range(70), *range(79, 149)] if by_row else [0, 2]
        assert_same_bits(name, y[others], wanted[name][others])


@pytest.mark.parametrize("lengths", [[70, 99, 5], [70, -3, 5], [70, 2**40, 5]])
@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(16, torch.float32), (64, torch.bfloat16)], ids=str
)
def test_malformed_lengths(lengths: list[int], head_dim: int, dtype: torch.dtype) -> None:
    """NaN for that sequence alone, nothing read or written out of bounds."""
    problem = on_device(3, 70, D=head_dim, dtype=dtype, return_final_state=True)
    given = problem.but(lengths=torch.tensor(lengths, device=DEVICE))
    if DRY_RUN:  # values on the CPU are checked before a kernel runs
        with pytest.raises(ValueError, match=r"^gated_rela: lengths must"):
            given.run(ops.gated_rela)
        return
    right = problem.but(lengths=torch.tensor([70, 70, 5], device=DEVICE))
    found, wanted = gradients(given, ops.gated_rela), gradients(right, ops.gated_rela)
    out, expected = given.run(ops.gated_rela)[0], right.run(ops.gated_rela)[0]
    assert out[1].isnan().all()
    assert_same_bits("out", out[[0, 2]], expected[[0, 2]])
    for name in ROWS:
        assert_same_bits(name, found[name][[0, 2]], wanted[name][[0, 2]])


def test_malformed_bounds() -> None:
    """The last sequence claims more rows than there are."""
    problem = on_device(packed=[5, 4, 3], D=16, dtype=torch.float32)
    given = problem.but(cu_seqlens=torch.tensor([0, 5, 9, 50], device=DEVICE))
    if DRY_RUN:
        with pytest.raises(ValueError, match=r"^gated_rela: cu_seqlens must"):
            given.run(ops.gated_rela)
        return
    out, expected = given.run(ops.gated_rela), problem.run(ops.gated_rela)
    assert out[9:].isnan().all()
    assert_same_bits("out", out[:9], expected[:9])


STEPS: dict[str, dict[str, Any]] = {
    "from nothing": {},
    "from a state": {"state": True},
    "without gate": {"gate": False},
    "without convolution": {"W": 0},
    "convolution of width 6": {"W": 6},
    "many users": {"B": 300, "L": 2},
}


@every_dtype
@pytest.mark.parametrize("head_dim", [8, 16, 24, 64, 128])
@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS.keys())
def test_steps(options: dict[str, Any], head_dim: int, dtype: torch.dtype) -> None:
    problem = on_device(**{"L": 5, **options}, D=head_dim, dtype=dtype, return_final_state=True)
    assert_agrees(problem, stepwise, backward=False)


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("split", [0, 1, 64, 65, 129, 130])
def test_prefill_then_steps_is_the_whole(split: int, head_dim: int) -> None:
    problem = on_device(2, 133, 2, head_dim, dtype=torch.float32, return_final_state=True)
    whole = outputs(problem.run(ops.gated_rela))
    rows = [{n: getattr(problem, n)[:, part] for n in ROWS} for part in (
        slice(None, split), slice(split, None))]  # fmt: skip
    first, state = problem.but(**rows[0]).run(ops.gated_rela)
    for operator in (ops.gated_rela, stepwise):
        rest = outputs(problem.but(**rows[1], initial_state=state).run(operator))
        out = torch.cat((first, rest.pop("out")), 1)
        assert_same_history("out", out, whole["out"])
        assert rest.pop("final position").tolist() == [133, 133]
        for name, x in rest.items():
            assert_same_history(name, x, whole[name], (-2, -1))


@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_padded_is_packed_is_one_by_one(head_dim: int) -> None:
    lengths = [300, 0, 1, 9]
    padded = on_device(4, 300, D=head_dim, lengths=lengths, dtype=torch.float32, state=True)
    keep = (torch.arange(300) < torch.tensor(lengths)[:, None]).to(DEVICE)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    rows = {n: getattr(padded, n)[keep] for n in ROWS}
    packed = padded.but(**rows, lengths=None, cu_seqlens=starts.to(DEVICE))
    out = packed.run(ops.gated_rela)
    assert_same_history("packed", out, padded.run(ops.gated_rela)[keep])
    for b, n in enumerate(lengths):
        alone = padded.but(
            **{name: getattr(padded, name)[b : b + 1, :n] for name in ROWS},
            lengths=None,
            initial_state=tuple(x[b : b + 1] for x in padded.initial_state or ()),
        )
        one = alone.run(ops.gated_rela)
        assert_same_history(f"sequence {b}", out[starts[b] : starts[b + 1]], one[0])
