"""The Adaptive Rank Modulator (paper section 3.3): rank augmentation and gated rank selector.

a_t = SiLU(b + sum_j w[:, j] * v_{t-W+1+j})    rank augmentation, zeros before the first item
y_t = SiLU(g_t) * (o_t + a_t)                  selector "silu"; other activations are ablations
y_t = s(g_t) * o_t + (1 - s(g_t)) * a_t        selector "balance"; s is the sigmoid
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..arguments import check_whole, is_one_of
from ..errors import shown
from .rela import RotaryEnhancedLinearAttention, State

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu}


class AdaptiveRankModulator(nn.Module):
    """Parameters of the modulator, and the operator calls that join it to the attention.

    With the SiLU gate, attention and modulator are one fused operator, `ops.gated_rela`. The other
    choices compose `ops.gated_rela` without the parts that differ and plain torch.

    Args:
        hidden_size: width of the rows.
        conv_width: taps W of the short causal depthwise convolution.
        gate: False drops the gated rank selector.
        rank_augmentation: False drops the convolution.
        selector: "silu" or "balance".
        gate_activation: "silu", "relu" or "gelu"; used by selector "silu".
    """

    def __init__(
        self,
        hidden_size: int = 64,
        *,
        conv_width: int = 4,
        gate: bool = True,
        rank_augmentation: bool = True,
        selector: str = "silu",
        gate_activation: str = "silu",
    ) -> None:
        super().__init__()
        if not is_one_of(selector, ("silu", "balance")):
            raise ValueError(
                f"AdaptiveRankModulator: selector must be silu or balance, got {shown(selector)}"
            )
        if not is_one_of(gate_activation, ACTIVATIONS):
            raise ValueError(
                "AdaptiveRankModulator: gate_activation must be one of "
                f"{', '.join(ACTIVATIONS)}, got {shown(gate_activation)}"
            )
        for name, size in (("hidden_size", hidden_size), ("conv_width", conv_width)):
            check_whole(size, "AdaptiveRankModulator", name)
        self.selector = selector if gate else "silu"
        self.gate_activation = gate_activation
        self.gate_proj = nn.Linear(hidden_size, hidden_size) if gate else None
        self.conv_weight: nn.Parameter | None = None  # [hidden_size, W], the last tap is now
        self.conv_bias: nn.Parameter | None = None
        self.conv_width = conv_width if rank_augmentation else 1
        if rank_augmentation:
            self.conv_weight = nn.Parameter(torch.empty(hidden_size, conv_width))
            self.conv_bias = nn.Parameter(torch.zeros(hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The short convolution's start, the published code's default; `gate_proj` has its own."""
        if self.conv_weight is not None and self.conv_bias is not None:
            bound = self.conv_width**-0.5
            nn.init.uniform_(self.conv_weight, -bound, bound)
            nn.init.zeros_(self.conv_bias)

    @property
    def fused(self) -> bool:
        """True where `ops.gated_rela` computes the whole modulator."""
        silu = self.selector == "silu" and self.gate_activation == "silu"
        return silu or self.gate_proj is None

    def gate(self, h: Tensor) -> Tensor | None:
        """Gate logits W_g h [..., hidden_size], or None without a gate."""
        return None if self.gate_proj is None else self.gate_proj(h)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor | None,
        attention: RotaryEnhancedLinearAttention,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        initial_state: State | None = None,
        return_final_state: bool = False,
    ) -> tuple[Tensor, State | None]:
        """y in the shape of q, and the final state where asked for; as in `ops.gated_rela`."""
        balance = self.selector == "balance"
        weight, bias = (None, None) if balance else (self.conv_weight, self.conv_bias)
        inner = initial_state
        if balance and inner is not None:
            inner = (inner[0], inner[1], inner[2][:, :0], inner[3])
        result = ops.gated_rela(
            q,
            k,
            v,
            gate if self.fused else None,
            attention.inv_freq,
            weight,
            bias,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
            initial_state=inner,
            return_final_state=return_final_state,
            causal=attention.causal,
            eps=attention.eps,
        )
        out, state = (result, None) if isinstance(result, Tensor) else result
        if self.fused:
            return out, state
        assert gate is not None
        if not balance:
            return ACTIVATIONS[self.gate_activation](gate) * out, state
        before = None if initial_state is None else initial_state[2]
        local, conv = self._augment(v, lengths, cu_seqlens, before)
        if state is not None:
            state = (state[0], state[1], conv.to(state[0].dtype), state[3])
        return _balance(gate, out, local), state

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor | None,
        attention: RotaryEnhancedLinearAttention,
        state: State,
        active: Tensor | None = None,
    ) -> Tensor:
        """One item per user: y [B, H, D]; `state` changes in place as in `ops.gated_rela_step`."""
        balance = self.selector == "balance"
        kv, k_sum, conv, position = state
        out = ops.gated_rela_step(
            q,
            k,
            v,
            gate if self.fused else None,
            attention.inv_freq,
            None if balance else self.conv_weight,
            None if balance else self.conv_bias,
            (kv, k_sum, conv[:, :0] if balance else conv, position),
            eps=attention.eps,
            active=active,
        )
        if self.fused:
            return out
        assert gate is not None
        if not balance:
            return ACTIVATIONS[self.gate_activation](gate) * out
        one = None if active is None else active.to(torch.int64)
        local, last = self._augment(v.unsqueeze(1), one, None, conv)
        conv.copy_(last)
        return _balance(gate, out, local.squeeze(1))

    def _augment(
        self, v: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None, before: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """a (shape of v) and the last W - 1 values [B, W-1, H*D], by W shifted products."""
        rows = v.flatten(-2)
        if cu_seqlens is None:
            B, L = rows.shape[:2]
            start = torch.arange(B, device=v.device) * L
            count = torch.full_like(start, L) if lengths is None else lengths.to(torch.int64)
            sequence = torch.arange(B, device=v.device).repeat_interleave(L)
            rows = rows.reshape(B * L, rows.shape[-1])
        else:
            start, count = cu_seqlens[:-1].to(torch.int64), cu_seqlens.diff().to(torch.int64)
            B = start.shape[0]
            index = torch.arange(rows.shape[0], device=v.device)
            sequence = torch.searchsorted(cu_seqlens[1:].to(torch.int64), index, right=True)
        kept = self.conv_width - 1
        if before is None:
            before = rows.new_zeros(B, kept, rows.shape[-1])
        before = before.to(rows.dtype)
        values = torch.cat((before.flatten(0, 1), rows))  # the earlier values, then this input

        def earlier(seq: Tensor, at: Tensor) -> Tensor:
            """Value number `at` of sequence `seq`; numbers from -kept to -1 are in `before`."""
            inside = B * kept + start[seq] + at
            return values[torch.where(at >= 0, inside, seq * kept + at + kept)]

        position = torch.arange(rows.shape[0], device=v.device) - start[sequence]
        taps = torch.arange(-kept, 0, device=v.device)  # [W-1]
        users = torch.arange(B, device=v.device)[:, None].expand(B, kept)
        last = earlier(users, count[:, None] + taps)
        if self.conv_weight is None:
            return torch.zeros_like(v), last
        assert self.conv_bias is not None
        pre = self.conv_bias.to(rows.dtype).expand_as(rows)
        for tap in range(self.conv_width):
            lagged = earlier(sequence, position - (kept - tap))
            pre = pre + self.conv_weight[:, tap].to(rows.dtype) * lagged
        return F.silu(pre).reshape(v.shape), last


def _balance(gate: Tensor, attended: Tensor, local: Tensor) -> Tensor:
    share = torch.sigmoid(gate)
    return share * attended + (1 - share) * local
