"""Without its framework an adapter says what to install."""

from __future__ import annotations

import importlib
from importlib.util import find_spec

import pytest

EXTRAS = {"recbole": "recbole", "rectools": "rectools", "replay": "replay",
          "torchrec": "torchrec", "hub": "huggingface_hub"}  # fmt: skip


@pytest.mark.parametrize("extra", EXTRAS)
def test_absent(extra: str) -> None:
    if find_spec(EXTRAS[extra]) is not None:
        pytest.skip(f"{EXTRAS[extra]} is installed here")
    with pytest.raises(ImportError, match=rf"needs .*: pip install 'recgrela-ext\[{extra}\]'"):
        importlib.import_module(f"recgrela_ext.integrations.{extra}")
