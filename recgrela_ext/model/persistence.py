"""Saved models: config.json, model.safetensors and id_map.json in a folder; never a pickle."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from .. import ops
from ..arguments import as_path, usable_device
from ..errors import CheckpointError, DataError, check_regular, shown
from ..files import write_files
from ..layers.packing import pack
from ..tensor_files import tensors_to_bytes
from .config import CONFIG_FILE, DIGESTS, WEIGHTS_FILE, RecGRELAConfig

if TYPE_CHECKING:
    from .recgrela import RecGRELA

ID_MAP_FILE = "id_map.json"

_PUBLISHED_TOP = {
    "item_embedding.weight": "item_embedding.weight",
    "LayerNorm.weight": "input_norm.weight",
    "LayerNorm.bias": "input_norm.bias",
}
_PUBLISHED_BLOCK = {
    "LayerNorm1": "norm1",
    "LayerNorm2": "norm2",
    "act_proj": "modulator.gate_proj",
    "in_proj": "in_proj",
    "out_proj": "out_proj",
    "attn.qk": "attention.qk_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_BLOCK_NAME = re.compile(r"GRELA_block\.(\d{1,18})\.(.+)\.(weight|bias|rotations)")


NOT_IN_FINGERPRINT = ("dropout", "drop_path", "initializer_range", "repeat_share", "id_map_file")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # a model runs in


class Weights:
    """What is made of a model's weights; `weights_of` makes it again when one of them changed."""

    def __init__(self, model: RecGRELA) -> None:
        tensors = dict(_tensors_of(model.state_dict(keep_vars=True)))
        fields = model.config.to_dict()
        for name in NOT_IN_FINGERPRINT:
            fields.pop(name)
        text = json.dumps(fields, sort_keys=True) + weights_digest(tensors)
        self.fingerprint = hashlib.sha256(text.encode()).digest()[:16]
        self._packed: tuple[ops.PackedEncoder | None] | None = None

    def packed(self, model: RecGRELA) -> ops.PackedEncoder | None:
        """For `ops.encoder_step`; None where the encoder has no fused step."""
        if self._packed is None:
            self._packed = (pack(model.encoder),)
        return self._packed[0]


def _tensors_of(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state dict; a quantised layer has pairs of them, whose weight is packed."""
    for name, value in state.items():
        if isinstance(value, Tensor):
            yield name, value.dequantize() if value.is_quantized else value
        elif isinstance(value, (tuple, list)):
            yield from _tensors_of({f"{name}.{i}": part for i, part in enumerate(value)})


def check_model(caller: str, model: Any) -> None:
    """TypeError for what has no weights to make states or tables from."""
    if not isinstance(model, nn.Module) or not hasattr(model, "fingerprint"):
        raise TypeError(f"{caller}: model must be a RecGRELA, got {shown(model)}")


def weights_of(model: RecGRELA) -> Weights:
    """Cheap enough for every event. A write through `.data` goes unnoticed, as autograd does not
    count it."""
    return model._weights.get(model)


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if tensor.numel():  # without elements strides may be anything
            digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_pretrained(model: RecGRELA, folder: str | os.PathLike[str]) -> None:
    folder = as_path(folder, "RecGRELA.save_pretrained", "folder")
    weights = _plain_weights(model)
    folder.mkdir(parents=True, exist_ok=True)
    name = None if model.id_map is None else (model.config.id_map_file or ID_MAP_FILE)
    config = model.config.replace(id_map_file=name)
    fields = {**config.to_dict(), "weights_sha256": weights_digest(weights)}
    files: dict[str, bytes] = {}  # the configuration, with the sums of the others, comes last
    if model.id_map is not None and name is not None:
        files[name] = _id_map_bytes(model)
        fields["id_map_sha256"] = hashlib.sha256(files[name]).hexdigest()
    files[WEIGHTS_FILE] = tensors_to_bytes(weights, metadata={"format": "pt"})
    files[CONFIG_FILE] = (json.dumps(fields, indent=2) + "\n").encode()
    write_files({folder / name: content for name, content in files.items()})


def _plain_weights(model: RecGRELA) -> dict[str, Tensor]:
    """What could not be loaded again is refused before anything is written, here and below."""
    caller = "RecGRELA.save_pretrained"
    state: dict[str, Any] = model.state_dict()
    other = next((name for name, value in state.items() if not isinstance(value, Tensor)), None)
    if other is not None:
        raise TypeError(f"{caller}: {other} must be a tensor, got {shown(state[other])}")
    weights = {name: t.detach().cpu().contiguous() for name, t in state.items()}
    try:
        _empty_model(type(model), model.config, weights, f"{caller}: model")
        _check_finite(weights, f"{caller}: model")
    except CheckpointError as error:
        raise ValueError(str(error)) from None
    return weights


def _id_map_bytes(model: RecGRELA) -> bytes:
    from ..data import IdMap

    caller, id_map = "RecGRELA.save_pretrained", model.id_map
    if not isinstance(id_map, IdMap):
        raise TypeError(f"{caller}: id_map must be an IdMap, got {shown(id_map)}")
    if id_map.n_items != model.config.rows:
        raise ValueError(
            f"{caller}: id_map must name the model's {model.config.num_items} items, "
            f"got {id_map.num_items}"
        )
    try:
        content = id_map.to_json().encode()
        IdMap.from_json(content, f"{caller}: id_map")
    except UnicodeEncodeError:
        raise DataError(f"{caller}: id_map must hold UTF-8 text, got lone surrogates") from None
    return content


def from_pretrained(
    cls: type[RecGRELA],
    folder: str | os.PathLike[str],
    device: torch.device | str | None = None,
) -> RecGRELA:
    caller = "RecGRELA.from_pretrained"
    folder = as_path(folder, caller, "folder")
    place = None if device is None else usable_device(device, caller)
    try:
        fields = json.loads(_read(folder / CONFIG_FILE).decode())  # bytes might be UTF-16
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder / CONFIG_FILE} must be JSON: {error}") from None
    digests = [fields.pop(name, None) if isinstance(fields, dict) else None for name in DIGESTS]
    try:
        config = RecGRELAConfig.from_dict(fields)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: {error}") from None
    path = folder / WEIGHTS_FILE
    try:
        weights = load(_read(path))
    except SafetensorError as error:
        raise CheckpointError(f"{path} must be a whole safetensors file: {error}") from None
    if digests[0] is not None and digests[0] != weights_digest(weights):
        raise CheckpointError(f"{path} must be the weights {CONFIG_FILE} was saved with")
    model = _filled(cls, config, weights, str(path))
    _check_finite(weights, str(path))
    if config.id_map_file is not None:
        from ..data import IdMap

        path = folder / config.id_map_file
        content = _read(path)
        try:
            model.id_map = IdMap.from_json(content, str(path))
        except DataError as error:
            raise CheckpointError(str(error)) from None
        if digests[1] is not None and digests[1] != hashlib.sha256(content).hexdigest():
            raise CheckpointError(f"{path} must be the id map {CONFIG_FILE} was saved with")
        if model.id_map.n_items != config.rows:
            raise CheckpointError(
                f"{path} must name the model's {config.rows - 1} items, "
                f"got {model.id_map.num_items}"
            )
    return model if place is None else model.to(place)


def from_reference(
    cls: type[RecGRELA], state_dict: Mapping[str, Any], num_heads: int = 4
) -> RecGRELA:
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"from_reference: state_dict must be a dict of tensors, got {type(state_dict).__name__}"
        )
    inner = state_dict.get("state_dict")
    tensors: Mapping[str, Tensor] = inner if isinstance(inner, Mapping) else state_dict
    weights: dict[str, Tensor] = {}
    max_seq_len, layers = RecGRELAConfig.max_seq_len, 0
    for name, tensor in tensors.items():
        name = str(name).removeprefix("module.")
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"from_reference: {name} must be a tensor, got {type(tensor).__name__}"
            )
        if name in _PUBLISHED_TOP:
            weights[_PUBLISHED_TOP[name]] = tensor
            continue
        found = _BLOCK_NAME.fullmatch(name)
        if found is None:
            raise CheckpointError(f"from_reference: {name} must be a published name, got another")
        layer, part, kind = int(found[1]), found[2], found[3]
        layers = max(layers, layer + 1)
        prefix = f"encoder.layers.{layer}."
        if kind == "rotations":
            if tensor.dim() == 0:
                raise CheckpointError(f"from_reference: {name} must have a row per place, got none")
            max_seq_len = tensor.shape[0]  # of this buffer only its length is not known already
        elif part == "attn.conv1d":
            taps = tensor.flatten(1) if kind == "weight" and tensor.dim() > 1 else tensor
            weights[f"{prefix}modulator.conv_{kind}"] = taps
        elif part in _PUBLISHED_BLOCK:
            weights[f"{prefix}{_PUBLISHED_BLOCK[part]}.{kind}"] = tensor
        else:
            raise CheckpointError(f"from_reference: {name} must be a published name, got another")
    needed = ("item_embedding.weight", "encoder.layers.0.modulator.conv_weight")
    for name in needed:
        if name not in weights:
            raise CheckpointError(f"from_reference: state_dict must hold {name}, got none")
    table, taps = (weights[name] for name in needed)
    if table.dim() != 2 or taps.dim() != 2:
        raise CheckpointError(
            "from_reference: item_embedding.weight must be [n_items, hidden_size] and "
            f"conv1d.weight [hidden_size, 1, W], got {list(table.shape)} and {list(taps.shape)}"
        )
    try:
        config = RecGRELAConfig.paper(
            n_items=table.shape[0],
            hidden_size=table.shape[1],
            num_layers=layers,
            num_heads=num_heads,
            conv_width=taps.shape[1],
            max_seq_len=max_seq_len,
        )
    except ValueError as error:
        raise CheckpointError(f"from_reference: state_dict must fit a model: {error}") from None
    return _filled(cls, config, weights, "from_reference: state_dict")


def _filled(
    cls: type[RecGRELA], config: RecGRELAConfig, weights: Mapping[str, Tensor], source: str
) -> RecGRELA:
    """A model with these weights in their own dtype, in evaluation mode."""
    model = _empty_model(cls, config, weights, source)
    device = weights["item_embedding.weight"].device
    model = model.to_empty(device=device).to(weights["item_embedding.weight"].dtype)
    model.load_state_dict(dict(weights))
    return model.eval()


def _check_finite(weights: Mapping[str, Tensor], source: str) -> None:
    wild = next((name for name, t in weights.items() if not t.isfinite().all()), None)
    if wild is not None:
        raise CheckpointError(f"{source} must hold finite weights, got NaN or inf in {wild}")


def _empty_model(
    cls: type[RecGRELA], config: RecGRELAConfig, weights: Mapping[str, Tensor], source: str
) -> RecGRELA:
    """On no device; CheckpointError where it is not what these weights are of."""
    table = weights.get("item_embedding.weight")
    sizes = [config.rows, config.hidden_size]
    # Before a model of absurd sizes is made.
    if table is not None and list(table.shape) != sizes:
        raise CheckpointError(
            f"{source}: item_embedding.weight must be {sizes}, got {list(table.shape)}"
        )
    if config.num_layers > len(weights):
        raise CheckpointError(
            f"{source} must hold this configuration's weights, but has {len(weights)} tensors for "
            f"{config.num_layers} layers"
        )
    with torch.device("meta"):
        model = cls(config)
    wanted = {name: t.shape for name, t in model.state_dict().items()}
    missing, unknown = sorted(set(wanted) - set(weights)), sorted(set(weights) - set(wanted))
    if missing or unknown:
        told = f"lacks {missing[0]}" if missing else f"has {unknown[0]}"
        raise CheckpointError(f"{source} must hold this configuration's weights, but {told}")
    for name, shape in wanted.items():
        if weights[name].shape != shape:
            raise CheckpointError(
                f"{source}: {name} must be {list(shape)}, got {list(weights[name].shape)}"
            )
        if weights[name].dtype not in _DTYPES:
            raise CheckpointError(
                f"{source}: {name} must have a dtype out of "
                f"{', '.join(str(d).removeprefix('torch.') for d in _DTYPES)}, "
                f"got {weights[name].dtype}"
            )
        if weights[name].dtype != weights["item_embedding.weight"].dtype:
            raise CheckpointError(
                f"{source}: {name} must have the dtype of item_embedding.weight, "
                f"{weights['item_embedding.weight'].dtype}, got {weights[name].dtype}"
            )
    return model


def _read(path: Path) -> bytes:
    check_regular(path, CheckpointError)
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} must be readable: {error.strerror}") from None
