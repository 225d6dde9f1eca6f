"""The operators in plain PyTorch: the specification every kernel is compared with.

Shapes: ``B`` batch, ``L`` length, ``H`` heads, ``D`` head dim, ``hidden_size = H * D``.

    phi(x) = x + 1 where x > 0, else exp(x)                          feature map
    R_p    rotates the pairs (2i, 2i+1) by p * inv_freq[h, i] radians
    num_t  = sum_{s<=t} (R_t phi(q_t) . R_s phi(k_s)) v_s             [D]
    den_t  = sum_{s<=t} phi(q_t) . phi(k_s)                           scalar, not rotated
    o_t    = num_t / (den_t + eps * n_t)                              n_t keys in the sum
    a_t    = SiLU(conv_bias + sum_j conv_weight[:, j] * v_{t-W+1+j})  rank augmentation
    y_t    = SiLU(gate_t) * (o_t + a_t)                               gated rank selector

Source: RecGRELA (arXiv 2506.13315), section 3; eps and the normaliser as in the published code.
bfloat16 and float16 inputs are computed in float32 and rounded once, at the end.

A state is the tuple ``(kv [B, H, D, D], k_sum [B, H, D], conv [B, W-1, H*D], position [B])``
with kv = sum R_s phi(k_s) v_s^T (key dim first) and conv = the last W - 1 values, oldest first.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import check_whole, is_one_of
from ..errors import shown

State = tuple[Tensor, Tensor, Tensor, Tensor]


class LogitBias(NamedTuple):
    """What is added to some logits ``[T, N]`` before a softmax, row by row.

    Row t adds ``values[k]`` to the logit of ``items[k]`` for every k from ``offsets[t]`` to
    ``offsets[t + 1]``; the same item may come several times.
    """

    offsets: Tensor  # [T + 1] int64, from 0 to K
    items: Tensor  # [K] int64, 0 to N - 1
    values: Tensor  # [K] in the dtype of the logits

    def rows(self) -> Tensor:
        """The row of each value, ``[K]`` int64."""
        counts = self.offsets.diff()
        rows = torch.arange(len(counts), device=counts.device)
        return rows.repeat_interleave(counts, output_size=len(self.items))


_CHUNK = 64
_DROPOUT_BLOCK = 1024  # kDropoutBlock of csrc/cpu/kernels.h
_LOW = 2**32 - 1


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums and states are kept in: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def inv_freq(
    num_heads: int, head_dim: int, rotary: str = "full_width", base: float = 10000.0
) -> Tensor:
    """Angular frequencies of the rotary pairs, radians per position.

    Args:
        num_heads: H.
        head_dim: D, even.
        rotary: ``"full_width"`` (published code: the heads own disjoint frequency bands),
            ``"per_head"`` (every head has all bands) or ``"none"`` (all zero: no rotation).
        base: the largest period is 2 pi * base, about.

    Returns:
        float64 ``[H, D/2]``.

    Raises:
        ValueError: unknown ``rotary``, odd ``head_dim`` or a base not above 0.
        TypeError: ``num_heads`` or ``head_dim`` is no int.
    """
    check_whole(num_heads, "inv_freq", "num_heads")
    check_whole(head_dim, "inv_freq", "head_dim", low=0)
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"inv_freq: head_dim must be even and at least 2, got {shown(head_dim)}")
    if not isinstance(base, (float, int)) or not 0 < base <= sys.float_info.max:
        raise ValueError(f"inv_freq: base must be a finite number above 0, got {shown(base)}")
    if not is_one_of(rotary, ("full_width", "per_head", "none")):
        raise ValueError(
            f"inv_freq: rotary must be 'full_width', 'per_head' or 'none', got {shown(rotary)}"
        )
    base = float(base)
    pairs = head_dim // 2
    index = torch.arange(num_heads * pairs, dtype=torch.float64).view(num_heads, pairs)
    if rotary == "full_width":
        return base ** (-index / (num_heads * pairs))
    if rotary == "per_head":
        return base ** (-(index % pairs) / pairs)
    return torch.zeros_like(index)


def feature_map(x: Tensor) -> Tensor:
    """phi(x) = elu(x) + 1, without the cancellation of computing it that way. Any shape."""
    # The inner where keeps exp from overflowing into a NaN gradient; a clamp would have gradient 0
    # at 0 in some versions of torch.
    return torch.where(x > 0, x + 1, torch.exp(torch.where(x > 0, 0.0, x)))


def rotate(x: Tensor, position: Tensor, inv_freq: Tensor) -> Tensor:
    """Rotates the adjacent pairs of ``x [B, L, H, D]`` at ``position [B, L]`` (any integers)."""
    phase = position.to(torch.float64)[:, :, None, None] * inv_freq.to(torch.float64)
    cos, sin = phase.cos().to(x.dtype), phase.sin().to(x.dtype)  # [B, L, H, D/2]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def gated_rela(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    inv_freq: Tensor,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: State | None = None,
    return_final_state: bool = False,
    causal: bool = True,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, State]:
    """Same arguments and results as :func:`recgrela_ext.ops.gated_rela`, differentiable twice."""
    if cu_seqlens is not None:
        return _packed(q, k, v, gate, inv_freq, conv_weight, conv_bias, cu_seqlens, initial_state,
                       return_final_state, causal, eps)  # fmt: skip
    dtype, acc = q.dtype, accumulate_dtype(q.dtype)
    B, L, H, D = q.shape
    q, k, v = q.to(acc), k.to(acc), v.to(acc)
    steps = torch.arange(L, device=q.device)
    if lengths is None:
        lengths = torch.full((B,), L, device=q.device, dtype=torch.int64)
    real = steps < lengths[:, None]  # [B, L]
    keep = real[:, :, None, None]
    # Padding may hold anything, NaN included: it is selected away, never multiplied.
    q, k, v = (torch.where(keep, x, 0.0) for x in (q, k, v))

    width = 1 if conv_weight is None else conv_weight.shape[-1]
    kv, k_sum, conv, position = initial_state or zero_state(B, H, D, width, acc, q.device)
    kv, k_sum, conv = kv.to(acc), k_sum.to(acc), conv.to(acc)
    phases = position[:, None] + steps
    phi_q, phi_k = feature_map(q), torch.where(keep, feature_map(k), 0.0)
    rot_q, rot_k = (rotate(x, phases, inv_freq) for x in (phi_q, phi_k))

    attend = _attend_causal if causal else _attend_bidirectional
    num, den, kv, k_sum = attend(phi_q, phi_k, rot_q, rot_k, v, kv, k_sum)
    count = phases + 1 if causal else (position + lengths)[:, None].expand(B, L)
    # A bidirectional sequence without keys has no output; 1 keeps its masked rows finite.
    out = num / (den + eps * count.clamp(min=1)[:, :, None].to(acc))[..., None]

    values = torch.cat((conv, v.reshape(B, L, H * D)), dim=1)  # [B, W-1+L, H*D]
    if conv_weight is not None:
        out = out + _augment(values, conv_weight, conv_bias).view(B, L, H, D)
    if gate is not None:
        out = out * F.silu(torch.where(keep, gate.to(acc), 0.0))
    out = torch.where(keep, out, 0.0).to(dtype)
    if not return_final_state:
        return out
    last = lengths[:, None] + torch.arange(width - 1, device=q.device)  # [B, W-1]
    conv = values.gather(1, last[:, :, None].expand(-1, -1, H * D))
    return out, (kv, k_sum, conv, position + lengths)


def rela(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inv_freq: Tensor,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: State | None = None,
    return_final_state: bool = False,
    causal: bool = True,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, State]:
    """RELA alone: o_t above, without rank augmentation and gate. See :func:`gated_rela`."""
    return gated_rela(q, k, v, None, inv_freq, None, None, lengths, cu_seqlens, initial_state,
                      return_final_state, causal, eps)  # fmt: skip


def gated_rela_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    inv_freq: Tensor,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    state: State,
    eps: float = 1e-6,
    active: Tensor | None = None,
) -> Tensor:
    """One item per sequence, ``[B, H, D]``; updates kv, k_sum and conv in place."""
    one_gate = None if gate is None else gate.unsqueeze(1)
    lengths = torch.ones(q.shape[0], dtype=torch.int64, device=q.device)
    if active is not None:
        lengths = lengths * active
    result = gated_rela(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), one_gate, inv_freq,
                        conv_weight, conv_bias, lengths, None, state, True, True, eps)  # fmt: skip
    assert isinstance(result, tuple)
    out, final = result
    for old, new in zip(state[:3], final[:3], strict=True):
        old.copy_(new)
    return out.squeeze(1)


def zero_state(
    B: int, H: int, D: int, width: int, dtype: torch.dtype, device: torch.device | str | None = None
) -> State:
    """The state before the first item: ``(kv, k_sum, conv, position)``, all zero."""
    return (
        torch.zeros(B, H, D, D, dtype=dtype, device=device),
        torch.zeros(B, H, D, dtype=dtype, device=device),
        torch.zeros(B, width - 1, H * D, dtype=dtype, device=device),
        torch.zeros(B, dtype=torch.int64, device=device),
    )


def _attend_causal(
    phi_q: Tensor,
    phi_k: Tensor,
    rot_q: Tensor,
    rot_k: Tensor,
    v: Tensor,
    kv: Tensor,
    k_sum: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """num [B, L, H, D], den [B, L, H] and the states after the last item."""
    nums, dens = [], []
    split = [x.split(_CHUNK, dim=1) for x in (phi_q, phi_k, rot_q, rot_k, v)]
    for pq, pk, rq, rk, u in zip(*split, strict=True):
        mask = torch.ones(pq.shape[1], pq.shape[1], device=v.device, dtype=torch.bool).tril()
        scores = torch.where(mask, torch.einsum("bthd,bshd->bhts", rq, rk), 0.0)
        nums.append(
            torch.einsum("bhts,bshe->bthe", scores, u) + torch.einsum("bthd,bhde->bthe", rq, kv)
        )
        dens.append((pq * (pk.cumsum(1) + k_sum[:, None])).sum(-1))
        kv = kv + torch.einsum("bshd,bshe->bhde", rk, u)
        k_sum = k_sum + pk.sum(1)
    if not nums:
        return v, v.sum(-1), kv, k_sum
    return torch.cat(nums, 1), torch.cat(dens, 1), kv, k_sum


def _attend_bidirectional(
    phi_q: Tensor,
    phi_k: Tensor,
    rot_q: Tensor,
    rot_k: Tensor,
    v: Tensor,
    kv: Tensor,
    k_sum: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kv = kv + torch.einsum("bshd,bshe->bhde", rot_k, v)
    k_sum = k_sum + phi_k.sum(1)
    num = torch.einsum("bthd,bhde->bthe", rot_q, kv)
    return num, torch.einsum("bthd,bhd->bth", phi_q, k_sum), kv, k_sum


def _augment(values: Tensor, conv_weight: Tensor, conv_bias: Tensor | None) -> Tensor:
    """a_t from ``values [B, W-1+L, H*D]``: ``[B, L, H*D]``."""
    weight = conv_weight.to(values.dtype)
    if values.shape[1] < weight.shape[1]:  # no items: conv1d refuses
        return values[:, :0]
    bias = None if conv_bias is None else conv_bias.to(values.dtype)
    pre = F.conv1d(values.transpose(1, 2), weight[:, None, :], bias, groups=weight.shape[0])
    return F.silu(pre).transpose(1, 2)


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    inv_freq: Tensor,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    cu_seqlens: Tensor,
    initial_state: State | None,
    return_final_state: bool,
    causal: bool,
    eps: float,
) -> Tensor | tuple[Tensor, State]:
    """Packed rows ``[T, H, D]`` through the padded form and back."""
    start = cu_seqlens.to(torch.int64)
    lengths = start.diff()
    longest = int(lengths.max()) if lengths.numel() else 0
    steps = torch.arange(longest, device=q.device)
    real = steps < lengths[:, None]  # [B, L]
    row = torch.where(real, start[:-1, None] + steps, 0)
    if q.shape[0] == 0:  # nothing to gather from: every sequence is empty
        shape = (lengths.shape[0], *q.shape)
        q, k, v = q.expand(shape), k.expand(shape), v.expand(shape)
        gate = None if gate is None else gate.expand(shape)
    else:
        q, k, v = q[row], k[row], v[row]
        gate = None if gate is None else gate[row]
    result = gated_rela(q, k, v, gate, inv_freq, conv_weight, conv_bias, lengths, None,
                        initial_state, return_final_state, causal, eps)  # fmt: skip
    if isinstance(result, Tensor):
        return result[real]
    out, state = result
    return out[real], state


def activation_dropout(
    x: Tensor, residual: Tensor | None = None, gelu: bool = False, p: float = 0.1, seed: int = 0
) -> Tensor:
    """residual + factors * act(x), factors of :func:`dropout_factors`; differentiable twice."""
    wide = x.to(accumulate_dtype(x.dtype))
    out = (F.gelu(wide) if gelu else wide) * dropout_factors(x, p, seed)
    return (out if residual is None else residual.to(out.dtype) + out).to(x.dtype).contiguous()


def dropout_factors(like: Tensor, p: float, seed: int) -> Tensor:
    """0 where element i (row-major) is dropped, else 1 / (1 - p), in the shape of ``like``.

    Every block of 1024 elements has a 64-bit key from splitmix64, with the low half a and the high
    half b. Its element j is dropped when its word, read as int32, is below 2^32 p - 2^31 (rounded):

        w = a + 0x9e3779b9 j;  w = (w ^ w >> 16) 0x7feb352d;  word = (w ^ w >> 15 ^ b) 0x846ca68b
    """
    dropped = min(round(p * 2**32), 2**32 - 1)
    index = torch.arange(like.numel(), device=like.device)
    key = _mix_bits(_mix_bits(torch.full_like(index, seed)) + index // _DROPOUT_BLOCK)
    word = (key + 0x9E3779B9 * (index % _DROPOUT_BLOCK)) & _LOW
    word = ((word ^ (word >> 16)) * 0x7FEB352D) & _LOW
    word = ((word ^ (word >> 15) ^ (key >> 32 & _LOW)) * 0x846CA68B) & _LOW
    kept = (word ^ 2**31) >= dropped  # 2^31 turns the order of int32 into that of uint32
    scale = 2**32 / (2**32 - dropped)
    return kept.view(like.shape).to(accumulate_dtype(like.dtype)) * scale


def _mix_bits(z: Tensor) -> Tensor:
    """splitmix64 of int64 numbers, which torch multiplies modulo 2^64."""
    z = z + _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _shift_right(z, shift)) * _signed(factor)
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    return z >> bits & (1 << 64 - bits) - 1  # without the sign's copies


def _signed(word: int) -> int:
    return word - (1 << 64)  # of a word with its highest bit set


def feed_forward(
    x: Tensor,
    first_weight: Tensor,
    first_bias: Tensor,
    second_weight: Tensor,
    second_bias: Tensor,
    residual: Tensor | None = None,
    p: float = 0.0,
    inner_seed: int = 0,
    outer_seed: int = 0,
) -> Tensor:
    """[residual +] dropout(W2 dropout(GELU(W1 x + b1)) + b2), by :func:`activation_dropout`."""
    pre = F.linear(x, first_weight, first_bias)  # [N, M]
    active = activation_dropout(pre, None, True, p, inner_seed)
    branch = F.linear(active, second_weight, second_bias)  # [N, C]
    return activation_dropout(branch, residual, False, p, outer_seed)


def feed_forward_gradients(
    grad: Tensor,
    x: Tensor,
    first_weight: Tensor,
    second_weight: Tensor,
    pre: Tensor,
    p: float,
    inner_seed: int,
    outer_seed: int,
) -> tuple[Tensor, ...]:
    """Gradients of :func:`feed_forward` by x, W1, b1, W2 and b2, given pre = W1 x + b1."""
    inner = dropout_factors(pre, p, inner_seed)
    branch = grad * dropout_factors(grad, p, outer_seed)
    density = torch.exp(-0.5 * pre * pre) * (2 * torch.pi) ** -0.5
    slope = torch.special.ndtr(pre) + pre * density
    grad_pre = (branch @ second_weight) * inner * slope
    active = F.gelu(pre) * inner
    return (
        grad_pre @ first_weight,
        grad_pre.t() @ x,
        grad_pre.sum(0),
        branch.t() @ active,
        branch.sum(0),
    )


def softmax_loss(
    hidden: Tensor,
    table: Tensor,
    targets: Tensor,
    ignore_index: int = 0,
    exclude: bool = True,
    gradients: bool = True,
    bias: LogitBias | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and gradients from the scores s = hidden table^T + bias of all rows.

        loss = mean of log sum_j exp s_j - s_y;   d loss / d s = (softmax(s) - onehot(y)) / rows

    over the rows whose target y is not `ignore_index`.
    """
    kept = targets != ignore_index
    h, y = hidden[kept], targets[kept]
    excluded = torch.tensor([ignore_index] if exclude else [], dtype=y.dtype, device=y.device)
    table = table.index_fill(0, excluded, 0.0)  # it may hold anything
    scores = h @ table.t()  # [R, N]
    if bias is not None:
        row = bias.rows()
        ours = kept[row].nonzero().squeeze(1)
        places = (kept.cumsum(0) - 1)[row[ours]], bias.items[ours]
        scores = scores.index_put(places, bias.values[ours], accumulate=True)
    scores = scores.index_fill(1, excluded, -torch.inf)
    count = max(h.shape[0], 1)
    loss = -torch.log_softmax(scores, 1).gather(1, y[:, None]).sum() / count
    if not gradients:
        return loss, hidden.new_empty(0), table.new_empty(0), hidden.new_empty(0)
    own = torch.arange(len(y), device=y.device), y
    minus = scores.new_full((), -1.0)
    share = torch.softmax(scores, 1).index_put(own, minus, accumulate=True) / count
    share = share.index_fill(1, excluded, 0.0)  # also of a row whose softmax is not finite
    grad_hidden = torch.zeros_like(hidden)
    grad_hidden[kept] = share @ table
    grad_bias = hidden.new_zeros(0 if bias is None else len(bias.values))
    if bias is not None:
        grad_bias[ours] = share[places]
    grad_table = (share.t() @ h).index_fill(0, excluded, 0.0)
    return loss, grad_hidden, grad_table, grad_bias


def recent_items(items: Tensor, begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each span `items[begin[r]:end[r]]` the places after which their item does not stand there
    again: offsets [R + 1], the items [K] and their recency [K], see `ops.recent_items`."""
    device = items.device
    counts = torch.where(begin < end, end - begin, 0)  # a difference of any two would overflow
    ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    row = torch.arange(len(counts), device=device).repeat_interleave(counts)
    place = torch.arange(len(row), device=device)
    place += (begin - ends[:-1]).index_select(0, row)
    last = next_places(items).index_select(0, place) >= end.index_select(0, row)
    kept = last.nonzero().squeeze(1)
    row, place = row.index_select(0, kept), place.index_select(0, kept)
    offsets = torch.searchsorted(kept, ends)
    recency = offsets.index_select(0, row + 1) - torch.arange(len(row), device=device)
    return offsets, items.index_select(0, place), recency


def next_places(items: Tensor) -> Tensor:
    """For every place in items [T] where the same item stands next, T where nowhere; int64 [T]."""
    T = items.shape[0]  # len would make a constant of it in torch.export
    ordered, order = items.sort(stable=True)
    again = torch.full((T,), T, device=items.device)
    same = (ordered[1:] == ordered[:-1]).nonzero().squeeze(1)
    again[order[same]] = order[same + 1]
    return again


def gelu_curvature(x: Tensor) -> Tensor:
    """Second derivative of GELU(x) = x Phi(x): phi(x) (2 - x^2), phi the normal density."""
    return torch.exp(-0.5 * x * x) * (2 - x * x) * (2 * torch.pi) ** -0.5
