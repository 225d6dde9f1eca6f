from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from recgrela_ext.model import RecGRELA, RecGRELAConfig

MakeModel = Callable[..., RecGRELA]


@pytest.fixture
def make_model() -> MakeModel:
    """A small model whose weights are large enough that every part of it shows in the output."""

    def make(dtype: torch.dtype = torch.float64, **changes: Any) -> RecGRELA:
        sizes = {"n_items": 50, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
        model = RecGRELA(RecGRELAConfig(**{**sizes, "max_seq_len": 40, **changes}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name and "conv" not in name:
                    parameter.normal_(std=0.3)
            model.item_embedding.weight[model.config.padding_idx] = 0
        return model.to(dtype).eval()

    return make
