"""What a review found in ids, titles, times, metrics and lists: taken in silence, or refused in
words that were wrong.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from recgrela_ext import DataError, IdMap, Interactions, Sequences, Targets, evaluate
from recgrela_ext.cli import main
from recgrela_ext.evaluation import (
    bootstrap_interval,
    format_table,
    mean_metrics,
    metric_values,
    recommend_for_items,
    recommend_for_users,
)
from recgrela_ext.evaluation.metrics import hit_at_k, mrr_at_k, ndcg_at_k
from tests.fuzz.saved import small_model
from tests.trust.test_refusals import objects, refused, users_of

NAN = float("nan")


@pytest.mark.parametrize(("bits", "dtype"), [(53, "float64"), (24, "float32"), (11, "float16")])
def test_ids_of_floats_that_could_be_another(bits: int, dtype: str) -> None:
    ids = np.array([2.0**bits, 2.0**bits + 1, 1], dtype=dtype)
    text = rf"^from_frame: user ids must be integers \(below 2\*\*{bits} in a {dtype} column\), got"
    refused(lambda: users_of(ids), DataError, text)
    assert users_of(np.array([2.0**bits - 1, 2.0**bits - 2], dtype=dtype)) == [
        2**bits - 2,
        2**bits - 1,
    ]
    id_map = IdMap(np.array([2**bits]), np.arange(1))
    refused(lambda: id_map.encode_users(ids[1:]), DataError, "^encode_users: user must be a known")


def test_float_ids_of_frames_and_parquet_files(tmp_path: Path) -> None:
    pandas, _ = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    path = tmp_path / "x.parquet"
    for dtype, bits in (("float32", 24), ("float64", 53), ("Float32", 24), ("float[pyarrow]", 24)):
        ids = pandas.Series([2.0**bits, 2.0**bits], dtype=dtype)
        text = rf"user ids must be integers \(below 2\*\*{bits} in a float"
        refused(lambda ids=ids: users_of(ids), DataError, f"^from_frame: {text}")
        pandas.DataFrame({"user": ids, "item": [1, 2], "timestamp": [1, 2]}).to_parquet(path)
        refused(lambda: Interactions.from_file(path, progress=False), DataError, text)


MIXED: dict[str, tuple[list[Any], str]] = {
    "text and NaN": (["a", NAN], "must not be missing, got 1 missing, the first in row 1"),
    "text and NaN of NumPy": ([np.float32("nan"), "a"], "must not be missing, got 1 missing"),
    "text and a fraction": (["a", 1.5], "must be integers or text, got float"),
    "a number and its text": ([1, "1"], "must be of one type, got a mixture"),
    "text and bytes": (["a", b"a"], "must be integers or text, got bytes"),
    "a bool and a number": ([True, 1], "must be integers or text, got bool"),
    "a number and a bool": ([2, np.True_], "must be integers or text, got bool"),
    "a bool and a fraction": ([False, 2.0], "must be integers or text, got bool"),
    "a bool and text": ([True, "a"], "must be integers or text, got bool"),
}


def test_lists_of_several_types() -> None:
    """NumPy made one type of a list, where a column of objects was refused."""
    pytest.importorskip("pandas")
    for ids, text in MIXED.values():
        for same in (ids, tuple(ids), objects(*ids)):
            refused(lambda same=same: users_of(same), DataError, f"^from_frame: user ids {text}")
    assert users_of([2, np.int32(1)]) == [1, 2]
    assert users_of([2.0, 1]) == [1, 2]
    assert users_of(["b", np.str_("a")]) == ["a", "b"]
    assert users_of([1, "a"]) == ["1", "a"]


def test_titles_that_are_missing() -> None:
    pandas = pytest.importorskip("pandas")
    columns: dict[str, Any] = {"user": [1] * 5, "item": [1, 2, 3, 1, 4], "timestamp": range(5)}
    for titles in (
        ["One", None, NAN, None, "Four"],
        objects("One", pandas.NA, "", NAN, "Four"),
        pandas.Series(["One", None, None, None, "Four"]),
        pandas.Series(["One", None, None, None, "Four"], dtype="string"),
    ):
        log = Interactions.from_frame({**columns, "title": titles}, title="title")
        assert log.item_titles == {1: "One", 4: "Four"}
        assert [log.id_map.title(row) for row in (1, 2, 3, 4)] == ["One", "2", "3", "Four"]
    none = Interactions.from_frame({**columns, "title": np.full(5, NAN)}, title="title")
    assert none.item_titles is None
    years = Interactions.from_frame({**columns, "title": [1990, 2.5, [1], 3, 4]}, title="title")
    assert years.item_titles == {1: "3", 2: "2.5", 3: "[1]", 4: "4"}


DAYS = [datetime.date(2020, 1, 2), datetime.date(2020, 1, 1), datetime.date(1969, 1, 1)]
ARROW_TIMES: dict[str, tuple[Callable[[Any], Any], list[Any], str]] = {
    "text of dates": (lambda pa: pa.string(), ["2020-01-02", "2020-01-01T10:00:00Z"], "str"),
    "text of numbers": (lambda pa: pa.string(), ["5", "7.5"], "str"),
    "days": (lambda pa: pa.date32(), DAYS, "object"),
    "days in milliseconds": (lambda pa: pa.date64(), DAYS, "object"),
    "with a zone": (
        lambda pa: pa.timestamp("us", "Asia/Tokyo"),
        ["2020-01-02T00:00:00+09:00", "2020-01-01T10:00:00+09:00"],
        "datetime64[us, Asia/Tokyo]",
    ),
    "without": (lambda pa: pa.timestamp("ms"), ["2020-01-02", "2020-01-01"], "datetime64[ms]"),
    "integers": (lambda pa: pa.int32(), [7, 5], "int32"),
    "fractions": (lambda pa: pa.float32(), [7.5, 5], "float32"),
}


def test_columns_of_arrow_types() -> None:
    """Such times were told to be missing, all of them."""
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    for make, values, plain in ARROW_TIMES.values():
        dtype = pandas.ArrowDtype(make(pyarrow))
        values = pandas.to_datetime(values) if plain.startswith("datetime") else values
        logs = []
        for times in (pandas.Series(values, dtype=dtype), pandas.Series(values, dtype=plain)):
            rows = pandas.Series(range(len(values)))
            frame = pandas.DataFrame({"user": rows, "item": rows, "timestamp": times})
            logs.append(Interactions.from_frame(frame))
        assert logs[0].time.dtype == logs[1].time.dtype
        assert logs[0].time.tolist() == logs[1].time.tolist()
        frame["timestamp"] = pandas.Series([values[0], None, *values[2:]], dtype=dtype)
        refused(lambda frame=frame: Interactions.from_frame(frame), DataError,
                "^from_frame: time must not be missing, got 1 missing, the first in")  # fmt: skip
    for kind, ids in ((pyarrow.int64(), [2, 1]), (pyarrow.string(), ["b", "a"])):
        assert users_of(pandas.Series(ids, dtype=pandas.ArrowDtype(kind))) == sorted(ids)


def test_arrow_tables() -> None:
    pytest.importorskip("pandas")
    pyarrow = pytest.importorskip("pyarrow")
    columns = {
        "user": ["b", "a", "b"],
        "item": [3, 1, 2],
        "timestamp": DAYS,
        "title": ["x", None, "y"],
    }
    table = pyarrow.table({**columns, "genre": pyarrow.array(["n"] * 3).dictionary_encode()})
    plain = Interactions.from_frame(columns, title="title")
    for frame in (table, pyarrow.concat_tables([table[:1], table[1:]]), table.to_batches()[0]):
        log = Interactions.from_frame(frame, title="title")
        assert log.user_ids.tolist() == ["a", "b"]
        assert log.time is not None
        assert plain.time is not None
        assert log.time.tolist() == plain.time.tolist()
        assert log.item_titles == plain.item_titles == {2: "y", 3: "x"}
        assert Interactions.from_frame(frame, user="genre").user_ids.tolist() == ["n"]
    refused(lambda: Interactions.from_frame(table, time="when"), DataError,
            "^from_frame: column 'when' is missing; the columns are user, item, timestamp, "
            "title, genre$")  # fmt: skip
    twice = table.append_column("user", [["c", "d", "e"]])
    refused(lambda: Interactions.from_frame(twice), DataError,
            "^from_frame: df must have one column 'user', got several")  # fmt: skip


ONES = {"hit@1": np.ones(3)}
METRICS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    name: (call, error, text)
    for name, call, error, text in (
        ("NaN", lambda: metric_values([1, NAN, 3], [5]), ValueError,
         "metric_values: ranks must be whole numbers, got nan"),
        ("inf", lambda: metric_values([1, np.inf], [5]), ValueError,
         "metric_values: ranks must be whole numbers, got inf"),
        ("half", lambda: mean_metrics(np.array([1.5]), [5]), ValueError,
         r"mean_metrics: ranks must be whole numbers, got 1\.5"),
        ("text", lambda: metric_values(["1"], [5]), TypeError,
         "metric_values: ranks must be whole numbers, got dtype <U1"),
        ("bools", lambda: metric_values([True], [5]), TypeError,
         "metric_values: ranks must be whole numbers, got dtype bool"),
        ("no ranks", lambda: mean_metrics(None, [5]), TypeError,
         "mean_metrics: ranks must be whole numbers, got dtype object"),
        ("uneven", lambda: metric_values([[1], [1, 2]], [5]), TypeError,
         "metric_values: ranks must be a plain list, array or tensor, got"),
        ("empty tensor", lambda: mean_metrics(torch.ones(0), [5]), ValueError,
         "mean_metrics: ranks must hold at least one rank, got none"),
        ("rank 0", lambda: hit_at_k(np.array([0]), 5), ValueError,
         "hit_at_k: ranks must be at least 1, got 0"),
        ("fraction", lambda: metric_values([1], [2.5]), TypeError,
         r"metric_values: k must be an int, got 2\.5"),
        ("True", lambda: ndcg_at_k(np.array([1]), True), TypeError,
         "ndcg_at_k: k must be an int, got True"),
        ("k NaN", lambda: mrr_at_k(np.array([1]), NAN), TypeError,
         "mrr_at_k: k must be an int, got nan"),
        ("k text", lambda: metric_values([1], ["5"]), TypeError,
         "metric_values: k must be an int, got '5'"),
        ("ks text", lambda: metric_values([1], "5"), TypeError,
         "metric_values: ks must be a list of ints, got '5'"),
        ("ks", lambda: mean_metrics(np.array([1]), 5), TypeError,
         "mean_metrics: ks must be a list of ints, got 5"),
        ("no dict", lambda: bootstrap_interval(np.ones(3)), TypeError,
         "bootstrap_interval: values must be a dict of arrays"),
        ("no metrics", lambda: bootstrap_interval({}), ValueError,
         "bootstrap_interval: values must hold at least one metric, got none"),
        ("no targets", lambda: bootstrap_interval({"a": np.ones(0)}), ValueError,
         "bootstrap_interval: values must hold at least one target, got none"),
        ("lengths", lambda: bootstrap_interval({**ONES, "b": np.ones(2)}), ValueError,
         r"bootstrap_interval: values must have one length, got \{'hit@1': 3, 'b': 2\}"),
        ("text values", lambda: bootstrap_interval({"a": ["x"]}), TypeError,
         r"bootstrap_interval: values must be numbers \[n\], got <U1 \[1\] for a"),
        ("shape", lambda: bootstrap_interval({"a": np.ones((1, 2))}), TypeError,
         r"bootstrap_interval: values must be numbers \[n\], got float64 \[1, 2\] for a"),
        ("users", lambda: bootstrap_interval(ONES, np.arange(2)), ValueError,
         r"bootstrap_interval: users must be one for each target \[3\], got shape \[2\]"),
        ("users' shape", lambda: bootstrap_interval(ONES, np.ones((3, 1))), ValueError,
         r"bootstrap_interval: users must be one for each target \[3\], got shape \[3, 1\]"),
        ("users' types", lambda: bootstrap_interval(ONES, objects(1, "a", None)), TypeError,
         "bootstrap_interval: users must be of one type"),
        ("samples", lambda: bootstrap_interval(ONES, samples=1.5), TypeError,
         r"bootstrap_interval: samples must be an int, got 1\.5"),
        ("level", lambda: bootstrap_interval(ONES, level="a"), TypeError,
         "bootstrap_interval: level must be a number, got 'a'"),
        ("seed", lambda: bootstrap_interval(ONES, seed="a"), ValueError,
         "bootstrap_interval: seed must be an int of at least 0, got 'a'"),
    )
}  # fmt: skip


def test_arguments_of_metrics() -> None:
    for call, error, text in METRICS.values():
        refused(call, error, f"^{text}")
    values = metric_values(np.array([1.0, 7.0]), (k for k in (np.int64(5),)))
    assert {name: value.tolist() for name, value in values.items()} == {
        "hit@5": [1, 0],
        "ndcg@5": [1, 0],
        "mrr@5": [1, 0],
    }
    assert bootstrap_interval({"a": [1, 1]}, ["x", "y"]) == {"a": [1.0, 1.0]}  # type: ignore[list-item, arg-type]


@pytest.mark.parametrize(
    "k", [iter((5, 10)), np.array([10, 5]), {5, 10}, range(5, 11, 5), (np.int64(5), 10, 5)]
)
def test_cut_offs_of_any_kind(k: Any) -> None:
    """A generator left no metric at all, an array had NumPy complain."""
    model, data = catalogue()
    result = evaluate(model, Targets.last_of(data), k=k, bootstrap=0, baselines={}, progress=False)
    assert [name for name in result["mean"] if "/" not in name] == [
        f"{name}@{cut}" for cut in (5, 10) for name in ("hit", "ndcg", "mrr")
    ]


@pytest.mark.parametrize("k", [5, np.array(5), [], iter(()), "5", None, [0], [True], [2.5]])
def test_cut_offs_that_are_none(k: Any) -> None:
    model, data = catalogue()
    refused(lambda: evaluate(model, Targets.last_of(data), k=k), ValueError,
            "^evaluate: k must be cut-offs from 1, got")  # fmt: skip


def test_columns_of_large_cut_offs_stand_apart() -> None:
    model, data = catalogue()
    result = evaluate(model, Targets.last_of(data), k=[1, 10, 100_000], baselines=data)
    _, *blocks = format_table(result).split("\n\n")
    for block in blocks:
        _, head, *rows = block.splitlines()
        names = [f"{name}@{k}" for k in (1, 10, 100_000) for name in ("hit", "ndcg", "mrr")]
        assert head.split() == names
        assert {len(row) for row in rows} == {len(head)}


def catalogue() -> tuple[Any, Sequences]:
    return small_model().eval(), Sequences.from_lists([[1, 2], [3]], 11)


def test_users_of_recommendations() -> None:
    model, data = catalogue()
    plain = recommend_for_users(model, data, [0, 1], k=2)
    assert recommend_for_users(model, data, (user for user in (0, 1)), k=2) == plain
    assert recommend_for_users(model, data, np.arange(2), k=2) == plain
    history = recommend_for_items(model, data.id_map, iter([1, 2]), k=2)
    assert [line["item"] for line in history] == [line["item"] for line in plain[:2]]
    for wrong in (5, None, "0", np.array(0)):
        refused(lambda wrong=wrong: recommend_for_users(model, data, wrong), TypeError,
                "^recommend_for_users: users must be a list of raw ids, got")  # fmt: skip
        refused(lambda wrong=wrong: recommend_for_items(model, data.id_map, wrong), TypeError,
                "^recommend_for_items: items must be a list of raw ids, got")  # fmt: skip


def test_options_of_recommendations() -> None:
    model, data = catalogue()
    for wrong in ("nonsense", None, 2, np.ones(2)):
        refused(lambda wrong=wrong: recommend_for_users(model, data, [0], exclude_seen=wrong),
                ValueError, "^recommend: exclude_seen must be True, False or 'auto', ")  # fmt: skip
    for k in (2.5, True, "5", None):
        refused(lambda k=k: recommend_for_users(model, data, [0], k), TypeError,
                "^recommend: k must be an int, got")  # fmt: skip


def test_items_beyond_int32() -> None:
    for item in (2**31, 2**62, 2**63, 2**64 - 1):
        refused(lambda item=item: Sequences.from_lists([[1], [item]]), DataError,
                rf"^Sequences\.from_lists: items must be below 2\*\*31, got {item}$")  # fmt: skip


LOG = Interactions.from_frame({"user": [5, 7, 5], "item": ["a", "b", "b"], "timestamp": [1, 2, 3]})


def test_bounds_that_leave_nothing() -> None:
    refused(lambda: LOG.filter(max_user=0), DataError,
            r"got 0 of 2 \(users of 1\.\.0 events, items of 1 or more\)$")  # fmt: skip


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"time": np.array([1, NAN, 3])}, "time must be finite, got nan in row 1"),
        ({"time": np.array([1, 2, np.inf])}, "time must be finite, got inf in row 2"),
        ({"time": np.array(["1", "2", "3"])}, "time must be numbers, got dtype <U1"),
        ({"time": objects(1, 2, 3)}, "time must be numbers, got dtype object"),
        ({"user_ids": np.array([5, 5])}, "user_ids must ascend, each of them once, got 5 after 5"),
        ({"user_ids": np.array([7, 5])}, "user_ids must ascend, each of them once, got 5 after 7"),
        (
            {"item_ids": np.array(["b", "b"])},
            "item_ids must ascend, each of them once, got 'b' after 'b'",
        ),
    ],
)
def test_logs_made_by_hand(change: dict[str, Any], text: str) -> None:
    refused(lambda: replace(LOG, **change), DataError, f"^Interactions: {text}$")


@pytest.mark.parametrize("items", ["1,,2", ",1", "1,2,", "1, ,2"])
def test_empty_ids_of_a_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], items: str
) -> None:
    model = small_model()
    model.id_map = IdMap(np.arange(2), np.arange(11))
    model.save_pretrained(tmp_path)
    assert main(["recommend", "--model", str(tmp_path), "--items", items]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    text = f"recommend: --items must be ids with a comma between two, got {items!r}"
    assert line.endswith(text)


DAY = datetime.datetime(2020, 1, 1)
NANOSECONDS = 1577836800 * 10**9


@pytest.mark.parametrize(
    "times",
    [
        [DAY, DAY],
        objects(DAY, DAY),
        objects(DAY.date(), "2020-01-01"),
        objects(pd.Timestamp(DAY), np.datetime64("2020-01-01")),
        pd.Series([DAY, DAY], dtype=object),
        objects(pd.Timestamp(DAY, tz="UTC"), "2020-01-01T09:00:00+09:00"),
    ],
    ids=range(6),
)
def test_dates_among_objects(times: Any) -> None:
    columns = {"user": [1, 1], "item": [1, 2], "timestamp": times}
    assert Interactions.from_frame(columns).time.tolist() == [NANOSECONDS] * 2


@pytest.mark.parametrize(
    ("times", "text"),
    [
        ([DAY, None], "time must not be missing, got 1 missing, the first in row 1"),
        (objects(pd.NaT, pd.Timestamp(DAY)), "time must not be missing, got 1 missing, the first"),
        (objects(1, DAY), "time must be all numbers or all dates, got 1 in row 0"),
        ("12", "column 'timestamp' must be an array, got '12'"),
    ],
)
def test_times_that_are_none(times: Any, text: str) -> None:
    with pytest.raises(DataError, match=f"^from_frame: {text}"):
        Interactions.from_frame({"user": [1, 1], "item": [1, 2], "timestamp": times})


@pytest.mark.parametrize("raw", [objects([1], [2, 3]), objects([5]), objects(np.arange(2), 5)])
def test_lists_among_ids_are_unknown(raw: Any) -> None:
    id_map = IdMap(np.arange(3), np.array([5, 6, 7]))
    with pytest.raises(DataError, match=r"^encode_items: item must be a known id, got"):
        id_map.encode_items(raw)
