"""The demonstration at its full length, two minutes of training on two quiet cores."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from recgrela_ext.demo.__main__ import main


@pytest.mark.slow
def test_reaches_most_of_the_oracle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    assert main(["--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    share = re.search(r"The model has ([\d.]+)% of its NDCG@10", out)
    assert share is not None, out
    assert float(share[1]) >= 80.0
