"""The command line of the benchmarks, `python -m benchmarks`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks import readme

HELP = """Speed and memory of recgrela_ext beside what else there is.

    python -m benchmarks cpu                     every row; writes results/cpu-<processor>.json
    python -m benchmarks cpu --quick             small shapes, half a minute, writes nothing
    python -m benchmarks cpu --list              the names of the rows
    python -m benchmarks cpu --only operator     the rows whose names begin so
    python -m benchmarks memory                  peak memory of loading ten million events
    python -m benchmarks readme                  README's tables, from the results files

A row first checks its results, by the tests' own rule, and tells no time when one is wrong. Ours
and its peers are timed in turn, in one process. The file is written after every row; a run that
was stopped goes on when its command is given again, as long as commit and library are the same.

Run from the root of the repository, on a machine that does nothing else.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one sub-command; returns the exit code."""
    options = parser().parse_args(argv)
    result: int = options.run(options)
    return result


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        "python -m benchmarks",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = whole.add_subparsers(required=True, metavar="cpu | memory | readme")
    cpu = commands.add_parser("cpu", help="kernels, training step and serving on the processor")
    _row_options(cpu)
    cpu.add_argument(
        "--threads",
        type=int,
        default=os.cpu_count() or 1,
        help="of the rows on all cores (default: every processor)",
    )
    cpu.set_defaults(run=_cpu)
    memory = commands.add_parser("memory", help="loading and splitting ten million events")
    memory.add_argument("--events", type=int, default=10_000_000)
    memory.add_argument("--out", type=Path, default=readme.RESULTS / "data-memory.json")
    memory.set_defaults(run=_memory)
    tables = commands.add_parser("readme", help="write README's tables from benchmarks/results")
    readme.add_options(tables)
    tables.set_defaults(run=readme.run)
    return whole


def _row_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--quick", action="store_true", help="tiny shapes: does everything run?")
    command.add_argument(
        "--only",
        action="append",
        metavar="NAME",
        help="this row, or those whose names begin so; may be repeated",
    )
    command.add_argument("--list", action="store_true", help="print the names of the rows")
    command.add_argument("--fresh", action="store_true", help="measure again what the file holds")
    command.add_argument(
        "--no-compile",
        dest="compile",
        action="store_false",
        help="leave out peers under torch.compile, which take minutes",
    )
    command.add_argument("--out", type=Path, help="the results file")


def _cpu(options: argparse.Namespace) -> int:
    from benchmarks import cpu, machine, probes, runner, store, timing
    from recgrela_ext import _library

    names = runner.choose(list(cpu.ROWS_BY_NAME), options.only)
    if options.list:
        print("\n".join(names))
        return 0
    if options.threads < 1:
        raise SystemExit(f"benchmarks: --threads must be at least 1, got {options.threads}")
    if "cpu" not in _library.KERNEL_DEVICES:
        raise SystemExit(
            "benchmarks: the compiled operators are absent, there is nothing to measure"
        )
    effort = timing.QUICK if options.quick else timing.FULL
    facts = machine.describe()
    path = options.out
    if path is None and not options.quick:
        path = readme.RESULTS / f"cpu-{machine.slug(facts['processor'])}.json"
    head = {"device": "cpu", "quick": options.quick, "machine": facts, "threads": options.threads}
    results = store.Results(path, head, options.fresh)
    counts = sorted({1, options.threads})
    nbytes = 12 * 2**20 if options.quick else 6 * max(facts["caches"].values(), default=2**25)
    try:
        found = [probes.cpu_bandwidth(count, effort, nbytes) for count in counts]
    except probes.ProbeError as error:
        raise SystemExit(
            f"benchmarks: the memory bandwidth could not be measured: {error}"
        ) from None
    results.content["bandwidth"] = found
    for speed in found:
        told = ", ".join(f"{name} {speed[name] / 1e9:.1f} GB/s" for name in ("copy", "triad"))
        print(f"{speed['threads']} thread(s): {told}")
    speeds = {int(speed["threads"]): speed["best"] for speed in found}
    compile_too = options.compile and not options.quick
    context = cpu.Context(options.quick, compile_too, options.threads, speeds)
    rows = {name: partial(cpu.ROWS_BY_NAME[name], context) for name in names}
    code = runner.run(names, rows, results)
    if path is not None:
        print(f"\n{path} holds {len(results.content['rows'])} rows")
    return code


def _memory(options: argparse.Namespace) -> int:
    from benchmarks import data_memory

    data_memory.run(options.events, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
