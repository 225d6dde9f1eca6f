"""topk_scores: inner products with all items and the best of them, the scores never in memory.

The kernel is csrc/cpu/topk_scores.h; what it computes, `reference_topk_scores` below. Without a
kernel `chunked_topk` runs, in chunks of the table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library
from ..errors import shown
from . import chunked_topk
from .checks import FLOATING, check_tensor, values_are_there
from .transforms import needs_gradient

_TABLES = (*FLOATING, torch.int8)
_ITEMS = (torch.int64, torch.int32, torch.int16, torch.int8,
          torch.uint64, torch.uint32, torch.uint16, torch.uint8)  # fmt: skip


def topk_scores(
    hidden: Tensor,
    table: Tensor,
    k: int,
    padding_idx: int = 0,
    scale: Tensor | None = None,
    seen: Tensor | None = None,
    candidates: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k items with the largest inner product, exact, for each row of `hidden`.

    Args:
        hidden: [B, width]; float32, float64, bfloat16 or float16.
        table: [N, width]; float32, float64, bfloat16, float16, or int8 with `scale`.
        k: at least 1.
        padding_idx: a row of the table that is no item.
        scale: [N] float32, row n of an int8 table stands for `scale[n] * table[n]`.
        seen: integers [B, S], rows to leave out; filled up with `padding_idx`.
        candidates: integers [C] or [B, C], the only rows to rank; filled up with `padding_idx`,
            repetitions count once.

    Returns:
        scores [B, k], best first, in float32 (float64 for float64 input), and items [B, k] int64.
        Of equal scores the smaller row comes first. Places without an item hold (-inf,
        padding_idx); a score that is NaN or -inf is no item's. No gradient. With the compiled
        operator the same bits for any number of threads, and for a user whatever the other users
        of the batch.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value is off.
        RuntimeError: gradients are on and an input requires one.
    """
    _check(hidden, table, k, padding_idx, scale, seen, candidates)
    if needs_gradient(hidden, table):
        raise RuntimeError(
            "topk_scores: inputs must not require a gradient; call it under torch.no_grad()"
        )
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if table.is_floating_point():
        dtype = torch.promote_types(dtype, table.dtype)
    if hidden.is_meta:
        shape = (hidden.shape[0], k)
        return hidden.new_empty(shape, dtype=dtype), hidden.new_empty(shape, dtype=torch.int64)
    hidden = hidden.to(dtype).contiguous()
    scale = None if scale is None else scale.contiguous()
    seen = None if seen is None else seen.to(torch.int64).contiguous().sort(-1).values
    if candidates is not None:
        candidates = _distinct(candidates.to(torch.int64).contiguous(), padding_idx)
    found = min(k, table.shape[0])
    fits = (dtype == torch.float64) == (table.dtype == torch.float64)
    if fits and _library.has_kernels(hidden.device) and not hidden.is_cuda:
        if table.stride(-1) != 1:
            table = table.contiguous()
        scores, items = _library.call(
            torch.ops.recgrela.topk_scores, hidden, table, scale, found, padding_idx, seen,
            candidates)  # fmt: skip
    else:
        scores, items = chunked_topk.top_k(
            hidden, table, found, padding_idx, scale, seen, candidates
        )
    return _widen(scores, k, -torch.inf), _widen(items, k, padding_idx)


def reference_topk_scores(
    hidden: Tensor,
    table: Tensor,
    k: int,
    padding_idx: int = 0,
    scale: Tensor | None = None,
    seen: Tensor | None = None,
    candidates: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same with all scores [B, N] in memory: the specification of the kernel."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    rows = table.to(torch.promote_types(dtype, table.dtype) if scale is None else dtype)
    if scale is not None:
        rows = rows * scale[:, None]
    scores = hidden.to(rows.dtype) @ rows.t()  # [B, N]
    B, N = scores.shape
    user = torch.arange(B, device=scores.device)[:, None]
    if candidates is not None:
        allowed = torch.zeros(B, N, dtype=torch.bool, device=scores.device)
        allowed[user, candidates.to(torch.int64).expand(B, -1)] = True
        scores = scores.masked_fill(~allowed, -torch.inf)
    if seen is not None:
        seen = seen.to(torch.int64)
        inside = torch.where((seen >= 0) & (seen < N), seen, padding_idx)
        scores[user, inside] = -torch.inf
    scores[:, padding_idx] = -torch.inf
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    scores, items = scores.sort(dim=1, descending=True, stable=True)
    items = items.masked_fill(scores == -torch.inf, padding_idx)
    return _widen(scores[:, :k], k, -torch.inf), _widen(items[:, :k], k, padding_idx)


def _distinct(candidates: Tensor, padding_idx: int) -> Tensor:
    """Ascending, with `padding_idx` in place of repetitions."""
    listed = candidates.sort(-1).values
    repeated = listed[..., 1:] == listed[..., :-1]
    listed[..., 1:] = listed[..., 1:].masked_fill(repeated, padding_idx)
    return listed


def _widen(x: Tensor, k: int, fill: float) -> Tensor:
    missing = k - x.shape[1]
    return x if missing <= 0 else torch.cat((x, x.new_full((len(x), missing), fill)), 1)


def _check(
    hidden: Tensor,
    table: Tensor,
    k: int,
    padding_idx: int,
    scale: Tensor | None,
    seen: Tensor | None,
    candidates: Tensor | None,
) -> None:
    op = "topk_scores"
    check_tensor(op, "hidden", hidden)
    check_tensor(op, "table", table)
    for name, x in (("scale", scale), ("seen", seen), ("candidates", candidates)):
        if x is not None:
            check_tensor(op, name, x)
    if hidden.dim() != 2 or hidden.dtype not in FLOATING:
        raise ValueError(
            f"{op}: hidden must be [B, width] of dtype float32, float64, bfloat16 or float16, "
            f"got {hidden.dtype} {list(hidden.shape)}"
        )
    B, width = hidden.shape
    if table.dim() != 2 or table.shape[1] != width or table.dtype not in _TABLES:
        raise ValueError(
            f"{op}: table must be [N, {width}] of a floating dtype or int8, got {table.dtype} "
            f"{list(table.shape)}"
        )
    N = table.shape[0]
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"{op}: k must be an int of at least 1, got {shown(k)}")
    if k >= 2**31:
        raise ValueError(f"{op}: k must be below 2**31, got {shown(k)}")
    if isinstance(padding_idx, bool) or not isinstance(padding_idx, int):
        raise TypeError(f"{op}: padding_idx must be an int, got {shown(padding_idx)}")
    if not 0 <= padding_idx < N:
        raise ValueError(f"{op}: padding_idx must lie in 0..{N - 1}, got {shown(padding_idx)}")
    if (scale is not None) != (table.dtype == torch.int8):
        raise ValueError(f"{op}: scale must be given for an int8 table and for no other")
    if scale is not None and (scale.shape != (N,) or scale.dtype != torch.float32):
        raise ValueError(
            f"{op}: scale must be float32 [{N}], got {scale.dtype} {list(scale.shape)}"
        )
    for name, x in (("seen", seen), ("candidates", candidates)):
        if x is None:
            continue
        if x.dtype not in _ITEMS:
            raise ValueError(f"{op}: {name} must be integers, got {x.dtype}")
        shared = name == "candidates" and x.dim() == 1
        if not shared and (x.dim() != 2 or x.shape[0] != B):
            either = "[C] or " if name == "candidates" else ""
            raise ValueError(f"{op}: {name} must be {either}[{B}, n], got {list(x.shape)}")
    for name, x in (("table", table), ("scale", scale), ("seen", seen), ("candidates", candidates)):
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{op}: {name} must be on {hidden.device}, got {x.device}")
    if candidates is not None and candidates.numel() and values_are_there(candidates):
        low, high = (int(x) for x in candidates.to(torch.int64).aminmax())  # uint64 has none
        if low < 0 or high >= N:
            raise ValueError(
                f"{op}: candidates must lie in 0..{N - 1}, got {low if low < 0 else high}"
            )


def _fake(
    hidden: Tensor,
    table: Tensor,
    scale: Tensor | None,
    k: int,
    padding_idx: int,
    seen: Tensor | None,
    candidates: Tensor | None,
) -> tuple[Tensor, Tensor]:
    shape = (hidden.shape[0], k)
    return hidden.new_empty(shape), hidden.new_empty(shape, dtype=torch.int64)


if _library.KERNEL_DEVICES:
    torch.library.register_fake("recgrela::topk_scores", _fake)
