"""Loading again and again: no memory stays. A mapped file kept 63 bytes a tensor (the soak)."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from recgrela_ext import UserStateStore
from recgrela_ext.files import SAFETENSORS
from recgrela_ext.training.checkpoint import CheckpointFolder
from tests.fuzz.saved import small_model


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
@pytest.mark.skipif(not SAFETENSORS, reason="needs safetensors 0.8, which reads without mapping")
def test_checkpoints_and_stores(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "run")
    folder.save(1, {f"tensor {i}": torch.ones(3) for i in range(300)}, {})
    assert growth(folder.load_newest, 100) < 1.0  # 300 tensors of 63 bytes: 18 KiB
    model = small_model()
    store = UserStateStore(model, 3)
    store.step([1], torch.tensor([2]))
    store.save(tmp_path / "users")
    assert growth(lambda: UserStateStore.load(tmp_path / "users", model), 300) < 0.3
