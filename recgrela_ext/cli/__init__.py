"""The ``recgrela`` command: info, train, evaluate, recommend, export."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib import import_module

from recgrela_ext.cli.mistakes import exit_code

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    Args:
        argv: the arguments after the program's name, by default those of the process.
    """
    return exit_code(partial(_run, argv))


def _run(argv: Sequence[str] | None) -> None:
    """What takes long to import is imported here, where Ctrl-C is looked after."""
    from recgrela_ext.cli.parser import build_parser

    options = build_parser().parse_args(argv)
    import_module(f"recgrela_ext.cli.{options.command}").run(options)
