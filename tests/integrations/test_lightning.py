"""The Lightning example learns, stops, and goes on from its checkpoint."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.integrations.payload import Touch
from tests.integrations.torchrun import ROOT, environment

pytest.importorskip("lightning", reason="Lightning is not installed (`make test-integrations`)")


def start(*arguments: str) -> subprocess.CompletedProcess:
    example = str(ROOT / "python_examples" / "lightning_module.py")
    return subprocess.run(
        [sys.executable, example, *arguments],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def run(*arguments: str) -> tuple[int, float, float]:
    """Epochs, loss and NDCG@10 that the example told."""
    done = start(*arguments)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "the first user's list: [" in done.stdout
    told = re.search(r"epochs (\d+)  loss (\S+)  ndcg@10 (\S+)", done.stdout)
    assert told is not None
    return int(told[1]), float(told[2]), float(told[3])


def test_example(tmp_path: Path) -> None:
    checkpoint = ["--checkpoint", str(tmp_path / "last.ckpt")]
    assert run("--epochs", "1", *checkpoint)[0] == 1
    again = start("--epochs", "1", *checkpoint)
    assert "no epoch was left to train" in again.stderr
    epochs, loss, _ = run("--epochs", "4", *checkpoint)
    assert epochs == 4
    first = run("--epochs", "1")[1]
    assert loss < first
    assert run("--epochs", "12")[2] > 0.05  # ten of 200 at random: about 0.02


def test_no_program_in_a_checkpoint_runs(tmp_path: Path) -> None:
    torch.save({"epoch": Touch(tmp_path / "ran")}, tmp_path / "last.ckpt")
    assert start("--checkpoint", str(tmp_path / "last.ckpt")).returncode != 0
    assert not (tmp_path / "ran").exists()
