"""Weights out of a RecBole checkpoint of the published implementation; no RecBole needed.

    model = RecGRELA.from_reference(published_state_dict("RecGRELA.pth"), num_heads=4)

RecBole pickles its configuration object beside the weights, with a pickle protocol that
``torch.load(weights_only=True)`` does not read. Here such a file is read with an allow-list of the
same spirit: tensors and plain containers are built, whatever else it names becomes an empty object,
and nothing it names is imported or called.
"""

from __future__ import annotations

import os
import pickle
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from recgrela_ext.errors import CheckpointError

_ALLOWED = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
}


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


class _ListedUnpickler(pickle.Unpickler):
    """torch.load derives from this class and adds the storages of tensors."""

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(module, name) if (module, name) in _ALLOWED else _Inert


_LISTED = SimpleNamespace(
    __name__="pickle",
    Unpickler=_ListedUnpickler,
    UnpicklingError=pickle.UnpicklingError,
    load=lambda file, **options: _ListedUnpickler(file, **options).load(),
)


def published_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Weights of a RecBole checkpoint (``.pth``) or of a plain state dict, on the CPU.

    Raises:
        CheckpointError: the file is missing, torn, or holds no state dict.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_LISTED)
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"published_state_dict: cannot read {path}: {reason}") from None
    weights = content.get("state_dict", content) if isinstance(content, dict) else None
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"published_state_dict: {path} must hold a state dict of tensors")
    return dict(weights)
