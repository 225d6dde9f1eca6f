"""Streaming: user states that follow the events instead of re-reading the history.

`prefill(a)` and then `step(b)` item by item gives what `encode(a + b)` gives, for every split.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import shown
from ..modes import evaluating
from ..ops.encoder_step import encoder_step_unchecked
from . import inputs, persistence
from .state import StateLayout, UserState

if TYPE_CHECKING:
    from .recgrela import RecGRELA

_FUSED_WIDTH = 128  # beyond it, with more than _FEW_USERS, the layers' matrix products are faster
_FEW_USERS = 64
_ROWS = 1 << 14  # packed rows at once


def layout(model: RecGRELA) -> StateLayout:
    config = model.config
    if not config.causal:
        raise ValueError("RecGRELA: a user state must belong to a causal model, got causal=False")
    kept = config.conv_width - 1 if config.rank_augmentation else 0
    return StateLayout(config.num_layers, config.num_heads, config.head_dim, kept)


def init_state(model: RecGRELA, batch_size: int) -> UserState:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 0:
        raise ValueError(
            f"RecGRELA.init_state: batch_size must be an int >= 0, got {shown(batch_size)}"
        )
    if batch_size >= 2**31:
        raise ValueError(
            f"RecGRELA.init_state: batch_size must be below 2**31, got {shown(batch_size)}"
        )
    there, wanted = len(model.encoder.layers), model.config.num_layers
    if there != wanted:
        raise ValueError(f"RecGRELA: encoder must have the {wanted} layers of config, got {there}")
    weight = model.item_embedding.weight
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    width = model.config.hidden_size
    sizes = layout(model)
    return UserState.zeros(batch_size, sizes, width, model.fingerprint(), dtype, weight.device)


def check_state(
    model: RecGRELA, caller: str, state: UserState, users: int | None = None
) -> persistence.Weights:
    """The weights of `model`, from which the state must come."""
    if not isinstance(state, UserState):
        raise TypeError(f"{caller}: state must be a UserState, got {type(state).__name__}")
    weights = persistence.weights_of(model)
    if state.fingerprint != weights.fingerprint:  # equal: so are the sizes
        if state.layout != layout(model):
            raise ValueError(
                f"{caller}: state must have the sizes of this model, got {state.layout}"
            )
        raise ValueError(
            f"{caller}: state must come from this model, got one of other weights or another "
            "configuration"
        )
    if users is not None and len(state) != users:
        raise ValueError(f"{caller}: state must hold {users} users, got {len(state)}")
    return weights


def _check_chunk_size(caller: str, chunk_size: int) -> None:
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"{caller}: chunk_size must be an int >= 1, got {shown(chunk_size)}")
    if chunk_size >= 2**31:
        raise ValueError(f"{caller}: chunk_size must be below 2**31, got {shown(chunk_size)}")


def prefill(
    model: RecGRELA,
    item_seq: Tensor,
    item_seq_len: Tensor | None,
    chunk_size: int,
    state: UserState | None,
    padding_side: str,
) -> UserState:
    caller = "RecGRELA.prefill"
    _check_chunk_size(caller, chunk_size)
    batch = inputs.LongBatch(caller, model.config, item_seq, item_seq_len, padding_side, chunk_size)
    if state is None:
        state = init_state(model, batch.users)
    check_state(model, caller, state, batch.users)
    with evaluating(model):
        for start in range(0, batch.width, chunk_size):
            part = batch.chunk(start)
            _prefill_chunk(model, part.items, part.lengths, state)
    return state


def _prefill_chunk(model: RecGRELA, items: Tensor, lengths: Tensor, state: UserState) -> None:
    positions = None
    if model.config.position != "none":
        positions = state.position[:, None] + torch.arange(items.shape[1], device=items.device)
    hidden, after = model.encoder.run(
        model._embed(items, positions), lengths, state=state.layers, return_state=True
    )
    for (kv, k_sum, conv, _), (new_kv, new_k_sum, new_conv, _) in zip(
        state.layers, after, strict=True
    ):
        kv.copy_(new_kv)
        k_sum.copy_(new_k_sum)
        conv.copy_(new_conv)
    last = hidden[torch.arange(len(state), device=items.device), (lengths - 1).clamp(min=0)]
    touched = (lengths > 0).unsqueeze(-1)
    state.hidden.copy_(torch.where(touched, last.to(state.hidden.dtype), state.hidden))
    state.advance(lengths, items.shape[1])


def prefill_packed(
    model: RecGRELA,
    items: Tensor,
    cu_seqlens: Tensor,
    chunk_size: int,
    state: UserState | None,
) -> UserState:
    caller = "RecGRELA.prefill_packed"
    _check_chunk_size(caller, chunk_size)
    inputs.check_packed(caller, model.config, items, cu_seqlens)
    bounds = cu_seqlens.to(torch.int64)
    users = bounds.shape[0] - 1
    if state is None:
        state = init_state(model, users)
    check_state(model, caller, state, users)
    starts, lengths = bounds[:-1], bounds.diff()
    with evaluating(model):
        for group in _groups(lengths.tolist(), chunk_size):
            for start in range(0, int(lengths[group].max()), chunk_size):
                some = (lengths[group] > start).nonzero().squeeze(1) + group.start
                count = (lengths[some] - start).clamp(max=chunk_size)
                _prefill_rows(model, items, starts[some] + start, count, state, some)
    return state


def _groups(lengths: list[int], chunk_size: int) -> Iterator[slice]:
    """Neighbouring users whose chunks have at most `_ROWS` items in all, at least one user each."""
    first, rows = 0, 0
    for user, length in enumerate(lengths):
        more = min(length, chunk_size)
        if rows + more > _ROWS and user > first:
            yield slice(first, user)
            first, rows = user, 0
        rows += more
    if first < len(lengths):
        yield slice(first, len(lengths))


def _prefill_rows(
    model: RecGRELA, items: Tensor, starts: Tensor, count: Tensor, state: UserState, users: Tensor
) -> None:
    """Packed items [starts, starts + count) of some users into their rows of `state`."""
    bounds = torch.nn.functional.pad(count.cumsum(0), (1, 0))
    shift = torch.repeat_interleave(starts - bounds[:-1], count)
    part = state.select(users)
    steps = torch.arange(len(shift), device=shift.device)
    positions = None
    if model.config.position != "none":
        positions = steps + torch.repeat_interleave(part.position - bounds[:-1], count)
    hidden, after = model.encoder.run(
        model._embed(items[steps + shift], positions),
        cu_seqlens=bounds,
        state=part.layers,
        return_state=True,
    )
    for views, finals in zip(state.layers, after, strict=True):
        for view, final in zip(views[:3], finals[:3], strict=True):
            view.index_copy_(0, users, final.to(view.dtype))
    state.hidden.index_copy_(0, users, hidden[bounds[1:] - 1].to(state.hidden.dtype))
    read = torch.zeros_like(state.position).index_copy_(0, users, count)
    state.advance(read, int(count.max()))


def _encode_step(
    model: RecGRELA,
    weights: persistence.Weights,
    x: Tensor,
    state: UserState,
    active: Tensor | None,
) -> Tensor:
    """All layers of one event, in a single operator where that is faster."""
    fused = (x.shape[0] <= _FEW_USERS or x.shape[1] <= _FUSED_WIDTH) and x.device.type == "cpu"
    if fused and x.dtype == state.buffer.dtype and not torch.is_autocast_enabled("cpu"):
        packed = weights.packed(model)
        if packed is not None:
            position = state.position.contiguous()  # it is not where the state is `other[::2]`
            return encoder_step_unchecked(x, packed, (state.buffer, position), active)
    with evaluating(model):
        return model.encoder.step(x, state.layers, active)


def _active(model: RecGRELA, caller: str, items: Tensor) -> Tensor | None:
    """Which users get a real item; None where all are known to. Wrong ids are refused."""
    config = model.config
    if items.shape[0] <= _FEW_USERS and inputs.values_are_checked(items):
        rows = items.tolist()  # for few users a list is looked at sooner than a tensor
        if rows and min(rows) >= 0 and max(rows) < config.rows:
            return items != config.padding_idx if config.padding_idx in rows else None
    inputs.check_ids(caller, "items", config, items)
    real = items != config.padding_idx
    everyone = inputs.values_are_checked(items) and bool(real.all())
    return None if everyone else real


def _embed_event(model: RecGRELA, items: Tensor, state: UserState) -> Tensor:
    """As `model._embed` in evaluation; without the modules' calls, which cost as much as their
    work, unless something was put in their place or hooked to them."""
    table, norm = model.item_embedding, model.input_norm
    plain = type(table) is nn.Embedding and type(norm) is nn.LayerNorm
    hooked = any((table._forward_hooks, table._forward_pre_hooks, norm._forward_hooks,
                  norm._forward_pre_hooks))  # fmt: skip
    if not plain or hooked or table.max_norm is not None or model.config.position != "none":
        positions = None if model.config.position == "none" else state.position
        with evaluating(model):
            return model._embed(items, positions)
    x = table.weight.index_select(0, items)
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def step(model: RecGRELA, items: Tensor, state: UserState) -> Tensor:
    caller = "RecGRELA.step"
    inputs.check_integers(caller, "items", items)
    if items.dim() != 1:
        raise ValueError(f"{caller}: items must be [B], got {list(items.shape)}")
    weights = check_state(model, caller, state, items.shape[0])
    active = _active(model, caller, items)
    hidden = _encode_step(model, weights, _embed_event(model, items, state), state, active)
    if active is not None:
        # The user's own row is kept as it is: a cast to the model's dtype and back would round it.
        kept = torch.where(active.unsqueeze(-1), hidden.to(state.hidden.dtype), state.hidden)
        hidden = kept.to(hidden.dtype)
        state.hidden.copy_(kept)
    else:
        state.hidden.copy_(hidden)
    state.advance(active, 1)
    return hidden
