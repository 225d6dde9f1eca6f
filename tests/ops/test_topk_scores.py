from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recgrela_ext import _library, ops
from recgrela_ext.ops import chunked_topk
from recgrela_ext.ops.topk_scores import reference_topk_scores

_CHUNKS = {"one chunk": 1 << 22, "many chunks": 64, "one column": 1}  # elements


@pytest.fixture(params=[pytest.param("kernel", marks=pytest.mark.kernels), *_CHUNKS])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "kernel":
        return request.param
    monkeypatch.setattr(_library, "KERNEL_DEVICES", frozenset())
    monkeypatch.setattr(chunked_topk, "_ELEMENTS", _CHUNKS[request.param])
    return request.param


def whole_numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small integers: every score is exact, and most of them tie."""
    return torch.randint(-2, 3, shape).to(dtype)


@pytest.mark.parametrize("padding_idx", [0, 40, 17])
@pytest.mark.parametrize("k", [1, 7, 41, 60])
@pytest.mark.parametrize("candidates", [None, "shared", "own"])
@pytest.mark.parametrize("with_seen", [False, True])
def test_equals_the_reference_with_ties(
    implementation: str, padding_idx: int, k: int, candidates: str | None, with_seen: bool
) -> None:
    hidden, table = whole_numbers(6, 4), whole_numbers(41, 4)
    shape = {None: None, "shared": (30,), "own": (6, 30)}[candidates]
    allowed = None if shape is None else torch.randint(0, 41, shape)
    seen = torch.randint(0, 41, (6, 9)) if with_seen else None
    if seen is not None:
        seen[:, 5:] = padding_idx
    got = ops.topk_scores(hidden, table, k, padding_idx, None, seen, allowed)
    want = reference_topk_scores(hidden, table, k, padding_idx, None, seen, allowed)
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[0], want[0])


@pytest.mark.parametrize("width", [1, 5, 64, 130])
@pytest.mark.parametrize("users", [1, 3, 8, 15, 33, 700])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16", "int8"])
def test_every_size_and_table(dtype: str, users: int, width: int) -> None:
    """Blocks and panels that are full, partly full and of one element."""
    table_dtype = getattr(torch, dtype)
    hidden_dtype = torch.float64 if dtype == "float64" else torch.float32
    for items in (1, 7, 240, 481):
        hidden = whole_numbers(users, width, dtype=hidden_dtype)
        table = whole_numbers(items, width).to(table_dtype)
        scale = 2.0 ** torch.randint(-3, 3, (items,)) if dtype == "int8" else None
        got = ops.topk_scores(hidden, table, 9, 0, scale)
        want = reference_topk_scores(hidden, table, 9, 0, scale)
        assert torch.equal(got[1], want[1])
        assert torch.equal(got[0], want[0])
        assert got[0].dtype == hidden_dtype


def test_parts_of_the_items_are_merged() -> None:
    """More than one part: 40,000 items for few users."""
    hidden, table = whole_numbers(3, 4), whole_numbers(40_000, 4)
    table[20_000:, 0] += 1
    seen = torch.randint(0, 40_000, (3, 5000))
    got = ops.topk_scores(hidden, table, 300, 0, None, seen)
    want = reference_topk_scores(hidden, table, 300, 0, None, seen)
    assert torch.equal(got[1], want[1])
    ascending = torch.arange(40_000.0)[:, None]  # every item enters every list
    got = ops.topk_scores(torch.ones(2, 1), ascending, 4)
    assert got[1].tolist() == [[39_999, 39_998, 39_997, 39_996]] * 2


@pytest.mark.kernels
def test_real_scores_are_close_and_the_same_for_any_threads_and_batch() -> None:
    hidden, table = torch.randn(600, 48), torch.randn(20_000, 48)
    seen = torch.randint(0, 20_000, (600, 20))
    torch.set_num_threads(2)
    scores, items = ops.topk_scores(hidden, table, 50, 0, None, seen)
    want, _ = reference_topk_scores(hidden.double(), table.double(), 50, 0, None, seen)
    assert ((scores - want).abs() <= 48 * 6e-8 * hidden.norm(dim=1)[:, None] * 15).all()
    exact = (hidden.double() @ table.double().t()).gather(1, items)
    assert (scores - exact).abs().max() <= 1e-4
    torch.set_num_threads(1)
    for part in (slice(0, 600), slice(40, 41), slice(60, 64), slice(80, 88), slice(7, 300)):
        again = ops.topk_scores(hidden[part], table, 50, 0, None, seen[part])
        assert torch.equal(again[0], scores[part])
        assert torch.equal(again[1], items[part])
    everything = torch.arange(20_000).flip(0)
    for candidates in (everything, everything.expand(8, -1)):
        again = ops.topk_scores(hidden[:8], table, 50, 0, None, seen[:8], candidates)
        assert torch.equal(again[0], scores[:8])
        assert torch.equal(again[1], items[:8])


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16", "int8"])
def test_few_users_and_many_get_the_same_bits(dtype: str) -> None:
    """Items lie in the lanes for few users, users for many; a width with a rest, rows of a view."""
    hidden = torch.randn(40, 37, dtype=torch.float64 if dtype == "float64" else torch.float32)
    table, scale = torch.randn(500, 60)[:, 3:40].to(getattr(torch, dtype)), None
    if dtype == "int8":
        table = torch.randint(-128, 128, (500, 60), dtype=torch.int8)[:, 3:40]
        scale = torch.rand(500)
    scores, items = ops.topk_scores(hidden, table, 30, 0, scale)
    for count in range(1, 10):
        again = ops.topk_scores(hidden[:count], table, 30, 0, scale)
        assert torch.equal(again[0], scores[:count])
        assert torch.equal(again[1], items[:count])


def test_shared_candidates_in_parts() -> None:
    """More candidates than one part of the work takes: each of them is counted once."""
    torch.manual_seed(0)
    hidden, table = torch.randn(3, 8, dtype=torch.float64), torch.randn(50_000, 8).double()
    candidates = 1 + torch.randperm(49_999)[:40_000]
    _, items = ops.topk_scores(hidden, table, 20, 0, None, None, candidates)
    scores = (hidden @ table.t())[:, candidates]
    assert torch.equal(items, candidates[scores.topk(20).indices])


def test_nan_and_infinity(implementation: str) -> None:
    hidden, table = whole_numbers(4, 3), whole_numbers(50, 3)
    clean = ops.topk_scores(hidden, table, 50)
    hidden[1] = torch.nan
    got = ops.topk_scores(hidden, table, 50)
    assert (got[1][1] == 0).all()
    assert (got[0][1] == -torch.inf).all()
    for user in (0, 2, 3):
        assert torch.equal(got[0][user], clean[0][user])
        assert torch.equal(got[1][user], clean[1][user])
    hidden[1] = 0
    table[7], table[9] = torch.nan, torch.inf
    scores, items = ops.topk_scores(hidden.abs() + 1, table, 50)
    assert (items[:, 0] == 9).all()
    assert not (items == 7).any()
    assert not scores.isnan().any()


def test_strides_and_integer_types(implementation: str) -> None:
    hidden, table = whole_numbers(9, 8), whole_numbers(60, 16)
    seen = torch.randint(0, 60, (9, 4))
    want = reference_topk_scores(hidden, table[:, :8], 5, 0, None, seen)
    for h, t, s in (
        (hidden, table[:, :8], seen.to(torch.int32)),
        (hidden.t().contiguous().t(), table[:, :8].t().contiguous().t(), seen.to(torch.uint8)),
    ):
        got = ops.topk_scores(h, t, 5, 0, None, s)
        assert torch.equal(got[1], want[1])
    assert ops.topk_scores(hidden[:0], table[:, :8], 5)[1].shape == (0, 5)
    none = torch.empty(9, 0, dtype=torch.int64)
    assert (ops.topk_scores(hidden, table[:, :8], 5, 0, None, None, none)[1] == 0).all()
    mixed = ops.topk_scores(hidden.double(), table[:, :8], 5, 0, None, seen)
    assert mixed[0].dtype == torch.float64
    assert torch.equal(mixed[1], want[1])


@pytest.mark.kernels
def test_opcheck_and_compile() -> None:
    hidden, table = torch.randn(5, 8), torch.randn(30, 8)
    seen = torch.randint(0, 30, (5, 3)).sort(1).values
    torch.library.opcheck(torch.ops.recgrela.topk_scores, (hidden, table, None, 4, 0, seen, None))
    compiled = torch.compile(ops.topk_scores, fullgraph=True, backend="aot_eager")
    got, want = compiled(hidden, table, 4, 0), ops.topk_scores(hidden, table, 4, 0)
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"hidden": torch.ones(3)}, r"hidden must be \[B, width\] of .*, got torch.float32 \[3"),
        ({"table": torch.ones(4, 3)}, r"table must be \[N, 2\] of a floating dtype or int8"),
        ({"table": torch.ones(4, 2).int()}, r"table must be .*, got torch.int32 \[4, 2\]"),
        ({"table": torch.ones(4, 2).char()}, "scale must be given for an int8 table"),
        ({"scale": torch.ones(4)}, "scale must be given for an int8 table and for no other"),
        (
            {"table": torch.ones(4, 2).char(), "scale": torch.ones(3)},
            r"scale must be float32 \[4\], got torch.float32 \[3\]",
        ),
        ({"k": 0}, "k must be an int of at least 1, got 0"),
        ({"k": True}, "k must be an int of at least 1, got True"),
        ({"padding_idx": 4}, "padding_idx must lie in 0..3, got 4"),
        ({"seen": torch.ones(2, 1).long()}, r"seen must be \[3, n\], got \[2, 1\]"),
        ({"seen": torch.ones(3, 1)}, "seen must be integers, got torch.float32"),
        ({"candidates": torch.tensor([4])}, "candidates must lie in 0..3, got 4"),
        ({"candidates": torch.ones(2, 2).long()}, r"candidates must be \[C\] or \[3, n\]"),
        ({"seen": torch.ones(3, 1, device="meta").long()}, "seen must be on cpu, got meta"),
    ],
)
def test_bad_arguments(changes: dict, text: str) -> None:
    given = {"hidden": torch.ones(3, 2), "table": torch.ones(4, 2), "k": 2, **changes}
    with pytest.raises(ValueError, match="topk_scores: " + text):
        ops.topk_scores(**given)


def test_no_gradient() -> None:
    hidden, table = torch.ones(3, 2, requires_grad=True), torch.ones(4, 2)
    with pytest.raises(RuntimeError, match="must not require a gradient"):
        ops.topk_scores(hidden, table, 1)
    with torch.no_grad():
        assert ops.topk_scores(hidden, table, 1)[1].tolist() == [[1]] * 3


@pytest.mark.kernels
def test_a_raw_call_is_checked() -> None:
    op, good = torch.ops.recgrela.topk_scores, (torch.ones(3, 2), torch.ones(4, 2))
    some = torch.zeros(3, 1).long()
    for arguments, text in (
        ((torch.ones(3), good[1], None, 1, 0, None, None), r"hidden must have shape \[B, width\]"),
        ((*good, None, 0, 0, None, None), "k must be at least 1, got 0"),
        ((good[0], torch.ones(4, 3), None, 1, 0, None, None), r"table must have shape \[N, 2\]"),
        ((good[0].double(), good[1], None, 1, 0, None, None), "table must suit hidden"),
        ((good[0].half(), good[1], None, 1, 0, None, None), "table must suit hidden"),
        ((*good, torch.ones(3), 1, 0, None, None), "table must suit hidden"),
        ((*good, None, 1, 0, some[:2], None), r"seen must have shape \[3, 1\]"),
        ((*good, None, 1, 0, some.int(), None), "seen must have dtype Long"),
        ((*good, None, 1, 0, None, some + 4), "candidates must lie in 0..3, got 4"),
        ((*good, None, 1, 0, None, torch.tensor(1)), "candidates must have shape"),
    ):
        with pytest.raises((ValueError, RuntimeError), match="topk_scores: " + text):
            op(*arguments)


def test_meta_tensors() -> None:
    """Shapes alone; autocast knows no meta device."""
    hidden, table = torch.empty(3, 4, device="meta"), torch.empty(9, 4, device="meta")
    scores, items = ops.topk_scores(hidden, table, 2)
    assert scores.shape == items.shape == (3, 2)
    assert items.dtype == torch.int64
    assert scores.is_meta
