from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from recgrela_ext.errors import CheckpointError
from recgrela_ext.model import RecGRELA, RecGRELAConfig


def test_item_counts_with_and_without_the_padding_row() -> None:
    assert RecGRELAConfig(n_items=3417).num_items == 3416
    assert RecGRELAConfig(num_items=3416).n_items == 3417
    assert RecGRELAConfig(n_items=np.int64(5)) == RecGRELAConfig(num_items=4)


def test_defaults_are_those_of_the_specification() -> None:
    config = RecGRELAConfig(n_items=10)
    assert (config.hidden_size, config.num_layers, config.num_heads, config.conv_width) == (
        64,
        4,
        4,
        4,
    )
    assert (config.dropout, config.drop_path, config.layer_norm_eps) == (0.1, 0.0, 1e-6)
    assert config.causal
    assert not config.attend_padding
    assert not config.final_norm
    assert config.variant == "causal"


def test_paper_is_the_published_model() -> None:
    config = RecGRELAConfig.paper(n_items=10)
    assert not config.causal
    assert config.attend_padding
    assert (config.dropout, config.drop_path, config.layer_norm_eps) == (0.1, 0.1, 1e-12)
    assert not config.published_single_layer
    assert config.variant == "published"
    assert RecGRELAConfig.paper(n_items=10, num_layers=1).published_single_layer
    assert RecGRELAConfig.paper(num_items=9) == config


def test_variant_names_departures() -> None:
    assert RecGRELAConfig(n_items=9, gate=False).variant == "causal gate=False"
    assert RecGRELAConfig(n_items=9, causal=False).variant == "bidirectional"


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({}, ValueError, "n_items must be given"),
        ({"n_items": 10, "num_items": 10}, ValueError, "n_items must be num_items [+] 1 = 11"),
        ({"n_items": 1}, ValueError, "n_items must be at least 2"),
        ({"n_items": 9.5}, TypeError, "n_items must be an int, got 9.5"),
        ({"n_items": 9, "hidden_size": 60, "num_heads": 4}, ValueError, "hidden_size must be a m"),
        ({"n_items": 9, "num_layers": 0}, ValueError, "num_layers must be at least 1, got 0"),
        ({"n_items": 9, "num_heads": True}, TypeError, "num_heads must be an int, got True"),
        ({"n_items": 9, "dropout": 1.0}, ValueError, "dropout must lie in"),
        ({"n_items": 9, "drop_path": "0.1"}, TypeError, "drop_path must be a number, got '0.1'"),
        ({"n_items": 9, "eps": float("nan")}, ValueError, r"eps must lie in \(0, 1\], got nan"),
        ({"n_items": 9, "layer_norm_eps": 2.0}, ValueError, r"layer_norm_eps must lie in \(0, 1\]"),
        ({"n_items": 9, "rotary_base": 0}, ValueError, "rotary_base must be positive and finite"),
        (
            {"n_items": 9, "rotary_base": 10**400},
            ValueError,
            "rotary_base must be a number a",
        ),
        ({"n_items": 9, "conv_width": 2**63}, ValueError, "conv_width must be at most 65536"),
        ({"n_items": 2**63}, ValueError, "n_items must be at most 1099511627776"),
        ({"n_items": 9, "rotary": "half"}, ValueError, "rotary must be one of full_width"),
        ({"n_items": 9, "mlp_activation": "tanh"}, ValueError, "mlp_activation must be one of"),
        ({"n_items": 9, "padding_idx": 9}, ValueError, "padding_idx must be a row"),
        ({"n_items": 9, "causal": 1}, TypeError, "causal must be True or False, got 1"),
        ({"n_items": 9, "attend_padding": True}, ValueError, "attend_padding must be False"),
        ({"n_items": 9, "published_single_layer": True}, ValueError, "published_single_layer must"),
        ({"n_items": 9, "selector": "balance", "gate": False}, ValueError, "gate must be True"),
        ({"n_items": 9, "repeat_share": 2}, ValueError, "repeat_share must lie in"),
        ({"n_items": 9, "id_map_file": "../x"}, ValueError, "id_map_file must be a plain file"),
    ],
)
def test_bad_values_have_one_clear_line(fields: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        RecGRELAConfig(**fields)
    assert "\n" not in str(caught.value)


def test_whole_numbers_become_floats() -> None:
    """10^30 as an int was taken and failed in the rotation's frequencies."""
    config = RecGRELAConfig(n_items=9, rotary_base=10**30, dropout=0)
    assert isinstance(config.rotary_base, float)
    RecGRELA(config.replace(hidden_size=8, num_heads=2))


def test_dict_round_trip_and_replace() -> None:
    config = RecGRELAConfig.paper(n_items=10, num_layers=1, repeat_share=0.2)
    assert RecGRELAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.replace(num_items=20).n_items == 21
    assert config.replace(dropout=0.0) == dataclasses.replace(config, dropout=0.0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"version": 99}, "version 1, got 99"),
        ({"version": None}, "version 1, got None"),
        ({"colour": "red"}, "known fields alone, got colour"),
        ({"num_heads": 0}, "num_heads must be at least 1"),
    ],
)
def test_config_of_another_version_is_refused(change: dict, text: str) -> None:
    fields = {**RecGRELAConfig(n_items=10).to_dict(), **change}
    with pytest.raises(CheckpointError, match=text):
        RecGRELAConfig.from_dict(fields)
    with pytest.raises(CheckpointError, match="JSON object"):
        RecGRELAConfig.from_dict([1])  # type: ignore[arg-type]
