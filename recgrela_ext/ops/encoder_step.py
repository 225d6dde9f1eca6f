"""encoder_step: every layer of one event in a single call, for serving.

Four layers of modules cost hundreds of microseconds before any operator runs; this is one operator.
The kernel is csrc/cpu/encoder_step.cpp; what it computes, `reference_encoder_step` below.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _library
from ..errors import shown
from . import reference
from .checks import check_tensor
from .transforms import needs_gradient, needs_plain_pytorch

_PANEL = 64  # kPanelColumns of csrc/cpu/kernels.h


@dataclasses.dataclass(frozen=True)
class EncoderLayer:
    """Weights of one layer in torch's layout, Linear weights [out, in]; C = hidden_size.

    `gate` and `conv` may be None (ablations). Each pair is (weight, bias).
    """

    norm1: tuple[Tensor, Tensor]  # [C], [C]
    gate: tuple[Tensor, Tensor] | None  # [C, C], [C]
    in_proj: tuple[Tensor, Tensor]  # [C, C], [C]
    qk_proj: tuple[Tensor, Tensor]  # [2C, C], [2C]
    conv: tuple[Tensor, Tensor] | None  # [C, W], [C]
    out_proj: tuple[Tensor, Tensor]  # [C, C], [C]
    norm2: tuple[Tensor, Tensor]  # [C], [C]
    fc1: tuple[Tensor, Tensor]  # [M, C], [M]
    fc2: tuple[Tensor, Tensor]  # [C, M], [C]


@dataclasses.dataclass(frozen=True)
class PackedEncoder:
    """All weights of an encoder in one buffer, made by `pack_encoder`; a copy, not a view."""

    weights: Tensor  # flat, float32 or float64
    inv_freq: Tensor  # [H, D/2] float64
    num_layers: int
    mlp_width: int
    conv_width: int  # 0: no rank augmentation
    gate: bool
    final_norm: bool
    eps: float
    layer_norm_eps: float

    @property
    def hidden_size(self) -> int:
        return 2 * self.inv_freq.numel()

    @property
    def state_size(self) -> int:
        """Elements of one user's state row: per layer kv, k_sum, conv."""
        head_dim = 2 * self.inv_freq.shape[1]
        kept = max(self.conv_width - 1, 0)
        return self.num_layers * self.hidden_size * (head_dim + 1 + kept)


def pack_encoder(
    layers: Sequence[EncoderLayer],
    inv_freq: Tensor,
    final_norm: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6,
    layer_norm_eps: float = 1e-6,
) -> PackedEncoder:
    """The weights of `layers` in the order and layout the kernel reads.

    Raises:
        ValueError: no layers, or layers that differ in kind.
        TypeError: layers that are none, or weights that are no tensors.
    """
    if not isinstance(layers, Sequence) or not all(isinstance(x, EncoderLayer) for x in layers):
        raise TypeError(f"pack_encoder: layers must be a list of EncoderLayer, got {shown(layers)}")
    check_tensor("pack_encoder", "inv_freq", inv_freq)
    if inv_freq.dim() != 2 or inv_freq.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            "pack_encoder: inv_freq must be [H, D/2] of dtype float64 or float32, "
            f"got {inv_freq.dtype} {list(inv_freq.shape)}"
        )
    if final_norm is not None:
        if not isinstance(final_norm, tuple | list) or len(final_norm) != 2:
            raise TypeError(
                f"pack_encoder: final_norm must be a pair (weight, bias), got {shown(final_norm)}"
            )
        for tensor in final_norm:
            check_tensor("pack_encoder", "final_norm", tensor)
    if not layers:
        raise ValueError("pack_encoder: layers must not be empty, got none")
    pieces: list[Tensor] = []
    for layer in layers:
        if (layer.gate is None, layer.conv is None) != (
            layers[0].gate is None,
            layers[0].conv is None,
        ):
            raise ValueError("pack_encoder: layers must be of one kind, got a mixture")
        pieces += layer.norm1
        for weight, bias in (p for p in (layer.gate, layer.in_proj, layer.qk_proj) if p):
            pieces += (*_panels(weight), bias)
        pieces += (layer.conv[0].t(), layer.conv[1]) if layer.conv else ()
        pieces += (*_panels(layer.out_proj[0]), layer.out_proj[1], *layer.norm2)
        pieces += (*_panels(layer.fc1[0]), layer.fc1[1], *_panels(layer.fc2[0]), layer.fc2[1])
    pieces += final_norm or ()
    first = layers[0]
    dtype = reference.accumulate_dtype(first.in_proj[0].dtype)
    with torch.no_grad():
        weights = torch.cat([x.detach().to(dtype).reshape(-1) for x in pieces])
    return PackedEncoder(
        weights,
        inv_freq.detach().to(torch.float64).contiguous(),
        len(layers),
        first.fc1[0].shape[0],
        0 if first.conv is None else first.conv[0].shape[1],
        first.gate is not None,
        final_norm is not None,
        eps,
        layer_norm_eps,
    )


def _panels(weight: Tensor) -> tuple[Tensor, ...]:
    """A Linear weight [out, in] as [in, columns] pieces of at most `_PANEL` columns."""
    return weight.t().split(_PANEL, dim=1)


def encoder_step(
    item_vectors: Tensor,
    packed_weights: PackedEncoder,
    state: tuple[Tensor, Tensor],
    active: Tensor | None = None,
) -> Tensor:
    """All layers of one event per user, the states updated in place.

    Args:
        item_vectors: ``[B, hidden_size]``, the encoder's input rows, in the dtype of the weights.
        packed_weights: see `pack_encoder`.
        state: ``(rows [B, F], position [B] int64)``. A row holds, layer after layer, kv [H, D, D],
            k_sum [H, D] and conv [W-1, H*D]; rows may have any batch stride. The rows change in
            place, the position is read alone and advanced by the caller.
        active: bool ``[B]``; where False the row stays untouched and the result is 0.

    Returns:
        ``[B, hidden_size]``. No gradient.

    Raises:
        RuntimeError: gradients are on and an input requires one.
        ValueError, TypeError: an argument's shape, dtype, device or stride is off.
    """
    if not isinstance(packed_weights, PackedEncoder):
        got = type(packed_weights).__name__
        raise TypeError(f"encoder_step: packed_weights must be a PackedEncoder, got {got}")
    if not isinstance(state, tuple | list) or len(state) != 2:
        got = type(state).__name__
        raise TypeError(f"encoder_step: state must be a pair (rows, position), got {got}")
    rows, position = state
    _check(item_vectors, packed_weights, rows, position, active)
    if needs_gradient(item_vectors, rows):
        raise RuntimeError(
            "encoder_step: inputs must not require a gradient, the state is updated in place; "
            "call it under torch.no_grad()"
        )
    active = None if active is None else active.contiguous()
    state = rows, position.contiguous()
    return encoder_step_unchecked(item_vectors.contiguous(), packed_weights, state, active)


def encoder_step_unchecked(
    item_vectors: Tensor,
    packed_weights: PackedEncoder,
    state: tuple[Tensor, Tensor],
    active: Tensor | None = None,
) -> Tensor:
    """`encoder_step` for a caller who has checked the arguments and switched gradients off."""
    p, (rows, position) = packed_weights, state
    kernel = item_vectors.device.type in _library.KERNEL_DEVICES and not item_vectors.is_cuda
    if not kernel or needs_plain_pytorch():
        return reference_encoder_step(item_vectors, packed_weights, state, active)
    out: Tensor = _library.call(
        torch.ops.recgrela.encoder_step, item_vectors, p.weights, p.inv_freq, rows, position,
        active, p.num_layers, p.mlp_width, p.conv_width, p.gate, p.final_norm, p.eps,
        p.layer_norm_eps)  # fmt: skip
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(rows)
    return out


def _check(
    x: Tensor, packed: PackedEncoder, rows: Tensor, position: Tensor, active: Tensor | None
) -> None:
    check_tensor("encoder_step", "item_vectors", x)
    C, B = packed.hidden_size, x.shape[0] if x.dim() else 0
    wanted = (
        ("item_vectors", x, (B, C), packed.weights.dtype),
        ("state", rows, (B, packed.state_size), packed.weights.dtype),
        ("position", position, (B,), torch.int64),
        ("active", active, (B,), torch.bool),
    )
    for name, tensor, shape, dtype in wanted:
        if tensor is None and name == "active":
            continue
        check_tensor("encoder_step", name, tensor)
        assert tensor is not None
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"encoder_step: {name} must have shape {list(shape)}, got {list(tensor.shape)}"
            )
        if tensor.dtype != dtype:
            raise ValueError(f"encoder_step: {name} must have dtype {dtype}, got {tensor.dtype}")
        if tensor.device != packed.weights.device:
            raise ValueError(
                f"encoder_step: {name} must be on the device of the weights, "
                f"{packed.weights.device}, got {tensor.device}"
            )


def reference_encoder_step(
    item_vectors: Tensor,
    packed: PackedEncoder,
    state: tuple[Tensor, Tensor],
    active: Tensor | None = None,
) -> Tensor:
    """The same in plain PyTorch: the specification of the kernel."""
    rows, position = state
    H, D = packed.inv_freq.shape[0], 2 * packed.inv_freq.shape[1]
    C, M, W = packed.hidden_size, packed.mlp_width, packed.conv_width
    kept = max(W - 1, 0)
    at = 0

    def take(*shape: int) -> Tensor:
        nonlocal at
        count = torch.Size(shape).numel()
        at += count
        return packed.weights[at - count : at].view(shape)

    def norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, (C,), take(C), take(C), packed.layer_norm_eps)

    def linear(x: Tensor, out: int) -> Tensor:
        widths = [min(_PANEL, out - first) for first in range(0, out, _PANEL)]
        weight = torch.cat([take(x.shape[-1], width) for width in widths], dim=1)
        return x @ weight + take(out)

    x = item_vectors
    for layer in rows.split(C * (D + 1 + kept), dim=1):
        kv, k_sum, conv = layer.split((C * D, C, kept * C), dim=1)
        views = (
            kv.unflatten(1, (H, D, D)),
            k_sum.unflatten(1, (H, D)),
            conv.unflatten(1, (kept, C)),
        )
        h = norm(x)
        gate = linear(h, C).view(-1, H, D) if packed.gate else None
        u = linear(h, C)
        q, k = linear(u, 2 * C).view(-1, 2, H, D).unbind(1)
        weight, bias = (take(W, C).t(), take(C)) if W else (None, None)
        y = reference.gated_rela_step(q, k, u.view(-1, H, D), gate, packed.inv_freq, weight, bias,
                                      (*views, position), packed.eps, active)  # fmt: skip
        x = x + linear(y.reshape(-1, C), C)
        x = x + linear(F.gelu(linear(norm(x), M)), C)
    if packed.final_norm:
        x = norm(x)
    return x if active is None else torch.where(active[:, None], x, 0.0)


def _fake_encoder_step(
    x: Tensor,
    weights: Tensor,
    inv_freq: Tensor,
    state: Tensor,
    position: Tensor,
    active: Tensor | None,
    num_layers: int,
    mlp_width: int,
    conv_width: int,
    gate: bool,
    final_norm: bool,
    eps: float,
    layer_norm_eps: float,
) -> Tensor:
    return x.new_empty(x.shape)


if _library.KERNEL_DEVICES:
    torch.library.register_fake("recgrela::encoder_step", _fake_encoder_step)
