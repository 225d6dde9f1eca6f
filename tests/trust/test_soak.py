"""The judge of tests/soak.py tells what grows; one round runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests import soak


def samples(**growth: float) -> list[dict[str, float]]:
    """Two hours, a sample a minute; what grows, by how much an hour."""
    start = {
        "rss_mib": 400.0,
        "held_mib": 360.0,
        "descriptors": 6.0,
        "threads": 2.0,
        "objects": 3e5,
    }
    noise = [0.3, -0.2, 0.0, 40.0, 0.1, -0.1, 0.2]  # a spike now and then
    found = []
    for minute in range(120):
        one = {name: x + growth.get(name, 0.0) * minute / 60 for name, x in start.items()}
        one["held_mib"] += noise[minute % 7]
        rounds = (1800 + growth.get("rounds", 0.0)) * minute / 60
        found.append({**one, "seconds": 60.0 * minute, "rounds": rounds})
    return found


@pytest.mark.parametrize(
    ("growth", "text"),
    [
        ({}, None),
        ({"held_mib": 2.0}, None),
        ({"held_mib": 5.0}, r"memory grows by [23]\.. KiB a round"),
        ({"held_mib": 12.0, "rounds": 18_000.0}, r"memory grows by 1[12]\.. MiB an hour"),
        ({"descriptors": 1.0}, "descriptors grow from"),
        ({"threads": 1.0}, "threads grow from"),
        ({"objects": 30.0}, "objects grow from"),
    ],
)
def test_judge(growth: dict[str, float], text: str | None) -> None:
    findings = soak.judge(samples(**growth))["findings"]
    if text is None:
        assert findings == []
    else:
        assert len(findings) == 1
        assert re.match(text, findings[0])


def test_too_little_to_judge() -> None:
    assert "too few samples" in soak.judge(samples()[:3])["findings"][0]


@pytest.mark.slow
def test_a_round(tmp_path: Path) -> None:
    record: dict[str, Any] = soak.soak(0.0, 0.0, tmp_path / "soak.json")
    assert record["finished"]
    assert len(record["samples"]) == 1
