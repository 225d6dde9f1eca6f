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
_ELEMENTS = 1 << 22  # of seen items' vectors, gathered at once


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
        self._must_know = model.config.repeat_bias
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
        """As `ops.topk_scores`, for hidden states [B, hidden_size]. With a repeat bias lists are
        those of `recommend_from_hidden(table=...)`, or without what was seen."""
        if seen is None and self._must_know:
            raise ValueError("ItemTable.top_k: seen must be given for a model with a repeat bias")
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
    check_lists(hidden, table, k, seen, candidates)
    seen, candidates = (None if x is None else x.contiguous() for x in (seen, candidates))
    with torch.no_grad():
        scores, items = ops.topk_scores(hidden, table, k, padding_idx, scale, seen, candidates)
    return Recommendations(items, scores)


def top_k_biased(
    hidden: Tensor,
    table: Tensor,
    k: int,
    padding_idx: int,
    recent: Tensor,
    bias: Tensor,
    candidates: Tensor | None = None,
    scale: Tensor | None = None,
) -> Recommendations:
    """`top_k` with `bias` [S] added to the scores of the items `recent` [B, S] int64.

    The unseen are ranked as ever; the seen, few beside the catalogue, are scored one by one.
    """
    unseen = top_k(hidden, table, k, padding_idx, recent, candidates, scale)
    if not recent.numel():
        return unseen
    dtype = unseen.scores.dtype
    step = max(1, _ELEMENTS // (recent.shape[1] * table.shape[1]))
    parts = []
    with torch.no_grad():
        for users, rows in zip(hidden.to(dtype).split(step), recent.split(step), strict=True):
            vectors = table[rows].to(dtype)
            if scale is not None:
                vectors = vectors * scale[rows].unsqueeze(-1)
            parts.append((vectors * users[:, None]).sum(-1) + bias.to(dtype))
        scores = torch.cat(parts)
        barred = (recent == padding_idx) | scores.isnan()
        if candidates is not None:
            barred |= ~_among(candidates.to(torch.int64), recent)
        # Of equal scores the smaller row comes first.
        items, order = torch.cat((unseen.items, recent), 1).sort(dim=1, stable=True)
        scores = torch.cat((unseen.scores, scores.masked_fill(barred, -torch.inf)), 1)
        scores, best = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
        scores, items = scores[:, :k], items.gather(1, best)[:, :k]
    return Recommendations(items.masked_fill(scores == -torch.inf, padding_idx), scores)


def _among(candidates: Tensor, items: Tensor) -> Tensor:
    """bool [B, S]: which of items [B, S] are in candidates [C] or [B, C]."""
    if not candidates.numel():
        return torch.zeros_like(items, dtype=torch.bool)
    listed = candidates.sort(-1).values.contiguous()
    place = torch.searchsorted(listed, items.contiguous()).clamp_(max=listed.shape[-1] - 1)
    return (listed[place] if listed.dim() == 1 else listed.gather(1, place)) == items


def check_lists(
    hidden: Tensor, table: Tensor, k: int, seen: Tensor | None, candidates: Tensor | None
) -> None:
    """ValueError or TypeError for what `top_k` could not rank."""
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
