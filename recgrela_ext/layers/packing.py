"""An encoder's weights packed for `ops.encoder_step`, kept until one of them changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import ops

if TYPE_CHECKING:
    from .encoder import GRELAEncoder


def can_pack(encoder: GRELAEncoder) -> bool:
    """Whether one operator can do a whole event: the fused model, in float32 or float64."""
    return all(_is_fused(layer) for layer in encoder.layers)


def _is_fused(layer: Any) -> bool:
    return (
        layer.residual
        and layer.modulator.fused
        and layer.modulator.selector == "silu"
        and layer.attention.causal
        and layer.attention.v_proj is None
        and layer.mlp.activation == "gelu"
        and layer.in_proj.weight.dtype in (torch.float32, torch.float64)
    )


def pack(encoder: GRELAEncoder) -> ops.PackedEncoder:
    """The weights of an encoder for which `can_pack` holds."""
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


class PackedCache:
    """The packed weights of one encoder, made again when a parameter was changed or replaced.

    Asking costs microseconds: the modules are listed once, their parameters looked at each time.
    """

    def __init__(self) -> None:
        self._modules: list[nn.Module] = []
        self._key: tuple[Any, ...] | None = None
        self._packed: ops.PackedEncoder | None = None

    def get(self, encoder: GRELAEncoder) -> ops.PackedEncoder | None:
        """None where the encoder's configuration has no fused step."""
        if not self._modules:
            self._modules = list(encoder.modules())
        key = tuple(
            (id(p), p.data_ptr(), p._version)
            for module in self._modules
            for p in module._parameters.values()
            if p is not None
        )
        if key != self._key:
            self._modules = list(encoder.modules())
            self._packed = pack(encoder) if can_pack(encoder) else None
            self._key = key
        return self._packed

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedCache:
        return PackedCache()

    def __reduce__(self) -> tuple[Any, ...]:
        return (PackedCache, ())
