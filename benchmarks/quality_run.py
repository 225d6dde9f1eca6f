"""One run of a quality queue, in a process of its own; quality.py starts it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.item_knn import ItemKNN
from benchmarks.quality import COUNTING, Run, note
from recgrela_ext import Interactions, RecGRELA, RecGRELAConfig, Sequences, evaluate, fit
from recgrela_ext.evaluation import write_result
from recgrela_ext.evaluation.baselines import Markov, Popularity
from recgrela_ext.evaluation.ranking import rank_targets
from recgrela_ext.training import TrainConfig


def build(run: Run, train: Sequences) -> Any:
    """The run's model before training, or a scorer that only counts.

    Raises:
        ValueError: no such model.
    """
    counting = {"Popularity": Popularity, "Markov": Markov, "ItemKNN": ItemKNN}
    if run.model in counting:
        return counting[run.model](train, **run.config)
    torch.manual_seed(run.seed)
    if run.model == "RecGRELA":
        return RecGRELA(RecGRELAConfig(n_items=train.n_items, **run.config))
    if run.model == "RecGRELA-paper":
        return RecGRELA(RecGRELAConfig.paper(n_items=train.n_items, **run.config))
    from benchmarks.peer_models import PEERS, PeerConfig

    if run.model not in PEERS:
        known = ", ".join(["RecGRELA", "RecGRELA-paper", *COUNTING, *PEERS])
        raise ValueError(f"quality: model must be one of {known}, got {run.model}")
    return PEERS[run.model](PeerConfig(n_items=train.n_items, **run.config))


def perform(run: Run, data: Path, work: Path, results: Path) -> None:
    """Trains, ranks, writes the result and its line in the log."""
    log = Interactions.from_file(data / run.data, order=run.order, progress=False)
    train, valid, test = log.leave_one_out()
    if test.target_sha256 != run.target_sha256:
        raise SystemExit(
            f"quality: {run.data}, order {run.order}, must have targets with sha256 "
            f"{run.target_sha256[:12]}, got {test.target_sha256[:12]}: its figures are of "
            "another test"
        )
    model = build(run, train)
    facts: dict[str, Any] = {}
    if run.model not in COUNTING:
        config = TrainConfig(seed=run.seed, **run.train)
        done = fit(model, train, valid, config=config, checkpoint_dir=work, **run.limits)
        facts = {"epochs": done.epochs, "best_epoch": done.best_epoch, "stopped": done.stopped,
                 "training_seconds": done.seconds, "targets_seen": done.targets,
                 "parameters": sum(p.numel() for p in model.parameters())}  # fmt: skip
    checked, result = (
        evaluate(model, targets, k=(5, 10), baselines={}, model_seed=run.seed)
        for targets in (valid, test)
    )
    ranks = rank_targets(model, test)
    result.update(model=run.model, label=run.label, setting=run.setting, valid=checked["mean"],
                  config=run.config, train=run.train, limits=run.limits, **facts)  # fmt: skip
    results.mkdir(parents=True, exist_ok=True)
    part = results / f"{run.name}.npz.part"
    with part.open("wb") as file:
        np.savez_compressed(
            file,
            user=test.user.astype(np.int32),
            seen_included=ranks.seen_included.astype(np.int32),
            seen_excluded=ranks.seen_excluded.astype(np.int32),
        )
    part.replace(results / f"{run.name}.npz")
    write_result(result, results / f"{run.name}.json")  # last: a run with this file is done
    told = {f"{view}/ndcg@10": result["mean"][f"{view}/ndcg@10"]
            for view in ("seen_included", "seen_excluded")}  # fmt: skip
    note(results, run, "done", valid=checked["mean"]["seen_included/ndcg@10"], test=told, **facts)
    print("  " + ", ".join(f"{name} {value:.4f}" for name, value in told.items()), flush=True)


def main() -> None:
    order = json.loads(sys.argv[1])
    torch.set_num_threads(order["threads"])
    perform(Run(**order["run"]), *(Path(order[name]) for name in ("data", "work", "results")))


if __name__ == "__main__":
    main()
