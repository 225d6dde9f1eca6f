"""PEP 517 backend: setuptools, plus a torch to compile against only when the caller has none.

An isolated build hides the caller's packages but runs the caller's interpreter, so an installed
torch can still be found and used. Which torch that is hardly matters: the library uses torch's
stable ABI, and what is built on one version runs on all from MINIMUM on.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from torch_location import find_torch

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

BUILD_TORCH = "torch==2.13.0"

Settings = dict[str, Any] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    requires = build_meta.get_requires_for_build_wheel(config_settings)
    return requires if find_torch() else [*requires, BUILD_TORCH]


get_requires_for_build_editable = get_requires_for_build_wheel


def build_wheel(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    # setuptools packs whatever lies in build/lib.*, modules deleted since the last build included.
    for stale in [*Path("build").glob("lib*"), *Path("build").glob("bdist*")]:
        shutil.rmtree(stale)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


build_editable = build_meta.build_editable
