"""The comparison with a framework's own SASRec runs, and goes on where it stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.integrations.torchrun import environment
from tests.integrations.walks import write_inter


def run(stack: str, log: Path, out: Path, *more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.stacks", "--stack", stack,
               "--data", str(log), "--out", str(out), "--epochs", "1", "--lrs", "0.01",
               "--max-len", "8", "--threads", "1", *more]  # fmt: skip
    return subprocess.run(
        command, env=environment(), cwd=out.parent, capture_output=True, text=True, timeout=600
    )


@pytest.mark.parametrize("stack", ["recbole", "rectools", "replay"])
def test_runs_and_goes_on(stack: str, tmp_path: Path) -> None:
    if find_spec(stack) is None:
        pytest.skip(f"{stack} is not installed (`make test-integrations`)")
    log, out = tmp_path / "walks.inter", tmp_path / "result.json"
    write_inter(log)
    done = run(stack, log, out, "--seeds", "0")
    assert done.returncode == 0, done.stderr[-4000:]
    first = json.loads(out.read_text(encoding="utf-8"))
    assert [one["model"] for one in first["runs"]] == ["RecGRELA", "SASRec"]
    for one in first["runs"]:
        assert len(one["epoch_seconds"]) == 1
        assert 0 < one["test"]["seen_included/hit@10"] <= 1
    assert run(stack, log, out, "--seeds", "0").stdout.count("s/epoch") == 0
    assert json.loads(out.read_text(encoding="utf-8")) == first
    timed = run(stack, log, out, "--seeds", "0", "--time")
    assert timed.returncode == 0, timed.stderr[-4000:]
    taken = json.loads(out.read_text(encoding="utf-8"))["seconds_per_epoch"]
    assert taken["clock"] == "process_time"
    assert min(taken["RecGRELA"], taken["SASRec"]) > 0
    other = run(stack, log, out, "--seeds", "0", "--width", "32")
    assert other.returncode == 1
    assert "choose another --out" in other.stderr
