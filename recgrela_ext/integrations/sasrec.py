"""RecGRELA behind the interface of the common PyTorch SASRec script.

That script calls ``SASRec(usernum, itemnum, args)``, then ``model(user_ids, log_seqs, pos_seqs,
neg_seqs)`` and ``model.predict(user_ids, log_seqs, item_indices)`` with numpy arrays padded on the
left with 0; in it, ``from model import SASRec`` becomes

    from recgrela_ext.integrations.sasrec import RecGRELA as SASRec
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recgrela_ext import RecGRELA as Model
from recgrela_ext import RecGRELAConfig
from recgrela_ext.model.inputs import check_ids


class RecGRELA(nn.Module):
    """The causal model, called as SASRec is.

    Args:
        user_num: not used; there is no user table.
        item_num: number of items, padding not counted: ids run from 1 to ``item_num``.
        args: a namespace with ``hidden_units``, ``num_blocks``, ``num_heads``, ``dropout_rate`` and
            ``maxlen``, as the script's command line makes it.
    """

    def __init__(self, user_num: int, item_num: int, args: Any) -> None:
        super().__init__()
        self.model = Model(
            RecGRELAConfig(
                num_items=item_num,
                hidden_size=args.hidden_units,
                num_layers=args.num_blocks,
                num_heads=args.num_heads,
                dropout=args.dropout_rate,
                max_seq_len=args.maxlen,
            )
        )
        # The script zeroes row 0 of both tables after its initialisation. Positions are rotary
        # here, so this table has one frozen row that nothing reads.
        self.pos_emb = nn.Embedding(1, args.hidden_units)
        self.pos_emb.weight.requires_grad_(False)

    @property
    def item_emb(self) -> nn.Embedding:
        """The item table, under the name the script uses."""
        return self.model.item_embedding

    def log2feats(self, log_seqs: np.ndarray) -> Tensor:
        """Hidden states ``[B, L, hidden]`` of left-padded ``log_seqs [B, L]``."""
        item_seq = self._ids("log_seqs", log_seqs)
        return self.model.encode(item_seq, (item_seq != 0).sum(dim=-1), padding_side="left")

    def forward(
        self, user_ids: Any, log_seqs: np.ndarray, pos_seqs: np.ndarray, neg_seqs: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """Logits ``[B, L]`` of the positive and of the negative items at every position.

        Args:
            user_ids: not used.
            log_seqs, pos_seqs, neg_seqs: item ids ``[B, L]``, 0 on the left where there is none.

        Raises:
            ValueError: shapes that differ, ids that are no items, padding that is not on the left.
        """
        hidden = self.log2feats(log_seqs)
        logits = []
        for name, values in (("pos_seqs", pos_seqs), ("neg_seqs", neg_seqs)):
            items = self._ids(name, values)
            if items.shape != hidden.shape[:2]:
                shape = list(hidden.shape[:2])
                raise ValueError(f"RecGRELA: {name} must be {shape}, got {list(items.shape)}")
            logits.append((hidden * self.item_emb(items)).sum(dim=-1))
        return logits[0], logits[1]

    def predict(self, user_ids: Any, log_seqs: np.ndarray, item_indices: Any) -> Tensor:
        """Logits ``[B, C]`` of candidate items ``[C]`` after each history.

        Args:
            user_ids: not used.
            log_seqs: item ids ``[B, L]``, left-padded with 0.
            item_indices: item ids ``[C]``.

        Raises:
            ValueError: as `forward`.
        """
        item_seq, items = self._ids("log_seqs", log_seqs), self._ids("item_indices", item_indices)
        hidden = self.model(item_seq, (item_seq != 0).sum(dim=-1), padding_side="left")
        return hidden @ self.item_emb(items).T

    def _ids(self, name: str, values: Any) -> Tensor:
        given = np.asarray(values)
        ids = given.astype(np.int64)
        if not np.array_equal(ids, given):
            raise ValueError(f"RecGRELA: {name} must be whole numbers, got others")
        items = torch.from_numpy(ids)
        check_ids("RecGRELA", name, self.model.config, items)
        return items.to(self.item_emb.weight.device)
