"""The numbered examples run, and what they print is what they claim."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "python_examples"


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("01_operator.py", [], "exactly 0 on padding: True"),
        ("02_train_and_recommend.py", ["--minutes", "0.01", "--users", "40"], "loaded again"),
        ("03_stream_events.py", [], "as from the whole history: True"),
    ],
)
def test_runs(tmp_path: Path, name: str, arguments: list[str], told: str) -> None:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert told in run.stdout
    assert "False" not in run.stdout


def test_the_index_lists_every_example() -> None:
    index = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in EXAMPLES.glob("*.py") if f"({path.name})" not in index] == []
