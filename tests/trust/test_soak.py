"""The judge of tests/soak.py tells what grows; one round runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import soak


def samples(**growth: float) -> list[dict[str, float]]:
    """Two hours, a sample a minute; what grows, by how much an hour."""
    start = {"rss_mib": 400.0, "descriptors": 6.0, "threads": 2.0, "objects": 3e5}
    noise = [3.0, -2.0, 0.0, 40.0, 1.0, -1.0, 2.0]  # a spike now and then
    found = []
    for minute in range(120):
        one = {name: x + growth.get(name, 0.0) * minute / 60 for name, x in start.items()}
        one["rss_mib"] += noise[minute % 7]
        found.append({**one, "seconds": 60.0 * minute, "rounds": float(3 * minute)})
    return found


@pytest.mark.parametrize(
    ("growth", "text"),
    [
        ({}, None),
        ({"rss_mib": 2.0}, None),
        ({"rss_mib": 12.0}, "resident memory grows"),
        ({"descriptors": 1.0}, "descriptors grow from"),
        ({"threads": 1.0}, "threads grow from"),
        ({"objects": 20_000.0}, "objects grow from"),
    ],
)
def test_judge(growth: dict[str, float], text: str | None) -> None:
    findings = soak.judge(samples(**growth))["findings"]
    if text is None:
        assert findings == []
    else:
        assert [text in one for one in findings] == [True]


def test_too_little_to_judge() -> None:
    assert "too few samples" in soak.judge(samples()[:3])["findings"][0]


@pytest.mark.slow
def test_a_round(tmp_path: Path) -> None:
    record: dict[str, Any] = soak.soak(0.0, 0.0, tmp_path / "soak.json")
    assert record["finished"]
    assert len(record["samples"]) == 1
