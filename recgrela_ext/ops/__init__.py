"""The operators: stateless functions on ``[B, L, H, D]`` rows.

``reference`` states each of them in plain PyTorch and is the specification; the functions here run
the compiled kernels where there are any and the reference elsewhere.
"""

from . import reference
from .activation_dropout import activation_dropout
from .encoder_step import EncoderLayer, PackedEncoder, encoder_step, pack_encoder
from .feed_forward import feed_forward
from .gated_rela import gated_rela
from .gated_rela_step import gated_rela_step
from .recency_bias import RecencyBias
from .recent_items import recent_items
from .reference import LogitBias, inv_freq
from .rela import rela
from .softmax_loss import softmax_loss
from .topk_scores import topk_scores

__all__ = [
    "EncoderLayer",
    "LogitBias",
    "PackedEncoder",
    "RecencyBias",
    "activation_dropout",
    "encoder_step",
    "feed_forward",
    "gated_rela",
    "gated_rela_step",
    "inv_freq",
    "pack_encoder",
    "recent_items",
    "reference",
    "rela",
    "softmax_loss",
    "topk_scores",
]
