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
from .checks import check_softmax


def softmax_loss(
    hidden: Tensor,
    table: Tensor,
    targets: Tensor,
    ignore_index: int = 0,
    exclude: bool = True,
    gradients: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of -log softmax(hidden table^T)[targets] in nats, and its gradients, in one call.

    Args:
        hidden: ``[T, width]``, float32 or float64.
        table: ``[N, width]`` of the same dtype, the classes.
        targets: ``[T]`` int64; rows with `ignore_index` do not count.
        ignore_index: see `targets`.
        exclude: row `ignore_index` of the table is no class.
        gradients: False leaves both gradients empty.

    Returns:
        The loss (a scalar, 0 without a target), its gradient by hidden ``[T, width]`` (zero in rows
        without a target) and by table ``[N, width]`` (zero in an excluded row). Values: none of
        them is differentiable. The same bits for any number of threads.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value is off.
    """
    check_softmax("softmax_loss", hidden, table, targets, ignore_index, exclude, gradients)
    hidden, table = hidden.detach(), table.detach()
    if hidden.device.type != "cpu" or not _library.has_kernels(hidden.device):
        return reference.softmax_loss(hidden, table, targets, ignore_index, exclude, gradients)
    tensors = hidden.contiguous(), table.contiguous(), targets.contiguous()
    operator = torch.ops.recgrela.softmax_loss
    found: tuple[Tensor, Tensor, Tensor] = _library.call(
        operator, *tensors, ignore_index, exclude, gradients
    )
    return found


def _fake(
    hidden: Tensor,
    table: Tensor,
    targets: Tensor,
    ignore_index: int,
    exclude: bool,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (hidden.shape, table.shape) if gradients else ((0,), (0,))
    return hidden.new_empty(()), hidden.new_empty(shapes[0]), table.new_empty(shapes[1])


if _library.KERNEL_DEVICES:
    torch.library.register_fake("recgrela::softmax_loss", _fake)
