"""Run a stack's tests in its environment; a framework that is absent is a failure here, no skip.

python tests/integrations/run_stack.py rectools
"""

from __future__ import annotations

import importlib
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small sizes; before torch is imported

import pytest

# Stack: (modules that must load, test files).
STACKS = {
    "recbole": (["recbole"], ["test_recbole.py", "test_published.py",
                              "../evaluation/test_recbole_agreement.py", "test_comparison.py"]),
    "rectools": (["rectools", "pytorch_lightning"], ["test_rectools.py", "test_comparison.py"]),
    "replay": (["replay", "lightning"], ["test_replay.py", "test_comparison.py"]),
    "torchrec": (["torchrec"], ["test_torchrec.py"]),
    "hub": (["huggingface_hub", "lightning"], ["test_hub.py", "test_lightning.py"]),
    "distributed": ([], ["test_distributed.py", "test_sasrec.py"]),
}  # fmt: skip


def main() -> int:
    modules, files = STACKS[sys.argv[1]]
    for name in modules:
        importlib.import_module(name)
    files = [*files, "test_framework_examples.py", "test_reference_path.py", "test_readme_lines.py"]
    paths = [f"tests/integrations/{name}" for name in files]
    # -m "" takes the slow ones too; -rP tells the largest differences.
    options = ["-q", "-m", "", "-W", "ignore", "-rP", "--show-capture=stdout"]
    return int(pytest.main([*options, *paths]))


if __name__ == "__main__":
    sys.exit(main())
