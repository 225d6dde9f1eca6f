"""What a user state loses in each format at rest, by the number of conversions.

    recgrela train --data ml-1m.inter --order file --minutes 8 --dropout 0 --no-repeat-bias \
        --schedule linear --decay 0.3 --patience 100 --eval-every 4 --threads 1 --out runs/states
    python benchmarks/state_formats.py --model runs/states

Two parts, both on the test split and against float32 throughout. "return": every user's state is
converted once, before the last item of the history, which then arrives. "drift": users with more
than `--events` items follow the last of them one by one; n conversions are spread evenly over
those events, the last one before the last event. Written per format: NDCG@10 of the test target
with seen items left out, and the relative error of the hidden state (Euclidean norms, mean and
largest over the users). Whole histories are read, however long.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recgrela_ext import RecGRELA, Targets, UserState, UserStateStore
from recgrela_ext.cli.reading import Reading, check_targets, load_model
from recgrela_ext.evaluation.result import machine_info

ROOT = Path(__file__).resolve().parents[1]
FORMATS = ("bfloat16", "float16", "int8")
CONVERSIONS = (1, 2, 5, 10, 20, 50, 100)


def main() -> None:
    """Measure every format and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder that `recgrela train` wrote")
    parser.add_argument("--events", type=int, default=100)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/state-formats.json")
    options = parser.parse_args()
    model = load_model(options.model)
    reading = Reading.load(options.model)
    test = reading.splits()[2]
    check_targets(reading, model, test)
    result = {
        "model": "RecGRELA",
        "variant": model.variant,
        "data": test.name,
        "order": test.order,
        "split": "test",
        "target_sha256": test.target_sha256,
        "bytes_per_user": {
            name: UserStateStore(model, 1, name).user_nbytes for name in ("float32", *FORMATS)
        },
        "return": measure(model, test, np.arange(len(test)), 1, (1,)),
        "drift": measure(model, test, long_enough(test, options.events), options.events),
        "machine": machine_info(torch.device("cpu")),
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def long_enough(test: Targets, events: int) -> np.ndarray:
    return np.array([i for i in range(len(test)) if len(test.history(i)) > events])


@torch.no_grad()
def measure(
    model: RecGRELA,
    test: Targets,
    users: np.ndarray,
    events: int,
    conversions: tuple[int, ...] = CONVERSIONS,
) -> dict[str, object]:
    """Every format and number of conversions over the last `events` items of some users."""
    histories = [np.asarray(test.history(i), dtype=np.int64) for i in users]
    last = torch.from_numpy(np.stack([row[len(row) - events :] for row in histories]))
    early = [row[: len(row) - events] for row in histories]
    bounds = torch.from_numpy(np.cumsum([0, *map(len, early)]))
    start = model.prefill_packed(torch.from_numpy(np.concatenate(early)), bounds)
    exact = follow(model, start, last, None, 0)
    targets = torch.from_numpy(test.target_items[users].astype(np.int64))
    rows: dict[str, object] = {
        "users": len(users),
        "events": events,
        "ndcg@10": ndcg(model, exact, histories, targets),
        "formats": {},
    }
    for name in FORMATS:
        table = []
        for count in conversions:
            hidden = follow(model, start, last, name, count)
            error = (hidden - exact).norm(dim=1) / exact.norm(dim=1)
            table.append(
                {
                    "conversions": count,
                    "mean_error": float(error.mean()),
                    "largest_error": float(error.max()),
                    "ndcg@10": ndcg(model, hidden, histories, targets),
                }
            )
            print(name, table[-1], flush=True)
        rows["formats"][name] = table  # type: ignore[index]
    return rows


def follow(
    model: RecGRELA, start: UserState, items: Tensor, form: str | None, conversions: int
) -> Tensor:
    """Hidden states after items [B, events], the state converted before some of them."""
    state, events = start.clone(), items.shape[1]
    before = {events - 1 - round(i * events / conversions) for i in range(conversions)}
    users = np.arange(len(state))
    for t in range(events):
        if t in before:
            # one user in use: all but that one are converted
            store = UserStateStore(model, len(state) + 1, form or "float32", active=1)
            store.put([*users, -1], UserState.cat([state, state[:1]]))
            state = store.lookup(users).state
        model.step(items[:, t], state)
    return state.hidden


def ndcg(model: RecGRELA, hidden: Tensor, histories: list[np.ndarray], targets: Tensor) -> float:
    """NDCG@10, the rank pessimistic, seen items and the padding row left out."""
    total = 0.0
    for begin in range(0, len(hidden), 512):
        users = slice(begin, begin + 512)
        scores = model.scores(hidden[users])
        own = scores.gather(1, targets[users, None])
        for row, history in zip(scores, histories[users], strict=True):
            row[torch.from_numpy(history)] = -torch.inf
        scores.scatter_(1, targets[users, None], own)
        rank = (scores >= own).sum(1)
        total += float((1 / torch.log2(rank + 1.0))[rank <= 10].sum())
    return total / len(hidden)


if __name__ == "__main__":
    main()
