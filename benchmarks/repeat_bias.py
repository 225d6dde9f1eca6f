"""A learned bias for items that were just seen, by how long ago: a few scalars for any model.

    score_t(j) = h_t . e_j + SCALE b[bucket(lag)],   lag = 1 for the item at t itself, and so on

for every j of the history, by its last occurrence; buckets are lags 1, 2, 3-4, 5-8, ... and the
last one has no end. Where items do not repeat it learns to keep seen items down, at once and
sharply; where they do, which lags bring them back. A model with it is another model: it has a row
of its own, and so have the baselines with it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recgrela_ext.evaluation.ranking import encode_histories
from recgrela_ext.model.losses import softmax_loss

BUCKETS = 9  # the last one begins at lag 129
SCALE = 10.0  # Adam moves a weight by about the rate per step; a bias must get to -10 in an epoch


def bucket(lag: Tensor) -> Tensor:
    """0 for lag 1, 1 for 2, 2 for 3 and 4, 3 for 5 to 8, ..."""
    return torch.log2(lag.double()).ceil().long().clamp(max=BUCKETS - 1)


class WithRepeatBias(nn.Module):
    """`model` with the bias. It trains on the repeats inside a window and ranks with those of the
    whole history.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.bias = nn.Parameter(torch.zeros(BUCKETS))
        self.config = model.config

    @property
    def item_embedding(self) -> nn.Embedding:
        table: nn.Embedding = self.model.item_embedding
        return table

    @property
    def variant(self) -> str:
        return f"{getattr(self.model, 'variant', type(self.model).__name__)} repeat_bias"

    def encode(self, item_seq: Tensor, item_seq_len: Tensor | None = None) -> Tensor:
        hidden: Tensor = self.model.encode(item_seq, item_seq_len)
        return hidden

    def forward(self, item_seq: Tensor, item_seq_len: Tensor | None = None) -> Tensor:
        hidden: Tensor = self.model(item_seq, item_seq_len)
        return hidden

    def loss(self, item_seq: Tensor, item_seq_len: Tensor, targets: Tensor) -> Tensor:
        """Full softmax over the biased scores; targets [B, L]."""
        hidden = self.encode(item_seq, item_seq_len).flatten(0, 1)
        adjustment = RepeatBias(self.bias, item_seq)
        return softmax_loss(
            hidden, self.item_embedding.weight, targets.flatten(), adjustment=adjustment
        )

    @torch.no_grad()
    def score(self, histories: list[np.ndarray]) -> Tensor:
        """Scores float32 [b, n_items] after each history, which makes this a `Scorer`."""
        table = self.item_embedding.weight.double()
        scores = torch.empty(len(histories), len(table))
        for index, hidden in encode_histories(self.model, histories):
            scores[torch.from_numpy(index)] = (hidden.double() @ table.t()).float()
        value = (SCALE * self.bias).float()
        for row, history in zip(scores, histories, strict=True):
            items, lag = np.unique(history[::-1], return_index=True)
            seen = torch.from_numpy(items.astype(np.int64))
            row[seen] += value[bucket(torch.from_numpy(lag + 1))]
        return scores


class RepeatBias:
    """The bias as an adjustment of the logits of right-padded windows [B, L], row b L + t."""

    def __init__(self, bias: Tensor, item_seq: Tensor) -> None:
        self.parameter: Tensor | None = bias
        self.items = item_seq
        L = item_seq.shape[1]
        same = item_seq[:, :, None] == item_seq[:, None, :]
        later = torch.ones(L, L, dtype=torch.bool).triu(1)
        # [B, L]: the place at which an item comes again, L when it does not
        self.again = torch.where((same & later).any(2), (same & later).int().argmax(2), L)
        self.place = torch.arange(L)
        self.bucket = bucket(self.place + 1)  # by lag - 1

    def _pairs(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each row: the window's items [c, L], whether each counts, and its bucket."""
        L = len(self.place)
        window, t = rows // L, (rows % L)[:, None]
        counts = (self.place <= t) & (self.again[window] > t)
        return self.items[window], counts, self.bucket[(t - self.place).clamp(min=0)]

    def apply(self, logits: Tensor, rows: Tensor, targets: Tensor) -> None:
        assert self.parameter is not None
        items, counts, where = self._pairs(rows)
        value = (SCALE * self.parameter)[where].to(logits.dtype)
        logits.scatter_add_(1, items, torch.where(counts, value, 0.0))

    def gradient(self, d_logits: Tensor, rows: Tensor) -> Tensor:
        assert self.parameter is not None
        items, counts, where = self._pairs(rows)
        found = torch.where(counts, d_logits.gather(1, items), 0.0) * SCALE
        zeros = torch.zeros(BUCKETS, dtype=found.dtype)
        return zeros.scatter_add_(0, where.flatten(), found.flatten()).to(self.parameter.dtype)
