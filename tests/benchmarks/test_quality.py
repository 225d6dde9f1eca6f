"""The quality queue: what it refuses, what it keeps, and the tests between models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import quality_comparison
from benchmarks.__main__ import main
from benchmarks.item_knn import ItemKNN
from benchmarks.quality import QUEUE, read_queue
from benchmarks.quality_tests import holm, paired_difference
from recgrela_ext import Interactions
from tests.integrations.walks import write_inter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small log under tmp_path/data/walks, and a queue of three models of it."""
    (tmp_path / "data" / "walks").mkdir(parents=True)
    write_inter(tmp_path / "data" / "walks" / "walks.inter")
    log = Interactions.from_file(tmp_path / "data" / "walks", order="file", progress=False)
    sha256 = log.leave_one_out()[2].target_sha256
    few = {"data": "walks", "order": "file"}
    queue = {
        "targets": {"walks": {"file": sha256}},
        "recipe": {"lr": 0.01},
        "limits": {"epochs": 1},
        "runs": [
            {"model": "Markov", "seeds": [0], **few},
            {"model": "ItemKNN", "seeds": [0], **few},
            {"model": "RecGRELA", "label": "ours", "seeds": [0, 1],
             "config": {"hidden_size": 8, "num_layers": 1, "num_heads": 1}, **few},
        ],
    }  # fmt: skip
    (tmp_path / "queue.json").write_text(json.dumps(queue))
    return tmp_path


def command(folder: Path, *more: str) -> int:
    return main(["quality", "--queue", str(folder / "queue.json"), "--data", str(folder / "data"),
                 "--work", str(folder / "work"), "--results", str(folder / "results"),
                 "--threads", "1", *more])  # fmt: skip


def test_queue_runs_and_goes_on(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command(folder, "--only", "markov") == 0
    assert len(list((folder / "results").glob("*.json"))) == 1
    assert command(folder) == 0
    results = sorted((folder / "results").glob("*.json"))
    assert len(results) == 4
    stamps = [path.stat().st_mtime_ns for path in results]
    assert command(folder) == 0  # nothing is left to do
    assert [path.stat().st_mtime_ns for path in results] == stamps
    lines = (folder / "results" / "log.jsonl").read_text().splitlines()
    events = [json.loads(line)["event"] for line in lines]
    assert events == ["begin", "done"] * 4
    ours = [json.loads(path.read_text()) for path in results if "recgrela" in path.name]
    assert [one["seeds"] for one in ours] == [[0], [1]]
    assert ours[0]["setting"] == ours[1]["setting"]
    with np.load(results[0].with_suffix(".npz"), allow_pickle=False) as ranks:
        assert len(ranks["user"]) == ours[0]["targets"]
    capfd.readouterr()
    assert command(folder, "--list") == 0
    assert capfd.readouterr().out.count("done ") == 4
    table = quality_comparison.section(folder / "results")
    assert "| ours | 2 |" in table
    assert table.index("| ours") < table.index("| ItemKNN") < table.index("| Markov")


def test_other_targets_are_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    queue = json.loads((folder / "queue.json").read_text())
    queue["targets"]["walks"]["file"] = "0" * 64
    queue["runs"] = queue["runs"][:1]
    (folder / "queue.json").write_text(json.dumps(queue))
    assert command(folder) == 1
    assert "its figures are of another test" in capfd.readouterr().err
    assert list((folder / "results").glob("*.json")) == []
    assert json.loads((folder / "results/log.jsonl").read_text().splitlines()[-1])["code"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": [{"model": "Markov"}]}, "give data, order, seeds in run 1"),
        ({"runs": [{"model": "x", "data": "d", "order": "o", "seeds": [0]}]}, "targets' sha256"),
        ({"runs": [{"modle": "x"}]}, "known fields in run 1, got modle"),
        ({"targets": None}, "hold targets and runs"),
    ],
)
def test_bad_queues(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    content = {"targets": {}, "runs": []} | change
    if content["targets"] is None:
        del content["targets"]
    path = tmp_path / "queue.json"
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=message):
        read_queue(path)


def test_committed_queue_can_be_read() -> None:
    assert {run.data for run in read_queue(QUEUE)} == {"ml-1m"}


def test_paired_difference() -> None:
    rng = np.random.default_rng(0)
    users = rng.random(500)
    better = paired_difference(np.stack([users + 0.05, users + 0.07]), users[None])
    assert better.value == pytest.approx(0.06)
    assert better.low > 0.049
    assert better.verdict == "ahead"
    assert better.p < 0.01
    noise = rng.normal(scale=0.1, size=(2, 500))
    same = paired_difference(users + noise[:1], users + noise[1:])
    assert same.low < 0 < same.high
    assert same.verdict == "tie"
    with pytest.raises(ValueError, match="of the same users"):
        paired_difference(np.zeros((1, 3)), np.zeros((1, 4)))


def test_interval_covers_the_truth() -> None:
    """Of 100 samples of a known difference, about 95 intervals hold it."""
    rng = np.random.default_rng(1)
    held = 0
    for trial in range(100):
        values = rng.normal(size=(2, 1, 100))
        found = paired_difference(values[0] + 0.3, values[1], samples=400, seed=trial)
        held += found.low <= 0.3 <= found.high
    assert 88 <= held <= 99


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_item_knn_by_hand(folder: Path) -> None:
    log = Interactions.from_file(folder / "data" / "walks", order="file", progress=False)
    train, _, _ = log.leave_one_out()
    model = ItemKNN(train, neighbours=3, shrink=2.0, last=2)
    having = [{int(i) for i in train.history(user)} for user in range(len(train))]

    def similarity(a: int, b: int) -> float:
        users = [sum(item in one for one in having) for item in (a, b)]
        both = sum(a in one and b in one for one in having)
        return 0.0 if a == b else both / ((users[0] * users[1]) ** 0.5 + 2.0)

    history = train.history(0)
    found = model.score([history])[0]
    expected = torch.zeros(train.n_items)
    for item in history[-2:].tolist():
        row = torch.tensor([similarity(item, other) for other in range(train.n_items)])
        kept = row.topk(3)
        # the third and the fourth may be equal; then either may be kept
        assert model.similar[item].count_nonzero() <= 3
        assert torch.allclose(model.similar[item].topk(3).values, kept.values)
        expected += model.similar[item]
    assert torch.allclose(found, expected, atol=1e-5)
    with pytest.raises(ValueError, match="neighbours must be at least 1"):
        ItemKNN(train, neighbours=0)
