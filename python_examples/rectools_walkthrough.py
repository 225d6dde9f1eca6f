"""RecTools' SASRecModel with RecGRELA layers: fit, recommend, measure, save.

    pip install torch
    pip install 'recgrela-ext[rectools]'
    python python_examples/rectools_walkthrough.py                    # a small made-up catalogue
    python python_examples/rectools_walkthrough.py --data log.inter --epochs 20

--layers sasrec trains RecTools' own layers instead; nothing else changes.
"""

from __future__ import annotations

import argparse

import pandas as pd
from pytorch_lightning import seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.metrics import NDCG, HitRate, calc_metrics
from rectools.models import SASRecModel

from recgrela_ext.data import Interactions
from recgrela_ext.data.synthetic import make_synthetic
from recgrela_ext.integrations.rectools import SLOT


def read_frame(path: str | None) -> pd.DataFrame:
    """user_id, item_id, datetime and weight; every user's events in order of time."""
    log = Interactions.from_file(path) if path else make_synthetic(300, 200, mean_length=30)[0]
    frame = pd.DataFrame(
        {Columns.User: log.user_ids[log.user], Columns.Item: log.item_ids[log.item]}
    )
    place = frame.groupby(Columns.User).cumcount()  # ranks: ties in time stay as they are
    frame[Columns.Datetime] = pd.to_datetime(place, unit="s")
    frame[Columns.Weight] = 1.0
    return frame


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a log that `Interactions` reads (default: a made-up one)")
    parser.add_argument("--layers", choices=("recgrela", "sasrec"), default="recgrela")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--max-len", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--save", help="file for RecTools' model")
    options = parser.parse_args()

    seed_everything(0, verbose=False)
    frame = read_frame(options.data)
    last = frame.groupby(Columns.User).cumcount(ascending=False) == 0
    train, test = frame[~last], frame[last]
    dataset = Dataset.construct(train)
    model = SASRecModel(
        **(SLOT if options.layers == "recgrela" else {}),
        n_blocks=2,
        n_heads=4,
        n_factors=64,
        session_max_len=options.max_len,
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
    )
    model.fit(dataset)
    known = test[test[Columns.Item].isin(train[Columns.Item])]
    users = known[known[Columns.User].isin(dataset.user_id_map.external_ids)][Columns.User]
    reco = model.recommend(
        users=users.unique(),
        dataset=dataset,
        k=10,
        filter_viewed=False,
        on_unsupported_targets="warn",
    )
    metrics = {"hr@10": HitRate(k=10), "ndcg@10": NDCG(k=10, divide_by_achievable=True)}
    told = calc_metrics(metrics, reco, interactions=known)
    print("  ".join(f"{name} {value:.4f}" for name, value in told.items()))
    if options.save:
        model.save(options.save)


if __name__ == "__main__":
    main()
