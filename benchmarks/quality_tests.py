"""Which of two models ranks better: a paired bootstrap over users crossed with seeds, and Holm.

A resample draws users with replacement, the same ones for both models, and for each model its
seeds with replacement; its value is the difference of the mean metric. The interval holds the
middle 95 % of the resamples; p is twice the smaller share of resamples on either side of 0.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import numpy as np

TIE = 0.005  # a difference below this is called a tie, whatever its p
ALPHA = 0.05  # and so is one whose p is above this


@dataclass(frozen=True)
class Difference:
    """Of two means, with its 95 % interval; `p` is corrected by `holm` where several are made."""

    value: float
    low: float
    high: float
    p: float

    @property
    def verdict(self) -> str:
        """One of: ahead, behind, tie."""
        if abs(self.value) < TIE or self.low <= 0 <= self.high or self.p > ALPHA:
            return "tie"
        return "ahead" if self.value > 0 else "behind"


def paired_difference(
    ours: np.ndarray, theirs: np.ndarray, samples: int = 2000, seed: int = 0
) -> Difference:
    """ours [S, U] and theirs [T, U]: a metric by seed and user, the same users in the same order.

    Raises:
        ValueError: no users or seeds, or different users.
    """
    if ours.ndim != 2 or theirs.ndim != 2 or ours.shape[1] != theirs.shape[1]:
        raise ValueError(
            "paired_difference: ours and theirs must be [seeds, users] of the same users, "
            f"got {list(ours.shape)} and {list(theirs.shape)}"
        )
    if 0 in ours.shape or 0 in theirs.shape:
        raise ValueError("paired_difference: there must be users and seeds, got none")
    return _difference(_Values(ours), _Values(theirs), samples, seed)


class _Values:
    """An array that is equal to another by its content, to be remembered by."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self._digest = hashlib.sha256(f"{values.shape}".encode() + values.tobytes()).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Values) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)


@functools.lru_cache(maxsize=1024)  # README and the page of results ask for the same, a second each
def _difference(mine: _Values, others: _Values, samples: int, seed: int) -> Difference:
    ours, theirs = mine.values, others.values
    users = ours.shape[1]
    rng = np.random.default_rng(seed)
    differences = np.empty(samples)
    block = max(1, 8_000_000 // users)  # bounds the drawn counts to 64 MB
    for start in range(0, samples, block):
        size = min(block, samples - start)
        drawn = rng.multinomial(users, np.full(users, 1 / users), size=size)
        means = []
        for values in (ours, theirs):
            seeds = len(values)
            weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=size) / seeds
            means.append(((drawn @ values.T) / users * weights).sum(1))
        differences[start : start + size] = means[0] - means[1]
    low, high = np.quantile(differences, [0.025, 0.975])
    below = (np.count_nonzero(differences <= 0) + 1) / (samples + 1)
    above = (np.count_nonzero(differences >= 0) + 1) / (samples + 1)
    value = float(ours.mean() - theirs.mean())
    return Difference(value, float(low), float(high), min(1.0, 2 * min(below, above)))


def holm(ps: list[float]) -> list[float]:
    """Corrected p of several tests, in their order (Holm 1979)."""
    corrected = [0.0] * len(ps)
    worst = 0.0
    for rank, index in enumerate(np.argsort(ps, kind="stable")):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = worst
    return corrected
