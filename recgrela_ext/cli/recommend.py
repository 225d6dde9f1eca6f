"""``recgrela recommend``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from recgrela_ext.cli.reading import (
    Reading,
    histories,
    load_model,
    prepare_file,
    progress_of,
    use_machine,
)
from recgrela_ext.errors import DataError, shown

if TYPE_CHECKING:
    from recgrela_ext import RecGRELA
    from recgrela_ext.evaluation.recommend import Recommended


def run(options: argparse.Namespace) -> None:
    """Print lists of the best next items."""
    from recgrela_ext.evaluation import format_recommendations

    prepare_file(options.json, options.model, options.data)
    model = load_model(options.model, use_machine(options))
    lines = _of_items(options, model) if options.items is not None else _of_users(options, model)
    print(format_recommendations(lines))
    if options.json is not None:
        text = json.dumps(lines, indent=2, ensure_ascii=False)
        Path(options.json).write_text(text + "\n", encoding="utf-8")


def _of_items(options: argparse.Namespace, model: RecGRELA) -> list[Recommended]:
    from recgrela_ext.evaluation import recommend_for_items

    if options.data is not None:
        raise ValueError("recommend: --data must go with --user, got --items")
    assert model.id_map is not None
    items = [item.strip() for item in options.items.split(",")]
    if "" in items and any(items):
        raise ValueError(
            f"recommend: --items must be ids with a comma between two, got {shown(options.items)}"
        )
    items = [item for item in items if item]
    return recommend_for_items(model, model.id_map, items, options.k, _exclude(options))


def _of_users(options: argparse.Namespace, model: RecGRELA) -> list[Recommended]:
    from recgrela_ext.evaluation import recommend_for_users

    assert model.id_map is not None
    reading = Reading.load(options.model).at(options.data)
    prepare_file(options.json, reading.data)
    found = histories(reading.interactions(progress_of(options)), model.id_map)
    users = found.id_map.encode_users(options.user)
    for raw, row in zip(options.user, users.tolist(), strict=True):
        if not len(found.history(row)):
            raise DataError(
                f"recommend: user {raw!r} must have an item the model knows, got none of its "
                f"{model.id_map.num_items}"
            )
    return recommend_for_users(model, found, options.user, options.k, _exclude(options))


def _exclude(options: argparse.Namespace) -> bool | str:
    return False if options.include_seen else "auto"
