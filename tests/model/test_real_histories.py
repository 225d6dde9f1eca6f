"""Ragged real histories, up to thousands of events, read in every way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from recgrela_ext.data import Interactions
from recgrela_ext.model import RecGRELA

USERS = 25


@pytest.fixture(scope="module")
def histories(real_data: Path) -> tuple[int, list[Tensor]]:
    pytest.importorskip("pandas", reason="reading the log needs pandas")
    train = Interactions.from_file(real_data / "ml-100k" / "ml-100k.inter").sequences()
    longest = sorted(range(len(train)), key=lambda u: -len(train.history(u)))
    chosen = longest[:2] + longest[:: len(longest) // USERS]
    return train.n_items, [torch.from_numpy(train.history(u).copy()).long() for u in chosen]


@torch.no_grad()
def test_same_hidden_states(histories: tuple[int, list[Tensor]]) -> None:
    n_items, rows = histories
    torch.manual_seed(0)
    model = RecGRELA.for_data(_Train(n_items)).eval()  # type: ignore[arg-type]
    lengths = torch.tensor([len(row) for row in rows])
    B, L = len(rows), int(lengths.max())
    right = torch.zeros(B, L, dtype=torch.int64)
    left = torch.zeros(B, L, dtype=torch.int64)
    for b, row in enumerate(rows):
        right[b, : len(row)] = row
        left[b, L - len(row) :] = row
    real = right != 0
    want = model.encode(right, lengths)[real]
    scale = want.abs().amax(-1, keepdim=True)

    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    views = {
        "left": model.encode(left, lengths, padding_side="left")[left != 0],
        "packed": model.encode_packed(torch.cat(rows), bounds),
    }
    state, stepped = model.init_state(B), torch.zeros(B, L, model.config.hidden_size)
    for t in range(L):
        stepped[:, t] = model.step(right[:, t], state)
    views["step"] = stepped[real]
    for name, got in views.items():
        worst = float(((got - want).abs() / scale).max())
        assert worst <= 2e-5, (name, worst)
    last = model(right, lengths)
    for chunk in (64, 512):
        filled = model.prefill(right, lengths, chunk_size=chunk)
        worst = float(((filled.hidden - last).abs() / last.abs().amax(-1, keepdim=True)).max())
        assert worst <= 2e-5, (chunk, worst)
    assert torch.equal(state.position, lengths)


class _Train:
    repeat_share = 0.0
    id_map = None

    def __init__(self, n_items: int) -> None:
        self.n_items = n_items
