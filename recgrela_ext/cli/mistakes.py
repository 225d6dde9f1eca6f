"""A user's mistake ends in one line on stderr and exit code 2, Ctrl-C in exit code 130.

RECGRELA_TRACEBACK=1 shows where an error came from instead.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import TextIO


def exit_code(command: Callable[[], None]) -> int:
    """Run a command; notes (warnings) and the error of a mistake are single lines on stderr."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_note
        try:
            command()
        except BrokenPipeError:  # the reader of our output left, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except KeyboardInterrupt as interrupt:
            _say(str(interrupt) or "interrupted")
            return 130
        except (ValueError, OSError, ImportError) as error:
            if os.environ.get("RECGRELA_TRACEBACK", "") not in ("", "0"):
                raise
            _say(_one_line(error))
            return 2
        except (RuntimeError, MemoryError) as error:
            refused = isinstance(error, MemoryError) or "allocate memory" in str(error)
            if not refused or os.environ.get("RECGRELA_TRACEBACK", "") not in ("", "0"):
                raise
            _say(f"not enough memory: {_one_line(error)}")
            return 2
    return 0


def _say(text: str) -> None:
    print(f"recgrela: {text}", file=sys.stderr)


def _one_line(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    return " ".join(text.split()) or type(error).__name__


def _show_note(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Warnings without their source line; those about the code of libraries are not the user's."""
    if not issubclass(category, (DeprecationWarning, FutureWarning)):
        _say(f"note: {' '.join(str(message).split())}")
