"""The quality queue: what it refuses, what it keeps, and the tests between models."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import (
    feature_ranks,
    model_card,
    quality,
    quality_comparison,
    quality_plots,
    quality_queue,
    quality_run,
    quality_soon,
)
from benchmarks.__main__ import main
from benchmarks.item_knn import ItemKNN
from benchmarks.quality import QUEUES
from benchmarks.quality_queue import read_queue
from benchmarks.quality_tests import holm, paired_difference
from python_examples import rank_analysis
from recgrela_ext import Interactions
from recgrela_ext.evaluation.metrics import ndcg_at_k
from tests.integrations.walks import write_inter

ROOT = Path(__file__).resolve().parents[2]


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
        "defaults": {"train": {"lr": 0.01}, "limits": {"epochs": 1}},
        "runs": [
            {"model": "Markov", "seeds": [0], **few},
            {"model": "ItemKNN", "seeds": [0], **few},
            {"model": "RecGRELA", "label": "ours", "seeds": [0],
             "grid": {"config.dropout": [0.0, 0.2]}, "then_seeds": [1],
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
    assert len(results) == 5
    stamps = [path.stat().st_mtime_ns for path in results]
    assert command(folder) == 0  # nothing is left to do
    assert [path.stat().st_mtime_ns for path in results] == stamps
    lines = (folder / "results" / "log.jsonl").read_text().splitlines()
    events = [json.loads(line)["event"] for line in lines]
    assert events == ["begin", "done"] * 5
    ours = [json.loads(path.read_text()) for path in results if "recgrela" in path.name]
    trials = {one["setting"]: one for one in ours if one["seeds"] == [0]}
    more = next(one for one in ours if one["seeds"] == [1])
    best = max(trials.values(), key=lambda one: one["valid"]["seen_included/ndcg@10"])
    assert more["setting"] == best["setting"]
    assert all(one["curve"][-1]["epoch"] == one["epochs"] == 1 for one in ours)
    assert not any((folder / "work").glob("*/"))  # the checkpoints of finished runs are gone
    ranks = np.load(next(folder.glob("results/*itemknn*.npz")), allow_pickle=False)
    known = json.loads(next(folder.glob("results/*itemknn*.json")).read_text())
    assert ndcg_at_k(ranks["seen_included"], 10).mean() == pytest.approx(
        known["mean"]["seen_included/ndcg@10"]
    )
    capfd.readouterr()
    assert command(folder, "--list") == 0
    assert capfd.readouterr().out.count("to do") == 0
    table = quality_comparison.section(folder, folder / "results")
    assert f"| ours | {more['parameters']:,} | 2/2 | 2 |" in table
    assert "All runs of this table have been made." in table
    assert table.index("| ours") < table.index("| Markov") < table.index("| ItemKNN")


def test_a_table_says_what_is_missing(folder: Path) -> None:
    assert command(folder, "--only", "markov") == 0
    assert quality_comparison.section(folder, folder / "results") == quality_comparison.NONE_YET
    assert command(folder, "--only", "recgrela") == 0
    table = quality_comparison.section(folder, folder / "results")
    assert "1 runs of this table have not been made, none of ItemKNN." in table
    assert "runs unfinished" not in table
    trial = min((folder / "results").glob("*recgrela*-s0.json"), key=valid_ndcg)  # not the chosen
    trial.unlink()
    table = quality_comparison.section(folder, folder / "results")
    assert "| 1/2 |" in table
    assert table.count("| runs unfinished |") == 3  # of the one other row
    assert "| ahead |" not in table


def valid_ndcg(result: Path) -> float:
    return float(json.loads(result.read_text())["valid"]["seen_included/ndcg@10"])


def test_new_targets_have_columns_of_their_own(folder: Path) -> None:
    """Those that are not in their users' histories, where some are; by hand for one model."""
    log = Interactions.from_file(folder / "data" / "walks", order="file", progress=False)
    test = log.leave_one_out()[2]
    queue = json.loads((folder / "queue.json").read_text())
    queue["runs"] = [{**queue["runs"][2], "grid": {}, "then_seeds": []}, queue["runs"][0]]
    (folder / "queue.json").write_text(json.dumps(queue))
    assert command(folder) == 0
    new = np.array([item not in test.history(i) for i, item in enumerate(test.target_items)])
    assert 0 < new.sum() < len(new)
    table = quality_comparison.section(folder, folder / "results")
    assert f"| unseen, {new.sum()} targets not met before | first less this |" in table
    with np.load(next(folder.glob("results/*recgrela*.npz")), allow_pickle=False) as ranks:
        assert (ranks["new"] == new).all()
        mine = ndcg_at_k(ranks["seen_excluded"][new].astype(int), 10).mean()
    with np.load(next(folder.glob("results/*markov*.npz")), allow_pickle=False) as ranks:
        theirs = ndcg_at_k(ranks["seen_excluded"][new].astype(int), 10).mean()
    (row,) = (line for line in table.splitlines() if line.startswith("| ours"))
    assert row.endswith(f"| {mine:.4f} |  |  |  |")
    (row,) = (line for line in table.splitlines() if line.startswith("| Markov"))
    assert f"| {theirs:.4f} | {mine - theirs:+.4f} (" in row


def test_short_trials_and_long_runs_of_the_best(folder: Path) -> None:
    queue = json.loads((folder / "queue.json").read_text())
    queue["runs"] = queue["runs"][2:]
    queue["defaults"] |= {"final_limits": {"epochs": 2}}
    (folder / "queue.json").write_text(json.dumps(queue))
    assert command(folder) == 0
    found = [json.loads(path.read_text()) for path in folder.glob("results/*.json")]
    trials, long = ([one for one in found if one["epochs"] == n] for n in (1, 2))
    assert sorted(one["seeds"] for one in trials) == [[0], [0]]
    assert sorted(one["seeds"] for one in long) == [[0], [1]]
    best = max(trials, key=lambda one: one["valid"]["seen_included/ndcg@10"])
    assert all(one["config"] == best["config"] for one in long)
    assert all(one["setting"] != best["setting"] for one in long)
    (row,) = read_queue(folder / "queue.json").rows
    assert {run.seed: run.setting for run in row.chosen_runs(folder / "results")} == {
        one["seeds"][0]: one["setting"] for one in long
    }


def test_trials_of_another_queue(folder: Path) -> None:
    """The setting is found on one order; the runs of the other have it, and their own limits."""
    queue = json.loads((folder / "queue.json").read_text())
    log = Interactions.from_file(folder / "data" / "walks", order="hash", progress=False)
    queue["targets"]["walks"]["hash"] = log.leave_one_out()[2].target_sha256
    counting, ours = queue["runs"][:2], queue["runs"][2]
    settings = queue | {"table": "settings", "runs": [ours | {"then_seeds": []}]}
    (folder / "settings.json").write_text(json.dumps(settings))
    more = {"order": "hash", "seeds": [0, 1], "limits": {"epochs": 2}}
    mine = {name: ours[name] for name in ("model", "label", "data", "config")}
    mine["config"] = mine["config"] | {"num_heads": 2}
    runs = [run | {"order": "hash"} for run in counting] + [mine | more]
    content = queue | {"settings": "settings.json", "runs": runs}
    (folder / "queue.json").write_text(json.dumps(content))
    assert command(folder) == 0
    found = [json.loads(path.read_text()) for path in folder.glob("results/*recgrela*.json")]
    trials, final = ([one for one in found if one["order"] == o] for o in ("file", "hash"))
    best = max(trials, key=lambda one: one["valid"]["seen_included/ndcg@10"])
    assert len(trials) == 2
    assert sorted(one["seeds"] for one in final) == [[0], [1]]
    assert all(one["config"] == best["config"] | {"num_heads": 2} for one in final)
    assert all(one["epochs"] == 2 for one in final)
    text = quality_comparison.page(folder, folder / "results")
    assert re.search(r"\| ours \| [\d,]+ \| 2/2 \| 2 \|", text)
    assert f"| ours | 2/2 | dropout {best['config']['dropout']} | 1 |" in text
    for change, message in (
        ({"label": "others"}, "have a row of settings.json for run 3"),
        ({"grid": {"train.lr": [0.1]}}, "leave the grid of run 3 to settings.json"),
        ({"final_limits": {"epochs": 3}}, "give the limits of run 3 as limits"),
    ):
        content["runs"] = [*runs[:2], mine | more | change]
        (folder / "queue.json").write_text(json.dumps(content))
        with pytest.raises(SystemExit, match=message):
            read_queue(folder / "queue.json")


def test_counting_models_share_a_table(folder: Path) -> None:
    queue = json.loads((folder / "queue.json").read_text())
    queue["runs"] = queue["runs"][:2]
    (folder / "queue.json").write_text(json.dumps(queue))
    assert command(folder) == 0
    text = quality_comparison.section(folder, folder / "results")
    assert "| Markov | ItemKNN |" in text
    markov = json.loads(next(folder.glob("results/*markov*.json")).read_text())["mean"]
    views = (markov[f"{view}/ndcg@10"] for view in quality_comparison.VIEWS)
    assert "| {:.4f} / {:.4f} |".format(*views) in text


def test_a_screen_shows_validation_alone(folder: Path) -> None:
    queue = json.loads((folder / "queue.json").read_text()) | {"table": "screen", "title": "tries"}
    queue["runs"] = queue["runs"][2:]
    (folder / "queue.json").write_text(json.dumps(queue))
    assert command(folder) == 0
    table = quality_comparison.page(folder, folder / "results")
    found = [json.loads(path.read_text()) for path in folder.glob("results/*-s0.json")]
    mean = np.mean([one["valid"]["seen_excluded/ndcg@10"] for one in found])
    assert "| ours | 2 | 1/1 |" in table
    assert f"| {mean:.4f} |" in table
    test = found[0]["mean"]["seen_included/ndcg@10"]
    assert f"{test:.4f}" not in table.replace(
        f"{found[0]['valid']['seen_included/ndcg@10']:.4f}", ""
    )


def test_a_done_run_once_more(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Also one that only the results of its trials can name; the same seed, the same figures."""
    assert command(folder, "--only", "recgrela") == 0
    more = next(folder.glob("results/*recgrela*-s1.json"))
    capfd.readouterr()
    assert command(folder, "--only", more.stem, "--again", str(folder / "new")) == 0
    again = json.loads((folder / "new" / more.name).read_text())
    assert again["mean"] == json.loads(more.read_text())["mean"]
    value = again["mean"]["seen_included/ndcg@10"]
    told = f"{more.stem}  seen_included/ndcg@10: {value:.4f}, was {value:.4f}"
    assert told in capfd.readouterr().out
    with pytest.raises(SystemExit, match="no run that is done has 'markov' in name or label"):
        command(folder, "--only", "markov", "--again", str(folder / "new"))
    card = model_card.page(folder, folder / "results", "the command")
    assert f"queues/queue.json --data DIR --again NEW --only {more.stem[:-1]}" in card
    assert "| 2 | " in card
    assert "`the command`" in card


def test_curves_of_two_models(folder: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    queue = json.loads((folder / "queue.json").read_text())
    other = {"model": "SASRec", "label": "theirs", "config": {"layers": 1, "inner": 8}}
    queue["runs"].append({**queue["runs"][2], **other, "grid": {}})
    (folder / "queue.json").write_text(json.dumps(queue))
    results = folder / "results"
    assert quality_plots.draw(folder, results, folder) is None
    assert command(folder) == 0
    found = quality_plots.curves(folder, results)
    (rows,) = found.values()
    assert {label: len(lines) for label, lines in rows.items()} == {"ours": 2, "theirs": 2}
    one = json.loads(next(results.glob("*sasrec*-s0.json")).read_text())
    minutes, value = rows["theirs"][0][-1]
    assert minutes == one["curve"][-1]["cpu_seconds"] / 60
    assert value == one["curve"][-1]["seen_included/ndcg@10"]
    picture = quality_plots.draw(folder, results, results)
    assert picture is not None
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"]({picture.name})" in quality_comparison.page(folder, results)


def test_ranks_of_features_stand_in_the_result(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Measured after training, without another name for the run; tables and picture from it."""
    build = quality_run.build
    queue = json.loads((folder / "queue.json").read_text())
    queue["runs"] = [{**queue["runs"][2], "grid": {}, "then_seeds": []}]
    queue["runs"].append({**queue["runs"][0], "model": "Popularity"})
    before = [run.name for row in read_queue_of(folder, queue).rows for run in row.trials]
    queue["defaults"]["rank_users"] = 2
    after = [run.name for row in read_queue_of(folder, queue).rows for run in row.trials]
    assert after == before
    results = folder / "results"
    assert feature_ranks.section(folder, results) == ""
    assert feature_ranks.draw(folder, results, folder) is None
    assert command(folder, "--only", "ours") == 1  # no history of the walks is so long
    assert "users with 200 items, got none" in capfd.readouterr().err
    assert not list((folder / "work").glob("*/*"))  # told before the training

    one = read_queue_of(folder, queue).rows[0].trials[0]
    monkeypatch.setattr(feature_ranks, "LENGTH", 5)
    models = []
    monkeypatch.setattr(quality_run, "build", lambda *_: models.append(build(*_)) or models[-1])
    quality_run.perform(one, folder / "data", folder / "work" / "one", results)
    result = json.loads((results / f"{one.name}.json").read_text())
    ranks = result["feature_ranks"]
    assert (ranks["users"], ranks["length"]) == (2, 5)
    train = Interactions.from_file(folder / "data" / "walks", order="file").leave_one_out()[0]
    (model,) = models
    values = rank_analysis.measure(model, [train.history(i)[-5:] for i in range(2)])
    mean, deviation = (np.array(ranks[name]) for name in ("mean", "deviation"))
    np.testing.assert_allclose(mean, values.mean(0))
    np.testing.assert_allclose(deviation, values.std(0))
    text = feature_ranks.section(folder, results)
    value, width = mean[0, 2, 1], deviation[0, 2, 1]
    assert text.endswith(f"| {value:.1f} ± {width:.1f} |")
    unseen = result["mean"]["seen_excluded/ndcg@10"]
    assert (
        f"| ours | 1 | {result['mean']['seen_included/ndcg@10']:.4f} | {unseen:.4f} | 1 |" in text
    )
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    picture = feature_ranks.draw(folder, results, results)
    assert picture is not None
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert feature_ranks.section(folder, results).endswith(f"]({picture.name})")


def read_queue_of(folder: Path, queue: dict[str, Any]) -> quality_queue.Queue:
    (folder / "queue.json").write_text(json.dumps(queue))
    return read_queue(folder / "queue.json")


def test_how_soon_a_level_is_reached(folder: Path) -> None:
    result = {"epochs": 4, "targets_seen": 4000, "curve": [
        {"epoch": 1, "cpu_seconds": 10.0, "m": 0.1}, {"epoch": 2, "cpu_seconds": 21.0, "m": 0.2},
        {"epoch": 3, "cpu_seconds": 33.0, "m": 0.15}]}  # fmt: skip
    assert quality_soon.reached(result, "m", 0.15) == (2000, 21.0)
    assert quality_soon.reached(result, "m", 0.2) == (2000, 21.0)
    assert quality_soon.reached(result, "m", 0.21) is None

    queue = json.loads((folder / "queue.json").read_text())
    queue |= {"table": "settings", "level": 1e-9, "runs": queue["runs"][2:]}
    queue["defaults"]["train"]["metric"] = "seen_included/ndcg@10"
    (folder / "queues").mkdir()
    for name, level in (("reached", 1e-9), ("never", 1.0)):
        (folder / "queues" / f"{name}.json").write_text(json.dumps({**queue, "level": level}))
    (folder / "queue.json").write_text(json.dumps(queue))
    assert quality_soon.section(folder / "queues", folder / "results") == ""
    assert command(folder) == 0
    cost = {"seconds": 0.5, "targets": 10}
    cells = {"ML-1M/RecGRELA, published": {"training": cost}}
    (folder / "dataset-cost.json").write_text(json.dumps({"cells": cells}))
    never, after = quality_soon.section(folder / "queues", folder / "results").split("\n\n**")
    assert "| ours | not reached |" in never
    result = json.loads(next((folder / "results").glob("*-s1.json")).read_text())
    assert f"| ours | {result['targets_seen']:,} |" in after
    assert "published" not in after  # what a target costs on such data was not measured
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality_soon.dataset_cost, "SETS", {"walks": None})
        (folder / "dataset-cost.json").write_text(
            json.dumps({"cells": {"walks/RecGRELA, published": {"training": cost}}})
        )
        text = quality_soon.section(folder / "queues", folder / "results")
    assert "50 ms of one thread" in text
    assert f"{result['targets_seen'] * 0.05 / 3600:.1f} hours for as many targets" in text


def test_a_run_that_was_killed_goes_on(folder: Path) -> None:
    """SIGKILL to the queue and to its training; the next command ends the same run."""
    queue = json.loads((folder / "queue.json").read_text())
    queue["runs"] = queue["runs"][2:]
    queue["defaults"]["limits"]["epochs"] = 2000
    queue["defaults"]["train"] |= {"targets_per_step": 50, "patience": None}
    queue["runs"][0] |= {"grid": {}, "then_seeds": []}
    (folder / "queue.json").write_text(json.dumps(queue))
    arguments = ["quality", "--queue", str(folder / "queue.json"), "--data", str(folder / "data"),
                 "--work", str(folder / "work"), "--results", str(folder / "results"),
                 "--threads", "1"]  # fmt: skip
    with subprocess.Popen([sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT,
                          start_new_session=True) as process:  # fmt: skip
        wait_for(lambda: any(folder.glob("work/*/step-*")))
        steps = [int(path.name[5:]) for path in folder.glob("work/*/step-*")]
        os.killpg(process.pid, signal.SIGKILL)
    assert max(steps) >= 0
    assert not list(folder.glob("results/*.json"))
    run = read_queue(folder / "queue.json").rows[0].trials[0]
    log = folder / "work" / run.name / "log.jsonl"
    done = log.read_text().count("\n") if log.exists() else 0
    with subprocess.Popen([sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT) as process:
        wait_for(lambda: log.exists() and log.read_text().count("\n") > done)
        assert json.loads(log.read_text().splitlines()[0])["epoch"] == 1
        process.terminate()
        assert process.wait(60) == 143
    lock = quality._claim(folder / "work", run)
    assert lock is not None, "a terminated queue must end its run"
    lock.close()


def test_two_queues_share_the_runs(folder: Path) -> None:
    runs = read_queue(folder / "queue.json").runs(folder / "results")
    (folder / "work").mkdir()
    with quality._claim(folder / "work", runs[0]) as lock:
        assert lock is not None
        assert command(folder, "--only", "markov") == 0  # says that others are at work
        assert not list(folder.glob("results/*.json"))
    assert command(folder, "--only", "markov") == 0
    assert len(list(folder.glob("results/*.json"))) == 1


def test_a_reader_that_leaves(folder: Path) -> None:
    """As in `--list | head`: exit code 1 and no traceback."""
    end, pipe = os.pipe()
    os.close(end)
    arguments = ["quality", "--queue", str(folder / "queue.json"), "--list"]
    with os.fdopen(pipe, "wb") as gone:
        process = subprocess.run([sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT,
                                 stdout=gone, stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    assert "BrokenPipe" not in process.stderr


def wait_for(holds: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


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
        ({"runs": [{"model": "Markov"}]}, "give data, order in run 1"),
        ({"runs": [{"model": "SASRec"}]}, "give data, order, seeds in run 1"),
        ({"runs": [{"model": "x", "data": "d", "order": "o", "seeds": [0]}]}, "targets' sha256"),
        ({"runs": [{"modle": "x"}]}, "known fields in run 1, got modle"),
        ({"targets": None}, "hold targets and runs"),
        ({"runs": [{"model": "GRU4Rec", "data": "d", "order": "o", "seeds": [0], "rank_users": 2}]},
         "ask rank_users of a plain RecGRELA alone, got it in run 1"),
    ],
)  # fmt: skip
def test_bad_queues(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    content = {"targets": {}, "runs": []} | change
    if content["targets"] is None:
        del content["targets"]
    path = tmp_path / "queue.json"
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=message):
        read_queue(path)


@pytest.mark.parametrize("path", sorted(QUEUES.glob("*.json")), ids=lambda path: path.stem)
def test_committed_queues_can_be_read(path: Path) -> None:
    assert {run.data for run in read_queue(path).runs(quality.RESULTS)}


def test_committed_results_belong_to_a_queue_and_hold_no_path() -> None:
    known: set[str] = set()
    for path in QUEUES.glob("*.json"):
        known |= {run.name for run in read_queue(path).runs(quality.RESULTS)}
    found = sorted(quality.RESULTS.glob("*.json"))
    assert found
    for path in found:
        assert path.stem in known
        assert path.with_suffix(".npz").exists()
        result = json.loads(path.read_text())
        assert not any(isinstance(v, str) and v.startswith("/") for v in _leaves(result))


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for one in value.values() for leaf in _leaves(one)]
    return [leaf for one in value for leaf in _leaves(one)] if isinstance(value, list) else [value]


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
