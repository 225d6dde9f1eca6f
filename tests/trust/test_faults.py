"""Disks that fill up, folders that cannot be written, processes killed while they save."""

from __future__ import annotations

import contextlib
import itertools
import json
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
from recgrela_ext.evaluation import write_result
from recgrela_ext.training.checkpoint import CheckpointFolder

ROOT = Path(__file__).resolve().parents[2]


def model_of(seed: int) -> RecGRELA:
    torch.manual_seed(seed)
    sizes = {"num_items": 2000, "hidden_size": 32, "num_layers": 2, "num_heads": 2}
    model = RecGRELA(RecGRELAConfig(**sizes)).eval()
    model.id_map = IdMap(np.arange(5), np.arange(2000) + seed)
    return model


def store_of(model: RecGRELA, events: int) -> UserStateStore:
    store = UserStateStore(model, 200, "int8", active=20)
    store.step(np.arange(100).repeat(events), torch.randint(1, 2000, (100 * events,)))
    return store


class Saves:
    """What is saved: how, and which version is there afterwards."""

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
        elif what == "id map":
            id_map = self.models[version].id_map
            assert id_map is not None
            id_map.save(self.folder / "ids.json")
        elif what == "result":
            write_result({"version": version, "much": "x" * 40_000}, self.folder / "result.json")
        else:
            weights = self.models[version].state_dict()
            self.checkpoints.save(version + 1, weights, {"position": {}})

    def version(self, what: str) -> int:
        """Which version is there, read back whole."""
        if what == "model":
            found = RecGRELA.from_pretrained(self.folder / "model")
            version = [one.fingerprint() for one in self.models].index(found.fingerprint())
            assert found.id_map is not None
            assert found.id_map.item_ids[0] == version
            return version
        if what == "store":
            path = self.folder / "users.safetensors"
            store = UserStateStore.load(path, self.models[0])
            return int(store.lookup([5]).state.position[0]) - 1
        if what == "id map":
            return int(IdMap.load(self.folder / "ids.json").item_ids[0])
        if what == "result":
            content = json.loads((self.folder / "result.json").read_text(encoding="utf-8"))
            return int(content["version"])
        checkpoint = self.checkpoints.load_newest()
        assert checkpoint is not None
        return checkpoint.step - 1


WHAT = ["model", "store", "checkpoint", "id map", "result"]


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
    places = {"model": tmp_path / "model", "checkpoint": tmp_path / "run"}
    if what not in places:
        saves.folder = tmp_path / "file"
        saves.folder.write_bytes(b"")
        with pytest.raises(OSError, match="Not a directory"):
            saves.save(what, 0)
        return
    shutil.rmtree(places[what], ignore_errors=True)
    places[what].write_bytes(b"")
    with pytest.raises(
        (OSError, CheckpointError), match=r"File exists|must be a folder|Not a directory"
    ):
        saves.save(what, 0)
    assert places[what].read_bytes() == b""
    if what == "checkpoint":
        with pytest.raises(CheckpointError, match="must be a folder that can be written"):
            CheckpointFolder(places[what])


@pytest.mark.parametrize("what", WHAT)
def test_everything_is_on_the_disk_before_it_takes_its_name(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is renamed was flushed, all that is in it too, and then the folder's list of names."""
    flushed: set[int] = set()
    named: list[Path] = []
    fsync, replace = os.fsync, os.replace

    def inodes(path: Path) -> set[int]:
        return {p.stat().st_ino for p in (path, *path.rglob("*"))}

    def flush(handle: int) -> None:
        flushed.add(os.fstat(handle).st_ino)
        fsync(handle)

    def rename(source: Any, target: Any) -> None:
        assert inodes(Path(source)) <= flushed, f"{source} is not on the disk"
        flushed.discard(Path(target).parent.stat().st_ino)
        replace(source, target)
        named.append(Path(target))

    saves = Saves(tmp_path)
    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    saves.save(what, 0)
    assert named
    assert {path.parent.stat().st_ino for path in named} <= flushed, "the names are not"


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.trust.test_faults import Saves
folder, what, stage, nth = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
what, again = what.removesuffix(" again"), what.endswith(" again")
saves = Saves(Path(folder))
for version in (0, 1)[: 1 + again]:
    saves.save(what, version)
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
# What a process leaves that is killed before its nth flush to the disk, or right after its nth
# renaming: version 0, version 1, or for a model, which is three files, the error that refuses it.
OLD_CONFIG = "config.json was saved with"
LEFT: dict[tuple[str, str], list[int | str]] = {
    ("model", "fsync"): [0, 0, 0, 1],
    ("model", "replace"): [f"the id map {OLD_CONFIG}", f"the weights {OLD_CONFIG}", 1],
    ("store", "fsync"): [0, 1],
    ("store", "replace"): [1],
    ("id map", "fsync"): [0, 1],
    ("id map", "replace"): [1],
    ("result", "fsync"): [0, 1],
    ("result", "replace"): [1],
    ("checkpoint", "fsync"): [0, 0, 0, 1],
    ("checkpoint", "replace"): [1],
    # A step saved twice: the old one is moved away first, and the step before it is there.
    ("checkpoint again", "fsync"): [1, 1, 1, 1],
    ("checkpoint again", "replace"): [0, 1],
}
STAGES = [(*key, nth, left) for key, lefts in LEFT.items() for nth, left in enumerate(lefts, 1)]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize(("what", "stage", "nth", "left"), STAGES)
def test_sigkill_at_each_stage(
    tmp_path: Path, what: str, stage: str, nth: int, left: int | str
) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), what, stage, str(nth)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    code = subprocess.run(command, env=environment, check=False).returncode
    assert code == -signal.SIGKILL, "there are fewer stages than listed"
    saves, kind = Saves(tmp_path), what.removesuffix(" again")
    if isinstance(left, str):
        with pytest.raises(CheckpointError, match=left):
            saves.version(kind)
    else:
        assert saves.version(kind) == left
    saves.save(kind, 1)
    assert saves.version(kind) == 1
    parts = [p for p in tmp_path.rglob(".*") if p.is_dir()]
    assert not parts, "a later checkpoint clears what a killed one left"


@pytest.mark.slow
def test_every_stage_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saves, calls = Saves(tmp_path), dict.fromkeys(("fsync", "replace"), 0)
    for stage in calls:
        real = getattr(os, stage)

        def counted(*args: Any, stage: str = stage, real: Callable[..., Any] = real) -> Any:
            calls[stage] += 1
            return real(*args)

        monkeypatch.setattr(os, stage, counted)
    for what in WHAT:
        saves.save(what, 0)
        calls.update(fsync=0, replace=0)
        saves.save(what, 1)
        assert calls == {stage: len(LEFT[what, stage]) for stage in calls}


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
    """Order of use and order of checkpoints never read the wall clock."""
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
