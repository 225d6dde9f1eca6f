"""Structured values out of a fuzzer's bytes: the same bytes always give the same values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")
REFUSED = ""  # what a target gives for an input that it does not accept

INTERESTING: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    64,
    255,
    2**31 - 1,
    2**31,
    2**53 + 1,
    2**63 - 1,
    2**63,
    -(2**63),
    10**30,
    0.0,
    0.5,
    -1.5,
    1e300,
    -1e-300,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    "a",
    "int8",
    "../x",
    "x" * 300,
    "é",
    "\ud800",
    "\0",
    [],
    [0],
    [1, 2, 3],
    [[1], [2]],
    {},
    {"a": 1},
)  # fmt: skip


class Draw:
    """Reads `data` from the front; zeros where it has ended."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        part = self.data[self.at : self.at + count]
        self.at += count
        return part.ljust(count, b"\0")

    def byte(self) -> int:
        return self.take(1)[0]

    def below(self, limit: int) -> int:
        """0 <= value < limit."""
        size = 1 if limit <= 256 else 4
        return int.from_bytes(self.take(size), "little") % limit

    def flag(self) -> bool:
        return bool(self.byte() & 1)

    def one_of(self, choices: Sequence[T]) -> T:
        return choices[self.below(len(choices))]

    def rest(self) -> bytes:
        part = self.data[self.at :]
        self.at = len(self.data)
        return part

    def value(self) -> Any:
        """Something JSON can hold, or nearly."""
        if self.flag():
            return self.one_of(INTERESTING)
        return int.from_bytes(self.take(2), "little", signed=True)

    def edited(self, text: bytes) -> bytes:
        """`text` with a few cuts, overwritten bytes and insertions."""
        data = bytearray(text)
        for _ in range(1 + self.below(4)):
            if not data:
                break
            place = self.below(len(data))
            kind = self.below(4)
            if kind == 0:
                data[place] = self.byte()
            elif kind == 1:
                del data[place : place + 1 + self.below(16)]
            elif kind == 2:
                data[place:place] = self.take(1 + self.below(8))
            else:
                del data[place:]
        return bytes(data)


def one_line(error: Exception) -> None:
    """Every refusal is one line with something in it."""
    text = str(error)
    assert text, "says nothing"
    assert "\n" not in text, f"more than a line: {text!r}"


def changed(draw: Draw, content: Any) -> Any:
    """A JSON value with one place replaced, removed or added, at any depth."""
    if isinstance(content, dict) and content and draw.byte() % 4 != 0:
        key = draw.one_of(sorted(content))
        action = draw.below(5)
        if action == 0:
            return {name: x for name, x in content.items() if name != key}
        if action == 1:
            return {**content, str(draw.value())[:40]: draw.value()}
        return {**content, key: changed(draw, content[key])}
    if isinstance(content, list) and content and draw.byte() % 4 != 0:
        place = draw.below(len(content))
        action = draw.below(4)
        if action == 0:
            return content[:place] + content[place + 1 :]
        if action == 1:
            return [*content[:place], draw.value(), *content[place:]]
        return [*content[:place], changed(draw, content[place]), *content[place + 1 :]]
    return draw.value()
