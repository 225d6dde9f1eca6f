"""Things made of a module's weights, and whether one of these was changed since."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, repeat
from operator import attrgetter
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_VERSION = attrgetter("_version")
M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


class Derived(Generic[M, T]):
    """What `make` says of a module's weights, made again when one of them changed.

    It is asked at every event: modules and tensors are listed once, and then compared by functions
    that need no bytecode per tensor. Threads may ask at once; a copy starts empty.

    What torch counts, `Tensor._version`, is enough but for three cases: its fused optimizers write
    without counting, so every optimizer's step counts here; an inference tensor has no count, so
    that `forget` is called after `load_state_dict`, and other writes to one go unnoticed, as those
    through `.data` do.
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

    def forget(self) -> None:
        """Makes it again when next asked."""
        self._last = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Derived[M, T]:
        return Derived(self._make)

    def __reduce__(self) -> tuple[Any, ...]:
        return Derived, (self._make,)


def watched(module: nn.Module) -> bool:
    """Whether something looks on at its calls, or was put in their place."""
    return bool(
        _has_another_forward(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _has_another_forward(module: nn.Module) -> bool:
    """Not where its own was compiled, as `integrations.distributed.compile_blocks` does."""
    forward = vars(module).get("forward")
    while (inner := getattr(forward, "_torchdynamo_orig_callable", None)) is not None:
        forward = inner
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


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
        self._attributes: list[dict[str, Any]] = list(map(vars, modules))
        self._replaced = self._forwards()
        self._ids = list(map(id, self._found))
        self._tensors = [value for value in self._found if isinstance(value, Tensor)]
        self._memory = [t.detach() for t in self._tensors]  # kept too, so that no place comes back
        self._places, self._versions = self._look()

    def unchanged(self) -> bool:
        ids = list(map(id, chain.from_iterable(map(dict.values, self._held))))
        same = ids == self._ids and not any(self._empty)
        same = same and self._forwards() == self._replaced
        return same and self._look() == (self._places, self._versions)

    def _forwards(self) -> list[bool]:
        """Which modules have a `forward` put in place of their own."""
        return list(map(dict.__contains__, self._attributes, repeat("forward")))

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


def _count_step(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    torch.autograd.graph.increment_version([p for p in weights if _counts(p)])


def _counts(x: Tensor) -> bool:
    """Not so for an inference tensor, nor for one that is no tensor by itself, as ShardedTensor."""
    try:
        return not x.is_inference()
    except RuntimeError:
        return False


register_optimizer_step_post_hook(_count_step)
