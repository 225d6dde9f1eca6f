"""Disks that fill up, folders that cannot be written, processes killed while they save."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recgrela_ext import CheckpointError, IdMap, RecGRELA, RecGRELAConfig, UserStateStore
from recgrela_ext.training.checkpoint import CheckpointFolder

ROOT = Path(__file__).resolve().parents[2]


def model_of(seed: int) -> RecGRELA:
    torch.manual_seed(seed)
    sizes = {"num_items": 2000, "hidden_size": 32, "num_layers": 2, "num_heads": 2}
    model = RecGRELA(RecGRELAConfig(**sizes)).eval()
    model.id_map = IdMap(np.arange(5), np.arange(2000))
    return model


def store_of(model: RecGRELA, events: int) -> UserStateStore:
    store = UserStateStore(model, 200, "int8", active=20)
    store.step(np.arange(100).repeat(events), torch.randint(1, 2000, (100 * events,)))
    return store


class Saves:
    """The four things that are saved: how, and what is there afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models = [model_of(0), model_of(1)]
        self.stores = [store_of(self.models[0], events) for events in (1, 2)]
        self.checkpoints = CheckpointFolder(folder / "run")

    def save(self, what: str, version: int) -> None:
        if what == "model":
            self.models[version].save_pretrained(self.folder / "model")
        elif what == "store":
            self.stores[version].save(self.folder / "users.safetensors")
        else:
            weights = self.models[version].state_dict()
            self.checkpoints.save(version + 1, weights, {"position": {}})

    def version(self, what: str) -> int:
        """Which version is there, read back whole."""
        if what == "model":
            found = RecGRELA.from_pretrained(self.folder / "model").fingerprint()
            return [model.fingerprint() for model in self.models].index(found)
        if what == "store":
            path = self.folder / "users.safetensors"
            store = UserStateStore.load(path, self.models[0])
            return int(store.lookup([5]).state.position[0]) - 1
        checkpoint = self.checkpoints.load_newest()
        assert checkpoint is not None
        return checkpoint.step - 1


WHAT = ["model", "store", "checkpoint"]


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    """A file system of this size mounted on `folder`; skips where that is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("what", WHAT)
def test_disk_full(tmp_path: Path, what: str) -> None:
    """An error, what was there stays, nothing half written is left, and with room it goes on."""
    with small_disk(tmp_path, 1400):
        saves = Saves(tmp_path)
        saves.save(what, 0)
        ballast = tmp_path / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        before = sorted(p.name for p in tmp_path.rglob("*"))
        errors: Any = CheckpointError if what == "checkpoint" else OSError
        with pytest.raises(errors, match=r"[Nn]o space left"):
            saves.save(what, 1)
        assert saves.version(what) == 0
        assert sorted(p.name for p in tmp_path.rglob("*")) == before
        ballast.unlink()
        saves.save(what, 1)
        assert saves.version(what) == 1


@pytest.mark.parametrize("what", WHAT)
def test_folder_that_cannot_be_written(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a file in the folder's place, which stops root too."""
    saves = Saves(tmp_path)
    places = {"model": tmp_path / "model", "store": tmp_path, "checkpoint": tmp_path / "run"}
    if what == "store":
        saves.folder = tmp_path / "file"
        saves.folder.write_bytes(b"")
        with pytest.raises(OSError, match="Not a directory"):
            saves.save(what, 0)
        return
    shutil.rmtree(places[what], ignore_errors=True)
    places[what].write_bytes(b"")
    with pytest.raises((OSError, CheckpointError), match=r"file|File|directory|folder"):
        saves.save(what, 0)
    assert places[what].read_bytes() == b""
    if what == "checkpoint":
        with pytest.raises(CheckpointError, match="must be a folder that can be written"):
            CheckpointFolder(places[what])


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.trust.test_faults import Saves
folder, what, stage, nth = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
saves = Saves(Path(folder))
saves.save(what, 0)
real, calls = getattr(os, stage), 0

def fatal(*args, **kwargs):
    global calls
    calls += 1
    if calls == nth and stage != "replace":
        os.kill(os.getpid(), signal.SIGKILL)
    result = real(*args, **kwargs)
    if calls == nth:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(os, stage, fatal)
saves.save(what, 1)
sys.exit(7)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("stage", ["fsync", "replace"])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_sigkill_at_each_stage(tmp_path: Path, what: str, stage: str, nth: int) -> None:
    """Before the data are flushed, and right after each renaming: the old or the new is there."""
    command = [sys.executable, "-c", KILLED, str(tmp_path), what, stage, str(nth)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    code = subprocess.run(command, env=environment, check=False).returncode
    assert code in (-signal.SIGKILL, 7)  # 7: there are fewer stages
    saves = Saves(tmp_path)
    try:
        version = saves.version(what)
    except CheckpointError as error:
        # A model is several files: between two renamings the mixture is refused, and a new saving
        # repairs it.
        if what != "model" or "must be the weights config.json was saved with" not in str(error):
            raise
        version = 0
    assert version == (1 if code == 7 else version)
    saves.save(what, 1)
    assert saves.version(what) == 1
    left = [p for p in tmp_path.rglob(".*") if p.is_dir()]
    assert not left, "a later checkpoint clears what a killed one left"


def test_a_torn_checkpoint_is_told_and_passed_over(tmp_path: Path) -> None:
    saves = Saves(tmp_path)
    for version in (0, 1):
        saves.save("checkpoint", version)
    newest = tmp_path / "run/step-0000000002/tensors.safetensors"
    whole = newest.read_bytes()
    for torn in (whole[:-7], b"", whole[:40] + bytes(3) + whole[43:]):
        newest.write_bytes(torn)
        with pytest.warns(UserWarning, match="going on from step 1"):
            assert saves.version("checkpoint") == 0


def test_clock_going_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Order of use, order of checkpoints and minutes of training never read the wall clock."""
    clock = itertools.count(10**6, -1000)
    back: Callable[[], float] = lambda: float(next(clock))  # noqa: E731
    monkeypatch.setattr(time, "time", back)
    monkeypatch.setattr(time, "time_ns", lambda: int(back() * 1e9))
    saves = Saves(tmp_path)
    store = UserStateStore(saves.models[0], 2)
    for user in (1, 2, 1, 3):
        store.step([user], torch.tensor([user]))
    assert sorted(store.users.tolist()) == [1, 3]
    for version in (0, 1):
        saves.save("checkpoint", version)
        assert saves.version("checkpoint") == version
