"""Two processes do what one does with the rows of both: DDP, FSDP2, accumulation, restarts.

The largest difference of each loss curve is printed (pytest -rP shows it) and bounded.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_state_dict

from recgrela_ext import RecGRELA, RecGRELAConfig
from recgrela_ext.errors import CheckpointError
from recgrela_ext.integrations import checkpoints
from recgrela_ext.integrations.distributed import (
    compile_blocks,
    fully_shard_blocks,
    load_checkpoint,
    save_checkpoint,
    train_step,
)
from tests.integrations.distributed_worker import EXAMPLE, load_example
from tests.integrations.payload import Touch
from tests.integrations.torchrun import largest_difference, torchrun

SIZES = ["--steps", "6", "--batch", "12", "--max-len", "40", "--hidden-size", "32", "--lr", "0.01"]
# Only the order of sums differs. A unit in the last place of a float32 loss of 5 is 4.8e-7; six
# steps of Adam, which divide gradients by their size, may grow it to some twenty of them.
LIMIT = {"float64": 1e-12, "float32": 1e-5}


def run_variants(
    folder: Path, variants: dict[str, list[str]], processes: int = 2
) -> dict[str, list[float]]:
    asked, told = folder / "variants.json", folder / "losses.json"
    asked.write_text(json.dumps(variants), encoding="utf-8")
    worker = Path(__file__).with_name("distributed_worker.py")
    run = torchrun(str(worker), str(asked), str(told), processes=processes)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(told.read_text(encoding="utf-8"))


def alone(*arguments: str) -> list[float]:
    example = load_example()
    options = example.read_options([*SIZES, *arguments])
    return example.train(options, example.read_log(options))


def test_two_processes_equal_one(tmp_path: Path) -> None:
    variants = {
        f"{wrap} {dtype} {parts}": [
            *SIZES, "--wrap", wrap, "--dtype", dtype, "--accumulate", parts
        ]
        for wrap in ("ddp", "fsdp")
        for dtype in ("float64", "float32")
        for parts in ("1", "3")
    }  # fmt: skip
    saved = ["--dtype", "float64", "--checkpoint", str(tmp_path / "saved"), "--every", "2"]
    variants["first half"] = [*SIZES, *saved, "--wrap", "fsdp", "--steps", "4"]
    variants["second half, other wrapper"] = [*SIZES, *saved, "--wrap", "ddp"]
    curves = run_variants(tmp_path, variants)
    expected = {dtype: alone("--dtype", dtype) for dtype in LIMIT}
    assert expected["float64"][-1] < expected["float64"][0]
    halves = curves.pop("first half"), curves.pop("second half, other wrapper")
    assert [len(half) for half in halves] == [4, 2]
    curves["fsdp float64, then ddp from its checkpoint"] = halves[0] + halves[1]
    for name, losses in curves.items():
        dtype = "float32" if "float32" in name else "float64"
        assert largest_difference(name, losses, expected[dtype]) < LIMIT[dtype]

    # And one process goes on from what two have written.
    example = load_example()
    options = example.read_options([*SIZES, *saved, "--steps", "8"])
    more = example.train(options, example.read_log(options))
    assert len(more) == 2
    assert more == pytest.approx(alone("--dtype", "float64", "--steps", "8")[6:], abs=1e-12)


@pytest.mark.slow
def test_torchrun_starts_again_after_a_death(tmp_path: Path) -> None:
    losses = tmp_path / "losses.json"
    arguments = [
        *SIZES, "--wrap", "fsdp", "--dtype", "float64", "--fail-at", "4", "--every", "2",
        "--checkpoint", str(tmp_path / "saved"), "--losses", str(losses),
    ]  # fmt: skip
    assert torchrun(str(EXAMPLE), *arguments).returncode != 0
    assert not losses.exists()
    for folder in (tmp_path / "saved").iterdir():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    run = torchrun(str(EXAMPLE), *arguments, restarts=1)
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(losses.read_text(encoding="utf-8"))
    assert len(found) == 2  # steps 0 to 3 came from the checkpoint
    expected = alone("--dtype", "float64")[4:]
    assert largest_difference("restarted", found, expected) < LIMIT["float64"]


@pytest.mark.slow
def test_compiled_blocks(tmp_path: Path) -> None:
    variants = {
        wrap: [*SIZES, "--wrap", wrap, "--compile", "--steps", "3"] for wrap in ("ddp", "fsdp")
    }
    expected = alone("--steps", "3")
    for name, losses in run_variants(tmp_path, variants).items():
        assert largest_difference(f"compiled {name}", losses, expected) < LIMIT["float32"]


def small() -> tuple[RecGRELA, torch.optim.Optimizer, Any]:
    torch.manual_seed(1)
    model = RecGRELA(RecGRELAConfig(num_items=20, hidden_size=16, num_layers=1, num_heads=2))
    item_seq = torch.randint(1, 21, (4, 6))
    return model, torch.optim.AdamW(model.parameters()), (item_seq, None, item_seq.roll(-1, 1))


def test_newest_whole_checkpoint_counts(tmp_path: Path) -> None:
    model, optimizer, rows = small()
    assert load_checkpoint(tmp_path, model, optimizer) == 0
    for step in (1, 2, 3):
        train_step(model, optimizer, [rows])
        save_checkpoint(tmp_path, step, model, optimizer)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    (tmp_path / "step-000000004").mkdir()  # a process died while it wrote
    (tmp_path / "step-000000004" / "__0_0.distcp").write_bytes(b"torn")
    assert not (tmp_path / "step-000000001").exists()
    other, other_optimizer, _ = small()
    assert load_checkpoint(tmp_path, other, other_optimizer) == 3
    assert all(torch.equal(x, weights[name]) for name, x in other.state_dict().items())
    for each in ((model, optimizer), (other, other_optimizer)):
        torch.manual_seed(5)  # dropout
        train_step(*each, [rows])
    assert torch.equal(other.item_embedding.weight, model.item_embedding.weight)


def test_checkpoints_of_another_model_or_torn(tmp_path: Path) -> None:
    model, optimizer, _ = small()
    folder = tmp_path / "step-000000002"
    save_checkpoint(tmp_path, 2, model, optimizer)
    for changes in ({"num_heads": 4}, {"causal": False}, {"hidden_size": 32}):
        other = RecGRELA(model.config.replace(**changes))
        (name,) = changes
        with pytest.raises(CheckpointError, match=rf"{name} must be .*, as in .*, got"):
            load_checkpoint(tmp_path, other, torch.optim.AdamW(other.parameters()))
    with pytest.raises(CheckpointError, match="must hold this model and optimizer whole, got"):
        load_checkpoint(tmp_path, model, torch.optim.SGD(model.parameters(), momentum=0.9))

    alone = RecGRELA(model.config.replace(dropout=0.0))  # weights only, to be saved or served
    assert load_checkpoint(tmp_path, alone, None) == 2
    assert torch.equal(alone.item_embedding.weight, model.item_embedding.weight)

    for file in folder.iterdir():
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CheckpointError, match="load_checkpoint: "):
            load_checkpoint(tmp_path, model, optimizer)
        file.write_bytes(whole)
    assert load_checkpoint(tmp_path, model, optimizer) == 2


def test_no_program_in_a_checkpoint_runs(tmp_path: Path) -> None:
    """Neither in the metadata nor among what is saved beside tensors."""
    model, optimizer, _ = small()
    folder = tmp_path / "step-000000001"
    payload = Touch(tmp_path / "ran")
    save_checkpoint(tmp_path, 1, model, optimizer)
    whole = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(pickle.dumps(payload))
    with pytest.raises(CheckpointError, match="which is not on the list"):
        load_checkpoint(tmp_path, model, optimizer)
    (folder / ".metadata").write_bytes(whole)
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "step": payload}
    checkpoints.write(tmp_path / "step-000000002", state, model)
    with pytest.raises(CheckpointError, match="must hold this model and optimizer whole"):
        load_checkpoint(tmp_path, model, optimizer)
    assert not (tmp_path / "ran").exists()


def test_the_newest_step_is_never_taken_away(tmp_path: Path) -> None:
    model, optimizer, _ = small()
    for step in (999_999_999, 1_000_000_000):  # one digit more
        save_checkpoint(tmp_path, step, model, optimizer)
    (tmp_path / "step-by-step").mkdir()
    (tmp_path / "step-by-step" / ".metadata").touch()
    assert load_checkpoint(tmp_path, model, optimizer) == 1_000_000_000
    with pytest.raises(ValueError, match=r"step must be an int of at least 1000000000, .* got 3"):
        save_checkpoint(tmp_path, 3, model, optimizer)


def test_padding_is_the_models_own() -> None:
    """Parts are weighed by their targets, so these must be counted with the model's padding."""
    torch.manual_seed(2)
    config = RecGRELAConfig(n_items=21, padding_idx=20, hidden_size=16, num_layers=1, num_heads=2,
                            dropout=0.0, drop_path=0.0)  # fmt: skip
    model = RecGRELA(config).double()
    item_seq = torch.tensor([[1, 2, 3, 4], [5, 20, 20, 20]])
    targets = torch.tensor([[0, 3, 4, 0], [6, 20, 20, 20]])
    expected = float(model(item_seq, targets=targets))
    parts = [(item_seq[:1], None, targets[:1]), (item_seq[1:], None, targets[1:])]
    found = float(train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), parts))
    assert found == pytest.approx(expected, abs=1e-12)


def test_mistakes(tmp_path: Path) -> None:
    model, optimizer, (item_seq, _, targets) = small()
    with pytest.raises(ValueError, match="parts must hold at least one batch, got none"):
        train_step(model, optimizer, [])
    with pytest.raises(ValueError, match="parts must hold a target on some process, got none"):
        train_step(model, optimizer, [(item_seq, None, torch.zeros_like(targets))])
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        save_checkpoint(tmp_path, 1, model, optimizer, keep=0)
    with pytest.raises(ValueError, match=r"step must be an int of at least 0, .* got -1"):
        save_checkpoint(tmp_path, -1, model, optimizer)
    for clip in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="clip must be positive and finite, got"):
            train_step(model, optimizer, [(item_seq, None, targets)], clip=clip)
    with pytest.raises(TypeError, match=r"must hold \(item_seq, item_seq_len, targets\)"):
        train_step(model, optimizer, [(item_seq, targets)])
    for wrap in (fully_shard_blocks, compile_blocks):
        with pytest.raises(TypeError, match=f"{wrap.__name__}: model must be a plain RecGRELA"):
            wrap(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model must be or hold a RecGRELA, got Linear"):
        train_step(torch.nn.Linear(2, 2), optimizer, [(item_seq, None, targets)])
