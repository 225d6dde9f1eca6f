"""Train on TorchRec: the item table cut by rows over processes, jagged histories, no padding.

    torchrun --nproc-per-node 2 python_examples/torchrec_rows.py --checkpoint runs/rows --steps 20
    torchrun --nproc-per-node 1 python_examples/torchrec_rows.py --checkpoint runs/rows --steps 30

The second command goes on with the first one's checkpoint, on another number of processes. It needs
an environment of its own (on a machine without CUDA; elsewhere `pip install torchrec==1.8.0`):

    pip install torch==2.13.0 recgrela-ext tensordict torchmetrics pyre-extensions iopath
    pip install --no-deps torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0
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

from recgrela_ext import RecGRELAConfig
from recgrela_ext.data import Interactions, Sequences
from recgrela_ext.data.synthetic import make_synthetic
from recgrela_ext.integrations.torchrec import (
    RecGRELA,
    gather,
    jagged_batch,
    load_checkpoint,
    save_checkpoint,
    shard_by_rows,
)


def batch_of_step(
    log: Sequences, options: argparse.Namespace, step: int
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Items, next items and negatives of this process's share of the step's users."""
    rng = np.random.default_rng([0, step])
    users = rng.choice(np.flatnonzero(log.lengths > 1), options.batch)
    negatives = torch.from_numpy(rng.integers(1, log.n_items, (options.batch, options.negatives)))
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    histories = [
        torch.from_numpy(log.history(int(user))[-options.max_len - 1 :].astype(np.int64))
        for user in users[mine]
    ]
    return [h[:-1] for h in histories], [h[1:] for h in histories], negatives[mine]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a log that `Interactions` reads (default: a made-up one)")
    parser.add_argument("--steps", type=int, default=20, help="with those of the checkpoint")
    parser.add_argument("--batch", type=int, default=32, help="users per step, of all processes")
    parser.add_argument("--max-len", type=int, default=50)
    parser.add_argument("--negatives", type=int, default=64, help="sampled items per user")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--table-lr", type=float, default=0.05)
    parser.add_argument("--checkpoint", help="folder to go on from and to write to")
    parser.add_argument("--out", help="folder for the whole model")
    parser.add_argument("--losses", help="JSON file for the losses")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        sys.exit("this example must be started by torchrun, also for one process")

    dist.init_process_group("gloo")
    if options.data:
        log = Interactions.from_file(options.data).leave_one_out()[0]
    else:
        log = make_synthetic(300, 200, mean_length=30)[0].leave_one_out()[0]
    torch.manual_seed(0)
    config = RecGRELAConfig(n_items=log.n_items, num_layers=2, dropout=0.0, drop_path=0.0)
    model, optimizer = shard_by_rows(RecGRELA(config), options.table_lr, options.lr)
    start = 0
    if options.checkpoint and Path(options.checkpoint, "steps.json").exists():
        start = json.loads(Path(options.checkpoint, "steps.json").read_text(encoding="utf-8"))
        if options.steps < start:
            sys.exit(f"--steps must be at least {start}, as the checkpoint, got {options.steps}")
        load_checkpoint(Path(options.checkpoint, f"step-{start}"), model, optimizer)
    losses = []
    for step in range(start, options.steps):
        loss, _ = model(jagged_batch(*batch_of_step(log, options, step)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        everywhere = loss.detach() / dist.get_world_size()
        dist.all_reduce(everywhere)
        losses.append(float(everywhere))
    if options.checkpoint:
        save_checkpoint(Path(options.checkpoint, f"step-{options.steps}"), model, optimizer)
    whole = gather(model)
    if whole is not None:  # process 0
        print(f"steps {start + 1} to {options.steps}:", *[f"{loss:.6f}" for loss in losses])
        if options.checkpoint:
            Path(options.checkpoint, "steps.json").write_text(str(options.steps), encoding="utf-8")
        if options.losses:
            Path(options.losses).write_text(json.dumps(losses), encoding="utf-8")
        if options.out:
            whole.save_pretrained(options.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
