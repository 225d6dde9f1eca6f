"""Each command once from end to end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from recgrela_ext import Interactions, RecGRELA, build_info
from recgrela_ext._library import KERNEL_DEVICES

from .conftest import SMALL, Recgrela

COMMANDS = ("info", "train", "evaluate", "recommend", "export")
SCHEMA = {
    "model", "variant", "data", "order", "split", "target_sha256", "seeds", "per_seed", "mean",
    "seconds", "machine",
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_help(recgrela: Recgrela, command: str) -> None:
    answer = recgrela(command, "--help")
    assert answer.code == 0
    assert answer.err == ""
    assert f"usage: recgrela {command}" in answer.out
    assert command == "info" or f"  recgrela {command} --" in answer.out, "no example"


def test_help_of_all(recgrela: Recgrela) -> None:
    answer = recgrela("--help")
    assert answer.code == 0
    assert all(command in answer.out for command in COMMANDS)


def test_info(recgrela: Recgrela, tmp_path: Path) -> None:
    answer = recgrela("info", "--json", tmp_path / "info.json")
    assert answer.code == 0
    assert torch.__version__ in answer.out
    assert ("compiled operators are absent" in answer.out) == (not KERNEL_DEVICES)
    facts = json.loads((tmp_path / "info.json").read_text())
    assert facts.items() >= build_info().items()


def test_train_writes_a_model_and_how_the_data_was_read(
    recgrela: Recgrela, events: Path, tmp_path: Path
) -> None:
    train = ["train", "--data", events, "--out", tmp_path / "m", "--json", tmp_path / "v.json"]
    filters = ["--k-core", 5, 2, "--order", "item_id"]
    answer = recgrela(*train, "--steps", 2, *filters, *SMALL)
    assert answer.code == 0, answer.err
    assert all(name in answer.out for name in ("RecGRELA", "Popularity", "Markov"))
    result = json.loads((tmp_path / "v.json").read_text())
    assert result.keys() >= SCHEMA
    assert (result["split"], result["order"], result["seeds"]) == ("valid", "item_id", [0])
    assert result["mean"]["ndcg@10"] == result["mean"]["seen_included/ndcg@10"]
    assert result["training"]["steps"] == 2
    _, valid, test = (
        Interactions.from_file(events, order="item_id").filter(k_core=(5, 2)).leave_one_out()
    )
    reading = json.loads((tmp_path / "m" / "data.json").read_text())["reading"]
    assert reading["target_sha256"] == {"valid": valid.target_sha256, "test": test.target_sha256}
    model = RecGRELA.from_pretrained(tmp_path / "m")
    assert model.id_map is not None
    assert np.array_equal(model.id_map.item_ids, test.id_map.item_ids)
    repeated = recgrela("evaluate", "--model", tmp_path / "m", "--split", "valid")
    assert repeated.code == 0, repeated.err


def test_the_same_command_goes_on(recgrela: Recgrela, events: Path, tmp_path: Path) -> None:
    def train(folder: str, steps: int, *more: str) -> str:
        out = tmp_path / folder
        answer = recgrela("train", "--data", events, "--out", out, "--steps", steps, *SMALL, *more)
        assert answer.code == 0, answer.err
        return (out / "model.safetensors").read_bytes().hex()

    train("parts", 2)
    assert train("parts", 4, "--resume") == train("whole", 4)


def test_time_split_and_time_limit(recgrela: Recgrela, events: Path, tmp_path: Path) -> None:
    train = ["train", "--data", events, "--out", tmp_path, "--minutes", 0.001, *SMALL]
    answer = recgrela(*train, "--split", "time", "--time-targets", "last")
    assert answer.code == 0, answer.err
    assert recgrela("evaluate", "--model", tmp_path).code == 0


def test_paper(recgrela: Recgrela, events: Path, tmp_path: Path) -> None:
    train = ["train", "--data", events, "--out", tmp_path, "--paper", "--steps", 1, *SMALL]
    assert recgrela(*train).code == 0
    assert RecGRELA.from_pretrained(tmp_path).config.variant == "published"
    exported = recgrela("export", "--model", tmp_path, "--out", tmp_path / "m.pt2")
    assert exported.code == 0, exported.err


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ([], True),
        (["--no-repeat-bias"], False),
        (["--loss", "sampled"], False),
        (["--paper"], False),
        (["--paper", "--no-repeat-bias"], False),
    ],
)
def test_repeat_bias_where_it_can_be_trained(
    recgrela: Recgrela, events: Path, tmp_path: Path, options: list[str], wanted: bool
) -> None:
    train = ["train", "--data", events, "--out", tmp_path, "--steps", 1, *SMALL, *options]
    answer = recgrela(*train)
    assert answer.code == 0, answer.err
    assert RecGRELA.from_pretrained(tmp_path).config.repeat_bias is wanted


def test_evaluate(recgrela: Recgrela, trained: Path, tmp_path: Path) -> None:
    answer = recgrela("evaluate", "--model", trained, "--json", tmp_path / "t.json", "-k", 1, 20)
    assert answer.code == 0, answer.err
    assert "Markov" in answer.out
    result = json.loads((tmp_path / "t.json").read_text())
    assert result.keys() >= SCHEMA
    assert {"seen_excluded/mrr@1", "hit@20"} <= result["mean"].keys()
    assert result["split"] == "test"


def test_evaluate_refuses_other_targets(
    recgrela: Recgrela, trained: Path, events: Path, tmp_path: Path
) -> None:
    lines = events.read_text().splitlines()
    other = tmp_path / "other.inter"
    user, item, stamp = lines[-1].split("\t")
    other_item = "7" if item != "7" else "8"
    other.write_text("\n".join([*lines, f"{user}\t{other_item}\t{int(stamp) + 9}"]) + "\n")
    line = recgrela("evaluate", "--model", trained, "--data", other).mistake
    assert "must have the recorded sha256" in line


def test_recommend_for_users(
    recgrela: Recgrela, trained: Path, events: Path, tmp_path: Path
) -> None:
    file = tmp_path / "lists.json"
    answer = recgrela("recommend", "--model", trained, "--user", 3, 4, "-k", 5, "--json", file)
    assert answer.code == 0, answer.err
    assert "user 3" in answer.out
    lists = json.loads(file.read_text())
    assert [line["user"] for line in lists] == [3] * 5 + [4] * 5
    assert lists[0]["title"] in answer.out
    assert lists[0]["title"] != str(lists[0]["item"])
    log = Interactions.from_file(events)
    history = log.sequences().history(2)
    model = RecGRELA.from_pretrained(trained)
    assert model.id_map is not None
    rows = torch.from_numpy(model.id_map.encode_items(log.item_ids[history - 1]))[None, -16:]
    top = model.recommend(rows, k=5)
    assert [line["score"] for line in lists[:5]] == pytest.approx(top.scores[0].tolist(), abs=1e-5)


def test_recommend_reads_new_users_and_leaves_out_new_items(
    recgrela: Recgrela, trained: Path, tmp_path: Path
) -> None:
    header = "user_id:token\titem_id:token\ttimestamp:float\n"
    new = tmp_path / "new.inter"
    new.write_text(f"{header}new\t5\t1\nnew\t6\t2\nnew\tnot-there\t3\nlost\tnot-there\t4\n")
    from_log = recgrela("recommend", "--model", trained, "--data", new, "--user", "new")
    from_items = recgrela("recommend", "--model", trained, "--items", "5, 6")
    assert (from_log.code, from_items.code) == (0, 0), from_log.err
    assert from_log.out.splitlines()[1:] == from_items.out.splitlines()[1:]
    line = recgrela("recommend", "--model", trained, "--data", new, "--user", "lost").mistake
    assert "user 'lost' must have an item the model knows" in line


def test_recommend_with_seen_items(recgrela: Recgrela, trained: Path) -> None:
    everything = ["recommend", "--model", trained, "--items", "5,6,7", "-k", 120]
    shown = recgrela(*everything, "--include-seen").out.splitlines()
    catalogue = RecGRELA.from_pretrained(trained).config.num_items
    assert len(shown) == 1 + catalogue


@pytest.mark.kernels
def test_export(recgrela: Recgrela, trained: Path, tmp_path: Path) -> None:
    program, vectors = tmp_path / "m.pt2", tmp_path / "items.npy"
    answer = recgrela("export", "--model", trained, "--out", program, "--item-vectors", vectors)
    assert answer.code == 0, answer.err
    assert "import recgrela_ext.ops" in answer.out
    model = RecGRELA.from_pretrained(trained)
    assert model.id_map is not None
    table = np.load(vectors)
    assert np.array_equal(table, model.item_embedding.weight[1:].detach().numpy())
    assert json.loads((tmp_path / "items.json").read_text())["item_ids"] == (
        model.id_map.item_ids.tolist()
    )
    script = f"""
import torch, recgrela_ext.ops
run = torch.export.load({str(program)!r}).module()
torch.save(run(torch.tensor([[3, 4, 5, 0], [6, 7, 8, 9]]), torch.tensor([3, 4])), "hidden.pt")
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, env=_environment())
    hidden = torch.load(tmp_path / "hidden.pt")
    wanted = model(torch.tensor([[3, 4, 5, 0], [6, 7, 8, 9]]), torch.tensor([3, 4]))
    torch.testing.assert_close(hidden, wanted.detach(), rtol=0, atol=1e-6)


def test_ctrl_c_names_the_checkpoint(events: Path, tmp_path: Path) -> None:
    out = tmp_path / "m"
    command = [sys.executable, "-m", "recgrela_ext", "train", "--data", str(events)]
    limits = ["--out", str(out), "--steps", "1000000", "--patience", "0", *SMALL]
    run = subprocess.Popen(
        [*command, *limits], stderr=subprocess.PIPE, text=True, env=_environment()
    )
    log = out / "checkpoints" / "log.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=30)
    assert run.returncode == 130, err
    lines = [line for line in err.splitlines() if "note:" not in line]
    assert len(lines) == 1
    assert f"is in {out / 'checkpoints'}, the same command goes on" in lines[0]


def test_a_moved_model_needs_no_original_data(
    recgrela: Recgrela, trained: Path, events: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved, ignore=shutil.ignore_patterns("checkpoints"))
    copy = tmp_path / "copy.inter"
    shutil.copy(events, copy)
    assert recgrela("evaluate", "--model", moved, "--data", copy).code == 0


def _environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
