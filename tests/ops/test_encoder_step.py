"""encoder_step against its reference and against the layers it stands for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import prune

from recgrela_ext import GRELAEncoder, ops
from recgrela_ext.layers import packing, watch
from recgrela_ext.ops.encoder_step import reference_encoder_step
from tests.ops.bad_inputs import raw

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}

OPTIONS = {
    "default": {},
    "odd widths": {"hidden_size": 40},
    "less than a vector over": {"hidden_size": 20, "num_heads": 2},
    "more than a panel": {"hidden_size": 72},
    "wide": {"hidden_size": 128, "num_heads": 2, "num_layers": 1},
    "final norm": {"final_norm": True},
    "without gate": {"gate": False},
    "without rank augmentation": {"rank_augmentation": False},
    "convolution of width 1": {"conv_width": 1},
    "per-head rotary": {"rotary": "per_head"},
}


def make_encoder(dtype: torch.dtype, **options: object) -> GRELAEncoder:
    encoder = GRELAEncoder(**{"num_layers": 2, **options}).to(dtype).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return encoder


def make_state(packed: ops.PackedEncoder, users: int) -> tuple[Tensor, Tensor]:
    rows = torch.zeros(users, packed.state_size, dtype=packed.weights.dtype)
    return rows, torch.zeros(users, dtype=torch.int64)


def relative(x: Tensor, y: Tensor) -> float:
    return float((x - y).abs().max() / y.abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@torch.no_grad()
def test_agrees_with_the_layers_and_the_reference(options: dict, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    encoder = make_encoder(dtype, **options)
    packed = packing.pack(encoder)
    users = 19  # more than one block of users
    x = torch.randn(users, 9, encoder.hidden_size, dtype=dtype)
    expected = encoder(x)
    state, other = make_state(packed, users), make_state(packed, users)
    for t in range(x.shape[1]):
        out = ops.encoder_step(x[:, t], packed, state)
        assert relative(out, expected[:, t]) < TOLERANCE[dtype]
        assert relative(out, reference_encoder_step(x[:, t], packed, other)) < TOLERANCE[dtype]
        state[1].add_(1)
        other[1].add_(1)
    assert relative(state[0], other[0]) < TOLERANCE[dtype]


@pytest.mark.kernels
@pytest.mark.parametrize("hidden_size", [20, 64, 72])
@torch.no_grad()
def test_a_users_bits_do_not_depend_on_who_shares_the_pass(hidden_size: int) -> None:
    torch.manual_seed(0)
    packed = packing.pack(make_encoder(torch.float32, hidden_size=hidden_size, num_heads=2))
    assert packed is not None
    x = torch.randn(35, hidden_size)
    rows, position = make_state(packed, 35)
    rows.normal_().abs_()
    before = rows.clone()
    together = ops.encoder_step(x, packed, (rows, position))
    for size in (1, 2, 3, 5, 16, 17):
        for start in range(0, 35, size):
            part = slice(start, start + size)
            alone = before[part].clone()
            out = ops.encoder_step(x[part], packed, (alone, position[part]))
            assert torch.equal(out, together[part])
            assert torch.equal(alone, rows[part])


@torch.no_grad()
def test_inactive_users_stay_untouched() -> None:
    packed = packing.pack(make_encoder(torch.float32))
    rows, position = make_state(packed, 5)
    rows.normal_().abs_()
    before, version = rows.clone(), rows._version
    active = torch.tensor([True, False, True, False, False])
    out = ops.encoder_step(torch.randn(5, 64), packed, (rows, position), active)
    assert torch.equal(rows[~active], before[~active])
    assert not torch.equal(rows[active], before[active])
    assert torch.equal(out[~active], torch.zeros(3, 64))
    assert rows._version > version


@torch.no_grad()
def test_rows_of_a_larger_pool() -> None:
    """A view with a batch stride is updated in place, and nothing beside it."""
    packed = packing.pack(make_encoder(torch.float32))
    pool = torch.zeros(3, packed.state_size + 10)
    position = torch.zeros(3, dtype=torch.int64)
    x = torch.randn(3, 64)
    out = ops.encoder_step(x, packed, (pool[:, : packed.state_size], position))
    plain = make_state(packed, 3)
    assert torch.equal(out, ops.encoder_step(x, packed, plain))
    assert torch.equal(pool[:, : packed.state_size], plain[0])
    assert torch.equal(pool[:, packed.state_size :], torch.zeros(3, 10))


@torch.no_grad()
def test_one_users_nan_stays_there() -> None:
    packed = packing.pack(make_encoder(torch.float32))
    x = torch.randn(6, 64)
    clean, dirty = make_state(packed, 6), make_state(packed, 6)
    expected = ops.encoder_step(x, packed, clean)
    x[2] = torch.nan
    out = ops.encoder_step(x, packed, dirty)
    others = torch.arange(6) != 2
    assert torch.equal(out[others], expected[others])
    assert torch.equal(dirty[0][others], clean[0][others])


@pytest.mark.kernels
def test_opcheck() -> None:
    packed = packing.pack(make_encoder(torch.float32))
    rows, position = make_state(packed, 2)
    torch.library.opcheck(
        torch.ops.recgrela.encoder_step.default,
        (torch.randn(2, 64), packed.weights, packed.inv_freq, rows, position, None,
         packed.num_layers, packed.mlp_width, packed.conv_width, packed.gate, packed.final_norm,
         packed.eps, packed.layer_norm_eps),
    )  # fmt: skip


def test_weights_are_packed_again_after_a_change() -> None:
    encoder = make_encoder(torch.float32)
    first = encoder.packed_weights()
    assert first is not None
    assert encoder.packed_weights() is first
    with torch.no_grad():
        encoder.layers[1].mlp.fc2.bias.add_(1.0)
    second = encoder.packed_weights()
    assert second is not None
    assert not torch.equal(first.weights, second.weights)
    encoder.layers[0].in_proj.weight = torch.nn.Parameter(torch.zeros(64, 64))
    third = encoder.packed_weights()
    assert third is not None
    assert not torch.equal(third.weights, second.weights)


def test_a_replaced_weight_is_noticed_where_its_memory_comes_back() -> None:
    encoder = make_encoder(torch.float32)
    weight = encoder.layers[0].in_proj.weight
    for _ in range(50):  # the allocator need not give the same memory each time
        encoder.packed_weights()
        weight.data = weight.data + 1
        weight.data = weight.data + 1
        packed, fresh = encoder.packed_weights(), packing.pack(encoder)
        assert packed is not None
        assert fresh is not None
        assert torch.equal(packed.weights, fresh.weights)


def test_a_module_replaced_while_another_thread_asks_is_watched() -> None:
    def replace(encoder: torch.nn.Module) -> None:
        if not replaced:
            replaced.append(True)
            encoder[0] = torch.nn.Linear(2, 2)

    class Slow(torch.nn.Linear):
        """Has its neighbour replaced at the moment its parameters are listed."""

        def __getattribute__(self, name: str) -> object:
            if name == "_parameters" and armed:
                replace(model)
            return super().__getattribute__(name)

    armed: list[bool] = []
    replaced: list[bool] = []
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), Slow(2, 2))
    total = watch.Derived(lambda m: float(m[0].bias.detach().sum()))
    armed.append(True)
    total.get(model)
    armed.clear()
    with torch.no_grad():
        model[0].bias.fill_(3)
    assert replaced
    assert total.get(model) == 6


def changed_encoder(change: str) -> GRELAEncoder:
    """An encoder of which a part was changed, after its packed weights were asked for unless that
    is a function put in the place of `forward`."""
    encoder = make_encoder(torch.float32)
    assert encoder.packed_weights() is not None
    layer = encoder.layers[0]
    if change == "layer":
        encoder.layers[0] = make_encoder(torch.float32).layers[0]
    elif change == "adapter":
        layer.out_proj = Adapter(layer.out_proj)
    elif change == "hook":
        layer.mlp.fc1.register_forward_hook(lambda module, x, out: 2 * out)
    elif change == "forward":
        encoder = make_encoder(torch.float32)
        fc1 = encoder.layers[0].mlp.fc1
        fc1.forward = lambda x: 2 * F.linear(x, fc1.weight, fc1.bias)
    elif change == "second hook":
        encoder.register_forward_hook(lambda module, x, out: None)
        assert encoder.packed_weights() is not None
        layer.mlp.fc1.register_forward_hook(lambda module, x, out: 2 * out)
    else:
        prune.l1_unstructured(layer.in_proj, "weight", 0.5)
    return encoder


class Adapter(torch.nn.Module):
    """What adapters look like: the weight of the layer they wrap, and more."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x


@pytest.mark.parametrize("change", ["layer", "adapter", "hook", "second hook", "forward", "prune"])
@torch.no_grad()
def test_changed_modules_are_noticed(change: str) -> None:
    encoder = changed_encoder(change)
    packed = encoder.packed_weights()
    assert (packed is not None) == (change == "layer")
    if packed is not None:
        x, state = torch.randn(2, 64), make_state(packed, 2)
        expected = encoder(x[:, None])[:, 0]
        assert relative(ops.encoder_step(x, packed, state), expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    "options",
    [{"selector": "balance"}, {"gate_activation": "relu"}, {"v_projection": True},
     {"mlp_activation": "silu"}, {"residual": False}, {"causal": False}],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_no_packed_weights_for_other_configurations(options: dict) -> None:
    assert make_encoder(torch.float32, **options).packed_weights() is None


@pytest.mark.kernels
def test_sizes_that_overflow() -> None:
    """2^62 layers need 0 elements modulo 2^64."""
    with pytest.raises(ValueError, match="num_layers must be at most 1024"):
        raw(
            torch.ops.recgrela.encoder_step,
            torch.randn(1, 4), torch.zeros(0), torch.ones(1, 2, dtype=torch.float64),
            torch.zeros(1, 0), torch.zeros(1, dtype=torch.int64), None,
            2**62, 4, 0, False, False, 1e-6, 1e-6)  # fmt: skip


def test_bad_inputs() -> None:
    packed = packing.pack(make_encoder(torch.float32))
    rows, position = make_state(packed, 2)
    x = torch.randn(2, 64)
    cases = [
        ((x[:, :63], (rows, position)), r"item_vectors must have shape \[2, 64\], got \[2, 63\]"),
        ((x.double(), (rows, position)), "item_vectors must have dtype torch.float32"),
        ((x, (rows[:, 1:], position)), "state must have shape"),
        ((x, (rows, position[:1])), "position must have shape"),
        ((x, (rows, position.int())), "position must have dtype torch.int64"),
    ]
    for (vectors, state), message in cases:
        with pytest.raises(ValueError, match=message):
            ops.encoder_step(vectors, packed, state)
    with pytest.raises(RuntimeError, match="must not require a gradient"):
        ops.encoder_step(x.requires_grad_(), packed, (rows, position))
