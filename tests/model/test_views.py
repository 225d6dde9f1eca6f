"""One history, many ways to read it: all of them give the same hidden states."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from recgrela_ext.model import RecGRELA

LENGTHS = (17, 1, 0, 33, 6)
LIMIT = {torch.float64: 1e-12, torch.float32: 2e-5}
VARIANTS = {
    "default": {},
    "balance": {"selector": "balance"},
    "gelu gate": {"gate_activation": "gelu"},
    "no gate": {"gate": False},
    "no convolution": {"rank_augmentation": False},
    "balance, no convolution": {"selector": "balance", "rank_augmentation": False},
    "wide convolution": {"conv_width": 7},
    "one tap": {"conv_width": 1, "selector": "balance"},
    "learned positions": {"position": "learned", "max_seq_len": 20},
    "sinusoidal positions": {"position": "sinusoidal", "rotary": "none"},
    "per head": {"rotary": "per_head", "final_norm": True, "v_projection": True},
    "repeat bias": {"repeat_bias": True},
    "last row pads": {"padding_idx": 49},
}
MakeModel = Callable[..., RecGRELA]


def histories(padding_idx: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    low = 1 if padding_idx == 0 else 0
    return [torch.randint(low, 49, (n,), generator=generator) for n in LENGTHS]


def padded(rows: list[Tensor], side: str = "right", fill: int = 0, extra: int = 0) -> Tensor:
    width = max(len(row) for row in rows) + extra
    out = torch.full((len(rows), width), fill)
    for target, row in zip(out, rows, strict=True):
        if side == "right":
            target[: len(row)] = row
        else:
            target[width - len(row) :] = row
    return out


def assert_same(got: Tensor, want: Tensor) -> None:
    scale = want.abs().amax(-1, keepdim=True)
    limit = LIMIT[want.dtype]
    assert got.shape == want.shape
    assert bool(((got - want).abs() <= limit * scale).all()), ((got - want).abs() / scale).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_left_right_packed_chunked_and_step(
    make_model: MakeModel, variant: str, dtype: torch.dtype
) -> None:
    model = make_model(dtype, **VARIANTS[variant])
    pad = model.config.padding_idx
    rows, lengths = histories(pad), torch.tensor(LENGTHS)
    want = model.encode(padded(rows, fill=pad), lengths)
    alone = [model.encode(row[None])[0] for row in rows]
    for b, row in enumerate(alone):
        assert_same(want[b, : len(row)], row)
        assert not want[b, len(row) :].any()

    longer = model.encode(padded(rows, fill=pad, extra=5), lengths.int())
    assert_same(longer[:, : want.shape[1]], want)
    left = model.encode(padded(rows, "left", pad, 2), lengths, padding_side="left")
    for b, row in enumerate(alone):
        assert_same(left[b, left.shape[1] - len(row) :], row)
        assert not left[b, : left.shape[1] - len(row)].any()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    assert_same(model.encode_packed(torch.cat(rows), cu_seqlens.int()), torch.cat(alone))
    last = torch.stack([r[-1] if len(r) else r.new_zeros(16) for r in alone])
    assert_same(model(padded(rows, fill=pad)), last)

    for chunk in (1, 5, 512):
        state = model.prefill(padded(rows, fill=pad), lengths, chunk_size=chunk)
        assert_same(state.hidden, last)
        assert state.position.tolist() == list(LENGTHS)
        packed = model.prefill_packed(torch.cat(rows), cu_seqlens, chunk_size=chunk)
        assert_same(packed.hidden, last)
        assert torch.equal(packed.position, state.position)
        scale = state.buffer.abs().max()
        assert (packed.buffer - state.buffer).abs().max() <= LIMIT[dtype] * scale
    stepped = model.init_state(len(rows))
    full = padded(rows, fill=pad)
    for t in range(full.shape[1]):
        hidden = model.step(full[:, t], stepped)
        for b, row in enumerate(alone):
            if t < len(row):
                assert_same(hidden[b], row[t])
    assert_same(stepped.hidden, last)
    scale = state.buffer.abs().max()
    assert (stepped.buffer - state.buffer).abs().max() <= LIMIT[dtype] * scale
    assert torch.equal(stepped.position, state.position)


@torch.no_grad()
def test_every_split_of_prefill_and_step(make_model: MakeModel) -> None:
    model = make_model()
    row = histories()[0]
    whole = model.encode(row[None])[0]
    for split in range(len(row) + 1):
        state = model.prefill(row[None, :split])
        for t in range(split, len(row)):
            assert_same(model.step(row[t : t + 1], state)[0], whole[t])
        again = model.prefill(row[None, split:], state=model.prefill(row[None, :split]))
        assert_same(again.hidden[0], whole[-1])


@torch.no_grad()
def test_packed_prefill_continues_a_state_and_leaves_others_alone(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recgrela_ext.model.streaming._ROWS", 20)  # several groups of users
    model = make_model()
    rows = histories()
    first, second = [row[:4] for row in rows], [row[4:] for row in rows]
    state = None
    for part in (first, second):
        cu_seqlens = torch.tensor([0, *(len(row) for row in part)]).cumsum(0)
        before = None if state is None else state.clone()
        state = model.prefill_packed(torch.cat(part), cu_seqlens, chunk_size=7, state=state)
    assert before is not None
    assert_same(state.hidden, model(padded(rows)))
    assert torch.equal(state.buffer[1], before.buffer[1])  # nothing was left for user 1
    assert torch.equal(state.hidden[1], before.hidden[1])
    with pytest.raises(ValueError, match="state must hold 1 users, got 5"):
        model.prefill_packed(rows[0], torch.tensor([0, 17]), state=state)
    with pytest.raises(ValueError, match="prefill_packed: chunk_size must be an int >= 1, got 0"):
        model.prefill_packed(rows[0], torch.tensor([0, 17]), chunk_size=0)


@torch.no_grad()
def test_packed_prefill_does_no_work_on_padding(make_model: MakeModel) -> None:
    model = make_model()
    worked: list[int] = []
    model.input_norm.register_forward_hook(lambda module, args, out: worked.append(len(out)))
    rows = histories()
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
    model.prefill_packed(torch.cat(rows), cu_seqlens, chunk_size=8)
    assert sum(worked) == sum(LENGTHS)
    assert max(worked) <= 8 * len(rows)


@torch.no_grad()
def test_left_padded_prefill(make_model: MakeModel) -> None:
    model = make_model()
    rows = histories()
    right = model.prefill(padded(rows), chunk_size=8)
    left = model.prefill(padded(rows, "left"), chunk_size=8, padding_side="left")
    assert torch.equal(left.buffer, right.buffer)
    assert torch.equal(left.hidden, right.hidden)


@pytest.mark.parametrize("garbage", [7, 10**12, -3])
@torch.no_grad()
def test_ids_on_padding_are_never_read(make_model: MakeModel, garbage: int) -> None:
    for model in (
        make_model(),
        make_model(causal=False),
        make_model(causal=False, attend_padding=True),
    ):
        rows, lengths = histories(), torch.tensor(LENGTHS)
        clean, dirty = padded(rows), padded(rows, fill=garbage)
        assert torch.equal(model.encode(clean, lengths), model.encode(dirty, lengths))
        targets = torch.where(lengths > 0, 5, 0)
        assert torch.equal(model.loss(clean, lengths, targets), model.loss(dirty, lengths, targets))
        left = padded(rows, "left", garbage)
        assert torch.equal(
            model.encode(left, lengths, padding_side="left"),
            model.encode(padded(rows, "left"), lengths, padding_side="left"),
        )


@torch.no_grad()
def test_longer_than_trained(make_model: MakeModel) -> None:
    model = make_model(max_seq_len=5)
    row = histories()[3]
    assert_same(model.encode(row[None])[0, :17], model.encode(row[None, :17])[0])


def test_bidirectional_sees_later_items_and_has_no_state(make_model: MakeModel) -> None:
    model = make_model(causal=False)
    row = histories()[0][None]
    changed = row.clone()
    changed[0, -1] = row[0, -1] % 48 + 1
    assert not torch.allclose(model.encode(row)[0, 0], model.encode(changed)[0, 0])
    causal = make_model()
    assert torch.equal(causal.encode(row)[0, :-1], causal.encode(changed)[0, :-1])
    with pytest.raises(ValueError, match="user state must belong to a causal model"):
        model.init_state(1)


@torch.no_grad()
def test_nan_of_one_user_stays_with_that_user(make_model: MakeModel) -> None:
    model = make_model(torch.float32)
    item_seq = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [1, 9, 2, 3]])
    before, state_before = model.encode(item_seq), model.prefill(item_seq)
    model.item_embedding.weight[7] = float("nan")
    after, state_after = model.encode(item_seq), model.prefill(item_seq)
    assert after[1, 2:].isnan().all()
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert torch.equal(state_after.buffer[[0, 2]], state_before.buffer[[0, 2]])
    lists = model.recommend(item_seq, candidates=torch.arange(20, 30))
    assert torch.equal(
        lists.items[0], model.recommend(item_seq[:1], candidates=torch.arange(20, 30)).items[0]
    )


@torch.no_grad()
def test_long_prefill_checks_everything_before_it_changes_a_state(make_model: MakeModel) -> None:
    model = make_model()
    state = model.prefill(padded(histories()))
    before = state.clone()
    wrong = torch.randint(1, 49, (5, 40))
    for place, text in (((3, 35), "padding on one side"), ((4, 39), "must lie in 0..49")):
        bad = wrong.clone()
        bad[place] = 0 if "padding" in text else 50
        lengths = torch.full((5,), 40)
        with pytest.raises(ValueError, match=text):
            model.prefill(bad, lengths, chunk_size=8, state=state)
        assert torch.equal(state.buffer, before.buffer)
    gap = torch.tensor([[1, 0, 2, 3, 4, 5]])
    with pytest.raises(ValueError, match="padding on one side"):
        model.prefill(gap, chunk_size=2)
    with pytest.raises(ValueError, match=r"item_seq_len must lie in 0\.\.6, got 7"):
        model.prefill(gap, torch.tensor([7]), chunk_size=2)
    assert model.prefill(gap[:, :0]).position.tolist() == [0]
