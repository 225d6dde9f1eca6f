"""A queue of quality runs: one process at a time, one result a run, resumed after anything.

    python -m benchmarks quality --data DIR --work DIR            # what the queue still lacks
    python -m benchmarks quality --list                           # what there is and what is left
    python -m benchmarks quality --only NAME --again DIR          # a run that is done, once more

What a queue holds: see benchmarks/quality_queue.py. Every run trains on the training part, is
selected on validation and ranks validation and test with the same code. Its result goes to
benchmarks/results/quality/<name>.json in the schema of `recgrela_ext.evaluation`, the ranks of its
test targets beside it (`.npz`, for paired tests), and a line to log.jsonl there when it begins and
when it ends, so that every run tried stays on record. The name holds a hash of all that decides the
figures: a run whose settings were changed is another run.

A run that was killed goes on from its last checkpoint in --work, at most a minute back, when the
command is given again; on another machine it starts over. The same command given twice works on two
runs at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from benchmarks.quality_queue import Queue, Run, read_queue

ROOT = Path(__file__).resolve().parents[1]
QUEUES = ROOT / "benchmarks" / "queues"
RESULTS = ROOT / "benchmarks" / "results" / "quality"


def note(results: Path, run: Run, event: str, **facts: Any) -> None:
    """One more line of the log."""
    results.mkdir(parents=True, exist_ok=True)
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    line = json.dumps({"at": at, "run": run.name, "event": event, "label": run.label, **facts})
    with (results / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(line + "\n")


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--queue", type=Path, default=QUEUES / "baselines.json")
    parser.add_argument("--data", type=Path, default=os.environ.get("RECGRELA_DATA"),
                        help="folder of the logs (default: RECGRELA_DATA)")  # fmt: skip
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "quality",
                        help="folder of checkpoints, resumed from")  # fmt: skip
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--again", type=Path, metavar="FOLDER",
                        help="train what --results has once more, into this folder")  # fmt: skip
    parser.add_argument("--only", metavar="TEXT", default="",
                        help="runs whose names or labels hold this")  # fmt: skip
    parser.add_argument("--minutes", type=float, help="begin no further run after these")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--list", action="store_true", help="print the runs; train nothing")


def run(options: Namespace) -> int:
    """Does what is missing, one run after the other; 1 when one of them failed."""
    queue = read_queue(options.queue)
    options.known = options.results
    if options.again is not None:
        options.results = options.again
    if options.list:
        for one in _named(queue, options):
            done = one.result(options.results)
            told = "to do" if done is None else f"{done['valid']['seen_included/ndcg@10']:.4f}"
            print(f"{told:6}  {one.name}  {one.label}")
        return 0
    if options.data is None or not Path(options.data).is_dir():
        raise SystemExit("quality: --data (or RECGRELA_DATA) must name the folder of the logs")
    if options.again is not None and not _named(queue, options):
        raise SystemExit(f"quality: no run that is done has {options.only!r} in name or label")
    options.work.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the run's process ends too
    code = _work_off(queue, options)
    if options.again is not None:
        _compare(_named(queue, options), options)
    return code


def _named(queue: Queue, options: Namespace) -> list[Run]:
    runs = queue.runs(options.known)
    if options.again is not None:
        runs = [one for one in runs if one.result(options.known) is not None]
    return [one for one in runs if options.only in one.name or options.only in one.label]


def _compare(runs: list[Run], options: Namespace) -> None:
    """NDCG@10 of test then and now."""
    for one in runs:
        results = one.result(options.known), one.result(options.again)
        if results[0] is not None and results[1] is not None:
            for view in ("seen_included", "seen_excluded"):
                then, now = (found["mean"][f"{view}/ndcg@10"] for found in results if found)
                print(f"{one.name}  {view}/ndcg@10: {now:.4f}, was {then:.4f}")


def _work_off(queue: Queue, options: Namespace) -> int:
    """Looks again after every run: a row's last trial decides which setting gets more seeds."""
    start, failed = time.monotonic(), set()
    while True:
        runs = _named(queue, options)
        left = [one for one in runs if one.result(options.results) is None]
        todo = [one for one in left if one.name not in failed]
        if not todo:
            break
        if options.minutes is not None and time.monotonic() - start > 60 * options.minutes:
            print(f"quality: {len(todo)} runs are left for the next time")
            break
        for one in todo:
            lock = _claim(options.work, one)
            if lock is not None:
                break
        else:
            print(f"quality: {len(todo)} runs are left, and others are at work on them")
            break
        with lock:
            print(f"[{len(runs) - len(left) + 1}/{len(runs)}] {one.name}  {one.label}", flush=True)
            if one.result(options.results) is None and not _process(one, options, lock):
                failed.add(one.name)
    return 1 if failed else 0


def _claim(work: Path, one: Run) -> IO[str] | None:
    """An open file that holds the lock of a run, or None when another process has it."""
    lock = (work / f"{one.name}.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def _process(one: Run, options: Namespace, lock: IO[str]) -> bool:
    """Trains and ranks in a process that holds the lock too, should this one be killed."""
    settings = {"config": one.config, "train": one.train, "limits": one.limits}
    note(options.results, one, "begin", **settings)
    order = {"run": asdict(one), "data": str(options.data), "work": str(options.work / one.name),
             "results": str(options.results), "threads": options.threads}  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.quality_run", json.dumps(order)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    code = subprocess.run(
        command, cwd=ROOT, env=environment, check=False, pass_fds=[lock.fileno()]
    ).returncode
    if code != 0:
        note(options.results, one, "failed", code=code)
    return code == 0
