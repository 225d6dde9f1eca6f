"""RecGRELA as a RecBole 1.2.1 sequential model.

    config = Config(model=RecGRELA, dataset="ml-100k", config_file_list=["RecGRELA.yaml"])
    train, valid, test = data_preparation(config, create_dataset(config))
    trainer = SafeTrainer(config, RecGRELA(config, train.dataset).to(config["device"]))
    trainer.fit(train, valid)
    trainer.evaluate(test)

Keys of the published YAML: ``hidden_size``, ``num_heads``, ``num_layers``, ``dropout_prob``,
``drop_path``, ``loss_type`` (CE or BPR; CE needs ``train_neg_sample_args: ~``). ``mode: causal`` is
this project's variant and the default, ``mode: paper`` the published bidirectional model;
``repeat_bias: true`` is a causal model's learned bias for items met before. RecBole
pads on the right and feeds one prefix per row: the last real position is trained and read.

RecBole 1.2.1 runs under "numpy<2" "pandas<3" "setuptools<81", which the extra ``recbole`` pins. Its
own trainer unpickles whole objects from its checkpoints, which torch refuses since 2.6 unless
TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 is set. `SafeTrainer` reads the same files without running
anything they hold, and needs no such setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from recgrela_ext import RecGRELA as Model
from recgrela_ext import RecGRELAConfig
from recgrela_ext.errors import CheckpointError
from recgrela_ext.integrations.published import published_state_dict, read_checkpoint

try:
    from recbole.model.abstract_recommender import SequentialRecommender
    from recbole.model.loss import BPRLoss
    from recbole.trainer import Trainer
except (ImportError, AttributeError) as error:
    raise ImportError(
        "recgrela_ext.integrations.recbole needs recbole 1.2.1: pip install 'recgrela-ext[recbole]'"
    ) from error

_KEYS = {"dropout_prob": "dropout"}
_KEYS |= {
    key: key for key in ("hidden_size", "num_heads", "num_layers", "drop_path", "repeat_bias")
}
_SAVED: dict[str, Any] = {"epoch": int, "cur_step": int, "best_valid_score": (int, float),
                          "state_dict": Mapping, "optimizer": Mapping}  # fmt: skip


class RecGRELA(SequentialRecommender):
    """The model behind RecBole's three methods.

    Raises:
        ValueError: ``mode`` or ``loss_type`` is unknown, BPR lacks negatives or meets a repeat
            bias, a size cannot work.
    """

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.mode = mode = config["mode"] or "causal"
        self.loss_type = config["loss_type"] or "CE"
        if mode not in ("causal", "paper"):
            raise ValueError(f"RecGRELA: mode must be causal or paper, got {mode!r}")
        if self.loss_type not in ("CE", "BPR"):
            raise ValueError(f"RecGRELA: loss_type must be CE or BPR, got {self.loss_type!r}")
        sampling = config["train_neg_sample_args"] or {}
        if self.loss_type == "BPR" and config["repeat_bias"]:
            raise ValueError("RecGRELA: loss_type must be CE with repeat_bias, got BPR")
        if self.loss_type == "BPR" and sampling.get("distribution", "none") == "none":
            raise ValueError("RecGRELA: train_neg_sample_args must be given for BPR, got none")
        options = {name: config[key] for key, name in _KEYS.items() if config[key] is not None}
        make = RecGRELAConfig.paper if mode == "paper" else RecGRELAConfig
        options["max_seq_len"] = self.max_seq_length
        self.model = Model(make(n_items=self.n_items, **options))
        self.bpr = BPRLoss()

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """Hidden state ``[B, hidden]`` at the last real item of ``item_seq [B, L]``."""
        return self.model(item_seq, item_seq_len)

    def calculate_loss(self, interaction: Any) -> Tensor:
        """Mean cross-entropy over all items, or BPR, of one target per row."""
        item_seq, item_seq_len = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        positive = interaction[self.POS_ITEM_ID]
        if self.loss_type == "BPR":
            hidden = self.forward(item_seq, item_seq_len)
            negative = interaction[self.NEG_ITEM_ID]
            return self.bpr(self._dot(hidden, positive), self._dot(hidden, negative))
        last = torch.arange(item_seq.shape[1], device=item_seq.device) == item_seq_len[:, None] - 1
        padding = self.model.config.padding_idx
        targets = torch.where(last, positive[:, None], padding)
        return self.model.loss(item_seq, item_seq_len, targets)

    def predict(self, interaction: Any) -> Tensor:
        """Scores ``[B]`` of the rows' own items."""
        items = interaction[self.ITEM_ID]
        if self.model.config.repeat_bias:
            return self.full_sort_predict(interaction).gather(1, items[:, None])[:, 0]
        hidden = self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        return self._dot(hidden, items)

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores ``[B, n_items]`` of all items."""
        item_seq = interaction[self.ITEM_SEQ]
        hidden = self.forward(item_seq, interaction[self.ITEM_SEQ_LEN])
        return self.model.scores(hidden, item_seq if self.model.config.repeat_bias else None)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Own weights, or those of the published implementation (``mode: paper`` alone)."""
        if any("GRELA_block." in str(name) for name in state_dict):
            if self.model.config.causal:
                raise ValueError("RecGRELA: mode must be paper for published weights, got causal")
            published = Model.from_reference(
                dict(state_dict), num_heads=self.model.config.num_heads
            )
            state_dict = {f"model.{name}": value for name, value in published.state_dict().items()}
        return super().load_state_dict(state_dict, *args, **kwargs)

    def other_parameter(self) -> dict[str, Any]:
        """What no weight's shape tells; RecBole keeps it in its checkpoints."""
        return {"mode": self.mode, "num_heads": self.model.config.num_heads}

    def load_other_parameter(self, para: Any) -> None:
        """CheckpointError when the weights are of another mode or number of heads."""
        for name, own in self.other_parameter().items():
            saved = own if para is None else para.get(name, own)
            if saved != own:
                raise CheckpointError(
                    f"RecGRELA: {name} must be {saved!r}, as in the checkpoint, got {own!r}"
                )

    def _dot(self, hidden: Tensor, items: Tensor) -> Tensor:
        return (hidden * self.model.item_embedding(items)).sum(dim=-1)


class SafeTrainer(Trainer):
    """RecBole's trainer, for any of its models, reading checkpoints through an allow-list."""

    def evaluate(
        self,
        eval_data: Any,
        load_best_model: bool = True,
        model_file: Any = None,
        show_progress: bool = False,
    ) -> Any:
        """As RecBole's; CheckpointError when the file of the best model cannot be read."""
        if load_best_model and eval_data:
            path = model_file or self.saved_model_file
            self._load(published_state_dict(path), read_checkpoint(path, "evaluate"), path)
        return super().evaluate(eval_data, False, None, show_progress)

    def resume_checkpoint(self, resume_file: Any) -> None:
        """As RecBole's; CheckpointError when the file cannot be read."""
        saved = read_checkpoint(resume_file, "resume_checkpoint")
        for name, kind in _SAVED.items():
            if not isinstance(saved.get(name), kind):
                got = type(saved.get(name)).__name__
                raise CheckpointError(
                    f"resume_checkpoint: {resume_file} must hold {name}, got {got}"
                )
        self._load(saved["state_dict"], saved, resume_file)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.saved_model_file = str(resume_file)
        self.start_epoch, self.cur_step = saved["epoch"] + 1, saved["cur_step"]
        self.best_valid_score = saved["best_valid_score"]

    def _load(self, weights: Any, saved: dict[str, Any], path: Any) -> None:
        other = saved.get("other_parameter")
        if not isinstance(other, (Mapping, type(None))):
            got = type(other).__name__
            raise CheckpointError(f"SafeTrainer: {path} must hold other_parameter, got {got}")
        self.model.load_other_parameter(other)  # first: it may refuse the weights
        self.model.load_state_dict(weights)
