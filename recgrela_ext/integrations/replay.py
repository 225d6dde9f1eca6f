"""RecGRELA in the encoder slot of RePlay's composable models (replay-rec 0.22).

    body = recgrela_body(tensor_schema, num_blocks=2, num_heads=4)
    model = SasRec(body=body, loss=CE(ignore_index=tensor_schema["item_id"].padding_value))
    Trainer(max_epochs=20).fit(LightningModule(model), datamodule=parquet_module)

Embeddings, losses, transforms, metrics and postprocessors stay RePlay's. It pads on the left, and
its padding item is row `cardinality`, after the last item; neither matters here, as padding comes
as a mask. Rotary positions take the place of the position table, so there is no longest sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recgrela_ext import GRELAEncoder as Encoder
from recgrela_ext.errors import shown

try:
    from replay.data.nn import TensorMap, TensorSchema
    from replay.nn.agg import SumAggregator
    from replay.nn.embedding import SequenceEmbedding
    from replay.nn.sequential import SasRecBody
except ImportError as error:
    raise ImportError(
        "recgrela_ext.integrations.replay needs replay-rec 0.22 or newer: "
        "pip install 'recgrela-ext[replay]'"
    ) from error


class GRELAEncoder(nn.Module):
    """Dropout, input norm and GRELA blocks, called as RePlay calls encoders.

    Args:
        embedding_dim, num_heads, num_blocks, dropout: as `SasRecTransformerLayer`; `embedding_dim`
            is a multiple of 2 * `num_heads`.
        block: other keywords of `GRELABlock`.

    Raises:
        ValueError: a size cannot work, or `causal` is False: SasRec trains all positions.
    """

    def __init__(
        self, embedding_dim: int, num_heads: int, num_blocks: int, dropout: float, **block: Any
    ) -> None:
        super().__init__()
        if not block.get("causal", True):
            raise ValueError("GRELAEncoder: causal must be True, got False")
        self.dropout = nn.Dropout(dropout)
        self.input_norm = nn.LayerNorm(embedding_dim, eps=block.get("layer_norm_eps", 1e-6))
        self.encoder = Encoder(embedding_dim, num_blocks, num_heads, dropout=dropout, **block)

    def reset_parameters(self) -> None:
        """Start anew; RePlay calls it once a model is put together."""
        self.input_norm.reset_parameters()
        self.encoder.reset_parameters()

    def forward(
        self,
        feature_tensors: TensorMap,
        input_embeddings: Tensor,
        padding_mask: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states `[B, L, embedding_dim]`, zero where `padding_mask [B, L]` is False.

        Args:
            feature_tensors, attention_mask: not used.
            input_embeddings: `[B, L, embedding_dim]`.
            padding_mask: True = real item, one contiguous run per row.

        Raises:
            ValueError: padding between items; in evaluation also padding after them, as RePlay
                reads the last position (both checked for tensors on the CPU).
        """
        if not self.training and not torch.compiler.is_compiling():
            _check_last(padding_mask)
        x = self.input_norm(self.dropout(input_embeddings))
        hidden: Tensor = self.encoder(x, mask=padding_mask)
        return hidden


def _check_last(mask: Tensor) -> None:
    if mask.device.type == "cpu" and mask.shape[1]:
        wrong = mask.any(1) & ~mask[:, -1].to(torch.bool)
        if bool(wrong.any()):
            raise ValueError(
                "GRELAEncoder: padding_mask must be True at the last position (left padding), "
                f"got padding there in row {int(wrong.nonzero()[0])}"
            )


class NoAttentionMask(nn.Module):
    """Stands where RePlay builds its `[B * H, L, L]` mask; causal blocks need none."""

    def forward(self, feature_tensor: TensorMap, padding_mask: Tensor) -> None:
        """None."""


class NoNormalization(nn.Identity):
    """RecGRELA has no norm after its last block, unless `final_norm=True` asks for one."""

    def reset_parameters(self) -> None:
        """There are none."""


def recgrela_body(
    schema: TensorSchema,
    num_heads: int = 4,
    num_blocks: int = 4,
    dropout: float = 0.1,
    excluded_features: Sequence[str] = (),
    **block: Any,
) -> SasRecBody:
    """The body of `replay.nn.sequential.SasRec` with this encoder; the width is the schema's.

    Args:
        schema: every sequential feature that is not excluded is embedded, and they are summed.
        num_heads, num_blocks, dropout, block: as `GRELAEncoder`.
        excluded_features: names of the schema, beside query id and timestamp.

    Raises:
        ValueError: there is not one item id feature, an excluded name is not in the schema, or a
            feature is embedded in another width than the item.
    """
    found = len(schema.item_id_features)
    if found != 1:
        raise ValueError(f"recgrela_body: schema must have one item id feature, got {found}")
    unknown = [name for name in excluded_features if name not in schema.names]
    if isinstance(excluded_features, str) or unknown:
        raise ValueError(
            "recgrela_body: excluded_features must be a list of names in the schema, "
            f"got {shown(excluded_features)}"
        )
    width = schema.item_id_features.item().embedding_dim
    excluded = [schema.query_id_feature_name, schema.timestamp_feature_name, *excluded_features]
    embedder = SequenceEmbedding(schema, [name for name in excluded if name is not None])
    for name, one in embedder.feature_embedders.items():
        if one.embedding_dim != width:
            raise ValueError(
                f"recgrela_body: schema must embed every feature in {width} numbers, as the item, "
                f"got {one.embedding_dim} for {name}"
            )
    return SasRecBody(
        embedder=embedder,
        embedding_aggregator=SumAggregator(width),
        attn_mask_builder=NoAttentionMask(),
        encoder=GRELAEncoder(width, num_heads, num_blocks, dropout, **block),
        output_normalization=NoNormalization(),
    )
