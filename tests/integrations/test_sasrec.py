from __future__ import annotations

import runpy
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from recgrela_ext.integrations.sasrec import RecGRELA

ARGS = Namespace(hidden_units=16, num_blocks=2, num_heads=2, dropout_rate=0.0, maxlen=8)
EXAMPLE = Path(__file__).parents[2] / "python_examples" / "sasrec_swap.py"


def logs() -> np.ndarray:
    return np.array([[0, 0, 0, 0, 0, 3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5]], np.int32)


def test_logits_are_products_of_hidden_states_and_item_vectors() -> None:
    model = RecGRELA(100, 9, ARGS).eval()
    pos = np.array([[0, 0, 0, 0, 0, 1, 4, 7], [5, 9, 2, 6, 5, 3, 5, 8]], np.int32)
    neg = np.where(pos > 0, 2, 0)
    pos_logits, neg_logits = model(np.array([1, 2]), logs(), pos, neg)
    assert pos_logits.shape == neg_logits.shape == (2, 8)
    lengths = torch.tensor([3, 8])
    right = torch.zeros(2, 8, dtype=torch.int64)
    right[0, :3], right[1] = torch.tensor([3, 1, 4]), torch.from_numpy(logs()[1]).long()
    hidden = model.model.encode(right, lengths)
    expected = hidden[0, 2] @ model.item_emb.weight[7]
    torch.testing.assert_close(pos_logits[0, -1], expected, rtol=1e-4, atol=1e-5)
    expected = hidden[1, 4] @ model.item_emb.weight[2]
    torch.testing.assert_close(neg_logits[1, 4], expected, rtol=1e-4, atol=1e-5)
    assert not pos_logits[0, :5].any()  # no item there


def test_prediction_is_the_last_positions_logit() -> None:
    model = RecGRELA(100, 9, ARGS).eval()
    candidates = [7, 2, 8]
    logits = model.predict(np.array([1, 2]), logs(), candidates)
    assert logits.shape == (2, 3)
    for column, item in enumerate(candidates):
        pos, _ = model(None, logs(), np.full((2, 8), item), np.ones((2, 8)))
        torch.testing.assert_close(logits[:, column], pos[:, -1], rtol=1e-4, atol=1e-5)


def test_the_scripts_initialisation_and_penalty_work() -> None:
    model = RecGRELA(100, 9, ARGS)
    for _, param in model.named_parameters():
        if param.dim() > 1:
            torch.nn.init.xavier_normal_(param.data)
    model.pos_emb.weight.data[0, :] = 0
    model.item_emb.weight.data[0, :] = 0
    pos, neg = model(None, logs(), logs(), np.ones((2, 8)))
    loss = pos.sum() - neg.sum()
    for param in model.item_emb.parameters():
        loss = loss + 0.1 * torch.sum(param**2)
    loss.backward()
    torch.optim.Adam(model.parameters()).step()
    assert not model.item_emb.weight[0].any()
    copy = RecGRELA(100, 9, ARGS)
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy.item_emb.weight, model.item_emb.weight)


def test_mistakes() -> None:
    model = RecGRELA(100, 9, ARGS).eval()
    good = logs()
    for pos, text in (
        (good[:1], r"pos_seqs must be \[2, 8\], got \[1, 8\]"),  # would be broadcast
        (good[0], r"pos_seqs must be \[2, 8\], got \[8\]"),
        (good * 9, "pos_seqs must lie in 0..9"),
        (good + 0.5, "pos_seqs must be whole numbers"),
    ):
        with pytest.raises(ValueError, match=text):
            model(None, good, pos, good)
    for log, items, text in (
        (good[:, ::-1], [1], "item_seq must have its padding on one side"),
        (good[0], [1], r"item_seq must be \[B, L\], got \[8\]"),
        (good, [10], "item_indices must lie in 0..9 .*, got 10"),
        (good, [1.5], "item_indices must be whole numbers"),
    ):
        with pytest.raises(ValueError, match=text):
            model.predict(None, log, items)
    assert not model.predict(None, good[:, :0], [1, 2]).any()  # nobody has a history


def test_example_learns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--epochs", "3", "--num_blocks", "1"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[1] for line in lines] == ["1", "2", "3"]
    assert float(lines[-1][3]) < float(lines[0][3])
    assert float(lines[-1][-1]) > 0.4  # ten of a hundred by chance: 0.045
