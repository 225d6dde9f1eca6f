"""Named tensors in the safetensors format, without what safetensors.torch leaves in the process."""

from __future__ import annotations

import contextlib
import inspect
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors import serialize, serialize_file
from safetensors.torch import load_file, save, save_file
from torch import Tensor

# For load_file and safe_open. Through a mapped file, which is the only way before safetensors 0.8,
# each tensor that is loaded keeps 63 bytes in the process for good.
READ_OPTIONS: dict[str, Any] = (
    {"backend": "pread"} if "backend" in inspect.signature(load_file).parameters else {}
)
# safetensors.torch makes a ctypes array of each tensor, and ctypes keeps the type of every size,
# 5.7 KiB. From 0.8 on an address does as well.
_BY_ADDRESS = hasattr(safetensors, "TensorSpec") and sys.byteorder == "little"


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes the file at `path`; tensors of any layout and device."""
    plain, path = _plain(tensors), Path(path)
    path.touch()
    usual = path.stat().st_mode  # safetensors makes a file that its owner alone can read
    if _BY_ADDRESS:
        serialize_file(_addresses(plain), path, metadata=metadata)
    else:
        save_file(plain, path, metadata=metadata)
    with contextlib.suppress(OSError):  # a file system without permissions
        path.chmod(stat.S_IMODE(usual))


def tensors_to_bytes(
    tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> bytes:
    """What `save_tensors` writes."""
    plain = _plain(tensors)
    if _BY_ADDRESS:
        return serialize(_addresses(plain), metadata=metadata)
    return save(plain, metadata=metadata)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _addresses(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The caller keeps `tensors` while these are used."""
    return {
        name: safetensors.TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=list(tensor.shape),
            data_ptr=tensor.data_ptr(),
            data_len=tensor.nbytes,
        )
        for name, tensor in tensors.items()
    }
