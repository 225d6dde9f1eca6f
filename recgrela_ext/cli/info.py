"""``recgrela info``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from recgrela_ext.cli.reading import prepare_file


def run(options: argparse.Namespace) -> None:
    """Print the build facts and the machine."""
    import torch

    from recgrela_ext import build_info
    from recgrela_ext._library import KERNEL_DEVICES

    prepare_file(options.json)
    facts = build_info()
    facts["torch"] = torch.__version__
    facts["threads"] = torch.get_num_threads()
    facts["cuda_available"] = torch.cuda.is_available()
    facts["kernel_devices"] = sorted(KERNEL_DEVICES)
    lines = {
        "recgrela_ext": facts["version"],
        "torch": f"{facts['torch']} (built against {facts['torch_built'] or 'none'})",
        "threads": facts["threads"],
        "CPU levels": ", ".join(facts["cpu_levels"]) or "none",
        "CPU level": facts["cpu_level"] or "none",
        "CUDA toolkit": facts["cuda_toolkit"] or "none: no CUDA kernels in this build",
        "CUDA archs": ", ".join(map(str, facts["cuda_archs"])) or "none",
        "GPU": torch.cuda.get_device_name() if facts["cuda_available"] else "none",
    }
    for name, value in lines.items():
        print(f"{name:<13} {value}")
    if not KERNEL_DEVICES:
        print(
            "The compiled operators are absent: everything runs in plain PyTorch, correct but "
            "slower; `pip install .` builds them."
        )
    if options.json is not None:
        Path(options.json).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
