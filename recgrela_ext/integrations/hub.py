"""RecGRELA on the Hugging Face Hub, through `PyTorchModelHubMixin` (huggingface_hub 1.0 or newer).

    model = RecGRELA.from_model(trained)
    model.push_to_hub("me/my-model", model_card_kwargs={"result": evaluate(trained, test)})
    model = RecGRELA.from_pretrained("me/my-model")      # also a folder
    model.recommend(item_seq, k=10)

The files are those of `recgrela_ext.RecGRELA.save_pretrained` (config, weights, id map; no pickle)
and a model card that states mode, data and protocol; either class reads what the other wrote.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from recgrela_ext import RecGRELA as Model
from recgrela_ext import RecGRELAConfig
from recgrela_ext.errors import CheckpointError
from recgrela_ext.model import persistence
from recgrela_ext.model.config import CONFIG_FILE, DIGESTS, WEIGHTS_FILE

try:
    from huggingface_hub import ModelCard, ModelCardData, PyTorchModelHubMixin, snapshot_download
except ImportError as error:
    raise ImportError(
        "recgrela_ext.integrations.hub needs huggingface_hub 1.0 or newer: "
        "pip install 'recgrela-ext[hub]'"
    ) from error

_TAGS = (
    "recommender-system",
    "sequential-recommendation",
    "arxiv:2506.13315",
    "model_hub_mixin",
    "pytorch_model_hub_mixin",
)
_WHERE = {"revision", "cache_dir", "force_download", "local_files_only", "token"}
_MODES = {
    "causal": "This is recgrela_ext's causal variant, which the paper does not describe; no "
    "published figure belongs to it. It keeps a small fixed state per user and follows events one "
    "at a time.",
    "published": "This is the published bidirectional model: padding takes part in the attention, "
    "and there is no state per user.",
    "bidirectional": "This is a bidirectional model that does not see padding; it is not the "
    "published one, and there is no state per user.",
}


class RecGRELA(PyTorchModelHubMixin, Model):
    """`recgrela_ext.RecGRELA` with the mixin's `save_pretrained` and `push_to_hub`."""

    @classmethod
    def from_model(cls, model: Model) -> RecGRELA:
        """A copy of `model` with its id map, in evaluation mode; TypeError for anything else."""
        if not isinstance(model, Model):
            raise TypeError(f"from_model: model must be a RecGRELA, got {type(model).__name__}")
        table = model.item_embedding.weight
        copy = cls(model.config).to(device=table.device, dtype=table.dtype)
        copy.load_state_dict(model.state_dict())
        copy.id_map = model.id_map
        return copy.eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        persistence.save_pretrained(self, save_directory)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # its first name is the mixin's
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        device: torch.device | str | None = None,
        **options: Any,
    ) -> RecGRELA:
        """The model of a folder or of a repository on the Hub, in evaluation mode.

        Args:
            pretrained_model_name_or_path: the folder, or "owner/name".
            device: also as `map_location`.
            options: for the Hub, the mixin's `revision`, `cache_dir`, `token`, `force_download`
                and `local_files_only`.

        Raises:
            CheckpointError: files that are missing, torn, mixed or of another model.
        """
        name = str(pretrained_model_name_or_path)
        if os.path.isdir(name):
            return cls._from_pretrained(model_id=name, device=device, **options)
        try:
            found = super().from_pretrained(name, device=device, **options)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, AttributeError) as error:
            raise CheckpointError(  # the mixin reads it first, and raises what json raises
                f"{name}: {CONFIG_FILE} must be a JSON object: {error}"
            ) from None
        assert isinstance(found, RecGRELA)
        return found

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        config: Any = None,
        device: torch.device | str | None = None,
        map_location: torch.device | str | None = None,
        strict: bool = True,  # it always is
        **where: Any,
    ) -> RecGRELA:
        folder = model_id
        unknown = set(where) - _WHERE
        if unknown:
            raise TypeError(f"from_pretrained: options must be known, got {', '.join(unknown)}")
        if not os.path.isdir(model_id):
            names = [CONFIG_FILE, WEIGHTS_FILE]
            fields = {k: v for k, v in (config or {}).items() if k not in DIGESTS}
            id_map_file = RecGRELAConfig.from_dict(fields).id_map_file  # before a name is asked for
            names += [id_map_file] if id_map_file is not None else []
            folder = snapshot_download(model_id, allow_patterns=names, **where)
        found = persistence.from_pretrained(cls, folder, device or map_location)
        assert isinstance(found, RecGRELA)
        return found

    def generate_model_card(
        self,
        *,
        result: dict[str, Any] | None = None,
        data: str | None = None,
        protocol: str | None = None,
        license: str | None = None,
    ) -> ModelCard:
        """The README.md beside the weights.

        Args:
            result: of `evaluate`, or of the file `recgrela evaluate --json` wrote.
            data: what the model was trained on, and its terms; by default what `result` names.
            protocol: how it was evaluated, beside what `result` tells.
            license: an identifier of the Hub, for the header.

        Raises:
            ValueError: `result` is not what `evaluate` returns.
        """
        header = ModelCardData(library_name="recgrela_ext", tags=list(_TAGS), license=license)
        if result is not None:
            _check_result(result)
            data = data or f"{result['data']}, order `{result['order']}`"
            told = (
                f"{result['split']} split, {result['targets']:,} targets, sha256 "
                f"`{result['target_sha256']}`. Every item is ranked; the rank is 1 + the number of "
                "other items with a score at least the target's."
            )
            protocol = f"{told} {protocol or ''}".strip()
        mode, config = self.variant.split()[0], self.config
        body = ["# RecGRELA", "", f"Variant: `{self.variant}`. {_MODES[mode]}", "",
                f"- Data: {_line(data or 'not stated')}",
                f"- Protocol: {_line(protocol or 'not stated')}",
                f"- Items: {config.num_items:,}; id map {'included' if self.id_map else 'absent'}",
                f"- Sizes: hidden {config.hidden_size}, {config.num_layers} layers, "
                f"{config.num_heads} heads, window {config.max_seq_len}"]  # fmt: skip
        if result is not None:
            body += ["", "| metric | value |", "|---|---|"]
            body += [f"| {_line(name)} | {value:.4f} |" for name, value in result["mean"].items()]
        body += ["", "```python", "from recgrela_ext.integrations.hub import RecGRELA", "",
                 'model = RecGRELA.from_pretrained("this repository")', "```", ""]  # fmt: skip
        return ModelCard("\n".join(["---", header.to_yaml(), "---", "", *body]))


def _line(text: str) -> str:
    """One line that ends no list, table or code of the card and brings no HTML."""
    return " ".join(text.split()).replace("<", "&lt;").replace("|", "\\|")


def _check_result(result: Any) -> None:
    needed = ("data", "order", "split", "targets", "target_sha256", "mean")
    lacking = [name for name in needed if not isinstance(result, dict) or name not in result]
    if lacking:
        raise ValueError(
            f"generate_model_card: result must be what evaluate returns, got one without {lacking}"
        )
