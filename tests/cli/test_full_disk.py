"""A disk that is full at any point of what a command writes: exit 7, one line, nothing half left; with room it works."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from apr.cli.main import main
from small_checkpoint import write_checkpoint

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
    return write_checkpoint(folder)


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
