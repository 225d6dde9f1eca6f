"""A learned bias for what a user has met before, by how recently: nine numbers for the whole model.

    score(j) = h . e_j + 10 b[bucket(r)]    for every item j of the history,
    r = 1 for the item met last, 2 for the one before it, ...: distinct items, by their last time
    buckets: r = 1, 2, 3-4, 5-8, ..., 65-128, and all beyond

Inner products cannot say sharply which items the user has just met, as a state is a sum over all of
them. Where items do not repeat these numbers learn within an epoch to keep seen items out; where
they do, which of them come back. Not in the paper. Not added: where seen items are left out anyway.

Training goes by what is in a window, ranking by the whole history. A bucket that no window reached
is still 0 exactly, and is ranked with the number of the one before it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import LogitBias, RecencyBias, recent_items
from ..ops.recency_bias import buckets

_UP_TO = (1, 2, 4, 8, 16, 32, 64, 128)  # the last bucket has no end
_SCALE = 10.0  # Adam moves a weight by about the rate a step; a bias must get to -10 in an epoch


class RepeatBias(nn.Module):
    """The bias of an item by its recency among the distinct items of a history."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(len(_UP_TO) + 1))

    def forward(self, recency: Tensor) -> Tensor:
        """What training adds to a score, in the weight's dtype; recency [...] int64 from 1."""
        return (_SCALE * self.weight)[buckets(recency, _UP_TO)]

    def ranked(self, recency: Tensor) -> Tensor:
        """What ranking adds to a score, as `forward` but for buckets that were never trained."""
        return self.ranked_values()[buckets(recency, _UP_TO)]

    def of_spans(self, items: Tensor, begin: Tensor, end: Tensor) -> RecencyBias:
        """For row r, what training adds for the items in `items[begin[r]:end[r]]`, oldest first.

        Args:
            items: item rows [T] int64.
            begin, end: bounds [R] int64 in 0..T; an empty span adds nothing.
        """
        return RecencyBias(items, begin, end, _UP_TO, _SCALE * self.weight)

    @torch.no_grad()
    def ranked_spans(self, items: Tensor, begin: Tensor, end: Tensor) -> LogitBias:
        """As `of_spans`, what ranking adds, item by item and in float32: it differs in buckets that
        were never trained. Memory: about 30 bytes for each distinct item of each span."""
        return RecencyBias(items, begin, end, _UP_TO, self.ranked_values().float()).listed()

    @torch.no_grad()
    def ranked_values(self) -> Tensor:
        """What ranking adds in each bucket, [9]."""
        trained = torch.where(self.weight != 0, torch.arange(len(self.weight)).to(self.weight), 0)
        return _SCALE * self.weight[trained.cummax(0).values.long()]

    def of_windows(
        self, items: Tensor, cu_seqlens: Tensor, targets: Tensor, padding_idx: int
    ) -> RecencyBias:
        """For every position of windows laid end to end, the bias of what was met up to there.

        Args:
            items, targets: [T] int64; positions whose target is `padding_idx` get nothing.
            cu_seqlens: bounds of the windows [B + 1].
        """
        bounds = cu_seqlens.to(torch.int64)
        begin = bounds[:-1].repeat_interleave(bounds.diff(), output_size=len(items))
        end = torch.arange(1, len(items) + 1, device=items.device)
        return self.of_spans(items, begin, torch.where(targets == padding_idx, begin, end))


def spans_of(histories: Tensor, padding_idx: int) -> tuple[Tensor, Tensor, Tensor]:
    """Items [T], begin and end [B] of histories [B, L] with padding anywhere."""
    real = histories != padding_idx
    lengths = real.sum(1)
    end = lengths.cumsum(0)
    return histories[real].to(torch.int64), end - lengths, end


def by_recency(histories: Tensor, padding_idx: int) -> Tensor:
    """Distinct items of histories [B, L], oldest first and with padding anywhere: [B, S] int64, the
    one met last first, filled up with `padding_idx`."""
    offsets, items, recency = recent_items(*spans_of(histories, padding_idx))
    counts = offsets.diff()
    most = int(counts.max()) if len(histories) else 0
    row = torch.arange(len(histories), device=items.device).repeat_interleave(counts)
    found = items.new_full((len(histories), most), padding_idx)
    found[row, recency - 1] = items
    return found
