"""softmax_loss: the reference's loss and gradients, ignored rows, excluded classes, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from recgrela_ext import _library, ops
from recgrela_ext.model.losses import softmax_loss
from recgrela_ext.ops import reference
from tests.ops.bad_inputs import raw
from tests.tolerance import assert_same_bits


def make_case(
    rows: int, n_items: int, width: int, dtype: torch.dtype, ignore_index: int = 0,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    hidden = (torch.randn(rows, width, dtype=torch.float64) * scale).to(dtype)
    table = torch.randn(n_items, width, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, n_items, (rows,))
    targets[1::4] = ignore_index
    return hidden, table, targets


def make_bias(rows: int, n_items: int, targets: Tensor, dtype: torch.dtype) -> ops.LogitBias:
    """0 to 9 items a row, some twice, padding too; a third of them left out, targets never."""
    counts = torch.randint(0, 10, (rows,))
    items = torch.randint(0, n_items, (int(counts.sum()),))
    values = torch.randn(len(items), dtype=torch.float64) * 3
    out = torch.rand(len(items)) < 0.3
    values[out & (items != targets.repeat_interleave(counts))] = -torch.inf
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return ops.LogitBias(offsets, items, values.to(dtype))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("ignore_index", [0, 11, "last", -100])
@pytest.mark.parametrize("shape", [(1, 12, 8), (31, 13, 3), (70, 64, 16), (300, 65, 50),
                                   (530, 129, 64), (97, 300, 72), (33, 13, 0)])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_agrees_with_the_reference(
    dtype: torch.dtype, shape: tuple[int, int, int], ignore_index: Any, biased: bool
) -> None:
    ignore = shape[1] - 1 if ignore_index == "last" else ignore_index
    hidden, table, targets = make_case(*shape, dtype, ignore)
    bias = make_bias(*shape[:2], targets, dtype) if biased else None
    wide = bias and bias._replace(values=bias.values.double())
    for exclude in (True, False):
        if exclude and ignore < 0:
            continue
        found = ops.softmax_loss(hidden, table, targets, ignore, exclude, bias=bias)
        plain = reference.softmax_loss(hidden, table, targets, ignore, exclude, bias=bias)
        exact = reference.softmax_loss(
            hidden.double(), table.double(), targets, ignore, exclude, bias=wide
        )
        for x, p, e in zip(found, plain, exact, strict=True):
            assert x.dtype == dtype
            assert x.shape == p.shape
            if not e.numel():
                continue
            largest = e.abs().max().item()
            error, theirs = ((y.double() - e).abs().max().item() for y in (x, p))
            own = 4 * torch.finfo(dtype).eps if dtype == torch.float32 else 1e-13  # nothing wider
            assert error <= 2 * theirs + own * largest
        assert not found[1][targets == ignore].any()
        if exclude:
            assert not found[2][ignore].any()


def test_by_hand() -> None:
    """One row, two classes and a padding row: scores 0 and log 3, so probabilities 1/4 and 3/4."""
    hidden = torch.tensor([[1.0, 0.0], [5.0, 5.0]])
    table = torch.tensor([[9.0, 9.0], [0.0, 1.0], [math.log(3.0), 2.0]])
    loss, by_hidden, by_table, _ = ops.softmax_loss(hidden, table, torch.tensor([1, 0]))
    torch.testing.assert_close(loss, torch.tensor(math.log(4.0)))
    torch.testing.assert_close(by_hidden, torch.tensor([[0.75 * math.log(3.0), 0.75], [0.0, 0.0]]))
    torch.testing.assert_close(by_table, torch.tensor([[0.0, 0.0], [-0.75, 0.0], [0.75, 0.0]]))


def test_bias_by_hand() -> None:
    """Scores 0, 0, 0 and a padding row; log 2 twice makes the weights 4, 1, 1, or leaves two."""
    hidden, table = torch.zeros(2, 3), torch.randn(4, 3)
    two = math.log(2.0)
    bias = ops.LogitBias(
        torch.tensor([0, 4, 6]),
        torch.tensor([1, 0, 1, 3, 2, 1]),
        torch.tensor([two, 9.0, two, 0.0, -torch.inf, 0.0]),
    )
    loss, by_hidden, by_table, by_bias = ops.softmax_loss(
        hidden, table, torch.tensor([1, 3]), bias=bias
    )
    torch.testing.assert_close(loss, torch.tensor((math.log(1.5) + math.log(2.0)) / 2))
    share = torch.tensor([[0.0, -1 / 3, 1 / 6, 1 / 6], [0.0, 1 / 2, 0.0, -1 / 2]]) / 2
    torch.testing.assert_close(by_hidden, share @ table)
    assert not by_table.any()
    wanted = [share[0, 1], 0.0, share[0, 1], share[0, 3], 0.0, share[1, 1]]
    torch.testing.assert_close(by_bias, torch.tensor(wanted))


def test_bias_moves_the_largest_score() -> None:
    """Without the largest score's own exponent every probability would underflow, or overflow."""
    hidden, table = (
        torch.tensor([[1000.0], [1.0]]).repeat(40, 1),
        torch.tensor([[0.0], [1.0], [0.0]]),
    )
    offsets = torch.arange(81)
    items = torch.tensor([1, 2]).repeat(40)
    bias = ops.LogitBias(offsets, items, torch.tensor([-torch.inf, 1000.0]).repeat(40))
    found = ops.softmax_loss(hidden, table, torch.full((80,), 2), bias=bias)
    assert found[0] == 0
    for x in found:
        assert not x.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_probabilities_that_underflow(dtype: torch.dtype) -> None:
    """Scores of several thousand: the loss keeps its digits, the gradients stay finite."""
    hidden, table, targets = make_case(90, 200, 16, dtype, scale=300.0)
    found = ops.softmax_loss(hidden, table, targets)
    exact = reference.softmax_loss(hidden.double(), table.double(), targets)
    assert exact[0] > 1000
    for x, e in zip(found[:3], exact, strict=False):
        allowed = 1e-5 if dtype == torch.float32 else 1e-12
        assert (x.double() - e).abs().max() <= allowed * e.abs().max()


def test_no_target() -> None:
    hidden, table, _ = make_case(40, 20, 16, torch.float32)
    for targets in (torch.zeros(40, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)):
        bias = make_bias(len(targets), 20, targets, torch.float32)
        loss, by_hidden, by_table, by_bias = ops.softmax_loss(
            hidden[: len(targets)], table, targets, bias=bias
        )
        assert by_bias.shape == bias.values.shape
        assert not by_bias.any()
        assert loss == 0
        assert by_hidden.shape == (len(targets), 16)
        assert not by_hidden.any()
        assert not by_table.any()


def test_no_classes() -> None:
    targets = torch.full((40,), -1)
    loss, by_hidden, by_table, _ = ops.softmax_loss(
        torch.randn(40, 16), torch.zeros(0, 16), targets, -1, exclude=False
    )
    assert loss == 0
    assert by_table.shape == (0, 16)
    assert not by_hidden.any()
    only = ops.softmax_loss(torch.randn(40, 16), torch.ones(1, 16), torch.zeros(40).long())
    assert not any(x.any() for x in only)


def test_gradients_only_where_wanted() -> None:
    hidden, table, targets = make_case(70, 30, 16, torch.float32)
    bias = make_bias(70, 30, targets, torch.float32)
    loss, *none = ops.softmax_loss(hidden, table, targets, gradients=False, bias=bias)
    assert all(x.numel() == 0 for x in none)
    assert_same_bits("loss", loss, ops.softmax_loss(hidden, table, targets, bias=bias)[0])


def test_same_bits_for_any_number_of_threads_and_layout() -> None:
    hidden, table, targets = make_case(1500, 333, 48, torch.float32)
    bias = make_bias(1500, 333, targets, torch.float32)
    results = []
    for threads in (1, 2, 13):  # 13: chunks of two groups of rows
        torch.set_num_threads(threads)
        results.append(ops.softmax_loss(hidden, table, targets, bias=bias))
    turned = (x.t().contiguous().t() for x in (hidden, table))
    apart = ops.LogitBias(*(x[:, None].expand(-1, 2).contiguous()[:, 0] for x in bias))
    results.append(ops.softmax_loss(*turned, targets, bias=apart))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_same_bits("result", a, b)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(value: float) -> None:
    hidden, table, targets = make_case(70, 40, 16, torch.float32)
    table[-1, 3] = value
    for x in ops.softmax_loss(hidden, table, targets)[:3]:
        assert not x.isfinite().all()
    table[-1, 3] = 1.0
    table[0] = value  # no class
    for x in ops.softmax_loss(hidden, table, targets):
        assert x.isfinite().all()


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("ignore_index", [0, 3, 6])
@pytest.mark.parametrize("way", ["ops", "reference", "chunks", "no kernel"])
def test_an_excluded_row_is_no_class(
    monkeypatch: pytest.MonkeyPatch, way: str, ignore_index: int, biased: bool
) -> None:
    """What it holds shows nowhere, and its gradient is 0 even where a row's loss is not finite."""
    hidden, table, targets = make_case(70, 7, 16, torch.float64, ignore_index)
    targets[6] = 1
    offsets, items, values = make_bias(70, 7, targets, torch.float64)
    items[:2] = ignore_index
    bias = ops.LogitBias(offsets, items, values) if biased else None
    if way == "no kernel":
        monkeypatch.setattr(_library, "KERNEL_DEVICES", frozenset())

    def run() -> tuple[Tensor, ...]:
        if way == "chunks":
            given = hidden.clone().requires_grad_(), table.clone().requires_grad_()
            loss = softmax_loss(*given, targets, ignore_index, method="chunked", bias=bias)
            return loss.detach(), *torch.autograd.grad(loss, given)
        call = reference.softmax_loss if way == "reference" else ops.softmax_loss
        return call(hidden, table, targets, ignore_index, bias=bias)

    plain = run()
    table[ignore_index] = torch.nan
    for found, wanted in zip(run(), plain, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)
    hidden[6] = torch.nan
    loss, by_hidden, by_table, *_ = run()
    assert loss.isnan()
    assert by_hidden[6].isnan().all()
    assert by_table[ignore_index].eq(0).all()
    assert by_table.isnan().any()


@pytest.mark.kernels
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_opcheck(gradients: bool, biased: bool) -> None:
    case = make_case(5, 7, 4, torch.float32)
    bias = make_bias(5, 7, case[2], torch.float32) if biased else (None,) * 3
    arguments = (*case, 0, True, gradients, *bias)
    torch.library.opcheck(torch.ops.recgrela.softmax_loss.default, arguments)


def test_compile() -> None:
    case = make_case(50, 30, 16, torch.float32)
    compiled = torch.compile(ops.softmax_loss, backend="aot_eager", fullgraph=True)
    for bias in (None, make_bias(50, 30, case[2], torch.float32)):
        found = ops.softmax_loss(*case, bias=bias)
        for a, b in zip(compiled(*case, bias=bias), found, strict=True):
            assert_same_bits("compiled", a, b)


def test_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(50, 30, 16, torch.float64)
    bias = make_bias(50, 30, case[2], torch.float64)
    found = ops.softmax_loss(*case, bias=bias)
    monkeypatch.setattr(_library, "KERNEL_DEVICES", frozenset())
    for x, y in zip(ops.softmax_loss(*case, bias=bias), found, strict=True):
        torch.testing.assert_close(x, y)


Bias = ops.LogitBias
S, K, V = torch.tensor([0, 1, 2]), torch.tensor([1, 4]), torch.zeros(2)
FALL = torch.tensor([0, 2, 1])
H, E, Y = torch.zeros(2, 3), torch.zeros(5, 3), torch.ones(2, dtype=torch.int64)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": ({"targets": [1, 2]}, TypeError, "targets must be a tensor, got list"),
    "dims": ({"hidden": H[0]}, ValueError, r"hidden must be \[T, width\], got \[3\]"),
    "dtype": ({"hidden": H.half()}, ValueError, "hidden must have dtype float32 or float64, got"),
    "width": ({"table": E[:, :2]}, ValueError, r"table must be \[N, 3\], got \[5, 2\]"),
    "table": ({"table": E.double()}, ValueError, "table must have the dtype of hidden, torch.fl"),
    "device": ({"table": E.to("meta")}, ValueError, "table must be on the device of hidden, cpu"),
    "targets": ({"targets": Y[:1]}, ValueError, r"targets must have shape of the rows = \[2\], g"),
    "int32": ({"targets": Y.int()}, TypeError, "targets must have dtype int64, got torch.int32"),
    "index": ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int, got 1.5"),
    "excluded": ({"ignore_index": 5}, ValueError, "ignore_index must be a row of table to be exc"),
    "tuple": ({"bias": (S, K, V)}, TypeError, r"bias must be a LogitBias or R|.* tuple"),
    "offsets": ({"bias": Bias(S[:2], K, V)}, ValueError, r"bias.offsets must have shape"),
    "items": ({"bias": Bias(S, K[:1], V)}, ValueError, r"bias.items and bias.values must"),
    "int": ({"bias": Bias(S, K.int(), V)}, TypeError, r"bias.items must have dtype int64"),
    "values": ({"bias": Bias(S, K, V.double())}, ValueError, r"bias.values must have the"),
    "falls": (
        {"bias": Bias(FALL, K, V)},
        ValueError,
        r"bias.offsets must rise",
    ),
    "drops": (
        {"bias": Bias(S[[2, 0, 2]], K, V)},
        ValueError,
        r"bias.offsets must rise",
    ),
    "range": (
        {"bias": Bias(S, K + 1, V)},
        ValueError,
        r"bias.items must lie in 0..4, got 5",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs(name: str) -> None:
    changes, error, text = BAD[name]
    with pytest.raises(error, match=f"^softmax_loss: ({text})"):
        ops.softmax_loss(**{"hidden": H, "table": E, "targets": Y, **changes})


@pytest.mark.parametrize("name", ["falls", "drops", "range"])
def test_bad_bias_without_the_kernel(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(_library, "KERNEL_DEVICES", frozenset())
    test_bad_inputs(name)


RAW: dict[str, tuple[tuple[Any, ...], str]] = {
    "dims": ((H[0], E, Y, 0), r"hidden must have shape \[T, width\], got \[3\]"),
    "dtype": ((H.half(), E.half(), Y, 0), "hidden must have dtype float32 or float64, got Half"),
    "width": ((H, E[:, :2], Y, 0), r"table must have shape \[N, 3\], got \[5, 2\]"),
    "table": ((H, E.double(), Y, 0), "table must have dtype Float, got Double"),
    "stride": ((H, torch.zeros(3, 5).t(), Y, 0), "table must be contiguous"),
    "targets": ((H, E, Y[:1], 0), r"targets must have shape \[2\], got \[1\]"),
    "int32": ((H, E, Y.int(), 0), "targets must have dtype Long, got Int"),
    "high": ((H, E, Y * 5, 0), "targets must be below n_items=5, got 5"),
    "negative": ((H, E, -Y, 0), "targets must be below n_items=5, got -1"),
    "excluded": ((H, E, Y, -1), "ignore_index must be a row of table to be excluded, got -1"),
    "two of three": ((H, E, Y, 0, S, K, None), "bias must be given as offsets, items and values"),
    "offsets": ((H, E, Y, 0, S[:2], K, V), r"bias.offsets must have shape \[3\], got \[2\]"),
    "fall": ((H, E, Y, 0, FALL, K, V), "bias.offsets must rise from 0 to K=2, got 0 to 1"),
    "drop": (
        (H, E, Y, 0, torch.tensor([0, 3, 2]), K, V),
        "bias.offsets must rise from 0 to K=2",
    ),
    "begin": ((H, E, Y, 0, S + 1, K, V), "bias.offsets must rise from 0 to K=2, got 1 to 3"),
    "item": ((H, E, Y, 0, S, K + 1, V), "bias.items must lie in 0..4, got 5"),
    "below": ((H, E, Y, 0, S, -K, V), "bias.items must lie in 0..4, got -1"),
    "values": ((H, E, Y, 0, S, K, V.double()), "bias.values must have dtype Float, got Double"),
    "shape": ((H, E, Y, 0, S, K[None], V), r"bias.items must have shape \[K\], got \[1, 2\]"),
}


@pytest.mark.kernels
@pytest.mark.parametrize("name", RAW)
def test_raw_operator(name: str) -> None:
    (*case, ignore_index), bias = RAW[name][0][:4], RAW[name][0][4:] or (None,) * 3
    with pytest.raises(ValueError, match=f"^softmax_loss: {RAW[name][1]}"):
        raw(torch.ops.recgrela.softmax_loss, *case, ignore_index, True, True, *bias)
