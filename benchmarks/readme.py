"""Writes the measured parts of README.md, between their markers, from benchmarks/results/*.json."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks import memory_tables, quality_tables, speed_tables, stack_tables

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
    "speed on a CPU": _speed("cpu"),
    "speed on a GPU": _speed("cuda"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--check", action="store_true", help="change nothing; 1 when out of date")


def run(options: argparse.Namespace) -> int:
    """Rewrites or checks; returns the exit code."""
    old = options.readme.read_text(encoding="utf-8")
    new = old
    for name, text_of in SECTIONS.items():
        new = replace_section(new, name, text_of(options.results))
    if new == old:
        return 0
    if options.check:
        print(f"{options.readme} is out of date: run {COMMAND}")
        return 1
    options.readme.write_text(new, encoding="utf-8")
    return 0


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
