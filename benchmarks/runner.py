"""Runs the rows of a device one by one: shows them, keeps them, goes on where it was stopped."""

from __future__ import annotations

import fnmatch
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence

import torch
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
    """Measures the named rows that `results` lacks and prints them all; 1 if one has no figures."""
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
                reason = f"WRONG RESULT, no time is told: {error}"
            except torch.OutOfMemoryError:
                reason = "left out: more memory than this GPU has"
            except Exception as error:  # the other rows are worth having all the same
                traceback.print_exc()
                reason = f"FAILED: {type(error).__name__}: {error}"
            else:
                reason = ""
            if reason:
                failed += 1
                results.leave_out(name, reason)
                bar.write(f"\n[{name}] {reason}", file=sys.stdout)
                continue
        stored = results.content["rows"][name]["records"]
        bar.write(f"\n[{name}]\n" + "\n".join(map(describe, stored)), file=sys.stdout)
        sys.stdout.flush()
    return 1 if failed else 0
