"""Top-k lists for users and histories in raw ids and titles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

import numpy as np
import torch

from recgrela_ext.arguments import check_same_items, check_whole, is_one_of
from recgrela_ext.data.sequences import IdMap, Sequences
from recgrela_ext.errors import DataError, shown
from recgrela_ext.modes import evaluating

_USERS_PER_BATCH = 64


class Recommended(TypedDict):
    """One line of a list: raw ids, the item's title (its raw id as text without titles), score."""

    user: int | str | None
    rank: int
    item: int | str
    title: str
    score: float


def recommend_for_users(
    model: Any,
    sequences: Sequences,
    users: Iterable[int | str],
    k: int = 10,
    exclude_seen: bool | str = True,
) -> list[Recommended]:
    """Top-k lists of users, one after another, best item first.

    The model reads the last ``model.config.max_seq_len`` items of a history; the whole history
    counts as seen, and for a repeat bias. A list is shorter than ``k`` where fewer items are left.

    Args:
        model: a ``RecGRELA`` for the catalogue of ``sequences``.
        sequences: the histories, with the raw ids.
        users: raw user ids, in any iterable.
        k: length of a list, at least 1.
        exclude_seen: ``"auto"`` keeps seen items in where more than 1 % of the training events
            repeat (``model.config.repeat_share``), and leaves them out when that is unknown.

    Raises:
        DataError: an unknown user, or a user without events.
        ValueError: ``k`` < 1, another ``exclude_seen``, or a model of another catalogue.
        TypeError: users that are no list, or ``k`` that is no int.
    """
    users = _listed(users, "recommend_for_users", "users")
    rows = sequences.id_map.encode_users(users).tolist()
    histories = [sequences.history(row) for row in rows]
    for user, history in zip(users, histories, strict=True):
        if not len(history):
            raise DataError(
                f"recommend_for_users: user must have events, got {shown(user)} with none"
            )
    names = sequences.id_map.user_ids[rows].tolist() if rows else []
    return _recommend(model, sequences.id_map, names, histories, k, exclude_seen)


def recommend_for_items(
    model: Any,
    id_map: IdMap,
    items: Iterable[int | str],
    k: int = 10,
    exclude_seen: bool | str = True,
) -> list[Recommended]:
    """Top-k list for one history of raw item ids, oldest first; ``user`` is None in its lines.

    Raises:
        DataError: an unknown item, or no items.
        ValueError, TypeError: as in :func:`recommend_for_users`.
    """
    items = _listed(items, "recommend_for_items", "items")
    if not items:
        raise DataError("recommend_for_items: items must hold at least one item, got none")
    return _recommend(model, id_map, [None], [id_map.encode_items(items)], k, exclude_seen)


def format_recommendations(lines: Sequence[Recommended]) -> str:
    """Lists as text: a heading per user, then rank, score, raw id and title."""
    text: list[str] = []
    width = max((len(str(line["item"])) for line in lines), default=1)
    for line in lines:
        if line["rank"] == 1:
            text.append("this history" if line["user"] is None else f"user {line['user']}")
        label = f"  {line['title']}" if line["title"] != str(line["item"]) else ""
        row = f"{line['rank']:4d}  {line['score']:8.3f}  {line['item']!s:>{width}}{label}"
        # a title comes from anywhere: nothing in it may reach the terminal as a command
        text.append("".join(c if c.isprintable() else repr(c)[1:-1] for c in row))
    return "\n".join(text)


def _listed(raw: Any, caller: str, name: str) -> list[Any]:
    try:
        if not isinstance(raw, (str, bytes)):
            return list(raw)
    except TypeError:
        pass
    raise TypeError(f"{caller}: {name} must be a list of raw ids, got {shown(raw)}")


def _recommend(
    model: Any,
    id_map: IdMap,
    users: Sequence[int | str | None],
    histories: list[np.ndarray],
    k: int,
    exclude_seen: bool | str,
) -> list[Recommended]:
    check_whole(k, "recommend", "k")
    if not is_one_of(exclude_seen, (True, False, "auto")):
        raise ValueError(
            f"recommend: exclude_seen must be True, False or 'auto', got {shown(exclude_seen)}"
        )
    if model.config.n_items != id_map.n_items:
        raise ValueError(
            f"recommend: model must have the data's n_items {id_map.n_items}, "
            f"got {model.config.n_items}"
        )
    check_same_items(model, id_map, "recommend")
    if model.config.padding_idx != 0:
        raise ValueError(
            "recommend: model must have padding_idx 0, as an id map has it, "
            f"got {model.config.padding_idx}"
        )
    if exclude_seen == "auto":
        exclude_seen = not model.config.keeps_seen
    lines: list[Recommended] = []
    lists = _top_lists(model, histories, k, bool(exclude_seen))
    for user, (items, scores) in zip(users, lists, strict=True):
        raw = id_map.decode_items(items).tolist()
        for place, (item, row, score) in enumerate(zip(raw, items, scores, strict=True), start=1):
            lines.append(
                Recommended(
                    user=user,
                    rank=place,
                    item=item,
                    title=id_map.title(int(row)),
                    score=float(score),
                )
            )
    return lines


def _top_lists(
    model: Any, histories: list[np.ndarray], k: int, exclude_seen: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(rows, scores) of each history's list, best first."""
    order = np.argsort([len(history) for history in histories], kind="stable")
    lists = [(np.empty(0, np.int64), np.empty(0, np.float32))] * len(histories)
    for start in range(0, len(order), _USERS_PER_BATCH):
        index = order[start : start + _USERS_PER_BATCH]  # of similar length: little padding
        found = _batch_lists(model, [histories[i] for i in index], k, exclude_seen)
        for i, one in zip(index, found, strict=True):
            lists[i] = one
    return lists


def _batch_lists(
    model: Any, batch: list[np.ndarray], k: int, exclude_seen: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The model reads a window; all of the history was seen."""
    device = model.item_embedding.weight.device
    windows = [history[-model.config.max_seq_len :] for history in batch]
    lengths = torch.tensor([len(window) for window in windows], device=device)
    with torch.inference_mode(), evaluating(model):
        hidden = model(_padded(windows).to(device), lengths)
        seen = _padded(batch).to(device)
        top = model.recommend_from_hidden(hidden, k, seen, exclude_seen=exclude_seen)
    pairs = zip(top.items.cpu().numpy(), top.scores.float().cpu().numpy(), strict=True)
    return [(items[items != 0], scores[items != 0]) for items, scores in pairs]


def _padded(histories: list[np.ndarray]) -> torch.Tensor:
    """Right-padded with 0: int64 ``[b, longest]``."""
    rows = np.zeros((len(histories), max(map(len, histories))), np.int64)
    for row, history in zip(rows, histories, strict=True):
        row[: len(history)] = history
    return torch.from_numpy(rows)
