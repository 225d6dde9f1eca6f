"""Survivors that no test can tell from the kernels as they are, by name; each was looked at."""

from __future__ import annotations

EXPLAINED: dict[str, str] = {}
