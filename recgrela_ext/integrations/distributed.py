"""Training on several processes with what torch has: DDP, FSDP2, checkpoints for any number.

    model = fully_shard_blocks(RecGRELA(config))          # or DistributedDataParallel(...)
    optimizer = torch.optim.AdamW(model.parameters())
    start = load_checkpoint(folder, model, optimizer)     # 0 when there is none
    loss = train_step(model, optimizer, [(item_seq, item_seq_len, targets)])
    save_checkpoint(folder, start + 1, model, optimizer)

Both wrappers average gradients over the processes, while a loss is a mean over targets, and rows of
different lengths give every process another number of them. `train_step` weighs each part by its
share of all targets, so that N processes do what one would do with all their rows.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from recgrela_ext import RecGRELA
from recgrela_ext._library import has_kernels
from recgrela_ext.errors import shown
from recgrela_ext.integrations import checkpoints

Rows = tuple[Tensor, Tensor | None, Tensor]  # item_seq [B, L], item_seq_len [B], targets [B, L]
_METHODS = ("encode", "recommend", "recommend_from_hidden")  # none that forward itself calls


def fully_shard_blocks(model: RecGRELA, **options: Any) -> RecGRELA:
    """FSDP2: every block is a group of its own, the item table belongs to the root's.

    Weights are gathered for `model(...)`, with targets for the loss, for `encode`, `recommend` and
    `recommend_from_hidden`.

    Args:
        model: changed in place; make the optimizer afterwards.
        options: of `torch.distributed.fsdp.fully_shard` (mesh, mp_policy, ...).

    Raises:
        TypeError: the model is no RecGRELA, or is wrapped already.
    """
    _check_model("fully_shard_blocks", model)
    for block in model.encoder.layers:
        fully_shard(block, **options)
    fully_shard(model, **options)
    for name in _METHODS:
        register_fsdp_forward_method(model, name)
    return model


def compile_blocks(model: RecGRELA, **options: Any) -> RecGRELA:
    """torch.compile of every block, before it is wrapped; names of weights stay.

    Where there are no compiled operators the attention stays as it is: its plain form on packed
    rows is more than Inductor takes (torch 2.13).

    Args:
        model: changed in place, on the device it will run on.
        options: of `torch.compile`.

    Raises:
        TypeError: as `fully_shard_blocks`.
    """
    _check_model("compile_blocks", model)
    for block in model.encoder.layers:
        if not has_kernels(model.item_embedding.weight.device):
            modulator: Any = block.modulator
            modulator.forward = torch.compiler.disable(modulator.forward)
        # Not Module.compile: that would trace the hooks of FSDP2 as well.
        block.forward = torch.compile(block.forward, **options)
    return model


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parts: Sequence[Rows],
    clip: float | None = None,
) -> Tensor:
    """One optimiser step over the rows of all processes.

    Args:
        model: `RecGRELA`, alone, in DistributedDataParallel or through `fully_shard_blocks`.
        parts: this process's rows, in as many parts as gradients are accumulated over; the number
            of parts is the same on every process.
        clip: largest gradient norm.

    Returns:
        The mean loss over the targets of all processes, detached.

    Raises:
        ValueError: the loss is not finite, or the norm that is clipped, on every process and before
            a weight changes; there are no parts, another number of them on some process, no process
            has a target, or `clip` is not positive.
        TypeError: a part is not (item_seq, item_seq_len, targets), or the model holds no RecGRELA.
    """
    padding_idx = checkpoints.config_of(model, "train_step").padding_idx
    if clip is not None and not 0 < clip < math.inf:
        raise ValueError(f"train_step: clip must be positive and finite, got {clip}")
    parts = list(parts)
    if not parts:
        raise ValueError("train_step: parts must hold at least one batch, got none")
    if not all(len(part) == 3 and isinstance(part[2], Tensor) for part in parts):
        raise TypeError("train_step: parts must hold (item_seq, item_seq_len, targets), got others")
    counts = torch.stack([(targets != padding_idx).sum() for _, _, targets in parts])
    processes = 1 if _alone() else dist.get_world_size()
    own = counts.new_tensor([int(counts.sum()), len(parts), len(parts) ** 2])
    everywhere, number, squares = _summed(own).tolist()
    if processes * squares != number**2:  # they would wait for each other for ever
        raise ValueError(
            f"train_step: parts must be as many on every process, got {len(parts)} on this one"
        )
    if everywhere == 0:
        raise ValueError("train_step: parts must hold a target on some process, got none")
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=counts.device)
    for number, (rows, count) in enumerate(zip(parts, counts.tolist(), strict=True), start=1):
        with _synchronised(model, last=number == len(parts)):
            loss = model(*rows) * (count / everywhere)
            (loss * processes).backward()  # the wrapper divides by their number
        total = total + loss.detach()
    if clip is not None:
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        total = torch.where(norm.isfinite(), total, torch.nan)
    total = _summed(total)
    if not total.isfinite():  # the same on every process: all of them end here
        raise ValueError(
            f"train_step: loss must be finite, and its gradient, got {float(total)}; no weight was "
            "changed"
        )
    optimizer.step()
    return total


def save_checkpoint(
    folder: str | os.PathLike[str], step: int, model: nn.Module, optimizer: Any, keep: int = 2
) -> None:
    """Every process writes its part of `folder`/step-N; the `keep` newest checkpoints stay.

    Raises:
        ValueError: `keep` is below 1, or `step` negative or below that of the newest checkpoint,
            which would be loaded in its place.
    """
    if keep < 1:
        raise ValueError(f"save_checkpoint: keep must be at least 1, got {keep}")
    least = max((_step(path) for path in _complete(folder)[-1:]), default=0)
    if not isinstance(step, int) or step < least:
        raise ValueError(
            f"save_checkpoint: step must be an int of at least {least}, the newest in {folder}, "
            f"got {shown(step)}"
        )
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "step": step}
    with _quiet():
        checkpoints.write(Path(folder) / f"step-{step:09d}", state, model)
    if _alone() or dist.get_rank() == 0:
        for old in _complete(folder)[:-keep]:
            shutil.rmtree(old)


def load_checkpoint(folder: str | os.PathLike[str], model: nn.Module, optimizer: Any) -> int:
    """The steps done in the newest whole checkpoint, which is loaded; 0 when there is none.

    The number of processes, and DDP or FSDP2, may differ from those it was saved with: one process
    that loads it into a plain `RecGRELA` can evaluate it, or save it with `save_pretrained`.

    Args:
        optimizer: None to read the weights alone.

    Raises:
        CheckpointError: it is torn, or of another model or optimizer.
    """
    found = _complete(folder)
    if not found:
        return 0
    optimizers = () if optimizer is None else optimizer
    weights, moments = get_state_dict(model, optimizers)
    state: dict[str, Any] = {"model": weights, "step": 0}
    if optimizer is not None:
        state["optimizer"] = moments
    with _quiet():
        checkpoints.read(found[-1], state, model)
    set_state_dict(
        model,
        optimizers,
        model_state_dict=state["model"],
        optim_state_dict=state.get("optimizer", {}),
    )
    return int(state["step"])


def _complete(folder: str | os.PathLike[str]) -> list[Path]:
    """Oldest first; the metadata is written last, when every process has written its part."""
    found = [path.parent for path in Path(folder).glob("step-*/.metadata")]
    return sorted((path for path in found if re.fullmatch(r"step-\d+", path.name)), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _check_model(caller: str, model: Any) -> None:
    if not isinstance(model, RecGRELA) or isinstance(model, FSDPModule):
        raise TypeError(f"{caller}: model must be a plain RecGRELA, got {type(model).__name__}")


def _alone() -> bool:
    return not dist.is_initialized()


def _summed(value: Tensor) -> Tensor:
    if not _alone():
        dist.all_reduce(value)
    return value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that there is one process, which `no_dist` has said already."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextlib.contextmanager
def _synchronised(model: nn.Module, last: bool) -> Iterator[None]:
    """Gradients travel between processes with the last part alone."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        yield
    elif isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield
