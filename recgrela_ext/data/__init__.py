"""Interaction logs, splits, readers and a synthetic catalogue.

Needs numpy alone; pandas and pyarrow are imported by the readers that use them.
"""

from __future__ import annotations

from recgrela_ext.data.interactions import Interactions
from recgrela_ext.data.sequences import IdMap, Sequences, Targets

__all__ = ["IdMap", "Interactions", "Sequences", "Targets"]
