"""Which run a checkpoint belongs to: recipe, model and data, compared field by field."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
from torch import nn

from recgrela_ext.data.sequences import Sequences, Targets
from recgrela_ext.errors import CheckpointError
from recgrela_ext.training.config import TrainConfig


def run_identity(
    model: nn.Module,
    train: Sequences,
    valid: Targets | None,
    limits: dict[str, Any],
    config: TrainConfig,
) -> dict[str, dict[str, Any]]:
    """JSON-ready facts that must be equal for a run to be resumed.

    The limits belong to it only where the learning rate follows them.
    """
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    settings: Any = getattr(model, "config", None)
    facts = settings.to_dict() if hasattr(settings, "to_dict") else {}
    data = hashlib.sha256(np.ascontiguousarray(train.items).data)
    data.update(np.ascontiguousarray(train.offsets).data)
    identity = {
        "config": config.fingerprint(),
        "model": {"class": type(model).__name__, **facts, "parameters": shapes, "frozen": frozen},
        "data": {
            "name": train.name,
            "order": train.order,
            "sha256": data.hexdigest(),
            "valid_sha256": None if valid is None else valid.target_sha256,
        },
    }
    if config.schedule != "constant":
        identity["limits"] = dict(limits)
    plain: dict[str, dict[str, Any]] = json.loads(json.dumps(identity, default=str))
    return plain


def check_identity(there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises CheckpointError, naming the first fields that differ."""
    different = []
    for group in sorted(set(there) | set(here)):
        old, now = there.get(group, {}), here.get(group, {})
        for name in sorted(set(old) | set(now)):
            if old.get(name) != now.get(name):
                if name == "parameters":
                    different.append("model parameters of other names or shapes")
                elif name == "frozen":
                    if set(old.get(name, ())) != set(now.get(name, ())):  # older ones say nothing
                        different.append("another set of weights that require no gradient")
                else:
                    values = f"{_short(old.get(name))} there and {_short(now.get(name))} here"
                    different.append(f"{group} {name} = {values}")
    if different:
        more = f" (and {len(different) - 3} more)" if len(different) > 3 else ""
        raise CheckpointError(
            "fit: checkpoint_dir must hold a checkpoint of this run, got "
            f"{'; '.join(different[:3])}{more}; resume='never' starts over"
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 24 else text[:20] + "..."
