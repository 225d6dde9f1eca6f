"""Wrong arguments, with the kernels and without them; those memory safety depends on, at the raw
operators as well."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from recgrela_ext import _library, ops
from recgrela_ext.ops.reference import zero_state
from tests.ops.bad_inputs import CONVOLUTION, TABLE, Bad, raw
from tests.ops.problems import Problem, make_problem

# A tensor on the meta device makes it a meta call: shapes alone, nothing is read.
RAW = [bad for bad in TABLE if bad.raw and not bad.name.endswith("device")]
RELA = [bad for bad in TABLE if bad.rela and bad not in CONVOLUTION]
NAMES = {bad.name: bad for bad in TABLE}
assert len(NAMES) == len(TABLE)


def bad_problem(bad: Bad, **options: Any) -> Problem:
    packed = [4, 2] if bad.packed else None
    problem = make_problem(2, 5, 2, 8, dtype=torch.float32, packed=packed, **options)
    return problem.but(**bad.change(problem))


def assert_refused(call: Callable[[], Any], bad: Bad, op: str, initial: str = "") -> None:
    with pytest.raises(bad.error) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is bad.error
    assert re.match(rf"{op}: {initial}{re.escape(bad.text)}", message), message
    assert "\n" not in message
    assert len(message) < 200


@pytest.fixture(params=[pytest.param("kernels", marks=pytest.mark.kernels), "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "reference":
        monkeypatch.setattr(_library, "KERNEL_DEVICES", frozenset())
    return request.param


@pytest.mark.parametrize("bad", TABLE, ids=NAMES)
def test_gated_rela(bad: Bad, path: str) -> None:
    problem = bad_problem(bad)
    assert_refused(lambda: problem.run(ops.gated_rela), bad, "gated_rela", "(initial_state )?")


@pytest.mark.parametrize("bad", RELA, ids=lambda b: b.name)
def test_rela(bad: Bad, path: str) -> None:
    packed = [4, 2] if bad.packed else None
    problem = make_problem(2, 5, 2, 8, dtype=torch.float32, packed=packed)
    changes = bad.change(problem.but(conv_weight=None, conv_bias=None))
    problem = problem.but(**changes)
    assert_refused(lambda: problem.run_rela(ops.rela), bad, "rela", "(initial_state )?")


@pytest.mark.kernels
@pytest.mark.parametrize("bad", RAW, ids=lambda b: b.name)
def test_raw_operators(bad: Bad) -> None:
    """torch.ops calls, for which the public checks do not run, with and without autograd."""
    p = bad_problem(bad)
    initial = p.initial_state or (None,) * 4
    arguments = (
        p.q,
        p.k,
        p.v,
        p.gate,
        p.inv_freq,
        p.conv_weight,
        p.conv_bias,
        p.lengths,
        p.cu_seqlens,
        *initial,
        p.eps,
        True,
    )
    for operator, save in (
        (torch.ops.recgrela.gated_rela_forward, False),
        (torch.ops.recgrela.gated_rela, True),
    ):
        with pytest.raises(ValueError, match=r"^gated_rela: ") as caught:
            raw(operator, *arguments, save)
        argument = bad.text.split()[0]
        assert argument in str(caught.value) or bad.name == "q stride"
        assert "\n" not in str(caught.value)


def good_backward() -> dict[str, Any]:
    p = make_problem(2, 70, 2, 8, dtype=torch.float32, state=True)
    assert p.initial_state is not None
    kv, k_sum, conv, position = p.initial_state
    named = {
        "q": p.q,
        "k": p.k,
        "v": p.v,
        "gate": p.gate,
        "inv_freq": p.inv_freq,
        "conv_weight": p.conv_weight,
        "conv_bias": p.conv_bias,
        "lengths": None,
        "cu_seqlens": None,
        "kv": kv,
        "k_sum": k_sum,
        "conv": conv,
        "position": position,
    }
    forward = torch.ops.recgrela.gated_rela_forward
    out, *final, saved_kv, saved_k_sum = forward(
        **named, eps=1e-6, return_final_state=True, save_for_backward=True
    )
    grads = dict(zip(("grad_kv", "grad_k_sum", "grad_conv"), final, strict=True))
    return dict(
        grad_out=out,
        **grads,
        **named,
        saved_kv=saved_kv,
        saved_k_sum=saved_k_sum,
        eps=1e-6,
        state_grad=True,
    )


BACKWARD: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "grad_out": (lambda x: x[:, :3], "grad_out must have the shape of q"),
    "grad_kv": (lambda x: x[:1], "grad_kv must have shape"),
    "grad_k_sum": (lambda x: None, "grad_kv, grad_k_sum and grad_conv must be given together"),
    "grad_conv": (Tensor.double, "grad_conv must have dtype"),
    "k": (lambda x: x[:1], "k must have the shape of q"),
    "inv_freq": (lambda x: x[:1], "inv_freq must have shape"),
    "position": (lambda x: x[:1], "position must have shape"),
    "saved_kv": (lambda x: x[:3], "saved_kv must have shape"),
    "saved_k_sum": (lambda x: x[:0], "saved_k_sum must have shape"),
}


@pytest.mark.kernels
@pytest.mark.parametrize("argument", BACKWARD)
def test_raw_backward(argument: str) -> None:
    arguments = good_backward()
    assert len(torch.ops.recgrela.gated_rela_backward(**arguments)) == 9
    make, text = BACKWARD[argument]
    arguments[argument] = make(arguments[argument])
    with pytest.raises(ValueError, match=f"^gated_rela_backward: {re.escape(text)}"):
        raw(torch.ops.recgrela.gated_rela_backward, **arguments)


def steps(**changes: Callable[[Any], Any]) -> dict[str, Any]:
    """Arguments of a good step, some of them changed."""
    p = make_problem(2, 1, 2, 8, dtype=torch.float32)
    kv, k_sum, conv, position = zero_state(2, 2, 8, 4, torch.float32)
    named: dict[str, Any] = {
        "q": p.q[:, 0],
        "k": p.k[:, 0],
        "v": p.v[:, 0],
        "gate": p.gate[:, 0],
        "inv_freq": p.inv_freq,
        "conv_weight": p.conv_weight,
        "conv_bias": p.conv_bias,
        "kv": kv,
        "k_sum": k_sum,
        "conv": conv,
        "position": position,
        "active": torch.tensor([True, False]),
        "eps": 1e-6,
    }
    for name, make in changes.items():
        named[name] = make(named[name])
    return named


def overlapping(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


def inner_strides(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


STEP: dict[str, tuple[dict[str, Callable[[Any], Any]], str]] = {
    "q 4 dims": (
        {n: lambda x: x[:, None] for n in ("q", "k", "v", "gate")},
        "q must have shape [B, H, D], got [2, 1, 2, 8]",
    ),
    "odd D": (
        {n: lambda x: x[..., :7] for n in ("q", "k", "v", "gate")},
        "q must have an even last dimension, got 7",
    ),
    "k shape": ({"k": lambda x: x[:1]}, "k must have the shape of q [2, 2, 8], got [1, 2, 8]"),
    "v dtype": ({"v": Tensor.double}, "v must have the dtype of q,"),
    "gate stride": (
        {"gate": inner_strides},
        "gate must have a contiguous last dimension, got stride 2",
    ),
    "inv_freq": ({"inv_freq": lambda x: x[:1]}, "inv_freq must have shape"),
    "conv_weight": ({"conv_weight": lambda x: x[:3]}, "conv_weight must have shape"),
    "conv_bias": ({"conv_bias": lambda x: x[:3]}, "conv_bias must have shape"),
    "kv shape": ({"kv": lambda x: x[:1]}, "(state )?kv must have shape"),
    "kv dtype": ({"kv": Tensor.double}, "(state )?kv must have dtype"),
    "k_sum shape": ({"k_sum": lambda x: x[..., :4]}, "(state )?k_sum must have shape"),
    "conv shape": ({"conv": lambda x: x[:, :2]}, "(state )?conv must have shape"),
    "position": ({"position": lambda x: x[:1]}, "(state )?position must have shape"),
    "position dtype": ({"position": Tensor.int}, "(state )?position must have dtype"),
    "active shape": ({"active": lambda x: x[:1]}, "active must "),
    "active dtype": ({"active": Tensor.long}, "active must "),
}


def public_step(arguments: dict[str, Any]) -> Tensor:
    state = tuple(arguments.pop(n) for n in ("kv", "k_sum", "conv", "position"))
    return ops.gated_rela_step(**arguments, state=state)


@pytest.mark.parametrize("name", STEP)
def test_step(name: str, path: str) -> None:
    changes, text = STEP[name]
    pattern = text if text.startswith("(") else re.escape(text)
    with pytest.raises(ValueError, match=f"^gated_rela_step: {pattern}") as caught:
        public_step(steps(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.kernels
@pytest.mark.parametrize("name", STEP)
def test_raw_step(name: str) -> None:
    changes, text = STEP[name]
    pattern = text if text.startswith("(") else re.escape(text)
    with pytest.raises(ValueError, match=f"^gated_rela_step: {pattern}"):
        raw(torch.ops.recgrela.gated_rela_step, **steps(**changes))


@pytest.mark.kernels
@pytest.mark.parametrize(
    "call", [public_step, lambda a: raw(torch.ops.recgrela.gated_rela_step, **a)]
)
@pytest.mark.parametrize(
    ("argument", "change", "text"),
    [
        ("kv", overlapping, "kv must not overlap between sequences, got batch stride 0"),
        ("k_sum", overlapping, "k_sum must not overlap between sequences, got batch stride 0"),
        ("kv", inner_strides, "kv must be contiguous inside one sequence"),
        ("conv", inner_strides, "conv must be contiguous inside one sequence"),
    ],
)
def test_states_written_in_place(
    call: Callable[..., Any], argument: str, change: Callable[[Tensor], Tensor], text: str
) -> None:
    """Strides a kernel cannot write through."""
    with pytest.raises(ValueError, match=f"^gated_rela_step: {re.escape(text)}"):
        call(steps(**{argument: change}))


@pytest.mark.parametrize(
    ("argument", "value", "text"),
    [
        ("active", [True, False], "active must be a tensor, got list"),
        ("k", None, "k must be a tensor, got NoneType"),
    ],
)
def test_step_without_tensors(argument: str, value: Any, text: str, path: str) -> None:
    with pytest.raises(TypeError, match=f"^gated_rela_step: {text}$"):
        public_step(steps(**{argument: lambda _: value}))


def test_a_refused_step_changes_nothing(path: str) -> None:
    arguments = steps(k=lambda x: x[:1])
    state = [arguments[n] for n in ("kv", "k_sum", "conv")]
    before = [(x.clone(), x._version) for x in state]
    with pytest.raises(ValueError, match="k must have the shape of q"):
        public_step(arguments)
    for (old, version), x in zip(before, state, strict=True):
        assert torch.equal(x, old)
        assert x._version == version
