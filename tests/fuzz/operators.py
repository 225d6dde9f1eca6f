"""Every operator: sizes, dtypes, strides, lengths, states, then what is spoiled of them.

What is refused is refused in one line that begins with the operator's name, and is not what
operator_rules.py calls valid; what is accepted gives what the reference gives, and so do its
gradients.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tests.fuzz import operator_calls as public
from tests.fuzz import raw_calls as raw
from tests.fuzz.draw import Draw

# The first byte of an input chooses, and of a kept input for ever: a new call takes a place of
# FREE, where others stand in for it until then.
CALLS = (
    public.sequence, public.sequence, public.step, public.encoder, public.topk, public.dropout,
    raw.sequence, raw.step, raw.encoder, raw.topk, raw.dropout,
    public.feed_forward, raw.feed_forward, public.softmax, raw.softmax,
    raw.rela, raw.sequence_backward, raw.dropout_backward, raw.feed_forward_backward,
    public.sequence_gradients, public.dropout_gradients, public.feed_forward_gradients,
    public.rela_gradients, public.softmax_gradients, public.recent, raw.recent,
    public.by_recency, raw.by_recency,
)  # fmt: skip
FREE = CALLS[len(CALLS) - 18 : 14]


class Operators:
    """Data: which call, a seed for the values, sizes, then what is spoiled."""

    def __init__(self, folder: Path) -> None:
        torch.set_grad_enabled(False)

    def __call__(self, data: bytes) -> str:
        draw = Draw(data)
        call = draw.one_of((*CALLS, *FREE))
        # not torch.manual_seed, which keeps stacks for other devices: half of the time here
        torch.default_generator.manual_seed(draw.byte())
        return call(draw)
