"""Loads librecgrela.so, which registers the operators, and says what it was built with."""

from __future__ import annotations

import ctypes
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from .version import __version__

LIBRARY = Path(__file__).parent / "librecgrela.so"

_REJECTIONS = (
    "gated_rela",
    "rela",
    "encoder_step",
    "topk_scores",
    "activation_dropout",
    "softmax_loss",
    "recent_items",
    "feed_forward",
    "RECGRELA_CPU_LEVEL",
)

_REFERENCE_ONLY = (
    "recgrela_ext: {reason}: every operator runs as plain PyTorch, correct but several times "
    "slower. {remedy}"
)


def _load() -> frozenset[str]:
    """The device types that have kernels."""
    if os.environ.get("RECGRELA_DISABLE_EXTENSION", "") not in ("", "0"):
        reason = "the compiled operators are switched off by RECGRELA_DISABLE_EXTENSION"
        remedy = "Unset it to use them."
    else:
        try:
            torch.ops.load_library(str(LIBRARY))
        except OSError as error:
            reason = f"the compiled operators could not be loaded ({error})"
            remedy = "Install again with `pip install .`; torch must be 2.11 or newer."
        else:
            has = torch._C._dispatch_has_kernel_for_dispatch_key
            keys = {"cpu": "CPU", "cuda": "CUDA"}
            found = {d for d, key in keys.items() if has("recgrela::gated_rela_forward", key)}
            # The CUDA kernels have run on a CPU under tests/cuda_shim, on no GPU yet: whoever has
            # one asks for them. Take this away once `make gpu` has passed somewhere.
            if os.environ.get("RECGRELA_CUDA_KERNELS", "") in ("", "0"):
                found.discard("cuda")
            return frozenset(found)
    warnings.warn(_REFERENCE_ONLY.format(reason=reason, remedy=remedy), stacklevel=2)
    return frozenset()


KERNEL_DEVICES = _load()


def has_kernels(device: torch.device) -> bool:
    """Whether tensors on ``device`` reach a compiled kernel; otherwise ops.reference runs."""
    return device.type in KERNEL_DEVICES


def call(operator: Any, *arguments: Any) -> Any:
    """An operator's result; a rejected argument is a ValueError under every version of torch.

    Kernels throw std::invalid_argument, which torch passed on as ValueError up to 2.13 and wraps in
    a RuntimeError since.
    """
    if torch.compiler.is_compiling():
        return operator(*arguments)
    try:
        return operator(*arguments)
    except RuntimeError as error:
        text = str(error).split("\n")[0]
        if text.startswith(_REJECTIONS):
            raise ValueError(text) from None
        raise


def build_info() -> dict[str, Any]:
    """What this installation was built with and what it runs on.

    Returns:
        ``version``, ``torch_built`` (the torch of the build; any torch >= 2.11 runs it),
        ``cuda_toolkit`` (None without one), ``cuda_archs``, ``cpu_levels`` (instruction-set levels
        this machine can run) and ``cpu_level`` (the one in use; None when the compiled operators
        are absent or switched off).
    """
    info: dict[str, Any] = {
        "version": __version__,
        "torch_built": None,
        "cuda_toolkit": None,
        "cuda_archs": [],
        "cpu_levels": [],
        "cpu_level": None,
    }
    if not KERNEL_DEVICES:
        return info
    from ._C import build_info as facts

    info.update(facts())
    library = ctypes.CDLL(str(LIBRARY))
    for name in ("recgrela_cpu_level", "recgrela_cpu_levels"):
        getattr(library, name).restype = ctypes.c_char_p
    # An unknown RECGRELA_CPU_LEVEL is reported by the first operator call, not through ctypes.
    info["cpu_levels"] = library.recgrela_cpu_levels().decode().split(",")
    wanted = os.environ.get("RECGRELA_CPU_LEVEL") or info["cpu_levels"][-1]
    if wanted in info["cpu_levels"]:
        info["cpu_level"] = library.recgrela_cpu_level().decode()
    return info
