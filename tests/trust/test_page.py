"""What docs/trust.md says of a record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.fuzz import targets
from tests.trust.__main__ import fuzz_row, matrix_rows, parts


def test_findings_are_those_of_the_record_and_of_the_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "states").mkdir()
    for name in ("found-b", "found-c", "grown"):
        (tmp_path / "states" / name).write_bytes(b"")
    monkeypatch.setattr(targets, "CORPUS", tmp_path)
    record = {
        "target": "states", "runs": {"random": 9}, "seconds": 60, "runs_since_a_finding": 4,
        "findings": ["found-a", "found-b"], "versions": {"commit": "0123456789ab"},
        "date": "2026-01-02",
    }  # fmt: skip
    _, _, found, ran = fuzz_row(record)
    assert found == "3 in all, 2 kept as inputs; none in the last 4 of these"
    assert ran == "last run: 0123456, 2026-01-02"


def test_a_cell_and_the_oldest_system_have_commits_of_their_own() -> None:
    def ran(commit: str, day: str) -> dict[str, Any]:
        return {"commit": commit, "date": day}

    cell = {"torch": "2.13.0", "summary": "1 passed", "symbols_missing": []}
    record = {
        "cells": {"3.10 2.13.0": cell | ran("aaaaaaaaaaaa", "2026-01-01")},
        "symbols": {"GLIBC": "2.32"}, "versions": ran("bbbbbbbbbbbb", "2026-01-02"),
        "date": "2026-01-03",
    }  # fmt: skip
    assert [row[3] for row in matrix_rows(record)] == ["aaaaaaa, 2026-01-01", "bbbbbbb, 2026-01-02"]


def test_a_run_of_tests_is_named_by_what_passed() -> None:
    said = (
        "tests/trust/test_extremes.py::test_giant_tensors PASSED [ 25%]\n"
        "tests/trust/test_found_calls.py::test_call[a b - c] PASSED [ 50%]\n"
        "tests/trust/test_kept.py::test_other SKIPPED (none PASSED here) [ 75%]\n"
        "tests/trust/test_extremes.py::test_giant_catalogue PASSED [100%]\n"
    )
    assert parts(said) == "extremes, found calls"
