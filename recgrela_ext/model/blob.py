"""Framing of stored states: magic, version, body, checksum. And tensors as bytes."""

from __future__ import annotations

import struct
import zlib

import torch
from torch import Tensor

from ..errors import StateError

VERSION = 1
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float64)

_FRAME = struct.Struct("<4sB")
_CHECKSUM = struct.Struct("<I")
_HALF_MAX = torch.finfo(torch.float16).max


def seal(magic: bytes, body: bytes) -> bytes:
    """The bytes `unseal` accepts."""
    framed = _FRAME.pack(magic, VERSION) + body
    return framed + _CHECKSUM.pack(zlib.crc32(framed))


def unseal(caller: str, blob: bytes, magics: tuple[bytes, ...], least: int) -> tuple[bytes, bytes]:
    """(magic, body) of a sealed blob; StateError unless it is whole, of this version and kind."""
    if not isinstance(blob, (bytes, bytearray, memoryview)):
        raise TypeError(f"{caller}: blob must be bytes, got {type(blob).__name__}")
    blob = bytes(blob)
    if len(blob) < _FRAME.size + least + _CHECKSUM.size:
        raise StateError(f"{caller}: blob must be whole, got {len(blob)} bytes")
    magic, version = _FRAME.unpack_from(blob)
    if magic not in magics:
        raise StateError(f"{caller}: blob must be one of ours, got bytes of something else")
    if version != VERSION:
        raise StateError(f"{caller}: blob must have version {VERSION}, got {version}")
    framed, checksum = blob[: -_CHECKSUM.size], blob[-_CHECKSUM.size :]
    if zlib.crc32(framed) != _CHECKSUM.unpack(checksum)[0]:
        raise StateError(f"{caller}: blob must be whole, its checksum does not match")
    return magic, framed[_FRAME.size :]


def raw_bytes(x: Tensor) -> bytes:
    """The elements of a CPU tensor as they lie in memory."""
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def raw_tensor(data: bytes, dtype: torch.dtype) -> Tensor:
    """Inverse of `raw_bytes`, flat."""
    if not data:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype)


def packed_size(size: int, dtype: torch.dtype, group: int) -> int:
    """Bytes `pack` writes for `size` elements."""
    scales = 2 * (size // group) if dtype == torch.int8 else 0
    return size * dtype.itemsize + scales


def pack(x: Tensor, dtype: torch.dtype, group: int) -> bytes:
    """x [F] in `dtype`; int8 comes with one float16 scale per `group` neighbours, scales first."""
    if dtype == torch.int8:
        rows = x.view(-1, group)
        scale = (rows.abs().amax(1) / 127).to(torch.float16)
        _must_fit(scale)
        step = scale.to(x.dtype).clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        whole = (rows / step).round().clamp(-127, 127)
        whole = torch.where(scale[:, None] > 0, whole, 0)
        return raw_bytes(scale) + raw_bytes(whole.to(torch.int8))
    rounded = x.to(dtype)
    if dtype == torch.float16:
        _must_fit(rounded)
    return raw_bytes(rounded)


def unpack(data: bytes, dtype: torch.dtype, group: int) -> Tensor:
    """Inverse of `pack`, float32 or float64."""
    if dtype == torch.float64:
        return raw_tensor(data, dtype)
    if dtype != torch.int8:
        return raw_tensor(data, dtype).to(torch.float32)
    count = len(data) // (group + 2)
    scale = raw_tensor(data[: 2 * count], torch.float16).to(torch.float32)
    whole = raw_tensor(data[2 * count :], torch.int8).view(count, group)
    return (whole * scale[:, None]).reshape(-1)


def _must_fit(half: Tensor) -> None:
    if bool(half.isinf().any()):
        raise StateError(
            "UserState.to_bytes: dtype must hold the state's values, float16 ends at "
            f"{_HALF_MAX:g}: use bfloat16 or float32"
        )
