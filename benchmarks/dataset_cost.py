"""`python -m benchmarks dataset-cost`: what the large data sets of the paper would cost.

The logs are not here, and cost does not depend on what is in them: random items of as many users,
items and items per user. Every cell runs in a process of its own, on one thread, in float32; time
is processor time, memory the growth of the process's resident memory at its highest. Models have
equal parameters beside their tables (benchmarks/peer_models.py) and all the same optimizer; the
peers' softmax over all items is this package's unless "dense logits" is said. The published model
reads both ways, so that it learns one target a window: prefixes of full length.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from benchmarks import machine, peers
from benchmarks.memory_models import CANDIDATES, event, stored_bytes
from benchmarks.memory_point import grown, timed
from benchmarks.memory_quality import OURS, PUBLISHED, build
from benchmarks.peer_models import Peer
from benchmarks.store import write_json
from benchmarks.training_rows import windows as full_windows
from recgrela_ext.model.retrieval import top_k
from recgrela_ext.training.config import TrainConfig
from recgrela_ext.training.stepper import Stepper
from recgrela_ext.training.windows import Batch

RESULT = machine.ROOT / "benchmarks" / "results" / "dataset-cost.json"
WINDOWS, LENGTH = 8, 200  # of a training step
PREFIXES = 64  # of one of the published model
EFFORT = {"rounds": 3, "sample": 0.02, "part": "latency"}
LIMIT_BYTES = 16 << 30


@dataclass(frozen=True)
class Shape:
    """A log's size, as arXiv 2506.13315 states it (without the padding row and user)."""

    users: int
    items: int
    mean: float  # items of a user


SETS = {
    "ML-1M": Shape(6_040, 3_416, 165.5),
    "ML-20M": Shape(138_493, 18_345, 144.3),
    "ML-32M": Shape(200_948, 43_884, 158.9),
    "Netflix": Shape(120_377, 16_086, 180.8),
    "LFM-1B": Shape(78_112, 179_514, 200.1),
}
UNKNOWN = {"Tmall": "its size is not stated"}
DENSE = ", dense logits"
# training as, label, and how its users are kept for an event (benchmarks/memory_models.py)
MODELS = {
    OURS: "ours",
    "SASRec": "sasrec-cache",
    f"SASRec{DENSE}": "sasrec-window",
    "GRU4Rec": "gru4rec",
    "Mamba": "mamba",
    PUBLISHED: "published",
}


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--only", default="", metavar="TEXT", help="cells with this in their name")
    command.add_argument("--out", type=Path, default=RESULT)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measures every cell that the file lacks or that other sources measured; with a bar."""
    machine.require_operators()
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1)])  # imports half of torch, once for all forks
    tqdm.monitor_interval = 0  # a thread would not survive the forks
    key = f"{torch.__version__} {machine.library_hash()[:16]}"
    content: dict[str, Any] = {"cells": {}}
    if options.out.exists():
        content = json.loads(options.out.read_text(encoding="utf-8"))
    names = [f"{data}/{model}" for data in SETS for model in MODELS]
    for name in tqdm([n for n in names if options.only in n], unit="cell"):
        if content["cells"].get(name, {}).get("key") == key:
            continue
        found = _apart(*name.split("/"))
        content["cells"][name] = {"key": key, "date": machine.today(),
                                  "commit": machine.commit(), **found}  # fmt: skip
        content |= {"benchmark": "dataset-cost", "windows": WINDOWS, "length": LENGTH,
                    "prefixes": PREFIXES, "machine": machine.describe()}  # fmt: skip
        write_json(options.out, content)
        tqdm.write(f"{name}: {json.dumps(found)}", file=sys.stdout)
    return 0


def _apart(data: str, model: str) -> dict[str, Any]:
    """Training and event, each in a fresh process: neither keeps memory of the other."""
    context = multiprocessing.get_context("fork")
    found: dict[str, Any] = {}
    for part in (training, serving):
        there, here = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(part, data, model, here))
        process.start()
        here.close()
        try:
            found[part.__name__] = there.recv()
        except EOFError:
            found[part.__name__] = {"missing": "killed: no memory left"}
        process.join()
        if "error" in found[part.__name__]:
            raise SystemExit(f"benchmarks dataset-cost: {found[part.__name__]['error']}")
    return found


def _child(part: Any, data: str, model: str, answer: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # a process that has computed on more would leave a fork to wait
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES))
    try:
        found = part(SETS[data], model)
    except peers.Missing as missing:
        found = {"missing": str(missing)}
    except Exception as error:
        found = {"error": traceback.format_exc()}
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            found = {"missing": f"more than {LIMIT_BYTES >> 30} GiB"}
    answer.send(found)


def training(shape: Shape, name: str) -> dict[str, Any]:
    """A step of `fit` on full windows: seconds, peak beyond the weights, bytes of the weights."""
    _steps(name, 10, 1)[2]()  # what the first step of a process takes once
    windows = PREFIXES if name == PUBLISHED else WINDOWS
    model, targets, work = _steps(name, shape.items, windows)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    peak = grown(work)  # what the optimizer keeps is part of it
    machine.keep_freed_memory()
    return {"targets": targets, "peak": peak, "weights": weights, **timed(work, EFFORT)}


def _steps(name: str, n_items: int, windows: int) -> tuple[Any, int, Callable[[], Tensor]]:
    """A model, the targets of a step, and its next step."""
    torch.manual_seed(0)
    dense = name.endswith(DENSE)
    model = build(name.removesuffix(DENSE), n_items + 1, length=LENGTH).train()
    if dense:
        model.loss = _dense_loss.__get__(model)
    stepper = Stepper(model, None, TrainConfig())  # type: ignore[arg-type]
    batch = full_windows(windows, LENGTH, num_items=n_items)
    if name == PUBLISHED:  # the last position of each is a target
        last = np.arange(1, windows + 1) * LENGTH - 1
        targets = np.zeros_like(batch.targets)
        targets[last] = batch.targets[last]
        batch = Batch(batch.items, targets, batch.cu_seqlens, windows)
    count = iter(range(1 << 60))
    return model, batch.num_targets, lambda: stepper.step(batch, next(count), 1e-3)


def _dense_loss(self: Peer, item_seq: Tensor, item_seq_len: Tensor, targets: Tensor) -> Tensor:
    """All scores at once, as most training loops have it."""
    scores = self.run(item_seq).flatten(0, 1) @ self.item_embedding.weight.t()
    return F.cross_entropy(scores, targets.flatten(), ignore_index=0)


@torch.no_grad()
def serving(shape: Shape, name: str) -> dict[str, Any]:
    """A new item of a user of mean length and the ten best items after it; bytes for all users."""
    candidate = CANDIDATES[MODELS[name]]
    length = round(shape.mean)
    model = candidate.build(shape.items + 1, length)
    weight = model.item_embedding.weight.detach()
    make = lambda users: event(candidate, model, length, users)  # noqa: E731

    def rank(hidden: Tensor) -> object:
        if candidate.model == OURS:
            return top_k(hidden, weight, 10, 0)
        return (hidden @ weight.t()).topk(10)

    rank(make(1)())
    peak = grown(lambda: [rank(work()) for work in [make(1)]])
    machine.keep_freed_memory()
    work = make(1)
    kept = sum(stored_bytes(candidate, length).values())
    return {"peak": peak, "user": kept, "users": kept * shape.users,
            **timed(lambda: rank(work()), EFFORT)}  # fmt: skip


def section(folder: Path) -> str:
    """Markdown; the sets without a result are named."""
    path = folder / RESULT.name
    if not path.exists():
        return ""
    content = json.loads(path.read_text(encoding="utf-8"))
    where = content["machine"]
    lines = [
        f"**What the paper's sets cost**, random items of as many users and items; one "
        f"thread of {where['processor']}, torch {where['torch']}. On the large ones no model was "
        "trained: their quality is not run here.",
        "",
        f"| | model | training step, {content['windows']} windows of {content['length']} "
        f"({PUBLISHED}: {content['prefixes']} prefixes) | peak | hours an epoch | "
        "event and ten best | peak | kept for all users |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for data, shape in SETS.items():
        told = f"{data}: {shape.users:,} users, {shape.items:,} items, {shape.mean} each"
        for model in MODELS:
            cell = content["cells"].get(f"{data}/{model}")
            if cell:
                lines.append(f"| {' | '.join([told, *_cells(model, shape, cell)])} |")
                told = ""
    unknown = "; ".join(f"{name}: {why}" for name, why in UNKNOWN.items())
    return "\n".join([*lines, "", f"Left out: {unknown}."])


def _cells(name: str, shape: Shape, cell: dict[str, Any]) -> list[str]:
    train, serve = cell["training"], cell["serving"]
    candidate = CANDIDATES[MODELS[name]]
    first = [train.get("missing", ""), "", ""]
    if "missing" not in train:
        steps = shape.users * (shape.mean - 1) / train["targets"]
        first = [f"{train['seconds']:.2f} s", f"{train['peak'] / 1e6:,.0f} MB",
                 f"{steps * train['seconds'] / 3600:,.1f}"]  # fmt: skip
    second = [serve.get("missing", ""), "", ""]
    if "missing" not in serve:
        second = [f"{serve['seconds'] * 1e3:.2f} ms, {candidate.label.partition(', ')[2]}",
                  f"{serve['peak'] / 1e6:.1f} MB", f"{serve['users'] / 1e9:,.1f} GB"]  # fmt: skip
    return [name, *first, *second]
