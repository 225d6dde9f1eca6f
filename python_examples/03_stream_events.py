"""Serving: one small state per user follows the events; no history is read again.

    python python_examples/03_stream_events.py

The weights here are untrained; `RecGRELA.from_pretrained(folder)` takes trained ones.
"""

from __future__ import annotations

import torch

from recgrela_ext import RecGRELA, RecGRELAConfig, SeenItems, UserState

torch.manual_seed(0)
model = RecGRELA(RecGRELAConfig(num_items=1000)).eval()
histories = torch.randint(1, 1001, (3, 200))  # three users, item rows from 1

# Read the histories once; afterwards the state is all a recommendation needs.
state = model.prefill(histories)
seen = SeenItems.from_sequences(histories)
print(f"{state.nbytes // len(state):,} bytes per user, whatever the length of the history")

# A new event of every user: 0 stands for "nothing happened".
events = torch.tensor([17, 0, 42])
model.step(events, state)
seen.add(events)
top = model.recommend_from_state(state, k=5, seen=seen)
print("lists after the events:", *top.items.tolist(), sep="\n  ")

# The same as reading the whole, longer history.
longer = torch.cat([histories[0], events[:1]])[None]
print(
    "as from the whole history:",
    top.items[0].tolist() == model.recommend(longer, k=5).items[0].tolist(),
)

# Put one user's state and seen items into any key-value store, and take them back.
blob = state.to_bytes(2, seen=seen)
back, back_seen = UserState.from_bytes(blob, model), SeenItems.from_bytes(blob)
again = model.recommend_from_state(back, k=5, seen=back_seen)
print(f"{len(blob):,} bytes at rest; same list: {again.items[0].tolist() == top.items[2].tolist()}")
