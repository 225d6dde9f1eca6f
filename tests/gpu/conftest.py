"""Settings of the GPU tests: exact float32 products, memory given back between tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# cuBLAS asks for it where a whole model has to repeat its bits.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """No TF32, and no memory of one test in the way of the next."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
