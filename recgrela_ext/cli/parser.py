"""Arguments of the five commands, and help that teaches them. Imports neither torch nor pandas."""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any, NoReturn

from recgrela_ext.data.formats import FORMATS
from recgrela_ext.data.order import ORDERS
from recgrela_ext.version import __version__

_MAIN_EXAMPLES = """\
examples:
  recgrela train --data ratings.csv --minutes 10 --out model/
  recgrela evaluate --model model/
  recgrela recommend --model model/ --user 42

`recgrela COMMAND --help` explains one command."""

_TRAIN_EXAMPLES = """\
examples:
  recgrela train --data ml-1m/ratings.dat --out model/ --minutes 30 --threads 2
  recgrela train --data plays.parquet --user listener --item track --time played_at --out model/
  recgrela train --data clicks.csv --k-core 5 5 --split time --epochs 20 --out model/ --json v.json
  recgrela train --data ml-1m.inter --paper --out published/ --epochs 50

The same command again goes on from the last checkpoint in OUT/checkpoints, after Ctrl-C or a crash
too. Without --minutes, --epochs or --steps the run ends when the validation metric has not grown
for --patience evaluations. OUT then holds model.safetensors, config.json, id_map.json (raw ids and
titles) and data.json (how the data was read and split, with the checksum of the targets)."""

_EVALUATE_EXAMPLES = """\
examples:
  recgrela evaluate --model model/
  recgrela evaluate --model model/ --data /new/place/ratings.csv --split valid --json valid.json

Every target is ranked among all items. The data is read, filtered and split as for training; the
command refuses when the targets are not the recorded ones."""

_RECOMMEND_EXAMPLES = """\
examples:
  recgrela recommend --model model/ --user 42 77 -k 5
  recgrela recommend --model model/ --data new_ratings.csv --user 42
  recgrela recommend --model model/ --items 318,296,593

A user's whole history in the data is read, oldest first; items the model does not know are left
out of it. --items is a history of its own, oldest first. Items of the history are not recommended,
unless users of the training data come back to items (more than 1 % of its events) or --include-seen
is given."""

_EXPORT_EXAMPLES = """\
examples:
  recgrela export --model model/ --out model.pt2
  recgrela export --model model/ --item-vectors items.npy

The .pt2 is a torch.export program: item_seq [B, L] and item_seq_len [B], int64, item rows from 1
and padding 0 on the right, to the hidden states [B, hidden]; B and L are free. It calls the
operators of this package, so a process that loads it must first `import recgrela_ext.ops`. The
score of an item is the inner product of the hidden state and the item's vector: --item-vectors
writes those for an external index, row i of FILE.npy belonging to item_ids[i] of FILE.json, which
is item row i + 1 of the program. A repeat bias, which models have by default, comes on top for the
items that the user has met: lists without these are right as they are, for others FILE.json has
its nine numbers."""


_MOST_THREADS = 1024


class Parser(argparse.ArgumentParser):
    """One line and exit code 2 for a wrong argument, as for every other mistake."""

    def error(self, message: str) -> NoReturn:
        command = self.prog.partition(" ")[2]
        text = " ".join(message.split())
        print(f"recgrela: {command + ': ' if command else ''}{text}", file=sys.stderr)
        raise SystemExit(2)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command; `command` in its result names a module of this package."""
    parser = Parser(
        prog="recgrela",
        description="Sequential recommendation with causal gated linear attention.",
        epilog=_MAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"recgrela {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=Parser
    )
    _add_info(commands)
    _add_train(commands)
    _add_evaluate(commands)
    _add_recommend(commands)
    _add_export(commands)
    return parser


def _command(commands: Any, name: str, text: str, epilog: str | None = None) -> Any:
    return commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_info(commands: Any) -> None:
    command = _command(commands, "info", "what is installed and what it runs on")
    command.add_argument("--json", metavar="FILE", help="also write it as JSON")


def _add_train(commands: Any) -> None:
    command = _command(commands, "train", "train a model on a log of events", _TRAIN_EXAMPLES)
    command.add_argument(
        "--out", required=True, metavar="DIR", help="folder of the model and its checkpoints"
    )
    command.add_argument("--json", metavar="FILE", help="write the validation metrics as JSON")
    _add_reading(command.add_argument_group("data"))
    _add_limits(command.add_argument_group("how long, the first limit reached counts"))
    _add_model(command.add_argument_group("model"))
    _add_recipe(command.add_argument_group("training"))
    _add_machine(command)


def _add_reading(group: Any) -> None:
    group.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="file, folder of a known data set, or a name such as ml-100k to download",
    )
    group.add_argument(
        "--format",
        default="auto",
        choices=("auto", *FORMATS),
        metavar="NAME",
        help=f"one of {', '.join(FORMATS)} (default: seen from the name)",
    )
    for what in ("user", "item", "time"):
        group.add_argument(f"--{what}", metavar="COLUMN", help=f"name of the {what} column")
    group.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="COLUMN=VALUE",
        help="read only rows with this value; several values of a column add up",
    )
    group.add_argument(
        "--order",
        default="hash",
        choices=ORDERS,
        help="what decides between events of one user at one time (default: hash)",
    )
    group.add_argument(
        "--order-seed", type=_whole, default=0, metavar="N", help="seed of hash and shuffled"
    )
    group.add_argument(
        "--k-core",
        nargs=2,
        type=_whole,
        metavar=("USERS", "ITEMS"),
        help="keep users and items with at least so many events; the paper's MovieLens: 5 5",
    )
    for bound, value in (("min", 1), ("max", None)):
        for what in ("user", "item"):
            group.add_argument(
                f"--{bound}-{what}",
                type=_whole,
                default=value,
                metavar="N",
                help=f"keep {what}s with at {'least' if bound == 'min' else 'most'} N events",
            )
    group.add_argument(
        "--split",
        default="loo",
        choices=("loo", "time"),
        help="loo: leave one out, the last event of each user is the test target and the one "
        "before it the validation target (default); time: first 80 %%, next 10 %%, last 10 %%",
    )
    group.add_argument(
        "--time-targets",
        default="all",
        choices=("all", "first", "last"),
        help="which events of a user are targets with --split time",
    )


def _add_limits(group: Any) -> None:
    group.add_argument("--minutes", type=_positive, metavar="M", help="of training time")
    group.add_argument("--epochs", type=_from_one, metavar="N")
    group.add_argument("--steps", type=_from_one, metavar="N", help="optimiser steps")


def _add_model(group: Any) -> None:
    group.add_argument(
        "--paper",
        action="store_true",
        help="the published bidirectional model instead of the causal variant",
    )
    group.add_argument("--hidden-size", type=_whole, metavar="N", help="default 64")
    group.add_argument("--num-layers", type=_whole, metavar="N", help="default 4")
    group.add_argument("--num-heads", type=_whole, metavar="N", help="default 4")
    group.add_argument("--max-seq-len", type=_whole, metavar="N", help="items read; default 200")
    group.add_argument("--dropout", type=_number, metavar="P", help="default 0.1")
    group.add_argument("--drop-path", type=_number, metavar="P", help="default 0, with --paper 0.1")
    group.add_argument(
        "--repeat-bias",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="learn nine numbers that are added to the scores of items a user has met, by how "
        "recently; not in the paper; default: yes for the causal model and the softmax loss",
    )


def _add_recipe(group: Any) -> None:
    group.add_argument("--lr", type=_number, metavar="RATE", help="default 1e-3")
    group.add_argument("--weight-decay", type=_number, metavar="W", help="default 0")
    group.add_argument("--schedule", metavar="NAME", help="constant (default), linear or cosine")
    group.add_argument(
        "--decay", type=_number, metavar="SHARE", help="last part of the run in which it decays"
    )
    group.add_argument("--warmup-steps", type=_whole, metavar="N", help="default 0")
    group.add_argument("--clip", type=_number, metavar="NORM", help="largest gradient norm")
    group.add_argument("--ema", type=_number, metavar="RATE", help="average weights; default 0")
    group.add_argument("--targets-per-step", type=_whole, metavar="N", help="default 3000")
    group.add_argument("--loss", metavar="NAME", help="softmax (default), unseen, sampled or bpr")
    group.add_argument("--num-negatives", type=_whole, metavar="N", help="for sampled; default 256")
    group.add_argument("--amp", metavar="DTYPE", help="bfloat16 or float16")
    group.add_argument("--seed", type=_whole, default=0, metavar="N")
    group.add_argument("--deterministic", action="store_true")
    group.add_argument("--metric", metavar="NAME", help="default seen_included/ndcg@10")
    group.add_argument("--patience", type=_whole, metavar="N", help="default 10; 0: never stop")
    group.add_argument("--eval-every", type=_whole, metavar="EPOCHS", help="default 1")
    group.add_argument(
        "--resume",
        nargs="?",
        const="must",
        default="auto",
        choices=("auto", "must", "never"),
        help="auto: go on where there is a checkpoint (default); must: demand one, also plain "
        "--resume; never: start over",
    )


def _add_machine(command: Any) -> None:
    command.add_argument("--threads", type=_threads, metavar="N", help="CPU threads")
    command.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, ...; default: a GPU if any"
    )
    command.add_argument("--quiet", action="store_true", help="no progress bars")


def _add_model_folder(command: Any) -> None:
    command.add_argument(
        "--model", required=True, metavar="DIR", help="a folder that `recgrela train` wrote"
    )


def _add_evaluate(commands: Any) -> None:
    text = "rank held-out events, with popularity and a Markov model beside it"
    command = _command(commands, "evaluate", text, _EVALUATE_EXAMPLES)
    _add_model_folder(command)
    command.add_argument("--data", metavar="FILE", help="default: the file of the training")
    command.add_argument("--split", default="test", choices=("test", "valid"))
    command.add_argument(
        "-k", nargs="+", type=_from_one, default=[5, 10], metavar="K", help="default 5 10"
    )
    command.add_argument("--json", metavar="FILE", help="write the metrics as JSON")
    _add_machine(command)


def _add_recommend(commands: Any) -> None:
    text = "list the next items of users, or after a history"
    command = _command(commands, "recommend", text, _RECOMMEND_EXAMPLES)
    _add_model_folder(command)
    command.add_argument("--data", metavar="FILE", help="histories; default: those of the training")
    who = command.add_mutually_exclusive_group(required=True)
    who.add_argument("--user", nargs="+", metavar="ID", help="users of the data")
    who.add_argument("--items", metavar="ID,ID,...", help="a history, oldest first")
    command.add_argument("-k", type=_from_one, default=10, metavar="K", help="default 10")
    command.add_argument("--include-seen", action="store_true", help="items of the history too")
    command.add_argument("--json", metavar="FILE", help="also write the lists as JSON")
    _add_machine(command)


def _add_export(commands: Any) -> None:
    text = "write the model as a torch.export program, or its item vectors"
    command = _command(commands, "export", text, _EXPORT_EXAMPLES)
    _add_model_folder(command)
    command.add_argument("--out", metavar="FILE.pt2", help="the program")
    command.add_argument(
        "--item-vectors", metavar="FILE.npy", help="the item table, with FILE.json"
    )


def _whole(text: str) -> int:
    value = _convert(int, text, "a whole number")
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"must be below 2**63, got {text}")
    return int(value)


def _from_one(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _threads(text: str) -> int:
    value = _from_one(text)
    if value > _MOST_THREADS:  # OpenMP crashes where the system refuses a thread
        raise argparse.ArgumentTypeError(f"must be at most {_MOST_THREADS}, got {text}")
    return value


def _number(text: str) -> float:
    value = float(_convert(float, text, "a number"))
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be finite, got {text}")
    return value


def _positive(text: str) -> float:
    value = _number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def _convert(kind: type, text: str, told: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be {told}, got {text!r}") from None
