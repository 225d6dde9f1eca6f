"""One run of a quality queue, in a process of its own; quality.py starts it."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import feature_ranks, machine
from benchmarks.item_knn import ItemKNN
from benchmarks.peer_models import PeerConfig
from benchmarks.quality import note
from benchmarks.quality_peers import PEERS
from benchmarks.quality_queue import COUNTING, Run
from benchmarks.repeat_bias import WithRepeatBias
from recgrela_ext import Interactions, RecGRELA, RecGRELAConfig, Sequences, Targets, evaluate, fit
from recgrela_ext.evaluation import write_result
from recgrela_ext.evaluation.baselines import Markov, Popularity
from recgrela_ext.evaluation.ranking import Ranks, rank_targets
from recgrela_ext.training import TrainConfig


def build(run: Run, train: Sequences) -> Any:
    """The run's model before training, or a scorer that only counts.

    `repeat_bias` in its config: with the bias of benchmarks/repeat_bias.py.

    Raises:
        ValueError: no such model.
    """
    counting = {"Popularity": Popularity, "Markov": Markov, "ItemKNN": ItemKNN}
    if run.model in counting:
        return counting[run.model](train, **run.config)
    torch.manual_seed(run.seed)
    options = {name: value for name, value in run.config.items() if name != "repeat_bias"}
    model = _model(run.model, train.n_items, options)
    return WithRepeatBias(model) if run.config.get("repeat_bias") else model


def _model(name: str, n_items: int, options: dict[str, Any]) -> Any:
    if name == "RecGRELA":
        return RecGRELA(RecGRELAConfig(n_items=n_items, **options))
    if name == "RecGRELA-paper":
        return RecGRELA(RecGRELAConfig.paper(n_items=n_items, **options))
    if name not in PEERS:
        known = ", ".join(["RecGRELA", "RecGRELA-paper", *COUNTING, *PEERS])
        raise ValueError(f"quality: model must be one of {known}, got {name}")
    shared = {field.name for field in fields(PeerConfig)}
    config = PeerConfig(n_items, **{k: v for k, v in options.items() if k in shared})
    return PEERS[name](config, **{k: v for k, v in options.items() if k not in shared})


def perform(run: Run, data: Path, work: Path, results: Path) -> None:
    """Trains, ranks, writes the result and its line in the log."""
    log = Interactions.from_file(data / run.data, order=run.order, progress=False)
    split = log.split_by_time() if run.split == "time" else log.leave_one_out()
    train, valid, test = split
    if run.target_sha256 and test.target_sha256 != run.target_sha256:
        raise SystemExit(
            f"quality: {run.data}, order {run.order}, must have targets with sha256 "
            f"{run.target_sha256[:12]}, got {test.target_sha256[:12]}: its figures are of "
            "another test"
        )
    histories = feature_ranks.histories_of(train, run.rank_users)
    model = build(run, train)
    commit = machine.commit()  # now: it may be another when the training ends
    facts: dict[str, Any] = {}
    curve: list[dict[str, float]] = []
    if run.model not in COUNTING:
        config = TrainConfig(seed=run.seed, **run.train)
        done = fit(model, train, valid, config=config, checkpoint_dir=work, **run.limits)
        facts = {"epochs": done.epochs, "best_epoch": done.best_epoch, "stopped": done.stopped,
                 "training_seconds": done.seconds, "training_cpu_seconds": done.cpu_seconds,
                 "targets_seen": done.targets,
                 "parameters": sum(p.numel() for p in model.parameters())}  # fmt: skip
        curve = [_point(record) for record in done.history]
    checked, result = (
        evaluate(model, targets, k=(5, 10), baselines={}, model_seed=run.seed)
        for targets in (valid, test)
    )
    ranks = rank_targets(model, test)
    result.update(model=run.model, label=run.label, setting=run.setting, valid=checked["mean"],
                  config=run.config, train=run.train, limits=run.limits, curve=curve, commit=commit,
                  left_out=dict(test.dropped), **facts)  # fmt: skip
    if run.rank_users:
        result["feature_ranks"] = feature_ranks.measured(model, histories)
    results.mkdir(parents=True, exist_ok=True)
    save_ranks(results / f"{run.name}.npz", test, ranks)
    write_result(result, results / f"{run.name}.json")  # last: a run with this file is done
    told = {f"{view}/ndcg@10": result["mean"][f"{view}/ndcg@10"]
            for view in ("seen_included", "seen_excluded")}  # fmt: skip
    note(results, run, "done", valid=checked["mean"]["seen_included/ndcg@10"], test=told, **facts)
    print("  " + ", ".join(f"{name} {value:.4f}" for name, value in told.items()), flush=True)
    shutil.rmtree(work, ignore_errors=True)  # the checkpoints have served


def save_ranks(path: Path, test: Targets, ranks: Ranks) -> None:
    """Ranks up to 255, which stands for all beyond, in the targets' order; whose they are, where
    that is not one target for each user in turn; which are new to their users, where not all are.
    """
    arrays = {view: np.minimum(getattr(ranks, view), 255).astype(np.uint8)
              for view in ("seen_included", "seen_excluded")}  # fmt: skip
    if (np.diff(test.user) <= 0).any():
        arrays["user"] = test.user.astype(np.int32)
    new = [item not in test.history(i) for i, item in enumerate(test.target_items)]
    if not all(new):
        arrays["new"] = np.array(new)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    part.replace(path)


def _point(record: dict[str, Any]) -> dict[str, float]:
    """What is kept of an epoch."""
    kept = {name: record[name] for name in ("epoch", "loss", "cpu_seconds")}
    valid = record.get("valid", {})
    return kept | {n: valid[n] for n in valid if n.endswith("/ndcg@10")}


def main() -> None:
    order = json.loads(sys.argv[1])
    warnings.filterwarnings("ignore", message=".*tie in time")  # the queue names the order
    torch.set_num_threads(order["threads"])
    perform(Run(**order["run"]), *(Path(order[name]) for name in ("data", "work", "results")))


if __name__ == "__main__":
    main()
