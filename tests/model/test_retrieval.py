from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from recgrela_ext.model import RecGRELA, SeenItems, retrieval
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


@pytest.fixture(params=[1 << 22, 64, 1], ids=["one chunk", "many chunks", "one column"])
def elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(retrieval, "_ELEMENTS", request.param)
    return request.param


@pytest.mark.parametrize("padding_idx", [0, 40, 17])
@pytest.mark.parametrize("k", [1, 7, 41, 60])
@pytest.mark.parametrize("candidates", [None, "shared", "own"])
@pytest.mark.parametrize("with_seen", [False, True])
def test_equals_brute_force_with_ties(
    elements: int, padding_idx: int, k: int, candidates: str | None, with_seen: bool
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


def test_scores_of_all_users_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    merge = retrieval._Ranking._merge

    def watch(self: retrieval._Ranking, scores: Tensor, items: Tensor) -> None:
        nonlocal largest
        largest = max(largest, scores.numel())
        merge(self, scores, items)

    monkeypatch.setattr(retrieval, "_ELEMENTS", 4096)
    monkeypatch.setattr(retrieval._Ranking, "_merge", watch)
    top_k(torch.randn(2000, 4), torch.randn(3000, 4), 3, 0)
    assert 0 < largest <= 4096


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
