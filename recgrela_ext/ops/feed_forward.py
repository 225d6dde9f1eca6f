"""feed_forward: two linear layers, GELU, both dropouts and the residual sum in one operator.

Here: the public function, the autograd formula and the fake kernels. The kernel is
csrc/cpu/feed_forward.cpp; what it computes, ops/reference.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _library
from . import reference
from .autocast import full_precision
from .checks import check_feed_forward
from .transforms import needs_gradient, needs_plain_pytorch

_WHOLE = 16  # of csrc/cpu/feed_forward.cpp: vectors and blocks of the dropout divide it


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
    """residual + dropout(W2 dropout(GELU(W1 x + b1)) + b2), the dropouts of `activation_dropout`.

    Args:
        x: rows ``[N, C]``, float32 or float64.
        first_weight, first_bias: W1 ``[M, C]`` and b1 ``[M]``.
        second_weight, second_bias: W2 ``[C, M]`` and b2 ``[C]``.
        residual: ``[N, C]`` or None.
        p: share that each dropout drops, in [0, 1).
        inner_seed, outer_seed: of the dropout after GELU and of the other. Draw fresh ones for
            every call, or masks repeat.

    Returns:
        ``[N, C]``. Differentiable in every tensor, twice. On a CPU the kernel runs where C and M
        are multiples of 16; the same bits for any number of threads.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value is off.
    """
    tensors = (x, first_weight, first_bias, second_weight, second_bias, residual)
    check_feed_forward("feed_forward", *tensors, p, inner_seed, outer_seed)
    if not fits_kernel(x, first_weight) or needs_plain_pytorch():
        with full_precision(x):
            return reference.feed_forward(*tensors, p, inner_seed, outer_seed)
    dense = [None if t is None else t.contiguous() for t in tensors]
    save = needs_gradient(*tensors)
    ops = torch.ops.recgrela
    operator = ops.feed_forward if save else ops.feed_forward_forward
    out: Tensor = _library.call(operator, *dense, p, inner_seed, outer_seed, save)[0]
    return out


def fits_kernel(x: Tensor, first_weight: Tensor) -> bool:
    """Whether a kernel takes rows x through a first weight of this shape."""
    if x.device.type != "cpu" or not _library.has_kernels(x.device):
        return False
    if x.dtype not in (torch.float32, torch.float64):
        return False
    return all(n > 0 and n % _WHOLE == 0 for n in first_weight.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, first_weight, _, second_weight, _, _, ctx.p, *ctx.seeds, _ = inputs
    ctx.save_for_backward(x, first_weight, second_weight, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_pre: Tensor | None) -> tuple[Tensor | None, ...]:
    """`grad_pre` comes from a second derivative: the first one reads `pre`."""
    x, first_weight, second_weight, pre = ctx.saved_tensors  # once: activation checkpoints count
    needs = ctx.needs_input_grad
    gradients: list[Tensor | None] = [None] * 5
    if grad is not None and any(needs[:5]):
        gradients = list(
            torch.ops.recgrela.feed_forward_backward(
                grad.contiguous(), x, first_weight, second_weight, pre, ctx.p, *ctx.seeds
            )
        )
    if grad_pre is not None:
        with full_precision(x):
            parts = grad_pre @ first_weight, grad_pre.t() @ x, grad_pre.sum(0)
        for i, part in enumerate(parts):
            before = gradients[i]
            gradients[i] = part if before is None else before + part
    return (*gradients, grad if needs[5] else None, None, None, None, None)


def _save_for_second_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.p, ctx.inner_seed, ctx.outer_seed = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _second_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of the reference's gradients, by autograd; what `pre` depends on comes through `pre`."""
    saved = ctx.saved_tensors
    with torch.enable_grad(), full_precision(saved[1]):
        grad, x, w1, w2, pre = (t.detach().requires_grad_() for t in saved)
        found = reference.feed_forward_gradients(
            grad, x, w1, w2, pre, ctx.p, ctx.inner_seed, ctx.outer_seed
        )
        pairs = [(f, g) for f, g in zip(found, grads, strict=True) if g is not None]
        second = torch.autograd.grad(
            [f for f, _ in pairs], [grad, x, w1, w2, pre], [g for _, g in pairs], allow_unused=True
        )
    return (*second, None, None, None)


def _fake_forward(
    x: Tensor,
    first_weight: Tensor,
    first_bias: Tensor,
    second_weight: Tensor,
    second_bias: Tensor,
    residual: Tensor | None,
    p: float,
    inner_seed: int,
    outer_seed: int,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], first_weight.shape[0]) if save_for_backward else (0,)
    return x.new_empty(x.shape), x.new_empty(shape)


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    first_weight: Tensor,
    second_weight: Tensor,
    pre: Tensor,
    p: float,
    inner_seed: int,
    outer_seed: int,
) -> tuple[Tensor, ...]:
    M, C = first_weight.shape
    return tuple(x.new_empty(shape) for shape in (x.shape, (M, C), (M,), (C, M), (C,)))


if _library.KERNEL_DEVICES:
    torch.library.register_autograd(
        "recgrela::feed_forward", _backward, setup_context=_save_for_backward
    )
    torch.library.register_autograd(
        "recgrela::feed_forward_backward",
        _second_backward,
        setup_context=_save_for_second_backward,
    )
    for name in ("feed_forward", "feed_forward_forward"):
        torch.library.register_fake(f"recgrela::{name}", _fake_forward)
    torch.library.register_fake("recgrela::feed_forward_backward", _fake_backward)
