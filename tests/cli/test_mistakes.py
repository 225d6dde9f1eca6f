"""What users get wrong: each answered with one line on stderr, exit code 2 and no traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from recgrela_ext import RecGRELAConfig, TrainConfig
from recgrela_ext._library import KERNEL_DEVICES
from recgrela_ext.cli.mistakes import exit_code
from recgrela_ext.cli.train import _check_memory

from .conftest import SMALL, Recgrela

ROWS = ["1,10,5", "1,11,6", "1,12,7", "1,13,8", "2,10,5", "2,12,6", "2,11,8", "2,14,9"]

BAD_FILES: dict[str, tuple[str | bytes, str]] = {
    "empty file": ("", "empty file"),
    "header only": ("user,item,timestamp\n", "must hold events"),
    "missing column": ("user,timestamp\n1,2\n", "the item column is missing"),
    "no time column": ("user,item\n1,2\n", "the time column is missing"),
    "not UTF-8": (b"user,item,timestamp\n1,caf\xe9,3\n", "must be UTF-8 text, got byte 0xe9"),
    "not UTF-8 in the header": (b"us\xe9r,item,timestamp\n", "must be UTF-8 text"),
    "negative id": ("user,item,timestamp\n1,-4,3\n1,5,4\n", "-4"),
    "gigantic id": ("user,item,timestamp\n1,99999999999999999999,3\n1,5,4\n", "9999"),
    "missing id": ("user,item,timestamp\n1,,3\n1,5,4\n", "line 2"),
    "NaN time": ("user,item,timestamp\n1,4,NaN\n1,5,4\n", "time must not be missing"),
    "text time": ("user,item,timestamp\n1,4,soon\n1,5,4\n", "'soon' in line 2"),
    "users with one item": ("user,item,timestamp\n1,4,3\n2,5,4\n", "a user with two events"),
    "row cut short": ("user,item,timestamp\n1,4,3\n1,5\n", "time must not be missing"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_bad_file(recgrela: Recgrela, tmp_path: Path, what: str) -> None:
    content, told = BAD_FILES[what]
    path = tmp_path / "log.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    answer = recgrela("train", "--data", path, "--out", tmp_path / "m", "--steps", 1)
    assert told in answer.mistake
    assert not (tmp_path / "m" / "model.safetensors").exists()


BAD_OPTIONS: dict[str, tuple[list[str], str]] = {
    "no such file": (["--data", "absent.csv"], "no such file or folder: absent.csv"),
    "a data set with terms": (["--data", "netflix"], "kaggle.com"),
    "unknown format": (["--format", "xml"], "argument --format: invalid choice: 'xml'"),
    "unknown column": (["--user", "who"], "column 'who' is missing"),
    "unknown order": (["--order", "random"], "argument --order: invalid choice: 'random'"),
    "filter leaves nothing": (["--k-core", "50", "50"], "must keep at least one user"),
    "half a condition": (["--keep", "item"], "--keep must read COLUMN=VALUE"),
    "heads that do not divide": (["--num-heads", "3"], "multiple of 2 * num_heads"),
    "dropout of one": (["--dropout", "1"], "dropout must lie in [0, 1)"),
    "no layers": (["--num-layers", "0"], "num_layers must be at least 1"),
    "unknown loss": (["--loss", "hinge"], "loss must be one of softmax, unseen, sampled, bpr"),
    "negative rate": (["--lr", "-1"], "lr must be positive"),
    "rate without a number": (["--lr", "fast"], "argument --lr: must be a number"),
    "no steps": (["--steps", "0"], "argument --steps: must be at least 1"),
    "no such device": (["--device", "abacus"], "--device must be usable, got 'abacus'"),
    "nothing to resume": (["--resume"], "must hold a checkpoint to resume"),
    "threads": (["--threads", "100000000"], "--threads: must be at most 1024, got 100000000"),
    "seed": (["--seed", "99999999999999999999"], "--seed: must be below 2**63"),
    "width": (["--hidden-size", "100000000"], "hidden_size must be at most 65536, got 100000000"),
    "memory": (
        ["--loss", "sampled", "--num-negatives", str(2 * 10**9)],
        "the model must fit in this machine's memory of",
    ),
    "a loss that trains no bias": (
        ["--loss", "sampled", "--repeat-bias"],
        "--repeat-bias must come with the causal model and --loss softmax, got --loss sampled",
    ),
    "a bias of the published model": (["--paper", "--repeat-bias"], "--loss softmax, got --paper"),
    "unknown option": (["--layers", "3"], "unrecognized arguments: --layers 3"),
}


@pytest.mark.parametrize("what", BAD_OPTIONS)
def test_bad_option(recgrela: Recgrela, tmp_path: Path, what: str) -> None:
    options, told = BAD_OPTIONS[what]
    path = tmp_path / "log.csv"
    path.write_text("\n".join(["user,item,timestamp", *ROWS]) + "\n")
    arguments = ["train", "--data", path, "--out", tmp_path / "m", "--steps", 1, *SMALL, *options]
    assert told in recgrela(*arguments).mistake


def test_memory_of_a_long_history() -> None:
    """None with the kernel; where it does not run, that of the distinct items, or of all."""

    def check(num_items: int, longest: int, amp: str | None = None) -> None:
        config = RecGRELAConfig(num_items + 1, max_seq_len=10**7, repeat_bias=True)
        _check_memory(config, TrainConfig(amp=amp), "cpu", longest)

    torch.set_num_threads(2)
    if "cpu" in KERNEL_DEVICES:
        check(10**6, 10**7)
        check(100, 90_000, "bfloat16")
    check(10**6, 1000, "bfloat16")
    with pytest.raises(ValueError, match=r"machine's memory of .* met .--no-repeat-bias spares it"):
        check(10**6, 10**7, "bfloat16")


def test_memory_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    def take() -> None:
        torch.empty(1 << 60)

    assert exit_code(take) == 2
    assert capsys.readouterr().err.startswith("recgrela: not enough memory: ")


def test_output_folder_is_a_file(recgrela: Recgrela, events: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    line = recgrela("train", "--data", events, "--out", tmp_path / "taken").mistake
    assert "taken: File exists" in line


def test_another_run_in_the_folder(recgrela: Recgrela, events: Path, tmp_path: Path) -> None:
    train = ["train", "--data", events, "--out", tmp_path, "--steps", 1, *SMALL]
    assert recgrela(*train).code == 0
    assert "got config lr = 0.001 there and 0.5 here" in recgrela(*train, "--lr", 0.5).mistake


def _truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _other_version(folder: Path) -> None:
    _change(folder / "config.json", version=99)


def _other_record_version(folder: Path) -> None:
    _change(folder / "data.json", version=99)


def _change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def _no_record(folder: Path) -> None:
    (folder / "data.json").unlink()


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _torn_id_map(folder: Path) -> None:
    names = folder / "id_map.json"
    names.write_text(names.read_text()[:100])


def _nothing(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


BAD_FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated weights": (_truncate, "must be a whole safetensors file"),
    "config of another version": (_other_version, "must have version 1, got 99"),
    "record of another version": (_other_record_version, "must have version 1, got 99"),
    "no record": (_no_record, "got no data.json"),
    "no weights": (_no_weights, "model.safetensors must be readable"),
    "torn id map": (_torn_id_map, "must be a JSON id map"),
    "empty folder": (_nothing, "config.json must be readable"),
    "no folder": (_no_folder, "must be a folder that `recgrela train` wrote"),
}


@pytest.mark.parametrize("what", BAD_FOLDERS)
@pytest.mark.parametrize("command", [["evaluate"], ["recommend", "--user", "1"]])
def test_bad_model_folder(
    recgrela: Recgrela, trained: Path, tmp_path: Path, what: str, command: list[str]
) -> None:
    spoil, told = BAD_FOLDERS[what]
    folder = tmp_path / "model"
    shutil.copytree(trained, folder)
    spoil(folder)
    assert told in recgrela(*command, "--model", folder).mistake


def test_truncated_training_checkpoint(recgrela: Recgrela, events: Path, tmp_path: Path) -> None:
    train = ["train", "--data", events, "--out", tmp_path, "--steps", 1, *SMALL]
    assert recgrela(*train).code == 0
    for tensors in (tmp_path / "checkpoints").glob("step-*/tensors.safetensors"):
        tensors.write_bytes(tensors.read_bytes()[:-100])
    assert "must be whole" in recgrela(*train).mistake


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--user", "nobody"], "user must be a known id, got 'nobody'"),
        (["--user", "1", "400"], "user must be a known id, got 400"),
        (["--items", "5,4000"], "item must be a known id, got 4000"),
        (["--items", "5,x"], "item must be a known id"),
        (["--items", ","], "items must hold at least one item"),
        (["--items", "5", "-k", "0"], "argument -k: must be at least 1"),
        ([], "one of the arguments --user --items is required"),
        (["--items", "5", "--user", "1"], "not allowed with argument --items"),
        (["--items", "5", "--data", "x.csv"], "--data must go with --user"),
    ],
)
def test_bad_recommendation(
    recgrela: Recgrela, trained: Path, options: list[str], told: str
) -> None:
    assert told in recgrela("recommend", "--model", trained, *options).mistake


def test_bad_export(recgrela: Recgrela, trained: Path, tmp_path: Path) -> None:
    export = ["export", "--model", trained]
    assert "--out or --item-vectors must be given" in recgrela(*export).mistake
    assert "must end in .pt2" in recgrela(*export, "--out", tmp_path / "model.bin").mistake


def test_no_command(recgrela: Recgrela) -> None:
    assert "required: COMMAND" in recgrela().mistake
    assert "invalid choice: 'trian'" in recgrela("trian").mistake
