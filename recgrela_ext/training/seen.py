"""A softmax loss that leaves the items a user has already seen out of the classes.

    unseen    -log softmax over the target and the items the user has not seen before it

Ranking with seen items left out asks only for that: what the full softmax spends on pushing seen
items down is spent on the others. It is a bias of -inf for `softmax_loss`.
"""

from __future__ import annotations

import numpy as np
import torch

from recgrela_ext.ops import LogitBias
from recgrela_ext.training.windows import Batch


def leave_out_seen(
    batch: Batch, items: np.ndarray, offsets: np.ndarray, length: int | None = None
) -> LogitBias:
    """For every position with a target: -inf for what was seen up to there, but for the target.

    Args:
        batch: windows of the log.
        items: int64, the log, user after user.
        offsets: int64 `[num_users + 1]`, bounds of the users in it. The whole history counts, also
            what lies before a window.
        length: rows of every window, which is padded to them; None: the windows back to back.
    """
    begins = offsets[np.searchsorted(offsets, batch.start, side="right") - 1]
    counts: list[np.ndarray] = []
    entries: list[np.ndarray] = []
    bounds = zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)
    for begin, start, (low, high) in zip(begins, batch.start, bounds, strict=True):
        targets = batch.targets[low:high]
        known, first = np.unique(items[begin : start + len(targets)], return_index=True)
        place = start - begin + np.arange(len(targets))
        out = (first <= place[:, None]) & (known != targets[:, None])
        out[targets == batch.padding_idx] = False
        counts.append(np.zeros(length or len(targets), np.int64))
        counts[-1][: len(targets)] = out.sum(1)
        entries.append(np.broadcast_to(known, out.shape)[out])
    ends = np.concatenate([np.zeros(1, np.int64), *counts]).cumsum()
    left_out = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *entries]))
    return LogitBias(torch.from_numpy(ends), left_out, torch.full((len(left_out),), -torch.inf))
