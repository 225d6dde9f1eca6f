"""Peak memory of loading and splitting stays a small multiple of the raw columns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, sys, warnings
import numpy as np, pandas
from recgrela_ext.data import Interactions
warnings.simplefilter("ignore")
# ru_maxrss would start at what the parent process once used
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
kind, path = sys.argv[1:]
small = pandas.DataFrame({"user": [1, 1, 1], "item": [1, 2, 3], "timestamp": [1, 2, 3]})
small.to_csv(path + ".small.csv", index=False)
Interactions.from_file(path + ".small.csv").leave_one_out()
raw = {name: column for name, column in np.load(path).items()} if kind == "frame" else None
before = peak()
log = Interactions.from_frame(raw) if kind == "frame" else Interactions.from_file(path + ".csv")
train, valid, test = log.leave_one_out()
after = peak()
print(json.dumps([(after - before) * 1024, len(log), len(train.items), len(test)]))
"""


def test_peak_memory_is_proportional_to_the_raw_columns(tmp_path):
    pandas = pytest.importorskip("pandas")
    rows, users = 1_500_000, 15_000
    rng = np.random.default_rng(0)
    raw = {
        "user": rng.integers(0, users, rows),
        "item": rng.integers(0, 20_000, rows),
        "timestamp": rng.integers(1_500_000_000, 1_600_000_000, rows),
    }
    path = tmp_path / "raw.npz"
    np.savez(path, **raw)
    pandas.DataFrame(raw).to_csv(f"{path}.csv", index=False)
    size = sum(column.nbytes for column in raw.values())
    for kind, factor, chunk in (("frame", 3.0, 0), ("file", 3.0, 100 << 20)):
        answer = subprocess.run(
            [sys.executable, "-c", SCRIPT, kind, str(path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        peak, events, trained, targets = json.loads(answer.stdout)
        assert (events, trained, targets) == (rows, rows - 2 * users, users)
        # A reader holds one chunk of parsed text beside the columns, whatever the file's length.
        assert peak < factor * size + chunk, f"{kind}: {peak / size:.2f} times the raw columns"
