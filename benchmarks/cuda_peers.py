"""What else there is on a GPU; each is left out, with the reason, where it does not install.

fla           the fused chunk kernel of flash-linear-attention, our surroundings around it
conv1d        the convolution by causal-conv1d, the rest eager or by flash-linear-attention
mamba         another model: mamba-ssm's chunked scan with its own gate, and causal-conv1d
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import (
    EPS,
    Convolve,
    Missing,
    Operator,
    Peer,
    augment,
    causal,
    compiled,
    feature_map,
    import_peer,
    published,
    real_rotation,
    sdpa,
)
from tests.ops.problems import Problem


def fla(problem: Problem, convolve: Convolve = augment) -> Operator:
    """Its own normaliser takes one q and k for both sums; ours is not rotated, hence stays here."""
    _need_gpu(problem)
    product = import_peer("fla.ops.linear_attn").fused_chunk_linear_attn
    rotate = real_rotation(problem, problem.q.dtype)

    def operator(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, w: Tensor, b: Tensor) -> Tensor:
        phi_q, phi_k = feature_map(q), feature_map(k)
        # a running sum in bfloat16 would be wrong after a few hundred items
        den = (phi_q.float() * phi_k.float().cumsum(1)).sum(-1, keepdim=True) + EPS
        num, _ = product(rotate(phi_q), rotate(phi_k), v, scale=1.0, normalize=False)
        out = (num / den).to(q.dtype)
        return (out + convolve(v, w, b)) * F.silu(gate)

    return operator


def conv1d(problem: Problem) -> Convolve:
    """SiLU(conv(v)) by causal-conv1d, channels last, without a copy."""
    _need_gpu(problem)
    kernel = import_peer("causal_conv1d").causal_conv1d_fn

    def convolve(v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = v.flatten(2).transpose(1, 2)  # [B, C, L], strides of [B, L, C]
        weight, bias = weight.to(v.dtype), bias.to(v.dtype)
        return kernel(rows, weight, bias, activation="silu").transpose(1, 2).view(v.shape)

    return convolve


def mamba(problem: Problem) -> Operator:
    """State-space duality with q, k, v as C, B, x: heads of D, a state of D, a constant decay."""
    _need_gpu(problem)
    scan = import_peer("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    convolve = conv1d(problem)
    B, L, H, _ = problem.q.shape
    step = torch.full((B, L, H), 0.1, dtype=problem.q.dtype, device=problem.q.device)
    decay = torch.full((H,), -0.1, device=problem.q.device)

    def operator(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, w: Tensor, b: Tensor) -> Tensor:
        out: Tensor = scan(convolve(v, w, b), step, decay, k, q, chunk_size=64, z=gate)
        return out

    return operator


def _need_gpu(problem: Problem) -> None:
    if not problem.q.is_cuda:
        raise Missing("needs a GPU")


def _fla_conv1d(problem: Problem) -> Operator:
    return fla(problem, conv1d(problem))


def _causal_conv1d(problem: Problem) -> Operator:
    return causal(problem, conv1d(problem))


_TF32 = 0.02  # flash-linear-attention multiplies float32 as TF32
EAGER = {
    "published": Peer("published", published, "bidirectional"),
    "causal": Peer("causal eager", causal, "causal"),
    "causal + conv1d": Peer("causal eager, causal-conv1d", _causal_conv1d, "causal"),
    "sdpa": Peer("SDPA", sdpa, None),
    "fla": Peer("fla", fla, "causal", _TF32),
    "fla + conv1d": Peer("fla, causal-conv1d", _fla_conv1d, "causal", _TF32),
    "mamba": Peer("mamba-ssm", mamba, None),
}
COMPILED = {
    "published, compiled": Peer(
        "published, compiled", compiled(lambda p: published(p, real=True)), "bidirectional"
    ),
    "fla, compiled": Peer("fla, compiled", compiled(fla), "causal", _TF32),
}
FLA = ("fla", "fla + conv1d", "fla, compiled")
