"""Crashes that no exception tells of: the fuzzing is a process that another one watches."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz import targets
from tests.trust import records

PLACE = "RECGRELA_FUZZ_LAST_INPUT"  # environment: where the watched process writes its input
_SPACE = 1 << 20
# By who started it; libFuzzer ends with 72 at Ctrl-C.
_STOPPED = (-signal.SIGINT, -signal.SIGTERM, 128 + signal.SIGINT, 72)


class LastInput:
    """The input at work, in memory that outlives the process."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._bytes = mmap.mmap(file.fileno(), _SPACE)

    def begin(self, data: bytes) -> None:
        self._bytes[8 : 8 + len(data)] = data
        self._bytes[:8] = (len(data) + 1).to_bytes(8, "little")

    def end(self) -> None:
        self._bytes[:8] = bytes(8)

    def read(self) -> bytes | None:
        size = int.from_bytes(self._bytes[:8], "little")
        return self._bytes[8 : 7 + size] if size else None


def keep(name: str, data: bytes) -> str:
    """Writes a finding into the corpus; its name."""
    place = targets.CORPUS / name / f"found-{targets.case_name(data)}"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data)
    print(f"found: {place}", file=sys.stderr)
    return place.name


def with_finding(names: list[str], found: str) -> list[str]:
    """The names with `found`, if there is one, each once."""
    return [*dict.fromkeys([*names, *([found] if found else [])])]


def watch(command: list[str], name: str, out: Path) -> int:
    """Runs it; where it ends inside an input, that is a finding like any other."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "input"
        path.write_bytes(bytes(_SPACE))
        code = subprocess.run(command, env={**os.environ, PLACE: str(path)}).returncode
        data = LastInput(path).read()
    if data is None or code == 0 or code in _STOPPED:
        return abs(code)
    found = keep(name, data)
    print(f"{name}: the process ended with {code} inside this input", file=sys.stderr)
    if out.exists():
        record = records.read(out)
        findings = with_finding(record["findings"], found)
        records.write(out, {**record, "findings": findings, "runs_since_a_finding": 0})
    return 1
