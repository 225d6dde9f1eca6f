"""README's table of RecGRELA beside each framework's own SASRec, from the results of stacks.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAMES = {"recbole": "RecBole", "rectools": "RecTools", "replay": "RePlay"}
NONE_YET = "No finished comparison is committed yet; the command below makes one."


def load_results(folder: Path) -> list[dict[str, Any]]:
    """Every finished comparison, in the order of NAMES."""
    paths = [folder / f"stacks-{stack}.json" for stack in NAMES]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
    return [result for result in found if "best" in result]


def section(results: list[dict[str, Any]]) -> str:
    """Markdown: two rows per framework, ours and its SASRec."""
    if not results:
        return NONE_YET
    lines = [
        "| | rate | HR@10 | NDCG@10 | HR@10, unseen | NDCG@10, unseen | seconds per epoch |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for model in sorted(result["best"]):
            lines.append(_row(result, model, result["best"][model]))
    return "\n".join([*lines, "", *(_conditions(result) for result in results)])


def _row(result: dict[str, Any], model: str, best: dict[str, Any]) -> str:
    stack = result["comparison"]
    label = f"[{NAMES[stack]}](benchmarks/results/stacks-{stack}.json), {model}"
    test = best["test"]
    columns = [f"{best['lr']:g}"]
    for view in ("seen_included", "seen_excluded"):
        columns += [f"{test[f'{view}/{metric}']:.4f}" for metric in ("hit@10", "ndcg@10")]
    taken = result.get("seconds_per_epoch")
    seconds = f"{taken[model]:.1f}" if taken else ""
    return f"| {' | '.join([label, *columns, seconds])} |"


def _conditions(result: dict[str, Any]) -> str:
    settings, machine, stack = result["settings"], result["machine"], result["comparison"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    seeds = len(next(iter(result["best"].values()))["seeds"])
    return (
        f"{NAMES[stack]}: {result['data']}, leave-one-out (targets' sha256 "
        f"`{result['target_sha256'][:12]}`), {settings['epochs']} epochs, the last "
        f"{settings['max_len']} items, batches of {settings['batch_size']}, width "
        f"{settings['width']}, {settings['layers']} layers, dropout {settings['dropout']:g}, "
        f"softmax over all items, mean of {seeds} seeds; {machine['threads']} thread(s) of "
        f"{machine['processor']}, {versions}.\n"
    )
