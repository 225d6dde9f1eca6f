"""activation_dropout: activation, dropout and residual sum in one pass, without a stored mask.

Here: the public function, the autograd formula and the fake kernels. The kernel is
csrc/cpu/activation_dropout.cpp; what it computes, ops/reference.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _library
from . import reference
from .checks import check_dropout
from .transforms import needs_plain_pytorch


def activation_dropout(
    x: Tensor, residual: Tensor | None = None, gelu: bool = False, p: float = 0.1, seed: int = 0
) -> Tensor:
    """residual + dropout(act(x)), act GELU (the exact one) or the identity.

    Element i in row-major order is dropped by a hash of `(seed, i)` alone: the same seed gives the
    same mask for any dtype, layout, number of threads and device, and the backward makes it anew.

    Args:
        x: any shape, float32, float64, bfloat16 or float16; computed in float32 at least.
        residual: shape and dtype of x, or None.
        gelu: apply GELU to x first.
        p: share that is dropped, in [0, 1), rounded to a multiple of 2^-32; what is kept is scaled
            by 1 / (1 - p) of the rounded p.
        seed: any int64. Draw a fresh one for every call, or masks repeat.

    Returns:
        Shape and dtype of x, contiguous. Differentiable in x and residual, twice.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value is off.
    """
    check_dropout("activation_dropout", x, residual, gelu, p, seed)
    if x.device.type != "cpu" or not _library.has_kernels(x.device) or needs_plain_pytorch():
        return reference.activation_dropout(x, residual, gelu, p, seed)
    residual = None if residual is None else residual.contiguous()
    operator = torch.ops.recgrela.activation_dropout
    out: Tensor = _library.call(operator, x.contiguous(), residual, gelu, p, seed)
    return out


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, ctx.gelu, ctx.p, ctx.seed = inputs
    ctx.save_for_backward(x if ctx.gelu else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_x, needs_residual = ctx.needs_input_grad[:2]
    dx = None
    if needs_x:
        (x,) = ctx.saved_tensors
        dx = torch.ops.recgrela.activation_dropout_backward(
            grad.contiguous(), x, ctx.gelu, ctx.p, ctx.seed
        )
    return dx, grad if needs_residual else None, None, None, None


def _save_for_second_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, ctx.gelu, ctx.p, ctx.seed = inputs
    ctx.save_for_backward(grad if ctx.gelu else None, x)


def _second_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of dx = grad_y * factor * act'(x), plain PyTorch for act''."""
    grad_y, x = ctx.saved_tensors
    needs_grad_y, needs_x = ctx.needs_input_grad[:2]
    grad = grad.contiguous()
    to_grad_y = to_x = None
    if needs_grad_y:
        to_grad_y = torch.ops.recgrela.activation_dropout_backward(
            grad, x, ctx.gelu, ctx.p, ctx.seed
        )
    if needs_x and ctx.gelu:
        acc = reference.accumulate_dtype(x.dtype)
        factors = reference.dropout_factors(x, ctx.p, ctx.seed)
        curvature = reference.gelu_curvature(x.to(acc))
        to_x = (grad.to(acc) * grad_y.to(acc) * factors * curvature).to(x.dtype)
    return to_grad_y, to_x, None, None, None


def _fake(x: Tensor, other: Tensor | None, gelu: bool, p: float, seed: int) -> Tensor:
    return torch.empty_like(x)


if _library.KERNEL_DEVICES:
    torch.library.register_autograd(
        "recgrela::activation_dropout", _backward, setup_context=_save_for_backward
    )
    torch.library.register_autograd(
        "recgrela::activation_dropout_backward",
        _second_backward,
        setup_context=_save_for_second_backward,
    )
    for name in ("activation_dropout", "activation_dropout_backward"):
        torch.library.register_fake(f"recgrela::{name}", _fake)
