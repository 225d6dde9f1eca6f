from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from recgrela_ext.cli import main
from recgrela_ext.data.synthetic import make_synthetic

SMALL = ["--hidden-size", "16", "--num-layers", "1", "--num-heads", "2", "--max-seq-len", "16"]


class Answer(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def mistake(self) -> str:
        """The one line a user's mistake must end in."""
        assert self.code == 2
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("recgrela: ")
        return lines[0]


Recgrela = Callable[..., Answer]


@pytest.fixture
def recgrela(capsys: pytest.CaptureFixture[str]) -> Recgrela:
    """Runs the command in this process."""

    def call(*arguments: object) -> Answer:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Answer(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def events(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 users and 120 items in RecBole's format, with titles beside."""
    log, _ = make_synthetic(40, 120, mean_length=12)
    folder = tmp_path_factory.mktemp("events") / "tiny"
    folder.mkdir()
    users, items = log.user_ids[log.user], log.item_ids[log.item]
    rows = np.stack([users, items, np.asarray(log.time)], axis=1)
    header = "user_id:token\titem_id:token\ttimestamp:float"
    path = folder / "tiny.inter"
    np.savetxt(path, rows, fmt="%d", delimiter="\t", header=header, comments="")
    assert log.item_titles is not None
    titles = "".join(f"{raw}\t{title}\n" for raw, title in log.item_titles.items())
    (folder / "tiny.item").write_text(f"item_id:token\ttitle:token_seq\n{titles}", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def trained(events: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "model"
    arguments = ["train", "--data", str(events), "--out", str(folder), "--steps", "3", *SMALL]
    assert main(arguments) == 0
    return folder
