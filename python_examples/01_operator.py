"""One operator: the compiled kernel, its plain-PyTorch specification, gradients and a state.

python python_examples/01_operator.py
"""

from __future__ import annotations

import torch

from recgrela_ext import build_info, ops

torch.manual_seed(0)
B, L, H, D, W = 2, 50, 4, 16, 4
q, k, v, gate = (torch.randn(B, L, H, D, requires_grad=True) for _ in range(4))
conv_weight, conv_bias = torch.randn(H * D, W), torch.randn(H * D)
inv_freq = ops.inv_freq(H, D)
lengths = torch.tensor([50, 31])  # the second user has 31 items, right-padded
fixed = (inv_freq, conv_weight, conv_bias)

# The kernel, and the specification it is tested against.
out = ops.gated_rela(q, k, v, gate, *fixed, lengths=lengths)
same = ops.reference.gated_rela(q, k, v, gate, *fixed, lengths=lengths)
print(f"instruction set: {build_info()['cpu_level'] or 'none, plain PyTorch'}")
print(f"out {list(out.shape)}, largest difference to the reference {(out - same).abs().max():.1e}")

# Gradients are part of the operator, also gradients of gradients.
out.square().sum().backward()
print(
    f"gradient of q {list(q.grad.shape)}, exactly 0 on padding: {bool((q.grad[1, 31:] == 0).all())}"
)

# Causal: what comes later changes nothing, so a sequence can be continued from a state.
with torch.no_grad():
    head, state = ops.gated_rela(
        *(x[:, :30] for x in (q, k, v, gate)), *fixed, return_final_state=True
    )
    tail = ops.gated_rela(*(x[:, 30:] for x in (q, k, v, gate)), *fixed, initial_state=state)
    whole = ops.gated_rela(q, k, v, gate, *fixed)
print(f"30 + 20 items against 50: {(torch.cat([head, tail], 1) - whole).abs().max():.1e}")

# One item at a time, the state updated in place.
with torch.no_grad():
    step = ops.gated_rela_step(*(x[:, 30] for x in (q, k, v, gate)), *fixed, state)
print(f"item 31 by itself: {(step - whole[:, 30]).abs().max():.1e}")
