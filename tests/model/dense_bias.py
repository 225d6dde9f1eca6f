"""The repeat bias written down item by item, the specification of model/repeat_bias.py."""

from __future__ import annotations

import math

from torch import Tensor


def biased(history: list[int], scores: Tensor, weight: Tensor) -> Tensor:
    """`scores` [N] after the whole history, oldest item first."""
    added = scores.new_zeros(scores.shape)
    recent = list(dict.fromkeys(reversed(history)))  # distinct, the one met last first
    for recency, item in enumerate(recent, start=1):
        added[item] = 10 * weight[min(math.ceil(math.log2(recency)), len(weight) - 1)]
    return scores + added
