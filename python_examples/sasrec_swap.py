"""The training loop of the common PyTorch SASRec script with RecGRELA in its place.

Only the import differs: the loop feeds left-padded numpy arrays, a positive and a sampled negative
item per position and binary cross-entropy, and ranks the next item against 100 sampled others.

    python python_examples/sasrec_swap.py                    # a small made-up catalogue
    python python_examples/sasrec_swap.py --data log.inter   # or any log `Interactions` reads
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from recgrela_ext.data import Interactions, Sequences, Targets
from recgrela_ext.integrations.sasrec import RecGRELA as SASRec


def made_up(users: int = 400, items: int = 120) -> tuple[Sequences, Targets]:
    """Users who walk through the catalogue in steps of one to three."""
    rng = np.random.default_rng(0)
    starts = rng.integers(0, items, users)
    walks = [
        (start + np.cumsum(rng.integers(1, 4, rng.integers(10, 40)))) % items + 1
        for start in starts
    ]
    train = Sequences.from_lists([walk[:-1].tolist() for walk in walks], items)
    return train, Targets.last_of(Sequences.from_lists([walk.tolist() for walk in walks], items))


def batch_of(
    train: Sequences, users: np.ndarray, maxlen: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """seq, pos, neg ``[B, maxlen]``: what the script's sampler returns."""
    seq, pos, neg = (np.zeros((len(users), maxlen), np.int32) for _ in range(3))
    for row, user in enumerate(users):
        history = train.history(int(user))[-maxlen - 1 :]
        length = len(history) - 1
        seq[row, maxlen - length :] = history[:-1]
        pos[row, maxlen - length :] = history[1:]
        neg[row, maxlen - length :] = rng.integers(1, train.n_items, length)
    return seq, pos, neg


def sampled_ndcg(model: SASRec, targets: Targets, maxlen: int, seed: int = 1) -> float:
    """NDCG@10 of the next item among 100 random others, one user after another."""
    rng = np.random.default_rng(seed)
    total = 0.0
    model.eval()
    with torch.no_grad():
        for i, target in enumerate(targets.target_items):
            seq = np.zeros((1, maxlen), np.int32)
            history = targets.history(i)[-maxlen:]
            seq[0, maxlen - len(history) :] = history
            others = np.setdiff1d(np.arange(1, targets.n_items), targets.history(i))
            others = rng.choice(others[others != target], min(100, len(others) - 1), replace=False)
            logits = model.predict(None, seq, np.concatenate([[target], others]))[0]
            rank = int((logits[1:] >= logits[0]).sum())
            total += 1 / np.log2(rank + 2) if rank < 10 else 0.0
    model.train()
    return total / len(targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a log to read instead of the made-up one")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--maxlen", type=int, default=50)
    parser.add_argument("--hidden_units", type=int, default=48)
    parser.add_argument("--num_blocks", type=int, default=2)
    parser.add_argument("--num_heads", type=int, default=1)
    parser.add_argument("--dropout_rate", type=float, default=0.2)
    args = parser.parse_args()
    if args.data:
        train, _, targets = Interactions.from_file(args.data).leave_one_out()
    else:
        train, targets = made_up()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    users = np.flatnonzero(train.lengths > 1)

    model = SASRec(len(train), train.num_items, args)
    criterion = torch.nn.BCEWithLogitsLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.98))
    for epoch in range(1, args.epochs + 1):
        losses = []
        for batch in np.array_split(rng.permutation(users), -(-len(users) // args.batch_size)):
            seq, pos, neg = batch_of(train, batch, args.maxlen, rng)
            pos_logits, neg_logits = model(batch, seq, pos, neg)
            real = np.where(pos != 0)
            loss = criterion(pos_logits[real], torch.ones(len(real[0])))
            loss = loss + criterion(neg_logits[real], torch.zeros(len(real[0])))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        ndcg = sampled_ndcg(model, targets, args.maxlen)
        print(f"epoch {epoch}  loss {np.mean(losses):.4f}  sampled ndcg@10 {ndcg:.4f}")


if __name__ == "__main__":
    main()
