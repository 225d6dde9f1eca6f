"""RecGRELA in the transformer slot of RecTools (0.19).

    model = SASRecModel(**SLOT, n_blocks=2, n_heads=4, n_factors=64, session_max_len=200)
    model.fit(dataset)
    model.recommend(users, dataset, k=10, filter_viewed=True)

`SLOT` holds four settings: these layers, their initialisation, no attention mask and no position
table, which rotary positions replace. Item networks, losses, recommending, saving stay RecTools'.
Sequences are padded on the left with item 0.

When training starts, RecTools draws every matrix again from a Xavier normal, short convolutions and
padding row included. `RecGRELAModule` starts from the model's own initialisation instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recgrela_ext import GRELAEncoder

try:
    from rectools.models.nn.transformers.lightning import TransformerLightningModule
    from rectools.models.nn.transformers.net_blocks import TransformerLayersBase
except ImportError as error:
    raise ImportError(
        "recgrela_ext.integrations.rectools needs rectools 0.19 or newer: "
        "pip install 'recgrela-ext[rectools]'"
    ) from error


class RecGRELALayers(TransformerLayersBase):
    """Input norm and GRELA encoder; a causal mask is not needed, and not looked at.

    Args:
        n_blocks, n_factors, n_heads, dropout_rate: as RecTools passes them; `n_factors` is a
            multiple of 2 * `n_heads`.
        kwargs: other keywords of `GRELABlock`, from `transformer_layers_kwargs`.

    Raises:
        ValueError: a size cannot work, or `causal` is False: SASRecModel trains all positions.
    """

    def __init__(
        self, n_blocks: int, n_factors: int, n_heads: int, dropout_rate: float, **kwargs: Any
    ) -> None:
        super().__init__()
        if not kwargs.get("causal", True):
            raise ValueError("RecGRELALayers: causal must be True, got False")
        self.input_norm = nn.LayerNorm(n_factors, eps=kwargs.get("layer_norm_eps", 1e-6))
        self.encoder = GRELAEncoder(n_factors, n_blocks, n_heads, dropout=dropout_rate, **kwargs)

    def forward(
        self,
        seqs: Tensor,
        timeline_mask: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states `[B, L, n_factors]`, zero where `timeline_mask [B, L, 1]` is False."""
        hidden: Tensor = self.encoder(self.input_norm(seqs), mask=timeline_mask.squeeze(-1))
        return hidden

    def reset_parameters(self) -> None:
        """Start anew."""
        self.input_norm.reset_parameters()
        self.encoder.reset_parameters()


class RecGRELAModule(TransformerLightningModule):
    """RecTools' training with RecGRELA's initialisation: N(0, 0.02), padding row zero."""

    def on_train_start(self) -> None:
        """Initialise, unless training goes on."""
        if not self.is_fitted:
            initialise(self.torch_model)


def initialise(backbone: nn.Module, std: float = 0.02) -> None:
    """For a backbone with `RecGRELALayers`; a Lightning module of your own may call it."""
    for module in backbone.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag, nn.Linear)):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx] = 0
    for module in backbone.modules():
        if isinstance(module, RecGRELALayers):
            module.reset_parameters()


SLOT: dict[str, Any] = {
    "transformer_layers_type": RecGRELALayers,
    "lightning_module_type": RecGRELAModule,
    "use_causal_attn": False,
    "use_pos_emb": False,
}
