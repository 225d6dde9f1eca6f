"""States of many users in a fixed amount of memory: `UserStateStore`.

    users, items = ...                                  # one new event per user
    state, seen, known = store.lookup(users)            # float32, copies
    hidden = model.step(items, state); seen.add(items)
    store.put(users, state, seen)                       # or all of it: store.step(users, items)

The users met last are kept as they are in use; the others rest in a smaller format. A state is
converted when it leaves the first group, not at every event: rounding each time ruins it.

When to `rebuild`, which reads histories again: to take an event out, because the sums do not say
which part was whose; and beyond a million events, where float32 sums end. After the weights changed
a new store has to be filled from the histories, as states of other weights are refused. Not because
a state is old: item n weighs 1/n in it, but states that had forgotten nothing ranked as well as
those rebuilt from the last items (README, "What a new event costs"). Rebuild from all items where
they are at hand; the last 200 lost nothing measurable but for users of more than 400.
"""

from __future__ import annotations

import os
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..arguments import as_array, usable_device
from ..errors import StateError, shown
from . import blob as storage
from . import inputs, streaming
from .persistence import check_model
from .pool import Pool, Rows, Users
from .seen import SeenItems
from .state import UserState

if TYPE_CHECKING:
    from .recgrela import RecGRELA

Ids = Sequence[int] | np.ndarray | Tensor
_LAST_USER = np.iinfo(np.int64).max


class Lookup(NamedTuple):
    """`known` [B] bool: False where the store has nothing, `state` is then that of no items."""

    state: UserState
    seen: SeenItems
    known: Tensor


class Evicted(NamedTuple):
    """Users who left a store, int64 [n], and what it kept of them."""

    users: np.ndarray
    state: UserState
    seen: SeenItems


class UserStateStore:
    """States and seen items of up to `capacity` users of one causal model.

    Args:
        model: its weights must not change while the store is in use.
        capacity: users at rest; beyond them the one at rest who was used longest ago falls out.
        dtype: format at rest: float32 (float64 for a float64 model), bfloat16, float16, int8.
        active: users kept as in use, beside the `capacity` at rest and at most as many; not used
            where the format at rest is that of use already.
        on_evict: called with the users that fall out, before they are gone; what it raises comes
            out of `put`, and nothing has changed. It must not change the store. None: they are
            dropped, so keep histories.
        device: where the rows lie; default: the model's.

    All memory but that of the seen items and of the index by user (a dict, some 100 bytes a user)
    is taken at once. Not thread-safe. When to `rebuild` a user: to delete an event, or beyond a
    million events; not because of a state's age (see the module).

    Raises:
        ValueError, TypeError: a bad argument; more users than there is memory for.
    """

    def __init__(
        self,
        model: RecGRELA,
        capacity: int,
        dtype: torch.dtype | str = torch.float32,
        active: int = 1024,
        on_evict: Callable[[Evicted], None] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        for name, value in (("capacity", capacity), ("active", active)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"UserStateStore: {name} must be an int >= 1, got {shown(value)}")
            if value >= 2**40:
                raise ValueError(f"UserStateStore: {name} must be below 2**40, got {shown(value)}")
        check_model("UserStateStore", model)
        self.model = model
        self.on_evict = on_evict
        empty = model.init_state(0)
        self.layout, self.fingerprint = empty.layout, empty.fingerprint
        self._device = empty.buffer.device
        in_use, width = empty.buffer.dtype, empty.hidden.shape[1]
        at_rest = storage.storage_dtype("UserStateStore", dtype)
        if at_rest.itemsize > in_use.itemsize:
            raise ValueError(
                f"UserStateStore: dtype must not exceed the model's, {in_use}, got {at_rest}"
            )
        place = self._device
        if device is not None:
            place = usable_device(device, "UserStateStore")
        if place.type == "meta":
            raise ValueError("UserStateStore: device must hold values, got meta")

        def pool(rows: int, form: torch.dtype) -> Pool:
            return Pool(rows, self.layout, width, form, in_use, place)

        # The last pool is where users fall out of the store.
        try:
            self.pools = [pool(capacity, at_rest)]
            if at_rest != in_use:
                self.pools.insert(0, pool(min(active, capacity), in_use))
        except (RuntimeError, MemoryError, ValueError):  # torch's and NumPy's
            raise ValueError(
                f"UserStateStore: capacity must fit in memory, got {capacity} users "
                f"({active} active) of {self.layout.row_size} numbers each"
            ) from None
        self._seen: dict[int, np.ndarray] = {}
        self._evicting = False

    def __len__(self) -> int:
        return sum(len(pool) for pool in self.pools)

    def __contains__(self, user: int) -> bool:
        return any(bool(pool.find(np.asarray([user]))[0] >= 0) for pool in self.pools)

    @property
    def users(self) -> np.ndarray:
        """Ids of all users, int64, in no particular order."""
        return np.concatenate([pool.users() for pool in self.pools])

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, a constant."""
        return sum(pool.rows.nbytes() for pool in self.pools)

    @property
    def user_nbytes(self) -> int:
        """Bytes of one user at rest, seen items apart."""
        return self.pools[-1].rows.nbytes() // self.pools[-1].capacity

    @property
    def seen_nbytes(self) -> int:
        """Bytes of all seen items."""
        return sum(ids.nbytes for ids in self._seen.values())

    def lookup(self, users: Ids) -> Lookup:
        """State and seen items of some users [B], as copies; they count as used now.

        Raises:
            ValueError, TypeError: `users` is not one-dimensional or not of integers.
        """
        ids = _user_ids("UserStateStore.lookup", users)
        found = [pool.find(ids) for pool in self.pools]
        for pool, slots in zip(self.pools, found, strict=True):
            if len(ids) and (slots >= 0).all():  # as when users come one at a time
                pool.recency.touch(slots)
                known = torch.ones(len(ids), dtype=torch.bool)
                return Lookup(self._state(*pool.read(slots)), self._seen_of(ids), known)
        state = self.model.init_state(len(ids))
        known = torch.zeros(len(ids), dtype=torch.bool)
        parts = (state.buffer, state.position, state.hidden)
        for pool, slots in zip(self.pools, found, strict=True):
            here = np.flatnonzero(slots >= 0)
            if not len(here):
                continue
            pool.recency.touch(slots[here])
            index = torch.from_numpy(here)
            known[index] = True
            for into, rows in zip(parts, pool.read(slots[here]), strict=True):
                into.index_copy_(0, index.to(into.device), rows.to(into.device))
        state = self._state(*parts)  # with a bound of these positions
        return Lookup(state, self._seen_of(ids), known)

    def put(self, users: Ids, state: UserState, seen: SeenItems | None = None) -> None:
        """Store the states of distinct users [B] and, unless None, what they have seen.

        The last user counts as the one met last. All or nothing, also where `on_evict` raises.

        Raises:
            ValueError: a user comes twice; a state of another batch size or model.
            StateError: a user on the way to rest has values float16 cannot hold.
        """
        caller = "UserStateStore.put"
        self._check_free(caller)
        ids = _user_ids(caller, users)
        if seen is not None and not isinstance(seen, SeenItems):
            raise TypeError(f"{caller}: seen must be SeenItems, got {type(seen).__name__}")
        streaming.check_state(self.model, caller, state, len(ids))
        if state.fingerprint != self.fingerprint:
            raise ValueError(f"{caller}: state must come from the weights this store was made for")
        if len(np.unique(ids)) != len(ids):
            raise ValueError(f"{caller}: users must be distinct, got {_repeated(ids)} twice")
        if seen is not None and len(seen) != len(ids):
            raise ValueError(f"{caller}: seen must hold {len(ids)} users, got {len(seen)}")
        self._put(ids, state, seen)

    def step(self, users: Ids, items: Tensor) -> Tensor:
        """Apply events in order: user `users[i]` met `items[i]`; the same user may come again.

        None of the users makes room for another of them, and it is all or nothing, also where
        `put` raises: as long as they are no more than are kept as in use (`active`, or `capacity`
        where there is no other format). More of them are taken in parts, each with as many.

        Returns the hidden states after each event, [B, hidden_size].

        Raises: as `RecGRELA.step` and `put`.
        """
        caller = "UserStateStore.step"
        self._check_free(caller)
        ids = _user_ids(caller, users)
        inputs.check_integers(caller, "items", items)
        if items.shape != (len(ids),):
            raise ValueError(f"{caller}: items must be [{len(ids)}], got {list(items.shape)}")
        # All of them before the first is applied: a caller who mends one and calls again must not
        # count the others twice.
        inputs.check_ids(caller, "items", self.model.config, items)
        ends = _ends_of_parts(ids, self.pools[0].capacity)
        hidden = [
            self._follow(ids[start:end], items[start:end])
            for start, end in zip([0, *ends], ends, strict=False)
        ]
        return torch.cat(hidden) if hidden else self.model.init_state(0).hidden

    def rebuild(self, users: Ids, histories: Sequence[Sequence[int] | np.ndarray | Tensor]) -> None:
        """Replace what is kept of distinct users by what their histories say.

        This is how an event is deleted: leave it out of the history. Seen items are replaced too.
        Users are taken in parts, of as many as are kept as in use: what `put` raises may come after
        some parts were replaced.

        Raises: as `RecGRELA.prefill_packed` and `put`.
        """
        caller = "UserStateStore.rebuild"
        ids = _user_ids(caller, users)
        if not isinstance(histories, Sequence | np.ndarray) or isinstance(histories, str):
            raise TypeError(f"{caller}: histories must be a list of lists, got {shown(histories)}")
        if len(histories) != len(ids):
            raise ValueError(
                f"{caller}: histories must be one per user, {len(ids)}, got {len(histories)}"
            )
        if len(np.unique(ids)) != len(ids):
            raise ValueError(f"{caller}: users must be distinct, got {_repeated(ids)} twice")
        given = [as_array(history, caller, "every history") for history in histories]
        for history in given:
            if history.ndim != 1:
                raise ValueError(
                    f"{caller}: every history must be items [L], got {list(history.shape)}"
                )
        seen = SeenItems.from_lists(given)  # which refuses what is no item row
        rows = [history.astype(np.int64) for history in given]
        everything = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *rows]))
        ends = torch.from_numpy(np.cumsum([0, *map(len, rows)]))
        inputs.check_packed(caller, self.model.config, everything, ends)  # before the first is put
        step = self.pools[0].capacity
        for start in range(0, len(ids), step):
            part = rows[start : start + step]
            bounds = np.cumsum([0, *map(len, part)])
            state = self.model.prefill_packed(
                torch.from_numpy(np.concatenate(part)).to(self._device),
                torch.from_numpy(bounds).to(self._device),
            )
            self.put(ids[start : start + step], state, seen[start : start + step])

    def evict(self, users: Ids | None = None, oldest: int | None = None) -> Evicted:
        """Take out some users, or the `oldest` ones; returns those who were there.

        `on_evict` is not called. The order is the order of leaving: users at rest come before those
        kept as in use, where a user gets by an event and not by a `lookup`.
        """
        if (users is None) == (oldest is None):
            raise ValueError("UserStateStore.evict: one of users and oldest must be given")
        self._check_free("UserStateStore.evict")
        if users is None:
            if isinstance(oldest, bool) or not isinstance(oldest, int) or oldest < 0:
                raise ValueError(
                    f"UserStateStore.evict: oldest must be an int >= 0, got {shown(oldest)}"
                )
            order = [pool.oldest(min(oldest, len(pool))) for pool in reversed(self.pools)]
            ids = np.concatenate(order)[:oldest]
        else:
            ids = _user_ids("UserStateStore.evict", users)
            ids = ids[np.sort(np.unique(ids, return_index=True)[1])]
            ids = ids[np.any([pool.find(ids) >= 0 for pool in self.pools], axis=0)]
        state, seen, _ = self.lookup(ids)
        for pool in self.pools:
            pool.remove(ids[pool.find(ids) >= 0])
        for user in ids.tolist():
            self._seen.pop(user, None)
        return Evicted(ids, state, seen)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything into one safetensors file, which appears whole or not at all.

        Raises OSError when the disk refuses; what was there stays.
        """
        from .store_file import save

        save(self, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: RecGRELA,
        on_evict: Callable[[Evicted], None] | None = None,
        device: torch.device | str | None = None,
    ) -> UserStateStore:
        """What `save` wrote: sizes, format and order of use included.

        Raises StateError for a file that is damaged, of something else or of another model;
        TypeError or ValueError for another kind of argument.
        """
        from .store_file import load

        return load(cls, path, model, on_evict, device)

    def _follow(self, ids: Users, items: Tensor) -> Tensor:
        """Events of users who all have room: each is read once and put back once."""
        users, place = np.unique(ids, return_inverse=True)
        once = len(users) == len(ids)
        if once:
            users, place = ids, np.arange(len(ids))
        state, seen, _ = self.lookup(users)
        parts = (state.buffer, state.position, state.hidden)
        padding = self.model.config.padding_idx
        rounds = _rounds(ids)
        hidden = None
        for number in range(int(rounds.max()) + 1):
            chosen = np.flatnonzero(rounds == number)
            index, rows = torch.from_numpy(chosen), torch.from_numpy(place[chosen])
            events = items[index.to(items.device)]
            part = state if once else state.select(rows.to(self._device))
            after = self.model.step(events.to(self._device), part)
            seen.select(place[chosen]).add(events, padding)
            if not once:
                for whole, some in zip(
                    parts, (part.buffer, part.position, part.hidden), strict=True
                ):
                    whole.index_copy_(0, rows.to(self._device), some)
            if hidden is None:
                hidden = after.new_empty(len(ids), after.shape[1])
            hidden[index.to(hidden.device)] = after
        assert hidden is not None
        happened = np.flatnonzero((items != padding).cpu().numpy())
        if once and len(happened) == len(ids):
            self._put(ids, state, seen)
        elif len(happened):  # a padding item is no event, and makes room for nobody
            those = place[happened[_last_of_each(ids[happened])]]
            chosen_state = self._state(*parts).select(torch.from_numpy(those).to(self._device))
            self._put(users[those], chosen_state, seen.select(those))
        return hidden

    def _put(self, ids: Users, state: UserState, seen: SeenItems | None) -> None:
        """All or nothing: what can fail, a format and `on_evict`, comes before the first change."""
        first, last = self.pools[0], self.pools[-1]
        split = max(0, len(ids) - first.capacity)
        early, late = ids[:split], ids[split:]  # the early ones leave the first pool at once
        given = (state.buffer, state.position, state.hidden)
        leaving, _ = _making_room(first, ids, len(late))
        moved = leaving
        parts: tuple[Tensor, ...] = first.read(first.find(leaving))
        if split:
            moved = np.concatenate([leaving, early])
            pairs = zip(parts, given, strict=True)
            parts = tuple(torch.cat([x, y[:split].to(x.device)]) for x, y in pairs)
        rows = first.encode(*(x[split:] for x in given))
        gone, excess, resting = ids[:0], len(moved), None
        if first is not last:
            gone, excess = _making_room(last, ids, len(moved))
            resting = self._encoded(moved[excess:], tuple(x[excess:] for x in parts))
        told = np.concatenate([gone, moved[:excess]])
        new = {} if seen is None else {user: seen.recent(i) for i, user in enumerate(ids.tolist())}
        if len(told) and self.on_evict is not None:
            pairs = zip(last.read(last.find(gone)), parts, strict=True)
            those = self._state(*(torch.cat([x, y[:excess]]) for x, y in pairs))
            self._tell(Evicted(told, those, self._seen_of(told, new)))
        if resting is not None:
            last.remove(np.concatenate([gone, _present(last, ids)]))
        first.remove(np.concatenate([leaving, _present(first, early)]))
        if resting is not None:
            last.write(moved[excess:], resting)
        first.write(late, rows)
        self._seen.update(new)
        for user in told.tolist():
            self._seen.pop(user, None)

    def _encoded(self, users: Users, parts: tuple[Tensor, ...]) -> Rows:
        """Users in the format at rest; StateError names one who does not fit."""
        last = self.pools[-1]
        try:
            return last.encode(*parts)
        except StateError:
            for i, user in enumerate(users):
                try:
                    last.encode(*(x[i : i + 1] for x in parts))
                except StateError:
                    limit = "float16 ends at 65504"
                    raise StateError(
                        f"UserStateStore.put: the state of user {user} must fit in {last.dtype} to "
                        f"make room, {limit}: evict or rebuild it, or use bfloat16 or float32"
                    ) from None
            raise

    def _tell(self, gone: Evicted) -> None:
        assert self.on_evict is not None
        self._evicting = True
        try:
            self.on_evict(gone)
        finally:
            self._evicting = False

    def _check_free(self, caller: str) -> None:
        if self._evicting:
            raise RuntimeError(f"{caller}: must not be called by on_evict, a put is under way")

    def _state(self, sums: Tensor, position: Tensor, hidden: Tensor) -> UserState:
        sums, position, hidden = (t.to(self._device) for t in (sums, position, hidden))
        return UserState(sums, position, hidden, self.layout, self.fingerprint)

    def _seen_of(self, users: Users, new: Mapping[int, np.ndarray] | None = None) -> SeenItems:
        """What is kept of them, or what is about to be."""
        known = self._seen if new is None else ChainMap(dict(new), self._seen)
        none = np.empty(0, dtype=np.int32)
        return SeenItems.of_recent([known.get(user, none) for user in users.tolist()])


def _user_ids(caller: str, users: Ids) -> Users:
    ids = as_array(users, caller, "users")
    if ids.ndim != 1:
        raise ValueError(f"{caller}: users must be [B], got {list(ids.shape)}")
    if len(ids) and ids.dtype.kind not in "iu":
        raise TypeError(f"{caller}: users must be integers, got {ids.dtype}")
    if ids.dtype == np.uint64 and len(ids) and int(ids.max()) > _LAST_USER:
        raise ValueError(f"{caller}: users must fit in int64, got {ids.max()}")
    return ids.astype(np.int64)


def _present(pool: Pool, users: Users) -> Users:
    return users[pool.find(users) >= 0]


def _making_room(pool: Pool, users: Users, count: int) -> tuple[Users, int]:
    """Who else leaves, oldest first, so that `count` new rows fit beside those who are none of
    `users`; and how many of the new ones do not fit even so."""
    here = len(_present(pool, users))
    others = len(pool) - here
    excess = max(0, others + count - pool.capacity)
    if not excess or not others:
        return users[:0], excess
    leaving = pool.oldest(min(excess + here, len(pool)))
    if here:
        leaving = leaving[~np.isin(leaving, users)]
    leaving = leaving[:excess]
    return leaving, excess - len(leaving)


def _last_of_each(ids: Users) -> Users:
    """Where each user comes last, ascending."""
    behind = np.unique(ids[::-1], return_index=True)[1]
    return np.sort(len(ids) - 1 - behind)


def _ends_of_parts(ids: Users, most: int) -> list[int]:
    """Where to cut, so that each part has at most `most` users."""
    ends: list[int] = []
    users: set[int] = set()
    if len(ids) > most and len(np.unique(ids)) > most:
        for i, user in enumerate(ids.tolist()):
            if len(users) == most and user not in users:
                ends.append(i)
                users = set()
            users.add(user)
    return [*ends, len(ids)] if len(ids) else []


def _repeated(ids: Users) -> int:
    values, counts = np.unique(ids, return_counts=True)
    return int(values[counts > 1][0])


def _rounds(ids: Users) -> Users:
    """How many earlier events of the same user each event has."""
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    new = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1))
    lengths = np.diff(new, append=len(ids))
    rounds = np.empty(len(ids), dtype=np.int64)
    rounds[order] = np.arange(len(ids)) - np.repeat(new, lengths)
    return rounds
