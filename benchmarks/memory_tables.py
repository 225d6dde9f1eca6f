"""README's tables of memory and latency, from results/memory.json (and of the targets that
results/retrieval.json and results/state-formats.json answer)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.memory_models import CANDIDATES, stored_bytes
from benchmarks.memory_quality import METRICS, OURS
from benchmarks.peers import Missing
from benchmarks.records import Target, duration

NOT_YET = "Not measured yet. `python -m benchmarks memory` measures it."
NO_FIGURE = "not measured"
BATCHES, CATALOGUES = (1, 16, 256, 4096), (10_000, 100_000, 1_000_000, 10_000_000)
RANKED = {
    "sasrec-window": "SASRec, re-encoding 200, dense scores",
    "sasrec-cache": "SASRec, KV cache, dense scores",
    "ours": "ours, step",
    "ours+bfloat16": "ours, step, bfloat16 table",
    "ours+int8": "ours, step, int8 table",
}
Found = dict[str, Any]


class Figures:
    """The points of a results file; `None` where one is absent."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content
        self._points: dict[tuple[Any, ...], list[Found]] = {}
        for stored in content["points"].values():
            p = stored["point"]
            key = (p["part"], p["kind"], p["model"], p["length"], p["items"], p["batch"])
            self._points.setdefault(key, []).append(stored["found"])

    def get(
        self,
        part: str,
        kind: str,
        model: str,
        length: int = 200,
        items: int = 10_000,
        batch: int = 1,
    ) -> Found | None:
        """One point; of several processes the median time and the outermost percentiles."""
        found = self._points.get((part, kind, model, length, items, batch))
        if not found:
            return None
        done = [f for f in found if "missing" not in f]
        if not done or "seconds" not in done[0]:
            return (done or found)[0]
        times = sorted(f["seconds"] for f in done)
        bounds = {"p10": min(f["p10"] for f in done), "p90": max(f["p90"] for f in done)}
        return {**done[0], **bounds, "seconds": times[len(times) // 2]}

    def seconds(self, *where: Any, **more: Any) -> float | None:
        found = self.get("latency", *where, **more)
        return None if found is None else found.get("seconds")

    def peak(self, *where: Any, **more: Any) -> int | None:
        found = self.get("memory", *where, **more)
        return None if found is None else found.get("peak")


def load(folder: Path) -> dict[str, Any] | None:
    path = folder / "memory.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def section(folder: Path) -> str:
    content = load(folder)
    if content is None:
        return NOT_YET
    figures = Figures(content)
    facts = content["machine"]
    dates = [point["date"][:10] for point in content["points"].values()]
    head = (
        f"One thread of {facts['processor']}, {facts['build']['cpu_level']} kernels, torch "
        f"{facts['torch']}, float32, measured {' to '.join(sorted({min(dates), max(dates)}))} "
        f"([memory.json](benchmarks/results/memory.json)). Peaks are the growth of a process's "
        f"memory after weights; times are processor time, medians."
    )
    parts = [head, models(figures), many(figures), catalogues(figures), losses(figures)]
    parts += [target_table(targets(figures, folder)), forgetting(content.get("forgetting", {}))]
    others = folder / "heavy-users.json"
    if others.exists():
        curve = json.loads(others.read_text(encoding="utf-8"))
        head = (
            f"[{curve['data']}](benchmarks/results/heavy-users.json), order `{curve['order']}`, "
            f"{curve['model']}, seeds {', '.join(map(str, curve['seeds']))}: made by `python -m "
            "benchmarks heavy-users`."
        )
        parts += [head, forgetting(curve)]
    return "\n\n".join(part for part in parts if part)


def kept(figures: Figures, name: str, length: int) -> str:
    """Reckoned; as its point counted them where the peer's package is not there."""
    try:
        found: Found = stored_bytes(CANDIDATES[name], length)
    except Missing as reason:
        found = figures.get("memory", "event", name, length) or {}
        if "state" not in found:
            return str(reason)
    return size(found["ids"] + found["state"])


def models(figures: Figures) -> str:
    """A row a model: what it keeps, its peak and its time by length, the rebuild, NDCG@10."""
    lines = [
        "| model | kept per user, 200 items | kept, 1,000,000 | peak, 200 | peak, 1,000,000 "
        "| new event, 200 | new event, 2,000 | new event, 1,000,000 | rebuild, per 1,000 users "
        "| NDCG@10 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, candidate in CANDIDATES.items():
        bytes_kept = (kept(figures, name, n) for n in (200, 1_000_000))
        peaks = (_peak(figures.get("memory", "event", name, n)) for n in (200, 1_000_000))
        lengths = (200, 2_000, 1_000_000)
        times = (_time(figures.get("latency", "event", name, n)) for n in lengths)
        cells = [candidate.label, *bytes_kept, *peaks, *times, _rebuild(figures, name)]
        cells.append(_ndcg(figures.content.get("quality", {}), name))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def many(figures: Figures) -> str:
    """Time of an event of each user and peak memory, by users at once."""
    head = [f"{n:,} at once" for n in BATCHES]
    lines = [f"| new event, 200 items, per user | {' | '.join(head)} | peak, 4,096 at once |"]
    lines.append("|---" * (len(BATCHES) + 2) + "|")
    for name, candidate in CANDIDATES.items():
        if candidate.way == "whole":
            continue
        found = [(n, figures.get("latency", "event", name, batch=n)) for n in BATCHES]
        cells = [_time(f, n) for n, f in found]
        peak = _peak(figures.get("memory", "event", name, batch=4096))
        lines.append(f"| {candidate.label} | {' | '.join(cells)} | {peak} |")
    return "\n".join(lines)


def catalogues(figures: Figures) -> str:
    """Time of an event with the ten best items after it, and its peak, by catalogue."""
    head = [f"{n:,} items" for n in CATALOGUES]
    lines = [
        f"| new event and its top 10, one user | {' | '.join(head)} | peak, 10,000,000 | table |"
    ]
    lines.append("|---" * (len(CATALOGUES) + 3) + "|")
    for name, label in RANKED.items():
        cells = [_time(figures.get("latency", "ranking", name, items=n)) for n in CATALOGUES]
        memory = figures.get("memory", "ranking", name, items=CATALOGUES[-1])
        table = size(memory["table"]) if memory and "table" in memory else ""
        lines.append(f"| {label} | {' | '.join(cells)} | {_peak(memory)} | {table} |")
    return "\n".join(lines)


def losses(figures: Figures) -> str:
    """Peak memory of the loss and its gradients."""
    columns = [(n, 512) for n in CATALOGUES] + [(1_000_000, 3000)]
    head = [f"{items:,} items, {rows:,} rows" for items, rows in columns]
    lines = [f"| loss and gradients, peak | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for name, label in (("dense", "dense cross-entropy"), ("ours", "ours")):
        cells = [_peak(figures.get("memory", "loss", name, 0, n, rows)) for n, rows in columns]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def forgetting(curve: dict[str, Any]) -> str:
    """What a state loses that was rebuilt from the last items alone."""
    if not curve:
        return ""
    lines = []
    for group in curve["groups"]:
        windows = group["windows"]
        head = " | ".join(f"last {row['window']}" for row in windows)
        told = f"{group['users']} users with more than {group['more_than']} items"
        lines += ["", f"| {told} | {head} | all |", "|---" * (len(windows) + 2) + "|"]
        values = " | ".join(f"{row['ndcg@10']:.4f}" for row in windows)
        lines.append(f"| NDCG@10, {group['targets']} targets | {values} | {group['all']:.4f} |")
        cells = []
        for row in windows:
            low, high = row["interval"]
            cells.append(f"{row['minus_all']:+.4f} ({low:+.4f} to {high:+.4f})")
        lines.append(f"| less that of all | {' | '.join(cells)} | |")
    return "\n".join(lines).strip()


def targets(figures: Figures, folder: Path) -> list[Target]:
    """What was asked of serving, and what was measured."""

    def times(peer: str, length: int) -> float | None:
        return _over(
            figures.seconds("event", peer, length), figures.seconds("event", "ours", length)
        )

    loss = [figures.peak("loss", name, 0, 1_000_000, 512) for name in ("dense", "ours")]
    found = [
        Target("event, 200 items: SASRec reading 200 over ours", 10, times("sasrec-window", 200)),
        Target("event, 200 items: SASRec, KV cache, over ours", 1.5, times("sasrec-cache", 200)),
        Target("event, 2,000 items: SASRec reading all over ours", 100,
               times("sasrec-whole", 2000)),
        Target("event, 2,000 items: SASRec, KV cache, over ours", 4, times("sasrec-cache", 2000)),
        Target("memory of the loss, 10⁶ items, 512 rows, of dense cross-entropy", 0.1,
               _over(loss[1], loss[0]), at_least=False),
    ]  # fmt: skip
    return [*found, *_prefill(folder), *_retrieval(folder), *_formats(folder)]


def _prefill(folder: Path) -> list[Target]:
    path = folder / "long-history.json"
    if not path.exists():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    at = {r["length"]: r["megabytes"] for r in rows if r["method"] == "prefill"}
    text = "peak of `prefill`, 1,000,000 items over 10,000, MB more"
    return [Target(text, 5, at[1_000_000] - at[10_000], at_least=False)]


def _retrieval(folder: Path) -> list[Target]:
    path = folder / "retrieval.json"
    if not path.exists():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    at = {r["method"]: r for r in rows if (r["users"], r["items"]) == (4096, 1_000_000)}
    found = []
    for peer, label in (("chunked_torch", "chunked torch"), ("faiss_flat", "FAISS Flat")):
        if {"topk_scores", peer} <= at.keys():
            ours, other = at["topk_scores"], at[peer]
            text = f"top 10 of 10⁶ items for 4,096 users: against {label}"
            found.append(Target(f"{text}, speed", 1.2, other["seconds"] / ours["seconds"]))
            share = ours["megabytes"] / other["megabytes"]
            found.append(Target(f"{text}, memory", 1.1, share, at_least=False))
    return found


def _formats(folder: Path) -> list[Target]:
    path = folder / "state-formats.json"
    if not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    lost = 0.0
    for part in ("return", "drift"):
        measured = content[part]["formats"]["int8"]
        lost = max(lost, *(content[part]["ndcg@10"] - row["ndcg@10"] for row in measured))
    size = content["bytes_per_user"]["int8"]
    return [
        Target("int8 state, bytes per user", 6144, size, at_least=False),
        Target("int8 state, NDCG@10 lost at worst", 0.001, lost, at_least=False),
    ]


def target_table(found: list[Target]) -> str:
    lines = ["| target | asked | measured |  |", "|---|---|---|---|"]
    for target in found:
        sign = "≥" if target.at_least else "≤"
        value = "" if target.value is None else f"{target.value:,.4g}"
        told = {True: "met", False: "**not met**", None: "not measured"}[target.met]
        lines.append(f"| {target.text} | {sign} {target.limit:g} | {value} | {told} |")
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes, from 10,000 on in the unit that fits: 5,896 B, 20.7 KB, 2.1 MB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= max(factor, 1e4):
            return f"{count / factor:,.3g} {unit}"
    return f"{count:,.0f} B"


def _peak(found: Found | None) -> str:
    """Below 0.1 MB it is a matter of pages."""
    if found is None:
        return NO_FIGURE
    told: str = found.get("missing") or size(found["peak"])
    return told if "missing" in found or found["peak"] >= 100_000 else "< 0.1 MB"


def _time(found: Found | None, users: int = 1) -> str:
    if found is None:
        return NO_FIGURE
    return found.get("missing") or duration(found["seconds"] / users)


def _rebuild(figures: Figures, name: str) -> str:
    if CANDIDATES[name].way in ("window", "whole"):
        return "none"
    found = figures.get("latency", "update", "ours" if name.startswith("ours") else name)
    if found is None or "missing" in found:
        return _time(found)
    return duration(found["seconds"] * 1000 / found["users"])


def _ndcg(quality: dict[str, Any], name: str) -> str:
    """Mean over the seeds, seen items included, and the range of more than one seed."""
    candidate = CANDIDATES[name]
    model = quality.get(candidate.model, {"missing": NO_FIGURE})
    if "missing" in model:
        return str(model["missing"])
    served = candidate.model == OURS and candidate.way in ("step", "store")
    runs = [r["served"][candidate.form] if served else r["test"] for r in model["per_seed"]]
    values = [run[METRICS[0]] for run in runs]
    mean = f"{sum(values) / len(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4f} to {max(values):.4f})"


def _over(a: float | None, b: float | None) -> float | None:
    return None if not a or not b else a / b
