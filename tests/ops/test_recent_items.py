"""recent_items against one item after another, with and without the kernel; bad input; torch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from recgrela_ext import _library, ops
from recgrela_ext.ops import reference

Result = tuple[Tensor, Tensor, Tensor]
IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Result]] = {
    "operator": ops.recent_items, "reference": reference.recent_items,
}  # fmt: skip


def spans(count: int, rows: int, high: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Spans that overlap, in any order, a third of them empty or upside down."""
    draw = torch.Generator().manual_seed(seed)
    items = torch.randint(1, high, (count,), generator=draw)
    begin, end = (torch.randint(0, count + 1, (rows,), generator=draw) for _ in range(2))
    return items, begin, torch.where(torch.arange(rows) % 3 == 0, end, torch.maximum(begin, end))


def one_by_one(items: Tensor, begin: Tensor, end: Tensor) -> list[list[tuple[int, int]]]:
    """(item, recency) of every row, oldest first."""
    found = []
    for low, high in zip(begin.tolist(), end.tolist(), strict=True):
        met = dict.fromkeys(reversed(items[low:high].tolist() if low < high else []))
        found.append([(item, place) for place, item in enumerate(met, 1)][::-1])
    return found


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("high", [2, 9, 10**15])
@pytest.mark.parametrize(("count", "rows"), [(0, 4), (1, 3), (7, 0), (60, 200), (400, 30)])
def test_every_row(name: str, count: int, rows: int, high: int) -> None:
    given = spans(count, rows, high)
    offsets, items, recency = IMPLEMENTATIONS[name](*given)
    assert {x.dtype for x in (offsets, items, recency)} == {torch.int64}
    assert offsets.shape == (rows + 1,)
    assert offsets[0] == 0
    assert len(items) == len(recency) == offsets[-1]
    pairs = list(zip(items.tolist(), recency.tolist(), strict=True))
    bounds = offsets.tolist()
    wanted = one_by_one(*given)
    assert [pairs[low:high] for low, high in pairwise(bounds)] == wanted


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_an_empty_span_may_lie_anywhere(name: str) -> None:
    least, most = -(2**63), 2**63 - 1
    pairs = [(3, 3), (9, 9), (9, 7), (-5, -7), (1, least), (most, least), (most, -2), (0, 2)]
    begin, end = torch.tensor(pairs).t()
    offsets, items, recency = IMPLEMENTATIONS[name](torch.tensor([5, 6, 5]), begin, end)
    assert offsets.tolist() == [0] * 8 + [2]
    assert items.tolist() == [5, 6]
    assert recency.tolist() == [2, 1]


def test_any_number_of_threads_and_any_strides() -> None:
    items, begin, end = spans(3000, 2000, 100)
    apart = torch.stack([items, items], 1)[:, 0], begin.repeat_interleave(2)[::2], end
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found += [ops.recent_items(items, begin, end), ops.recent_items(*apart)]
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, found[0], strict=True))


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": ({"items": [1, 2]}, TypeError, "items must be a tensor, got list"),
    "floats": ({"begin": torch.zeros(2)}, TypeError, "begin must have dtype int64, got torch.f"),
    "int32": ({"end": torch.zeros(2).int()}, TypeError, "end must have dtype int64, got torch.int"),
    "a matrix": ({"items": torch.ones(2, 2).long()}, ValueError, r"items must be \[T\], begin and"),
    "fewer ends": ({"end": torch.ones(1).long()}, ValueError, r"got \[3\], \[2\] and \[1\]"),
    "before": ({"begin": torch.tensor([0, -1])}, ValueError, r"lie in 0\.\.3, got -1 to 3"),
    "beyond": ({"end": torch.tensor([4, 3])}, ValueError, r"lie in 0\.\.3, got 0 to 4"),
    "device": ({"end": torch.ones(2, device="meta").long()}, ValueError, "end must be on cpu"),
}  # fmt: skip


@pytest.mark.parametrize("without_kernel", [False, True])
@pytest.mark.parametrize("what", BAD)
def test_refusals(what: str, without_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    change, error, told = BAD[what]
    if without_kernel:
        monkeypatch.setattr(_library, "KERNEL_DEVICES", frozenset())
    good = {"items": torch.tensor([5, 6, 5]), "begin": torch.tensor([0, 1]),
            "end": torch.tensor([2, 3])}  # fmt: skip
    assert ops.recent_items(**good)[1].tolist() == [5, 6, 6, 5]
    with pytest.raises(error, match=rf"^recent_items: .*{told}"):
        ops.recent_items(**(good | change))


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({0: torch.ones(3).int()}, "items must have dtype"),
        ({1: torch.ones(2).long()}, r"next must have shape \[3\], got \[2\]"),
        ({2: torch.ones(2, 1).long()}, r"begin must have shape \[R\]"),
        ({3: torch.ones(3).long()}, r"end must have shape \[2\], got \[3\]"),
        ({3: torch.ones(4).long()[::2]}, "end must be contiguous"),
        ({2: torch.tensor([-1, 0])}, r"spans must lie in 0\.\.3, got -1 to 2"),
    ],
)
def test_raw_refusals(change: dict[int, Tensor], told: str) -> None:
    items = torch.tensor([5, 6, 5])
    given = [items, reference.next_places(items), torch.tensor([0, 1]), torch.tensor([2, 3])]
    for place, x in change.items():
        given[place] = x
    with pytest.raises((ValueError, RuntimeError), match=f"recent_items: {told}"):
        torch.ops.recgrela.recent_items(*given)


@pytest.mark.kernels
def test_raw_calls_write_only_what_they_counted() -> None:
    """`next` may hold anything: a place that says it comes before itself, or beyond the log."""
    items = torch.arange(1, 9)
    begin, end = torch.zeros(8).long(), torch.arange(1, 9)
    for value in (-(2**63), -1, 0, 3, 2**63 - 1):
        offsets, found, recency = torch.ops.recgrela.recent_items(
            items, torch.full((8,), value), begin, end
        )
        assert len(found) == len(recency) == offsets[-1] <= 36
        assert (offsets.diff() >= 0).all()


@pytest.mark.kernels
def test_torch_features() -> None:
    items, begin, end = spans(40, 12, 9)
    given = items, reference.next_places(items), begin, end
    torch.library.opcheck(torch.ops.recgrela.recent_items, given)
    torch._dynamo.reset()
    compiled = torch.compile(ops.recent_items, backend="aot_eager")
    for found, wanted in zip(compiled(items, begin, end), ops.recent_items(items, begin, end),
                             strict=True):  # fmt: skip
        assert torch.equal(found, wanted)

    class Module(torch.nn.Module):
        def forward(self, items: Tensor, begin: Tensor, end: Tensor) -> Result:
            return ops.recent_items(items, begin, end)

    free = ({0: torch.export.Dim.DYNAMIC},) * 3
    exported = torch.export.export(Module(), (items, begin, end), dynamic_shapes=free).module()
    other = spans(70, 31, 9)
    for found, wanted in zip(exported(*other), ops.recent_items(*other), strict=True):
        assert torch.equal(found, wanted)
