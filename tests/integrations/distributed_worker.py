"""Started by torchrun from test_distributed.py: variants of one training run, losses to a file."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist

EXAMPLE = Path(__file__).parents[2] / "python_examples" / "ddp_fsdp.py"


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ddp_fsdp", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    variants: dict[str, list[str]] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    example = load_example()
    losses = {}
    for name, arguments in variants.items():
        options = example.read_options(arguments)
        losses[name] = example.train(options, example.read_log(options))
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(losses), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
