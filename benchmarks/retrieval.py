"""Exact top-10 of 4,096 users among a million items: speed, memory, and what small tables lose.

    pip install faiss-cpu
    python benchmarks/retrieval.py            # writes benchmarks/results/retrieval.json

Random vectors of width 64, float32, two threads. Each method and size runs in a process of its own;
seconds are the least of `--repeats` calls, megabytes the growth of the peak resident memory from
before the first call, the vectors themselves being there already (0 where making the table took
more). A method's items are compared
with those of `ops.topk_scores` before its speed counts. The share of the true ten that a bfloat16
or int8 table still finds is given beside its bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from recgrela_ext import ops
from recgrela_ext.evaluation.result import machine_info

ROOT = Path(__file__).resolve().parents[1]
WIDTH, K, THREADS = 64, 10, 2
SIZES = ((4096, 1_000_000), (256, 1_000_000), (1, 1_000_000), (4096, 100_000))
METHODS = ("topk_scores", "bfloat16", "int8", "faiss_flat", "chunked_torch", "dense_torch")
DENSE_LIMIT = 1 << 29  # scores of the dense method at most


def main() -> None:
    """Run every method and size and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/retrieval.json")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        method, users, items = options.measure
        print(json.dumps(measure(method, int(users), int(items), options.repeats)))
        return
    rows = []
    for users, items in SIZES:
        for method in METHODS:
            if method == "dense_torch" and users * items > DENSE_LIMIT:
                continue
            command = [sys.executable, __file__, "--measure", method, str(users), str(items)]
            command += ["--repeats", str(options.repeats)]
            answer = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append({"method": method, "users": users, "items": items})
            rows[-1].update(json.loads(answer.stdout))
            print(rows[-1], flush=True)
    result = {"width": WIDTH, "k": K, "rows": rows, "machine": machine_info(torch.device("cpu"))}
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measure(method: str, users: int, items: int, repeats: int) -> dict[str, object]:
    torch.set_num_threads(THREADS)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(users, WIDTH, generator=generator)
    table = torch.randn(items, WIDTH, generator=generator)
    run, table_bytes = prepare(method, hidden, table)
    run(hidden[:1])  # libraries start their threads
    before = peak_bytes()
    start = time.perf_counter()
    found = run(hidden)
    seconds = [time.perf_counter() - start]
    grown = peak_bytes() - before
    for _ in range(repeats - 1):
        start = time.perf_counter()
        run(hidden)
        seconds.append(time.perf_counter() - start)
    true = ops.topk_scores(hidden, table, K, 0)[1]
    if method not in ("bfloat16", "int8"):
        # sums in another order may swap items that all but tie
        assert float((found == true).float().mean()) > 0.999, method
    hits = (found[:, :, None] == true[:, None, :]).any(2).float().mean()
    return {
        "seconds": min(seconds),
        "megabytes": grown / 1e6,
        "table_megabytes": table_bytes / 1e6,
        "found": float(hits),
    }


def prepare(method: str, hidden: Tensor, table: Tensor) -> tuple[Callable[[Tensor], Tensor], int]:
    """The method, and the bytes of its table."""
    table[0] = 0
    size = table.numel()
    if method == "topk_scores":
        return lambda h: ops.topk_scores(h, table, K, 0)[1], 4 * size
    if method == "bfloat16":
        low = table.bfloat16()
        return lambda h: ops.topk_scores(h, low, K, 0)[1], 2 * size
    if method == "int8":
        scale = table.abs().amax(1) / 127
        whole = (table / scale.clamp(min=1e-30)[:, None]).round().to(torch.int8)
        return lambda h: ops.topk_scores(h, whole, K, 0, scale)[1], size + 4 * len(table)
    if method == "faiss_flat":
        import faiss

        faiss.omp_set_num_threads(THREADS)
        index = faiss.IndexFlatIP(WIDTH)
        index.add(table.numpy())
        return lambda h: torch.from_numpy(index.search(h.numpy(), K)[1]), 4 * size
    return (chunked if method == "chunked_torch" else dense)(table), 4 * size


def dense(table: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda hidden: (hidden @ table.t()).topk(K).indices


def chunked(table: Tensor, columns: int = 8192) -> Callable[[Tensor], Tensor]:
    """The ten lines one would write."""

    def run(hidden: Tensor) -> Tensor:
        best = hidden.new_full((len(hidden), K), -torch.inf)
        items = torch.zeros(len(hidden), K, dtype=torch.int64)
        for start in range(0, len(table), columns):
            scores = hidden @ table[start : start + columns].t()
            top = scores.topk(K)
            best, order = torch.cat((best, top.values), 1).topk(K)
            items = torch.cat((items, top.indices + start), 1).gather(1, order)
        return items

    return run


def peak_bytes() -> int:
    """High-water mark of this program."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
