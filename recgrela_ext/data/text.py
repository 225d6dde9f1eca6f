"""Text files as one checked byte stream: progress by bytes, UTF-8 errors with their byte offset."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from recgrela_ext.errors import DataError


class TextSource(io.RawIOBase):
    """Several files read one after the other as one stream of lines; ``.gz`` is unpacked.

    Args:
        paths: the files, in order; a missing line feed at the end of one is supplied.
        progress: True or False; None shows the bar on a terminal.
        description: text beside the bar.
        before: a line of ours that comes first.

    A byte order mark at the beginning of a file is left out.
    """

    def __init__(
        self, paths: Sequence[Path], progress: bool | None, description: str, before: bytes = b""
    ) -> None:
        super().__init__()
        self._head = before
        self._paths = list(paths)
        self._next = 0
        self._raw: IO[bytes] | None = None
        self._text: IO[bytes] | None = None
        self._last = b"\n"
        self._bar = tqdm(
            total=sum(path.stat().st_size for path in self._paths),
            unit="B",
            unit_scale=True,
            desc=description,
            disable=None if progress is None else not progress,
        )

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        while True:
            if self._head:
                data, self._head = self._head[: len(view)], self._head[len(view) :]
                view[: len(data)] = data
                return len(data)
            if self._text is None and not self._open_next():
                return 0
            assert self._text is not None
            assert self._raw is not None
            begins = self._offset == 0
            data = self._read(len(view))
            if data:
                self._last = data[-1:]
                if begins:
                    data = data.removeprefix(codecs.BOM_UTF8)
                if data:
                    view[: len(data)] = data
                    return len(data)
                continue
            self._close_current()
            if self._last != b"\n":
                self._last = b"\n"
                view[:1] = b"\n"
                return 1

    def close(self) -> None:
        self._close_current()
        self._bar.close()
        super().close()

    def _open_next(self) -> bool:
        if self._next == len(self._paths):
            return False
        path = self._paths[self._next]
        self._next += 1
        self._raw = path.open("rb")
        self._text = open_bytes(self._raw, path)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._offset = 0
        self._start = 0
        return True

    def _close_current(self) -> None:
        if self._text is not None and self._raw is not None:
            self._text.close()
            self._raw.close()
        self._text = self._raw = None

    def _read(self, size: int) -> bytes:
        assert self._text is not None
        assert self._raw is not None
        path = self._paths[self._next - 1]
        try:
            data = self._text.read(size)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path}: must be readable to its end, got {error}") from None
        pending = len(self._decoder.getstate()[0])
        try:
            self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            offset = self._offset - pending + error.start
            raise DataError(
                f"{path}: must be UTF-8 text, got byte 0x{error.object[error.start]:02x} "
                f"at byte offset {offset}"
            ) from None
        zero = data.find(b"\0")
        if zero >= 0:  # the tail of a file after a power cut; the CSV parser would cut the field
            raise DataError(
                f"{path}: must be text, got a zero byte at byte offset {self._offset + zero}"
            )
        self._offset += len(data)
        place = self._raw.tell()
        self._bar.update(place - self._start)
        self._start = place
        return data


def open_bytes(raw: IO[bytes], path: Path) -> IO[bytes]:
    return gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw  # type: ignore[return-value]


def first_line(path: Path) -> str:
    """The first line without its end; DataError when the file is empty or not UTF-8 there."""
    try:
        with path.open("rb") as raw, open_bytes(raw, path) as text:
            line = text.readline(1 << 20)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: must be readable, got {error}") from None
    if not line:
        raise DataError(f"{path}: must hold events, got an empty file")
    try:
        return line.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: must be UTF-8 text, got byte 0x{line[error.start]:02x} "
            f"at byte offset {error.start}"
        ) from None
