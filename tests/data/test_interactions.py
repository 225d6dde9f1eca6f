from __future__ import annotations

import hashlib
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recgrela_ext.data import IdMap, Interactions
from recgrela_ext.errors import DataError

ML_1M_FILE_ORDER = "43f79849b8dae70053551bbf7bcafd527c7f131b73060cd6ff67a9803db4505e"


def make(rows, **options):
    """A log from (user, item, time) triples."""
    columns = dict(zip(("user", "item", "time"), map(list, zip(*rows, strict=True)), strict=True))
    return Interactions.from_frame(columns, time="time", **options)


def histories(sequences):
    return {
        sequences.id_map.user_ids[u].item(): sequences.id_map.decode_items(
            sequences.history(u)
        ).tolist()
        for u in range(len(sequences))
    }


def quiet(function, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **options)


def test_leave_one_out_by_hand():
    log = make([(7, 30, 3), (7, 10, 1), (7, 20, 2), (5, 10, 9), (5, 30, 4), (2, 20, 0), (7, 40, 8)])
    train, valid, test = log.leave_one_out()
    assert histories(train) == {2: [20], 5: [30], 7: [10, 20]}
    assert train.items.dtype == np.int32
    assert train.offsets.dtype == np.int64
    assert test.id_map.decode_items(test.target_items).tolist() == [10, 40]
    assert [test.id_map.decode_items(test.history(i)).tolist() for i in (0, 1)] == [
        [30],
        [10, 20, 30],
    ]
    assert valid.id_map.decode_items(valid.target_items).tolist() == [30]
    assert valid.id_map.decode_items(valid.history(0)).tolist() == [10, 20]
    assert (test.split, valid.split) == ("test", "valid")
    assert test.dropped == {"short_users": 1}
    assert valid.dropped == {"short_users": 2}
    assert test.target_sha256 == hashlib.sha256(b"5\t10\n7\t40\n").hexdigest()
    assert test.items is valid.items
    assert train.id_map.n_items == 5


def test_ids_keep_their_type_and_users_ascend_by_value():
    numbers = make([(10, 1, 0), (10, 2, 1), (9, 1, 0), (9, 2, 1)])
    assert numbers.user_ids.tolist() == [9, 10]
    text = make([("10", "b", 0), ("10", "a", 1), ("9", "b", 0), ("9", "a", 1)])
    assert text.user_ids.tolist() == ["10", "9"]
    assert text.item_ids.tolist() == ["a", "b"]
    sparse = make([(10**18, 5, 0), (3, 10**15, 1)])
    assert sparse.user_ids.tolist() == [3, 10**18]
    assert sparse.user.tolist() == [1, 0]


@pytest.mark.parametrize("order", ["hash", "item_id", "recbole_float32", "file", "shuffled"])
def test_order_rules_differ_in_ties_alone(order):
    rng = np.random.default_rng(1)
    rows = [(u, int(i), t // 4) for u in range(20) for t, i in enumerate(rng.permutation(40))]
    log = make(rows, order=order, seed=3)
    with pytest.warns(UserWarning, match=r"7\d.\d % of adjacent events .* tie in time"):
        sequences = log.sequences()
    assert sequences.order == order
    for user, items in histories(sequences).items():
        given_items = [i for u, i, _ in rows if u == user]
        if order != "shuffled":
            blocks = [sorted(items[b : b + 4]) for b in range(0, 40, 4)]
            assert blocks == [sorted(given_items[b : b + 4]) for b in range(0, 40, 4)]
        if order in ("file", "recbole_float32"):
            assert items == given_items
        elif order == "item_id":
            assert items == [i for b in range(0, 40, 4) for i in sorted(given_items[b : b + 4])]
        else:
            assert items != given_items


def test_hash_order_ignores_the_file_and_depends_on_the_seed():
    rng = np.random.default_rng(2)
    rows = [(u, int(i), 0) for u in range(5) for i in rng.permutation(30)]
    one = histories(quiet(make(rows).sequences))
    mixed = [rows[r] for r in rng.permutation(len(rows))]
    assert histories(quiet(make(mixed).sequences)) == one
    assert histories(quiet(make(rows, seed=1).sequences)) != one
    text = [(str(u), f"i{i}", t) for u, i, t in rows]
    other = [text[r] for r in rng.permutation(len(rows))]
    assert histories(quiet(make(text).sequences)) == histories(quiet(make(other).sequences))
    # Two users with the same items in one tie do not share one order.
    assert len({tuple(items) for items in one.values()}) == 5


def test_hash_order_is_uniform():
    pairs = [(u, i, 0) for u in range(4000) for i in (1, 2)]
    first = np.array([items[0] for items in histories(quiet(make(pairs).sequences)).values()])
    assert abs((first == 1).mean() - 0.5) < 0.03


def test_recbole_float32_ties_what_float32_cannot_tell_apart():
    base = 900_000_000  # float32 steps here are 64
    rows = [(1, 1, base + 30), (1, 2, base + 1), (1, 3, base + 200), (1, 4, base)]
    exact = histories(make(rows).sequences())
    rounded = histories(quiet(make(rows, order="recbole_float32").sequences))
    assert exact == {1: [4, 2, 1, 3]}
    assert rounded == {1: [1, 2, 4, 3]}


def test_shuffled_permutes_runs_of_ascending_file_position_only():
    # Time as a rank, ties resolved in file order: file positions 0 2 5 | 1 4 | 3 by time.
    rank = {0: 1, 2: 2, 5: 3, 1: 4, 4: 5, 3: 6}
    rows = [(u, p, rank[p]) for u in range(200) for p in range(6)]
    log = make(rows, order="shuffled")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a rank has no ties left
        result = list(histories(log.sequences()).values())
    assert {tuple(sorted(items[:3])) for items in result} == {(0, 2, 5)}
    assert {tuple(sorted(items[3:5])) for items in result} == {(1, 4)}
    assert {items[5] for items in result} == {3}
    assert len({tuple(items[:3]) for items in result}) == 6
    again = make(rows, order="shuffled")
    assert list(histories(again.sequences()).values()) == result
    assert list(histories(make(rows, order="shuffled", seed=1).sequences()).values()) != result


def test_no_time_column_needs_file_order():
    frame = {"user": [1, 1, 2, 1], "item": [3, 1, 2, 2]}
    with pytest.raises(DataError, match=r"order must be 'file' .* got 'hash'"):
        Interactions.from_frame(frame, time=None)
    log = Interactions.from_frame(frame, time=None, order="file")
    assert histories(log.sequences()) == {1: [3, 1, 2], 2: [2]}


def test_filters():
    rows = [(u, i, i) for u in range(6) for i in range(u + 1)]  # user u: u + 1, item i: 6 - i
    log = make(rows)
    core = log.filter(k_core=(3, 3))
    counts = np.bincount(core.user), np.bincount(core.item)
    assert min(map(np.min, counts)) >= 3
    assert core.user_ids.tolist() == [2, 3, 4, 5]
    assert core.item_ids.tolist() == [0, 1, 2, 3]
    assert log.filter(min_user=2, max_user=4).user_ids.tolist() == [1, 2, 3]
    assert log.filter(min_item=2, max_item=4).item_ids.tolist() == [2, 3, 4]
    assert log.filter(k_core=(1, 1)) is log
    with pytest.raises(DataError, match=r"filter: frame must keep at least one user, got 0 of 6"):
        log.filter(k_core=(7, 1))


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 4))
def test_k_core_is_the_largest_one(seed, users, items):
    rng = np.random.default_rng(seed)
    rows = [(int(u), int(i), n) for n, (u, i) in enumerate(rng.integers(0, 12, (60, 2)))]
    left = list(rows)
    while True:  # one bad user or item at a time: the core does not depend on the path
        user_counts = np.bincount([r[0] for r in left], minlength=12)
        item_counts = np.bincount([r[1] for r in left], minlength=12)
        stay = [r for r in left if user_counts[r[0]] >= users]
        if len(stay) == len(left):
            stay = [r for r in left if item_counts[r[1]] >= items]
        if len(stay) == len(left):
            break
        left = stay
    if not left:
        with pytest.raises(DataError):
            make(rows).filter(k_core=(users, items))
        return
    core = make(rows).filter(k_core=(users, items))
    assert core.time.tolist() == [r[2] for r in left]
    assert core.user_ids[core.user].tolist() == [r[0] for r in left]
    assert core.item_ids[core.item].tolist() == [r[1] for r in left]


def test_split_by_time_by_hand():
    rows = [(1, 10, 0), (2, 10, 1), (1, 20, 2), (2, 20, 3), (1, 30, 4), (2, 10, 5)]
    rows += [(1, 20, 6), (3, 10, 7), (1, 99, 8), (3, 20, 9)]  # 99 and user 3: after training
    train, valid, test = make(rows).split_by_time(0.6, 0.2, 0.2)
    assert histories(train) == {1: [10, 20, 30], 2: [10, 20, 10], 3: []}
    assert train.repeat_share == pytest.approx(1 / 6)
    assert valid.id_map.decode_items(valid.target_items).tolist() == [20]
    assert test.id_map.decode_items(test.target_items).tolist() == [20]
    assert test.id_map.decode_items(test.history(0)).tolist() == [10]
    assert valid.dropped == {"cold_items": 1, "cold_events": 1, "no_history": 1}
    assert test.dropped == {"cold_items": 1, "cold_events": 1, "no_history": 0}
    assert train.num_items == 3


def test_split_by_time_targets():
    rng = np.random.default_rng(0)
    rows = [(int(rng.integers(5)), int(rng.integers(6)), t) for t in range(400)]
    log = make(rows)
    _, _, every = log.split_by_time()
    _, _, first = log.split_by_time(targets="first")
    _, _, last = log.split_by_time(targets="last")
    assert len(every) == 40
    edges = {u: np.flatnonzero(every.user == u)[[0, -1]] for u in np.unique(every.user)}
    assert first.position.tolist() == [every.position[e[0]] for e in edges.values()]
    assert last.position.tolist() == [every.position[e[1]] for e in edges.values()]
    assert len({t.target_sha256 for t in (every, first, last)}) == 3
    for targets in (every, first, last):
        for index in range(len(targets)):
            user = targets.user[index]
            assert targets.offsets[user] <= targets.position[index] < targets.offsets[user + 1]
            assert len(targets.history(index)) > 0


@pytest.mark.parametrize(
    ("options", "split", "message"),
    [
        ({}, {"targets": "some"}, "targets must be 'all', 'first' or 'last', got 'some'"),
        ({}, {"train": 0.9}, "must be positive with sum 1"),
        ({}, {"train": float("nan")}, "must be positive with sum 1"),
        ({"order": "shuffled"}, {}, "order must not be 'shuffled'"),
    ],
)
def test_split_by_time_wrong_arguments(options, split, message):
    with pytest.raises(DataError, match=message):
        make([(1, 1, 5), (1, 2, 6), (2, 1, 9)], **options).split_by_time(**split)


def test_split_by_time_refuses_a_rank_and_no_time():
    rank = make([(u, t, t + 1) for u in range(4) for t in range(6)])
    with pytest.raises(DataError, match=r"comparable between users, got a rank"):
        rank.split_by_time()
    frame = {"user": [1, 1], "item": [1, 2]}
    with pytest.raises(DataError, match="must have a time column"):
        Interactions.from_frame(frame, time=None, order="file").split_by_time()


def test_first_events():
    log = make([(1, 5, 9), (1, 5, 3), (1, 6, 4), (2, 5, 1), (2, 5, 2)])
    assert sorted(log.first_events().time.tolist()) == [1, 3, 4]


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"user": [1], "item": [1]}, {}, r"'timestamp' is missing; the columns are user, item"),
        ({"user": [], "item": [], "timestamp": []}, {}, "at least one row, got 0"),
        ({"user": [1], "item": [1, 2], "timestamp": [1]}, {}, "must have one length"),
        ({"user": [-3], "item": [1], "timestamp": [1]}, {}, r"0\.\.2\*\*63-1, got -3"),
        (
            {"user": np.array([2**63], np.uint64), "item": [1], "timestamp": [1]},
            {},
            "got 9223372036854775808",
        ),
        ({"user": ["a" * 300], "item": [1], "timestamp": [1]}, {}, "at most 256 characters"),
        ({"user": [1.5], "item": [1], "timestamp": [1]}, {}, "must be integers"),
        (
            {"user": np.array([b"a"], object), "item": [1], "timestamp": [1]},
            {},
            "must be integers or text, got bytes",
        ),
        (
            {"user": [1.0, np.nan], "item": [1, 2], "timestamp": [1, 2]},
            {},
            "1 missing, the first in row 1",
        ),
        (
            {"user": ["a", None], "item": [1, 2], "timestamp": [1, 2]},
            {},
            "1 missing, the first in row 1",
        ),
        (
            {"user": [1, 1, 1], "item": [1, 2, 3], "timestamp": [1.0, np.nan, np.inf]},
            {},
            "time must not be missing, got 2 missing, the first in row 1",
        ),
        (
            {"user": [1], "item": [1], "timestamp": ["soon"]},
            {},
            "all dates, got 'soon' in row 0",
        ),
        ({"user": [1], "item": [1], "timestamp": [1]}, {"order": "best"}, "order must be one of"),
    ],
)
def test_from_frame_wrong_input(columns, options, message):
    with pytest.raises(DataError, match=message) as caught:
        Interactions.from_frame(columns, **options)
    assert "\n" not in str(caught.value)


def test_users_without_events_and_uneven_columns():
    """A log made by hand may name users that do nothing; they keep an empty history."""
    user, item = np.array([0, 2, 2, 0, 2, 0], np.int32), np.array([0, 1, 0, 1, 1, 0], np.int32)
    log = Interactions(user, item, np.arange(10, 16), np.array([5, 6, 7]), np.array([1, 2]))
    train, _, test = log.leave_one_out()
    assert train.lengths.tolist() == [1, 0, 1]
    assert test.dropped == {"short_users": 1}
    by_time = log.split_by_time(0.5, 0.25, 0.25)[0]
    assert by_time.lengths.tolist() == [1, 0, 2]
    with pytest.raises(DataError, match=r"one length, got \[6, 5, 6\]"):
        Interactions(user, item[:5], np.arange(6), np.array([5, 6, 7]), np.array([1, 2]))


def test_users_with_one_event_only():
    with pytest.raises(DataError, match="a user with two events, got none among 2 users"):
        make([(1, 1, 1), (2, 1, 2)]).leave_one_out()


def test_pandas_frames_dates_gaps_and_titles():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {
            "who": pandas.Categorical(["b", "a", "b"]),
            "what": pandas.array([3, 1, 2], dtype="Int64"),
            "when": pandas.to_datetime(["2020-01-02", "2020-01-01", "2020-01-01"]),
            "title": ["three", "one", "two"],
        }
    )
    log = Interactions.from_frame(frame, "who", "what", "when", title="title")
    assert histories(log.sequences()) == {"a": [1], "b": [2, 3]}
    assert log.id_map.title(3) == "three"
    text = frame.assign(when=["2020-01-02T00:00:01Z", "2020-01-01", "2020-01-02"])
    same = Interactions.from_frame(text, "who", "what", "when")
    assert histories(same.sequences()) == histories(log.sequences())
    zoned = frame.assign(when=frame["when"].dt.tz_localize("Asia/Tokyo"))
    assert histories(Interactions.from_frame(zoned, "who", "what", "when").sequences()) == {
        "a": [1],
        "b": [2, 3],
    }


def test_id_map_of_a_split_survives_a_file(tmp_path):
    train, _, test = make([("ä", f"i{n}", n) for n in range(5)]).leave_one_out()
    train.id_map.save(tmp_path / "ids.json")
    loaded = IdMap.load(tmp_path / "ids.json")
    assert loaded.decode_items(test.target_items).tolist() == ["i4"]
    assert loaded.user_ids.tolist() == ["ä"]


def test_ml_1m_file_order_has_the_known_targets(real_data):
    pytest.importorskip("pandas")
    log = Interactions.from_file(real_data / "ml-1m" / "ml-1m.inter", order="file")
    assert (log.num_users, log.num_items, len(log)) == (6040, 3416, 999_611)
    train, valid, test = log.leave_one_out()
    assert test.target_sha256 == ML_1M_FILE_ORDER
    assert len(train.items) == 987_531
    assert (len(valid), len(test)) == (6040, 6040)
    assert len(log.filter(k_core=(5, 5))) == len(log)


def test_ml_1m_shuffled_breaks_the_order_of_the_file(real_data):
    pytest.importorskip("pandas")
    shares = {}
    for order in ("file", "shuffled"):
        log = Interactions.from_file(real_data / "ml-1m" / "ml-1m.inter", order=order)
        index = log.order_rows()
        same_user = log.user[index[1:]] == log.user[index[:-1]]
        shares[order] = float((index[1:] > index[:-1])[same_user].mean())
    assert shares["file"] == pytest.approx(0.662, abs=0.002)  # what the data's notes state
    assert shares["shuffled"] < 0.5


def test_ml_100k_recbole_order_differs_for_the_measured_share(real_data):
    pytest.importorskip("pandas")
    path = real_data / "ml-100k" / "ml-100k.inter"
    exact = quiet(Interactions.from_file(path, order="file").leave_one_out)[2]
    rounded = quiet(Interactions.from_file(path, order="recbole_float32").leave_one_out)[2]
    assert (exact.target_items != rounded.target_items).mean() == pytest.approx(0.158, abs=0.001)
    assert exact.id_map.title(1) == "Toy Story"
