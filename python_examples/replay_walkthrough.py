"""RePlay's SasRec with a RecGRELA body: parquet in, Lightning training, RePlay's metrics.

    pip install torch
    pip install 'recgrela-ext[replay]'
    python python_examples/replay_walkthrough.py                      # a small made-up catalogue
    python python_examples/replay_walkthrough.py --data log.inter --epochs 20

--body sasrec trains RePlay's own encoder instead; nothing else changes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import lightning
import pandas as pd
from replay.data import FeatureHint, FeatureType
from replay.data.nn import ParquetModule, TensorFeatureInfo, TensorSchema
from replay.nn.lightning import LightningModule
from replay.nn.lightning.callback import ComputeMetricsCallback
from replay.nn.lightning.optimizer import OptimizerFactory
from replay.nn.loss import CE
from replay.nn.sequential import SasRec
from replay.nn.transform.template import make_default_sasrec_transforms

from recgrela_ext.data import Interactions
from recgrela_ext.data.synthetic import make_synthetic
from recgrela_ext.integrations.replay import recgrela_body


def schema_of(num_items: int, width: int = 64) -> TensorSchema:
    """One feature, the item; padding is row `num_items`, after the last item."""
    return TensorSchema(
        [
            TensorFeatureInfo(
                name="item_id",
                is_seq=True,
                padding_value=num_items,
                cardinality=num_items,
                embedding_dim=width,
                feature_type=FeatureType.CATEGORICAL,
                feature_hint=FeatureHint.ITEM_ID,
            )
        ]
    )


def write_parts(log: Interactions, folder: Path) -> None:
    """train.parquet: histories without their last item; validate.parquet: with it as the truth."""
    items = pd.DataFrame({"user_id": log.user, "item_id": log.item})  # codes from 0
    histories = items.groupby("user_id")["item_id"].agg(list)
    histories = histories[histories.map(len) > 2]
    if histories.empty:
        raise SystemExit("--data must hold a user with three events, got none")
    train = pd.DataFrame({"item_id": histories.map(lambda h: h[:-1])}).reset_index()
    train.to_parquet(folder / "train.parquet")
    train["ground_truth"] = histories.map(lambda h: h[-1:]).to_numpy()
    train.to_parquet(folder / "validate.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a log that `Interactions` reads (default: a made-up one)")
    parser.add_argument("--body", choices=("recgrela", "sasrec"), default="recgrela")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--max-len", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    options = parser.parse_args()

    lightning.seed_everything(0, verbose=False)
    if options.data:
        log = Interactions.from_file(options.data)
    else:
        log = make_synthetic(300, 200, mean_length=30)[0]
    num_items = len(log.item_ids)
    schema = schema_of(num_items)
    if options.body == "recgrela":
        body = recgrela_body(schema, num_blocks=2, num_heads=4)
        model = SasRec(body=body, loss=CE(ignore_index=num_items))
    else:
        model = SasRec.from_params(
            schema, embedding_dim=64, num_blocks=2, max_sequence_length=options.max_len
        )
    metrics = ComputeMetricsCallback(
        metrics=["recall", "ndcg"], ks=[10], item_count=num_items, verbose=False
    )
    padded = {"shape": options.max_len, "padding": num_items}
    with tempfile.TemporaryDirectory() as folder:
        write_parts(log, Path(folder))
        data = ParquetModule(
            train_path=f"{folder}/train.parquet",
            validate_path=f"{folder}/validate.parquet",
            batch_size=options.batch_size,
            metadata={
                "train": {"item_id": {**padded, "shape": options.max_len + 1}},
                "validate": {"item_id": padded, "ground_truth": {"shape": 1, "padding": -1}},
            },
            transforms=make_default_sasrec_transforms(schema),
        )
        trainer = lightning.Trainer(
            max_epochs=options.epochs,
            callbacks=[metrics],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        optimizer = OptimizerFactory(learning_rate=options.lr)
        trainer.fit(LightningModule(model, optimizer_factory=optimizer), datamodule=data)
    last = metrics.get_metrics()[options.epochs - 1]
    print("  ".join(f"{name} {float(value):.4f}" for name, value in sorted(last.items())))


if __name__ == "__main__":
    main()
