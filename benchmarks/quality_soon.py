"""How soon a model gets there: targets and processor time until a level of NDCG@10 on validation.

A queue with `level` becomes a table: per row its chosen setting and the first epoch that reaches
the level. Below it stands the published training, which learns one target from a prefix: what it
takes for as many targets as ours took, at the cost of a target that dataset_cost.py measured for
data of this size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import dataset_cost
from benchmarks.memory_quality import PUBLISHED
from benchmarks.quality_comparison import OURS, read_queues
from benchmarks.quality_queue import Queue, Row


def section(queues: Path, results: Path) -> str:
    """Markdown: a table for each queue with a level; empty where nothing got there."""
    found = (_table(queue, results) for queue in read_queues(queues) if queue.level is not None)
    return "\n\n".join(filter(None, found))


def reached(result: dict[str, Any], metric: str, level: float) -> tuple[int, float] | None:
    """Targets seen and processor seconds when `metric` first was `level` or more; None if never."""
    for point in result["curve"]:
        if point[metric] >= level:
            share = point["epoch"] / result["epochs"]
            return round(share * result["targets_seen"]), point["cpu_seconds"]
    return None


def _table(queue: Queue, results: Path) -> str:
    assert queue.level is not None
    lines, ours, run = [], None, queue.rows[0].shown
    for row in queue.rows:
        found, told = _of_row(row, results, queue.level)
        if told:
            lines.append(f"| {row.label} | {told} |")
        if row.model == OURS and found is not None:
            ours = ours or found
    if not lines:
        return ""
    head = [
        f"**How soon {queue.level} is reached**: {run.data}, order `{run.order}`, NDCG@10 on "
        "validation after whole epochs, the chosen setting of each row",
        "",
        "| | targets seen | processor minutes |",
        "|---|---|---|",
    ]
    cost = _seconds_per_target(results.parent / dataset_cost.RESULT.name, run.data)
    tail = []
    if ours and cost:
        targets, seconds = ours
        prefixes = targets * cost
        told = (
            f"The published training learns one target from a prefix, {1e3 * cost:.0f} ms of one "
            f"thread each (table below): {prefixes / 3600:.1f} hours for as many targets as the "
            f"first row took, {prefixes / seconds:.0f} times its time. It was not run to the "
            "level; that is what it takes if it learns as much from each."
        )
        tail = ["", told]
    return "\n".join([*head, *lines, *tail])


def _of_row(row: Row, results: Path, level: float) -> tuple[tuple[int, float] | None, str]:
    """What the chosen setting took, and its cells; no cells where no setting is done."""
    best = row.chosen(results)
    result = best and best.result(results)
    if not result:
        return None, ""
    found = reached(result, row.metric, level)
    if found is None:
        return None, "not reached |"
    return found, f"{found[0]:,} | {found[1] / 60:.1f}"


def _seconds_per_target(path: Path, data: str) -> float | None:
    """Of the published training on a set of this size, where it was measured."""
    if not path.exists():
        return None
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    names = {name.casefold(): name for name in dataset_cost.SETS}
    cell = cells.get(f"{names.get(data)}/{PUBLISHED}", {}).get("training", {})
    return cell["seconds"] / cell["targets"] if "seconds" in cell else None
