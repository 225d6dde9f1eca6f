"""Folders of `torch.distributed.checkpoint`, read without running anything they hold.

torch unpickles a folder's `.metadata`, and everything in it that is no tensor, as it comes: such a
file can run any program. Here both are read with an allow-list. The model's configuration travels
with the weights, as heads and padding do not show in their shapes.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import metadata as meta
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from recgrela_ext import RecGRELAConfig
from recgrela_ext.arguments import is_whole
from recgrela_ext.errors import CheckpointError, shown
from recgrela_ext.integrations.listed_pickle import ListedUnpickler
from recgrela_ext.model.persistence import NOT_IN_FINGERPRINT

_METADATA = (
    "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
    "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
)  # fmt: skip
_ALLOWED = {
    *((meta.__name__, name) for name in _METADATA),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}


_CLASSES: list[Any] = [getattr(sys.modules[module], name) for module, name in sorted(_ALLOWED)]


def _member(kind: Any, name: Any) -> Any:
    """In place of `getattr`, by which Python 3.11.0 to 3.11.3 pickle the members of an enum."""
    if kind is not meta._MEM_FORMAT_ENCODING or name not in kind.__members__:
        raise pickle.UnpicklingError("it takes attributes, which only a memory format has here")
    return kind[name]


class _ListedUnpickler(ListedUnpickler):
    builds = tuple(x for x in _CLASSES if isinstance(x, type) and dataclasses.is_dataclass(x))

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return getattr(sys.modules[module], name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("builtins", "getattr"):
            return _member
        if module in ("pathlib", "pathlib._local") and name in ("PosixPath", "WindowsPath"):
            return pathlib.PurePath
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__(folder)
        with open(Path(folder) / ".metadata", "rb") as file:
            self._found = _ListedUnpickler(file).load()
        if not isinstance(self._found, meta.Metadata):
            raise pickle.UnpicklingError(f"it holds {type(self._found).__name__}, no metadata")

    def read_metadata(self, *args: Any, **kwargs: Any) -> meta.Metadata:
        return self._found


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()  # what comes next unpickles anything
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


def config_of(model: nn.Module, caller: str) -> RecGRELAConfig:
    """The configuration of the RecGRELA in a wrapper; TypeError when there is none."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, RecGRELAConfig):
            return config
    raise TypeError(f"{caller}: model must be or hold a RecGRELA, got {type(model).__name__}")


def write(folder: str | os.PathLike[str], state: dict[str, Any], model: nn.Module) -> None:
    """Every process writes its part of `state` and the configuration of `model`."""
    config = json.dumps(_told(config_of(model, "save_checkpoint")))
    save({**state, "config": config}, checkpoint_id=folder, no_dist=not dist.is_initialized())


def read(folder: str | os.PathLike[str], state: dict[str, Any], model: nn.Module) -> None:
    """Fill `state`, whose keys are all read, from what `write` wrote for such a `model`.

    Nothing is filled before configuration and step are known to be right.

    Raises:
        CheckpointError: a file is missing, torn, or holds another model or optimiser.
    """
    try:
        reader = _Reader(folder)
    except Exception as error:  # a damaged pickle raises nearly anything
        text = f"load_checkpoint: cannot read {Path(folder) / '.metadata'}: {_line(error)}"
        raise CheckpointError(text) from None
    saved: dict[str, Any] = {"config": "", **{name: 0 for name in state if name == "step"}}
    _load(saved, reader, folder)
    try:
        fields = json.loads(saved["config"])
    except (TypeError, ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise CheckpointError(
            f"load_checkpoint: {folder} must hold a configuration in JSON, "
            f"got {shown(saved['config'])}"
        )
    step = saved.get("step", 0)
    if not is_whole(step) or step < 0:
        raise CheckpointError(
            f"load_checkpoint: {folder} must hold a number of steps, got {shown(step)}"
        )
    for name, own in _told(config_of(model, "load_checkpoint")).items():
        if fields.get(name) != own:
            raise CheckpointError(
                f"load_checkpoint: {name} must be {fields.get(name)!r}, as in {folder}, got {own!r}"
            )
    _load(state, reader, folder)


def _load(state: dict[str, Any], reader: _Reader, folder: str | os.PathLike[str]) -> None:
    try:
        load(state, storage_reader=reader, planner=_Planner(), no_dist=not dist.is_initialized())
    except CheckpointException as error:  # no Exception, and pages long
        first = next(iter(error.failures.values()))[0]
        raise CheckpointError(
            f"load_checkpoint: {folder} must hold this model and optimizer whole, "
            f"got {_line(first)}"
        ) from None


def _told(config: RecGRELAConfig) -> dict[str, Any]:
    """Fields that change what the weights compute."""
    left_out = (*NOT_IN_FINGERPRINT, "max_seq_len")
    return {name: value for name, value in config.to_dict().items() if name not in left_out}


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
