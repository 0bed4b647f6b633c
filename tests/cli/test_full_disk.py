"""A disk that is full at any point of what a command writes: exit 7, one line, nothing half left; with room it works."""

from __future__ import annotations

import dataclasses
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from apr.checkpoints.apr2 import write_apr
from apr.checkpoints.apr2_metadata import config_to_metadata, embed_tokenizer
from apr.checkpoints.hf import write_hf
from apr.cli.main import main
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.tokenizer.training import train_tokenizer

COMMANDS = {
    "tokenize train": "tokenize train {place}/corpus --vocab-size 300 -o {out}",
    "tokenize import-hf": "tokenize import-hf {place}/hf -o {out}",
    "import": "import {place}/hf -o {out}/m.apr",
    "export to Hugging Face": "export {place}/m.apr --format hf -o {out}/hf",
    "export to GGUF": "export {place}/m.apr --format gguf -o {out}/m.gguf",
    "trace": "trace {place}/m.apr --tokens 1,2,3 --backward -o {out}/t.safetensors",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, and a random model with a tokenizer as an .apr file and as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "corpus").mkdir()
    for i in range(9):
        (folder / "corpus" / f"{i}.txt").write_text(f"{i} some text to read, and {i * i} more. " * 40)
    tokenizer = train_tokenizer(["def f(x):\n    return x + 1\n"] * 3, 270, folder)
    cfg = dataclasses.replace(PRESETS["llama-tiny"], vocab_size=tokenizer.vocab_size)
    layout = Layout(cfg)
    host = np.zeros(layout.size, np.float32)
    layout.randomise(host, 3)
    meta = config_to_metadata(cfg)
    embed_tokenizer(meta, tokenizer.json, tokenizer.eos_id)
    write_apr(folder / "m.apr", meta, layout.named(host), "float32")
    write_hf(folder / "hf", cfg, layout.named(host), tokenizer_json=tokenizer.json)
    return folder


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch):
    """full(limit, work): do work while no file can grow beyond a size."""

    def do(limit: int, work: Callable[[], int]) -> int:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            return work()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return do


def sizes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk(name: str, place: Path, tmp_path: Path, full, capsys) -> None:
    def args(folder: str) -> list[str]:
        (tmp_path / folder).mkdir(exist_ok=True)
        return COMMANDS[name].format(place=place, out=tmp_path / folder).split()

    assert main(args("sound")) == 0
    sound = sizes(tmp_path / "sound")
    largest = max(sound.values())
    for limit in (0, largest // 2, largest - 1):
        capsys.readouterr()
        assert full(limit, lambda: main(args("full"))) == 7, limit
        err = capsys.readouterr().err
        assert err.count("\n") == 1, err
        assert str(tmp_path / "full") in err
        assert sizes(tmp_path / "full") == {}, limit
    # The folder that the full disk left is no hindrance.
    assert main(args("full")) == 0
    assert sizes(tmp_path / "full") == sound
