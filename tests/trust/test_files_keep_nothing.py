"""Loading and saving again and again: no memory stays.

Found by the soak: safetensors.torch kept 63 bytes a tensor loaded, and 5.7 KiB for every size of a
tensor it had not saved before.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from recgrela_ext import UserStateStore
from recgrela_ext.tensor_files import READ_OPTIONS, save_tensors, tensors_to_bytes
from recgrela_ext.training.checkpoint import CheckpointFolder
from tests.fuzz.saved import small_model

NEW_SAFETENSORS = pytest.mark.skipif(
    not READ_OPTIONS, reason="needs safetensors 0.8, which reads without mapping, saves by address"
)
TENSORS = {
    "whole": torch.ones(3, 4),
    "turned": torch.arange(12.0).view(3, 4).to(torch.bfloat16).t(),
    "scalar": torch.tensor(3),
    "empty": torch.empty(0, 5, dtype=torch.int32),
    "truth": torch.tensor([True, False]),
    "bytes": torch.arange(5, dtype=torch.int8),
    "half": torch.ones(2, dtype=torch.float16),
    "part": torch.arange(10.0)[3:6],
}


def kib() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


def growth(call: Callable[[], object], rounds: int) -> float:
    """KiB a round; the least of three, since the allocator grows in steps."""
    for _ in range(rounds):
        call()
    found = []
    for _ in range(3):
        before = kib()
        for _ in range(rounds):
            call()
        found.append((kib() - before) / rounds)
    return min(found)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@NEW_SAFETENSORS
def test_checkpoints_and_stores(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "run")
    folder.save(1, {f"tensor {i}": torch.ones(3) for i in range(300)}, {})
    assert growth(folder.load_newest, 100) < 1.0  # 300 tensors of 63 bytes: 18 KiB
    model = small_model()
    store = UserStateStore(model, 3)
    store.step([1], torch.tensor([2]))
    store.save(tmp_path / "users")
    assert growth(lambda: UserStateStore.load(tmp_path / "users", model), 300) < 0.3


@NEW_SAFETENSORS
def test_a_saved_size_makes_no_type() -> None:
    """ctypes keeps the type of every array for good."""
    kept = len(ctypes._pointer_type_cache)  # type: ignore[attr-defined]
    for size in range(1000, 1100):
        tensors_to_bytes({"x": torch.ones(size)})
    assert len(ctypes._pointer_type_cache) == kept  # type: ignore[attr-defined]


def test_the_files_are_those_of_safetensors(tmp_path: Path) -> None:
    facts = {"format": "pt"}  # of two, the order is any
    theirs = save({name: t.contiguous() for name, t in TENSORS.items()}, metadata=facts)
    assert tensors_to_bytes(TENSORS, facts) == theirs
    save_tensors(tmp_path / "x", TENSORS, facts)
    assert (tmp_path / "x").read_bytes() == theirs
    for name, tensor in load(theirs).items():
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])
    assert tensors_to_bytes({}) == save({})
