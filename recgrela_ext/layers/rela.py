"""Rotary-enhanced linear attention as a layer: projections and `ops.rela` (paper section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..arguments import check_whole

State = tuple[Tensor, Tensor, Tensor, Tensor]  # kv, k_sum, conv, position: see ops.gated_rela


class RotaryEnhancedLinearAttention(nn.Module):
    """q, k = W_qk u and v = u (or W_v u), then `ops.rela`.

    As published there is no value projection of its own: the block's input projection is one.
    The rotary frequencies are float64 outside parameters and buffers, so `.to(bfloat16)` and
    checkpoints leave them alone; they follow the weights to another device.

    Args:
        hidden_size: width of the rows, num_heads * head_dim.
        num_heads: heads; head_dim must be even.
        rotary: "full_width" (published), "per_head" or "none"; `rotary_base` as in `ops.inv_freq`.
        eps: added once per key to the normaliser.
        causal: position t sees s <= t; False: the published bidirectional form.
        v_projection: adds W_v (an ablation of the paper).
    """

    def __init__(
        self,
        hidden_size: int = 64,
        num_heads: int = 4,
        *,
        rotary: str = "full_width",
        rotary_base: float = 10000.0,
        eps: float = 1e-6,
        causal: bool = True,
        v_projection: bool = False,
    ) -> None:
        super().__init__()
        for name, size in (("hidden_size", hidden_size), ("num_heads", num_heads)):
            check_whole(size, "RotaryEnhancedLinearAttention", name)
        if hidden_size % (2 * num_heads):
            raise ValueError(
                "RotaryEnhancedLinearAttention: hidden_size must be a multiple of 2 * num_heads, "
                f"got hidden_size={hidden_size}, num_heads={num_heads}"
            )
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.rotary = rotary
        self.rotary_base = rotary_base
        self.eps = eps
        self.causal = causal
        self.qk_proj = nn.Linear(hidden_size, 2 * hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size) if v_projection else None
        self._set_inv_freq(self.qk_proj.weight.device)

    def _set_inv_freq(self, device: torch.device) -> None:
        with torch.device("cpu"):
            exact = ops.inv_freq(self.num_heads, self.head_dim, self.rotary, self.rotary_base)
        self.inv_freq = exact.to(device)  # [H, D/2], float64

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        module = super()._apply(fn, recurse)
        device = self.qk_proj.weight.device
        if device != self.inv_freq.device:
            self._set_inv_freq(device)
        return module

    def project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u [..., hidden_size] -> q, k, v [..., H, D]; q and k are views of one projection."""
        q, k = self.qk_proj(u).chunk(2, dim=-1)
        v = u if self.v_proj is None else self.v_proj(u)
        heads = (self.num_heads, self.head_dim)
        return q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads)

    def forward(
        self,
        u: Tensor,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        initial_state: State | None = None,
        return_final_state: bool = False,
    ) -> Tensor | tuple[Tensor, State]:
        """Attention alone, without rank augmentation, gate or output projection.

        Args:
            u: [B, L, hidden_size] right-padded with `lengths` [B], or packed [T, hidden_size] with
                `cu_seqlens` [B + 1].
            initial_state, return_final_state: as in `ops.rela`.

        Returns:
            Same shape as `u`, zero on padding; with `return_final_state` also the state.
        """
        q, k, v = self.project(u)
        result = ops.rela(
            q,
            k,
            v,
            self.inv_freq,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
            initial_state=initial_state,
            return_final_state=return_final_state,
            causal=self.causal,
            eps=self.eps,
        )
        if isinstance(result, Tensor):
            return result.flatten(-2)
        out, state = result
        return out.flatten(-2), state

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, rotary={self.rotary!r}, "
            f"causal={self.causal}"
        )
