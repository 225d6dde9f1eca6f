"""``python -m recgrela_ext`` is the ``recgrela`` command."""

from __future__ import annotations

import sys

from recgrela_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
