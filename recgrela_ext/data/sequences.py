"""Histories, evaluation targets and the id map: what training and evaluation read.

Layout: the items of all users stand in one int32 array, user after user, each in time order;
``offsets[u]:offsets[u + 1]`` is user ``u``. Item rows run from 1; row 0 is padding.
Prefixes are views into that array and are never copied.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from recgrela_ext.arguments import as_array, as_path, is_whole
from recgrela_ext.data.ids import (
    check_id_array,
    ends_in_zero,
    exact_bits,
    is_plain_integer,
    lone_surrogate,
)
from recgrela_ext.errors import DataError, check_regular, shown
from recgrela_ext.files import write_files

PADDING_ROW = 0
_ID_MAP_FORMAT = "recgrela-id-map"
_ID_MAP_VERSION = 1


@dataclass(frozen=True, eq=False)
class IdMap:
    """Raw ids of users and items. Item row ``i + 1`` is ``item_ids[i]``; row 0 is padding.

    Args:
        user_ids: int64 or str array ``[num_users]``, distinct.
        item_ids: int64 or str array ``[num_items]``, distinct.
        item_titles: raw item id -> title, or ``None`` where the data has no titles.

    Raises:
        DataError: ids that are no array of integers or of text.
    """

    user_ids: np.ndarray
    item_ids: np.ndarray
    item_titles: Mapping[int | str, str] | None = None

    def __post_init__(self) -> None:
        check_id_array(self.user_ids, "user_ids", "IdMap")
        check_id_array(self.item_ids, "item_ids", "IdMap")

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        """Items without the padding row."""
        return len(self.item_ids)

    @property
    def n_items(self) -> int:
        """Rows of an item table: ``num_items + 1``, the padding row included."""
        return len(self.item_ids) + 1

    def encode_items(self, raw: Any) -> np.ndarray:
        """Item rows (int32, 1-based, the shape of ``raw``) of raw ids; DataError on an unknown one.

        Numbers written as text are understood where the ids are integers, and the other way round.
        """
        return (_lookup("encode_items", "item", self.item_ids, raw) + 1).astype(np.int32)

    def encode_users(self, raw: Any) -> np.ndarray:
        """User indices (int64, 0-based, the shape of ``raw``) of raw ids; DataError on unknown."""
        return _lookup("encode_users", "user", self.user_ids, raw)

    def decode_items(self, rows: Any) -> np.ndarray:
        """Raw ids of item rows 1..num_items; DataError on padding and on rows outside the table."""
        index = as_array(rows, "decode_items", "rows", DataError)
        if index.size and index.dtype.kind not in "iu":
            raise DataError(f"decode_items: rows must be integers, got {shown(rows)}")
        index = index.astype(np.int64)
        bad = index[(index < 1) | (index > self.num_items)]
        if bad.size:
            raise DataError(
                f"decode_items: rows must lie in 1..{self.num_items} (0 is padding), "
                f"got {int(bad.flat[0])}"
            )
        return self.item_ids[index - 1]

    def title(self, row: int) -> str:
        """Title of an item row, or its raw id as text where there is none."""
        raw = self.decode_items([row])[0].item()
        return str(raw) if self.item_titles is None else self.item_titles.get(raw, str(raw))

    def to_json(self) -> str:
        """What :meth:`save` writes."""
        titles = None
        if self.item_titles is not None:
            titles = [self.item_titles.get(raw) for raw in self.item_ids.tolist()]
        content = {
            "format": _ID_MAP_FORMAT,
            "version": _ID_MAP_VERSION,
            "user_ids": self.user_ids.tolist(),
            "item_ids": self.item_ids.tolist(),
            "item_titles": titles,
        }
        return json.dumps(content, ensure_ascii=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON (UTF-8, atomically: a reader sees the old file or the new one)."""
        write_files({as_path(path, "IdMap.save"): self.to_json()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> IdMap:
        """Read what :meth:`save` wrote; DataError when the file is something else or torn."""
        path = as_path(path, "IdMap.load")
        check_regular(path, DataError, "IdMap.load: ")
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise DataError(f"IdMap.load: no such file: {path}") from None
        except OSError as error:
            raise DataError(f"IdMap.load: {path} must be readable: {error.strerror}") from None
        return cls.from_json(content, f"IdMap.load: {path}")

    @classmethod
    def from_json(cls, text: bytes | str, what: str = "IdMap.from_json: text") -> IdMap:
        """Of what :meth:`to_json` gave; DataError, which begins with `what`, for anything else."""
        try:
            content = json.loads(text.decode() if isinstance(text, bytes) else text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{what} must be a JSON id map, got {error}") from None
        if not isinstance(content, dict) or content.get("format") != _ID_MAP_FORMAT:
            raise DataError(f"{what} must be a JSON id map, got another kind of JSON")
        if content.get("version") != _ID_MAP_VERSION:
            raise DataError(
                f"{what} must have version {_ID_MAP_VERSION}, got {shown(content.get('version'))}"
            )
        try:
            titles = content["item_titles"]
            if titles is not None:
                pairs = zip(content["item_ids"], titles, strict=True)
                titles = {raw: title for raw, title in pairs if title is not None}
                if not all(isinstance(title, str) for title in titles.values()):
                    raise TypeError("titles must be text")
                if lone_surrogate(titles.values()) is not None:
                    raise ValueError("titles must be UTF-8 text")
            return cls(_id_array(content["user_ids"]), _id_array(content["item_ids"]), titles)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{what} must hold ids and titles, got {error!r}") from None


@dataclass(frozen=True, eq=False)
class Sequences:
    """Training data, or any plain set of histories.

    A user may have an empty history (a time split leaves such users); ``len`` counts all users.

    Args:
        items: int32 ``[N]``, rows 1..num_items, users concatenated, each in time order.
        offsets: int64 ``[U + 1]``.
        id_map: raw ids behind rows and users.
        order: the rule that broke ties in time (see ``Interactions``).
        order_seed: seed of that rule.
        name: name of the data set.
        repeat_share: share of the events whose item stood earlier in the same history.
    """

    items: np.ndarray
    offsets: np.ndarray
    id_map: IdMap
    order: str
    order_seed: int
    name: str
    repeat_share: float

    def __post_init__(self) -> None:
        for name, column in (("items", self.items), ("offsets", self.offsets)):
            if not isinstance(column, np.ndarray) or column.ndim != 1:
                raise DataError(f"Sequences: {name} must be an array [n], got {shown(column)}")
        offsets, events = self.offsets, len(self.items)
        if not len(offsets) or offsets[0] or offsets[-1] != events or (np.diff(offsets) < 0).any():
            raise DataError(f"Sequences: offsets must ascend from 0 to the {events} items")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def history(self, user: int) -> np.ndarray:
        """Rows of one user, int32, a view."""
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Events of each user, int64 ``[U]``."""
        return np.diff(self.offsets)

    @property
    def n_items(self) -> int:
        return self.id_map.n_items

    @property
    def num_items(self) -> int:
        return self.id_map.num_items

    @classmethod
    def from_lists(
        cls,
        histories: Iterable[Sequence[int]],
        num_items: int | None = None,
        name: str = "lists",
    ) -> Sequences:
        """Histories given as item rows (1-based); raw ids are then the rows themselves.

        Raises:
            DataError: histories that are no lists, rows that are no integers, or lie outside
                1..``num_items`` or beyond int32.
        """
        caller = "Sequences.from_lists"
        if not isinstance(histories, Iterable) or isinstance(histories, str):
            raise DataError(f"{caller}: histories must be lists of items, got {shown(histories)}")
        if num_items is not None and not (is_whole(num_items) and 0 <= num_items < 2**31):
            raise DataError(
                f"{caller}: num_items must be an int from 0 to 2**31-1, got {shown(num_items)}"
            )
        arrays = []
        for one in histories:
            array = as_array(one, caller, "histories", DataError)
            if array.ndim != 1:
                raise DataError(f"{caller}: histories must be lists of items, got {shown(one)}")
            arrays.append(array)
        other = next((x.dtype for x in arrays if x.size and x.dtype.kind not in "iu"), None)
        if other is not None:
            raise DataError(f"Sequences.from_lists: items must be integers, got {other}")
        huge = next((x.max() for x in arrays if x.dtype.kind == "u" and (x >= 2**31).any()), None)
        arrays = [array.astype(np.int64) for array in arrays]
        flat = np.concatenate(arrays) if arrays else np.empty(0, np.int64)
        largest = int(flat.max() if huge is None else huge) if flat.size else 0
        if largest >= 2**31:
            raise DataError(f"{caller}: items must be below 2**31, got {largest}")
        rows = largest if num_items is None else num_items
        if flat.size and (flat.min() < 1 or largest > rows):
            raise DataError(
                f"Sequences.from_lists: items must lie in 1..{rows}, "
                f"got {int(flat.min())}..{largest}"
            )
        offsets = np.cumsum([0] + [len(array) for array in arrays], dtype=np.int64)
        items = flat.astype(np.int32)
        id_map = IdMap(np.arange(len(arrays)), np.arange(1, rows + 1))
        return cls(items, offsets, id_map, "file", 0, name, repeat_share(items, offsets))


@dataclass(frozen=True, eq=False)
class Targets:
    """Evaluation data: positions in one shared log, nothing is materialised.

    Args:
        items: int32 ``[N]``, the whole log, users concatenated.
        offsets: int64 ``[U + 1]``.
        position: int64 ``[n]``, index into ``items`` of each target.
        user: int64 ``[n]``, the user of each target.
        split: ``"valid"`` or ``"test"``.
        id_map, order, order_seed, name: as in :class:`Sequences`.
        repeat_share: of the training part.
        target_sha256: sha256 of the lines ``user<TAB>item<LF>``, raw ids, users ascending.
        dropped: what was left out and how often, for example ``{"short_users": 3}``.
        part_start: int64 ``[U]``, index into ``items`` where each user's events of this part or a
            later one begin; None: at the user's first target, or at the end.
    """

    items: np.ndarray
    offsets: np.ndarray
    position: np.ndarray
    user: np.ndarray
    split: str
    id_map: IdMap
    order: str
    order_seed: int
    name: str
    repeat_share: float
    target_sha256: str
    dropped: Mapping[str, int] = field(default_factory=dict)
    part_start: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.position)

    def history(self, index: int) -> np.ndarray:
        """Everything the user did before the target, int32, a view."""
        return self.items[self.offsets[self.user[index]] : self.position[index]]

    @property
    def target_items(self) -> np.ndarray:
        """Target rows, int32 ``[n]``."""
        return self.items[self.position]

    @property
    def n_items(self) -> int:
        return self.id_map.n_items

    @property
    def num_items(self) -> int:
        return self.id_map.num_items

    @classmethod
    def last_of(cls, sequences: Sequences, split: str = "test") -> Targets:
        """The last event of every history with two events or more, for histories already split."""
        if not isinstance(sequences, Sequences):
            raise TypeError(f"Targets.last_of: sequences must be Sequences, got {shown(sequences)}")
        lengths = sequences.lengths
        users = np.flatnonzero(lengths > 1)
        position = sequences.offsets[users + 1] - 1
        return cls(
            sequences.items,
            sequences.offsets,
            position,
            users,
            split,
            sequences.id_map,
            sequences.order,
            sequences.order_seed,
            sequences.name,
            sequences.repeat_share,
            target_digest(sequences.id_map, users, sequences.items[position]),
            {"short_users": int((lengths < 2).sum())},
        )


def repeat_share(items: np.ndarray, offsets: np.ndarray) -> float:
    """Share of the events whose item stood earlier in the same history; 0.0 without events."""
    if not len(items):
        return 0.0
    width = int(items.max()) + 1
    pairs = np.repeat(np.arange(len(offsets) - 1, dtype=np.int64) * width, np.diff(offsets))
    pairs += items
    pairs.sort()
    return float(np.count_nonzero(pairs[1:] == pairs[:-1]) / len(items))


def target_digest(id_map: IdMap, user: np.ndarray, target_items: np.ndarray) -> str:
    """sha256 of the lines ``user<TAB>item<LF>`` with raw ids, users ascending (a number by value).

    Several targets of one user keep their order in time.
    """
    raw_user = id_map.user_ids[user]
    rank = np.argsort(raw_user, kind="stable")
    raw_item = id_map.item_ids[np.asarray(target_items)[rank] - 1]
    digest = hashlib.sha256()
    for start in range(0, len(rank), 65536):
        users = raw_user[rank[start : start + 65536]].tolist()
        lines = zip(users, raw_item[start : start + 65536].tolist(), strict=True)
        digest.update("".join(f"{one}\t{item}\n" for one, item in lines).encode())
    return digest.hexdigest()


def _id_array(values: Any) -> np.ndarray:
    """What `IdMap.save` wrote as an array; TypeError for anything but distinct ids of one type."""
    kinds = {type(one) for one in values} if isinstance(values, list) else {None}
    ids = np.asarray(values) if kinds in ({int}, {str}) else np.empty(0, np.int64)
    if kinds - {int, str} or len(kinds) > 1 or ids.dtype.kind not in "iU":
        raise TypeError("ids must be a list of integers or of texts")
    if ids.dtype.kind == "U" and ends_in_zero(values) is not None:
        raise ValueError("ids must not end in a zero character")
    if len(set(values)) != len(values):
        raise ValueError("ids must be distinct")
    return ids


def _lookup(where: str, what: str, ids: np.ndarray, raw: Any) -> np.ndarray:
    wanted = as_array(raw, where, what, DataError)
    if wanted.dtype.kind == "O" or (not hasattr(raw, "dtype") and wanted.dtype.kind == "U"):
        cut = ends_in_zero(np.asarray(raw, dtype=object).flat)
        if cut is not None:
            raise DataError(f"{where}: {what} must be a known id, got {shown(cut)}")
        try:
            wanted = wanted.astype(str)
        except ValueError:  # an object in it is an array itself
            nested = next(one for one in wanted.flat if isinstance(one, (Sized, np.ndarray)))
            raise DataError(f"{where}: {what} must be a known id, got {shown(nested)}") from None
    if wanted.dtype.kind == "f" and ids.dtype.kind == "i":
        far = np.abs(wanted) >= 2.0 ** exact_bits(wanted.dtype)  # may stand for several ids
        broken = wanted[far | (wanted != np.floor(wanted))]  # NaN too
        if broken.size:
            raise DataError(f"{where}: {what} must be a known id, got {_first(broken)}")
    if wanted.dtype.kind in "cmM":
        raise DataError(f"{where}: {what} must be a known id, got {_first(wanted)}")
    if wanted.dtype.kind in "US" and ids.dtype.kind == "i":  # NumPy reads "1_0" and "+5"
        texts = wanted.astype(str).ravel().tolist()
        other = next((text for text in texts if not is_plain_integer(text)), None)
        if other is not None:
            raise DataError(f"{where}: {what} must be a known id, got {shown(other)}")
    try:
        if wanted.dtype.kind != ids.dtype.kind and wanted.size:
            wanted = wanted.astype(np.int64 if ids.dtype.kind == "i" else str)
    except (ValueError, OverflowError):
        raise DataError(f"{where}: {what} must be a known id, got {_first(wanted)}") from None
    if not len(ids) and wanted.size:
        raise DataError(f"{where}: {what} must be a known id, got {_first(wanted)}")
    if not wanted.size:
        return np.zeros(wanted.shape, np.int64)
    sorter = None if np.all(ids[1:] > ids[:-1]) else np.argsort(ids, kind="stable")
    place = np.minimum(np.searchsorted(ids, wanted, sorter=sorter), len(ids) - 1)
    index = np.asarray(place if sorter is None else sorter[place], dtype=np.int64)
    unknown = wanted[ids[index] != wanted]
    if unknown.size:
        raise DataError(
            f"{where}: {what} must be a known id, got {_first(unknown)} "
            f"({unknown.size} unknown of {wanted.size})"
        )
    return index


def _first(values: np.ndarray) -> str:
    return repr(values.flat[0].item())
