"""README's tables of recommendation quality, from the results of `recgrela evaluate`.

A file counts when it holds a result of `recgrela evaluate` or `train` (see
recgrela_ext/evaluation/result.py); other files are left alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SCHEMA = {"model", "variant", "data", "order", "split", "target_sha256", "seeds", "mean", "machine"}
VIEWS, METRICS = ("seen_included", "seen_excluded"), ("hit@10", "ndcg@10", "mrr@10")
COLUMNS = [f"{view}/{metric}" for view in VIEWS for metric in METRICS]
NONE_YET = (
    "No results are committed yet. The commands below make them; this section is then written by\n"
    "`python -m benchmarks readme`."
)


def load_results(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """(file name, result) of every file with the result schema, by name."""
    found = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.keys() >= SCHEMA:
            found.append((path.name, content))
    return found


def section(results: list[tuple[str, dict[str, Any]]]) -> str:
    """Markdown: one table per set of targets, models and baselines as rows."""
    groups: dict[tuple[str, str, str, str], list[tuple[str, dict[str, Any]]]] = {}
    for name, result in results:
        data, order, split, sha256 = (
            str(result[field]) for field in ("data", "order", "split", "target_sha256")
        )
        key = data, order, split, sha256
        groups.setdefault(key, []).append((name, result))
    return "\n\n".join(_group(*key, group) for key, group in groups.items()) or NONE_YET


def _group(
    data: str, order: str, split: str, sha256: str, results: list[tuple[str, dict[str, Any]]]
) -> str:
    targets = next((r["targets"] for _, r in results if "targets" in r), None)
    told = "" if targets is None else f"{targets:,} targets, "
    lines = [
        f"**{data}**, order `{order}`, {split}: {told}sha256 `{sha256[:12]}`",
        "",
        "| | seeds | HR@10 | NDCG@10 | MRR@10 | HR@10, unseen | NDCG@10, unseen | MRR@10, unseen |",
        "|---|---|---|---|---|---|---|---|",
    ]
    baselines: dict[str, dict[str, float]] = {}
    for name, result in results:
        label = f"[{result['model']}, {result['variant']}](benchmarks/results/{name})"
        lines.append(_row(label, str(len(result["seeds"])), result["mean"]))
        baselines.update(result.get("baselines", {}))
    lines += [_row(label, "", metrics) for label, metrics in baselines.items()]
    machines = {_machine(result["machine"]) for _, result in results}
    return "\n".join([*lines, "", f"Measured on {'; '.join(sorted(machines))}."])


def _row(label: str, seeds: str, metrics: dict[str, float]) -> str:
    values = (f"{metrics[column]:.4f}" if column in metrics else "" for column in COLUMNS)
    return f"| {' | '.join([label, seeds, *values])} |"


def _machine(machine: dict[str, Any]) -> str:
    device = machine.get("accelerator") or f"{machine['threads']} threads of {machine['processor']}"
    return f"{device}, torch {machine['torch']}"
