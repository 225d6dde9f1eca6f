"""The model: configuration, table and encoder, retrieval, user states, files."""

from __future__ import annotations

from .config import RecGRELAConfig
from .recgrela import RecGRELA
from .retrieval import ItemTable, Recommendations
from .seen import SeenItems
from .state import UserState
from .store import UserStateStore

__all__ = [
    "ItemTable",
    "RecGRELA",
    "RecGRELAConfig",
    "Recommendations",
    "SeenItems",
    "UserState",
    "UserStateStore",
]
