"""Train and evaluate RecGRELA inside RecBole 1.2.1 on ml-100k.

RecBole wants an environment of its own, as it needs old versions of numpy, pandas and setuptools:

    pip install torch
    pip install 'recgrela-ext[recbole]'
    python python_examples/recbole_ml100k.py
    python python_examples/recbole_ml100k.py --dataset mine --data FOLDER

ml-100k comes with RecBole, which reads its own copy whatever --data says; another dataset is
FOLDER/NAME/NAME.inter.
"""

from __future__ import annotations

import argparse
import sys

from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import init_seed

from recgrela_ext.integrations.recbole import RecGRELA, SafeTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="ml-100k", help="its name")
    parser.add_argument("--data", default="dataset", help="folder of datasets")
    parser.add_argument("--mode", choices=("causal", "paper"), default="causal")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--max-len", type=int, default=50)
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--checkpoints", default="saved", help="folder for RecBole's checkpoints")
    options = parser.parse_args()
    sys.argv = sys.argv[:1]  # RecBole reads it too
    settings = {
        "data_path": options.data,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "MAX_ITEM_LIST_LENGTH": options.max_len,
        "mode": options.mode,
        "hidden_size": 64,
        "num_heads": 4,
        "num_layers": options.num_layers,
        "dropout_prob": 0.1,
        "loss_type": "CE",
        "train_neg_sample_args": None,
        "epochs": options.epochs,
        "train_batch_size": 2048,
        "eval_batch_size": 512,
        "eval_args": {
            "split": {"LS": "valid_and_test"},
            "order": "TO",
            "group_by": "user",
            "mode": "full",
        },
        "metrics": ["Hit", "NDCG", "MRR"],
        "topk": [5, 10],
        "valid_metric": "NDCG@10",
        "seed": 2020,
        "checkpoint_dir": options.checkpoints,
        "show_progress": False,
    }
    config = Config(model=RecGRELA, dataset=options.dataset, config_dict=settings)
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    train, valid, test = data_preparation(config, dataset)
    model = RecGRELA(config, train.dataset).to(config["device"])
    trainer = SafeTrainer(config, model)
    best, _ = trainer.fit(train, valid, show_progress=config["show_progress"])
    print(f"best valid ndcg@10 {best:.4f}")
    print("test", dict(trainer.evaluate(test, load_best_model=True)))


if __name__ == "__main__":
    main()
