from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recgrela_ext import RecGRELAConfig
from recgrela_ext.data.sequences import IdMap, Sequences
from recgrela_ext.errors import DataError
from recgrela_ext.evaluation import (
    format_recommendations,
    recommend_for_items,
    recommend_for_users,
)

ITEM_IDS = ["ash", "birch", "cedar", "date", "elm", "fir"]


class Nearest(torch.nn.Module):
    """Scores item j by -|j - last item|; records what it was asked."""

    def __init__(self, n_items: int = 7, max_seq_len: int = 3, share: float | None = None) -> None:
        super().__init__()
        self.config = RecGRELAConfig(n_items, max_seq_len=max_seq_len, repeat_share=share)
        self.item_embedding = torch.nn.Embedding(n_items, 2)
        self.widths: list[int] = []

    def forward(self, item_seq: torch.Tensor, item_seq_len: torch.Tensor) -> torch.Tensor:
        self.widths.append(item_seq.shape[1])
        return item_seq.gather(1, item_seq_len[:, None] - 1)

    def recommend_from_hidden(
        self, hidden: torch.Tensor, k: int, seen: torch.Tensor, exclude_seen: bool
    ) -> SimpleNamespace:
        scores = -(torch.arange(self.config.rows)[None] - hidden).abs().float()
        if exclude_seen:
            scores.scatter_(1, seen, -torch.inf)
        scores[:, 0] = -torch.inf
        top = scores.topk(min(k, scores.shape[1]), dim=1)
        items = top.indices.masked_fill(top.values == -torch.inf, 0)
        return SimpleNamespace(items=items, scores=top.values)


def catalogue(histories: list[list[int]]) -> Sequences:
    flat = Sequences.from_lists(histories, len(ITEM_IDS))
    users = np.array([f"u{i}" for i in range(len(histories))])
    id_map = IdMap(users, np.array(ITEM_IDS), {"date": "Date palm"})
    return Sequences(flat.items, flat.offsets, id_map, "file", 0, "trees", 0.0)


def lists(lines: list[dict]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in lines:
        found.setdefault(line["user"], []).append(line["item"])
    return found


def test_lists_in_raw_ids_without_seen_items() -> None:
    sequences = catalogue([[1, 2, 3], [6]])
    found = recommend_for_users(Nearest(), sequences, ["u1", "u0"], k=2)
    assert lists(found) == {"u1": ["elm", "date"], "u0": ["date", "elm"]}
    assert [line["rank"] for line in found] == [1, 2, 1, 2]
    assert found[1]["title"] == "Date palm"
    assert found[0]["title"] == "elm"
    assert found[0]["score"] == -1.0


def test_items_older_than_the_window_count_as_seen() -> None:
    model = Nearest(max_seq_len=2)
    found = recommend_for_users(model, catalogue([[4, 2, 2, 3]]), ["u0"], k=2)
    assert lists(found) == {"u0": ["ash", "elm"]}
    assert model.widths == [2]


def test_seen_items_can_stay() -> None:
    sequences = catalogue([[1, 2, 3]])
    stay = recommend_for_users(Nearest(), sequences, ["u0"], k=1, exclude_seen=False)
    assert lists(stay) == {"u0": ["cedar"]}
    for share, first in ((None, "date"), (0.005, "date"), (0.2, "cedar")):
        model = Nearest(share=share)
        auto = recommend_for_users(model, sequences, ["u0"], k=1, exclude_seen="auto")
        assert lists(auto) == {"u0": [first]}


def test_short_catalogues_give_short_lists() -> None:
    found = recommend_for_users(Nearest(), catalogue([[1, 2, 3, 4]]), ["u0"], k=50)
    assert sorted(lists(found)["u0"]) == ["elm", "fir"]


def test_history_of_raw_items() -> None:
    sequences = catalogue([[1, 2]])
    found = recommend_for_items(Nearest(), sequences.id_map, ["fir", "elm"], k=1)
    assert [(line["user"], line["item"]) for line in found] == [(None, "date")]


def test_table() -> None:
    sequences = catalogue([[1, 2, 3], [6]])
    text = format_recommendations(recommend_for_users(Nearest(), sequences, ["u0", "u1"], k=2))
    assert text.splitlines() == [
        "user u0",
        "   1    -1.000  date  Date palm",
        "   2    -2.000   elm",
        "user u1",
        "   1    -1.000   elm",
        "   2    -2.000  date  Date palm",
    ]
    alone = recommend_for_items(Nearest(), sequences.id_map, ["fir"], k=1)
    assert format_recommendations(alone).startswith("this history\n")


def test_unknown_users_items_and_bad_arguments() -> None:
    sequences = catalogue([[1, 2, 3], []])
    with pytest.raises(DataError, match="user must be a known id, got 'nobody'"):
        recommend_for_users(Nearest(), sequences, ["u0", "nobody"])
    with pytest.raises(DataError, match="user must have events, got 'u1' with none"):
        recommend_for_users(Nearest(), sequences, ["u1"])
    with pytest.raises(DataError, match="item must be a known id, got 'yew'"):
        recommend_for_items(Nearest(), sequences.id_map, ["ash", "yew"])
    with pytest.raises(DataError, match="at least one item"):
        recommend_for_items(Nearest(), sequences.id_map, [])
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        recommend_for_users(Nearest(), sequences, ["u0"], k=0)
    with pytest.raises(ValueError, match="n_items 7, got 9"):
        recommend_for_users(Nearest(n_items=9), sequences, ["u0"])
