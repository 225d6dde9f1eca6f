"""Threads, fork, spawn, DataLoader workers, copies."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from recgrela_ext import (
    AdaptiveRankModulator,
    GRELABlock,
    ItemTable,
    RecGRELA,
    RecGRELAConfig,
    RotaryEnhancedLinearAttention,
    SeenItems,
    UserStateStore,
    ops,
)
from tests.ops.problems import make_problem

ROOT = Path(__file__).resolve().parents[2]


def small() -> RecGRELA:
    torch.manual_seed(0)
    config = RecGRELAConfig(num_items=60, hidden_size=16, num_layers=2, num_heads=2, dropout=0.5)
    return RecGRELA(config)


@pytest.mark.parametrize("training", [False, True])
def test_a_thousand_threads_of_requests(training: bool) -> None:
    """Each follows its user and asks for a list; also where the model is in training mode."""
    model = small().train(training)
    histories = torch.randint(1, 61, (1000, 6))
    found: list[Any] = [None] * 1000
    start = threading.Event()

    def request(user: int) -> None:
        start.wait()
        state = model.prefill(histories[user : user + 1, :4])
        for item in histories[user, 4:]:
            model.step(item[None], state)
        best = model.recommend_from_state(state, 5)
        found[user] = (state.buffer, best.items, best.scores)

    threads = [threading.Thread(target=request, args=(user,)) for user in range(1000)]
    for thread in threads:
        thread.start()
    start.set()
    for thread in threads:
        thread.join()
    assert model.training == training
    for user in range(0, 1000, 37):
        got = found[user]
        request(user)
        for a, b in zip(got, found[user], strict=True):
            assert torch.equal(a, b), f"user {user}"
    assert all(one is not None for one in found)


FORK = """
import os, signal, sys, torch
from recgrela_ext import ops
from recgrela_ext.forking import one_thread_in_children
from tests.ops.problems import make_problem

one_thread_in_children()
torch.set_num_threads(2)
problem = make_problem(64, 50, 4, 16, dtype=torch.float32)
before = problem.run(ops.gated_rela)
torch.randn(600, 600) @ torch.randn(600, 600)
child = os.fork()
if not child:
    signal.alarm(60)
    torch.randn(600, 600) @ torch.randn(600, 600)
    os._exit(0 if torch.equal(problem.run(ops.gated_rela), before) else 3)
status = os.waitpid(child, 0)[1]
assert torch.get_num_threads() == 2
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_after_parallel_work() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", FORK], env=environment, check=True, timeout=300)


class Encoded(Dataset[Tensor]):
    """Computes with the operators inside the worker."""

    def __init__(self, model: RecGRELA) -> None:
        self.model = model

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.model(torch.tensor([[index + 1, 7, 3]]))[0]


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_loader(method: str) -> None:
    """After parallel work in the parent; spawn pickles the model."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"needs {method}")
    model = small().eval()
    torch.set_num_threads(2)
    make_problem(64, 50, 4, 16, dtype=torch.float32).run(ops.gated_rela)
    data = Encoded(model)
    loader: Any = DataLoader(
        data, batch_size=2, num_workers=2, multiprocessing_context=method, timeout=200
    )
    for number, batch in enumerate(loader):
        assert torch.equal(batch, torch.stack([data[2 * number], data[2 * number + 1]]))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_modules(copied: Any) -> None:
    x = torch.randn(2, 5, 16)
    frequencies = ops.inv_freq(2, 8)
    for module in (
        GRELABlock(16, 2).eval(),
        RotaryEnhancedLinearAttention(16, 2),
    ):
        other = copied(module)
        assert torch.equal(other(x), module(x))
        assert other.state_dict().keys() == module.state_dict().keys()
    rank = AdaptiveRankModulator(16)
    other = copied(rank)
    for a, b in zip(other.parameters(), rank.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()
    assert torch.equal(copied(frequencies), frequencies)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_states(copied: Any) -> None:
    model = small().eval()
    store = UserStateStore(model, 4, "int8", active=2)
    store.step(np.arange(5), torch.arange(1, 6))
    table = copied(ItemTable(model))
    other = copied(store)
    other.step([1], torch.tensor([9]))
    assert store.lookup([1]).state.position.tolist() == [1]
    assert other.lookup([1]).state.position.tolist() == [2]
    assert copied(SeenItems.from_lists([[3, 1]])).ids(0).tolist() == [1, 3]
    state = store.lookup([2, 3]).state
    twin = copied(state)
    model.step(torch.tensor([4, 4]), twin)
    assert state.position.tolist() == [1, 1]
    assert model.recommend_from_state(state, 3, table=table).items.shape == (2, 3)
