"""Columns of every kind: `Interactions.from_frame`, its id map, histories, splits; metrics.

Every column is made of values whose ids, times and titles plain Python knows: what is accepted must
be these, row by row, and what is done with them is done again in plain Python.
"""

from __future__ import annotations

import datetime
import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from recgrela_ext import DataError, IdMap, Interactions
from recgrela_ext.data.order import ORDERS
from recgrela_ext.evaluation.metrics import bootstrap_interval, metric_values
from tests.fuzz.draw import INTERESTING, REFUSED, Draw, one_line

Value = Any
Column = tuple[Any, "list[Value] | None"]  # what is given, what it means; None: must be refused

INTS: tuple[tuple[str, Callable[[list[int]], Any]], ...] = (
    ("list", list), ("tuple", tuple), ("int64", lambda x: np.array(x, np.int64)),
    ("uint64", lambda x: np.array(x, np.uint64)), ("int8", lambda x: np.array(x, np.int8)),
    ("big-endian", lambda x: np.array(x, ">i8")), ("object", lambda x: np.array(x, object)),
    ("series", pd.Series), ("nullable", lambda x: pd.Series(x, dtype="Int64")),
    ("nullable small", lambda x: pd.Series(x, dtype="UInt8")),
    ("category", lambda x: pd.Series(x).astype("category")), ("tensor", torch.tensor),
    ("arrow", pa.array), ("chunks", lambda x: pa.chunked_array([x[:1], x[1:]])),
    ("arrow series", lambda x: pd.Series(x, dtype="int64[pyarrow]")), ("index", pd.Index),
    ("masked", np.ma.array), ("strided", lambda x: np.repeat(np.array(x), 2)[::2]),
    ("arrow words", lambda x: pa.array(x).dictionary_encode()),
    ("objects of numpy", lambda x: np.array([np.int64(one) for one in x] + [None], object)[:-1]),
)  # fmt: skip
TEXTS: tuple[tuple[str, Callable[[list[str]], Any]], ...] = (
    ("list", list), ("tuple", tuple), ("U", np.array), ("object", lambda x: np.array(x, object)),
    ("series", pd.Series), ("string", lambda x: pd.Series(x, dtype="string[python]")),
    ("arrow string", lambda x: pd.Series(x, dtype="string[pyarrow]")), ("arrow", pa.array),
    ("category", lambda x: pd.Series(x).astype("category")), ("index", pd.Index),
    ("large", lambda x: pa.array(x, pa.large_string())),
    ("words", lambda x: pa.array(x).dictionary_encode()),
    ("variable", lambda x: np.array(x, np.dtypes.StringDType())),
    ("chunks", lambda x: pa.chunked_array([x[:1], x[1:]])),
    ("bytes", lambda x: np.array([one.encode() for one in x])),
    ("list of bytes", lambda x: [one.encode() for one in x]),
    ("one object", lambda x: pd.Series(x, dtype=object)),
)  # fmt: skip
BYTES = ("bytes", "list of bytes")
WORDS = ("a", "b", "ab", "0", "7", "007", "7.0", "nan", "None", "é", " a", "A", "x" * 256)
ODD_WORDS = ("", "a\t", "a\n", "a\0", "\ud800", "x" * 257)
WHOLE = (0, 1, 2, 7, 64, 255, 2**24 + 1, 2**31, 2**53 - 1, 2**53 + 1, 2**63 - 1)
FLOAT_TYPES = (np.float16, np.float32, np.float64, np.longdouble)
UNITS = {"D": 86400 * 10**9, "h": 3600 * 10**9, "m": 60 * 10**9, "s": 10**9, "ms": 10**6,
         "us": 10**3, "ns": 1}  # fmt: skip
ZONES = (None, "UTC", "Asia/Tokyo", "Europe/Berlin")
EPOCH = datetime.datetime(1970, 1, 1)


class Perhaps(list[Value]):
    """What a column means if it is taken; it may be refused as well."""


def mixture(values: list[Value]) -> list[Value] | None:
    """Whole numbers of any kind are numbers; beside text they may be text; nothing else may be."""
    if any(isinstance(one, bool) or not isinstance(one, (int, float, str)) for one in values):
        return None
    texts = [one for one in values if isinstance(one, str)]
    numbers = [one for one in values if not isinstance(one, str)]
    if not all(math.isfinite(one) and one == one // 1 for one in numbers):
        return None
    whole = [one if isinstance(one, str) else int(one) for one in values]
    if texts:
        fit = all(one and one.isprintable() and len(one) <= 256 for one in texts)
        return Perhaps(map(str, whole)) if fit else None
    # as floats, if one of them is a float: from 2**53 on two neighbours may be one
    most = 2**63 if all(isinstance(one, int) for one in values) else 2**53
    return Perhaps(whole) if all(0 <= one < most for one in whole) else None


def holes(draw: Draw, values: list[Value]) -> list[Value]:
    """One of them missing."""
    place = draw.below(len(values))
    gap = draw.one_of([None, float("nan"), pd.NA, pd.NaT, np.datetime64("NaT")])
    return [*values[:place], gap, *values[place + 1 :]]


def masked(draw: Draw, values: list[Value]) -> Any:
    places = [draw.flag() for _ in values]
    return np.ma.array(values, mask=[*places[:-1], True])


def ids(draw: Draw, rows: int) -> Column:
    kind = (*range(10), *(0, 1, 2, 3, 4) * 2)[draw.below(20)]
    if kind < 3:
        few = [draw.one_of(WHOLE[: 1 + draw.below(len(WHOLE))]) for _ in range(rows)]
        return made(draw.one_of(INTS)[1], few), list[Value](few)
    if kind < 5:
        texts = [draw.one_of(WORDS) for _ in range(rows)]
        if draw.below(8) == 0:
            texts[draw.below(rows)] = draw.one_of(ODD_WORDS)
        form, make = draw.one_of(TEXTS)
        odd = any(one in ODD_WORDS for one in texts)
        # An array of NumPy holds no zero at the end of a text: that is "a" before we see it.
        if form == "U" or (form == "bytes" and all(map(str.isascii, texts))):
            cut = Perhaps(one.rstrip("\0") for one in texts)
            return make(texts), None if {*texts} & {*ODD_WORDS} - {"a\0"} else cut
        if odd or (form in BYTES and not all(map(str.isascii, texts))):
            return made(make, texts), None
        known = list[Value](texts)
        return made(make, texts), Perhaps(known) if form in BYTES else known
    if kind == 5:
        dtype, bits = draw.one_of(((np.float16, 11), (np.float32, 24), (np.float64, 53)))
        whole = [one for one in (*WHOLE, 2047, 2048) if draw.below(8) == 0 or one < 2**bits]
        floats = np.array([draw.one_of(whole) for _ in range(rows)], np.float64)
        array = np.minimum(floats, float(np.finfo(dtype).max)).astype(dtype)
        if draw.below(4) == 0:
            array[draw.below(rows)] = draw.one_of([0.5, -1, np.nan, np.inf, -np.inf])
        wide = array.astype(np.float64)  # from 2**bits on, two neighbours may be one
        good = bool(np.all((wide >= 0) & (wide < 2.0**bits) & (wide == np.floor(wide))))
        given = pd.Series(array) if draw.flag() else array
        return given, [int(one) for one in array] if good else None
    if kind == 6:
        few = [draw.one_of(WHOLE[:6]) for _ in range(rows)]
        values = [str(one) for one in few] if draw.flag() else few
        gaps = holes(draw, list[Value](values))
        forms = (list, lambda x: np.array(x, object), pd.Series, lambda x: masked(draw, values))
        return draw.one_of(forms)(gaps), None
    if kind == 7:
        choices = INTERESTING if draw.flag() else (0, 1, 7, 7.0, "a", "7", "é", 2**31)
        some = [draw.one_of(choices) for _ in range(rows)]
        return (some if draw.flag() else objects(some)), mixture(some)
    others = (
        [True] * rows, np.zeros(rows, bool), np.zeros(rows, complex), np.zeros((rows, 2), int),
        np.zeros(rows, "M8[s]"), np.zeros(rows, "m8[s]"), [[1]] * rows, [{}] * rows,
        [-1] * rows, np.full(rows, 2**63, np.uint64), [2**64] * rows, torch.ones(rows, 1),
        pd.Series([True] * rows, dtype="boolean"), np.zeros(rows, [("a", int)]), [b"\xff"] * rows,
        torch.zeros(rows, device="meta"), torch.zeros(rows, dtype=torch.bfloat16) + 0.5,
        pd.Series([datetime.date(2020, 1, 1)] * rows), pa.array([[1]] * rows), "a" * rows, 3, None,
    )  # fmt: skip
    return draw.one_of(others), None


def made(make: Callable[[Any], Any], values: list[Any]) -> Any:
    """The column, or a list where this kind of column cannot hold the values."""
    try:
        return make(values)
    except (OverflowError, TypeError, ValueError, pa.ArrowException):
        return values


def objects(values: Sequence[Value]) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = [*values]
    return array


def times(draw: Draw, rows: int) -> Column:
    kind = draw.below(9)
    small = [draw.one_of([0, 1, 2, 3, -1, 100, 2**31, 2**40]) for _ in range(rows)]
    if kind < 2:
        form, make = draw.one_of(INTS)
        values = [abs(one) % 100 if "8" in form or "small" in form else one for one in small]
        if form == "uint64":
            values = [abs(one) for one in values]
        return made(make, values), list[Value](values)
    if kind == 2:
        dtype = draw.one_of(FLOAT_TYPES[:3])
        array = np.array([draw.one_of([0.5, 1.0, 1.5, -2.25, 64.0]) for _ in range(rows)], dtype)
        if draw.below(4) == 0:
            array[draw.below(rows)] = draw.one_of([np.nan, np.inf, -np.inf])
        good = bool(np.isfinite(array).all())
        given = draw.one_of([np.array, pd.Series, torch.tensor, list])(array)
        return given, [float(one) for one in array] if good else None
    counts = [draw.below(200) for _ in range(rows)]
    if kind < 5:
        unit = draw.one_of(sorted(UNITS))
        stamps = np.array(counts, f"M8[{unit}]")
        known = [one * UNITS[unit] for one in counts]
        zone = draw.one_of(ZONES)
        if zone is not None:
            return pd.Series(stamps).dt.tz_localize("UTC").dt.tz_convert(zone), known
        if draw.flag():
            nanos = stamps.astype("M8[ns]")
            kind = pa.timestamp("ns", draw.one_of([None, "UTC", "Asia/Tokyo"]))
            arrow = pa.array(nanos, pa.timestamp("ns")).cast(kind)
            return (pd.Series(arrow, dtype=pd.ArrowDtype(kind)) if draw.flag() else arrow), known
        return (pd.Series(stamps) if draw.flag() else stamps), known
    moments = [EPOCH + datetime.timedelta(hours=one) for one in counts]
    known = [one * UNITS["h"] for one in counts]
    if kind == 5:
        form = draw.below(5)
        if form == 1:
            return [one.isoformat() for one in moments], known
        if form < 4:
            if form == 3:
                return holes(draw, moments), None
            return (objects([pd.Timestamp(one) for one in moments]) if form else moments), known
        return pd.Series([one.isoformat() + "+09:00" for one in moments]), [
            one - 9 * UNITS["h"] for one in known
        ]
    if kind == 6:
        texts = [str(one) for one in small]
        return draw.one_of([list, np.array, pd.Series])(texts), list[Value](small)
    if kind == 7:
        return draw.one_of([list, objects, lambda x: pd.Series(x, dtype="Int64")])(
            [*small[:-1], None]
        ), None
    others = (
        ["x"] * rows, [b"\xff"] * rows, np.zeros(rows, "m8[s]"), np.zeros(rows, complex),
        [[1]] * rows, np.full(rows, 2**63, np.uint64), np.array([None] * rows),
        pd.Series([""] * rows),
        np.full(rows, "NaT", "M8[s]"), np.array(["9999-01-01"] * rows, "M8[D]"),
        5, torch.ones(rows, 2), np.zeros((rows, 1)), "1" * rows, [{}] * rows,
        masked(draw, [1] * rows),
    )  # fmt: skip
    other = draw.one_of(others)
    return other, None


def titles(draw: Draw, rows: int) -> tuple[Any, list[Value]]:
    known: list[Value] = [draw.one_of(["One", "Two", "é", ""]) for _ in range(rows)]
    if draw.flag():
        known = [draw.one_of([one, one, None, float("nan"), pd.NA]) for one in known]
        return draw.one_of([list, objects])(known), known
    return draw.one_of([list, objects, np.array, pd.Series])(known), known


def refused(error: Exception, *begins: str) -> None:
    one_line(error)
    assert str(error).startswith(begins), f"not ours: {error}"


class Frames:
    """Rows, columns, options; then what is done with the log."""

    def __init__(self, folder: Path) -> None:
        pass

    def __call__(self, data: bytes) -> str:
        draw = Draw(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if draw.below(8) == 0:
                return self.metrics(draw)
            return self.frame(draw)

    def frame(self, draw: Draw) -> str:
        rows = 1 + draw.below(16)
        (users, raw_users), (items, raw_items) = ids(draw, rows), ids(draw, rows)
        columns = {"user": users, "item": items}
        order = draw.one_of(ORDERS)
        options: dict[str, Any] = {"order": order, "seed": draw.below(3), "time": None}
        at: list[Value] | None = [0] * rows
        if order != "file" or draw.flag():
            columns["timestamp"], at = times(draw, rows)
            options["time"] = "timestamp"
        named = None
        if draw.below(4) == 0:
            columns["title"], named = titles(draw, rows)
            options["title"] = "title"
        frame: Any = columns
        if draw.below(4) == 0 and not any(isinstance(x, (str, int)) for x in columns.values()):
            try:
                frame = pd.DataFrame(columns)
            except Exception:  # what pandas does not hold
                return REFUSED
        if draw.below(8) == 0:
            options[draw.one_of(["order", "seed", "time", "title", "user", "item"])] = draw.value()
            at = None if options["time"] != "timestamp" else at
            odd = True
        else:
            odd = False
        try:
            log = Interactions.from_frame(frame, **options)
        except DataError as error:
            refused(error, "from_frame: ", "Interactions: ")
            told = str(error)
        else:
            told = ""
        if told:
            sure = not odd and all(type(one) is list for one in (raw_users, raw_items, at))
            assert not sure, f"refused {columns}: {told}"
            return REFUSED
        if odd:
            return "frame, odd options"
        assert raw_users is not None, f"took {users!r} as users"
        assert raw_items is not None, f"took {items!r} as items"
        assert at is not None, f"took {columns.get('timestamp')!r} as times"
        self.columns(log, raw_users, raw_items, at, options["time"] is not None)
        if named is not None:
            self.titles(log.id_map, raw_items, named)
        self.id_map(draw, log.id_map, raw_users, raw_items)
        self.histories(log)
        done = [self.leave_one_out(log), self.by_time(draw, log), self.filtered(draw, log)]
        return " ".join(["frame,", *filter(None, done)])

    @staticmethod
    def columns(
        log: Interactions, users: list[Value], items: list[Value], at: list[Value], timed: bool
    ) -> None:
        """As given, row by row; ids ascending and each once."""
        assert log.user_ids[log.user].tolist() == users
        assert log.item_ids[log.item].tolist() == items
        for found in (log.user_ids.tolist(), log.item_ids.tolist()):
            assert found == sorted(set(found))
        if timed:
            assert log.time is not None
            assert log.time.tolist() == at, f"{log.time.tolist()}, not {at}"

    @staticmethod
    def titles(id_map: IdMap, items: list[Value], named: list[Value]) -> None:
        """The last one that is there, or else the id."""
        last: dict[Value, str] = {raw: str(raw) for raw in items}
        pairs = zip(items, named, strict=True)
        last |= {raw: title for raw, title in pairs if isinstance(title, str) and title}
        for raw, title in last.items():
            assert id_map.title(int(id_map.encode_items([raw])[0])) == title

    @staticmethod
    def id_map(draw: Draw, id_map: IdMap, users: list[Value], items: list[Value]) -> None:
        rows = id_map.encode_items(items)
        assert id_map.decode_items(rows).tolist() == items
        assert id_map.user_ids[id_map.encode_users(users)].tolist() == users
        again = IdMap.from_json(id_map.to_json())
        assert again.user_ids.tolist() == id_map.user_ids.tolist()
        assert again.item_ids.tolist() == id_map.item_ids.tolist()
        other = draw.one_of([draw.value(), *WORDS, *WHOLE])
        asked = draw.one_of([other, [other], objects([other])])
        try:
            found = id_map.encode_items(asked)
        except DataError as error:
            refused(error, "encode_items: ")
            assert not any(type(other) is type(one) and other == one for one in items)
        else:
            for one in id_map.decode_items(found).flat:
                got = one.item() if isinstance(one, np.generic) else one
                values = other if isinstance(other, list) else [other]
                flat = np.array(values, object).reshape(-1).tolist()
                # a number as text and the other way round
                assert any(got == x or str(got) == str(x) for x in flat), (
                    f"{other!r} became {got!r}"
                )
        for row in (0, id_map.num_items + 1, -1):
            try:
                id_map.decode_items([row])
            except DataError as error:
                refused(error, "decode_items: ")
            else:
                raise AssertionError(f"row {row} has an id")

    @staticmethod
    def histories(log: Interactions) -> None:
        """Every row once, user by user, in time order; what ties is as the rule says."""
        order = log.order_rows(warn=False).tolist()
        assert sorted(order) == list(range(len(log)))
        keys: list[tuple[Any, ...]] = []
        for row in order:
            time: Any = 0 if log.time is None else log.time[row]
            if log.order == "recbole_float32":
                time = np.float32(time)
            ties = {"file": row, "recbole_float32": row, "item_id": int(log.item[row])}
            rule = ties.get(log.order, 0)
            keys.append((int(log.user[row]), *(() if log.order == "shuffled" else (time, rule))))
        assert keys == sorted(keys)
        found = log.sequences()
        assert found.items.tolist() == (log.item[order] + 1).tolist()
        assert found.lengths.tolist() == np.bincount(log.user, minlength=log.num_users).tolist()
        assert int(found.lengths.sum()) == len(log)

    @staticmethod
    def leave_one_out(log: Interactions) -> str:
        whole = log.sequences()
        lengths = whole.lengths.tolist()
        try:
            train, valid, test = log.leave_one_out()
        except DataError as error:
            refused(error, "leave_one_out: ")
            assert max(lengths) < 2
            return ""
        for least, targets in ((2, test), (3, valid)):
            chosen = [u for u, n in enumerate(lengths) if n >= least]
            assert targets.user.tolist() == chosen
            assert dict(targets.dropped) == {"short_users": len(lengths) - len(chosen)}
            for number, user in enumerate(chosen):
                events = whole.history(user).tolist()
                assert targets.target_items[number] == events[1 - least]
                assert targets.history(number).tolist() == events[: 1 - least]
        for user, n in enumerate(lengths):
            kept = whole.history(user).tolist()[: n - (n > 1) - (n > 2)]
            assert train.history(user).tolist() == kept
        assert len(train.items) + len(valid) + len(test) == len(log)
        return "left out"

    @staticmethod
    def by_time(draw: Draw, log: Interactions) -> str:
        shares = draw.one_of([(0.8, 0.1, 0.1), (0.5, 0.25, 0.25), (0.34, 0.33, 0.33)])
        if draw.below(8) == 0:
            shares = (draw.value(), *shares[1:])
        targets = draw.one_of(["all", "first", "last", draw.value()])
        try:
            train, *parts = log.split_by_time(*shares, targets)
        except DataError as error:
            refused(error, "split_by_time: ")
            return ""
        dropped = dict(parts[0].dropped)
        assert dropped["cold_events"] == dict(parts[1].dropped)["cold_events"]
        counted = len(train.items) + dropped["cold_events"]
        for part in parts:
            assert (np.diff(part.user) >= 0).all()
            for number in range(len(part)):
                assert len(part.history(number)) > 0
            if targets == "all":
                counted += len(part) + part.dropped["no_history"]
            else:
                assert len(set(part.user.tolist())) == len(part)
        if targets == "all":
            assert counted == len(log)
        assert set(train.items.tolist()) == set(range(1, train.num_items + 1))
        return "split"

    @staticmethod
    def filtered(draw: Draw, log: Interactions) -> str:
        names = ("min_user", "max_user", "min_item", "max_item")
        bounds: dict[str, Any] = {n: draw.below(4) for n in names if draw.flag()}
        if draw.below(4) == 0:
            bounds["k_core"] = (draw.below(3), draw.below(3))
        odd = bool(bounds) and draw.below(8) == 0
        if odd:
            bounds[draw.one_of(sorted(bounds))] = draw.value()
        events = list(zip(log.user.tolist(), log.item.tolist(), strict=True))
        left = range(len(events)) if odd else survivors(events, **bounds)
        try:
            found = log.filter(**bounds)
        except DataError as error:
            refused(error, "filter: ")
            assert odd or not left
            return ""
        if not odd:
            for ids, codes, before, old in (
                (found.user_ids, found.user, log.user_ids, log.user),
                (found.item_ids, found.item, log.item_ids, log.item),
            ):
                assert ids[codes].tolist() == [before[old[row]].item() for row in left]
                assert ids.tolist() == sorted(set(ids[codes].tolist()))
            if log.time is not None:
                assert found.time is not None
                assert found.time.tolist() == [log.time[row].item() for row in left]
        return "filtered"

    @staticmethod
    def metrics(draw: Draw) -> str:
        count = draw.below(7)
        pool: list[Value] = [1, 2, 3, 10, 1000, 2**31, 2**62]
        ranks: list[Value] = [draw.one_of(pool) for _ in range(count)]
        cuts: list[Value] = [draw.one_of([1, 2, 5, 10, 2**31 - 1]) for _ in range(draw.below(3))]
        odd = False
        if draw.below(4) == 0:
            odd = True
            wrong: list[Value] = [0, -1, float("nan"), None, "a", 1.5, float("inf")]
            if ranks and cuts and draw.flag():
                ranks[draw.below(count)] = draw.one_of(wrong)
            else:
                cuts.append(draw.one_of([*wrong, True, [1], 2**31]))
        dtype = draw.one_of([None, np.int64, np.int32, np.float64])
        fits = odd or dtype is not np.int32 or all(one < 2**31 for one in ranks)
        given: Any = ranks if odd or dtype is None or not fits else np.array(ranks, dtype)
        try:
            values = metric_values(given, cuts)
        except (ValueError, TypeError) as error:
            refused(error, "metric_values: ")
            assert odd
            return REFUSED
        assert not odd, f"took {ranks} and {cuts}"
        for k in cuts:
            hits = [float(rank <= k) for rank in ranks]
            gains = [hit / math.log2(rank + 1) for hit, rank in zip(hits, ranks, strict=True)]
            shares = [hit / rank for hit, rank in zip(hits, ranks, strict=True)]
            for name, plain in (("hit", hits), ("ndcg", gains), ("mrr", shares)):
                assert np.allclose(values[f"{name}@{k}"], plain, 1e-12, 0), f"{name}@{k}"
        if not cuts:
            return "metrics"
        owners = [draw.below(3) for _ in ranks] if draw.flag() else None
        options = {
            "samples": draw.below(5),
            "level": draw.one_of([0.5, 0.95, 0.999, 0.0, 1.0, 2.0]),
        }
        users = None if owners is None else np.array(owners)
        try:
            bounds = bootstrap_interval(values, users, **options)
        except ValueError as error:
            refused(error, "bootstrap_interval: ")
            assert not ranks or options["samples"] < 1 or not 0 < options["level"] < 1
            return "metrics"
        for name, (low, high) in bounds.items():
            least, most = min(values[name]) - 1e-9, max(values[name]) + 1e-9
            assert least <= low <= high <= most, f"{name}: {low}, {high}"
        return "metrics, intervals"


def survivors(
    events: list[tuple[int, int]],
    k_core: tuple[int, int] = (1, 1),
    min_user: int = 1,
    max_user: int | None = None,
    min_item: int = 1,
    max_item: int | None = None,
) -> list[int]:
    """Rows that stay, in plain Python."""
    least = max(min_user, k_core[0]), max(min_item, k_core[1])
    most = tuple(math.inf if one is None else one for one in (max_user, max_item))
    rows = list(range(len(events)))
    while True:
        counts = [Counter(events[row][side] for row in rows) for side in (0, 1)]
        stay = [
            row
            for row in rows
            if all(least[s] <= counts[s][events[row][s]] <= most[s] for s in (0, 1))
        ]
        if stay == rows:
            return rows
        rows = stay
