from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recgrela_ext.data.sequences import Sequences, Targets
from recgrela_ext.evaluation import evaluate, rank_targets


class TableScorer:
    """Scores of a history are the row of its first item."""

    def __init__(self, table: list[list[float]]) -> None:
        self.table = torch.tensor(table)

    def score(self, histories: list[np.ndarray]) -> torch.Tensor:
        return self.table[[int(history[0]) - 1 for history in histories]]


class BagModel(torch.nn.Module):
    """A small model of the published contract: a decayed sum of the last items' vectors."""

    def __init__(self, n_items: int, hidden: int = 8, max_seq_len: int = 20) -> None:
        super().__init__()
        self.item_embedding = torch.nn.Embedding(n_items, hidden, padding_idx=0)
        self.config = SimpleNamespace(max_seq_len=max_seq_len, padding_idx=0, attend_padding=False)
        self.widths: list[int] = []
        self.was_training: list[bool] = []

    def forward(self, item_seq: torch.Tensor, item_seq_len: torch.Tensor) -> torch.Tensor:
        self.widths.append(item_seq.shape[1])
        self.was_training.append(self.training)
        age = item_seq_len[:, None] - 1 - torch.arange(item_seq.shape[1])
        weight = torch.where(age >= 0, 0.7 ** age.clamp(min=0), 0.0)
        return (weight[..., None] * self.item_embedding(item_seq)).sum(dim=1)


def targets_of(histories: list[list[int]], num_items: int) -> Targets:
    return Targets.last_of(Sequences.from_lists(histories, num_items))


def random_targets(users: int = 60, num_items: int = 150) -> Targets:
    rng = np.random.default_rng(1)
    lengths = rng.integers(2, 60, users)
    return targets_of([rng.integers(1, num_items + 1, n).tolist() for n in lengths], num_items)


def plain_ranks(model: BagModel, targets: Targets, window: int) -> tuple[list[int], list[int]]:
    """The definition, one target and one item at a time."""
    included, excluded = [], []
    model.eval()
    table = model.item_embedding.weight.detach().double()
    for i, target in enumerate(targets.target_items.tolist()):
        history = targets.history(i)
        window_items = torch.from_numpy(history[-window:].astype(np.int64))[None]
        with torch.no_grad():
            hidden = model(window_items, torch.tensor([window_items.shape[1]]))[0]
        scores = (table @ hidden.double()).float()
        before = [
            j
            for j in range(1, targets.n_items)
            if j != target and bool(scores[j] >= scores[target])
        ]
        included.append(1 + len(before))
        excluded.append(1 + len(set(before) - set(history.tolist())))
    return included, excluded


def test_ranks_by_hand() -> None:
    # Row 0 of each table line is padding and never competes, whatever it scores.
    scorer = TableScorer([[9.0, 5.0, 4.0, 3.0, 2.0], [9.0, 1.0, 2.0, 3.0, 4.0]])
    ranks = rank_targets(scorer, targets_of([[1, 2, 3], [2, 4, 1]], 4))
    assert ranks.seen_included.tolist() == [3, 4]
    assert ranks.seen_excluded.tolist() == [1, 2]


def test_ties_count_against_the_target() -> None:
    scorer = TableScorer([[0.0, 1.0, 1.0, 1.0, 0.0]])
    ranks = rank_targets(scorer, targets_of([[1, 2]], 4))
    assert ranks.seen_included.tolist() == [3]
    assert ranks.seen_excluded.tolist() == [2]  # item 1 was seen, item 3 still ties


def test_constant_scores_rank_last() -> None:
    ranks = rank_targets(TableScorer([[7.0] * 5]), targets_of([[1, 2]], 4))
    assert ranks.seen_included.tolist() == [4]


def test_seen_items_with_repeats_leave_once() -> None:
    scorer = TableScorer([[0.0, 9.0, 8.0, 7.0, 6.0, 5.0]])
    ranks = rank_targets(scorer, targets_of([[1, 1, 2, 1, 5]], 5))
    assert ranks.seen_included.tolist() == [5]
    assert ranks.seen_excluded.tolist() == [3]


def test_a_repeated_target_still_competes() -> None:
    scorer = TableScorer([[0.0, 9.0, 8.0, 7.0]])
    ranks = rank_targets(scorer, targets_of([[1, 2, 3, 2]], 3))
    assert ranks.seen_included.tolist() == [2]
    assert ranks.seen_excluded.tolist() == [1]


def test_model_ranks_follow_the_definition() -> None:
    targets = random_targets()
    model = BagModel(targets.n_items)
    ranks = rank_targets(model, targets)
    included, excluded = plain_ranks(model, targets, window=20)
    assert ranks.seen_included.tolist() == included
    assert ranks.seen_excluded.tolist() == excluded


@pytest.mark.parametrize(
    "sizes",
    [
        {"user_block": 1, "item_block": 1},
        {"user_block": 7, "item_block": 13, "batch_size": 3},
        {"user_block": 1000, "item_block": 149, "batch_size": 59},
    ],
)
def test_block_sizes_do_not_change_ranks(sizes: dict[str, int]) -> None:
    targets = random_targets()
    model = BagModel(targets.n_items)
    with torch.no_grad():  # ties that only equal rounding keeps
        model.item_embedding.weight[76:] = model.item_embedding.weight[1:76]
    whole, blocks = rank_targets(model, targets), rank_targets(model, targets, **sizes)
    assert whole.seen_included.tolist() == blocks.seen_included.tolist()
    assert whole.seen_excluded.tolist() == blocks.seen_excluded.tolist()
    assert whole.seen_included.min() >= 2  # the target's twin stands before it


def test_model_scores_and_scorer_scores_agree() -> None:
    targets = random_targets()
    model = BagModel(targets.n_items)

    class Wrapped:
        def score(self, histories: list[np.ndarray]) -> torch.Tensor:
            rows = []
            for history in histories:
                items = torch.from_numpy(history[-20:].astype(np.int64))[None]
                rows.append(model(items, torch.tensor([items.shape[1]]))[0].double())
            return (torch.stack(rows) @ model.item_embedding.weight.double().T).float()

    ours, wrapped = rank_targets(model, targets), rank_targets(Wrapped(), targets, batch_size=7)
    assert ours.seen_included.tolist() == wrapped.seen_included.tolist()
    assert ours.seen_excluded.tolist() == wrapped.seen_excluded.tolist()


def test_window_crops_the_input_but_not_what_was_seen() -> None:
    targets = random_targets()
    model = BagModel(targets.n_items)
    ranks = rank_targets(model, targets, max_seq_len=3)
    assert max(model.widths) == 3
    included, excluded = plain_ranks(model, targets, window=3)
    assert ranks.seen_included.tolist() == included
    assert ranks.seen_excluded.tolist() == excluded


def test_a_model_that_attends_to_padding_gets_its_own_width() -> None:
    targets = random_targets()
    model = BagModel(targets.n_items, max_seq_len=33)
    model.config.attend_padding = True
    rank_targets(model, targets, batch_size=5)
    assert set(model.widths) == {33}


def test_mode_of_the_model_is_restored() -> None:
    targets = random_targets(users=4)
    model = BagModel(targets.n_items).train()
    rank_targets(model, targets)
    assert model.was_training == [False]
    assert model.training


def test_empty_history_ranks_last() -> None:
    log = Sequences.from_lists([[3], [1, 2, 3]], 5)
    position = np.array([0, 3])
    targets = Targets(
        log.items, log.offsets, position, np.array([0, 1]), "test", log.id_map, "file", 0,
        "lists", 0.0, "",
    )  # fmt: skip
    ranks = rank_targets(BagModel(6), targets)
    assert ranks.seen_included[0] == 5
    assert ranks.seen_excluded[0] == 5


def test_nan_in_an_item_vector_spoils_every_user() -> None:
    targets = targets_of([[1, 2], [3, 4], [1, 5]], 6)
    model = BagModel(7)
    with torch.no_grad():
        model.item_embedding.weight[6] = float("nan")
    with pytest.raises(ValueError, match="scores must not be NaN, got NaN for 3 of 3 users"):
        rank_targets(model, targets)


def test_nan_of_one_user_is_found() -> None:
    scorer = TableScorer([[0.0, 1.0, 2.0], [0.0, 1.0, float("nan")]])
    with pytest.raises(ValueError, match="got NaN for 1 of 2 users"):
        rank_targets(scorer, targets_of([[1, 2], [2, 1]], 2))


def test_infinite_scores_are_ranked() -> None:
    scorer = TableScorer([[0.0, float("inf"), 2.0, -float("inf")]])
    assert rank_targets(scorer, targets_of([[1, 2]], 3)).seen_included.tolist() == [2]
    assert rank_targets(scorer, targets_of([[1, 3]], 3)).seen_included.tolist() == [3]


def test_catalogues_must_match() -> None:
    targets = targets_of([[1, 2]], 4)
    with pytest.raises(ValueError, match="n_items 5, got 9"):
        rank_targets(BagModel(9), targets)
    with pytest.raises(ValueError, match=r"scores must be \[1, 5\], got \[1, 3\]"):
        rank_targets(TableScorer([[0.0, 1.0, 2.0]]), targets)


def test_bad_arguments() -> None:
    targets = targets_of([[1, 2]], 4)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        rank_targets(BagModel(5), targets, batch_size=0)
    with pytest.raises(ValueError, match="at least one target"):
        rank_targets(BagModel(5), targets_of([[1]], 4))
    with pytest.raises(ValueError, match="k must be cut-offs from 1"):
        evaluate(BagModel(5), targets, k=(0, 5))
