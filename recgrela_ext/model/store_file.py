"""A whole `UserStateStore` as one safetensors file, one tensor at a time in memory.

Per pool the rows as they lie, whose they are and the slots in use, oldest first; the seen items
end to end, of each user the one met last at the end. The metadata hold the sizes, the model's
fingerprint and a checksum per tensor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..arguments import as_path
from ..errors import StateError, check_regular
from ..files import replacing
from ..tensor_files import READ_OPTIONS, save_tensors
from .persistence import check_model, weights_digest
from .pool import Pool
from .state import LAST_POSITION

if TYPE_CHECKING:
    from .recgrela import RecGRELA
    from .store import Evicted, UserStateStore

_KIND, _VERSION = "recgrela_ext user states", 1


def save(store: UserStateStore, path: str | os.PathLike[str]) -> None:
    path = as_path(path, "UserStateStore.save")
    tensors: dict[str, Tensor] = {}
    for number, pool in enumerate(store.pools):
        for name, tensor in _pool_tensors(pool).items():
            tensors[f"{number}.{name}"] = tensor
    users = np.fromiter(store._seen, dtype=np.int64, count=len(store._seen))
    lists = list(store._seen.values())
    tensors["seen.users"] = torch.from_numpy(users)
    tensors["seen.counts"] = torch.tensor([len(ids) for ids in lists], dtype=torch.int64)
    tensors["seen.items"] = torch.from_numpy(np.concatenate([np.empty(0, np.int32), *lists]))
    facts = {
        "version": _VERSION,
        "fingerprint": store.fingerprint.hex(),
        "capacity": store.pools[-1].capacity,
        "active": store.pools[0].capacity,
        "dtype": str(store.pools[-1].dtype).removeprefix("torch."),
        "sha256": {name: weights_digest({name: tensor}) for name, tensor in tensors.items()},
    }
    with replacing(path) as (temporary,):
        try:
            save_tensors(temporary, tensors, metadata={"kind": _KIND, "facts": json.dumps(facts)})
        except SafetensorError as error:  # its only reason here: the disk
            raise OSError(f"UserStateStore.save: {path} must be writable: {error}") from None


def load(
    cls: type[UserStateStore],
    path: str | os.PathLike[str],
    model: RecGRELA,
    on_evict: Callable[[Evicted], None] | None,
    device: torch.device | str | None,
) -> UserStateStore:
    check_model("UserStateStore.load", model)
    path = as_path(path, "UserStateStore.load")
    check_regular(path, StateError, "UserStateStore.load: ")
    try:
        path.open("rb").close()  # safetensors says of every failure that there is no such file
        with safe_open(os.fspath(path), "pt", **READ_OPTIONS) as file:
            facts = _facts(path, file.metadata() or {})
            if facts["fingerprint"] != model.fingerprint().hex():
                raise StateError(
                    f"UserStateStore.load: {path} must come from this model, got one of another "
                    "configuration or other weights"
                )
            try:
                store = cls(
                    model, facts["capacity"], facts["dtype"], facts["active"], on_evict, device
                )
            except (ValueError, TypeError, RuntimeError, MemoryError, OverflowError) as error:
                raise StateError(
                    f"UserStateStore.load: {path} must have sizes that can be made here, got "
                    f"{facts['capacity']} users, {facts['active']} active: "
                    f"{type(error).__name__} {str(error).partition(chr(10))[0]}"
                ) from None
            for number, pool in enumerate(store.pools):
                _fill(pool, _Reader(file, facts, f"{number}.", path))
            if len(np.unique(store.users)) != len(store):
                raise StateError(f"UserStateStore.load: {path} must hold distinct users")
            _fill_seen(store, _Reader(file, facts, "seen.", path))
    except SafetensorError as error:
        raise StateError(
            f"UserStateStore.load: {path} must be a whole safetensors file: {error}"
        ) from None
    except OSError as error:
        raise StateError(
            f"UserStateStore.load: {path} must be readable: {error.strerror or error}"
        ) from None
    return store


def _pool_tensors(pool: Pool) -> dict[str, Tensor]:
    """Views of the rows that were ever used, on the CPU."""
    taken = pool.taken
    names = zip(pool.rows._fields, pool.rows, strict=True)
    tensors = {name: t[:taken].cpu() for name, t in names if t is not None}
    tensors["owner"] = torch.from_numpy(pool.owner[:taken])
    tensors["order"] = torch.from_numpy(pool.recency.order())
    return tensors


def _fill(pool: Pool, read: _Reader) -> None:
    order, owner = read("order", torch.int64).numpy(), read("owner", torch.int64).numpy()
    slots = np.sort(order)
    read.require(len(owner) <= pool.capacity, "owner", "fit its capacity")
    once = len(slots) <= len(owner) and bool(np.all(np.diff(slots) > 0))
    inside = not len(slots) or bool(slots[0] >= 0 and slots[-1] < len(owner))
    read.require(once and inside, "order", "list slots once")
    read.require(len(np.unique(owner[order])) == len(order), "owner", "be distinct users")
    for name, into in zip(pool.rows._fields, pool.rows, strict=True):
        if into is not None:
            rows = read(name, into.dtype, into.dim())
            read.require(rows.shape == into[: len(owner)].shape, name, "have rows of this model")
            into[: len(owner)] = rows
    low, high = (int(x) for x in pool.rows.position.aminmax()) if pool.capacity else (0, 0)
    read.require(low >= 0 and high <= LAST_POSITION, "position", "lie in 0..2^53")
    pool.restore(owner, order)


def _fill_seen(store: UserStateStore, read: _Reader) -> None:
    users, counts = read("users", torch.int64).numpy(), read("counts", torch.int64).numpy()
    items = read("items", torch.int32).numpy()
    bounds = np.concatenate(([0], np.cumsum(counts)))
    fits = len(users) == len(counts) and bool((counts >= 0).all()) and bounds[-1] == len(items)
    read.require(bool(fits), "counts", "be the lengths of the lists of items")
    known = np.isin(users, store.users)
    read.require(bool(known.all()) and len(np.unique(users)) == len(users), "users", "be kept once")
    read.require(not len(items) or bool(items.min() >= 0), "items", "be rows of the item table")
    keys = np.repeat(np.arange(len(counts)) << 31, counts) | items
    keys.sort()
    read.require(not (np.diff(keys) == 0).any(), "items", "be distinct for each user")
    lists = np.split(items, bounds[1:-1]) if len(counts) else []
    store._seen = {user: ids.copy() for user, ids in zip(users.tolist(), lists, strict=True)}


def _facts(path: str | os.PathLike[str], metadata: dict[str, str]) -> dict[str, Any]:
    if metadata.get("kind") != _KIND:
        raise StateError(f"UserStateStore.load: {path} must be a saved store, got something else")
    try:
        facts: dict[str, Any] = json.loads(metadata["facts"])
        version = facts["version"]
        whole = all(name in facts for name in ("fingerprint", "capacity", "active", "dtype"))
        whole = whole and isinstance(facts["sha256"], dict)
    except (ValueError, KeyError, TypeError, RecursionError):
        version, whole = _VERSION, False
    if version == _VERSION and not whole:
        raise StateError(f"UserStateStore.load: {path} must have a whole header")
    if version != _VERSION:
        raise StateError(f"UserStateStore.load: {path} must have version {_VERSION}, got {version}")
    return facts


class _Reader:
    """Tensors of an open file whose names share a prefix, each compared with its checksum."""

    def __init__(
        self, file: Any, facts: dict[str, Any], prefix: str, path: str | os.PathLike[str]
    ) -> None:
        self.file, self.facts, self.prefix, self.path = file, facts, prefix, path

    def require(self, holds: bool, name: str, condition: str) -> None:
        if not holds:
            raise StateError(
                f"UserStateStore.load: {self.prefix}{name} of {self.path} must {condition}"
            )

    def __call__(self, name: str, dtype: torch.dtype, dims: int = 1) -> Tensor:
        name = self.prefix + name
        tensor: Tensor = self.file.get_tensor(name)
        if weights_digest({name: tensor}) != self.facts["sha256"].get(name):
            raise StateError(
                f"UserStateStore.load: {self.path} must be whole, checksum of {name} differs"
            )
        if tensor.dtype != dtype or tensor.dim() != dims:
            raise StateError(
                f"UserStateStore.load: {name} of {self.path} must be {dtype} of {dims} dimensions, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
        return tensor
