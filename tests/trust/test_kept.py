"""A call that is refused and a save that fails leave everything as it was; what does not belong
together is refused.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from recgrela_ext import (
    CheckpointError,
    DataError,
    IdMap,
    Interactions,
    RecGRELA,
    UserStateStore,
    ops,
)
from recgrela_ext.cli.reading import Reading
from recgrela_ext.data import readers
from recgrela_ext.evaluation.recommend import (
    Recommended,
    format_recommendations,
    recommend_for_items,
)
from recgrela_ext.files import write_files
from recgrela_ext.model.persistence import weights_digest
from recgrela_ext.training.checkpoint import CheckpointFolder
from tests.fuzz.saved import small_model


def with_ids(first: int, seed: int) -> RecGRELA:
    torch.manual_seed(seed)
    model = RecGRELA(small_model().config)
    items = np.arange(first, first + model.config.num_items)
    model.id_map = IdMap(np.arange(2), items)
    return model.eval()


def item_ids(model: RecGRELA) -> list[int]:
    assert model.id_map is not None
    return model.id_map.item_ids.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_save_keeps_the_old_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Whichever file the disk is full at; a kill between two renamings leaves what is refused."""
    old, new = with_ids(100, 0), with_ids(500, 1)
    old.save_pretrained(tmp_path)
    real = getattr(os, call)
    for number in range(3):
        left = [number]

        def fails(*arguments: Any, left: list[int] = left) -> Any:
            if left[0] == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            left[0] -= 1
            return real(*arguments)

        monkeypatch.setattr(os, call, fails)
        with pytest.raises(OSError, match="No space left"):
            new.save_pretrained(tmp_path)
        monkeypatch.setattr(os, call, real)
        assert not list(tmp_path.glob(".*"))
        if call == "replace" and number:
            with pytest.raises(CheckpointError, match=r"must be the .* config\.json was saved wi"):
                RecGRELA.from_pretrained(tmp_path)
            old.save_pretrained(tmp_path)
        found = RecGRELA.from_pretrained(tmp_path)
        assert found.fingerprint() == old.fingerprint()
        assert item_ids(found) == item_ids(old)
    new.save_pretrained(tmp_path)
    assert item_ids(RecGRELA.from_pretrained(tmp_path)) == item_ids(new)


def test_an_id_map_of_another_model(tmp_path: Path) -> None:
    model = with_ids(100, 0)
    model.save_pretrained(tmp_path)
    with_ids(500, 0).id_map.save(tmp_path / "id_map.json")  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match=r"must be the id map config\.json was saved with"):
        RecGRELA.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["id_map_sha256"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    IdMap(np.arange(2), np.arange(3)).save(tmp_path / "id_map.json")
    with pytest.raises(CheckpointError, match=r"must name the model's \d+ items, got 3"):
        RecGRELA.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("id_map", "message"),
    [
        (lambda n: IdMap(np.arange(2), np.arange(3)), r"must name the model's \d+ items, got 3"),
        (lambda n: IdMap(np.arange(2), np.zeros(n, np.int64)), "ids must be distinct"),
        (lambda n: IdMap(np.arange(2), np.arange(n), {1: 5}), "titles must be text"),
        (lambda n: IdMap(np.arange(2), np.arange(n), {1: "\ud800"}), "must hold UTF-8 text"),
        (lambda n: {}, "must be an IdMap, got {}"),
    ],
)
def test_what_could_not_be_loaded_again_is_not_saved(
    tmp_path: Path, id_map: Any, message: str
) -> None:
    model = with_ids(100, 0)
    model.save_pretrained(tmp_path)
    other = with_ids(100, 1)
    other.id_map = id_map(other.config.num_items)
    with pytest.raises((ValueError, TypeError), match=message):
        other.save_pretrained(tmp_path)
    assert item_ids(RecGRELA.from_pretrained(tmp_path)) == item_ids(model)


def test_an_id_map_from_before_it_had_a_digest(tmp_path: Path) -> None:
    model = with_ids(100, 0)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["id_map_sha256"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert item_ids(RecGRELA.from_pretrained(tmp_path)) == item_ids(model)


def test_files_get_their_names_together(tmp_path: Path) -> None:
    write_files({tmp_path / "a": b"1", tmp_path / "b": b"2"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"1", "b": b"2"}
    (tmp_path / "usual").write_bytes(b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_refused_event_counts_for_nobody() -> None:
    store = UserStateStore(small_model(), 5)
    with pytest.raises(ValueError, match=r"\.step: items must lie in 0\.\.11 .* got 9999"):
        store.step([1, 2, 1], torch.tensor([5, 6, 9999]))
    assert len(store.users) == 0
    store.step([1, 2, 1], torch.tensor([5, 6, 7]))
    assert store.lookup([1, 2]).state.position.tolist() == [2, 1]


@pytest.mark.parametrize("bad", [[9999], [3, 0, 3]])
def test_a_refused_rebuild_replaces_nobody(bad: list[int]) -> None:
    store = UserStateStore(small_model(), 5, "int8", active=1)
    store.step([1], torch.tensor([4]))
    before = store.lookup([1])
    with pytest.raises(ValueError, match=r"UserStateStore\.rebuild: item_ids must"):
        store.rebuild([1, 2], [[7, 8], bad])
    after = store.lookup([1, 2])
    assert after.known.tolist() == [True, False]
    assert torch.equal(after.state.buffer[:1], before.state.buffer)
    assert after.seen.ids(0).tolist() == [4]


@pytest.mark.parametrize("date", ["2300-01-01", "9999-12-31", "1600-01-01"])
@pytest.mark.parametrize("form", ["text", "datetime64[s]", "csv", "parquet"])
def test_dates_that_nanoseconds_cannot_hold(tmp_path: Path, form: str, date: str) -> None:
    """They wrapped around: the far future became a user's first event."""
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"user": [1] * 3, "item": [10, 11, 12]})
    days = ["2020-01-01", "2021-01-01", date]
    seconds = np.array(days, dtype="datetime64[s]")
    if form == "csv":
        frame.assign(timestamp=days).to_csv(tmp_path / "x.csv", index=False)
    elif form == "parquet":
        pytest.importorskip("pyarrow")
        frame.assign(timestamp=seconds).to_parquet(tmp_path / "x.parquet")

    def read() -> Interactions:
        if form in ("csv", "parquet"):
            return Interactions.from_file(tmp_path / f"x.{form}", progress=False)
        return Interactions.from_frame(frame.assign(timestamp=days if form == "text" else seconds))

    with pytest.raises(DataError, match=f"time must .*{date}.* in (row|line) [24]"):
        read()


@pytest.mark.parametrize("kinds", ["numbers and then dates", "dates and then numbers"])
def test_numbers_and_dates_in_different_parts_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: str
) -> None:
    monkeypatch.setattr(readers, "CHUNK_ROWS", 3)
    parts = {"numbers": ["1600000000", "1600000001"], "dates": ["2020-01-01", "2020-01-02"]}
    times = [time for kind in kinds.split(" and then ") for time in parts[kind]]
    rows = [f"1,{i},{time}" for i, time in enumerate(times, start=1)]
    (tmp_path / "x.csv").write_text("\n".join(["user,item,time", *rows]) + "\n")
    with pytest.raises(DataError, match=f"must be all numbers or all dates, got {kinds} from line"):
        Interactions.from_file(tmp_path / "x.csv", progress=False)


@pytest.mark.parametrize("date", ["today", "NaT", "2005", "2005-01", "999999-01-01", "2005-02-30"])
def test_netflix_dates(tmp_path: Path, date: str) -> None:
    (tmp_path / "combined_data_1.txt").write_text(f"1:\n5,3,2005-09-06\n6,3,{date}\n")
    with pytest.raises(DataError, match="dates must read YYYY-MM-DD, got"):
        Interactions.from_file(tmp_path, progress=False)


BAD_READINGS: dict[str, Any] = {
    "data": [5, None, [1]], "k_core": [5, [1], ["a", "b"]], "min_user": [None, "x", True],
    "max_user": ["x"], "keep": [["user"], {"user": 5}, {"user": "5"}], "order_seed": ["q"],
    "target_sha256": [[1], "x", {"test": 5}], "split": ["zz"], "time_targets": ["none"],
    "order": [5], "user": [1],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_READINGS.items() for value in values]
)
def test_a_record_of_reading_with_other_values(tmp_path: Path, name: str, value: Any) -> None:
    Reading("events.csv", keep={"kind": ["view"]}, k_core=[5, 5], split="time").save(tmp_path)
    reading = Reading.load(tmp_path)
    assert dataclasses.asdict(reading)["k_core"] == [5, 5]
    content = json.loads((tmp_path / "data.json").read_text())
    content["reading"][name] = value
    (tmp_path / "data.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"data.json: {name} must be .*, got ") as error:
        Reading.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_record_of_reading_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="must be JSON"):
        Reading.load(tmp_path)
    (tmp_path / "data.json").unlink()
    os.mkfifo(tmp_path / "data.json")
    with pytest.raises(CheckpointError, match="must be a regular file"):
        Reading.load(tmp_path)


@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors"])
def test_a_pipe_in_place_of_a_checkpoint(tmp_path: Path, name: str) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(1, {"x": torch.zeros(2)}, {"a": 1})
    (place,) = tmp_path.glob("step-*")
    (place / name).unlink()
    os.mkfifo(place / name)
    with pytest.raises(CheckpointError, match="must be a regular file"):
        folder.load(1)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_no_kernel_takes(tmp_path: Path, dtype: torch.dtype) -> None:
    """They were loaded, and the first use failed."""
    refused_weights(tmp_path, {name: t.to(dtype) for name, t in small_model().state_dict().items()},
                    "must have a dtype out of float32, .*, got torch.float8")  # fmt: skip


def test_weights_of_two_dtypes(tmp_path: Path) -> None:
    """The others were rounded to the item table's."""
    weights = small_model().state_dict()
    weights["item_embedding.weight"] = weights["item_embedding.weight"].half()
    refused_weights(tmp_path, weights, "must have the dtype of item_embedding.weight, torch.float")


def refused_weights(folder: Path, weights: dict[str, torch.Tensor], message: str) -> None:
    small_model().save_pretrained(folder)
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["weights_sha256"] = weights_digest(weights)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        RecGRELA.from_pretrained(folder)


def test_an_id_map_and_a_padding_row_elsewhere() -> None:
    model = RecGRELA(small_model().config.replace(padding_idx=5))
    id_map = IdMap(np.arange(2), np.arange(100, 100 + model.config.num_items))
    with pytest.raises(ValueError, match="model must have padding_idx 0, as an id map has it, got"):
        recommend_for_items(model, id_map, [101])


def test_a_title_does_not_steer_the_terminal() -> None:
    line: Recommended = {"user": None, "rank": 1, "item": 7, "score": 1.0,
                         "title": "\x1b]0;owned\x07two\nlines \u202e\u00e9"}  # fmt: skip
    text = format_recommendations([line])
    assert len(text.splitlines()) == 2
    assert text.endswith("\\x1b]0;owned\\x07two\\nlines \\u202e\u00e9")


@pytest.mark.parametrize("dtype", [torch.uint64, torch.uint32, torch.uint16])
def test_candidates_in_unsigned_integers(dtype: torch.dtype) -> None:
    hidden, table = torch.randn(2, 4), torch.randn(9, 4)
    wanted = ops.topk_scores(hidden, table, 3, 0, candidates=torch.tensor([2, 5, 7]))
    found = ops.topk_scores(hidden, table, 3, 0, candidates=torch.tensor([2, 5, 7]).to(dtype))
    assert torch.equal(found[1], wanted[1])
    with pytest.raises(ValueError, match=r"candidates must lie in 0\.\.8, got 9"):
        ops.topk_scores(hidden, table, 3, 0, candidates=torch.tensor([2, 9]).to(dtype))
