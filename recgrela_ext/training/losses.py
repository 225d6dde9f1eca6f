"""Losses of next-item training: full softmax, sampled softmax with logQ, BPR.

    softmax   -log softmax over all items                           (model/losses.py, chunked)
    sampled   -log softmax over the target and K shared negatives, their logits less log(K q)
    bpr       -log sigmoid(score(target) - score(negative))

All take hidden states `[T, hidden_size]`, the item table `[n_items, hidden_size]` and targets
`[T]`, and return the mean over the rows whose target is not `ignore_index`, 0 when there is none.
Scores are formed in float32 at least, also under autocast.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recgrela_ext.errors import shown
from recgrela_ext.model.losses import softmax_loss
from recgrela_ext.model.softmax_chunks import default_chunk_rows

__all__ = [
    "NegativeSampler",
    "bpr_loss",
    "default_chunk_rows",
    "sampled_softmax_loss",
    "softmax_loss",
]

_STRATEGIES = ("uniform", "popularity", "in_batch")


class NegativeSampler:
    """Draws negative items and knows the log-probability of each draw.

    Args:
        n_items: rows of the item table, the padding row included.
        strategy: "uniform" over the items; "popularity", q ~ count^power; "in_batch", the targets
            of the step, whose q is the popularity (power 1).
        counts: `[n_items]`, how often each item occurs; needed unless uniform. An item that never
            occurs counts as once.
        power: exponent of the popularity.
        padding_idx: the row that is never drawn.

    Raises:
        ValueError: `strategy` is unknown, or `counts` is missing or has another length.
    """

    def __init__(
        self,
        n_items: int,
        strategy: str = "uniform",
        counts: np.ndarray | Tensor | None = None,
        power: float = 1.0,
        padding_idx: int = 0,
    ) -> None:
        if strategy not in _STRATEGIES:
            raise ValueError(
                f"NegativeSampler: strategy must be one of {', '.join(_STRATEGIES)},"
                f" got {shown(strategy)}"
            )
        if strategy == "uniform":
            weight = torch.ones(n_items, dtype=torch.float64)
        else:
            if counts is None or len(counts) != n_items:
                got = "none" if counts is None else str(len(counts))
                raise ValueError(
                    f"NegativeSampler: counts must have n_items={n_items} entries, got {got}"
                )
            weight = torch.as_tensor(counts).to(torch.float64).clamp(min=1.0)
            weight[padding_idx] = 1.0
            # relative to the most popular one: counts to a high power are beyond every float
            weight = (weight / weight.max()) ** (power if strategy == "popularity" else 1.0)
        weight[padding_idx] = 0.0
        self.strategy = strategy
        self.log_q = (weight / weight.sum()).log().float()  # [n_items], -inf for padding
        sums = weight.cumsum(0)
        self._cumulative = sums / sums[-1]  # ends in exactly 1, which no draw reaches

    def to(self, device: torch.device) -> NegativeSampler:
        """Moves the tables to a device, in place."""
        self.log_q = self.log_q.to(device)
        self._cumulative = self._cumulative.to(device)
        return self

    def draw(self, count: int, targets: Tensor) -> Tensor:
        """`[count]` item rows from torch's global generator, with replacement.

        In-batch: `count` of the `targets [R]` without replacement, all of them when R <= count.
        """
        if self.strategy == "in_batch":
            if targets.numel() <= count:
                return targets
            return targets[torch.randperm(targets.numel(), device=targets.device)[:count]]
        uniform = torch.rand(count, dtype=torch.float64, device=self._cumulative.device)
        return torch.searchsorted(self._cumulative, uniform, right=True)


def sampled_softmax_loss(
    hidden: Tensor,
    table: Tensor,
    targets: Tensor,
    sampler: NegativeSampler,
    num_negatives: int = 256,
    ignore_index: int = 0,
) -> Tensor:
    """Softmax over the target and `num_negatives` items shared by all rows of the step.

    The normaliser exp(s_y) + 1/K sum_j exp(s_j) / q_j, over the K draws j other than y, is an
    unbiased estimate of the full one, so the loss tends to the full softmax as K grows. (The target
    is not drawn, hence not corrected.) Memory `[T, num_negatives]`.
    """
    rows = (targets != ignore_index).nonzero().squeeze(1)
    if rows.numel() == 0:
        return (hidden.sum() + table.sum()).float() * 0.0
    with torch.autocast(hidden.device.type, enabled=False):
        h, wide = _float_rows(hidden, table, rows)
        y = targets.index_select(0, rows)
        negatives = sampler.draw(num_negatives, y)
        positive = (h * wide.index_select(0, y)).sum(1, keepdim=True)  # [R, 1]
        log_count = sampler.log_q[negatives] + math.log(negatives.numel())
        logits = h @ wide.index_select(0, negatives).t() - log_count
        logits = logits.masked_fill(negatives == y.unsqueeze(1), -torch.inf)
        return (
            torch.logsumexp(torch.cat((positive, logits), dim=1), dim=1) - positive[:, 0]
        ).mean()


def bpr_loss(
    hidden: Tensor,
    table: Tensor,
    targets: Tensor,
    sampler: NegativeSampler,
    ignore_index: int = 0,
) -> Tensor:
    """Bayesian personalised ranking with one negative per row; accidental hits carry no loss."""
    rows = (targets != ignore_index).nonzero().squeeze(1)
    if rows.numel() == 0:
        return (hidden.sum() + table.sum()).float() * 0.0
    with torch.autocast(hidden.device.type, enabled=False):
        h, wide = _float_rows(hidden, table, rows)
        y = targets.index_select(0, rows)
        drawn = sampler.draw(y.numel(), y)
        if sampler.strategy == "in_batch":
            drawn = drawn[torch.randperm(y.numel(), device=y.device)]
        margin = (h * (wide.index_select(0, y) - wide.index_select(0, drawn))).sum(1)
        kept = (drawn != y).to(margin.dtype)
        return -(F.logsigmoid(margin) * kept).sum() / kept.sum().clamp(min=1.0)


def _float_rows(hidden: Tensor, table: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, table.dtype), torch.float32)
    return hidden.index_select(0, rows).to(dtype), table.to(dtype)
