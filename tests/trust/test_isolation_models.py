"""What one user sends changes no bit of another's, through whole models: gradients of what they
read, training with dropout, padding on either side, the published variant; stores that are full.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recgrela_ext import (
    GRELAEncoder,
    RecGRELA,
    RecGRELAConfig,
    SeenItems,
    StateError,
    UserStateStore,
)
from recgrela_ext.model.store import Evicted
from tests.tolerance import assert_same_bits
from tests.trust.test_isolation import Poisoned, bad_values, spoil

quick = settings(max_examples=25)
SIZES = {"hidden_size": 16, "num_layers": 2, "num_heads": 2}
VARIANTS: dict[str, RecGRELAConfig] = {
    "causal": RecGRELAConfig(num_items=40, **SIZES),
    "published": RecGRELAConfig.paper(41, **SIZES),
    "published, one layer": RecGRELAConfig.paper(41, **{**SIZES, "num_layers": 1}),
    "bidirectional": RecGRELAConfig(num_items=40, causal=False, **SIZES),
    "others": RecGRELAConfig(
        num_items=40, selector="balance", v_projection=True, mlp_activation="relu",
        gate_activation="gelu", position="learned", final_norm=True, rotary="per_head",
        repeat_bias=True, **SIZES,
    ),
}  # fmt: skip
variants = st.sampled_from(sorted(VARIANTS))


@pytest.fixture(scope="module")
def models() -> dict[str, RecGRELA]:
    torch.manual_seed(0)
    return {name: RecGRELA(config) for name, config in VARIANTS.items()}


@pytest.fixture(scope="module")
def encoders() -> dict[str, GRELAEncoder]:
    torch.manual_seed(0)
    return {
        name: GRELAEncoder(
            config.hidden_size, config.num_layers, config.num_heads,
            final_norm=config.final_norm, **config.block_options(),
        )
        for name, config in VARIANTS.items()
    }  # fmt: skip


def seeded(call: Callable[[], Any]) -> Any:
    """The same dropout every time."""
    torch.manual_seed(5)
    return call()


@quick
@given(
    variant=variants,
    value=bad_values,
    share=st.sampled_from([1.0, 0.1]),
    training=st.booleans(),
    form=st.sampled_from(["whole", "right", "left", "packed"]),
    lengths=st.lists(st.sampled_from([0, 1, 5, 20]), min_size=2, max_size=5),
    data=st.data(),
)
def test_encoder(
    encoders: dict[str, GRELAEncoder],
    variant: str,
    value: float,
    share: float,
    training: bool,
    form: str,
    lengths: list[int],
    data: st.DataObject,
) -> None:
    """Rows of any numbers: hidden states, final states and the rows' gradients."""
    encoder = encoders[variant].train(training)
    causal = VARIANTS[variant].causal
    users, count = len(lengths), torch.tensor(lengths)
    bad = data.draw(st.integers(0, users - 1))
    steps, bounds = torch.arange(20), torch.nn.functional.pad(count.cumsum(0), (1, 0))
    own: Any = bad
    options: dict[str, Any] = {"return_state": causal}
    x = torch.randn(users, 20, 16)
    if form == "packed":
        x, own = torch.randn(sum(lengths), 16), slice(bounds[bad], bounds[bad + 1])
        options["cu_seqlens"] = bounds
    elif form == "left":
        options["mask"] = steps >= 20 - count[:, None]
    elif form == "right":
        options["lengths"] = count
    given = torch.randn(x.shape)

    def run(x: Tensor) -> list[tuple[Tensor, Any]]:
        x = x.detach().requires_grad_()
        found = encoder(x, **options)
        out, states = found if causal else (found, [])
        (gradient,) = torch.autograd.grad(out, x, given)
        by_user = [(part, bad) for state in states for part in state]
        return [(out, own), (gradient, own), *by_user]

    spoiled = spoil(x, own, value, share)
    clean, found = seeded(lambda: run(x)), seeded(lambda: run(spoiled))
    for (a, index), (b, _) in zip(found, clean, strict=True):
        others = torch.ones(len(a), dtype=torch.bool)
        others[index] = False
        assert_same_bits(f"{variant}, {form}", a[others], b[others])


@quick
@given(
    variant=variants,
    value=bad_values,
    training=st.booleans(),
    side=st.sampled_from(["right", "left"]),
    users=st.integers(2, 6),
)
def test_models(
    models: dict[str, RecGRELA],
    variant: str,
    value: float,
    training: bool,
    side: str,
    users: int,
) -> None:
    """One user meets a poisoned item: what the model says of the others, and the gradients of the
    items that only they met."""
    model = Poisoned(models[variant], value).model.train(training)
    table = model.item_embedding.weight
    lengths = torch.randint(1, 20, (users,))
    bad, steps = users // 2, torch.arange(20)
    real = steps < lengths[:, None] if side == "right" else steps >= 20 - lengths[:, None]
    rows = torch.randint(1, 31, (users, 20))
    rows[bad] = torch.randint(31, 40, (20,))
    rows = rows.masked_fill(~real, 0)
    theirs = rows.clone()
    theirs[bad] = theirs[bad].masked_fill((theirs[bad] > 0) & (torch.rand(20) < 0.5), 40)
    theirs[bad, int(real[bad].int().argmax())] = 40
    others = torch.arange(users) != bad
    candidates = torch.arange(1, 40)
    given = torch.randn(users, 20, 16)

    def run(items: Tensor) -> dict[str, Tensor]:
        hidden = model.encode(items, lengths, padding_side=side)
        (gradient,) = torch.autograd.grad(hidden, table, given)
        last = model(items, lengths, padding_side=side)
        best = model.recommend(items, lengths, 10, candidates=candidates, padding_side=side)
        return {
            "hidden": hidden[others], "last": last[others], "scores": model.scores(last)[others],
            "best": best.items[others], "their scores": best.scores[others],
            "gradients": gradient[1:31],
        }  # fmt: skip

    clean, found = seeded(lambda: run(rows)), seeded(lambda: run(theirs))
    for name, x in clean.items():
        assert_same_bits(f"{variant}, {name}", found[name], x)


class Watched:
    """A store that is too small for its users, and what fell out of it."""

    def __init__(self, model: RecGRELA, dtype: str) -> None:
        self.fell: list[Evicted] = []
        self.store = UserStateStore(model, 4, dtype, active=2, on_evict=self.fell.append)

    def rows(self, users: list[int]) -> list[Tensor]:
        state, seen, known = self.store.lookup(users)
        lists = [torch.from_numpy(seen.ids(i).astype(np.int64)) for i in range(len(users))]
        return [known, state.buffer, state.hidden, state.position, *lists]


def refuses(store: UserStateStore, users: list[int], items: Tensor, bad: int) -> bool:
    """Whether the poisoned state had no place at rest; then it has left and the rest was done."""
    try:
        store.step(users, items)
    except StateError as error:
        told = str(error)
    else:
        return False
    assert f"user {bad} " in told
    store.evict([bad])
    store.step(users, items)
    return True


@settings(max_examples=20)
@given(
    value=bad_values,
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "int8"]),
    put=st.booleans(),
    calls=st.lists(
        st.lists(st.integers(0, 6), min_size=1, max_size=2, unique=True), min_size=8, max_size=30
    ),
)
def test_full_store(
    models: dict[str, RecGRELA], value: float, dtype: str, put: bool, calls: list[list[int]]
) -> None:
    """User 6 is poisoned, by items or by a state that was put; users fall out all the time."""
    bad = 6
    poisoned = Poisoned(models["causal"], value).model
    tried, plain = (Watched(poisoned, dtype) for _ in range(2))
    if put:
        state = poisoned.prefill(torch.tensor([[1, 2]]))
        plain.store.put([bad], state, SeenItems(1))
        state.buffer[:] = spoil(state.buffer, 0, value, 0.5)
        tried.store.put([bad], state, SeenItems(1))
    for users in calls:
        items = torch.randint(1, 40, (len(users),))
        is_bad = torch.tensor(users) == bad
        if refuses(tried.store, users, items.masked_fill(is_bad & (not put), 40), bad):
            plain.store.evict([bad])
        plain.store.step(users, items)
        assert sorted(tried.store.users) == sorted(plain.store.users)
    everyone = [user for user in range(bad) if user in plain.store]
    for a, b in zip(tried.rows(everyone), plain.rows(everyone), strict=True):
        assert_same_bits(dtype, a, b)
    assert len(tried.fell) == len(plain.fell)
    for a, b in zip(tried.fell, plain.fell, strict=True):
        assert a.users.tolist() == b.users.tolist()
        good = torch.from_numpy(a.users != bad)
        assert_same_bits("fell out", a.state.buffer[good], b.state.buffer[good])
        assert_same_bits("fell out", a.state.hidden[good], b.state.hidden[good])
