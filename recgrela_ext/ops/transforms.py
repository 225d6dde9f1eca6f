"""What is differentiating, or transforming, a call: which operator must be taken for it."""

from __future__ import annotations

import torch
from torch import Tensor


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an operator on these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def needs_plain_pytorch() -> bool:
    """Inside forward-mode differentiation or torch.func, where a kernel would drop derivatives."""
    return _in_forward_mode() or in_transform()


# `torch.compile` asks while it makes a graph, and makes another one where the answer would differ.
@torch.compiler.assume_constant_result
def _in_forward_mode() -> bool:
    return torch.autograd.forward_ad._current_level >= 0


@torch.compiler.assume_constant_result
def in_transform() -> bool:
    """Inside vmap, grad and the other transforms of torch.func."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_batched(x: Tensor) -> bool:
    """Inside vmap, one of a batch that has no values of its own."""
    return torch._C._functorch.is_batchedtensor(x)
