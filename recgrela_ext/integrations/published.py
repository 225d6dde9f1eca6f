"""Weights out of a RecBole checkpoint of the published implementation; no RecBole needed.

    model = RecGRELA.from_reference(published_state_dict("RecGRELA.pth"), num_heads=4)

RecBole pickles its configuration object beside the weights, which `torch.load(weights_only=True)`
refuses; with weights_only=False it would run whatever the file asks for, TorchScript included. So
the file is read here, with an allow-list: tensors and plain containers are built, all else it names
becomes an empty object, and nothing it names is imported or called.
"""

from __future__ import annotations

import collections
import io
import math
import os
import struct
import zipfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recgrela_ext.errors import CheckpointError
from recgrela_ext.integrations.listed_pickle import ListedUnpickler

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


_SCALARS = {"f8": "d", "f4": "f", "i8": "q", "i4": "i", "b1": "?"}


class _Inert:
    """Takes the place of everything that is not on the list; keeps and runs nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass


def _tensor(
    storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any
) -> Tensor:
    if math.prod(size) > storage.numel():  # a stride of 0 would make terabytes of four bytes
        raise ValueError(f"a tensor of shape {list(size)} is larger than its storage")
    return storage.as_strided(size, stride, offset)  # raises beyond the storage's end


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data


class _ScalarType(_Inert):
    """In place of a numpy dtype, of which its name is all that is kept."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code = code


def _scalar(kind: _ScalarType, data: bytes) -> Any:
    """A numpy number, which metrics are, as Python's."""
    return struct.unpack("<" + _SCALARS[kind.code], data)[0]


def _bytes(text: str, *_: Any) -> bytes:
    """How pickles before protocol 3, which `torch.save` makes unless told, write bytes."""
    return text.encode("latin-1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("_codecs", "encode"): _bytes,
    ("numpy", "dtype"): _ScalarType,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


class _ListedUnpickler(ListedUnpickler):
    """Reads `<root>/data.pkl` of an archive; the bytes of storage n lie in `<root>/data/n`."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise ValueError("it is no checkpoint of torch.save")
        super().__init__(io.BytesIO(archive.read(names[0])), encoding="utf-8")
        self._archive = archive
        self._root = names[0].removesuffix("data.pkl")

    builds = (_Inert, _ScalarType, collections.OrderedDict)

    def find_class(self, module: str, name: str) -> Any:
        return _ALLOWED.get((module, name), _Inert)

    def persistent_load(self, saved: Any) -> Tensor:
        _, dtype, key, *_ = saved  # "storage", type, key, device, numel
        data = self._archive.read(f"{self._root}data/{key}")
        return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0).to(dtype)


def read_checkpoint(
    path: str | os.PathLike[str], caller: str = "read_checkpoint"
) -> dict[str, Any]:
    """Everything plain in a checkpoint of `torch.save`: tensors on the CPU, numbers, text,
    containers. Objects, RecBole's configuration among them, come back as empty ones.

    Raises:
        CheckpointError: the file is missing, torn, holds no dict, or is no zip archive (older than
            torch 1.6).
    """
    try:
        with zipfile.ZipFile(path) as archive:
            content = _ListedUnpickler(archive).load()
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{caller}: cannot read {path}: {reason}") from None
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{caller}: {path} must hold a state dict, got {type(content).__name__}"
        )
    return content


def published_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Weights of a RecBole checkpoint (``.pth``) or of a plain state dict, on the CPU.

    Raises:
        CheckpointError: as `read_checkpoint`, or the file holds no state dict.
    """
    content = read_checkpoint(path, "published_state_dict")
    weights = content.get("state_dict", content)
    if (
        not isinstance(weights, dict)
        or not weights
        or not all(isinstance(value, Tensor) for value in weights.values())
    ):
        raise CheckpointError(f"published_state_dict: {path} must hold a state dict of tensors")
    return dict(weights)
