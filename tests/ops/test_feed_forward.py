"""feed_forward: the reference's values and gradients, the dropouts' masks, autograd, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from recgrela_ext import _library, ops
from recgrela_ext.ops import reference
from tests.ops.bad_inputs import raw
from tests.tolerance import assert_same_bits

NAMES = ("x", "first_weight", "first_bias", "second_weight", "second_bias", "residual")
SHAPES = [(1, 16, 16), (5, 16, 48), (64, 32, 112), (67, 64, 256), (200, 48, 80), (130, 128, 512)]


def make_case(
    rows: int, width: int, inner: int, dtype: torch.dtype, residual: bool = True
) -> list[Tensor | None]:
    shapes = ((rows, width), (inner, width), (inner,), (width, inner), (width,), (rows, width))
    scales = (1.0, width**-0.5, 0.3, inner**-0.5, 0.3, 1.0)
    found: list[Tensor | None] = [
        (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)
        for shape, scale in zip(shapes, scales, strict=True)
    ]
    return found if residual else [*found[:5], None]


def results_of(operator: Any, case: list[Any], grad: Tensor, **options: Any) -> list[Tensor]:
    """Output and gradients of all tensors."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in case]
    out = operator(*leaves, **options)
    return [out, *torch.autograd.grad(out, [t for t in leaves if t is not None], grad)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_agrees_with_the_reference(
    dtype: torch.dtype, residual: bool, p: float, shape: tuple[int, int, int]
) -> None:
    case = make_case(*shape, dtype, residual)
    wide: list[Any] = [None if t is None else t.double() for t in case]
    grad = torch.randn(shape[:2], dtype=torch.float64).to(dtype)
    options: dict[str, Any] = {"p": p, "inner_seed": 3, "outer_seed": -8}
    found = results_of(ops.feed_forward, case, grad, **options)
    plain = results_of(reference.feed_forward, case, grad, **options)
    exact = results_of(reference.feed_forward, wide, grad.double(), **options)
    for name, x, y, e in zip(("out", *NAMES), found, plain, exact, strict=False):
        assert x.dtype == dtype
        assert x.shape == y.shape
        error, theirs = ((z.double() - e).abs().max().item() for z in (x, y))
        own = 4 * torch.finfo(dtype).eps if dtype == torch.float32 else 1e-13
        assert error <= 2 * theirs + own * e.abs().max().item(), name
    with torch.no_grad():
        assert_same_bits("without gradients", ops.feed_forward(*case, **options), found[0])


def test_by_hand() -> None:
    """W1 and W2 are the identity: 2 + GELU(1) everywhere, or 2 where both dropouts take it."""
    eye, zero, one = torch.eye(16), torch.zeros(16), torch.ones(40, 16)
    gelu = 0.5 * (1 + math.erf(0.5**0.5))
    out = ops.feed_forward(one, eye, zero, eye, zero, 2 * one)
    torch.testing.assert_close(out, torch.full((40, 16), 2 + gelu))
    dropped = ops.feed_forward(one, eye, zero, eye, zero, 2 * one, 0.5, 7, 8)
    inner, outer = (ops.activation_dropout(one, p=0.5, seed=s) for s in (7, 8))
    torch.testing.assert_close(dropped, 2 + gelu * inner * outer)


def test_same_bits_for_any_number_of_threads_and_layout() -> None:
    case = make_case(1500, 32, 64, torch.float32)
    grad = torch.randn(1500, 32)
    options: dict[str, Any] = {"p": 0.1, "inner_seed": 1, "outer_seed": 2}
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(results_of(ops.feed_forward, case, grad, **options))
    turned = [t.t().contiguous().t() if t is not None and t.dim() == 2 else t for t in case]
    results.append(results_of(ops.feed_forward, turned, grad, **options))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_same_bits("result", a, b)


def test_no_rows() -> None:
    case = make_case(0, 16, 32, torch.float32)
    out, dx, *weights, _ = results_of(ops.feed_forward, case, torch.zeros(0, 16))
    assert out.shape == dx.shape == (0, 16)
    assert not any(w.any() for w in weights)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(value: float) -> None:
    case: list[Any] = make_case(70, 16, 32, torch.float32)
    case[0][3, 2] = value
    grad = torch.ones(70, 16)
    out, dx, dw1, *_ = results_of(ops.feed_forward, case, grad)
    finite = torch.arange(70) != 3
    assert out[finite].isfinite().all()
    assert not out[3].isfinite().all()
    assert dx[finite].isfinite().all()
    assert not dw1.isfinite().all()


def test_dropout_is_the_same_in_every_tile() -> None:
    """Tiles of rows of width 8 would begin inside a block of the dropout's random words."""
    case: list[Any] = make_case(200, 8, 16, torch.float64)
    grad = torch.randn(200, 8, dtype=torch.float64)
    found = results_of(ops.feed_forward, case, grad, p=0.5, inner_seed=1, outer_seed=1)
    plain = results_of(reference.feed_forward, case, grad, p=0.5, inner_seed=1, outer_seed=1)
    for x, y in zip(found, plain, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("residual", [True, False])
def test_gradcheck_twice(residual: bool) -> None:
    case: list[Any] = make_case(3, 16, 16, torch.float64, residual)
    leaves = [t.requires_grad_() for t in case if t is not None]

    def call(*tensors: Tensor) -> Tensor:
        return ops.feed_forward(*tensors[:5], *(tensors[5:] or (None,)), 0.3, 4, 5)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("wanted", range(6), ids=NAMES)
def test_gradient_of_one(wanted: int) -> None:
    case: list[Any] = make_case(70, 16, 32, torch.float32)
    grad = torch.randn(70, 16)
    everything = results_of(ops.feed_forward, case, grad)[1:]
    leaf = case[wanted].requires_grad_()
    (alone,) = torch.autograd.grad(ops.feed_forward(*case), leaf, grad)
    assert_same_bits("gradient", alone, everything[wanted])


def test_other_widths_run_the_reference() -> None:
    case = make_case(9, 12, 20, torch.float32)
    assert_same_bits("out", ops.feed_forward(*case), reference.feed_forward(*case))


def test_forward_mode() -> None:
    case: list[Any] = make_case(4, 16, 16, torch.float64)
    tangent = torch.randn(4, 16, dtype=torch.float64)

    def call(x: Tensor) -> Tensor:
        return ops.feed_forward(x, *case[1:])

    found = torch.func.jvp(call, (case[0],), (tangent,))[1]
    step = 1e-6 * tangent
    torch.testing.assert_close(
        found, (call(case[0] + step) - call(case[0] - step)) / 2e-6, rtol=1e-6, atol=1e-8
    )


@pytest.mark.kernels
@pytest.mark.parametrize("residual", [True, False])
def test_opcheck(residual: bool) -> None:
    case: list[Any] = make_case(3, 16, 32, torch.float32, residual)
    leaves = [None if t is None else t.requires_grad_() for t in case]
    arguments = (*leaves, 0.3, 1, 2, True)
    torch.library.opcheck(torch.ops.recgrela.feed_forward.default, arguments)
    plain = [None if t is None else t.detach() for t in case]
    without = (*plain, 0.3, 1, 2, False)
    torch.library.opcheck(torch.ops.recgrela.feed_forward_forward.default, without)
    x, w1, _, w2 = leaves[:4]
    pre = torch.randn(3, 32, requires_grad=True)
    backward = (torch.randn(3, 16, requires_grad=True), x, w1, w2, pre, 0.3, 1, 2)
    torch.library.opcheck(torch.ops.recgrela.feed_forward_backward.default, backward)


def test_compile() -> None:
    case: list[Any] = [
        t.requires_grad_() for t in make_case(9, 16, 32, torch.float32) if t is not None
    ]

    def call(*tensors: Tensor) -> Tensor:
        return ops.feed_forward(*tensors, 0.3, 2, 3).sum(1)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    found, wanted = (torch.autograd.grad(f(*case).sum(), case) for f in (compiled, call))
    for a, b in zip(found, wanted, strict=True):
        assert_same_bits("gradient", a, b)


def test_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(70, 16, 32, torch.float64)
    out = ops.feed_forward(*case, 0.3, 1, 2)
    monkeypatch.setattr(_library, "KERNEL_DEVICES", frozenset())
    torch.testing.assert_close(ops.feed_forward(*case, 0.3, 1, 2), out)


GOOD: dict[str, Any] = dict(zip(NAMES, make_case(2, 16, 32, torch.float32), strict=True))
X, W1, B1, W2, B2, R = (GOOD[name] for name in NAMES)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    "dims": ({"x": X[0]}, ValueError, r"x must be \[N, C\], got \[16\]"),
    "half": (
        {"x": X.half()},
        ValueError,
        "x must have dtype float32 or float64, got torch.float16",
    ),
    "width": ({"first_weight": W1[:, :8]}, ValueError, r"first_weight must be \[M, 16\], got \[32"),
    "first bias": ({"first_bias": B1[:1]}, ValueError, "first_bias must have shape of x and first"),
    "second": ({"second_weight": W2.t()}, ValueError, "second_weight must have shape of x and fir"),
    "second bias": ({"second_bias": None}, TypeError, "second_bias must be a tensor, got NoneType"),
    "residual": ({"residual": R[:1]}, ValueError, "residual must have shape of x and first_weight"),
    "dtype": (
        {"second_bias": B2.double()},
        ValueError,
        "second_bias must have the dtype of x, tor",
    ),
    "device": (
        {"residual": R.to("meta")},
        ValueError,
        "residual must be on the device of x, cpu, ",
    ),
    "p": ({"p": 1.0}, ValueError, r"p must lie in \[0, 1\), got 1.0"),
    "seed": ({"outer_seed": 1.5}, TypeError, "outer_seed must be an int, got 1.5"),
    "long seed": (
        {"inner_seed": 2**63},
        ValueError,
        "inner_seed must fit in 64 bits, got 92233720",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs(name: str) -> None:
    changes, error, text = BAD[name]
    with pytest.raises(error, match=f"^feed_forward: {text}"):
        ops.feed_forward(**{**GOOD, **changes})


ALL = (X, W1, B1, W2, B2, R)
RAW: dict[str, tuple[tuple[Any, ...], float, str]] = {
    "dims": ((X[0], *ALL[1:]), 0.1, r"x must have shape \[N, C\], got \[16\]"),
    "half": (tuple(t.half() for t in ALL), 0.1, "x must have dtype float32 or float64, got Half"),
    "widths": ((X[:, :8], W1[:, :8], B1, W2[:8], B2[:8], None), 0.1,
               "widths must be multiples of 16, got 8 and 32"),
    "stride": ((X.t().contiguous().t(), *ALL[1:]), 0.1, "x must be contiguous"),
    "first": ((X, W1[0], *ALL[2:]), 0.1, r"first_weight must have shape \[M, C\], got \[16\]"),
    "first bias": ((X, W1, B1[:1], W2, B2, R), 0.1, r"first_bias must have shape \[32\], got \[1"),
    "second": ((X, W1, B1, W1, B2, R), 0.1, r"second_weight must have shape \[16, 32\], got \[32"),
    "bias": ((X, W1, B1, W2, B2.double(), R), 0.1, "second_bias must have dtype Float, got Double"),
    "residual": ((X, W1, B1, W2, B2, R[:1]), 0.1, r"residual must have shape \[2, 16\], got \[1,"),
    "p": (ALL, math.nan, r"p must lie in \[0, 1\), got -?nan"),
}  # fmt: skip


@pytest.mark.kernels
@pytest.mark.parametrize("name", RAW)
def test_raw_operator(name: str) -> None:
    arguments, p, text = RAW[name]
    with pytest.raises(ValueError, match=f"^feed_forward: {text}"):
        raw(torch.ops.recgrela.feed_forward, *arguments, p, 0, 0, True)


P = torch.zeros(2, 32)
RAW_BACKWARD: dict[str, tuple[tuple[Any, ...], str]] = {
    "grad": ((X[:1], X, W1, W2, P), r"grad must have shape \[2, 16\], got \[1, 16\]"),
    "pre": ((X, X, W1, W2, P[:, :16]), r"pre must have shape \[2, 32\], got \[2, 16\]"),
    "dtype": ((X, X, W1, W2, P.double()), "pre must have dtype Float, got Double"),
    "second": ((X, X, W1, W1, P), r"second_weight must have shape \[16, 32\], got \[32, 16\]"),
}


@pytest.mark.kernels
@pytest.mark.parametrize("name", RAW_BACKWARD)
def test_raw_backward(name: str) -> None:
    arguments, text = RAW_BACKWARD[name]
    with pytest.raises(ValueError, match=f"^feed_forward_backward: {text}"):
        raw(torch.ops.recgrela.feed_forward_backward, *arguments, 0.1, 0, 0)
