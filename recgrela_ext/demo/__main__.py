"""The demonstration behind ``make demo``."""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from recgrela_ext.cli.mistakes import exit_code
from recgrela_ext.cli.parser import Parser

SEED = 0
EVENTS = 10
SHARE_OF_ORACLE = 0.8
MODEL = {"num_layers": 2, "max_seq_len": 150}
RECIPE = {"lr": 3e-3, "schedule": "linear", "patience": None, "seed": SEED}


def main(argv: list[str] | None = None) -> int:
    """Run the demonstration; returns the exit code."""
    parser = Parser(prog="recgrela demo", description=__doc__)
    parser.add_argument("--data", metavar="FILE", help="real events; default: made-up ones")
    parser.add_argument("--minutes", type=float, default=2.0, help="of training, default 2")
    parser.add_argument("--out", default="demo", metavar="DIR", help="default demo")
    parser.add_argument("--users", type=int, default=1500, help="of the synthetic catalogue")
    return exit_code(partial(run, parser.parse_args(argv)))


def run(options: argparse.Namespace) -> None:
    """All sections, one after another."""
    from recgrela_ext.demo import sections

    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    log, oracle = _data(options)
    train, valid, test = log.leave_one_out()
    model = _train(options, train, valid)
    model.save_pretrained(out / "model")
    sections.compare(model, train, test, oracle, SHARE_OF_ORACLE)
    host, guest = sections.choose_users(train)
    sections.show_user(model, test, host)
    moves = sections.stream(model, test, host, guest, EVENTS)
    sections.heading("Picture")
    picture = out / "stream.png"
    try:
        from recgrela_ext.demo.picture import draw
    except ImportError:
        print("left out: it needs matplotlib, try: pip install matplotlib")
    else:
        draw(moves, picture)
        print(f"{picture}: the ranks of those items after every event")
    print(
        f"\nAll of it took {(time.perf_counter() - start) / 60:.1f} minutes. The model is in "
        f"{out / 'model'}; go on with\n  recgrela recommend --model {out / 'model'} --items "
        + ",".join(str(raw) for raw in train.id_map.item_ids[:3].tolist())
    )


def _data(options: argparse.Namespace) -> tuple[Any, Any]:
    from recgrela_ext.cli.reading import Reading
    from recgrela_ext.data.synthetic import make_synthetic
    from recgrela_ext.demo.sections import heading

    heading("Data")
    oracle = None
    if options.data is None:
        log, oracle = make_synthetic(options.users, seed=SEED)
        print("A made-up music catalogue: listeners have long-term tastes and short bursts.")
    else:
        log = Reading(options.data).interactions().filter(k_core=(5, 5))
    print(f"{log.name}: {log.num_users:,} users, {log.num_items:,} items, {len(log):,} events")
    return log, oracle


def _train(options: argparse.Namespace, train: Any, valid: Any) -> Any:
    import torch

    from recgrela_ext import RecGRELA, TrainConfig, fit
    from recgrela_ext.demo.sections import heading

    heading(f"Training, {options.minutes:g} minutes on {torch.get_num_threads()} threads")
    torch.manual_seed(SEED)
    model = RecGRELA.for_data(train, **MODEL)
    result = fit(
        model, train, valid if len(valid) else None, minutes=options.minutes,
        config=TrainConfig(**RECIPE),  # type: ignore[arg-type]
    )  # fmt: skip
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters:,} parameters, {result.epochs} epochs, {result.steps:,} steps, "
        f"{result.targets / max(result.seconds, 1e-9):,.0f} targets a second"
    )
    return model


if __name__ == "__main__":
    sys.exit(main())
