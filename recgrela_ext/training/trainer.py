"""`fit`: trains a next-item model, stops early, writes checkpoints, resumes exactly.

What is random in step s is drawn from (seed, s), and the order of an epoch from (seed, epoch). So a
run that is killed and resumed goes the way of one that was not, bit for bit on the same machine
with the same number of threads.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
import warnings
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from recgrela_ext.arguments import check_same_items, is_one_of
from recgrela_ext.data.sequences import Sequences, Targets
from recgrela_ext.errors import CheckpointError, shown
from recgrela_ext.model.repeat_bias import RepeatBias
from recgrela_ext.training.checkpoint import Checkpoint, CheckpointFolder
from recgrela_ext.training.config import FitResult, TrainConfig
from recgrela_ext.training.guards import Interrupt, deterministic_algorithms, own_random_state
from recgrela_ext.training.identity import check_identity, run_identity
from recgrela_ext.training.journal import EpochLog, Progress
from recgrela_ext.training.stepper import Stepper
from recgrela_ext.training.windows import EpochPlan, TrainingWindows

_RESUME: dict[str | bool, str] = {
    "auto": "auto",
    "must": "must",
    "never": "never",
    True: "must",
    False: "never",
}


def fit(
    model: nn.Module,
    train: Sequences,
    valid: Targets | None = None,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    config: TrainConfig | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    resume: str | bool = "auto",
    progress: bool | None = None,
    log_file: str | os.PathLike[str] | None = None,
) -> FitResult:
    """Train `model` in place on next-item prediction (paper section on training; dense by default).

    Args:
        model: a `RecGRELA`, or a module with `config`, `item_embedding`, `loss` and `encode` (and
            `encode_packed` and `loss_packed` if it is causal and can).
        train: histories; every item but each user's first is a target once per epoch.
        valid: targets for early stopping; without them the last weights are kept.
        epochs, steps, minutes: limits; the run ends at the first one reached. Minutes count
            training time alone, over all resumed parts. None at all: `valid` and `patience` end it.
        config: the recipe, `TrainConfig()` by default.
        checkpoint_dir: folder for checkpoints and `log.jsonl`; None: nothing is written. Ctrl-C
            ends the run after its step and leaves a checkpoint.
        resume: "auto" goes on from a checkpoint that is there; "must" (True) demands one; "never"
            (False) removes what is there.
        progress: a bar on stderr; None: only on a terminal.
        log_file: one JSON line per epoch; by default `checkpoint_dir/log.jsonl`. The log of an
            earlier run is replaced, any other file refused.

    Returns:
        The result; the model holds the best weights and is in evaluation mode.

    Raises:
        ValueError, TypeError: a bad argument; a loss that is not finite (the line names the step,
            which changed no weight).
        CheckpointError: no whole checkpoint where one is needed, or one of another run.
    """
    config = TrainConfig() if config is None else config
    limits = {"epochs": epochs, "steps": steps, "minutes": minutes}
    _check_arguments(model, train, valid, limits, config, resume)
    folder = None if checkpoint_dir is None else CheckpointFolder(checkpoint_dir)
    if log_file is None and folder is not None:
        log_file = folder.path / "log.jsonl"
    run = _Run(model, train, valid, limits, config, folder, EpochLog(log_file), Progress(progress))
    with (
        contextlib.nullcontext() if folder is None else folder.alone(),
        deterministic_algorithms(config.deterministic),
        own_random_state(run.stepper.device),
        contextlib.closing(run.bar),
    ):
        run.begin(_RESUME[resume])
        with Interrupt() as interrupt:
            run.train(interrupt)
    return run.finish()


@dataclass
class _Position:
    """Where a run stands; all of it goes into a checkpoint."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    targets: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    epoch_loss: float = 0.0  # summed over the targets of the epoch so far
    epoch_targets: int = 0
    epoch_seconds: float = 0.0
    evaluated_step: int = -1
    best_metric: float | None = None
    best_epoch: int | None = None
    best_step: int | None = None
    best_step_before: int | None = None
    evaluations_since_best: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


def position_of(saved: Any) -> _Position:
    """Of a checkpoint; TypeError or ValueError for one that `fit` did not write."""
    found = _Position(**saved)
    for one in fields(found):
        value = getattr(found, one.name)
        kinds: tuple[type, ...] = {"int": (int,), "float": (int, float), "list": (list,)}[
            str(one.type).partition(" ")[0].partition("[")[0]
        ]
        optional = str(one.type).endswith("| None")
        if not (isinstance(value, kinds) or (optional and value is None)) or value is True:
            raise TypeError(f"{one.name} must be {one.type}, got {shown(value)}")
    if min(found.epoch, found.step_in_epoch, found.step, found.targets) < 0:
        raise ValueError("position must not be negative")
    return found


class _Run:
    def __init__(
        self,
        model: nn.Module,
        train: Sequences,
        valid: Targets | None,
        limits: dict[str, Any],
        config: TrainConfig,
        folder: CheckpointFolder | None,
        log: EpochLog,
        bar: Progress,
    ) -> None:
        self.model, self.valid, self.config = model, valid, config
        self.limits, self.folder, self.log, self.bar = limits, folder, log, bar
        self.stepper = Stepper(model, train, config)
        self.windows = _make_windows(model, train, config, self.stepper.packed)
        self.at = _Position()
        self._identity = run_identity(model, train, valid, limits, config)
        self._best: dict[str, Tensor] | None = None
        self._unread: list[tuple[int, int, Tensor]] = []  # (step, targets, loss)
        self._saved_at = time.monotonic()

    def begin(self, resume: str) -> None:
        """Goes to the newest checkpoint, or to the start."""
        if self.folder is None:
            if resume == "must":
                raise CheckpointError("fit: checkpoint_dir must be given to resume, got None")
            self.log.rewind(0)
            return
        if resume == "never":
            self.folder.clear()
        found = self.folder.load_newest()
        if found is None:
            if resume == "must":
                raise CheckpointError(
                    f"fit: checkpoint_dir must hold a checkpoint to resume, got {self.folder.path}"
                )
            self.log.rewind(0)
            self.save()  # pins the initial weights
            return
        self._restore(found)
        self.folder.discard_after(found.step)
        self.log.rewind(found.step)

    def train(self, interrupt: Interrupt) -> None:
        """Steps until a limit is reached; KeyboardInterrupt after the step of a Ctrl-C."""
        at = self.at
        while self.stopped() is None:
            plan = self.windows.epoch(at.epoch)
            self.bar.begin(at.epoch, at.step_in_epoch, len(plan))
            self.model.train()
            while at.step_in_epoch < len(plan) and self.stopped() is None:
                self._step(plan)
                if interrupt.requested:
                    self.save()
                    raise KeyboardInterrupt
                if self._checkpoint_is_due() and at.step_in_epoch < len(plan):
                    self.save()
            self._close_epoch(whole=at.step_in_epoch == len(plan))
            if interrupt.requested:  # while it evaluated
                raise KeyboardInterrupt

    def stopped(self) -> str | None:
        """The limit that is reached, if one is."""
        at, limits = self.at, self.limits
        reached = {"epochs": at.epoch, "steps": at.step, "minutes": at.seconds / 60.0}
        for name, limit in limits.items():
            if limit is not None and reached[name] >= limit:
                return name
        patience = self.config.patience
        if self.valid is not None and patience and at.evaluations_since_best >= patience:
            return "patience"
        return None

    def finish(self) -> FitResult:
        """Gives the model its best weights."""
        at = self.at
        weights = self.stepper.kept_weights() if self._best is None else self._best
        self.model.load_state_dict(weights)
        self.model.eval()
        best = (at.best_metric, at.best_epoch, at.best_step)
        cpu = at.cpu_seconds
        stopped = self.stopped() or ""
        return FitResult(at.epoch, at.step, at.targets, at.seconds, stopped, *best, at.history, cpu)

    def save(self) -> None:
        """Writes a checkpoint of this moment."""
        if self.folder is None:
            return
        self._read_losses()
        state = {
            "position": asdict(self.at),
            "identity": self._identity,
            "scaler": self.stepper.scaler.state_dict(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        # the checkpoint before this one may refer to the best step before the present one
        bests = (self.at.best_step, self.at.best_step_before)
        keep = [step for step in bests if step is not None]
        self.folder.save(self.at.step, self.stepper.tensors(), state, keep)
        self._saved_at = time.monotonic()

    def _step(self, plan: EpochPlan) -> None:
        at = self.at
        start, cpu_start = time.perf_counter(), time.process_time()
        batch = plan[at.step_in_epoch]
        rate = self.config.learning_rate(at.step, self._progress(len(plan)))
        loss = self.stepper.step(batch, at.step, rate)
        at.step += 1
        at.step_in_epoch += 1
        at.targets += batch.num_targets
        at.epoch_targets += batch.num_targets
        self._unread.append((at.step, batch.num_targets, loss))
        due = at.step % self.config.log_every == 0 or at.step_in_epoch == len(plan)
        if due or self.stepper.device.type == "cpu":
            self._read_losses()  # on a GPU this waits for the step
        elapsed = time.perf_counter() - start
        at.seconds += elapsed
        at.cpu_seconds += time.process_time() - cpu_start
        at.epoch_seconds += elapsed
        if due:
            speed = at.epoch_targets / max(at.epoch_seconds, 1e-9)
            self.bar.advance(at.epoch_loss / at.epoch_targets, speed)
        else:
            self.bar.advance()

    def _restore(self, found: Checkpoint) -> None:
        assert self.folder is not None
        threads = found.state.get("threads")
        if threads != torch.get_num_threads():
            warnings.warn(
                f"fit: the checkpoint was written with {shown(threads)} threads and this "
                f"process has {torch.get_num_threads()}: the last bits may differ",
                stacklevel=4,
            )
        try:
            check_identity(found.state["identity"], self._identity)
            self.at = position_of(found.state["position"])
            self.stepper.restore(found.tensors)
            self.stepper.scaler.load_state_dict(found.state["scaler"])
        except CheckpointError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            got = " ".join(str(error).split())
            raise CheckpointError(
                f"fit: {self.folder.path} step {found.step} must be a checkpoint of this model and "
                f"recipe, got {type(error).__name__} {got}"
            ) from None
        steps = len(self.windows.epoch(self.at.epoch))
        if self.at.step_in_epoch > steps:
            raise CheckpointError(
                f"fit: {self.folder.path} step {found.step} must stand in an epoch of {steps} "
                f"steps, got step {self.at.step_in_epoch}"
            )
        best = self.at.best_step
        if best is not None:
            there = found if best == found.step else self._load_best(best)
            self._best = self.stepper.kept_weights(there.tensors)

    def _load_best(self, step: int) -> Checkpoint:
        assert self.folder is not None
        try:
            return self.folder.load(step)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; it holds the best weights so far (resume='never' starts over)"
            ) from None

    def _progress(self, steps_of_epoch: int) -> float:
        """The share of the run that is over, by the limit that is nearest."""
        at, limits = self.at, self.limits
        done = {
            "epochs": at.epoch + at.step_in_epoch / steps_of_epoch,
            "steps": at.step,
            "minutes": at.seconds / 60.0,
        }
        return max((done[n] / limit for n, limit in limits.items() if limit), default=0.0)

    def _read_losses(self) -> None:
        """Sums the losses not yet read; ValueError at one that is not finite."""
        if not self._unread:
            return
        losses = torch.stack([loss for _, _, loss in self._unread]).tolist()
        for (step, targets, _), loss in zip(self._unread, losses, strict=True):
            if not math.isfinite(loss):
                raise ValueError(
                    f"fit: loss must be finite, got {loss} at step {step} "
                    f"(epoch {self.at.epoch + 1}); a lower lr, or clip, may help"
                )
            self.at.epoch_loss += loss * targets
        self._unread.clear()

    def _checkpoint_is_due(self) -> bool:
        steps, seconds = self.config.checkpoint_every_steps, self.config.checkpoint_every_seconds
        if steps is not None and self.at.step % steps == 0:
            return True
        return seconds is not None and time.monotonic() - self._saved_at >= seconds

    def _close_epoch(self, whole: bool) -> None:
        """Evaluates, writes the line of the epoch and a checkpoint; also where a limit cut it."""
        at = self.at
        epoch = at.epoch + 1
        if whole:
            at.epoch, at.step_in_epoch = epoch, 0
        record: dict[str, Any] = {
            "epoch": epoch,
            "step": at.step,
            "loss": at.epoch_loss / max(at.epoch_targets, 1),
            "lr": self.stepper.optimizer.param_groups[0]["lr"],
            "targets": at.epoch_targets,
            "targets_per_second": at.epoch_targets / max(at.epoch_seconds, 1e-9),
            "epoch_seconds": at.epoch_seconds,
            "seconds": at.seconds,
            "cpu_seconds": at.cpu_seconds,
        }
        due = (whole and epoch % self.config.eval_every == 0) or self.stopped() is not None
        if self.valid is not None and due and at.evaluated_step != at.step:
            record["valid"] = self._evaluate(epoch)
        if whole:
            at.epoch_loss, at.epoch_targets, at.epoch_seconds = 0.0, 0, 0.0
        at.history.append(record)
        self.log.write(record)
        shown = record.get("valid", {}).get(self.config.metric_key)
        tail = "" if shown is None else f", {self.config.metric_key} {shown:.4f}"
        self.bar.say(f"epoch {epoch}: loss {record['loss']:.4f}{tail}")
        self.save()

    def _evaluate(self, epoch: int) -> dict[str, float]:
        from recgrela_ext.evaluation import evaluate

        assert self.valid is not None
        at = self.at
        self.model.eval()
        with self.stepper.averaged():
            cuts = sorted({5, 10, self.config.metric_k})
            result = evaluate(
                self.model, self.valid, k=cuts, baselines={}, bootstrap=0, progress=False
            )
        metrics = {name: value for name, value in result["mean"].items() if "/" in name}
        value = metrics[self.config.metric_key]
        at.evaluated_step = at.step
        at.evaluations_since_best += 1
        if at.best_metric is None or value > at.best_metric:
            at.best_step_before = at.best_step
            at.best_metric, at.best_epoch, at.best_step = value, epoch, at.step
            at.evaluations_since_best = 0
            self._best = self.stepper.kept_weights()
        return metrics


def _make_windows(
    model: nn.Module, train: Sequences, config: TrainConfig, packed: bool
) -> TrainingWindows:
    settings: Any = getattr(model, "config", None)
    causal = bool(getattr(settings, "causal", True))
    objective = config.objective
    if objective == "auto":
        objective = "dense" if causal else "prefix"
    if objective == "dense" and not causal:
        raise ValueError("fit: objective must be prefix for a bidirectional model, got dense")
    size = config.max_seq_len
    if size is None:
        size = int(getattr(settings, "max_seq_len", 200))
    return TrainingWindows(
        train.items,
        train.offsets,
        max_seq_len=size or None,
        targets_per_step=config.targets_per_step,
        context=config.context,
        objective=objective,
        bucket=not packed,
        seed=config.seed,
        padding_idx=int(getattr(settings, "padding_idx", 0)),
    )


def _check_arguments(
    model: nn.Module,
    train: Sequences,
    valid: Targets | None,
    limits: dict[str, Any],
    config: TrainConfig,
    resume: str | bool,
) -> None:
    if not isinstance(config, TrainConfig):
        raise TypeError(f"fit: config must be a TrainConfig, got {shown(config)}")
    for name, limit in limits.items():
        if limit is None:
            continue
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0:
            raise ValueError(f"fit: {name} must be a positive number, got {shown(limit)}")
        if name != "minutes" and limit % 1 != 0:
            raise ValueError(f"fit: {name} must be a whole number, got {shown(limit)}")
        if isinstance(limit, int) and limit >= 2**63:
            raise ValueError(f"fit: {name} must be below 2**63, got {shown(limit)}")
    if all(limit is None for limit in limits.values()) and (valid is None or not config.patience):
        raise ValueError("fit: epochs, steps or minutes must be given, got none of them")
    if not is_one_of(resume, _RESUME):
        raise ValueError(f"fit: resume must be auto, must or never, got {shown(resume)}")
    if not hasattr(model, "item_embedding"):
        raise TypeError(f"fit: model must have an item_embedding, got {type(model).__name__}")
    if isinstance(getattr(model, "repeat_bias", None), RepeatBias) and config.loss != "softmax":
        raise ValueError(
            "fit: loss must be softmax for a model with a repeat bias (repeat_bias=False makes one "
            f"without), got {config.loss}"
        )
    weights = list(model.parameters())
    if not any(weight.requires_grad for weight in weights):
        raise ValueError("fit: model must have a weight that requires a gradient, got none")
    if any(weight.is_inference() for weight in weights):
        raise ValueError(
            "fit: model must be made or loaded outside of torch.inference_mode, got one from inside"
        )
    if not torch.is_grad_enabled():
        raise ValueError("fit: gradients must be enabled, got a call in no_grad or inference_mode")
    n_items = model.item_embedding.weight.shape[0]  # type: ignore[union-attr,index]
    for what, data, kind in (("train", train, Sequences), ("valid", valid, Targets)):
        if what == "valid" and data is None:
            continue
        if not isinstance(data, kind):
            raise TypeError(f"fit: {what} must be {kind.__name__}, got {shown(data)}")
        if data.n_items != n_items:
            raise ValueError(
                f"fit: {what} must have the model's n_items={n_items}, got {data.n_items}"
            )
        check_same_items(model, data.id_map, f"fit: {what}")
    if valid is None:
        return
    # What `rank_targets` would say after the first epoch.
    if not len(valid):
        raise ValueError("fit: valid must hold at least one target, got none (None: train without)")
    padding_idx = getattr(getattr(model, "config", None), "padding_idx", 0)
    if padding_idx != 0 and not hasattr(model, "score"):
        raise ValueError(f"fit: model must have padding_idx 0 to be validated, got {padding_idx}")
