"""Builds recgrela_ext: metadata is in pyproject.toml, the compiler's rules in build_backend/."""

import sys
from pathlib import Path

from setuptools import Extension, setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "build_backend"))

from native_build import LIBRARY, MODULE, BuildNative

setup(
    ext_modules=[Extension(name, sources=[]) for name in (LIBRARY, MODULE)],
    cmdclass={"build_ext": BuildNative},
)
