"""Files that take their place whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path


@contextlib.contextmanager
def replacing(*paths: str | os.PathLike[str]) -> Iterator[list[Path]]:
    """Empty files to be written, which take the names of `paths` at the end.

    All of them are on the disk before the first takes its name, so that an error leaves what was
    there, and a process killed before that does too. Each name changes in one step; several do so
    in the order of `paths`. A link stays, and what it leads to is replaced. A file that is replaced
    passes on its permissions.

    Raises:
        FileExistsError: at one of `paths` is something else than a file, a pipe or a device.
    """
    targets = [Path(os.path.realpath(path)) for path in paths]
    for target in targets:
        if target.exists() and not target.is_file():
            raise FileExistsError(errno.EEXIST, "must be a regular file", str(target))
    parts: list[Path] = []
    try:
        for target in targets:
            part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
            part.open("xb").close()
            parts.append(part)
        yield parts
        for part, target in zip(parts, targets, strict=True):
            if target.exists():
                with contextlib.suppress(OSError):  # a file system without permissions
                    part.chmod(stat.S_IMODE(target.stat().st_mode))
            flush(part)
        for part, target in zip(parts, targets, strict=True):
            os.replace(part, target)
        for folder in {target.parent for target in targets}:
            flush(folder)
    except BaseException:
        for part in parts:
            part.unlink(missing_ok=True)
        raise


def write_files(files: Mapping[Path, bytes | str]) -> None:
    """`replacing` for contents at hand; text as UTF-8. Pipes and devices are written to."""
    contents = {p: x.encode() if isinstance(x, str) else x for p, x in files.items()}
    special = [path for path in contents if path.exists() and not (path.is_file() or path.is_dir())]
    for path in special:
        path.write_bytes(contents.pop(path))
    with replacing(*contents) as parts:
        for part, content in zip(parts, contents.values(), strict=True):
            part.write_bytes(content)


def flush(path: Path) -> None:
    """A file, or a folder's list of names, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
