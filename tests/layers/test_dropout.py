from __future__ import annotations

import pytest
import torch

from recgrela_ext.layers.dropout import dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_share_scale_and_gradient(p: float, dtype: torch.dtype) -> None:
    x = torch.full((1001, 101), 3.0, dtype=dtype, requires_grad=True)
    out = dropout(x, p, training=True)
    kept = out != 0
    spread = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(float(kept.double().mean()) - (1 - p)) < 5 * spread
    assert torch.allclose(out[kept].double(), torch.tensor(3 / (1 - p)).double(), rtol=1e-2)
    out.sum().backward()
    assert torch.equal(x.grad != 0, kept)
    # neighbours share a random word, and still are independent
    pairs = (kept[:, 1:] & kept[:, :-1]).double().mean()
    assert abs(float(pairs) - (1 - p) ** 2) < 6 * spread


def test_seeded_and_off_in_evaluation() -> None:
    x = torch.randn(7, 5)
    torch.manual_seed(1)
    first = dropout(x, 0.5, True)
    second = dropout(x, 0.5, True)
    torch.manual_seed(1)
    assert torch.equal(dropout(x, 0.5, True), first)
    assert not torch.equal(first, second)
    assert dropout(x, 0.5, False) is x
    assert dropout(x, 0.0, True) is x
    assert dropout(x[:0], 0.5, True).shape == (0, 5)
    assert dropout(x, 1 - 1e-7, True).isfinite().all()


def test_compiled() -> None:
    x = torch.ones(200, 50)
    out = torch.compile(dropout, backend="aot_eager", fullgraph=True)(x, 0.5, True)
    assert 0.45 < float((out == 2).float().mean()) < 0.55
