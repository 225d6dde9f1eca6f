"""An encoder's weights packed for `ops.encoder_step`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import ops
from .grela_block import DropPath, FeedForward, GRELABlock
from .rank_modulator import AdaptiveRankModulator
from .watch import watched

if TYPE_CHECKING:
    from .encoder import GRELAEncoder


def can_pack(encoder: GRELAEncoder) -> bool:
    """Whether one operator can do a whole event: the fused model, in float32 or float64."""
    norm = encoder.final_norm
    return (norm is None or _is_plain(norm)) and all(_is_fused(layer) for layer in encoder.layers)


def _is_plain(module: nn.Module) -> bool:
    """Whether weight and bias say all: not so for adapters, quantised layers, with hooks or a
    `forward` of its own."""
    plain = type(module) in (nn.Linear, nn.LayerNorm) and module.bias is not None
    return plain and not watched(module)


def steps_itself(layer: Any) -> bool:
    """Whether `layer.step` says what a call of `layer` would: nobody watches the calls that it
    leaves out."""
    own = type(layer) is GRELABlock and type(layer.modulator) is AdaptiveRankModulator
    return own and not watched(layer) and not watched(layer.modulator)


def _affine_modules(layer: Any) -> list[nn.Module]:
    modules = (layer.norm1, layer.modulator.gate_proj, layer.in_proj, layer.attention.qk_proj,
               layer.out_proj, layer.norm2, layer.mlp.fc1, layer.mlp.fc2)  # fmt: skip
    return [module for module in modules if module is not None]


def _is_fused(layer: Any) -> bool:
    return (
        steps_itself(layer)
        and not watched(layer.mlp)
        and not watched(layer.drop_path)
        and (type(layer.mlp), type(layer.drop_path)) == (FeedForward, DropPath)
        and all(_is_plain(module) for module in _affine_modules(layer))
        and layer.residual
        and layer.modulator.fused
        and layer.modulator.selector == "silu"
        and layer.attention.causal
        and layer.attention.v_proj is None
        and layer.mlp.activation == "gelu"
        and layer.in_proj.weight.dtype in (torch.float32, torch.float64)
    )


def pack(encoder: GRELAEncoder) -> ops.PackedEncoder | None:
    """The weights of an encoder; None where its configuration has no fused step."""
    if not can_pack(encoder):
        return None
    first: Any = encoder.layers[0]
    norm = None if encoder.final_norm is None else _pair(encoder.final_norm)
    return ops.pack_encoder(
        [_weights(layer) for layer in encoder.layers],
        first.attention.inv_freq,
        norm,
        first.attention.eps,
        first.norm1.eps,
    )


def _pair(module: Any) -> tuple[Tensor, Tensor]:
    return module.weight, module.bias


def _weights(layer: Any) -> ops.EncoderLayer:
    modulator = layer.modulator
    conv = None
    if modulator.conv_weight is not None and modulator.conv_bias is not None:
        conv = (modulator.conv_weight, modulator.conv_bias)
    return ops.EncoderLayer(
        _pair(layer.norm1),
        None if modulator.gate_proj is None else _pair(modulator.gate_proj),
        _pair(layer.in_proj),
        _pair(layer.attention.qk_proj),
        conv,
        _pair(layer.out_proj),
        _pair(layer.norm2),
        _pair(layer.mlp.fc1),
        _pair(layer.mlp.fc2),
    )
