"""Second derivatives of gated_rela: the reference, differentiated twice by autograd.

Plain PyTorch on every device: who needs second derivatives needs them right, seldom, and in float64
(gradient penalties, gradgradcheck); a kernel would be the third statement of the same formula.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
    with torch.enable_grad():
        leaves: list[Tensor | None] = list(tensors[:17])
        for i in (*_GRADS, *_INPUTS):
            x = leaves[i]
            if x is not None:
                leaves[i] = x.detach().requires_grad_()
        grad_final, q, k, v, gate, inv_freq, weight, bias, lengths, cu_seqlens = (
            leaves[1:4], *leaves[4:13]
        )  # fmt: skip
        with_final = grad_final[0] is not None
        state = None if leaves[13] is None else tuple(leaves[13:17])
        result = gated_rela(
            q, k, v, gate, inv_freq, weight, bias, lengths, cu_seqlens, state, with_final, True, eps
        )  # type: ignore[arg-type]
        outputs = [result[0], *result[1][:3]] if with_final else [result]
        used = [i for i in _INPUTS if leaves[i] is not None]
        first = torch.autograd.grad(
            outputs,
            [leaves[i] for i in used],  # type: ignore[misc]
            [leaves[i] for i in _GRADS[: len(outputs)]],  # type: ignore[misc]
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
            [leaves[i] for i in wanted],  # type: ignore[misc]
            [grad for _, grad in pairs],  # type: ignore[misc]
            allow_unused=True,
        )
    found: list[Tensor | None] = [None] * 17
    for i, gradient in zip(wanted, second, strict=True):
        found[i] = gradient
    return found
