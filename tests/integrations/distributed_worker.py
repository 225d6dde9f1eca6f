"""Started by torchrun from test_distributed.py: variants of one training run, losses to a file."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from recgrela_ext import RecGRELA, RecGRELAConfig
from recgrela_ext.integrations.distributed import fully_shard_blocks, train_step

EXAMPLE = Path(__file__).parents[2] / "python_examples" / "ddp_fsdp.py"


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ddp_fsdp", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_methods() -> None:
    """What is called beside forward gathers the weights as well."""
    torch.manual_seed(0)
    plain = RecGRELA(RecGRELAConfig(num_items=30, hidden_size=16, num_layers=2, num_heads=2)).eval()
    sharded = fully_shard_blocks(copy.deepcopy(plain))
    item_seq = torch.tensor([[3, 1, 4, 0], [1, 5, 9, 2]])
    for _ in range(2):
        torch.testing.assert_close(sharded.encode(item_seq), plain.encode(item_seq))
        assert sharded.recommend(item_seq, k=5).items.equal(plain.recommend(item_seq, k=5).items)
        torch.testing.assert_close(sharded(item_seq), plain(item_seq))


def check_unequal_parts() -> None:
    """Processes with unlike numbers of parts would wait for each other; all of them raise."""
    model = RecGRELA(RecGRELAConfig(num_items=9, hidden_size=16, num_layers=1, num_heads=2))
    rows = torch.tensor([[1, 2]]), None, torch.tensor([[2, 3]])
    with pytest.raises(ValueError, match="parts must be as many on every process"):
        train_step(model, torch.optim.AdamW(model.parameters()), [rows] * (1 + dist.get_rank()))


def main() -> None:
    variants: dict[str, list[str]] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    check_methods()
    if dist.get_world_size() > 1:
        check_unequal_parts()
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
