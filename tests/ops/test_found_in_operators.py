"""What a reader found in the operators: derivatives that were lost in silence, layouts refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.func
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from recgrela_ext import RecGRELA, RecGRELAConfig, ops
from recgrela_ext.model.losses import softmax_loss

Function = Callable[[Tensor], Tensor]
WEIGHT = torch.randn(16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ROTATION = ops.inv_freq(2, 8)


def rela(x: Tensor) -> Tensor:
    return ops.rela(x, x, x, ROTATION).square().sum()


def gated_rela(x: Tensor) -> Tensor:
    return ops.gated_rela(x, x, x, x, ROTATION, None, None).square().sum()


def feed_forward(x: Tensor) -> Tensor:
    rows, bias = x.reshape(-1, 16), WEIGHT[0]
    return ops.feed_forward(rows, WEIGHT, bias, WEIGHT, bias, None, 0.0, 0, 0).square().sum()


def activation_dropout(x: Tensor) -> Tensor:
    return ops.activation_dropout(x.reshape(-1, 16), None, True, 0.3, 5).square().sum()


ALL = [rela, gated_rela, feed_forward, activation_dropout]


@pytest.fixture
def x() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 5, 2, 8, dtype=torch.float64, generator=generator)


def compiled(function: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager")


def gradient_of(function: Function, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(function(leaf), leaf)
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", ALL)
def test_transforms_inside_of_compile(function: Function, x: Tensor) -> None:
    wanted = gradient_of(function, x)
    slope = (wanted * x).sum()  # along x
    torch.testing.assert_close(compiled(torch.func.grad(function))(x), wanted)
    along = compiled(lambda z: torch.func.jvp(function, (z,), (z,))[1])
    torch.testing.assert_close(along(x), slope)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", ALL)
def test_transforms_outside_of_compile(function: Function, x: Tensor) -> None:
    wanted = gradient_of(function, x)
    once = compiled(function)
    torch.testing.assert_close(gradient_of(once, x), wanted)  # a graph with the kernel is there
    torch.testing.assert_close(torch.func.grad(once)(x), wanted)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(once(forward_ad.make_dual(x, x))).tangent
    torch.testing.assert_close(tangent, (wanted * x).sum())
    torch.testing.assert_close(gradient_of(once, x), wanted)


# the loss has no second derivatives, and says so


@pytest.mark.parametrize("rows", [4, 300])
@pytest.mark.parametrize("method", ["auto", "chunked"])
def test_the_loss_refuses_second_derivatives(rows: int, method: str) -> None:
    torch.manual_seed(0)
    source, weight = torch.randn(rows, 16), torch.randn(16, 16, requires_grad=True)
    table, targets = torch.randn(30, 16, requires_grad=True), torch.arange(rows) % 29 + 1
    loss = softmax_loss((source @ weight).tanh(), table, targets, method=method)
    with pytest.raises(RuntimeError, match="softmax_loss: gradients must be taken without create"):
        torch.autograd.grad(loss, [weight, table], create_graph=True)
    once = softmax_loss((source @ weight).tanh(), table, targets, method=method)
    found = torch.autograd.grad(once, [weight, table])
    plain = F.cross_entropy((source @ weight).tanh() @ table[1:].t(), targets - 1)
    wanted = torch.autograd.grad(plain, [weight, table])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_a_model_refuses_second_derivatives_of_its_loss() -> None:
    model = RecGRELA(RecGRELAConfig(n_items=9, hidden_size=16, num_layers=1, num_heads=1))
    loss = model.loss(torch.tensor([[1, 2, 3]]), None, torch.tensor([[2, 3, 4]]))
    with pytest.raises(RuntimeError, match="softmax_loss"):
        loss.backward(create_graph=True)


@pytest.mark.kernels
def test_second_derivatives_under_autocast_are_not_rounded() -> None:
    def second(autocast: bool) -> Tensor:
        torch.manual_seed(0)
        rows = torch.randn(6, 16, requires_grad=True)
        weights = [torch.randn(16, 16, requires_grad=True) for _ in range(2)]
        with torch.autocast("cpu", enabled=autocast):
            out = ops.feed_forward(
                rows, weights[0], torch.zeros(16), weights[1], torch.zeros(16), None, 0.0, 0, 0
            )
            first = torch.autograd.grad(out.square().sum(), rows, create_graph=True)[0]
            return torch.autograd.grad(first.square().sum(), rows)[0]

    torch.testing.assert_close(second(True), second(False), rtol=1e-5, atol=1e-5)


# what is documented is taken


def test_items_in_any_layout() -> None:
    torch.manual_seed(0)
    hidden, table = torch.randn(3, 8), torch.randn(20, 8)
    few = torch.randint(1, 20, (5, 3)).t()
    whole = torch.randint(-127, 127, (20, 8), dtype=torch.int8)
    scale = torch.rand(40)[::2]
    calls: list[dict[str, Any]] = [
        {"table": table, "seen": few},
        {"table": table, "candidates": few},
        {"table": whole, "scale": scale},
    ]
    for call in calls:
        dense = {name: value.contiguous() for name, value in call.items()}
        for found, wanted in zip(
            ops.topk_scores(hidden, k=3, **call),
            ops.topk_scores(hidden, k=3, **dense),
            strict=True,
        ):
            assert torch.equal(found, wanted)


def test_a_step_takes_arguments_in_any_layout() -> None:
    torch.manual_seed(0)
    model = RecGRELA(RecGRELAConfig(n_items=9, hidden_size=16, num_layers=1, num_heads=1)).eval()
    packed = model.encoder.packed_weights()
    assert packed is not None
    vectors, positions = torch.randn(16, 3).t(), torch.arange(6)[::2]
    active = torch.tensor([True]).expand(3)
    found = []
    for dense in (False, True):
        state = torch.zeros(3, packed.state_size)
        given = (vectors, positions, active)
        x, position, chosen = (t.contiguous() if dense else t for t in given)
        with torch.no_grad():
            found.append((ops.encoder_step(x, packed, (state, position), chosen), state))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_vmap_over_lengths_and_over_histories() -> None:
    torch.manual_seed(0)
    rows = torch.randn(3, 2, 5, 2, 8)
    lengths = torch.tensor([[5, 2], [1, 0], [3, 3]])

    def one(q: Tensor, lengths: Tensor) -> Tensor:
        return ops.gated_rela(q, q, q, q, ROTATION, None, None, lengths=lengths)

    found = torch.func.vmap(one)(rows, lengths)
    wanted = torch.stack([one(*pair) for pair in zip(rows, lengths, strict=True)])
    torch.testing.assert_close(found, wanted)

    model = RecGRELA(RecGRELAConfig(n_items=9, hidden_size=16, num_layers=1, num_heads=1)).eval()
    histories = torch.tensor([[[1, 2, 3], [4, 0, 0]], [[5, 6, 0], [0, 0, 0]]])
    counts = (histories != 0).sum(-1)
    with torch.no_grad():
        wanted = torch.stack([model(part) for part in histories])
        torch.testing.assert_close(torch.func.vmap(lambda s: model(s))(histories), wanted)
        torch.testing.assert_close(torch.func.vmap(model)(histories, counts), wanted)


def test_values_are_checked_beside_a_transform() -> None:
    model = RecGRELA(RecGRELAConfig(n_items=9, hidden_size=16, num_layers=1, num_heads=1)).eval()
    weights = dict(model.named_parameters())

    def loss(weights: dict[str, Tensor]) -> Tensor:
        items = (torch.tensor([[1, 0, 2]]),)
        out: Tensor = torch.func.functional_call(model, weights, items)
        return out.sum()

    with pytest.raises(ValueError, match="padding on one side"):
        torch.func.grad(loss)(weights)


@pytest.mark.kernels
def test_candidates_that_are_fake() -> None:
    with FakeTensorMode():
        scores, items = ops.topk_scores(
            torch.randn(3, 8), torch.randn(20, 8), 4, candidates=torch.randint(1, 20, (3, 6))
        )
    assert scores.shape == items.shape == (3, 4)


def test_dropout_without_a_kernel_is_contiguous_too() -> None:
    x = torch.empty(4, 3, device="meta").t()
    assert ops.activation_dropout(x, None, True, 0.1, 1).is_contiguous()
    with forward_ad.dual_level():
        assert ops.activation_dropout(torch.randn(4, 3).t(), None, False, 0.1, 1).is_contiguous()
