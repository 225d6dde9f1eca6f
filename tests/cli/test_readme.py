"""What the README shows works, and its results section is what the committed files say."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import quality_tables, readme, stack_tables
from benchmarks.__main__ import main
from recgrela_ext.cli.parser import build_parser
from recgrela_ext.data.synthetic import make_synthetic

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_eight_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pandas = pytest.importorskip("pandas", reason="the README reads a CSV file with pandas")
    code = re.findall(r"```python\n(.*?)```", README, re.S)[0]
    imports, lines = code.split("\n\n")
    assert len(lines.splitlines()) == 8
    log, _ = make_synthetic(60, 120, mean_length=8)
    columns = {"user": log.user_ids[log.user], "item": log.item_ids[log.item]}
    monkeypatch.chdir(tmp_path)
    pandas.DataFrame({**columns, "timestamp": log.time}).to_csv("plays.csv", index=False)
    assert "minutes=30" in lines
    exec(imports + "\n" + lines.replace("minutes=30", "steps=1"), {})
    assert "user 42" in capsys.readouterr().out
    assert (tmp_path / "my-model" / "model.safetensors").exists()


def test_commands_are_understood() -> None:
    joined = re.sub(r"\\\n +", "", README)  # lines that end in a backslash go on
    commands = re.findall(r"^ {4}recgrela (.+)$", joined, re.M)
    assert len(commands) > 4
    for command in commands:
        build_parser().parse_args(command.split())


def test_adapters_that_are_shown_exist() -> None:
    shown = []
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and "integrations" in str(node.module):
                path = ROOT / (str(node.module).replace(".", "/") + ".py")
                body = ast.parse(path.read_text(encoding="utf-8")).body
                defined = {getattr(one, "name", None) for one in body}
                defined |= {one.target.id for one in body if isinstance(one, ast.AnnAssign)}
                shown += [name.name for name in node.names]
                assert defined >= {name.name for name in node.names}, node.module
    assert len(shown) > 10


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_results_are_up_to_date() -> None:
    assert main(["readme", "--check"]) == 0


def test_tables(tmp_path: Path) -> None:
    metrics = dict.fromkeys(quality_tables.COLUMNS, 0.25)
    result: dict[str, Any] = {
        "model": "RecGRELA", "variant": "causal", "data": "tiny", "order": "file", "split": "test",
        "target_sha256": "ab" * 32, "seeds": [0, 1], "per_seed": [], "mean": metrics, "seconds": 1,
        "targets": 1234, "baselines": {"Markov": {"seen_included/ndcg@10": 0.125}},
        "machine": {"threads": 2, "processor": "abacus", "torch": "2.13"},
    }  # fmt: skip
    (tmp_path / "tiny.json").write_text(json.dumps(result))
    (tmp_path / "speed.json").write_text(json.dumps({"kernel": "rela"}))
    page = tmp_path / "README.md"
    marked = "".join("{}\nold\n{}\n".format(*readme.markers(name)) for name in readme.SECTIONS)
    page.write_text(f"before\n{marked}after\n")
    arguments = ["readme", "--results", str(tmp_path), "--readme", str(page)]
    assert main([*arguments, "--check"]) == 1
    assert main(arguments) == 0
    assert main([*arguments, "--check"]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "**tiny**, order `file`, test: 1,234 targets, sha256 `abababababab`" in text
    assert "| [RecGRELA, causal](benchmarks/results/tiny.json) | 2 | 0.2500 | 0.2500 |" in text
    assert "| Markov |  |  | 0.1250 |" in text
    assert "2 threads of abacus, torch 2.13" in text
    assert text.count("Not measured yet.") == 3
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="must hold the lines"):
        main(arguments)


def test_stack_table(tmp_path: Path) -> None:
    assert stack_tables.load_results(tmp_path) == []
    unfinished: dict[str, Any] = {"comparison": "recbole", "runs": []}
    (tmp_path / "stacks-recbole.json").write_text(json.dumps(unfinished))
    assert stack_tables.load_results(tmp_path) == []
    test = {"seen_included/hit@10": 0.5, "seen_included/ndcg@10": 0.25,
            "seen_excluded/hit@10": 0.75, "seen_excluded/ndcg@10": 0.125}  # fmt: skip
    best = {"lr": 0.003, "seeds": [0, 1, 2], "test": test}
    result: dict[str, Any] = {
        "comparison": "replay", "data": "tiny", "target_sha256": "ab" * 32, "runs": [],
        "settings": {"epochs": 20, "max_len": 9, "batch_size": 32, "width": 64, "layers": 2,
                     "dropout": 0.2},
        "versions": {"torch": "2.13", "replay-rec": "0.22"},
        "machine": {"threads": 1, "processor": "abacus"}, "best": {"RecGRELA": best},
        "seconds_per_epoch": {"RecGRELA": 12.34, "clock": "process_time"},
    }  # fmt: skip
    (tmp_path / "stacks-replay.json").write_text(json.dumps(result))
    text = stack_tables.section(stack_tables.load_results(tmp_path))
    assert "RePlay](benchmarks/results/stacks-replay.json), RecGRELA | 0.003 | 0.5000 |" in text
    assert "| 0.2500 | 0.7500 | 0.1250 | 12.3 |" in text
    assert "20 epochs, the last 9 items" in text
    assert "mean of 3 seeds; 1 thread(s) of abacus, torch 2.13, replay-rec 0.22" in text
