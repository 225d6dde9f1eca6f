"""RecGRELA behind a TorchRec EmbeddingCollection: jagged input, a table on several processes.

    model = RecGRELA(RecGRELAConfig(num_items=10_000_000), device=torch.device("meta"))
    apply_optimizer_in_backward(RowWiseAdagrad, model.table_parameters(), {"lr": 0.05})
    model = shard_rows(model)
    loss, _ = model(batch_of(item_seqs, targets, negatives))
    loss.backward()

A batch is one KeyedJaggedTensor with the keys "item" and "target" (the same lengths, end to end)
and "negative" (some sampled items per user). All three are looked up in one table. Histories go to
the encoder as they come, packed and without padding. The loss is a softmax over the target and the
user's negatives, a mean over the targets of all processes.

Tried with torchrec and fbgemm-gpu-cpu 1.8.0 on torch 2.13; 1.7 and 1.9 do not load there.
"""

from __future__ import annotations
