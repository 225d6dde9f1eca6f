from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch

from recgrela_ext.errors import StateError
from recgrela_ext.model import RecGRELA, RecGRELAConfig, SeenItems, UserState, state

MakeModel = Callable[..., RecGRELA]
ITEMS = torch.tensor([[5, 6, 7, 5, 9, 11], [9, 8, 0, 0, 0, 0], [3, 3, 3, 4, 0, 0]])


def test_size_of_a_user() -> None:
    model = RecGRELA(RecGRELAConfig(n_items=9))
    assert model.init_state(1).nbytes == 20_480 + 264
    assert model.init_state(3).nbytes == 3 * (20_480 + 264)
    assert model.prefill(torch.ones(2, 700, dtype=torch.int64)).nbytes == 2 * (20_480 + 264)
    assert model.init_state(2).buffer[1].is_contiguous()
    assert len(model.init_state(1).to_bytes(0, "int8")) <= 6000


def test_slices_are_views(make_model: MakeModel) -> None:
    model = make_model()
    whole, want = model.prefill(ITEMS), model.prefill(ITEMS)
    model.step(torch.tensor([7, 8]), whole[1:3])
    model.step(torch.tensor([0, 7, 8]), want)
    assert torch.equal(whole.buffer, want.buffer)
    assert torch.equal(whole.hidden, want.hidden)
    assert torch.equal(whole.position, want.position)
    model.step(torch.tensor([4, 6]), whole[::2])
    model.step(torch.tensor([4, 0, 6]), want)
    assert torch.equal(whole.buffer, want.buffer)
    assert torch.equal(whole.position, want.position)
    assert len(whole[1:]) == 2
    assert whole[-1].position.tolist() == [6]
    with pytest.raises(IndexError, match="below 3 users, got 3"):
        whole[3]
    with pytest.raises(TypeError, match="int or slice, got list"):
        whole[[0]]  # type: ignore[index]


def test_padding_item_leaves_its_user_untouched(make_model: MakeModel) -> None:
    model = make_model(torch.bfloat16)
    users = model.prefill(ITEMS)
    before = users.clone()
    hidden = model.step(torch.tensor([4, 0, 4]), users)
    assert torch.equal(users.buffer[1], before.buffer[1])
    assert torch.equal(users.hidden[1], before.hidden[1])
    assert users.position.tolist() == [7, 2, 5]
    assert torch.equal(hidden[1].float(), before.hidden[1])
    assert not torch.equal(users.buffer[0], before.buffer[0])


def test_cat_clone_and_to(make_model: MakeModel) -> None:
    model = make_model()
    users = model.prefill(ITEMS)
    again = UserState.cat([users[2], users[:2]])
    assert torch.equal(again.buffer, users.buffer[[2, 0, 1]])
    assert again.position.tolist() == [4, 6, 2]
    assert users.to("cpu") is users
    with pytest.raises(ValueError, match="at least one state, got none"):
        UserState.cat([])
    with pytest.raises(ValueError, match="must belong to one model"):
        UserState.cat([users, make_model().init_state(1)])


def test_copies_step_like_the_original(make_model: MakeModel) -> None:
    model = make_model()
    users = model.prefill(ITEMS)
    others = [copy.deepcopy(users), pickle.loads(pickle.dumps(users))]
    want = model.step(torch.tensor([7, 8, 9]), users)
    for other in others:
        assert torch.equal(model.step(torch.tensor([7, 8, 9]), other), want)
        assert torch.equal(other.buffer, users.buffer)


@pytest.mark.parametrize(
    ("dtype", "limit", "size"),
    [
        (None, 0.0, 4),
        (torch.float32, 0.0, 4),
        ("bfloat16", 4e-3, 2),
        (torch.float16, 5e-4, 2),
        ("int8", 4.1e-3, 1),
    ],
)
def test_bytes_round_trip(
    make_model: MakeModel, dtype: torch.dtype | str | None, limit: float, size: int
) -> None:
    model = make_model(torch.float32)
    users = model.prefill(ITEMS)
    blob = users.to_bytes(2, dtype)
    back = UserState.from_bytes(blob, model)
    head_dim = model.config.head_dim
    want, got = (s.view(-1, head_dim) for s in (users.buffer[2], back.buffer[0]))
    assert ((got - want).abs() <= limit * want.abs().amax(1, keepdim=True)).all()
    if dtype == "int8":
        assert torch.equal(back.hidden[0], users.hidden[2].bfloat16().float())
    else:
        assert torch.equal(back.hidden[0], users.hidden[2])
    assert back.position.tolist() == [4]
    assert len(blob) < size * want.numel() * (1.25 if size == 1 else 1) + 4 * 16 + 60
    stepped = model.step(torch.tensor([7]), back)
    exact = model.step(torch.tensor([7]), users[2])
    assert (stepped - exact).abs().max() <= max(10 * limit, 1e-9) * exact.abs().max()


def test_float64_state_round_trip(make_model: MakeModel) -> None:
    model = make_model()
    users = model.prefill(ITEMS)
    back = UserState.from_bytes(users.to_bytes(0), model)
    assert torch.equal(back.buffer[0], users.buffer[0])
    assert torch.equal(back.hidden[0], users.hidden[0])


def test_values_float16_cannot_hold(make_model: MakeModel) -> None:
    model = make_model(torch.float32)
    users = model.init_state(1)
    users.layers[0][1].fill_(1e5)
    with pytest.raises(StateError, match="float16 ends at 65504: use bfloat16 or float32"):
        users.to_bytes(0, torch.float16)
    back = UserState.from_bytes(users.to_bytes(0, "int8"), model)
    assert torch.allclose(back.buffer, users.buffer, rtol=5e-4)
    with pytest.raises(ValueError, match="dtype must be one of float32"):
        users.to_bytes(0, "int4")


def test_bytes_of_another_model_or_damaged(make_model: MakeModel) -> None:
    model = make_model()
    blob = model.prefill(ITEMS).to_bytes(0)
    other = copy.deepcopy(model)
    UserState.from_bytes(blob, other)
    with torch.no_grad():
        other.encoder.layers[0].in_proj.bias[0] += 1
    for wrong in (other, make_model(eps=1e-5), make_model(num_layers=1)):
        with pytest.raises(StateError, match="must come from this model"):
            UserState.from_bytes(blob, wrong)
    for torn in (blob[:-1], blob[:100], blob[:3], b"", blob[:200] + b"?" + blob[201:], blob + b"!"):
        with pytest.raises(StateError, match=r"whole|one of ours"):
            UserState.from_bytes(torn, model)
    with pytest.raises(StateError, match="one of ours"):
        UserState.from_bytes(b"x" * 500, model)
    with pytest.raises(StateError, match="version 1, got 9"):
        UserState.from_bytes(blob[:4] + b"\x09" + blob[5:], model)
    with pytest.raises(TypeError, match="blob must be bytes, got str"):
        UserState.from_bytes("text", model)  # type: ignore[arg-type]


def test_state_of_another_model_or_batch(make_model: MakeModel) -> None:
    model = make_model()
    users = model.prefill(ITEMS)
    with pytest.raises(ValueError, match="state must hold 2 users, got 3"):
        model.step(torch.tensor([1, 2]), users)
    with pytest.raises(ValueError, match="state must have the sizes of this model"):
        make_model(num_layers=1).step(torch.tensor([1, 2, 3]), users)
    with pytest.raises(TypeError, match="state must be a UserState, got NoneType"):
        model.step(torch.tensor([1]), None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"items must be \[B\], got \[1, 1\]"):
        model.step(torch.tensor([[1]]), users)
    with pytest.raises(ValueError, match=r"items must lie in 0..49"):
        model.step(torch.tensor([1, 2, 50]), users)
    with pytest.raises(TypeError, match="items must be int64 or int32"):
        model.step(torch.tensor([1.0, 2, 3]), users)


def test_warns_once_beyond_the_accurate_range(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "MAX_EVENTS", 10)
    monkeypatch.setattr(state, "_warned", False)
    model = make_model()
    users = model.prefill(ITEMS)
    for _ in range(4):
        model.step(torch.tensor([1]), users[1])
        model.step(torch.tensor([1]), users[0])
    with pytest.warns(RuntimeWarning, match="a user has 11 events"):
        model.step(torch.tensor([1]), users[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.step(torch.tensor([1]), users[0])
        others = model.prefill(torch.ones(1, 30, dtype=torch.int64))  # of another state object
        model.step(torch.tensor([1]), others)


def test_prefill_memory_does_not_grow_with_length(make_model: MakeModel) -> None:
    model = make_model()
    longest = 0

    def watch(module: torch.nn.Module, args: tuple, out: torch.Tensor) -> None:
        nonlocal longest
        longest = max(longest, out.shape[1])

    model.input_norm.register_forward_hook(watch)
    model.prefill(torch.ones(1, 100, dtype=torch.int64), chunk_size=16)
    assert longest == 16
    with pytest.raises(ValueError, match="chunk_size must be an int >= 1, got 0"):
        model.prefill(ITEMS, chunk_size=0)


def test_seen_items() -> None:
    seen = SeenItems(2)
    seen.add([5, 0])
    seen.add(torch.tensor([3, 9]))
    seen.add(np.array([[5, 4], [0, 1]]))
    assert seen.ids(0).tolist() == [3, 4, 5]
    assert seen.ids(1).tolist() == [1, 9]
    assert seen.nbytes == 20
    assert seen.padded().tolist() == [[3, 5, 4], [9, 1, 0]]
    seen[1].add([7])
    assert SeenItems.cat([seen[1:], seen[:1]]).padded(-1).tolist() == [[9, 1, 7], [3, 5, 4]]
    back = SeenItems.from_bytes(seen.to_bytes(1))
    assert back.ids(0).tolist() == [1, 7, 9]
    assert back.ids(0).dtype == np.int32
    back.add([2])
    assert back.ids(0).tolist() == [1, 2, 7, 9]
    with pytest.raises(ValueError, match=r"items must be \[2\] or \[2, n\], got \[3\]"):
        seen.add([1, 2, 3])
    with pytest.raises(TypeError, match="items must be integers"):
        seen.add([1.5, 2.5])
    with pytest.raises(StateError, match="checksum"):
        SeenItems.from_bytes(seen.to_bytes(1)[:-1] + b"?")


def test_seen_items_stored_with_the_state(make_model: MakeModel) -> None:
    model = make_model()
    users, seen = model.prefill(ITEMS), SeenItems.from_sequences(ITEMS)
    blob = users.to_bytes(0, "int8", seen=seen)
    assert SeenItems.from_bytes(blob).ids(0).tolist() == [5, 6, 7, 9, 11]
    assert UserState.from_bytes(blob, model).position.tolist() == [6]
    with pytest.raises(StateError, match="stored with seen items, got a state alone"):
        SeenItems.from_bytes(users.to_bytes(0))
