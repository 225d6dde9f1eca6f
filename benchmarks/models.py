"""Whole models to compare with: RecGRELA as one would first write it, ours on an eager operator,
and SASRec.
"""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import peers
from recgrela_ext import RecGRELA, RecGRELAConfig, ops
from tests.ops.problems import Problem


def ml_1m(hidden_size: int = 64, **options: Any) -> RecGRELA:
    """Four layers, four heads and the 3,416 items of ML-1M."""
    torch.manual_seed(0)
    return RecGRELA(RecGRELAConfig(n_items=3417, hidden_size=hidden_size, **options))


class EagerOperator:
    """Takes the place of `ops.gated_rela` inside `with`; for batches without padding."""

    def __init__(self, bidirectional: bool = False) -> None:
        self._build = peers.published if bidirectional else peers.causal
        self._made: dict[Any, peers.Operator] = {}  # tables are made once, as a user would
        self._patch = mock.patch.object(ops, "gated_rela", self)

    def __enter__(self) -> None:
        self._patch.start()

    def __exit__(self, *_: object) -> None:
        self._patch.stop()

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, inv_freq: Tensor, weight: Tensor,
        bias: Tensor, cu_seqlens: Tensor | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        shape = q.shape
        if cu_seqlens is not None:
            q, k, v, gate = (x.unflatten(0, (cu_seqlens.shape[0] - 1, -1)) for x in (q, k, v, gate))
        key = (q.shape, q.dtype, q.device)
        if key not in self._made:
            row = q.new_empty(q.shape)
            self._made[key] = self._build(Problem(row, row, row, row, inv_freq, weight, bias))
        return self._made[key](q, k, v, gate, weight, bias).reshape(shape)


class PlainRecGRELA(nn.Module):
    """The model out of torch's own parts, as the published code is: padded rows, nn.Dropout, the
    eager operator, logits of all positions at once. Weights are a copy of `model`'s. `real`:
    rotations in real numbers, for torch.compile, which leaves complex ones alone.
    """

    def __init__(
        self, model: RecGRELA, length: int, bidirectional: bool = False, real: bool = False
    ) -> None:
        super().__init__()
        config = model.config
        C = config.hidden_size
        self.heads = (config.num_heads, C // config.num_heads)
        self.table = nn.Embedding(config.rows, C, padding_idx=config.padding_idx)
        self.norm = nn.LayerNorm(C, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        build = partial(peers.published, real=real) if bidirectional else peers.causal
        layers = model.encoder.layers
        self.blocks = nn.ModuleList(_PlainBlock(config, layer) for layer in layers)
        self.table.load_state_dict(model.item_embedding.state_dict())
        self.norm.load_state_dict(model.input_norm.state_dict())
        self.to(model.item_embedding.weight.device)
        inv_freq = ops.inv_freq(*self.heads).to(self.table.weight.device)
        row = self.table.weight.new_empty(1, length, *self.heads)
        self.operator = build(Problem(row, row, row, row, inv_freq, None, None))

    def forward(self, items: Tensor) -> Tensor:
        """Hidden states [B, L, C]."""
        x = self.norm(self.dropout(self.table(items)))
        for block in self.blocks:
            x = block(x, self.operator, self.heads)
        return x

    def loss(self, items: Tensor, targets: Tensor) -> Tensor:
        """Dense cross-entropy over all positions; targets [B, L]."""
        logits = self(items) @ self.table.weight.t()
        logits = logits.index_fill(
            -1, torch.zeros(1, dtype=torch.long, device=items.device), -torch.inf
        )
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=0)

    def last_loss(self, items: Tensor, targets: Tensor) -> Tensor:
        """The published training loss: cross-entropy at the last position; targets [B]."""
        return F.cross_entropy(self(items)[:, -1] @ self.table.weight.t(), targets)


class _PlainBlock(nn.Module):
    def __init__(self, config: RecGRELAConfig, layer: Any) -> None:
        super().__init__()
        C, eps = config.hidden_size, config.layer_norm_eps
        self.norm1, self.norm2 = nn.LayerNorm(C, eps=eps), nn.LayerNorm(C, eps=eps)
        self.gate, self.in_proj, self.out_proj = (nn.Linear(C, C) for _ in range(3))
        self.qk_proj = nn.Linear(C, 2 * C)
        self.conv_weight = nn.Parameter(layer.modulator.conv_weight.detach().clone())
        self.conv_bias = nn.Parameter(layer.modulator.conv_bias.detach().clone())
        self.fc1, self.fc2 = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)
        self.dropout, self.drop_path = nn.Dropout(config.dropout), config.drop_path
        for mine, theirs in (
            (self.norm1, layer.norm1),
            (self.norm2, layer.norm2),
            (self.gate, layer.modulator.gate_proj),
            (self.in_proj, layer.in_proj),
            (self.out_proj, layer.out_proj),
            (self.qk_proj, layer.attention.qk_proj),
            (self.fc1, layer.mlp.fc1),
            (self.fc2, layer.mlp.fc2),
        ):
            mine.load_state_dict(theirs.state_dict())

    def forward(self, x: Tensor, operator: peers.Operator, heads: tuple[int, int]) -> Tensor:
        h = self.norm1(x)
        u = self.in_proj(h)
        q, k = self.qk_proj(u).chunk(2, dim=-1)
        q, k, v, gate = (y.unflatten(-1, heads) for y in (q, k, u, self.gate(h)))
        y = operator(q, k, v, gate, self.conv_weight, self.conv_bias).flatten(-2)
        x = x + self._drop(self.out_proj(y))
        inner = self.dropout(F.gelu(self.fc1(self.norm2(x))))
        return x + self.dropout(self.fc2(inner))

    def _drop(self, branch: Tensor) -> Tensor:
        if not self.training or not self.drop_path:
            return branch
        keep = torch.empty(branch.shape[0], 1, 1, device=branch.device, dtype=branch.dtype)
        return branch * keep.bernoulli_(1 - self.drop_path).div_(1 - self.drop_path)


class SASRec(nn.Module):
    """Causal softmax attention over learned positions (arXiv 1808.09781), with SDPA: LayerNorm,
    attention, LayerNorm, two pointwise layers of the same width, residual sums.
    """

    def __init__(
        self,
        n_items: int,
        hidden_size: int = 64,
        layers: int = 4,
        heads: int = 4,
        length: int = 200,
    ) -> None:
        super().__init__()
        C = hidden_size
        self.heads = (heads, C // heads)
        self.items, self.positions = nn.Embedding(n_items, C), nn.Embedding(length, C)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(C),
                    "qkv": nn.Linear(C, 3 * C),
                    "out": nn.Linear(C, C),
                    "norm2": nn.LayerNorm(C),
                    "fc1": nn.Linear(C, C),
                    "fc2": nn.Linear(C, C),
                }
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(C)

    def forward(self, items: Tensor) -> Tensor:
        """items [B, L] without padding -> hidden state at the last one, [B, hidden_size]."""
        x = self.items(items) + self.positions.weight[: items.shape[1]]
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            h = block["norm1"](x)
            q, k, v = (
                y.unflatten(-1, self.heads).transpose(1, 2) for y in block["qkv"](h).chunk(3, -1)
            )
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block["out"](y.transpose(1, 2).flatten(-2))
            x = x + block["fc2"](F.relu(block["fc1"](block["norm2"](x))))
        return self.norm(x[:, -1])
