"""Install what a stack's tests import: torch, the package's own needs, those of its extra, pytest.

    python tests/integrations/install_stack.py rectools build/integrations/rectools/bin/python torch

The package itself is taken from the checkout, where it is compiled already.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import requires

from packaging.requirements import Requirement

EXTRAS = {"hub": ("hub", "lightning")}
# Its metadata ask for the CUDA build of fbgemm; this is the one without.
TORCHREC = ["torchrec==1.8.0", "fbgemm-gpu-cpu==1.8.0"]
TORCHREC_NEEDS = ["tensordict", "torchmetrics", "pyre-extensions", "iopath"]


def needs_of(extra: str) -> list[str]:
    """Requirements that hold with this extra, and only with it or always."""
    found = []
    for text in requires("recgrela-ext") or []:
        one = Requirement(text)
        if one.marker is None or one.marker.evaluate({"extra": extra}):
            one.marker = None
            found.append(str(one))
    return found


def main() -> None:
    stack, python, torch = sys.argv[1:]

    def install(*what: str) -> None:
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        subprocess.run([*pip, *what], check=True)

    install(torch)
    if stack == "torchrec":
        install(torch, *needs_of("none"), *TORCHREC_NEEDS, "pytest", "hypothesis")
        install("--no-deps", *TORCHREC)
    else:
        needs = {need for extra in EXTRAS.get(stack, (stack,)) for need in needs_of(extra)}
        install(torch, *sorted(needs), "pytest", "hypothesis")


if __name__ == "__main__":
    main()
