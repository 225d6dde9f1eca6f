"""Causal sequential recommenders to compare with, in plain torch, their steps written with care.

Each has the item table and the tied scores of ours, width 64, and as many parameters beside the
tables as four layers of ours (217,984, to two per cent):

    SASRec    arXiv 1808.09781: learned positions, causal softmax attention; its pointwise layers
              are 288 wide instead of 64 for equal parameters
    GRU4Rec   arXiv 1511.06939 with this loss: one GRU of 228, projected to 64
    LRURec    after arXiv 2310.02367: a diagonal complex linear recurrence of 80 per layer, then
              pointwise layers
    Mamba     the block of the package mambapy with pointwise layers after it, as arXiv 2403.03900

Facts are from the papers, no code is. `encode`, `forward`, `loss` and `config` are what
`recgrela_ext.fit` and `evaluate` ask for. `start`, `read` and `step` stream, under no_grad: the
users of a state have all read equally many items, which saves masks, and the state holds the
weights as plain tensors, which saves the modules.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import import_peer
from recgrela_ext.model.losses import softmax_loss

WIDTH, HEADS, LAYERS = 64, 4, 4
CHUNK = 512  # items a recurrent model reads at once


@dataclass(frozen=True)
class PeerConfig:
    """What `fit` and `evaluate` read of a model's configuration."""

    n_items: int  # with the padding row
    max_seq_len: int = 200
    dropout: float = 0.0
    padding_idx: int = 0
    causal: bool = True
    attend_padding: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class PeerState:
    """What a model keeps of B users who have read `position` items each."""

    tensors: list[Tensor]
    position: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)


class Peer(nn.Module):
    """Item table, input dropout, loss and last hidden state; a subclass brings `run`."""

    def __init__(self, config: PeerConfig) -> None:
        super().__init__()
        self.config = config
        self.item_embedding = nn.Embedding(config.n_items, WIDTH, padding_idx=0)
        self.dropout = nn.Dropout(config.dropout)

    def start_weights(self) -> None:
        """N(0, 0.02) for what is an nn.Linear or nn.Embedding, as in ours."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.item_embedding.weight[0] = 0

    def run(self, items: Tensor) -> Tensor:
        """items [B, L] -> hidden states [B, L, WIDTH]."""
        raise TypeError(f"{type(self).__name__} must define run")

    def encode(self, item_seq: Tensor, item_seq_len: Tensor | None = None) -> Tensor:
        """Right-padded items; causal, so that padding is never seen by real items."""
        return self.run(item_seq)

    def forward(self, item_seq: Tensor, item_seq_len: Tensor | None = None) -> Tensor:
        """Hidden state at the last real item, [B, WIDTH]."""
        if item_seq_len is None:
            return self.last(item_seq)
        users = torch.arange(len(item_seq))
        return self.run(item_seq)[users, item_seq_len - 1]

    def last(self, items: Tensor) -> Tensor:
        """Of full rows: hidden state at the last column."""
        return self.run(items)[:, -1]

    def loss(self, item_seq: Tensor, item_seq_len: Tensor, targets: Tensor) -> Tensor:
        hidden = self.run(item_seq).flatten(0, 1)
        return softmax_loss(hidden, self.item_embedding.weight, targets.flatten())

    def body_parameters(self) -> int:
        """Without item and position tables."""
        tables = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Embedding))
        return sum(p.numel() for p in self.parameters()) - tables


class Pointwise(nn.Module):
    """Two layers after a norm, added to their input."""

    def __init__(self, inner: int, dropout: float, activation: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, inner), nn.Linear(inner, WIDTH)
        self.activation, self.dropout = activation, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.activation(self.fc1(self.norm(x))))
        return x + self.dropout(self.fc2(y))

    def ready(self) -> tuple[Any, ...]:
        return affine(self.norm), linear(self.fc1), linear(self.fc2)


def affine(norm: Any) -> tuple[Any, ...]:
    """What F.layer_norm takes after its input."""
    return (WIDTH,), norm.weight.detach(), norm.bias.detach(), norm.eps


def linear(layer: Any) -> tuple[Tensor, Tensor]:
    """What F.linear takes after its input."""
    return layer.weight.detach(), layer.bias.detach()


def step_pointwise(x: Tensor, norm: Any, fc1: Any, fc2: Any, activation: Any) -> Tensor:
    h = activation(F.linear(F.layer_norm(x, *norm), *fc1))
    return x + F.linear(h, *fc2)


class SASRec(Peer):
    def __init__(self, config: PeerConfig, inner: int = 288, layers: int = LAYERS) -> None:
        super().__init__(config)
        self.positions = nn.Embedding(config.max_seq_len, WIDTH)
        self.blocks = nn.ModuleList(AttentionBlock(inner, config.dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.start_weights()

    def _embed(self, items: Tensor) -> Tensor:
        x = self.item_embedding(items) + self.positions.weight[: items.shape[1]]
        return self.dropout(x)

    def run(self, items: Tensor) -> Tensor:
        x = self._embed(items)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def last(self, items: Tensor) -> Tensor:
        """The last block and the norm do their work for the last item alone."""
        x = self._embed(items)
        *first, block = self.blocks
        for other in first:
            x = other(x)
        return self.norm(block(x, last=True)[:, -1])

    # a key and a value per item and layer, in memory taken once; keys lie as the products read them

    def start(self, batch: int, capacity: int) -> PeerState:
        rows, dim = batch * HEADS, WIDTH // HEADS
        tensors = []
        for _ in self.blocks:
            tensors += [torch.zeros(rows, dim, capacity), torch.zeros(rows, capacity, dim)]
        ready = [block.ready() for block in self.blocks]
        return PeerState(tensors, extra={"ready": ready, "norm": affine(self.norm)})

    @torch.no_grad()
    def read(self, items: Tensor, state: PeerState) -> Tensor:
        """First items of a fresh state; hidden states [B, L, WIDTH]."""
        x = self._embed(items)
        for i, block in enumerate(self.blocks):
            x = block(x, cache=state.tensors[2 * i : 2 * i + 2])
        state.position = items.shape[1]
        return self.norm(x)  # type: ignore[no-any-return]

    def step(self, items: Tensor, state: PeerState) -> Tensor:
        """Functions instead of modules, the scale inside the weights, products into `bmm`: two
        thirds of the time of modules around scaled_dot_product_attention."""
        t, kept = state.position, state.tensors
        dim = WIDTH // HEADS
        x = F.embedding(items, self.item_embedding.weight) + self.positions.weight[t]
        for i, (norm, qkv, out, pointwise) in enumerate(state.extra["ready"]):
            keys, values = kept[2 * i], kept[2 * i + 1]
            q, k, v = F.linear(F.layer_norm(x, *norm), *qkv).view(-1, 3, HEADS, dim).unbind(1)
            keys[:, :, t] = k.reshape(-1, dim)
            values[:, t] = v.reshape(-1, dim)
            scores = torch.bmm(q.reshape(-1, 1, dim), keys[:, :, : t + 1]).softmax(-1)
            y = torch.bmm(scores, values[:, : t + 1]).view(-1, WIDTH)
            x = x + F.linear(y, *out)
            x = step_pointwise(x, *pointwise, F.relu_)
        state.position = t + 1
        return F.layer_norm(x, *state.extra["norm"])


class AttentionBlock(nn.Module):
    def __init__(self, inner: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.pointwise = Pointwise(inner, dropout, F.relu)

    def forward(self, x: Tensor, cache: list[Tensor] | None = None, last: bool = False) -> Tensor:
        B, L, _ = x.shape
        qkv = self.qkv(self.norm(x)).view(B, L, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if cache is not None:
            cache[0][:, :, :L] = k.flatten(0, 1).transpose(1, 2)
            cache[1][:, :L] = v.flatten(0, 1)
        if last:
            q, x = q[:, :, -1:], x[:, -1:]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=not last)
        x = x + self.dropout(self.out(y.transpose(1, 2).reshape(x.shape)))
        return self.pointwise(x)  # type: ignore[no-any-return]

    def ready(self) -> tuple[Any, ...]:
        """Norm, projections and pointwise layers as plain tensors; queries scaled."""
        scale = (WIDTH // HEADS) ** -0.5
        weight, bias = self.qkv.weight.detach().clone(), self.qkv.bias.detach().clone()
        weight[:WIDTH] *= scale
        bias[:WIDTH] *= scale
        return affine(self.norm), (weight, bias), linear(self.out), self.pointwise.ready()


class GRU4Rec(Peer):
    def __init__(self, config: PeerConfig, inner: int = 228) -> None:
        super().__init__(config)
        self.gru = nn.GRU(WIDTH, inner, batch_first=True)
        self.out = nn.Linear(inner, WIDTH)
        self.start_weights()

    def run(self, items: Tensor) -> Tensor:
        return self.out(self.dropout(self.gru(self.dropout(self.item_embedding(items)))[0]))  # type: ignore[no-any-return]

    def start(self, batch: int, capacity: int = 0) -> PeerState:
        g = self.gru
        ready = [g.weight_ih_l0, g.weight_hh_l0, g.bias_ih_l0, g.bias_hh_l0]
        extra = {"ready": [p.detach() for p in ready], "out": linear(self.out)}
        return PeerState([torch.zeros(batch, g.hidden_size)], extra=extra)

    @torch.no_grad()
    def read(self, items: Tensor, state: PeerState) -> Tensor:
        parts = []
        for part in items.split(CHUNK, 1):
            y, last = self.gru(self.item_embedding(part), state.tensors[0][None])
            state.tensors[0].copy_(last[0])
            parts.append(self.out(y[:, -1:]))
        state.position += items.shape[1]
        return parts[-1]

    def step(self, items: Tensor, state: PeerState) -> Tensor:
        x = F.embedding(items, self.item_embedding.weight)
        state.tensors[0] = torch.gru_cell(x, state.tensors[0], *state.extra["ready"])
        state.position += 1
        return F.linear(state.tensors[0], *state.extra["out"])


class LRURec(Peer):
    def __init__(self, config: PeerConfig, size: int = 80, inner: int = 256) -> None:
        super().__init__(config)
        self.norm = nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList(LinearRecurrence(size, config.dropout) for _ in range(LAYERS))
        self.pointwise = nn.ModuleList(
            Pointwise(inner, config.dropout, F.gelu) for _ in range(LAYERS)
        )
        self.start_weights()

    def run(self, items: Tensor) -> Tensor:
        x = self.norm(self.dropout(self.item_embedding(items)))
        for block, pointwise in zip(self.blocks, self.pointwise, strict=True):
            x = pointwise(block(x)[0])
        return x  # type: ignore[no-any-return]

    def start(self, batch: int, capacity: int = 0) -> PeerState:
        """One complex vector a layer; what the steps need of the weights is made once."""
        size = self.blocks[0].size
        tensors = [torch.zeros(batch, size, dtype=torch.complex64) for _ in self.blocks]
        with torch.no_grad():
            ready = [
                (affine(block.norm), block.ready(), linear(block.out), pointwise.ready())
                for block, pointwise in zip(self.blocks, self.pointwise, strict=True)
            ]
        return PeerState(tensors, extra={"ready": ready, "norm": affine(self.norm)})

    @torch.no_grad()
    def read(self, items: Tensor, state: PeerState) -> Tensor:
        for part in items.split(CHUNK, 1):
            x = self.norm(self.item_embedding(part))
            for i, (block, pointwise) in enumerate(zip(self.blocks, self.pointwise, strict=True)):
                x, state.tensors[i] = block(x, state.tensors[i])
                x = pointwise(x)
        state.position += items.shape[1]
        return x[:, -1:]  # type: ignore[no-any-return]

    def step(self, items: Tensor, state: PeerState) -> Tensor:
        kept, size = state.tensors, self.blocks[0].size
        x = F.layer_norm(F.embedding(items, self.item_embedding.weight), *state.extra["norm"])
        for i, (norm, (eigen, into), out, pointwise) in enumerate(state.extra["ready"]):
            new = F.linear(F.layer_norm(x, *norm), into).view(-1, size, 2)
            kept[i] = torch.addcmul(torch.view_as_complex(new), kept[i], eigen)
            x = x + F.linear(torch.view_as_real(kept[i]).flatten(-2), *out)
            x = step_pointwise(x, *pointwise, F.gelu)
        state.position += 1
        return x


class LinearRecurrence(nn.Module):
    """h_t = lambda h_{t-1} + gamma B x_t;  y_t = x_t + Re(C h_t), all elementwise in h."""

    def __init__(self, size: int, dropout: float, low: float = 0.8, high: float = 0.99) -> None:
        super().__init__()
        self.size = size
        self.norm = nn.LayerNorm(WIDTH)
        radius = torch.sqrt(torch.rand(size) * (high**2 - low**2) + low**2)
        phase = torch.rand(size) * 2 * math.pi
        self.log_decay = nn.Parameter(torch.log(-torch.log(radius)))
        self.log_phase = nn.Parameter(torch.log(phase))
        self.log_gamma = nn.Parameter(torch.log(torch.sqrt(1 - radius**2)))
        self.into = nn.Linear(WIDTH, 2 * size, bias=False)  # pairs: real, imaginary
        self.out = nn.Linear(2 * size, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def eigenvalues(self) -> Tensor:
        decay = torch.exp(-torch.exp(self.log_decay))
        return torch.polar(decay, torch.exp(self.log_phase))

    def ready(self) -> tuple[Tensor, Tensor]:
        """lambda [size], and B scaled by gamma."""
        gamma = torch.exp(self.log_gamma).repeat_interleave(2)
        return self.eigenvalues(), self.into.weight * gamma[:, None]

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, L, WIDTH], by doubling: log2(L) passes over all items."""
        eigen, weight = self.ready()
        h = torch.view_as_complex(F.linear(self.norm(x), weight).unflatten(-1, (-1, 2)))
        L, shift = x.shape[1], 1
        if state is not None:
            h = torch.cat((h[:, :1] + eigen * state.unsqueeze(1), h[:, 1:]), 1)
        power = eigen
        while shift < L:
            h = torch.cat((h[:, :shift], h[:, shift:] + power * h[:, :-shift]), 1)
            power, shift = power * power, 2 * shift
        y = self.dropout(self.out(torch.view_as_real(h).flatten(-2)))
        return x + y, h[:, -1]


class Mamba(Peer):
    """Three of the package's blocks (d_state 16, expansion 2), pointwise layers after each."""

    def __init__(self, config: PeerConfig, layers: int = 3, inner: int = 304) -> None:
        super().__init__(config)
        package = import_peer("mambapy.mamba")
        settings = package.MambaConfig(d_model=WIDTH, n_layers=layers)
        self.kept = (settings.d_inner, settings.d_state, settings.d_conv - 1)
        self.norm = nn.LayerNorm(WIDTH)
        self.start_weights()  # before the package's layers, which start by themselves
        self.blocks = package.Mamba(settings).layers
        self.pointwise = nn.ModuleList(
            Pointwise(inner, config.dropout, F.gelu) for _ in range(layers)
        )

    def run(self, items: Tensor) -> Tensor:
        x = self.norm(self.dropout(self.item_embedding(items)))
        for block, pointwise in zip(self.blocks, self.pointwise, strict=True):
            x = pointwise(x + self.dropout(block(x) - x))
        return x  # type: ignore[no-any-return]

    def start(self, batch: int, capacity: int = 0) -> PeerState:
        inner, size, kept = self.kept
        shapes = [(batch, inner, size), (batch, inner, kept)] * len(self.blocks)
        return PeerState([torch.zeros(shape) for shape in shapes])

    def read(self, items: Tensor, state: PeerState) -> Tensor:
        """Item by item: the package's parallel form returns no state."""
        for column in items.unbind(1):
            hidden = self.step(column, state)
        return hidden[:, None]

    @torch.no_grad()
    def step(self, items: Tensor, state: PeerState) -> Tensor:
        x = self.norm(self.item_embedding(items))
        kept = state.tensors
        for i, (block, pointwise) in enumerate(zip(self.blocks, self.pointwise, strict=True)):
            x, (kept[2 * i], kept[2 * i + 1]) = block.step(x, (kept[2 * i], kept[2 * i + 1]))
            x = pointwise(x)
        state.position += 1
        return x  # type: ignore[no-any-return]


PEERS: dict[str, type[Peer]] = {
    "SASRec": SASRec,
    "GRU4Rec": GRU4Rec,
    "LRURec": LRURec,
    "Mamba": Mamba,
}
