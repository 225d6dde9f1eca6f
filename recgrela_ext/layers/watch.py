"""Things made of a module's weights, and whether one of these was changed since."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from operator import attrgetter
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

_VERSION = attrgetter("_version")
M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


class Derived(Generic[M, T]):
    """What `make` says of a module's weights, made again when one of them changed.

    It is asked at every event: modules and tensors are listed once, and then compared by functions
    that need no bytecode per tensor. Threads may ask at once; a copy starts empty.
    """

    def __init__(self, make: Callable[[M], T]) -> None:
        self._make = make
        self._last: tuple[_Weights, T] | None = None

    def get(self, module: M) -> T:
        last = self._last
        if last is None or not last[0].unchanged():
            weights = _Weights(module)  # before they are read: a write meanwhile is seen next time
            last = self._last = (weights, self._make(module))
        return last[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> Derived[M, T]:
        return Derived(self._make)

    def __reduce__(self) -> tuple[Any, ...]:
        return Derived, (self._make,)


class _Weights:
    """A module's tensors as they were. Everything is listed from one look at each dict, so that
    another thread's change meanwhile is seen next time."""

    def __init__(self, module: nn.Module) -> None:
        self._held: list[dict[Any, Any]] = []
        self._empty: list[dict[Any, Any]] = []
        self._found: list[Any] = []  # kept alive, so that no id comes back
        modules, known = [module], {id(module)}
        for m in modules:  # grows meanwhile
            for kind in (m._parameters, m._buffers, m._modules,
                         m._forward_hooks, m._forward_pre_hooks):  # fmt: skip
                values: list[Any] = list(kind.values())
                (self._held if values else self._empty).append(kind)
                self._found += values
                new = [v for v in values if isinstance(v, nn.Module) and id(v) not in known]
                modules += new
                known.update(map(id, new))
        self._ids = list(map(id, self._found))
        self._tensors = [value for value in self._found if isinstance(value, Tensor)]
        self._memory = [t.detach() for t in self._tensors]  # kept too, so that no place comes back
        self._places, self._versions = self._look()

    def unchanged(self) -> bool:
        ids = list(map(id, chain.from_iterable(map(dict.values, self._held))))
        same = ids == self._ids and not any(self._empty)
        return same and self._look() == (self._places, self._versions)

    def _look(self) -> tuple[list[int], int]:
        places = list(map(Tensor.data_ptr, self._tensors))  # `p.data = x` changes nothing else
        try:  # a version never falls, so their sum tells
            versions = sum(map(_VERSION, self._tensors))
        except RuntimeError:  # an inference tensor is among them, which does not count
            versions = sum(map(_version_of, self._tensors))
        return places, versions


def _version_of(x: Tensor) -> int:
    """How often `x` was written to; 0 for an inference tensor, which does not count."""
    return 0 if x.is_inference() else x._version
