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
from tests.fuzz.draw import REFUSED

NEEDS = {"requests": "fastapi", "readers": "pyarrow"}
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def gradients_as_before() -> Iterator[None]:
    enabled = torch.is_grad_enabled()
    yield
    torch.set_grad_enabled(enabled)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", targets.TARGETS)
def test_kept_inputs(name: str, tmp_path: Path) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"needs {NEEDS[name]}")
    target = targets.make(name, tmp_path)
    rng = random.Random(0)
    for case in targets.corpus(name):
        target(case.read_bytes())
    accepted = Counter(target(rng.randbytes(rng.randrange(8, 100))) for _ in range(150))
    assert 0 < accepted[REFUSED] < 150, accepted


def test_an_option_that_is_none_is_refused() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "states", "--random", "--rnus", "3"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert "unrecognized arguments: --rnus" in run.stderr
