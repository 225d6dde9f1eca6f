"""The operators inside torch: autograd twice, opcheck, torch.compile, fake tensors, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from recgrela_ext import _library, ops
from tests.ops.problems import (
    ROWS,
    Problem,
    gradients,
    make_problem,
    make_state,
    outputs,
    random_gradients,
)
from tests.tolerance import assert_same_bits, assert_same_history

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "right-padded": {"lengths": [3, 0]},
    "packed": {"packed": [2, 0, 1]},
    "state": {"state": True, "return_final_state": True},
    "packed with state": {"packed": [2, 0, 1], "state": True, "return_final_state": True},
    "final state from nothing": {"return_final_state": True},
    "without gate": {"gate": False},
    "without bias": {"bias": False},
    "without convolution": {"W": 0, "state": True, "return_final_state": True},
}
every_mode = pytest.mark.parametrize("options", MODES.values(), ids=MODES.keys())


def small(**options: Any) -> Problem:
    return make_problem(**{"B": 2, "L": 3, "H": 1, "D": 4, "W": 2, **options})


def of_leaves(problem: Problem, rela: bool = False) -> tuple[Callable[..., Any], list[Tensor]]:
    """The operator as a function of its differentiable arguments alone, and those."""
    problem = problem.requiring_grad()
    leaves = problem.leaves()
    if rela:
        leaves = {n: x for n, x in leaves.items() if n != "conv"}

    def call(*tensors: Tensor) -> list[Tensor]:
        named: dict[str, Any] = dict(zip(leaves, tensors, strict=True))
        sums = [named.pop(n) for n in ("kv", "k_sum", "conv") if n in named]
        if sums:
            assert problem.initial_state is not None
            named["initial_state"] = (*sums, *problem.initial_state[len(sums) :])
        changed = problem.but(**named)
        result = changed.run_rela(ops.rela) if rela else changed.run(ops.gated_rela)
        return [x for x in outputs(result).values() if x.requires_grad]

    return call, list(leaves.values())


@every_mode
def test_gradcheck(options: dict[str, Any]) -> None:
    call, leaves = of_leaves(small(**options))
    assert torch.autograd.gradcheck(call, leaves, fast_mode=False)


@every_mode
def test_gradgradcheck(options: dict[str, Any]) -> None:
    call, leaves = of_leaves(small(**options))
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("name", ["plain", "right-padded", "packed", "packed with state"])
def test_gradchecks_of_rela(name: str) -> None:
    call, leaves = of_leaves(small(**MODES[name] | {"W": 0, "gate": False}), rela=True)
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("name", ["plain", "packed with state"])
@pytest.mark.parametrize("rela", [False, True], ids=["gated_rela", "rela"])
def test_forward_mode(name: str, rela: bool) -> None:
    """Tangents are right, not dropped."""
    problem = small(**MODES[name] | ({"W": 0} if rela else {}))

    def call(*rows: Tensor) -> tuple[Tensor, ...]:
        changed = problem.but(**dict(zip(ROWS[:3], rows, strict=True)))
        found = outputs(changed.run_rela(ops.rela) if rela else changed.run(ops.gated_rela))
        return tuple(x for x in found.values() if x.is_floating_point())

    rows = (problem.q, problem.k, problem.v)
    tangents = tuple(torch.randn_like(x) for x in rows)
    tangent = torch.func.jvp(call, rows, tangents)[1]
    step = 1e-6
    after, before = (
        call(*(x + sign * step * t for x, t in zip(rows, tangents, strict=True)))
        for sign in (1, -1)
    )
    for found, x, y in zip(tangent, after, before, strict=True):
        torch.testing.assert_close(found, (x - y) / (2 * step), rtol=1e-6, atol=1e-8)


def test_gradcheck_over_a_chunk() -> None:
    call, leaves = of_leaves(small(B=1, L=66, D=2))
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("wanted", [[n] for n in (*ROWS, "conv_weight", "conv_bias", "kv")])
def test_gradient_of_some(wanted: list[str]) -> None:
    """Each gradient alone is what it is among all."""
    problem = make_problem(L=70, state=True, return_final_state=True)
    everything = gradients(problem, ops.gated_rela)
    some = problem.map_floats(torch.clone, torch.clone)
    leaves = [some.leaves()[n].requires_grad_() for n in wanted]
    found = outputs(some.run(ops.gated_rela))
    given = random_gradients(found)
    kept = [n for n in given if found[n].requires_grad]
    grads = torch.autograd.grad([found[n] for n in kept], leaves, [given[n] for n in kept])
    for name, x in zip(wanted, grads, strict=True):
        assert_same_bits(name, x, everything[name])


def test_no_graph_without_need() -> None:
    problem = make_problem(return_final_state=True)
    assert not problem.run(ops.gated_rela)[0].requires_grad
    with torch.no_grad():
        assert not problem.requiring_grad().run(ops.gated_rela)[0].requires_grad
    with torch.inference_mode():
        assert_same_bits("out", problem.run(ops.gated_rela)[0], problem.run(ops.gated_rela)[0])


def raw_arguments(problem: Problem) -> tuple[Any, ...]:
    """What the public function hands to torch.ops.recgrela.gated_rela."""
    p, state = problem, problem.initial_state or (None,) * 4
    return (p.q, p.k, p.v, p.gate, p.inv_freq, p.conv_weight, p.conv_bias, p.lengths, p.cu_seqlens,
            *state, p.eps, p.return_final_state)  # fmt: skip


def without_gate_and_conv(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    q, k, v, _, inv_freq, _, _, lengths, cu_seqlens, kv, k_sum, _, position, *rest = arguments
    return (q, k, v, inv_freq, lengths, cu_seqlens, kv, k_sum, position, *rest)


OPCHECKED = ("plain", "right-padded", "packed with state", "without gate", "without convolution")


@pytest.mark.kernels
@pytest.mark.parametrize("mode", OPCHECKED)
def test_opcheck_forward(mode: str) -> None:
    problem = small(**MODES[mode], dtype=torch.float32)
    opcheck = torch.library.opcheck
    opcheck(torch.ops.recgrela.gated_rela_forward, (*raw_arguments(problem), False))
    opcheck(torch.ops.recgrela.gated_rela, (*raw_arguments(problem.requiring_grad()), True))
    bare = without_gate_and_conv(raw_arguments(problem))
    opcheck(torch.ops.recgrela.rela_forward, (*bare, False))
    bare = without_gate_and_conv(raw_arguments(problem.requiring_grad()))
    opcheck(torch.ops.recgrela.rela, (*bare, True))


@pytest.mark.kernels
@pytest.mark.parametrize("mode", OPCHECKED)
def test_opcheck_backward(mode: str) -> None:
    problem = small(**MODES[mode], dtype=torch.bfloat16)
    has_state = problem.initial_state is not None
    *inputs, eps, final = raw_arguments(problem)
    out, *states, saved_kv, saved_k_sum = torch.ops.recgrela.gated_rela(*inputs, eps, final, True)
    given = [torch.randn_like(x) if final else None for x in states]
    grads = (torch.randn_like(out), *given)
    tail = (saved_kv, saved_k_sum, eps, has_state)
    torch.library.opcheck(torch.ops.recgrela.gated_rela_backward, (*grads, *inputs, *tail))

    *inputs, eps, final = without_gate_and_conv(raw_arguments(problem))
    out, *states, saved_kv, saved_k_sum = torch.ops.recgrela.rela(*inputs, eps, final, True)
    grads = (torch.randn_like(out), *given[:2])
    tail = (saved_kv, saved_k_sum, eps, has_state)
    torch.library.opcheck(torch.ops.recgrela.rela_backward, (*grads, *inputs, *tail))


@pytest.mark.kernels
@pytest.mark.parametrize("active", [None, [True, False]])
@pytest.mark.parametrize("width", [0, 1, 4])
def test_opcheck_step(width: int, active: list[bool] | None) -> None:
    p = make_problem(2, 1, W=width, dtype=torch.float32)
    rows = [getattr(p, n)[:, 0].contiguous() for n in ROWS]
    state = make_state(2, 2, 8, max(width, 1), torch.float32)
    flags = None if active is None else torch.tensor(active)
    arguments = (*rows, p.inv_freq, p.conv_weight, p.conv_bias, *state, flags, 1e-6)
    torch.library.opcheck(torch.ops.recgrela.gated_rela_step, arguments)


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True, **options)


@pytest.mark.kernels
@every_mode
def test_compile_forward_and_backward(options: dict[str, Any]) -> None:
    problem = small(**options, dtype=torch.float32)
    operator = compiled(ops.gated_rela)
    found, expected = outputs(problem.run(operator)), outputs(problem.run(ops.gated_rela))
    for name, x in found.items():
        assert_same_bits(name, x, expected[name])
    grads = gradients(problem, operator)
    for name, x in gradients(problem, ops.gated_rela).items():
        assert_same_bits(name, grads[name], x)


@pytest.mark.kernels
def test_compile_dynamic_shapes() -> None:
    """One graph for every B and L."""
    operator = compiled(ops.gated_rela, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for B, L in ((7, 9), (5, 70), (3, 130)):
            problem = make_problem(B, L, dtype=torch.float32, lengths=[L - 1] * B)
            grads = gradients(problem, operator)
            for name, x in gradients(problem, ops.gated_rela).items():
                assert_same_bits(name, grads[name], x)


@pytest.mark.kernels
def test_compile_dynamic_packed() -> None:
    operator = compiled(ops.gated_rela, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for packed in ([3, 0, 9, 1], [70, 1, 2], [64, 65, 3, 2, 9, 5]):
            problem = make_problem(packed=packed, dtype=torch.float32, return_final_state=True)
            found, expected = problem.run(operator), problem.run(ops.gated_rela)
            assert_same_bits("out", found[0], expected[0])
            assert found[1][3].tolist() == packed


@pytest.mark.kernels
def test_compile_step() -> None:
    """Three events of one state: written in place, seen by the next call."""
    p = make_problem(2, 3, dtype=torch.float32)
    eager = make_state(2, 2, 8, 4, torch.float32)
    graph = tuple(x.clone() for x in eager)
    operator = compiled(ops.gated_rela_step)
    for t in range(3):
        rows = [getattr(p, n)[:, t].contiguous() for n in ROWS]
        arguments = (*rows, p.inv_freq, p.conv_weight, p.conv_bias)
        out = operator(*arguments, graph)
        assert_same_bits("out", out, ops.gated_rela_step(*arguments, eager))
        for x, y in zip(graph, eager, strict=True):
            assert_same_bits("state", x, y)


@pytest.mark.kernels
@pytest.mark.slow
def test_compile_inductor() -> None:
    problem = make_problem(L=70, dtype=torch.float32, state=True, return_final_state=True)
    torch._dynamo.reset()
    operator = torch.compile(ops.gated_rela, fullgraph=True)
    found, expected = outputs(problem.run(operator)), outputs(problem.run(ops.gated_rela))
    for name, x in found.items():
        assert_same_bits(name, x, expected[name])


@pytest.mark.kernels
def test_export() -> None:
    class Module(torch.nn.Module):
        def __init__(self, problem: Problem) -> None:
            super().__init__()
            self.problem = problem

        def forward(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
            return self.problem.but(q=q, k=k, v=v, gate=gate).run(ops.gated_rela)

    problem = make_problem(2, 9, dtype=torch.float32)
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2)
    rows = tuple(getattr(problem, n) for n in ROWS)
    program = torch.export.export(
        Module(problem), rows, dynamic_shapes=({0: batch, 1: length},) * 4
    )
    longer = make_problem(3, 70, dtype=torch.float32)
    rows = tuple(getattr(longer, n) for n in ROWS)
    expected = problem.but(**dict(zip(ROWS, rows, strict=True))).run(ops.gated_rela)
    assert_same_bits("out", program.module()(*rows), expected)


def fake(x: Any, device: str) -> Any:
    if isinstance(x, tuple):
        return tuple(fake(y, device) for y in x)
    return torch.empty(x.shape, dtype=x.dtype, device=device) if isinstance(x, Tensor) else x


@pytest.mark.kernels
@every_mode
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors(options: dict[str, Any], device: str, monkeypatch: Any) -> None:
    """Shapes, dtypes and devices without data, also for a device that is absent."""
    monkeypatch.setattr(_library, "KERNEL_DEVICES", frozenset({"cpu", "cuda"}))
    real = small(**options, dtype=torch.bfloat16)
    expected = outputs(real.run(ops.gated_rela))
    with FakeTensorMode():
        problem = Problem(**{n: fake(x, device) for n, x in real.arguments().items()})
        found = outputs(problem.run(ops.gated_rela))
    if device == "cpu":  # torch aborts when autograd meets a device it was not built for
        expected |= gradients(real, ops.gated_rela)
        with FakeTensorMode():
            problem = Problem(**{n: fake(x, device) for n, x in real.arguments().items()})
            found |= gradients(problem, ops.gated_rela)
    for name, x in expected.items():
        assert (x.shape, x.dtype) == (found[name].shape, found[name].dtype), name
        assert found[name].device.type == device


@pytest.mark.kernels
def test_fake_step() -> None:
    with FakeTensorMode():
        row, sums = torch.empty(3, 2, 8), make_state(3, 2, 8, 1, torch.float32)
        frequencies = torch.empty(2, 4, dtype=torch.float64)
        out = ops.gated_rela_step(row, row, row, None, frequencies, None, None, sums)
        assert (out.shape, out.dtype) == (row.shape, row.dtype)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "reference"])
def test_autocast(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are cast; states, parameters and every sum are not."""
    if not kernels:
        monkeypatch.setattr(_library, "KERNEL_DEVICES", frozenset())
    problem = make_problem(L=70, dtype=torch.float32, state=True, return_final_state=True)
    half = problem.map_floats(lambda x: x.bfloat16(), lambda x: x)
    expected = outputs(half.run(ops.gated_rela))
    leaf = problem.requiring_grad()
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs(leaf.run(ops.gated_rela))
        double = make_problem(L=3).run(ops.gated_rela)
    for name, x in found.items():
        assert_same_bits(name, x, expected[name])
    assert found["final kv"].dtype == torch.float32
    assert double.dtype == torch.float64
    found["out"].float().sum().backward()
    assert leaf.q.grad is not None
    assert leaf.q.grad.dtype == torch.float32


def test_autocast_bidirectional() -> None:
    problem = make_problem(L=70, dtype=torch.float32, causal=False)
    half = problem.map_floats(lambda x: x.bfloat16(), lambda x: x)
    with torch.autocast("cpu", torch.bfloat16):
        out = problem.run(ops.gated_rela)
    assert_same_bits("out", out, half.run(ops.gated_rela))


@pytest.mark.kernels
def test_autocast_does_not_reach_second_derivatives() -> None:
    problem = small(dtype=torch.float32).requiring_grad()
    (first,) = torch.autograd.grad(
        problem.run(ops.gated_rela).square().sum(), problem.q, create_graph=True
    )
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(first.sum(), problem.k, retain_graph=True)[0])
    assert_same_bits("second derivative", found[1], found[0])


def test_autocast_step_and_rela() -> None:
    problem = make_problem(2, 1, dtype=torch.float32, gate=False, W=0)
    state = make_state(2, 2, 8, 1, torch.float32)
    rows = [getattr(problem, n)[:, 0] for n in ("q", "k", "v")]
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.gated_rela_step(*rows, None, problem.inv_freq, None, None, state)
        assert out.dtype == torch.bfloat16
        assert problem.run_rela(ops.rela).dtype == torch.bfloat16
    assert state[0].dtype == torch.float32


def test_checkpointing() -> None:
    problem = make_problem(L=70).requiring_grad()
    leaves = list(problem.leaves().values())
    expected = torch.autograd.grad(problem.run(ops.gated_rela).sum(), leaves)
    out = torch.utils.checkpoint.checkpoint(
        lambda: problem.run(ops.gated_rela), use_reentrant=False
    )
    for x, y in zip(torch.autograd.grad(out.sum(), leaves), expected, strict=True):
        assert_same_history("gradient", x, y, tuple(range(x.dim())))
