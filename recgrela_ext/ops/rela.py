"""rela: rotary-enhanced linear attention alone.

Here: the public function, the autograd formula and the fake kernels. The kernel is
csrc/cpu/rela.cpp; what it computes, ops/reference.py.
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
from .gated_rela import _fake_backward as _fake_gated_backward
from .gated_rela import _fake_forward as _fake_gated_forward
from .gated_rela import final_position, state_shapes
from .reference import State, accumulate_dtype
from .transforms import needs_gradient, needs_plain_pytorch


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
    """Rotary-enhanced linear attention (RecGRELA, arXiv 2506.13315, section 3.2).

        num_t = sum_{s<=t} (R_t phi(q_t) . R_s phi(k_s)) v_s
        o_t = num_t / (sum_{s<=t} phi(q_t) . phi(k_s) + eps n_t)

    Arguments, results and errors as :func:`recgrela_ext.ops.gated_rela` without gate and
    convolution; the state's conv is ``[B, 0, H*D]``.
    """
    q, k, v = cast_rows(q, k, v)  # type: ignore[assignment]
    check_sequence("rela", q, k, v, None, inv_freq, None, None, lengths, cu_seqlens,
                   initial_state, return_final_state, causal, eps)  # fmt: skip
    if not causal or not _library.has_kernels(q.device) or needs_plain_pytorch():
        check_values("rela", q, lengths, cu_seqlens)
        with full_precision(q):
            return reference.rela(q, k, v, inv_freq, lengths, cu_seqlens, initial_state,
                                  return_final_state, causal, eps)  # fmt: skip
    inv_freq = inv_freq.detach().to(torch.float64).contiguous()
    lengths = None if lengths is None else lengths.to(torch.int64).contiguous()
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    kv = k_sum = position = None
    if initial_state is not None:
        kv, k_sum, _, position = (x.contiguous() for x in initial_state)
    arguments = (q, k, v, inv_freq, lengths, cu_seqlens, kv, k_sum, position, eps,
                 return_final_state)  # fmt: skip
    if needs_gradient(q, k, v, kv, k_sum):
        operator, save = torch.ops.recgrela.rela, True
    else:
        operator, save = torch.ops.recgrela.rela_forward, False
    out, final_kv, final_k_sum, _, _ = _library.call(operator, *arguments, save)
    if not return_final_state:
        return out
    conv = final_kv.new_empty(state_shapes(q, None, cu_seqlens)[2])
    return out, (final_kv, final_k_sum, conv,
                 final_position(q, lengths, cu_seqlens, position, final_kv))  # fmt: skip


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps, ctx.has_final, _ = inputs
    ctx.save_for_backward(*tensors, output[3], output[4])
    ctx.mark_non_differentiable(output[3], output[4])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any,
    grad_out: Tensor | None,
    grad_kv: Tensor | None,
    grad_k_sum: Tensor | None,
    *_: Tensor | None,
) -> tuple[Tensor | None, ...]:
    *inputs, saved_kv, saved_k_sum = ctx.saved_tensors
    q, cu_seqlens = inputs[0], inputs[5]
    grad_out = torch.zeros_like(q) if grad_out is None else grad_out
    finals: tuple[Tensor | None, ...] = (None, None)
    if ctx.has_final and (grad_kv is not None or grad_k_sum is not None):
        shapes = state_shapes(q, None, cu_seqlens)[:2]
        finals = tuple(
            q.new_zeros(shape, dtype=accumulate_dtype(q.dtype)) if g is None else g.contiguous()
            for g, shape in zip((grad_kv, grad_k_sum), shapes, strict=True)
        )
    state_grad = any(ctx.needs_input_grad[6:8])
    dq, dk, dv, dkv, dk_sum = torch.ops.recgrela.rela_backward(
        grad_out.contiguous(), *finals, *inputs, saved_kv, saved_k_sum, ctx.eps, state_grad
    )
    states = (dkv, dk_sum) if state_grad else (None, None)
    return (dq, dk, dv, None, None, None, *states, None, None, None, None)


def _save_for_second_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.eps, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _second_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_out, grad_kv, grad_k_sum, q, k, v, inv_freq, lengths, cu_seqlens, kv, k_sum, position = (
        ctx.saved_tensors[:12]
    )
    empty = [
        None if x is None else x.new_empty(state_shapes(q, None, cu_seqlens)[2])
        for x in (grad_kv, kv)
    ]
    gated = (grad_out, grad_kv, grad_k_sum, empty[0], q, k, v, None, inv_freq, None, None, lengths,
             cu_seqlens, kv, k_sum, empty[1], position)  # fmt: skip
    gated_grads = (*grads[:3], None, None, None, *grads[3:5], None)
    found = second_gradients(gated, ctx.eps, gated_grads)
    return (*found[:3], *found[4:7], None, None, None, *found[13:15], *(None,) * 5)


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inv_freq: Tensor,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    kv: Tensor | None,
    k_sum: Tensor | None,
    position: Tensor | None,
    eps: float,
    return_final_state: bool,
    save_for_backward: bool,
) -> tuple[Tensor, ...]:
    out, final_kv, final_k_sum, _, saved_kv, saved_k_sum = _fake_gated_forward(
        q, k, v, None, inv_freq, None, None, lengths, cu_seqlens, kv, k_sum, None, position, eps,
        return_final_state, save_for_backward)  # fmt: skip
    return out, final_kv, final_k_sum, saved_kv, saved_k_sum


def _fake_backward(
    grad_out: Tensor,
    grad_kv: Tensor | None,
    grad_k_sum: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inv_freq: Tensor,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    kv: Tensor | None,
    k_sum: Tensor | None,
    position: Tensor | None,
    saved_kv: Tensor,
    saved_k_sum: Tensor,
    eps: float,
    state_grad: bool,
) -> tuple[Tensor, ...]:
    result = _fake_gated_backward(
        grad_out, grad_kv, grad_k_sum, None, q, k, v, None, inv_freq, None, None, lengths,
        cu_seqlens, kv, k_sum, None, position, saved_kv, saved_k_sum, eps, state_grad)  # fmt: skip
    return (*result[:3], *result[6:8])


if _library.KERNEL_DEVICES:
    torch.library.register_autograd("recgrela::rela", _backward, setup_context=_save_for_backward)
    torch.library.register_autograd(
        "recgrela::rela_backward", _second_backward, setup_context=_save_for_second_backward
    )
    for name in ("rela", "rela_forward"):
        torch.library.register_fake(f"recgrela::{name}", _fake_forward)
    torch.library.register_fake("recgrela::rela_backward", _fake_backward)
