"""README's comparison of models on one test, from the results of a quality queue."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from benchmarks.quality import COUNTING
from benchmarks.quality_tests import Difference, holm, paired_difference
from recgrela_ext.evaluation.metrics import ndcg_at_k

OURS = "RecGRELA"
VIEWS = ("seen_included", "seen_excluded")
NONE_YET = "No run of a quality queue is committed yet."


class Setting:
    """All seeds of one run: their results, and NDCG@10 by seed and user."""

    def __init__(self, paths: list[Path]) -> None:
        self.results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        self.label = str(self.results[0]["label"])
        self.model = str(self.results[0]["model"])
        ranks = [np.load(path.with_suffix(".npz"), allow_pickle=False) for path in paths]
        orders = [np.argsort(rank["user"], kind="stable") for rank in ranks]
        self.ndcg = {
            view: np.stack(
                [ndcg_at_k(r[view][order], 10) for r, order in zip(ranks, orders, strict=True)]
            )
            for view in VIEWS
        }

    def mean(self, metric: str) -> tuple[float, float]:
        """Mean over the seeds, and their standard deviation (0 for one seed)."""
        values = [result["mean"][metric] for result in self.results]
        return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0

    @property
    def valid(self) -> float:
        """Mean NDCG@10 on validation, the only figure a setting may be chosen by."""
        return float(np.mean([r["valid"]["seen_included/ndcg@10"] for r in self.results]))


def load_settings(folder: Path) -> dict[tuple[str, str, str], list[Setting]]:
    """Per (data, order, targets' sha256), its settings."""
    grouped: dict[tuple[str, str, str, str], list[Path]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        key = result["data"], result["order"], result["target_sha256"], result["setting"]
        grouped.setdefault(key, []).append(path)
    tests: dict[tuple[str, str, str], list[Setting]] = {}
    for (data, order, sha256, _), paths in grouped.items():
        tests.setdefault((data, order, sha256), []).append(Setting(paths))
    return tests


def chosen(settings: list[Setting]) -> list[Setting]:
    """Per model the setting that is best on validation; ours first, counting last."""
    best: dict[str, Setting] = {}
    for setting in settings:
        if setting.model not in best or setting.valid > best[setting.model].valid:
            best[setting.model] = setting
    return sorted(best.values(), key=lambda s: (s.model != OURS, s.model in COUNTING, s.model))


def compare(ours: Setting, others: list[Setting], view: str) -> list[Difference]:
    """Of NDCG@10, ours less theirs; p corrected over the others."""
    found = [paired_difference(ours.ndcg[view], other.ndcg[view]) for other in others]
    corrected = holm([one.p for one in found])
    return [dataclasses.replace(one, p=p) for one, p in zip(found, corrected, strict=True)]


def section(folder: Path) -> str:
    """Markdown: a table a test."""
    tests = load_settings(folder) if folder.exists() else {}
    return "\n\n".join(_table(*key, chosen(found)) for key, found in tests.items()) or NONE_YET


def _table(data: str, order: str, sha256: str, models: list[Setting]) -> str:
    users = models[0].ndcg[VIEWS[0]].shape[1]
    lines = [
        f"**{data}**, order `{order}`, leave-one-out: {users:,} users, targets' sha256 "
        f"`{sha256[:12]}`; the setting of each model chosen on validation",
        "",
        "| | seeds | NDCG@10 | ours less this | p | NDCG@10, unseen | ours less this | p |",
        "|---|---|---|---|---|---|---|---|",
    ]
    others = models[1:] if models[0].model == OURS else []
    differences = {view: compare(models[0], others, view) for view in VIEWS} if others else {}
    for number, setting in enumerate(models):
        cells = [setting.label, str(len(setting.results))]
        for view in VIEWS:
            cells.append(_figure(*setting.mean(f"{view}/ndcg@10"), len(setting.results)))
            other = differences[view][number - 1] if differences and number else None
            cells += _difference(other)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _figure(mean: float, deviation: float, seeds: int) -> str:
    return f"{mean:.4f} ± {deviation:.4f}" if seeds > 1 else f"{mean:.4f}"


def _difference(found: Difference | None) -> list[str]:
    if found is None:
        return ["", ""]
    return [f"{found.value:+.4f} ({found.low:+.4f} to {found.high:+.4f})", f"{found.p:.3f}"]
