"""Interaction logs, splits, readers and a synthetic catalogue.

Needs numpy alone; pandas and pyarrow are imported by the readers that use them.
"""

from __future__ import annotations

from recgrela_ext.data.interactions import Interactions
from recgrela_ext.data.sequences import IdMap, Sequences, Targets
from recgrela_ext.data.synthetic import Oracle, make_synthetic

__all__ = ["IdMap", "Interactions", "Oracle", "Sequences", "Targets", "make_synthetic"]
