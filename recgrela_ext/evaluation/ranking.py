"""Full ranking of every target against the whole catalogue, in blocks of users and items.

    rank = 1 + #{competing items j != target : score_j >= score_target}

The rank is pessimistic: an item with the target's score stands before it. Two views come from one
pass: in ``seen_included`` every item but the padding row competes; in ``seen_excluded`` the items
of the user's history do not (the target always does, also when it repeats an item of the history).
The second count is the first less the history's distinct items that score at least the target's.

Scores are float32. Those of a model are dot products accumulated in float64 and then rounded, so
that ties are ties, whatever the blocks, the threads and the device: a rank does not depend on them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from tqdm.auto import tqdm

from recgrela_ext.arguments import check_same_items, check_whole
from recgrela_ext.data.sequences import Targets
from recgrela_ext.errors import shown
from recgrela_ext.modes import evaluating

_ITEMS_PER_BATCH = 32_768  # batch_size=None: longer histories go in smaller batches


@runtime_checkable
class Scorer(Protocol):
    """Anything that scores the catalogue for histories of item rows."""

    def score(self, histories: list[np.ndarray]) -> torch.Tensor:
        """Float32 ``[b, n_items]``; column 0 (padding) is ignored."""
        ...


@dataclass(frozen=True)
class Ranks:
    """1-based ranks, int64 ``[n]``, one per target and view."""

    seen_included: np.ndarray
    seen_excluded: np.ndarray


def rank_targets(
    model: Any,
    targets: Targets,
    *,
    max_seq_len: int | None = None,
    batch_size: int | None = None,
    user_block: int = 1024,
    item_block: int = 8192,
    progress: bool | None = None,
) -> Ranks:
    """Rank every target among all items.

    Args:
        model: a :class:`Scorer`, or a model with ``model(item_seq [B, L], item_seq_len [B]) ->
            [B, hidden]`` and ``model.item_embedding.weight [n_items, hidden]``. It is put in
            evaluation mode for the pass and back afterwards. A repeat bias it may carry is added,
            by the whole history.
        targets: items to rank and the histories before them.
        max_seq_len: a model reads the last ``max_seq_len`` items of a history; ``None``: the value
            of ``model.config``, and the whole history where that has none. What was *seen* is
            always the whole history.
        batch_size: histories per call; ``None``: about 32,768 items for a model, at most 64 MB of
            scores for a scorer.
        user_block, item_block: of a model, ``[user_block, item_block]`` scores are held at once.
        progress: a bar on stderr; ``None``: only on a terminal.

    A target without a history gets the hidden state 0 from a model: every item ties, it ranks last.

    Raises:
        ValueError: NaN scores, with the number of targets; no targets; a model and targets of
            different catalogues.
    """
    if not len(targets):
        raise ValueError("rank_targets: targets must hold at least one target, got none")
    sizes = {"batch_size": batch_size, "max_seq_len": max_seq_len}
    blocks = {"user_block": user_block, "item_block": item_block}
    for name, value in {**{n: x for n, x in sizes.items() if x is not None}, **blocks}.items():
        check_whole(value, "rank_targets", name)
    if not isinstance(model, Scorer) and not hasattr(model, "item_embedding"):
        raise TypeError(
            f"rank_targets: model must have an item_embedding, or score, got {shown(model)}"
        )
    bar = tqdm(
        total=len(targets),
        desc="evaluate",
        unit=" targets",
        disable=None if progress is None else not progress,
        leave=False,
    )
    ranking = _Ranking(targets, bar)
    with bar, torch.inference_mode():
        if isinstance(model, Scorer):
            _rank_scorer(model, ranking, batch_size)
        else:
            _rank_model(model, ranking, max_seq_len, batch_size, user_block, item_block)
    return ranking.result()


class _Ranking:
    """Ranks so far, and the count of ``score >= target`` over blocks of scores."""

    def __init__(self, targets: Targets, bar: Any) -> None:
        self.targets = targets
        self.items = targets.target_items.astype(np.int64)
        self.included = np.zeros(len(targets), np.int64)
        self.excluded = np.zeros(len(targets), np.int64)
        self.nan = np.zeros(len(targets), bool)
        self.bar = bar

    def add(
        self,
        index: np.ndarray,
        target_score: torch.Tensor,
        blocks: Iterator[tuple[int, torch.Tensor]],
    ) -> None:
        """Rank targets ``index [b]`` from ``blocks`` of (first item, scores ``[b, c]``)."""
        device = target_score.device
        limit = target_score[:, None]
        own = torch.from_numpy(self.items[index]).to(device)
        seen_user, seen_item = self._seen(index)
        count = torch.zeros(len(index), dtype=torch.int64, device=device)
        nan = torch.isnan(target_score)
        seen_count = np.zeros(len(index), np.int64)
        for start, scores in blocks:
            nan |= torch.isnan(scores).any(dim=1)
            count += (scores >= limit).sum(dim=1)
            low, high = np.searchsorted(seen_item, [start, start + scores.shape[1]])
            user = torch.from_numpy(seen_user[low:high]).to(device)
            item = torch.from_numpy(seen_item[low:high] - start).to(device)
            before = scores[user, item] >= target_score[user]
            seen_count += np.bincount(user[before].cpu().numpy(), minlength=len(index))
            # The target does not compete with itself, whichever way its own score was rounded.
            row = ((own >= start) & (own < start + scores.shape[1])).nonzero()[:, 0]
            count[row] -= (scores[row, own[row] - start] >= target_score[row]).long()
        self.included[index] = 1 + count.cpu().numpy()
        self.excluded[index] = self.included[index] - seen_count
        self.nan[index] = nan.cpu().numpy()
        self.bar.update(len(index))

    def _seen(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(row of ``index``, item) of the distinct seen items but the target, sorted by item."""
        histories = [self.targets.history(int(i)) for i in index]
        user = np.repeat(np.arange(len(index)), [len(history) for history in histories])
        item = np.concatenate(histories).astype(np.int64)
        other = item != self.items[index][user]
        keys = np.unique(item[other] * len(index) + user[other])
        return keys % len(index), keys // len(index)

    def result(self) -> Ranks:
        if self.nan.any():
            raise ValueError(
                "rank_targets: scores must not be NaN, got NaN for "
                f"{int(self.nan.sum())} of {len(self.nan)} users"
            )
        return Ranks(self.included, self.excluded)


def _rank_scorer(scorer: Scorer, ranking: _Ranking, batch_size: int | None) -> None:
    n_items = ranking.targets.n_items
    if batch_size is None:
        batch_size = max(1, min(256, 2**24 // n_items))
    for start in range(0, len(ranking.items), batch_size):
        index = np.arange(start, min(start + batch_size, len(ranking.items)))
        scores = scorer.score([ranking.targets.history(int(i)) for i in index]).float()
        if tuple(scores.shape) != (len(index), n_items):
            raise ValueError(
                f"rank_targets: scores must be [{len(index)}, {n_items}], got {list(scores.shape)}"
            )
        rows = torch.from_numpy(ranking.items[index]).to(scores.device)
        target_score = scores.gather(1, rows[:, None])[:, 0]
        ranking.add(index, target_score, iter([(1, scores[:, 1:])]))


def _rank_model(
    model: Any,
    ranking: _Ranking,
    max_seq_len: int | None,
    batch_size: int | None,
    user_block: int,
    item_block: int,
) -> None:
    table = model.item_embedding.weight.detach()
    if getattr(getattr(model, "config", None), "padding_idx", 0) != 0:
        raise ValueError(
            "rank_targets: model must have padding_idx 0, as the data's item rows start at 1, "
            f"got {model.config.padding_idx}"
        )
    if len(table) != ranking.targets.n_items:
        raise ValueError(
            f"rank_targets: model must have the targets' n_items {ranking.targets.n_items}, "
            f"got {len(table)}"
        )
    check_same_items(model, ranking.targets.id_map, "rank_targets")
    dtype = torch.float32 if table.device.type == "mps" else torch.float64

    def dot(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return (hidden @ rows.to(dtype).T).float()

    histories = [ranking.targets.history(i) for i in range(len(ranking.items))]

    def finish(index: np.ndarray, hidden: torch.Tensor) -> None:
        hidden = hidden.to(dtype)
        rows = torch.from_numpy(ranking.items[index]).to(table.device)
        target_score = (hidden * table[rows].to(dtype)).sum(dim=1).float()
        bias = _HistoryBias(model, [histories[i] for i in index])
        target_score += bias.of_items(rows)
        starts = range(1, len(table), item_block)
        blocks = ((at, bias.added(at, dot(hidden, table[at : at + item_block]))) for at in starts)
        ranking.add(index, target_score, blocks)

    waiting: list[tuple[np.ndarray, torch.Tensor]] = []
    for index, hidden in encode_histories(model, histories, max_seq_len, batch_size):
        waiting.append((index, hidden))
        if sum(len(part) for part, _ in waiting) >= user_block:
            _flush(waiting, user_block, finish)
    _flush(waiting, user_block, finish)


class _HistoryBias:
    """What a model with a repeat bias adds to the scores of each history's items: nothing, for any
    other. The whole history counts, also what the model has not read."""

    def __init__(self, model: Any, histories: list[np.ndarray]) -> None:
        spans = getattr(getattr(model, "repeat_bias", None), "ranked_spans", None)
        self.none = spans is None
        if spans is None:
            return
        device = model.item_embedding.weight.device
        everything = torch.from_numpy(np.concatenate(histories).astype(np.int64)).to(device)
        ends = torch.tensor([len(history) for history in histories], device=device).cumsum(0)
        begins = torch.nn.functional.pad(ends[:-1], (1, 0))
        bias = spans(everything, begins, ends)
        self.items, order = bias.items.sort(stable=True)
        self.row, self.values = bias.rows()[order], bias.values[order]

    def added(self, start: int, scores: torch.Tensor) -> torch.Tensor:
        """Scores ``[b, c]`` of the items from ``start`` on, changed in place."""
        if not self.none:
            stop = start + scores.shape[1]
            bounds = torch.tensor([start, stop], device=self.items.device)
            low, high = torch.searchsorted(self.items, bounds).tolist()
            scores[self.row[low:high], self.items[low:high] - start] += self.values[low:high]
        return scores

    def of_items(self, items: torch.Tensor) -> torch.Tensor | float:
        """What is added to one item of each history, ``[b]``."""
        if self.none:
            return 0.0
        own = torch.zeros(len(items), device=items.device)
        hit = items[self.row] == self.items
        own[self.row[hit]] = self.values[hit]
        return own


def _flush(
    waiting: list[tuple[np.ndarray, torch.Tensor]],
    user_block: int,
    finish: Callable[[np.ndarray, torch.Tensor], None],
) -> None:
    if waiting:
        index = np.concatenate([part for part, _ in waiting])
        hidden = torch.cat([part for _, part in waiting])
        for at in range(0, len(index), user_block):
            finish(index[at : at + user_block], hidden[at : at + user_block])
        waiting.clear()


def encode_histories(
    model: Any,
    histories: Sequence[np.ndarray],
    max_seq_len: int | None = None,
    batch_size: int | None = None,
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Hidden states after each history's last item: pairs (index ``[b]``, hidden ``[b, hidden]``).

    Histories go shortest first, so that a batch holds little padding; the hidden state of an empty
    history is 0. A model that attends to padding (``config.attend_padding``) is given batches
    padded to ``max_seq_len``, as its published evaluation does.

    Args:
        model: as in :func:`rank_targets`.
        histories: item rows, the last ``max_seq_len`` of each are read.
        max_seq_len: ``None``: that of ``model.config``; the whole history where it has none.
        batch_size: histories per batch; ``None``: about 32,768 items.
    """
    config = getattr(model, "config", None)
    crop = max_seq_len if max_seq_len is not None else getattr(config, "max_seq_len", None)
    lengths = np.array([len(history) for history in histories], np.int64)
    lengths = lengths if crop is None else np.minimum(lengths, crop)
    fixed = None
    if crop is not None and config is not None and getattr(config, "attend_padding", False):
        fixed = min(crop, max(config.max_seq_len, int(lengths.max(initial=1))))
    order = np.argsort(lengths, kind="stable")
    device = model.item_embedding.weight.device
    with evaluating(model) if isinstance(model, torch.nn.Module) else contextlib.nullcontext():
        for index in _batches(order, lengths, batch_size, fixed):
            yield index, _encode(model, histories, index, lengths[index], fixed, device)


def _batches(
    order: np.ndarray, lengths: np.ndarray, batch_size: int | None, fixed: int | None
) -> Iterator[np.ndarray]:
    start = 0
    while start < len(order):
        if batch_size is not None:
            stop = start + batch_size
        else:
            longest = np.maximum(lengths[order[start : start + _ITEMS_PER_BATCH]], fixed or 1)
            cost = longest * np.arange(1, len(longest) + 1)  # ascending: histories are sorted
            stop = start + max(1, int(np.searchsorted(cost, _ITEMS_PER_BATCH, side="right")))
        yield order[start:stop]
        start = stop


def _encode(
    model: Any,
    histories: Sequence[np.ndarray],
    index: np.ndarray,
    lengths: np.ndarray,
    fixed: int | None,
    device: torch.device,
) -> torch.Tensor:
    item_seq = np.zeros((len(index), fixed or max(int(lengths.max()), 1)), np.int64)
    for row, (i, length) in enumerate(zip(index, lengths, strict=True)):
        if length:
            item_seq[row, :length] = histories[i][-length:]
    empty = torch.from_numpy(lengths == 0).to(device)
    item_seq_len = torch.from_numpy(np.maximum(lengths, 1)).to(device)
    hidden = model(torch.from_numpy(item_seq).to(device), item_seq_len)
    return torch.where(empty[:, None], torch.zeros_like(hidden), hidden)
