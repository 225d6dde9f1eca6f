"""The whole model on the GPU: encoding, training, streaming, recommending."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recgrela_ext import RecGRELA, RecGRELAConfig, UserState, evaluate, fit
from recgrela_ext.data.synthetic import make_synthetic
from recgrela_ext.training.config import TrainConfig
from tests.gpu.device import DEVICE, DRY_RUN
from tests.tolerance import assert_same_bits, assert_same_history

pytestmark = pytest.mark.gpu


def make_model(hidden_size: int = 64, **options: float) -> RecGRELA:
    torch.manual_seed(0)
    return RecGRELA(RecGRELAConfig(n_items=500, hidden_size=hidden_size, **options))  # type: ignore


def histories(users: int = 6, length: int = 90) -> tuple[Tensor, Tensor]:
    """Right-padded, one of them empty."""
    torch.manual_seed(1)
    lengths = torch.randint(1, length + 1, (users,))
    lengths[0], lengths[1] = length, 0
    items = torch.randint(1, 500, (users, length))
    return torch.where(torch.arange(length) < lengths[:, None], items, 0), lengths


def assert_near(what: str, x: Tensor, y: Tensor, limit: float = 2e-4) -> None:
    """Two devices' GEMMs differ: an ordinary distance in float32 through four layers."""
    x, y = x.detach().cpu().double(), y.detach().cpu().double()
    assert (x - y).abs().max() <= limit * y.abs().max(), what


@pytest.mark.parametrize("hidden_size", [64, 128, 256])
def test_encodes_as_on_the_cpu(hidden_size: int) -> None:
    model, (items, lengths) = make_model(hidden_size).eval(), histories()
    with torch.no_grad():
        expected = model.encode(items, lengths)
        model = model.to(DEVICE)
        found = model.encode(items.to(DEVICE), lengths.to(DEVICE))
        starts = F.pad(lengths.cumsum(0), (1, 0))
        real = torch.arange(items.shape[1]) < lengths[:, None]
        packed = model.encode_packed(items[real].to(DEVICE), starts.to(DEVICE))
    assert_near("encode", found, expected)
    assert_near("encode_packed", packed, expected[real])


@pytest.mark.parametrize("repeat_bias", [False, True])
def test_loss_and_gradients_as_on_the_cpu(repeat_bias: bool) -> None:
    model = make_model(dropout=0.0, drop_path=0.0, repeat_bias=repeat_bias).train()
    items, lengths = histories()
    targets = torch.where(items > 0, items % 499 + 1, 0)
    results = []
    for device in (torch.device("cpu"), DEVICE):
        model = model.to(device)
        model.zero_grad()
        loss = model.loss(items.to(device), lengths.to(device), targets.to(device))
        loss.backward()
        grads = {n: p.grad.cpu().clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss, grads))
    (loss, grads), (found, found_grads) = results
    assert_near("loss", found, loss)
    assert found_grads.keys() == grads.keys()
    for name, x in found_grads.items():
        assert_near(name, x, grads[name], 2e-3)


def test_lists_with_a_repeat_bias_as_on_the_cpu() -> None:
    model, (items, _) = make_model(repeat_bias=True).eval(), histories()
    torch.nn.init.normal_(model.repeat_bias.weight, std=0.02)  # type: ignore[union-attr]
    items = torch.where(items > 0, items % 59 + 1, 0)  # some come again
    expected = model.recommend(items, k=20, exclude_seen=False)
    model = model.to(DEVICE)
    found = model.recommend(items.to(DEVICE), k=20, exclude_seen=False)
    assert_near("scores", found.scores, expected.scores)
    same = (found.items.cpu() == expected.items).double().mean()
    assert same > 0.95  # near ties may change places


def test_step_is_prefill_is_encode() -> None:
    model, (items, lengths) = make_model().eval().to(DEVICE), histories(length=70)
    items, lengths = items.to(DEVICE), lengths.to(DEVICE)
    with torch.no_grad():
        whole = model.forward(items, lengths)
        prefilled = model.prefill(items, lengths, chunk_size=32)
        state = model.init_state(len(items))
        for t in range(items.shape[1]):
            hidden = model.step(items[:, t], state)
    assert_same_history("prefill", prefilled.hidden, whole)
    assert_same_history("step", hidden, whole)
    assert state.position.tolist() == lengths.tolist()
    assert_same_history("state", state.buffer, prefilled.buffer)


def test_states_travel() -> None:
    """GPU to bytes, to the CPU and back."""
    model, (items, lengths) = make_model().eval(), histories()
    model = model.to(DEVICE)
    state = model.prefill(items.to(DEVICE), lengths.to(DEVICE))
    restored = UserState.from_bytes(state.to_bytes(0), model)
    assert restored.buffer.device.type == DEVICE.type
    assert_same_bits("buffer", restored.buffer[0], state.buffer[0])
    assert_same_bits("there and back", state.to("cpu").to(DEVICE).buffer, state.buffer)


@pytest.mark.parametrize("amp", [None, "bfloat16", "float16"])
def test_fit_then_recommend(amp: str | None, tmp_path: Path) -> None:
    log, _ = make_synthetic(200, 120, mean_length=20)
    train, valid, _ = log.leave_one_out()
    torch.manual_seed(0)
    model = RecGRELA.for_data(train, hidden_size=32, num_layers=2, num_heads=2).to(DEVICE)
    start = model.item_embedding.weight.detach().clone()
    amp = "bfloat16" if DRY_RUN and amp == "float16" else amp  # no float16 GEMMs on every CPU
    result = fit(model, train, valid, steps=12, config=TrainConfig(amp=amp, targets_per_step=500))
    assert result.steps == 12
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert not torch.equal(model.item_embedding.weight, start)
    assert 0 <= evaluate(model, valid)["mean"]["ndcg@10"] <= 1
    items, lengths = (x.to(DEVICE) for x in histories(4, 9))
    found = model.recommend(items % train.n_items, lengths, k=5)
    assert found.items.device.type == DEVICE.type
    assert found.items.shape == (4, 5)
    model.save_pretrained(tmp_path / "model")
    again = RecGRELA.from_pretrained(tmp_path / "model").to(DEVICE)
    assert_same_bits("weights", again.item_embedding.weight, model.item_embedding.weight)


def test_amp_training_step_is_near() -> None:
    """bfloat16 autocast: loss and gradients as near as eight bits of mantissa let them be."""
    model, (items, lengths) = make_model(dropout=0.0, drop_path=0.0).to(DEVICE), histories()
    items, lengths = items.to(DEVICE), lengths.to(DEVICE)
    targets = torch.where(items > 0, items % 499 + 1, 0)
    results = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled):
            loss = model.loss(items, lengths, targets)
        loss.backward()
        results.append((loss.detach(), model.item_embedding.weight.grad.clone()))  # type: ignore
    (loss, grad), (low_loss, low_grad) = results
    assert_near("loss", low_loss, loss, 0.01)
    assert F.cosine_similarity(low_grad.flatten(), grad.flatten(), dim=0) > 0.99


def test_compiled_training_step() -> None:
    model, (items, lengths) = make_model(dropout=0.0, drop_path=0.0).to(DEVICE), histories(8, 40)
    items, lengths = items.to(DEVICE), lengths.to(DEVICE)
    targets = torch.where(items > 0, items % 499 + 1, 0)
    torch._dynamo.reset()
    backend = "aot_eager" if DRY_RUN else "inductor"
    encode = torch.compile(model.encode, backend=backend)
    hidden = encode(items, lengths)
    expected = model.encode(items, lengths)
    assert_near("hidden", hidden, expected)
    wanted = targets.flatten() != 0
    losses = [
        F.cross_entropy(model.scores(h.flatten(0, 1)[wanted])[:, 1:], targets.flatten()[wanted] - 1)
        for h in (hidden, expected)
    ]
    grads = [torch.autograd.grad(x, list(model.parameters())) for x in losses]
    for name, x, y in zip(dict(model.named_parameters()), *grads, strict=True):
        assert_near(name, x, y, 2e-3)
