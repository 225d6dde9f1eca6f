"""What the machine can do at all: copy and triad bandwidth, multiply-adds a second.

The CPU's are small C loops (probes.c), compiled for this machine when they are needed. STREAM's
way of counting: a triad moves three rows, a copy two, whatever the caches fetch besides.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch

from benchmarks.timing import Clock, CpuClock, Effort, interleave

FMA_ROUNDS = 5_000_000  # some 10 ms: starting a thread must not count
_SOURCE = Path(__file__).with_name("probes.c")


class ProbeError(RuntimeError):
    """The machine could not be probed; the text says why."""


@cache
def _library() -> ctypes.CDLL:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise ProbeError("no C compiler was found (cc, gcc or CC)")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "probes.so"
        flags = ["-O3", "-march=native", "-shared", "-fPIC"]
        command = [compiler, *flags, "-o", str(target), str(_SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ProbeError(f"{compiler} could not compile probes.c: {done.stderr.strip()[:200]}")
        library = ctypes.CDLL(str(target))
    library.fma_loop.restype = ctypes.c_float
    library.fma_loop.argtypes = [ctypes.c_long]
    library.triad.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_size_t]
    library.triad.restype = None
    return library


class CpuProbe:
    """The loops on `threads` threads, as work for `interleave`; `close` ends the threads."""

    def __init__(self, threads: int, triad_bytes: int) -> None:
        self.threads = threads
        self._library = _library()
        self._pool = ThreadPoolExecutor(max(1, threads - 1))  # the caller's is the first thread
        self._size = triad_bytes // 12 // threads
        self.triad_bytes = 12 * self._size * threads
        shape = (3, threads, self._size)
        self._rows = np.ones(shape, np.float32)

    def fma(self) -> None:
        """FMA_ROUNDS rounds of 12 vectors in every thread."""
        self._run(lambda i: self._library.fma_loop(FMA_ROUNDS))

    def triad(self) -> None:
        """a = b + 3 c over `triad_bytes` in all."""
        self._run(
            lambda i: self._library.triad(*(x[i].ctypes.data for x in self._rows), self._size)
        )

    def _run(self, work: Callable[[int], object]) -> None:
        others = [self._pool.submit(work, i) for i in range(1, self.threads)]
        work(0)
        for other in others:
            other.result()

    def close(self) -> None:
        self._pool.shutdown()


def copy_work(nbytes: int, device: torch.device | str = "cpu") -> tuple[Callable[[], object], int]:
    """torch's copy of a tensor, and the bytes it reads and writes: `nbytes` in all."""
    source = torch.ones(nbytes // 8, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 8 * source.numel()


def cpu_bandwidth(threads: int, effort: Effort, nbytes: int) -> dict[str, float]:
    """Bytes a second of copy and triad over `nbytes`, and the larger of the two as "best".

    A copy may use stores that bypass the caches, the triad and our operators do not; comparing
    with the better one makes no share look too good.
    """
    probe = CpuProbe(threads, nbytes)
    torch.set_num_threads(threads)
    copy, copied = copy_work(nbytes)
    times = interleave({"copy": copy, "triad": probe.triad}, CpuClock(threads), effort)
    probe.close()
    found = {
        "copy": copied / times["copy"].median,
        "triad": probe.triad_bytes / times["triad"].median,
    }
    return {"threads": threads, **found, "best": max(found.values())}


def device_bandwidth(
    device: torch.device, clock: Clock, effort: Effort, nbytes: int
) -> dict[str, float]:
    """Bytes a second of torch's copy on `device`, read and written, `nbytes` in all."""
    copy, copied = copy_work(nbytes, device)
    speed = copied / interleave({"copy": copy}, clock, effort)["copy"].median
    return {"copy": speed, "best": speed}
