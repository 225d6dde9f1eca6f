"""NDCG@10 of every model of `python -m benchmarks memory`, trained alike on ml-100k.

Leave-one-out, ties in time in hashed order; width 64, equal parameters, softmax over all items at
every position, dropout 0.2, AdamW on 1,000 targets a step, at most 25 epochs, the best by validation
NDCG@10, ended after three epochs without a better one. The rate is chosen from `RATES` on validation
with seed 0; all seeds then use it. Two models are trained less, because they take that much longer: `LIMITS` says
what they got. Ours is also evaluated as it is served: from states that followed every event, the
last conversion to a format at rest just before the last event.

A run keeps its checkpoints and results in a work folder, and goes on from there.
"""

from __future__ import annotations

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

RATES, SEEDS = (1e-3, 3e-3), (0, 1, 2)
DROPOUT, EPOCHS, PATIENCE, TARGETS = 0.2, 25, 3, 1000
OURS, PUBLISHED = "RecGRELA", "RecGRELA, published"
MODELS = (OURS, "SASRec", "GRU4Rec", "LRURec", "Mamba", PUBLISHED)
FORMATS = ("float32", "bfloat16", "float16", "int8")
LIMITS: dict[str, dict[str, Any]] = {
    "Mamba": {"fit": {"epochs": 6}, "rates": (3e-3,), "seeds": (0,)},
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


def run(
    work: Path, models: Sequence[str], seeds: Sequence[int], told: Callable[[str], None]
) -> dict[str, Any]:
    """Trains what the work folder lacks, one seed of all models after the other; per model the
    results of its seeds."""
    torch.set_num_threads(1)
    data = Data()
    found: dict[str, Any] = {}
    for seed in seeds:
        for name in models:
            try:
                _one_seed(name, seed, data, work, told, found)
            except peers.Missing as missing:
                found[name] = {"missing": str(missing)}
    return found


def _one_seed(
    name: str, seed: int, data: Data, work: Path, told: Callable[[str], None], found: dict[str, Any]
) -> None:
    """Adds to `found[name]`; its first seed chooses the rate."""
    limits = LIMITS.get(name, {})
    if seed not in limits.get("seeds", SEEDS):
        return
    if name not in found:
        rates = limits.get("rates", RATES)
        tried = {rate: trained(name, rate, seed, data, work, told)["valid"] for rate in rates}
        best = max(tried, key=tried.__getitem__)
        by_rate = {str(rate): valid for rate, valid in tried.items()}
        found[name] = {"rate": best, "valid_by_rate": by_rate, "limit": limits.get("fit")}
        found[name] |= {"seeds": [], "per_seed": []}
    result = trained(name, found[name]["rate"], seed, data, work, told)
    found[name]["seeds"].append(seed)
    found[name]["per_seed"].append(result)


def trained(
    name: str, rate: float, seed: int, data: Data, work: Path, told: Callable[[str], None]
) -> dict[str, Any]:
    """The result of one run, from the work folder where it is there."""
    folder = work / f"{name.replace(', ', '-').lower()}-{rate:g}-{seed}"
    result = folder / "result.json"
    if result.exists():
        return dict(json.loads(result.read_text(encoding="utf-8")))
    told(f"{name}, rate {rate:g}, seed {seed}")
    torch.manual_seed(seed)
    model = build(name, data.train.n_items, DROPOUT)
    limits = LIMITS.get(name, {})
    recipe = {"targets_per_step": TARGETS, "patience": PATIENCE, **limits.get("config", {})}
    config = TrainConfig(lr=rate, seed=seed, **recipe)
    until = limits.get("fit", {"epochs": EPOCHS})
    done = fit(
        model, data.train, data.valid, config=config, checkpoint_dir=folder / "run",
        progress=False, **until,
    )  # fmt: skip
    save_file(model.state_dict(), str(folder / "model.safetensors"))
    facts: dict[str, Any] = {
        "valid": done.best_metric,
        "epochs": done.epochs,
        "steps": done.steps,
        "best_epoch": done.best_epoch,
        "stopped": done.stopped,
        "seconds": round(done.seconds, 1),
        "target_sha256": data.test.target_sha256,
        "test": _metrics(model, data),
    }
    if name == OURS:
        facts["served"] = {form: _metrics(Served(model, form), data) for form in FORMATS}
    result.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def load(name: str, rate: float, seed: int, n_items: int, work: Path) -> Any:
    """The model of a run that is done."""
    model = build(name, n_items, DROPOUT)
    folder = work / f"{name.replace(', ', '-').lower()}-{rate:g}-{seed}"
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
