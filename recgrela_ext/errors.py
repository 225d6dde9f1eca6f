"""Errors a user can cause with files: each is a ``ValueError`` with one clear line."""

from __future__ import annotations


class DataError(ValueError):
    """An interaction log, an id map or a data file cannot be used as it is."""


class CheckpointError(ValueError):
    """A saved model, state or training checkpoint cannot be used as it is."""


class StateError(ValueError):
    """A saved user state belongs to another model, is damaged, or cannot be stored as asked."""
