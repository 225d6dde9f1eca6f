"""The stack of GRELA blocks without an item table (paper section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..arguments import check_whole
from ..errors import shown
from ..ops.checks import check_tensor
from .grela_block import GRELABlock, sequence_of_rows
from .packing import pack, steps_itself
from .rank_modulator import AdaptiveRankModulator
from .rela import State
from .watch import Derived


class GRELAEncoder(nn.Module):
    """`num_layers` GRELA blocks on rows of `hidden_size`, for other frameworks' encoder slots.

    Args:
        hidden_size, num_layers, num_heads: sizes.
        final_norm: adds a LayerNorm after the last block (not in the published model).
        block: every other keyword of `GRELABlock`.
    """

    def __init__(
        self,
        hidden_size: int = 64,
        num_layers: int = 4,
        num_heads: int = 4,
        *,
        final_norm: bool = False,
        **block: Any,
    ) -> None:
        super().__init__()
        check_whole(num_layers, "GRELAEncoder", "num_layers")
        self.hidden_size = hidden_size
        self.layers = nn.ModuleList(
            GRELABlock(hidden_size, num_heads, **block) for _ in range(num_layers)
        )
        eps = block.get("layer_norm_eps", 1e-6)
        self.final_norm = nn.LayerNorm(hidden_size, eps=eps) if final_norm else None
        self._packed = Derived(pack)
        self.register_load_state_dict_post_hook(_forget_packed)

    def reset_parameters(self, std: float = 0.02) -> None:
        """Start anew, as `RecGRELA` does: N(0, std) for Linear weights, zero biases, the short
        convolution uniform in ±1/sqrt(W), norms that scale by one."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, AdaptiveRankModulator)):
                module.reset_parameters()

    def forward(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        state: Sequence[State] | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, list[State]]:
        """Hidden states of every position.

        Args:
            x: [B, L, hidden_size], or packed [T, hidden_size] with `cu_seqlens`. What it holds on
                padding, NaN included, has no influence.
            lengths: real items per row [B], the rest of the row is padding on the right.
            mask: bool [B, L], True = real item, one contiguous run per row, anywhere in the row.
            state: one (kv, k_sum, conv, position) per layer, continued and not changed.
            return_state: also return the states after the last real item.
            cu_seqlens: bounds [B + 1] of packed sequences; at most one of the three may be given.

        Returns:
            Shape of `x`, zero on padding; with `return_state` also the list of states.

        Raises:
            ValueError: wrong shapes, two descriptions of the padding, or a mask whose True values
                are not one run per row (checked for tensors on the CPU).
        """
        self._check(x, lengths, mask, state, cu_seqlens)
        if mask is not None:
            return self._masked(x, mask, state, return_state)
        real = None
        if lengths is not None:
            real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]  # [B, L]
            x = torch.where(real.unsqueeze(-1), x, 0.0)  # selected: NaN * 0 would be NaN
        out, states = self.run(x, lengths, cu_seqlens, state, return_state)
        if real is not None:
            out = torch.where(real.unsqueeze(-1), out, 0.0)
        return (out, states) if return_state else out

    def run(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: Sequence[State] | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, list[State]]:
        """`forward` for input whose padding is finite, leaving rows on padding as they come out."""
        sequence = None
        if cu_seqlens is not None and self.training:
            sequence = sequence_of_rows(cu_seqlens, x.shape[0])
        states: list[State] = []
        for number, layer in enumerate(self.layers):
            before = None if state is None else state[number]
            result = layer(x, lengths, cu_seqlens, before, return_state, sequence)
            if return_state:
                x, after = result
                states.append(after)
            else:
                x = result
        return (x if self.final_norm is None else self.final_norm(x)), states

    def step(self, x: Tensor, state: Sequence[State], active: Tensor | None = None) -> Tensor:
        """One item per user, x [B, hidden_size] -> [B, hidden_size].

        The states change in place for users where `active` [B] is True (None: all of them). Their
        position is read and left alone: the caller advances it once per event.
        """
        for layer, layer_state in zip(self.layers, state, strict=True):
            if steps_itself(layer):
                assert isinstance(layer, GRELABlock)
                x = layer.step(x, layer_state, active)
            else:
                x = _step_by_call(layer, x, layer_state, active)
        return x if self.final_norm is None else self.final_norm(x)

    def packed_weights(self) -> ops.PackedEncoder | None:
        """The weights for `ops.encoder_step`, which does all layers of an event in one call.

        A copy, made again after a weight changed; a write through `.data` goes unnoticed, as
        autograd does not count it. None where the configuration has no fused step
        (another activation, selector "balance", V projection, half precision, no residuals).
        """
        return self._packed.get(self)

    def _masked(
        self, x: Tensor, mask: Tensor, state: Sequence[State] | None, return_state: bool
    ) -> Tensor | tuple[Tensor, list[State]]:
        mask = mask.to(torch.bool)
        lengths = mask.sum(1)
        if x.shape[1] == 0:
            out, states = self.run(x, lengths, None, state, return_state)
            return (out, states) if return_state else out
        first = mask.to(torch.int8).argmax(1)  # of equal values argmax gives the first
        if not torch.compiler.is_compiling() and mask.device.type == "cpu":
            check_one_run(mask, first, lengths)
        x = shift_rows(x, first)
        real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        x = torch.where(real.unsqueeze(-1), x, 0.0)
        out, states = self.run(x, lengths, None, state, return_state)
        out = torch.where(mask.unsqueeze(-1), shift_rows(out, -first), 0.0)
        return (out, states) if return_state else out

    def _check(
        self,
        x: Tensor,
        lengths: Tensor | None,
        mask: Tensor | None,
        state: Sequence[State] | None,
        cu_seqlens: Tensor | None,
    ) -> None:
        if sum(given is not None for given in (lengths, mask, cu_seqlens)) > 1:
            raise ValueError("GRELAEncoder: only one of lengths, mask and cu_seqlens must be given")
        tensors = {"x": x, "lengths": lengths, "mask": mask, "cu_seqlens": cu_seqlens}
        for name, tensor in tensors.items():
            if tensor is not None or name == "x":
                check_tensor("GRELAEncoder", name, tensor)
        dims = 2 if cu_seqlens is not None else 3
        if x.dim() != dims or x.shape[-1] != self.hidden_size:
            shape = "[T, {}]" if dims == 2 else "[B, L, {}]"
            raise ValueError(
                f"GRELAEncoder: x must be {shape.format(self.hidden_size)}, got {list(x.shape)}"
            )
        if lengths is not None and lengths.shape != x.shape[:1]:
            raise ValueError(
                f"GRELAEncoder: lengths must be [{x.shape[0]}], got {list(lengths.shape)}"
            )
        if mask is not None and mask.shape != x.shape[:2]:
            raise ValueError(
                f"GRELAEncoder: mask must be {list(x.shape[:2])}, got {list(mask.shape)}"
            )
        if state is not None and not isinstance(state, Sequence):
            raise TypeError(f"GRELAEncoder: state must be a list, got {shown(state)}")
        if state is not None and len(state) != len(self.layers):
            raise ValueError(
                f"GRELAEncoder: state must have {len(self.layers)} layers, got {len(state)}"
            )


def _step_by_call(layer: nn.Module, x: Tensor, state: State, active: Tensor | None) -> Tensor:
    """A step of a layer that has none of its own, or whose calls are watched: a sequence of one."""
    count = None if active is None else active.to(torch.int64)
    out, after = layer(x.unsqueeze(1), count, None, state, True)
    for kept, new in zip(state[:3], after[:3], strict=True):
        kept.copy_(new)
    return out.squeeze(1)


def shift_rows(x: Tensor, by: Tensor) -> Tensor:
    """x [B, L] or [B, L, C] with row b moved `by[b]` places to the front, wrapping around."""
    length = x.shape[1]
    if length == 0:
        return x
    steps = torch.arange(length, device=x.device)
    index = (steps + by.to(torch.int64)[:, None]) % length  # [B, L]
    if x.dim() == 2:
        return x.gather(1, index)
    return x.gather(1, index.unsqueeze(-1).expand_as(x))


def check_one_run(mask: Tensor, first: Tensor, lengths: Tensor) -> None:
    """ValueError unless the True values of each row of `mask` [B, L] are neighbours."""
    steps = torch.arange(mask.shape[1], device=mask.device) - first[:, None]
    wrong = (mask != ((steps >= 0) & (steps < lengths[:, None]))).any(1)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"GRELAEncoder: mask must have one run of True per row, got a gap in row {row}"
        )


def _forget_packed(encoder: GRELAEncoder, _: Any) -> None:
    encoder._packed.forget()
