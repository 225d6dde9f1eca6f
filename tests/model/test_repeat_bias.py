"""The repeat bias against dense_bias.py: loss, lists, ranks, states, files, refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recgrela_ext import Interactions, RecGRELA, RecGRELAConfig, UserStateStore, evaluate, fit
from recgrela_ext.data.sequences import Sequences, Targets
from recgrela_ext.errors import CheckpointError
from recgrela_ext.evaluation import rank_targets, recommend_for_users
from recgrela_ext.model import ItemTable, SeenItems
from recgrela_ext.model.losses import softmax_loss
from recgrela_ext.model.repeat_bias import RepeatBias, by_recency
from recgrela_ext.training import TrainConfig
from tests.model.dense_bias import biased

N = 30


def make(seed: int = 0, **options) -> RecGRELA:
    torch.manual_seed(seed)
    fields = {"n_items": N, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_seq_len": 12}
    model = RecGRELA(RecGRELAConfig(**{**fields, "repeat_bias": True, **options}))
    torch.nn.init.normal_(model.item_embedding.weight, std=0.3)
    assert model.repeat_bias is not None
    torch.nn.init.normal_(model.repeat_bias.weight, std=0.15)
    with torch.no_grad():
        model.item_embedding.weight[model.config.padding_idx] = 0
    return model.eval()


def histories(*lengths: int, high: int = 12, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, high, length) for length in lengths]


def padded(lists: list[np.ndarray], side: str = "right") -> Tensor:
    out = torch.zeros(len(lists), max(map(len, lists)), dtype=torch.int64)
    for row, items in zip(out, lists, strict=True):
        if len(items):
            place = slice(len(items)) if side == "right" else slice(-len(items), None)
            row[place] = torch.from_numpy(items)
    return out


def all_scores(model: RecGRELA, read: np.ndarray, history: np.ndarray | None = None) -> Tensor:
    """[N] after a history of which the model has read a part, item by item."""
    history = read if history is None else history
    hidden = model(torch.from_numpy(read[None].astype(np.int64)))[0]
    scores = hidden @ model.item_embedding.weight.t()
    scores = biased(history.tolist(), scores, model.repeat_bias.weight)
    return scores.index_fill(0, torch.tensor([0]), -torch.inf)


def test_buckets() -> None:
    bias = RepeatBias()
    with torch.no_grad():
        bias.weight.copy_(torch.arange(9.0))
    recency = torch.tensor([1, 2, 3, 4, 5, 8, 9, 16, 17, 64, 65, 128, 129, 5000])
    assert bias(recency).tolist() == [0, 10, 20, 20, 30, 30, 40, 40, 50, 60, 70, 70, 80, 80]


def test_a_bucket_that_was_never_trained_is_ranked_as_the_one_before() -> None:
    bias = RepeatBias()
    with torch.no_grad():
        bias.weight.copy_(torch.tensor([0, -1, -2, 0, -3, 0, 0, 0, 0.0]))
    ends = 2 ** torch.arange(9)
    assert bias(ends).tolist() == [0, -10, -20, 0, -30, 0, 0, 0, 0]
    assert bias.ranked(ends).tolist() == [0, -10, -20, -20, -30, -30, -30, -30, -30]


def test_windows_shorter_than_histories(tmp_path: Path) -> None:
    """Nothing repeats, and no window shows what recency beyond 8 is worth: it stays out too."""
    rng = np.random.default_rng(0)
    log = Sequences.from_lists([rng.permutation(60)[:40] + 1 for _ in range(150)], 60)
    model = RecGRELA.for_data(
        log, hidden_size=8, num_layers=1, num_heads=1, max_seq_len=8, repeat_bias=True
    )
    recipe = TrainConfig(lr=0.01, targets_per_step=200, patience=None)
    fit(model, log, epochs=6, config=recipe, checkpoint_dir=tmp_path)
    lists = [log.history(i) for i in range(20)]
    found = model.recommend_from_hidden(
        model(padded([one[-8:] for one in lists])), 15, SeenItems.from_lists(lists),
        exclude_seen=False,
    )  # fmt: skip
    seen = [len(set(a) & set(b.tolist())) for a, b in zip(found.items.tolist(), lists, strict=True)]
    assert sum(seen) < 0.05 * 15 * 20


def test_by_recency_is_what_seen_items_keep() -> None:
    lists = histories(0, 1, 40, 7, high=9)
    for side in ("right", "left"):
        found = by_recency(padded(lists, side), 0)
        seen = SeenItems.from_lists(lists)
        for row in range(len(lists)):
            assert found[row][found[row] != 0].tolist() == seen.recent(row)[::-1].tolist()
        assert torch.equal(by_recency(seen.padded(), 0), found)
    assert by_recency(torch.tensor([[0, 5, 0, 7, 5]]), 0).tolist() == [[5, 7]]
    assert by_recency(torch.zeros(0, 3, dtype=torch.int64), 0).shape == (0, 0)
    assert by_recency(torch.zeros(2, 0, dtype=torch.int64), 0).shape == (2, 0)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("lengths", [(11, 11), (11, 4), (11, 0)])  # full, nearly, packed
def test_loss_and_gradients(lengths: tuple[int, ...], side: str) -> None:
    model = make()
    lists = histories(*lengths)
    wanted = histories(*lengths, seed=1)
    wanted[0][3] = 0  # a position without a target
    losses = []
    for items, targets in zip(lists, wanted, strict=True):
        for t in range(len(items)):
            if targets[t]:
                scores = all_scores(model, items[: t + 1])
                losses.append(F.cross_entropy(scores[1:], torch.tensor(targets[t] - 1)))
    expected = torch.stack(losses).mean()
    item_seq, targets = padded(lists, side), padded(wanted, side)
    found = model.loss(item_seq, torch.tensor(lengths), targets, side)
    torch.testing.assert_close(found, expected)
    weights = list(model.parameters())
    grads, wants = (torch.autograd.grad(x, weights) for x in (found, expected))
    for grad, want in zip(grads, wants, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-3, atol=1e-5)


def test_loss_of_the_item_after_each_sequence() -> None:
    model = make()
    lists, targets = histories(5, 0, 9, 12), torch.tensor([3, 0, 29, 0])
    scores = torch.stack([all_scores(model, lists[i]) for i in (0, 2)])
    expected = F.cross_entropy(scores[:, 1:], targets[[0, 2]] - 1)
    lengths = torch.tensor([5, 0, 9, 12])
    torch.testing.assert_close(model.loss(padded(lists), lengths, targets), expected)
    torch.testing.assert_close(model(padded(lists), lengths, targets), expected)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    items = torch.tensor([1, 2, 1, 3, 2, 2, 4])
    bounds, targets = torch.tensor([0, 4, 7]), torch.tensor([1, 3, 0, 4, 1, 2, 3])
    hidden, table = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (7, 6))
    bias = RepeatBias()
    del bias.weight  # for any tensor in its place
    weight = torch.randn(9, dtype=torch.float64, requires_grad=True)

    def loss(h: Tensor, t: Tensor, w: Tensor) -> Tensor:
        bias.weight = w
        return softmax_loss(h, t, targets, bias=bias.of_windows(items, bounds, targets, 0))

    assert torch.autograd.gradcheck(loss, (hidden, table, weight))


@pytest.mark.parametrize("form", [None, torch.float32, torch.bfloat16, torch.int8])
def test_lists(form: torch.dtype | None) -> None:
    model = make()
    lists = histories(3, 12, 1, 8)
    table = None if form is None else ItemTable(model, form)
    if table is not None:  # the specification with the rounded vectors
        rounded = table.vectors.float()
        rounded = rounded if table.scale is None else rounded * table.scale[:, None]
    item_seq = padded(lists)
    for exclude in (True, False):
        found = model.recommend(item_seq, k=N + 3, exclude_seen=exclude, table=table)
        for row, items in enumerate(lists):
            scores = all_scores(model, items)
            if table is not None:
                hidden = model(torch.from_numpy(items[None]))[0]
                scores = biased(items.tolist(), hidden @ rounded.t(), model.repeat_bias.weight)
                scores = scores.index_fill(0, torch.tensor([0]), -torch.inf)
            if exclude:
                scores = scores.index_fill(0, torch.from_numpy(items), -torch.inf)
            best = scores.sort(descending=True)
            there = int((best.values > -torch.inf).sum())
            assert found.items[row, :there].tolist() == best.indices[:there].tolist()
            torch.testing.assert_close(found.scores[row, :there], best.values[:there])
            assert (found.items[row, there:] == 0).all()
            assert (found.scores[row, there:] == -torch.inf).all()


def test_scores_of_all_items() -> None:
    model = make()
    lists = histories(3, 12, 1, 8)
    for side in ("right", "left"):
        hidden = model(padded(lists))
        found = model.scores(hidden, padded(lists, side))
        for row, items in enumerate(lists):
            torch.testing.assert_close(found[row], all_scores(model, items))
    loss = F.cross_entropy(found[:, 1:], torch.tensor([1, 2, 3, 4]))
    wanted = model.loss(padded(lists), None, torch.tensor([2, 3, 4, 5]))
    torch.testing.assert_close(loss, wanted)
    grad, want = (torch.autograd.grad(x, model.repeat_bias.weight)[0] for x in (loss, wanted))
    torch.testing.assert_close(grad, want)
    with torch.no_grad():
        model.repeat_bias.weight[4:] = 0  # never trained: ranked as the one before
        found = model.scores(hidden, padded(lists))
        best = model.recommend(padded(lists), k=N - 1, exclude_seen=False)
    torch.testing.assert_close(found.gather(1, best.items), best.scores)
    with pytest.raises(ValueError, match=r"seen must be \[4, S\], got \[2, 12\]"):
        model.scores(hidden, padded(lists)[:2])
    with pytest.raises(ValueError, match="scores: seen must lie in 0"):
        model.scores(hidden[:1], torch.tensor([[4, 99]]))


def test_candidates() -> None:
    model = make()
    lists = histories(9, 4)
    everything = model.recommend(padded(lists), k=N, exclude_seen=False)
    shared = torch.tensor([2, 5, 5, 25, 0, 7])
    own = torch.tensor([[1, 2, 3, 4], [20, 3, 3, 0]])
    for candidates in (shared, own):
        found = model.recommend(padded(lists), k=4, exclude_seen=False, candidates=candidates)
        for row in range(2):
            allowed = set((candidates if candidates.dim() == 1 else candidates[row]).tolist())
            wanted = [x for x in everything.items[row].tolist() if x and x in allowed][:4]
            assert [x for x in found.items[row].tolist() if x] == wanted
    none = torch.empty(0, dtype=torch.int64)
    assert not model.recommend(padded(lists), exclude_seen=False, candidates=none).items.any()


def test_equal_scores_go_by_row_and_users_apart() -> None:
    model = make()
    with torch.no_grad():
        model.item_embedding.weight.zero_()
        model.repeat_bias.weight.zero_()
    found = model.recommend(torch.tensor([[5, 3, 9]]), k=5, exclude_seen=False)
    assert found.items.tolist() == [[1, 2, 3, 4, 5]]
    model = make()
    lists = histories(9, 4, 11)
    together = model.recommend(padded(lists), k=8, exclude_seen=False)
    for row, items in enumerate(lists):
        alone = model.recommend(torch.from_numpy(items[None]), k=8, exclude_seen=False)
        assert torch.equal(alone.items[0], together.items[row])
        torch.testing.assert_close(alone.scores[0], together.scores[row])


def test_a_user_with_nan_reaches_nobody_else() -> None:
    model = make()
    lists = histories(6, 6)
    hidden = model(padded(lists))
    seen = SeenItems.from_lists(lists)
    good = model.recommend_from_hidden(hidden, 5, seen, exclude_seen=False)
    hidden = hidden.detach().clone()
    hidden[0] = torch.nan
    found = model.recommend_from_hidden(hidden, 5, seen, exclude_seen=False)
    assert not found.items[0].any()
    assert torch.equal(found.items[1], good.items[1])


@pytest.mark.parametrize("item_block", [4, 8192])
def test_ranks(item_block: int) -> None:
    """The model reads 12 items, the bias knows all 41; targets seen before and new ones."""
    model = make()
    log = Sequences.from_lists(histories(4, 41, 2, 13, 20), N - 1)
    targets = Targets.last_of(log)
    assert any(item in targets.history(i) for i, item in enumerate(targets.target_items))
    ranks = rank_targets(model, targets, item_block=item_block)
    for i, item in enumerate(targets.target_items):
        history = targets.history(i)
        scores = all_scores(model, history[-12:], history)
        assert ranks.seen_included[i] == int((scores >= scores[item]).sum())
        others = [x for x in set(history.tolist()) if x != item]
        scores = scores.index_fill(0, torch.tensor(others), -torch.inf)
        assert ranks.seen_excluded[i] == int((scores >= scores[item]).sum())


def test_lists_of_users_go_by_the_whole_history() -> None:
    model = make()
    log = Sequences.from_lists(histories(4, 41, 2, 13), N - 1)
    model.id_map = log.id_map
    names = log.id_map.user_ids.tolist()
    found = recommend_for_users(model, log, names, k=6, exclude_seen=False)
    for row, name in enumerate(names):
        history = log.history(row)
        best = all_scores(model, history[-12:], history).sort(descending=True)
        mine = [line for line in found if line["user"] == name]
        rows = log.id_map.encode_items([line["item"] for line in mine])
        assert rows.tolist() == best.indices[:6].tolist()
        scores = torch.tensor([line["score"] for line in mine])
        torch.testing.assert_close(scores, best.values[:6])


def test_stream_is_what_reading_all_is(tmp_path: Path) -> None:
    """Through a store, its file and a state's bytes."""
    model = make()
    lists = histories(9, 30, 4, high=8)
    store = UserStateStore(model, 10)
    users = [3, 1, 2]
    for step in range(30):
        now = [(user, items[step]) for user, items in zip(users, lists, strict=True)
               if step < len(items)]  # fmt: skip
        store.step([user for user, _ in now], torch.tensor([int(item) for _, item in now]))
    whole = model.recommend(padded(lists), k=9, exclude_seen=False)
    store.save(tmp_path / "store")
    for kept in (store, UserStateStore.load(tmp_path / "store", model)):
        state, seen, _ = kept.lookup(users)
        assert seen.recent(1).tolist() == list(dict.fromkeys(lists[1][::-1].tolist()))[::-1]
        found = model.recommend_from_state(state, 9, seen, exclude_seen=False)
        assert torch.equal(found.items, whole.items)
        torch.testing.assert_close(found.scores, whole.scores)
        alone = model.recommend_from_state(
            state[1:2], 9, SeenItems.from_bytes(state.to_bytes(1, seen=seen)), exclude_seen=False
        )
        assert torch.equal(alone.items[0], whole.items[1])
        tensor = model.recommend_from_state(state, 9, padded(lists, "left"), exclude_seen=False)
        assert torch.equal(tensor.items, whole.items)
        left_out = model.recommend_from_state(state, 9, seen)
        assert torch.equal(left_out.items, model.recommend(padded(lists), k=9).items)


def test_states_and_sequences_agree_on_what_stays_in() -> None:
    """By default both ask the share of repeats; a state of a model without the bias leaves out."""
    lists = histories(9, 30, 4, high=8)
    for share, flag in ((0.3, True), (0.0, True), (None, True), (0.3, False)):
        model = make(repeat_share=share) if flag else make_plain(share)
        state, seen = model.prefill(padded(lists)), SeenItems.from_lists(lists)
        found = model.recommend_from_state(state, 9, seen)
        stays = flag and share == 0.3
        wanted = model.recommend(padded(lists), k=9, exclude_seen=not stays)
        assert torch.equal(found.items, wanted.items)
        if flag:
            assert torch.equal(model.recommend(padded(lists), k=9).items, wanted.items)


def make_plain(share: float) -> RecGRELA:
    torch.manual_seed(0)
    config = RecGRELAConfig(n_items=N, hidden_size=16, num_layers=2, num_heads=2,
                            repeat_share=share)  # fmt: skip
    return RecGRELA(config).eval()


def test_seen_items_keep_the_order_of_the_last_meeting() -> None:
    rng = np.random.default_rng(0)
    one_by_one, at_once, met = SeenItems(1), SeenItems(1), []
    for _ in range(60):
        some = rng.integers(0, 15, 3)
        met += [int(x) for x in some if x]
        at_once.add(some[None])
        for item in some:
            one_by_one.add([item])
        wanted = list(dict.fromkeys(reversed(met)))[::-1]
        for seen in (one_by_one, at_once, SeenItems.from_lists([met])):
            assert seen.recent(0).tolist() == wanted
            assert seen.ids(0).tolist() == sorted(wanted)
            assert seen.padded().tolist() == [wanted]
    with pytest.raises(ValueError, match="read-only"):
        at_once.recent(0)[0] = 1


def test_fit_learns_what_comes_back(tmp_path: Path) -> None:
    """The item before the last comes back: no item is likelier than others, its recency tells."""
    rng = np.random.default_rng(0)
    pairs = [rng.permutation(N - 1)[:2] + 1 for _ in range(200)]
    log = Sequences.from_lists([np.tile(pair, 6) for pair in pairs], N - 1)
    model = RecGRELA.for_data(log, hidden_size=8, num_layers=1, num_heads=1, repeat_bias=True)
    recipe = TrainConfig(lr=0.01, targets_per_step=200, patience=None)
    fit(model, log, epochs=4, config=recipe, checkpoint_dir=tmp_path)
    first, second = model.repeat_bias(torch.tensor([1, 2])).tolist()
    assert second > first + 3
    result = evaluate(model, Targets.last_of(log), baselines={}, bootstrap=0)
    assert result["mean"]["seen_included/hit@5"] == 1.0
    assert result["variant"] == "causal repeat_bias=True"


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    back = RecGRELA.from_pretrained(tmp_path)
    assert back.config == model.config
    item_seq = padded(histories(9, 4))
    found, wanted = (m.recommend(item_seq, exclude_seen=False) for m in (back, model))
    assert torch.equal(found.items, wanted.items)
    assert back.fingerprint() == model.fingerprint()
    with torch.no_grad():
        model.repeat_bias.weight[0] += 1
    assert back.fingerprint() != model.fingerprint()


def test_a_model_without_it_is_the_one_it_was(tmp_path: Path) -> None:
    """Its fingerprint, by which stored states are known, and its files."""
    torch.manual_seed(0)
    config = RecGRELAConfig(n_items=5, hidden_size=4, num_layers=1, num_heads=1)
    plain = RecGRELA(config)
    assert "repeat_bias" not in " ".join(plain.state_dict())
    assert "repeat_bias" not in config.to_dict()
    assert RecGRELAConfig.from_dict(config.to_dict()) == config
    assert config.replace(repeat_bias=True).to_dict()["repeat_bias"] is True
    biased_model = RecGRELA(dataclasses.replace(config, repeat_bias=True, num_items=None))
    with pytest.raises(RuntimeError, match="repeat_bias"):
        biased_model.load_state_dict(plain.state_dict())


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="repeat_bias must be False for a bidirectional model"):
        RecGRELAConfig.paper(n_items=9, repeat_bias=True)
    with pytest.raises(TypeError, match="repeat_bias must be True or False, got 1"):
        RecGRELAConfig(n_items=9, repeat_bias=1)
    with pytest.raises(CheckpointError, match="repeat_bias must be True or False"):
        RecGRELAConfig.from_dict({**RecGRELAConfig(n_items=9).to_dict(), "repeat_bias": "yes"})
    model = make()
    state = model.prefill(padded(histories(3)))
    for exclude in (True, False, "auto"):
        with pytest.raises(ValueError, match="seen must be given to a model with a repeat bias"):
            model.recommend_from_state(state, exclude_seen=exclude)
    with pytest.raises(ValueError, match=r"seen must be \[1, S\], got \[2, 3\]"):
        model.recommend_from_state(state, seen=torch.ones(2, 3).long(), exclude_seen=False)
    with pytest.raises(TypeError, match="seen must be integers in a tensor"):
        model.recommend_from_state(state, seen=torch.ones(1, 3), exclude_seen=False)
    with pytest.raises(ValueError, match="k must be an int of at least 1, got 0"):
        model.recommend_from_state(state, 0, SeenItems(1), exclude_seen=False)
    for bad, error, told in (
        (torch.ones(3).long(), ValueError, r"targets must be \[5\] as item_ids, got \[3\]"),
        (torch.ones(1, 5).long(), ValueError, r"targets must be \[5\] as item_ids"),
        (None, TypeError, "targets must be int64 in a tensor, got NoneType"),
        (torch.full((5,), 99), ValueError, "targets must lie in 0..29"),
    ):
        with pytest.raises(error, match=rf"RecGRELA\.loss_packed: {told}"):
            model.loss_packed(torch.arange(1, 6), torch.tensor([0, 2, 5]), bad)
    published = RecGRELA(RecGRELAConfig.paper(n_items=9))
    with pytest.raises(ValueError, match="loss_packed: model must be causal"):
        published.loss_packed(torch.arange(1, 6), torch.tensor([0, 5]), torch.arange(2, 7))
    for bad_hidden in (None, [[1.0] * 16]):
        with pytest.raises(TypeError, match="recommend: hidden must be a tensor"):
            model.recommend_from_hidden(bad_hidden, 3, SeenItems(1))
    with pytest.raises(ValueError, match=r"ItemTable\.top_k: seen must be given"):
        ItemTable(model).top_k(state.hidden, 3)
    log = Sequences.from_lists(histories(9, 9), N - 1)
    for loss in ("unseen", "sampled", "bpr"):
        told = rf"loss must be softmax .* repeat bias \(repeat_bias=False .* without\), got {loss}"
        with pytest.raises(ValueError, match=told):
            fit(model, log, epochs=1, config=TrainConfig(loss=loss), checkpoint_dir=tmp_path)


def test_items_beyond_the_table_are_not_known() -> None:
    """As `seen` is read where it is left out."""
    model = make()
    state = model.prefill(torch.tensor([[4, 5]]))
    wanted = model.recommend_from_state(state, 4, torch.tensor([[4, 5]]), exclude_seen=False)
    for dtype in (torch.int64, torch.int8):
        odd = torch.tensor([[4, 99, -3, 5]], dtype=dtype)
        found = model.recommend_from_state(state, 4, odd, exclude_seen=False)
        assert torch.equal(found.items, wanted.items)
        torch.testing.assert_close(found.scores, wanted.scores)


def test_real_repeats(real_data: Path, tmp_path: Path) -> None:
    """Check-ins of foursquare, a short training: with the bias what is seen ranks better."""
    log = Interactions.from_file(real_data / "foursquare-nyc" / "foursquare-nyc.inter")
    train, valid, _ = log.leave_one_out()
    found = []
    for flag in (False, True):
        torch.manual_seed(0)
        model = RecGRELA.for_data(train, num_layers=1, max_seq_len=50, repeat_bias=flag)
        recipe = TrainConfig(targets_per_step=1000)
        fit(model, train, None, steps=150, config=recipe, checkpoint_dir=tmp_path / str(flag))
        result = evaluate(model, valid, baselines={}, bootstrap=0)
        found.append(result["mean"]["ndcg@10"])
    assert found[1] > found[0] + 0.02
