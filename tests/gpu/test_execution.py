"""Streams, graphs, devices and repeatability of the CUDA kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from recgrela_ext import ops
from tests.gpu.device import DEVICE, DRY_RUN, captured, side_stream, synchronize
from tests.ops.problems import ROWS, Problem, gradients, make_problem, make_state, outputs
from tests.tolerance import assert_same_bits

pytestmark = pytest.mark.gpu
MODES: dict[str, dict[str, Any]] = {
    "short": {"B": 40, "L": 200, "H": 4, "D": 16},
    "long": {"B": 3, "L": 2000, "H": 2, "D": 16},
    "wide heads": {"B": 3, "L": 300, "H": 2, "D": 64},
    "widest heads": {"B": 3, "L": 300, "H": 2, "D": 128},
    "few wide sequences": {"B": 1, "L": 1000, "H": 1, "D": 128},
    "few sequences": {"B": 1, "L": 5000, "H": 1, "D": 32},
    "packed": {"packed": [200, 0, 1, 700, 64], "H": 4, "D": 16},
    "padded, with states": {
        "B": 3, "L": 200, "D": 16, "lengths": [200, 0, 7], "state": True,
        "return_final_state": True,
    },
}  # fmt: skip
every_mode = pytest.mark.parametrize("options", MODES.values(), ids=MODES.keys())
two_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def everything(problem: Problem) -> dict[str, Tensor]:
    """Outputs, and gradients of all leaves."""
    found = outputs(problem.run(ops.gated_rela))
    return found | {f"d{n}": g for n, g in gradients(problem, ops.gated_rela).items()}


@two_dtypes
@every_mode
def test_same_bits_twenty_times(options: dict[str, Any], dtype: torch.dtype) -> None:
    problem = make_problem(**options, dtype=dtype).on(DEVICE)
    first = everything(problem)
    for _ in range(2 if DRY_RUN else 20):
        for name, x in everything(problem).items():
            assert_same_bits(name, x, first[name])


def test_same_bits_in_any_company() -> None:
    """A batch of other sequences does not change one's bits, at the same shape."""
    problem = make_problem(64, 200, 4, 16, dtype=torch.float32).on(DEVICE)
    other = problem.map_floats(lambda x: torch.cat((x[:1], torch.randn_like(x[1:]))), lambda x: x)
    assert_same_bits("out", other.run(ops.gated_rela)[0], problem.run(ops.gated_rela)[0])


def forward_and_backward(problem: Problem, given: Tensor) -> list[Tensor]:
    """Without a word to the host in between."""
    leaf = problem.requiring_grad()
    out = outputs(leaf.run(ops.gated_rela))["out"]
    leaves = [x for n, x in leaf.leaves().items() if n != "conv"]
    return [out.detach(), *torch.autograd.grad(out, leaves, given)]


@every_mode
def test_a_stream_of_the_callers(options: dict[str, Any]) -> None:
    """Inputs are written on a busy side stream just before: another stream would read too early."""
    problem = make_problem(**options, dtype=torch.float32).on(DEVICE)
    given = torch.randn_like(problem.q)
    expected = forward_and_backward(problem, given)
    late = problem.map_floats(torch.zeros_like, torch.zeros_like)
    synchronize()
    with side_stream():
        for name, x in problem.leaves().items():
            late.leaves()[name].copy_(x)
        found = forward_and_backward(late, given)
    synchronize()
    for number, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert_same_bits(f"result {number}", x, y)


@two_dtypes
@every_mode
def test_graph_of_forward_and_backward(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Replayed on other inputs, written into the same tensors."""
    problem = make_problem(**options, dtype=dtype).on(DEVICE)
    other = problem.map_floats(lambda x: x.flip(0), lambda x: x * 0.5)
    given = torch.randn_like(problem.q)
    results, replay = captured(lambda: forward_and_backward(problem, given))
    for name, x in other.leaves().items():
        problem.leaves()[name].copy_(x)
    replay()
    synchronize()
    replayed = [x.clone() for x in results]
    expected = forward_and_backward(other, given)
    for number, (x, y) in enumerate(zip(replayed, expected, strict=True)):
        assert_same_bits(f"result {number}", x, y)


@pytest.mark.parametrize("users", [1, 300])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_graph_of_a_step(head_dim: int, users: int) -> None:
    """Five events of one state, the position advanced inside the graph."""
    problem = make_problem(users, 5, 4, head_dim, dtype=torch.float32).on(DEVICE)
    start = tuple(x.to(DEVICE) for x in make_state(users, 4, head_dim, 4, torch.float32))
    rows = [torch.empty_like(getattr(problem, n)[:, 0]).zero_() for n in ROWS]
    parameters = problem.inv_freq, problem.conv_weight, problem.conv_bias
    state = tuple(x.clone() for x in start)

    def work() -> Sequence[Tensor]:
        out = ops.gated_rela_step(*rows, *parameters, state)
        state[3].add_(1)
        return (out,)

    (out,), replay = captured(work)
    for x, y in zip(state, start, strict=True):
        x.copy_(y)
    eager = tuple(x.clone() for x in start)
    for t in range(5):
        now = [getattr(problem, n)[:, t].contiguous() for n in ROWS]
        for x, y in zip(rows, now, strict=True):
            x.copy_(y)
        replay()
        wanted = ops.gated_rela_step(*now, *parameters, eager)
        eager[3].add_(1)
        synchronize()
        assert_same_bits(f"event {t}", out, wanted)
    for x, y in zip(state, eager, strict=True):
        assert_same_bits("state", x, y)


def test_two_devices() -> None:
    """The device of the arguments counts, not the current one."""
    if not DRY_RUN and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    other = DEVICE if DRY_RUN else torch.device("cuda", 1)
    problem = make_problem(3, 200, 4, 16, dtype=torch.float32)
    expected = everything(problem.on(DEVICE))
    for name, x in everything(problem.on(other)).items():
        assert x.device == other
        assert_same_bits(name, x.cpu(), expected[name].cpu())
    if not DRY_RUN:
        assert torch.cuda.current_device() == 0
