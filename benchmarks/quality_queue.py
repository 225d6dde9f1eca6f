"""What a queue of quality runs holds: rows of tables, their trials, and what is left to run.

A queue (benchmarks/queues/*.json) is

    {"title": str, "table": "comparison" | "screen" | "settings", "note": str,
     "level": float, "targets": {data: {order: sha256}}, "defaults": {...}, "runs": [{...}, ...]}

and each of its runs, over the defaults, has the fields of `FIELDS`. `grid` maps names such as
"train.lr" or "config.dropout" to the values to try, all with all, each with every one of `seeds`;
the setting that is best on validation, by the metric the training is selected by, is then run with
`then_seeds` too. With `final_limits` the trials are short ones, under `limits`, and the setting
chosen by them is run with all seeds under `final_limits`; the table shows these runs. With
"settings": "other.json" beside `defaults` the trials are those of the other queue's rows of the
same labels, perhaps on another order, and this queue's runs add what they chose to their own
`config` and `train`. Models that only count have no grid and one seed, and take nothing but their
own `config`. A global split by time has its targets under the order's name and "-time"; null stands
for whatever targets the user's own copy of the data has. With `level` a table says how soon each
row reaches it on validation. With `rank_users` a run of ours also measures the ranks of its
features over so many users (feature_ranks.py).
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

COUNTING = ("Popularity", "Markov", "ItemKNN")
FIELDS = {"label", "model", "data", "order", "split", "config", "train", "limits", "grid", "seeds",
          "then_seeds", "final_limits", "rank_users"}  # fmt: skip
SPLITS = ("leave_one_out", "time")
TABLES = ("comparison", "screen", "settings")
NAMELESS = ("seed", "label", "rank_users")  # decide no figure of a setting


@dataclass(frozen=True)
class Run:
    """One model, trained once. `config`: the model's; `train`: TrainConfig's; `limits`: fit's."""

    model: str
    data: str
    order: str
    split: str
    seed: int
    config: dict[str, Any]
    train: dict[str, Any]
    limits: dict[str, Any]
    target_sha256: str  # empty: any
    label: str = ""
    rank_users: int = 0  # over how many the ranks of its features are measured (feature_ranks.py)

    @property
    def setting(self) -> str:
        """What all seeds of this run share, as eight digits."""
        decisive = {k: v for k, v in asdict(self).items() if k not in NAMELESS}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def test(self) -> str:
        """Which targets: data and order, and "time" for a global split."""
        return f"{self.data}-{self.order}" + ("-time" if self.split == "time" else "")

    @property
    def name(self) -> str:
        return f"{self.test}-{self.model.lower()}-{self.setting}-s{self.seed}"

    def value(self, name: str) -> Any:
        """Of a field such as train.lr."""
        part, _, field = name.partition(".")
        return getattr(self, part)[field]

    def result(self, results: Path) -> dict[str, Any] | None:
        """What came of it; None when it has not been run."""
        path = results / f"{self.name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


@dataclass(frozen=True)
class Row:
    """One row of a table: its trials (settings x seeds), and what the best of them is run as."""

    label: str
    trials: list[Run]
    grid: tuple[str, ...]  # what differs between the trials, such as train.lr
    then_seeds: list[int]
    final: list[Run] | None = None  # a run per seed, before the chosen setting is filled in

    @property
    def shown(self) -> Run:
        """One of the runs that the table is about, perhaps without its setting."""
        return (self.final or self.trials)[0]

    @property
    def model(self) -> str:
        return self.trials[0].model

    @property
    def metric(self) -> str:
        """What a setting is chosen by, on validation."""
        metric = str(self.trials[0].train.get("metric", "seen_included/ndcg@10"))
        return metric if "/" in metric else f"seen_included/{metric}"

    def chosen(self, results: Path) -> Run | None:
        """The setting with the best mean over its seeds, among those with all seeds; None so far.

        Only the trials' own seeds count, so that more seeds do not change the choice.
        """
        found: dict[str, list[float]] = {}
        for run in self.trials:
            result = run.result(results)
            found.setdefault(run.setting, [])
            found[run.setting].append(float("nan") if result is None else self._valid(result))
        means = {setting: sum(values) / len(values) for setting, values in found.items()}
        done = {setting: mean for setting, mean in means.items() if mean == mean}
        if not done:
            return None
        best = max(done, key=lambda setting: done[setting])
        return next(run for run in self.trials if run.setting == best)

    def _valid(self, result: dict[str, Any]) -> float:
        return float(result["valid"][self.metric])

    def runs(self, results: Path) -> Iterator[Run]:
        """The trials; after the last of them is done, the final runs of the chosen setting."""
        yield from self.trials
        yield from self._final_runs(results)

    def chosen_runs(self, results: Path) -> list[Run]:
        """Of the chosen setting, every run that is done and that the table is about."""
        best = self.chosen(results)
        if best is None:
            return []
        mine = [] if self.final else [t for t in self.trials if t.setting == best.setting]
        mine += self._final_runs(results)
        return [run for run in mine if run.result(results) is not None]

    def final_count(self) -> int:
        """How many runs follow the trials."""
        return len(self.final or self.then_seeds)

    def _final_runs(self, results: Path) -> list[Run]:
        """None before all trials are done."""
        if any(run.result(results) is None for run in self.trials):
            return []
        best = self.chosen(results)
        assert best is not None
        if not self.final:
            return [replace(best, seed=seed) for seed in self.then_seeds]
        return [_with_fields_of(best, run, self.grid) for run in self.final]


def _with_fields_of(best: Run, run: Run, names: tuple[str, ...]) -> Run:
    """`run` with what `best` has in these fields."""
    changed: dict[str, dict[str, Any]] = {}
    for name in names:
        part, _, field = name.partition(".")
        changed.setdefault(part, dict(getattr(run, part)))[field] = best.value(name)
    return replace(run, **changed)


@dataclass(frozen=True)
class Queue:
    """The rows of one table per test, in their order."""

    name: str  # of its file
    title: str
    table: str
    rows: list[Row]
    note: str = ""
    level: float | None = None  # of NDCG@10 on validation

    def runs(self, results: Path) -> list[Run]:
        """Every run that can be named now, once: first all trials, then the other seeds."""
        trials = [run for row in self.rows for run in row.trials]
        more = [run for row in self.rows for run in row.runs(results)]
        return list({run.name: run for run in trials + more}.values())


def read_queue(path: Path) -> Queue:
    """The queue in a file; SystemExit, one line, for one that cannot work."""

    def need(holds: bool, what: str) -> None:
        if not holds:
            raise SystemExit(f"quality: {path} must {what}")

    try:
        queue = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"quality: {path} must be a queue in JSON, got {error}") from None
    need(isinstance(queue, dict) and {"targets", "runs"} <= queue.keys(), "hold targets and runs")
    table = queue.get("table", "comparison")
    need(table in TABLES, f"have a table out of {', '.join(TABLES)}, got {table}")
    settings: dict[str, Row] = {}
    if "settings" in queue:
        settings = {row.label: row for row in read_queue(path.parent / queue["settings"]).rows}
    rows = []
    for number, given in enumerate(queue["runs"], start=1):
        entry = _merged(queue.get("defaults", {}), given)
        if given.get("model") in COUNTING:  # what is shared by the trained models is not for them
            entry |= {"config": given.get("config", {}), "train": {}, "limits": {}, "grid": {},
                      "seeds": [0], "then_seeds": [], "final_limits": None,
                      "rank_users": 0}  # fmt: skip
        unknown = entry.keys() - FIELDS
        need(not unknown, f"name known fields in run {number}, got {', '.join(sorted(unknown))}")
        missing = {"model", "data", "order", "seeds"} - entry.keys()
        need(not missing, f"give {', '.join(sorted(missing))} in run {number}")
        split = entry.get("split", "leave_one_out")
        need(split in SPLITS, f"name a split out of {', '.join(SPLITS)} in run {number}")
        order = entry["order"] + ("-time" if split == "time" else "")
        if entry.get("rank_users"):
            ours = entry["model"] == "RecGRELA" and not entry["config"].get("repeat_bias")
            need(ours, f"ask rank_users of a plain RecGRELA alone, got it in run {number}")
        known = queue["targets"].get(entry["data"], {})
        need(order in known, f"give the targets' sha256 of {entry['data']}, order {order}")
        sha256 = known[order] or ""
        for name in entry.get("grid", {}):
            part, _, field = name.partition(".")
            need(part in ("config", "train", "limits") and field, f"vary config.x, got {name}")
        row = _row(entry, split, sha256)
        if settings and row.model not in COUNTING:
            source = queue["settings"]
            need(row.label in settings, f"have a row of {source} for run {number}")
            need(not entry.get("grid"), f"leave the grid of run {number} to {source}")
            need(not entry.get("final_limits"), f"give the limits of run {number} as limits")
            seeds = [*entry["seeds"], *row.then_seeds]
            final = [replace(row.shown, seed=seed) for seed in seeds]
            row = replace(settings[row.label], then_seeds=[], final=final)
        rows.append(row)
    names = [run.name for row in rows for run in row.trials]
    need(len(set(names)) == len(names), "hold no run twice")
    title, note, level = queue.get("title", path.stem), queue.get("note", ""), queue.get("level")
    need(level is None or isinstance(level, float), f"have a level between 0 and 1, got {level}")
    return Queue(path.stem, title, table, rows, note, level)


def _merged(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given` over `defaults`; config, train and limits field by field."""
    both = {**defaults, **given}
    for part in ("config", "train", "limits"):
        both[part] = {**defaults.get(part, {}), **given.get(part, {})}
    return both


def _row(entry: dict[str, Any], split: str, sha256: str) -> Row:
    model, grid = entry["model"], entry.get("grid", {})
    label = entry.get("label", model)
    trials = []
    for values in itertools.product(*grid.values()):
        chosen = {part: dict(entry[part]) for part in ("config", "train", "limits")}
        for name, value in zip(grid, values, strict=True):
            part, _, field = name.partition(".")
            chosen[part][field] = value
        for seed in entry["seeds"]:
            trials.append(
                Run(model, entry["data"], entry["order"], split, seed, **chosen,
                    target_sha256=sha256, label=label, rank_users=entry.get("rank_users", 0))
            )  # fmt: skip
    then_seeds, final = entry.get("then_seeds", []), None
    if entry.get("final_limits"):
        long = replace(trials[0], limits=entry["final_limits"])
        final = [replace(long, seed=seed) for seed in [*entry["seeds"], *then_seeds]]
    return Row(label, trials, tuple(grid), then_seeds, final)
