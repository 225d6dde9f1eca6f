"""Starting processes for tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """Of this process, with the checkout first on the path and one thread."""
    # torchrun keeps one store for all restarts, where a process may find the address of one that
    # died (pytorch/pytorch#135712): a store for each.
    fresh_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, **fresh_store, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def torchrun(*command: str, processes: int = 2, restarts: int = 0) -> subprocess.CompletedProcess:
    """A finished torchrun of `command`, one thread a process."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc-per-node={processes}", f"--max-restarts={restarts}", *command],
        env=environment(),
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def largest_difference(name: str, losses: list[float], expected: list[float]) -> float:
    """Of two loss curves; printed, so that `pytest -rP` shows it."""
    assert len(losses) == len(expected) > 0
    found = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    print(f"{name}: largest difference of the loss curve {found:.2e}")
    return found
