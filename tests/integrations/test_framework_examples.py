"""The examples that need a framework run and tell metrics; --help works."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.integrations.torchrun import ROOT, environment
from tests.integrations.walks import write_inter

# Framework: (example, arguments, what it prints).
EXAMPLES = {
    "recbole": (
        "recbole_ml100k.py",
        ["--dataset", "walks", "--data", ".", "--epochs", "2", "--max-len", "8", "--mode", "paper"],
        "'ndcg@10'",
    ),
    "rectools": ("rectools_walkthrough.py", ["--epochs", "1", "--save", "model"], "ndcg@10 "),
    "replay": ("replay_walkthrough.py", ["--epochs", "1"], "ndcg@10 "),
    "torchrec": ("torchrec_rows.py", None, ""),
    "lightning": ("lightning_module.py", None, ""),
    "torch": ("ddp_fsdp.py", ["--steps", "2"], "steps 1 to 2: "),
}


@pytest.mark.parametrize("framework", EXAMPLES)
def test_runs(framework: str, tmp_path: Path) -> None:
    if find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed (`make test-integrations`)")
    name, arguments, told = EXAMPLES[framework]
    write_inter(tmp_path / "walks" / "walks.inter")

    def run(*more: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(ROOT / "python_examples" / name), *more],
            env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    assert "usage: " in run("--help")
    if arguments is not None:  # the others have tests of their own
        assert told in run(*arguments)
