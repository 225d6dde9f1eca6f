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
        self._last: tuple[_Weights, _Look, T] | None = None

    def get(self, module: M) -> T:
        last = self._last
        if last is None or last[0].look() != last[1]:
            weights = _Weights(module)
            look = weights.look()  # before they are read: a write meanwhile is seen next time
            last = (weights, look, self._make(module))
            self._last = last
        return last[2]

    def known(self) -> T | None:
        """What was made last, without a look at the weights; None before the first time."""
        return None if self._last is None else self._last[2]

    def __deepcopy__(self, memo: dict[int, Any]) -> Derived[M, T]:
        return Derived(self._make)

    def __reduce__(self) -> tuple[Any, ...]:
        return Derived, (self._make,)


_Look = tuple[list[int], int, list[int], bool]


class _Weights:
    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.modules())  # kept alive, so that no id comes back
        kinds = [k for m in self._modules for k in (m._parameters, m._buffers, m._modules)]
        self._held: list[dict[str, Any]] = [kind for kind in kinds if kind]
        self._hooks = [h for m in self._modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        tensors = (
            t for m in self._modules for k in (m._parameters, m._buffers) for t in k.values()
        )
        self._tensors = [t for t in tensors if t is not None]

    def look(self) -> _Look:
        """Equal as long as nothing was changed; a version never falls, so their sum tells."""
        places = list(map(Tensor.data_ptr, self._tensors))  # `p.data = x` changes nothing else
        try:
            versions = sum(map(_VERSION, self._tensors))
        except RuntimeError:  # an inference tensor is among them, which does not count
            versions = sum(map(_version_of, self._tensors))
        held = list(map(id, chain.from_iterable(map(dict.values, self._held))))
        return places, versions, held, any(self._hooks)


def _version_of(x: Tensor) -> int:
    """How often `x` was written to; 0 for an inference tensor, which does not count."""
    return 0 if x.is_inference() else x._version
