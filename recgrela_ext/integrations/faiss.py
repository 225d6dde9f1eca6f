"""Approximate lists from a FAISS index, where the exact scan of the catalogue is too slow.

`pip install faiss-cpu`. The exact top-k of this package needs no index: `RecGRELA.recommend`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..model.retrieval import Recommendations

if TYPE_CHECKING:
    from ..model import RecGRELA


class FaissIndex:
    """The item vectors of a model in a FAISS index by inner product.

    Args:
        model: its vectors are copied; make a new index after training.
        factory: what `faiss.index_factory` reads, "HNSW32", "IVF1024,Flat", "SQ8", ...; an index
            that must be trained is trained on the item vectors.

    Raises:
        ImportError: faiss is not installed.
    """

    def __init__(self, model: RecGRELA, factory: str = "HNSW32") -> None:
        import faiss

        self.padding_idx = model.config.padding_idx
        self._must_know = model.config.repeat_bias
        weight = model.item_embedding.weight.detach().float().cpu()
        self.rows = np.flatnonzero(np.arange(model.config.rows) != self.padding_idx)
        vectors = np.ascontiguousarray(weight.numpy()[self.rows])
        self.index: Any = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        if not self.index.is_trained:
            self.index.train(vectors)
        self.index.add(vectors)

    def top_k(self, hidden: Tensor, k: int = 10, seen: Tensor | None = None) -> Recommendations:
        """As `ItemTable.top_k`, approximate: the index is asked for k items and as many more as
        the longest row of `seen` [B, S] has, then what was seen is taken out. The index knows no
        repeat bias, so a model that has one must be given `seen`."""
        if k < 1:
            raise ValueError(f"FaissIndex.top_k: k must be at least 1, got {k}")
        if seen is None and self._must_know:
            raise ValueError("FaissIndex.top_k: seen must be given for a model with a repeat bias")
        wanted = k if seen is None else k + seen.shape[1]
        queries = np.ascontiguousarray(hidden.detach().float().cpu().numpy())
        found, place = self.index.search(queries, min(wanted, len(self.rows)))
        scores = torch.from_numpy(found)
        items = torch.from_numpy(np.where(place >= 0, self.rows[place], self.padding_idx))
        gone = items == self.padding_idx
        if seen is not None and seen.shape[1]:
            ordered = seen.cpu().to(torch.int64).sort(1).values
            at = torch.searchsorted(ordered, items).clamp_(max=ordered.shape[1] - 1)
            gone |= ordered.gather(1, at) == items
        scores = scores.masked_fill(gone, -torch.inf)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        items = items.masked_fill(gone, self.padding_idx).gather(1, order)
        missing = max(0, k - items.shape[1])
        items = torch.nn.functional.pad(items[:, :k], (0, missing), value=self.padding_idx)
        scores = torch.nn.functional.pad(scores[:, :k], (0, missing), value=-torch.inf)
        return Recommendations(items.to(hidden.device), scores.to(hidden.device))
