r"""RecGRELA beside a framework's own SASRec, both trained in that framework, on the same targets.

    PYTHONPATH=. build/integrations/recbole/bin/python -m benchmarks.stacks --stack recbole \
        --data ml-100k.inter

Each model is trained with every learning rate under the first seed; the rate with the best NDCG@10
on validation is then trained under the other seeds, and its test figures are averaged. No early
stopping: the last epoch's weights are evaluated. Ranking is `recgrela_ext.evaluate`, the same for
both. After every run the result file is rewritten, and a command given again does what is missing.
`--time` then takes the seconds of an epoch on their own, the models in turn: one thread by its
processor time, several by the clock on the wall, which wants a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.stack_trainers import DEFAULTS, PACKAGES, TRAINERS, Settings
from benchmarks.store import write_json
from recgrela_ext import evaluate
from recgrela_ext.data import Interactions
from recgrela_ext.evaluation.result import machine_info

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("RecGRELA", "SASRec")
METRICS = ("hit@10", "ndcg@10")


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stack", choices=sorted(TRAINERS), required=True)
    parser.add_argument("--data", required=True, help="a log that `Interactions` reads")
    parser.add_argument("--lrs", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--time", action="store_true", help="time the epochs; needs all the runs")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/stacks-STACK.json")
    for field in dataclasses.fields(Settings):
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=type(field.default), help=f"default {field.default}")
    return parser.parse_args(arguments)


def settings_of(options: argparse.Namespace) -> Settings:
    """What was asked for, then the framework's defaults, then those of `Settings`."""
    asked = {f.name: getattr(options, f.name) for f in dataclasses.fields(Settings)}
    given = {name: value for name, value in asked.items() if value is not None}
    return Settings(**{**DEFAULTS[options.stack], **given})


def begin(options: argparse.Namespace, path: Path, sha256: str) -> dict[str, Any]:
    """The result file's content, or a new one; exits when it holds another comparison."""
    about = {
        "comparison": options.stack,
        "data": Path(options.data).stem,
        "target_sha256": sha256,
        "settings": dataclasses.asdict(settings_of(options)),
        "versions": {name: version(name) for name in ("torch", PACKAGES[options.stack])},
        "loss": "softmax over all items",
        "machine": {**machine_info(), "threads": options.threads},
    }
    if not path.exists():
        return {**about, "runs": []}
    found = json.loads(path.read_text(encoding="utf-8"))
    for name, value in about.items():
        if found.get(name) != value:
            sys.exit(
                f"{path} must hold {name} {value}, got {found.get(name)}: choose another --out"
            )
    return found


def run(options: argparse.Namespace, splits: Any, model: str, lr: float, seed: int) -> dict:
    train, valid, test = splits
    settings = settings_of(options)
    scorer, seconds = TRAINERS[options.stack](train, model == "RecGRELA", settings, lr, seed)
    figures = {}
    for name, targets in (("valid", valid), ("test", test)):
        mean = evaluate(scorer, targets, baselines={}, bootstrap=0, progress=False)["mean"]
        figures[name] = {f"{view}/{metric}": mean[f"{view}/{metric}"]
                         for view in ("seen_included", "seen_excluded")
                         for metric in METRICS}  # fmt: skip
    return {"model": model, "lr": lr, "seed": seed, **figures, "epoch_seconds": seconds}


def chosen_rate(runs: list[dict[str, Any]], model: str, seed: int) -> float:
    """The learning rate with the best NDCG@10 on validation, by the first seed."""
    tried = [one for one in runs if (one["model"], one["seed"]) == (model, seed)]
    return max(tried, key=lambda one: one["valid"]["seen_included/ndcg@10"])["lr"]


def summary(runs: list[dict[str, Any]], first_seed: int) -> dict[str, Any]:
    """Per model the chosen learning rate and its mean test figures."""
    told = {}
    for model in sorted({one["model"] for one in runs}):
        lr = chosen_rate(runs, model, first_seed)
        chosen = [one for one in runs if (one["model"], one["lr"]) == (model, lr)]
        told[model] = {
            "lr": lr,
            "seeds": [one["seed"] for one in chosen],
            "test": {
                name: statistics.mean(one["test"][name] for one in chosen)
                for name in chosen[0]["test"]
            },
        }
    return told


def epoch_seconds(options: argparse.Namespace, train: Any) -> dict[str, Any]:
    """The median of three epochs' seconds by model, and the clock they were read from."""
    settings = dataclasses.replace(settings_of(options), epochs=1)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    taken: dict[str, list[float]] = {model: [] for model in MODELS}
    for _ in range(3):
        for model in MODELS:
            _, seconds = TRAINERS[options.stack](
                train, model == "RecGRELA", settings, options.lrs[0], 0, clock
            )
            taken[model] += seconds
            print(f"{model}: an epoch in {seconds[0]:.1f} s", flush=True)
    medians = {model: statistics.median(seconds) for model, seconds in taken.items()}
    return {**medians, "clock": clock.__name__}


def main() -> None:
    options = read_options()
    torch.set_num_threads(options.threads)
    path = options.out or ROOT / "benchmarks" / "results" / f"stacks-{options.stack}.json"
    with open(options.data, "rb") as lock:  # one process at a time: they would share the cores
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"another comparison on {options.data} is running: start it when that is done")
        splits = Interactions.from_file(options.data).leave_one_out()
        result = begin(options, path, splits[2].target_sha256)
        first, *others = options.seeds

        def do(model: str, lr: float, seed: int) -> None:
            if any((o["model"], o["lr"], o["seed"]) == (model, lr, seed) for o in result["runs"]):
                return
            found = run(options, splits, model, lr, seed)
            result["runs"].append(found)
            write_json(path, result)
            test, seconds = found["test"], statistics.median(found["epoch_seconds"])
            print(
                f"{len(result['runs'])}: {model} lr {lr} seed {seed}: "
                f"hr@10 {test['seen_included/hit@10']:.4f} "
                f"ndcg@10 {test['seen_included/ndcg@10']:.4f} {seconds:.1f} s/epoch",
                flush=True,
            )

        # In turn, so that both models meet the same other work on the machine.
        for lr in options.lrs:
            for model in MODELS:
                do(model, lr, first)
        for seed in others:
            for model in MODELS:
                do(model, chosen_rate(result["runs"], model, first), seed)
        result["best"] = summary(result["runs"], first)
        if options.time:
            result["seconds_per_epoch"] = epoch_seconds(options, splits[0])
        write_json(path, result)


if __name__ == "__main__":
    main()
