"""README's tables of quality: what the queues ask for, as far as their runs are done.

A queue of counting models alone becomes one table with a line per test. A queue with the table
"comparison" becomes a table per test: per row the setting that is best on validation, with all its
seeds, and the difference of the first row of ours less the others. One with the table "screen"
becomes a list of settings and what they reached on validation; no test figure is shown there, so
that none is chosen by it. One with the table "settings" holds trials for other queues, and becomes
a list of what they chose.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality_queue import COUNTING, Queue, Row, Run, read_queue
from benchmarks.quality_tests import ALPHA, TIE, Difference, holm, paired_difference
from recgrela_ext.evaluation.metrics import ndcg_at_k

OURS = "RecGRELA"
VIEWS = ("seen_included", "seen_excluded")
PROTOCOL = f"""\
Every model is trained by `fit` on the same batches and ranked by the same code among all items;
seen items stay in the ranking, or ("unseen") are left out of it, but for the target. The peers are
our own code after the papers (docs/quality.md, Models), none of it compared with its authors'
figures. The setting of a row is the best of its trials on validation (learning rate x dropout, the
same number of targets and the same patience for all), of this table or of the one that its note
names, and is then run with more seeds; where no trials are counted, none were made. ± is the
standard deviation over seeds. A difference is that of the first row less this one: the mean over
users of NDCG@10 averaged over seeds, and its 95 % interval from a bootstrap over users and seeds,
paired by user; of one seed it holds the chance of the users alone. p is Holm-adjusted over the rows
that are done, so it cannot fall below 0.001 times their number. A difference is called a tie below
{TIE}, even if significant, where its interval holds 0, and where p is above {ALPHA}. Rows with
runs still to be made are not judged."""
NONE_YET = "No model has been trained by a quality queue yet."
SCREENS = """\
One change of the recipe at a time, judged on validation; no test figure is shown, so that none is
chosen by it. One seed each: a change is believed after two. Loss is that of the last epoch's
training and is comparable between rows of the same loss alone."""
COMMAND = "python -m benchmarks readme"
CURVES = "curves.png"  # of quality_plots.py
UNFINISHED = "runs unfinished"
NEW = """ In the unseen view a target that its user has met competes only with items he has not met,
so it tells how far a model trusts repeats; the last columns hold the other targets alone."""


class Setting:
    """All seeds of the chosen setting of a row: their results, and NDCG@10 by seed and user."""

    def __init__(self, row: Row, runs: list[Run], results: Path) -> None:
        self.row = row
        self.is_done = all(run.result(results) is not None for run in row.runs(results))
        found = [run.result(results) for run in runs]
        self.results: list[dict[str, Any]] = [result for result in found if result is not None]
        self.model = runs[0].model
        self.names = [run.name for run in runs]
        self.done = len({run.setting for run in row.trials if run.result(results) is not None})
        self.trials = len({run.setting for run in row.trials})
        self.ndcg = {view: [] for view in VIEWS}
        self.new: np.ndarray | None = None  # which targets are, where it is told and not all are
        for run in runs:
            with np.load(results / f"{run.name}.npz", allow_pickle=False) as ranks:
                for view in VIEWS:
                    self.ndcg[view].append(_by_user(ranks, view))
                if "new" in ranks and "user" not in ranks and ranks["new"].any():
                    self.new = ranks["new"]

    @property
    def trained(self) -> bool:
        return self.model not in COUNTING

    def mean(self, metric: str) -> tuple[float, float]:
        """Mean over the seeds, and their standard deviation (0 for one seed)."""
        return _over_seeds([result["mean"][metric] for result in self.results])

    def mean_of(self, view: str, users: np.ndarray) -> tuple[float, float]:
        """The same of NDCG@10 of some users."""
        return _over_seeds([float(values[users].mean()) for values in self.ndcg[view]])


def _over_seeds(values: list[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _by_user(ranks: Any, view: str) -> np.ndarray:
    """NDCG@10 of each user, the mean over the user's targets."""
    values = ndcg_at_k(ranks[view].astype(np.int64), 10)
    if "user" not in ranks:
        return values
    _, index = np.unique(ranks["user"], return_inverse=True)
    sums: np.ndarray = np.bincount(index, values) / np.bincount(index)
    return sums


def settings_of(rows: list[Row], results: Path) -> list[Setting]:
    """Of the rows with a setting that is done."""
    runs = [(row, row.chosen_runs(results)) for row in rows]
    return [Setting(row, done, results) for row, done in runs if done]


def compare(
    ours: Setting, others: list[Setting], view: str, users: np.ndarray | None = None
) -> list[Difference]:
    """Of NDCG@10 of all or of some users, ours less theirs; p corrected over the others."""
    which = slice(None) if users is None else users
    mine = np.stack(ours.ndcg[view])[:, which]
    found = [paired_difference(mine, np.stack(other.ndcg[view])[:, which]) for other in others]
    corrected = holm([one.p for one in found])
    return [dataclasses.replace(one, p=p) for one, p in zip(found, corrected, strict=True)]


def section(queues: Path, results: Path) -> str:
    """Markdown for README: counting models on every test, and comparisons with a trained one."""
    read = [queue for queue in read_queues(queues) if queue.table == "comparison"]
    counted = [part for queue in read if _counts(queue) for part in counting(queue, results)]
    trained = [part for queue in read if not _counts(queue) for part in comparison(queue, results)]
    if not trained:
        return "\n\n".join([*counted, NONE_YET])
    return "\n\n".join([*counted, PROTOCOL, *trained, *_not_run_here(read, results)])


def _not_run_here(queues: list[Queue], results: Path) -> list[str]:
    """A sentence about the tests on which no model was trained."""
    missing = []
    for queue in queues:
        tests = [
            test
            for test, rows in _by_test(queue).items()
            if all(row.model in COUNTING for row in rows if row.chosen_runs(results))
        ]
        if tests and not _counts(queue):
            missing.append(f"{queue.title} ({', '.join(tests)})")
    return [f"Not run here: {'; '.join(missing)}."] if missing else []


def page(queues: Path, results: Path) -> str:
    """The page beside the results: all of README's tables, and the screens."""
    makers = {"screen": screen, "settings": settings}
    screens = [part for queue in read_queues(queues) if queue.table in makers
               for part in makers[queue.table](queue, results)]  # fmt: skip
    parts = [
        "# Results of the quality queues",
        f"Written by `{COMMAND}`.",
        section(queues, results),
    ]
    if (results / CURVES).exists():
        parts.append(f"![NDCG@10 on validation over the processor time of training]({CURVES})")
    if screens:
        parts += ["## Screens", SCREENS, *screens]
    return "\n\n".join(parts) + "\n"


def read_queues(queues: Path) -> list[Queue]:
    return [read_queue(path) for path in sorted(queues.glob("*.json"))]


def _counts(queue: Queue) -> bool:
    return all(row.model in COUNTING for row in queue.rows)


def counting(queue: Queue, results: Path) -> list[str]:
    """One table, a line per test: NDCG@10 of every model, both views."""
    models = list({row.label: None for row in queue.rows})
    lines = []
    for rows in _by_test(queue).values():
        found = {row.label: row.trials[0].result(results) for row in rows}
        if None not in found.values():
            cells = [_where(rows[0].shown, found[rows[0].label])]
            for model in models:
                mean = found[model]["mean"]
                cells.append(" / ".join(f"{mean[f'{view}/ndcg@10']:.4f}" for view in VIEWS))
            lines.append(f"| {' | '.join(cells)} |")
    if not lines:
        return []
    head = [
        f"| NDCG@10, seen items in / out | {' | '.join(models)} |",
        "|---" * (len(models) + 1) + "|",
    ]
    return ["\n".join([f"**{queue.title}**, test targets", "", *head, *lines])]


def comparison(queue: Queue, results: Path) -> list[str]:
    """A table per test, for those with a model that was trained."""
    tables = []
    for rows in _by_test(queue).values():
        done = settings_of(rows, results)
        if any(setting.trained for setting in done):
            tables.append(_table(queue, rows, done, results))
    return tables


def _by_test(queue: Queue) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in queue.rows:
        found.setdefault(row.shown.test, []).append(row)
    return found


def _table(queue: Queue, rows: list[Row], done: list[Setting], results: Path) -> str:
    ours = next((s for s in done if s.model == OURS), None)
    ordered = [s for s in done if s is ours] + [s for s in done if s is not ours]
    head = ["", "parameters", "trials", "seeds"]
    cells = [
        [
            setting.row.label,
            f"{setting.results[0]['parameters']:,}" if setting.trained else "",
            f"{setting.done}/{setting.trials}" if setting.trials > 1 else "",
            str(len(setting.results)),
        ]
        for setting in ordered
    ]
    new = next((setting.new for setting in done if setting.new is not None), None)
    columns = [("NDCG@10", VIEWS[0], None), ("NDCG@10, unseen", VIEWS[1], None)]
    if new is not None:
        columns.append((f"unseen, {new.sum():,} targets not met before", VIEWS[1], new))
    for name, view, users in columns:
        head += [name, "first less this", "", "p"]
        differences = _differences(ours, ordered, view, users)
        for mine, setting, told in zip(cells, ordered, differences, strict=True):
            of_all = users is None
            figure = setting.mean(f"{view}/ndcg@10") if of_all else setting.mean_of(view, users)
            mine += [_figure(*figure, len(setting.results)), *told]
    lines = [f"| {' | '.join(line)} |" for line in [head, *cells]]
    lines.insert(1, "|---" * len(head) + "|")
    heading = _heading(queue, rows[0].shown, done[0].results[0])
    note = queue.note + (NEW if new is not None else "")
    parts = [heading, note.strip(), "\n".join(lines), _not_run(rows, done, results)]
    return "\n\n".join(filter(None, parts))


def _differences(
    ours: Setting | None, rows: list[Setting], view: str, users: np.ndarray | None
) -> list[list[str]]:
    """Difference, verdict and p of every row; empty for ours, and for all without it."""
    told = {id(row): ["", "", ""] for row in rows}
    if ours is None:
        return list(told.values())
    for finished in (True, False):  # apart: p is corrected over the finished alone
        of = [s for s in rows if s is not ours and s.is_done == finished]
        for other, one in zip(of, compare(ours, of, view, users), strict=True):
            cells = [f"{one.value:+.4f} ({one.low:+.4f} to {one.high:+.4f})", UNFINISHED, ""]
            if finished and ours.is_done:
                cells[1:] = one.verdict, f"{one.p:.3f}"
            told[id(other)] = cells
    return list(told.values())


def _heading(queue: Queue, run: Run, result: dict[str, Any]) -> str:
    return f"**{queue.title}**: {_where(run, result)}, sha256 `{result['target_sha256'][:12]}`"


def _where(run: Run, result: dict[str, Any]) -> str:
    """Data, order, split and counts."""
    left_out = ", ".join(f"{n:,} {what.replace('_', ' ')}"
                         for what, n in result["left_out"].items() if n)  # fmt: skip
    return (
        f"{run.data}, order `{run.order}`, "
        + ("leave-one-out" if run.split == "leave_one_out" else "global split by time, 80/10/10")
        + f", {result['targets']:,} targets of {result['users']:,} users among "
        f"{result['n_items'] - 1:,} items" + (f" (left out: {left_out})" if left_out else "")
    )


def _not_run(rows: list[Row], done: list[Setting], results: Path) -> str:
    shown = [setting.row for setting in done]
    missing = [row.label for row in rows if row not in shown]
    runs = {run.name: run for row in rows for run in row.runs(results)}.values()
    left = sum(run.result(results) is None for run in runs)
    more = sum(row.final_count() for row in rows
               if any(run.result(results) is None for run in row.trials))  # fmt: skip
    told = f"{left + more} runs of this table have not been made"
    if missing:
        told += f", none of {', '.join(missing)}"
    return told + "." if left + more else "All runs of this table have been made."


def _figure(mean: float, deviation: float, seeds: int) -> str:
    return f"{mean:.4f} ± {deviation:.4f}" if seeds > 1 else f"{mean:.4f}"


def screen(queue: Queue, results: Path) -> list[str]:
    """One table: settings in the queue's order, each seed's figures averaged; validation alone."""
    lines = []
    for row in queue.rows:
        found = [r for run in row.trials if (r := run.result(results)) is not None]
        if found:
            lines.append([row.label, *_screened(found)])
    names = "seeds | epochs | loss | NDCG@10 | NDCG@10, unseen | processor minutes"
    return _of_validation(queue, results, names, lines)


def settings(queue: Queue, results: Path) -> list[str]:
    """One table: per row the setting its trials chose; validation alone."""
    lines = []
    for row in queue.rows:
        best = row.chosen(results)
        if best is not None:
            found = best.result(results)
            assert found is not None
            done = sum(run.result(results) is not None for run in row.trials)
            values = (name.rpartition(".")[2] + f" {best.value(name)}" for name in row.grid)
            lines.append([row.label, f"{done}/{len(row.trials)}", ", ".join(values),
                          *_screened([found])])  # fmt: skip
    names = ("trials | chosen | seeds | epochs | loss | NDCG@10 | NDCG@10, unseen | "
             "processor minutes")  # fmt: skip
    return _of_validation(queue, results, names, lines)


def _of_validation(queue: Queue, results: Path, names: str, lines: list[list[str]]) -> list[str]:
    """The table, where it has a line."""
    if not lines:
        return []
    run = queue.rows[0].shown
    left = sum(one.result(results) is None for row in queue.rows for one in row.trials)
    heading = f"**{queue.title}**: {run.data}, order `{run.order}`, figures of validation"
    tail = f"{left} runs of this table have not been made." if left else ""
    head = [f"| | {names} |", "|---" * (names.count("|") + 2) + "|"]
    body = [f"| {' | '.join(cells)} |" for cells in lines]
    return ["\n".join([heading, "", *head, *body, *(["", tail] if tail else [])])]


def _screened(found: list[dict[str, Any]]) -> list[str]:
    last = [result["curve"][-1] if result["curve"] else None for result in found]
    losses = [point["loss"] for point in last if point]
    minutes = [result.get("training_cpu_seconds", 0.0) / 60 for result in found]
    return [
        str(len(found)),
        "/".join(str(result.get("epochs", "")) for result in found),
        f"{np.mean(losses):.3f}" if losses else "",
        *(f"{np.mean([r['valid'][f'{view}/ndcg@10'] for r in found]):.4f}" for view in VIEWS),
        f"{np.mean(minutes):.0f}",
    ]
