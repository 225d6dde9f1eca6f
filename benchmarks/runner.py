"""Runs the rows of a device one by one: shows them, keeps them, goes on where it was stopped."""

from __future__ import annotations

import fnmatch
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from tqdm import tqdm

from benchmarks.checks import WrongResult
from benchmarks.records import Record, describe
from benchmarks.store import Results


def choose(names: Sequence[str], patterns: Sequence[str] | None) -> list[str]:
    """Names that match a pattern, or begin with it; SystemExit when one matches none."""
    if not patterns:
        return list(names)
    chosen = []
    for pattern in patterns:
        found = [n for n in names if fnmatch.fnmatch(n, pattern) or n.startswith(pattern)]
        if not found:
            raise SystemExit(f"benchmarks: no row is called {pattern}; --list shows all of them")
        chosen += found
    return [name for name in names if name in chosen]


def run(
    names: Sequence[str], rows: Mapping[str, Callable[[], list[Record]]], results: Results
) -> int:
    """Measures the named rows that `results` lacks and prints them all; 1 if a result was wrong."""
    failed = 0
    bar = tqdm(names, unit="row", disable=not sys.stderr.isatty())
    for name in bar:
        bar.set_description(name)
        if not results.has(name):
            start = time.perf_counter()
            try:
                records = rows[name]()
                if results.key["quick"]:
                    for record in records:
                        record.targets.clear()  # they are for the full shapes
                results.add(name, records, time.perf_counter() - start)
            except WrongResult as error:
                failed += 1
                results.add_wrong(name, str(error))
                bar.write(f"\n[{name}] WRONG RESULT, no time is told: {error}", file=sys.stdout)
                continue
        stored = results.content["rows"][name]["records"]
        bar.write(f"\n[{name}]\n" + "\n".join(map(describe, stored)), file=sys.stdout)
        sys.stdout.flush()
    return 1 if failed else 0
