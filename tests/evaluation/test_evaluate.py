from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from recgrela_ext.data.sequences import Sequences, Targets
from recgrela_ext.evaluation import (
    Popularity,
    combine_seeds,
    evaluate,
    format_table,
    write_result,
)

SCHEMA = {
    "model", "variant", "data", "order", "split", "target_sha256", "seeds", "per_seed", "mean",
    "seconds", "machine",
}  # fmt: skip


class NextNumber:
    """Prefers the item after the last one."""

    variant = "counting"

    def __init__(self, n_items: int) -> None:
        self.n_items = n_items

    def score(self, histories: list[np.ndarray]) -> torch.Tensor:
        last = torch.tensor([int(history[-1]) for history in histories])
        return -(torch.arange(self.n_items)[None] - last[:, None] - 1).abs().float()


def log_and_targets() -> tuple[Sequences, Targets]:
    log = Sequences.from_lists([[1, 2, 3], [4, 5, 6], [2, 4, 9]], 12, name="counting")
    return log, Targets.last_of(log)


def test_result_has_the_schema_and_its_numbers() -> None:
    _, targets = log_and_targets()
    result = evaluate(NextNumber(13), targets, k=(1, 5), model_seed=7)
    assert set(result) >= SCHEMA
    # After 4 comes 5: the third target, 9, is no first guess.
    assert result["mean"]["hit@1"] == pytest.approx(2 / 3)
    assert result["mean"]["seen_included/hit@1"] == result["mean"]["hit@1"]
    assert set(result["mean"]) == {
        f"{view}{name}@{k}"
        for view in ("", "seen_included/", "seen_excluded/")
        for name in ("hit", "ndcg", "mrr")
        for k in (1, 5)
    }
    assert result["seeds"] == [7]
    assert result["per_seed"] == [result["mean"]]
    assert result["model"] == "NextNumber"
    assert result["variant"] == "counting"
    assert (result["data"], result["order"], result["split"]) == ("counting", "file", "test")
    assert result["target_sha256"] == targets.target_sha256
    assert (result["targets"], result["users"], result["n_items"]) == (3, 3, 13)
    low, high = result["interval"]["hit@1"]
    assert low <= result["mean"]["hit@1"] <= high


def test_baselines_come_from_the_targets_or_the_training_data() -> None:
    log, targets = log_and_targets()
    assert set(evaluate(NextNumber(13), targets)["baselines"]) == {"Popularity", "Markov"}
    given = evaluate(NextNumber(13), targets, baselines=log)["baselines"]
    # The whole log holds the transitions 2->3 and 5->6 of the targets themselves.
    assert given["Markov"]["hit@5"] == 1.0
    named = evaluate(NextNumber(13), targets, baselines={"mine": Popularity(log)})["baselines"]
    assert list(named) == ["mine"]
    assert evaluate(NextNumber(13), targets, baselines={})["baselines"] == {}


def test_baselines_of_another_catalogue() -> None:
    _, targets = log_and_targets()
    with pytest.raises(ValueError, match="n_items 13, got 4"):
        evaluate(NextNumber(13), targets, baselines=Sequences.from_lists([[1, 2]], 3))


def test_result_is_the_same_twice_but_for_time() -> None:
    _, targets = log_and_targets()
    first, second = (evaluate(NextNumber(13), targets, seed=5) for _ in range(2))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_no_bootstrap_no_interval() -> None:
    _, targets = log_and_targets()
    result = evaluate(NextNumber(13), targets, bootstrap=0)
    assert result["interval"] == {}
    assert "95 %" not in format_table(result)
    with pytest.raises(ValueError, match="bootstrap must be at least 0"):
        evaluate(NextNumber(13), targets, bootstrap=-1)


def test_table_shows_model_baselines_and_both_views() -> None:
    _, targets = log_and_targets()
    result = evaluate(NextNumber(13), targets, k=(1, 5))
    table = format_table(result)
    lines = table.splitlines()
    assert "3 targets among 12 items" in lines[0]
    assert targets.target_sha256[:12] in lines[0]
    for view in ("seen_included", "seen_excluded"):
        at = next(i for i, line in enumerate(lines) if line.startswith(view))
        rows = {line[:14].strip(): line[14:].split() for line in lines[at + 1 : at + 7]}
        expected = [f"{result['mean'][f'{view}/{name}']:.4f}" for name in rows[""]]
        assert rows["NextNumber"] == expected
        assert {"Popularity", "Markov", "95 % from", "95 % to"} < set(rows)
    assert max(map(len, lines)) <= 100


def test_written_result_is_whole_json(tmp_path: Path) -> None:
    _, targets = log_and_targets()
    result = evaluate(NextNumber(13), targets)
    path = tmp_path / "result.json"
    path.write_text("old", encoding="utf-8")
    write_result(result, path)
    assert json.loads(path.read_text(encoding="utf-8")) == result
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(ValueError, match="JSON"):
        write_result({"mean": float("nan")}, path)
    assert path.read_text(encoding="utf-8") == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_seeds_are_combined() -> None:
    _, targets = log_and_targets()
    one = evaluate(NextNumber(13), targets, model_seed=1)
    two = evaluate(NextNumber(13), targets, model_seed=2)
    two["per_seed"] = [dict.fromkeys(two["mean"], 0.0)]
    both = combine_seeds([one, two])
    assert both["seeds"] == [1, 2]
    assert both["mean"]["hit@5"] == pytest.approx(one["mean"]["hit@5"] / 2)
    assert len(both["per_seed"]) == 2
    assert "95 %" not in format_table(both)
    with pytest.raises(ValueError, match="agree on target_sha256"):
        combine_seeds([one, {**two, "target_sha256": "other"}])
    with pytest.raises(ValueError, match="at least one result"):
        combine_seeds([])
