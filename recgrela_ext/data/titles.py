"""Item titles: a column of the events, or the file that a data set keeps beside them."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from recgrela_ext.data.formats import Source
from recgrela_ext.errors import DataError


def given_titles(raw_items: list[int | str], column: Iterable[Any]) -> dict[int | str, str] | None:
    """Raw id -> its last title in a column of the events, or None where there is no title."""
    pairs = zip(raw_items, column, strict=True)
    return {raw: str(title) for raw, title in pairs if not _is_missing(title)} or None


def _is_missing(title: Any) -> bool:
    if isinstance(title, str):
        return not title
    try:
        return title is None or bool(title != title)  # NaN, NaT
    except (TypeError, ValueError):  # pandas.NA does not even tell; nor do arrays
        return not hasattr(title, "__len__")


def read_titles(source: Source, item_ids: np.ndarray) -> dict[int | str, str] | None:
    """Raw id -> title for the ids of the log, or None where no title file lies beside it."""
    path = _title_file(source)
    if path is None:
        return None
    known = {str(raw): raw for raw in item_ids.tolist()}
    rows = ((raw.strip(), title) for raw, title in _rows(path, source))
    titles = {known[raw]: title for raw, title in rows if raw in known and title}
    return titles or None


def _title_file(source: Source) -> Path | None:
    folder = source.paths[0].parent
    names = {
        "recbole": [f"{source.paths[0].name.removesuffix('.gz').removesuffix('.inter')}.item"],
        "movielens_dat": ["movies.dat"],
        "movielens_100k": ["u.item"],
        "csv": ["movies.csv"] if source.paths[0].name.startswith("ratings.csv") else [],
        "netflix": ["movie_titles.csv", "movie_titles.txt", "../movie_titles.txt"],
        "lfm1b": [f"LFM-1b_{source.item}s.txt"],
    }.get(source.format, [])
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _rows(path: Path, source: Source) -> Iterator[tuple[str, str]]:
    # Not splitlines, for which the three dots of Windows in a file of Latin-1 end a line.
    lines = re.split("\r\n|\r|\n", _text(path))
    if source.format == "recbole":
        header = [column.partition(":")[0] for column in lines[0].split("\t")]
        place = next(
            (i for i, name in enumerate(header) if "title" in name or "name" in name), None
        )
        if place is not None:
            for line in lines[1:]:
                fields = line.split("\t")
                if len(fields) > place:
                    yield fields[0], fields[place]
    elif source.format == "csv":
        try:
            for row in csv.reader(lines[1:]):
                if len(row) > 1:
                    yield row[0], row[1]
        except csv.Error as error:
            raise DataError(f"from_file: {path} must be CSV, got {error}") from None
    else:
        separator, place = {
            "movielens_dat": ("::", 1),
            "movielens_100k": ("|", 1),
            "netflix": (",", 2),
            "lfm1b": ("\t", 1),
        }[source.format]
        for line in lines:
            fields = (
                line.split(separator, 2) if source.format == "netflix" else line.split(separator)
            )
            if len(fields) > place:
                yield fields[0], fields[place]


def _text(path: Path) -> str:
    """UTF-8, or Latin-1 as in the older MovieLens and Netflix title files."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")
