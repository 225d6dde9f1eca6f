"""Run in a fresh environment: the installed wheel loads beside its torch and computes.

Prints one JSON line of facts on success.
"""

from __future__ import annotations

import json

import torch

import recgrela_ext
from recgrela_ext import ops
from recgrela_ext.ops import reference


def main() -> None:
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN: an unwritten output shows
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    shape = (3, 70, 2, 8)
    q, k, v, gate = (torch.randn(shape, requires_grad=True) for _ in range(4))
    weight, bias = torch.randn(16, 4), torch.randn(16)
    inv_freq = ops.inv_freq(2, 8)
    lengths = torch.tensor([70, 5, 0])
    arguments = (q, k, v, gate, inv_freq, weight, bias, lengths)
    out = ops.gated_rela(*arguments)
    expected = reference.gated_rela(*arguments)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    grad_out = torch.randn(shape)
    for got, wanted in zip(
        torch.autograd.grad(out, (q, k, v, gate), grad_out),
        torch.autograd.grad(expected, (q, k, v, gate), grad_out),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
    if not hasattr(torch.ops.recgrela, "gated_rela"):
        raise SystemExit("the compiled library was not loaded")
    facts = {"torch": torch.__version__, "file": recgrela_ext.__file__}
    print(json.dumps({**facts, **recgrela_ext.build_info()}))


if __name__ == "__main__":
    main()
