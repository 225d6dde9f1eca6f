"""Fetch public data sets: checksum, resume, atomic rename; or name the page to visit.

A download grows in ``<file>.part`` and takes its name only after the checksum held, so a file
under its own name is always whole; an interrupted download continues where it stopped.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shutil
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

from recgrela_ext.errors import DataError, shown

_GROUPLENS = "https://files.grouplens.org/datasets/movielens/"
_BLOCK = 1 << 20
_TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class DataSet:
    """A public data set.

    Args:
        page: the page with its terms.
        url: the archive, or None where the terms ask for a visit to the page.
        folder: what the archive unpacks to.
    """

    page: str
    url: str | None = None
    folder: str = ""


def _movielens(name: str) -> DataSet:
    page = f"https://grouplens.org/datasets/movielens/{name.removeprefix('ml-')}/"
    return DataSet(page, f"{_GROUPLENS}{name}.zip", name)


DATASETS: dict[str, DataSet] = {
    "ml-100k": _movielens("ml-100k"),
    "ml-1m": _movielens("ml-1m"),
    "ml-10m": DataSet(
        "https://grouplens.org/datasets/movielens/10m/", f"{_GROUPLENS}ml-10m.zip", "ml-10M100K"
    ),
    "ml-20m": _movielens("ml-20m"),
    "ml-25m": _movielens("ml-25m"),
    "ml-32m": _movielens("ml-32m"),
    "ml-latest-small": DataSet(
        "https://grouplens.org/datasets/movielens/latest/",
        f"{_GROUPLENS}ml-latest-small.zip",
        "ml-latest-small",
    ),
    "netflix": DataSet("https://www.kaggle.com/datasets/netflix-inc/netflix-prize-data"),
    "lfm1b": DataSet("http://www.cp.jku.at/datasets/LFM-1b/"),
    "lfm1b-artists": DataSet("https://recbole.io/dataset_list.html"),
    "tmall": DataSet("https://tianchi.aliyun.com/dataset/42"),
}


def fetch_dataset(
    name: str,
    folder: str | os.PathLike[str],
    *,
    progress: bool | None = None,
    checksum: str | None = None,
    url: str | None = None,
) -> Path:
    """Download and unpack a data set; returns the folder for ``Interactions.from_file``.

    Args:
        name: a key of ``DATASETS``.
        folder: where the data set's own folder appears; one that is there is used as it is.
        progress: show a bar on stderr; None shows it on a terminal.
        checksum: md5 (32 digits) or sha256 (64) of the archive. None fetches the ``.md5`` file
            that GroupLens publishes beside each archive.
        url: another place of the same archive, a mirror say.

    Raises:
        DataError: an unknown name; a data set whose terms ask for a visit to its page (the page
            is in the message); no network; a wrong checksum.
    """
    known = DATASETS.get(name) if isinstance(name, str) else None
    if known is None:
        raise DataError(
            f"fetch_dataset: name must be one of {', '.join(DATASETS)}, got {shown(name)}"
        )
    source = url or known.url
    if source is None:
        raise DataError(
            f"fetch_dataset: {name} is not downloaded, its terms must be accepted at "
            f"{known.page}; then pass the path of the files"
        )
    target = Path(folder) / (known.folder or name)
    if target.is_dir():
        return target
    archive = Path(folder) / source.rpartition("/")[2]
    digest = checksum or published_md5(source + ".md5")
    download(source, archive, digest, progress=progress)
    _unpack(archive, target)
    archive.unlink()
    return target


def published_md5(url: str) -> str:
    """The md5 in a ``.md5`` file, in any of the usual layouts."""
    with _open(url) as stream:
        text = stream.read(_BLOCK).decode("latin-1")
    found = re.search(r"\b[0-9a-fA-F]{32}\b", text)
    if found is None:
        raise DataError(f"download: {url} must hold an md5, got {text[:60]!r}")
    return found.group().lower()


def download(
    url: str, target: str | os.PathLike[str], checksum: str, *, progress: bool | None = None
) -> Path:
    """Fetch ``url`` to ``target``, continuing ``<target>.part`` where the server allows it.

    Args:
        url: http, https or file.
        checksum: md5 or sha256 in hexadecimal.

    Raises:
        DataError: unreachable, cut off, or another checksum (the part file is then removed).
    """
    target = Path(target)
    if not re.fullmatch(r"[0-9a-fA-F]{32}|[0-9a-fA-F]{64}", checksum):
        raise DataError(f"download: checksum must be an md5 or a sha256, got {shown(checksum)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    if not (part.exists() and _digest(part, checksum) == checksum.lower()):
        _receive(url, part, progress)
        found = _digest(part, checksum)
        if found != checksum.lower():
            part.unlink()
            raise DataError(f"download: checksum of {url} must be {checksum}, got {found}")
    os.replace(part, target)
    return target


def _receive(url: str, part: Path, progress: bool | None) -> None:
    have = part.stat().st_size if part.exists() else 0
    with _open(url, have) as stream:
        # A server that ignores the range sends everything (200): begin anew.
        resumed = have > 0 and getattr(stream, "status", None) == 206
        length = int(stream.headers.get("Content-Length") or 0)  # type: ignore[attr-defined]
        begin = have if resumed else 0
        with (
            part.open("ab" if resumed else "wb") as out,
            tqdm(
                total=begin + length or None,
                initial=begin,
                unit="B",
                unit_scale=True,
                desc=url.rpartition("/")[2],
                disable=None if progress is None else not progress,
            ) as bar,
        ):
            try:
                while block := stream.read(_BLOCK):
                    out.write(block)
                    bar.update(len(block))
            except (OSError, http.client.HTTPException) as error:
                raise DataError(f"download: {url} must arrive whole, got {error}") from None
        received = part.stat().st_size - begin
    if length and received < length:
        raise DataError(
            f"download: {url} must arrive whole, got {received} of {length} bytes; "
            "run again to continue"
        )


def _open(url: str, start: int = 0) -> IO[bytes]:
    headers = {"User-Agent": "recgrela"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        request = urllib.request.Request(url, headers=headers)
        return urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part file is as long as the whole one, or longer: begin anew
            return _open(url)
        raise DataError(f"download: {url} must be reachable, got HTTP {error.code}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise DataError(f"download: {url} must be reachable, got {reason}") from None


def _digest(path: Path, like: str) -> str:
    digest = hashlib.md5(usedforsecurity=False) if len(like) == 32 else hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _unpack(archive: Path, target: Path) -> None:
    """Unpack beside ``target`` and rename: the folder is there whole or not at all."""
    part = target.with_name(target.name + ".part.d")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(part)
    except zipfile.BadZipFile as error:
        raise DataError(f"download: {archive} must be a zip archive, got {error}") from None
    inner = part / target.name
    os.replace(inner if inner.is_dir() else part, target)
    shutil.rmtree(part, ignore_errors=True)
