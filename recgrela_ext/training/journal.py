"""What a run says: a progress bar on stderr and one JSON line per epoch."""

from __future__ import annotations

import json
import os
from typing import Any

from tqdm.auto import tqdm

from recgrela_ext.arguments import as_path
from recgrela_ext.files import write_files

_BEGIN = '{"epoch": '  # of every line


class EpochLog:
    """A file of JSON lines. A resumed run first drops the lines after its checkpoint.

    ValueError for a folder, or a file that is not such a log: its lines would be dropped too.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else as_path(path, "fit", "log_file")
        if self.path is not None and self.path.is_dir():
            raise ValueError(f"fit: log_file must be a file, got the folder {self.path}")
        if not all(_step_of(line) is not None or _is_torn(line) for line in self._lines()):
            raise ValueError(f"fit: log_file must be the log of a run, got another: {self.path}")

    def rewind(self, step: int) -> None:
        """Keeps the lines up to optimiser step `step`; 0 empties the file."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        steps = ((line, _step_of(line)) for line in self._lines())
        kept = [line for line, at in steps if at is not None and at <= step]
        write_files({self.path: "".join(f"{line}\n" for line in kept)})

    def _lines(self) -> list[str]:
        """What is there; a torn line too, whatever its bytes."""
        if self.path is None or not self.path.is_file():
            return []
        return self.path.read_text(encoding="utf-8", errors="replace").splitlines()

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


def _step_of(line: str) -> float | None:
    """None of a line that is torn, or none of ours."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _is_torn(line: str) -> bool:
    """What a kill, or a machine that lost its power, leaves of a line of ours."""
    begin = line.strip("\0")[: len(_BEGIN)]
    return _BEGIN.startswith(begin)
