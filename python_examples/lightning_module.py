"""RecGRELA as a LightningModule: training, NDCG@10 on validation, checkpoints, lists for users.

    pip install 'recgrela-ext[lightning]'
    python python_examples/lightning_module.py                     # a small made-up catalogue
    python python_examples/lightning_module.py --data log.inter --epochs 20 --checkpoint last.ckpt

The checkpoint is Lightning's own; a second run with the same file and more --epochs goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import lightning
import torch
from torch.utils.data import DataLoader

from recgrela_ext import RecGRELA
from recgrela_ext.data import Interactions, Sequences, Targets
from recgrela_ext.data.synthetic import make_synthetic

Rows = tuple[torch.Tensor, torch.Tensor]


class RecGRELAModule(lightning.LightningModule):
    """Batches are (item_seq [B, L], target): [B, L] next items to train, [B] to validate."""

    def __init__(self, model: RecGRELA, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch: Rows, batch_idx: int) -> torch.Tensor:
        item_seq, targets = batch
        loss = self.model(item_seq, targets=targets)
        self.log("loss", loss, on_epoch=True, on_step=False, batch_size=len(item_seq))
        return loss

    def validation_step(self, batch: Rows, batch_idx: int) -> None:
        item_seq, target = batch
        top = self.model.recommend(item_seq, k=10, exclude_seen=False).items
        place = (top == target[:, None]).float()  # [B, 10], at most one
        ndcg = (place / torch.log2(torch.arange(2, 12, device=place.device))).sum(1).mean()
        self.log("ndcg@10", ndcg, batch_size=len(item_seq))

    def predict_step(self, batch: Rows, batch_idx: int, dataloader_idx: int = 0) -> torch.Tensor:
        return self.model.recommend(batch[0], k=10).items

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def right_padded(histories: list[torch.Tensor], length: int) -> torch.Tensor:
    """[B, length], the last `length` items of each."""
    rows = torch.zeros(len(histories), length, dtype=torch.int64)
    for row, history in zip(rows, histories, strict=True):
        row[: min(len(history), length)] = history[-length:]
    return rows


def train_rows(log: Sequences, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    histories = [torch.from_numpy(log.history(u)).long()[-length - 1 :] for u in range(len(log))]
    histories = [history for history in histories if len(history) > 1]
    items = right_padded([history[:-1] for history in histories], length)
    return list(
        zip(items, right_padded([history[1:] for history in histories], length), strict=True)
    )


def target_rows(targets: Targets, length: int) -> list[tuple[torch.Tensor, int]]:
    histories = [torch.from_numpy(targets.history(i)).long() for i in range(len(targets))]
    return list(zip(right_padded(histories, length), targets.target_items.tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a log that `Interactions` reads (default: a made-up one)")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-len", type=int, default=50)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--checkpoint", help="file to write, and to go on from")
    options = parser.parse_args()
    lightning.seed_everything(0, verbose=False)
    if options.data:
        log = Interactions.from_file(options.data)
    else:
        log = make_synthetic(300, 200, mean_length=30)[0]
    train, valid, _ = log.leave_one_out()
    model = RecGRELA.for_data(train, num_layers=2, max_seq_len=options.max_len)
    module = RecGRELAModule(model, options.lr)
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rows = DataLoader(train_rows(train, options.max_len), options.batch_size, shuffle=True)
    held_out = DataLoader(target_rows(valid, options.max_len), 256)
    found = options.checkpoint and Path(options.checkpoint).exists()
    # weights_only: a checkpoint is a pickle, and a changed one could run anything.
    going_on = {"ckpt_path": options.checkpoint, "weights_only": True} if found else {}
    trainer.fit(module, rows, held_out, **going_on)
    if "loss" not in trainer.callback_metrics:
        sys.exit(f"no epoch was left to train: --epochs is {options.epochs}")
    told = {name: float(value) for name, value in trainer.callback_metrics.items()}
    print(f"epochs {trainer.current_epoch}  loss {told['loss']:.4f}  ndcg@10 {told['ndcg@10']:.4f}")
    lists = torch.cat(trainer.predict(module, held_out))
    print("the first user's list:", train.id_map.decode_items(lists[0]).tolist())
    if options.checkpoint:
        trainer.save_checkpoint(options.checkpoint)


if __name__ == "__main__":
    main()
