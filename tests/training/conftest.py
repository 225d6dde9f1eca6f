"""A small model and small data with something to learn: the next item is the last one plus one."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from recgrela_ext.data.sequences import Sequences, Targets
from recgrela_ext.model.losses import softmax_loss

NUM_ITEMS = 30


class TinyGRU(nn.Module):
    """Embedding, dropout and a GRU behind the interface of RecGRELA (padded batches alone)."""

    def __init__(self, n_items: int = NUM_ITEMS + 1, hidden_size: int = 8, causal: bool = True):
        super().__init__()
        self.config = SimpleNamespace(max_seq_len=6, padding_idx=0, causal=causal)
        self.item_embedding = nn.Embedding(n_items, hidden_size, padding_idx=0)
        self.dropout = nn.Dropout(0.2)
        self.gru = nn.GRU(hidden_size, hidden_size, batch_first=True, bidirectional=not causal)
        self.out = nn.Linear(hidden_size * (1 if causal else 2), hidden_size)

    def encode(self, item_seq: Tensor, item_seq_len: Tensor | None = None) -> Tensor:
        return self.out(self.gru(self.dropout(self.item_embedding(item_seq)))[0])

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        rows = torch.arange(len(item_seq), device=item_seq.device)
        return self.encode(item_seq)[rows, item_seq_len - 1]

    def loss(self, item_seq: Tensor, item_seq_len: Tensor, targets: Tensor) -> Tensor:
        hidden = self.encode(item_seq, item_seq_len)
        return softmax_loss(hidden.flatten(0, 1), self.item_embedding.weight, targets.flatten())


def make_model(seed: int = 0, **options: object) -> TinyGRU:
    torch.manual_seed(seed)
    return TinyGRU(**options)  # type: ignore[arg-type]


def make_sequences(users: int = 40, seed: int = 0) -> Sequences:
    rng = np.random.default_rng(seed)
    histories = []
    for _ in range(users):
        jump = rng.random(int(rng.integers(2, 20))) < 0.1
        steps = np.where(jump, rng.integers(0, NUM_ITEMS, len(jump)), 1)
        histories.append((rng.integers(0, NUM_ITEMS) + np.cumsum(steps)) % NUM_ITEMS + 1)
    return Sequences.from_lists(histories, NUM_ITEMS)


@pytest.fixture
def train() -> Sequences:
    return make_sequences()


@pytest.fixture
def valid() -> Targets:
    return Targets.last_of(make_sequences(20, seed=1), "valid")


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
