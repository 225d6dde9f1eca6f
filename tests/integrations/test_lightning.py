"""The Lightning example learns, stops, and goes on from its checkpoint."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integrations.torchrun import ROOT, environment

pytest.importorskip("lightning", reason="Lightning is not installed (`make test-integrations`)")


def run(*arguments: str) -> tuple[int, float, float]:
    """Epochs, loss and NDCG@10 that the example told."""
    example = str(ROOT / "python_examples" / "lightning_module.py")
    done = subprocess.run(
        [sys.executable, example, *arguments],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "the first user's list: [" in done.stdout
    told = re.search(r"epochs (\d+)  loss (\S+)  ndcg@10 (\S+)", done.stdout)
    assert told is not None
    return int(told[1]), float(told[2]), float(told[3])


def test_example(tmp_path: Path) -> None:
    checkpoint = ["--checkpoint", str(tmp_path / "last.ckpt")]
    assert run("--epochs", "1", *checkpoint)[0] == 1
    epochs, loss, _ = run("--epochs", "4", *checkpoint)
    assert epochs == 4
    first = run("--epochs", "1")[1]
    assert loss < first
    assert run("--epochs", "12")[2] > 0.05  # ten of 200 at random: about 0.02
