"""activation_dropout: the reference's values and mask, the mask's statistics, autograd, errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recgrela_ext import _library, ops
from recgrela_ext.ops import reference
from tests.ops.bad_inputs import raw
from tests.tolerance import assert_as_exact, assert_same_bits

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MODES = {
    "dropout": {},
    "gelu": {"gelu": True},
    "residual": {"residual": True},
    "gelu and residual": {"gelu": True, "residual": True},
}
SEEDS = (0, 1, -1, 2**63 - 1, -(2**63), 123456789)


def make_rows(count: int, dtype: torch.dtype, residual: bool = False) -> list[Tensor | None]:
    x = (torch.randn(count, dtype=torch.float64) * 3).to(dtype)
    return [x, torch.randn(count, dtype=torch.float64).to(dtype) if residual else None]


def gradients_of(operator: Callable[..., Tensor], rows: list[Tensor | None], grad: Tensor,
                 **options: Any) -> tuple[Tensor, ...]:  # fmt: skip
    leaves = [None if x is None else x.detach().requires_grad_() for x in rows]
    out = operator(*leaves, **options)
    return torch.autograd.grad(out, [x for x in leaves if x is not None], grad)


def as_exact(
    what: str, found: Tensor, plain: Tensor, exact: Tensor, backward: bool, terms: Tensor
) -> None:
    assert found.dtype == plain.dtype
    for parts in zip(*(t.split(64) for t in (found, plain, exact, terms)), strict=True):
        x, p, e, t = parts
        assert_as_exact(what, x, p, e, (-1,), backward, t)


@pytest.mark.parametrize("count", [0, 1, 3, 17, 63, 64, 65, 1023, 1025, 5001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", MODES.values(), ids=MODES.keys())
def test_agrees_with_the_reference(
    options: dict[str, bool], dtype: torch.dtype, count: int
) -> None:
    gelu, p, seed = options.get("gelu", False), 0.3, 5
    rows = make_rows(count, dtype, options.get("residual", False))
    exactly: list[Any] = [None if x is None else x.double() for x in rows]
    named: dict[str, Any] = {"gelu": gelu, "p": p, "seed": seed}
    # The reference's (1 + erf) / 2, in float64 too, cancels far below 0.
    terms = 0.5 * gelu * reference.dropout_factors(exactly[0], p, seed)
    found = ops.activation_dropout(*rows, **named)
    plain = reference.activation_dropout(*rows, **named)
    as_exact("out", found, plain, reference.activation_dropout(*exactly, **named), False,
             terms * exactly[0].abs())  # fmt: skip
    grad = torch.randn(count, dtype=torch.float64).to(dtype)
    founds, plains, exacts = (
        gradients_of(operator, given, g, **named)
        for operator, given, g in (
            (ops.activation_dropout, rows, grad),
            (reference.activation_dropout, rows, grad),
            (reference.activation_dropout, exactly, grad.double()),
        )
    )
    for name, x, y, e in zip(("x", "residual"), founds, plains, exacts, strict=False):
        as_exact(f"gradient of {name}", x, y, e, True, terms * grad.double().abs())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_mask_is_the_reference_s(seed: int, dtype: torch.dtype) -> None:
    for p in (0.0, 1e-9, 0.1, 0.5, 1 - 2**-20, math.nextafter(1.0, 0.0)):
        factors = reference.dropout_factors(torch.empty(5003, dtype=dtype), p, seed)
        ones = torch.ones(5003, dtype=dtype)
        assert_same_bits("factors", ops.activation_dropout(ones, p=p, seed=seed), factors.to(dtype))
        (grad,) = gradients_of(ops.activation_dropout, [ones, None], ones, p=p, seed=seed)
        assert_same_bits("gradient", grad, factors.to(dtype))


def test_a_mask_by_hand() -> None:
    """splitmix64(0) is published, 0xe220a8397b1dcdaf; the rest by Python's integers."""
    low = 2**32 - 1

    def mix(z: int) -> int:
        z = (z + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    assert mix(0) == 0xE220A8397B1DCDAF
    kept = []
    for i in range(2100):
        key = mix((mix(-7 % 2**64) + i // 1024) % 2**64)
        w = ((key & low) + 0x9E3779B9 * (i % 1024)) & low
        w = (w ^ w >> 16) * 0x7FEB352D & low
        w = (w ^ w >> 15 ^ key >> 32) * 0x846CA68B & low
        kept.append((w ^ 2**31) >= 2**30)
    out = ops.activation_dropout(torch.ones(2100), p=0.25, seed=-7)
    assert (out != 0).tolist() == kept
    assert out.max() == torch.tensor(4 / 3)


def test_without_dropout() -> None:
    x, residual = make_rows(1000, torch.float32, True)
    assert x is not None
    assert_same_bits("identity", ops.activation_dropout(x, p=0.0), x)
    assert_same_bits("sum", ops.activation_dropout(x, residual, p=0.0), residual + x)
    wide = ops.activation_dropout(x.double(), gelu=True, p=0.0)
    assert torch.allclose(wide, F.gelu(x.double()), rtol=0, atol=1e-14)


@pytest.mark.kernels
def test_gelu_far_out() -> None:
    """Nothing overflows; far below 0 GELU keeps its digits, which x (1 + erf) / 2 loses."""
    x = torch.tensor([-torch.inf, -3e38, -1e4, -30.0, 30.0, 1e4, 3e38, torch.inf, torch.nan])
    wanted = torch.tensor([0, 0, 0, 0, 30.0, 1e4, 3e38, torch.inf, torch.nan])
    slope = torch.tensor([0, 0, 0, 0, 1.0, 1.0, 1.0, 1.0, torch.nan])
    for dtype in (torch.float32, torch.float64):
        own = x.to(dtype)
        out = ops.activation_dropout(own, gelu=True, p=0.0)
        assert torch.allclose(out, wanted.to(dtype), rtol=0, atol=1e-30, equal_nan=True)
        (grad,) = gradients_of(ops.activation_dropout, [own, None], torch.ones_like(own),
                               gelu=True, p=0.0)  # fmt: skip
        assert torch.allclose(grad, slope.to(dtype), rtol=0, atol=1e-30, equal_nan=True)
    x = torch.linspace(-10, 10, 4001)
    exact = 0.5 * x.double() * torch.special.erfc(-x.double() * 0.5**0.5)
    out = ops.activation_dropout(x, gelu=True, p=0.0)
    assert torch.allclose(out.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(dtype: torch.dtype) -> None:
    """The mask goes by the element's number, wherever it lies."""
    x, residual = (torch.randn(31, 33, 5).to(dtype) for _ in range(2))
    named: dict[str, Any] = {"gelu": True, "p": 0.4, "seed": 3}
    plain = ops.activation_dropout(x, residual, **named)
    turned = (y.transpose(0, 2).contiguous().transpose(0, 2) for y in (x, residual))
    assert_same_bits("strided", ops.activation_dropout(*turned, **named), plain)
    flat = ops.activation_dropout(x.flatten(), residual.flatten(), **named)
    assert_same_bits("flat", flat.view(x.shape), plain)
    grad = torch.ones((), dtype=dtype).expand_as(x)
    expanded = gradients_of(ops.activation_dropout, [x, residual], grad, **named)
    dense = gradients_of(ops.activation_dropout, [x, residual], grad.contiguous(), **named)
    for a, b in zip(expanded, dense, strict=True):
        assert_same_bits("gradient", a, b)


def test_same_bits_for_any_number_of_threads() -> None:
    x, residual = (torch.randn(301, 257) for _ in range(2))
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        named: dict[str, Any] = {"gelu": True, "p": 0.1, "seed": 11}
        out = ops.activation_dropout(x, residual, **named)
        results.append((out, *gradients_of(ops.activation_dropout, [x, residual], x, **named)))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_same_bits("threads", a, b)


# Statistics. Every bound is 5 standard deviations of what independent draws would give.


def drops(count: int, p: float, seed: int) -> Tensor:
    return (ops.activation_dropout(torch.ones(count), p=p, seed=seed) == 0).double()


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_share_and_spread(p: float) -> None:
    count, width = 1 << 20, 256
    dropped = drops(count, p, 77)
    assert abs(dropped.mean() - p) < 5 * (p * (1 - p) / count) ** 0.5
    rows = dropped.view(-1, width)
    for dim in (0, 1):  # as many drops a row and a column as a binomial gives
        n = rows.shape[dim]
        sums = rows.sum(dim)
        variance, k = n * p * (1 - p), sums.numel()
        excess = 1 + (1 - 6 * p * (1 - p)) / (2 * variance)
        statistic = ((sums - n * p) ** 2).sum() / variance
        assert abs(statistic - k) < 5 * (2 * k * excess) ** 0.5


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_no_correlation(p: float) -> None:
    """Between neighbours, rows, blocks of one key, and seeds that are neighbours."""
    count = 1 << 20
    centred = drops(count, p, 42) - p
    limit = 5 * p * (1 - p) * count**0.5
    for lag in (*range(1, 33), 63, 64, 65, 127, 128, 255, 256, 257, 512, 1023, 1024, 1025, 4096):
        assert abs((centred[lag:] * centred[:-lag]).sum()) < limit, lag
    for other in (43, 41, -42, 42 + 2**32, 42 + 1024):
        assert abs(((drops(count, p, other) - p) * centred).sum()) < limit, other


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("lag", [1, 2, 8, 64, 256, 1024])
def test_patterns(p: float, lag: int) -> None:
    """Chi-square of the 256 patterns of 8 elements, `lag` apart."""
    dropped = drops(1 << 21, p, 4).view(-1, 8, lag)
    weights = 2 ** torch.arange(8, dtype=torch.float64)
    patterns = (dropped * weights[:, None]).sum(1).long().flatten()
    found = torch.bincount(patterns, minlength=256).double()
    ones = torch.tensor([sum(bits) for bits in itertools.product((0, 1), repeat=8)])
    expected = patterns.numel() * p**ones * (1 - p) ** (8 - ones)
    pooled = expected < 20  # too rare for the approximation one by one
    found = torch.cat((found[~pooled], found[pooled].sum()[None]))
    expected = torch.cat((expected[~pooled], expected[pooled].sum()[None]))
    found, expected = found[expected > 0], expected[expected > 0]
    free = len(expected) - 1
    statistic = ((found - expected) ** 2 / expected).sum()
    assert abs(statistic - free) < 5 * (2 * free) ** 0.5


def test_seeds_at_one_element() -> None:
    """Elements over 4,000 seeds are as random as seeds over elements."""
    p, seeds = 0.25, 4000
    table = torch.stack([drops(64, p, seed) for seed in range(seeds)]) - p
    assert (table.sum(0).abs() < 5 * (p * (1 - p) * seeds) ** 0.5).all()
    correlation = (table.T @ table) / (p * (1 - p) * seeds)
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 5.5 / seeds**0.5  # of 2,016 pairs
    assert abs((table[1:] * table[:-1]).sum()) < 5 * p * (1 - p) * (64 * seeds) ** 0.5


# Inside torch.


@pytest.mark.parametrize("options", MODES.values(), ids=MODES.keys())
def test_gradcheck_twice(options: dict[str, bool]) -> None:
    rows = make_rows(70, torch.float64, options.get("residual", False))
    leaves = [x.requires_grad_() for x in rows if x is not None]

    def call(x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.activation_dropout(x, residual, options.get("gelu", False), 0.4, 9)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("wanted", [0, 1])
def test_gradient_of_one(wanted: int) -> None:
    rows = make_rows(100, torch.float32, True)
    grad = torch.randn(100)
    both = gradients_of(ops.activation_dropout, rows, grad, gelu=True)
    leaf = rows[wanted].requires_grad_()
    (alone,) = torch.autograd.grad(ops.activation_dropout(*rows, gelu=True), leaf, grad)
    assert_same_bits("gradient", alone, both[wanted])


def test_forward_mode() -> None:
    x, tangent = (torch.randn(50, dtype=torch.float64) for _ in range(2))
    (grad,) = gradients_of(ops.activation_dropout, [x, None], tangent, gelu=True)
    found = torch.func.jvp(lambda y: ops.activation_dropout(y, gelu=True), (x,), (tangent,))[1]
    assert torch.allclose(found, grad, rtol=1e-12)


@pytest.mark.kernels
@pytest.mark.parametrize("options", MODES.values(), ids=MODES.keys())
def test_opcheck(options: dict[str, bool]) -> None:
    gelu = options.get("gelu", False)
    rows = [None if x is None else x.requires_grad_()
            for x in make_rows(12, torch.float32, options.get("residual", False))]  # fmt: skip
    torch.library.opcheck(torch.ops.recgrela.activation_dropout.default, (*rows, gelu, 0.3, 1))
    x = rows[0] if gelu else None
    grad = torch.randn(12, requires_grad=True)
    arguments = (grad, x, gelu, 0.3, 1)
    torch.library.opcheck(torch.ops.recgrela.activation_dropout_backward.default, arguments)


def test_compile() -> None:
    def call(x: Tensor, residual: Tensor) -> Tensor:
        return ops.activation_dropout(x, residual, True, 0.3, 2).sum(1)

    rows = [torch.randn(9, 40, requires_grad=True) for _ in range(2)]
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    found, wanted = (torch.autograd.grad(f(*rows).sum(), rows) for f in (compiled, call))
    for a, b in zip(found, wanted, strict=True):
        assert_same_bits("gradient", a, b)


def test_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(300)
    out = ops.activation_dropout(x, p=0.3, seed=8)
    monkeypatch.setattr(_library, "KERNEL_DEVICES", frozenset())
    assert_same_bits("out", out, ops.activation_dropout(x, p=0.3, seed=8))


X = torch.zeros(2, 3)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    "integers": ({"x": X.long()}, ValueError, "x must have dtype float32, float64, bfloat16 or"),
    "residual": ({"residual": 1.0}, TypeError, "residual must be a tensor, got float"),
    "shape": ({"residual": X[:1]}, ValueError, r"residual must have shape of x = \[2, 3\], got"),
    "dtype": ({"residual": X.double()}, ValueError, "residual must have the dtype of x, torch.fl"),
    "device": ({"residual": X.to("meta")}, ValueError, "residual must be on the device of x, cpu"),
    "gelu": ({"gelu": "tanh"}, TypeError, "gelu must be True or False, got 'tanh'"),
    "p of one": ({"p": 1.0}, ValueError, r"p must lie in \[0, 1\), got 1.0"),
    "negative p": ({"p": -0.1}, ValueError, r"p must lie in \[0, 1\), got -0.1"),
    "nan p": ({"p": math.nan}, ValueError, r"p must lie in \[0, 1\), got nan"),
    "seed": ({"seed": 1.5}, TypeError, "seed must be an int, got 1.5"),
    "long seed": ({"seed": 2**63}, ValueError, "seed must fit in 64 bits, got 9223372036854775808"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs(name: str) -> None:
    changes, error, text = BAD[name]
    with pytest.raises(error, match=f"^activation_dropout: {text}"):
        ops.activation_dropout(**{"x": X, **changes})


RAW: dict[str, tuple[tuple[Any, ...], str]] = {
    "integers": ((X.long(), None, False, 0.1), "x must have a floating dtype, got Long"),
    "stride": ((X.t(), None, False, 0.1), "x must be contiguous"),
    "shape": ((X, X[:1], False, 0.1), r"residual must have the shape of x \[2, 3\], got \[1, 3\]"),
    "dtype": ((X, X.double(), False, 0.1), "residual must have the dtype of x, Float, got Double"),
    "p": ((X, None, False, 1.0), r"p must lie in \[0, 1\), got 1"),
    "nan": ((X, None, False, math.nan), r"p must lie in \[0, 1\), got -?nan"),
}
RAW_BACKWARD: dict[str, tuple[tuple[Any, ...], str]] = {
    "no x": ((X, None, True, 0.1), "x must be given with gelu and not without it"),
    "x": ((X, X, False, 0.1), "x must be given with gelu and not without it"),
    "shape": ((X, X[:1], True, 0.1), r"x must have the shape of grad \[2, 3\], got \[1, 3\]"),
    "dtype": ((X, X.half(), True, 0.1), "x must have the dtype of grad, Float, got Half"),
    "stride": ((X.t(), X.t(), True, 0.1), "grad must be contiguous"),
    "p": ((X, None, False, -1.0), r"p must lie in \[0, 1\), got -1"),
}


@pytest.mark.kernels
@pytest.mark.parametrize("name", RAW)
def test_raw_operator(name: str) -> None:
    arguments, text = RAW[name]
    with pytest.raises(ValueError, match=f"^activation_dropout: {text}"):
        raw(torch.ops.recgrela.activation_dropout, *arguments, 0)


@pytest.mark.kernels
@pytest.mark.parametrize("name", RAW_BACKWARD)
def test_raw_backward(name: str) -> None:
    arguments, text = RAW_BACKWARD[name]
    with pytest.raises(ValueError, match=f"^activation_dropout_backward: {text}"):
        raw(torch.ops.recgrela.activation_dropout_backward, *arguments, 0)
