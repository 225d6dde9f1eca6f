"""Hours of mixed work in one process, while memory, descriptors and threads are watched.

    python -m tests.soak --hours 2 --out soak.json  # a sample every 30 s, judged at the end
    python -m tests.soak --judge soak.json          # judges a file again

A round trains, follows events, recommends, saves and loads, and makes mistakes that must be
refused. Everything it makes is dropped at its end, so that what grows over the rounds is a leak.
What is judged is the memory that is held: what the C library keeps of freed memory for later, up to
40 MiB that come and go, is given back before a sample (its size before is in the record).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recgrela_ext import (
    CheckpointError,
    ItemTable,
    RecGRELA,
    SeenItems,
    StateError,
    TrainConfig,
    UserState,
    UserStateStore,
    evaluate,
    fit,
)
from recgrela_ext.data.synthetic import make_synthetic
from tests.trust import records

WARM_UP = 0.2  # share of the samples before memory has to be flat
# MiB an hour and KiB a round, of the memory that is held, by the median slope. A round makes some
# thousand calls: two bytes that each leaves are too many.
MAX_GROWTH, MAX_ROUND = 6.0, 2.0
MAX_OBJECTS = 20  # Python objects, in all: a cache may fill late
USERS, EVENTS = 3000, 600


class Work:
    """What a round does; one model that is trained on and followed over all rounds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        log, _ = make_synthetic(num_users=200, num_items=480, mean_length=60)
        self.train, self.valid, _ = log.leave_one_out()
        torch.manual_seed(0)
        self.model = RecGRELA.for_data(self.train, num_layers=2)
        self.rng = np.random.default_rng(0)
        self.round = 0

    def parts(self) -> list[Callable[[], None]]:
        return [self.training, self.streaming, self.retrieval, self.saving, self.mistakes]

    def training(self) -> None:
        config = TrainConfig(targets_per_step=800, checkpoint_every_steps=3, seed=self.round)
        place = self.folder / "run"
        for steps in (4, 8):  # the second goes on from the first one's checkpoint
            fit(
                self.model,
                self.train,
                self.valid,
                steps=steps,
                config=config,
                checkpoint_dir=place,
                progress=False,
            )
        shutil.rmtree(place)
        evaluate(self.model, self.valid, bootstrap=0, baselines={}, progress=False)

    def streaming(self) -> None:
        self.gone = 0

        def count(evicted: Any) -> None:
            self.gone += len(evicted.users)

        store = UserStateStore(self.model, USERS // 2, "int8", active=200, on_evict=count)
        for _ in range(8):
            users = self.rng.integers(0, USERS, EVENTS)
            items = torch.from_numpy(self.rng.integers(1, 481, EVENTS))
            store.step(users, items)
        store.save(self.folder / "users.safetensors")
        again = UserStateStore.load(self.folder / "users.safetensors", self.model)
        assert len(again) == len(store)
        assert self.gone > 0
        state, seen, _ = again.lookup(again.users[:50])
        for i in range(50):
            blob = state.to_bytes(i, "bfloat16", seen)
            UserState.from_bytes(blob, self.model)
            SeenItems.from_bytes(blob)

    def retrieval(self) -> None:
        histories = torch.from_numpy(self.rng.integers(1, 481, (64, 50)))
        state = self.model.prefill(histories, torch.full((64,), 50))
        tables = [None, *(ItemTable(self.model, name) for name in ("bfloat16", "int8"))]

        def ask() -> None:
            for table in tables:
                self.model.recommend_from_state(state, 10, table=table)
                self.model.recommend(histories[:16], k=10, table=table)

        askers = [threading.Thread(target=ask) for _ in range(4)]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()

    def saving(self) -> None:
        place = self.folder / "model"
        self.model.save_pretrained(place)
        again = RecGRELA.from_pretrained(place)
        assert again.fingerprint() == self.model.fingerprint()
        shutil.rmtree(place)

    def mistakes(self) -> None:
        """Errors on the way out must not hold on to anything."""
        state = self.model.init_state(2)
        refused: list[tuple[type[Exception], Callable[[], Any]]] = [
            (ValueError, lambda: self.model.step(torch.tensor([1, 9999]), state)),
            (ValueError, lambda: self.model.recommend(torch.tensor([[5000]]), k=3)),
            (StateError, lambda: UserState.from_bytes(state.to_bytes(0)[:-1], self.model)),
            (CheckpointError, lambda: RecGRELA.from_pretrained(self.folder / "nowhere")),
            (StateError, lambda: UserStateStore.load(self.folder / "nowhere", self.model)),
        ]
        for error, call in refused:
            for _ in range(20):
                try:
                    call()
                except error:
                    continue
                raise AssertionError(f"{error.__name__} was expected")


def sample(start: float, rounds: int) -> dict[str, float]:
    gc.collect()
    before = resident_mib()
    give_back()
    return {
        "seconds": round(time.monotonic() - start, 1),
        "rounds": rounds,
        "rss_mib": before,
        "held_mib": resident_mib(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "objects": len(gc.get_objects()),
    }


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 2)


def give_back() -> None:
    """Freed memory, to the system; only glibc can be asked."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def judge(samples: list[dict[str, float]]) -> dict[str, Any]:
    """Whether what was sampled stays flat after warm-up; `findings` says what does not."""
    steady = samples[int(len(samples) * WARM_UP) :]
    if len(steady) < 4:
        return {"findings": [f"too few samples to judge: {len(steady)} after warm-up"]}
    held = [one["held_mib"] for one in steady]
    hourly = median_slope([one["seconds"] / 3600 for one in steady], held)
    a_round = 1024 * median_slope([one["rounds"] for one in steady], held)
    findings = []
    if hourly > MAX_GROWTH:
        findings.append(f"memory grows by {hourly:.1f} MiB an hour, over {MAX_GROWTH}")
    if a_round > MAX_ROUND:
        findings.append(f"memory grows by {a_round:.1f} KiB a round, over {MAX_ROUND}")
    quarter = max(1, len(steady) // 4)
    for name, most in (("descriptors", 0), ("threads", 0), ("objects", MAX_OBJECTS)):
        first = max(one[name] for one in steady[:quarter])
        last = max(one[name] for one in steady[-quarter:])
        if last > first + most:
            findings.append(f"{name} grow from {first:.0f} to {last:.0f}")
    return {
        "mib_per_hour": round(hourly, 2),
        "kib_per_round": round(a_round, 2),
        "held_mib": [held[0], held[-1]],
        "findings": findings,
    }


def median_slope(x: list[float], y: list[float]) -> float:
    """Theil and Sen's: the median over pairs a third of the points apart, so that one spike is
    nothing."""
    points = list(zip(x, y, strict=True))
    apart = max(1, len(points) // 3)
    pairs = zip(points[:-apart], points[apart:], strict=True)
    return statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in pairs)


@contextlib.contextmanager
def quiet_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="recgrela-soak-") as name, warnings.catch_warnings():
        warnings.simplefilter("error")
        yield Path(name)


def soak(seconds: float, every: float, out: Path | None) -> dict[str, Any]:
    """Rounds of work for `seconds`; the record, also written to `out` at every sample."""
    start = time.monotonic()
    record: dict[str, Any] = {
        "kind": "soak",
        "seconds": seconds,
        "versions": {**records.versions(), "commit": records.commit()},
        "finished": False,
        "samples": [],
    }
    with quiet_folder() as folder:
        work = Work(folder)
        due = 0.0
        while True:
            for part in work.parts():
                part()
            work.round += 1
            elapsed = time.monotonic() - start
            over = elapsed >= seconds
            if over or elapsed >= due:
                due = elapsed + every
                record["samples"].append(sample(start, work.round))
                record["finished"] = over
                record["verdict"] = judge(record["samples"])
                if out is not None:
                    records.write(out, record)
            if over:
                return record


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--hours", type=float, default=2.0, help="how long (default: 2)")
    parser.add_argument(
        "--every", type=float, default=30.0, help="seconds between samples (default: 30)"
    )
    parser.add_argument("--out", type=Path, default=records.FOLDER / "soak.json",
                        help="file of the record (default: the committed one)")  # fmt: skip
    parser.add_argument("--judge", type=Path, help="a file to judge again; nothing is run")
    options = parser.parse_args()
    if options.judge:
        record = records.read(options.judge)
        record["verdict"] = judge(record["samples"])
    else:
        torch.set_num_threads(1)
        record = soak(3600 * options.hours, options.every, options.out)
    print(record["verdict"])
    return 0 if record["finished"] and not record["verdict"]["findings"] else 1


if __name__ == "__main__":
    sys.exit(main())
