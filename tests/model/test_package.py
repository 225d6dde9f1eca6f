from __future__ import annotations

import subprocess
import sys

import pytest

import recgrela_ext

HEAVY = ("pandas", "pyarrow", "matplotlib", "recbole", "scipy")
PRINT_HEAVY = f"import sys; print([m for m in {HEAVY} if m in sys.modules])"


def loaded_by(code: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", f"{code}; {PRINT_HEAVY}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("name", recgrela_ext.__all__)
def test_every_public_name_loads(name: str) -> None:
    assert getattr(recgrela_ext, name) is not None
    assert name in dir(recgrela_ext)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        recgrela_ext.nothing  # noqa: B018


def test_importing_loads_nothing_heavy() -> None:
    assert loaded_by("import recgrela_ext, sys; assert 'torch' not in sys.modules") == "[]"
    code = (
        "import torch; from recgrela_ext import RecGRELA, RecGRELAConfig; "
        "m = RecGRELA(RecGRELAConfig(n_items=9)); m.recommend(torch.tensor([[1, 2]]), k=2)"
    )
    assert loaded_by(code) == "[]"
