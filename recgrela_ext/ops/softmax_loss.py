"""softmax_loss: cross-entropy over all items and its gradients, a tile of scores at a time.

Here: the public function and the fake kernel. The kernel is csrc/cpu/softmax_loss.cpp; what it
computes, ops/reference.py, for which a bias by recency is listed. It has no autograd formula: its
outputs are the gradients, and `model.losses.softmax_loss` hands them to autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library
from . import reference
from .checks import check_bias_values, check_softmax
from .recency_bias import RecencyBias, check_either
from .reference import LogitBias


def softmax_loss(
    hidden: Tensor,
    table: Tensor,
    targets: Tensor,
    ignore_index: int = 0,
    exclude: bool = True,
    gradients: bool = True,
    bias: LogitBias | RecencyBias | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean of -log softmax(hidden table^T)[targets] in nats, and its gradients, in one call.

    Args:
        hidden: ``[T, width]``, float32 or float64.
        table: ``[N, width]`` of the same dtype, the classes.
        targets: ``[T]`` int64; rows with `ignore_index` do not count.
        ignore_index: see `targets`.
        exclude: row `ignore_index` of the table is no class.
        gradients: False leaves the gradients empty.
        bias: what is added to the scores of some items of some rows, item by item
            (:class:`LogitBias`) or by how recently a row has met them (:class:`RecencyBias`); -inf
            leaves an item out, a row's target must stay finite.

    Returns:
        The loss (a scalar, 0 without a target), its gradient by hidden ``[T, width]`` (zero in rows
        without a target), by table ``[N, width]`` (zero in an excluded row) and by the values of
        bias ``[K]`` (empty without one). Values: none of them is differentiable. With the compiled
        operator the same bits for any number of threads.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value is off.
    """
    check_softmax("softmax_loss", hidden, table, targets, ignore_index, exclude, gradients)
    if bias is not None:
        check_either("softmax_loss", bias, hidden)
        if bias.values.dtype != hidden.dtype:
            raise ValueError(
                f"softmax_loss: bias.values must have the dtype of hidden, {hidden.dtype}, "
                f"got {bias.values.dtype}"
            )
        bias = bias._replace(values=bias.values.detach())
    hidden, table = hidden.detach(), table.detach()
    if hidden.device.type != "cpu" or not _library.has_kernels(hidden.device):
        return _plain(hidden, table, targets, ignore_index, exclude, gradients, bias)
    middle = exclude and 0 < ignore_index < len(table) - 1
    if middle:  # the kernel takes it for a class of probability 0; it may hold what is not finite
        table = table.index_fill(0, torch.tensor([ignore_index], device=table.device), 0.0)
    tensors = hidden.contiguous(), table.contiguous(), targets.contiguous()
    operator = torch.ops.recgrela.softmax_loss
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _library.call(
        operator, *tensors, ignore_index, exclude, gradients, *_arguments(bias)
    )
    if middle and gradients:
        found[2][ignore_index] = 0.0  # also where a row's loss is not finite
    return found


def _arguments(bias: LogitBias | RecencyBias | None) -> tuple[Tensor | None, ...]:
    """Of the operator: offsets, items, values, begin, end, up_to."""
    if bias is None:
        return None, None, None
    if isinstance(bias, LogitBias):
        return bias.offsets.contiguous(), bias.items.contiguous(), bias.values.contiguous()
    bounds = torch.tensor(bias.up_to, dtype=torch.int64)
    tensors = (bias.items, bias.values, bias.begin, bias.end)
    return None, *(x.contiguous() for x in tensors), bounds


def _plain(
    hidden: Tensor,
    table: Tensor,
    targets: Tensor,
    ignore_index: int,
    exclude: bool,
    gradients: bool,
    bias: LogitBias | RecencyBias | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    listed, bucket = bias, None
    if isinstance(bias, RecencyBias):
        offsets, items, bucket = bias.entries()
        listed = LogitBias(offsets, items, bias.values.index_select(0, bucket))
    assert not isinstance(listed, RecencyBias)
    if listed is not None:
        check_bias_values("softmax_loss", listed, len(table))
    loss, grad_hidden, grad_table, grad_bias = reference.softmax_loss(
        hidden, table, targets, ignore_index, exclude, gradients, listed
    )
    if bias is not None and bucket is not None and gradients:
        grad_bias = torch.zeros_like(bias.values).index_add(0, bucket, grad_bias)
    return loss, grad_hidden, grad_table, grad_bias


def _fake(
    hidden: Tensor,
    table: Tensor,
    targets: Tensor,
    ignore_index: int,
    exclude: bool,
    gradients: bool,
    bias_offsets: Tensor | None,
    bias_items: Tensor | None,
    bias_values: Tensor | None,
    bias_begin: Tensor | None = None,
    bias_end: Tensor | None = None,
    bias_up_to: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    none = (0,)
    shapes = (hidden.shape, table.shape) if gradients else (none, none)
    added = bias_values.shape if gradients and bias_values is not None else none
    loss, grad_bias = hidden.new_empty(()), hidden.new_empty(added)
    return loss, hidden.new_empty(shapes[0]), table.new_empty(shapes[1]), grad_bias


if _library.KERNEL_DEVICES:
    torch.library.register_fake("recgrela::softmax_loss", _fake)
