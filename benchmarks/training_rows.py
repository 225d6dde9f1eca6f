"""The whole model beside eager ones: a training step and an inference pass, on any device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.checks import WrongResult
from benchmarks.models import EagerOperator, PlainRecGRELA, ml_1m
from benchmarks.records import Record
from benchmarks.timing import Clock, Effort, Work, interleave
from recgrela_ext import RecGRELA
from recgrela_ext.training.config import TrainConfig
from recgrela_ext.training.stepper import Stepper
from recgrela_ext.training.windows import Batch

_AGREE = 1e-3  # of the largest gradient, float32 through four layers


def windows(batch: int, length: int, seed: int = 0, num_items: int = 3416) -> Batch:
    """Full windows of random items, by default ML-1M's, every position with a target."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(1, num_items + 1, (batch, length + 1))
    bounds = np.arange(batch + 1) * length
    items, targets = (x.reshape(-1).copy() for x in (ids[:, :-1], ids[:, 1:]))
    return Batch(items, targets, bounds, batch * length)


def own_step(model: RecGRELA, batch: Batch, config: TrainConfig) -> Work:
    """The step `fit` takes: packed windows, chunked loss, fused AdamW."""
    stepper = Stepper(model.train(), None, config)  # type: ignore[arg-type]
    count = iter(range(1 << 60))
    return lambda: stepper.step(batch, next(count), 1e-3)


def plain_step(model: PlainRecGRELA, batch: Batch, dense: bool = True) -> Work:
    """One step of the plain model with torch's default AdamW."""
    model.train()
    device = model.table.weight.device
    items, _, targets = batch.padded(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def work() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = model.loss(items, targets) if dense else model.last_loss(items, targets[:, -1])
        loss.backward()
        optimizer.step()

    return work


def under(operator: EagerOperator, work: Work) -> Work:
    """The same work with the eager operator in the layers."""

    def run() -> object:
        with operator:
            return work()

    return run


def check_models(hidden_size: int, batch: Batch, device: torch.device) -> None:
    """Raises WrongResult unless ours and both eager models have one loss and one gradient."""
    model = ml_1m(hidden_size, dropout=0.0, drop_path=0.0).to(device)
    length = int(batch.cu_seqlens[1])
    plain = PlainRecGRELA(model, length)
    items, lengths, targets = batch.padded(device)
    loss = model.loss(items, lengths, targets)
    ours = torch.autograd.grad(loss, model.item_embedding.weight)[0]
    with EagerOperator():
        eager_loss = model.loss(items, lengths, targets)
        eager = torch.autograd.grad(eager_loss, model.item_embedding.weight)[0]
    plain_loss = plain.loss(items, targets)
    plainly = torch.autograd.grad(plain_loss, plain.table.weight)[0]
    for name, other, grad in (
        ("eager operator", eager_loss, eager),
        ("plain", plain_loss, plainly),
    ):
        _compare(f"loss, {name}", loss, other)
        _compare(f"gradient of the item table, {name}", ours, grad)


def _compare(what: str, x: Tensor, y: Tensor) -> None:
    x, y = x.detach(), y.detach()
    error = float((x - y).abs().max() / y.abs().max())
    if not error <= _AGREE:
        raise WrongResult(f"{what}: off by {error:.2g} of the largest")


def training(
    row: str, batch: int, length: int, hidden_size: int, threads: int, effort: Effort, clock: Clock
) -> Record:
    """One optimiser step on the CPU: ours, ours on the eager operator, and the plain model."""
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    data = windows(batch, length)
    check_models(hidden_size, windows(min(batch, 4), length), device)
    config = TrainConfig()
    works: dict[str, Work] = {
        "ours": own_step(ml_1m(hidden_size), data, config),
        "eager operator": under(EagerOperator(), own_step(ml_1m(hidden_size), data, config)),
        "plain": plain_step(PlainRecGRELA(ml_1m(hidden_size), length), data),
    }
    record = _record(row, "training step", batch, length, hidden_size, threads, clock)
    record.times = interleave(works, clock, effort)
    record.values["items a second"] = batch * length / record.times["ours"].median
    return record


@torch.no_grad()
def inference(
    row: str, batch: int, length: int, hidden_size: int, threads: int, effort: Effort, clock: Clock
) -> Record:
    """Hidden states of all positions, without dropout and gradients."""
    torch.set_num_threads(threads)
    model = ml_1m(hidden_size).eval()
    plain = PlainRecGRELA(model, length).eval()
    items, lengths, _ = windows(batch, length).padded(torch.device("cpu"))

    def encode() -> Any:
        return model.encode(items, lengths)

    eager = under(EagerOperator(), encode)
    for name, other in (("eager operator", eager()), ("plain", plain(items))):
        _compare(f"hidden states, {name}", encode(), other)

    def no_grad(work: Work) -> Work:
        return torch.no_grad()(work)

    record = _record(row, "inference, all positions", batch, length, hidden_size, threads, clock)
    works = {"ours": encode, "eager operator": eager, "plain": lambda: plain(items)}
    record.times = interleave({n: no_grad(w) for n, w in works.items()}, clock, effort)
    return record


def _record(
    row: str, what: str, batch: int, length: int, hidden_size: int, threads: int, clock: Clock
) -> Record:
    shape = {"B": batch, "L": length, "hidden": hidden_size, "layers": 4, "items": 3416}
    labels = {"eager operator": "eager operator, same loss", "plain": "plain model, dense loss"}
    return Record(row, what, "RecGRELA", shape, threads=threads, clock=clock.name, labels=labels)
