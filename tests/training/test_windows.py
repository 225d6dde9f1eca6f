"""Every interaction is a target once per epoch, whatever the windows."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recgrela_ext.training.windows import Batch, TrainingWindows


def make_log(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Histories whose items are all different, so that an item tells its place."""
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    return np.arange(1, offsets[-1] + 1, dtype=np.int32), offsets


def check_batch(batch: Batch, items: np.ndarray, offsets: np.ndarray) -> list[int]:
    """Inputs are unbroken pieces of one history, targets their next items, which it returns."""
    for begin, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        piece, targets = batch.items[begin:end], batch.targets[begin:end]
        assert len(piece)
        assert np.array_equal(piece, np.arange(piece[0], piece[0] + len(piece)))
        user = np.searchsorted(offsets, piece[0] - 1, side="right") - 1
        assert piece[-1] < offsets[user + 1], "a window ends before the last item of its user"
        has_loss = targets != 0
        assert np.array_equal(targets[has_loss], piece[has_loss] + 1)
        assert has_loss[-1]
        assert not np.any(np.diff(has_loss.astype(int)) < 0)
    assert batch.num_targets == np.count_nonzero(batch.targets)
    return batch.targets[batch.targets != 0].tolist()


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    max_seq_len=st.sampled_from([None, 1, 3, 8, 100]),
    context=st.sampled_from([0, 2, 50]),
    objective=st.sampled_from(["dense", "prefix"]),
    bucket=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_every_interaction_is_a_target_once_per_epoch(
    lengths: list[int],
    max_seq_len: int | None,
    context: int,
    objective: str,
    bucket: bool,
    epoch: int,
) -> None:
    items, offsets = make_log([*lengths, 2])
    windows = TrainingWindows(
        items,
        offsets,
        max_seq_len=max_seq_len,
        targets_per_step=7,
        context=context,
        objective=objective,
        bucket=bucket,
        seed=3,
    )
    seen: Counter[int] = Counter()
    for batch in windows.epoch(epoch):
        seen.update(check_batch(batch, items, offsets))
        if max_seq_len is not None and objective == "dense":
            assert np.diff(batch.cu_seqlens).max() <= max_seq_len + context
    firsts = {int(items[start]) for start, end in itertools.pairwise(offsets) if end > start}
    assert seen == Counter({int(item): 1 for item in items if int(item) not in firsts})
    assert windows.num_targets == sum(seen.values())


def test_phases_differ_between_epochs_and_repeat_for_the_same_seed() -> None:
    items, offsets = make_log([100, 90, 80])

    def starts(seed: int, epoch: int) -> list[int]:
        windows = TrainingWindows(items, offsets, max_seq_len=10, targets_per_step=20, seed=seed)
        return [int(b.items[i]) for b in windows.epoch(epoch) for i in b.cu_seqlens[:-1]]

    assert starts(0, 0) == starts(0, 0)
    assert sorted(starts(0, 0)) != sorted(starts(0, 1))
    assert sorted(starts(0, 0)) != sorted(starts(1, 0))
    ends = [s % 10 for epoch in range(60) for s in starts(0, epoch) if 1 < s <= 100]
    assert len(set(ends)) == 10, "a window may begin anywhere in a long history"


def test_steps_hold_about_the_asked_number_of_targets() -> None:
    items, offsets = make_log([150] * 100)
    windows = TrainingWindows(items, offsets, max_seq_len=50, targets_per_step=500)
    counts = [batch.num_targets for batch in windows.epoch(0)]
    assert len(counts) == 30
    assert all(450 <= count <= 550 for count in counts[:-1])
    prefixes = TrainingWindows(items, offsets, objective="prefix", targets_per_step=500)
    assert {batch.num_targets for batch in prefixes.epoch(0)} <= {500, 100 * 149 % 500}


def test_a_step_is_the_same_alone_and_in_a_row() -> None:
    items, offsets = make_log([30] * 20)
    windows = TrainingWindows(items, offsets, max_seq_len=8, targets_per_step=40)
    in_a_row = list(windows.epoch(2))
    alone = windows.epoch(2)[5]
    assert np.array_equal(alone.items, in_a_row[5].items)
    assert np.array_equal(alone.targets, in_a_row[5].targets)
    with pytest.raises(IndexError):
        windows.epoch(2)[len(in_a_row)]


def test_context_is_read_without_a_loss() -> None:
    items, offsets = make_log([9])
    windows = TrainingWindows(items, offsets, max_seq_len=3, context=2, targets_per_step=99)
    batch = next(iter(windows.epoch(0)))
    for begin, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        first_target = int(np.argmax(batch.targets[begin:end] > 0))
        assert first_target == min(2, batch.items[begin + first_target] - 1)


def test_packed_padded_and_split_hold_the_same() -> None:
    items, offsets = make_log([5, 9, 2, 7])
    batch = next(iter(TrainingWindows(items, offsets, max_seq_len=4).epoch(0)))
    cpu = torch.device("cpu")
    packed, cu_seqlens, targets = batch.packed(cpu)
    for length in (None, 10):
        item_seq, lengths, padded_targets = batch.padded(cpu, length)
        assert item_seq.shape == (len(lengths), length or int(lengths.max()))
        real = torch.arange(item_seq.shape[1]) < lengths[:, None]
        assert torch.equal(item_seq[real], packed)
        assert torch.equal(padded_targets[real], targets)
        assert not item_seq[~real].any()
        assert not padded_targets[~real].any()
    assert cu_seqlens[-1] == len(packed)
    for parts in (1, 2, 3, 50):
        pieces = batch.split(parts)
        assert 1 <= len(pieces) <= parts
        assert np.array_equal(np.concatenate([p.items for p in pieces]), batch.items)
        assert sum(p.num_targets for p in pieces) == batch.num_targets
        assert all(p.cu_seqlens[0] == 0 and p.cu_seqlens[-1] == len(p.items) for p in pieces)


def test_bucketed_batches_hold_similar_lengths() -> None:
    rng = np.random.default_rng(0)
    items, offsets = make_log(rng.integers(2, 200, 400).tolist())

    def padding(bucket: bool) -> float:
        windows = TrainingWindows(items, offsets, targets_per_step=800, bucket=bucket)
        batches = [batch.padded(torch.device("cpu"))[0] for batch in windows.epoch(0)]
        return float(np.mean([(seq == 0).float().mean() for seq in batches]))

    assert padding(True) < 0.1 < 0.3 < padding(False)


def test_bad_arguments_give_one_line() -> None:
    items, offsets = make_log([5])
    for options in ({"max_seq_len": 0}, {"targets_per_step": 0}, {"context": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            TrainingWindows(items, offsets, **options)
    with pytest.raises(ValueError, match="objective"):
        TrainingWindows(items, offsets, objective="cloze")
    with pytest.raises(ValueError, match="at least two items"):
        TrainingWindows(*make_log([1, 0, 1]))
