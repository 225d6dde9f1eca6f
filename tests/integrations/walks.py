"""A small log every stack is tried on: users who walk through the catalogue in steps of 1 to 3."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def walks(users: int = 60, items: int = 30, seed: int = 0) -> list[list[int]]:
    """Item numbers 1 .. items of each user, 5 to 20 of them."""
    rng = np.random.default_rng(seed)
    steps = [rng.integers(1, 4, rng.integers(5, 21)) for _ in range(users)]
    return [((user + np.cumsum(step)) % items + 1).tolist() for user, step in enumerate(steps)]


def columns(users: int = 60, items: int = 30, seed: int = 0) -> dict[str, np.ndarray]:
    """user_id, item_id and timestamp of the same log, rows by user and time."""
    log = walks(users, items, seed)
    lengths = [len(walk) for walk in log]
    return {
        "user_id": np.repeat(np.arange(1, users + 1), lengths),
        "item_id": np.concatenate([np.array(walk) for walk in log]),
        "timestamp": np.concatenate([np.arange(length) for length in lengths]),
    }


def write_inter(path: Path) -> None:
    """The same log as RecBole's atomic file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = zip(*(column.tolist() for column in columns().values()), strict=True)
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    lines += ["\t".join(map(str, row)) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
