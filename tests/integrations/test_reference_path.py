"""Without the compiled operators every adapter loads, computes, and warns once."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.integrations.torchrun import environment

# Adapter: (framework, what to compute with it).
PROGRAMS = {
    "distributed": ("torch", """
from recgrela_ext.integrations.distributed import train_step
model = RecGRELA(RecGRELAConfig(num_items=9, hidden_size=16, num_layers=1, num_heads=2))
rows = torch.tensor([[1, 2, 3]]), None, torch.tensor([[2, 3, 4]])
print(float(train_step(model, torch.optim.AdamW(model.parameters()), [rows])) > 0)
"""),
    "sasrec": ("torch", """
from argparse import Namespace
from recgrela_ext.integrations.sasrec import RecGRELA as SASRec
sizes = dict(hidden_units=16, num_blocks=1, num_heads=2, dropout_rate=0.0, maxlen=5)
scores = SASRec(3, 9, Namespace(**sizes)).predict(None, [[0, 1, 2]], [3, 4])
print(scores.shape == (1, 2))
"""),
    "recbole": ("recbole", """
from recgrela_ext.integrations.recbole import RecGRELA as Adapter
print(issubclass(Adapter, torch.nn.Module))
"""),
    "rectools": ("rectools", """
from recgrela_ext.integrations.rectools import RecGRELALayers
layers = RecGRELALayers(n_blocks=1, n_factors=16, n_heads=2, dropout_rate=0.0)
mask = torch.tensor([[False, True, True]])
print(layers(torch.randn(1, 3, 16), mask.unsqueeze(-1), None, None).shape == (1, 3, 16))
"""),
    "replay": ("replay", """
from recgrela_ext.integrations.replay import GRELAEncoder
encoder = GRELAEncoder(16, 2, 1, 0.0)
mask = torch.tensor([[False, True, True]])
print(encoder({}, torch.randn(1, 3, 16), mask).shape == (1, 3, 16))
"""),
    "torchrec": ("torchrec", """
from recgrela_ext.integrations.torchrec import RecGRELA as Jagged
model = Jagged(RecGRELAConfig(num_items=9, hidden_size=16, num_layers=1, num_heads=2))
print(model.encoder(torch.randn(3, 16), cu_seqlens=torch.tensor([0, 2, 3])).shape == (3, 16))
"""),
    "hub": ("huggingface_hub", """
from recgrela_ext.integrations.hub import RecGRELA as Shared
model = RecGRELA(RecGRELAConfig(num_items=9, hidden_size=16, num_layers=1, num_heads=2))
print(Shared.from_model(model)(torch.tensor([[1, 2]])).shape == (1, 16))
"""),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_one_warning(name: str) -> None:
    framework, program = PROGRAMS[name]
    if find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed (`make test-integrations`)")
    start = "import torch\nfrom recgrela_ext import RecGRELA, RecGRELAConfig\n"
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", start + program],
        env={**environment(), "RECGRELA_DISABLE_EXTENSION": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "True"
    assert done.stderr.count("runs as plain PyTorch, correct but several times slower") == 1
    assert done.stderr.count("Unset it to use them.") == 1
