"""softmax_loss: cross-entropy over all items and its gradients, a tile of scores at a time.

Here: the public function and the fake kernel. The kernel is csrc/cpu/softmax_loss.cpp; what it
computes, ops/reference.py. It has no autograd formula: its outputs are the gradients, and
`model.losses.softmax_loss` hands them to autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library
from . import reference
from .checks import check_bias_values, check_softmax
from .reference import LogitBias


def softmax_loss(
    hidden: Tensor,
    table: Tensor,
    targets: Tensor,
    ignore_index: int = 0,
    exclude: bool = True,
    gradients: bool = True,
    bias: LogitBias | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean of -log softmax(hidden table^T)[targets] in nats, and its gradients, in one call.

    Args:
        hidden: ``[T, width]``, float32 or float64.
        table: ``[N, width]`` of the same dtype, the classes.
        targets: ``[T]`` int64; rows with `ignore_index` do not count.
        ignore_index: see `targets`.
        exclude: row `ignore_index` of the table is no class.
        gradients: False leaves the gradients empty.
        bias: what is added to the scores of some items of some rows, :class:`LogitBias`; -inf
            leaves an item out, a row's target must stay finite.

    Returns:
        The loss (a scalar, 0 without a target), its gradient by hidden ``[T, width]`` (zero in rows
        without a target), by table ``[N, width]`` (zero in an excluded row) and by the values of
        bias ``[K]`` (empty without one). Values: none of them is differentiable. With the compiled
        operator the same bits for any number of threads.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value is off.
    """
    check_softmax("softmax_loss", hidden, table, targets, ignore_index, exclude, gradients, bias)
    hidden, table = hidden.detach(), table.detach()
    if bias is not None:
        bias = LogitBias(bias.offsets, bias.items, bias.values.detach())
    if hidden.device.type != "cpu" or not _library.has_kernels(hidden.device):
        if bias is not None:
            check_bias_values("softmax_loss", bias, len(table))
        return reference.softmax_loss(
            hidden, table, targets, ignore_index, exclude, gradients, bias
        )
    middle = exclude and 0 < ignore_index < len(table) - 1
    if middle:  # the kernel takes it for a class of probability 0; it may hold what is not finite
        table = table.index_fill(0, torch.tensor([ignore_index], device=table.device), 0.0)
    tensors = hidden.contiguous(), table.contiguous(), targets.contiguous()
    operator = torch.ops.recgrela.softmax_loss
    added = (None,) * 3 if bias is None else [x.contiguous() for x in bias]
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _library.call(
        operator, *tensors, ignore_index, exclude, gradients, *added
    )
    if middle and gradients:
        found[2][ignore_index] = 0.0  # also where a row's loss is not finite
    return found


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    none = (0,)
    shapes = (hidden.shape, table.shape) if gradients else (none, none)
    added = bias_values.shape if gradients and bias_values is not None else none
    loss, grad_bias = hidden.new_empty(()), hidden.new_empty(added)
    return loss, hidden.new_empty(shapes[0]), table.new_empty(shapes[1]), grad_bias


if _library.KERNEL_DEVICES:
    torch.library.register_fake("recgrela::softmax_loss", _fake)
