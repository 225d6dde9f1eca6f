"""torch.compile, autocast, opcheck and second derivatives with tensors on the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from recgrela_ext import ops
from tests.gpu.device import DEVICE, DRY_RUN
from tests.ops.problems import ROWS, gradients, make_problem, make_state, outputs
from tests.ops.test_torch_features import MODES, raw_arguments, small
from tests.tolerance import assert_same_bits

pytestmark = pytest.mark.gpu
every_mode = pytest.mark.parametrize("options", MODES.values(), ids=MODES.keys())
BACKEND = "aot_eager" if DRY_RUN else "inductor"


@every_mode
def test_compile(options: dict[str, Any]) -> None:
    """One graph, no break, the same bits."""
    problem = small(**options, dtype=torch.float32).on(DEVICE)
    torch._dynamo.reset()
    operator = torch.compile(ops.gated_rela, fullgraph=True, backend=BACKEND)
    found, expected = outputs(problem.run(operator)), outputs(problem.run(ops.gated_rela))
    found |= {f"d{n}": g for n, g in gradients(problem, operator).items()}
    expected |= {f"d{n}": g for n, g in gradients(problem, ops.gated_rela).items()}
    for name, x in found.items():
        assert_same_bits(name, x, expected[name])


def test_compile_step() -> None:
    problem = make_problem(2, 3, D=16, dtype=torch.float32).on(DEVICE)
    eager = tuple(x.to(DEVICE) for x in make_state(2, 2, 16, 4, torch.float32))
    graph = tuple(x.clone() for x in eager)
    torch._dynamo.reset()
    operator = torch.compile(ops.gated_rela_step, fullgraph=True, backend=BACKEND)
    for t in range(3):
        rows = [getattr(problem, n)[:, t].contiguous() for n in ROWS]
        arguments = (*rows, problem.inv_freq, problem.conv_weight, problem.conv_bias)
        assert_same_bits("out", operator(*arguments, graph), ops.gated_rela_step(*arguments, eager))
        for x, y in zip(graph, eager, strict=True):
            assert_same_bits("state", x, y)


@pytest.mark.parametrize("mode", ["plain", "packed with state"])
def test_opcheck(mode: str) -> None:
    problem = small(**MODES[mode], dtype=torch.float32).on(DEVICE)
    torch.library.opcheck(torch.ops.recgrela.gated_rela_forward, (*raw_arguments(problem), False))
    leaf = problem.requiring_grad()
    torch.library.opcheck(torch.ops.recgrela.gated_rela, (*raw_arguments(leaf), True))


def test_autocast() -> None:
    """Rows are cast; states, parameters and every sum are not."""
    problem = make_problem(L=70, D=16, dtype=torch.float32, state=True, return_final_state=True)
    problem = problem.on(DEVICE)
    half = problem.map_floats(lambda x: x.bfloat16(), lambda x: x)
    expected = outputs(half.run(ops.gated_rela))
    leaf = problem.requiring_grad()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = outputs(leaf.run(ops.gated_rela))
    for name, x in found.items():
        assert_same_bits(name, x, expected[name])
    assert found["final kv"].dtype == torch.float32
    found["out"].float().sum().backward()
    assert leaf.q.grad is not None
    assert leaf.q.grad.dtype == torch.float32


def test_second_derivatives() -> None:
    """They go through the reference; as right as float32 is."""
    problem = make_problem(L=70, D=16, dtype=torch.float32)
    results = []
    for one in (problem.on(DEVICE), problem.to(torch.float64)):
        leaf = one.requiring_grad()
        out = leaf.run(ops.gated_rela if one is not problem else ops.reference.gated_rela)
        (first,) = torch.autograd.grad(out.square().sum(), leaf.q, create_graph=True)
        leaves = [getattr(leaf, n) for n in ("k", "v", "gate")]
        results.append(torch.autograd.grad(first.square().sum(), leaves))
    for x, y in zip(*results, strict=True):
        assert (x.double().cpu() - y).abs().max() <= 1e-3 * y.abs().max()
