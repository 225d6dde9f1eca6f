"""Raw ids to compact codes. Codes are int32, 0-based, in ascending order of the raw ids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from recgrela_ext.arguments import as_array
from recgrela_ext.data.optional import import_pandas
from recgrela_ext.errors import DataError, shown

LARGEST_ID = 2**63 - 1
_LONGEST_TEXT_ID = 256


def factorize(values: Any, what: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    """``(sorted raw ids, int32 code of every row)``; DataError on a missing or impossible id.

    Integers stay integers (0..2**63 - 1), text stays text.
    """
    array = as_array(values, where, f"{what} ids", DataError)
    if array.ndim != 1:
        raise DataError(f"{where}: {what} ids must be one column, got shape {array.shape}")
    if array.dtype.kind != "O" and isinstance(values, Sequence) and _is_mixed(values):
        array = np.array(values, dtype=object)
    if array.dtype.kind == "f":
        array = _integral(array, what, where)
    if array.dtype.kind in "iu":
        return _factorize_integers(array, what, where)
    if array.dtype.kind not in "OUST":
        raise DataError(f"{where}: {what} ids must be integers or text, got dtype {array.dtype}")
    uniques: Iterable[Any]
    if array.dtype.kind in "US":
        if not hasattr(values, "dtype") and (cut := ends_in_zero(values)) is not None:
            raise DataError(f"{where}: {what} ids must hold no zero character, got {shown(cut)}")
        try:
            uniques, codes = np.unique(array.astype(str), return_inverse=True)
        except UnicodeDecodeError as error:
            got = f"byte 0x{error.object[error.start]:02x}"
            raise DataError(f"{where}: {what} ids in bytes must be ASCII, got {got}") from None
        uniques = uniques.tolist()
    else:
        uniques, codes = column_ids(values if hasattr(values, "dtype") else array, what, where)
    encoder = IdEncoder(what, where)
    encoder.add(uniques, codes)
    return encoder.finish(parse_numbers=False)


def column_ids(
    column: Any, what: str, where: str, numbers: np.ndarray | None = None
) -> tuple[list[Any], np.ndarray]:
    """``(distinct raw ids, code of every row)`` of a column that pandas can hold.

    DataError on a missing id and on what cannot be one, with its place in ``numbers``, by default
    in the column.
    """
    if column.dtype.kind == "f" and (array := np.asarray(column)).dtype.kind == "f":
        column = _integral(array, what, where, numbers)
    try:
        codes, uniques = import_pandas(where).factorize(column)
    except TypeError:
        other = next((one for one in column if type(one).__hash__ is None), column)
        raise DataError(
            f"{where}: {what} ids must be integers or text, got {type(other).__name__}"
        ) from None
    missing = np.flatnonzero(codes < 0)
    if missing.size:
        raise DataError(
            f"{where}: {what} ids must not be missing, got {missing.size} missing, "
            f"the first in row {_place(missing[0], numbers)}"
        )
    found = uniques.tolist()
    maybe = column.dtype.kind not in "iuf" and (0 in found or 1 in found)  # as False and True
    if maybe and any(isinstance(one, (bool, np.bool_)) for one in column):
        raise DataError(f"{where}: {what} ids must be integers or text, got bool")
    return found, codes


def _is_mixed(values: Sequence[Any]) -> bool:
    """Whether NumPy would make one type of several: text of 1, NaN and "a", numbers of True."""
    kinds = set(map(type, values))
    apart = ((str,), (bytes,), (bool, np.bool_))
    return len({tuple(issubclass(kind, group) for group in apart) for kind in kinds}) > 1


def ends_in_zero(values: Any) -> str | bytes | None:
    """The first text that NumPy would cut: in its arrays "a" and "a\\0" are one."""
    texts = (one for one in values if isinstance(one, (str, bytes)))
    return next((one for one in texts if one[-1:] in ("\0", b"\0")), None)


def lone_surrogate(texts: Iterable[str]) -> str | None:
    """The first half of a pair of UTF-16, which no file can hold."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        return str(error.object[error.start])
    return None


def check_id_array(ids: Any, name: str, where: str) -> None:
    """DataError unless these are the ids of an `IdMap`; whether they are distinct is not seen."""
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iuU":
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, np.ndarray) else shown(ids)
        raise DataError(f"{where}: {name} must be an array of integers or text [n], got {got}")
    if ids.dtype.kind == "U" and ids.size:
        letters = np.ascontiguousarray(ids.astype(ids.dtype.newbyteorder("="))).view(np.uint32)
        lone = letters[(letters >= 0xD800) & (letters <= 0xDFFF)]
        if lone.size:
            raise DataError(f"{where}: {name} must be UTF-8 text, got {chr(lone[0])!r} in one")


def compact(codes: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drop the ids that no longer occur; ``(ids, codes)``."""
    used = np.zeros(len(ids), dtype=bool)
    used[codes] = True
    if used.all():
        return ids, codes
    place = np.cumsum(used, dtype=np.int32) - np.int32(1)
    return ids[used], place[codes]


def id_hashes(ids: np.ndarray, seed: int) -> np.ndarray:
    """One uint64 per id, a function of the raw id and the seed alone."""
    if ids.dtype.kind == "i":
        numbers = ids.astype(np.uint64)
    else:
        digests = (hashlib.blake2b(str(raw).encode(), digest_size=8).digest() for raw in ids)
        numbers = np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)
    return mix(numbers ^ mix(np.array([seed % 2**64], dtype=np.uint64)))


def mix(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that spreads every input bit (the finaliser of splitmix64)."""
    with np.errstate(over="ignore"):
        out = values + np.uint64(0x9E3779B97F4A7C15)
        out = (out ^ (out >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        out = (out ^ (out >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(out ^ (out >> np.uint64(31)))


class IdEncoder:
    """Codes of one id column that arrives in chunks; memory grows with distinct ids alone."""

    def __init__(self, what: str, where: str) -> None:
        self._what = what
        self._where = where
        self._code_of: dict[int | str, int] = {}
        self._chunks: list[np.ndarray] = []

    def add(self, uniques: Iterable[Any], codes: np.ndarray) -> None:
        """One chunk: row ``r`` holds the raw id ``uniques[codes[r]]``."""
        known = self._code_of
        place = np.array([known.setdefault(raw, len(known)) for raw in uniques], dtype=np.int32)
        self._chunks.append(place[codes])

    def finish(self, parse_numbers: bool) -> tuple[np.ndarray, np.ndarray]:
        """``(sorted raw ids, int32 codes)``; frees the chunks.

        ``parse_numbers`` turns ids into integers when every one of them is written as a plain
        integer, or as the float ``7.0`` that pandas makes of it where a column has a gap; ``007``
        beside ``7``, or any other text, keeps all of them text.
        """
        raw: list[Any] = list(self._code_of)
        other = next((one for one in raw if not isinstance(one, (str, int, np.integer))), None)
        if other is not None:
            raise DataError(
                f"{self._where}: {self._what} ids must be integers or text, "
                f"got {type(other).__name__}"
            )
        if texts := [one for one in raw if isinstance(one, str)]:
            _check_text(texts, self._what, self._where)
        parsed = parse_numbers and all(isinstance(one, str) and _is_number(one) for one in raw)
        if parsed:
            raw = [int(one.removesuffix(".0")) for one in raw]
        if any(isinstance(one, str) for one in raw):
            raw = [str(one) for one in raw]
        if raw and not isinstance(raw[0], str):
            _check_range(min(raw), max(raw), self._what, self._where)
        ids, first, rank = np.unique(
            np.array(raw) if raw else np.empty(0, np.int64),
            return_index=True,
            return_inverse=True,
        )
        if len(first) != len(raw) and not parsed:  # 7 and 7.0 are one
            raise DataError(f"{self._where}: {self._what} ids must be of one type, got a mixture")
        self._code_of = {}
        codes = np.concatenate([*self._chunks, np.empty(0, np.int32)])
        self._chunks = []
        np.take(rank.astype(np.int32), codes, out=codes)
        return ids, codes


def is_plain_integer(text: str) -> bool:
    digits = text[1:] if text.startswith("-") else text
    return digits.isdecimal() and digits.isascii() and (digits[0] != "0" or text == "0")


def _is_number(text: str) -> bool:
    """A plain integer, also as a float that stands for no other."""
    plain = text.removesuffix(".0")
    return is_plain_integer(plain) and (plain == text or abs(int(plain)) < 2**53)


def _check_range(smallest: int, largest: int, what: str, where: str) -> None:
    if smallest < 0 or largest > LARGEST_ID:
        raise DataError(
            f"{where}: {what} ids must lie in 0..2**63-1, "
            f"got {shown(smallest if smallest < 0 else largest)}"
        )


def _check_text(raw: list[str], what: str, where: str) -> None:
    longest = max(raw, key=len)
    if len(longest) > _LONGEST_TEXT_ID:
        raise DataError(
            f"{where}: {what} ids must have at most {_LONGEST_TEXT_ID} characters, "
            f"got {len(longest)} ({longest[:20]!r}...)"
        )
    if "" in raw:
        raise DataError(f"{where}: {what} ids must not be empty")
    broken = next((one for one in raw if "\t" in one or "\n" in one or "\0" in one), None)
    if broken is not None:
        raise DataError(
            f"{where}: {what} ids must hold no tab, line feed or zero character, got {broken!r}"
        )
    lone = lone_surrogate(raw)
    if lone is not None:
        raise DataError(f"{where}: {what} ids must be UTF-8 text, got {lone!r} in one")


def _place(row: np.integer[Any], numbers: np.ndarray | None) -> int:
    return int(row if numbers is None else numbers[row])


def _integral(
    array: np.ndarray, what: str, where: str, numbers: np.ndarray | None = None
) -> np.ndarray:
    """Integers that pandas turned to floats, because a column once had a gap, are integers."""
    missing = np.flatnonzero(np.isnan(array))
    if missing.size:
        raise DataError(
            f"{where}: {what} ids must not be missing, got {missing.size} missing, "
            f"the first in row {_place(missing[0], numbers)}"
        )
    bits = exact_bits(array.dtype)
    bad = np.flatnonzero((array != np.floor(array)) | (np.abs(array) >= 2.0**bits))
    if bad.size:
        raise DataError(
            f"{where}: {what} ids must be integers (below 2**{bits} in a {array.dtype.name} "
            f"column), got {array[bad[0]]} in row {_place(bad[0], numbers)}"
        )
    return array.astype(np.int64)


def exact_bits(dtype: np.dtype[Any]) -> int:
    """Below 2**bits a float is the one integer it was made of; from there on two become one."""
    return min(int(np.finfo(dtype).nmant) + 1, 53)


def _factorize_integers(array: np.ndarray, what: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    if not array.size:
        return np.empty(0, np.int64), np.empty(0, np.int32)
    smallest, largest = int(array.min()), int(array.max())
    _check_range(smallest, largest, what, where)
    if largest - smallest > 4 * array.size:
        ids, codes = np.unique(array, return_inverse=True)
        return ids.astype(np.int64), codes.astype(np.int32)
    # A dense range needs no sort: a presence table gives ids and codes in one pass each.
    present = np.zeros(largest - smallest + 1, dtype=bool)
    present[array - smallest if smallest else array] = True
    place = np.cumsum(present, dtype=np.int32) - np.int32(1)
    codes = place[array - smallest if smallest else array]
    return np.flatnonzero(present).astype(np.int64) + smallest, codes
