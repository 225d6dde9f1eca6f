"""One library for torch with and without CUDA: what must hold without a GPU."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from recgrela_ext import _library

pytestmark = pytest.mark.kernels
OPERATORS = ("gated_rela_forward", "gated_rela", "gated_rela_backward", "gated_rela_step",
             "rela_forward", "rela", "rela_backward")  # fmt: skip
ASK = """
import ctypes, sys, torch
torch.ops.load_library(sys.argv[1])
print(ctypes.CDLL(sys.argv[1]).recgrela_has_cuda_streams())
"""


@pytest.fixture
def library() -> ctypes.CDLL:
    if not torch._C._dispatch_has_kernel_for_dispatch_key("recgrela::gated_rela", "CUDA"):
        pytest.skip("librecgrela.so was built without CUDA")
    return ctypes.CDLL(str(_library.LIBRARY))


def test_kernels_are_registered_without_a_gpu(library: ctypes.CDLL) -> None:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert [name for name in OPERATORS if not has(f"recgrela::{name}", "CUDA")] == []


@pytest.mark.parametrize("wish", ["", "0", "1"])
def test_untried_kernels_are_asked_for(library: ctypes.CDLL, wish: str) -> None:
    code = "from recgrela_ext import _library; print(*sorted(_library.KERNEL_DEVICES))"
    environment = os.environ | {"RECGRELA_CUDA_KERNELS": wish}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == ("cpu cuda" if wish == "1" else "cpu")


def test_the_stream_symbol_follows_this_torch(library: ctypes.CDLL) -> None:
    """A weak symbol: torch's own where it has CUDA, NULL (and the library loads) where not."""
    found = bool(library.recgrela_has_cuda_streams())
    assert found == (torch.version.cuda is not None)


@pytest.mark.slow
def test_the_stream_symbol_resolves_on_a_cuda_torch(library: ctypes.CDLL) -> None:
    """No GPU is needed: RECGRELA_CUDA_TORCH_PYTHON names a Python whose torch has CUDA."""
    python = os.environ.get("RECGRELA_CUDA_TORCH_PYTHON")
    if not python:
        pytest.skip("RECGRELA_CUDA_TORCH_PYTHON names no Python with a CUDA build of torch")
    answer = subprocess.run(
        [python, "-c", ASK, str(_library.LIBRARY)], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "1"


def test_build_info_names_the_toolkit(library: ctypes.CDLL) -> None:
    info = _library.build_info()
    assert info["cuda_toolkit"] is not None
    assert info["cuda_archs"] != []
