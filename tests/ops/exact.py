"""gated_rela and its gradients item by item, more precisely than the problem's dtype.

Written from the formulas, independent of ops/reference.py (other order of sums, other backward,
numpy), so the two check each other. Float64 problems are summed with 64 bits of mantissa, where the
machine's long double has them, which is enough to measure their rounding; all others in float64.

Forward, with S_t = sum R_s phi(k_s) v_s^T and z_t = sum phi(k_s):
    o_t = S_t^T R_t phi(q_t) / (phi(q_t) . z_t + eps n_t)
    y_t = SiLU(g_t) (o_t + SiLU(b + sum_j w_j v_{t-W+1+j}))
Backward, with dO = SiLU(g) dy and den' = den + eps n:
    dnum_t = dO_t / den'_t                      dden_t = -(dO_t . o_t) / den'_t
    dphi(q_t) = R_t^T (S_t dnum_t) + dden_t z_t
    dphi(k_t) = R_t^T (T_t v_t) + y_t           T_t = sum_{s>=t} R_s phi(q_s) dnum_s^T + dkv
    dv_t = T_t^T R_t phi(k_t) + conv part       y_t = sum_{s>=t} dden_s phi(q_s) + dk_sum
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.ops.problems import PARAMETERS, Problem

Array = np.ndarray
WIDE = np.longdouble


def exact(problem: Problem, grads: dict[str, Tensor] | None = None) -> Exact:
    """``grads``: of "out" and, where there is a final state, of "final kv", ...; see Exact."""
    rows = _bounds(problem)
    result = Exact(problem)
    for b, (index, n) in enumerate(rows):
        result.add_sequence(b, index, n, grads)
    return result


class Exact:
    """Results by name as float64 tensors: ``outputs``, ``gradients``, and for out and the gradients
    of q, k, the gate and the parameters ``terms``: the magnitudes of what is added up, before it
    cancels. "out" and "gate" add the attention and the rank augmentation.
    """

    def __init__(self, problem: Problem) -> None:
        p = self.problem = problem
        H, D = p.q.shape[-2:]
        W = 1 if p.conv_weight is None else p.conv_weight.shape[1]
        B = p.q.shape[0] if p.cu_seqlens is None else p.cu_seqlens.shape[0] - 1
        self.H, self.D, self.W, self.B = H, D, W, B
        wide = torch.float64
        self.outputs: dict[str, Tensor] = {"out": torch.zeros(p.q.shape, dtype=wide)}
        self.gradients = {n: torch.zeros(x.shape, dtype=wide) for n, x in p.leaves().items()}
        named = {n: x for n, x in p.leaves().items() if n in ("q", "k", "gate", *PARAMETERS)}
        self.terms = {n: torch.zeros(x.shape, dtype=wide) for n, x in {"out": p.q, **named}.items()}
        if p.return_final_state:
            self.outputs["final kv"] = torch.zeros(B, H, D, D, dtype=wide)
            self.outputs["final k_sum"] = torch.zeros(B, H, D, dtype=wide)
            self.outputs["final conv"] = torch.zeros(B, W - 1, H * D, dtype=wide)
            self.outputs["final position"] = torch.zeros(B, dtype=torch.int64)

    def add_sequence(self, b: int, index: Any, n: int, grads: dict[str, Tensor] | None) -> None:
        one = _Sequence(self, b, index, n)
        one.forward()
        self.outputs["out"][index] = _tensor(one.y)
        self.terms["out"][index] = _tensor(one.y_terms)
        if self.problem.return_final_state:
            finals = (one.kv, one.k_sum, one.values[n:])
            for name, x in zip(("final kv", "final k_sum", "final conv"), finals, strict=True):
                self.outputs[name][b] = _tensor(x).reshape(self.outputs[name][b].shape)
            self.outputs["final position"][b] = one.position + n
        if grads is None:
            return
        for results, arrays in zip(
            (self.gradients, self.terms), one.backward(grads, b, index), strict=True
        ):
            for name in results.keys() & arrays.keys():
                x = _tensor(arrays[name])
                if name in PARAMETERS:
                    results[name] += x.reshape(results[name].shape)
                else:
                    at = b if name in ("kv", "k_sum", "conv") else index
                    results[name][at] = x.reshape(results[name][at].shape)


class _Sequence:
    """One sequence of n items, arrays [n, H, D]."""

    def __init__(self, whole: Exact, b: int, index: Any, n: int) -> None:
        p = whole.problem
        H, D, W = whole.H, whole.D, whole.W
        self.n, self.D, self.W = n, D, W
        wide = self.wide = WIDE if p.q.dtype == torch.float64 else np.float64
        self.causal, self.eps = p.causal, wide(p.eps)
        self.q, self.k, self.v = (_array(x[index], wide) for x in (p.q, p.k, p.v))
        self.gate = None if p.gate is None else _array(p.gate[index], wide)
        self.weight = (
            None if p.conv_weight is None else _array(p.conv_weight, wide).reshape(H, D, W)
        )
        self.bias = wide(0) if p.conv_bias is None else _array(p.conv_bias, wide).reshape(H, D)
        self.kv, self.k_sum = np.zeros((H, D, D), wide), np.zeros((H, D), wide)
        past, self.position = np.zeros((W - 1, H, D), wide), 0
        if p.initial_state is not None:
            kv, k_sum, conv, position = (x[b] for x in p.initial_state)
            self.kv, self.k_sum, self.position = (
                _array(kv, wide),
                _array(k_sum, wide),
                int(position),
            )
            past = _array(conv, wide).reshape(W - 1, H, D)
        self.values = np.concatenate((past, self.v))  # [W-1+n, H, D]
        index_of = np.arange(n).astype(WIDE) + self.position
        phase = index_of[:, None, None] * _array(p.inv_freq, WIDE)
        self.cos, self.sin = np.cos(phase).astype(wide), np.sin(phase).astype(wide)
        last = np.full(n, wide(self.position + n))
        self.count = index_of.astype(wide) + 1 if p.causal else last

    def rotate(self, x: Array, t: Any, sign: int = 1) -> Array:
        cos, sin = self.cos[t], sign * self.sin[t]
        even, odd = x[..., 0::2], x[..., 1::2]
        return np.stack((even * cos - odd * sin, even * sin + odd * cos), -1).reshape(x.shape)

    def forward(self) -> None:
        every = slice(None)
        self.phi_q, self.phi_k = _phi(self.q), _phi(self.k)
        self.rot_q, self.rot_k = self.rotate(self.phi_q, every), self.rotate(self.phi_k, every)
        self.start = self.kv, self.k_sum
        self.out = np.zeros_like(self.q)
        self.den = np.zeros(self.q.shape[:2], self.wide)
        for t, S, z in self.states():
            den = (self.phi_q[t] * z).sum(-1) + self.eps * self.count[t]
            self.out[t] = np.einsum("hd,hde->he", self.rot_q[t], S) / den[:, None]
            self.den[t] = den
        self.kv, self.k_sum = self.last
        self.pre = np.zeros_like(self.v)
        self.augmented = np.zeros_like(self.v)
        if self.weight is not None:
            self.pre += self.bias
            for j in range(self.W):
                self.pre += self.weight[:, :, j] * self.values[j : j + self.n]
            self.augmented = _silu(self.pre)
        factor = self.wide(1) if self.gate is None else _silu(self.gate)
        self.y = (self.out + self.augmented) * factor
        self.summands = abs(self.out) + abs(self.augmented)
        self.y_terms = self.summands * abs(factor)

    def states(self) -> Any:
        """(t, S, z) as item t sees them."""
        S, z = self.start[0].copy(), self.start[1].copy()
        if not self.causal:
            S += np.einsum("thd,the->hde", self.rot_k, self.v)
            z += self.phi_k.sum(0)
        for t in range(self.n):
            if self.causal:
                S += self.rot_k[t][:, :, None] * self.v[t][:, None, :]
                z += self.phi_k[t]
            yield t, S, z
        self.last = S, z

    def backward(
        self, grads: dict[str, Tensor], b: int, index: Any
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        n, H, D = self.v.shape
        dy = _array(grads["out"][index], self.wide)
        dO = dy if self.gate is None else dy * _silu(self.gate)
        dnum = dO / self.den[:, :, None]
        dden = -(dO * self.out).sum(-1) / self.den
        found = {name: np.zeros_like(self.v) for name in ("q", "k", "v")}
        terms = {name: np.zeros_like(self.v) for name in ("q", "k")}
        if self.gate is not None:
            slope = dy * _silu_slope(self.gate)
            found["gate"] = slope * (self.out + self.augmented)
            terms["gate"] = abs(slope) * self.summands

        for t, S, z in self.states():
            turned = self.rotate(np.einsum("hde,he->hd", S, dnum[t]), t, -1)
            level = dden[t][:, None] * z
            found["q"][t] = (turned + level) * _phi_slope(self.q[t])
            terms["q"][t] = np.einsum("hde,he->hd", abs(S), abs(dnum[t]))

        T, y = np.zeros((H, D, D), self.wide), np.zeros((H, D), self.wide)
        if "final kv" in grads:
            T += _array(grads["final kv"][b], self.wide)
            y += _array(grads["final k_sum"][b], self.wide)
        for t in reversed(range(n)):
            T += self.rot_q[t][:, :, None] * dnum[t][:, None, :]
            y += dden[t][:, None] * self.phi_q[t]
            turned = self.rotate(np.einsum("hde,he->hd", T, self.v[t]), t, -1)
            found["k"][t] = (turned + y) * _phi_slope(self.k[t])
            terms["k"][t] = np.einsum("hde,he->hd", abs(T), abs(self.v[t]))
            found["v"][t] = np.einsum("hde,hd->he", T, self.rot_k[t])
        found |= {"kv": T, "k_sum": y}
        terms["q"] *= _phi_slope(self.q)
        terms["k"] *= _phi_slope(self.k)

        dvalues = np.zeros_like(self.values)
        if "final conv" in grads:
            dvalues[n:] += _array(grads["final conv"][b], self.wide).reshape(-1, H, D)
        if self.weight is not None:
            dpre = dO * _silu_slope(self.pre)
            dweight, size = np.zeros_like(self.weight), np.zeros_like(self.weight)
            for j in range(self.W):
                dvalues[j : j + n] += self.weight[:, :, j] * dpre
                product = dpre * self.values[j : j + n]
                dweight[:, :, j], size[:, :, j] = product.sum(0), abs(product).sum(0)
            found |= {"conv_weight": dweight, "conv_bias": dpre.sum(0)}
            terms |= {"conv_weight": size, "conv_bias": abs(dpre).sum(0)}
        found["conv"] = dvalues[: self.W - 1]
        found["v"] += dvalues[self.W - 1 :]
        return found, terms


def _bounds(p: Problem) -> list[tuple[Any, int]]:
    """(index of the real rows, their number) of every sequence."""
    if p.cu_seqlens is not None:
        starts = p.cu_seqlens.tolist()
        pairs = itertools.pairwise(starts)
        return [(slice(start, end), end - start) for start, end in pairs]
    B, L = p.q.shape[:2]
    lengths = [L] * B if p.lengths is None else p.lengths.tolist()
    return [((b, slice(0, n)), n) for b, n in enumerate(lengths)]


def _array(x: Tensor, wide: Any) -> Array:
    return x.detach().to(torch.float64).numpy().astype(wide)


def _tensor(x: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.astype(np.float64)))


def _phi(x: Array) -> Array:
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def _phi_slope(x: Array) -> Array:
    return np.where(x > 0, x.dtype.type(1), np.exp(np.minimum(x, 0)))


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _silu(x: Array) -> Array:
    return x * _sigmoid(x)


def _silu_slope(x: Array) -> Array:
    s = _sigmoid(x)
    return s * (1 + x * (1 - s))
