"""gated_rela: RELA, rank augmentation and gated rank selector in one operator.

Here: the public function, the autograd formula and the fake kernels. The kernel is
csrc/cpu/gated_rela.cpp; what it computes, ops/reference.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _library
from . import reference
from .autocast import cast_rows, full_precision
from .checks import check_sequence, check_values
from .double_backward import second_gradients
from .reference import State, accumulate_dtype
from .transforms import needs_gradient, needs_plain_pytorch

CHUNK = 64  # items between saved states: kChunk of csrc/params.h


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
    """y_t = SiLU(gate_t) * (RELA(q, k, v)_t + SiLU(conv(v))_t), one pass over the sequence.

    RELA is causal linear attention with feature map elu + 1 and rotary positions in the numerator
    (RecGRELA, arXiv 2506.13315, section 3); the formulas are in :mod:`recgrela_ext.ops.reference`.

    Args:
        q, k, v, gate: ``[B, L, H, D]``, D even, strided views welcome as long as the last dimension
            is contiguous; float32, float64, bfloat16 or float16. ``gate=None``: no gate.
        inv_freq: ``[H, D/2]`` radians per position, see :func:`inv_freq`. No gradient.
        conv_weight, conv_bias: ``[H*D, W]`` and ``[H*D]``, W >= 1; None: no rank augmentation.
        lengths: ``[B]`` real items of each right-padded sequence, int64 or int32. What padding
            holds never matters, NaN included; its outputs and gradients are exactly 0.
        cu_seqlens: ``[B+1]`` starts of packed sequences, the last entry T; q, k, v, gate are then
            ``[T, H, D]``. Excludes ``lengths``.
        initial_state: ``(kv [B, H, D, D], k_sum [B, H, D], conv [B, W-1, H*D], position [B])`` of
            the items before, float32 (float64 for float64 rows), position int64; never written to.
        return_final_state: also return the state after the last item, a new tuple.
        causal: False is the published bidirectional form, in plain PyTorch on every device, without
            states.
        eps: added to the normaliser, times the number of keys; from 0 to 1.

    Returns:
        ``out`` in the shape and dtype of q, or ``(out, final_state)``. Sums are kept in float32 at
        least. Differentiable in q, k, v, gate, conv_weight, conv_bias and the states, twice.
        Under autocast the rows are cast, parameters and states are not.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device, stride or value is off; the
            message names it.
    """
    q, k, v, gate = cast_rows(q, k, v, gate)  # type: ignore[assignment]
    check_sequence("gated_rela", q, k, v, gate, inv_freq, conv_weight, conv_bias, lengths,
                   cu_seqlens, initial_state, return_final_state, causal, eps)  # fmt: skip
    if not causal or not _library.has_kernels(q.device) or needs_plain_pytorch():
        check_values("gated_rela", q, lengths, cu_seqlens)
        with full_precision(q):
            return reference.gated_rela(
                q, k, v, gate, inv_freq, conv_weight, conv_bias, lengths, cu_seqlens,
                initial_state, return_final_state, causal, eps)  # fmt: skip
    acc = accumulate_dtype(q.dtype)
    inv_freq = inv_freq.detach().to(torch.float64).contiguous()
    conv_weight = None if conv_weight is None else conv_weight.to(acc).contiguous()
    conv_bias = None if conv_bias is None else conv_bias.to(acc).contiguous()
    lengths = None if lengths is None else lengths.to(torch.int64).contiguous()
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    state = (None,) * 4 if initial_state is None else [x.contiguous() for x in initial_state]
    arguments = (q, k, v, gate, inv_freq, conv_weight, conv_bias, lengths, cu_seqlens, *state, eps,
                 return_final_state)  # fmt: skip
    if needs_gradient(q, k, v, gate, conv_weight, conv_bias, *state[:3]):
        out, *final, _, _ = _library.call(torch.ops.recgrela.gated_rela, *arguments, True)
    else:
        forward = torch.ops.recgrela.gated_rela_forward
        out, *final, _, _ = _library.call(forward, *arguments, False)
    if not return_final_state:
        return out
    return out, (*final, final_position(q, lengths, cu_seqlens, state[3], final[0]))


def final_position(
    q: Tensor,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    position: Tensor | None,
    final_kv: Tensor,
) -> Tensor:
    """Positions after the last items: int64 ``[B]``."""
    if cu_seqlens is not None:
        items = cu_seqlens.diff()
    elif lengths is not None:
        items = lengths.clone()
    else:
        shape = (final_kv.shape[0],)
        items = torch.full(shape, q.shape[1], dtype=torch.int64, device=q.device)
    return items if position is None else position + items


# Autograd: the backward is an operator of its own, so that it can be differentiated again.


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps, ctx.has_final, _ = inputs
    ctx.save_for_backward(*tensors, output[4], output[5])
    ctx.mark_non_differentiable(output[4], output[5])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any,
    grad_out: Tensor | None,
    grad_kv: Tensor | None,
    grad_k_sum: Tensor | None,
    grad_conv: Tensor | None,
    *_: Tensor | None,
) -> tuple[Tensor | None, ...]:
    *inputs, saved_kv, saved_k_sum = ctx.saved_tensors
    q, k, v, gate, inv_freq, weight, bias, lengths, cu_seqlens, kv, k_sum, conv, position = inputs
    grad_out = torch.zeros_like(q) if grad_out is None else grad_out
    finals = _final_gradients(ctx.has_final, inputs, (grad_kv, grad_k_sum, grad_conv))
    state_grad = any(ctx.needs_input_grad[9:12])
    dq, dk, dv, dgate, dweight, dbias, dkv, dk_sum, dconv = torch.ops.recgrela.gated_rela_backward(
        grad_out.contiguous(), *finals, q, k, v, gate, inv_freq, weight, bias, lengths, cu_seqlens,
        kv, k_sum, conv, position, saved_kv, saved_k_sum, ctx.eps, state_grad)  # fmt: skip
    return (
        dq, dk, dv,
        None if gate is None else dgate,
        None,
        None if weight is None else dweight,
        None if bias is None else dbias,
        None, None,
        *((dkv, dk_sum, dconv) if state_grad else (None, None, None)),
        None, None, None, None,
    )  # fmt: skip


def _final_gradients(
    has_final: bool, inputs: list[Tensor | None], grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of the final state: all of them, zeros where one is missing, or none at all."""
    if not has_final or all(g is None for g in grads):
        return (None, None, None)
    q, weight, cu_seqlens = inputs[0], inputs[5], inputs[8]
    assert q is not None
    shapes = state_shapes(q, weight, cu_seqlens)
    acc = accumulate_dtype(q.dtype)
    return tuple(
        q.new_zeros(shape, dtype=acc) if g is None else g.contiguous()
        for g, shape in zip(grads, shapes, strict=True)
    )


def state_shapes(
    q: Tensor, conv_weight: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[tuple[Any, ...], ...]:
    """Shapes of kv, k_sum and conv for rows like q."""
    H, D = q.shape[-2:]
    B = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    past = 0 if conv_weight is None else conv_weight.shape[1] - 1
    return (B, H, D, D), (B, H, D), (B, past, H * D)


def _save_for_second_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.eps, ctx.state_grad = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _second_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = second_gradients(ctx.saved_tensors, ctx.eps, grads)
    return (*gradients, None, None, None, None)


# Fake kernels: shapes and dtypes alone.


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    inv_freq: Tensor,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    kv: Tensor | None,
    k_sum: Tensor | None,
    conv: Tensor | None,
    position: Tensor | None,
    eps: float,
    return_final_state: bool,
    save_for_backward: bool,
) -> tuple[Tensor, ...]:
    acc = accumulate_dtype(q.dtype)
    shapes: tuple[tuple[Any, ...], ...] = ((0,),) * 3
    if return_final_state:
        shapes = state_shapes(q, conv_weight, cu_seqlens)
    saved: tuple[tuple[Any, ...], ...] = ((0,),) * 2
    if save_for_backward:
        H, D = q.shape[-2:]
        if cu_seqlens is None:
            chunks = q.shape[0] * ((q.shape[1] + CHUNK - 1) // CHUNK)
        else:
            chunks = q.shape[0] // CHUNK + cu_seqlens.shape[0] - 1
        saved = ((chunks, H, D, D), (chunks, H, D))
    return (q.new_empty(q.shape), *(q.new_empty(s, dtype=acc) for s in (*shapes, *saved)))


def _fake_backward(
    grad_out: Tensor,
    grad_kv: Tensor | None,
    grad_k_sum: Tensor | None,
    grad_conv: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    inv_freq: Tensor,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    kv: Tensor | None,
    k_sum: Tensor | None,
    conv: Tensor | None,
    position: Tensor | None,
    saved_kv: Tensor,
    saved_k_sum: Tensor,
    eps: float,
    state_grad: bool,
) -> tuple[Tensor, ...]:
    acc = accumulate_dtype(q.dtype)
    rows = [q.new_empty(q.shape) for _ in range(3)]
    grad_gate = q.new_empty((0,) if gate is None else q.shape)
    weight = q.new_empty((0,) if conv_weight is None else conv_weight.shape, dtype=acc)
    bias = q.new_empty((0,) if conv_bias is None else conv_bias.shape, dtype=acc)
    shapes = state_shapes(q, conv_weight, cu_seqlens) if state_grad else ((0,),) * 3
    return (*rows, grad_gate, weight, bias, *(q.new_empty(s, dtype=acc) for s in shapes))


if _library.KERNEL_DEVICES:
    torch.library.register_autograd(
        "recgrela::gated_rela", _backward, setup_context=_save_for_backward
    )
    torch.library.register_autograd(
        "recgrela::gated_rela_backward", _second_backward, setup_context=_save_for_second_backward
    )
    for name in ("gated_rela", "gated_rela_forward"):
        torch.library.register_fake(f"recgrela::{name}", _fake_forward)
    torch.library.register_fake("recgrela::gated_rela_backward", _fake_backward)
