"""`python -m benchmarks plots`: README's log-log pictures of results/memory.json, and those of
quality_plots.py and feature_ranks.py.

Needs the extra `plot`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import feature_ranks, quality_plots
from benchmarks.machine import ROOT
from benchmarks.quality import QUEUES

RESULTS = ROOT / "benchmarks" / "results"
SHOWN = ("sasrec-window", "sasrec-whole", "sasrec-cache", "gru4rec", "lrurec", "mamba", "published",
         "ours", "ours-int8")  # fmt: skip
STYLES = dict(zip(SHOWN, ("C0", "C1", "C2", "C4", "C5", "C6", "C7", "C3", "C3"), strict=True))


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--results", type=Path, default=RESULTS, help="folder of memory.json")
    command.add_argument("--out", type=Path, help="folder of the pictures; default: the same")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from benchmarks.memory_tables import Figures, load

    content = load(options.results)
    if content is None:
        raise SystemExit(f"benchmarks plots: {options.results} holds no memory.json")
    for name, draw in (("memory-history.png", history), ("memory-load.png", load_)):
        path = (options.out or options.results) / name
        draw(Figures(content), path)
        print(path)
    quality = options.results / "quality"
    if quality.is_dir():
        for pictures in (quality_plots, feature_ranks):
            print(pictures.draw(QUEUES, quality, options.out or quality) or "nothing to draw")
    return 0


def history(figures: Any, path: Path) -> None:
    """Time of a new event, and bytes kept, over the length of the history."""
    from benchmarks.memory import LENGTHS

    figure, (left, right) = _axes()
    for name in SHOWN:
        events = [(n, figures.get("latency", "event", name, n)) for n in LENGTHS]
        _errors(left, name, [(n, f, 1) for n, f in events])
        kept = [(n, figures.get("memory", "event", name, n)) for n in LENGTHS]
        sizes = [(n, f["ids"] + f["state"]) for n, f in kept if f and "state" in f]
        if sizes:
            right.plot(*zip(*sizes, strict=True), **_style(name))
    _label(left, "items in the history", "a new event of one user, microseconds")
    _label(right, "items in the history", "bytes kept per user, seen items apart")
    _save(figure, left, path)


def load_(figures: Any, path: Path) -> None:
    """Time of a new event over the users at once, and with a top 10 over the catalogue."""
    from benchmarks.memory_tables import BATCHES, CATALOGUES, RANKED

    figure, (left, right) = _axes()
    for name in SHOWN:
        found = [(n, figures.get("latency", "event", name, batch=n), n) for n in BATCHES]
        _errors(left, name, found)
    for i, (name, label) in enumerate(RANKED.items()):
        found = [(n, figures.get("latency", "ranking", name, items=n), 1) for n in CATALOGUES]
        _errors(right, name, found, {"label": label, "marker": "o", "color": f"C{i}"})
    _label(left, "users at once, 200 items each", "a new event, per user, microseconds")
    _label(right, "items in the catalogue", "a new event and its top 10, microseconds")
    right.legend(fontsize=7, frameon=False)
    _save(figure, left, path)


def _errors(axes: Any, name: str, points: list[Any], style: dict[str, Any] | None = None) -> None:
    """Medians with bars from the 10th to the 90th percentile, per user; [(x, found, users)]."""
    done = [(x, f, users) for x, f, users in points if f and "seconds" in f]
    if not done:
        return
    x = [row[0] for row in done]
    middle, low, high = (
        [1e6 * f[field] / users for _, f, users in done] for field in ("seconds", "p10", "p90")
    )
    below = [max(m - a, 0) for m, a in zip(middle, low, strict=True)]
    above = [max(b - m, 0) for m, b in zip(middle, high, strict=True)]
    axes.errorbar(x, middle, yerr=(below, above), capsize=2, **(style or _style(name)))


def _style(name: str) -> dict[str, Any]:
    from benchmarks.memory_models import CANDIDATES

    ours = name.startswith("ours")
    return {
        "label": CANDIDATES[name].label,
        "color": STYLES[name],
        "marker": "o",
        "markersize": 4,
        "linewidth": 2.2 if ours else 1.2,
        "linestyle": "--" if name == "ours-int8" else "-",
    }


def _axes() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(1, 2, figsize=(12, 4.8))


def _label(axes: Any, x: str, y: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _save(figure: Any, legend: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    handles, labels = legend.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=3, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
