"""Framing of stored states: magic, version, body, checksum. And tensors as bytes."""

from __future__ import annotations

import struct
import zlib

import torch
from torch import Tensor

from ..errors import StateError, shown

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


def to_rest(x: Tensor, dtype: torch.dtype, group: int) -> tuple[Tensor, Tensor | None]:
    """x [B, F] in `dtype`, and with int8 one float16 scale per `group` neighbours, [B, F / group].

    StateError when a value does not fit in float16. NaN stays NaN.
    """
    if dtype == torch.int8:
        rows = x.unflatten(-1, (-1, group))
        scale = (rows.abs().amax(-1) / 127).to(torch.float16)
        _must_fit(scale)
        step = scale.to(x.dtype).clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        whole = (rows / step).round().clamp(-127, 127)
        whole = torch.where(scale[..., None] > 0, whole, 0)  # a NaN scale makes NaN of any value
        return whole.to(torch.int8).flatten(-2), scale
    rounded = x.to(dtype)
    if dtype == torch.float16:
        _must_fit(rounded)
    return rounded, None


def from_rest(data: Tensor, scale: Tensor | None, group: int) -> Tensor:
    """Inverse of `to_rest`, float32 or float64."""
    if scale is None:
        return data if data.dtype == torch.float64 else data.to(torch.float32)
    whole = data.unflatten(-1, (-1, group)).to(torch.float32)
    return whole.mul_(scale.to(torch.float32)[..., None]).flatten(-2)


def hidden_dtype(dtype: torch.dtype, in_use: torch.dtype) -> torch.dtype:
    """Of the hidden state beside sums in `dtype`: as in use, with int8 bfloat16."""
    return torch.bfloat16 if dtype == torch.int8 else in_use


def storage_dtype(caller: str, dtype: torch.dtype | str) -> torch.dtype:
    """A format at rest by its name or type; ValueError for another."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(f"{caller}: dtype must be one of {names}, got {shown(dtype)}")
    return found


def pack(x: Tensor, dtype: torch.dtype, group: int) -> bytes:
    """x [F] in `dtype`; int8 comes with its scales first."""
    data, scale = to_rest(x[None], dtype, group)
    return (b"" if scale is None else raw_bytes(scale)) + raw_bytes(data)


def unpack(data: bytes, dtype: torch.dtype, group: int) -> Tensor:
    """Inverse of `pack`, float32 or float64."""
    if dtype != torch.int8:
        return from_rest(raw_tensor(data, dtype), None, group)
    count = len(data) // (group + 2)
    scale = raw_tensor(data[: 2 * count], torch.float16)
    return from_rest(raw_tensor(data[2 * count :], torch.int8), scale, group)


def _must_fit(half: Tensor) -> None:
    if bool(half.isinf().any()):
        raise StateError(
            "UserState.to_bytes: dtype must hold the state's values, float16 ends at "
            f"{_HALF_MAX:g}: use bfloat16 or float32"
        )
