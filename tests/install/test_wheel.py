"""One wheel, built once, runs in fresh environments with different torches.

RECGRELA_TEST_TORCH lists the versions (default "2.13.0"); each costs a download of torch.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = os.environ.get("RECGRELA_TEST_TORCH", "2.13.0").split()


def run(*command: str | Path, cwd: Path) -> str:
    # No PYTHONPATH, no checkout as working directory: only what is installed can be imported.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    answer = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT, cwd=folder)
    (built,) = folder.glob("recgrela_ext-*.whl")
    return built


@pytest.mark.parametrize("version", VERSIONS)
def test_wheel_runs_beside_torch(wheel: Path, tmp_path: Path, version: str) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    run(python, "-m", "pip", "install", "-q", f"torch=={version}", cwd=tmp_path)
    ask_version = (python, "-c", "import torch; print(torch.__version__)")
    before = run(*ask_version, cwd=tmp_path)
    run(python, "-m", "pip", "install", "-q", wheel, cwd=tmp_path)
    assert run(*ask_version, cwd=tmp_path) == before
    facts = json.loads(run(python, ROOT / "tests/install/smoke.py", cwd=tmp_path).splitlines()[-1])
    assert facts["torch"] == before.strip()
    assert Path(facts["file"]).is_relative_to(tmp_path)
    # The operators' and golden tests, out of reach of the checkout's own package.
    shutil.copytree(ROOT / "tests", tmp_path / "suite/tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "suite")
    run(python, "-m", "pip", "install", "-q", "pytest", "hypothesis", cwd=tmp_path)
    chosen = ("tests/ops", "tests/model/test_reference_weights.py")
    run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, cwd=tmp_path / "suite")
