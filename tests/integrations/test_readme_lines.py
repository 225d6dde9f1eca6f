"""README's lines for each stack run as they stand, after the data they leave out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.integrations.torchrun import ROOT
from tests.integrations.walks import write_inter

ALONE = """
import torch
from recgrela_ext import RecGRELAConfig
config = RecGRELAConfig(num_items=9, hidden_size=16, num_layers=1, num_heads=2)
item_seq, targets = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[2, 3, 4], [5, 6, 0]])
item_seq_len = torch.tensor([3, 2])
"""
# Framework: (a line of its code in README, the data, what is made smaller).
STACKS = {
    "recbole": ("from recgrela_ext.integrations.recbole import", "", ('"ml-100k"', '"walks"')),
    "rectools": ("from recgrela_ext.integrations.rectools import", """
import pandas as pd
from rectools import Columns
from rectools.dataset import Dataset
from tests.integrations.walks import columns
frame = pd.DataFrame(columns()).rename(columns={"timestamp": Columns.Datetime})
frame[Columns.Datetime] = pd.to_datetime(frame[Columns.Datetime], unit="s")
dataset = Dataset.construct(frame.assign(**{Columns.Weight: 1.0}))
users = [1, 2]
""", ("session_max_len=200", "session_max_len=20, epochs=1")),
    "replay": ("from recgrela_ext.integrations.replay import", """
from tempfile import TemporaryDirectory
from pathlib import Path
from tests.integrations.test_readme_lines import replay_data
tensor_schema, parquet_module = replay_data(Path("."))
""", ("max_epochs=20", "max_epochs=1")),
    "torch": ("import fully_shard_blocks, load_checkpoint", ALONE, ("", "")),
    "torchrec": ("from recgrela_ext.integrations.torchrec import", """
import torch
item_seqs, targets = [torch.tensor([1, 2])], [torch.tensor([2, 3])]
negatives = torch.tensor([[5, 6]])
""", ("10_000_000", "10")),
    "huggingface_hub": ("from recgrela_ext.integrations.hub import", """
from recgrela_ext import RecGRELA
from recgrela_ext.data.synthetic import make_synthetic
train, _, test = make_synthetic(60, 120, mean_length=8)[0].leave_one_out()
trained = RecGRELA.for_data(train, hidden_size=16, num_layers=1, num_heads=2)
""", ("push_to_hub", "save_pretrained")),
}  # fmt: skip


def replay_data(folder: Path) -> tuple[object, object]:
    """The example's schema and module, for the walks."""
    import runpy

    from recgrela_ext.data import Interactions

    example = runpy.run_path(str(ROOT / "python_examples" / "replay_walkthrough.py"))
    write_inter(folder / "walks" / "walks.inter")
    log = Interactions.from_file(folder / "walks" / "walks.inter")
    example["write_parts"](log, folder)
    num_items = len(log.item_ids)
    schema = example["schema_of"](num_items)
    module = example["ParquetModule"](
        train_path=str(folder / "train.parquet"),
        validate_path=str(folder / "validate.parquet"),
        batch_size=16,
        metadata={
            "train": {"item_id": {"shape": 21, "padding": num_items}},
            "validate": {
                "item_id": {"shape": 20, "padding": num_items},
                "ground_truth": {"shape": 1, "padding": -1},
            },
        },
        transforms=example["make_default_sasrec_transforms"](schema),
    )
    return schema, module


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("framework", STACKS)
def test_lines(framework: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed (`make test-integrations`)")
    marker, data, (large, small) = STACKS[framework]
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    (lines,) = [block for block in blocks if marker in block]
    assert large in lines
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lines"])  # RecBole reads it
    if framework == "recbole":
        write_inter(tmp_path / "walks" / "walks.inter")
        keys = ["data_path: .", "epochs: 1", "MAX_ITEM_LIST_LENGTH: 8", "loss_type: CE",
                "train_neg_sample_args: ~", "use_gpu: False", "hidden_size: 16",
                "load_col: {inter: [user_id, item_id, timestamp]}"]  # fmt: skip
        Path("RecGRELA.yaml").write_text("\n".join(keys), encoding="utf-8")
    names: dict[str, object] = {}
    exec(data, names)
    exec(lines.replace(large, small) if large else lines, names)
