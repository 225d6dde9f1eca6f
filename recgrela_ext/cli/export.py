"""``recgrela export``: a torch.export program, and the item vectors for an external index."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from recgrela_ext.cli.reading import load_model, prepare_file
from recgrela_ext.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from recgrela_ext import RecGRELA

_TOLERANCE = 1e-5


def run(options: argparse.Namespace) -> None:
    """Write what was asked for, each file checked."""
    if options.out is None and options.item_vectors is None:
        raise ValueError("export: --out or --item-vectors must be given, got neither")
    for path, suffix in ((options.out, ".pt2"), (options.item_vectors, ".npy")):
        prepare_file(path)
        if path is not None and not path.endswith(suffix):
            raise ValueError(f"export: the file must end in {suffix}, got {path}")
    model = load_model(options.model)
    if options.out is not None:
        worst = export_program(model, Path(options.out))
        print(
            f"{options.out}: (item_seq [B, L], item_seq_len [B]) int64 -> hidden "
            f"[B, {model.config.hidden_size}]; loaded again and compared, largest difference "
            f"{worst:.1e}"
        )
        if model.config.causal:
            print(
                "A process that loads it must first `import recgrela_ext.ops`, which registers "
                "the operators it calls."
            )
    if options.item_vectors is not None:
        names = write_item_vectors(model, Path(options.item_vectors))
        print(
            f"{options.item_vectors}: vectors [{model.config.num_items}, "
            f"{model.config.hidden_size}] float32; row i is item_ids[i] of {names}, and row "
            "i + 1 of the program's input"
        )


def export_program(model: RecGRELA, path: Path) -> float:
    """Write the program; returns the largest difference to the model over batches of other sizes.

    Raises:
        ValueError: a causal model without the compiled operators: plain PyTorch walks over a
            sequence in chunks, whose number an exported program fixes.
        CheckpointError: the file, loaded again, does not compute what the model does.
    """
    import torch

    from recgrela_ext._library import KERNEL_DEVICES

    if model.config.causal and "cpu" not in KERNEL_DEVICES:
        raise ValueError(
            "export: the compiled operators must be present for a causal model, got none"
        )
    model = model.eval()
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1)
    with torch.no_grad():
        program = torch.export.export(
            model, _batch(model, 3, 7), dynamic_shapes=({0: batch, 1: length}, {0: batch})
        )
    torch.export.save(program, path)
    loaded = torch.export.load(path).module()
    worst = 0.0
    for users, items in ((3, 7), (1, 1), (5, 130)):
        item_seq, item_seq_len = _batch(model, users, items)
        with torch.no_grad():
            wanted = model(item_seq, item_seq_len)
            found = loaded(item_seq, item_seq_len)
        scale = float(wanted.abs().max().clamp(min=1.0))
        worst = max(worst, float((found - wanted).abs().max()) / scale)
    if not worst <= _TOLERANCE:
        raise CheckpointError(f"export: {path} must agree with the model, got a difference {worst}")
    return worst


def write_item_vectors(model: RecGRELA, path: Path) -> Path:
    """Write the item table without padding, and its raw ids beside it; returns that file."""
    import torch

    rows = torch.arange(model.config.rows) != model.config.padding_idx
    table = model.item_embedding.weight.detach().float()[rows]
    with path.open("wb") as file:
        np.save(file, table.numpy())
    assert model.id_map is not None
    titles = model.id_map.item_titles
    raw = model.id_map.item_ids.tolist()
    names = path.with_suffix(".json")
    content = {
        "item_ids": raw,
        "item_titles": None if titles is None else [titles.get(one) for one in raw],
    }
    names.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    return names


def _batch(model: RecGRELA, users: int, length: int) -> tuple[Tensor, Tensor]:
    """Random histories of all lengths up to `length`, right-padded."""
    import torch

    generator = torch.Generator().manual_seed(users)
    item_seq = torch.randint(1, model.config.rows, (users, length), generator=generator)
    item_seq_len = torch.arange(users) % length + 1
    item_seq_len[0] = length
    real = torch.arange(length) < item_seq_len[:, None]
    return torch.where(real, item_seq, model.config.padding_idx), item_seq_len
