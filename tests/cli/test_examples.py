"""The numbered examples run, and what they print is what they claim."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recgrela_ext import ops

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "python_examples"


RANKS = ["--epochs", "1", "--users", "3", "--layers", "1", "--length", "40", "--out", "ranks"]


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("01_operator.py", [], "exactly 0 on padding: True"),
        ("02_train_and_recommend.py", ["--minutes", "0.01", "--users", "40"], "loaded again"),
        ("03_stream_events.py", [], "as from the whole history: True"),
        ("rank_analysis.py", RANKS, "| attention alone |"),
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


def test_ranks_are_of_the_matrices_of_the_operator() -> None:
    """The attention map times the values is what `ops.rela` returns; ranks by hand."""
    example = runpy.run_path(str(EXAMPLES / "rank_analysis.py"))
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 30, 2, 4, dtype=torch.float64) for _ in range(3))
    freq = ops.inv_freq(2, 4)
    found = torch.einsum("hlm,bmhd->blhd", example["attention_map"](q, k, freq, 1e-6), v)
    torch.testing.assert_close(found, ops.rela(q, k, v, freq, eps=1e-6))
    diagonal = torch.diag(torch.tensor([2.0, 2.0, 1e-4, 0.0], dtype=torch.float64))
    count, entropy = example["ranks"](diagonal).tolist()
    assert count == 2
    assert 2 < entropy < 2.01


def test_ranks_go_on_where_they_were(tmp_path: Path) -> None:
    """A known result is not measured again, and not taken for one of other options."""
    example = runpy.run_path(str(EXAMPLES / "rank_analysis.py"))
    place = tmp_path / "no-gate-0"
    place.mkdir()
    asked = dict.fromkeys(example["ASKED"], 1)
    known = {"known": 1, "asked": asked}
    (place / "ranks.json").write_text(json.dumps(known))
    options = argparse.Namespace(out=tmp_path, **asked)
    assert example["run"]("no gate", 0, None, [], options) == known
    options.epochs = 2
    with pytest.raises(SystemExit, match=r"--out must be of the same options, got .*epochs 1"):
        example["run"]("no gate", 0, None, [], options)


def test_the_index_lists_every_example() -> None:
    index = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in EXAMPLES.glob("*.py") if f"({path.name})" not in index] == []
