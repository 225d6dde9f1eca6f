from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from recgrela_ext.data import IdMap, Sequences, Targets
from recgrela_ext.errors import DataError


def test_from_lists_and_targets_are_views():
    sequences = Sequences.from_lists([[1, 2, 3], [3], [2, 2]])
    assert len(sequences) == 3
    assert sequences.num_items == 3
    assert sequences.n_items == 4
    assert sequences.items.dtype == np.int32
    assert sequences.offsets.dtype == np.int64
    assert sequences.history(0).base is sequences.items
    assert sequences.repeat_share == pytest.approx(1 / 6)
    targets = Targets.last_of(sequences)
    assert targets.target_items.tolist() == [3, 2]
    assert targets.history(0).tolist() == [1, 2]
    assert targets.history(1).tolist() == [2]
    assert targets.target_sha256 == hashlib.sha256(b"0\t3\n2\t2\n").hexdigest()
    assert targets.dropped == {"short_users": 1}


def test_from_lists_rejects_padding_and_empty_is_fine():
    with pytest.raises(DataError, match=r"must lie in 1..3, got 0..3"):
        Sequences.from_lists([[0, 3]])
    assert len(Sequences.from_lists([])) == 0
    assert Sequences.from_lists([[], [1]]).lengths.tolist() == [0, 1]


@pytest.mark.parametrize(
    "items", [np.array([10, 30, 20]), np.array(["a", "ü", "c"]), np.array([5])]
)
def test_id_map_round_trip(tmp_path, items):
    titles = {items[0].item(): "Ürsprung"}
    saved = IdMap(np.array([1, 2]), items, titles)
    saved.save(tmp_path / "ids.json")
    loaded = IdMap.load(tmp_path / "ids.json")
    assert [path.name for path in tmp_path.iterdir()] == ["ids.json"]
    assert loaded.item_ids.tolist() == items.tolist()
    assert loaded.item_titles == titles
    rows = loaded.encode_items(items)
    assert rows.dtype == np.int32
    assert rows.tolist() == list(range(1, len(items) + 1))
    assert loaded.decode_items(rows).tolist() == items.tolist()
    assert loaded.encode_items(items.astype(str)).tolist() == rows.tolist()
    assert loaded.title(1) == "Ürsprung"
    assert loaded.encode_users([2]).tolist() == [1]


def test_id_map_unknown_ids():
    id_map = IdMap(np.array([1]), np.array([10, 20]))
    with pytest.raises(DataError, match=r"known id, got 15 \(1 unknown of 2\)"):
        id_map.encode_items([10, 15])
    with pytest.raises(DataError, match="known id, got 'abc'"):
        id_map.encode_items(["abc"])
    with pytest.raises(DataError, match=r"known id, got 10\.5"):
        id_map.encode_items([20.0, 10.5])
    with pytest.raises(DataError, match="known id, got nan"):
        id_map.encode_items([np.nan])
    assert id_map.encode_items([20.0]).tolist() == [2]
    assert IdMap(np.array([1]), np.array(["1.5"])).encode_items([1.5]).tolist() == [1]
    with pytest.raises(DataError, match=r"must lie in 1..2 .* got 0"):
        id_map.decode_items([0])
    assert id_map.encode_items([]).shape == (0,)


_HEAD = '{"format": "recgrela-id-map", "version": '


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        _HEAD + "9}",
        _HEAD + "1}",
        _HEAD + '1, "user_ids": [1], "item_ids": [1], "item_titles": ["a", "b"]}',
        _HEAD + '1, "user_ids": [1], "item_ids": 3, "item_titles": ["a"]}',
    ],
)
def test_id_map_load_bad_file(tmp_path, text):
    path = tmp_path / "ids.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"IdMap\.load"):
        IdMap.load(path)
    with pytest.raises(DataError, match="no such file"):
        IdMap.load(tmp_path / "absent.json")
    with pytest.raises(DataError, match="must be a regular file"):
        IdMap.load(tmp_path)


def test_last_of_counts_users_by_value_of_their_number():
    base = Sequences.from_lists([[1, 2], [1, 3]])
    id_map = IdMap(np.array([10, 9]), base.id_map.item_ids)
    sequences = Sequences(base.items, base.offsets, id_map, "file", 0, "x", 0.0)
    expected = hashlib.sha256(b"9\t3\n10\t2\n").hexdigest()
    assert Targets.last_of(sequences).target_sha256 == expected


@pytest.mark.parametrize("offsets", [[], [0], [1, 3], [0, 4, 3], [0, 2], [0, 4]])
def test_offsets_that_do_not_fit(offsets):
    good = Sequences.from_lists([[1, 2], [3]])
    with pytest.raises(DataError, match="offsets must ascend from 0 to the 3 items"):
        replace(good, offsets=np.array(offsets, dtype=np.int64))


def test_histories_of_fractions():
    with pytest.raises(DataError, match="items must be integers, got float64"):
        Sequences.from_lists([[1, 2.5]])
