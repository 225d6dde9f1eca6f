"""The device of the GPU tests, and stand-ins for a dry run of the tests themselves.

RECGRELA_GPU_DRY_RUN=1 runs every test marked `gpu` on the CPU: graphs and streams become plain
calls, problems become small. It checks the tests' own logic; it says nothing about a GPU.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

DRY_RUN = os.environ.get("RECGRELA_GPU_DRY_RUN", "") not in ("", "0")
DEVICE = torch.device("cpu" if DRY_RUN else "cuda")
Work = Callable[[], Sequence[Tensor]]


def synchronize() -> None:
    if not DRY_RUN:
        torch.cuda.synchronize()


@contextlib.contextmanager
def side_stream() -> Iterator[None]:
    """Inside, kernels go to a stream that is busy: one that ignores it is too early."""
    if DRY_RUN:
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # clocks: some 10 ms
        yield
    torch.cuda.current_stream().wait_stream(stream)


def captured(work: Work) -> tuple[Sequence[Tensor], Callable[[], None]]:
    """The outputs of `work` as a CUDA graph writes them, and what replays the graph.

    Warming up and capturing call `work` beforehand, which changes what it updates in place.
    """
    if DRY_RUN:
        outputs = work()

        def again() -> None:
            for old, new in zip(outputs, work(), strict=True):
                old.detach().copy_(new)

        return outputs, again
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = work()
    return outputs, graph.replay


def free_memory() -> int:
    """Bytes; no limit in a dry run, whose problems are small."""
    return 1 << 62 if DRY_RUN else int(torch.cuda.mem_get_info()[0])
