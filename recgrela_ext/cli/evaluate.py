"""``recgrela evaluate``."""

from __future__ import annotations

import argparse

from recgrela_ext.cli.reading import (
    Reading,
    check_targets,
    load_model,
    prepare_file,
    progress_of,
    use_machine,
)


def run(options: argparse.Namespace) -> None:
    """Repeat the split of the training and rank its targets."""
    from recgrela_ext import evaluate
    from recgrela_ext.evaluation import format_table, write_result

    device, progress = use_machine(options), progress_of(options)
    model = load_model(options.model, device)
    reading = Reading.load(options.model).at(options.data)
    prepare_file(options.json, options.model, reading.data)
    train, valid, test = reading.splits(progress)
    targets = test if options.split == "test" else valid
    check_targets(reading, model, targets)
    if not len(targets):
        raise ValueError(f"evaluate: the {options.split} split must hold targets, got none")
    result = evaluate(
        model,
        targets,
        k=options.k,
        baselines=train,
        model_seed=reading.seed,
        progress=progress,
    )
    print(format_table(result))
    if options.json is not None:
        write_result(result, options.json)
