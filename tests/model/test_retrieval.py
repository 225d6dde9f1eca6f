from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from recgrela_ext.model import ItemTable, RecGRELA, SeenItems
from recgrela_ext.model.retrieval import top_k

MakeModel = Callable[..., RecGRELA]


def brute_force(
    scores: Tensor, k: int, padding_idx: int, seen: Tensor | None, allowed: Tensor | None
) -> tuple[list[list[int]], list[list[float]]]:
    """Sort whole rows by (score, item) in Python."""
    items, values = [], []
    for user, row in enumerate(scores.tolist()):
        left = set(range(len(row)))
        if allowed is not None:
            left = set((allowed if allowed.dim() == 1 else allowed[user]).tolist())
        left -= {padding_idx} | (set() if seen is None else set(seen[user].tolist()))
        best = sorted(left, key=lambda item, row=row: (-row[item], item))[:k]
        missing = k - len(best)
        items.append(best + [padding_idx] * missing)
        values.append([row[item] for item in best] + [-float("inf")] * missing)
    return items, values


@pytest.mark.parametrize("padding_idx", [0, 40, 17])
@pytest.mark.parametrize("k", [1, 7, 41, 60])
@pytest.mark.parametrize("candidates", [None, "shared", "own"])
@pytest.mark.parametrize("with_seen", [False, True])
def test_equals_brute_force_with_ties(
    padding_idx: int, k: int, candidates: str | None, with_seen: bool
) -> None:
    # Small integers: every score is exact, and most of them tie.
    hidden = torch.randint(-2, 3, (6, 4)).float()
    table = torch.randint(-2, 3, (41, 4)).float()
    shape = {None: None, "shared": (30,), "own": (6, 30)}[candidates]
    allowed = None if shape is None else torch.randint(0, 41, shape)
    seen = torch.randint(0, 41, (6, 9)) if with_seen else None
    if seen is not None:
        seen[:, 5:] = padding_idx
    got = top_k(hidden, table, k, padding_idx, seen, allowed)
    items, scores = brute_force(hidden @ table.t(), k, padding_idx, seen, allowed)
    assert got.items.tolist() == items
    assert got.scores.tolist() == scores


def test_many_users_in_blocks() -> None:
    hidden, table = torch.randn(1100, 8), torch.randn(300, 8)
    got = top_k(hidden, table, 5, 0)
    want = (hidden @ table.t())[:, 1:].topk(5)
    assert torch.equal(got.items, want.indices + 1)
    assert top_k(hidden[:0], table, 5, 0).items.shape == (0, 5)


def test_half_precision_is_ranked_in_float32() -> None:
    hidden, table = torch.randn(5, 8).bfloat16(), torch.randn(300, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = top_k(hidden, table, 5, 0)
    want = top_k(hidden.float(), table.float(), 5, 0)
    assert got.scores.dtype == torch.float32
    assert torch.equal(got.items, want.items)
    assert torch.equal(got.scores, want.scores)


@pytest.mark.parametrize(
    ("dtype", "size", "limit"),
    [("float32", 256, 0.0), ("bfloat16", 128, 4e-3), ("float16", 128, 5e-4), ("int8", 68, 4e-3)],
)
def test_item_table(make_model: MakeModel, dtype: str, size: int, limit: float) -> None:
    model = make_model(torch.float32, n_items=200, hidden_size=64)
    table = ItemTable(model, dtype)
    assert table.nbytes == 200 * size
    item_seq = torch.randint(1, 200, (6, 9))
    want = model.recommend(item_seq, k=200)
    got = model.recommend(item_seq, k=200, table=table)
    state = model.prefill(item_seq)
    from_state = model.recommend_from_state(state, k=200, seen=item_seq, table=table)
    assert torch.equal(from_state.items, got.items)
    exact, rounded = (torch.zeros(6, 200).scatter_(1, x.items, x.scores) for x in (want, got))
    exact, rounded = exact[:, 1:], rounded[:, 1:]
    assert torch.equal(exact.isinf(), rounded.isinf())
    largest = (model(item_seq).norm(dim=1) * model.item_embedding.weight.norm(dim=1).max()).max()
    assert (exact - rounded).nan_to_num(0).abs().max() <= limit * largest
    if limit == 0:
        assert torch.equal(got.items, want.items)


def test_item_table_of_another_model(make_model: MakeModel) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="table must come from this model"):
        model.recommend(torch.tensor([[5, 6]]), table=ItemTable(make_model()))
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, int8"):
        ItemTable(model, "int4")


def test_recommend_leaves_out_seen_items(make_model: MakeModel) -> None:
    item_seq = torch.tensor([[5, 6, 7, 5], [9, 8, 0, 0]])
    model = make_model()
    best = model.recommend(item_seq, k=49)
    for row, seen in zip(best.items.tolist(), ({5, 6, 7}, {8, 9}), strict=True):
        real = [item for item in row if item != 0]
        assert set(real) == set(range(1, 50)) - seen
        assert len(real) == 49 - len(seen)
    kept = model.recommend(item_seq, k=49, exclude_seen=False)
    assert sorted(kept.items[0].tolist()) == list(range(1, 50))
    full = model.scores(model(item_seq))
    assert torch.allclose(kept.scores, full[:, 1:].sort(1, descending=True).values)


@pytest.mark.parametrize(("share", "excluded"), [(None, True), (0.01, True), (0.02, False)])
def test_auto_reads_the_share_of_repeats(
    make_model: MakeModel, share: float | None, excluded: bool
) -> None:
    model = make_model(repeat_share=share)
    best = model.recommend(torch.tensor([[5, 6]]), k=49)
    assert (5 not in best.items[0].tolist()) == excluded


def test_recommend_from_state_equals_recommend(make_model: MakeModel) -> None:
    model = make_model(torch.float32)
    item_seq = torch.tensor([[5, 6, 7, 5], [9, 8, 0, 0]])
    state = model.prefill(item_seq)
    seen = SeenItems.from_sequences(item_seq)
    want = model.recommend(item_seq, k=6)
    for given in (seen, item_seq):
        got = model.recommend_from_state(state, k=6, seen=given)
        assert torch.equal(got.items, want.items)
    free = model.recommend_from_state(state, k=6, candidates=torch.tensor([3, 5, 0]))
    assert set(free.items[0, :2].tolist()) == {3, 5}
    assert free.items[0, 2:].tolist() == [0] * 4


def test_recommend_evaluates_and_restores_the_mode(make_model: MakeModel) -> None:
    model = make_model(dropout=0.5, drop_path=0.5)
    item_seq = torch.tensor([[5, 6, 7, 5]])
    want = model.recommend(item_seq)
    model.train()
    assert torch.equal(model.recommend(item_seq).scores, want.scores)
    assert model.training
    assert model.encoder.layers[0].training


def test_bad_arguments(make_model: MakeModel) -> None:
    model = make_model()
    item_seq = torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match="k must be an int of at least 1, got 0"):
        model.recommend(item_seq, k=0)
    with pytest.raises(ValueError, match="exclude_seen must be True, False or 'auto', got 'no'"):
        model.recommend(item_seq, exclude_seen="no")
    with pytest.raises(ValueError, match=r"candidates must lie in 0..49, got 50"):
        model.recommend(item_seq, candidates=torch.tensor([50]))
    with pytest.raises(ValueError, match=r"candidates must be \[C\] or \[1, C\], got \[2, 1\]"):
        model.recommend(item_seq, candidates=torch.tensor([[1], [2]]))
    with pytest.raises(TypeError, match="candidates must be integers"):
        model.recommend(item_seq, candidates=torch.tensor([1.0]))
    text = r"item_seq must lie in 0..49 \(n_items=50 with the padding row, num_items=49 without\)"
    with pytest.raises(ValueError, match=text + ", got 50"):
        model.recommend(torch.tensor([[5, 50]]))
