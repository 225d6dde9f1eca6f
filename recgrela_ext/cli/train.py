"""``recgrela train``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recgrela_ext.cli.reading import Reading, prepare_file, progress_of, use_machine

if TYPE_CHECKING:
    from recgrela_ext import RecGRELA, RecGRELAConfig, Sequences, Targets
    from recgrela_ext.training import FitResult, TrainConfig

CHECKPOINTS = "checkpoints"
_MODEL = (
    "hidden_size",
    "num_layers",
    "num_heads",
    "max_seq_len",
    "dropout",
    "drop_path",
    "repeat_bias",
)
_RECIPE = (
    "lr",
    "weight_decay",
    "schedule",
    "decay",
    "warmup_steps",
    "clip",
    "ema",
    "targets_per_step",
    "loss",
    "num_negatives",
    "amp",
    "seed",
    "deterministic",
    "metric",
    "eval_every",
)


def run(options: argparse.Namespace) -> None:
    """Read, split, train on the training part alone, save, validate."""
    from recgrela_ext import fit

    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    prepare_file(options.json, out, options.data)
    device, progress = use_machine(options), progress_of(options)
    recipe = _recipe(options)
    options.repeat_bias = _repeat_bias(options, recipe)
    reading = Reading.from_options(options)
    train, valid, test = reading.splits(progress)
    model = _model(options, train, recipe, device).to(device)
    print(_describe(model, train, valid, test), flush=True)
    checkpoints = out / CHECKPOINTS
    try:
        result = fit(
            model,
            train,
            valid if len(valid) else None,
            epochs=options.epochs,
            steps=options.steps,
            minutes=options.minutes,
            config=recipe,
            checkpoint_dir=checkpoints,
            resume=options.resume,
            progress=progress,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_where_to_go_on(checkpoints)) from None
    model.save_pretrained(out)
    reading.with_targets(valid, test).save(out)
    print(_summary(result, out), flush=True)
    if len(valid):
        _validate(options, model, train, valid, result)
    else:
        print("no validation: no user has three events")


def _recipe(options: argparse.Namespace) -> TrainConfig:
    from recgrela_ext import TrainConfig

    given = {name: getattr(options, name) for name in _RECIPE}
    given = {name: value for name, value in given.items() if value is not None}
    if options.patience is not None:
        given["patience"] = options.patience or None
    return TrainConfig(**given)


def _repeat_bias(options: argparse.Namespace, recipe: TrainConfig) -> bool:
    """What was asked for; else yes, where it can be trained."""
    possible = not options.paper and recipe.loss == "softmax"
    if options.repeat_bias and not possible:
        got = "--paper" if options.paper else f"--loss {recipe.loss}"
        raise ValueError(
            f"train: --repeat-bias must come with the causal model and --loss softmax, got {got}"
        )
    return possible if options.repeat_bias is None else options.repeat_bias


def _model(
    options: argparse.Namespace, train: Sequences, recipe: TrainConfig, device: str
) -> RecGRELA:
    import torch

    from recgrela_ext import RecGRELA, RecGRELAConfig

    given = {name: getattr(options, name) for name in _MODEL}
    given = {name: value for name, value in given.items() if value is not None}
    facts = {"repeat_share": train.repeat_share, **given}
    make = RecGRELAConfig.paper if options.paper else RecGRELAConfig
    config = make(train.n_items, **facts)
    _check_memory(config, recipe, device, int(train.lengths.max()))
    torch.manual_seed(options.seed)  # the initial weights
    model = RecGRELA(config)
    model.id_map = train.id_map
    return model


def _check_memory(config: RecGRELAConfig, recipe: TrainConfig, device: str, longest: int) -> None:
    """The system kills a process that takes more than there is, and says nothing.

    `longest`: items of the longest history.
    """
    from recgrela_ext._library import KERNEL_DEVICES
    from recgrela_ext.model.losses import enough_rows

    try:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return
    needed = _weights_nbytes(config.replace(num_layers=1))
    if config.num_layers > 1:  # all of them would take minutes
        needed += (config.num_layers - 1) * (_weights_nbytes(config.replace(num_layers=2)) - needed)
    what = ["weights"]
    if device.startswith("cpu"):
        needed *= 4
        what += ["gradients", "Adam's averages"]
        if recipe.loss == "sampled":
            needed += 4 * recipe.targets_per_step * recipe.num_negatives
            what.append("scores of the negatives")
        if config.repeat_bias:
            window = min(config.max_seq_len, longest)
            positions = max(window, min(recipe.targets_per_step, recipe.positions_per_pass))
            before = window // 2  # a position, on average
            listed = 0
            if "cpu" not in KERNEL_DEVICES:
                listed = 48 * positions * before
            elif recipe.amp == "bfloat16" or not enough_rows(positions, config.rows):
                listed = 30 * positions * min(before, config.rows)  # distinct items alone
            if listed:
                needed += listed
                what.append("what each position has met (--no-repeat-bias spares it)")
    if needed > there:
        raise ValueError(
            f"train: the model must fit in this machine's memory of {there / 2**30:,.1f} GiB, got "
            f"{needed / 2**30:,.1f} GiB of {', '.join(what)}"
        )


def _weights_nbytes(config: RecGRELAConfig) -> int:
    import torch

    from recgrela_ext import RecGRELA

    with torch.device("meta"):
        weights = RecGRELA(config).parameters()
    return sum(weight.numel() * weight.element_size() for weight in weights)


def _describe(model: RecGRELA, train: Sequences, valid: Targets, test: Targets) -> str:
    config = model.config
    parameters = sum(p.numel() for p in model.parameters())
    return (
        f"{train.name}: {len(train):,} users, {train.num_items:,} items, "
        f"{len(train.items):,} training events, {len(valid):,} validation and {len(test):,} test "
        f"targets, order {train.order}\n"
        f"model: {config.variant}, {config.num_layers} layers of {config.hidden_size} with "
        f"{config.num_heads} heads, {parameters:,} parameters"
    )


def _summary(result: FitResult, out: Path) -> str:
    best = ""
    if result.best_metric is not None:
        best = f", best {result.best_metric:.4f} after epoch {result.best_epoch}"
    speed = result.targets / max(result.seconds, 1e-9)
    return (
        f"trained {result.epochs} epochs, {result.steps:,} steps in {result.seconds / 60:.1f} "
        f"minutes ({speed:,.0f} targets a second), ended by {result.stopped}{best}\n"
        f"saved in {out}\n"
    )


def _validate(
    options: argparse.Namespace,
    model: RecGRELA,
    train: Sequences,
    valid: Targets,
    result: FitResult,
) -> None:
    from recgrela_ext import evaluate
    from recgrela_ext.evaluation import format_table, write_result

    found: dict[str, Any] = evaluate(
        model, valid, baselines=train, model_seed=options.seed, progress=progress_of(options)
    )
    print(format_table(found))
    if options.json is None:
        return
    found["training"] = {
        "epochs": result.epochs,
        "steps": result.steps,
        "targets": result.targets,
        "seconds": result.seconds,
        "stopped": result.stopped,
        "best_epoch": result.best_epoch,
        "best_step": result.best_step,
    }
    write_result(found, options.json)


def _where_to_go_on(checkpoints: Path) -> str:
    from recgrela_ext.training.checkpoint import CheckpointFolder

    steps = CheckpointFolder(checkpoints).steps()
    if not steps:
        return f"interrupted before the first checkpoint in {checkpoints}"
    return (
        f"interrupted; the checkpoint of step {steps[-1]} is in {checkpoints}, "
        "the same command goes on from there"
    )
