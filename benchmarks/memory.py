"""`python -m benchmarks memory`: what a new event costs, and what must be kept for it.

Points along one axis at a time, around one user with 200 items and a catalogue of 10,000: the
length of the history, users at once, the catalogue, and beside them the rebuild after a model
update and the memory of the training loss. Every point runs in a process of its own
(memory_point.py); what it cannot do is recorded with the reason. Results are written after every
point, and a run that was stopped goes on where it was, as long as sources, library and torch are
the same. "quality" takes NDCG@10 from the runs of memory_quality.py.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import multiprocessing
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import forgetting, machine, memory_point, memory_quality, peers
from benchmarks.memory_models import CANDIDATES
from benchmarks.store import write_json

ROOT = machine.ROOT
RESULT = ROOT / "benchmarks" / "results" / "memory.json"
LENGTHS = (50, 200, 2_000, 10_000, 100_000, 1_000_000)
FEW_LENGTHS = (50, 200, 2_000, 1_000_000)  # where the cost stays the same
BATCHES = (16, 256, 4096)
CATALOGUES = (10_000, 100_000, 1_000_000, 10_000_000)
REPEATED = 3  # processes for each latency at the lengths of the targets
TARGET_LENGTHS = (200, 2_000)
PARTS = ("memory", "latency", "quality")
LIMIT_BYTES = 8 << 30
LIMIT_SECONDS = {"memory": 60, "latency": 45}
SOURCES = ("memory_models.py", "memory_point.py", "memory_quality.py", "peer_models.py")
Point = dict[str, Any]


def points(part: str, quick: bool = False) -> Iterator[Point]:
    """The grid of one part, models next to each other, so that they are measured near in time."""

    def at(kind: str, model: str, length: int = 200, items: int = 10_000, batch: int = 1) -> Point:
        return {"part": part, "kind": kind, "model": model, "length": length, "items": items,
                "batch": batch, "round": 0}  # fmt: skip

    if quick:
        yield from (at("event", m, 50) for m in ("sasrec-cache", "ours"))
        yield from (at("ranking", m, 50) for m in ("sasrec-cache", "ours+int8"))
        yield from (at("update", m) for m in ("gru4rec", "ours"))
        yield from (at("history", m, 50) for m in ("lrurec", "ours") if part == "memory")
        yield from (at("loss", m, 0, 1000, 64) for m in ("dense", "ours") if part == "memory")
        return
    for turn in range(REPEATED if part == "latency" else 1):
        for length in LENGTHS:
            for name, candidate in CANDIDATES.items():
                wanted = length in (LENGTHS if candidate.grows else FEW_LENGTHS)
                if wanted and (turn == 0 or length in TARGET_LENGTHS):
                    yield {**at("event", name, length), "round": turn}
    for batch in BATCHES:
        for name, candidate in CANDIDATES.items():
            if candidate.way != "whole":
                yield at("event", name, batch=batch)
    for items in CATALOGUES:
        for name in ("sasrec-window", "sasrec-cache", "ours", "ours+bfloat16", "ours+int8"):
            yield at("ranking", name, items=items)
    steps = [n for n, c in CANDIDATES.items() if c.way == "step"]
    yield from (at("update", name) for name in steps)
    if part == "latency":
        return
    for batch in (256, 4096):
        yield from (
            at("ranking", m, items=1_000_000, batch=batch) for m in ("sasrec-cache", "ours")
        )
    for items in CATALOGUES:
        yield from (at("loss", name, 0, items, 512) for name in ("dense", "ours"))
    yield from (at("loss", name, 0, 1_000_000, 3000) for name in ("dense", "ours"))
    for length in (200, 10_000, 1_000_000):
        yield from (at("history", name, length) for name in ("sasrec-whole", *reversed(steps)))


def name_of(point: Point) -> str:
    sizes = f"L{point['length']}/items{point['items']}/batch{point['batch']}"
    turn = f"/{point['round']}" if point["round"] else ""
    return f"{point['part']}/{point['kind']}/{point['model']}/{sizes}{turn}"


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--part", action="append", choices=PARTS, help="default: all; repeatable")
    command.add_argument(
        "--only", action="append", metavar="TEXT", help="points with this in their name; repeatable"
    )
    command.add_argument("--list", action="store_true", help="print the names of the points")
    command.add_argument("--quick", action="store_true", help="a few small points, a minute")
    command.add_argument("--fresh", action="store_true", help="measure these points again")
    command.add_argument(
        "--seconds", type=float, help="start no new point after so many; call again to go on"
    )
    command.add_argument("--work", type=Path, help="of memory_quality.py: trained models")
    command.add_argument("--out", type=Path, help=f"default: {RESULT.relative_to(ROOT)}")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    parts = options.part or PARTS
    grid = [p for part in parts if part != "quality" for p in points(part, options.quick)]
    if options.only:
        grid = [p for p in grid if any(text in name_of(p) for text in options.only)]
    if options.list:
        print("\n".join(map(name_of, grid)))
        return 0
    machine.require_operators()
    path = options.out or (None if options.quick else RESULT)
    results = Results(path, options.quick)
    if options.fresh:
        results.forget(grid)
    if "quality" in parts and options.work:
        results.content["quality"] = quality(options.work)
        if "missing" not in results.content["quality"][memory_quality.OURS]:
            results.content["forgetting"] = forgetting.measure(options.work)
        results.save()
    measure(grid, results, options.seconds)
    return 0


def measure(grid: list[Point], results: Results, seconds: float | None) -> None:
    """Runs the points that `results` lacks; with a bar."""
    tqdm.monitor_interval = 0  # a thread would not survive the forks
    torch.set_num_threads(1)
    end = None if seconds is None else time.monotonic() + seconds
    todo = [p for p in grid if not results.has(p)]
    effort = {"rounds": 3, "sample": 0.001} if results.quick else {"rounds": 15, "sample": 0.02}
    with tqdm(total=len(grid), initial=len(grid) - len(todo), unit="point") as bar:
        for point in todo:
            if end is not None and time.monotonic() > end:
                bar.write(f"{bar.total - bar.n} points are left: give the command again")
                return
            bar.set_description(name_of(point), refresh=True)
            found = results.shorter_failed(point) or _measure(point, effort)
            results.add(point, found)
            bar.write(f"{name_of(point)}: {json.dumps(found)}", file=sys.stdout)
            bar.update()


def _child(point: Point, answer: Any, limit: int) -> None:
    """The limit of a memory point is one of processor time: other work on the machine makes nothing
    fail. Not that of a latency: under it Linux counts processor time in ticks alone."""
    if point["part"] == "memory":
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    memory_point.main(point, answer)


def _measure(point: Point, effort: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own, forked from this one, which has imported everything and computed
    nothing: torch need not be loaded for every point."""
    limit = LIMIT_SECONDS[point["part"]]
    context = multiprocessing.get_context("fork")
    there, here = context.Pipe(duplex=False)
    whole = {**point, **effort, "limit_bytes": LIMIT_BYTES}
    process = context.Process(target=_child, args=(whole, here, limit))
    process.start()
    here.close()
    try:
        wait = limit if point["part"] == "latency" else None
        found = dict(there.recv()) if there.poll(wait) else {"missing": f"more than {limit} s"}
    except EOFError:
        process.join()
        found = {"missing": "killed: no memory left"}
        if process.exitcode == -signal.SIGXCPU:
            found = {"missing": f"more than {limit} s"}
    finally:
        process.kill()
        process.join()
        there.close()
    if "error" in found:
        raise SystemExit(f"benchmarks memory: {name_of(point)}: {found['error']}")
    return found


class Results:
    """The file: {benchmark, schema, command, machine, limits, quick, points: {name: {point, key,
    date, commit, found}}, quality, forgetting}; written whole after every point."""

    def __init__(self, path: Path | None, quick: bool) -> None:
        self.path, self.quick = path, quick
        self.key = source_key()
        old: dict[str, Any] = {}
        if path is not None and path.exists():
            old = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: p for name, p in old.get("points", {}).items() if p["key"] == self.key}
        self.content = {
            "benchmark": "memory",
            "schema": 1,
            "command": "python -m benchmarks memory",
            "quick": quick,
            "threads": 1,
            "machine": machine.describe(),
            "limits": {"bytes": LIMIT_BYTES, "seconds": LIMIT_SECONDS},
            "points": kept,
            "quality": old.get("quality", {}),
            "forgetting": old.get("forgetting", {}),
        }

    def forget(self, grid: list[Point]) -> None:
        for point in grid:
            self.content["points"].pop(name_of(point), None)

    def has(self, point: Point) -> bool:
        return name_of(point) in self.content["points"]

    def shorter_failed(self, point: Point) -> dict[str, Any] | None:
        """Where fewer items, or a smaller catalogue, were too much already, more of them are."""
        for other in self.content["points"].values():
            same = all(
                other["point"][name] == point[name] for name in ("part", "kind", "model", "batch")
            )
            smaller = all(other["point"][n] <= point[n] for n in ("length", "items"))
            if same and smaller and "missing" in other["found"]:
                return dict(other["found"])
        return None

    def add(self, point: Point, found: dict[str, Any]) -> None:
        self.content["points"][name_of(point)] = {
            "point": point,
            "key": self.key,
            "date": machine.today(),
            "commit": machine.commit(),
            "found": found,
        }
        self.save()

    def save(self) -> None:
        if self.path is None:
            return
        write_json(self.path, self.content)


def source_key() -> str:
    """Of what is measured: our library and package, the peers, and the code of a point, comments
    and docstrings apart."""
    digest = hashlib.sha256(f"{torch.__version__} {machine.library_hash()}".encode())
    own = sorted((ROOT / "recgrela_ext").rglob("*.py"))
    for path in [*own, *(ROOT / "benchmarks" / name for name in SOURCES)]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            first = body[0] if isinstance(body, list) and body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body[0] = ast.Pass()  # type: ignore[attr-defined]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:16]


def quality(work: Path) -> dict[str, Any]:
    """NDCG@10 of the runs that are done; why not, for the others."""
    found: dict[str, Any] = {}
    for name in memory_quality.MODELS:
        try:
            found[name] = memory_quality.collect(work, name)
        except peers.Missing as missing:
            found[name] = {"missing": str(missing)}
    return found
