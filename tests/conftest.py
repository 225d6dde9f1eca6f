"""Fixtures shared by all tests.

RECGRELA_DATA         folder of real datasets (ml-1m/, ml-100k/, ...)
RECGRELA_GOLDEN       folder of outputs recorded from the published implementation
RECGRELA_REQUIRE_GPU  1: a test marked `gpu` fails instead of skipping where there is no device
RECGRELA_GPU_DRY_RUN  1: tests marked `gpu` run on the CPU, to check the tests, not a GPU
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from recgrela_ext import _library
from tests.gpu.device import DRY_RUN

hypothesis.settings.register_profile("recgrela", deadline=None, print_blob=True)
hypothesis.settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "recgrela")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("kernels") and "cpu" not in _library.KERNEL_DEVICES:
        pytest.skip("the compiled operators are absent or switched off")
    if not item.get_closest_marker("gpu") or DRY_RUN:
        return
    reason = ""
    if not torch.cuda.is_available():
        reason = "torch sees no CUDA device"
    elif "cuda" not in _library.KERNEL_DEVICES:
        reason = "no CUDA kernels: build with nvcc, set RECGRELA_CUDA_KERNELS=1"
    if reason and os.environ.get("RECGRELA_REQUIRE_GPU") == "1":
        pytest.fail(f"RECGRELA_REQUIRE_GPU=1, but {reason}", pytrace=False)
    if reason:
        pytest.skip(f"needs a GPU: {reason}")


@pytest.fixture(autouse=True)
def restored_global_state() -> Iterator[None]:
    """Every test starts from the same seed and leaves torch's global state as it was."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


@pytest.fixture(autouse=True)
def nan_filled_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """In tests of operators and layers torch.empty holds NaN, so that an unwritten output shows."""
    if not {"ops", "layers", "gpu"} & set(request.path.parts):
        yield
        return
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    # Some of torch's own GPU operators have no deterministic form: there it warns.
    torch.use_deterministic_algorithms(True, warn_only="gpu" in request.path.parts)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def folder_from_environment(name: str, what: str) -> Path:
    value = os.environ.get(name)
    if not value:
        pytest.skip(f"needs {what}: set {name} to their folder")
    folder = Path(value)
    if not folder.is_dir():
        pytest.fail(f"{name} must name a folder, got {value}", pytrace=False)
    return folder.resolve()


@pytest.fixture(scope="session")
def real_data() -> Path:
    return folder_from_environment("RECGRELA_DATA", "real datasets")


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    return folder_from_environment("RECGRELA_GOLDEN", "the golden files")
