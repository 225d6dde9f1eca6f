from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from recgrela_ext.errors import StateError
from recgrela_ext.model import ItemTable, RecGRELA, SeenItems, UserState, UserStateStore
from recgrela_ext.model.recency import Recency
from recgrela_ext.model.store import Evicted, _rounds

MakeModel = Callable[..., RecGRELA]


@pytest.fixture
def model(make_model: MakeModel) -> RecGRELA:
    return make_model(torch.float32)


def equal(a: UserState, b: UserState) -> bool:
    return (
        torch.equal(a.buffer, b.buffer)
        and torch.equal(a.position, b.position)
        and torch.equal(a.hidden, b.hidden)
    )


def fed(model: RecGRELA, count: int) -> UserState:
    """States of users with different histories."""
    return model.prefill(torch.randint(1, 50, (count, 9)))


def test_put_and_lookup_by_user(model: RecGRELA) -> None:
    store = UserStateStore(model, 10)
    state, seen = fed(model, 3), SeenItems.from_lists([[1, 2], [], [7]])
    store.put([70, -5, 2**40], state, seen)
    got = store.lookup(torch.tensor([2**40, 9, 70]))
    assert got.known.tolist() == [True, False, True]
    rows = [state.buffer[2], torch.zeros_like(state.buffer[0]), state.buffer[0]]
    assert torch.equal(got.state.buffer, torch.stack(rows))
    assert got.state.position.tolist() == [9, 0, 9]
    assert [got.seen.ids(i).tolist() for i in range(3)] == [[7], [], [1, 2]]
    got.state.buffer.zero_()
    got.seen.add([4, 4, 4])
    assert torch.equal(store.lookup([70]).state.buffer[0], state.buffer[0])
    assert store.lookup([70]).seen.ids(0).tolist() == [1, 2]
    assert (len(store), -5 in store, 9 in store) == (3, True, False)
    store.put([70], state[1:2])
    assert store.lookup([70]).seen.ids(0).tolist() == [1, 2]  # none given: kept


def test_events_equal_a_state_of_ones_own(model: RecGRELA) -> None:
    """Steps through the store, users repeated and new, are steps on states kept apart."""
    store = UserStateStore(model, 40, active=5)
    users = np.random.default_rng(0).integers(0, 12, 60)
    items = torch.randint(1, 50, (60,))
    own = {user: model.init_state(1) for user in range(12)}
    hidden = torch.cat([store.step(users[a : a + 15], items[a : a + 15]) for a in (0, 15, 30, 45)])
    want = torch.cat([model.step(items[i : i + 1], own[user]) for i, user in enumerate(users)])
    torch.testing.assert_close(hidden, want)
    found = store.lookup(np.arange(12))
    torch.testing.assert_close(found.state.buffer, torch.cat([own[u].buffer for u in range(12)]))
    for user in range(12):
        assert found.seen.ids(user).tolist() == sorted(set(items[users == user].tolist()))
    assert store.step([], torch.empty(0, dtype=torch.int64)).shape == (0, 16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_events_while_users_fall_out(model: RecGRELA, dtype: str) -> None:
    """Against states of their own that are dropped with the user: nobody of a call makes room for
    another, whatever the order of the events, and the user met last stays longest."""
    own: dict[int, UserState] = {}

    def drop(evicted: Evicted) -> None:
        for i, user in enumerate(evicted.users.tolist()):
            kept = own.pop(user)
            assert evicted.state.position[i] == kept.position[0]
            torch.testing.assert_close(evicted.state[i].buffer, kept.buffer, **close)

    close = {} if dtype == "float32" else {"rtol": 0.05, "atol": 0.05}
    sizes = {"capacity": 4} if dtype == "float32" else {"capacity": 5, "active": 4}
    store = UserStateStore(model, dtype=dtype, on_evict=drop, **sizes)  # type: ignore[arg-type]
    rng, padded, fell = np.random.default_rng(0), 0, 0
    for _ in range(60):
        some = rng.choice(12, size=4, replace=False)
        users = rng.choice(some, size=rng.integers(1, 9))
        items = torch.from_numpy(rng.integers(1, 50, len(users)) * (rng.random(len(users)) > 0.25))
        before = set(own)
        for user in users.tolist():
            own.setdefault(user, model.init_state(1))
        want = torch.cat(
            [model.step(items[i : i + 1], own[u]) for i, u in enumerate(users.tolist())]
        )
        for user in set(users.tolist()):  # padding makes room for nobody
            if user not in before and not items[users == user].any():
                padded += 1
                del own[user]
        count = len(own)
        torch.testing.assert_close(store.step(users, items), want, **close)
        fell += count - len(own)
        assert set(store.users.tolist()) == set(own)
    assert padded > 2
    assert fell > 20
    last = store.evict(oldest=len(store)).users.tolist()[-1]
    assert last == users[items.numpy() != 0][-1]


def test_more_users_than_there_is_room(model: RecGRELA) -> None:
    users, items = [1, 1, 2, 3, 1, 3, 2], torch.tensor([3, 4, 5, 6, 7, 8, 9])
    whole, parts = UserStateStore(model, 2), UserStateStore(model, 2)
    hidden = whole.step(users, items)
    cuts = [(0, 3), (3, 6), (6, 7)]  # two users each
    torch.testing.assert_close(
        hidden, torch.cat([parts.step(users[a:b], items[a:b]) for a, b in cuts])
    )
    assert whole.evict(oldest=2).users.tolist() == parts.evict(oldest=2).users.tolist() == [3, 2]


def everything(store: UserStateStore) -> list[object]:
    state, seen, known = store.lookup(np.arange(9))
    return [state.buffer.tolist(), state.position.tolist(), known.tolist(),
            [seen.ids(i).tolist() for i in range(9)], len(store)]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_an_eviction_that_fails_changes_nothing(model: RecGRELA, dtype: str) -> None:
    def refuse(evicted: Evicted) -> None:
        raise RuntimeError(f"cannot take {evicted.users.tolist()}")

    store = UserStateStore(model, 2, dtype, active=2, on_evict=refuse)
    users = [1] if dtype == "float32" else [1, 2]
    store.step(users, torch.tensor([3, 4][: len(users)]))
    before = everything(store)
    with pytest.raises(RuntimeError, match="cannot take"):  # the first two would have room
        store.put([7, 1, 8, 6, 5], fed(model, 5), SeenItems.from_lists([[9]] * 5))
    assert everything(store) == before
    if dtype == "float32":
        with pytest.raises(RuntimeError, match="cannot take"):
            store.step([7, 8, 7], torch.tensor([5, 6, 7]))
        assert everything(store) == before


def test_who_is_put_keeps_what_was_seen(model: RecGRELA) -> None:
    """Also where more are put than are kept as in use: the first of them would have made room."""
    gone: list[int] = []
    store = UserStateStore(model, 2, "int8", active=1, on_evict=lambda x: gone.extend(x.users))
    for user in (1, 2, 3):
        store.step([user], torch.tensor([10 * user]))
    store.put([4, 1], fed(model, 2))
    assert gone == [2]
    assert store.lookup([1]).seen.ids(0).tolist() == [10]


def test_users_who_leave_at_once_are_told_of(model: RecGRELA) -> None:
    gone: list[Evicted] = []
    store = UserStateStore(model, 1, on_evict=gone.append)
    store.step([9], torch.tensor([3]))
    state = fed(model, 3)
    store.put([5, 6, 7], state, SeenItems.from_lists([[1], [2], [4]]))
    (one,) = gone
    assert one.users.tolist() == [9, 5, 6]
    assert torch.equal(one.state.buffer[1:], state.buffer[:2])
    assert [one.seen.ids(i).tolist() for i in range(3)] == [[3], [1], [2]]
    assert store.users.tolist() == [7]


def test_rebuilding_a_user_twice_is_refused(model: RecGRELA) -> None:
    store = UserStateStore(model, 10, "int8", active=2)
    with pytest.raises(ValueError, match=r"rebuild: users must be distinct, got 1 twice"):
        store.rebuild([1, 2, 1], [[1], [2], [3]])
    assert not len(store)


def test_rounds_number_the_events_of_each_user() -> None:
    assert _rounds(np.array([5, 3, 5, 5, 3, 9])).tolist() == [0, 0, 1, 2, 1, 0]
    assert _rounds(np.array([], dtype=np.int64)).tolist() == []


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_least_recently_used_falls_out(model: RecGRELA, dtype: str) -> None:
    """Against an OrderedDict, over random puts, lookups and evictions."""
    gone: list[Evicted] = []
    store = UserStateStore(model, 8, dtype, active=3, on_evict=gone.append)
    hot: OrderedDict[int, None] = OrderedDict()
    cold: OrderedDict[int, None] = OrderedDict()
    rng = np.random.default_rng(1)
    two = dtype == "int8"
    for _ in range(300):
        users = rng.choice(20, size=rng.integers(1, 15), replace=False)
        kind = rng.choice(["put", "put", "lookup", "evict"])
        if kind == "lookup":
            known = store.lookup(users).known.tolist()
            assert known == [u in hot or u in cold for u in users.tolist()]
            for kept in (hot, cold):
                for user in users.tolist():
                    if user in kept:
                        kept.move_to_end(user)
        elif kind == "evict":
            out = store.evict(users[:2])
            assert out.users.tolist() == [u for u in users[:2].tolist() if u in hot or u in cold]
            for user in users[:2].tolist():
                hot.pop(user, None)
                cold.pop(user, None)
        else:
            gone.clear()
            store.put(users, fed(model, len(users)))
            fallen = lru_put(hot, cold, users.tolist(), (3, 8) if two else (8, 0))
            assert [u for one in gone for u in one.users.tolist()] == fallen
        assert set(store.users.tolist()) == {*hot, *cold}
        assert len(store) == len(hot) + len(cold)


def lru_put(hot: OrderedDict, cold: OrderedDict, users: list, sizes: tuple) -> list:
    """The same rule with lists; returns who falls out. Nobody of `users` makes room for another
    while they have room at all; of too many the first ones leave."""
    split = max(0, len(users) - sizes[0])
    early, late = users[:split], users[split:]
    others = [u for u in hot if u not in users]
    count = max(0, len(others) + len(late) - sizes[0])
    moved = others[:count] + early
    resting = [u for u in cold if u not in users] + moved
    excess = max(0, len(resting) - sizes[1])
    for kept, now in ((hot, others[count:] + late), (cold, resting[excess:])):
        kept.clear()
        kept.update(dict.fromkeys(now))
    return resting[:excess]


def test_recency_is_exact_beyond_its_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recgrela_ext.model.recency._QUEUE", 4)
    recency, order = Recency(50), OrderedDict.fromkeys(range(30))
    recency.touch(np.arange(30))
    rng = np.random.default_rng(0)
    for _ in range(200):
        slots = rng.choice(50, size=5, replace=False)
        recency.touch(slots)
        for slot in slots.tolist():
            order[slot] = None
            order.move_to_end(slot)
        count = int(rng.integers(0, 9))
        oldest = recency.oldest(count)
        assert oldest.tolist() == list(order)[:count]
        recency.forget(oldest[:2])
        for slot in oldest[:2].tolist():
            order.pop(slot)
    assert recency.oldest(100).tolist() == recency.order().tolist() == list(order)


@pytest.mark.parametrize(
    ("dtype", "limit"), [("float32", 0.0), ("bfloat16", 4e-3), ("float16", 5e-4), ("int8", 4.1e-3)]
)
def test_formats_at_rest(model: RecGRELA, dtype: str, limit: float) -> None:
    store = UserStateStore(model, 4, dtype, active=1)
    state = fed(model, 3)
    store.put([1, 2, 3], state)
    back = store.lookup([1, 2, 3]).state
    want, got = (s.buffer.view(3, -1, model.config.head_dim) for s in (state, back))
    assert ((got - want).abs() <= limit * want.abs().amax(-1, keepdim=True)).all()
    assert torch.equal(back.buffer[2], state.buffer[2])  # used last: not converted
    if dtype == "float32":
        assert equal(back, state)
    else:
        assert not torch.equal(back.buffer[0], state.buffer[0])
    before = store.lookup([1]).state
    assert equal(store.lookup([1]).state, before)  # reading converts nothing again


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "int8"])
def test_a_float64_model_rests_in_any_format(make_model: MakeModel, dtype: str) -> None:
    model = make_model().double()
    store = UserStateStore(model, 4, dtype, active=1)
    for user in (1, 2, 1, 2):
        store.step([user], torch.tensor([3]))
    for users in ([1], [1, 2], [1, 9]):
        assert store.lookup(users).state.buffer.dtype == torch.float64


def test_an_event_costs_no_conversion(model: RecGRELA) -> None:
    """Users in use stay exact over any number of events; those at rest are converted on return."""
    store, items = UserStateStore(model, 4, "int8", active=2), torch.randint(1, 50, (50, 2))
    own = model.init_state(2)
    for pair in items:
        store.step([1, 2], pair)
        model.step(pair, own)
    assert equal(store.lookup([1, 2]).state, own)


def test_weights_that_changed_are_noticed_without_being_asked_for(model: RecGRELA) -> None:
    """Before anything asks for the fingerprint again."""
    store, state = UserStateStore(model, 3), model.prefill(torch.tensor([[1, 2, 3]]))
    table = ItemTable(model)
    store.put([1], state)
    with torch.no_grad():
        model.input_norm.bias.add_(0.5)
    event = torch.tensor([4])
    for call in (
        lambda: store.step([1], event),
        lambda: store.put([1], state),
        lambda: store.rebuild([1], [[1, 2]]),
        lambda: model.step(event, state),
        lambda: model.recommend_from_state(state),
        lambda: model.recommend(event[None], table=table),
    ):
        with pytest.raises(ValueError, match=r"other weights|weights this store was made for"):
            call()


def test_a_padding_item_makes_room_for_nobody(model: RecGRELA) -> None:
    store = UserStateStore(model, 2)
    store.step([1, 2], torch.tensor([3, 4]))
    before = store.lookup([2]).state.hidden
    hidden = store.step([99, 2, 1], torch.tensor([0, 0, 5]))
    assert sorted(store.users.tolist()) == [1, 2]
    assert torch.equal(hidden[0], torch.zeros_like(hidden[0]))
    assert torch.equal(hidden[1], before[0])
    assert store.lookup([1, 2]).state.position.tolist() == [2, 1]
    assert store.lookup([1]).seen.ids(0).tolist() == [3, 5]
    assert torch.equal(store.step([2], torch.tensor([0]))[0], before[0])
    store.step([99], torch.tensor([0]))  # alone: nobody else of the call keeps the others
    assert sorted(store.users.tolist()) == [1, 2]


def test_a_callback_must_not_change_the_store(model: RecGRELA) -> None:
    store = UserStateStore(model, 1, on_evict=lambda gone: store.evict(oldest=1))
    store.step([1], torch.tensor([3]))
    with pytest.raises(RuntimeError, match="must not be called by on_evict"):
        store.step([2], torch.tensor([3]))
    assert store.users.tolist() == [1]
    assert store.lookup([1]).known.all()


def test_bytes_are_counted_and_fixed(make_model: MakeModel) -> None:
    model = RecGRELA(make_model().config.replace(hidden_size=64, num_heads=4, num_layers=4))
    store = UserStateStore(model.eval(), 100, "int8", active=1)
    assert store.user_nbytes == 5120 + 640 + 8 + 128 <= 6000
    before = store.nbytes
    assert before == 100 * store.user_nbytes + 20_480 + 264
    store.step(np.arange(150), torch.randint(1, 50, (150,)))
    assert (store.nbytes, len(store)) == (before, 101)
    assert store.seen_nbytes == 101 * 4


def test_nothing_changes_when_the_callback_or_a_conversion_fails(model: RecGRELA) -> None:
    def refuse(evicted: Evicted) -> None:
        raise OSError("disk full")

    store = UserStateStore(model, 2, "float16", active=1, on_evict=refuse)
    state = fed(model, 4)
    store.put([1, 2, 3], state[:3])
    users = sorted(store.users.tolist())
    before = store.lookup(users).state
    with pytest.raises(OSError, match="disk full"):
        store.put([4], state[3:])
    assert sorted(store.users.tolist()) == users
    assert equal(store.lookup(users).state, before)

    store = UserStateStore(model, 2, "float16", active=1)
    state.layers[0][1][0].fill_(1e5)
    store.put([1], state[:1])
    with pytest.raises(StateError, match="float16 ends at 65504"):
        store.put([2], state[1:2])
    assert equal(store.lookup([1]).state, state[:1])
    assert 2 not in store


def test_evicted_users_come_back_as_they_were(model: RecGRELA) -> None:
    gone: list[Evicted] = []
    store = UserStateStore(model, 2, on_evict=gone.append)
    state, seen = fed(model, 3), SeenItems.from_lists([[1], [2], [3, 4]])
    store.put([1, 2, 3], state, seen)
    assert [one.users.tolist() for one in gone] == [[1]]
    assert equal(gone[0].state, state[:1])
    assert gone[0].seen.ids(0).tolist() == [1]
    out = store.evict(oldest=1)
    assert (out.users.tolist(), store.users.tolist()) == ([2], [3])
    assert equal(out.state, state[1:2])
    assert store.evict(oldest=9).users.tolist() == [3]
    assert (len(store), store.seen_nbytes, store.evict([3, 3]).users.tolist()) == (0, 0, [])
    store.put(out.users, out.state, out.seen)
    assert store.lookup([2]).seen.ids(0).tolist() == [2]


def test_rebuild_deletes_an_event(model: RecGRELA) -> None:
    store = UserStateStore(model, 3, active=2)
    store.step([7, 7, 7, 8, 9], torch.tensor([5, 6, 5, 4, 3]))
    store.rebuild([7, 8, 9], [[5, 5], [], torch.tensor([3])])
    got = store.lookup([7, 8, 9])
    want = model.prefill(torch.tensor([[5, 5], [0, 0], [3, 0]]))
    torch.testing.assert_close(got.state.buffer, want.buffer)
    assert got.state.position.tolist() == [2, 0, 1]
    assert [got.seen.ids(i).tolist() for i in range(3)] == [[5], [], [3]]
    with pytest.raises(ValueError, match="histories must be one per user, 1, got 2"):
        store.rebuild([7], [[1], [2]])


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_saved_and_loaded(model: RecGRELA, tmp_path: Path, dtype: str) -> None:
    store = UserStateStore(model, 6, dtype, active=2)
    store.step(np.arange(9), torch.randint(1, 50, (9,)))
    store.evict([5])
    store.save(tmp_path / "users.safetensors")
    again = UserStateStore.load(tmp_path / "users.safetensors", model)
    users = np.sort(store.users)
    assert np.sort(again.users).tolist() == users.tolist()
    assert equal(again.lookup(users).state, store.lookup(users).state)
    assert again.seen_nbytes == store.seen_nbytes
    assert again.lookup(users).seen.padded().tolist() == store.lookup(users).seen.padded().tolist()
    for one in (store, again):  # the same users fall out next, and freed rows are used again
        one.step([100, 101, 102], torch.tensor([1, 2, 3]))
    assert sorted(again.users.tolist()) == sorted(store.users.tolist())
    assert [path.name for path in tmp_path.iterdir()] == ["users.safetensors"]


def test_files_that_are_refused(model: RecGRELA, make_model: MakeModel, tmp_path: Path) -> None:
    store = UserStateStore(model, 6, "int8", active=2)
    store.step(np.arange(5), torch.randint(1, 50, (5,)))
    path = tmp_path / "users.safetensors"
    store.save(path)
    whole = path.read_bytes()
    with pytest.raises(StateError, match="must come from this model"):
        UserStateStore.load(path, make_model(torch.float32))
    for torn in (whole[:-5], whole[: len(whole) // 2], b"", whole[:-9] + b"?" + whole[-8:]):
        path.write_bytes(torn)
        with pytest.raises(StateError, match=r"must be whole|whole safetensors file"):
            UserStateStore.load(path, model)
    with pytest.raises(StateError, match=r"must be readable|whole safetensors"):
        UserStateStore.load(tmp_path / "missing", model)
    model.save_pretrained(tmp_path)
    with pytest.raises(StateError, match="must be a saved store"):
        UserStateStore.load(tmp_path / "model.safetensors", model)


def test_bad_arguments(model: RecGRELA, make_model: MakeModel) -> None:
    store, state = UserStateStore(model, 3), fed(model, 2)
    with pytest.raises(ValueError, match="users must be distinct, got 5 twice"):
        store.put([5, 5], state)
    with pytest.raises(ValueError, match="state must hold 1 users, got 2"):
        store.put([5], state)
    with pytest.raises(ValueError, match="seen must hold 2 users, got 1"):
        store.put([5, 6], state, SeenItems(1))
    with pytest.raises(ValueError, match=r"users must be \[B\], got \[1, 1\]"):
        store.lookup([[1]])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="users must be integers, got float64"):
        store.lookup([1.5])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="users must fit in int64, got 18446744073709551615"):
        store.lookup([2**64 - 1])
    with pytest.raises(ValueError, match=r"items must be \[1\], got \[2\]"):
        store.step([1], torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="state must come from this model"):
        store.put([1, 2], make_model(torch.float32).init_state(2))
    with pytest.raises(ValueError, match="capacity must be an int >= 1, got 0"):
        UserStateStore(model, 0)
    with pytest.raises(ValueError, match="dtype must be one of float32"):
        UserStateStore(model, 1, "int4")
    with pytest.raises(ValueError, match=r"the model's, torch.float32, got torch.float64"):
        UserStateStore(model, 1, "float64")
    with pytest.raises(ValueError, match="one of users and oldest must be given"):
        store.evict()
    for oldest in (-2, "1", True):
        with pytest.raises(ValueError, match="oldest must be an int >= 0, got"):
            store.evict(oldest=oldest)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="seen must be SeenItems, got Tensor"):
        store.put([5, 6], state, torch.tensor([[1], [2]]))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="items must be a tensor, got list"):
        store.step([1], [5])  # type: ignore[arg-type]
    for history in ([1.7], ["12"]):
        with pytest.raises(TypeError, match="items must be integers"):
            store.rebuild([1], [history])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="seen must be SeenItems, got list"):
        state.to_bytes(0, seen=[[1], [2]])  # type: ignore[arg-type]
    assert len(store) == 0
    with torch.no_grad():
        model.encoder.layers[0].in_proj.bias[0] += 1
    with pytest.raises(ValueError, match="weights this store was made for"):
        store.put([1, 2], fed(model, 2))
