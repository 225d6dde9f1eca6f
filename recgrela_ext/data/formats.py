"""What a file is: its format, its columns and the files that belong to it."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from recgrela_ext.arguments import is_one_of
from recgrela_ext.data.text import first_line
from recgrela_ext.errors import DataError, shown

FORMATS = (
    "recbole",  # .inter: tab-separated, typed header; RecBole's merged LFM-1B artists, Tmall, ...
    "movielens_dat",  # ratings.dat: user::item::rating::timestamp
    "movielens_100k",  # u.data: tab-separated, no header
    "csv",  # any delimited text with a header; MovieLens ratings.csv
    "netflix",  # combined_data_*.txt or mv_*.txt
    "lfm1b",  # LFM-1b_LEs.txt: user, artist, album, track, timestamp
    "tmall",  # user_log_format1.csv of IJCAI-15
    "parquet",
)
_IN_FOLDER = (
    ("ratings.dat", "movielens_dat"),
    ("ratings.csv", "csv"),
    ("u.data", "movielens_100k"),
    ("combined_data_*.txt", "netflix"),
    ("mv_*.txt", "netflix"),
    ("training_set/mv_*.txt", "netflix"),
    ("LFM-1b_LEs.txt", "lfm1b"),
    ("user_log_format1.csv", "tmall"),
    ("*.inter", "recbole"),
    ("*.parquet", "parquet"),
)
_USER_NAMES = ("user", "userid", "uid")
_ITEM_NAMES = ("item", "itemid", "movieid", "productid", "artistid", "trackid", "iid")
_TIME_NAMES = ("timestamp", "time", "datetime", "date", "unixtime", "ts")
_LFM_COLUMNS = ("user", "artist", "album", "track", "timestamp")


@dataclass(frozen=True)
class Source:
    """Files of one format, their columns in file order, and which of them to read."""

    format: str
    paths: tuple[Path, ...]
    name: str
    columns: tuple[str, ...]
    separator: str
    header: bool
    user: str
    item: str
    time: str | None


def resolve(
    path: Path, format: str, user: str | None, item: str | None, time: str | None, order: str
) -> Source:
    """Find out what ``path`` is; DataError names what is missing or unknown."""
    if not is_one_of(format, ("auto", *FORMATS)):
        raise DataError(
            f"from_file: format must be 'auto' or one of {', '.join(FORMATS)}, got {shown(format)}"
        )
    if not path.exists():
        raise DataError(f"from_file: no such file or folder: {path}")
    paths, found = _find_files(path, format)
    kind = found if format == "auto" else format
    name = path.name if path.is_dir() else paths[0].name.split(".")[0]
    if name in ("ratings", "u", "user_log_format1") and path.resolve().parent.name:
        name = path.resolve().parent.name
    if kind == "parquet":
        columns, separator, header = _parquet_columns(paths[0]), "", True
    else:
        columns, separator, header = _text_columns(paths[0], kind)
    if kind == "netflix":
        return Source(kind, paths, name, columns, separator, False, "user", "item", "date")
    bare = [column.partition(":")[0] for column in columns] if kind == "recbole" else list(columns)
    where = f"from_file: {paths[0].name}"
    if kind == "lfm1b":
        user, item, time = user or "user", item or "artist", time or "timestamp"
    chosen_user = _choose(where, "user", user, bare, _USER_NAMES)
    chosen_item = _choose_item(where, item, columns, bare, chosen_user, kind)
    chosen_time = _choose_time(where, time, bare, order)
    return Source(
        kind, paths, name, tuple(bare), separator, header, chosen_user, chosen_item, chosen_time
    )


def _find_files(path: Path, format: str) -> tuple[tuple[Path, ...], str]:
    if path.is_dir():
        for pattern, kind in _IN_FOLDER:
            hits = sorted(path.glob(pattern))
            if not hits or format not in ("auto", kind):
                continue
            if len(hits) > 1 and kind != "netflix":
                names = ", ".join(hit.name for hit in hits[:8])
                raise DataError(f"from_file: {path} must hold one {pattern}, got {names}")
            return tuple(hits), kind
        raise DataError(
            f"from_file: {path} must hold a known file ({', '.join(p for p, _ in _IN_FOLDER)}), "
            "got none"
        )
    if not path.stat().st_size:
        raise DataError(f"from_file: {path} must hold events, got an empty file")
    kind = _guess(path) if format == "auto" else format
    return (path,), kind


def _guess(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    if re.fullmatch(r"(combined_data|mv)_\d+\.txt", name):
        return "netflix"
    known = {"LFM-1b_LEs.txt": "lfm1b", "u.data": "movielens_100k"}
    known["user_log_format1.csv"] = "tmall"
    if name in known:
        return known[name]
    suffix = Path(name).suffix.lower()
    by_suffix = {".inter": "recbole", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
    if suffix in by_suffix:
        return by_suffix[suffix]
    if suffix in (".dat", ".txt") and "::" in first_line(path):
        return "movielens_dat"
    raise DataError(
        f"from_file: the format of {path.name} must be known, got suffix {suffix!r}; "
        f"pass format= one of {', '.join(FORMATS)}"
    )


def _text_columns(path: Path, kind: str) -> tuple[tuple[str, ...], str, bool]:
    """Columns in file order, separator, whether the first line is a header."""
    line = first_line(path)
    if kind == "netflix":
        return ("user", "rating", "date"), ",", False
    if kind == "movielens_dat":
        if line.count("::") != 3:
            raise DataError(f"from_file: {path} must hold user::item::rating::time, got {line!r}")
        return ("user", "_1", "item", "_2", "rating", "_3", "timestamp"), ":", False
    if kind in ("movielens_100k", "lfm1b"):
        names = _LFM_COLUMNS if kind == "lfm1b" else ("user", "item", "rating", "timestamp")
        if line.count("\t") != len(names) - 1:
            raise DataError(
                f"from_file: {path} must hold {len(names)} tab-separated columns "
                f"({', '.join(names)}), got {line.count(chr(9)) + 1}"
            )
        return names, "\t", False
    if kind == "recbole":
        return tuple(line.split("\t")), "\t", True
    separator = max("\t;|,", key=line.count)
    try:
        columns = next(csv.reader([line], delimiter=separator))
    except csv.Error as error:
        raise DataError(f"from_file: {path} must begin with a header line, got {error}") from None
    return tuple(name.strip() for name in columns), separator, True


def _parquet_columns(path: Path) -> tuple[str, ...]:
    from recgrela_ext.data.optional import import_parquet, parquet_errors

    parquet = import_parquet("from_file")
    try:
        names = tuple(parquet.read_schema(path).names)
    except parquet_errors("from_file") as error:
        found = " ".join(str(error).split())  # pyarrow ends some of its words with a new line
        raise DataError(f"from_file: {path} must be a Parquet file, got {found}") from None
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"from_file: {path} must have distinct columns, got {twice!r} twice")
    return names


def _choose(
    where: str, what: str, wanted: str | None, columns: list[str], usual: tuple[str, ...]
) -> str:
    if wanted is not None:
        if wanted in columns:
            return wanted
        raise DataError(
            f"{where}: column {wanted!r} is missing; the columns are {', '.join(columns)}"
        )
    plain = [re.sub(r"[^a-z]", "", column.lower()) for column in columns]
    for name in usual:
        if name in plain:
            return columns[plain.index(name)]
    raise DataError(
        f"{where}: the {what} column is missing (pass {what}=); "
        f"the columns are {', '.join(columns)}"
    )


def _choose_item(
    where: str,
    wanted: str | None,
    columns: tuple[str, ...],
    bare: list[str],
    user: str,
    kind: str,
) -> str:
    """RecBole calls the item after the data set (``artists_id:token``): the other token counts."""
    try:
        return _choose(where, "item", wanted, bare, _ITEM_NAMES)
    except DataError:
        tokens = [
            name for name, typed in zip(bare, columns, strict=True) if typed.endswith(":token")
        ]
        others = [name for name in tokens if name != user and name.endswith("_id")]
        if wanted is None and kind == "recbole" and others:
            return others[0]
        raise


def _choose_time(where: str, wanted: str | None, columns: list[str], order: str) -> str | None:
    if wanted == "":
        return None
    try:
        return _choose(where, "time", wanted, columns, _TIME_NAMES)
    except DataError as error:
        if wanted is None and order in ("file", "shuffled"):
            return None
        hint = "" if wanted else ", or order='file' to take the rows of a user as they stand"
        raise DataError(f"{error}{hint}") from None
