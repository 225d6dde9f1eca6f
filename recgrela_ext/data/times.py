"""Time columns of any kind as int64 or float64."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np

from recgrela_ext.arguments import as_array
from recgrela_ext.data.optional import import_pandas
from recgrela_ext.errors import DataError

_DATES = (datetime.date, np.datetime64)
_FIRST_YEAR, _LAST_YEAR = 1678, 2261  # whole years of int64 nanoseconds


def as_time(values: Any, where: str, first_row: int = 0, unit: str = "row") -> np.ndarray:
    """int64 (integers; datetimes in nanoseconds) or float64; DataError on a missing value.

    Args:
        values: one column.
        where: begins the error line.
        first_row, unit: number and word of the first row, for the error line.
    """
    values = _plain(values, where)
    array = as_array(values, where, "time", DataError)
    if array.dtype.kind in "OUST":
        array = _from_objects(values if hasattr(values, "dtype") else array, where, first_row, unit)
    if array.dtype.kind == "M":
        missing = np.isnat(array)
        year = 1970 + array.astype("datetime64[Y]").astype(np.int64)
        far = np.flatnonzero(((year < _FIRST_YEAR) | (year > _LAST_YEAR)) & ~missing)
        if far.size:  # they would wrap around
            raise DataError(
                f"{where}: time must lie in the years {_FIRST_YEAR} to {_LAST_YEAR}, "
                f"got {array[far[0]]} in {unit} {first_row + far[0]}"
            )
        converted = array.astype("datetime64[ns]").astype(np.int64)
    elif array.dtype.kind == "f":
        missing = ~np.isfinite(array)
        converted = array.astype(np.float64)
    elif array.dtype.kind in "iu":
        if array.size and array.dtype.kind == "u" and int(array.max()) >= 2**63:
            raise DataError(f"{where}: time must lie below 2**63, got {array.max()}")
        return array.astype(np.int64)
    else:
        raise DataError(f"{where}: time must be numbers or dates, got dtype {array.dtype}")
    gaps = np.flatnonzero(missing)
    if gaps.size:
        raise DataError(
            f"{where}: time must not be missing, got {gaps.size} missing, "
            f"the first in {unit} {first_row + gaps[0]}"
        )
    return converted


def _plain(values: Any, where: str) -> Any:
    """Times with a zone as what they are in UTC; other columns of Arrow's types as NumPy's."""
    dtype = getattr(values, "dtype", None)
    arrow = getattr(dtype, "pyarrow_dtype", None)
    if getattr(arrow or dtype, "tz", None) is not None:
        zoned = import_pandas(where).Series(values)
        return zoned.dt.tz_convert("UTC").dt.tz_localize(None)
    # For pandas, NaN is not missing in a column of Arrow's types.
    return values if arrow is None else as_array(values, where, "time", DataError)


def _from_objects(values: Any, where: str, first_row: int, unit: str) -> np.ndarray:
    """Text or mixed objects: numbers, else dates; what is neither names its first row."""
    pandas = import_pandas(where)
    column = pandas.Series(values).reset_index(drop=True)
    if column.dtype.kind == "M":  # objects that are all dates, or none
        return _plain(column, where).to_numpy()
    try:
        given = column.notna() & (column.astype(str).str.strip() != "")
    except UnicodeDecodeError:
        raise DataError(f"{where}: time must be numbers or dates, got bytes") from None
    plain = column
    if pandas.api.types.infer_dtype(column, skipna=True) != "string":  # a date is a number to it
        plain = column.mask(column.map(lambda one: isinstance(one, _DATES)))
    numbers = pandas.to_numeric(plain, errors="coerce")
    if (numbers.notna() | ~given).all():
        return np.asarray(numbers)
    dates = pandas.to_datetime(column, errors="coerce", utc=True, format="ISO8601")
    wrong = dates.isna() & given
    neither = np.flatnonzero(wrong & numbers.isna())
    if neither.size or wrong.any():
        bad = neither[0] if neither.size else np.flatnonzero(wrong)[0]
        raise DataError(
            f"{where}: time must be all numbers or all dates, got {column[bad]!r} "
            f"in {unit} {first_row + bad}"
        )
    return dates.dt.tz_localize(None).to_numpy()


class TimeColumn:
    """A time column that comes in parts: numbers throughout, or dates throughout."""

    def __init__(self, where: str) -> None:
        self.where = where
        self._kind: str | None = None

    def add(self, values: Any, first_row: int, unit: str = "row") -> np.ndarray:
        """`as_time` of one part; DataError also where an earlier part was of the other kind."""
        values = _plain(values, self.where)
        array = as_array(values, self.where, "time", DataError)
        if array.dtype.kind in "OUST":
            array = _from_objects(values, self.where, first_row, unit)
        times = as_time(array, self.where, first_row, unit)
        kind = "dates" if array.dtype.kind == "M" else "numbers"
        if self._kind not in (None, kind):
            raise DataError(
                f"{self.where}: time must be all numbers or all dates, got {self._kind} and then "
                f"{kind} from {unit} {first_row} on"
            )
        self._kind = kind
        return times
