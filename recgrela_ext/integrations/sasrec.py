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
        item_seq = self._ids(log_seqs)
        return self.model.encode(item_seq, (item_seq != 0).sum(dim=1), padding_side="left")

    def forward(
        self, user_ids: Any, log_seqs: np.ndarray, pos_seqs: np.ndarray, neg_seqs: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """Logits ``[B, L]`` of the positive and of the negative items at every position.

        Args:
            user_ids: not used.
            log_seqs, pos_seqs, neg_seqs: item ids ``[B, L]``, 0 on the left where there is none.
        """
        hidden = self.log2feats(log_seqs)
        pos_logits = (hidden * self.item_emb(self._ids(pos_seqs))).sum(dim=-1)
        neg_logits = (hidden * self.item_emb(self._ids(neg_seqs))).sum(dim=-1)
        return pos_logits, neg_logits

    def predict(self, user_ids: Any, log_seqs: np.ndarray, item_indices: Any) -> Tensor:
        """Logits ``[B, C]`` of candidate items ``[C]`` after each history.

        Args:
            user_ids: not used.
            log_seqs: item ids ``[B, L]``, left-padded with 0.
            item_indices: item ids ``[C]``.
        """
        return self.log2feats(log_seqs)[:, -1] @ self.item_emb(self._ids(item_indices)).T

    def _ids(self, values: Any) -> Tensor:
        return torch.as_tensor(
            np.asarray(values, dtype=np.int64), device=self.item_emb.weight.device
        )
