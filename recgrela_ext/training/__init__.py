"""Training: windows of next-item targets, losses, and `fit` with exact resume."""

from recgrela_ext.training.config import FitResult, TrainConfig
from recgrela_ext.training.losses import (
    NegativeSampler,
    bpr_loss,
    sampled_softmax_loss,
    softmax_loss,
)
from recgrela_ext.training.trainer import fit
from recgrela_ext.training.windows import TrainingWindows

__all__ = [
    "FitResult",
    "NegativeSampler",
    "TrainConfig",
    "TrainingWindows",
    "bpr_loss",
    "fit",
    "sampled_softmax_loss",
    "softmax_loss",
]
