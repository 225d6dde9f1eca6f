"""What is valid, from the documentation of the public operators alone: never from their checks.

A refusal of such arguments is a finding. True is certain; False leaves open whether they are
refused, also where the documentation says nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from recgrela_ext import ops
from recgrela_ext.ops.encoder_step import PackedEncoder
from tests.fuzz.operator_arguments import DTYPES, Arguments

WIDE = (torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32)
ITEMS = (*INTEGERS, torch.int16, torch.int8, torch.uint8)
KERNEL_WIDTH = 16  # what feed_forward's widths must be multiples of for its kernel


def gated_rela(given: Arguments) -> bool:
    q, cu_seqlens, lengths = given["q"], given["cu_seqlens"], given["lengths"]
    state, causal, last = (given[n] for n in ("initial_state", "causal", "return_final_state"))
    if not (isinstance(causal, bool) and isinstance(last, bool)):
        return False
    if not causal and (last or state is not None):
        return False
    packed = cu_seqlens is not None
    if not _rows(given, 3 if packed else 4):
        return False
    B = len(q)
    if packed:
        if lengths is not None or not _is(cu_seqlens, INTEGERS, None) or cu_seqlens.dim() != 1:
            return False
        starts = cu_seqlens.tolist()
        if not starts or starts != sorted(starts) or (starts[0], starts[-1]) != (0, len(q)):
            return False
        B = len(starts) - 1
    shaped = lengths is None or _is(lengths, INTEGERS, (B,))
    if not shaped or (lengths is not None and not _inside(lengths, q.shape[1] + 1)):
        return False
    return state is None or _state(state, given, B)


def rela(given: Arguments) -> bool:
    return gated_rela({**given, "gate": None, "conv_weight": None, "conv_bias": None})


def gated_rela_step(given: Arguments) -> bool:
    state = given["state"]
    if not _rows(given, 3) or not _state(state, given, len(given["q"])):
        return False
    # written in place: any stride between users, none of whom shares memory with another
    apart = all(_apart(x) for x in state[:3])
    return apart and _active(given["active"], len(given["q"]))


def encoder_step(given: Arguments) -> bool:
    x, packed, state = (given[n] for n in ("item_vectors", "packed_weights", "state"))
    if not isinstance(packed, PackedEncoder) or not isinstance(state, tuple) or len(state) != 2:
        return False
    if not _is(x, (packed.weights.dtype,), None) or x.dim() != 2:
        return False
    rows, position = state
    good = x.shape[1] == packed.hidden_size and _active(given["active"], len(x))
    good &= _is(rows, (x.dtype,), (len(x), packed.state_size)) and _apart(rows)
    return good and _is(position, (torch.int64,), (len(x),))


def topk_scores(given: Arguments) -> bool:
    hidden, table, scale = (given[n] for n in ("hidden", "table", "scale"))
    if not _is(hidden, DTYPES, None) or hidden.dim() != 2:
        return False
    if not _is(table, (*DTYPES, torch.int8), (_length(table), hidden.shape[1])):
        return False
    B, N = len(hidden), len(table)
    if (scale is not None) != (table.dtype == torch.int8):
        return False
    if scale is not None and not _is(scale, (torch.float32,), (N,)):
        return False
    seen, candidates = given["seen"], given["candidates"]
    if seen is not None and not _is(seen, ITEMS, (B, _width(seen))):
        return False
    if candidates is not None:
        if not _is(candidates, ITEMS, None) or not _inside(candidates, N):
            return False
        if candidates.dim() != 1 and candidates.shape != (B, _width(candidates)):
            return False
    return _whole(given["k"], 1, 10**6) and _whole(given["padding_idx"], 0, N - 1)


def activation_dropout(given: Arguments) -> bool:
    x, residual = given["x"], given["residual"]
    if not _is(x, DTYPES, None) or not isinstance(given["gelu"], bool):
        return False
    if residual is not None and not _is(residual, (x.dtype,), tuple(x.shape)):
        return False
    return _share(given["p"]) and _int64(given["seed"])


def feed_forward(given: Arguments) -> bool:
    x, w1, residual = (given[n] for n in ("x", "first_weight", "residual"))
    if not _is(x, WIDE, None) or x.dim() != 2:
        return False
    (N, C), M = x.shape, _length(w1)
    shapes = {"first_weight": (M, C), "first_bias": (M,), "second_weight": (C, M),
              "second_bias": (C,)}  # fmt: skip
    if not all(_is(given[n], (x.dtype,), shape) for n, shape in shapes.items()):
        return False
    if residual is not None and not _is(residual, (x.dtype,), (N, C)):
        return False
    return _share(given["p"]) and _int64(given["inner_seed"]) and _int64(given["outer_seed"])


def softmax_loss(given: Arguments) -> bool:
    hidden, table, targets = (given[n] for n in ("hidden", "table", "targets"))
    if not _is(hidden, WIDE, None) or hidden.dim() != 2:
        return False
    (T, width), N, ignored = hidden.shape, _length(table), given["ignore_index"]
    if not _is(table, (hidden.dtype,), (N, width)) or not _is(targets, (torch.int64,), (T,)):
        return False
    if not all(isinstance(given[n], bool) for n in ("exclude", "gradients")):
        return False
    if not _int64(ignored) or (given["exclude"] and not 0 <= ignored < N):
        return False
    bias = given.get("bias")
    return _inside(targets[targets != ignored], N) and (bias is None or _bias(bias, hidden, N))


def recent_items(given: Arguments) -> bool:
    items, begin, end = given["items"], given["begin"], given["end"]
    whole = (torch.int64,)
    if not all(_is(x, whole, None) and x.dim() == 1 for x in given.values()):
        return False
    if not _is(end, whole, (len(begin),)):
        return False
    return bool(((begin >= end) | ((begin >= 0) & (end <= len(items)))).all())


RULES = {
    "gated_rela": gated_rela, "rela": rela, "gated_rela_step": gated_rela_step,
    "encoder_step": encoder_step, "topk_scores": topk_scores,
    "activation_dropout": activation_dropout, "feed_forward": feed_forward,
    "softmax_loss": softmax_loss, "recent_items": recent_items,
}  # fmt: skip


def fits_kernel(given: Arguments) -> bool:
    """Whether a raw call takes arguments as they were drawn: some kernels know fewer dtypes than
    the public functions, and feed_forward's whole vectors alone."""
    first = given.get("first_weight")
    if first is not None:
        return first.dtype in WIDE and all(n % KERNEL_WIDTH == 0 for n in first.shape)
    return given["hidden"].dtype in WIDE if "targets" in given else True


def _is(x: Any, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...] | None) -> bool:
    """A dense tensor in memory, strided in any way."""
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.device.type != "cpu":
        return False
    return x.dtype in dtypes and (shape is None or tuple(x.shape) == shape)


def _length(x: Any) -> int:
    return len(x) if isinstance(x, Tensor) and x.dim() else -1


def _width(x: Any) -> int:
    return x.shape[-1] if isinstance(x, Tensor) and x.dim() else -1


def _whole(x: Any, low: int, high: int) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and low <= x <= high


def _int64(x: Any) -> bool:
    return _whole(x, -(2**63), 2**63 - 1)


def _share(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x < 1


def _inside(x: Tensor, limit: int) -> bool:
    return not x.numel() or 0 <= int(x.min()) <= int(x.max()) < limit


def _active(x: Any, B: int) -> bool:
    return x is None or _is(x, (torch.bool,), (B,))


def _apart(x: Tensor) -> bool:
    """Rows contiguous and without an element in common, in any distance."""
    return len(x) == 0 or (
        x[0].is_contiguous() and (len(x) == 1 or x.stride(0) >= math.prod(x.shape[1:]))
    )


def _rows(given: Arguments, dims: int) -> bool:
    """q, k, v, gate and the parameters, of gated_rela and its step."""
    q, weight, bias, eps = (given[n] for n in ("q", "conv_weight", "conv_bias", "eps"))
    if not _is(q, DTYPES, None) or q.dim() != dims:
        return False
    H, D = q.shape[-2:]
    if H < 1 or D < 2 or D % 2:
        return False
    rows = [q, given["k"], given["v"], *([] if given["gate"] is None else [given["gate"]])]
    if not all(_is(x, (q.dtype,), tuple(q.shape)) and x.stride(-1) == 1 for x in rows):
        return False
    if weight is None:
        good = bias is None
    else:
        good = _is(weight, DTYPES, (H * D, _width(weight))) and _width(weight) >= 1
        good = good and (bias is None or _is(bias, DTYPES, (H * D,)))
    number = isinstance(eps, int | float) and not isinstance(eps, bool) and 0 <= eps <= 1
    return good and number and _is(given["inv_freq"], WIDE, (H, D // 2))


def _state(state: Any, given: Arguments, B: int) -> bool:
    """The four tensors of a state; `given` has passed `_rows`."""
    if not isinstance(state, tuple) or len(state) != 4:
        return False
    q, weight = given["q"], given["conv_weight"]
    (H, D), past = q.shape[-2:], 0 if weight is None else weight.shape[1] - 1
    sums = torch.float64 if q.dtype == torch.float64 else torch.float32
    shapes = ((B, H, D, D), (B, H, D), (B, past, H * D), (B,))
    dtypes = (sums, sums, sums, torch.int64)
    return all(_is(x, (d,), s) for x, d, s in zip(state, dtypes, shapes, strict=True))


def _recency(bias: ops.RecencyBias, hidden: Tensor, N: int) -> bool:
    items, begin, end, up_to, values = bias
    whole, T = (torch.int64,), len(hidden)
    if not _is(items, whole, None) or items.dim() != 1 or not _inside(items, N):
        return False
    if not (_is(begin, whole, (T,)) and _is(end, whole, (T,))):
        return False
    if not isinstance(up_to, tuple) or not all(_whole(x, 1, 2**63 - 1) for x in up_to):
        return False
    rising = list(up_to) == sorted(set(up_to)) and len(up_to) < 254
    spans = ((begin >= end) | ((begin >= 0) & (end <= len(items)))).all()
    return rising and bool(spans) and _is(values, (hidden.dtype,), (len(up_to) + 1,))


def _bias(bias: Any, hidden: Tensor, N: int) -> bool:
    if isinstance(bias, ops.RecencyBias):
        return _recency(bias, hidden, N)
    if not isinstance(bias, ops.LogitBias):
        return False
    offsets, items, values = bias
    K = _length(items)
    if not _is(offsets, (torch.int64,), (len(hidden) + 1,)):
        return False
    if not _is(items, (torch.int64,), (K,)) or not _is(values, (hidden.dtype,), (K,)):
        return False
    bounds = offsets.tolist()
    rises = bounds == sorted(bounds) and (bounds[0], bounds[-1]) == (0, K)
    return rises and _inside(items, N)
