"""The models of the quality tables: those of peer_models.py, and two that only train and rank.

    LinRec      Liu et al. 2023 (10.1145/3539618.3591717): attention in linear time, queries and
                keys through ELU and to unit length, no other normaliser. The published one reads
                the whole sequence at every position; here a position reads what came before it,
                as dense training asks for.
    Mamba4Rec   arXiv 2403.03900: Mamba blocks (arXiv 2312.00752, state 32, expansion 2, four
                taps) with pointwise layers; its scan is selective_scan.py's. It counts for
                quality, never for time or memory.

Facts are from the papers, no code is.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peer_models import (
    HEADS,
    WIDTH,
    GRU4Rec,
    LRURec,
    Mamba,
    Peer,
    PeerConfig,
    Pointwise,
    SASRec,
)
from benchmarks.selective_scan import selective_scan


class LinRec(Peer):
    """Two or more blocks over learned positions; sizes as in `SASRec`."""

    def __init__(self, config: PeerConfig, inner: int = 288, layers: int = 4) -> None:
        super().__init__(config)
        self.positions = nn.Embedding(config.max_seq_len, WIDTH)
        self.blocks = nn.ModuleList(
            LinearAttentionBlock(inner, config.dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.start_weights()

    def run(self, items: Tensor) -> Tensor:
        x = self.dropout(self.item_embedding(items) + self.positions.weight[: items.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)  # type: ignore[no-any-return]


class LinearAttentionBlock(nn.Module):
    """y_t = 1/sqrt(D) sum_{s <= t} (q_t . k_s) v_s with q, k = ELU(.) / |ELU(.)|.

    The products of all pairs are formed: at a few hundred positions that is as fast as the sums in
    linear time, and the same figures.
    """

    def __init__(self, inner: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.pointwise = Pointwise(inner, dropout, F.gelu)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, L, D]
        q, k = (F.normalize(F.elu(part), dim=-1) for part in (q, k))
        y = (q @ k.transpose(-1, -2)).tril() @ v / math.sqrt(WIDTH // HEADS)
        x = x + self.dropout(self.out(y.transpose(1, 2).flatten(-2)))
        return self.pointwise(x)  # type: ignore[no-any-return]


class Mamba4Rec(Peer):
    def __init__(self, config: PeerConfig, inner: int = 304, layers: int = 3) -> None:
        super().__init__(config)
        self.norm = nn.LayerNorm(WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(layers))
        self.pointwise = nn.ModuleList(
            Pointwise(inner, config.dropout, F.gelu) for _ in range(layers)
        )
        self.start_weights()  # before the blocks, which start by themselves
        self.blocks = nn.ModuleList(SelectiveBlock() for _ in range(layers))

    def run(self, items: Tensor) -> Tensor:
        x = self.norm(self.dropout(self.item_embedding(items)))
        for norm, block, pointwise in zip(self.norms, self.blocks, self.pointwise, strict=True):
            x = pointwise(x + self.dropout(block(norm(x))))
        return x  # type: ignore[no-any-return]


class SelectiveBlock(nn.Module):
    """The selective state space block (arXiv 2312.00752, section 3.4), its start as published.

    h_t = exp(d_t A) h_{t-1} + d_t B_t u_t;  y_t = C_t h_t + D u_t, with d, B, C linear in u.
    """

    def __init__(self, state: int = 32, expand: int = 2, taps: int = 4) -> None:
        super().__init__()
        inner, rank = expand * WIDTH, -(-WIDTH // 16)
        self.sizes = (rank, state, state)
        self.into = nn.Linear(WIDTH, 2 * inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, taps, groups=inner, padding=taps - 1)
        self.select = nn.Linear(inner, sum(self.sizes), bias=False)
        self.step = nn.Linear(rank, inner)
        self.log_decay = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, WIDTH, bias=False)
        with torch.no_grad():  # steps between 1e-3 and 0.1, uniform in their logarithm
            size = torch.exp(torch.empty(inner).uniform_(math.log(1e-3), math.log(0.1)))
            self.step.bias.copy_(size + torch.log(-torch.expm1(-size)))
            nn.init.uniform_(self.step.weight, -(rank**-0.5), rank**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, WIDTH] -> [B, L, WIDTH]."""
        u, gate = self.into(x).chunk(2, -1)  # [B, L, inner]
        u = F.silu(self.conv(u.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        step, b, c = self.select(u).split(self.sizes, -1)
        step = F.softplus(self.step(step))
        y = selective_scan(u, step, -torch.exp(self.log_decay), b, c)
        return self.out((y + self.skip * u) * F.silu(gate))  # type: ignore[no-any-return]


PEERS: dict[str, type[Peer]] = {
    "SASRec": SASRec,
    "GRU4Rec": GRU4Rec,
    "LRURec": LRURec,
    "LinRec": LinRec,
    "Mamba4Rec": Mamba4Rec,
    "Mamba": Mamba,
}
