"""``recgrela export``: a torch.export program, and the item vectors for an external index."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from recgrela_ext.cli.reading import load_model, prepare_file

if TYPE_CHECKING:
    from recgrela_ext import RecGRELA


def run(options: argparse.Namespace) -> None:
    """Write what was asked for, each file checked."""
    if options.out is None and options.item_vectors is None:
        raise ValueError("export: --out or --item-vectors must be given, got neither")
    for path, suffix in ((options.out, ".pt2"), (options.item_vectors, ".npy")):
        prepare_file(path, options.model)
        if path is not None and not path.endswith(suffix):
            raise ValueError(f"export: the file must end in {suffix}, got {path}")
    if options.item_vectors is not None:
        prepare_file(_names_of(Path(options.item_vectors)), options.model)
    from recgrela_ext.export import export_program

    model = load_model(options.model)
    if options.out is not None:
        worst = export_program(model, options.out)
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
    if model.repeat_bias is not None:
        print(
            "The model has a repeat bias, which is in none of these files' products: lists without "
            "seen items are right as they are; for others add the nine numbers of repeat_bias, in "
            "the JSON file that --item-vectors writes, to the scores of the items met last, second "
            "to last, 3rd to 4th, 5th to 8th and so on, the last number beyond the 128th."
        )
    if options.item_vectors is not None:
        names = write_item_vectors(model, Path(options.item_vectors))
        print(
            f"{options.item_vectors}: vectors [{model.config.num_items}, "
            f"{model.config.hidden_size}] float32; row i is item_ids[i] of {names}, and row "
            "i + 1 of the program's input"
        )


def _names_of(path: Path) -> Path:
    return path.with_suffix(".json")


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
    names = _names_of(path)
    bias = model.repeat_bias
    content = {
        "item_ids": raw,
        "item_titles": None if titles is None else [titles.get(one) for one in raw],
        "repeat_bias": None if bias is None else bias.ranked_values().tolist(),
    }
    names.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    return names
