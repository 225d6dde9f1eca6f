from __future__ import annotations

import pytest
import torch

from recgrela_ext import RecGRELA, RecGRELAConfig
from recgrela_ext.integrations.faiss import FaissIndex

pytest.importorskip("faiss", reason="needs faiss")


@pytest.mark.parametrize("padding_idx", [0, 300])
def test_a_flat_index_is_exact_and_leaves_out_what_was_seen(padding_idx: int) -> None:
    model = RecGRELA(RecGRELAConfig(num_items=300, padding_idx=padding_idx)).eval()
    item_seq = torch.randint(1, 300, (5, 12))
    index = FaissIndex(model, "Flat")
    with torch.no_grad():
        hidden = model(item_seq)
    for k in (10, 300):
        got = index.top_k(hidden, k, item_seq)
        want = model.recommend(item_seq, k=k)
        assert (got.items == want.items).float().mean() > 0.99
        torch.testing.assert_close(got.scores, want.scores, rtol=1e-4, atol=1e-5)
    assert index.top_k(hidden, 3).items.shape == (5, 3)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        index.top_k(hidden, 0)


def test_an_approximate_index_finds_most() -> None:
    model = RecGRELA(RecGRELAConfig(num_items=2000)).eval()
    item_seq = torch.randint(1, 2001, (20, 12))
    with torch.no_grad():
        hidden = model(item_seq)
    got = FaissIndex(model).top_k(hidden, 10, item_seq).items
    want = model.recommend(item_seq, k=10).items
    found = (got[:, :, None] == want[:, None]).any(2).float().mean()
    assert found > 0.8
