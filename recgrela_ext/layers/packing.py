"""An encoder's weights packed for `ops.encoder_step`, kept until one of them changes."""

from __future__ import annotations

from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import ops

if TYPE_CHECKING:
    from .encoder import GRELAEncoder


_VERSION = attrgetter("_version")


def can_pack(encoder: GRELAEncoder) -> bool:
    """Whether one operator can do a whole event: the fused model, in float32 or float64."""
    norm = encoder.final_norm
    return (norm is None or _is_plain(norm)) and all(_is_fused(layer) for layer in encoder.layers)


def _is_plain(module: nn.Module) -> bool:
    """Whether weight and bias say all: not so for adapters, quantised layers, or with hooks."""
    plain = type(module) in (nn.Linear, nn.LayerNorm) and module.bias is not None
    return plain and not module._forward_hooks and not module._forward_pre_hooks


def _affine_modules(layer: Any) -> list[nn.Module]:
    modules = (layer.norm1, layer.modulator.gate_proj, layer.in_proj, layer.attention.qk_proj,
               layer.out_proj, layer.norm2, layer.mlp.fc1, layer.mlp.fc2)  # fmt: skip
    return [module for module in modules if module is not None]


def _is_fused(layer: Any) -> bool:
    return (
        all(_is_plain(module) for module in _affine_modules(layer))
        and layer.residual
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


def version_of(x: Tensor) -> int:
    """How often `x` was written to; 0 for an inference tensor, which does not count."""
    return 0 if x.is_inference() else x._version


class PackedCache:
    """The packed weights of one encoder, made again when a parameter or module was changed.

    It is asked at every event: the modules and parameters are listed once, and then compared by
    functions that need no bytecode per parameter.
    """

    def __init__(self) -> None:
        self._modules: list[nn.Module] = []  # kept alive, so that no id comes back
        self._held: list[dict[str, Any]] = []  # parameters and children of all modules
        self._hooks: list[dict[int, Any]] = []
        self._tensors: list[Tensor] = []
        self._key: tuple[Any, ...] | None = None
        self._packed: ops.PackedEncoder | None = None

    def get(self, encoder: GRELAEncoder) -> ops.PackedEncoder | None:
        """None where the encoder's configuration has no fused step."""
        if self._key is None or self._look() != self._key:
            self._list(encoder)
            self._packed = pack(encoder) if can_pack(encoder) else None
            self._key = self._look()
        return self._packed

    def _list(self, encoder: GRELAEncoder) -> None:
        modules = self._modules = list(encoder.modules())
        held = [kind for m in modules for kind in (m._parameters, m._modules)]
        self._held = [kind for kind in held if kind]
        self._hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._tensors = [p for m in modules for p in m._parameters.values() if p is not None]

    def _look(self) -> tuple[Any, ...]:
        """Equal as long as nothing was changed; a version never falls, so their sum tells."""
        places = list(map(Tensor.data_ptr, self._tensors))  # `p.data = x` changes nothing else
        try:
            versions = sum(map(_VERSION, self._tensors))
        except RuntimeError:  # an inference tensor is among them, which does not count
            versions = sum(map(version_of, self._tensors))
        held = list(map(id, chain.from_iterable(map(dict.values, self._held))))
        return places, versions, held, any(self._hooks)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedCache:
        return PackedCache()

    def __reduce__(self) -> tuple[Any, ...]:
        return (PackedCache, ())
