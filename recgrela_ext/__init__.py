"""RecGRELA: sequential recommendation with causal gated linear attention.

Names load on first use, so that importing the package stays cheap and the model needs torch, numpy
and safetensors alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import ops
    from ._library import build_info
    from .data import IdMap, Interactions, Sequences, Targets
    from .errors import CheckpointError, DataError, StateError
    from .evaluation import evaluate
    from .layers import (
        AdaptiveRankModulator,
        GRELABlock,
        GRELAEncoder,
        RotaryEnhancedLinearAttention,
    )
    from .model import (
        ItemTable,
        RecGRELA,
        RecGRELAConfig,
        Recommendations,
        SeenItems,
        UserState,
        UserStateStore,
    )
    from .training import TrainConfig, fit
    from .version import __version__

_HOME = {
    "AdaptiveRankModulator": "layers",
    "CheckpointError": "errors",
    "DataError": "errors",
    "GRELABlock": "layers",
    "GRELAEncoder": "layers",
    "IdMap": "data",
    "Interactions": "data",
    "ItemTable": "model",
    "RecGRELA": "model",
    "RecGRELAConfig": "model",
    "Recommendations": "model",
    "RotaryEnhancedLinearAttention": "layers",
    "SeenItems": "model",
    "Sequences": "data",
    "StateError": "errors",
    "Targets": "data",
    "TrainConfig": "training",
    "UserState": "model",
    "UserStateStore": "model",
    "__version__": "version",
    "build_info": "_library",
    "evaluate": "evaluation",
    "fit": "training",
    "ops": "ops",
}

__all__ = [
    "AdaptiveRankModulator",
    "CheckpointError",
    "DataError",
    "GRELABlock",
    "GRELAEncoder",
    "IdMap",
    "Interactions",
    "ItemTable",
    "RecGRELA",
    "RecGRELAConfig",
    "Recommendations",
    "RotaryEnhancedLinearAttention",
    "SeenItems",
    "Sequences",
    "StateError",
    "Targets",
    "TrainConfig",
    "UserState",
    "UserStateStore",
    "__version__",
    "build_info",
    "evaluate",
    "fit",
    "ops",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f".{_HOME[name]}", __name__)
    value = module if name == _HOME[name] else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
