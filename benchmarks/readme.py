"""Writes the measured parts of README.md, between their markers, from benchmarks/results, the page
of all quality queues beside their results, and the model card.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks import (
    dataset_cost,
    feature_ranks,
    memory_tables,
    model_card,
    quality_comparison,
    quality_soon,
    quality_tables,
    speed_tables,
    stack_tables,
)
from benchmarks.quality import QUEUES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COMMAND = "python -m benchmarks readme"


def _speed(device: str) -> Callable[[Path], str]:
    return lambda folder: speed_tables.section(speed_tables.load_results(folder, device), device)


# The text between a section's markers, from the folder of results.
SECTIONS: dict[str, Callable[[Path], str]] = {
    "memory": memory_tables.section,
    "stacks": lambda folder: stack_tables.section(stack_tables.load_results(folder)),
    "results": lambda folder: quality_tables.section(quality_tables.load_results(folder)),
    "quality": lambda folder: quality_comparison.section(QUEUES, folder / "quality"),
    "speed on a CPU": _speed("cpu"),
    "speed on a GPU": _speed("cuda"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--card", type=Path, default=ROOT / "docs" / "model-card.md")
    parser.add_argument("--check", action="store_true", help="change nothing; 1 when out of date")


def run(options: argparse.Namespace) -> int:
    """Rewrites or checks; returns the exit code."""
    readme = options.readme.read_text(encoding="utf-8")
    for name, text_of in SECTIONS.items():
        readme = replace_section(readme, name, text_of(options.results))
    pages = {options.readme: readme}
    quality = options.results / "quality"
    if quality.is_dir():
        parts = [quality_comparison.page(QUEUES, quality).rstrip("\n"),
                 quality_soon.section(QUEUES, quality),
                 feature_ranks.section(QUEUES, quality),
                 dataset_cost.section(options.results)]  # fmt: skip
        pages[quality / "README.md"] = "\n\n".join(filter(None, parts)) + "\n"
        pages[options.card] = model_card.page(QUEUES, quality, COMMAND)
    old = {page: page.read_text(encoding="utf-8") if page.exists() else "" for page in pages}
    changed = [page for page, text in pages.items() if text != old[page]]
    for page in changed:
        if options.check:
            print(f"{page} is out of date: run {COMMAND}")
        else:
            page.write_text(pages[page], encoding="utf-8")
    return 1 if changed and options.check else 0


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: {COMMAND} -->", f"<!-- end of {name} -->"


def replace_section(readme: str, name: str, text: str) -> str:
    """The README with `text` between the markers; SystemExit when they are not there."""
    begin, end = markers(name)
    head, found, rest = readme.partition(begin)
    _, last, tail = rest.partition(end)
    if not found or not last:
        raise SystemExit(f"the README must hold the lines {begin} and {end}")
    return f"{head}{begin}\n\n{text}\n\n{end}{tail}"
