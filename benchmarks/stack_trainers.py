"""Train one model inside a framework, ours or the framework's own SASRec; see stacks.py.

Every function takes the training histories (item rows from 1) and returns a scorer for `evaluate`
and the seconds of each epoch's training, read from `now`. Both models of a framework get the same
batches, loss (softmax over all items), optimiser, width, depth, heads and dropout.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recgrela_ext.data import Sequences


@dataclass(frozen=True)
class Settings:
    """What both models share; `max_len` and `batch_size` have a default per framework."""

    epochs: int = 20
    width: int = 64
    layers: int = 2
    heads: int = 2
    dropout: float = 0.2
    max_len: int = 50
    batch_size: int = 32


class Scorer:
    """`score(histories)` over rows 0 .. num_items; `compute`: padded rows [B, L], lengths [B]."""

    def __init__(self, compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], max_len: int,
                 left: bool) -> None:  # fmt: skip
        self.compute, self.max_len, self.left = compute, max_len, left

    @torch.no_grad()
    def score(self, histories: list[np.ndarray]) -> torch.Tensor:
        rows = torch.zeros(len(histories), self.max_len, dtype=torch.int64)
        kept = [history[-self.max_len :] for history in histories]
        for row, history in zip(rows, kept, strict=True):
            start = self.max_len - len(history) if self.left else 0
            row[start : start + len(history)] = torch.from_numpy(history.astype(np.int64))
        lengths = torch.tensor([len(history) for history in kept])
        parts = zip(rows.split(256), lengths.split(256), strict=True)
        return torch.cat([self.compute(*part).float() for part in parts])


Now = Callable[[], float]


def clock(base: type, now: Now) -> Any:
    """A Lightning callback that notes the seconds of every epoch's training."""

    class Clock(base):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_train_epoch_start(self, *_: Any) -> None:
            self._start = now()

        def on_train_epoch_end(self, *_: Any) -> None:
            self.seconds.append(now() - self._start)

    return Clock()


def recbole(
    train: Sequences,
    ours: bool,
    settings: Settings,
    lr: float,
    seed: int,
    now: Now = time.perf_counter,
) -> tuple[Scorer, list[float]]:
    """One row per prefix, right-padded; CE of the last position."""
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.sequential_recommender import SASRec
    from recbole.trainer import Trainer
    from recbole.utils import init_seed

    from recgrela_ext.integrations.recbole import RecGRELA

    seconds: list[float] = []

    class Timed(Trainer):
        def _train_epoch(self, *args: Any, **kwargs: Any) -> Any:
            start = now()
            loss = super()._train_epoch(*args, **kwargs)
            seconds.append(now() - start)
            return loss

    kind = RecGRELA if ours else SASRec
    drop = settings.dropout
    sizes = {"hidden_size": settings.width, "num_layers": settings.layers,
             "num_heads": settings.heads, "dropout_prob": drop, "drop_path": drop,
             "n_layers": settings.layers, "n_heads": settings.heads,
             "inner_size": 4 * settings.width, "hidden_dropout_prob": drop,
             "attn_dropout_prob": drop}  # fmt: skip
    argv, sys.argv = sys.argv, sys.argv[:1]  # RecBole reads it
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "log")
        path.mkdir()
        lines = ["user_id:token\titem_id:token\ttimestamp:float"]
        for user in range(len(train)):
            history = train.history(user).tolist()
            lines += [f"{user}\t{item}\t{place}" for place, item in enumerate(history)]
        (path / "log.inter").write_text("\n".join(lines) + "\n", encoding="utf-8")
        given = {**sizes, "data_path": folder, "seed": seed, "learning_rate": lr,
                 "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
                 "MAX_ITEM_LIST_LENGTH": settings.max_len, "loss_type": "CE",
                 "train_neg_sample_args": None, "epochs": settings.epochs,
                 "train_batch_size": settings.batch_size, "use_gpu": False,
                 "eval_args": {"split": {"RS": [1.0, 0.0, 0.0]}, "order": "TO",
                               "group_by": "user", "mode": "full"},
                 "valid_metric": "NDCG@10", "checkpoint_dir": folder,
                 "show_progress": False}  # fmt: skip
        config = Config(model=kind, dataset="log", config_dict=given)
        sys.argv = argv
        init_seed(seed, True)
        rows, _, _ = data_preparation(config, create_dataset(config))
        model = kind(config, rows.dataset)
        Timed(config, model).fit(rows, None, verbose=False, saved=False, show_progress=False)
    known = rows.dataset.field2token_id["item_id"]
    to_theirs = torch.tensor([known.get(str(row), 0) for row in range(train.n_items)])
    model.eval()

    def compute(items: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        rows = _close_gaps(to_theirs[items], left=False)
        batch = {"item_id_list": rows, "item_length": (rows != 0).sum(1)}
        scores = model.full_sort_predict(batch)[:, to_theirs]
        return scores.masked_fill(to_theirs == 0, -torch.inf)

    return Scorer(compute, settings.max_len, left=False), seconds


def rectools(
    train: Sequences,
    ours: bool,
    settings: Settings,
    lr: float,
    seed: int,
    now: Now = time.perf_counter,
) -> tuple[Scorer, list[float]]:
    """The last `max_len` steps of every user, left-padded; softmax at all positions."""
    import pandas as pd
    from pytorch_lightning import Callback, Trainer, seed_everything
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel

    from recgrela_ext.integrations.rectools import SLOT

    seed_everything(seed, verbose=False)
    lengths = train.lengths
    place = np.concatenate([np.arange(length) for length in lengths])
    frame = pd.DataFrame(
        {
            Columns.User: np.repeat(np.arange(len(train)), lengths),
            Columns.Item: train.items.astype(np.int64),
            Columns.Weight: 1.0,
            Columns.Datetime: pd.to_datetime(place, unit="s"),
        }
    )
    timer = clock(Callback, now)

    def trainer() -> Trainer:
        return Trainer(max_epochs=settings.epochs, accelerator="cpu", logger=False,
                       callbacks=[timer], **_SILENT)  # fmt: skip

    model = SASRecModel(
        **(SLOT if ours else {}), n_blocks=settings.layers, n_heads=settings.heads,
        n_factors=settings.width, dropout_rate=settings.dropout, lr=lr, loss="softmax",
        session_max_len=settings.max_len, batch_size=settings.batch_size,
        get_trainer_func=trainer, **({"transformer_layers_kwargs": {"drop_path": settings.dropout}}
                                     if ours else {}),
    )  # fmt: skip
    model.fit(Dataset.construct(frame))
    timer = next(one for one in model.fit_trainer.callbacks if type(one).__name__ == "Clock")
    internal = model.data_preparator.item_id_map.to_internal
    to_theirs = torch.tensor([int(internal.get(row, 0)) for row in range(train.n_items)])
    to_theirs[0] = 0
    backbone = model.torch_model.eval()
    with torch.no_grad():
        table = backbone.item_model.get_all_embeddings()

    def compute(items: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        hidden = backbone.encode_sessions({"x": _close_gaps(to_theirs[items], left=True)}, table)[
            :, -1
        ]
        return (hidden @ table.T)[:, to_theirs].masked_fill(to_theirs == 0, -torch.inf)

    return Scorer(compute, settings.max_len, left=True), timer.seconds


def replay(
    train: Sequences,
    ours: bool,
    settings: Settings,
    lr: float,
    seed: int,
    now: Now = time.perf_counter,
) -> tuple[Scorer, list[float]]:
    """The last `max_len` steps of every user, left-padded; CE at all positions."""
    import lightning
    import pandas as pd
    from replay.data import FeatureHint, FeatureType
    from replay.data.nn import ParquetModule, TensorFeatureInfo, TensorSchema
    from replay.nn.lightning import LightningModule
    from replay.nn.lightning.optimizer import OptimizerFactory
    from replay.nn.loss import CE
    from replay.nn.sequential import SasRec
    from replay.nn.transform.template import make_default_sasrec_transforms

    from recgrela_ext.integrations.replay import recgrela_body

    lightning.seed_everything(seed, verbose=False)
    pad = train.num_items
    schema = TensorSchema(
        [
            TensorFeatureInfo(
                name="item_id", is_seq=True, padding_value=pad, cardinality=pad,
                embedding_dim=settings.width, feature_type=FeatureType.CATEGORICAL,
                feature_hint=FeatureHint.ITEM_ID,
            )
        ]
    )  # fmt: skip
    if ours:
        body = recgrela_body(schema, settings.heads, settings.layers, settings.dropout,
                             drop_path=settings.dropout)  # fmt: skip
        model = SasRec(body=body, loss=CE(ignore_index=pad))
    else:
        model = SasRec.from_params(schema, settings.width, settings.heads, settings.layers,
                                   settings.max_len, settings.dropout)  # fmt: skip
    timer = clock(lightning.Callback, now)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "train.parquet"))
        histories = [train.history(u) for u in np.flatnonzero(train.lengths > 1)]
        codes = [(history - 1).tolist() for history in histories]
        pd.DataFrame({"user_id": range(len(codes)), "item_id": codes}).to_parquet(path)
        shape = {"item_id": {"shape": settings.max_len + 1, "padding": pad}}
        data = ParquetModule(
            train_path=path, batch_size=settings.batch_size, metadata={"train": shape},
            transforms=make_default_sasrec_transforms(schema),
        )  # fmt: skip
        trainer = lightning.Trainer(max_epochs=settings.epochs, accelerator="cpu", logger=False,
                                    callbacks=[timer], **_SILENT)  # fmt: skip
        factory = OptimizerFactory(learning_rate=lr)
        trainer.fit(LightningModule(model, optimizer_factory=factory), datamodule=data)
    model.eval()

    def compute(items: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        real = items != 0
        batch = {"item_id": torch.where(real, items - 1, pad)}
        logits = model(feature_tensors=batch, padding_mask=real)["logits"]
        return torch.nn.functional.pad(logits, (1, 0), value=-torch.inf)

    return Scorer(compute, settings.max_len, left=True), timer.seconds


_SILENT = {
    "enable_checkpointing": False,
    "limit_val_batches": 0,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def _close_gaps(rows: torch.Tensor, left: bool) -> torch.Tensor:
    """Padded rows [B, L] without the zeros inside them: items the training part lacks."""
    real = rows != 0
    order = (real if left else ~real).to(torch.int8).argsort(dim=1, stable=True)
    return rows.gather(1, order)


TRAINERS = {"recbole": recbole, "rectools": rectools, "replay": replay}
DEFAULTS = {
    "recbole": {"max_len": 50, "batch_size": 2048},
    "rectools": {"max_len": 100, "batch_size": 32},
    "replay": {"max_len": 100, "batch_size": 32},
}
PACKAGES = {"recbole": "recbole", "rectools": "rectools", "replay": "replay-rec"}
