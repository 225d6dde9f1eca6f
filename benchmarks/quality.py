"""A queue of quality runs: one process at a time, one result a run, resumed after anything.

    python -m benchmarks quality --data DIR --work DIR            # what the queue still lacks
    python -m benchmarks quality --list                           # what there is and what is left

A queue (benchmarks/queues/*.json) holds `targets`, the sha256 of every order's test targets, a
`recipe`, and `runs`: {model, data, order, seeds, config, train, limits}. Every run trains on the
training part, is selected on validation and ranks validation and test with the same code. Its
result goes to benchmarks/results/quality/<name>.json in the schema of `recgrela_ext.evaluation`,
the ranks of its targets beside it (`.npz`, for paired tests), and a line to log.jsonl there when it
begins and when it ends, so that every run tried stays on record. The name holds a hash of all that
decides the figures: a run whose settings were changed is another run.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
QUEUE = ROOT / "benchmarks" / "queues" / "ml-1m.json"
RESULTS = ROOT / "benchmarks" / "results" / "quality"
COUNTING = ("Popularity", "Markov", "ItemKNN")
_FIELDS = {"label", "model", "data", "order", "seeds", "config", "train", "limits"}


@dataclass(frozen=True)
class Run:
    """One model, trained once. `config`: the model's; `train`: TrainConfig's; `limits`: fit's."""

    model: str
    data: str
    order: str
    seed: int
    config: dict[str, Any]
    train: dict[str, Any]
    limits: dict[str, Any]
    target_sha256: str
    label: str = ""

    @property
    def setting(self) -> str:
        """What all seeds of this run share, as eight digits."""
        decisive = {k: v for k, v in asdict(self).items() if k not in ("seed", "label")}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def name(self) -> str:
        return f"{self.data}-{self.order}-{self.model.lower()}-{self.setting}-s{self.seed}"


def read_queue(path: Path) -> list[Run]:
    """Every run of a queue, in its order; SystemExit, one line, for a queue that cannot work."""

    def need(holds: bool, what: str) -> None:
        if not holds:
            raise SystemExit(f"quality: {path} must {what}")

    try:
        queue = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"quality: {path} must be a queue in JSON, got {error}") from None
    need(isinstance(queue, dict) and {"targets", "runs"} <= queue.keys(), "hold targets and runs")
    runs = []
    for number, given in enumerate(queue["runs"], start=1):
        unknown = given.keys() - _FIELDS
        need(not unknown, f"name known fields in run {number}, got {', '.join(sorted(unknown))}")
        missing = {"model", "data", "order", "seeds"} - given.keys()
        need(not missing, f"give {', '.join(sorted(missing))} in run {number}")
        sha256 = queue["targets"].get(given["data"], {}).get(given["order"])
        need(sha256, f"give the targets' sha256 of {given['data']}, order {given['order']}")
        counting = given["model"] in COUNTING
        train = {} if counting else {**queue.get("recipe", {}), **given.get("train", {})}
        limits = {} if counting else given.get("limits", queue.get("limits", {}))
        for seed in given["seeds"]:
            runs.append(
                Run(given["model"], given["data"], given["order"], seed, given.get("config", {}),
                    train, limits, sha256, given.get("label", given["model"]))
            )  # fmt: skip
    names = [run.name for run in runs]
    need(len(set(names)) == len(names), "hold no run twice")
    return runs


def note(results: Path, run: Run, event: str, **facts: Any) -> None:
    """One more line of the log."""
    results.mkdir(parents=True, exist_ok=True)
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    line = json.dumps({"at": at, "run": run.name, "event": event, "label": run.label, **facts})
    with (results / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(line + "\n")


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--queue", type=Path, default=QUEUE)
    parser.add_argument("--data", type=Path, default=os.environ.get("RECGRELA_DATA"),
                        help="folder of the logs (default: RECGRELA_DATA)")  # fmt: skip
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "quality",
                        help="folder of checkpoints, resumed from")  # fmt: skip
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", metavar="TEXT", default="", help="runs whose names hold this")
    parser.add_argument("--minutes", type=float, help="begin no further run after these")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--list", action="store_true", help="print the runs; train nothing")


def run(options: Namespace) -> int:
    """Does what is missing, one run after the other; 1 when one of them failed."""
    runs = [run for run in read_queue(options.queue) if options.only in run.name]
    left = [run for run in runs if not (options.results / f"{run.name}.json").exists()]
    if options.list:
        for one in runs:
            print(f"{'to do' if one in left else 'done '}  {one.name}  {one.label}")
        return 0
    if options.data is None:
        raise SystemExit("quality: --data (or RECGRELA_DATA) must name the folder of the logs")
    options.work.mkdir(parents=True, exist_ok=True)
    with (options.work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"quality: another queue runs in {options.work}") from None
        return _work_off(left, options)


def _work_off(left: list[Run], options: Namespace) -> int:
    start, failed = time.monotonic(), 0
    for number, one in enumerate(left, start=1):
        if options.minutes is not None and time.monotonic() - start > 60 * options.minutes:
            print(f"quality: {len(left) - number + 1} runs are left for the next time")
            break
        print(f"[{number}/{len(left)}] {one.name}  {one.label}", flush=True)
        note(options.results, one, "begin", **_settings(one))
        order = {"run": asdict(one), "data": str(options.data),
                 "work": str(options.work / one.name),
                 "results": str(options.results), "threads": options.threads}  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.quality_run", json.dumps(order)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        if code != 0:
            failed += 1
            note(options.results, one, "failed", code=code)
    return 1 if failed else 0


def _settings(one: Run) -> dict[str, Any]:
    return {"config": one.config, "train": one.train, "limits": one.limits}
