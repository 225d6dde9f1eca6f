"""A synthetic music log whose true next-item distribution is known.

Every listener has a hidden type ``z`` with a long-term taste for a few bands. After the songs
``x_1 .. x_t`` the next one is drawn from

    P(x | x_1 .. x_t, z) = burst * B(x) + (1 - burst) * ((1 - stray) * T_z(x) + stray * P_0(x))
    B(x)                 = sum_j lag_j * Genre(x; genre of x_{t-j}),  j = 0, 1, 2

``T_z`` is the taste of the type, ``P_0`` what everybody hears, ``B`` a short burst in the genres of
the last three songs (the first song has none). All types are equally likely, and ``B`` does not
depend on ``z``; so the posterior of ``z`` is an exact product over the history, and so is the
oracle, which sees the history alone: no model can predict better on average. Six songs show little
of a taste, a hundred show all of it: counting recent songs is not enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from recgrela_ext.data.interactions import Interactions
from recgrela_ext.errors import DataError

if TYPE_CHECKING:
    import torch

SONGS_PER_BAND = 6
BANDS_PER_TASTE = 8
GEN, PER, EXP = 3, 3, 1.0
LAGS = np.array([0.6, 0.25, 0.15])
_GENRES = (
    "ambient", "bluegrass", "bossa nova", "chamber pop", "cumbia", "dream pop", "dub", "fado",
    "folk", "funk", "garage rock", "house", "jazz", "klezmer", "lo-fi", "metal", "new wave",
    "opera", "soul", "surf rock",
)  # fmt: skip
_COLOURS = (
    "Amber", "Broken", "Copper", "Distant", "Electric", "Frozen", "Golden", "Hollow", "Idle",
    "Jaded", "Kind", "Lunar", "Midnight", "Nervous", "Open", "Paper", "Quiet", "Restless",
    "Silver", "Tender", "Upper", "Velvet", "Wild", "Yellow",
)  # fmt: skip
_THINGS = (
    "Anchor", "Bridge", "Comet", "Dune", "Echo", "Fox", "Garden", "Harbour", "Island", "Jackdaw",
    "Kite", "Lantern", "Meadow", "Needle", "Orchard", "Pilot", "Quarry", "River", "Signal",
    "Tide", "Umbrella", "Valley", "Window", "Zephyr",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Oracle:
    """The generator's true next-item distribution given a history; a scorer for ``evaluate``.

    Item rows are those of the log that came with it, and of its ``leave_one_out`` split.

    Args:
        taste: float64 ``[Z, num_items]``, ``T_z``; rows sum to 1.
        common: float64 ``[num_items]``, ``P_0``.
        in_genre: float64 ``[num_genres, num_items]``; rows sum to 1.
        genre: int64 ``[num_items]``.
        burst, stray: the probabilities above.
        user_type: int64 ``[num_users]``, the hidden types; :meth:`score` does not look.
    """

    taste: np.ndarray
    common: np.ndarray
    in_genre: np.ndarray
    genre: np.ndarray
    burst: float
    stray: float
    user_type: np.ndarray

    @property
    def num_items(self) -> int:
        return len(self.common)

    def score(self, histories: Sequence[np.ndarray]) -> torch.Tensor:
        """Log-probabilities of the next item, float32 ``[b, num_items + 1]``; padding is -inf.

        Args:
            histories: item rows (1..num_items) of each user, oldest first; may be empty.
        """
        import torch

        out = np.full((len(histories), self.num_items + 1), -np.inf, dtype=np.float32)
        for row, history in enumerate(histories):
            out[row, 1:] = np.log(self.next_item(np.asarray(history, dtype=np.int64) - 1))
        return torch.from_numpy(out)

    def next_item(self, songs: np.ndarray) -> np.ndarray:
        """Probabilities, float64 ``[num_items]``, after the 0-based ``songs`` ``[t]``."""
        long_term = (1 - self.stray) * (self.posterior(songs) @ self.taste)
        long_term += self.stray * self.common
        if not len(songs):
            return np.asarray(long_term)
        recent = self.genre[songs[::-1][: len(LAGS)]]
        lags = LAGS[: len(recent)] / LAGS[: len(recent)].sum()
        return np.asarray(
            self.burst * (lags @ self.in_genre[recent]) + (1 - self.burst) * long_term
        )

    def posterior(self, songs: np.ndarray) -> np.ndarray:
        """Probability of every type, float64 ``[Z]``, given the 0-based ``songs`` ``[t]``."""
        long_term = (1 - self.stray) * self.taste[:, songs] + self.stray * self.common[songs]
        weight = np.full(len(songs), 1 - self.burst)
        weight[:1] = 1.0
        likelihood = long_term * weight + self.burst * self._burst(songs)
        log = np.log(likelihood).sum(axis=1)
        odds = np.exp(log - log.max())
        return np.asarray(odds / odds.sum())

    def _burst(self, songs: np.ndarray) -> np.ndarray:
        """``B(x_t | x_1 .. x_{t-1})`` for every event; 0 for the first."""
        total, lags = np.zeros(len(songs)), np.zeros(len(songs))
        for lag, share in enumerate(LAGS, start=1):
            total[lag:] += share * self.in_genre[self.genre[songs[:-lag]], songs[lag:]]
            lags[lag:] += share
        return np.asarray(total / np.maximum(lags, share))


def make_synthetic(
    num_users: int = 1500,
    num_items: int = 480,
    seed: int = 0,
    *,
    mean_length: int = 100,
    num_types: int = 32,
    burst: float = 0.4,
    stray: float = 0.2,
) -> tuple[Interactions, Oracle]:
    """A seeded log of plays and its oracle; every item has a title with its band and genre.

    Args:
        num_users, num_items: sizes; at least 1 and 120.
        seed: the same seed gives the same log.
        mean_length: events per user, between half and one and a half of it, at least 4.
        num_types: hidden types of listeners.
        burst: share of events in a short burst, in [0, 1).
        stray: share of the other events that everybody hears, in (0, 1].

    Raises:
        DataError: an argument outside its range.
    """
    for name, value, smallest in (
        ("num_users", num_users, 1),
        ("num_items", num_items, 120),
        ("mean_length", mean_length, 4),
        ("num_types", num_types, 1),
    ):
        if value < smallest:
            raise DataError(f"make_synthetic: {name} must be at least {smallest}, got {value}")
    if not (0 <= burst < 1 and 0 < stray <= 1):
        raise DataError(
            f"make_synthetic: burst must lie in [0, 1) and stray in (0, 1], got {burst}, {stray}"
        )
    rng = np.random.default_rng(seed)
    band = np.arange(num_items) // SONGS_PER_BAND
    genre_of_band = np.arange(band[-1] + 1) % len(_GENRES)
    genre = genre_of_band[band]
    in_genre = np.zeros((len(_GENRES), num_items))
    in_genre[genre, np.arange(num_items)] = rng.uniform(0.5, 1.5, size=num_items)
    in_genre /= in_genre.sum(axis=1, keepdims=True)
    taste, common = _tastes(rng, band, in_genre, num_types)
    types = rng.integers(num_types, size=num_users)
    oracle = Oracle(taste, common, in_genre, genre, burst, stray, types)
    lengths = rng.integers(mean_length // 2, mean_length + mean_length // 2 + 1, size=num_users)
    plays = _play(rng, oracle, int(lengths.max()))
    present = np.arange(plays.shape[1]) < lengths[:, None]
    user, place = np.nonzero(present)
    gaps = rng.integers(60, 40_000, size=plays.shape)
    start = rng.integers(0, 200 * 86_400, size=(num_users, 1)) + 1_700_000_000
    item_ids = np.arange(1, num_items + 1)
    log = Interactions(
        user.astype(np.int32),
        plays[user, place].astype(np.int32),
        (start + np.cumsum(gaps, axis=1))[user, place],
        np.arange(1, num_users + 1),
        item_ids,
        dict(zip(item_ids.tolist(), _titles(rng, band, genre_of_band), strict=True)),
        name=f"synthetic-{num_users}x{num_items}-seed{seed}",
    )
    return log, oracle


def _tastes(
    rng: np.random.Generator, band: np.ndarray, in_genre: np.ndarray, num_types: int
) -> tuple[np.ndarray, np.ndarray]:
    """``T_z``: a few bands, of which some songs are played far more than others; ``P_0``."""
    num_bands = int(band[-1]) + 1
    songs = np.zeros((num_bands, len(band)))
    songs[band, np.arange(len(band))] = (1.0 + np.arange(len(band)) % SONGS_PER_BAND) ** -2.0
    songs /= songs.sum(axis=1, keepdims=True)
    loved = np.zeros((num_types, num_bands))
    for row in loved:
        mine = rng.choice(num_bands, size=BANDS_PER_TASTE, replace=False)
        row[mine] = rng.uniform(0.5, 1.5, size=len(mine))
    loved /= loved.sum(axis=1, keepdims=True)
    fame = rng.permutation((1.0 + np.arange(num_bands)) ** -0.7)
    fame /= fame.sum()
    everywhere = in_genre[np.arange(num_bands) % len(in_genre)]
    return loved @ songs, fame @ (songs + everywhere) / 2


def _play(rng: np.random.Generator, oracle: Oracle, length: int) -> np.ndarray:
    """0-based songs, int64 ``[num_users, length]``, all users one event at a time."""
    users = len(oracle.user_type)
    taste, in_genre = _ladder(oracle.taste), _ladder(oracle.in_genre)
    common = _ladder(oracle.common[None])
    plays = np.empty((users, length), dtype=np.int64)
    for t in range(length):
        follows = rng.random(users) < (oracle.burst if t else 0.0)
        strays = rng.random(users) < oracle.stray
        own = _draw(rng, taste, oracle.user_type, oracle.num_items)
        heard = _draw(rng, common, np.zeros(users, np.int64), oracle.num_items)
        plays[:, t] = np.where(strays, heard, own)
        if t:
            lags = LAGS[: min(t, len(LAGS))]
            lag = rng.choice(len(lags), size=users, p=lags / lags.sum()) + 1
            recent = oracle.genre[plays[np.arange(users), t - lag]]
            again = _draw(rng, in_genre, recent, oracle.num_items)
            plays[:, t] = np.where(follows, again, plays[:, t])
    return plays


def _ladder(rows: np.ndarray) -> np.ndarray:
    """Cumulative rows one above the other, so that one sorted array serves every row."""
    steps = np.cumsum(rows, axis=1)
    steps /= steps[:, -1:]
    return np.asarray((steps + np.arange(len(rows))[:, None]).ravel())


def _draw(
    rng: np.random.Generator, ladder: np.ndarray, row: np.ndarray, num_items: int
) -> np.ndarray:
    # Kept clear of the rungs at whole numbers, where rounding could reach the next row.
    height = row + np.clip(rng.random(len(row)), 1e-9, 1 - 1e-9)
    return np.searchsorted(ladder, height, side="left") - row * num_items


def _titles(rng: np.random.Generator, band: np.ndarray, genre: np.ndarray) -> list[str]:
    bands = [f"The {name}s".replace("xs", "xes") for name in _names(rng, len(genre))]
    songs = _names(rng, len(band))
    return [
        f"{song} - {bands[which]} ({_GENRES[genre[which]]})"
        for song, which in zip(songs, band.tolist(), strict=True)
    ]


def _names(rng: np.random.Generator, count: int) -> list[str]:
    """Distinct two-word names; a number is added when the words run out."""
    pairs = [f"{colour} {thing}" for colour in _COLOURS for thing in _THINGS]
    order = rng.permutation(len(pairs))
    return [
        pairs[order[i % len(pairs)]] + (f" {i // len(pairs) + 1}" if i >= len(pairs) else "")
        for i in range(count)
    ]
