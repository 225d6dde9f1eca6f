"""RecGRELA beside a framework's own SASRec, both trained in that framework, on the same targets.

    build/integrations/recbole/bin/python benchmarks/stacks.py --stack recbole --data ml-100k.inter

Each model is trained with every learning rate and seed; the rate with the best mean NDCG@10 on
validation is the one whose test figures count. No early stopping: the last epoch's weights are
evaluated. Ranking is `recgrela_ext.evaluate`, the same for both. After every run the result file
is rewritten, and a command given again does what is missing in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import os
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from stack_trainers import DEFAULTS, PACKAGES, TRAINERS, Settings

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


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Per model the learning rate chosen on validation, its mean test figures and epoch time."""
    told = {}
    for model in MODELS:
        rates: dict[float, list[dict[str, Any]]] = {}
        for one in runs:
            if one["model"] == model:
                rates.setdefault(one["lr"], []).append(one)
        if not rates:
            continue

        def on_validation(lr: float, rates: Any = rates) -> float:
            return statistics.mean(one["valid"]["seen_included/ndcg@10"] for one in rates[lr])

        chosen = rates[max(rates, key=on_validation)]
        names = chosen[0]["test"]
        told[model] = {
            "lr": chosen[0]["lr"],
            "seeds": [one["seed"] for one in chosen],
            "test": {n: statistics.mean(one["test"][n] for one in chosen) for n in names},
            "seconds_per_epoch": statistics.median(
                second for one in chosen for second in one["epoch_seconds"]
            ),
        }
    return told


def write(path: Path, result: dict[str, Any]) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def main() -> None:
    options = read_options()
    torch.set_num_threads(options.threads)
    path = options.out or ROOT / "benchmarks" / "results" / f"stacks-{options.stack}.json"
    with open(f"{path}.lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"another process is writing {path}")
        splits = Interactions.from_file(options.data).leave_one_out()
        result = begin(options, path, splits[2].target_sha256)
        done = {(one["model"], one["lr"], one["seed"]) for one in result["runs"]}
        grid = [(m, lr, s) for s in options.seeds for lr in options.lrs for m in MODELS]
        for number, one in enumerate(grid, start=1):
            if one in done:
                continue
            found = run(options, splits, *one)
            result["runs"].append(found)
            result["best"] = summary(result["runs"])
            write(path, result)
            test, seconds = found["test"], statistics.median(found["epoch_seconds"])
            print(
                f"{number}/{len(grid)} {one[0]} lr {one[1]} seed {one[2]}: "
                f"hr@10 {test['seen_included/hit@10']:.4f} "
                f"ndcg@10 {test['seen_included/ndcg@10']:.4f} {seconds:.1f} s/epoch",
                flush=True,
            )
    Path(f"{path}.lock").unlink()


if __name__ == "__main__":
    main()
