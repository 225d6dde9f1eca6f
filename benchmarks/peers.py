"""What the operator is compared with, in plain PyTorch and out of other packages.

Every peer takes q, k, v, gate [B, L, H, D] and the convolution's weight and bias, as
`ops.gated_rela` does, and gets what it can have in advance (rotation tables, masks) beforehand. The
surroundings, feature map, rotation, convolution and gate, are the same for all that have them.

    published   the published bidirectional formula (design of the published code, own statement)
    causal      ours, as plain PyTorch can do it best: chunks of 64, tables made in advance
    reference   ours, as the specification states it: what runs without the compiled library
    sdpa        causal softmax attention instead, with the convolution and the gate
    idiap       the causal product of idiap/fast-transformers, with our surroundings
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recgrela_ext import ops
from tests.ops.problems import Problem

Convolve = Callable[[Tensor, Tensor, Tensor], Tensor]  # (v, weight, bias) -> SiLU(conv(v))
Operator = Callable[..., Tensor]  # (q, k, v, gate, conv_weight, conv_bias) -> [B, L, H, D]
EPS = 1e-6


class Missing(RuntimeError):
    """A peer cannot run here; the text is what its cell says."""


@dataclass(frozen=True)
class Peer:
    """`build` makes the operator for problems like the given one; `computes` names what its result
    is compared with: "causal", "bidirectional", or nothing where it is another model.
    """

    label: str
    build: Callable[[Problem], Operator]
    computes: str | None
    error: float | None = None  # allowed, of the largest result; by default what its dtype needs


def feature_map(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def complex_rotation(problem: Problem, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Rotation of adjacent pairs as complex numbers, in float32: x [B, L, H, D]."""
    phase = _phases(problem)
    turn = torch.polar(torch.ones_like(phase), phase).to(torch.complex64)  # [L, H, D/2]

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn).flatten(-2).to(dtype)

    return rotate


def real_rotation(problem: Problem, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The same in real numbers, which a compiler can fuse."""
    phase = _phases(problem)
    cos, sin = phase.cos().to(dtype), phase.sin().to(dtype)  # [L, H, D/2]

    def rotate(x: Tensor) -> Tensor:
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    return rotate


def _phases(problem: Problem) -> Tensor:
    L = problem.q.shape[1]
    steps = torch.arange(L, dtype=torch.float64, device=problem.q.device)
    return steps[:, None, None] * problem.inv_freq.double()


def augment(v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU of the short causal convolution: [B, L, H, D]."""
    B, L, H, D = v.shape
    width = weight.shape[1]
    rows = v.reshape(B, L, H * D).transpose(1, 2)
    weight, bias = weight.to(v.dtype), bias.to(v.dtype)
    pre = F.conv1d(rows, weight[:, None, :], bias, padding=width - 1, groups=H * D)[..., :L]
    return F.silu(pre).transpose(1, 2).reshape(B, L, H, D)


def published(problem: Problem, real: bool = False) -> Operator:
    """num = R phi(q) (sum_s R phi(k_s) v_s^T / L), den = phi(q) . mean phi(k) + eps."""
    rotate = (real_rotation if real else complex_rotation)(problem, problem.q.dtype)

    def operator(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, w: Tensor, b: Tensor) -> Tensor:
        L = q.shape[1]
        phi_q, phi_k = feature_map(q), feature_map(k)
        rot_q, rot_k = (rotate(x).transpose(1, 2) for x in (phi_q, phi_k))  # [B, H, L, D]
        mean = phi_k.mean(1).unsqueeze(-1)  # [B, H, D, 1]
        den = phi_q.transpose(1, 2) @ mean + EPS  # [B, H, L, 1]
        kv = (rot_k.transpose(-2, -1) * L**-0.5) @ (v.transpose(1, 2) * L**-0.5)
        out = (rot_q @ kv / den).transpose(1, 2)
        return (out + augment(v, w, b)) * F.silu(gate)

    return operator


def causal(problem: Problem, convolve: Convolve = augment, chunk: int = 64) -> Operator:
    """Chunk by chunk: scores inside, a running state for what came before."""
    rotate = real_rotation(problem, problem.q.dtype)
    L = problem.q.shape[1]
    square = (chunk, chunk)
    mask = torch.ones(square, dtype=torch.bool, device=problem.q.device).tril()
    count = torch.arange(1, L + 1, device=problem.q.device)[:, None, None] * EPS  # [L, 1, 1]

    def operator(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, w: Tensor, b: Tensor) -> Tensor:
        phi_q, phi_k = feature_map(q), feature_map(k)
        den = (phi_q * phi_k.cumsum(1)).sum(-1, keepdim=True) + count.to(q.dtype)  # [B, L, H, 1]
        rows = [x.transpose(1, 2) for x in (rotate(phi_q), rotate(phi_k), v)]  # [B, H, L, D]
        parts: list[Tensor] = []
        state: Tensor | None = None
        for rq, rk, u in zip(*(x.split(chunk, 2) for x in rows), strict=True):
            size = rq.shape[2]
            scores = (rq @ rk.transpose(-2, -1)).masked_fill(~mask[:size, :size], 0.0)
            num = scores @ u
            parts.append(num if state is None else num + rq @ state)
            added = rk.transpose(-2, -1) @ u
            state = added if state is None else state + added
        out = torch.cat(parts, 2).transpose(1, 2) / den
        return (out + convolve(v, w, b)) * F.silu(gate)

    return operator


def reference(problem: Problem) -> Operator:
    def operator(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, w: Tensor, b: Tensor) -> Tensor:
        out = ops.reference.gated_rela(q, k, v, gate, problem.inv_freq, w, b, eps=problem.eps)
        assert isinstance(out, Tensor)
        return out

    return operator


def sdpa(problem: Problem) -> Operator:
    """softmax(q k^T) v; no feature map and no rotation, which softmax models do without."""

    def operator(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, w: Tensor, b: Tensor) -> Tensor:
        q, k, u = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, u, is_causal=True).transpose(1, 2)
        return (out + augment(v, w, b)) * F.silu(gate)

    return operator


def idiap(problem: Problem) -> Operator:
    product = import_peer("fast_transformers.causal_product").causal_dot_product
    if problem.q.dtype != torch.float32:
        raise Missing("float32 alone")
    rotate = real_rotation(problem, problem.q.dtype)

    def operator(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, w: Tensor, b: Tensor) -> Tensor:
        phi_q, phi_k = feature_map(q), feature_map(k)
        den = (phi_q * phi_k.cumsum(1)).sum(-1, keepdim=True) + EPS
        rows = (x.transpose(1, 2).contiguous() for x in (rotate(phi_q), rotate(phi_k), v))
        out = product(*rows).transpose(1, 2) / den
        return (out + augment(v, w, b)) * F.silu(gate)

    return operator


def ours(problem: Problem) -> Operator:
    def operator(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, w: Tensor, b: Tensor) -> Tensor:
        out = ops.gated_rela(q, k, v, gate, problem.inv_freq, w, b, eps=problem.eps)
        assert isinstance(out, Tensor)
        return out

    return operator


def compiled(build: Callable[[Problem], Operator]) -> Callable[[Problem], Operator]:
    """The operator under torch.compile with fixed shapes.

    Dynamo keeps eight variants of one code object and then gives up compiling: reset it in between.
    """

    def make(problem: Problem) -> Operator:
        operator: Operator = torch.compile(build(problem), dynamic=False)
        return operator

    return make


def import_peer(name: str) -> Any:
    """A module of another package; Missing where it is not installed or does not load."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and error.name == package
        raise Missing("not installed" if missing else f"import failed: {error}") from None


CPU_PEERS = {
    "published": Peer("published", published, "bidirectional"),
    "published, compiled": Peer("published, compiled", compiled(published), "bidirectional"),
    "causal": Peer("causal eager", causal, "causal"),
    "reference": Peer("reference", reference, "causal"),
    "sdpa": Peer("SDPA", sdpa, None),
    "idiap": Peer("idiap", idiap, "causal"),
}
