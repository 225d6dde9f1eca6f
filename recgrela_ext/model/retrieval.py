"""Exact top-k over the item table: never the scores of all users for all items at once.

`ItemTable` holds the item vectors in a smaller format; an approximate index is in
`recgrela_ext.integrations.faiss`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..arguments import is_one_of
from ..errors import shown
from ..ops.checks import check_tensor
from . import persistence

if TYPE_CHECKING:
    from .recgrela import RecGRELA

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_FORMATS = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


class Recommendations(NamedTuple):
    """`items` [B, k] int64, best first, and their `scores` [B, k]; (padding_idx, -inf) where a user
    has fewer than k items left."""

    items: Tensor
    scores: Tensor


class ItemTable:
    """A copy of a model's item vectors to rank with, in float32, bfloat16, float16 or int8.

    int8 has one float32 scale per item; scores are float32 in every format, only the vectors are
    rounded. Pass it as `table` to `recommend` and `recommend_from_state`.
    """

    def __init__(self, model: RecGRELA, dtype: torch.dtype | str = torch.int8) -> None:
        persistence.check_model("ItemTable", model)
        found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if not is_one_of(found, _FORMATS):
            raise ValueError(
                "ItemTable: dtype must be one of float32, bfloat16, float16, int8, "
                f"got {shown(dtype)}"
            )
        weight = model.item_embedding.weight.detach()
        self.fingerprint = model.fingerprint()
        self.padding_idx = model.config.padding_idx
        self.scale: Tensor | None = None
        if found == torch.int8:
            self.scale = weight.abs().amax(1).float() / 127
            step = torch.where(self.scale > 0, self.scale, 1.0)[:, None]
            self.vectors = (weight / step).round().clamp(-127, 127).to(torch.int8)
        else:
            self.vectors = weight.to(found, copy=True)

    @property
    def nbytes(self) -> int:
        """Bytes of all vectors and scales."""
        parts = (self.vectors,) if self.scale is None else (self.vectors, self.scale)
        return sum(t.numel() * t.element_size() for t in parts)

    def top_k(
        self,
        hidden: Tensor,
        k: int = 10,
        seen: Tensor | None = None,
        candidates: Tensor | None = None,
    ) -> Recommendations:
        """As `recommend`, for hidden states [B, hidden_size]."""
        return top_k(hidden, self.vectors, k, self.padding_idx, seen, candidates, self.scale)

    def check(self, model: RecGRELA, caller: str) -> None:
        """ValueError unless the table was made from the weights `model` has."""
        if persistence.weights_of(model).fingerprint != self.fingerprint:
            raise ValueError(f"{caller}: table must come from this model, got one of other weights")


def top_k(
    hidden: Tensor,
    table: Tensor,
    k: int,
    padding_idx: int,
    seen: Tensor | None = None,
    candidates: Tensor | None = None,
    scale: Tensor | None = None,
) -> Recommendations:
    """The k items with the largest inner product; see `ops.topk_scores`.

    Args:
        hidden: [B, hidden_size].
        table: [n_items, hidden_size]; int8 with `scale` [n_items].
        k: length of the lists, at least 1.
        padding_idx: a row that is never returned as an item.
        seen: item rows to leave out [B, S], filled up with `padding_idx`.
        candidates: rank these rows alone, [C] for all users or [B, C]; filled up with
            `padding_idx`, repetitions count once.
    """
    _check(hidden, table, k, seen, candidates)
    seen, candidates = (None if x is None else x.contiguous() for x in (seen, candidates))
    with torch.no_grad():
        scores, items = ops.topk_scores(hidden, table, k, padding_idx, scale, seen, candidates)
    return Recommendations(items, scores)


def _check(
    hidden: Tensor, table: Tensor, k: int, seen: Tensor | None, candidates: Tensor | None
) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"recommend: k must be an int of at least 1, got {shown(k)}")
    check_tensor("recommend", "hidden", hidden)
    users = hidden.shape[0] if hidden.dim() else 0
    for name, x in (("seen", seen), ("candidates", candidates)):
        if x is None:
            continue
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        if got not in _INTEGERS:
            raise TypeError(f"recommend: {name} must be integers in a tensor, got {got}")
        check_tensor("recommend", name, x)
    if seen is not None and (seen.dim() != 2 or seen.shape[0] != users):
        raise ValueError(f"recommend: seen must be [{users}, S], got {list(seen.shape)}")
    if candidates is None:
        return
    if candidates.dim() not in (1, 2) or (candidates.dim() == 2 and len(candidates) != users):
        raise ValueError(
            f"recommend: candidates must be [C] or [{users}, C], got {list(candidates.shape)}"
        )
    if candidates.device.type == "cpu" and candidates.numel():
        low, high = (int(x) for x in candidates.aminmax())
        if low < 0 or high >= table.shape[0]:
            raise ValueError(
                f"recommend: candidates must lie in 0..{table.shape[0] - 1}, "
                f"got {low if low < 0 else high}"
            )
