"""`python -m benchmarks plots`: what the models of the quality tables reach while they train.

A panel per table of a comparison or a search with at least two trained models: NDCG@10 on
validation over the processor time of training, the chosen setting of each row, a thin line a seed
and a thick one through their mean.
Needs the extra `plot`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality_comparison import CURVES, OURS, read_queues, settings_of
from benchmarks.quality_queue import COUNTING, Queue

COLUMNS = 2


def curves(queues: Path, results: Path) -> dict[str, dict[str, list[Any]]]:
    """{title: {row: [a list of (minutes, NDCG@10) per seed]}} of the tables to draw."""
    found: dict[str, dict[str, list[Any]]] = {}
    for queue in read_queues(queues):
        if queue.table in ("comparison", "settings"):
            rows = _of_queue(queue, results)
            if len(rows) > 1:
                found[queue.title] = rows
    return found


def _of_queue(queue: Queue, results: Path) -> dict[str, list[Any]]:
    found = {}
    for setting in settings_of([r for r in queue.rows if r.model not in COUNTING], results):
        metric = setting.row.metric
        lines = [
            [(point["cpu_seconds"] / 60, point[metric]) for point in result["curve"]]
            for result in setting.results
        ]
        found[setting.row.label] = lines
    return found


def draw(queues: Path, results: Path, folder: Path) -> Path | None:
    """The picture, in `folder`; None where there is nothing to compare."""
    found = curves(queues, results)
    if not found:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height = -(-len(found) // COLUMNS)
    figure, panels = plt.subplots(height, COLUMNS, figsize=(12, 4 * height), squeeze=False)
    for axes in panels.flat[len(found) :]:
        axes.axis("off")
    labels = list(dict.fromkeys(label for rows in found.values() for label in rows))
    for axes, (title, rows) in zip(panels.flat, found.items(), strict=False):
        for label, seeds in rows.items():
            color = f"C{labels.index(label)}"
            for line in seeds if len(seeds) > 1 else []:
                axes.plot(*np.transpose(line), color=color, linewidth=0.6, alpha=0.5)
            length = min(map(len, seeds))  # patience may end one seed before another
            mean = np.mean([line[:length] for line in seeds], axis=0)
            width = 2.2 if OURS in label else 1.4
            axes.plot(*mean.T, "o-", color=color, label=label, linewidth=width, markersize=3)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("processor minutes of training")
        axes.set_ylabel("NDCG@10 on validation")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    path = folder / CURVES
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)
    return path
