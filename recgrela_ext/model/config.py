"""Configuration of a RecGRELA model: a checked, immutable record that travels with the weights."""

from __future__ import annotations

import dataclasses
import operator
import re
from typing import Any

from ..arguments import is_one_of
from ..errors import CheckpointError, shown

CONFIG_VERSION = 1

_CHOICES = {
    "rotary": ("full_width", "per_head", "none"),
    "position": ("none", "learned", "sinusoidal"),
    "selector": ("silu", "balance"),
    "gate_activation": ("silu", "relu", "gelu"),
    "mlp_activation": ("gelu", "silu", "relu"),
}
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"  # of a saved model
DIGESTS = ("weights_sha256", "id_map_sha256")  # in config.json, of the files beside it
# Each at least 1 and at most this: far beyond, a weight's size in bytes no longer fits an int64.
_LARGEST = {
    "hidden_size": 1 << 16,
    "num_layers": 1 << 16,
    "num_heads": 1 << 16,
    "conv_width": 1 << 16,
    "max_seq_len": 1 << 40,
}
_LARGEST_TABLE = 1 << 40
_MANY_REPEATS = 0.01  # share of repeated events from which seen items stay recommendable
_SHARES = ("dropout", "drop_path")
_POSITIVE = ("rotary_base", "initializer_range")
_EPSILONS = ("layer_norm_eps", "eps")
_FLAGS = (
    "causal",
    "attend_padding",
    "final_norm",
    "published_single_layer",
    "gate",
    "rank_augmentation",
    "v_projection",
    "repeat_bias",
)


@dataclasses.dataclass(frozen=True)
class RecGRELAConfig:
    """Everything that defines a RecGRELA model (paper sections 3.1 to 3.4).

    Give `n_items` (rows of the item table, padding row included, as RecBole counts) or `num_items`
    (real items alone); the other follows. The defaults are this project's causal variant;
    `RecGRELAConfig.paper(...)` is the published bidirectional model.

    Ablations of the paper (section 7): `gate=False`, `rank_augmentation=False`, `rotary="none"`,
    `position="learned" | "sinusoidal"`, `v_projection=True`, and the pair `gate_activation`,
    `mlp_activation`. `selector="balance"` weighs the two branches with sigmoid(gate) and
    1 - sigmoid(gate) instead of gating their sum.

    `drop_path` leaves out the attention of whole sequences while training; the published 0.1 costs
    the causal model more than it gains (docs/quality.md), so it is off here and on in `paper`.

    `repeat_bias=True` adds a learned number to the score of each item the user has met, by how
    recently (`model.repeat_bias`; causal models alone; not in the paper). It is off here and on in
    `RecGRELA.for_data` and `recgrela train`. Where `ops.softmax_loss` does not run (on a GPU,
    without the compiled operators, under torch.compile or autocast to bfloat16, for more than
    500,000 items over the number of threads) the loss then takes time and memory that grow with the
    square of the window.

    `max_seq_len` is the window used for training and evaluation; the causal model also takes longer
    input (learned positions repeat their last row beyond it). `repeat_share` is a fact about the
    training data, the share of events that repeat an earlier item of the same user; `recommend`
    reads it. `id_map_file` names the file with the raw ids beside a saved model.

    Raises ValueError or TypeError, one line naming the field, for a value that cannot work.
    """

    n_items: int | None = None
    num_items: int | None = None
    hidden_size: int = 64
    num_layers: int = 4
    num_heads: int = 4
    conv_width: int = 4
    dropout: float = 0.1
    drop_path: float = 0.0
    layer_norm_eps: float = 1e-6
    max_seq_len: int = 200
    padding_idx: int = 0
    causal: bool = True
    attend_padding: bool = False
    final_norm: bool = False
    published_single_layer: bool = False
    rotary: str = "full_width"
    rotary_base: float = 10000.0
    position: str = "none"
    gate: bool = True
    rank_augmentation: bool = True
    v_projection: bool = False
    selector: str = "silu"
    gate_activation: str = "silu"
    mlp_activation: str = "gelu"
    repeat_bias: bool = False
    initializer_range: float = 0.02
    eps: float = 1e-6
    repeat_share: float | None = None
    id_map_file: str | None = None

    def __post_init__(self) -> None:
        self._resolve_item_counts()
        for name in (*_LARGEST, "padding_idx"):
            object.__setattr__(self, name, _as_int(name, getattr(self, name)))
        for name, largest in _LARGEST.items():
            value = getattr(self, name)
            _require(value >= 1, name, "be at least 1", value)
            _require(value <= largest, name, f"be at most {largest}", value)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(_message(name, "be True or False", getattr(self, name)))
        for name in (*_SHARES, *_POSITIVE, *_EPSILONS):
            object.__setattr__(self, name, _as_float(name, getattr(self, name)))
        for name in _SHARES:
            _require(0.0 <= getattr(self, name) < 1.0, name, "lie in [0, 1)", getattr(self, name))
        for name in _POSITIVE:
            value = getattr(self, name)
            _require(0.0 < value < float("inf"), name, "be positive and finite", value)
        for name in _EPSILONS:
            value = getattr(self, name)
            _require(0.0 < value <= 1.0, name, "lie in (0, 1]", value)
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            _require(is_one_of(value, choices), name, f"be one of {', '.join(choices)}", value)
        self._check_combinations()

    def _resolve_item_counts(self) -> None:
        n_items, num_items = self.n_items, self.num_items
        if n_items is None and num_items is None:
            raise ValueError(
                "RecGRELAConfig: n_items must be given (padding row included), "
                "or num_items (without it)"
            )
        n_items = None if n_items is None else _as_int("n_items", n_items)
        num_items = None if num_items is None else _as_int("num_items", num_items)
        if n_items is not None and num_items is not None and n_items != num_items + 1:
            raise ValueError(
                f"RecGRELAConfig: n_items must be num_items + 1 = {num_items + 1} "
                f"(the padding row counts), got {n_items}"
            )
        if n_items is None:
            assert num_items is not None
            n_items = num_items + 1
        _require(n_items >= 2, "n_items", "be at least 2 (one item and the padding row)", n_items)
        _require(n_items <= _LARGEST_TABLE, "n_items", f"be at most {_LARGEST_TABLE}", n_items)
        object.__setattr__(self, "n_items", n_items)
        object.__setattr__(self, "num_items", n_items - 1)

    def _check_combinations(self) -> None:
        _require(
            0 <= self.padding_idx < self.rows,
            "padding_idx",
            f"be a row of the item table, 0 to {self.rows - 1}",
            self.padding_idx,
        )
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                "RecGRELAConfig: hidden_size must be a multiple of 2 * num_heads "
                f"(rotary pairs), got hidden_size={self.hidden_size}, num_heads={self.num_heads}"
            )
        if self.attend_padding and self.causal:
            raise ValueError(
                "RecGRELAConfig: attend_padding must be False for a causal model, got True "
                "(it exists for the published bidirectional one, causal=False)"
            )
        if self.repeat_bias and not self.causal:
            raise ValueError(
                "RecGRELAConfig: repeat_bias must be False for a bidirectional model, got True"
            )
        if self.published_single_layer and self.num_layers != 1:
            raise ValueError(
                "RecGRELAConfig: published_single_layer must be False unless num_layers is 1, "
                f"got True with num_layers={self.num_layers}"
            )
        if self.selector == "balance" and not self.gate:
            raise ValueError("RecGRELAConfig: gate must be True for selector='balance', got False")
        share, name = self.repeat_share, self.id_map_file
        if share is not None:
            share = _as_float("repeat_share", share)
            object.__setattr__(self, "repeat_share", share)
            _require(0 <= share <= 1, "repeat_share", "lie in [0, 1]", share)
        if name is not None:
            plain = isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*", name) is not None
            _require(plain, "id_map_file", "be a plain file name", name)
            own = name.lower() in (CONFIG_FILE, WEIGHTS_FILE)
            _require(not own, "id_map_file", f"not be {CONFIG_FILE} or {WEIGHTS_FILE}", name)

    @classmethod
    def paper(cls, n_items: int | None = None, **changes: Any) -> RecGRELAConfig:
        """The published bidirectional model with every published default (paper section 4.1.4).

        Padding takes part in the attention and one-layer models lose their residuals, both as in
        the published code. Numbers from the paper belong to this configuration, not to the default.
        """
        published: dict[str, Any] = {
            "causal": False,
            "attend_padding": True,
            "drop_path": 0.1,
            "layer_norm_eps": 1e-12,
            "published_single_layer": changes.get("num_layers", cls.num_layers) == 1,
        }
        return cls(n_items=n_items, **{**published, **changes})

    @property
    def rows(self) -> int:
        """Rows of the item table: `n_items` as a plain int."""
        assert self.n_items is not None
        return self.n_items

    @property
    def head_dim(self) -> int:
        """Width of one head, hidden_size / num_heads."""
        return self.hidden_size // self.num_heads

    @property
    def keeps_seen(self) -> bool:
        """What `exclude_seen="auto"` means: whether lists may hold items that the user has met."""
        return self.repeat_share is not None and self.repeat_share > _MANY_REPEATS

    @property
    def variant(self) -> str:
        """`causal`, `published` or `bidirectional`, and the departures from that one's defaults."""
        if self.causal:
            name, base = "causal", RecGRELAConfig(n_items=2)
        elif self.attend_padding:
            name = "published"
            base = RecGRELAConfig.paper(n_items=2, num_layers=self.num_layers)
        else:
            name = "bidirectional"
            base = RecGRELAConfig(n_items=2, causal=False)
        told = (*_CHOICES, *_FLAGS)
        changed = [f for f in told if getattr(self, f) != getattr(base, f)]
        return " ".join([name, *(f"{f}={getattr(self, f)}" for f in changed)])

    def replace(self, **changes: Any) -> RecGRELAConfig:
        """A copy with some fields changed (and checked again)."""
        fields = self.to_dict()
        fields.pop("version")
        if "num_items" in changes:
            fields.pop("n_items")
        return RecGRELAConfig(**{**fields, **changes})

    def block_options(self) -> dict[str, Any]:
        """Keyword arguments of `GRELABlock` other than its sizes."""
        return {
            "conv_width": self.conv_width,
            "dropout": self.dropout,
            "drop_path": self.drop_path,
            "layer_norm_eps": self.layer_norm_eps,
            "eps": self.eps,
            "causal": self.causal,
            "rotary": self.rotary,
            "rotary_base": self.rotary_base,
            "gate": self.gate,
            "rank_augmentation": self.rank_augmentation,
            "v_projection": self.v_projection,
            "selector": self.selector,
            "gate_activation": self.gate_activation,
            "mlp_activation": self.mlp_activation,
            "residual": not self.published_single_layer,
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields and the version of this layout; `from_dict` reads it back."""
        fields = dataclasses.asdict(self)
        fields.pop("num_items")
        if not self.repeat_bias:  # as in files and fingerprints from before there was one
            fields.pop("repeat_bias")
        return {"version": CONFIG_VERSION, **fields}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> RecGRELAConfig:
        """Read what `to_dict` wrote; CheckpointError for another version, unknown or bad fields."""
        if not isinstance(fields, dict):
            raise CheckpointError(f"config must be a JSON object, got {type(fields).__name__}")
        fields = dict(fields)
        version = fields.pop("version", None)
        if version != CONFIG_VERSION:
            raise CheckpointError(
                f"config must have version {CONFIG_VERSION}, got {shown(version)}: "
                "it was written by another version of recgrela_ext"
            )
        unknown = sorted(set(fields) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise CheckpointError(f"config must hold known fields alone, got {', '.join(unknown)}")
        try:
            return cls(**fields)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"config must be valid: {error}") from None


def _message(name: str, condition: str, value: object) -> str:
    return f"RecGRELAConfig: {name} must {condition}, got {shown(value)}"


def _require(holds: bool, name: str, condition: str, value: object) -> None:
    if not holds:
        raise ValueError(_message(name, condition, value))


def _as_int(name: str, value: Any) -> int:
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(_message(name, "be an int", value))


def _as_float(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(_message(name, "be a number", value))
    try:
        return float(value)
    except OverflowError:
        raise ValueError(_message(name, "be a number a float can hold", value)) from None
