"""gated_rela_step: the same history item by item, states in place and nowhere else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from recgrela_ext import ops
from recgrela_ext.ops.reference import State, accumulate_dtype, zero_state
from tests.ops.agreement import assert_agrees
from tests.ops.problems import ROWS, Problem, make_problem, make_state
from tests.tolerance import assert_same_bits, assert_same_history

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def step(problem: Problem, t: int, state: Any, **options: Any) -> Tensor:
    """Item t of every sequence of ``problem``."""
    rows = [None if getattr(problem, n) is None else getattr(problem, n)[:, t] for n in ROWS]
    parameters = problem.inv_freq, problem.conv_weight, problem.conv_bias
    return ops.gated_rela_step(*rows, *parameters, state, eps=problem.eps, **options)


def copy(state: Any) -> State:
    return tuple(x.clone() for x in state)  # type: ignore[return-value]


def stepwise(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, *args: Any, **options: Any
) -> Any:
    """gated_rela, item by item."""
    problem = Problem(q, k, v, gate, *args, **options)
    B, L, H, D = q.shape
    width = 1 if problem.conv_weight is None else problem.conv_weight.shape[1]
    state = problem.initial_state or zero_state(B, H, D, width, accumulate_dtype(q.dtype), q.device)
    *sums, position = copy(state)
    out = [step(problem, t, (*sums, position + t)) for t in range(L)]
    return torch.stack(out, 1), (*sums, position + L)


CASES: dict[str, dict[str, Any]] = {
    "from nothing": {},
    "from a state": {"state": True},
    "without gate": {"gate": False},
    "without bias": {"bias": False},
    "without convolution": {"W": 0},
    "convolution of width 1": {"W": 1},
    "convolution of width 6": {"W": 6},
    "large eps": {"eps": 0.3},
    "one user": {"B": 1},
    "many users, wide heads": {"B": 300, "L": 2, "D": 64},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_modes(options: dict[str, Any], dtype: torch.dtype) -> None:
    problem = make_problem(**options, dtype=dtype, return_final_state=True)
    assert_agrees(problem, stepwise, backward=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [2, 8, 10, 16, 24, 32, 64, 128, 136])
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    problem = make_problem(L=5, D=head_dim, dtype=dtype, state=True, return_final_state=True)
    assert_agrees(problem, stepwise, backward=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_prefill_then_steps_is_the_whole(dtype: torch.dtype) -> None:
    """For every split of 68 items, over a chunk's bound."""
    L = 68
    problem = make_problem(2, L, 2, 8, dtype=dtype, return_final_state=True)
    whole, final = problem.run(ops.gated_rela)
    for split in range(L + 1):
        rows = {n: getattr(problem, n)[:, :split] for n in ROWS}
        *sums, position = problem.but(**rows).run(ops.gated_rela)[1]
        for t in range(split, min(split + 3, L)):
            out = step(problem, t, (*sums, position + (t - split)))
            assert_same_history(f"split {split}, item {t}", out, whole[:, t])
    *sums, _ = zero_state(2, 2, 8, 4, dtype)
    for t in range(L):
        out = step(problem, t, (*sums, torch.full((2,), t)))
        assert_same_history(f"item {t}", out, whole[:, t])
    for name, x, y in zip(("kv", "k_sum", "conv"), sums, final, strict=False):
        assert_same_history(name, x, y, (-2, -1))


def one_row_per_user(state: State, room: int) -> tuple[Tensor, State]:
    """(store, views of it): each user's whole state in one row, with ``room`` numbers behind."""
    *sums, position = state
    flat = torch.cat([x.flatten(1) for x in sums], dim=1)
    store = torch.full((flat.shape[0], flat.shape[1] + room), math.nan, dtype=flat.dtype)
    store[:, : flat.shape[1]] = flat
    views, start = [], 0
    for x in sums:
        size = x[0].numel()
        strides = (store.stride(0), *x.stride()[1:])
        views.append(store.as_strided(x.shape, strides, start))
        start += size
    return store, (*views, position)  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_states_may_lie_in_one_row_per_user(dtype: torch.dtype) -> None:
    problem = make_problem(3, 1, 2, 16, dtype=dtype)
    state = make_state(3, 2, 16, 4, accumulate_dtype(dtype))
    store, views = one_row_per_user(state, room=5)
    assert not views[0].is_contiguous()
    plain = copy(state)
    assert_same_bits("out", step(problem, 0, views), step(problem, 0, plain))
    for name, x, y in zip(("kv", "k_sum", "conv"), views, plain, strict=False):
        assert_same_bits(name, x, y)
    assert store[:, -5:].isnan().all()


def test_rows_may_have_strides() -> None:
    problem = make_problem(3, 4, 2, 16, dtype=torch.float32)
    fused = torch.stack([getattr(problem, n) for n in ROWS], dim=2)  # [B, L, 4, H, D]
    rows = fused[:, 2].unbind(1)
    parameters = problem.inv_freq, problem.conv_weight, problem.conv_bias
    state = make_state(3, 2, 16, 4, torch.float32)
    other = copy(state)
    out = ops.gated_rela_step(*rows, *parameters, state)
    assert_same_bits("out", out, step(problem.map_floats(torch.clone, torch.clone), 2, other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inactive_users_are_untouched(dtype: torch.dtype) -> None:
    """Whatever their rows and states hold."""
    problem = make_problem(4, 1, dtype=dtype)
    active = torch.tensor([True, False, True, False])
    for n in ROWS:
        getattr(problem, n)[1] = math.nan
    before = make_state(4, 2, 8, 4, accumulate_dtype(dtype))
    before[0][3] = math.nan
    state, everyone = copy(before), copy(before)
    out = step(problem, 0, state, active=active)
    assert not out[~active].any()
    assert_same_bits("out", out[active], step(problem, 0, everyone)[active])
    for old, x, y in zip(before[:3], state, everyone, strict=False):
        assert_same_bits("inactive", x[~active], old[~active])
        assert_same_bits("active", x[active], y[active])


@pytest.mark.parametrize("active", [None, [True, False]])
def test_version_counters_and_position(active: list[bool] | None) -> None:
    problem = make_problem(2, 1)
    state = make_state(2, 2, 8, 4, torch.float64)
    versions = [x._version for x in state]
    position = state[3].clone()
    step(problem, 0, state, active=None if active is None else torch.tensor(active))
    assert all(x._version > old for x, old in zip(state[:3], versions, strict=False))
    assert state[3]._version == versions[3]
    assert torch.equal(state[3], position)


def test_autograd_notices_the_change() -> None:
    """A graph that saved the state must not use the changed one."""
    problem = make_problem(2, 1)
    state = make_state(2, 2, 8, 4, torch.float64)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = (weight * state[0]).sum()
    step(problem, 0, state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("where", [*ROWS, "conv_weight", "conv_bias", "kv", "k_sum", "conv"])
def test_refuses_what_requires_a_gradient(where: str) -> None:
    problem = make_problem(2, 1, state=True)
    x = problem.leaves()[where].requires_grad_()
    with pytest.raises(RuntimeError, match=r"^gated_rela_step: inputs must not require a gradient"):
        step(problem, 0, problem.initial_state)
    with torch.no_grad():
        out = step(problem, 0, problem.initial_state)
    assert not out.requires_grad
    assert x.requires_grad


def test_nan_stays_with_its_user() -> None:
    problem = make_problem(3, 1, dtype=torch.float32)
    state = make_state(3, 2, 8, 4, torch.float32)
    clean_state, sick_state = copy(state), copy(state)
    clean = step(problem, 0, clean_state)
    for n in ROWS:
        getattr(problem, n)[1, 0, 0, 3] = math.nan
    out = step(problem, 0, sick_state)
    assert out[1].isnan().any()
    for x, y in zip((out, *sick_state[:3]), (clean, *clean_state[:3]), strict=True):
        assert_same_bits("others", x[[0, 2]], y[[0, 2]])


def test_same_bits_for_any_number_of_threads() -> None:
    problem = make_problem(64, 1, 4, 32, dtype=torch.float32)
    state = make_state(64, 4, 32, 4, torch.float32)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        own = copy(state)
        results.append((step(problem, 0, own), *own[:3]))
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            assert_same_bits("threads", x, y)


def test_no_users() -> None:
    problem = make_problem(0, 1)
    assert step(problem, 0, make_state(0, 2, 8, 4, torch.float64)).shape == (0, 2, 8)


def test_positions_far_out() -> None:
    problem = make_problem(2, 3, dtype=torch.float32, state=True, return_final_state=True)
    assert problem.initial_state is not None
    state = (*problem.initial_state[:3], torch.tensor([1_000_003, 2**40]))
    assert_agrees(problem.but(initial_state=state), stepwise, backward=False)
