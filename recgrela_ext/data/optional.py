"""Optional packages, imported where they are used, with one clear line when they are absent."""

from __future__ import annotations

import importlib
from types import ModuleType

from recgrela_ext.errors import DataError


def import_pandas(where: str) -> ModuleType:
    return _import("pandas", where)


def parquet_errors(where: str) -> tuple[type[Exception], ...]:
    """What comes of a Parquet file that cannot be read."""
    return OSError, ValueError, OverflowError, _import("pyarrow", where).ArrowException


def import_parquet(where: str) -> ModuleType:
    return _import("pyarrow.parquet", where)


def _import(module: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise DataError(f"{where}: needs {package}, try: pip install {package}") from None
