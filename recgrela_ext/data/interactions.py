"""A log of (user, item, time): load, filter, split.

Layout: three columns of equal length in file order, ``user`` and ``item`` int32 codes,
``time`` int64 or float64 (or None); the position in the file is the row number.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from recgrela_ext.arguments import is_whole
from recgrela_ext.data import splits
from recgrela_ext.data.ids import check_id_array, compact, factorize, lone_surrogate
from recgrela_ext.data.optional import import_pandas
from recgrela_ext.data.order import check_order, check_seed, sort_rows
from recgrela_ext.data.ranks import number_events
from recgrela_ext.data.sequences import IdMap, Sequences, Targets
from recgrela_ext.errors import DataError, shown

Split: TypeAlias = tuple[Sequences, Targets, Targets]

_TIES_WORTH_A_WARNING = 0.05


@dataclass(frozen=True, eq=False)
class Interactions:
    """An interaction log in compact columns; made by :meth:`from_frame` or :meth:`from_file`.

    Args:
        user: int32 ``[N]``, codes into ``user_ids``, in file order.
        item: int32 ``[N]``, codes into ``item_ids``.
        time: int64 or float64 ``[N]`` in any unit, or None: the file order is the time order.
        user_ids, item_ids: raw ids, ascending, each of them once, int64 or str.
        item_titles: raw item id -> title, where the data has titles.
        order: the rule for ties in time, see ``recgrela_ext.data.order``.
        seed: seed of that rule.
        name: name of the data set, for results.
        time_is_rank: whether the time numbers each user's events, as known of a log that this one
            is a part of; None: judged by the columns.

    Raises:
        DataError: columns or ids that are not as above, or a time that is not finite.
    """

    user: np.ndarray
    item: np.ndarray
    time: np.ndarray | None
    user_ids: np.ndarray
    item_ids: np.ndarray
    item_titles: Mapping[int | str, str] | None = None
    order: str = "hash"
    seed: int = 0
    name: str = "frame"
    time_is_rank: bool | None = None

    def __post_init__(self) -> None:
        check_order(self.order, self.time is not None, "Interactions")
        check_seed(self.seed, "Interactions")
        if self.time_is_rank is not None and not isinstance(self.time_is_rank, bool):
            raise DataError(
                "Interactions: time_is_rank must be True, False or None, "
                f"got {shown(self.time_is_rank)}"
            )
        check_id_array(self.user_ids, "user_ids", "Interactions")
        check_id_array(self.item_ids, "item_ids", "Interactions")
        columns = [self.user, self.item] + ([] if self.time is None else [self.time])
        other = next((x for x in columns if not isinstance(x, np.ndarray) or x.ndim != 1), None)
        if other is not None or self.user is None or self.item is None:
            raise DataError(
                f"Interactions: user, item and time must be arrays [N], got {shown(other)}"
            )
        if len({len(column) for column in columns}) > 1:
            raise DataError(
                "Interactions: user, item and time must have one length, "
                f"got {[len(column) for column in columns]}"
            )
        if not len(self.user):
            raise DataError(f"Interactions: {self.name} must hold at least one event, got 0")
        for what, codes, ids in (
            ("user", self.user, self.user_ids),
            ("item", self.item, self.item_ids),
        ):
            if codes.dtype.kind not in "iu":
                raise DataError(f"Interactions: {what} must be integers, got dtype {codes.dtype}")
            low, high = int(codes.min()), int(codes.max())
            if low < 0 or high >= len(ids):
                raise DataError(
                    f"Interactions: {what} must hold codes of the {len(ids)} {what}_ids, "
                    f"got {low if low < 0 else high}"
                )
            wrong = np.flatnonzero(ids[1:] <= ids[:-1])
            if wrong.size:
                before, after = ids[wrong[0] : wrong[0] + 2].tolist()
                raise DataError(
                    f"Interactions: {what}_ids must ascend, each of them once, "
                    f"got {shown(after)} after {shown(before)}"
                )
        if self.time is None:
            return
        if self.time.dtype.kind not in "iuf":
            raise DataError(f"Interactions: time must be numbers, got dtype {self.time.dtype}")
        gap = np.flatnonzero(~np.isfinite(self.time))
        if gap.size:
            raise DataError(
                f"Interactions: time must be finite, got {self.time[gap[0]]} in row {gap[0]}"
            )

    @classmethod
    def from_frame(
        cls,
        df: Any,
        user: str = "user",
        item: str = "item",
        time: str | None = "timestamp",
        order: str = "hash",
        seed: int = 0,
        title: str | None = None,
        name: str = "frame",
    ) -> Interactions:
        """A log from a DataFrame (pandas, polars), an Arrow table, or any mapping of column names
        to arrays.

        Args:
            df: the columns; rows in file order.
            user, item: names of the id columns, integers or text.
            time: name of the time column (numbers, datetimes or date text), or None together
                with ``order="file"``: rows of a user are then taken as they stand.
            order, seed: the rule for ties in time.
            title: name of a column with item titles; the last title of an item counts. None,
                NaN and empty text are none.
            name: name of the data set, for results.

        Raises:
            DataError: a missing column, no rows, a missing or negative id, text that NumPy or
                UTF-8 cannot hold, a missing time.
        """
        from recgrela_ext.data.times import as_time
        from recgrela_ext.data.titles import given_titles

        where = "from_frame"
        if not hasattr(df, "columns") and not isinstance(df, Mapping):
            raise DataError(f"{where}: df must be a frame or a dict of columns, got {shown(df)}")
        arrow = hasattr(df, "column_names") and hasattr(df, "to_pandas")
        for name_of, column in (("user", user), ("item", item), ("time", time), ("title", title)):
            must = name_of in ("user", "item")
            if not isinstance(column, str) and (must or column is not None):
                raise DataError(f"{where}: {name_of} must name a column, got {shown(column)}")
        wanted = [column for column in (user, item, time, title) if column is not None]
        found = list(df.column_names if arrow else df.columns if hasattr(df, "columns") else df)
        for column in wanted:
            if column not in found:
                raise DataError(
                    f"{where}: column {column!r} is missing; "
                    f"the columns are {', '.join(map(str, found))}"
                )
            if found.count(column) > 1:
                raise DataError(f"{where}: df must have one column {column!r}, got several")
        if arrow:
            import_pandas(where)  # Arrow itself asks for it in words of its own
            df = {column: df.column(column).to_pandas() for column in wanted}
        check_order(order, time is not None, where)
        bare = next(
            (
                column
                for column in wanted
                if not hasattr(df[column], "__len__") or isinstance(df[column], (str, bytes))
            ),
            None,
        )
        if bare is not None:
            raise DataError(f"{where}: column {bare!r} must be an array, got {shown(df[bare])}")
        rows = {column: len(df[column]) for column in wanted}
        if len(set(rows.values())) > 1:
            raise DataError(f"{where}: columns must have one length, got {rows}")
        if not rows[user]:
            raise DataError(f"{where}: df must hold at least one row, got 0")
        user_ids, user_codes = factorize(df[user], "user", where)
        item_ids, item_codes = factorize(df[item], "item", where)
        times = None if time is None else as_time(df[time], where)
        titles = None
        if title is not None:
            titles = given_titles(item_ids[item_codes].tolist(), df[title])
            lone = None if titles is None else lone_surrogate(titles.values())
            if lone is not None:
                raise DataError(f"{where}: titles must be UTF-8 text, got {lone!r} in one")
        return cls(user_codes, item_codes, times, user_ids, item_ids, titles, order, seed, name)

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        format: str = "auto",
        user: str | None = None,
        item: str | None = None,
        time: str | None = None,
        order: str = "hash",
        seed: int = 0,
        progress: bool | None = None,
        keep: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> Interactions:
        """A log from a file or a folder of a known data set; needs pandas (pyarrow for Parquet).

        Ids in text lose the blanks around them, quoted or not. They become integers where each of
        a column is written as one, or as the float ``42.0`` that pandas makes of it where a column
        has a gap; otherwise all of them stay text.

        Args:
            path: a file, possibly ``.gz``, or the folder of a data set.
            format: one of ``recgrela_ext.data.readers.FORMATS``, or ``"auto"``.
            user, item, time: column names where the format has a header; None takes the usual
                ones. A file without a time column needs ``order="file"``.
            order, seed: the rule for ties in time.
            progress: show a bar on stderr; None shows it on a terminal.
            keep: column name -> values; only rows with one of these values are read, for
                example ``{"action_type": ["2"]}`` for the purchases of Tmall. Values are compared
                as text, in text files without blanks around. Of the other rows only the time
                must be readable.
            name: name of the data set, by default the file's or the folder's.

        Raises:
            DataError: anything wrong with the file or an argument, in one line; TypeError or
                ValueError where `path` is none.
        """
        from recgrela_ext.data.readers import read_columns

        check_seed(seed, "from_file")
        columns = read_columns(
            path, format, user, item, time, order=order, progress=progress, keep=keep
        )
        return cls(
            columns.user,
            columns.item,
            columns.time,
            columns.user_ids,
            columns.item_ids,
            columns.item_titles,
            order,
            seed,
            columns.name if name is None else name,
            columns.time_is_rank,
        )

    @classmethod
    def from_dataset(
        cls,
        name: str,
        folder: str | os.PathLike[str] | None = None,
        *,
        progress: bool | None = None,
        **options: Any,
    ) -> Interactions:
        """A public data set by name, downloaded once with its checksum where its terms allow.

        Args:
            name: a key of ``recgrela_ext.data.download.DATASETS``, for example ``"ml-1m"``.
            folder: where data sets are kept; None takes ``~/.cache/recgrela``.
            progress, options: as in :meth:`from_file`.

        Raises:
            DataError: an unknown name; no network; a data set that must be fetched by hand, with
                the page to visit.
        """
        from recgrela_ext.data.download import fetch_dataset

        kept = Path.home() / ".cache" / "recgrela" if folder is None else folder
        path = fetch_dataset(name, kept, progress=progress)
        return cls.from_file(path, progress=progress, **{"name": name, **options})

    def __len__(self) -> int:
        """Number of events."""
        return len(self.user)

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @property
    def id_map(self) -> IdMap:
        return IdMap(self.user_ids, self.item_ids, self.item_titles)

    @cached_property
    def has_rank_time(self) -> bool:
        """Whether the time numbers each user's events (1, 2, 3 or 0, 1, 2, in any unit): it then
        says nothing across users. A part of a log is judged by the whole log.
        """
        if self.time is None or self.time_is_rank is not None:
            return bool(self.time_is_rank)
        return number_events(self.user, self.time, self.num_users)

    def filter(
        self,
        k_core: tuple[int, int] | None = None,
        *,
        min_user: int = 1,
        max_user: int | None = None,
        min_item: int = 1,
        max_item: int | None = None,
    ) -> Interactions:
        """Keep users and items whose number of events lies within bounds (inclusive).

        Users and items out of bounds leave together, then all is counted again, until nothing
        changes (as RecBole does). The paper's filters: ``k_core=(5, 5)`` for MovieLens;
        ``min_user=50, max_user=500`` for LFM-1B; ``min_user=50, min_item=50, max_item=15000``
        for Netflix. ``k_core=(u, i)`` says ``min_user=u, min_item=i``.

        Raises:
            DataError: a bound that is no int; nothing is left.
        """
        for name, bound in (("min_user", min_user), ("min_item", min_item)):
            if not is_whole(bound):
                raise DataError(f"filter: {name} must be an int, got {shown(bound)}")
        for name, limit in (("max_user", max_user), ("max_item", max_item)):
            if limit is not None and not is_whole(limit):
                raise DataError(f"filter: {name} must be an int or None, got {shown(limit)}")
        if k_core is not None:
            pair = isinstance(k_core, tuple | list) and len(k_core) == 2
            if not pair or not all(map(is_whole, k_core)):
                raise DataError(
                    f"filter: k_core must be two ints, of users and of items, got {shown(k_core)}"
                )
            min_user, min_item = max(min_user, k_core[0]), max(min_item, k_core[1])
        keep = np.ones(len(self), dtype=bool)
        users, items = self.user, self.item
        while True:
            good_user = _within(users, self.num_users, min_user, max_user)
            good_item = _within(items, self.num_items, min_item, max_item)
            stays = good_user[users] & good_item[items]
            if stays.all():
                break
            keep[keep] = stays
            users, items = users[stays], items[stays]
        if not len(users):
            raise DataError(
                f"filter: {self.name} must keep at least one user, got 0 of {self.num_users} "
                f"(users of {_bounds(min_user, max_user)} events, "
                f"items of {_bounds(min_item, max_item)})"
            )
        return self.subset(keep)

    def subset(self, keep: np.ndarray) -> Interactions:
        """The rows where ``keep`` (bool ``[N]``) is True; ids that no longer occur leave."""
        if not isinstance(keep, np.ndarray) or keep.dtype != bool or keep.shape != (len(self),):
            raise DataError(f"subset: keep must be bool [{len(self)}], got {shown(keep)}")
        if keep.all():
            return self
        user_ids, user = compact(self.user[keep], self.user_ids)
        item_ids, item = compact(self.item[keep], self.item_ids)
        time = None if self.time is None else self.time[keep]
        return Interactions(
            user,
            item,
            time,
            user_ids,
            item_ids,
            self.item_titles,
            self.order,
            self.seed,
            self.name,
            self.has_rank_time,  # gaps would hide it
        )

    def first_events(self) -> Interactions:
        """Only the first event of every (user, item), as the merged LFM-1B artists keep it."""
        index = self.order_rows(warn=False)
        pair = self.user[index].astype(np.int64) * self.num_items + self.item[index]
        first = np.unique(pair, return_index=True)[1]
        keep = np.zeros(len(self), dtype=bool)
        keep[index[first]] = True
        return self.subset(keep)

    def order_rows(self, warn: bool = True) -> np.ndarray:
        """Row numbers, int64 ``[N]``, user by user, each in time order with ties broken."""
        index, tied = sort_rows(
            self.user, self.item, self.time, self.user_ids, self.item_ids, self.order, self.seed
        )
        if warn and tied > _TIES_WORTH_A_WARNING:
            warnings.warn(
                f"{self.name}: {100 * tied:.1f} % of adjacent events of a user tie in time; the "
                f"rule order={self.order!r} (seed {self.seed}) decides between them",
                stacklevel=5,
            )
        return index

    def sequences(self) -> Sequences:
        """All events as histories, no split."""
        return splits.sequences(self)

    def leave_one_out(self) -> Split:
        """Test: the last event of each user; validation: the one before; training: the rest.

        A user with two events has a test target and no validation target; a user with one stays
        in training and is no target (counted in ``Targets.dropped["short_users"]``). The history
        of a test target includes the validation event.

        Raises:
            DataError: no user has two events.
        """
        return splits.leave_one_out(self)

    def split_by_time(
        self,
        train: float = 0.8,
        valid: float = 0.1,
        test: float = 0.1,
        targets: str = "all",
    ) -> Split:
        """Split at two moments for all users: the quantiles ``train`` and ``train + valid``.

        Times that number each user's events (:attr:`has_rank_time`) say nothing across users and
        are refused. They are known also where `filter`, `subset` or `keep` of :meth:`from_file`
        left gaps in them; gaps from elsewhere hide them.

        Events with the time of a boundary belong to the later part. Items without a training
        event leave the log (``dropped["cold_items"]``, ``dropped["cold_events"]``); an event that
        has no earlier one of its user is no target (``dropped["no_history"]``). A user who
        first appears after training keeps an empty training history.

        Args:
            train, valid, test: shares of all events, positive, with sum 1.
            targets: ``"all"`` events of a part, or each user's ``"first"`` or ``"last"`` there.

        Raises:
            DataError: no time column, time that is a per-user rank, order ``"shuffled"``, shares
                that do not add up, or a part without events.
        """
        return splits.split_by_time(self, (train, valid, test), targets)


def _bounds(smallest: int, largest: int | None) -> str:
    return f"{smallest} or more" if largest is None else f"{smallest}..{largest}"


def _within(codes: np.ndarray, size: int, smallest: int, largest: int | None) -> np.ndarray:
    count = np.bincount(codes, minlength=size)
    good = count >= smallest
    return good if largest is None else good & (count <= largest)
