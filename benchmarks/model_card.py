"""docs/model-card.md, from the committed results of the quality queues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.quality_comparison import OURS, VIEWS, Setting, read_queues, settings_of
from benchmarks.quality_queue import Queue

INTRODUCTION = """\
# Model card: causal RecGRELA as measured here

Written by `{command}` from [benchmarks/results/quality](../benchmarks/results/quality/README.md),
whose tables hold the models it was compared with; no weights are published.

**What it is.** A sequential recommender: item ids in, a score for every item out. Causal linear
attention with rotary positions, a short causal convolution beside it, a SiLU gate
(arXiv 2506.13315, made causal). It reads histories of any length (the figures here are of their
last 200 items) and serves a user from a state of fixed size; with a repeat bias the distinct items
met are needed as well, 4 bytes each.

**For what.** Ranking the next item for users with a history, items known from training. It knows
ids alone: no text, price or picture, and no item or user that training has not seen (a new user
begins with an empty state). It repeats what the log holds, popularity and the habits of those who
left the data included; whether a group of users is served worse was not measured. The sets are
ratings, visits and edits of volunteers; none of them says how it does in your shop.
"""
NONE_YET = "No queue has trained it yet."
TAIL = """\
**Read the figures with care.** NDCG@10 among all items, one held-out item a user, or all later ones
where the split is by time. An order or a split makes another test: rows of different tables say
nothing about each other. ML-1M's ties in time leak the file's order, so both orders are given. A
repeat bias (`RecGRELAConfig(repeat_bias=True)`) is nothing of this model's own: any can have it,
and the tables of ML-1M with it give it to every trained model.

**Cost.** Processor time of one thread; wall times are of shared machines."""


def page(queues: Path, results: Path, command: str) -> str:
    """Markdown."""
    introduction = INTRODUCTION.format(command=command)
    found = [
        (queue, setting)
        for queue in read_queues(queues)
        if queue.table == "comparison"
        for setting in settings_of(queue.rows, results)
        if setting.model == OURS
    ]
    if not found:
        return f"{introduction}\n{NONE_YET}\n"
    head = ("| test | trained as | seeds | NDCG@10, seen items in / out | parameters "
            "| processor minutes |")  # fmt: skip
    table = "\n".join([head, "|---|---|---|---|---|---|", *(_row(one) for _, one in found)])
    again = "\n".join(_again(queue, one) for queue, one in found)
    return "\n\n".join([introduction.strip(), table, "To train a row again:", again, TAIL]) + "\n"


def _row(setting: Setting) -> str:
    one = setting.results[0]
    run = setting.row.shown
    figures = []
    for view in VIEWS:
        mean, deviation = setting.mean(f"{view}/ndcg@10")
        figures.append(f"{mean:.4f} ± {deviation:.4f}" if deviation else f"{mean:.4f}")
    minutes = [result["training_cpu_seconds"] / 60 for result in setting.results]
    cells = [
        f"{run.test}: {one['targets']:,} targets, sha256 `{one['target_sha256'][:12]}`",
        _told(one),
        str(len(setting.results)),
        " / ".join(figures),
        f"{one['parameters']:,}",
        f"{sum(minutes) / len(minutes):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def _told(result: dict[str, Any]) -> str:
    """Configuration and recipe, as far as they are not the defaults."""
    parts = [result["config"], result["train"], result["limits"]]
    return ", ".join(f"{name} {value}" for part in parts for name, value in part.items())


def _again(queue: Queue, setting: Setting) -> str:
    return (f"    python -m benchmarks quality --queue benchmarks/queues/{queue.name}.json "
            f"--data DIR --again NEW --only {setting.names[0]}")  # fmt: skip
