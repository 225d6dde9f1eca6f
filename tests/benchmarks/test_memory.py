"""`python -m benchmarks memory` runs, resumes, says what cannot be done, and feeds README."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import (
    forgetting,
    memory,
    memory_point,
    memory_quality,
    memory_tables,
    readme,
)
from benchmarks.__main__ import main
from benchmarks.memory_models import CANDIDATES, stored_bytes
from recgrela_ext import RecGRELA
from recgrela_ext.cli import main as cli
from recgrela_ext.data.synthetic import make_synthetic

POINT = {"part": "memory", "kind": "event", "model": "ours", "length": 50, "items": 1000,
         "batch": 1, "round": 0}  # fmt: skip


@pytest.mark.kernels
def test_quick_points_are_measured_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "memory.json"
    command = ["memory", "--quick", "--part", "memory", "--part", "latency", "--out", str(out)]
    assert main(command) == 0
    content = json.loads(out.read_text())
    grid = [p for part in ("memory", "latency") for p in memory.points(part, quick=True)]
    assert list(content["points"]) == [memory.name_of(p) for p in grid]
    for stored in content["points"].values():
        found = stored["found"]
        assert "missing" not in found
        if stored["point"]["part"] == "latency":
            assert 0 < found["p10"] <= found["seconds"] <= found["p90"]
        else:
            assert found["peak"] >= 0
    assert content["machine"]["torch"] == torch.__version__
    dense, ours = (content["points"][f"memory/loss/{m}/L0/items1000/batch64"]["found"]["peak"]
                   for m in ("dense", "ours"))  # fmt: skip
    assert dense > 0
    assert ours > 0

    def unexpected(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(memory, "_measure", unexpected)
    assert main(command) == 0  # everything is there already
    monkeypatch.setattr(memory, "source_key", lambda: "another build")
    with pytest.raises(AssertionError, match="measured again"):
        main(command)


def results(tmp_path: Path) -> memory.Results:
    return memory.Results(tmp_path / "memory.json", quick=True)


def test_a_point_over_the_time_limit_says_so_and_so_do_longer_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forever(point: memory.Point) -> None:
        while True:
            pass

    monkeypatch.setattr(memory, "LIMIT_SECONDS", {"memory": 1})
    monkeypatch.setitem(memory_point.KINDS, "event", forever)
    found = results(tmp_path)
    longer, other = {**POINT, "length": 500}, {**POINT, "model": "gru4rec", "length": 500}
    memory.measure([POINT], found, None)
    assert found.content["points"][memory.name_of(POINT)]["found"] == {"missing": "more than 1 s"}
    assert found.shorter_failed(longer) == {"missing": "more than 1 s"}
    assert found.shorter_failed(other) is None


def test_a_point_over_the_memory_limit_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "LIMIT_BYTES", 4 << 30)
    monkeypatch.setitem(memory_point.KINDS, "event", lambda point: torch.ones(5 << 30))
    assert memory._measure(POINT, {}) == {"missing": "more than 4 GiB of memory"}


def test_a_point_that_fails_ends_the_run_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(memory_point.KINDS, "event", lambda point: 1 / 0)
    with pytest.raises(SystemExit, match=r"(?s)memory/event/ours.*ZeroDivisionError"):
        memory._measure(POINT, {})


def test_peaks_are_those_of_the_work() -> None:
    peak = memory_point.grown(lambda: torch.ones(25 << 20))
    assert 100 << 20 <= peak < 120 << 20


def test_a_run_ends_in_time_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_measure", lambda *_: time.sleep(0.05) or {"peak": 1})
    grid = list(memory.points("memory"))[:5]
    found = results(tmp_path)
    memory.measure(grid, found, 0.01)
    assert 1 <= len(found.content["points"]) < 5
    memory.measure(grid, results(tmp_path), None)
    assert len(results(tmp_path).content["points"]) == 5


def test_names_of_points_are_distinct() -> None:
    for part in ("memory", "latency"):
        names = [memory.name_of(p) for p in memory.points(part)]
        assert len(set(names)) == len(names)


@torch.no_grad()
@pytest.mark.parametrize("name", ["ours", "ours-float16", "ours-int8"])
def test_what_ours_keeps_is_counted(name: str) -> None:
    expected = {"ours": 20_744, "ours-float16": 10_504, "ours-int8": 5_896}[name]
    assert stored_bytes(CANDIDATES[name], 10**6) == {"ids": 0, "state": expected}
    assert stored_bytes(CANDIDATES["sasrec-cache"], 1000) == {"ids": 0, "state": 2048 * 1000}
    assert stored_bytes(CANDIDATES["sasrec-window"], 1000) == {"ids": 800, "state": 0}


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A work folder with every model after an epoch on a small made-up log."""
    train, valid, test = make_synthetic(30, 120, mean_length=12)[0].leave_one_out()
    data = argparse.Namespace(train=train, valid=valid, test=test)
    monkeypatch.setattr(memory_quality, "Data", lambda: data)
    monkeypatch.setattr(forgetting, "Data", lambda: data)
    monkeypatch.setattr(memory_quality, "EPOCHS", 1)
    monkeypatch.setattr(memory_quality, "RATES", (3e-3, 1e-3))
    monkeypatch.setattr(memory_quality, "SEEDS", (0, 1))
    little = {"fit": {"steps": 1}, "rates": (1e-3,), "seeds": (0,)}
    little["config"] = {"targets_per_step": 4}
    monkeypatch.setattr(memory_quality, "LIMITS", {memory_quality.PUBLISHED: little})
    return tmp_path / "work"


def test_models_are_trained_once_and_their_quality_is_collected(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    models = (memory_quality.OURS, "SASRec", memory_quality.PUBLISHED)
    memory_quality.train(trained, models, told.append)
    assert len(told) == len(set(told)) == 2 * 3 + 1  # two rates and another seed; the published one
    memory_quality.train(trained, models, told.append)
    assert len(told) == 2 * 3 + 1
    found = memory.quality(trained)
    assert found["Mamba"] == {"missing": "not trained"}
    ours = found[memory_quality.OURS]
    assert ours["seeds"] == [0, 1]
    assert ours["valid_by_rate"].keys() == {"0.003", "0.001"}
    for run in ours["per_seed"]:
        for form in memory_quality.FORMATS:  # histories are shorter than the window
            served = run["served"][form][memory_quality.METRICS[0]]
            assert served == pytest.approx(run["test"][memory_quality.METRICS[0]], abs=0.05)
    assert found[memory_quality.PUBLISHED]["per_seed"][0]["steps"] == 1
    monkeypatch.setattr(forgetting, "HEAVY", (8,))
    monkeypatch.setattr(forgetting, "WINDOWS", (3, 1000))
    curve = forgetting.measure(trained)["groups"][0]
    assert curve["targets"] > 0
    short, whole = curve["windows"]
    assert whole["minus_all"] == 0  # nothing was forgotten
    assert short["interval"][0] <= short["minus_all"] <= short["interval"][1]


def test_heavy_users_of_saved_models(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [f"{u},{rng.integers(0, 40)},{t}" for u in range(30) for t in range(8 + u)]
    log = tmp_path / "log.csv"
    log.write_text("\n".join(["user,item,timestamp", *rows]) + "\n")
    models = []
    for seed in ("0", "1"):
        models += ["--model", str(tmp_path / seed)]
        options = ["--hidden-size", "8", "--num-layers", "1", "--num-heads", "1", "--steps", "30",
                    "--lr", "0.03", "--no-repeat-bias"]  # fmt: skip
        assert (
            cli(["train", "--data", str(log), "--out", models[-1], "--seed", seed, *options]) == 0
        )
    out = tmp_path / "heavy-users.json"
    limits = ["--more-than", "20", "--last", "5", "1000", "--out", str(out)]
    assert main(["heavy-users", *models, *limits]) == 0
    found = json.loads(out.read_text())
    assert found["seeds"] == [0, 1]
    group = found["groups"][0]
    assert (group["users"], group["targets"]) == (16, 31)  # the shortest has one such history
    few, everything = group["windows"]
    assert everything["minus_all"] == 0
    assert few["minus_all"] != 0
    assert "16 users with more than 20 items" in memory_tables.forgetting(found)


def test_differences_are_means_over_all_targets() -> None:
    found = forgetting._difference(np.array([1.0, 0.0, 0.5]), np.array([7, 7, 9]))
    assert found["minus_all"] == 0.5
    assert found["interval"] == [0.5, 0.5]  # both users have this mean


def some_content() -> dict[str, Any]:
    points = {}
    for point in [*memory.points("memory"), *memory.points("latency")]:
        seconds = 1e-3 * (1 + point["round"]) * (0.1 if point["model"].startswith("ours") else 1)
        timing = {"seconds": seconds, "p10": seconds / 2, "p90": seconds * 2, "users": 128}
        size = {"peak": 10_000_000 if point["model"] == "dense" else 500_000, "ids": 0,
                "state": 5896, "table": 68}  # fmt: skip
        found = timing if point["part"] == "latency" else size
        if point["model"] == "mamba":
            found = {"missing": "not installed"}
        date = "2026-01-02 03:04 UTC"
        points[memory.name_of(point)] = {"point": point, "found": found, "date": date}
    run = {"test": dict.fromkeys(memory_quality.METRICS, 0.05)}
    run["served"] = dict.fromkeys(memory_quality.FORMATS, run["test"])  # type: ignore[assignment]
    return {
        "machine": {"processor": "a processor", "torch": "2.13.0", "build": {"cpu_level": "avx2"}},
        "points": points,
        "quality": {"RecGRELA": {"seeds": [0, 1], "per_seed": [run, run]}},
        "forgetting": {},
    }


def test_tables_and_targets(tmp_path: Path) -> None:
    (tmp_path / "memory.json").write_text(json.dumps(some_content()))
    text = memory_tables.section(tmp_path)
    # three processes of 1, 2 and 3 ms: the median
    assert "avx2 kernels, torch 2.13.0, float32, measured 2026-01-02 (" in text
    assert "| SASRec, KV cache | 410 KB | 2.05 GB | 500 KB | 500 KB | 2 ms | 2 ms |" in text
    assert "| Mamba (mambapy), step |" in text
    assert "not installed" in text
    assert "0.0500 (0.0500 to 0.0500)" in text
    assert "| event, 200 items: SASRec reading 200 over ours | ≥ 10 | 10 | met |" in text
    assert "| event, 2,000 items: SASRec reading all over ours | ≥ 100 | 10 | **not met** |" in text
    assert "of dense cross-entropy | ≤ 0.1 | 0.05 | met |" in text
    assert memory_tables.section(tmp_path / "nothing") == memory_tables.NOT_YET


def test_sizes() -> None:
    told = [memory_tables.size(n) for n in (5896, 20_744, 2_097_152, 3.2e10)]
    assert told == ["5,896 B", "20.7 KB", "2.1 MB", "32 GB"]


def test_plots_are_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "memory.json").write_text(json.dumps(some_content()))
    assert main(["plots", "--results", str(tmp_path)]) == 0
    for name in ("memory-history.png", "memory-load.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match=r"holds no memory\.json"):
        main(["plots", "--results", str(tmp_path / "nothing")])


def test_readme_is_written_from_the_results() -> None:
    """What is committed there is what the committed results say."""
    text = (readme.ROOT / "README.md").read_text(encoding="utf-8")
    for text_of in readme.SECTIONS.values():
        assert text_of(readme.RESULTS) in text, f"run {readme.COMMAND}"


def test_served_states_see_the_whole_history() -> None:
    model = RecGRELA.for_data(make_synthetic(9, 120, mean_length=8)[0].leave_one_out()[0]).eval()
    histories = [np.arange(1, 15), np.array([3, 4])]
    scores, rounded = (memory_quality.Served(model, form).score(histories)
                       for form in ("float32", "bfloat16"))  # fmt: skip
    assert not torch.equal(scores, rounded)  # the state did rest
    torch.testing.assert_close(scores, rounded, rtol=0.05, atol=0.01)
    with torch.no_grad():
        for row, history in zip(scores, histories, strict=True):
            expected = model.scores(model(torch.from_numpy(history)[None]))[0]
            torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)
