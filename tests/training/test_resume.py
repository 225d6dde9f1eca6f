"""A run that is stopped anywhere and resumed ends with the bits of one that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recgrela_ext.data.sequences import Sequences, Targets
from recgrela_ext.errors import CheckpointError
from recgrela_ext.training import TrainConfig, fit, trainer
from recgrela_ext.training.checkpoint import CheckpointFolder
from recgrela_ext.training.stepper import Stepper

from .conftest import assert_same_bits, make_model, make_sequences, weights_of

RECIPE = {
    "lr": 0.02,
    "targets_per_step": 60,
    "ema": 0.9,
    "clip": 1.0,
    "loss": "sampled",
    "num_negatives": 8,
    "checkpoint_every_seconds": None,
    "checkpoint_every_steps": 3,
}


class Killed(BaseException):
    """Stands for SIGKILL inside one process: nothing catches it."""


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The process dies inside optimiser step `number`, after the weights changed."""
    step = Stepper.step

    def dying(self: Stepper, batch: object, at: int, rate: float) -> torch.Tensor:
        loss = step(self, batch, at, rate)  # type: ignore[arg-type]
        if at == number:
            raise Killed
        return loss

    monkeypatch.setattr(Stepper, "step", dying)


@pytest.mark.parametrize("amp", [None, "float16"])
def test_killed_at_any_step_ends_with_the_same_bits(
    train: Sequences,
    valid: Targets,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    amp: str | None,
) -> None:
    config = TrainConfig(**RECIPE, amp=amp)
    whole = make_model()
    expected = fit(whole, train, valid, epochs=4, config=config, checkpoint_dir=tmp_path / "whole")
    killed = make_model()
    for number in (1, 5, 9, 14, 20):
        with monkeypatch.context() as patch:
            stop_at(patch, number)
            with pytest.raises(Killed):
                fit(killed, train, valid, epochs=4, config=config, checkpoint_dir=tmp_path / "cut")
        killed = make_model(seed=number)  # a new process starts from other weights
    result = fit(killed, train, valid, epochs=4, config=config, checkpoint_dir=tmp_path / "cut")
    assert_same_bits(weights_of(killed), weights_of(whole))
    assert (result.steps, result.best_metric) == (expected.steps, expected.best_metric)
    numbers = [(r["epoch"], r["step"], r["loss"], r["valid"]) for r in result.history]
    assert numbers == [(r["epoch"], r["step"], r["loss"], r["valid"]) for r in expected.history]
    lines = (tmp_path / "cut" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history


def test_a_finished_run_is_only_loaded(train: Sequences, valid: Targets, tmp_path: Path) -> None:
    config = TrainConfig(**RECIPE)
    first, second = make_model(), make_model(seed=1)
    done = fit(first, train, valid, epochs=2, config=config, checkpoint_dir=tmp_path)
    again = fit(second, train, valid, epochs=2, config=config, checkpoint_dir=tmp_path)
    assert_same_bits(weights_of(first), weights_of(second))
    assert again == done


def test_more_epochs_go_on_from_the_end(train: Sequences, tmp_path: Path) -> None:
    config = TrainConfig(**RECIPE)
    whole, grown = make_model(), make_model()
    fit(whole, train, epochs=4, config=config)
    fit(grown, train, epochs=2, config=config, checkpoint_dir=tmp_path)
    fit(grown, train, epochs=4, config=config, checkpoint_dir=tmp_path)
    assert_same_bits(weights_of(whole), weights_of(grown))


def test_ctrl_c_ends_after_the_step_with_a_checkpoint(
    train: Sequences, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(**{**RECIPE, "checkpoint_every_steps": None})
    whole, stopped = make_model(), make_model()
    fit(whole, train, epochs=2, config=config)
    step = Stepper.step

    def interrupted(self: Stepper, batch: object, at: int, rate: float) -> torch.Tensor:
        if at == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, at, rate)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(stopped, train, epochs=2, config=config, checkpoint_dir=tmp_path)
    assert CheckpointFolder(tmp_path).steps()[-1] == 5
    fit(stopped, train, epochs=2, config=config, checkpoint_dir=tmp_path, resume="must")
    assert_same_bits(weights_of(whole), weights_of(stopped))


KILLER = """
import os, random, signal, sys, time
import torch
from recgrela_ext import RecGRELA
from recgrela_ext.data.sequences import Targets
from recgrela_ext.training import TrainConfig, fit
import recgrela_ext.evaluation
from tests.training.conftest import make_sequences

def train(folder):
    torch.set_num_threads(1)
    train, valid = make_sequences(), Targets.last_of(make_sequences(20, seed=1), "valid")
    torch.manual_seed(0)
    model = RecGRELA.for_data(train, hidden_size=8, num_layers=1, num_heads=2, max_seq_len=6)
    config = TrainConfig(lr=0.02, targets_per_step=30, ema=0.9, checkpoint_every_seconds=None,
                         checkpoint_every_steps=4)
    fit(model, train, valid, epochs=8, config=config, checkpoint_dir=folder)

def run(folder, kill_after=None):
    pid = os.fork()
    if pid == 0:
        try:
            train(folder)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]

start = time.monotonic()
assert run(sys.argv[1]) == 0
length = time.monotonic() - start
ends = [run(sys.argv[2], random.uniform(0.05, 0.3) * length) for _ in range(5)]
assert set(ends) <= {0, signal.SIGKILL}, ends
assert run(sys.argv[2]) == 0
print("killed", ends.count(signal.SIGKILL))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_sigkill_five_times_at_random(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path / "whole"), str(tmp_path / "cut")],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) >= 1, "no run was killed"
    whole, cut = (CheckpointFolder(tmp_path / name).load_newest() for name in ("whole", "cut"))
    assert whole is not None
    assert cut is not None
    assert cut.step == whole.step
    assert_same_bits(cut.tensors, whole.tensors)
    for field in ("best_metric", "best_step", "targets", "step_in_epoch"):
        assert cut.state["position"][field] == whole.state["position"][field]
    assert not list((tmp_path / "cut").glob(".*part"))


@pytest.fixture
def run_folder(train: Sequences, valid: Targets, tmp_path: Path) -> Path:
    fit(make_model(), train, valid, steps=8, config=TrainConfig(**RECIPE), checkpoint_dir=tmp_path)
    return tmp_path


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "flipped":
        # Not any place of the JSON: the last digit of a time may be one that no float64 shows.
        middle = content.find(b"position") if path.suffix == ".json" else len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped", "missing"])
@pytest.mark.parametrize("file", ["state.json", "tensors.safetensors"])
def test_torn_checkpoint_falls_back_to_the_one_before(
    train: Sequences, valid: Targets, run_folder: Path, file: str, how: str
) -> None:
    folder = CheckpointFolder(run_folder)
    newest = folder.steps()[-1]
    damage(run_folder / f"step-{newest:010d}" / file, how)
    whole, model = make_model(), make_model(seed=3)
    fit(whole, train, valid, epochs=3, config=TrainConfig(**RECIPE))
    with pytest.warns(UserWarning, match=f"step-{newest:010d} .*going on from step"):
        fit(model, train, valid, epochs=3, config=TrainConfig(**RECIPE), checkpoint_dir=run_folder)
    assert_same_bits(weights_of(model), weights_of(whole))


def test_no_whole_checkpoint_is_an_error(
    train: Sequences, valid: Targets, run_folder: Path
) -> None:
    for state in run_folder.glob("step-*/state.json"):
        damage(state, "truncated")
    with pytest.raises(CheckpointError, match="no earlier one to go on from"):
        fit(make_model(), train, valid, steps=8, checkpoint_dir=run_folder)


def test_another_run_is_refused_in_one_line(
    train: Sequences, valid: Targets, run_folder: Path
) -> None:
    def resume(model: torch.nn.Module, data: Sequences, **changes: object) -> str:
        config = TrainConfig(**{**RECIPE, **changes})
        with pytest.raises(CheckpointError) as error:
            fit(model, data, valid, steps=9, config=config, checkpoint_dir=run_folder)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "config lr = 0.02 there and 0.5 here" in resume(make_model(), train, lr=0.5)
    assert "data sha256" in resume(make_model(), make_sequences(seed=9))
    assert "other names or shapes" in resume(make_model(hidden_size=4), train)
    assert "config schedule = 'constant' there" in resume(make_model(), train, schedule="linear")


def test_limits_belong_to_a_run_whose_rate_follows_them(train: Sequences, tmp_path: Path) -> None:
    config = TrainConfig(**RECIPE, schedule="cosine")
    fit(make_model(), train, steps=3, config=config, checkpoint_dir=tmp_path)
    with pytest.raises(CheckpointError, match="limits steps = 3 there and 6 here"):
        fit(make_model(), train, steps=6, config=config, checkpoint_dir=tmp_path)


def test_a_decaying_rate_survives_a_kill(
    train: Sequences, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(**RECIPE, schedule="cosine", decay=0.6, warmup_steps=2)
    whole, killed = make_model(), make_model()
    fit(whole, train, epochs=3, config=config)
    with monkeypatch.context() as patch:
        stop_at(patch, 13)
        with pytest.raises(Killed):
            fit(killed, train, epochs=3, config=config, checkpoint_dir=tmp_path)
    fit(killed, train, epochs=3, config=config, checkpoint_dir=tmp_path)
    assert_same_bits(weights_of(killed), weights_of(whole))


def test_disk_that_refuses_is_one_line(
    train: Sequences, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    before = CheckpointFolder(run_folder).steps()
    monkeypatch.setattr("recgrela_ext.training.checkpoint.save_tensors", full)
    folder = CheckpointFolder(run_folder)
    with pytest.raises(CheckpointError, match=r"must be writable, got .*No space left"):
        folder.save(99, {}, {})
    assert folder.steps() == before
    assert not list(run_folder.glob(".*part"))


def test_another_version_is_refused(train: Sequences, run_folder: Path) -> None:
    for file in run_folder.glob("step-*/state.json"):
        content = json.loads(file.read_text())
        file.write_text(json.dumps({**content, "version": 99}))
    with pytest.raises(CheckpointError, match="must have version 1, got 99"):
        fit(make_model(), train, steps=9, checkpoint_dir=run_folder)


def test_resume_choices(train: Sequences, valid: Targets, run_folder: Path, tmp_path: Path) -> None:
    config = TrainConfig(**RECIPE)
    fresh, again = make_model(), make_model()
    fit(fresh, train, valid, steps=2, config=config)
    fit(again, train, valid, steps=2, config=config, checkpoint_dir=run_folder, resume="never")
    assert_same_bits(weights_of(fresh), weights_of(again))
    assert CheckpointFolder(run_folder).steps()[-1] == 2
    assert len((run_folder / "log.jsonl").read_text().splitlines()) == 1
    with pytest.raises(CheckpointError, match="must hold a checkpoint to resume"):
        fit(again, train, steps=2, checkpoint_dir=tmp_path / "none", resume="must")
    with pytest.raises(CheckpointError, match="must be given to resume"):
        fit(again, train, steps=2, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="folder that can be written"):
        fit(again, train, steps=2, checkpoint_dir=tmp_path / "file")


def test_folder_keeps_the_two_newest_and_the_best(
    train: Sequences, valid: Targets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([0.1, 0.9, 0.2, 0.3, 0.4])
    monkeypatch.setattr(
        "recgrela_ext.evaluation.evaluate",
        lambda *a, **k: {"mean": {"seen_included/ndcg@10": next(values)}},
    )
    config = TrainConfig(**{**RECIPE, "checkpoint_every_steps": None})
    result = fit(make_model(), train, valid, epochs=5, config=config, checkpoint_dir=tmp_path)
    ends = [line["step"] for line in result.history]
    assert CheckpointFolder(tmp_path).steps() == [ends[0], ends[1], ends[3], ends[4]]
    assert result.best_step == ends[1]


def test_no_pickle_in_a_checkpoint(run_folder: Path) -> None:
    names = {path.name for path in run_folder.rglob("*") if path.is_file()}
    assert names == {"log.jsonl", "state.json", "tensors.safetensors"}


def test_time_based_checkpoints(train: Sequences, tmp_path: Path) -> None:
    config = TrainConfig(
        **{**RECIPE, "checkpoint_every_steps": None, "checkpoint_every_seconds": 0}
    )
    fit(make_model(), train, steps=5, config=config, checkpoint_dir=tmp_path)
    assert CheckpointFolder(tmp_path).steps() == [4, 5]


def test_other_thread_count_warns(
    train: Sequences, valid: Targets, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.torch, "get_num_threads", lambda: 77)
    with pytest.warns(UserWarning, match="77: the last bits may differ"):
        fit(
            make_model(),
            train,
            valid,
            steps=9,
            config=TrainConfig(**RECIPE),
            checkpoint_dir=run_folder,
        )
    shutil.rmtree(run_folder)


def test_a_folder_in_use_is_refused(train: Sequences, tmp_path: Path) -> None:
    if os.name == "nt":
        pytest.skip("no flock on Windows")
    with (
        CheckpointFolder(tmp_path).alone(),
        pytest.raises(CheckpointError, match="checkpoint_dir must not be in use"),
    ):
        fit(make_model(), train, steps=1, checkpoint_dir=tmp_path)
    assert fit(make_model(), train, steps=1, checkpoint_dir=tmp_path).steps == 1


def test_a_torn_log_is_no_obstacle(train: Sequences, tmp_path: Path) -> None:
    fit(make_model(), train, epochs=1, checkpoint_dir=tmp_path, progress=False)
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes() + b'{"epoch": 2, "st\xc3')
    fit(make_model(), train, epochs=2, checkpoint_dir=tmp_path, progress=False)
    assert [json.loads(line)["epoch"] for line in log.read_text().splitlines()] == [1, 2]
