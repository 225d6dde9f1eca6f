"""Times of several ways to do one thing, taken in turn: whatever slows the machine slows them all.

One thread is timed by the processor time of this process, which other work on the machine cannot
lengthen; several threads, by the clock on the wall; a GPU, by its events, with a cold L2 cache.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

Work = Callable[[], Any]
_AHEAD = 2_000_000  # clocks, about a millisecond


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds, seconds a sample, and seconds one candidate may take in all."""

    rounds: int = 15
    sample: float = 0.02
    most: float = 8.0

    def rounds_for(self, seconds: float) -> int:
        """Rounds of a candidate whose sample takes `seconds`: at least three."""
        return max(3, min(self.rounds, int(self.most / max(seconds, 1e-9))))


FULL, QUICK = Effort(), Effort(rounds=3, sample=0.001, most=0.2)
GPU = Effort(rounds=15, sample=0.002, most=2.0)  # a millisecond of waiting comes to every call


class Clock(Protocol):
    """What takes one sample: the seconds of one call, as the mean of `calls` in a row."""

    name: str

    def sample(self, work: Work, calls: int) -> float: ...


class CpuClock:
    """For work of `threads` threads of this process."""

    def __init__(self, threads: int) -> None:
        self.name = "processor time" if threads == 1 else "wall time"
        self._now = time.process_time if threads == 1 else time.perf_counter

    def sample(self, work: Work, calls: int) -> float:
        start = self._now()
        for _ in range(calls):
            work()
        return (self._now() - start) / calls


class CudaClock:
    """For work on a GPU: every call between two events, after the L2 cache was overwritten.

    The GPU waits a millisecond before each call, so that the host is ahead of it: what is timed is
    the GPU's work, not Python's launching of it, for ours and for peers of many kernels alike.
    """

    def __init__(self, device: torch.device, flush: bool = True) -> None:
        self.name = "GPU events, cold L2" if flush else "GPU events, warm L2"
        size = 4 * torch.cuda.get_device_properties(device).L2_cache_size if flush else 0
        self._device = device
        self._flush = torch.empty(size, dtype=torch.uint8, device=device)

    def sample(self, work: Work, calls: int) -> float:
        pairs = []
        for _ in range(calls):
            self._flush.zero_()
            torch.cuda._sleep(_AHEAD)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize(self._device)
        return float(np.median([a.elapsed_time(b) for a, b in pairs])) / 1e3


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median, the 10th and the 90th percentile of the samples."""

    median: float
    p10: float
    p90: float
    samples: int
    calls: int

    def divided(self, by: int) -> Timing:
        """Of one of `by` equal parts of a call."""
        return Timing(self.median / by, self.p10 / by, self.p90 / by, self.samples, self.calls)

    @classmethod
    def of(cls, samples: list[float], calls: int) -> Timing:
        p10, median, p90 = (float(x) for x in np.percentile(samples, (10, 50, 90)))
        return cls(median, p10, p90, len(samples), calls)


def interleave(candidates: Mapping[str, Work], clock: Clock, effort: Effort) -> dict[str, Timing]:
    """Every candidate's time; they take turns, and the order of a round moves on by one."""
    names = list(candidates)
    calls, rounds = {}, {}
    for name in names:
        candidates[name]()  # allocations, tables, threads
        once = max(clock.sample(candidates[name], 1), 1e-9)
        calls[name] = max(1, math.ceil(effort.sample / once))
        rounds[name] = effort.rounds_for(once * calls[name])
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(max(rounds.values(), default=0)):
            for i in range(len(names)):
                name = names[(i + turn) % len(names)]
                if turn < rounds[name]:
                    samples[name].append(clock.sample(candidates[name], calls[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: Timing.of(samples[name], calls[name]) for name in names}
