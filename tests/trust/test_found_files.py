"""What fuzzing found in files and stored bytes, each as small as it gets; the inputs themselves are
in tests/fuzz/corpus.
"""

from __future__ import annotations

import gzip
import importlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save_file
from torch import Tensor

from recgrela_ext import (
    CheckpointError,
    DataError,
    IdMap,
    Interactions,
    RecGRELA,
    SeenItems,
    StateError,
    UserState,
    UserStateStore,
)
from recgrela_ext.data.order import _distinct_ints
from recgrela_ext.errors import shown
from recgrela_ext.model import blob as framing
from recgrela_ext.model.persistence import weights_digest
from recgrela_ext.training.checkpoint import CheckpointFolder
from tests.fuzz.saved import small_model


def test_seen_items_cut_short_behind_a_right_checksum() -> None:
    state = small_model().init_state(1)
    whole = state.to_bytes(0, seen=SeenItems.from_lists([[3, 5]]))
    for body in (b"abc", (10**6).to_bytes(4, "little") + whole[9:-4]):
        with pytest.raises(StateError, match="must be whole, got seen items that begin at byte"):
            SeenItems.from_bytes(framing.seal(b"RGUS", body))
    with pytest.raises(StateError, match=r"items must lie in 0\.\..*, got -1"):
        SeenItems.from_bytes(framing.seal(b"RGSI", b"\xff" * 4))


def test_state_headers_that_fit_and_mean_nothing() -> None:
    model = small_model()
    body = bytearray(model.init_state(1).to_bytes(0)[5:-4])
    body[22:30] = (2**62).to_bytes(8, "little")  # the position
    with pytest.raises(StateError, match="must have a header that fits this model"):
        UserState.from_bytes(framing.seal(b"RGUS", bytes(body)), model)
    body[22:30] = bytes(8)
    body[5] = framing.DTYPES.index(torch.int8)  # of the hidden state
    with pytest.raises(StateError, match=r"must hold floating hidden states, got torch\.int8"):
        UserState.from_bytes(framing.seal(b"RGUS", bytes(body)), model)


@pytest.mark.parametrize(
    "changes",
    [
        {"item_ids": 3},
        {"item_ids": [[1], [2]]},
        {"item_ids": [1, "2"]},
        {"item_ids": [1, 1]},
        {"user_ids": [2**63]},
        {"user_ids": [0.5]},
        {"user_ids": [True]},
        {"user_ids": [None]},
        {"item_titles": [1, 2]},
        {"item_titles": 7},
    ],
)
def test_id_maps_of_other_things(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "id_map.json"
    IdMap(np.arange(2), np.arange(2)).save(path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))
    with pytest.raises(DataError, match=r"IdMap\.load: .* must hold ids and titles"):
        IdMap.load(path)
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match="must be a JSON id map"):
        IdMap.load(path)


def test_checkpoints_without_their_parts(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    place = folder.save(1, {"a": torch.ones(2)}, {"position": {}})
    path = place / "state.json"
    whole = json.loads(path.read_text())
    for text in ("[" * 100_000, json.dumps({**whole, "state": 3})):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="must be"):
            folder.load(1)
    for name in ("tensors_sha256", "state"):
        content = {key: x for key, x in whole.items() if key not in (name, "sha256")}
        from recgrela_ext.training.checkpoint import _sha256_of_json

        content["sha256"] = _sha256_of_json(content)
        path.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match="must be whole"):
            folder.load(1)


def test_gzip_that_is_torn_inside(tmp_path: Path) -> None:
    path = tmp_path / "x.csv.gz"
    packed = bytearray(gzip.compress(b"user,item,time\n" + b"1,2,3\n" * 500))
    packed[12:16] = b"\xff\xff\xff\xff"
    path.write_bytes(packed)
    with pytest.raises(DataError, match="must be readable"):
        Interactions.from_file(path)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[UserStateStore, Path]:
    store = UserStateStore(small_model(), 5, "int8", active=2)
    store.step(np.arange(6), torch.arange(1, 7))
    path = tmp_path / "users.safetensors"
    store.save(path)
    return store, path


def rewrite(path: Path, tensors: dict[str, Tensor], **changes: Any) -> None:
    """The file with other contents and checksums that fit; None takes a fact away."""
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
    kept = {**load(path.read_bytes()), **tensors}
    facts = {**json.loads(metadata["facts"]), **changes}
    facts["sha256"] = {name: weights_digest({name: t}) for name, t in kept.items()}
    facts = {name: x for name, x in facts.items() if x is not None}
    save_file(kept, path, metadata={**metadata, "facts": json.dumps(facts)})


@pytest.mark.parametrize(
    ("tensors", "changes", "text"),
    [
        ({}, {"fingerprint": None}, "must have a whole header"),
        ({}, {"capacity": 2**61}, "must have sizes that can be made here"),
        ({}, {"capacity": "x"}, "must have sizes that can be made here"),
        ({}, {"dtype": "int4"}, "must have sizes that can be made here"),
        ({"1.order": torch.tensor(3)}, {}, "must be torch.int64 of 1 dimensions"),
        ({"1.order": torch.tensor([0, 0])}, {}, "must list slots once"),
        ({"1.order": torch.tensor([77])}, {}, "must list slots once"),
        ({"1.owner": torch.arange(100)}, {}, "must fit its capacity"),
        ({"1.owner": torch.zeros(4, dtype=torch.int64)}, {}, "must be distinct users"),
        ({"1.owner": torch.tensor([5, 1, 2, 3])}, {}, "must hold distinct users"),
        ({"1.owner": torch.ones(4)}, {}, "must be torch.int64 of 1 dimensions"),
        ({"1.data": torch.ones(4, 7, dtype=torch.int8)}, {}, "must have rows of this model"),
        ({"1.position": torch.tensor([1, -1, 1, 1])}, {}, "must lie in 0..2^53"),
        ({"seen.items": torch.tensor([9], dtype=torch.int32)}, {}, "lengths of the lists"),
        ({"seen.users": torch.arange(50, 56)}, {}, "must be kept once"),
        ({"seen.items": -torch.ones(6, dtype=torch.int32)}, {}, "must be rows of the item table"),
        (
            {
                "seen.users": torch.tensor([1]),
                "seen.counts": torch.tensor([6]),
                "seen.items": torch.full((6,), 3, dtype=torch.int32),
            },
            {},
            "must be distinct for each user",
        ),
        ({"seen.items": torch.ones(0, 3, dtype=torch.int32)}, {}, "of 1 dimensions"),
    ],
)
def test_stores_that_contradict_themselves(
    saved: tuple[UserStateStore, Path], tensors: Any, changes: Any, text: str
) -> None:
    store, path = saved
    rewrite(path, tensors, **changes)
    with pytest.raises(StateError, match=re.escape(text)):
        UserStateStore.load(path, store.model)


def test_parquet_error_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1" + bytes(8) + b"PAR1")
    with pytest.raises(DataError) as caught:
        Interactions.from_file(path, progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_id_map_has_a_file_of_its_own(name: str) -> None:
    """It was written over the configuration, and lost."""
    with pytest.raises(ValueError, match="id_map_file must not be config"):
        small_model(id_map_file=name)


@pytest.mark.parametrize(
    "change",
    [
        {"GRELA_block.0.attn.rotations": torch.ones(())},
        {"GRELA_block.0.attn.conv1d.weight": torch.ones(())},
        {"GRELA_block.0.attn.conv1d.weight": torch.ones(4)},
        {f"GRELA_block.{'1' * 5000}.attn.conv1d.weight": torch.ones(4, 1, 4)},
    ],
    ids=["rotations", "no taps", "one row of taps", "layer"],
)
def test_reference_weights_of_odd_shapes(change: dict[str, Tensor]) -> None:
    weights = {
        "item_embedding.weight": torch.ones(9, 8),
        "GRELA_block.0.attn.conv1d.weight": torch.ones(8, 1, 4),
    }
    with pytest.raises(CheckpointError, match="from_reference"):
        RecGRELA.from_reference({**weights, **change})


def test_foreign_folders_beside_checkpoints(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path)
    checkpoints.save(1, {"a": torch.ones(1)}, {})
    (tmp_path / "step-²").mkdir()
    found = checkpoints.load_newest()
    assert found is not None
    assert found.step == 1


def test_file_names_with_line_ends(tmp_path: Path) -> None:
    for ends in ("\n", "\u2028"):
        with pytest.raises(DataError) as caught:
            Interactions.from_file(tmp_path / f"a{ends}b.csv")
        assert len(str(caught.value).splitlines()) == 1
    assert shown("a\u2028b") == "'a\\u2028b'"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "id_map.json"])
def test_pipes_are_not_waited_for(tmp_path: Path, name: str) -> None:
    model = small_model()
    model.id_map = IdMap(np.arange(3), np.arange(11))
    model.save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match="must be a regular file"):
        RecGRELA.from_pretrained(tmp_path)
    with pytest.raises(StateError, match="must be a regular file"):
        UserStateStore.load(tmp_path / name, model)


def test_times_with_a_zone_beyond_python_s_years(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    times = np.array(["2020-01-01T00", "2300-01-01T00"], dtype="datetime64[s]")
    column = pandas.Series(times).dt.tz_localize("UTC").dt.tz_convert("Asia/Tokyo")
    frame = pandas.DataFrame({"user": [1, 1], "item": [1, 2], "timestamp": column})
    with pytest.raises(DataError, match=r"time must lie in the years 1678 to 2261, got 2300-01"):
        Interactions.from_frame(frame)
    frame["timestamp"] = column - pandas.Timedelta(days=50_000)
    found = Interactions.from_frame(frame).time
    assert found is not None
    assert (found == (times - 50_000 * 86400).astype("datetime64[ns]").astype(np.int64)).all()


def test_shuffled_keeps_times_apart_that_differ_by_a_fraction_or_are_far() -> None:
    """They were cut to whole numbers, and what int64 cannot hold was undefined."""
    times = np.array([1.25, 1.5, 2.0, 1e300, 2e300, -3.0, -3.5])
    with np.errstate(all="raise"):
        ints = _distinct_ints(times)
    assert len(set(ints.tolist())) == len(times)
    assert ints[[2, 5]].tolist() == [2, -3]  # whole times as ever: the order of known data stays


def test_parquet_as_pandas_writes_it(tmp_path: Path) -> None:
    """A column that was an index, columns of one name, bytes for times."""
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    pyarrow, parquet = (importlib.import_module(n) for n in ("pyarrow", "pyarrow.parquet"))
    path = tmp_path / "x.parquet"
    frame = pandas.DataFrame({"user": [1, 1, 2], "item": [3, 4, 3], "time": [5, 6, 7]})
    frame.set_index("user").to_parquet(path)
    log = Interactions.from_file(path)
    assert log.user_ids[log.user].tolist() == [1, 1, 2]
    columns = [pyarrow.array([1, 2])] * 3
    parquet.write_table(pyarrow.table(columns, names=["user", "item", "user"]), path)
    with pytest.raises(DataError, match="must have distinct columns, got 'user' twice"):
        Interactions.from_file(path)
    frame.assign(time=[b"\xff", b"\xfe", b"\xfd"]).to_parquet(path)
    with pytest.raises(DataError, match="time must be numbers or dates, got bytes"):
        Interactions.from_file(path)


def test_titles_beyond_the_limit_of_a_csv_field(tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,2,3,4\n1,3,3,5\n")
    (tmp_path / "movies.csv").write_text('movieId,title\n2,"' + "x" * 140_000 + '"\n')
    with pytest.raises(DataError, match=r"movies\.csv must be CSV, got field larger"):
        Interactions.from_file(tmp_path / "ratings.csv")


@pytest.mark.parametrize("digits", [300, 5000])
def test_ids_of_more_digits_than_python_reads(tmp_path: Path, digits: int) -> None:
    (tmp_path / "x.csv").write_text(f"user,item,time\n1,{'7' * digits},3\n1,2,4\n")
    with pytest.raises(DataError, match="item ids must have at most 256 characters"):
        Interactions.from_file(tmp_path / "x.csv")


def test_titles_of_windows_are_not_cut(tmp_path: Path) -> None:
    (tmp_path / "ratings.dat").write_text("1::10::5::978300760\n1::11::3::978302109\n")
    (tmp_path / "movies.dat").write_bytes(
        b"10::Wait\x85 what (1995)::Drama\r\n11::Caf\xe9::Drama\r\n"
    )
    titles = Interactions.from_file(tmp_path / "ratings.dat").id_map.item_titles
    assert titles is not None
    assert [titles[10], titles[11]] == ["Wait\x85 what (1995)", "Caf\xe9"]


@pytest.mark.parametrize("text", ["1_0", "+10", " 10", "010", "\uff11\uff10", "1e1"])
def test_ids_are_looked_up_as_they_are_written(text: str) -> None:
    ids = IdMap(np.arange(3), np.array([5, 10]))
    assert ids.encode_items(["10"]).tolist() == [2]
    with pytest.raises(DataError, match="encode_items: item must be a known id, got"):
        ids.encode_items([text])
