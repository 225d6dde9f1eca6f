"""What a run says: a progress bar on stderr and one JSON line per epoch."""

from __future__ import annotations

import json
import os
from typing import Any

from tqdm.auto import tqdm

from recgrela_ext.arguments import as_path
from recgrela_ext.files import write_files


class EpochLog:
    """A file of JSON lines. A resumed run first drops the lines after its checkpoint."""

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else as_path(path, "fit", "log_file")
        if self.path is not None and self.path.is_dir():
            raise ValueError(f"fit: log_file must be a file, got the folder {self.path}")

    def rewind(self, step: int) -> None:
        """Keeps the lines up to optimiser step `step`; 0 empties the file."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        old = []
        if self.path.is_file():  # a torn line is dropped, whatever its bytes
            old = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in old if _step_of(line) <= step]
        write_files({self.path: "".join(f"{line}\n" for line in kept)})

    def write(self, record: dict[str, Any]) -> None:
        """Appends one line."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


class Progress:
    """A bar over the steps of an epoch; `shown` None: only on a terminal."""

    def __init__(self, shown: bool | None) -> None:
        self._disable = None if shown is None else not shown
        self._bar: tqdm[Any] | None = None

    def begin(self, epoch: int, step: int, steps: int) -> None:
        self.close()
        self._bar = tqdm(
            total=steps,
            initial=step,
            desc=f"epoch {epoch + 1}",
            unit="step",
            disable=self._disable,
            dynamic_ncols=True,
        )

    def advance(self, loss: float | None = None, targets_per_second: float = 0.0) -> None:
        """One step; with a loss, the numbers beside the bar change too."""
        if self._bar is None or self._bar.disable:
            return
        if loss is not None:
            self._bar.set_postfix_str(
                f"loss {loss:.4f}, {targets_per_second:,.0f} targets/s", refresh=False
            )
        self._bar.update()

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self._bar is not None and not self._bar.disable:
            self._bar.write(text, file=self._bar.fp)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a torn line
