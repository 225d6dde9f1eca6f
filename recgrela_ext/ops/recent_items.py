"""recent_items: the distinct items of spans of a log, and how recently each was met.

The kernel is csrc/cpu/recent_items.cpp; what it computes, ops/reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library
from . import reference
from .checks import check_tensor, values_are_there
from .transforms import in_transform, is_batched


def recent_items(items: Tensor, begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For row r the distinct items in `items[begin[r]:end[r]]`, in the order of their last places.

    Args:
        items: [T] int64.
        begin, end: bounds [R] int64 in 0..T; a span whose end is not above its begin is empty,
            wherever it lies.

    Returns:
        All int64: offsets [R + 1] from 0 to K; the items [K] of row r from `offsets[r]` to
        `offsets[r + 1]`; and of each its recency [K], 1 for the item met last, 2 for the distinct
        one before it. On a CPU with kernels nothing else is held; elsewhere about 40 bytes for
        each place of each span.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value is off.
    """
    _check(items, begin, end)
    if items.device.type != "cpu" or not _library.has_kernels(items.device) or in_transform():
        if values_are_there(items) and not any(map(is_batched, (items, begin, end))):
            _check_values(items, begin, end)
        return reference.recent_items(items, begin, end)
    tensors = items.contiguous(), reference.next_places(items), begin.contiguous()
    found: tuple[Tensor, Tensor, Tensor] = _library.call(
        torch.ops.recgrela.recent_items, *tensors, end.contiguous()
    )
    return found


def _check(items: Tensor, begin: Tensor, end: Tensor) -> None:
    op = "recent_items"
    for name, x in (("items", items), ("begin", begin), ("end", end)):
        check_tensor(op, name, x)
        if x.dtype != torch.int64:
            raise TypeError(f"{op}: {name} must have dtype int64, got {x.dtype}")
        if x.device != items.device:
            raise ValueError(f"{op}: {name} must be on {items.device}, got {x.device}")
    if items.dim() != 1 or begin.dim() != 1 or end.shape != begin.shape:
        raise ValueError(
            f"{op}: items must be [T], begin and end [R], got {list(items.shape)}, "
            f"{list(begin.shape)} and {list(end.shape)}"
        )


def _check_values(items: Tensor, begin: Tensor, end: Tensor) -> None:
    bad = ((begin < 0) | (end > len(items))) & (begin < end)
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"recent_items: spans must lie in 0..{len(items)}, got {int(begin[at])} to "
            f"{int(end[at])}"
        )


def _fake(items: Tensor, next: Tensor, begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size()
    # len would make a constant of it in torch.export
    return items.new_empty(begin.shape[0] + 1), items.new_empty(count), items.new_empty(count)


if _library.KERNEL_DEVICES:
    torch.library.register_fake("recgrela::recent_items", _fake)
