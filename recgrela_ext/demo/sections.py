"""What the demonstration prints: metrics, one user, and a list that follows ten events."""

from __future__ import annotations

import statistics
import textwrap
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from recgrela_ext import RecGRELA, SeenItems, Sequences, Targets, evaluate
from recgrela_ext.evaluation import Markov, Popularity, Scorer, format_table

LIST = 10
_TITLE = 52
_CANDIDATES = 200


@dataclass(frozen=True)
class Moves:
    """How a list moved.

    Args:
        events: titles of the events ``[E]``.
        lists: item rows ``[E + 1, num_items]``, best first, before and after every event; rows that
            were left out are 0 and stand at the end.
        titles: title of every row that is shown.
        user: raw id.
    """

    events: list[str]
    lists: np.ndarray
    titles: dict[int, str]
    user: str

    def rank(self, moment: int, row: int) -> int | None:
        """1-based place of an item after ``moment`` events; None when it was left out."""
        places = np.flatnonzero(self.lists[moment] == row)
        return int(places[0]) + 1 if len(places) else None


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def compare(
    model: RecGRELA, train: Sequences, test: Targets, oracle: Any | None, wanted: float
) -> None:
    """Metrics beside the baselines and, where there is one, the true distribution."""
    heading("Next-item ranking among all items")
    others: dict[str, Scorer] = {"Popularity": Popularity(train), "Markov": Markov(train)}
    if oracle is not None:
        others["Oracle"] = oracle
    result = evaluate(model, test, baselines=others)
    print(format_table(result))
    if oracle is not None:
        share = result["mean"]["ndcg@10"] / result["baselines"]["Oracle"]["ndcg@10"]
        told = "reaches" if share >= wanted else "does not reach"
        print(
            f"\nThe oracle knows the true next-item distribution; no model can do better on "
            f"average.\nThe model has {share:.1%} of its NDCG@10 and so {told} {wanted:.0%}."
        )


def choose_users(train: Sequences) -> tuple[int, int]:
    """A user with a history of middle length, and one with quite another taste."""
    lengths = train.lengths
    long_enough = np.flatnonzero(lengths >= min(LIST, int(lengths.max())))
    by_length = long_enough[np.argsort(lengths[long_enough], kind="stable")]
    host = int(by_length[len(by_length) // 2])
    mine = np.unique(train.history(host))

    def overlap(user: int) -> float:
        return float(np.isin(train.history(user), mine).mean())

    others = [int(user) for user in long_enough[:_CANDIDATES] if user != host]
    return host, min(others, key=overlap, default=host)


def show_user(model: RecGRELA, test: Targets, user: int) -> None:
    """The end of a history and the list after it."""
    history = _whole_history(test, user)
    heading(f"User {test.id_map.user_ids[user]}, {len(history)} events")
    print("the last eight:")
    for row in history[-8:]:
        print(f"      {_title(test, int(row))}")
    print("recommended next:")
    top = model.recommend(torch.from_numpy(history.astype(np.int64))[None], k=LIST)
    for place, row in enumerate(top.items[0].tolist(), start=1):
        print(f"  {place:2d}  {_title(test, row)}")


def stream(model: RecGRELA, test: Targets, user: int, guest: int, count: int) -> Moves:
    """Feed the last events of ``guest`` into the state of ``user``, one by one."""
    history, events = _whole_history(test, user), _whole_history(test, guest)[-count:]
    heading(f"{len(events)} new events stream into that user's state")
    print(f"(what user {test.id_map.user_ids[guest]}, of another taste, did last)")
    item_seq = torch.from_numpy(history.astype(np.int64))[None]
    state = model.prefill(item_seq)
    seen = SeenItems.from_sequences(item_seq)
    lists, seconds = [_list(model, state, seen)], []
    print(f"{'':4}{'event':<{_TITLE}}  first on the list afterwards")
    for number, row in enumerate(events.tolist(), start=1):
        item = torch.tensor([row])
        start = time.perf_counter()
        model.step(item, state)
        seconds.append(time.perf_counter() - start)
        seen.add(item)
        lists.append(_list(model, state, seen))
        first = _title(test, int(lists[-1][0]))
        print(f"{number:3d} {_title(test, row):<{_TITLE}}  {first}")
    shown = {int(row) for one in lists for row in one[:LIST] if row}
    moves = Moves(
        [_title(test, row) for row in events.tolist()],
        np.stack(lists),
        {row: _title(test, row) for row in shown},
        str(test.id_map.user_ids[user]),
    )
    _print_list(moves)
    print(
        f"one event took {1e3 * statistics.median(seconds):.2f} ms (median); the state is "
        f"{state.nbytes:,} bytes, before and after"
    )
    return moves


def _print_list(moves: Moves) -> None:
    print("the list now, and where each item stood before:")
    for place, row in enumerate(moves.lists[-1][:LIST].tolist(), start=1):
        if row:
            before = moves.rank(0, row)
            print(f"  {place:2d}  {moves.titles[row]:<{_TITLE}}  {before or 'new':>4}")


def _list(model: RecGRELA, state: Any, seen: SeenItems) -> np.ndarray:
    """All rows of the catalogue, best first."""
    top = model.recommend_from_state(state, model.config.rows - 1, seen, exclude_seen="auto")
    return top.items[0].numpy()


def _whole_history(test: Targets, user: int) -> np.ndarray:
    return test.items[test.offsets[user] : test.offsets[user + 1]]


def _title(test: Targets, row: int) -> str:
    return textwrap.shorten(test.id_map.title(row), _TITLE, placeholder=" ...") if row else "-"
