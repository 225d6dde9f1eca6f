"""What a review found in logs: rows left out that left something behind, ids with blanks, times
that number events and passed for moments, counts of what comes later.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from recgrela_ext import DataError, Interactions, Sequences
from recgrela_ext.data import readers
from recgrela_ext.data.synthetic import make_synthetic
from recgrela_ext.evaluation.baselines import visible_part
from tests.trust.test_refusals import refused

Rows = list[tuple[Any, Any, Any, Any]]
# user, item, time, kind: those of kind 5 stay; nobody else has the users and items of the others.
ROWS: Rows = [
    (7, 30, 100, 1), (1, 10, 102, 5), (1, 11, 101, 5), (8, 31, 100, 2), (2, 10, 105, 5),
    ("", 32, 106, 2), (9, "", 107, 1), (2, 12, 104, 5), (9, 33, 108, 1), (1, 12, 109, 5),
]  # fmt: skip


def lines(form: str, header: str = "") -> Callable[[Path, Rows], None]:
    def write(path: Path, rows: Rows) -> None:
        texts = [form.format(u=u, i=i, t=t, k=k) for u, i, t, k in rows]
        path.write_text("".join(f"{line}\n" for line in ([header] if header else []) + texts))

    return write


def parquet(dtype: Any) -> Callable[[Path, Rows], None]:
    def write(path: Path, rows: Rows) -> None:
        pytest.importorskip("pyarrow")
        columns = list(zip(*rows, strict=True))
        frame = pd.DataFrame({"timestamp": columns[2], "kind": columns[3]})
        for name, column in (("user", columns[0]), ("item", columns[1])):
            frame[name] = pd.Series([None if one == "" else one for one in column]).astype(dtype)
        frame.to_parquet(path, index=False)

    return write


# format, what is kept -> name of the file, how it is written
KEPT: dict[tuple[str, str], tuple[str, Callable[[Path, Rows], None]]] = {
    ("recbole", "kind"): ("x.inter", lines("{u}\t{i}\t{t}\t{k}", "user_id:token\titem_id:token\t"
                                           "timestamp:float\tkind:token")),
    ("movielens_dat", "rating"): ("ratings.dat", lines("{u}::{i}::{k}::{t}")),
    ("movielens_100k", "rating"): ("u.data", lines("{u}\t{i}\t{k}\t{t}")),
    ("csv", "kind"): ("x.csv", lines("{u};{k};{i};{t}", "user;kind;item;time")),
    ("csv", " kind "): ("x.csv", lines(" {u} , {k}, {i},{t}", "user, kind, item, time")),
    ("lfm1b", "album"): ("LFM-1b_LEs.txt", lines("{u}\t{i}\t{k}\t4\t{t}")),
    ("tmall", "action_type"): ("user_log_format1.csv", lines(
        "{u},{i},1,2,,{t},{k}",
        "user_id,item_id,cat_id,seller_id,brand_id,time_stamp,action_type")),
    ("parquet", "kind"): ("x.parquet", parquet(float)),
    ("parquet", "kind "): ("x.parquet", parquet("Int64")),
    ("parquet", " kind"): ("x.parquet", parquet("category")),
}  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize(("kind", "column"), KEPT)
def test_kept_rows_are_the_log_of_a_file_of_these_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, column: str, chunk: int
) -> None:
    """Parquet kept the users and items of the other rows, and refused one without an id."""
    monkeypatch.setattr(readers, "CHUNK_ROWS", chunk)
    name, write = KEPT[kind, column]
    logs = []
    for folder, rows in (("all", ROWS), ("kept", [row for row in ROWS if row[3] == 5])):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / name, rows)
        logs.append(
            Interactions.from_file(
                tmp_path / folder / name, kind, progress=False, keep={column.strip(): [5]}
            )
        )
    for field in ("user", "item", "time", "user_ids", "item_ids"):
        found, expected = (getattr(log, field) for log in logs)
        assert found.tolist() == expected.tolist(), field
        assert found.dtype == expected.dtype, field
    assert logs[0].user_ids.tolist() == [1, 2]
    assert logs[0].item_ids.tolist() == [10, 11, 12]
    for found, expected in zip(logs[0].leave_one_out()[1:], logs[1].leave_one_out()[1:],
                               strict=True):  # fmt: skip
        assert found.target_sha256 == expected.target_sha256
        assert found.dropped == expected.dropped


def test_every_format_keeps_rows_or_refuses_to(tmp_path: Path) -> None:
    assert {kind for kind, _ in KEPT} == {*readers.FORMATS} - {"netflix"}
    (tmp_path / "mv_1.txt").write_text("1:\n5,3,2005-09-06\n")
    with pytest.raises(DataError, match="column 'rating' is missing"):
        Interactions.from_file(tmp_path, keep={"rating": ["3"]}, progress=False)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_kept_rows_without_an_id_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    frame = pd.DataFrame({"user": [1, None, 2, None], "item": 5, "time": 7, "kind": [1, 1, 2, 2]})
    frame.to_csv(path, index=False) if suffix == "csv" else frame.to_parquet(path)
    with pytest.raises(DataError, match=r"got 1 missing, the first in (line 5|row 3)$"):
        Interactions.from_file(path, keep={"kind": [2]}, progress=False)


def read(path: Path, text: str, **options: Any) -> Interactions:
    path.write_text(text)
    return Interactions.from_file(path, progress=False, **options)


BLANKS = {
    "x.csv": "user, item ,time\n42, 7,1\n 42, 8,2\n42 ,\t7 ,3\n",
    "x.inter": "user_id:token\titem_id:token\ttimestamp:float\n42\t 7\t1\n 42\t8\t2\n42 \t7 \t3\n",
    "u.data": "42 \t7\t5\t1\n42\t8 \t5\t2\n 42\t 7\t5\t3\n",
    "ratings.dat": "42 :: 7::5::1\n42::8 ::5::2\n 42::7::5::3\n",
    "quoted.csv": 'user,item,time\n" 42",7,1\n"42 "," 8",2\n42,"7 ",3\n',
}


@pytest.mark.parametrize("name", BLANKS)
def test_blanks_around_ids(tmp_path: Path, name: str) -> None:
    """They made other users and items, and text of a column of integers."""
    log = read(tmp_path / name, BLANKS[name])
    assert log.user_ids.tolist() == [42]
    assert log.item_ids.tolist() == [7, 8]
    assert log.item.tolist() == [0, 1, 0]


def test_blanks_around_other_values(tmp_path: Path) -> None:
    (tmp_path / "combined_data_1.txt").write_text("1 :\n 5,3,2005-09-06 \n 1:\n5 ,3,2005-09-07\n")
    log = Interactions.from_file(tmp_path, progress=False)
    assert (log.user_ids.tolist(), log.item_ids.tolist()) == ([5], [1])
    (tmp_path / "x.item").write_text("item_id:token\ttitle:token_seq\n7 \tSeven\n")
    text = "user_id:token\titem_id:token\ttimestamp:float\tkind:token\n"
    text += "1\t7\t1\t buy\n1\t8\t2\tbuy \n1\t9\t3\tview\n"
    for value in ("buy", " buy"):
        log = read(tmp_path / "x.inter", text, keep={"kind": value})
        assert log.item_ids.tolist() == [7, 8]
        assert log.item_titles == {7: "Seven"}
    with pytest.raises(DataError, match=r"user must not be missing, got 1 missing, .* line 3$"):
        read(tmp_path / "x.csv", "user,item,time\n1,2,3\n  ,2,3\n")


def test_ids_written_as_floats(tmp_path: Path) -> None:
    """Text of a file, integers of the frame that pandas reads of it."""
    path = tmp_path / "x.csv"
    log = read(path, "user,item,time\n42.0,7,1\n43,7.0,2\n42,8.0,3\n")
    frame = Interactions.from_frame(pd.read_csv(path), time="time")
    for one in (log, frame):
        assert one.user_ids.tolist() == [42, 43]
        assert one.item_ids.tolist() == [7, 8]
        assert one.user.tolist() == [0, 1, 0]
        assert one.item.tolist() == [0, 0, 1]
    for others in (["42.5", "7.0"], ["42.00", "7.0"], ["007.0", "7.0"], ["a", "7.0"], ["", ".0"],
                   ["9007199254740993.0", "7.0"]):  # fmt: skip
        others = [one for one in others if one]
        text = "".join(f"1,{one},3\n" for one in others)
        assert read(path, f"user,item,time\n{text}").item_ids.tolist() == sorted(others)


def numbered(lengths: list[int], first: int = 1, step: float = 1) -> pd.DataFrame:
    """Every user's events numbered; every third of them is a view."""
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(len(lengths)), lengths)
    number = np.concatenate([np.arange(n) for n in lengths])
    item = rng.integers(0, 12, len(user)) + 30 * (number % 3 == 1)
    kind = np.where(number % 3 == 1, "view", np.where(number % 9 == 0, "buy", "click"))
    columns = {"user": user, "item": item, "timestamp": step * (first + number), "kind": kind}
    frame = pd.DataFrame(columns)
    return frame.sample(frac=1, random_state=0, ignore_index=True)


LENGTHS = np.random.default_rng(1).integers(3, 60, 40).tolist()
RANK = "^split_by_time: time must be comparable between users, got a rank"


@pytest.mark.parametrize("step", [1, 1000, 0.25])
@pytest.mark.parametrize("first", [0, 1])
def test_ranks_with_gaps_are_refused_as_time(first: int, step: float) -> None:
    """A filter left gaps, and the split by time took ranks for moments."""
    frame = numbered(LENGTHS, first, step)
    log = Interactions.from_frame(frame)
    rare = log.item_ids[log.item] < 30
    for part in (
        log,
        log.filter(max_item=40),
        log.filter((5, 20)),
        log.subset(rare).filter((2, 2)).first_events(),
        log.subset(np.arange(len(log)) % 10 == 0),
        Interactions.from_frame(numbered([6] * 4, first, step)),
        Interactions.from_frame(numbered([4, 3], first, step)),
    ):
        refused(part.split_by_time, DataError, RANK)


@pytest.mark.parametrize("chunk", [100, 1 << 19])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_ranks_with_rows_left_out_by_keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, chunk: int
) -> None:
    monkeypatch.setattr(readers, "CHUNK_ROWS", chunk)
    frame, path = numbered(LENGTHS), tmp_path / f"x.{suffix}"
    frame.to_csv(path, index=False) if suffix == "csv" else frame.to_parquet(path)
    for kept in (["click", "view"], ["buy"]):
        log = Interactions.from_file(path, keep={"kind": kept}, progress=False)
        assert len(log) < len(frame)
        refused(log.split_by_time, DataError, RANK)
    moments = frame.assign(timestamp=np.arange(len(frame)))
    moments.to_csv(path, index=False) if suffix == "csv" else moments.to_parquet(path)
    log = Interactions.from_file(path, keep={"kind": ["buy"]}, progress=False)
    assert len(log.split_by_time()[2]) > 0


@pytest.mark.filterwarnings("ignore:.*tie in time")
def test_ranks_of_real_data(real_data: Path) -> None:
    for name, ranks in (
        ("wikipedia-edits", True), ("statics2011", True), ("ml-100k", False),
        ("ml-latest-small", False), ("foursquare-nyc", False), ("algebra05-test", False),
    ):  # fmt: skip
        path = real_data / name / f"{name}.inter"
        log = Interactions.from_file(path, order="file", progress=False)
        for part in (log, log.filter((2, 200)), log.filter(max_user=300)):
            assert part.has_rank_time == ranks, name
        if ranks:
            refused(log.filter((2, 200)).split_by_time, DataError, RANK)
        else:
            assert len(log.filter((2, 20)).split_by_time()[2]) > 0


def honest(name: str) -> Interactions:
    rng = np.random.default_rng(0)
    users, events = {"one user": (1, 30), "two users": (2, 60)}.get(name, (40, 1200))
    user = rng.integers(0, users, events)
    time: Any = np.arange(events)  # of the whole log
    if name == "panel":  # everybody from the first day on, once a day at most
        user, time = np.nonzero(rng.random((40, 60)) < rng.uniform(0.3, 1, (40, 1)))
    elif name == "days":
        time = rng.integers(0, 60, events)
    elif name == "every day":  # by everybody: its parts are the same for ranks
        user, time = np.repeat(np.arange(40), 30), 1_700_000_000 + 86_400 * (np.arange(1200) % 30)
    elif name == "one event each":
        user = np.arange(events)
    elif name == "huge":
        time = rng.uniform(-1, 1, events) * 1.7e308
    elif name == "one moment":
        time = np.full(events, 5)
    item = rng.integers(0, 9, len(user))
    return Interactions.from_frame({"user": user, "item": item, "timestamp": time})


@pytest.mark.parametrize(
    "name", ["rows", "one user", "two users", "panel", "days", "every day", "one event each",
             "huge", "one moment"],
)  # fmt: skip
def test_moments_are_no_ranks(name: str) -> None:
    log = honest(name)
    assert not log.has_rank_time
    assert not log.filter(min_item=2).has_rank_time


def test_few_moments_are_no_ranks() -> None:
    """Coincidences of a few events prove nothing."""
    for users, times in (
        ([1, 1, 2], [100, 250, 100]), ([1, 1, 2, 2], [3, 9, 3, 9]),
        ([1, 1, 1, 2, 2, 2], [0, 1, 9, 0, 2, 9]), ([1, 2, 3, 4], [5] * 4),
    ):  # fmt: skip
        log = Interactions.from_frame({"user": users, "item": users, "timestamp": times})
        assert not log.has_rank_time
    assert not make_synthetic(60, 120)[0].has_rank_time
    assert not Interactions.from_frame({"user": [1], "item": [1]}, time=None,
                                       order="file").has_rank_time  # fmt: skip
    refused(lambda: Interactions(log.user, log.item, log.time, log.user_ids, log.item_ids,
                                 time_is_rank=1), DataError,  # type: ignore[arg-type]
            "^Interactions: time_is_rank must be True, False or None, got 1$")  # fmt: skip


def test_what_is_visible_before_leave_one_out_targets() -> None:
    """The last event of a user without a validation target was counted before validation."""
    rows = [("a", "x", 1), ("a", "y", 2), ("a", "z", 3), ("b", "y", 1), ("b", "x", 9),
            ("c", "z", 4)]  # fmt: skip
    log = Interactions.from_frame(pd.DataFrame(rows, columns=["user", "item", "timestamp"]))
    train, valid, test = log.leave_one_out()
    assert histories(visible_part(valid)) == histories(train) == [[1], [2], [3]]
    assert histories(visible_part(test)) == [[1, 2], [2], [3]]


@pytest.mark.parametrize("targets", ["all", "first", "last"])
def test_what_is_visible_before_targets_of_a_time_split(targets: str) -> None:
    rng = np.random.default_rng(0)
    columns = {"user": rng.integers(0, 30, 300), "item": rng.integers(0, 8, 300)}
    log = Interactions.from_frame({**columns, "timestamp": np.arange(300)})
    train, valid, test = log.split_by_time(targets=targets)
    assert histories(visible_part(valid)) == histories(train)
    before = Interactions.from_frame(
        {name: column[:270] for name, column in columns.items()} | {"timestamp": np.arange(270)}
    )
    seen = visible_part(test)
    assert [one for one in histories(seen) if one] == histories(before.sequences())
    assert seen.repeat_share == pytest.approx(before.sequences().repeat_share)


def histories(data: Sequences) -> list[list[int]]:
    return [data.history(user).tolist() for user in range(len(data))]


@pytest.mark.parametrize(
    "wrong", [[1, 2, 3], [[[1, 2], [3, 4]]], np.arange(1, 4), [[[]]], [[1], 2]]
)
def test_histories_that_are_no_lists_of_items(wrong: Any) -> None:
    """Three items were three users, and a batch of histories one history."""
    refused(lambda: Sequences.from_lists(wrong), DataError,
            r"^Sequences\.from_lists: histories must be lists of items, got")  # fmt: skip
    assert histories(Sequences.from_lists(np.array([[1, 2], [3, 4]]))) == [[1, 2], [3, 4]]
    assert histories(Sequences.from_lists([[], (2,), np.array([1])])) == [[], [2], [1]]
