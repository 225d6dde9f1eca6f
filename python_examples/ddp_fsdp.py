r"""Train on several processes: DDP or FSDP2, accumulation, torch.compile, restarts.

    python python_examples/ddp_fsdp.py                                     # one process
    torchrun --nproc-per-node 2 python_examples/ddp_fsdp.py --wrap fsdp    # the same losses
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nproc-per-node 2 --max-restarts 1 \
        python_examples/ddp_fsdp.py --wrap fsdp --checkpoint runs/two --fail-at 7

In the last line one process dies and torchrun starts all again. Without the variable they may find
the address of the dead one in torchrun's store and fail (pytorch/pytorch#135712).

With the same --batch any number of processes sees the same rows in each step. Dropout is off
here, as every process draws its own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from recgrela_ext import RecGRELA, RecGRELAConfig
from recgrela_ext.data import Interactions, Sequences
from recgrela_ext.data.synthetic import make_synthetic
from recgrela_ext.integrations.distributed import (
    Rows,
    compile_blocks,
    fully_shard_blocks,
    load_checkpoint,
    save_checkpoint,
    train_step,
)


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a log that `Interactions` reads (default: a made-up one)")
    parser.add_argument("--wrap", choices=("none", "ddp", "fsdp"), default="none")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32, help="users per step, of all processes")
    parser.add_argument("--accumulate", type=int, default=1, help="parts per step and process")
    parser.add_argument("--compile", action="store_true", help="torch.compile every block")
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--max-len", type=int, default=50)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--checkpoint", help="folder to write to and to go on from")
    parser.add_argument("--every", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--fail-at", type=int, help="the last process dies here, the first time")
    parser.add_argument("--losses", help="JSON file for the losses")
    options = parser.parse_args(arguments)
    if options.accumulate < 1:
        parser.error(f"--accumulate must be at least 1, got {options.accumulate}")
    if options.fail_at is not None and options.wrap == "none":
        parser.error("--fail-at must come with --wrap ddp or fsdp, under torchrun")
    return options


def read_log(options: argparse.Namespace) -> Sequences:
    if options.data:
        return Interactions.from_file(options.data).leave_one_out()[0]
    return make_synthetic(300, 200, mean_length=30)[0].leave_one_out()[0]


def rows_of_step(log: Sequences, options: argparse.Namespace, step: int) -> list[Rows]:
    """This process's share of the step's users, right-padded, in --accumulate parts."""
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    users = np.random.default_rng([0, step]).choice(np.flatnonzero(log.lengths > 1), options.batch)
    parts = []
    for mine in np.array_split(users[rank::processes], options.accumulate):
        item_seq, targets = np.zeros((2, len(mine), options.max_len), np.int64)
        for row, user in enumerate(mine):
            history = log.history(int(user))[-options.max_len - 1 :]
            item_seq[row, : len(history) - 1] = history[:-1]
            targets[row, : len(history) - 1] = history[1:]
        lengths = torch.from_numpy((item_seq != 0).sum(1))
        parts.append((torch.from_numpy(item_seq), lengths, torch.from_numpy(targets)))
    return parts


def train(options: argparse.Namespace, log: Sequences, device: str = "cpu") -> list[float]:
    """The losses of the steps done here; those before the checkpoint are not repeated."""
    torch.manual_seed(0)  # the same weights everywhere
    model: torch.nn.Module = RecGRELA(
        RecGRELAConfig(
            n_items=log.n_items,
            hidden_size=options.hidden_size,
            num_layers=options.num_layers,
            max_seq_len=options.max_len,
            dropout=0.0,
            drop_path=0.0,
        )
    ).to(device=device, dtype=getattr(torch, options.dtype))
    if options.compile:
        compile_blocks(model)
    if options.wrap == "ddp":
        model = DistributedDataParallel(model)
    elif options.wrap == "fsdp":
        model = fully_shard_blocks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    start = load_checkpoint(options.checkpoint, model, optimizer) if options.checkpoint else 0
    losses = []
    for step in range(start, options.steps):
        parts = [tuple(x.to(device) for x in part) for part in rows_of_step(log, options, step)]
        losses.append(float(train_step(model, optimizer, parts)))
        first_time = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if step == options.fail_at and first_time and dist.get_rank() == dist.get_world_size() - 1:
            sys.exit(f"step {step}: this process dies")
        if options.checkpoint and (step + 1) % options.every == 0:
            save_checkpoint(options.checkpoint, step + 1, model, optimizer)
    return losses


def main() -> None:
    options = read_options()
    device = "cpu"
    if "LOCAL_RANK" in os.environ:
        if torch.cuda.is_available():
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    elif options.wrap != "none":
        sys.exit(f"--wrap {options.wrap} must be started by torchrun")
    losses = train(options, read_log(options), device)
    if not dist.is_initialized() or dist.get_rank() == 0:
        told = [f"{loss:.6f}" for loss in losses]
        print(f"steps {options.steps - len(losses) + 1} to {options.steps}:", *told)
        if options.losses:
            Path(options.losses).write_text(json.dumps(losses), encoding="utf-8")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
