"""The peers of `python -m benchmarks memory` are what they claim: causal, equal in size, and their
steps give what their full passes give."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks import peers
from benchmarks.peer_models import PEERS, LinearRecurrence, PeerConfig, SASRec
from recgrela_ext import RecGRELA, RecGRELAConfig
from tests.tolerance import assert_same_history

N_ITEMS = 50


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=list(PEERS))
def peer(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    try:
        model = PEERS[request.param](PeerConfig(N_ITEMS, max_seq_len=64))
    except peers.Missing as missing:
        pytest.skip(f"mambapy: {missing}")
    for parameter in model.parameters():  # weights large enough for an error to be seen
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def items(length: int, batch: int = 3) -> torch.Tensor:
    return torch.randint(1, N_ITEMS, (batch, length), generator=torch.Generator().manual_seed(1))


def test_steps_equal_the_full_pass(peer) -> None:
    history = items(23)
    whole = peer.encode(history)
    state = peer.start(3, 23)
    for t in range(23):
        assert_same_history(f"step {t}", peer.step(history[:, t], state), whole[:, t])
    assert state.position == 23


def test_reading_and_then_steps_equal_the_full_pass(peer, monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.peer_models.CHUNK", 5)
    history = items(20)
    whole = peer.encode(history)
    state = peer.start(3, 20)
    assert_same_history("read", peer.read(history[:, :17], state)[:, -1], whole[:, 16])
    for t in range(17, 20):
        assert_same_history(f"step {t}", peer.step(history[:, t], state), whole[:, t])


def test_last_and_forward_are_rows_of_encode(peer) -> None:
    history = items(20)
    whole = peer.encode(history)
    assert_same_history("last", peer(history), whole[:, -1])
    lengths = torch.tensor([20, 7, 1])
    rows = whole[torch.arange(3), lengths - 1]
    assert_same_history("forward", peer(history, lengths), rows)


def test_later_items_change_nothing_before(peer) -> None:
    history = items(20)
    other = history.clone()
    other[:, 12:] = 1
    before, after = peer.encode(history), peer.encode(other)
    assert_same_history("prefix", before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_loss_is_the_mean_over_positions_with_a_target(peer) -> None:
    history, targets = items(12), items(12).flip(1)
    targets[:, 3:9] = 0
    logits = peer.encode(history) @ peer.item_embedding.weight.t()
    expected = torch.nn.functional.cross_entropy(
        logits[..., 1:].flatten(0, 1), targets.flatten() - 1, ignore_index=-1
    )
    torch.testing.assert_close(peer.loss(history, torch.full((3,), 12), targets), expected)


def test_parameters_are_equal_to_two_per_cent(peer) -> None:
    ours = RecGRELA(RecGRELAConfig(n_items=N_ITEMS))
    wanted = sum(p.numel() for p in ours.parameters()) - ours.item_embedding.weight.numel()
    assert abs(peer.body_parameters() / wanted - 1) < 0.02


def test_the_cache_of_sasrec_is_a_key_and_a_value_per_item() -> None:
    state = SASRec(PeerConfig(N_ITEMS, max_seq_len=30)).start(2, 30)
    assert state.nbytes == 2 * 30 * 4 * 2 * 64 * 4


def test_the_recurrence_is_the_one_written_down() -> None:
    torch.manual_seed(0)
    block = LinearRecurrence(4, 0.0)
    x = torch.randn(1, 6, 64)
    eigen, weight = block.ready()
    h = torch.zeros(4, dtype=torch.complex64)
    for t in range(6):
        pairs = (weight @ block.norm(x[0, t])).view(4, 2)
        h = eigen * h + torch.complex(pairs[:, 0], pairs[:, 1])
        y = block.out(torch.stack((h.real, h.imag), 1).flatten())
        torch.testing.assert_close(block(x)[0][0, t], x[0, t] + y)
    assert (eigen.abs() < 1).all()
