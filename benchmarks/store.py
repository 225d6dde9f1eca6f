"""Results on disk: one JSON file a machine, written after every row, continued when asked again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.records import Record


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Atomically: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)


class Results:
    """`content` is {schema, device, commit, library, date, quick, machine, bandwidth, left_out:
    {name: reason}, rows: {name: {key, date, seconds, records: [...]}}}. A row is done when this
    very build measured it.
    """

    def __init__(self, path: Path | None, head: dict[str, Any], fresh: bool) -> None:
        self.path = path
        self.key = {
            "commit": machine.commit(),
            "library": machine.library_hash(),
            "torch": head["machine"]["torch"],
            "quick": head["quick"],
        }
        old: dict[str, Any] = {}
        if path is not None and path.exists() and not fresh:
            old = json.loads(path.read_text(encoding="utf-8"))
        kept = {n: r for n, r in old.get("rows", {}).items() if r["key"] == self.key}
        self.content = {
            "schema": 1,
            **self.key,
            "date": machine.today(),
            **head,
            "left_out": {},
            "rows": kept,
        }

    def has(self, row: str) -> bool:
        return row in self.content["rows"]

    def add(self, row: str, records: list[Record], seconds: float) -> None:
        self.content["rows"][row] = {
            "key": self.key,
            "date": machine.today(),
            "seconds": round(seconds, 1),
            "records": [record.to_dict() for record in records],
        }
        self.save()

    def leave_out(self, row: str, reason: str) -> None:
        """A row without figures; it is measured again next time."""
        self.content["rows"].pop(row, None)
        self.content["left_out"][row] = reason
        self.save()

    def save(self) -> None:
        if self.path is None:
            return
        write_json(self.path, self.content)
