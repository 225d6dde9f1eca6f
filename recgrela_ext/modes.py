"""Evaluation mode for a while; afterwards every module has the mode it had."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn


class _Borrowed:
    """A module in evaluation mode for some calls, and its parts that were training before."""

    def __init__(self, parts: list[nn.Module]) -> None:
        self.parts, self.calls = parts, 0


_borrowed: WeakKeyDictionary[nn.Module, _Borrowed] = WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, in all parts; the modes from before once no thread is inside."""
    if torch.compiler.is_compiling() and not model.training:
        yield  # what a graph may hold is one look at one flag
        return
    with _lock:
        held = _borrowed.get(model)
        if held is None and (parts := training_parts(model)):
            held = _borrowed[model] = _Borrowed(parts)
            for part in parts:
                part.training = False
        if held is not None:
            held.calls += 1
    try:
        yield
    finally:
        if held is not None:
            with _lock:
                held.calls -= 1
                if not held.calls:
                    del _borrowed[model]
                    for part in held.parts:
                        part.training = True


def training_parts(model: nn.Module) -> list[nn.Module]:
    """The modules in training mode. `Module.modules` takes four times as long, and this is asked
    at an event."""
    found, known = [model], {id(model)}
    for part in found:  # grows meanwhile
        for one in part._modules.values():
            if one is not None and id(one) not in known:
                known.add(id(one))
                found.append(one)
    return [part for part in found if part.training]
