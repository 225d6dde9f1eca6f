"""Peak memory and time of loading and splitting ten million made-up events.

    python -m benchmarks data-memory            # writes benchmarks/results/data-memory.json

Two sources: numpy columns in memory, and a CSV file. Each is measured in a process of its own, as
the growth of its peak resident memory from before the load to after the leave-one-out split, over
the 24 bytes an event takes as three int64 columns. Needs the extra `data`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import ROOT

USERS, ITEMS = 70_000, 18_000


def run(events: int, out: Path) -> None:
    """Measure both sources and write the file."""
    result: dict[str, Any] = {"events": events, "raw_bytes": 24 * events, "sources": {}}
    with tempfile.TemporaryDirectory() as folder:
        columns = Path(folder) / "log.npz"
        write_log(columns, events)
        for kind in ("columns", "csv"):
            source = columns if kind == "columns" else columns.with_suffix(".csv")
            command = [sys.executable, "-m", "benchmarks.data_memory", kind, str(source)]
            answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
            facts = json.loads(answer.stdout)
            facts["peak_over_raw"] = round(facts["peak_bytes"] / result["raw_bytes"], 2)
            result["sources"][kind] = facts
            print(kind, facts)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def write_log(path: Path, events: int) -> None:
    import pandas as pd

    rng = np.random.default_rng(0)
    raw = {
        "user": rng.integers(0, USERS, events),
        "item": rng.integers(0, ITEMS, events),
        "timestamp": rng.integers(1_500_000_000, 1_600_000_000, events),
    }
    np.savez(path, **raw)
    pd.DataFrame(raw).to_csv(path.with_suffix(".csv"), index=False)


def measure(kind: str, source: Path) -> dict[str, float]:
    import pandas as pd

    from recgrela_ext.data import Interactions

    warm = {"user": [1, 1, 1], "item": [1, 2, 3], "timestamp": [1, 2, 3]}
    Interactions.from_frame(pd.DataFrame(warm)).leave_one_out()  # imports are not data
    raw = dict(np.load(source)) if kind == "columns" else None
    before = peak_bytes()
    start = time.perf_counter()
    log = Interactions.from_frame(raw) if raw is not None else Interactions.from_file(source)
    loaded = time.perf_counter()
    train, _, test = log.leave_one_out()
    done = time.perf_counter()
    assert len(train.items) + 2 * len(test) == len(log)
    return {
        "peak_bytes": peak_bytes() - before,
        "load_seconds": round(loaded - start, 2),
        "split_seconds": round(done - loaded, 2),
    }


def peak_bytes() -> int:
    """High-water mark of this program; ru_maxrss would include its parent's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
