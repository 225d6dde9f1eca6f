"""What `python -m benchmarks memory` compares: per model what it keeps of users, and one event.

Every candidate has 4 layers of width 64 or as many parameters (benchmarks/peer_models.py), float32,
and one catalogue. "Re-encoding" keeps ids alone and reads them again at every event.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.memory_quality import OURS, PUBLISHED, build
from recgrela_ext import RecGRELA, UserStateStore

WINDOW = 200  # items a model with a window reads
EventWork = Callable[[], Tensor]  # one event of every user: hidden states [B, 64]


@dataclass(frozen=True)
class Candidate:
    """`model`: a name of memory_quality.MODELS. `way`: "window" and "whole" re-encode, "step" keeps
    a state; "store" the same, resting in `form` between any two events.
    """

    label: str
    model: str
    way: str
    form: str = "float32"

    @property
    def grows(self) -> bool:
        """Whether the cost of an event grows with the history."""
        return self.way == "whole" or (self.model == "SASRec" and self.way == "step")

    def build(self, n_items: int, length: int) -> Any:
        positions = length if self.model == "SASRec" and self.way != "window" else WINDOW
        torch.manual_seed(0)
        return build(self.model, n_items, length=positions).eval()


CANDIDATES: dict[str, Candidate] = {
    "sasrec-window": Candidate("SASRec, re-encoding the last 200", "SASRec", "window"),
    "sasrec-whole": Candidate("SASRec, re-encoding everything", "SASRec", "whole"),
    "sasrec-cache": Candidate("SASRec, KV cache", "SASRec", "step"),
    "gru4rec": Candidate("GRU4Rec, step", "GRU4Rec", "step"),
    "lrurec": Candidate("LRURec, step", "LRURec", "step"),
    "mamba": Candidate("Mamba (mambapy), step", "Mamba", "step"),
    "published": Candidate("RecGRELA as published, re-encoding the last 200", PUBLISHED, "window"),
    "ours-window": Candidate("ours, re-encoding the last 200", OURS, "window"),
    "ours": Candidate("ours, step", OURS, "step"),
    "ours-bfloat16": Candidate("ours, bfloat16 at rest", OURS, "store", "bfloat16"),
    "ours-float16": Candidate("ours, float16 at rest", OURS, "store", "float16"),
    "ours-int8": Candidate("ours, int8 at rest", OURS, "store", "int8"),
}


def stored_bytes(candidate: Candidate, length: int) -> dict[str, int]:
    """Bytes kept of one user after `length` items: ids (int32) that must be read again, and state.

    Seen items come to every model alike, 4 bytes a distinct item, where they are to be left out.
    """
    if candidate.way == "window":
        return {"ids": 4 * min(length, WINDOW), "state": 0}
    if candidate.way == "whole":
        return {"ids": 4 * length, "state": 0}
    model = candidate.build(10, 1)
    if candidate.model == OURS:
        return {"ids": 0, "state": UserStateStore(model, 1, candidate.form).user_nbytes}
    rows = length if candidate.grows else 1
    return {"ids": 0, "state": model.start(1, rows).nbytes}


def event(candidate: Candidate, model: Any, length: int, users: int) -> EventWork:
    """What happens when item number `length` of each user arrives, all that is kept being there.

    What is kept is filled without reading the whole history where only its size matters.
    """
    rows = model.item_embedding.num_embeddings
    generator = torch.Generator().manual_seed(0)
    new = torch.randint(1, rows, (users,), generator=generator)
    if candidate.way in ("window", "whole"):
        read = min(length, WINDOW) if candidate.way == "window" else length
        history = torch.randint(1, rows, (users, read), generator=generator)
        history[:, -1] = new
        return lambda: model(history)  # type: ignore[no-any-return]
    if candidate.model != OURS:
        return _peer_step(candidate, model, length, new)
    state = model.init_state(users)
    state.buffer.uniform_(0, 1)
    state.advance(length - 1, 0)
    if candidate.way == "step":
        return lambda: model.step(new, state)  # type: ignore[no-any-return]
    return _store_step(candidate, model, new, state)


def _peer_step(candidate: Candidate, model: Any, length: int, new: Tensor) -> EventWork:
    kept = model.start(len(new), length if candidate.grows else 1)
    for part in kept.tensors:
        real = torch.view_as_real(part) if part.is_complex() else part
        real.uniform_(-1, 1)

    def work() -> Tensor:
        kept.position = length - 1  # the same event again: a cache does not run full
        return model.step(new, kept)  # type: ignore[no-any-return]

    return work


def _store_step(candidate: Candidate, model: RecGRELA, new: Tensor, state: Any) -> EventWork:
    """Two groups of users take turns in the active part, so that every event converts all states:
    in from rest, and the other group's out to rest."""
    B = len(new)
    store = UserStateStore(model, 2 * B, candidate.form, active=B)
    groups = (np.arange(B), np.arange(B, 2 * B))
    for group in groups:
        store.put(group, state)
    turn = 0

    def work() -> Tensor:
        nonlocal turn
        turn += 1
        return store.step(groups[turn % 2], new)

    return work


def read_history(candidate: Candidate, model: Any, length: int) -> Callable[[], object]:
    """Making what is kept of one user out of the ids; for one that keeps ids, reading them once."""
    rows = model.item_embedding.num_embeddings
    items = torch.randint(1, rows, (1, length), generator=torch.Generator().manual_seed(0))
    if candidate.way in ("window", "whole"):
        read = items[:, -WINDOW:] if candidate.way == "window" else items
        return lambda: model(read)
    if candidate.model == OURS:
        return lambda: model.prefill(items)
    return lambda: model.read(items, model.start(1, length))


def rebuild(candidate: Candidate, model: Any, histories: list[np.ndarray]) -> Callable[[], object]:
    """All users after a model update, histories ragged; peers pad batches of 64 of like lengths."""
    if candidate.model == OURS:
        items = torch.from_numpy(np.concatenate(histories))
        bounds = torch.from_numpy(np.cumsum([0, *map(len, histories)]))
        return lambda: model.prefill_packed(items, bounds)
    order = sorted(histories, key=len)
    batches = [order[i : i + 64] for i in range(0, len(order), 64)]

    def padded() -> None:
        for batch in batches:
            longest = len(batch[-1])
            rows = torch.zeros(len(batch), longest, dtype=torch.int64)
            for row, history in zip(rows, batch, strict=True):
                row[: len(history)] = torch.from_numpy(history)
            model.read(rows, model.start(len(batch), longest))

    return padded
