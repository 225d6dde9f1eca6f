"""gated_rela_step: one item per sequence, the state updated in place.

The kernel is csrc/cpu/gated_rela_step.cpp; what it computes, ops/reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library
from . import reference
from .autocast import cast_rows, full_precision
from .checks import check_parameters, check_rows, check_same_device, check_state, check_tensor
from .reference import State, accumulate_dtype
from .transforms import needs_gradient, needs_plain_pytorch


def gated_rela_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    inv_freq: Tensor,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    state: State,
    eps: float = 1e-6,
    active: Tensor | None = None,
) -> Tensor:
    """gated_rela for the next item of every sequence: cost and memory do not grow with the history.

    Args:
        q, k, v, gate: ``[B, H, D]``, see :func:`recgrela_ext.ops.gated_rela`.
        inv_freq, conv_weight, conv_bias, eps: as there.
        state: ``(kv [B, H, D, D], k_sum [B, H, D], conv [B, W-1, H*D], position [B] int64)``. The
            first three are updated in place (their version counters are bumped); they may have any
            batch stride, so that all of one user's state can lie in one row. ``position`` is only
            read: whoever owns the layers advances it once per event.
        active: bool ``[B]``; where False the state stays untouched, bit for bit, and the output row
            is 0. None: all active.

    Returns:
        ``[B, H, D]`` in the dtype of q. No gradient.

    Raises:
        RuntimeError: gradients are on and an input requires one.
        ValueError, TypeError: an argument's shape, dtype, device or stride is off.
    """
    q, k, v, gate = cast_rows(q, k, v, gate)  # type: ignore[assignment]
    check_rows("gated_rela_step", q, k, v, gate, 3)
    width = check_parameters("gated_rela_step", q, inv_freq, conv_weight, conv_bias, eps)
    check_state("gated_rela_step", "state", state, q, q.shape[0], width)
    if active is not None:
        check_tensor("gated_rela_step", "active", active)
        check_same_device("gated_rela_step", "active", active, q)
    if active is not None and (active.shape != q.shape[:1] or active.dtype != torch.bool):
        raise ValueError(
            f"gated_rela_step: active must be a bool tensor of shape [B] = [{q.shape[0]}], "
            f"got {active.dtype} {list(active.shape)}"
        )
    if needs_gradient(q, k, v, gate, conv_weight, conv_bias, *state[:3]):
        raise RuntimeError(
            "gated_rela_step: inputs must not require a gradient, the state is updated in place; "
            "call it under torch.no_grad(), or train with gated_rela"
        )
    kv, k_sum, conv, position = state
    if not _library.has_kernels(q.device) or needs_plain_pytorch():
        with full_precision(q):
            return reference.gated_rela_step(q, k, v, gate, inv_freq, conv_weight, conv_bias,
                                             state, eps, active)  # fmt: skip
    acc = accumulate_dtype(q.dtype)
    out = _library.call(
        torch.ops.recgrela.gated_rela_step,
        q, k, v, gate,
        inv_freq.to(torch.float64).contiguous(),
        None if conv_weight is None else conv_weight.to(acc).contiguous(),
        None if conv_bias is None else conv_bias.to(acc).contiguous(),
        kv, k_sum, conv,
        position.contiguous(),
        None if active is None else active.contiguous(),
        eps,
    )  # fmt: skip
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version((kv, k_sum, conv))
    return out


def _fake_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    inv_freq: Tensor,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    kv: Tensor,
    k_sum: Tensor,
    conv: Tensor,
    position: Tensor,
    active: Tensor | None,
    eps: float,
) -> Tensor:
    return q.new_empty(q.shape)


if _library.KERNEL_DEVICES:
    torch.library.register_fake("recgrela::gated_rela_step", _fake_step)
