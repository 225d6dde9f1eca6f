"""Items like those of a user's history: the neighbourhood baseline of every quality table."""

from __future__ import annotations

import numpy as np
import torch

from recgrela_ext import Sequences

LARGEST = 20_000  # items; similarities are a dense square


class ItemKNN:
    """score(j) = sum over the last `last` items i of the history of sim(i, j), where

        sim(i, j) = users with both / (sqrt(users with i * users with j) + shrink)

    and every i keeps its `neighbours` most similar items (Deshpande and Karypis 2004, cosine).

    Args:
        train: training histories.
        neighbours: kept per item.
        shrink: pulls similarities that rest on few users towards 0.
        last: items of the history that count; 0: all.

    Raises:
        ValueError: a bad size, or more than 20,000 items.
    """

    def __init__(
        self, train: Sequences, neighbours: int = 100, shrink: float = 10.0, last: int = 50
    ) -> None:
        n_items = train.n_items
        if n_items > LARGEST:
            raise ValueError(f"ItemKNN: items must be at most {LARGEST:,}, got {n_items:,}")
        if neighbours < 1 or shrink < 0 or last < 0:
            raise ValueError(
                "ItemKNN: neighbours must be at least 1, shrink and last not negative, "
                f"got {neighbours}, {shrink} and {last}"
            )
        self.last = last
        user = np.repeat(np.arange(len(train)), train.lengths)
        has = torch.zeros(len(train), n_items)
        has[torch.from_numpy(user), torch.from_numpy(train.items.astype(np.int64))] = 1
        both = has.t() @ has
        users = both.diagonal().clone()
        both.fill_diagonal_(0)
        similar = both / ((users[:, None] * users[None, :]).sqrt() + shrink).clamp_min(1e-9)
        kept = min(neighbours, n_items)
        values, items = similar.topk(kept, dim=1)
        self.similar = torch.zeros_like(similar).scatter_(1, items, values)
        self.popularity = users / max(1.0, float(users.sum()))

    def score(self, histories: list[np.ndarray]) -> torch.Tensor:
        """Summed similarities, float32 [b, n_items]; popularity decides between equals."""
        scores = torch.empty(len(histories), len(self.similar))
        for row, history in zip(scores, histories, strict=True):
            recent = torch.from_numpy(history[-self.last :].astype(np.int64))
            torch.sum(self.similar[recent], dim=0, out=row)
        return scores.add_(self.popularity, alpha=1e-6)
