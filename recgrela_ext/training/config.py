"""What a training run is: `TrainConfig`, and what came of it: `FitResult`."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import torch

from recgrela_ext.arguments import is_one_of
from recgrela_ext.errors import shown

_CHOICES = {
    "schedule": ("constant", "linear", "cosine"),
    "objective": ("auto", "dense", "prefix"),
    "loss": ("softmax", "unseen", "sampled", "bpr"),
    "negatives": ("uniform", "popularity", "in_batch"),
    "amp": (None, "bfloat16", "float16"),
}
_METRIC = re.compile(r"(seen_included/|seen_excluded/)?(hit|ndcg|mrr)@([1-9]\d*)")
# Changing these does not change the weights, so a run may be resumed with others.
_FREE_FIELDS = ("log_every", "checkpoint_every_steps", "checkpoint_every_seconds")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Recipe of a run. The defaults train the causal model on dense windows.

    Dense training learns per step: small batches, constant rate, no warm-up.

    Optimiser: AdamW with `lr`, `weight_decay` (on matrices alone), `betas`; `clip` is the largest
    gradient norm (None: off); `warmup_steps` of linear growth; `schedule` "constant", or "linear"
    or "cosine" decay to zero over the last part `decay` of the run. The run's length is the first
    limit `fit` was given, so with `minutes` the progress is elapsed time over budget.
    `ema` > 0: weights are averaged with this decay per step, and the average is what is evaluated
    and kept.

    Batches: about `targets_per_step` targets from windows of `max_seq_len` items (None: as the
    model says; 0: whole histories) and up to `context` items before them. `objective` "dense" or
    "prefix" (published: last position of each prefix); "auto": dense if the model is causal. A
    step of more than `positions_per_pass` items is accumulated over several passes, with the same
    result but for dropout and the losses that draw negatives, which draw in every pass.

    Loss: "softmax" over all items; "unseen": over the target and what the user has not seen before,
    for rankings that leave seen items out; "sampled" with `num_negatives` shared items and logQ;
    "bpr". `negatives` and `negative_power`: see `losses.NegativeSampler`. With a repeat bias the
    loss must be "softmax".

    Selection: every `eval_every` epochs the validation `metric` is taken; after `patience` such
    evaluations without a better one the run ends (None: never). The best weights are kept.

    `amp`: "bfloat16" or "float16" autocast. `seed` fixes batches, dropout and negatives: step s
    draws from a generator seeded with (seed, s). `deterministic` asks torch for deterministic
    algorithms. A checkpoint is written every `checkpoint_every_steps` or
    `checkpoint_every_seconds` (None: off), and at each epoch's end. `log_every`: steps between
    updates of the progress bar, and between checks of the loss on a GPU.

    Raises:
        ValueError: a value cannot work; one line names the field.
    """

    lr: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = None
    warmup_steps: int = 0
    schedule: str = "constant"
    decay: float = 0.2
    ema: float = 0.0
    objective: str = "auto"
    max_seq_len: int | None = None
    context: int = 0
    targets_per_step: int = 3000
    positions_per_pass: int = 65_536
    loss: str = "softmax"
    num_negatives: int = 256
    negatives: str = "uniform"
    negative_power: float = 1.0
    eval_every: int = 1
    metric: str = "seen_included/ndcg@10"
    patience: int | None = 10
    amp: str | None = None
    seed: int = 0
    deterministic: bool = False
    log_every: int = 10
    checkpoint_every_steps: int | None = None
    checkpoint_every_seconds: float | None = 60.0

    def __post_init__(self) -> None:
        _require(isinstance(self.betas, (tuple, list)), "betas", "be two numbers", self.betas)
        object.__setattr__(self, "betas", tuple(self.betas))
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            told = ", ".join(str(choice) for choice in choices)
            _require(is_one_of(value, choices), name, f"be one of {told}", value)
        whole = (
            "targets_per_step",
            "positions_per_pass",
            "num_negatives",
            "eval_every",
            "log_every",
        )
        for name in whole:
            _require_int(name, getattr(self, name), 1)
        _require(self.num_negatives < 2**31, "num_negatives", "be below 2**31", self.num_negatives)
        for name in ("seed", "context", "warmup_steps"):
            _require_int(name, getattr(self, name), 0)
        for name, low in (("max_seq_len", 0), ("patience", 1), ("checkpoint_every_steps", 1)):
            if getattr(self, name) is not None:
                _require_int(name, getattr(self, name), low)
        for name in ("lr", "clip"):
            value = getattr(self, name)
            if value is not None or name == "lr":
                _require(_is_number(value) and value > 0, name, "be positive and finite", value)
        for name in ("weight_decay", "negative_power"):
            value = getattr(self, name)
            _require(_is_number(value) and value >= 0, name, "be at least 0 and finite", value)
        for name, value in (("ema", self.ema), *(("betas", beta) for beta in self.betas)):
            _require(_is_number(value) and 0 <= value < 1, name, "lie in [0, 1)", value)
        _require(len(self.betas) == 2, "betas", "be two numbers", self.betas)
        _require(
            _is_number(self.decay) and 0 < self.decay <= 1, "decay", "lie in (0, 1]", self.decay
        )
        seconds = self.checkpoint_every_seconds
        ok = seconds is None or (_is_number(seconds) and seconds >= 0)
        _require(ok, "checkpoint_every_seconds", "be at least 0", seconds)
        known = isinstance(self.metric, str) and _METRIC.fullmatch(self.metric)
        _require(bool(known), "metric", "look like seen_included/ndcg@10", self.metric)

    @property
    def metric_key(self) -> str:
        """`metric` with its view: a plain name is seen_included."""
        return self.metric if "/" in self.metric else f"seen_included/{self.metric}"

    @property
    def metric_k(self) -> int:
        """The cut-off of `metric`."""
        return int(self.metric.rpartition("@")[2])

    @property
    def amp_dtype(self) -> torch.dtype | None:
        return None if self.amp is None else getattr(torch, self.amp)

    def learning_rate(self, step: int, progress: float) -> float:
        """Rate of step `step` (from 0) when the share `progress` in [0, 1] of the run is over."""
        rate = self.lr * min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.schedule == "constant":
            return rate
        left = min(1.0, max(0.0, (1.0 - progress) / self.decay))
        return rate * (left if self.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return {**dataclasses.asdict(self), "betas": list(self.betas)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> TrainConfig:
        """Reads `to_dict`'s output. Raises ValueError for an unknown field."""
        unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"TrainConfig: field must be a known one, got {', '.join(unknown)}")
        return cls(**fields)

    def fingerprint(self) -> dict[str, Any]:
        """The fields that decide the weights."""
        return {name: v for name, v in self.to_dict().items() if name not in _FREE_FIELDS}


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What came of a run; the model holds the best weights, or the last ones without validation.

    Args:
        epochs, steps, targets: finished epochs, optimiser steps, and targets seen.
        seconds: training time, all resumed parts together; evaluation and checkpoints not counted.
        stopped: "epochs", "steps", "minutes" or "patience".
        best_metric, best_epoch, best_step: of the validation metric; None without validation.
        history: one dict per epoch, as in the log file.
        cpu_seconds: processor time of all threads in `seconds`; unlike it, little changed by other
            work on the machine.
    """

    epochs: int
    steps: int
    targets: int
    seconds: float
    stopped: str
    best_metric: float | None = None
    best_epoch: int | None = None
    best_step: int | None = None
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    cpu_seconds: float = 0.0


def _require(holds: bool, name: str, condition: str, value: object) -> None:
    if not holds:
        raise ValueError(f"TrainConfig: {name} must {condition}, got {shown(value)}")


def _require_int(name: str, value: object, low: int) -> None:
    holds = isinstance(value, int) and not isinstance(value, bool) and value >= low
    _require(holds, name, f"be a whole number of at least {low}", value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
