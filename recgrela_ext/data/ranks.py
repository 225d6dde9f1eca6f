"""Times that number each user's events, 1, 2, 3: they order a user's events and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_ROWS = 1 << 19  # looked at together
_COINCIDENCES = 3  # events of others than the longest user; fewer prove nothing


class UserTimes:
    """What is known of every user's times, of rows that come in parts."""

    def __init__(self) -> None:
        self._code_of: dict[Any, int] = {}
        self._count = np.empty(0, np.int64)
        self._last, self._sum = np.empty(0), np.empty(0)
        self._begin = np.inf  # of all users
        self._origin = 0.0  # of the sums, which would lose digits otherwise

    def add(self, users: Sequence[Any], codes: np.ndarray, time: np.ndarray) -> None:
        """One part: row ``r`` is of ``users[codes[r]]``, or of nobody: code -1, or no text."""
        known = self._code_of
        place = [-1 if user == "" else known.setdefault(user, len(known)) for user in users]
        user = np.array([*place, -1])[codes]
        named = user >= 0
        self.add_codes(user[named], time[named], len(known))

    def add_codes(self, user: np.ndarray, time: np.ndarray, num_users: int) -> None:
        """One part: ``user`` are codes below ``num_users``, the same in every part."""
        if not len(user):
            return
        more = num_users - len(self._count)
        self._count = np.append(self._count, np.zeros(more, np.int64))
        self._last = np.append(self._last, np.full(more, -np.inf))
        self._sum = np.append(self._sum, np.zeros(more))
        # NumPy takes ten times as long for columns that it has to convert itself.
        user, time = user.astype(np.intp, copy=False), time.astype(np.float64, copy=False)
        if self._begin == np.inf:
            self._origin = float(time[0])
        self._count += np.bincount(user, minlength=num_users)
        self._begin = min(self._begin, float(time.min()))
        np.maximum.at(self._last, user, time)
        with np.errstate(all="ignore"):  # times around the largest float, here and below
            self._sum += np.bincount(user, time - self._origin, minlength=num_users)

    def number_events(self) -> bool:
        """Whether every user's times are 1, 2, 3 or 0, 1, 2 and so on, all in one unit."""
        here = self._count > 0
        count, several = self._count[here], self._count[here] > 1
        if not several.any() or count.sum() - count.max() < _COINCIDENCES:
            return False
        with np.errstate(all="ignore"):
            begin = self._begin
            steps = self._last[here] - begin
            step = (steps[several] / (count[several] - 1)).min()
            total = self._sum[here] - count * (begin - self._origin)
            return bool(
                0 < step < np.inf
                and (begin == 0 or np.isclose(begin, step, rtol=1e-9, atol=0))
                and np.allclose(steps, step * (count - 1), rtol=1e-9, atol=0)
                and np.allclose(total, steps * count / 2, rtol=1e-9, atol=0)
            )


def number_events(user: np.ndarray, time: np.ndarray, num_users: int) -> bool:
    """Whether a log's times number the events of each user, from 0 or 1 on in any unit.

    Args:
        user: ``[N]``, codes below ``num_users``.
        time: ``[N]``, finite.
    """
    times = UserTimes()
    for start in range(0, len(user), _ROWS):
        rows = slice(start, start + _ROWS)
        times.add_codes(user[rows], time[rows], num_users)
    return times.number_events()
