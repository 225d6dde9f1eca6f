"""Exact top-k over the item table in chunks: never the scores of all users for all items at once.

The k best items of each chunk of columns are merged into the best so far. Ties go to the smaller
item row, so that a list depends on the scores alone. Scores are float32 at least.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_ELEMENTS = 1 << 22  # scores (or gathered table elements) held at once


class Recommendations(NamedTuple):
    """`items` [B, k] int64, best first, and their `scores` [B, k]; (padding_idx, -inf) where a user
    has fewer than k items left."""

    items: Tensor
    scores: Tensor


def top_k(
    hidden: Tensor,
    table: Tensor,
    k: int,
    padding_idx: int,
    seen: Tensor | None = None,
    candidates: Tensor | None = None,
) -> Recommendations:
    """The k items with the largest inner product.

    Args:
        hidden: [B, hidden_size].
        table: [n_items, hidden_size].
        k: length of the lists, at least 1.
        padding_idx: a row that is never returned as an item.
        seen: item rows to leave out [B, S], filled up with `padding_idx`.
        candidates: rank these rows alone, [C] for all users or [B, C]; filled up with
            `padding_idx`, repetitions count once.
    """
    _check(hidden, table, k, seen, candidates)
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, table.dtype), torch.float32)
    items, scores = [], []
    with torch.autocast(hidden.device.type, enabled=False):
        step = _users_at_once(hidden.shape[0], table, candidates)
        for start in range(0, hidden.shape[0], step):
            users = slice(start, start + step)
            own = candidates if candidates is None or candidates.dim() == 1 else candidates[users]
            part = _Ranking(
                hidden[users].to(dtype),
                table,
                min(k, table.shape[0]),
                padding_idx,
                None if seen is None else seen[users],
            ).run(own)
            items.append(part.items)
            scores.append(part.scores)
    if not items:
        empty = hidden.new_empty((0, k), dtype=dtype)
        return Recommendations(empty.to(torch.int64), empty)
    return Recommendations(
        _widen(torch.cat(items), k, padding_idx), _widen(torch.cat(scores), k, -torch.inf)
    )


class _Ranking:
    """Running top-k of some users."""

    def __init__(
        self, hidden: Tensor, table: Tensor, k: int, padding_idx: int, seen: Tensor | None
    ) -> None:
        self.hidden = hidden
        self.table = table
        self.k = k
        self.padding_idx = padding_idx
        self.seen = seen
        self.best = Recommendations(
            torch.empty(len(hidden), 0, dtype=torch.int64, device=hidden.device),
            hidden.new_empty(len(hidden), 0),
        )

    def run(self, candidates: Tensor | None) -> Recommendations:
        users, width = self.hidden.shape
        per_user = candidates is not None and candidates.dim() == 2
        columns = max(1, _ELEMENTS // max(1, users * (width if per_user else 1)))
        if candidates is None:
            for start in range(0, self.table.shape[0], columns):
                self._range(start, min(start + columns, self.table.shape[0]))
        else:
            listed = candidates.to(torch.int64).sort(-1).values
            repeated = listed[..., 1:] == listed[..., :-1]
            listed[..., 1:] = listed[..., 1:].masked_fill(repeated, self.padding_idx)
            for part in listed.split(columns, dim=-1):
                self._listed(part)
        items, scores = self.best
        gone = scores == -torch.inf
        items = _widen(items.masked_fill(gone, self.padding_idx), self.k, self.padding_idx)
        return Recommendations(items, _widen(scores, self.k, -torch.inf))

    def _range(self, first: int, end: int) -> None:
        rows = self.table[first:end].to(self.hidden.dtype)
        scores = self.hidden @ rows.t()  # [b, C]
        if first <= self.padding_idx < end:
            scores[:, self.padding_idx - first] = -torch.inf
        if self.seen is not None:
            inside = (self.seen >= first) & (self.seen < end)
            user, place = inside.nonzero(as_tuple=True)
            scores[user, self.seen[user, place] - first] = -torch.inf
        self._merge(scores, torch.arange(first, end, device=scores.device))

    def _listed(self, items: Tensor) -> None:
        """items [C] or [b, C], ascending but for the padding."""
        rows = self.table[items].to(self.hidden.dtype)
        if items.dim() == 1:
            scores = self.hidden @ rows.t()
        else:
            scores = torch.einsum("bh,bch->bc", self.hidden, rows)
        scores = scores.masked_fill(items == self.padding_idx, -torch.inf)
        if self.seen is not None and items.shape[-1]:
            scores = scores.masked_fill(self._seen_among(items), -torch.inf)
        self._merge(scores, items)

    def _seen_among(self, items: Tensor) -> Tensor:
        """bool [b, C]: whether the user has seen the item."""
        assert self.seen is not None
        seen = self.seen.sort(-1).values
        items = items.expand(len(seen), -1).contiguous()
        if seen.shape[1] == 0:
            return torch.zeros_like(items, dtype=torch.bool)
        place = torch.searchsorted(seen, items).clamp_(max=seen.shape[1] - 1)
        return seen.gather(1, place) == items

    def _merge(self, scores: Tensor, items: Tensor) -> None:
        """Items ascend within and between chunks, so that of equal scores the first is kept."""
        columns = _best_columns(scores, self.k)
        chosen = items[columns] if items.dim() == 1 else items.gather(1, columns)
        items = torch.cat((self.best.items, chosen), 1)
        scores = torch.cat((self.best.scores, scores.gather(1, columns)), 1)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        self.best = Recommendations(items.gather(1, order)[:, : self.k], scores[:, : self.k])


def _best_columns(scores: Tensor, k: int) -> Tensor:
    """Columns of the k largest scores per row, ascending; among equal scores the first columns."""
    if scores.shape[1] <= k:
        return torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
    top = scores.topk(k, sorted=False)
    least = top.values.amin(1, keepdim=True)
    columns = top.indices
    # topk may return any of the items that tie for the last place
    tied = ((scores >= least).sum(1) != k) & (least.squeeze(1) != -torch.inf)
    rows = tied.nonzero().squeeze(1)
    if rows.numel():
        order = scores[rows].sort(dim=1, descending=True, stable=True).indices
        columns = columns.index_copy(0, rows, order[:, :k])
    return columns.sort(1).values


def _users_at_once(users: int, table: Tensor, candidates: Tensor | None) -> int:
    if candidates is not None and candidates.dim() == 2:
        return max(1, min(users, _ELEMENTS // (256 * table.shape[1])))
    return max(1, min(users, 512))


def _widen(x: Tensor, k: int, fill: float) -> Tensor:
    missing = k - x.shape[1]
    return x if missing <= 0 else torch.cat((x, x.new_full((len(x), missing), fill)), 1)


def _check(
    hidden: Tensor, table: Tensor, k: int, seen: Tensor | None, candidates: Tensor | None
) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"recommend: k must be an int of at least 1, got {k!r}")
    users = hidden.shape[0]
    for name, x in (("seen", seen), ("candidates", candidates)):
        if x is None:
            continue
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        if got not in _INTEGERS:
            raise TypeError(f"recommend: {name} must be integers in a tensor, got {got}")
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
