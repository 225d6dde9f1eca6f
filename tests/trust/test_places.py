"""Where things are saved: links, pipes and devices stay what they are."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from recgrela_ext import IdMap, RecGRELA, UserStateStore
from recgrela_ext.evaluation import write_result
from recgrela_ext.training.checkpoint import CheckpointFolder
from tests.fuzz.saved import small_model

IDS = IdMap(np.arange(2), np.arange(3))
SAVES: dict[str, Callable[[Path], None]] = {
    "id map": IDS.save,
    "result": lambda path: write_result({"a": 1}, path),
    "store": lambda path: UserStateStore(small_model(), 2).save(path),
}


@pytest.mark.parametrize("what", SAVES)
def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path, what: str) -> None:
    (tmp_path / "other").mkdir()
    file, link = tmp_path / "other/file", tmp_path / "link"
    file.write_bytes(b"old")
    link.symlink_to(file)
    SAVES[what](link)
    assert link.is_symlink()
    assert file.read_bytes() != b"old"
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["file"]


@pytest.mark.parametrize("what", ["id map", "result"])
def test_a_pipe_is_written_to(tmp_path: Path, what: str) -> None:
    pipe, got = tmp_path / "pipe", list[bytes]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    SAVES[what](pipe)
    reader.join(30)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert isinstance(json.loads(got[0]), dict)


def test_a_device_is_no_place_for_a_store(tmp_path: Path) -> None:
    device = tmp_path / "null"
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except OSError:
        os.mkfifo(device)
    with pytest.raises(OSError, match="must be a regular file"):
        SAVES["store"](device)
    assert not device.is_file()


def test_an_error_at_a_checkpoint_s_name_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(3, {"a": torch.zeros(2)}, {})
    real, calls = os.replace, list[str]()

    def second_fails(source: Path, target: Path) -> None:
        calls.append(str(target))
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(ValueError, match="must be writable"):
        folder.save(3, {"a": torch.ones(2)}, {})
    found = folder.load_newest()
    assert found is not None
    assert found.tensors["a"].tolist() == [0, 0]


def test_a_model_is_saved_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "here").symlink_to(tmp_path / "there")
    model = small_model()
    model.save_pretrained(tmp_path / "here")
    assert RecGRELA.from_pretrained(tmp_path / "there").fingerprint() == model.fingerprint()
