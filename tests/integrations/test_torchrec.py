"""A table cut by rows over two processes trains as on one, and moves between numbers of them."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from recgrela_ext import RecGRELA as WholeModel
from recgrela_ext import RecGRELAConfig
from recgrela_ext.errors import CheckpointError
from tests.integrations.payload import Touch
from tests.integrations.torchrun import ROOT, largest_difference, torchrun

pytest.importorskip("torchrec", reason="TorchRec is not installed (`make test-integrations`)")

EXAMPLE = str(ROOT / "python_examples" / "torchrec_rows.py")
# Sums in another order; float32 losses of about 4, six steps of AdamW and Adagrad.
LIMIT = 1e-5


def train(folder: Path, steps: int, processes: int) -> list[float]:
    """Go on in `folder` to `steps`; the losses done on the way."""
    told = folder / "losses.json"
    run = torchrun(
        EXAMPLE, "--steps", str(steps), "--batch", "12", "--max-len", "20", "--negatives", "16",
        "--checkpoint", str(folder), "--losses", str(told), "--out", str(folder / "whole"),
        processes=processes,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(told.read_text(encoding="utf-8"))


def test_two_one_two_processes_equal_one(tmp_path: Path) -> None:
    one, moved = tmp_path / "one", tmp_path / "moved"
    assert train(one, 0, processes=1) == []
    shutil.copytree(one, moved)  # the same start
    expected = train(one, 6, processes=1)
    losses = train(moved, 3, processes=2)
    losses += train(moved, 4, processes=1)
    losses += train(moved, 6, processes=2)
    assert largest_difference("2, 1, 2 processes", losses, expected) < LIMIT

    fewer = torchrun(EXAMPLE, "--steps", "2", "--checkpoint", str(moved), processes=1)
    assert fewer.returncode != 0
    assert "--steps must be at least 6" in fewer.stderr  # not saved as step 2
    whole = [WholeModel.from_pretrained(folder / "whole") for folder in (one, moved)]
    for (name, a), (_, b) in zip(*(m.state_dict().items() for m in whole), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    later = train(one, 40, processes=1)
    assert sum(later[-6:]) < 0.95 * sum(expected)


@pytest.fixture
def process_group(tmp_path: Path) -> object:
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def config(**changes: object) -> RecGRELAConfig:
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "dropout": 0.0, "drop_path": 0.0}
    return RecGRELAConfig(**{"num_items": 50, **sizes, **changes})


@pytest.mark.usefixtures("process_group")
def test_same_numbers_as_the_model() -> None:
    from recgrela_ext.integrations.torchrec import RecGRELA, gather, jagged_batch, shard_by_rows

    model, optimizer = shard_by_rows(RecGRELA(config()), table_lr=0.1, lr=0.01)
    items = [torch.tensor([3, 8, 2]), torch.tensor([50]), torch.tensor([9, 9, 1, 7])]
    targets = [torch.tensor([8, 2, 4]), torch.tensor([1]), torch.tensor([9, 1, 7, 5])]
    negatives = torch.tensor([[4, 10, 11], [12, 13, 14], [5, 16, 17]])  # 4 and 5 are hits
    batch = jagged_batch(items, targets, negatives)
    whole = gather(model)
    loss, hidden = model(batch)
    bounds = torch.tensor([0, 3, 4, 8])
    torch.testing.assert_close(hidden, whole.encode_packed(torch.cat(items), bounds))

    table, total = whole.item_embedding.weight, 0.0
    rows = [user for user in range(3) for _ in items[user]]
    for row, user in enumerate(rows):
        target = int(torch.cat(targets)[row])
        classes = [target, *(n for n in negatives[user].tolist() if n != target)]
        scores = hidden[row] @ table[classes].T
        total -= scores.log_softmax(0)[0]
    torch.testing.assert_close(loss, total / 8)

    loss.backward()
    optimizer.step()
    after = gather(model).item_embedding.weight
    changed = (after != table).any(1).nonzero().flatten().tolist()
    looked_up = {*torch.cat(items).tolist(), *torch.cat(targets).tolist()}
    # A user's hit is masked where it is the target, and 4 and 5 are targets elsewhere.
    assert changed == sorted(looked_up | set(negatives.flatten().tolist()))


def test_batches_that_do_not_fit() -> None:
    """Lengths that differ would shift rows, and ids beyond a sharded table are read as row 0."""
    from torchrec import KeyedJaggedTensor

    from recgrela_ext.integrations.torchrec import KEYS, RecGRELA

    model = RecGRELA(config())

    def loss(lengths: list[int], values: list[int], keys: list[str] = KEYS) -> torch.Tensor:
        parts = torch.tensor(values), torch.tensor(lengths)
        return model(KeyedJaggedTensor.from_lengths_sync(keys, *parts))[0]

    assert loss([2, 1, 2, 1, 2, 2], list(range(1, 11))).isfinite()
    for lengths, values, text in (
        ([2, 1, 1, 2, 2, 2], list(range(1, 11)), "target must be as long as item"),
        ([2, 1, 2, 1, 3, 1], list(range(1, 11)), r"K > 0 items for every user, got \[1, 3\]"),
        ([2, 1, 2, 1, 0, 0], list(range(1, 7)), r"K > 0 items for every user, got \[0\]"),
        ([1, 1, 1], [51, 2, 3], "item must lie in 0..50"),
        ([1, 1, 1], [1, -1, 3], "target must lie in 0..50"),
        ([1, 1, 1], [1, 2, 0], "negative must be real items, got padding_idx=0"),
    ):
        with pytest.raises(ValueError, match=text):
            loss(lengths, values)
    with pytest.raises(ValueError, match="batch must have the keys"):
        loss([1, 1, 1], [1, 2, 3], ["item", "target", "sampled"])


@pytest.mark.usefixtures("process_group")
def test_checkpoints_of_another_model_or_with_a_program(tmp_path: Path) -> None:
    from recgrela_ext.integrations.torchrec import (
        RecGRELA,
        load_checkpoint,
        save_checkpoint,
        shard_by_rows,
    )

    def sharded(**changes: object) -> tuple[object, object]:
        return shard_by_rows(RecGRELA(config(**changes)), table_lr=0.1, lr=0.01)

    folder = tmp_path / "saved"
    save_checkpoint(folder, *sharded())
    load_checkpoint(folder, *sharded(dropout=0.5))
    for changes, text in (
        ({"num_heads": 4}, "num_heads must be 2, as in"),
        ({"hidden_size": 32}, "hidden_size must be 16, as in"),
    ):
        with pytest.raises(CheckpointError, match=text):
            load_checkpoint(folder, *sharded(**changes))
    with pytest.raises(CheckpointError, match="cannot read"):
        load_checkpoint(tmp_path / "none", *sharded())
    (folder / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match="which is not on the list"):
        load_checkpoint(folder, *sharded())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("n_items", "processes"), [(2, 3), (4, 3), (9, 6)])
def test_fewer_rows_than_processes(
    monkeypatch: pytest.MonkeyPatch, n_items: int, processes: int
) -> None:
    """TorchRec fails on the processes without rows, and the others wait for them."""
    from recgrela_ext.integrations.torchrec import RecGRELA, shard_by_rows

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes)
    model = RecGRELA(config(num_items=n_items - 1))
    with pytest.raises(ValueError, match=f"got {n_items} rows for {processes} processes"):
        shard_by_rows(model, 0.1, 0.1)


@pytest.mark.usefixtures("process_group")
def test_copies_and_the_padding_row() -> None:
    from recgrela_ext.integrations.torchrec import RecGRELA, gather, shard_by_rows

    model = pickle.loads(pickle.dumps(RecGRELA(config())))
    whole = gather(shard_by_rows(model, table_lr=0.1, lr=0.01)[0])
    assert not whole.item_embedding.weight[0].any()
    assert whole.item_embedding.weight[1:].any(1).all()


def test_mistakes() -> None:
    from recgrela_ext.integrations.torchrec import RecGRELA, gather, jagged_batch, shard_by_rows

    with pytest.raises(ValueError, match="item_seqs must hold at least one user, got none"):
        jagged_batch([], [], torch.empty(0, 4, dtype=torch.int64))
    two = [torch.tensor([1, 2]), torch.tensor([3])]
    with pytest.raises(ValueError, match="must fit item_seqs of lengths"):
        jagged_batch(two, two[::-1], torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"negatives must be \[B, K\], K at least 1, got \[2, 0\]"):
        jagged_batch(two, two, torch.ones(2, 0, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"targets must be int64 or int32, got torch\.float32"):
        jagged_batch(two, [torch.tensor([1, 2]), torch.tensor([])], torch.ones(2, 1).long())
    with pytest.raises(ValueError, match="must be causal"):
        RecGRELA(config(position="learned"))
    with pytest.raises(TypeError, match="config must be a RecGRELAConfig, got dict"):
        RecGRELA({"num_items": 9})
    with pytest.raises(TypeError, match="must be this module's RecGRELA, got Linear"):
        shard_by_rows(torch.nn.Linear(2, 2), 0.1, 0.1)
    with pytest.raises(ValueError, match="lr must be a finite rate, got nan"):
        shard_by_rows(RecGRELA(config()), 0.1, float("nan"))
    with pytest.raises(TypeError, match="must be sharded by rows, got RecGRELA"):
        gather(RecGRELA(config()))
