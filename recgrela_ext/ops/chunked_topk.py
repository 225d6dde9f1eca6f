"""topk_scores in plain PyTorch, a chunk of the table at a time, for devices without a kernel.

The k best items of each chunk of columns are merged into the best so far.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .autocast import full_precision

_ELEMENTS = 1 << 22  # scores (or gathered table elements) held at once
_USERS = 512


def top_k(
    hidden: Tensor,
    table: Tensor,
    k: int,
    padding_idx: int,
    scale: Tensor | None,
    seen: Tensor | None,
    candidates: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Scores and items [B, k]; `hidden` in the dtype of the scores, `seen` [B, S] and `candidates`
    ascending, repeated candidates replaced by padding, k at most N."""
    if hidden.shape[0] == 0:
        empty = hidden.new_empty((0, k))
        return empty, empty.to(torch.int64)
    scores, items = [], []
    own_lists = candidates is not None and candidates.dim() == 2
    step = max(1, _ELEMENTS // (256 * table.shape[1])) if own_lists else _USERS
    with full_precision(hidden):
        for start in range(0, hidden.shape[0], step):
            users = slice(start, start + step)
            some = None if seen is None else seen[users]
            ranking = _Ranking(hidden[users], table, k, padding_idx, scale, some)
            own = candidates[users] if own_lists and candidates is not None else candidates
            part = ranking.run(own)
            scores.append(part[0])
            items.append(part[1])
    return torch.cat(scores), torch.cat(items)


class _Ranking:
    """Running top-k of some users."""

    def __init__(
        self,
        hidden: Tensor,
        table: Tensor,
        k: int,
        padding_idx: int,
        scale: Tensor | None,
        seen: Tensor | None,
    ) -> None:
        self.hidden = hidden
        self.table = table
        self.k = k
        self.padding_idx = padding_idx
        self.scale = scale
        self.seen = seen
        self.scores = hidden.new_empty(len(hidden), 0)
        self.items = torch.empty(len(hidden), 0, dtype=torch.int64, device=hidden.device)

    def run(self, candidates: Tensor | None) -> tuple[Tensor, Tensor]:
        users, width = self.hidden.shape
        per_user = candidates is not None and candidates.dim() == 2
        columns = max(1, _ELEMENTS // max(1, users * (width if per_user else 1)))
        if candidates is None:
            for start in range(0, self.table.shape[0], columns):
                self._range(start, min(start + columns, self.table.shape[0]))
        else:
            for part in candidates.split(columns, dim=-1):
                self._listed(part)
        items = self.items.masked_fill(self.scores == -torch.inf, self.padding_idx)
        missing = self.k - items.shape[1]
        if missing > 0:
            size = (users, missing)
            items = torch.cat((items, items.new_full(size, self.padding_idx)), 1)
            self.scores = torch.cat((self.scores, self.scores.new_full(size, -torch.inf)), 1)
        return self.scores, items

    def _rows(self, index: slice | Tensor) -> Tensor:
        rows = self.table[index].to(self.hidden.dtype)
        return rows if self.scale is None else rows * self.scale[index].unsqueeze(-1)

    def _range(self, first: int, end: int) -> None:
        scores = self.hidden @ self._rows(slice(first, end)).t()  # [b, C]
        if first <= self.padding_idx < end:
            scores[:, self.padding_idx - first] = -torch.inf
        if self.seen is not None:
            inside = (self.seen >= first) & (self.seen < end)
            user, place = inside.nonzero(as_tuple=True)
            scores[user, self.seen[user, place] - first] = -torch.inf
        self._merge(scores, torch.arange(first, end, device=scores.device))

    def _listed(self, items: Tensor) -> None:
        """items [C] or [b, C], ascending but for the padding."""
        rows = self._rows(items)
        if items.dim() == 1:
            scores = self.hidden @ rows.t()
        else:
            scores = torch.einsum("bh,bch->bc", self.hidden, rows)
        scores = scores.masked_fill(items == self.padding_idx, -torch.inf)
        if self.seen is not None and items.shape[-1]:
            scores = scores.masked_fill(self._seen_among(self.seen, items), -torch.inf)
        self._merge(scores, items)

    def _seen_among(self, seen: Tensor, items: Tensor) -> Tensor:
        """bool [b, C]: whether the user has seen the item."""
        items = items.expand(len(seen), -1).contiguous()
        if seen.shape[1] == 0:
            return torch.zeros_like(items, dtype=torch.bool)
        place = torch.searchsorted(seen, items).clamp_(max=seen.shape[1] - 1)
        return seen.gather(1, place) == items

    def _merge(self, scores: Tensor, items: Tensor) -> None:
        """Items ascend within and between chunks, so that of equal scores the first is kept."""
        scores = scores.masked_fill(scores.isnan(), -torch.inf)
        columns = _best_columns(scores, self.k)
        chosen = items[columns] if items.dim() == 1 else items.gather(1, columns)
        items = torch.cat((self.items, chosen), 1)
        scores = torch.cat((self.scores, scores.gather(1, columns)), 1)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        self.scores, self.items = scores[:, : self.k], items.gather(1, order)[:, : self.k]


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
