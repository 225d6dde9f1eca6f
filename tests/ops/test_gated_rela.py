"""gated_rela's kernels: precision, memory layouts, empty input, isolation, determinism."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from recgrela_ext import ops
from tests.ops.agreement import assert_agrees
from tests.ops.problems import ROWS, Problem, gradients, make_problem, outputs
from tests.tolerance import assert_same_bits, assert_same_history

pytestmark = pytest.mark.kernels
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


@every_dtype
@pytest.mark.parametrize("head_dim", [2, 8, 10, 16, 24, 32, 64, 128, 136])
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    assert_agrees(make_problem(L=65, H=2, D=head_dim, dtype=dtype), ops.gated_rela)


@every_dtype
@pytest.mark.parametrize("length", [1, 2, 63, 64, 130, 200])
def test_lengths(length: int, dtype: torch.dtype) -> None:
    assert_agrees(make_problem(L=length, H=3, D=16, dtype=dtype), ops.gated_rela)


@pytest.mark.parametrize(("head_dim", "length"), [(8, 4000), (16, 4000), (8, 9001)])
def test_long_sequence(head_dim: int, length: int) -> None:
    """Without convolution and gate, whose own rounding hides that of the sums."""
    problem = make_problem(1, length, 1, head_dim, 0, torch.float32, gate=False)
    assert_agrees(problem, ops.gated_rela)


CASES: dict[str, dict[str, Any]] = {
    "right-padded": {"B": 5, "L": 130, "lengths": [130, 0, 1, 64, 65]},
    "packed": {"packed": [65, 0, 1, 128, 3, 0]},
    "state": {"L": 70, "state": True, "return_final_state": True},
    "shorter than the convolution": {"L": 2, "state": True, "return_final_state": True},
    "state, padded": {
        "B": 4,
        "L": 66,
        "lengths": [66, 0, 2, 64],
        "state": True,
        "return_final_state": True,
    },
    "state, packed": {"packed": [65, 0, 1, 3], "state": True, "return_final_state": True},
    "final state from nothing": {"L": 70, "return_final_state": True},
    "initial state alone": {"L": 70, "state": True},
    "without gate": {"L": 70, "gate": False},
    "without bias": {"L": 70, "bias": False},
    "without convolution": {"L": 70, "W": 0, "state": True, "return_final_state": True},
    "convolution of width 1": {"L": 70, "W": 1, "state": True, "return_final_state": True},
    "convolution of width 2": {"L": 70, "W": 2, "state": True, "return_final_state": True},
    "convolution of width 9": {"L": 70, "W": 9, "state": True, "return_final_state": True},
    "convolution wider than a chunk": {
        "L": 200,
        "W": 140,
        "state": True,
        "return_final_state": True,
    },
    "neither gate nor convolution": {"L": 70, "gate": False, "W": 0},
    "large eps": {"L": 70, "eps": 0.3},
    "eps 0": {"L": 70, "eps": 0.0},
    "one head": {"L": 70, "H": 1},
    "many sequences": {"B": 130, "L": 3},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_modes(options: dict[str, Any], dtype: torch.dtype) -> None:
    assert_agrees(make_problem(**options, dtype=dtype), ops.gated_rela)


@pytest.mark.parametrize("name", ["gate", "conv_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=dtype_name)
def test_silu_of_huge_numbers(name: str, dtype: torch.dtype) -> None:
    """SiLU and its slope are 0 far below 0."""
    problem = make_problem(L=5, dtype=dtype)
    x = getattr(problem, name)
    x.view(-1)[::3] = torch.finfo(dtype).min / 4
    problem = problem.requiring_grad()
    wanted = problem.run(ops.reference.gated_rela).double()
    out = problem.run(ops.gated_rela)
    torch.testing.assert_close(out.double(), wanted, rtol=0.01, atol=1e-6)
    (slope,) = torch.autograd.grad(out.sum(), getattr(problem, name))
    assert slope.view(-1)[::3].abs().max() < 1e-30


@pytest.mark.parametrize("start", [1_000_003, 2**40])
def test_positions_far_out(start: int) -> None:
    problem = make_problem(L=70, D=16, dtype=torch.float32, state=True, return_final_state=True)
    assert problem.initial_state is not None
    state = (*problem.initial_state[:3], torch.tensor([start, start + 12345]))
    assert_agrees(problem.but(initial_state=state), ops.gated_rela, backward=start < 2**30)


def fused(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """All rows as slices of one projection [..., 4 * H * D]."""
    shape = next(iter(x.values())).shape
    whole = torch.cat([row.flatten(-2) for row in x.values()], dim=-1)
    parts = whole.chunk(len(x), dim=-1)
    return {n: p.unflatten(-1, shape[-2:]) for n, p in zip(x, parts, strict=True)}


def heads_first(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """[B, H, L, D] in memory."""
    return {n: r.transpose(-3, -2).contiguous().transpose(-3, -2) for n, r in x.items()}


def every_other_item(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: r.repeat_interleave(2, dim=-3)[..., 1::2, :, :] for n, r in x.items()}


def batch_last(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """[H, L, B, D] in memory, packed rows [H, T, D]."""
    return {n: r.transpose(0, -2).contiguous().transpose(0, -2) for n, r in x.items()}


def off_by_one(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Heads of D + 1 numbers, the first one unused: no row is aligned."""
    return {n: torch.nn.functional.pad(r, (1, 0), value=math.nan)[..., 1:] for n, r in x.items()}


LAYOUTS = (fused, heads_first, every_other_item, batch_last, off_by_one)
by_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)


@by_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("packed", [None, [65, 0, 7]], ids=["padded", "packed"])
def test_layouts(
    layout: Callable[..., dict[str, Tensor]], packed: list[int] | None, dtype: torch.dtype
) -> None:
    """Strided rows are read in place: the bits of contiguous ones."""
    problem = make_problem(L=70, D=24, dtype=dtype, packed=packed)
    strided = problem.but(**layout({n: getattr(problem, n) for n in ROWS}))
    assert not strided.q.is_contiguous()
    assert_same_bits("out", strided.run(ops.gated_rela), problem.run(ops.gated_rela))
    leaves = [getattr(strided, n).requires_grad_() for n in ROWS]
    grads = torch.autograd.grad(strided.run(ops.gated_rela).square().sum(), leaves)
    plain = problem.requiring_grad()
    leaves = [getattr(plain, n) for n in ROWS]
    expected = torch.autograd.grad(plain.run(ops.gated_rela).square().sum(), leaves)
    for name, x, y in zip(ROWS, grads, expected, strict=True):
        assert_same_bits(name, x.contiguous(), y)


def test_shared_and_expanded_rows() -> None:
    """One tensor for several arguments, and one sequence for the whole batch (batch stride 0)."""
    problem = make_problem(B=1, L=70)
    row = problem.q.expand(3, -1, -1, -1)
    shared = problem.but(q=row, k=row, v=row, gate=row)
    copied = shared.map_floats(torch.clone, lambda x: x)
    assert_same_bits("out", shared.run(ops.gated_rela), copied.run(ops.gated_rela))
    x = problem.q.clone().requires_grad_()
    problem.but(q=x, k=x, v=x, gate=x).run(ops.gated_rela).sum().backward()
    leaves = problem.but(q=x, k=x, v=x, gate=x).requiring_grad()
    leaves.run(ops.gated_rela).sum().backward()
    expected = sum(getattr(leaves, n).grad for n in ROWS)
    assert_same_history("gradient", x.grad, expected, (-3, -1))


def test_gradient_layouts() -> None:
    """An expanded and a transposed gradient of the output."""
    problem = make_problem(L=70).requiring_grad()
    out = problem.run(ops.gated_rela)
    leaves = list(problem.leaves().values())
    shape = out.shape
    weights = torch.randn(*shape[::-1], dtype=torch.float64)
    for gradient in (
        torch.ones((), dtype=torch.float64).expand(shape),
        weights.permute(3, 2, 1, 0),
    ):
        found = torch.autograd.grad(out, leaves, gradient, retain_graph=True)
        expected = torch.autograd.grad(out, leaves, gradient.contiguous(), retain_graph=True)
        for x, y in zip(found, expected, strict=True):
            assert_same_bits("gradient", x, y)


EMPTY: dict[str, dict[str, Any]] = {
    "no sequences": {"B": 0},
    "no items": {"L": 0},
    "nothing": {"B": 0, "L": 0},
    "all padding": {"lengths": [0, 0]},
    "no packed sequences": {"packed": []},
    "packed empty sequences": {"packed": [0, 0]},
}


@pytest.mark.parametrize("options", EMPTY.values(), ids=EMPTY.keys())
def test_empty(options: dict[str, Any]) -> None:
    problem = make_problem(**options, state=True, return_final_state=True)
    assert problem.initial_state is not None
    out, final = problem.run(ops.gated_rela)
    assert out.shape == problem.q.shape
    assert not out.any()
    for x, y in zip(final, problem.initial_state, strict=True):
        assert_same_bits("state", x, y)
        assert x.numel() == 0 or x.data_ptr() != y.data_ptr()
    found = gradients(problem, ops.gated_rela)
    for name, x in found.items():
        assert x.shape == problem.leaves()[name].shape
        if name not in ("kv", "k_sum", "conv"):
            assert not x.any()
    expected = gradients(problem, ops.reference.gated_rela)
    for name in ("kv", "k_sum", "conv"):
        assert torch.equal(found[name], expected[name])


@every_dtype
def test_padding_may_hold_anything(dtype: torch.dtype) -> None:
    lengths = [70, 3, 0]
    problem = make_problem(3, 70, lengths=lengths, dtype=dtype, state=True, return_final_state=True)
    pad = torch.arange(70) >= torch.tensor(lengths)[:, None]
    poison = {n: getattr(problem, n).masked_fill(pad[:, :, None, None], math.nan) for n in ROWS}
    poisoned = problem.but(**poison)
    clean = outputs(problem.run(ops.gated_rela))
    for name, x in outputs(poisoned.run(ops.gated_rela)).items():
        assert_same_bits(name, x, clean[name])
    assert not clean["out"][pad].any()

    grad_out = torch.randn(problem.q.shape).to(dtype)
    grad_poison = grad_out.masked_fill(pad[:, :, None, None], math.nan)
    results = []
    for p, g in ((problem, grad_out), (poisoned, grad_poison)):
        leaf = p.requiring_grad()
        out = leaf.run(ops.gated_rela)[0]
        results.append(torch.autograd.grad(out, list(leaf.leaves().values()), g))
    for name, x, y in zip(problem.leaves(), *results, strict=True):
        assert_same_bits(name, y, x)
        if name in ROWS:
            assert not x[pad].any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", [*ROWS, "kv", "k_sum", "conv"])
@pytest.mark.parametrize("packed", [None, [70, 9, 70]], ids=["padded", "packed"])
@pytest.mark.parametrize("D", [6, 16])  # no whole vector at any level; whole vectors
def test_nan_stays_with_its_user(
    where: str, value: float, packed: list[int] | None, D: int
) -> None:
    options: dict[str, Any] = {"state": True, "return_final_state": True, "dtype": torch.float32}
    problem = make_problem(3, 70, D=D, packed=packed, **options)
    sick = problem.map_floats(torch.clone, torch.clone)
    x = sick.leaves()[where]
    per_user = packed is None or where not in ROWS
    torch.set_num_threads(1)  # users follow each other through the same memory
    (x[1] if per_user else x[70:79]).flatten()[5] = value

    found, expected = outputs(sick.run(ops.gated_rela)), outputs(problem.run(ops.gated_rela))
    leaves = [*ROWS, "kv", "k_sum", "conv"]
    grads, clean = gradients(sick, ops.gated_rela), gradients(problem, ops.gated_rela)
    found |= {n: grads[n] for n in leaves}
    expected |= {n: clean[n] for n in leaves}
    assert not found["out"].isfinite().all() or value == math.inf
    for name, y in found.items():
        by_row = packed is not None and name in (*ROWS, "out")
        others = [*range(70), *range(79, 149)] if by_row else [0, 2]
        assert_same_bits(name, y[others], expected[name][others])


@pytest.mark.parametrize("D", [6, 16])
@pytest.mark.parametrize("start", ["state", "nothing"])
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_few_long_histories_are_shared_by_threads(D: int, start: str, form: str) -> None:
    """Segments of 4,096 items, once one after the other and once each on its own."""
    packed = {"padded": None, "packed": [8192, 0, 4096, 9001]}[form]
    lengths = [9001] if form == "padded" else None
    problem = make_problem(
        1, 9100, 1, D, packed=packed, lengths=lengths, dtype=torch.float32,
        state=start == "state", return_final_state=True,
    )  # fmt: skip
    results = []
    for threads in (1, 2, 9):
        torch.set_num_threads(threads)
        found = outputs(problem.run(ops.gated_rela))
        results.append(found | {f"d{n}": g for n, g in gradients(problem, ops.gated_rela).items()})
    for other in results[1:]:
        for name, x in other.items():
            assert_same_bits(name, x, results[0][name])


@pytest.mark.parametrize("packed", [None, [200, 0, 130, 1, 70, 64]], ids=["padded", "packed"])
def test_same_bits_for_any_number_of_threads(packed: list[int] | None) -> None:
    problem = make_problem(
        6, 200, 4, 16, packed=packed, dtype=torch.float32, state=True, return_final_state=True
    )
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found = outputs(problem.run(ops.gated_rela))
        results.append(found | {f"d{n}": g for n, g in gradients(problem, ops.gated_rela).items()})
    for other in results[1:]:
        for name, x in other.items():
            assert_same_bits(name, x, results[0][name])


@every_dtype
@pytest.mark.parametrize("split", [0, 1, 3, 64, 65, 129, 130])
def test_states_split_anywhere(split: int, dtype: torch.dtype) -> None:
    """prefill(a), then b, is a + b."""
    problem = make_problem(L=130, D=16, dtype=dtype, return_final_state=True)
    whole = outputs(problem.run(ops.gated_rela))
    first, state = problem.but(**{n: getattr(problem, n)[:, :split] for n in ROWS}).run(
        ops.gated_rela
    )
    rest = problem.but(**{n: getattr(problem, n)[:, split:] for n in ROWS}, initial_state=state)
    second = outputs(rest.run(ops.gated_rela))
    out = torch.cat((first, second.pop("out")), 1)
    if out.dtype in (torch.float32, torch.float64):
        assert_same_history("out", out, whole["out"])
    else:  # each is within half a unit of the exact result
        step = torch.finfo(dtype).eps * whole["out"].abs().amax(-1, keepdim=True)
        assert ((out - whole["out"]).abs() <= step).all()
    assert second.pop("final position").tolist() == [130, 130]
    for name, x in second.items():
        assert_same_history(name, x, whole[name], (-2, -1))


@every_dtype
def test_padded_is_packed_is_one_by_one(dtype: torch.dtype) -> None:
    lengths = [70, 0, 1, 9]
    padded = make_problem(4, 70, lengths=lengths, dtype=dtype, state=True)
    keep = torch.arange(70) < torch.tensor(lengths)[:, None]
    rows = {n: getattr(padded, n)[keep] for n in ROWS}
    starts = torch.tensor([0, *lengths]).cumsum(0)
    packed = padded.but(**rows, lengths=None, cu_seqlens=starts)
    out = packed.run(ops.gated_rela)
    assert_same_bits("packed", out, padded.run(ops.gated_rela)[keep])
    for b, n in enumerate(lengths):
        alone: Problem = padded.but(
            **{name: getattr(padded, name)[b : b + 1, :n] for name in ROWS},
            lengths=None,
            initial_state=tuple(x[b : b + 1] for x in padded.initial_state or ()),
        )
        one = alone.run(ops.gated_rela)
        assert_same_bits(f"sequence {b}", out[starts[b] : starts[b + 1]], one[0])


def test_initial_state_is_never_written() -> None:
    problem = make_problem(L=70, state=True, return_final_state=True)
    assert problem.initial_state is not None
    before = [(x.clone(), x._version) for x in problem.initial_state]
    final = problem.run(ops.gated_rela)[1]
    gradients(problem, ops.gated_rela)
    for (old, version), x, new in zip(before, problem.initial_state, final, strict=True):
        assert_same_bits("state", x, old)
        assert x._version == version
        assert new.data_ptr() != x.data_ptr()


def test_states_with_strides() -> None:
    """One user's whole state in one row, as a store keeps it."""
    problem = make_problem(3, 70, state=True, return_final_state=True)
    assert problem.initial_state is not None
    *sums, position = problem.initial_state
    store = torch.cat([x.flatten(1) for x in sums], dim=1)
    views = store.split([x[0].numel() for x in sums], dim=1)
    state = (*(v.view(x.shape) for v, x in zip(views, sums, strict=True)), position)
    found = outputs(problem.but(initial_state=state).run(ops.gated_rela))
    for name, x in outputs(problem.run(ops.gated_rela)).items():
        assert_same_bits(name, found[name], x)


def test_other_dtypes_of_the_small_arguments() -> None:
    """int32 lengths, float32 inv_freq, parameters in another dtype than the rows'."""
    problem = make_problem(L=70, lengths=[70, 9], dtype=torch.bfloat16)
    assert problem.conv_weight is not None
    assert problem.lengths is not None
    assert problem.conv_bias is not None
    rounded = problem.but(
        inv_freq=problem.inv_freq.float().double(),
        conv_weight=problem.conv_weight.bfloat16().float(),
        conv_bias=problem.conv_bias.bfloat16().float(),
    )
    small = rounded.but(
        lengths=problem.lengths.int(),
        inv_freq=rounded.inv_freq.float(),
        conv_weight=problem.conv_weight.bfloat16(),
        conv_bias=problem.conv_bias.bfloat16().double(),
    )
    assert_same_bits("out", small.run(ops.gated_rela), rounded.run(ops.gated_rela))
    for name, x in gradients(small, ops.gated_rela).items():
        assert x.dtype == small.leaves()[name].dtype
    packed = make_problem(packed=[3, 0, 9])
    assert packed.cu_seqlens is not None
    other = packed.but(cu_seqlens=packed.cu_seqlens.int())
    assert_same_bits("packed", other.run(ops.gated_rela), packed.run(ops.gated_rela))


def test_extreme_values_stay_finite() -> None:
    """phi underflows to 0 for every key, or the rows are huge."""
    for scale in (-300.0, 1e4):
        problem = make_problem(L=70, dtype=torch.float32)
        far = problem.map_floats(lambda x, s=scale: x.abs() * s, lambda x: x)
        found = gradients(far, ops.gated_rela)
        assert far.run(ops.gated_rela).isfinite().all()
        assert all(x.isfinite().all() for x in found.values())
