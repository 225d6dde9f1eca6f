"""Layers: operators with parameters around them."""

from __future__ import annotations

from .encoder import GRELAEncoder
from .grela_block import DropPath, FeedForward, GRELABlock
from .rank_modulator import AdaptiveRankModulator
from .rela import RotaryEnhancedLinearAttention

__all__ = [
    "AdaptiveRankModulator",
    "DropPath",
    "FeedForward",
    "GRELABlock",
    "GRELAEncoder",
    "RotaryEnhancedLinearAttention",
]
