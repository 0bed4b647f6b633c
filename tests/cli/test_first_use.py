"""A stranger's first hour: messages that can be followed, placeholders that say what to write, words in their number."""

from __future__ import annotations

import configparser
import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

from apr.cli.main import COMMANDS, MODULES
from apr.common.options import field_types, flag, placeholder
from apr.common.packages import OPTIONAL, pip_install

ROOT = Path(__file__).resolve().parents[2]


# What to install


def test_the_command_that_installs_is_of_this_python():
    words = shlex.split(pip_install("gguf", "torch"))
    assert words[1:] == ["-m", "pip", "install", "gguf" + OPTIONAL["gguf"], "torch"]
    asked = "import sys; print(sys.prefix)"
    found = subprocess.run([words[0], "-c", asked], capture_output=True, text=True, check=True).stdout
    assert found.strip() == sys.prefix


def test_packages_have_the_versions_of_the_extras():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    wanted = {line.replace(" ", "") for text in lines for line in text.splitlines()}
    assert {name + version for name, version in OPTIONAL.items()} <= wanted


def test_nothing_advises_a_package_that_no_index_has():
    """apr is on no index: not `pip install apr`, and of every message the command is made by one function."""
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "apr").rglob("*.py")]
    wrong = [str(p) for p in texts if re.search(r"pip install '?apr\b", p.read_text())]
    assert not wrong
    home = ROOT / "apr" / "common" / "packages.py"
    spelt = [p for p in (ROOT / "apr").rglob("*.py") if "pip install" in p.read_text() and p != home]
    assert not spelt, f"use {home.name}: {spelt}"


# Placeholders

# Last words of names that say what to write; of any other name the option gives a metavar.
SAY = {
    "BATCHES", "BYTES", "DEVICE", "FRACTION", "IDS", "LOSS", "MODEL", "PREFIX", "RANK", "REVISION", "ROWS", "SEED", "SIDES",
    "SIZE", "STATES", "STEPS", "TEMPERATURE", "THREADS", "TOKEN", "TOKENS", "ALPHA", "PATH",
}  # fmt: skip


def flags() -> dict[str, type]:
    """The options of every command, by name."""
    out = {}
    for name in COMMANDS:
        module = importlib.import_module(f"apr.cli.{MODULES.get(name, name)}")
        if hasattr(module, "flags_and_main"):
            out |= {f"{name} {sub}": module.flags_and_main(sub)[0] for sub in module.COMMANDS}
        else:
            out[name] = module.Flags
    return out


def test_placeholders_say_what_to_write():
    wrong = []
    for command, cls in flags().items():
        kinds = field_types(cls)
        for f in dataclasses.fields(cls):
            meta = f.metadata
            if kinds[f.name] is bool or meta["choices"] or meta["positional"] or meta["metavar"]:
                continue
            if placeholder(f) not in SAY:
                wrong.append(f"{command} {flag(f.name)} {placeholder(f)}")
    assert not wrong


def test_options_of_one_name_have_one_placeholder():
    """Of several commands; a path may be a file here and a folder there."""
    seen: dict[str, set[str]] = {}
    for cls in flags().values():
        for f in dataclasses.fields(cls):
            if not f.metadata["positional"] and not f.metadata["path"]:
                seen.setdefault(f.name, set()).add(placeholder(f))
    assert {n: s for n, s in seen.items() if len(s) > 1} == {
        "batch_size": {"SEQUENCES", "PROMPTS", "WINDOWS"}
    }
