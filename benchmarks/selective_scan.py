"""y_t = h_t c_t with h_t = exp(step_t A) h_{t-1} + (step_t u_t) b_t, for Mamba4Rec in the quality
tables: a small C++ loop, compiled when it is first asked for, or the same in plain torch.

It serves to train the peer in bearable time and counts for quality alone; what Mamba costs is
measured with its own packages.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from benchmarks.machine import ROOT

SOURCE = Path(__file__).with_suffix(".cpp")
BUILT = ROOT / "build" / "benchmarks"
FLAGS = ("-O3", "-march=native", "-ffast-math", "-fPIC", "-std=c++17")


class Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "length", "inner")]


@functools.cache
def compiled(state: int) -> ctypes.CDLL | None:
    """The library for states of this size; None without a C++ compiler.

    Raises:
        SystemExit: the compiler failed.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        return None
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False).stdout
    text = SOURCE.read_bytes() + version + repr((FLAGS, state)).encode() + _processor()
    library = BUILT / f"selective-scan-{hashlib.sha256(text).hexdigest()[:12]}.so"
    if not library.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILT) as folder:
            part, whole = Path(folder) / "part.o", Path(folder) / "whole.so"
            # Linked apart: with -ffast-math the link may change the rounding of the process.
            for command in (
                [*compiler, *FLAGS, f"-DSTATE={state}", "-c", str(SOURCE), "-o", str(part)],
                [*compiler, "-shared", str(part), "-o", str(whole), "-lm"],
            ):
                if subprocess.run(command, check=False).returncode:
                    raise SystemExit(f"selective_scan: {shlex.join(command)} failed")
            whole.replace(library)
    return ctypes.CDLL(str(library))


def _processor() -> bytes:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_bytes().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")


def selective_scan(u: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """y [B, L, I] of u, step [B, L, I]; a [I, N]; b, c [B, L, N]. Compiled for float32 on a CPU."""
    inputs = (u, step, a, b, c)
    batch, length, inner = u.shape
    states = batch, length, a.shape[1]
    if [x.shape for x in inputs[1:]] != [u.shape, (inner, states[-1]), states, states]:
        raise ValueError(
            "selective_scan: must get u, step [B, L, I], a [I, N] and b, c [B, L, N], got "
            f"{[list(x.shape) for x in inputs]}"
        )
    fits = all(x.dtype == torch.float32 and x.device.type == "cpu" for x in inputs)
    scan = CompiledScan if fits and compiled(a.shape[1]) is not None else LoopScan
    return scan.apply(*inputs)  # type: ignore[no-any-return]


class CompiledScan(torch.autograd.Function):
    """No state is kept; the backward pass reckons them again."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        inputs = tuple(x.contiguous() for x in inputs)
        ctx.save_for_backward(*inputs)
        y = torch.empty_like(inputs[0])
        _call("selective_scan", *inputs, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        inputs = ctx.saved_tensors
        found = tuple(torch.zeros_like(x) for x in inputs)
        _call("selective_scan_backward", *inputs, grad.contiguous(), *found)
        return found


def _call(name: str, *tensors: Tensor) -> None:
    sizes, state = tensors[0].shape, tensors[2].shape[1]
    function = getattr(compiled(state), name)
    function(Sizes(*sizes), *(ctypes.c_void_p(x.data_ptr()) for x in tensors))


class LoopScan(torch.autograd.Function):
    """One loop over the positions each way and all states kept in between: a tenth of the time and
    memory of torch's own graph of the loop."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, u: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor
    ) -> Tensor:
        states = u.new_empty(u.shape[1] + 1, u.shape[0], *a.shape)  # [L + 1, B, I, N]
        states[0] = 0
        y = torch.empty_like(u)
        for t in range(u.shape[1]):
            decay = torch.exp(step[:, t, :, None] * a)
            new = (step[:, t] * u[:, t])[..., None] * b[:, t, None]
            torch.addcmul(new, decay, states[t], out=states[t + 1])
            y[:, t] = (states[t + 1] @ c[:, t, :, None])[..., 0]
        ctx.save_for_backward(u, step, a, b, c, states)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        u, step, a, b, c, states = ctx.saved_tensors
        d_u, d_step, d_a, d_b, d_c = (torch.zeros_like(part) for part in (u, step, a, b, c))
        d_h = torch.zeros_like(states[0])
        for t in range(u.shape[1] - 1, -1, -1):
            s, g = step[:, t, :, None], grad[:, t, :, None]
            d_c[:, t] = (g * states[t + 1]).sum(1)
            d_h += g * c[:, t, None]
            inflow = (d_h @ b[:, t, :, None])[..., 0]  # d loss / d (step u)
            d_b[:, t] = (d_h * (step[:, t] * u[:, t])[..., None]).sum(1)
            d_u[:, t] = inflow * step[:, t]
            decay = torch.exp(s * a)
            d_h *= decay
            d_power = d_h * states[t]  # d loss / d (step A)
            d_step[:, t] = inflow * u[:, t] + (d_power * a).sum(-1)
            d_a += (d_power * s).sum(0)
        return d_u, d_step, d_a, d_b, d_c
