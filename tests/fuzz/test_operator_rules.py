"""A refusal of what is valid is a finding: calls that refuse it are put in the operators' place."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from recgrela_ext import ops
from tests.fuzz import operator_calls as public
from tests.fuzz import raw_calls as raw
from tests.fuzz.draw import Draw

Call = Callable[[Draw], str]
PUBLIC: dict[str, tuple[Any, Call]] = {
    "gated_rela": (ops, public.sequence), "rela": (ops, public.sequence),
    "gated_rela_step": (ops, public.step), "encoder_step": (public, public.encoder),
    "topk_scores": (ops, public.topk), "activation_dropout": (public, public.dropout),
    "feed_forward": (ops, public.feed_forward), "softmax_loss": (ops, public.softmax),
    "recent_items": (ops, public.recent),
}  # fmt: skip
RAW: dict[str, Call] = {
    "gated_rela_forward": raw.sequence, "rela_forward": raw.rela, "gated_rela_step": raw.step,
    "encoder_step": raw.encoder, "topk_scores": raw.topk, "activation_dropout": raw.dropout,
    "feed_forward_forward": raw.feed_forward, "softmax_loss": raw.softmax,
    "gated_rela_backward": raw.sequence_backward,
    "activation_dropout_backward": raw.dropout_backward, "recent_items": raw.recent,
    "feed_forward_backward": raw.feed_forward_backward,
}  # fmt: skip
FOUND = "refused, though valid"


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def draws(count: int) -> Iterator[Draw]:
    rng = random.Random(0)
    torch.manual_seed(0)
    for _ in range(count):
        yield Draw(rng.randbytes(120))


def tried(call: Call, count: int = 100) -> None:
    for draw in draws(count):
        call(draw)


@pytest.mark.parametrize("name", PUBLIC)
def test_refusing_everything_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError(f"{name}: x must be otherwise, got this")

    place, call = PUBLIC[name]
    monkeypatch.setattr(place, name, refuse)
    with pytest.raises(AssertionError, match=FOUND):
        tried(call)


@pytest.mark.kernels
@pytest.mark.parametrize("name", RAW)
def test_refusing_every_raw_call_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = getattr(torch.ops.recgrela, name)

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError(f"{real.__name__}: x must be otherwise, got this")

    monkeypatch.setattr(torch.ops.recgrela, name, refuse)
    with pytest.raises(AssertionError, match=FOUND):
        tried(RAW[name])


@pytest.mark.parametrize(
    "refuses",
    [
        lambda given: given["seen"] is not None,
        lambda given: given["candidates"] is not None,
        lambda given: given["k"] > 3,
        lambda given: any(isinstance(x, Tensor) and x.dim() == 1 and x.stride(0) != 1
                          for x in given.values()),
    ],
    ids=["seen", "candidates", "k", "strides"],
)  # fmt: skip
def test_a_narrow_refusal_is_found(
    refuses: Callable[[dict[str, Any]], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ops.topk_scores

    def some(**given: Any) -> Any:
        found = real(**given)  # refuses what is no argument at all
        if refuses(given):
            raise ValueError("topk_scores: x must be otherwise, got this")
        return found

    monkeypatch.setattr(ops, "topk_scores", some)
    with pytest.raises(AssertionError, match="x must be otherwise"):
        tried(public.topk, 400)
