"""Peak memory of reading one long history into a state.

    python benchmarks/long_history.py         # writes benchmarks/results/long-history.json

`prefill` and `prefill_packed` of one user, 4 layers of 64, in a process each: the growth of the
peak resident memory from after a short prefill (which warms everything up) to after the long one.
The ids, 8 bytes an item, are there before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from recgrela_ext import RecGRELA, RecGRELAConfig
from recgrela_ext.evaluation.result import machine_info

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = (10_000, 100_000, 1_000_000)


def main() -> None:
    """Run every length and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/long-history.json")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], int(options.measure[1]))))
        return
    rows = []
    for method in ("prefill", "prefill_packed"):
        for length in LENGTHS:
            command = [sys.executable, __file__, "--measure", method, str(length)]
            answer = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append({"method": method, "length": length, **json.loads(answer.stdout)})
            print(rows[-1], flush=True)
    result = {"rows": rows, "machine": machine_info(torch.device("cpu"))}
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measure(method: str, length: int) -> dict[str, float]:
    torch.set_num_threads(1)
    model = RecGRELA(RecGRELAConfig(num_items=1000)).eval()
    items = torch.randint(1, 1001, (length,))

    def run(part: torch.Tensor) -> None:
        if method == "prefill":
            model.prefill(part[None])
        else:
            model.prefill_packed(part, torch.tensor([0, len(part)]))

    run(items[:5000])
    before = peak_bytes()
    run(items)
    return {"megabytes": (peak_bytes() - before) / 1e6}


def peak_bytes() -> int:
    """High-water mark of this program."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
