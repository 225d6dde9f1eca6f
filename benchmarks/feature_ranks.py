"""The paper's claim that gate and rank augmentation raise the rank of what attention returns.

A run of a quality queue with `rank_users` keeps in its result what python_examples/rank_analysis.py
measures, which says what the matrices and the ranks are; here they become a table and a picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality_comparison import read_queues
from benchmarks.quality_queue import Queue
from python_examples import rank_analysis
from recgrela_ext import RecGRELA, Sequences

LENGTH = 200  # as in the paper, of the histories: their last items
PICTURE = "ranks.png"
TEXT = f"""\
## Ranks of attention and features

Over the last {LENGTH} items of the first {{users}} users who have as many, mean ± deviation over
the users, both averaged over the seeds; a head is 16 wide, the features 64. "Above 1e-3" counts
singular values above a thousandth of the largest, "entropy rank" is exp of the entropy of their
shares; python_examples/rank_analysis.py says what each matrix is, and measures a log of yours. The
paper's Figure 9 has one picture of the last layer's output on ML-1M: 58 of 64, 32 without rank
augmentation and gate, 47 for LinRec. A higher rank is no better ranking by itself: NDCG@10 stands
beside it."""


def histories_of(train: Sequences, users: int) -> list[np.ndarray]:
    """What a run measures on.

    Raises:
        SystemExit: no history is long enough.
    """
    histories = rank_analysis.long_histories(train, users, LENGTH)
    if users and not histories:
        raise SystemExit(f"quality: rank_users asks for users with {LENGTH} items, got none")
    return histories


def measured(model: RecGRELA, histories: list[np.ndarray]) -> dict[str, Any]:
    """Mean and deviation over users, [layers][matrices][2], of a trained model."""
    values = rank_analysis.measure(model, histories)
    return {"users": len(histories), "length": LENGTH, "mean": values.mean(0).tolist(),
            "deviation": values.std(0).tolist()}  # fmt: skip


def _rows(queue: Queue, results: Path) -> list[dict[str, Any]]:
    """As the example has them, of the runs that were measured."""
    found = []
    for run in (run for row in queue.rows for run in row.chosen_runs(results)):
        result = run.result(results)
        if result is not None and "feature_ranks" in result:
            ndcg = {view: result["mean"][f"{view}/ndcg@10"] for view in rank_analysis.VIEWS}
            found.append({"variant": run.label, "ndcg@10": ndcg, **result["feature_ranks"]})
    return found


def _measured_queues(queues: Path, results: Path) -> list[tuple[Queue, list[dict[str, Any]]]]:
    return [(queue, rows) for queue in read_queues(queues) if (rows := _rows(queue, results))]


def section(queues: Path, results: Path) -> str:
    """Markdown; empty where nothing was measured."""
    found = _measured_queues(queues, results)
    if not found:
        return ""
    parts = [part for queue, rows in found
             for part in (f"**{queue.title}**", rank_analysis.table(rows))]  # fmt: skip
    users = max(row["users"] for _, rows in found for row in rows)
    picture = [f"![Entropy rank by layer]({PICTURE})"] if (results / PICTURE).exists() else []
    return "\n\n".join([TEXT.format(users=users), *parts, *picture])


def draw(queues: Path, results: Path, folder: Path) -> Path | None:
    """The picture of the first queue that was measured, in `folder`; None where there is none."""
    found = _measured_queues(queues, results)
    if not found:
        return None
    rank_analysis.picture(found[0][1], folder / PICTURE)
    return folder / PICTURE
