"""NDCG@10 of every model of `python -m benchmarks memory`, trained alike on ml-100k.

Leave-one-out, ties in time in hashed order; width 64, equal parameters, softmax over all items at
every position, dropout 0.2, AdamW on 1,000 targets a step, ten epochs, the rate falling linearly
over the second half, the best of five evaluations by validation NDCG@10. The rate is chosen from
`RATES` on validation with seed 0; the other seeds use it. `LIMITS`: two models take so long that
they get less. Ours is also evaluated as it is served: from states that followed every event, the
last conversion to a format at rest just before the last event.

    python -m benchmarks.memory_quality --work DIR     # trains what DIR lacks

`python -m benchmarks memory --part quality --work DIR` then takes up what is done.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import peers
from benchmarks.peer_models import PEERS, PeerConfig
from recgrela_ext import Interactions, RecGRELA, RecGRELAConfig, UserStateStore, evaluate, fit
from recgrela_ext.training.config import TrainConfig

RATES, SEEDS = (3e-3, 1e-3), (0, 1, 2)
DROPOUT, EPOCHS = 0.2, 10
RECIPE = {
    "targets_per_step": 1000,
    "schedule": "linear",
    "decay": 0.5,
    "eval_every": 2,
    "patience": None,
}
OURS, PUBLISHED = "RecGRELA", "RecGRELA, published"
MODELS = (OURS, "SASRec", "GRU4Rec", "LRURec", "Mamba", PUBLISHED)
FORMATS = ("float32", "bfloat16", "float16", "int8")
LIMITS: dict[str, dict[str, Any]] = {
    "Mamba": {"fit": {"epochs": 4}, "rates": (3e-3,), "seeds": (0,)},
    PUBLISHED: {
        "fit": {"steps": 150},
        "rates": (1e-3,),
        "seeds": (0,),
        "config": {"targets_per_step": 256},
    },
}
METRICS = ("seen_included/ndcg@10", "seen_excluded/ndcg@10")


class Data:
    """The splits of ml-100k below RECGRELA_DATA, read when first asked for."""

    def __init__(self, order: str = "hash") -> None:
        folder = os.environ.get("RECGRELA_DATA")
        if not folder:
            raise peers.Missing("RECGRELA_DATA must name a folder that holds ml-100k")
        log = Interactions.from_file(Path(folder) / "ml-100k", order=order, progress=False)
        self.train, self.valid, self.test = log.leave_one_out()


def build(name: str, n_items: int, dropout: float = 0.0, length: int = 200) -> Any:
    """A fresh model; Missing where its package is."""
    if name == OURS:
        options = {"dropout": dropout, "drop_path": 0.0, "max_seq_len": length}
        return RecGRELA(RecGRELAConfig(n_items=n_items, **options))  # type: ignore[arg-type]
    if name == PUBLISHED:
        options = {"dropout": dropout, "max_seq_len": length}
        return RecGRELA(RecGRELAConfig.paper(n_items=n_items, **options))
    return PEERS[name](PeerConfig(n_items, length, dropout))


def train(work: Path, models: Sequence[str], told: Callable[[str], None]) -> None:
    """Seed 0 of all models at one rate after the other, then the other seeds at the best rate."""
    torch.set_num_threads(1)
    data = Data()
    for rate in RATES:
        for name in models:
            if rate in _of(name, "rates", RATES):
                trained(name, rate, SEEDS[0], data, work, told)
    for seed in SEEDS[1:]:
        for name in models:
            if seed in _of(name, "seeds", SEEDS):
                trained(name, collect(work, name)["rate"], seed, data, work, told)


def _of(name: str, what: str, default: Any) -> Any:
    return LIMITS.get(name, {}).get(what, default)


def collect(work: Path, name: str) -> dict[str, Any]:
    """The best rate of a model among the runs that are done, and their results; Missing without."""
    tried = {rate: _read(work, name, rate, SEEDS[0]) for rate in _of(name, "rates", RATES)}
    done = {rate: result for rate, result in tried.items() if result}
    if not done:
        raise peers.Missing("not trained")
    best = max(done, key=lambda rate: float(done[rate]["valid"]))
    found = {seed: _read(work, name, best, seed) for seed in SEEDS}
    return {
        "rate": best,
        "valid_by_rate": {str(rate): result["valid"] for rate, result in done.items()},
        "limit": _of(name, "fit", {"epochs": EPOCHS}),
        "seeds": [seed for seed, result in found.items() if result],
        "per_seed": [result for result in found.values() if result],
    }


def _folder(work: Path, name: str, rate: float, seed: int) -> Path:
    return work / f"{name.replace(', ', '-').lower()}-{rate:g}-{seed}"


def _read(work: Path, name: str, rate: float, seed: int) -> dict[str, Any]:
    """Empty where the run is not done."""
    path = _folder(work, name, rate, seed) / "result.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def trained(
    name: str, rate: float, seed: int, data: Data, work: Path, told: Callable[[str], None]
) -> dict[str, Any]:
    """The result of one run, from the work folder where it is there."""
    done = _read(work, name, rate, seed)
    if done:
        return done
    folder = _folder(work, name, rate, seed)
    told(f"{name}, rate {rate:g}, seed {seed}")
    torch.manual_seed(seed)
    model = build(name, data.train.n_items, DROPOUT)
    config = TrainConfig(lr=rate, seed=seed, **{**RECIPE, **_of(name, "config", {})})
    until = _of(name, "fit", {"epochs": EPOCHS})
    fitted = fit(
        model, data.train, data.valid, config=config, checkpoint_dir=folder / "run",
        progress=False, **until,
    )  # fmt: skip
    save_file(model.state_dict(), str(folder / "model.safetensors"))
    facts: dict[str, Any] = {
        "valid": fitted.best_metric,
        "epochs": fitted.epochs,
        "steps": fitted.steps,
        "best_epoch": fitted.best_epoch,
        "stopped": fitted.stopped,
        "seconds": round(fitted.seconds, 1),
        "target_sha256": data.test.target_sha256,
        "test": _metrics(model, data),
    }
    if name == OURS:
        facts["served"] = {form: _metrics(Served(model, form), data) for form in FORMATS}
    (folder / "result.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def load(name: str, rate: float, seed: int, n_items: int, work: Path) -> Any:
    """The model of a run that is done."""
    model = build(name, n_items, DROPOUT)
    folder = _folder(work, name, rate, seed)
    model.load_state_dict(load_file(str(folder / "model.safetensors")))
    return model.eval()


def _metrics(model: Any, data: Data) -> dict[str, float]:
    result = evaluate(model, data.test, k=(10,), baselines={}, bootstrap=0, progress=False)
    return {name: result["mean"][name] for name in METRICS}


class Served:
    """A scorer that ranks from states: whole histories are followed, the state rests in `form`
    before the last event arrives."""

    def __init__(self, model: RecGRELA, form: str) -> None:
        self.model, self.form = model.eval(), form

    @torch.no_grad()
    def score(self, histories: Sequence[np.ndarray]) -> Tensor:
        rows = [np.asarray(row, dtype=np.int64) for row in histories]
        users = np.arange(len(rows))
        store = UserStateStore(self.model, len(rows) + 1, self.form, active=1)
        store.rebuild(users, [row[:-1] for row in rows])
        store.rebuild([len(rows)], [rows[0]])  # the one active place: all others are at rest
        state = store.lookup(users).state
        self.model.step(torch.from_numpy(np.array([row[-1] for row in rows])), state)
        return self.model.scores(state.hidden)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    options = parser.parse_args()
    train(options.work, options.models, lambda text: print(text, flush=True))


if __name__ == "__main__":
    main()
