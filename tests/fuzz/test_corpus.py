"""Every kept input of every fuzz target, and random ones, of which it must accept some."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.fuzz import targets
from tests.fuzz.crashes import watch
from tests.fuzz.draw import REFUSED
from tests.trust import records

NEEDS = {"requests": "fastapi", "readers": "pyarrow", "frames": "pyarrow"}
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def gradients_as_before() -> Iterator[None]:
    enabled = torch.is_grad_enabled()
    yield
    torch.set_grad_enabled(enabled)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.kernels) if x == "operators" else x
             for x in targets.TARGETS]
)  # fmt: skip
def test_kept_inputs(name: str, tmp_path: Path) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"needs {NEEDS[name]}")
    target = targets.make(name, tmp_path)
    rng = random.Random(0)
    for case in targets.corpus(name):
        target(case)
    accepted = Counter(target(rng.randbytes(rng.randrange(8, 100))) for _ in range(150))
    assert 0 < accepted[REFUSED] < 150, accepted


def test_an_option_that_is_none_is_refused() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "states", "--random", "--rnus", "3"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert "unrecognized arguments: --rnus" in run.stderr


CRASHES = """
import os, signal, sys
from pathlib import Path
from tests.fuzz.crashes import PLACE, LastInput
last = LastInput(Path(os.environ[PLACE]))
last.begin(b"fine")
last.end()
if sys.argv[1] != "0":
    last.begin(b"bad input")
    if sys.argv[1] == "72":
        sys.exit(72)
    os.kill(os.getpid(), int(sys.argv[1]))
"""


@pytest.mark.parametrize(
    ("number", "found"), [(11, True), (9, True), (2, False), (72, False), (0, False)]
)
def test_a_crash_is_a_finding(
    number: int, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGSEGV and SIGKILL inside an input; not Ctrl-C, also as libFuzzer does it, nor the end."""
    monkeypatch.setattr(targets, "CORPUS", tmp_path / "corpus")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    out = tmp_path / "record.json"
    records.write(out, {"findings": [], "runs_since_a_finding": 7})
    for _ in range(2):  # found again, it counts once
        code = watch([sys.executable, "-c", CRASHES, str(number)], "states", out)
    kept = targets.corpus("states")
    assert kept == ([b"bad input"] if found else [])
    assert (code == 1) == found
    record = records.read(out)
    assert len(record["findings"]) == found
    assert record["runs_since_a_finding"] == (0 if found else 7)


def test_what_was_grown_is_kept_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "CORPUS", tmp_path)
    assert targets.keep_grown("states", [b"\x00b", b"a", b""]) == 2
    assert targets.keep_grown("states", [b"a", b"c"]) == 1
    assert targets.corpus("states") == [b"a", b"c", b"\x00b"]
