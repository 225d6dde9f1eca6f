"""Every kept input of every fuzz target, and a handful of random ones."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.fuzz import targets

NEEDS = {"requests": "fastapi", "readers": "pyarrow"}


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
    for _ in range(30):
        target(rng.randbytes(rng.randrange(8, 100)))
