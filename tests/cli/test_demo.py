"""The demonstration at a size that takes a second."""

from __future__ import annotations

from pathlib import Path

import pytest

from recgrela_ext.demo.__main__ import main


def test_synthetic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    assert main(["--minutes", "0.005", "--users", "40", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("RecGRELA", "Popularity", "Markov", "Oracle"))
    assert "reach 80%" in out or "reaches 80%" in out
    assert "10 new events stream into that user's state" in out
    assert "the state is 10,504 bytes" in out
    assert (tmp_path / "stream.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_real_data(events: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--minutes", "0.005", "--data", str(events), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "Oracle" not in out
    assert "recommended next" in out


def test_no_such_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path / "absent.csv"), "--out", str(tmp_path / "o")]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert err[0].startswith("recgrela: from_file: no such file or folder")
