"""Results of long runs: one JSON file a run, under tests/trust/results."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("results")


def write(path: Path, record: dict[str, Any]) -> None:
    """Replace `path` by `record` in one step; it gets the day."""
    record = {**record, "date": today()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def versions() -> dict[str, str]:
    """What a result depends on, beside the commit it lies in."""
    import torch

    from recgrela_ext import __version__

    return {
        "recgrela_ext": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def commit() -> str:
    """The commit checked out, and whether sources differ from it."""

    def git(*arguments: str) -> str:
        folder = FOLDER.parents[2]
        run = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
        return run.stdout.strip()

    changed = git("diff", "HEAD", "--name-only", "--", ":/", ":(exclude,top)tests/trust/results")
    return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
