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
import torch.nn.functional as F
from torch import Tensor, nn

from recgrela_ext.evaluation.ranking import encode_histories
from recgrela_ext.model.losses import softmax_loss
from recgrela_ext.ops import LogitBias

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
        bias = repeat_bias(self.bias, item_seq, targets)
        return softmax_loss(hidden, self.item_embedding.weight, targets.flatten(), bias=bias)

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


def repeat_bias(bias: Tensor, item_seq: Tensor, targets: Tensor) -> LogitBias:
    """For right-padded windows [B, L]: of row b L + t, where it has a target (not 0)."""
    L = item_seq.shape[1]
    place = torch.arange(L)
    same = item_seq[:, :, None] == item_seq[:, None, :]
    later = torch.ones(L, L, dtype=torch.bool).triu(1)
    # [B, L]: the place at which an item comes again, L when it does not
    again = torch.where((same & later).any(2), (same & later).int().argmax(2), L)
    counts = (place <= place[:, None]) & (again[:, None] > place[:, None])  # [B, L, L]
    counts &= (targets != 0)[:, :, None]
    window, t, s = counts.nonzero(as_tuple=True)
    offsets = F.pad(counts.sum(2).flatten().cumsum(0), (1, 0))
    values = (SCALE * bias)[bucket(place + 1)][t - s]
    return LogitBias(offsets, item_seq[window, s], values)
