from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from recgrela_ext import _library
from recgrela_ext.layers import FeedForward, grela_block
from recgrela_ext.layers.dropout import dropout


@pytest.fixture(params=[pytest.param("kernels", marks=pytest.mark.kernels), "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(_library, "KERNEL_DEVICES", frozenset())
    return request.param


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_share_scale_and_gradient(p: float, dtype: torch.dtype, path: str) -> None:
    x = torch.full((1001, 101), 3.0, dtype=dtype, requires_grad=True)
    out = dropout(x, p, training=True)
    kept = out != 0
    spread = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(float(kept.double().mean()) - (1 - p)) < 5 * spread
    assert torch.allclose(out[kept].double(), torch.tensor(3 / (1 - p)).double(), rtol=1e-2)
    out.sum().backward()
    assert torch.equal(x.grad != 0, kept)
    pairs = (kept[:, 1:] & kept[:, :-1]).double().mean()
    assert abs(float(pairs) - (1 - p) ** 2) < 6 * spread


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_with_activation_and_residual(gelu: bool, with_residual: bool, path: str) -> None:
    x, residual = torch.randn(50, 40), torch.randn(50, 40) if with_residual else None
    act = F.gelu(x) if gelu else x
    plain = act if residual is None else residual + act
    for out in (
        dropout(x, 0.5, False, residual, gelu),
        dropout(x, 0.0, True, residual, gelu),
    ):
        assert torch.equal(out, plain)
    out = dropout(x, 0.5, True, residual, gelu)
    branch = out if residual is None else out - residual
    kept = branch.abs() > 1e-6
    assert 0.4 < float(kept.float().mean()) < 0.6
    assert torch.allclose(branch, 2 * act * kept, atol=2e-6)


def test_seeded_and_off_in_evaluation(path: str) -> None:
    x = torch.randn(7, 5)
    torch.manual_seed(1)
    first = dropout(x, 0.5, True)
    second = dropout(x, 0.5, True)
    torch.manual_seed(1)
    assert torch.equal(dropout(x, 0.5, True), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    assert dropout(x, 0.5, False) is x
    assert dropout(x, 0.0, True) is x
    assert torch.equal(torch.get_rng_state(), state)
    assert dropout(x[:0], 0.5, True).shape == (0, 5)
    assert dropout(x, 1 - 1e-7, True).isfinite().all()


def test_residual_of_another_dtype(path: str) -> None:
    """Under autocast the branch is bfloat16 and the stream float32."""
    x, residual = torch.randn(30, 20, dtype=torch.bfloat16), torch.randn(30, 20)
    out = dropout(x, 0.5, True, residual)
    assert out.dtype == torch.float32
    branch = out - residual
    kept = branch.abs() > 1e-6
    assert torch.allclose(branch, 2 * x.float() * kept, atol=2e-6)


def test_compiled_and_exported() -> None:
    x = torch.ones(200, 50)
    compiled = torch.compile(dropout, backend="aot_eager", fullgraph=True)
    first, second = compiled(x, 0.5, True), compiled(x, 0.5, True)
    assert 0.45 < float((first == 2).float().mean()) < 0.55
    assert not torch.equal(first, second)
    layer = FeedForward(50, 0.5).train()
    program = torch.export.export(layer, (x, x)).module()
    torch.manual_seed(3)
    first = program(x, x)
    assert not torch.equal(first, program(x, x))


def test_fake_tensors() -> None:
    with FakeTensorMode():
        assert dropout(torch.empty(4, 3), 0.5, True).shape == (4, 3)


def test_checkpointed() -> None:
    """The forward that is run again in the backward draws the same mask."""
    layer = FeedForward(16, 0.5).train()
    x = torch.randn(20, 16, requires_grad=True)

    def gradient(run: object) -> Tensor:
        torch.manual_seed(5)
        out = checkpoint(layer, x, x, use_reentrant=False) if run is checkpoint else layer(x, x)
        return torch.autograd.grad(out.square().sum(), x)[0]

    assert torch.equal(gradient(checkpoint), gradient(layer))


@pytest.mark.parametrize("activation", ["gelu", "silu", "relu"])
def test_feed_forward(activation: str) -> None:
    """In evaluation exactly the formula; without dropout the same while training."""
    layer = FeedForward(16, 0.0, activation)
    x, residual = torch.randn(9, 16), torch.randn(9, 16)
    wanted = layer.fc2(getattr(F, activation)(layer.fc1(x)))
    for training in (False, True):
        layer.train(training)
        assert torch.equal(layer(x), wanted)
        assert torch.equal(layer(x, residual), residual + wanted)
    dropped = FeedForward(16, 0.5, activation).eval()
    dropped.load_state_dict(layer.state_dict())
    assert torch.equal(dropped(x, residual), residual + wanted)


def _enough_rows() -> int:
    return 64 * torch.get_num_threads() + 22  # a tile for every thread


@pytest.mark.kernels
@pytest.mark.parametrize("with_residual", [False, True])
def test_fused_feed_forward_is_the_layers_one_by_one(with_residual: bool) -> None:
    """A hook makes the layers run one by one: the same masks, the same values and gradients."""
    layer = FeedForward(32, dropout=0.3).double()
    x = torch.randn(_enough_rows(), 32, dtype=torch.float64, requires_grad=True)
    residual = torch.randn_like(x) if with_residual else None
    leaves = [x, *layer.parameters()]
    seen = []

    def run() -> list[Tensor]:
        torch.manual_seed(3)
        out = layer(x, residual)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    fused = run()
    handle = layer.fc1.register_forward_hook(lambda *_: seen.append(1))
    one_by_one = run()
    handle.remove()
    assert seen == [1]
    for a, b in zip(fused, one_by_one, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.kernels
def test_where_the_fused_feed_forward_stands_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaced or half-precision layers, autocast and other activations keep their own code."""
    calls: list[int] = []
    whole = grela_block.feed_forward
    monkeypatch.setattr(
        grela_block,
        "feed_forward",
        lambda *a: calls.append(1) or whole(*a),  # type: ignore[func-returns-value]
    )
    x = torch.randn(_enough_rows(), 32)
    FeedForward(32)(x)
    assert calls == [1]

    class Doubled(nn.Linear):
        def forward(self, rows: Tensor) -> Tensor:
            return 2 * super().forward(rows)

    replaced = FeedForward(32, dropout=0.0)
    plain = replaced(x)
    replaced.fc2 = Doubled(128, 32)
    assert not torch.equal(replaced(x), plain)
    FeedForward(32).bfloat16()(x.bfloat16())
    FeedForward(32, activation="relu")(x)
    FeedForward(20)(x[:, :20])
    FeedForward(32)(x[:5])  # packing the weights would cost more than the products
    with torch.autocast("cpu", torch.bfloat16):
        assert FeedForward(32)(x).dtype == torch.bfloat16
    assert len(calls) == 2  # one of them `replaced` before it was
