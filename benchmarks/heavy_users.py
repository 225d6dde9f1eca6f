"""What the far past is worth to users with many items, for models that `recgrela train` saved.

    recgrela train --data ml-1m.inter ... --out runs/one
    python -m benchmarks heavy-users --model runs/one --model runs/two --more-than 500

Several models are seeds of one: the figures are their means. forgetting.py says what is compared.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import forgetting, machine
from benchmarks.readme import RESULTS
from recgrela_ext.cli.reading import Reading, check_targets, load_model
from recgrela_ext.files import write_files


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", action="append", required=True, metavar="DIR")
    parser.add_argument("--data", metavar="FILE", help="default: where it was when training")
    parser.add_argument("--more-than", type=int, action="append", metavar="ITEMS", help="500")
    parser.add_argument("--last", type=int, nargs="+", metavar="ITEMS", default=[200, 500, 1000])
    parser.add_argument("--out", type=Path, default=RESULTS / "heavy-users.json")


def run(options: argparse.Namespace) -> int:
    """Ranks and writes; returns the exit code."""
    models, seeds, sums = [], [], set()
    for folder in options.model:
        model = load_model(folder, "cpu")
        reading = Reading.load(folder).at(options.data)
        _, valid, test = reading.splits(False)
        check_targets(reading, model, test)
        models.append(model)
        seeds.append(reading.seed)
        sums.add((model.variant, test.target_sha256))
    if len(sums) > 1:
        raise SystemExit("benchmarks: models must be of one variant and one test, got several")
    groups = forgetting.compare(models, [valid, test], options.more_than or [500], options.last)
    content = {"data": test.name, "order": test.order, "target_sha256": test.target_sha256,
               "model": f"RecGRELA, {model.variant}", "seeds": seeds, "machine": machine.describe(),
               "commit": machine.commit(), "groups": groups}  # fmt: skip
    write_files({options.out: json.dumps(content, indent=2) + "\n"})
    for group in groups:
        print(f"{group['users']} users with more than {group['more_than']} items, all: "
              f"{group['all']:.4f}")  # fmt: skip
        for row in group["windows"]:
            print(f"  last {row['window']:5d}: {row['ndcg@10']:.4f}, less that of all "
                  f"{row['minus_all']:+.4f} {row['interval']}")  # fmt: skip
    return 0
