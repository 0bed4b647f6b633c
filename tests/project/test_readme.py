"""The README tells the truth: its paths exist, its commands parse, its code runs, its tables are complete."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from apr.cli.main import COMMANDS, MODULES, main
from apr.common.options import given
from apr.model.presets import PRESETS
from apr.training.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
LINES = [line for block in re.findall(r"```\n(.*?)```", README, re.S) for line in block.splitlines()]


def test_paths_and_links_exist():
    table = README.split("## What is where")[1].split("##")[0]
    named = [p for row in re.findall(r"^\|(.+?)\|", table, re.M)[2:] for p in re.findall(r"`(.+?)`", row)]
    assert len(named) > 10
    folder = Path()
    for name in named:
        path = ROOT / name if (ROOT / name).exists() else ROOT / folder / name  # `a/b.py`, `c.py`
        assert path.exists(), name
        folder = path.parent.relative_to(ROOT)
    for link in re.findall(r"\]\(([^)#]+)", README):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("line", [x for x in LINES if x.startswith(".venv/bin/apr")])
def test_commands_parse(line):
    _, command, *args = shlex.split(line)
    module = importlib.import_module(f"apr.cli.{MODULES.get(command, command)}")
    if command == "tokenize":
        flags, args = module.flags_and_main(args[0])[0], args[1:]
    else:
        flags = Settings if command == "pretrain" else module.Flags
        args = ["--output" if a == "-o" else a for a in args]
    assert given(flags, args, command, "")


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = [line.split()[1] for line in LINES if line.startswith("make ")]
    assert set(targets) == {"pretrain", "test"}
    assert re.search(r"^GPU ", makefile, re.M)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M)


def test_every_command_and_preset_is_named():
    for command in COMMANDS:
        assert f"`apr {command}" in README
    shown = re.search(r"Presets: (.+?)\. Each", README, re.S)
    assert shown
    assert set(re.findall(r"`(.+?)`", shown[1])) == set(PRESETS)


def test_the_python_example_runs(capsys):
    code = re.search(r"```python\n(.*?)```", README, re.S)
    exec(compile(code[1], "README", "exec"), {})
    losses = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 3
    assert losses[2] < losses[0]


def test_a_first_trace_as_in_the_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = next(x for x in LINES if " trace " in x)
    assert main(shlex.split(line)[1:]) == 0
    assert "trace.safetensors" in capsys.readouterr().out


def test_the_readme_is_short_and_has_a_line_for_each_room():
    assert len(README.splitlines()) <= 200
    table = README.split("## What is where")[1].split("##")[0]
    for room in (ROOT / "apr").iterdir():
        if room.is_dir() and room.name != "__pycache__":
            assert f"| `apr/{room.name}/` |" in table, room.name


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"@[A-Z_]+@", README)
