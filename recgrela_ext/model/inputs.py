"""Reading what callers pass to the model: shapes, types, padding, ids; positions."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import is_one_of
from ..errors import shown
from ..layers.encoder import shift_rows
from ..ops.checks import check_tensor
from ..ops.transforms import is_batched
from .config import RecGRELAConfig


class Batch(NamedTuple):
    """Right-padded item rows, checked."""

    items: Tensor  # [B, L], padding_idx on padding
    lengths: Tensor  # [B] int64
    real: Tensor  # [B, L] bool
    shift: Tensor | None  # [B], by how much left-padded rows were moved to the front
    full: bool  # known to hold no padding


def read_batch(
    caller: str,
    config: RecGRELAConfig,
    item_seq: Tensor,
    item_seq_len: Tensor | None,
    padding_side: str = "right",
) -> Batch:
    """Check one batch and bring it to right-padded form; values are checked on the CPU alone."""
    check_form(caller, item_seq, item_seq_len, padding_side)
    L = item_seq.shape[1]
    if item_seq_len is None:
        lengths = (item_seq != config.padding_idx).sum(1)
    else:
        lengths = item_seq_len.to(device=item_seq.device, dtype=torch.int64)
    shift = None
    if padding_side == "left":
        shift = L - lengths
        item_seq = shift_rows(item_seq, shift)
    real = torch.arange(L, device=item_seq.device) < lengths[:, None]
    items = torch.where(real, item_seq, config.padding_idx)
    full = False
    if values_are_checked(items):
        full = _check_values(caller, config, items, lengths, real)
    return Batch(items, lengths, real, shift, full)


class LongBatch:
    """Item rows [B, L] read `chunk_size` columns at a time: no copy of all of them is made.

    Everything is checked, where values can be, before the first chunk is handed out.
    """

    def __init__(
        self,
        caller: str,
        config: RecGRELAConfig,
        item_seq: Tensor,
        item_seq_len: Tensor | None,
        padding_side: str,
        chunk_size: int,
    ) -> None:
        check_form(caller, item_seq, item_seq_len, padding_side)
        self.caller, self.config, self.chunk_size = caller, config, chunk_size
        self.item_seq = item_seq
        self.users, self.width = item_seq.shape
        if item_seq_len is None:
            parts = item_seq.split(max(chunk_size, 1), dim=1)
            counts = [(part != config.padding_idx).sum(1) for part in parts]
            self.lengths = torch.stack(counts).sum(0)
        else:
            self.lengths = item_seq_len.to(device=item_seq.device, dtype=torch.int64)
        self.shift = self.width - self.lengths if padding_side == "left" else None
        if values_are_checked(item_seq, self.lengths):
            _check_lengths(caller, self.lengths, self.width)
            for start in range(0, self.width, chunk_size):
                self.chunk(start)

    def chunk(self, start: int) -> Batch:
        """The columns from `start` on, as `read_batch` gives them."""
        width = min(self.chunk_size, self.width - start)
        if self.shift is None:
            items = self.item_seq[:, start : start + width]
        else:
            column = torch.arange(start, start + width, device=self.item_seq.device)
            index = (column + self.shift[:, None]).clamp(max=self.width - 1)
            items = self.item_seq.gather(1, index)
        lengths = (self.lengths - start).clamp(0, width)
        return read_batch(self.caller, self.config, items, lengths)


def check_form(
    caller: str, item_seq: Tensor, item_seq_len: Tensor | None, padding_side: str
) -> None:
    """Types and shapes of one batch."""
    if not is_one_of(padding_side, ("right", "left")):
        raise ValueError(f"{caller}: padding_side must be right or left, got {shown(padding_side)}")
    check_integers(caller, "item_seq", item_seq)
    if item_seq.dim() != 2:
        raise ValueError(f"{caller}: item_seq must be [B, L], got {list(item_seq.shape)}")
    if item_seq_len is None:
        return
    check_integers(caller, "item_seq_len", item_seq_len)
    if item_seq_len.shape != item_seq.shape[:1]:
        raise ValueError(
            f"{caller}: item_seq_len must be [{item_seq.shape[0]}], got {list(item_seq_len.shape)}"
        )


def values_are_checked(x: Tensor, *others: Tensor) -> bool:
    """Values on a GPU are not looked at: that would wait for it. Inside vmap there are none."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or is_batched(x):
        return False
    return not any(map(is_batched, others))


def check_integers(caller: str, name: str, x: Tensor) -> None:
    """TypeError or ValueError for anything but a dense int64 or int32 tensor."""
    check_tensor(caller, name, x)
    if x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{caller}: {name} must be int64 or int32, got {x.dtype}")


def _check_values(
    caller: str, config: RecGRELAConfig, items: Tensor, lengths: Tensor, real: Tensor
) -> bool:
    """True when there is no padding at all."""
    B, L = items.shape
    if B == 0:
        return False
    shortest = _check_lengths(caller, lengths, L)
    check_ids(caller, "item_seq", config, items)
    if int((items != config.padding_idx).sum()) != int(lengths.sum()):
        row = int(((items == config.padding_idx) & real).any(1).nonzero()[0])
        raise ValueError(
            f"{caller}: item_seq must have its padding on one side and lengths that fit, "
            f"got padding_idx={config.padding_idx} among the items of row {row}"
        )
    return shortest == L


def _check_lengths(caller: str, lengths: Tensor, most: int) -> int:
    """The shortest length."""
    if not lengths.numel():
        return 0
    shortest, longest = (int(x) for x in lengths.aminmax())
    if shortest < 0 or longest > most:
        bad = shortest if shortest < 0 else longest
        raise ValueError(f"{caller}: item_seq_len must lie in 0..{most}, got {bad}")
    return shortest


def check_ids(caller: str, name: str, config: RecGRELAConfig, items: Tensor) -> None:
    """ValueError unless all ids are rows of the item table (checked on the CPU)."""
    if items.numel() == 0 or not values_are_checked(items):
        return
    low, high = (int(x) for x in items.aminmax())
    if low < 0 or high >= config.rows:
        raise ValueError(
            f"{caller}: {name} must lie in 0..{config.rows - 1} (n_items={config.rows} with the "
            f"padding row, num_items={config.num_items} without), got {low if low < 0 else high}"
        )


def read_targets(caller: str, config: RecGRELAConfig, targets: Tensor, batch: Batch) -> Tensor:
    """Checked targets, right-padded [B, L], or [B] where only the last position may have one."""
    got = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
    if got != torch.int64:
        raise TypeError(f"{caller}: targets must be int64 in a tensor, got {got}")
    check_tensor(caller, "targets", targets)
    B, L = batch.items.shape
    if targets.shape not in ((B, L), (B,)):
        raise ValueError(
            f"{caller}: targets must be [{B}, {L}] or [{B}], got {list(targets.shape)}"
        )
    check_ids(caller, "targets", config, targets)
    pad = config.padding_idx
    if targets.dim() == 1:
        empty = batch.lengths == 0
        if values_are_checked(targets, empty) and bool(((targets != pad) & empty).any()):
            raise ValueError(f"{caller}: targets must be padding for sequences without items")
        return torch.where(batch.lengths > 0, targets, pad)
    if batch.shift is not None:
        targets = shift_rows(targets, batch.shift)
    allowed = batch.real
    if not config.causal:
        steps = torch.arange(L, device=targets.device)
        allowed = steps == (batch.lengths - 1)[:, None]
    if values_are_checked(targets, allowed) and bool(((targets != pad) & ~allowed).any()):
        where = "at real items" if config.causal else "at the last item (later items are seen)"
        raise ValueError(f"{caller}: targets must be padding_idx={pad} but {where}")
    if config.causal:
        return torch.where(allowed, targets, pad)
    if L == 0:
        return targets.new_full((B,), pad)
    last = targets.gather(1, (batch.lengths - 1).clamp(min=0)[:, None]).squeeze(1)
    return torch.where(batch.lengths > 0, last, pad)


def check_packed(caller: str, config: RecGRELAConfig, items: Tensor, cu_seqlens: Tensor) -> None:
    """Shapes and types; on the CPU also the ids and that the bounds ascend from 0 to T."""
    check_integers(caller, "item_ids", items)
    check_integers(caller, "cu_seqlens", cu_seqlens)
    if items.dim() != 1:
        raise ValueError(f"{caller}: item_ids must be [T], got {list(items.shape)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{caller}: cu_seqlens must be [B + 1], got {list(cu_seqlens.shape)}")
    if not values_are_checked(cu_seqlens):
        return
    first, last, T = int(cu_seqlens[0]), int(cu_seqlens[-1]), items.shape[0]
    if (first, last) != (0, T):
        raise ValueError(f"{caller}: cu_seqlens must run from 0 to T={T}, got {first} to {last}")
    if bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(f"{caller}: cu_seqlens must not descend")
    check_ids(caller, "item_ids", config, items)
    if values_are_checked(items) and bool((items == config.padding_idx).any()):
        raise ValueError(
            f"{caller}: item_ids must be real items, got padding_idx={config.padding_idx}"
        )


def check_packed_targets(
    caller: str, config: RecGRELAConfig, targets: Tensor, items: Tensor
) -> None:
    """One target for every packed row, of a causal model; their values on the CPU alone."""
    if not config.causal:
        raise ValueError(f"{caller}: model must be causal, got one that sees later items")
    got = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
    if got != torch.int64:
        raise TypeError(f"{caller}: targets must be int64 in a tensor, got {got}")
    check_tensor(caller, "targets", targets)
    if isinstance(items, Tensor) and targets.shape != items.shape:
        raise ValueError(
            f"{caller}: targets must be {list(items.shape)} as item_ids, got {list(targets.shape)}"
        )
    check_ids(caller, "targets", config, targets)


def packed_positions(items: Tensor, cu_seqlens: Tensor, config: RecGRELAConfig) -> Tensor | None:
    """Position of each packed row in its sequence [T], where the model has position embeddings."""
    if config.position == "none":
        return None
    starts = cu_seqlens[:-1].to(torch.int64)
    index = torch.arange(items.shape[0], device=items.device)
    sequence = torch.searchsorted(cu_seqlens[1:].to(torch.int64), index, right=True)
    return index - starts[sequence]


def sinusoid(positions: Tensor, width: int) -> Tensor:
    """Sine and cosine of each position, [..., width] float32; phases are formed in float64."""
    pair = torch.arange(0, width, 2, device=positions.device, dtype=torch.float64)
    phase = positions.to(torch.float64).unsqueeze(-1) * torch.exp(pair * (-math.log(1e4) / width))
    return torch.stack((phase.sin(), phase.cos()), -1).flatten(-2)[..., :width]
