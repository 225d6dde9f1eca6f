"""A whole training step and an inference pass on a GPU, time and peak memory.

The published code trains on the last position of every prefix, 2,048 of 200 items a step; so do
all candidates here. `published` is its plain statement (benchmarks/models.py, bidirectional).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.checks import WrongResult
from benchmarks.models import PlainRecGRELA, ml_1m
from benchmarks.operator_rows import failure, forget
from benchmarks.records import Record, Target
from benchmarks.timing import Clock, Effort, Work, interleave
from benchmarks.training_rows import check_models, windows
from recgrela_ext import RecGRELA
from recgrela_ext.model.losses import softmax_loss

LABELS = {
    "bfloat16": "ours, bfloat16, compiled",
    "recompute": "ours, bfloat16, compiled, MLP recomputed",
    "dense": "ours, bfloat16, compiled, every position a target",
    "published": "published",
    "published, compiled": "published, compiled",
}


def training(
    row: str,
    batch: int,
    length: int,
    device: torch.device,
    clock: Clock,
    effort: Effort,
    compile_too: bool,
) -> list[Record]:
    """One optimiser step of every candidate, and what memory each adds at its highest."""
    check_models(64, windows(min(batch, 4), length), device)
    check_published(length, device)
    data = windows(batch, length)
    items, lengths, targets = data.padded(device)
    makers = step_makers(items, lengths, targets, device, compile_too)
    record = _record(row, "training step, last position of each prefix", batch, length, clock)
    works: dict[str, Work] = {}
    for name, make in makers.items():
        try:
            work = make()
            record.memory[name] = peak_memory(work, device)
            works[name] = work
        except Exception as error:
            if name == "ours":
                raise
            record.missing[name] = failure(error)
        forget(device)
    record.times = interleave(works, clock, effort)
    record.memory = {n: b for n, b in record.memory.items() if b > 0}  # none on a CPU
    _aim(record)
    return [record]


def _aim(record: Record) -> None:
    times = {name: timing.median for name, timing in record.times.items()}

    def over(name: str, figures: dict[str, Any]) -> float | None:
        both = "published" in figures and name in figures
        return figures["published"] / figures[name] if both else None

    text = "training step, published over ours"
    record.targets += [
        Target(f"{text}: time, float32", 2.5, over("ours", times)),
        Target(f"{text}: time, bfloat16 and torch.compile", 5, over("bfloat16", times)),
        Target(f"{text}: memory, with MLP recompute", 4, over("recompute", record.memory)),
    ]


def step_makers(
    items: Tensor, lengths: Tensor, targets: Tensor, device: torch.device, compile_too: bool
) -> dict[str, Callable[[], Work]]:
    """Candidates by name, made when they are measured: each has a model and an optimiser."""
    last, length = targets[:, -1].contiguous(), items.shape[1]

    def own(autocast: bool = False, recompute: bool = False, dense: bool = False) -> Work:
        model = ml_1m().to(device).train()
        if recompute:
            recompute_mlp(model)
        encode: Callable[..., Tensor] = model.encode if dense else model
        if autocast:
            encode = torch.compile(encode, dynamic=False)
        table = model.item_embedding.weight

        def loss() -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                hidden = encode(items, lengths)
                wanted = targets.flatten() if dense else last
                return softmax_loss(hidden.flatten(0, -2), table, wanted)

        return optimiser_step(model, loss, fused=True)

    def published(compiled: bool = False) -> Work:
        source = ml_1m().to(device)
        model = PlainRecGRELA(source, length, bidirectional=True, real=compiled).train()
        run: Callable[..., Tensor] = model.last_loss
        if compiled:
            run = torch.compile(run, dynamic=False)
        return optimiser_step(model, lambda: run(items, last), fused=False)

    makers: dict[str, Callable[[], Work]] = {"ours": own, "published": published}
    if compile_too:
        makers |= {
            "bfloat16": lambda: own(autocast=True),
            "recompute": lambda: own(autocast=True, recompute=True),
            "dense": lambda: own(autocast=True, dense=True),
            "published, compiled": lambda: published(compiled=True),
        }
    return makers


def optimiser_step(model: nn.Module, loss: Callable[[], Tensor], fused: bool) -> Work:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused or None)

    def work() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    work()  # the optimiser's state exists from here on
    return work


def recompute_mlp(model: RecGRELA) -> None:
    """The MLP's inner rows, four times as wide, are formed again in the backward."""
    for layer in model.encoder.layers:
        mlp: Any = layer.mlp
        forward = mlp.forward
        mlp.forward = lambda x, residual=None, f=forward: checkpoint(
            f, x, residual, use_reentrant=False
        )


def peak_memory(work: Work, device: torch.device) -> int:
    """Bytes one call adds at its highest; 0 on a CPU, where benchmarks/peak.py measures."""
    if device.type != "cuda":
        work()
        return 0
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@torch.no_grad()
def check_published(length: int, device: torch.device) -> None:
    """Raises WrongResult unless the plain published model agrees with ours in its mode."""
    model = ml_1m(causal=False, dropout=0.0, drop_path=0.0).to(device).eval()
    plain = PlainRecGRELA(model, length, bidirectional=True).eval()
    items, lengths, _ = windows(3, length).padded(device)
    ours, theirs = model.encode(items, lengths), plain(items)
    error = float((ours - theirs).abs().max() / ours.abs().max())
    if not error <= 1e-3:
        raise WrongResult(f"published model: off by {error:.2g} of the largest")


def inference(
    row: str,
    batch: int,
    length: int,
    device: torch.device,
    clock: Clock,
    effort: Effort,
    compile_too: bool,
) -> list[Record]:
    """The hidden state at the last item and the scores of all items, without gradients."""
    check_published(length, device)
    items, lengths, _ = windows(batch, length).padded(device)
    model = ml_1m().to(device).eval()
    plain = PlainRecGRELA(model, length, bidirectional=True).eval()

    def own(autocast: bool) -> Work:
        forward: Callable[..., Tensor] = torch.compile(model, dynamic=False) if autocast else model

        def work() -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                return model.scores(forward(items, lengths))

        return work

    makers: dict[str, Work] = {
        "ours": own(False),
        "published": lambda: plain(items)[:, -1] @ plain.table.weight.t(),
    }
    if compile_too:
        makers["bfloat16"] = own(True)
    record = _record(row, "inference, scores of all items", batch, length, clock)
    works: dict[str, Work] = {}
    for name, work in makers.items():
        without = torch.no_grad()(work)
        try:
            without()
            record.memory[name] = peak_memory(without, device)
            works[name] = without
        except Exception as error:
            if name == "ours":
                raise
            record.missing[name] = failure(error)
        forget(device)
    record.memory = {n: b for n, b in record.memory.items() if b > 0}
    record.times = interleave(works, clock, effort)
    return [record]


def _record(row: str, what: str, batch: int, length: int, clock: Clock) -> Record:
    shape = {"B": batch, "L": length, "hidden": 64, "layers": 4, "items": 3416}
    return Record(row, what, "RecGRELA", shape, clock=clock.name, labels=dict(LABELS))
