"""What a causal model remembers of its users: a fixed number of bytes each, whatever their history.

One row of `buffer` [B, F] is one user, layer after layer:

    kv [H, D, D] (key dim first) | k_sum [H, D] | conv [W-1, H*D] (oldest first)

beside it `position` [B], the number of items seen, and `hidden` [B, hidden_size], the hidden state
after the last of them. Four layers, hidden 64 and four heads are 20,480 bytes + 264 per user.
"""

from __future__ import annotations

import dataclasses
import struct
import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..arguments import usable_device
from ..errors import StateError, shown
from ..layers.rela import State
from . import blob as storage
from .inputs import check_integers
from .persistence import check_model
from .seen import STATE_MAGIC, SeenItems

if TYPE_CHECKING:
    from .recgrela import RecGRELA

MAX_EVENTS = 1_000_000
_warned = False  # of sums that end, once in a process: services hold many states
LAST_POSITION = 1 << 53  # beyond it float64 cannot tell positions apart

# where the seen items begin (0: none), dtype, dtype of hidden, fingerprint, position, sizes
_HEADER = struct.Struct("<IBB16sqII")


@dataclasses.dataclass(frozen=True)
class StateLayout:
    """Sizes of one user's row."""

    num_layers: int
    num_heads: int
    head_dim: int
    kept: int  # earlier values the short convolution needs, W - 1

    @property
    def layer_size(self) -> int:
        """Elements per layer."""
        return self.num_heads * self.head_dim * (self.head_dim + 1 + self.kept)

    @property
    def row_size(self) -> int:
        """Elements per user, F."""
        return self.num_layers * self.layer_size

    def views(self, buffer: Tensor, position: Tensor) -> list[State]:
        """Per layer (kv, k_sum, conv, position), the first three as views of buffer [B, F]."""
        heads, dim = self.num_heads, self.head_dim
        sizes = (heads * dim * dim, heads * dim, self.kept * heads * dim)
        layers = []
        for layer in buffer.split(self.layer_size, dim=1):
            kv, k_sum, conv = layer.split(sizes, dim=1)
            layers.append(
                (
                    kv.unflatten(1, (heads, dim, dim)),
                    k_sum.unflatten(1, (heads, dim)),
                    conv.unflatten(1, (self.kept, heads * dim)),
                    position,
                )
            )
        return layers


class _Clock:
    """An upper bound of the largest position among a state and all its views."""

    def __init__(self, position: Tensor, bound: int) -> None:
        self.position = position
        self.bound = bound

    def advance(self, events: int) -> None:
        global _warned
        self.bound += events
        if self.bound <= MAX_EVENTS or _warned or self.position.numel() == 0:
            return
        self.bound = int(self.position.max())
        if self.bound > MAX_EVENTS:
            _warned = True
            warnings.warn(
                f"UserState: a user has {self.bound} events; float32 sums are accurate up to "
                f"{MAX_EVENTS}. Prefill this user's recent history into a fresh state. This is "
                "said once in a process, whoever else gets there",
                RuntimeWarning,
                stacklevel=4,
            )


class UserState:
    """States of B users of one causal model; made by `RecGRELA.init_state` and `prefill`.

    `state[i:j]` is a view: steps on it write through. Float32 (float64 for a float64 model) while
    in use; smaller formats are for rest alone, see `to_bytes`.
    """

    def __init__(
        self,
        buffer: Tensor,
        position: Tensor,
        hidden: Tensor,
        layout: StateLayout,
        fingerprint: bytes,
        clock: _Clock | None = None,
    ) -> None:
        self.buffer = _writable(buffer)  # [B, F]
        self.position = position = _writable(position)  # [B] int64
        self.hidden = _writable(hidden)  # [B, hidden_size]
        self.layout = layout
        self.fingerprint = fingerprint
        if clock is None:
            bound = int(position.max()) if position.numel() else 0
            clock = _Clock(position, bound)
        self._clock = clock

    @cached_property
    def layers(self) -> list[State]:
        """Per layer (kv, k_sum, conv, position), views of this state."""
        return self.layout.views(self.buffer, self.position)

    @classmethod
    def zeros(
        cls,
        batch_size: int,
        layout: StateLayout,
        hidden_size: int,
        fingerprint: bytes,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> UserState:
        """The state of `batch_size` users before their first item."""
        with torch.inference_mode(False):
            position = torch.zeros(batch_size, dtype=torch.int64, device=device)
            return cls(
                torch.zeros(batch_size, layout.row_size, dtype=dtype, device=device),
                position,
                torch.zeros(batch_size, hidden_size, dtype=dtype, device=device),
                layout,
                fingerprint,
                _Clock(position, 0),
            )

    def __reduce__(self) -> tuple[Any, ...]:
        # `layers` are views: a copy makes its own from the copied buffer
        parts = (self.buffer, self.position, self.hidden, self.layout, self.fingerprint)
        return UserState, parts

    def __len__(self) -> int:
        return self.buffer.shape[0]

    def __getitem__(self, users: int | slice) -> UserState:
        """A view of some users; an int gives a state of one."""
        if isinstance(users, int) and not isinstance(users, bool):
            if not -len(self) <= users < len(self):
                raise IndexError(f"UserState: index must be below {len(self)} users, got {users}")
            users = slice(users % len(self), users % len(self) + 1)
        if not isinstance(users, slice):
            raise TypeError(f"UserState: index must be int or slice, got {type(users).__name__}")
        if users.step is not None and users.step < 1:
            raise ValueError(f"UserState: a slice must go forwards, got step {users.step}")
        return UserState(
            self.buffer[users],
            self.position[users],
            self.hidden[users],
            self.layout,
            self.fingerprint,
            self._clock,
        )

    def select(self, users: Tensor) -> UserState:
        """The users with these indices [n] int64, in this order; a copy."""
        check_integers("UserState.select", "users", users)
        if users.dim() != 1:
            raise ValueError(f"UserState.select: users must be [n], got {list(users.shape)}")
        if users.numel():
            low, high = (int(x) for x in users.aminmax())
            if low < 0 or high >= len(self.position):
                raise ValueError(
                    f"UserState.select: users must lie in 0..{len(self.position) - 1}, "
                    f"got {low if low < 0 else high}"
                )
        return UserState(
            self.buffer.index_select(0, users),
            self.position.index_select(0, users),
            self.hidden.index_select(0, users),
            self.layout,
            self.fingerprint,
        )

    @staticmethod
    def cat(states: Sequence[UserState]) -> UserState:
        """One state with the users of all (a copy); ValueError for none or different models,
        TypeError for what is no state."""
        if not isinstance(states, Sequence) or not all(isinstance(x, UserState) for x in states):
            raise TypeError(
                f"UserState.cat: states must be a list of UserState, got {shown(states)}"
            )
        if not states:
            raise ValueError("UserState.cat: states must hold at least one state, got none")
        first = states[0]
        for other in states:
            if other.layout != first.layout or other.fingerprint != first.fingerprint:
                raise ValueError("UserState.cat: states must belong to one model")
        return UserState(
            torch.cat([s.buffer for s in states]),
            torch.cat([s.position for s in states]),
            torch.cat([s.hidden for s in states]),
            first.layout,
            first.fingerprint,
        )

    def clone(self) -> UserState:
        """A copy that shares nothing."""
        return UserState.cat([self])

    def to(self, device: torch.device | str) -> UserState:
        """The state on `device`: itself where it is there already, else a copy. ValueError where
        there is no such device."""
        place = usable_device(device, "UserState.to")
        if place == self.buffer.device:
            return self
        parts = (self.buffer.to(place), self.position.to(place), self.hidden.to(place))
        return UserState(*parts, self.layout, self.fingerprint)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole batch."""
        return sum(t.numel() * t.element_size() for t in (self.buffer, self.position, self.hidden))

    def advance(self, active: Tensor | int | None, most: int) -> None:
        """Count new events: `active` [B] per user (None: one each), `most` at the most."""
        self.position += 1 if active is None else active
        self._clock.advance(most)

    def to_bytes(
        self,
        i: int,
        dtype: torch.dtype | str | None = None,
        seen: SeenItems | None = None,
    ) -> bytes:
        """User `i` as bytes for storage.

        Args:
            i: index of the user.
            dtype: format of the sums: float32, bfloat16, float16, int8 (with one float16 scale for
                every head_dim values; the hidden state is bfloat16) or float64; default: as in
                use. Convert on put and evict, not at every event: rounding at each step ruins
                long histories.
            seen: also stores what user `i` of it has seen; `SeenItems.from_bytes` reads it back.

        Raises:
            StateError: a value does not fit in float16.
        """
        one = self[i]
        if seen is not None and not isinstance(seen, SeenItems):
            raise TypeError(
                f"UserState.to_bytes: seen must be SeenItems, got {type(seen).__name__}"
            )
        if seen is not None and len(seen) != len(self):
            raise ValueError(
                f"UserState.to_bytes: seen must hold {len(self)} users, got {len(seen)}"
            )
        row, hidden = one.buffer[0].detach().cpu(), one.hidden[0].detach().cpu()
        dtype = storage.storage_dtype("UserState.to_bytes", row.dtype if dtype is None else dtype)
        hidden = hidden.to(storage.hidden_dtype(dtype, hidden.dtype))
        data = storage.pack(row, dtype, self.layout.head_dim) + storage.raw_bytes(hidden)
        header = _HEADER.pack(
            0 if seen is None else _HEADER.size + len(data),
            storage.DTYPES.index(dtype),
            storage.DTYPES.index(hidden.dtype),
            self.fingerprint,
            int(one.position[0]),
            row.numel(),
            hidden.numel(),
        )
        ids = b"" if seen is None else seen[i].recent(0).tobytes()
        return storage.seal(STATE_MAGIC, header + data + ids)

    @staticmethod
    def from_bytes(blob: bytes, model: RecGRELA) -> UserState:
        """A state of one user from `to_bytes`, on the device of `model`.

        Raises StateError when the bytes are damaged, of another version, or written by a model with
        another configuration or other weights; TypeError for another kind of argument.
        """
        caller = "UserState.from_bytes"
        check_model(caller, model)
        body = storage.unseal(caller, blob, (STATE_MAGIC,), _HEADER.size)[1]
        _, code, hidden_code, fingerprint, position, size, width = _HEADER.unpack_from(body)
        if fingerprint != model.fingerprint():
            raise StateError(
                f"{caller}: blob must come from this model, got one of another configuration or "
                "other weights"
            )
        state = model.init_state(1)
        known = max(code, hidden_code) < len(storage.DTYPES) and 0 <= position <= LAST_POSITION
        if not known or (size, width) != (state.layout.row_size, state.hidden.shape[1]):
            raise StateError(f"{caller}: blob must have a header that fits this model, got another")
        dtype, hidden_dtype = storage.DTYPES[code], storage.DTYPES[hidden_code]
        if not hidden_dtype.is_floating_point:
            raise StateError(f"{caller}: blob must hold floating hidden states, got {hidden_dtype}")
        group = state.layout.head_dim
        middle = _HEADER.size + storage.packed_size(size, dtype, group)
        end = middle + width * hidden_dtype.itemsize
        if end > len(body):
            raise StateError(f"{caller}: blob must be whole, got {len(body)} of {end} bytes")
        state.buffer[0] = storage.unpack(body[_HEADER.size : middle], dtype, group)
        state.hidden[0] = storage.raw_tensor(body[middle:end], hidden_dtype)
        state.position[0] = position
        state.advance(0, position)
        return state


def _writable(x: Tensor) -> Tensor:
    """x, or a copy of an inference tensor: that could not be written to outside inference mode."""
    if not x.is_inference():
        return x
    with torch.inference_mode(False):
        return x.clone()
