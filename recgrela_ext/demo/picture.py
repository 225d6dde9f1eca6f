"""A chart of ranks: how a recommendation list moves while events stream in. Needs matplotlib."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from recgrela_ext.demo.sections import Moves

TRACKED = 6  # from the top of the first list and of the last one
_LABEL = 44
_TICKS = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)


def draw(moves: Moves, path: Path) -> None:
    """Write a PNG: items of the first list in grey, those of the last one in colour."""
    before = [row for row in moves.lists[0][:TRACKED].tolist() if row]
    after = [row for row in moves.lists[-1][:TRACKED].tolist() if row]
    moments = range(len(moves.lists))
    figure, axes = plt.subplots(figsize=(12, 6.5))
    colours = iter(plt.get_cmap("tab10").colors)  # type: ignore[attr-defined]
    for row in dict.fromkeys([*before, *after]):
        risen = row in after
        ranks = [moves.rank(moment, row) or float("nan") for moment in moments]
        axes.plot(
            moments,
            ranks,
            marker="o",
            color=next(colours) if risen else "0.75",
            linewidth=2.5 if risen else 1.5,
            zorder=2 if risen else 1,
        )
        ends = ((0, ranks[0], "right"), (moments[-1], ranks[-1], "left"))
        for (moment, rank, side), rows in zip(ends, (before, after), strict=True):
            if row in rows and rank == rank:  # not NaN
                shift = -0.15 if side == "right" else 0.15
                label = textwrap.shorten(moves.titles[row], _LABEL, placeholder=" ...")
                axes.text(moment + shift, rank, label, ha=side, va="center", fontsize=7)
    lowest = max(moves.rank(moment, row) or 1 for moment in moments for row in (*before, *after))
    axes.set_yscale("log")
    axes.set_ylim(1.1 * lowest, 0.9)
    ticks = [rank for rank in _TICKS if rank <= lowest]
    axes.set_yticks(ticks, [str(rank) for rank in ticks])
    axes.minorticks_off()
    axes.set_xlim(-4.2, moments[-1] + 4.2)
    axes.set_xticks(list(moments))
    events = [textwrap.shorten(title, _LABEL, placeholder=" ...") for title in moves.events]
    axes.set_xticklabels(["before", *events], rotation=35, ha="right", fontsize=7)
    axes.set_ylabel("rank")
    axes.set_title(f"Recommendations for user {moves.user} while {len(events)} events stream in")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
