"""The bias by recency of softmax_loss, against a dense one made item by item; bad input; memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recgrela_ext import _library, ops
from recgrela_ext.model import losses
from tests.ops.bad_inputs import raw
from tests.tolerance import assert_same_bits

ROOT = Path(__file__).parents[2]
POWERS = (1, 2, 4, 8, 16, 32, 64, 128)
BOUNDS: dict[str, tuple[int, ...]] = {
    "powers of two": POWERS, "one value": (), "the last item": (1,), "far off": (3, 7, 10**12),
    "every place": tuple(range(1, 40)), "second": (2, 3),
}  # fmt: skip


def windows(rows: int, n_items: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Windows of one log end to end; a row has met its window up to itself."""
    end = torch.arange(1, rows + 1)
    return torch.randint(0, n_items, (rows,)), (end - 1) // length * length, end


def jumps(rows: int, n_items: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Spans that grow by none, one or many places, in runs of about `length` rows."""
    steps = torch.tensor([0, 1, 1, 1, 2, 5, 40])[torch.randint(0, 7, (rows,))]
    run = torch.arange(rows) // length
    end = 9 + steps.cumsum(0)
    return torch.randint(0, n_items, (int(end[-1]),)), 3 * run.clamp(max=3), end


def anywhere(rows: int, n_items: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Any spans, a third of them empty or upside down."""
    begin, end = torch.randint(0, 5 * length + 1, (2, rows))
    end = torch.where(torch.arange(rows) % 3 == 0, end, torch.maximum(begin, end))
    return torch.randint(0, n_items, (5 * length,)), begin, end


def back_and_forth(rows: int, n_items: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Spans with one begin, whose ends rise and fall by a few places."""
    end = (length + torch.randint(-2, 4, (rows,)).cumsum(0)).clamp(0, 3 * length)
    return torch.randint(0, n_items, (3 * length,)), torch.ones_like(end), end


LOGS = {"windows": windows, "jumps": jumps, "anywhere": anywhere, "back and forth": back_and_forth}


def make_bias(
    log: str, rows: int, n_items: int, length: int, up_to: tuple[int, ...], dtype: torch.dtype
) -> ops.RecencyBias:
    items, begin, end = LOGS[log](rows, n_items, length)
    values = (3 * torch.randn(len(up_to) + 1, dtype=torch.float64)).to(dtype)
    return ops.RecencyBias(items, begin, end, up_to, values)


def dense(bias: ops.RecencyBias, n_items: int) -> Tensor:
    """[T, N] in float64, one item after another."""
    places = torch.full((len(bias.begin), n_items), -1)
    for row, (low, high) in enumerate(zip(bias.begin.tolist(), bias.end.tolist(), strict=True)):
        met = dict.fromkeys(reversed(bias.items[low:high].tolist() if low < high else []))
        for recency, item in enumerate(met, 1):
            places[row, item] = sum(bound < recency for bound in bias.up_to)
    values = torch.cat([bias.values.double(), torch.zeros(1, dtype=torch.float64)])
    return values[places]


def expected(
    hidden: Tensor, table: Tensor, targets: Tensor, ignore: int, exclude: bool, bias: Any
) -> tuple[Tensor, ...]:
    """Loss and gradients in float64, by autograd."""
    wide = [x.detach().double().requires_grad_() for x in (hidden, table, bias.values)]
    scores = wide[0] @ wide[1].t() + dense(bias._replace(values=wide[2]), len(table))
    if exclude:
        scores = scores.index_fill(1, torch.tensor([ignore]), -torch.inf)
    loss = torch.nn.functional.cross_entropy(
        scores, targets, ignore_index=ignore, reduction="sum"
    ) / max(int((targets != ignore).sum()), 1)
    return loss.detach(), *torch.autograd.grad(loss, wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ignore", [0, 7, "last", -100])
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("log", LOGS)
@pytest.mark.parametrize(("rows", "n_items", "length"), [(1, 12, 3), (70, 40, 25), (150, 300, 90)])
def test_every_row(
    rows: int, n_items: int, length: int, log: str, bounds: str, ignore: Any, dtype: torch.dtype
) -> None:
    hidden, table = torch.randn(rows, 8, dtype=dtype), torch.randn(n_items, 8, dtype=dtype)
    exclude, ignore = ignore != -100, n_items - 1 if ignore == "last" else ignore
    targets = torch.randint(0, n_items, (rows,))
    targets[rows // 2 :: 5] = ignore
    bias = make_bias(log, rows, n_items, length, BOUNDS[bounds], dtype)
    found = ops.softmax_loss(hidden, table, targets, ignore, exclude, True, bias)
    wanted = expected(hidden, table, targets, ignore, exclude, bias)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    alone = ops.softmax_loss(hidden, table, targets, ignore, exclude, False, bias)
    assert_same_bits("loss", alone[0], found[0])
    assert [x.numel() for x in alone[1:]] == [0, 0, 0]


@pytest.mark.parametrize("seed", range(20))
def test_few_items_that_come_again_and_again(seed: int) -> None:
    """Every order of moving over a bound: the item at it, this side of it, beyond it, new."""
    torch.manual_seed(seed)
    for n_items in (2, 4, 7):
        bias = make_bias("windows", 200, n_items, 60, (1, 2, 3, 5), torch.float64)
        hidden, table = torch.randn(200, 4).double(), torch.randn(n_items, 4).double()
        targets = torch.randint(0, n_items, (200,))
        found = ops.softmax_loss(hidden, table, targets, -1, False, True, bias)
        wanted = expected(hidden, table, targets, -1, False, bias)
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.kernels
def test_any_number_of_threads_and_any_strides() -> None:
    bias = make_bias("windows", 700, 90, 150, POWERS, torch.float32)
    hidden, table, targets = torch.randn(700, 16), torch.randn(90, 16), torch.randint(0, 90, (700,))
    items, begin, end, values = (
        x.repeat_interleave(2)[::2] for x in (bias.items, bias.begin, bias.end, bias.values)
    )
    apart = ops.RecencyBias(items, begin, end, bias.up_to, values)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for one in (bias, apart):
            found.append(ops.softmax_loss(hidden, table, targets, 0, True, True, one))
    for other in found[1:]:
        for x, y in zip(other, found[0], strict=True):
            assert_same_bits("output", x, y)


@pytest.mark.parametrize("chunk_rows", [None, 7])
def test_autograd(chunk_rows: int | None) -> None:
    """The same from `model.losses`, by the kernel and item by item."""
    torch.set_num_threads(1)
    bias = make_bias("windows", 200, 50, 60, POWERS, torch.float64)
    leaves = [
        x.requires_grad_()
        for x in (torch.randn(200, 8).double(), torch.randn(50, 8).double(), bias.values)
    ]
    targets = torch.randint(0, 50, (200,))
    loss = losses.softmax_loss(*leaves[:2], targets, chunk_rows=chunk_rows, bias=bias)
    wanted = expected(*leaves[:2], targets, 0, True, bias)
    for got, want in zip((loss, *torch.autograd.grad(loss, leaves)), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_an_item_can_be_left_out() -> None:
    """-inf for what was met last: no loss beside it, no gradient."""
    items = torch.tensor([3, 5, 3, 4])
    bias = ops.RecencyBias(items, torch.zeros(3, dtype=torch.int64), torch.tensor([2, 3, 4]),
                           (1,), torch.tensor([-torch.inf, 0.5]))  # fmt: skip
    hidden, table, targets = torch.randn(3, 4), torch.randn(6, 4), torch.tensor([1, 1, 2])
    loss, _, _, grad = ops.softmax_loss(hidden, table, targets, 0, True, True, bias)
    listed = ops.softmax_loss(hidden, table, targets, 0, True, True, bias.listed())
    torch.testing.assert_close(loss, listed[0])
    assert loss.isfinite()
    assert grad[0] == 0
    assert grad[1] > 0


def test_a_row_that_is_not_finite_reaches_its_own_buckets_alone() -> None:
    end = torch.arange(1, 41).clamp(max=3)
    bias = ops.RecencyBias(torch.tensor([1, 2, 3]), end - end, end, (1, 2), torch.zeros(3))
    hidden, table = torch.randn(40, 4), torch.randn(6, 4)
    hidden[0] = torch.nan
    grad = ops.softmax_loss(hidden, table, torch.full((40,), 5), bias=bias)[3]
    assert grad.isnan().tolist() == [True, False, False]


def test_bfloat16_values_are_summed_in_float32() -> None:
    rows, dtype = 400, torch.bfloat16
    bias = make_bias("windows", rows, 300, 200, (1, 2, 4), dtype)
    values = bias.values.requires_grad_()
    hidden, table = torch.randn(rows, 8).to(dtype), torch.randn(300, 8).to(dtype)
    targets = torch.randint(1, 300, (rows,))
    loss = losses.softmax_loss(hidden, table, targets, chunk_rows=64, bias=bias)
    (got,) = torch.autograd.grad(loss, values)
    want = expected(hidden, table, targets, 0, True, bias)[3]
    torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=1e-3)


@pytest.mark.kernels
def test_memory_does_not_grow_with_the_square_of_a_window() -> None:
    """Listed item by item, 20,000 rows with up to 3,000 items would be more than a gigabyte."""
    code = """
import resource, torch
from recgrela_ext import ops
rows, n_items = 20_000, 3_000
end = torch.arange(1, rows + 1)
bias = ops.RecencyBias(torch.randint(1, n_items, (rows,)), torch.zeros_like(end), end,
                       (1, 2, 4, 8, 16, 32, 64, 128), torch.randn(9))
hidden, table = torch.randn(rows, 8), torch.randn(n_items, 8)
def run(bias):
    ops.softmax_loss(hidden, table, torch.randint(1, n_items, (rows,)), 0, True, True, bias)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
without = run(None)
print(run(bias) - without)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=300, check=True)  # fmt: skip
    assert int(done.stdout) < 30


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": ({"items": [1, 2]}, TypeError, "bias.items must be a tensor, got list"),
    "a matrix": ({"begin": torch.ones(2, 2).long()}, ValueError, "bias.begin must have one dim"),
    "int32": ({"end": torch.ones(2).int()}, TypeError, "bias.end must have dtype int64, got"),
    "fewer rows": ({"end": torch.ones(1).long()}, ValueError, r"bias.end must have shape of the "),
    "device": ({"end": torch.ones(2, device="meta").long()}, ValueError, "bias.end must be on the"),
    "whole values": ({"values": torch.ones(3).long()}, ValueError, "must have a floating dtype"),
    "double values": ({"values": torch.ones(3).double()}, ValueError, "the dtype of hidden, torch"),
    "a list": ({"up_to": [1, 2]}, ValueError, r"up_to must be a tuple of ints that rise from 1"),
    "falls": ({"up_to": (2, 2)}, ValueError, r"rise from 1 or more, got \(2, 2\)"),
    "zero": ({"up_to": (0, 2)}, ValueError, r"rise from 1 or more, got \(0, 2\)"),
    "a float": ({"up_to": (1.0, 2)}, ValueError, "tuple of ints that rise"),
    "too large": ({"up_to": (1, 2**63)}, ValueError, "tuple of ints that rise"),
    "fewer values": ({"values": torch.ones(2)}, ValueError, "must be one more than up_to, 254 at"),
    "too many": ({"values": torch.ones(255), "up_to": tuple(range(1, 255))}, ValueError,
                 "254 at most, got 255 and 254"),
    "before": ({"begin": torch.tensor([0, -1])}, ValueError, r"spans must lie in 0\.\.3, got -1 t"),
    "beyond": ({"end": torch.tensor([2, 4])}, ValueError, r"spans must lie in 0\.\.3, got 1 to 4"),
    "no item": ({"items": torch.tensor([5, 6, 2])}, ValueError, r"bias.items must lie in 0\.\.5, "),
}  # fmt: skip


@pytest.mark.parametrize(
    "path", [pytest.param("kernel", marks=pytest.mark.kernels), "plain", "chunks"]
)
@pytest.mark.parametrize("what", BAD)
def test_refusals(what: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, error, told = BAD[what]
    if path == "plain":
        monkeypatch.setattr(_library, "KERNEL_DEVICES", frozenset())
    hidden, table, targets = torch.randn(2, 4), torch.randn(6, 4), torch.tensor([1, 2])
    good = ops.RecencyBias(torch.tensor([5, 3, 5]), torch.tensor([0, 1]), torch.tensor([2, 3]),
                           (1, 2), torch.ones(3))  # fmt: skip

    def run(bias: ops.RecencyBias) -> Any:
        if path == "chunks":
            return losses.softmax_loss(hidden, table, targets, chunk_rows=1, bias=bias)
        return ops.softmax_loss(hidden, table, targets, bias=bias)

    run(good)
    if path == "chunks" and what == "double values":  # model.losses casts them
        assert run(good._replace(**change)) == run(good)
        return
    with pytest.raises(error, match=told):
        run(good._replace(**change))


@pytest.mark.kernels
def test_a_raw_call_is_checked() -> None:
    operator = torch.ops.recgrela.softmax_loss
    hidden, table, targets = torch.randn(2, 4), torch.randn(6, 4), torch.tensor([1, 2])
    items, values = torch.tensor([5, 3, 5]), torch.ones(3)
    begin, end, up_to = torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([1, 2])
    head = hidden, table, targets, 0, True, True
    for tail, text in (
        ((None, items, values, begin, end, None), "got some of them"),
        ((begin, items, values, begin, end, up_to), "got some of them"),
        ((None, None, None, begin, end, up_to), "got some of them"),
        ((begin, None, None, begin, end, up_to), "got some of them"),
        ((None, items, torch.ones(0), begin, end, up_to), "K from 1 to 254"),
        ((None, items, values, begin, end, up_to[:1]), "bias.up_to must have shape [2]"),
        ((None, items, values, begin, end, up_to.flip(0)), "must rise from 1 or more"),
        ((None, items, values, begin, end[:1], up_to), "bias.end must have shape [2]"),
        ((None, items, values, begin - 1, end, up_to), "spans must lie in 0..3, got -1 to 2"),
        ((None, items + 1, values, begin, end, up_to), "bias.items must lie in 0..5, got 6"),
    ):
        with pytest.raises(ValueError, match="softmax_loss: ") as caught:
            raw(operator, *head, *tail)
        assert text in str(caught.value)


@pytest.mark.kernels
def test_opcheck() -> None:
    bias = make_bias("windows", 40, 12, 15, (1, 2), torch.float32)
    torch.library.opcheck(
        torch.ops.recgrela.softmax_loss.default,
        (torch.randn(40, 8), torch.randn(12, 8), torch.randint(0, 12, (40,)), 0, True, True,
         None, bias.items, bias.values, bias.begin, bias.end, torch.tensor([1, 2])),
    )  # fmt: skip
