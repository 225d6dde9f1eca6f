"""The repeat bias of recgrela_ext for any model, trained on padded windows like all the others.

A model with it is another model: it has a row of its own, and so have the baselines with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recgrela_ext.model.losses import softmax_loss
from recgrela_ext.model.repeat_bias import RepeatBias


class WithRepeatBias(nn.Module):
    """`model` with the bias. It trains on the repeats inside a window and ranks with those of the
    whole history.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.repeat_bias = RepeatBias()
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
        windows = item_seq.shape[1] * torch.arange(len(item_seq) + 1)
        bias = self.repeat_bias.of_windows(item_seq.flatten(), windows, targets.flatten(), 0)
        return softmax_loss(hidden, self.item_embedding.weight, targets.flatten(), bias=bias)
