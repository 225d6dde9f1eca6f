"""RecGRELA behind a TorchRec EmbeddingCollection: jagged histories, a table cut over processes.

    model = RecGRELA(RecGRELAConfig(num_items=10_000_000))
    model, optimizer = shard_by_rows(model, table_lr=0.05, lr=1e-3)     # several processes
    loss, hidden = model(jagged_batch(item_seqs, targets, negatives))
    loss.backward(); optimizer.step()                  # the table's step was in the backward
    save_checkpoint("runs/step-1000", model, optimizer)    # for any number of processes
    gather(model).save_pretrained("runs/whole")        # on process 0

A batch is one KeyedJaggedTensor: "item" and "target", equally long, and "negative", sampled items
of each user. One table answers all three. The encoder takes the histories packed, as they come. The
loss is a softmax over the target and its user's negatives, and a mean over all processes' targets.

Tried with torchrec and fbgemm-gpu-cpu 1.8.0 on torch 2.13; 1.7.0 and 1.9.x do not load there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward

from recgrela_ext import GRELAEncoder, RecGRELAConfig
from recgrela_ext import RecGRELA as WholeModel
from recgrela_ext.errors import shown
from recgrela_ext.integrations import checkpoints
from recgrela_ext.layers.grela_block import sequence_of_rows
from recgrela_ext.model.inputs import check_ids, check_integers, values_are_checked

try:
    from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
    from torchrec.distributed.types import ShardingPlan
    from torchrec.optim import RowWiseAdagrad
    from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
    from torchrec.optim.optimizers import in_backward_optimizer_filter
except (ImportError, OSError) as error:
    raise ImportError(
        "recgrela_ext.integrations.torchrec needs torchrec and fbgemm 1.8: "
        "pip install 'recgrela-ext[torchrec]'"
    ) from error

KEYS = ["item", "target", "negative"]


class RecGRELA(nn.Module):
    """The causal model without scores of all items; but for the table, weights keep their names.

    Args:
        config: as there; causal, without position embeddings and repeat bias. Row `padding_idx` is
            never read.

    Raises:
        ValueError: the configuration is bidirectional, has position embeddings or a repeat bias.
        TypeError: it is no RecGRELAConfig.
    """

    def __init__(self, config: RecGRELAConfig) -> None:
        super().__init__()
        if not isinstance(config, RecGRELAConfig):
            got = type(config).__name__
            raise TypeError(f"RecGRELA: config must be a RecGRELAConfig, got {got}")
        if not config.causal or config.position != "none" or config.repeat_bias:
            raise ValueError(
                "RecGRELA: config must be causal with position='none' and without repeat_bias, "
                f"got {config.variant!r}"
            )
        self.config = config
        width, std = config.hidden_size, config.initializer_range
        table = EmbeddingConfig(
            name="item_embedding",
            embedding_dim=width,
            num_embeddings=config.rows,
            feature_names=KEYS,
            init_fn=partial(nn.init.normal_, std=std),
        )
        self.tables = EmbeddingCollection(tables=[table])
        self.dropout = nn.Dropout(config.dropout)
        self.input_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.encoder = GRELAEncoder(
            width, config.num_layers, config.num_heads,
            final_norm=config.final_norm, **config.block_options(),
        )  # fmt: skip
        self.encoder.reset_parameters(std)

    def forward(self, batch: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        """Loss (its mean over the processes is the mean over all targets) and hidden states [T, D].

        Args:
            batch: keys "item" and "target" [T] each, "negative" [B * K].

        Raises:
            ValueError: a key is missing; on the CPU also an id that is no item, a user whose items
                and targets differ in number, or users with unlike numbers of negatives.
        """
        self._check(batch)
        rows = self.tables(batch)
        bounds = rows["item"].offsets()
        x = self.input_norm(self.dropout(rows["item"].values()))
        hidden = self.encoder(x, cu_seqlens=bounds)
        positive = (hidden * rows["target"].values()).sum(-1, keepdim=True)  # [T, 1]
        logits = torch.cat((positive, self._negative(batch, rows, hidden, bounds)), 1)
        first = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        count = torch.tensor(float(len(logits)), dtype=torch.float64, device=logits.device)
        processes = 1
        if dist.is_initialized():
            dist.all_reduce(count)
            processes = dist.get_world_size()
        share = (processes / count.clamp(min=1)).to(logits.dtype)
        return F.cross_entropy(logits, first, reduction="sum") * share, hidden

    def _check(self, batch: KeyedJaggedTensor) -> None:
        """Ids beyond a sharded table are read as row 0, and lengths that differ shift all rows."""
        if not set(KEYS) <= set(batch.keys()):
            raise ValueError(f"RecGRELA: batch must have the keys {KEYS}, got {batch.keys()}")
        if not values_are_checked(batch.values()):
            return
        items, targets, sampled = (batch[key].lengths() for key in KEYS)
        if not torch.equal(items, targets):
            raise ValueError("RecGRELA: target must be as long as item for every user, got others")
        if bool((sampled != sampled[:1]).any()) or not bool((sampled > 0).all()):
            told = sorted(set(sampled.tolist()))
            raise ValueError(f"RecGRELA: negative must be K > 0 items for every user, got {told}")
        for key in KEYS:
            values = batch[key].values()
            check_ids("RecGRELA", key, self.config, values)
            if bool((values == self.config.padding_idx).any()):
                padding = self.config.padding_idx
                raise ValueError(f"RecGRELA: {key} must be real items, got padding_idx={padding}")

    def _negative(self, batch: Any, rows: Any, hidden: Tensor, bounds: Tensor) -> Tensor:
        """Logits [T, K] of the user's sampled items; -inf where one is the target itself."""
        num = len(bounds) - 1
        user = sequence_of_rows(bounds, len(hidden))
        place = torch.arange(len(hidden), device=hidden.device) - bounds[user]
        padded = hidden.new_zeros(num, int(bounds.diff().max()), hidden.shape[1])
        padded[user, place] = hidden
        sampled = rows["negative"].values().view(num, -1, hidden.shape[1])  # [B, K, D]
        logits = torch.bmm(padded, sampled.mT)[user, place]
        same = batch["negative"].values().view(num, -1)[user] == batch["target"].values()[:, None]
        return logits.masked_fill(same, -torch.inf)


def jagged_batch(
    item_seqs: Sequence[Tensor], targets: Sequence[Tensor], negatives: Tensor
) -> KeyedJaggedTensor:
    """One batch from B users' items and next items [L_b] each and negatives [B, K].

    Raises:
        ValueError: there is no user or no negative, or the numbers of users, or of items and
            targets, differ.
        TypeError: ids that are no int64 or int32 tensors.
    """
    if not item_seqs:
        raise ValueError("jagged_batch: item_seqs must hold at least one user, got none")
    for name, tensors in (("item_seqs", item_seqs), ("targets", targets)):
        for x in tensors:
            check_integers("jagged_batch", name, x)
            if x.dim() != 1:
                raise ValueError(f"jagged_batch: {name} must hold [L] each, got {list(x.shape)}")
    check_integers("jagged_batch", "negatives", negatives)
    if negatives.dim() != 2 or not negatives.shape[1]:
        got = list(negatives.shape)
        raise ValueError(f"jagged_batch: negatives must be [B, K], K at least 1, got {got}")
    lengths = torch.tensor([len(items) for items in item_seqs])
    wanted = torch.tensor([len(items) for items in targets])
    if len(negatives) != len(lengths) or not torch.equal(lengths, wanted):
        raise ValueError(
            "jagged_batch: targets and negatives must fit item_seqs of lengths "
            f"{lengths.tolist()}, got lengths {wanted.tolist()} and {len(negatives)} users"
        )
    values = torch.cat((*item_seqs, *targets, negatives.flatten()))
    sampled = torch.full_like(lengths, negatives.shape[1])
    return KeyedJaggedTensor.from_lengths_sync(KEYS, values, torch.cat((lengths, wanted, sampled)))


def shard_by_rows(
    model: RecGRELA, table_lr: float, lr: float, device: torch.device | str = "cpu"
) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """The table cut by rows with row-wise Adagrad in its backward; the rest in DDP with AdamW.

    Raises:
        TypeError: the model is not this module's `RecGRELA`.
        ValueError: a rate is negative or not finite, or a process would hold no row of the table,
            which TorchRec does not do.
    """
    if not isinstance(model, RecGRELA):
        got = type(model).__name__
        raise TypeError(f"shard_by_rows: model must be this module's RecGRELA, got {got}")
    for name, rate in (("table_lr", table_lr), ("lr", lr)):
        if not isinstance(rate, (int, float)) or not 0 <= rate < math.inf:
            raise ValueError(f"shard_by_rows: {name} must be a finite rate, got {shown(rate)}")
    rows, processes = model.config.rows, dist.get_world_size()
    if rows <= -(-rows // processes) * (processes - 1):  # equal blocks, the last one shorter
        raise ValueError(
            "shard_by_rows: n_items must give every process a block of rows, "
            f"got {rows} rows for {processes} processes"
        )
    _apply_optimizer_in_backward(RowWiseAdagrad, model.tables.parameters(), {"lr": table_lr})
    sharder: Any = EmbeddingCollectionSharder()
    device = torch.device(device)
    plan = construct_module_sharding_plan(
        model.tables, {"item_embedding": row_wise()}, sharder, device_type=device.type
    )
    sharded = DistributedModelParallel(
        model, device=device, plan=ShardingPlan({"tables": plan}), sharders=[sharder]
    )
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(sharded.named_parameters())),
        lambda parameters: _with_state(torch.optim.AdamW(parameters, lr=0.0), lr),
    )
    return sharded, CombinedOptimizer([("table", sharded.fused_optimizer), ("dense", dense)])


def _with_state(optimizer: torch.optim.Optimizer, lr: float) -> torch.optim.Optimizer:
    """TorchRec loads a state into tensors that exist, so they are made here, by a step of 0."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        group["lr"] = lr
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()
    optimizer.zero_grad()
    return optimizer


def save_checkpoint(folder: str | os.PathLike[str], model: nn.Module, optimizer: Any) -> None:
    """Every process writes its rows and its part of the optimiser's state."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoints.write(folder, state, model)


def load_checkpoint(folder: str | os.PathLike[str], model: nn.Module, optimizer: Any) -> None:
    """Load what another number of processes may have saved.

    Raises:
        CheckpointError: a file is missing or torn, or it is of another model.
    """
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoints.read(folder, state, model)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])


def gather(model: DistributedModelParallel) -> WholeModel | None:
    """The whole model on process 0, to evaluate, save or serve it; None on the others.

    Raises:
        TypeError: the model did not come from `shard_by_rows`.
    """
    if not isinstance(model, DistributedModelParallel):
        raise TypeError(f"gather: model must be sharded by rows, got {type(model).__name__}")
    weights = dict(model.state_dict())
    table = weights.pop("tables.embeddings.item_embedding.weight")
    first = dist.get_rank() == 0
    whole = torch.empty(table.size()) if first else None
    table.gather(0, whole)
    if not first:
        return None
    config = next(m.config for m in model.modules() if isinstance(m, RecGRELA))
    plain = WholeModel(config)
    plain.load_state_dict({**weights, "item_embedding.weight": whole})
    with torch.no_grad():
        plain.item_embedding.weight[config.padding_idx] = 0  # drawn like the others, never read
    return plain.eval()
