"""Second derivatives of gated_rela: the reference, differentiated twice by autograd.

Plain PyTorch on every device: who needs second derivatives needs them right, seldom, and in float64
(gradient penalties, gradgradcheck); a kernel would be the third statement of the same formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .autocast import full_precision
from .reference import gated_rela

# Positions of the differentiable tensors among the inputs of gated_rela_backward, and for each of
# its outputs the input it is the gradient of.
_GRADS = (0, 1, 2, 3)
_INPUTS = (4, 5, 6, 7, 9, 10, 13, 14, 15)


def second_gradients(
    tensors: Sequence[Tensor | None], eps: float, grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of gated_rela_backward with respect to its first 17 inputs.

    Args:
        tensors: grad_out, grad_kv, grad_k_sum, grad_conv, q, k, v, gate, inv_freq, conv_weight,
            conv_bias, lengths, cu_seqlens, kv, k_sum, conv, position; what follows is ignored.
        eps: as in the forward.
        grads: of the nine outputs of gated_rela_backward.
    """
    rows = tensors[4]
    assert rows is not None
    with torch.enable_grad(), full_precision(rows):
        # Any: an entry is None just where the operator's optional argument was.
        leaves: list[Any] = list(tensors[:17])
        for i in (*_GRADS, *_INPUTS):
            if leaves[i] is not None:
                leaves[i] = leaves[i].detach().requires_grad_()
        with_final = leaves[1] is not None
        state = None if leaves[13] is None else tuple(leaves[13:17])
        q, k, v, gate, inv_freq, weight, bias, lengths, cu_seqlens = leaves[4:13]
        result: Any = gated_rela(q, k, v, gate, inv_freq, weight, bias, lengths, cu_seqlens, state,
                                 with_final, True, eps)  # fmt: skip
        outputs = [result[0], *result[1][:3]] if with_final else [result]
        used = [i for i in _INPUTS if leaves[i] is not None]
        first = torch.autograd.grad(
            outputs,
            [leaves[i] for i in used],
            [leaves[i] for i in _GRADS[: len(outputs)]],
            create_graph=True,
            allow_unused=True,
        )
        pairs = [
            (gradient, grads[_INPUTS.index(i)])
            for gradient, i in zip(first, used, strict=True)
            if gradient is not None and grads[_INPUTS.index(i)] is not None
        ]
        wanted = [i for i in (*_GRADS, *_INPUTS) if leaves[i] is not None]
        second = torch.autograd.grad(
            [gradient for gradient, _ in pairs],
            [leaves[i] for i in wanted],
            [grad for _, grad in pairs],
            allow_unused=True,
        )
    found: list[Tensor | None] = [None] * 17
    for i, gradient in zip(wanted, second, strict=True):
        found[i] = gradient
    return found
