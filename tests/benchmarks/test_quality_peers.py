"""The models that only the quality tables have, against what is written down about them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import selective_scan
from benchmarks.peer_models import HEADS, WIDTH, PeerConfig
from benchmarks.quality_peers import LinearAttentionBlock, LinRec, Mamba4Rec, SelectiveBlock
from recgrela_ext import RecGRELA, RecGRELAConfig
from tests.tolerance import assert_same_history

N_ITEMS = 50


@pytest.fixture(params=[LinRec, Mamba4Rec])
def peer(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    model = request.param(PeerConfig(N_ITEMS, max_seq_len=64))
    for parameter in model.parameters():  # weights large enough for an error to be seen
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def items(length: int, batch: int = 3) -> torch.Tensor:
    return torch.randint(1, N_ITEMS, (batch, length), generator=torch.Generator().manual_seed(1))


def test_later_items_change_nothing_before(peer) -> None:
    history = items(20)
    other = history.clone()
    other[:, 12:] = 1
    with torch.no_grad():
        before, after = peer.encode(history), peer.encode(other)
    assert_same_history("prefix", before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_forward_is_a_row_of_encode(peer) -> None:
    history, lengths = items(20), torch.tensor([20, 7, 1])
    with torch.no_grad():
        rows = peer.encode(history)[torch.arange(3), lengths - 1]
        assert_same_history("forward", peer(history, lengths), rows)


def test_every_weight_is_trained(peer) -> None:
    history = items(20)
    peer.loss(history, torch.full((3,), 20), history.flip(1)).backward()
    for name, parameter in peer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("model", [LinRec, Mamba4Rec])
def test_parameters_are_near_ours(model) -> None:
    ours = RecGRELA(RecGRELAConfig(n_items=N_ITEMS))
    wanted = sum(p.numel() for p in ours.parameters()) - ours.item_embedding.weight.numel()
    assert abs(model(PeerConfig(N_ITEMS)).body_parameters() / wanted - 1) < 0.1


def test_linear_attention_equals_its_running_sums() -> None:
    torch.manual_seed(0)
    block = LinearAttentionBlock(8, 0.0).double()
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    heads = block.qkv(block.norm(x)).view(2, 9, 3, HEADS, -1)
    state = torch.zeros(2, HEADS, WIDTH // HEADS, WIDTH // HEADS, dtype=torch.float64)
    for t in range(9):
        q, k, v = heads[:, t].unbind(1)
        q, k = (F.elu(part) / F.elu(part).norm(dim=-1, keepdim=True) for part in (q, k))
        state = state + k[..., :, None] * v[..., None, :]
        y = (q[..., None] * state).sum(-2) / (WIDTH // HEADS) ** 0.5
        expected = block.pointwise(x[:, t] + block.out(y.flatten(1)))
        torch.testing.assert_close(block(x)[:, t], expected)


def scan_inputs(length: int, state: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    u, b, c = (torch.randn(2, length, size, dtype=dtype) for size in (3, state, state))
    step, a = torch.rand(2, length, 3, dtype=dtype), -5 * torch.rand(3, state, dtype=dtype)
    return [x.requires_grad_() for x in (u, step, a, b, c)]


def test_scan_gradients() -> None:
    inputs = scan_inputs(6, 4, torch.float64)
    assert torch.autograd.gradcheck(selective_scan.selective_scan, inputs)


@pytest.mark.parametrize(("length", "state"), [(1, 32), (57, 32), (20, 5)])
def test_the_compiled_scan_is_the_loop(length: int, state: int) -> None:
    """Also of views, which are what a block gives it."""
    if selective_scan.compiled(state) is None:
        pytest.skip("no C++ compiler is on the path")
    u, step, a, b, c = scan_inputs(length, state, torch.float32)
    grad = torch.randn(2, 3, length).transpose(1, 2)
    both = torch.cat([b, c], -1).detach()
    b, c = (part.requires_grad_() for part in both.split(state, -1))
    u = u.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert not any(x.is_contiguous() for x in (u, b, c) if length > 1)
    found = {}
    for scan, dtype in ((selective_scan.selective_scan, torch.float32),
                        (selective_scan.LoopScan.apply, torch.float64)):  # fmt: skip
        inputs = [u, step, a, b, c]
        y = scan(*(x.to(dtype) for x in inputs))
        found[dtype] = [y, *torch.autograd.grad(y, inputs, grad.to(dtype))]
    for ours, wanted in zip(*found.values(), strict=True):
        # the loop is float64: sums that cancel are right to the scale of the whole
        assert (ours - wanted).abs().max() <= 2e-6 * wanted.abs().max()


@pytest.mark.parametrize("changed", range(1, 5))
def test_other_shapes_are_refused(changed: int) -> None:
    """The compiled loop trusts them."""
    inputs = scan_inputs(6, 4, torch.float32)
    inputs[changed] = inputs[changed][..., :1]
    with pytest.raises(ValueError, match=r"must get u, step \[B, L, I\]"):
        selective_scan.selective_scan(*inputs)


def test_without_a_compiler_the_scan_is_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the compiled one is what is asked where there is one."""
    inputs = scan_inputs(9, 4, torch.float32)
    asked = []

    class Library:
        def selective_scan(self, *arguments: object) -> None:
            asked.append(arguments)

    monkeypatch.setattr(selective_scan, "compiled", lambda state: Library())
    selective_scan.selective_scan(*inputs)
    assert len(asked) == 1
    selective_scan.selective_scan(*(x.double() for x in inputs))
    assert len(asked) == 1
    monkeypatch.setattr(selective_scan, "compiled", lambda state: None)
    y = selective_scan.selective_scan(*inputs)
    torch.testing.assert_close(y, selective_scan.LoopScan.apply(*inputs))


def test_compiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """-ffast-math is not for the link, which may change the rounding of the process."""
    fake = tmp_path / "fake"
    fake.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/calls\nexit $FAKE_CODE\n")
    fake.chmod(0o755)
    monkeypatch.setattr(selective_scan, "BUILT", tmp_path / "built")
    monkeypatch.setenv("CXX", f"{fake} --fast")
    monkeypatch.setenv("FAKE_CODE", "1")
    compile_ = selective_scan.compiled.__wrapped__
    with pytest.raises(SystemExit, match=r"fake --fast -O3 .* failed"):
        compile_(4)
    monkeypatch.setenv("FAKE_CODE", "0")
    with pytest.raises(OSError, match="whole"):
        compile_(4)
    link = (tmp_path / "calls").read_text().splitlines()[-1]
    assert "-shared" in link
    assert "fast-math" not in link
    assert not list((tmp_path / "built").iterdir())
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compile_(4) is None


def test_selective_block_is_the_recurrence_written_down() -> None:
    torch.manual_seed(0)
    block = SelectiveBlock(state=5).double()
    x = torch.randn(1, 7, WIDTH, dtype=torch.float64)
    u, gate = block.into(x[0]).chunk(2, -1)
    padded = F.pad(u, (0, 0, 3, 0))
    taps = block.conv.weight[:, 0]  # [inner, 4]
    h = torch.zeros(u.shape[1], 5, dtype=torch.float64)
    found = block(x)[0]
    for t in range(7):
        now = F.silu((padded[t : t + 4] * taps.t()).sum(0) + block.conv.bias)
        low, b, c = block.select(now).split(block.sizes, -1)
        step = F.softplus(block.step(low))
        decay = torch.exp(-step[:, None] * torch.exp(block.log_decay))
        h = decay * h + (step * now)[:, None] * b
        y = (h @ c + block.skip * now) * F.silu(gate[t])
        torch.testing.assert_close(found[t], block.out(y))
