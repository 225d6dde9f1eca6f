"""Read files into compact columns, chunk by chunk: memory grows with the events, not the text."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from recgrela_ext.arguments import as_path
from recgrela_ext.data.formats import FORMATS, Source, resolve
from recgrela_ext.data.ids import IdEncoder, column_ids, compact, lone_surrogate
from recgrela_ext.data.optional import import_pandas, import_parquet, parquet_errors
from recgrela_ext.data.ranks import UserTimes
from recgrela_ext.data.text import TextSource
from recgrela_ext.data.times import TimeColumn
from recgrela_ext.data.titles import read_titles
from recgrela_ext.errors import DataError, shown

__all__ = ["FORMATS", "Columns", "read_columns"]

CHUNK_ROWS = 1 << 19
_BEYOND = "\0beyond"  # no column has a name with a zero byte
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_NO_TIME = ["", "nan", "NaN", "NA", "N/A", "null", "NULL", "None", "inf", "-inf"]


@dataclass(frozen=True, eq=False)
class Columns:
    """What a file holds: int32 codes, int64 or float64 time or None, ascending raw ids.

    ``time_is_rank`` as of `Interactions`: True where rows that `keep` dropped tell it.
    """

    user: np.ndarray
    item: np.ndarray
    time: np.ndarray | None
    user_ids: np.ndarray
    item_ids: np.ndarray
    item_titles: dict[int | str, str] | None
    name: str
    time_is_rank: bool | None


@dataclass
class _Part:
    """One chunk. ``user`` and ``item`` are (raw ids, code of every row)."""

    user: tuple[Any, np.ndarray]
    item: tuple[Any, np.ndarray]
    time: np.ndarray | None


def read_columns(
    path: str | os.PathLike[str],
    format: str = "auto",
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
    *,
    order: str = "hash",
    progress: bool | None = None,
    keep: Mapping[str, Any] | None = None,
) -> Columns:
    """The events of a file or folder; arguments as in ``Interactions.from_file``.

    Raises:
        DataError: anything wrong with the file, in one line.
    """
    source = resolve(as_path(path, "from_file"), format, user, item, time, order)
    where = f"from_file: {source.paths[0].name}"
    chosen = _chosen(keep)
    for column in chosen:
        if column not in source.columns or source.format == "netflix":
            raise DataError(
                f"{where}: column {column!r} is missing; "
                f"the columns are {', '.join(source.columns)}"
            )
    everything = UserTimes()
    read = {"parquet": _parquet_parts, "netflix": _netflix_parts}.get(source.format, _text_parts)
    parts = read(source, where, chosen, progress, everything)
    users, items = IdEncoder("user", where), IdEncoder("item", where)
    times: list[np.ndarray] = []
    for part in parts:
        users.add(*part.user)
        items.add(*part.item)
        if part.time is not None:
            times.append(part.time)
    numbers = source.format != "parquet"
    user_ids, user_codes = users.finish(parse_numbers=numbers)
    item_ids, item_codes = items.finish(parse_numbers=numbers)
    if not len(user_codes):
        kept = " left by keep=" if chosen else ""
        raise DataError(f"{where} must hold events{kept}, got a file without any")
    return Columns(
        user_codes,
        item_codes,
        np.concatenate(times) if source.time is not None else None,
        user_ids,
        item_ids,
        read_titles(source, item_ids),
        source.name,
        everything.number_events() or None,
    )


def _chosen(keep: Any) -> dict[str, set[str]]:
    if keep is not None and not isinstance(keep, Mapping):
        raise DataError(f"from_file: keep must be a dict, column name to values, got {shown(keep)}")
    chosen = {}
    for name, values in (keep or {}).items():
        if not isinstance(values, (str, Iterable)):
            raise DataError(
                f"from_file: keep must have a list of values for column {name!r}, "
                f"got {shown(values)}"
            )
        chosen[name] = {values} if isinstance(values, str) else {str(one) for one in values}
        lone = lone_surrogate(chosen[name])
        if lone is not None:
            raise DataError(f"from_file: keep must hold UTF-8 text, got {lone!r} in a value")
    return chosen


def _text_parts(
    source: Source,
    where: str,
    keep: Mapping[str, set[str]],
    progress: bool | None,
    everything: UserTimes,
) -> Iterator[_Part]:
    keep = {name: {value.strip() for value in values} for name, values in keep.items()}
    wanted = [source.user, source.item, *keep]
    types = dict.fromkeys(wanted, "str")
    times = TimeColumn(where)
    if source.time is not None:
        wanted.append(source.time)
    for chunk in _chunks(source, wanted, types, progress):
        lines = chunk.index.to_numpy() + (2 if source.header else 1)
        time = None
        if source.time is not None:
            time = times.add(chunk[source.time], int(lines[0]), "line")
        if keep:
            if time is not None:
                everything.add(*_texts(chunk[source.user], where), time)
            rows = np.ones(len(chunk), dtype=bool)
            for name, values in keep.items():
                texts, codes = _texts(chunk[name], where)
                # The last: a row too short for the column.
                rows &= np.array([*(text in values for text in texts), False])[codes]
            chunk, lines = chunk[rows], lines[rows]
            time = None if time is None else time[rows]
        yield _Part(
            _codes(chunk[source.user], "user", where, lines),
            _codes(chunk[source.item], "item", where, lines),
            time,
        )


def _netflix_parts(
    source: Source,
    where: str,
    keep: Mapping[str, set[str]],
    progress: bool | None,
    everything: UserTimes,
) -> Iterator[_Part]:
    """Lines ``movie:`` followed by lines ``user,rating,date`` of that movie."""
    movie: str | None = None
    types = {"user": "str", "date": "str"}
    for chunk in _chunks(source, ["user", "date"], types, progress):
        lines = chunk.index.to_numpy() + 1
        names, codes = _codes(chunk["user"], "user", where, lines)
        is_movie = np.array([str(name).endswith(":") for name in names], dtype=bool)
        head = is_movie[codes]
        heads = np.flatnonzero(head)
        movies = [movie, *(names[codes[row]][:-1].rstrip() for row in heads)]
        block = np.cumsum(head)[~head]
        movie = movies[-1]
        if movies[0] is None and block.size and block[0] == 0:
            raise DataError(f"{where}: the first line must name a movie ('1:'), got a rating")
        dates, date_codes = _codes(chunk["date"][~head], "date", where, lines[~head])
        wrong = [date for date in dates if not _DAY.fullmatch(date)]
        try:
            days = np.array([] if wrong else dates, dtype="datetime64[D]").astype(np.int64)
        except ValueError:  # such as 2005-02-30
            wrong = dates
        if wrong:
            raise DataError(f"{where}: dates must read YYYY-MM-DD, got {wrong[0]!r}")
        start = int(block[0]) if block.size else 0
        yield _Part(
            _used(names, codes[~head]),
            _used([str(one) for one in movies[start:]], block - start),
            days[date_codes],
        )


def _used(names: list[str], codes: np.ndarray) -> tuple[Any, np.ndarray]:
    ids, codes = compact(codes, np.array(names, dtype=object))
    return ids.tolist(), codes


def _parquet_parts(
    source: Source,
    where: str,
    keep: Mapping[str, set[str]],
    progress: bool | None,
    everything: UserTimes,
) -> Iterator[_Part]:
    parquet = import_parquet(where)
    wanted = list(dict.fromkeys([source.user, source.item, *keep]))
    wanted += [source.time] if source.time is not None else []
    times = TimeColumn(where)
    first = 0
    with (
        parquet.ParquetFile(source.paths[0]) as file,
        tqdm(
            total=file.metadata.num_rows,
            unit=" rows",
            unit_scale=True,
            desc=source.name,
            disable=None if progress is None else not progress,
        ) as bar,
    ):
        for chunk in _parquet_chunks(file, wanted, where):
            numbers = np.arange(first, first + len(chunk))
            first += len(chunk)
            bar.update(len(chunk))
            time = None
            if source.time is not None:
                time = times.add(chunk[source.time], int(numbers[0]))
            if keep:
                rows = np.ones(len(chunk), dtype=bool)
                for name, values in keep.items():
                    rows &= chunk[name].astype(str).isin(values).to_numpy()
                if time is not None:
                    _add_users(everything, chunk[source.user], time, where)
                chunk, numbers = chunk[rows], numbers[rows]
                time = None if time is None else time[rows]
            users = column_ids(chunk[source.user], "user", where, numbers)
            items = column_ids(chunk[source.item], "item", where, numbers)
            yield _Part(users, items, time)


def _add_users(everything: UserTimes, column: Any, time: np.ndarray, where: str) -> None:
    try:
        codes, users = import_pandas(where).factorize(column)
    except TypeError:  # lists, which are refused where `keep` leaves one of them
        return
    everything.add(users.tolist(), codes, time)


def _parquet_chunks(file: Any, wanted: list[str], where: str) -> Iterator[Any]:
    """pandas frames; what cannot be read of them becomes a DataError."""
    try:
        for batch in file.iter_batches(CHUNK_ROWS, columns=wanted):
            batch.validate(full=True)  # of a damaged file: text that is no UTF-8, offsets beyond it
            # Not as pandas kept it: a column may have been its index.
            yield batch.to_pandas(ignore_metadata=True)
    except parquet_errors(where) as error:
        raise DataError(
            f"{where}: cannot read the columns, {' '.join(str(error).split())}"
        ) from None


def _chunks(
    source: Source, wanted: list[str], types: dict[str, str], progress: bool | None
) -> Iterator[Any]:
    """Non-empty pandas chunks with the ``wanted`` columns; parser errors become DataErrors."""
    pandas = import_pandas("from_file")
    no_quotes = source.format != "csv" and source.format != "tmall"
    # One field wider than the file, so that pandas keeps what stands behind the last column.
    widest = (source.separator.join("0" * len(source.columns)) + source.separator + "\n").encode()
    with TextSource(source.paths, progress, source.name, before=widest) as raw:
        try:
            reader = pandas.read_csv(
                io.BufferedReader(raw, 1 << 20),
                sep=source.separator,
                header=None,
                names=[*_distinct(source.columns), _BEYOND],
                usecols=[*dict.fromkeys(wanted), _BEYOND],
                index_col=False,
                skiprows=[1] if source.header else None,
                dtype={**types, _BEYOND: "str"},
                keep_default_na=False,
                na_values={source.time: _NO_TIME} if source.time not in (None, *types) else None,
                quoting=csv.QUOTE_NONE if no_quotes else csv.QUOTE_MINIMAL,
                encoding="utf-8",
                low_memory=False,
                chunksize=CHUNK_ROWS,
            )
            for number, chunk in enumerate(reader):
                chunk.index -= 1
                chunk = chunk[1:] if number == 0 else chunk
                if len(chunk):
                    _check_width(source, chunk[_BEYOND])
                    yield chunk
        except pandas.errors.EmptyDataError:
            return
        except (pandas.errors.ParserError, OverflowError) as error:
            text = " ".join(str(error).split())
            raise DataError(f"{source.paths[0]}: must be regular rows, got: {text}") from None


def _check_width(source: Source, beyond: Any) -> None:
    """`beyond`: what stands behind the last column; a separator at the end of a row is nothing."""
    more = beyond.fillna("").to_numpy() != ""
    if more.any():
        line = beyond.index[0] + int(more.argmax()) + (2 if source.header else 1)
        raise DataError(
            f"{source.paths[0]}: every row must have {len(source.columns)} fields, "
            f"got more in line {line}"
        )


def _distinct(columns: tuple[str, ...]) -> list[str]:
    seen: dict[str, int] = {}
    names = []
    for column in columns:
        count = seen[column] = seen.get(column, 0) + 1
        names.append(column if count == 1 else f"{column}.{count}")
    return names


def _texts(column: Any, where: str) -> tuple[list[str], np.ndarray]:
    """Texts without the blanks around them, and the code of every row: -1 where none is.

    Two of the texts may be the same.
    """
    codes, uniques = import_pandas(where).factorize(column)
    return [text.strip() for text in uniques.tolist()], codes


def _codes(column: Any, what: str, where: str, lines: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Texts as of `_texts`, none of them empty; a gap names its line."""
    texts, codes = _texts(column, where)
    missing = np.flatnonzero(np.array([*(not text for text in texts), True])[codes])
    if missing.size:
        raise DataError(
            f"{where}: {what} must not be missing, got {missing.size} missing, "
            f"the first in line {lines[missing[0]]}"
        )
    return texts, codes
