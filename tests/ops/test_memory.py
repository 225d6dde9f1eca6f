"""A kernel that finds no memory says so, in one clear error, and the process lives on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(sys.platform != "linux", reason="limits its address space by Linux means"),
]
ROOT = Path(__file__).parents[2]

# Two heads, so that two threads have a share; D * D floats are 256 MiB. The outputs fit.
CODE = """
import re, resource
from pathlib import Path
import torch
from recgrela_ext import ops

def run(D):
    q, inv_freq = torch.ones(1, 2, 2, D), torch.zeros(2, D // 2, dtype=torch.float64)
    return ops.gated_rela(q, q, q, None, inv_freq, None, None)

torch.set_num_threads(2)
run(64)  # the threads are there
used = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29,) * 2)
try:
    run(8192)
except RuntimeError as error:
    print(error)
print(run(64).shape)
"""


def test_no_memory_for_scratch_is_one_clear_error() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [
        "not enough memory for the scratch of gated_rela",
        "torch.Size([1, 2, 2, 64])",
    ]
