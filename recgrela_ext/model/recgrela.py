"""The RecGRELA model (arXiv 2506.13315): item table, GRELA encoder, tied scores.

x = LN(Dropout(E[item])),  hidden = encoder(x),  scores = hidden . E^T (+ repeat_bias.py)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import shown
from ..layers.dropout import dropout
from ..layers.encoder import GRELAEncoder, shift_rows
from ..layers.watch import Derived
from ..modes import evaluating
from ..ops import RecencyBias
from ..ops.checks import check_tensor
from . import inputs, persistence, streaming
from .config import RecGRELAConfig
from .losses import softmax_loss
from .repeat_bias import RepeatBias, by_recency, spans_of
from .retrieval import ItemTable, Recommendations, check_lists, top_k, top_k_biased
from .seen import SeenItems
from .state import StateLayout, UserState

if TYPE_CHECKING:
    from ..data import IdMap, Sequences

_PACK_BELOW = 0.95  # share of real items from which packing is not worth a copy


class RecGRELA(nn.Module):
    """Sequential recommender with causal gated linear attention.

    Item rows are integers 0 .. n_items - 1; row `config.padding_idx` is padding: zero, without
    gradient, never scored and no class of the loss (the published variant keeps it as a class).
    Sequences are right-padded unless `padding_side="left"`; what stands on padding is never read.

    `forward` returns the hidden state at the last real item, `encode` all of them, `loss` the
    training loss, `recommend` lists of items. A causal model also streams: `init_state`, `prefill`,
    `step`, `recommend_from_state`.

    Args:
        config: see `RecGRELAConfig`.
    """

    def __init__(self, config: RecGRELAConfig) -> None:
        super().__init__()
        if not isinstance(config, RecGRELAConfig):
            raise TypeError(
                f"RecGRELA: config must be a RecGRELAConfig, got {type(config).__name__}"
            )
        self.config = config
        self.id_map: IdMap | None = None
        self._weights = Derived(persistence.Weights)
        self.register_load_state_dict_post_hook(_forget_weights)
        width = config.hidden_size
        self.item_embedding = nn.Embedding(config.rows, width, padding_idx=config.padding_idx)
        learned = config.position == "learned"
        self.position_embedding = nn.Embedding(config.max_seq_len, width) if learned else None
        self.input_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.encoder = GRELAEncoder(
            width,
            config.num_layers,
            config.num_heads,
            final_norm=config.final_norm,
            **config.block_options(),
        )
        self.repeat_bias = RepeatBias() if config.repeat_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, initializer_range) for Linear and Embedding, zero biases and padding row; the short
        convolution keeps its own uniform start, as in the published code."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.item_embedding.weight[self.config.padding_idx] = 0

    @classmethod
    def for_data(cls, train: Sequences, **overrides: Any) -> RecGRELA:
        """A model for this training data: item count, id map and share of repeats taken from it.

        `overrides` are fields of `RecGRELAConfig`. A causal model gets a repeat bias, which only
        the softmax loss trains; for the other losses make it with `repeat_bias=False`.
        """
        if not hasattr(train, "n_items"):
            raise TypeError(f"RecGRELA.for_data: train must be Sequences, got {shown(train)}")
        facts = {
            "n_items": train.n_items,
            "repeat_share": train.repeat_share,
            "repeat_bias": bool(overrides.get("causal", True)),
        }
        model = cls(RecGRELAConfig(**{**facts, **overrides}))
        model.id_map = train.id_map
        return model

    @property
    def variant(self) -> str:
        """Which model this is, see `RecGRELAConfig.variant`."""
        return self.config.variant

    # hidden states

    def forward(
        self,
        item_seq: Tensor,
        item_seq_len: Tensor | None = None,
        targets: Tensor | None = None,
        padding_side: str = "right",
    ) -> Tensor:
        """Hidden state at the last real item, the published contract.

        Args:
            item_seq: item rows [B, L], int64 or int32.
            item_seq_len: real items per row [B]; None: counted.
            targets: with targets the result is `loss(item_seq, item_seq_len, targets)`, so that
                wrappers which only know `forward` (DistributedDataParallel) can train.
            padding_side: "right" or "left".

        Returns:
            [B, hidden_size]; zero for a user without items.

        Raises:
            ValueError, TypeError: see `encode`.
        """
        if targets is not None:
            return self.loss(item_seq, item_seq_len, targets, padding_side)
        return self._last_hidden(self._read("forward", item_seq, item_seq_len, padding_side))

    def encode(
        self, item_seq: Tensor, item_seq_len: Tensor | None = None, padding_side: str = "right"
    ) -> Tensor:
        """Hidden states of all positions, [B, L, hidden_size], zero on padding.

        Args: as `forward`.

        Raises:
            ValueError: wrong shape, an id that is no row of the item table, a length beyond L, or
                padding between real items (values are checked for tensors on the CPU).
            TypeError: ids that are not integers.
        """
        batch = self._read("encode", item_seq, item_seq_len, padding_side)
        hidden = torch.where(batch.real.unsqueeze(-1), self._hidden(batch), 0.0)
        return hidden if batch.shift is None else shift_rows(hidden, -batch.shift)

    def encode_packed(self, item_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Hidden states of sequences laid end to end, without padding.

        Args:
            item_ids: item rows [T].
            cu_seqlens: bounds [B + 1], int32 or int64, from 0 to T.

        Returns:
            [T, hidden_size].

        Raises:
            ValueError, TypeError: as `encode`; bounds that do not ascend from 0 to T.
        """
        inputs.check_packed("RecGRELA.encode_packed", self.config, item_ids, cu_seqlens)
        x = self._embed(item_ids, inputs.packed_positions(item_ids, cu_seqlens, self.config))
        return self.encoder.run(x, cu_seqlens=cu_seqlens)[0]

    def _read(
        self, caller: str, item_seq: Tensor, item_seq_len: Tensor | None, padding_side: str
    ) -> inputs.Batch:
        name = f"RecGRELA.{caller}"
        return inputs.read_batch(name, self.config, item_seq, item_seq_len, padding_side)

    def _hidden(self, batch: inputs.Batch) -> Tensor:
        """[B, L, hidden_size] of right-padded input; rows on padding hold no meaning."""
        lengths = None if self.config.attend_padding else batch.lengths
        positions = None
        if self.config.position != "none":
            positions = torch.arange(batch.items.shape[1], device=batch.items.device)
        return self.encoder.run(self._embed(batch.items, positions), lengths)[0]

    def _last_hidden(self, batch: inputs.Batch) -> Tensor:
        B, L = batch.items.shape
        if L == 0:
            return self.item_embedding.weight.new_zeros(B, self.config.hidden_size)
        hidden = self._hidden(batch)
        last = (batch.lengths - 1).clamp(min=0)
        at_last = hidden[torch.arange(B, device=last.device), last]
        return torch.where((batch.lengths > 0).unsqueeze(-1), at_last, 0.0)

    def _embed(self, items: Tensor, positions: Tensor | None = None) -> Tensor:
        """LN(Dropout(E[items] + P[positions])); items and positions broadcast."""
        x = self.item_embedding(items)
        if self.position_embedding is not None:
            assert positions is not None
            last = self.position_embedding.num_embeddings - 1
            x = x + self.position_embedding(positions.clamp(max=last))
        elif self.config.position == "sinusoidal":
            assert positions is not None
            x = x + inputs.sinusoid(positions, self.config.hidden_size).to(x.dtype)
        return self.input_norm(dropout(x, self.config.dropout, self.training))

    # training

    def loss(
        self,
        item_seq: Tensor,
        item_seq_len: Tensor | None,
        targets: Tensor,
        padding_side: str = "right",
    ) -> Tensor:
        """Mean full-softmax cross-entropy in nats over the positions with a target (paper eq. 25).

        Args:
            item_seq, item_seq_len, padding_side: as `forward`.
            targets: [B, L], the next item of each position, `padding_idx` where there is none; or
                [B], the item after each whole sequence. A bidirectional model sees later items, so
                for it only the last real position may have a target.

        Returns:
            Scalar, 0 without any target. Positions without one are not scored, and the scores of
            all positions never exist at once.

        Raises:
            ValueError, TypeError: as `encode`; targets on padding, or a target the model could see.
        """
        config = self.config
        batch = self._read("loss", item_seq, item_seq_len, padding_side)
        targets = inputs.read_targets("RecGRELA.loss", config, targets, batch)
        bias = None
        if targets.dim() == 1:
            if self.repeat_bias is not None:
                L = batch.items.shape[1]
                begin = L * torch.arange(len(batch.items), device=targets.device)
                end = torch.where(targets == config.padding_idx, begin, begin + batch.lengths)
                bias = self.repeat_bias.of_spans(batch.items.flatten().long(), begin, end)
            return self._softmax_loss(self._last_hidden(batch), targets, bias)
        if self._worth_packing(batch):
            bounds = F.pad(batch.lengths.cumsum(0), (1, 0))
            return self.loss_packed(batch.items[batch.real], bounds, targets[batch.real])
        items, targets = batch.items.flatten(), targets.flatten()
        hidden = self._hidden(batch).flatten(0, 1)
        if self.repeat_bias is not None:
            B, L = batch.items.shape
            bounds = L * torch.arange(B + 1, device=items.device)
            bias = self.repeat_bias.of_windows(items.long(), bounds, targets, config.padding_idx)
        return self._softmax_loss(hidden, targets, bias)

    def loss_packed(self, item_ids: Tensor, cu_seqlens: Tensor, targets: Tensor) -> Tensor:
        """`loss` of sequences laid end to end, without padding.

        Args:
            item_ids, cu_seqlens: as `encode_packed`.
            targets: [T] int64, the next item of each position, `padding_idx` where there is none.

        Raises:
            ValueError, TypeError: as `encode_packed`; targets that are no rows of the item table; a
                bidirectional model, which would see them.
        """
        inputs.check_packed_targets("RecGRELA.loss_packed", self.config, targets, item_ids)
        hidden = self.encode_packed(item_ids, cu_seqlens)
        bias = None
        if self.repeat_bias is not None:
            pad = self.config.padding_idx
            bias = self.repeat_bias.of_windows(item_ids.long(), cu_seqlens, targets, pad)
        return self._softmax_loss(hidden, targets, bias)

    def _softmax_loss(self, hidden: Tensor, targets: Tensor, bias: RecencyBias | None) -> Tensor:
        return softmax_loss(
            hidden,
            self.item_embedding.weight,
            targets,
            ignore_index=self.config.padding_idx,
            exclude_padding_class=not self.config.attend_padding,
            bias=bias,
        )

    def _worth_packing(self, batch: inputs.Batch) -> bool:
        if torch.compiler.is_compiling() or self.config.attend_padding or batch.full:
            return False
        return int(batch.lengths.sum()) < _PACK_BELOW * batch.items.numel()

    # scoring

    def scores(self, hidden: Tensor, seen: Tensor | None = None) -> Tensor:
        """hidden [..., hidden_size] -> scores of all rows [..., n_items]; the padding row is -inf.

        (In the published variant, `attend_padding=True`, that row is scored like any other.) A
        repeat bias is in them where `seen` says what was met: histories [B, S] of hidden [B,
        hidden_size], oldest first, filled up with padding.

        Raises:
            ValueError, TypeError: `seen` of another shape or type.
        """
        scores = F.linear(hidden, self.item_embedding.weight)
        if seen is not None:
            check_lists(hidden, self.item_embedding.weight, 1, seen, None)
        if seen is not None and self.repeat_bias is not None:
            items, begin, end = spans_of(seen, self.config.padding_idx)
            inputs.check_ids("RecGRELA.scores", "seen", self.config, items)
            if torch.is_grad_enabled():
                bias = self.repeat_bias.of_spans(items, begin, end).listed()
            else:
                bias = self.repeat_bias.ranked_spans(items, begin, end)
            values = bias.values.to(scores.dtype)
            scores = scores.index_put((bias.rows(), bias.items), values, accumulate=True)
        if self.config.attend_padding:
            return scores
        padding = torch.arange(self.config.rows, device=scores.device) == self.config.padding_idx
        return scores.masked_fill(padding, -torch.inf)

    @torch.no_grad()
    def recommend(
        self,
        item_seq: Tensor,
        item_seq_len: Tensor | None = None,
        k: int = 10,
        exclude_seen: bool | str = "auto",
        candidates: Tensor | None = None,
        padding_side: str = "right",
        table: ItemTable | None = None,
    ) -> Recommendations:
        """The k best next items of each user, in evaluation mode and exact, in chunks of the table.

        Args:
            item_seq, item_seq_len, padding_side: as `forward`.
            k: list length.
            exclude_seen: leave out the items of `item_seq`. "auto": yes, unless the model was made
                for data in which more than 1 % of the events repeat an item.
            candidates: rank these rows alone, [C] or [B, C].
            table: rank with these item vectors, in a smaller format; None: the model's own.

        Returns:
            items [B, k] and scores [B, k]; (padding_idx, -inf) where a user has no more items, or
            where the scores are NaN.

        Raises:
            ValueError, TypeError: as `encode`; k below 1; candidates that are no rows of the table.
        """
        exclude = self._excludes(exclude_seen)
        batch = self._read("recommend", item_seq, item_seq_len, padding_side)
        with evaluating(self):
            hidden = self._last_hidden(batch)
        return self._top_k(hidden, k, batch.items, exclude, candidates, table)

    @torch.no_grad()
    def recommend_from_hidden(
        self,
        hidden: Tensor,
        k: int = 10,
        seen: SeenItems | Tensor | None = None,
        candidates: Tensor | None = None,
        table: ItemTable | None = None,
        exclude_seen: bool | str | None = None,
    ) -> Recommendations:
        """The k best next items after hidden states [B, hidden_size], as `recommend`.

        Args:
            k, candidates, table: as there.
            seen: what each user has met: a `SeenItems`, or histories [B, S], oldest first, filled
                up with padding. None: nothing is left out, which a repeat bias does not allow.
            exclude_seen: leave `seen` out; False: it stays in, with its repeat bias if the model
                has one; "auto" as in `recommend`. None: "auto" with a repeat bias, else True.

        Raises:
            ValueError, TypeError: as `recommend`; a model with a repeat bias and no `seen`.
        """
        if exclude_seen is None:
            exclude_seen = True if self.repeat_bias is None else "auto"
        exclude = self._excludes(exclude_seen)
        if seen is None and self.repeat_bias is not None:
            raise ValueError(
                "RecGRELA.recommend: seen must be given to a model with a repeat bias, as scores "
                "depend on it, also where it stays in (exclude_seen=False); got None"
            )
        if isinstance(seen, SeenItems):
            check_tensor("RecGRELA.recommend", "hidden", hidden)
            seen = seen.padded(self.config.padding_idx, hidden.device)
        return self._top_k(hidden, k, seen, exclude, candidates, table)

    def _excludes(self, exclude_seen: bool | str) -> bool:
        if isinstance(exclude_seen, str) and exclude_seen == "auto":
            return not self.config.keeps_seen
        if not isinstance(exclude_seen, bool):
            raise ValueError(
                "RecGRELA.recommend: exclude_seen must be True, False or 'auto', "
                f"got {shown(exclude_seen)}"
            )
        return exclude_seen

    def _top_k(
        self,
        hidden: Tensor,
        k: int,
        seen: Tensor | None,
        exclude: bool,
        candidates: Tensor | None,
        table: ItemTable | None,
    ) -> Recommendations:
        vectors, scale, padding = self.item_embedding.weight, None, self.config.padding_idx
        if table is not None:
            if not isinstance(table, ItemTable):
                got = type(table).__name__
                raise TypeError(f"RecGRELA.recommend: table must be an ItemTable, got {got}")
            table.check(self, "RecGRELA.recommend")
            vectors, scale = table.vectors, table.scale
        elif vectors.shape[0] != self.config.rows:
            raise ValueError(
                f"RecGRELA.recommend: item_embedding must have the {self.config.rows} rows of the "
                f"config, got {vectors.shape[0]}"
            )
        if self.repeat_bias is None or exclude or seen is None:
            return top_k(hidden, vectors, k, padding, seen if exclude else None, candidates, scale)
        check_lists(hidden, vectors, k, seen, candidates)
        seen = seen.to(torch.int64)
        known = (seen >= 0) & (seen < len(vectors))  # others are passed over, as by `top_k`
        recent = by_recency(torch.where(known, seen, padding), padding)
        bias = self.repeat_bias.ranked(torch.arange(1, recent.shape[1] + 1, device=recent.device))
        return top_k_biased(hidden, vectors, k, padding, recent, bias, candidates, scale)

    # streaming

    @property
    def state_layout(self) -> StateLayout:
        """Sizes of a user state. ValueError for a bidirectional model, which has none."""
        return streaming.layout(self)

    def init_state(self, batch_size: int) -> UserState:
        """The state of `batch_size` users before their first item, on the model's device."""
        return streaming.init_state(self, batch_size)

    @torch.no_grad()
    def prefill(
        self,
        item_seq: Tensor,
        item_seq_len: Tensor | None = None,
        chunk_size: int = 512,
        state: UserState | None = None,
        padding_side: str = "right",
    ) -> UserState:
        """Read whole histories into a state; `chunk_size` positions at a time, so that the working
        memory does not grow with L.

        Args:
            item_seq, item_seq_len, padding_side: as `forward`.
            state: continued in place and returned; None: fresh.

        Raises:
            ValueError, TypeError: as `encode`; a state of another batch size or model.
        """
        return streaming.prefill(self, item_seq, item_seq_len, chunk_size, state, padding_side)

    @torch.no_grad()
    def prefill_packed(
        self,
        item_ids: Tensor,
        cu_seqlens: Tensor,
        chunk_size: int = 512,
        state: UserState | None = None,
    ) -> UserState:
        """`prefill` of histories laid end to end: no work is done on padding.

        Args:
            item_ids, cu_seqlens: as `encode_packed`.
            chunk_size, state: as `prefill`.

        Raises:
            ValueError, TypeError: as `encode_packed`; a state of another batch size or model.
        """
        return streaming.prefill_packed(self, item_ids, cu_seqlens, chunk_size, state)

    def step(self, items: Tensor, state: UserState) -> Tensor:
        """One new item [B] per user: updates `state`, returns the hidden states [B, hidden_size].

        The padding item leaves its user untouched and returns the hidden state kept there. Always
        in evaluation mode. Warns once in a process, when a user passes a million
        events.

        Raises:
            ValueError, TypeError: wrong shape or type, an id that is no row of the item table, a
                state of another batch size or model.
        """
        if torch.is_grad_enabled():
            with torch.no_grad():
                return streaming.step(self, items, state)
        return streaming.step(self, items, state)  # a service has switched gradients off for good

    @torch.no_grad()
    def recommend_from_state(
        self,
        state: UserState,
        k: int = 10,
        seen: SeenItems | Tensor | None = None,
        candidates: Tensor | None = None,
        table: ItemTable | None = None,
        exclude_seen: bool | str | None = None,
    ) -> Recommendations:
        """The k best next items after everything `state` has read, as `recommend_from_hidden`: a
        state holds no ids, so that what was seen comes beside it.

        Raises:
            ValueError, TypeError: as there; a state of another model.
        """
        streaming.check_state(self, "RecGRELA.recommend_from_state", state)
        return self.recommend_from_hidden(state.hidden, k, seen, candidates, table, exclude_seen)

    def fingerprint(self) -> bytes:
        """16 bytes that depend on the weights and on the configuration, training options apart.

        States, stores and item tables made with other weights are refused by it. Writes through
        `.data` are the exception, and those to a weight that was made in inference mode (but for
        `load_state_dict`): they go unnoticed, as autograd does not count them.
        """
        return persistence.weights_of(self).fingerprint

    # persistence

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json, model.safetensors and, with an `id_map`, id_map.json into `folder`.

        Each file appears whole or not at all; a mixture of two savings is refused on loading.
        """
        persistence.save_pretrained(self, folder)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], device: torch.device | str | None = None
    ) -> RecGRELA:
        """The model `save_pretrained` wrote, in evaluation mode.

        Raises:
            CheckpointError: a file is missing, truncated, of another version or of another model.
            ValueError, TypeError: a folder that is no path, a device that is not there.
        """
        return persistence.from_pretrained(cls, folder, device)

    @classmethod
    def from_reference(cls, state_dict: dict[str, Any], num_heads: int = 4) -> RecGRELA:
        """The published implementation's weights in `RecGRELAConfig.paper` form, evaluation mode.

        Sizes are read from the tensors, `num_heads` cannot be. CheckpointError for other weights.
        """
        return persistence.from_reference(cls, state_dict, num_heads)

    def extra_repr(self) -> str:
        return f"variant={self.variant!r}, n_items={self.config.n_items}"


def _forget_weights(model: RecGRELA, _: Any) -> None:
    model._weights.forget()
