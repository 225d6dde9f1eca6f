"""The command line of the benchmarks, `python -m benchmarks`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import dataset_cost, heavy_users, memory, memory_plots, quality, readme
from benchmarks.records import Record

HELP = """Speed and memory of recgrela_ext beside what else there is.

    python -m benchmarks cpu                     every row; writes results/cpu-<processor>.json
    python -m benchmarks cpu --quick             small shapes, half a minute, writes nothing
    python -m benchmarks cpu --list              the names of the rows
    python -m benchmarks cpu --only operator     the rows whose names begin so
    python -m benchmarks cuda                    the GPU's rows; writes results/<gpu>.json
    python -m benchmarks cuda --dry-run          all of them on the CPU: checks the benchmark alone
    python -m benchmarks memory                  bytes, peak memory and latency of a new event, ours
                                                 and peers; writes results/memory.json
    python -m benchmarks memory --part latency   its times alone: they need a quiet machine
    python -m benchmarks plots                   README's pictures, from results/memory.json
    python -m benchmarks dataset-cost            steps, memory and states of data sets as large as
                                                 the paper's; writes results/dataset-cost.json
    python -m benchmarks data-memory             peak memory of loading ten million events
    python -m benchmarks quality                 a queue of training runs, ranked on one test
    python -m benchmarks heavy-users             what the far past is worth where histories are
                                                 long; writes results/heavy-users.json
    python -m benchmarks readme                  README's tables, from the results files

A row first checks its results, by the tests' own rule, and tells no time when one is wrong. Ours
and its peers are timed in turn, in one process. The file is written after every row; a run that
was stopped goes on when its command is given again, as long as commit and library are the same.

Run from the root of the repository, on a machine that does nothing else.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one sub-command; returns the exit code."""
    options = parser().parse_args(argv)
    try:
        result: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return result


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        "python -m benchmarks",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    cpu = commands.add_parser("cpu", help="kernels, training step and serving on the processor")
    _row_options(cpu)
    cpu.add_argument(
        "--threads",
        type=int,
        default=os.cpu_count() or 1,
        help="of the rows on all cores (default: every processor)",
    )
    cpu.set_defaults(run=_cpu)
    cuda = commands.add_parser("cuda", help="kernels, step, training and inference on a GPU")
    _row_options(cuda)
    cuda.add_argument(
        "--dry-run", action="store_true", help="tiny shapes on the CPU; says nothing about a GPU"
    )
    cuda.set_defaults(run=_cuda)
    memory.add_options(commands.add_parser("memory", help="what a new event costs and keeps"))
    memory_plots.add_options(commands.add_parser("plots", help="README's pictures of it"))
    costs = commands.add_parser("dataset-cost", help="what the paper's large sets would cost")
    dataset_cost.add_options(costs)
    loading = commands.add_parser("data-memory", help="loading and splitting ten million events")
    loading.add_argument("--events", type=int, default=10_000_000)
    loading.add_argument("--out", type=Path, default=readme.RESULTS / "data-memory.json")
    loading.set_defaults(run=_data_memory)
    runs = commands.add_parser(
        "quality",
        help="train and rank what a queue lacks",
        description=quality.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    quality.add_options(runs)
    runs.set_defaults(run=quality.run)
    heavy = commands.add_parser(
        "heavy-users",
        help="what the far past is worth to users with many items",
        description=heavy_users.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    heavy_users.add_options(heavy)
    heavy.set_defaults(run=heavy_users.run)
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
    from benchmarks import cpu, machine, probes, timing

    names = _names(list(cpu.ROWS_BY_NAME), options)
    if not names:
        return 0
    if options.threads < 1:
        raise SystemExit(f"benchmarks: --threads must be at least 1, got {options.threads}")
    machine.require_operators()
    effort = timing.QUICK if options.quick else timing.FULL
    facts = machine.describe() | {"freed_memory_kept": machine.keep_freed_memory()}
    counts = sorted({1, options.threads})
    nbytes = 12 * 2**20 if options.quick else 6 * max(facts["caches"].values(), default=2**25)
    try:
        found = [probes.cpu_bandwidth(count, effort, nbytes) for count in counts]
    except probes.ProbeError as error:
        raise SystemExit(f"benchmarks: the memory could not be measured: {error}") from None
    speeds = {int(speed["threads"]): speed["best"] for speed in found}
    compile_too = options.compile and not options.quick
    context = cpu.Context(options.quick, compile_too, options.threads, speeds)
    head = {"device": "cpu", "machine": facts, "threads": options.threads, "bandwidth": found}
    rows = {name: partial(cpu.ROWS_BY_NAME[name], context) for name in names}
    return _measure(names, rows, head, f"cpu-{machine.slug(facts['processor'])}", options)


def _cuda(options: argparse.Namespace) -> int:
    if options.dry_run:
        os.environ["RECGRELA_GPU_DRY_RUN"] = "1"  # graphs become plain calls
    from benchmarks import cuda, machine, probes
    from recgrela_ext import _library

    names = _names(list(cuda.ROWS_BY_NAME), options)
    if not names:
        return 0
    if options.dry_run:
        print("dry run on the CPU: it checks the benchmark and says nothing about a GPU")
        options.quick = True
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        raise SystemExit("benchmarks cuda: torch sees no CUDA device (--dry-run needs none)")
    elif "cuda" not in _library.KERNEL_DEVICES:
        raise SystemExit(
            "benchmarks cuda: no CUDA kernels: build with nvcc, set RECGRELA_CUDA_KERNELS=1"
        )
    device = torch.device("cpu") if options.dry_run else torch.device("cuda", 0)
    context = cuda.Context(device, options.quick, options.compile)
    nbytes = 2**24 if options.quick else 2**32
    found = probes.device_bandwidth(device, context.clock(), context.effort, nbytes)
    context = cuda.Context(device, options.quick, options.compile, found["best"])
    facts = machine.describe(device)
    head = {"device": "dry run" if options.dry_run else "cuda", "machine": facts}
    gpu = facts.get("accelerator", "dry-run")
    rows = {name: partial(cuda.ROWS_BY_NAME[name], context) for name in names}
    return _measure(names, rows, head | {"bandwidth": [found]}, machine.slug(gpu), options)


def _names(names: list[str], options: argparse.Namespace) -> list[str]:
    """The rows to measure; none, after printing them, with --list."""
    from benchmarks import runner

    chosen = runner.choose(names, options.only)
    if options.list:
        print("\n".join(chosen))
        return []
    return chosen


def _measure(
    names: list[str],
    rows: Mapping[str, Callable[[], list[Record]]],
    head: dict[str, Any],
    stem: str,
    options: argparse.Namespace,
) -> int:
    from benchmarks import runner, store

    path = options.out
    if path is None and not options.quick:
        path = readme.RESULTS / f"{stem}.json"
    results = store.Results(path, {**head, "quick": options.quick}, options.fresh)
    for speed in head["bandwidth"]:
        figures = (
            f"{name} {speed[name] / 1e9:.1f} GB/s" for name in ("copy", "triad") if name in speed
        )
        threads = f"{speed['threads']} thread(s): " if "threads" in speed else ""
        print(threads + ", ".join(figures))
    code = runner.run(names, rows, results)
    if path is not None:
        print(f"\n{path} holds {len(results.content['rows'])} rows")
    return code


def _data_memory(options: argparse.Namespace) -> int:
    from benchmarks import data_memory

    data_memory.run(options.events, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
