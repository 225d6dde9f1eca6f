"""softmax_loss: the reference's loss and gradients, ignored rows, excluded classes, errors."""

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

needs_kernels = pytest.mark.skipif(
    not _library.KERNEL_DEVICES, reason="the compiled operators are absent or switched off"
)


def make_case(
    rows: int, n_items: int, width: int, dtype: torch.dtype, ignore_index: int = 0,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    hidden = (torch.randn(rows, width, dtype=torch.float64) * scale).to(dtype)
    table = torch.randn(n_items, width, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, n_items, (rows,))
    targets[1::4] = ignore_index
    return hidden, table, targets


@pytest.mark.parametrize("ignore_index", [0, 11, "last", -100])
@pytest.mark.parametrize("shape", [(1, 12, 8), (31, 13, 3), (70, 64, 16), (300, 65, 50),
                                   (530, 129, 64), (97, 300, 72)])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_agrees_with_the_reference(
    dtype: torch.dtype, shape: tuple[int, int, int], ignore_index: Any
) -> None:
    ignore = shape[1] - 1 if ignore_index == "last" else ignore_index
    hidden, table, targets = make_case(*shape, dtype, ignore)
    for exclude in (True, False):
        if exclude and ignore < 0:
            continue
        found = ops.softmax_loss(hidden, table, targets, ignore, exclude)
        plain = reference.softmax_loss(hidden, table, targets, ignore, exclude)
        exact = reference.softmax_loss(hidden.double(), table.double(), targets, ignore, exclude)
        for x, p, e in zip(found, plain, exact, strict=True):
            assert x.dtype == dtype
            assert x.shape == p.shape
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
    loss, by_hidden, by_table = ops.softmax_loss(hidden, table, torch.tensor([1, 0]))
    torch.testing.assert_close(loss, torch.tensor(math.log(4.0)))
    torch.testing.assert_close(by_hidden, torch.tensor([[0.75 * math.log(3.0), 0.75], [0.0, 0.0]]))
    torch.testing.assert_close(by_table, torch.tensor([[0.0, 0.0], [-0.75, 0.0], [0.75, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_probabilities_that_underflow(dtype: torch.dtype) -> None:
    """Scores of several thousand: the loss keeps its digits, the gradients stay finite."""
    hidden, table, targets = make_case(90, 200, 16, dtype, scale=300.0)
    found = ops.softmax_loss(hidden, table, targets)
    exact = reference.softmax_loss(hidden.double(), table.double(), targets)
    assert exact[0] > 1000
    for x, e in zip(found, exact, strict=True):
        allowed = 1e-5 if dtype == torch.float32 else 1e-12
        assert (x.double() - e).abs().max() <= allowed * e.abs().max()


def test_no_target() -> None:
    hidden, table, _ = make_case(40, 20, 16, torch.float32)
    for targets in (torch.zeros(40, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)):
        loss, by_hidden, by_table = ops.softmax_loss(hidden[: len(targets)], table, targets)
        assert loss == 0
        assert by_hidden.shape == (len(targets), 16)
        assert not by_hidden.any()
        assert not by_table.any()


def test_no_classes() -> None:
    targets = torch.full((40,), -1)
    loss, by_hidden, by_table = ops.softmax_loss(
        torch.randn(40, 16), torch.zeros(0, 16), targets, -1, exclude=False
    )
    assert loss == 0
    assert by_table.shape == (0, 16)
    assert not by_hidden.any()
    only = ops.softmax_loss(torch.randn(40, 16), torch.ones(1, 16), torch.zeros(40).long())
    assert not any(x.any() for x in only)


def test_gradients_only_where_wanted() -> None:
    hidden, table, targets = make_case(70, 30, 16, torch.float32)
    loss, by_hidden, by_table = ops.softmax_loss(hidden, table, targets, gradients=False)
    assert by_hidden.numel() == by_table.numel() == 0
    assert_same_bits("loss", loss, ops.softmax_loss(hidden, table, targets)[0])


def test_same_bits_for_any_number_of_threads_and_layout() -> None:
    hidden, table, targets = make_case(1500, 333, 48, torch.float32)
    results = []
    for threads in (1, 2, 13):  # 13: chunks of two groups of rows
        torch.set_num_threads(threads)
        results.append(ops.softmax_loss(hidden, table, targets))
    turned = (x.t().contiguous().t() for x in (hidden, table))
    results.append(ops.softmax_loss(*turned, targets))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_same_bits("result", a, b)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(value: float) -> None:
    hidden, table, targets = make_case(70, 40, 16, torch.float32)
    table[-1, 3] = value
    for x in ops.softmax_loss(hidden, table, targets):
        assert not x.isfinite().all()
    table[-1, 3] = 1.0
    table[0] = value  # no class
    for x in ops.softmax_loss(hidden, table, targets):
        assert x.isfinite().all()


@needs_kernels
@pytest.mark.parametrize("gradients", [True, False])
def test_opcheck(gradients: bool) -> None:
    arguments = (*make_case(5, 7, 4, torch.float32), 0, True, gradients)
    torch.library.opcheck(torch.ops.recgrela.softmax_loss.default, arguments)


def test_compile() -> None:
    case = make_case(50, 30, 16, torch.float32)
    compiled = torch.compile(ops.softmax_loss, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(*case), ops.softmax_loss(*case), strict=True):
        assert_same_bits("compiled", a, b)


def test_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(50, 30, 16, torch.float64)
    found = ops.softmax_loss(*case)
    monkeypatch.setattr(_library, "KERNEL_DEVICES", frozenset())
    for x, y in zip(ops.softmax_loss(*case), found, strict=True):
        torch.testing.assert_close(x, y)


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
}


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs(name: str) -> None:
    changes, error, text = BAD[name]
    with pytest.raises(error, match=f"^softmax_loss: {text}"):
        ops.softmax_loss(**{"hidden": H, "table": E, "targets": Y, **changes})


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
}


@needs_kernels
@pytest.mark.parametrize("name", RAW)
def test_raw_operator(name: str) -> None:
    arguments, text = RAW[name]
    with pytest.raises(ValueError, match=f"^softmax_loss: {text}"):
        raw(torch.ops.recgrela.softmax_loss, *arguments, True, True)
