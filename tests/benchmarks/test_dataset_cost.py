"""What large data sets cost: every cell is measured, told and not measured twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import dataset_cost
from benchmarks.__main__ import main
from benchmarks.memory_quality import PUBLISHED

pytestmark = pytest.mark.kernels


def test_cells_of_a_small_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = dataset_cost.Shape(users=1000, items=60, mean=12.0)
    monkeypatch.setattr(dataset_cost, "SETS", {"small": shape})
    monkeypatch.setattr(dataset_cost, "WINDOWS", 1)
    monkeypatch.setattr(dataset_cost, "LENGTH", 10)
    out = tmp_path / "dataset-cost.json"
    assert main(["dataset-cost", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert set(content["cells"]) == {f"small/{name}" for name in dataset_cost.MODELS}
    ours = content["cells"]["small/RecGRELA"]
    assert ours["training"]["seconds"] > 0
    assert ours["serving"]["users"] == 1000 * ours["serving"]["user"]
    window = content["cells"]["small/SASRec, dense logits"]["serving"]
    assert window["user"] == 4 * 12  # ids alone
    cache = content["cells"]["small/SASRec"]["serving"]
    assert cache["user"] == 12 * 4 * 2 * 64 * 4  # keys and values of four layers
    prefixes = content["cells"][f"small/{PUBLISHED}"]["training"]
    assert prefixes["targets"] == dataset_cost.PREFIXES
    before = out.read_bytes()
    assert main(["dataset-cost", "--out", str(out)]) == 0
    assert out.read_bytes() == before

    table = dataset_cost.section(tmp_path)
    assert "| small: 1,000 users, 60 items, 12.0 each | RecGRELA |" in table
    steps = 1000 * 11 / 10
    assert f"| {steps * ours['training']['seconds'] / 3600:,.1f} |" in table
    assert "their quality is not run here." in table
    assert "Tmall: its size is not stated" in table
    assert dataset_cost.section(tmp_path / "none") == ""


def test_what_a_process_dies_of_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_cost, "SETS", {"huge": dataset_cost.Shape(10, 10**8, 12.0)})
    found = dataset_cost._apart("huge", "RecGRELA")
    assert found["training"] == found["serving"] == {"missing": "more than 16 GiB"}
    monkeypatch.setattr(dataset_cost, "build", lambda *_, **__: 1 / 0)
    with pytest.raises(SystemExit, match="division by zero"):
        dataset_cost._apart("huge", "RecGRELA")
