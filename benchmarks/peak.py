"""Peak extra memory of one forward and backward, in a process of its own.

    python -m benchmarks.peak causal 128 2048 4 16 2      # peer B L H D threads; prints bytes

"Extra" is what the resident memory grows by, at its highest, from the moment the inputs exist.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.operator_rows import Shape

PEERS = ("ours", "causal", "reference", "published", "sdpa")


def operator_peak(name: str, shape: Shape, threads: int) -> int:
    """Bytes; RuntimeError with the process's last words when it fails."""
    sizes = (shape.B, shape.L, shape.H, shape.D, threads)
    command = [sys.executable, "-m", "benchmarks.peak", name, *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise RuntimeError(f"memory of {name}: {done.stderr.strip()[-300:]}")
    return int(done.stdout)


def main() -> None:
    import torch

    from benchmarks.peers import CPU_PEERS, Operator, ours
    from tests.ops.problems import PARAMETERS, ROWS

    name, *numbers = sys.argv[1:]
    B, L, H, D, threads = map(int, numbers)
    torch.set_num_threads(threads)
    build = ours if name == "ours" else CPU_PEERS[name].build

    def arguments(shape: Shape) -> tuple[Operator, list[torch.Tensor], torch.Tensor]:
        problem = shape.problem(torch.float32).requiring_grad()
        found = [getattr(problem, n) for n in (*ROWS, *PARAMETERS)]
        return build(problem), found, torch.randn_like(problem.q)

    operator, warm, given = arguments(Shape(2, min(L, 70), H, D))
    torch.autograd.grad(operator(*warm), warm, given)  # libraries and threads are no part of it
    operator, inputs, given = arguments(Shape(B, L, H, D))
    before = _status("VmRSS")
    _forget_peak()
    grads = torch.autograd.grad(operator(*inputs), inputs, given)
    extra = _status("VmHWM") - before
    assert all(bool(g.isfinite().all()) for g in grads)
    print(extra)


def _status(field: str) -> int:
    """Bytes; of this program alone, ru_maxrss would include its parent's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def _forget_peak() -> None:
    """Starts the high-water mark again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


if __name__ == "__main__":
    main()
