"""One layer of the model (paper section 3.4).

h = LN1(x);  g = W_g h;  u = W_in h;  [q, k] = W_qk u;  v = u
x = x + DropPath(W_out gated_rela(q, k, v, g))
x = x + MLP(LN2(x)),   MLP = Dropout(W_2 Dropout(GELU(W_1 .)))
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..arguments import check_whole, is_one_of
from ..errors import shown
from ..ops.feed_forward import feed_forward, fits_kernel
from ..ops.transforms import in_transform
from .dropout import draw_seed, dropout, has_kernel
from .rank_modulator import ACTIVATIONS, AdaptiveRankModulator
from .rela import RotaryEnhancedLinearAttention, State
from .watch import watched

_TILE_ROWS = 64  # of csrc/cpu/feed_forward.h: a thread's share at least
_MOST_WEIGHTS = 2**18  # wider, the partial weight gradients would be most of a layer's memory


class DropPath(nn.Module):
    """A residual branch, dropped for whole sequences with probability `p` while training.

    Kept branches are scaled by 1 / (1 - p), so that evaluation needs no change.
    """

    def __init__(self, p: float = 0.1) -> None:
        super().__init__()
        if not isinstance(p, (float, int)) or not 0.0 <= p < 1.0:
            raise ValueError(f"DropPath: p must lie in [0, 1), got {shown(p)}")
        self.p = p

    def forward(
        self, x: Tensor | None, branch: Tensor, sequence: Tensor | None, num: int
    ) -> Tensor:
        """x + branch [N, C], or the branch alone; row n belongs to sequence `sequence[n]` of `num`.

        `sequence=None` says that all sequences have N / num rows each.
        """
        if not self.training or self.p == 0.0 or num == 0:
            return branch if x is None else x + branch
        keep = branch.new_full((num, 1), 1.0 - self.p).bernoulli_().div_(1.0 - self.p)
        if sequence is None:
            rows = keep.expand(num, branch.shape[0] // num).reshape(-1, 1)
        else:
            rows = keep[sequence]
        return branch * rows if x is None else torch.addcmul(x, branch, rows)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class FeedForward(nn.Module):
    """Dropout(W_2 Dropout(activation(W_1 x))), four times as wide inside."""

    def __init__(self, hidden_size: int, dropout: float = 0.1, activation: str = "gelu") -> None:
        super().__init__()
        if not is_one_of(activation, ACTIVATIONS):
            raise ValueError(
                f"FeedForward: activation must be one of {', '.join(ACTIVATIONS)}, "
                f"got {shown(activation)}"
            )
        self.fc1 = nn.Linear(hidden_size, 4 * hidden_size)
        self.fc2 = nn.Linear(4 * hidden_size, hidden_size)
        self.activation = activation
        self.dropout = dropout

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[residual +] the MLP of x; all are [N, hidden_size]."""
        if self._fused(x, residual):
            p = self.dropout if self.training else 0.0
            seeds = (draw_seed(), draw_seed()) if p > 0.0 else (0, 0)
            first, second = self.fc1, self.fc2
            weights = first.weight, first.bias, second.weight, second.bias
            return feed_forward(x, *weights, residual, p, *seeds)
        gelu, inner = self.activation == "gelu", self.fc1(x)
        if not gelu:
            inner = ACTIVATIONS[self.activation](inner)
        inner = dropout(inner, self.dropout, self.training, gelu=gelu)
        return dropout(self.fc2(inner), self.dropout, self.training, residual)

    def _fused(self, x: Tensor, residual: Tensor | None) -> bool:
        """Whether one operator may do all of it: plain Linear layers whose calls nobody watches."""
        if self.activation != "gelu" or not has_kernel(x) or torch.is_autocast_enabled("cpu"):
            return False
        if x.dim() != 2 or x.shape[0] < _TILE_ROWS * torch.get_num_threads():
            return False
        layers = self.fc1, self.fc2
        if any(type(layer) is not nn.Linear or watched(layer) for layer in layers):
            return False
        if in_transform() or _watched_by_all() or self.fc1.weight.numel() > _MOST_WEIGHTS:
            return False
        weights = [w for layer in layers for w in (layer.weight, layer.bias)]
        if any(type(w) not in (nn.Parameter, Tensor) or w.dtype != x.dtype for w in weights):
            return False
        same = residual is None or (residual.dtype == x.dtype and residual.shape == x.shape)
        return same and fits_kernel(x, self.fc1.weight)


def _watched_by_all() -> bool:
    """Whether hooks of every module, a tracer or a mode such as FlopCounterMode look on."""
    every = torch.nn.modules.module
    return bool(
        every._global_forward_hooks
        or every._global_forward_pre_hooks
        or every._global_backward_hooks
        or every._global_backward_pre_hooks
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
    )


class GRELABlock(nn.Module):
    """One RecGRELA layer on rows of width `hidden_size`.

    Args:
        hidden_size, num_heads: sizes; hidden_size is a multiple of 2 * num_heads.
        conv_width, gate, rank_augmentation, selector, gate_activation: see `AdaptiveRankModulator`.
        causal, rotary, rotary_base, eps, v_projection: see `RotaryEnhancedLinearAttention`.
        dropout: after each layer of the MLP. drop_path: on the attention branch, per sequence.
        mlp_activation: "gelu", "silu" or "relu".
        residual: False drops both residual sums, as the published code does in one-layer models.
    """

    def __init__(
        self,
        hidden_size: int = 64,
        num_heads: int = 4,
        *,
        conv_width: int = 4,
        dropout: float = 0.1,
        drop_path: float = 0.0,
        layer_norm_eps: float = 1e-6,
        eps: float = 1e-6,
        causal: bool = True,
        rotary: str = "full_width",
        rotary_base: float = 10000.0,
        gate: bool = True,
        rank_augmentation: bool = True,
        v_projection: bool = False,
        selector: str = "silu",
        gate_activation: str = "silu",
        mlp_activation: str = "gelu",
        residual: bool = True,
    ) -> None:
        super().__init__()
        check_whole(hidden_size, "GRELABlock", "hidden_size")
        self.hidden_size = hidden_size
        self.residual = residual
        self.norm1 = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.in_proj = nn.Linear(hidden_size, hidden_size)
        self.attention = RotaryEnhancedLinearAttention(
            hidden_size,
            num_heads,
            rotary=rotary,
            rotary_base=rotary_base,
            eps=eps,
            causal=causal,
            v_projection=v_projection,
        )
        self.modulator = AdaptiveRankModulator(
            hidden_size,
            conv_width=conv_width,
            gate=gate,
            rank_augmentation=rank_augmentation,
            selector=selector,
            gate_activation=gate_activation,
        )
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.mlp = FeedForward(hidden_size, dropout, mlp_activation)

    def forward(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: State | None = None,
        return_state: bool = False,
        sequence: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, State]:
        """x [B, L, hidden_size] right-padded with `lengths` [B], or packed [T, hidden_size].

        `state` is this layer's (kv, k_sum, conv, position) and is not changed; `return_state` adds
        the one after the last real item to the result. `sequence` [T] may hold the row's sequence
        number of packed input where the caller has it already. Rows on padding hold no meaning.
        """
        rows = x.reshape(-1, self.hidden_size)  # 2-D rows keep every Linear one GEMM with its bias
        q, k, v, gate = self._project(rows, x.shape[:-1])
        y, final = self.modulator(
            q, k, v, gate, self.attention, lengths, cu_seqlens, state, return_state
        )
        if cu_seqlens is None:
            num = x.shape[0]
        else:
            num = cu_seqlens.shape[0] - 1
            if sequence is None and self.training:
                sequence = sequence_of_rows(cu_seqlens, x.shape[0])
        out = self._finish(rows, y, sequence, num).view(x.shape)
        return (out, final) if return_state else out

    def step(self, x: Tensor, state: State, active: Tensor | None = None) -> Tensor:
        """One item per user, x [B, hidden_size]; `state` changes in place where `active` [B]."""
        q, k, v, gate = self._project(x, x.shape[:-1])
        y = self.modulator.step(q, k, v, gate, self.attention, state, active)
        return self._finish(x, y, None, x.shape[0])

    def _project(
        self, rows: Tensor, shape: torch.Size
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        h = self.norm1(rows)
        gate = self.modulator.gate(h)
        heads = (*shape, self.attention.num_heads, self.attention.head_dim)
        q, k, v = (t.view(heads) for t in self.attention.project(self.in_proj(h)))
        return q, k, v, None if gate is None else gate.view(heads)

    def _finish(self, rows: Tensor, y: Tensor, sequence: Tensor | None, num: int) -> Tensor:
        branch = self.out_proj(y.reshape(-1, self.hidden_size))
        if not self.residual:
            return self.mlp(self.norm2(self.drop_path(None, branch, sequence, num)))
        rows = self.drop_path(rows, branch, sequence, num)
        return self.mlp(self.norm2(rows), rows)


def sequence_of_rows(cu_seqlens: Tensor, total: int) -> Tensor:
    """Number of the sequence each packed row belongs to, int64 [total]."""
    index = torch.arange(total, device=cu_seqlens.device)
    ends = cu_seqlens[1:].to(torch.int64).contiguous()
    return torch.searchsorted(ends, index, right=True)
