"""Loss, gradients, ablations, compilation and precision of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recgrela_ext.model import RecGRELA, RecGRELAConfig

MakeModel = Callable[..., RecGRELA]

ITEM_SEQ = torch.tensor([[5, 6, 7, 5, 11], [9, 8, 0, 0, 0], [3, 0, 0, 0, 0], [1, 2, 3, 4, 0]])
LENGTHS = torch.tensor([5, 2, 1, 4])
TARGETS = torch.tensor([[6, 7, 5, 11, 2], [8, 1, 0, 0, 0], [0, 0, 0, 0, 0], [2, 0, 4, 9, 0]])


def dense_loss(model: RecGRELA) -> Tensor:
    logits = model.scores(model.encode(ITEM_SEQ, LENGTHS))
    wanted = model.config.padding_idx != TARGETS
    return F.cross_entropy(logits[wanted], TARGETS[wanted])


def gradients(model: RecGRELA, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("changes", [{}, {"position": "learned", "selector": "balance"}])
def test_loss_and_gradients_equal_the_dense_ones(
    make_model: MakeModel, changes: dict[str, Any]
) -> None:
    model = make_model(**changes)
    want, got = dense_loss(model), model.loss(ITEM_SEQ, LENGTHS, TARGETS)
    torch.testing.assert_close(got, want)
    want_grad, got_grad = gradients(model, want), gradients(model, got)
    assert got_grad.keys() == want_grad.keys() == dict(model.named_parameters()).keys()
    for name, grad in want_grad.items():
        torch.testing.assert_close(got_grad[name], grad, rtol=1e-9, atol=1e-12)
    assert not got_grad["item_embedding.weight"][0].any()
    wrapped = model(ITEM_SEQ, LENGTHS, TARGETS)
    assert torch.equal(wrapped, got)


def test_left_padded_loss(make_model: MakeModel) -> None:
    model = make_model()
    left = torch.stack([row.roll(5 - n) for row, n in zip(ITEM_SEQ, LENGTHS.tolist(), strict=True)])
    to = torch.stack([row.roll(5 - n) for row, n in zip(TARGETS, LENGTHS.tolist(), strict=True)])
    got = model.loss(left, LENGTHS, to, padding_side="left")
    assert torch.equal(got, model.loss(ITEM_SEQ, LENGTHS, TARGETS))


def test_last_position_targets(make_model: MakeModel) -> None:
    model = make_model()
    last = torch.tensor([2, 1, 4, 9])
    want = F.cross_entropy(model.scores(model(ITEM_SEQ, LENGTHS)), last)
    torch.testing.assert_close(model.loss(ITEM_SEQ, LENGTHS, last), want)
    assert model.loss(ITEM_SEQ, LENGTHS, torch.zeros_like(TARGETS)) == 0


def test_padding_row_stays_zero_while_training(make_model: MakeModel) -> None:
    for padding_idx in (0, 49):
        model = make_model(torch.float32, padding_idx=padding_idx).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        items = torch.tensor([[5, 6, 7, 5], [9, 8, padding_idx, padding_idx]])
        targets = torch.tensor([[6, 7, 5, 11], [8, 1, padding_idx, padding_idx]])
        for _ in range(3):
            optimizer.zero_grad()
            model.loss(items, None, targets).backward()
            optimizer.step()
        assert not model.item_embedding.weight[padding_idx].any()
        assert model.scores(torch.randn(2, 16))[:, padding_idx].tolist() == [-float("inf")] * 2


@pytest.mark.parametrize(
    ("items", "lengths", "targets", "text"),
    [
        ([[1, 2]], [3], None, r"item_seq_len must lie in 0..2, got 3"),
        ([[1, 2]], [-1], None, r"item_seq_len must lie in 0..2, got -1"),
        ([[1, 50]], [2], None, r"item_seq must lie in 0..49 .n_items=50 .* num_items=49.* got 50"),
        ([[1, -2]], [2], None, r"item_seq must lie in 0..49 .* got -2"),
        ([[1, 0, 2]], None, None, r"got padding_idx=0 among the items of row 0"),
        ([[1, 0, 0]], [2], None, r"got padding_idx=0 among the items of row 0"),
        ([1, 2], None, None, r"item_seq must be \[B, L\], got \[2\]"),
        ([[1, 2]], [2, 2], None, r"item_seq_len must be \[1\], got \[2\]"),
        ([[1, 2]], [2], [[1, 2, 3]], r"targets must be \[1, 2\] or \[1\], got \[1, 3\]"),
        ([[1, 2]], [2], [[1, 99]], r"targets must lie in 0..49"),
        ([[1, 0]], [1], [[1, 9]], r"targets must be padding_idx=0 but at real items"),
    ],
)
def test_bad_batches(
    make_model: MakeModel, items: list, lengths: list | None, targets: list | None, text: str
) -> None:
    model = make_model()
    given = None if lengths is None else torch.tensor(lengths)
    with pytest.raises(ValueError, match=text):
        model(torch.tensor(items), given, None if targets is None else torch.tensor(targets))


def test_bad_types(make_model: MakeModel) -> None:
    model = make_model()
    with pytest.raises(TypeError, match=r"item_seq must be int64 or int32, got torch.float32"):
        model(torch.ones(1, 2))
    with pytest.raises(TypeError, match="targets must be int64"):
        model.loss(ITEM_SEQ, LENGTHS, TARGETS.float())
    with pytest.raises(ValueError, match="padding_side must be right or left, got 'top'"):
        model(ITEM_SEQ, LENGTHS, padding_side="top")
    with pytest.raises(ValueError, match=r"cu_seqlens must run from 0 to T=3, got 0 to 2"):
        model.encode_packed(torch.tensor([1, 2, 3]), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="cu_seqlens must not descend"):
        model.encode_packed(torch.tensor([1, 2, 3]), torch.tensor([0, 2, 1, 3]))
    with pytest.raises(ValueError, match="item_ids must be real items, got padding_idx=0"):
        model.encode_packed(torch.tensor([1, 0, 3]), torch.tensor([0, 3]))
    with pytest.raises(TypeError, match="config must be a RecGRELAConfig, got dict"):
        RecGRELA({"n_items": 5})  # type: ignore[arg-type]


def published_size(**changes: Any) -> int:
    model = RecGRELA(RecGRELAConfig(n_items=3417, **changes))
    return sum(p.numel() for p in model.parameters())


WIDTH, LAYERS = 64, 4
LINEAR = WIDTH * WIDTH + WIDTH


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"gate": False}, -LAYERS * LINEAR),
        ({"rank_augmentation": False}, -LAYERS * WIDTH * 5),
        ({"v_projection": True}, LAYERS * LINEAR),
        ({"position": "learned"}, 200 * WIDTH),
        ({"position": "sinusoidal"}, 0),
        ({"rotary": "none"}, 0),
        ({"rotary": "per_head"}, 0),
        ({"selector": "balance"}, 0),
        ({"gate_activation": "relu", "mlp_activation": "relu"}, 0),
        ({"mlp_activation": "silu"}, 0),
        ({"conv_width": 2}, -LAYERS * WIDTH * 2),
        ({"final_norm": True}, 2 * WIDTH),
        ({"causal": False}, 0),
        ({"num_layers": 3}, -54_464),
    ],
)
def test_ablations(changes: dict[str, Any], difference: int, make_model: MakeModel) -> None:
    assert published_size() == 436_672  # as the published log says
    assert published_size(**changes) == 436_672 + difference

    plain, changed = make_model(), make_model(**changes)
    if difference == 0:
        changed.load_state_dict(plain.state_dict())
        assert not torch.allclose(changed(ITEM_SEQ, LENGTHS), plain(ITEM_SEQ, LENGTHS))
    changed.train()
    optimizer = torch.optim.SGD(changed.parameters(), lr=0.01)
    targets = torch.tensor([2, 1, 4, 9])
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        torch.manual_seed(0)
        loss = changed.loss(ITEM_SEQ, LENGTHS, targets)
        loss.backward()
        assert all(p.grad is not None for p in changed.parameters())  # nothing is left unused
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_dropout_and_drop_path_act_while_training_alone(make_model: MakeModel) -> None:
    for changes in ({"drop_path": 0.0}, {"dropout": 0.0, "drop_path": 0.5}):
        model = make_model(**changes)
        want = model(ITEM_SEQ, LENGTHS)
        model.train()
        assert not torch.allclose(model(ITEM_SEQ, LENGTHS), want)
        model.eval()
        assert torch.equal(model(ITEM_SEQ, LENGTHS), want)
    model = make_model(dropout=0.0, drop_path=0.0)
    want = model(ITEM_SEQ, LENGTHS)
    assert torch.equal(model.train()(ITEM_SEQ, LENGTHS), want)


def test_initial_weights() -> None:
    model = RecGRELA(RecGRELAConfig(n_items=2000))
    for name, parameter in model.state_dict().items():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert bool((parameter == 1).all()), name
        elif "conv" in name:
            assert 0.4 < float(parameter.abs().max()) <= 0.5
        else:
            assert float(parameter.std()) == pytest.approx(0.02, rel=0.05), name
    assert not model.item_embedding.weight[0].any()


def test_autocast_bfloat16(make_model: MakeModel) -> None:
    model = make_model(torch.float32, dropout=0.0, drop_path=0.0).train()
    want = model.loss(ITEM_SEQ, LENGTHS, TARGETS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model.loss(ITEM_SEQ, LENGTHS, TARGETS)
        state = model.prefill(ITEM_SEQ, LENGTHS)
        hidden = model.step(torch.tensor([1, 2, 3, 0]), state)
    assert got.dtype == torch.float32
    assert state.buffer.dtype == torch.float32
    assert got.item() == pytest.approx(want.item(), rel=0.03)
    got.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    exact = model.eval().prefill(ITEM_SEQ, LENGTHS)
    wanted = model.step(torch.tensor([1, 2, 3, 0]), exact)
    assert (hidden.float() - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_bfloat16_model(make_model: MakeModel) -> None:
    model = make_model(torch.float32)
    want = model(ITEM_SEQ, LENGTHS)
    got = model.bfloat16()(ITEM_SEQ, LENGTHS)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).abs().max() < 0.05 * want.abs().max()
    assert model.recommend(ITEM_SEQ, LENGTHS).scores.dtype == torch.float32
    assert model.loss(ITEM_SEQ, LENGTHS, TARGETS).isfinite()


def test_compiled_in_one_graph(make_model: MakeModel) -> None:
    model = make_model(torch.float32)
    want = model.encode(ITEM_SEQ, LENGTHS)
    compiled = torch.compile(model.encode, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ITEM_SEQ, LENGTHS), want)
    left = torch.compile(model.encode, fullgraph=True, backend="aot_eager")
    rolled = torch.stack([row.roll(5 - n) for row, n in zip(ITEM_SEQ, [5, 2, 1, 4], strict=True)])
    torch.testing.assert_close(left(rolled, LENGTHS, "left"), model.encode(rolled, LENGTHS, "left"))


def test_for_data_takes_the_facts_of_the_data() -> None:
    class Train:
        n_items = 12
        repeat_share = 0.25
        id_map = object()

    def make(**overrides: bool) -> RecGRELA:
        return RecGRELA.for_data(Train(), hidden_size=8, num_heads=2, **overrides)  # type: ignore[arg-type]

    model = make()
    assert model.config.n_items == 12
    assert model.config.repeat_share == 0.25
    assert model.config.hidden_size == 8
    assert model.id_map is Train.id_map
    assert model.config.repeat_bias
    assert not make(repeat_bias=False).config.repeat_bias
    assert not make(causal=False).config.repeat_bias


def test_distributed_data_parallel(make_model: MakeModel) -> None:
    model = make_model(dropout=0.0, drop_path=0.0).train()
    want = gradients(model, model.loss(ITEM_SEQ, LENGTHS, TARGETS))
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # an unused parameter would raise in the second step
            model.zero_grad()
            wrapped(ITEM_SEQ, LENGTHS, TARGETS).backward()
    finally:
        torch.distributed.destroy_process_group()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name])
