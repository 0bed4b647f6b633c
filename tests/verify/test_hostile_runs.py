"""Run folders of strangers: what stands in the place of files, damaged records, entries of every type of JSON.

`apr verify`, `apr report` and `apr pretrain --resume` say one clear thing, and neither wait nor end in a traceback."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from apr.cli.main import main
from apr.common.errors import MalformedFile
from apr.evidence.seal import compare, hashes, seal
from apr.training.rundir import RunDir
from run_cases import cache, place, pretrain  # noqa: F401

FILES = [
    "config.json",
    "verdict.json",
    "evidence.json",
    "metrics.jsonl",
    "samples.jsonl",
    "ckpt/epoch-001.metadata.json",
]
SPECIALS: dict[str, Callable[[Path], Any]] = {
    "pipe": os.mkfifo,
    "device": lambda p: p.symlink_to("/dev/zero"),
    "circle": lambda p: p.symlink_to(p.name),
    "dangling": lambda p: p.symlink_to("gone"),
    "folder": lambda p: p.mkdir(),
}
BYTES = {
    "cut": b"{",
    "not UTF-8": b"\xff\xfe\xfd",
    "deep": b"[" * 100_000,
    "deep objects": b'{"step":' * 100_000,
    "empty": b"",
    "null": b"null",
    "a number": b"1e5\n",
    "a list": b"[{}]\n",
    "an object": b"{}\n",
    "zeros": b"\0" * 1000,
}
VALUES = [None, True, 0, -1, 10**9, 10**400, 0.5, 1e308, "", "x", "\x1b[2J[bold]", [], [None], {}, {"a": 1}]
COMMANDS = ("verify", "report", "resume")


@pytest.fixture(scope="module")
def true_run(place, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as m:
        m.setenv("APR_CACHE", str(place / "cache"))
        path = tmp_path_factory.mktemp("true") / "run"
        assert pretrain(place, path, "--sample", "import") == 0
    return Path(path)


@pytest.fixture
def run(true_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(true_run, tmp_path / "run"))


def command(name: str, run: Path) -> int:
    """The exit code of a command on a run."""
    if name == "resume":
        return main(["pretrain", "--resume", "--run-dir", str(run), "--json"])
    if name == "report":
        return main(["report", str(run), "-o", str(run.parent / "page.html")])
    return main(["verify", str(run), "--backend", "none"])


@pytest.mark.parametrize("kind", SPECIALS)
@pytest.mark.parametrize("name", [*FILES, "ckpt/epoch-001.apr", "ckpt/state/step-000006.apr", "x"])
def test_what_is_no_file_is_named_and_not_waited_for(run: Path, kind: str, name: str, capsys) -> None:
    path = run / name
    path.unlink(missing_ok=True)
    SPECIALS[kind](path)
    assert command("report", run) in (0, 3, 4)
    code = command("verify", run)
    said = "".join(capsys.readouterr())
    if name != "x":
        assert code in (2, 3, 4, 9), said
    elif kind != "folder":
        assert "x is no regular file" in said
        assert code == 9


@pytest.mark.parametrize("kind", SPECIALS)
def test_a_run_that_goes_on_beside_it_ends(run: Path, kind: str, capsys) -> None:
    SPECIALS[kind](run / "ckpt/x")
    assert command("resume", run) == 0
    assert kind == "folder" or compare(run) == ["ckpt/x is no regular file"]


def test_what_has_no_name_that_can_be_written_is_no_part_of_the_evidence(run: Path) -> None:
    for name in (b"\xff", b"a\nb", b"\x1b[2J"):
        Path(os.fsdecode(os.path.join(os.fsencode(run), name))).touch()
    assert len(compare(run)) == 3
    seal(run)
    assert all("cannot be written down" in line for line in compare(run))
    assert hashes(run)


@pytest.mark.parametrize("kind", BYTES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_record_is_named(run: Path, name: str, kind: str, capsys) -> None:
    (run / name).write_bytes(BYTES[kind])
    seal(run) if name != "evidence.json" else None
    code = command("verify", run)
    said = "".join(capsys.readouterr())
    assert code in (2, 3, 4, 9) or (code == 0 and name == "samples.jsonl"), said
    if name == "verdict.json":
        assert code == 4
        assert "verdict.json" in said
    assert command("report", run) in (0, 3, 4)


def places(value: Any, trail: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to every entry of a JSON value; of a list, its first."""
    if trail:
        yield trail
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*trail, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*trail, 0))


def changed(value: Any, trail: tuple[Any, ...], new: Any) -> Any:
    box = value
    for key in trail[:-1]:
        box = box[key]
    if new is KeyError:
        del box[trail[-1]]
    else:
        box[trail[-1]] = new
    return value


def variants(true_run: Path, name: str) -> Iterator[tuple[tuple[Any, ...], Any, str]]:
    """(entry, its new value, the text of the file) for every entry of a record and every type."""
    text = (true_run / name).read_text()
    for i, line in enumerate(text.splitlines() if name.endswith("l") else [text]):
        for trail in places(json.loads(line)):
            for new in (*VALUES, KeyError):
                other = json.dumps(changed(json.loads(line), trail, new)) + "\n"
                yield (i, *trail), new, text.replace(line, other, 1) if name.endswith("l") else other


@pytest.mark.parametrize("name", [n for n in FILES if n != "samples.jsonl"])
def test_entries_of_any_type(run: Path, true_run: Path, name: str, capsys) -> None:
    """A few of all; tools/fuzz.py reads the others."""
    some = random.Random(name).sample(list(variants(true_run, name)), 5)
    for i, (trail, new, text) in enumerate(some):
        for what in COMMANDS[: 3 if i == 0 else 2]:
            (run / name).write_text(text)
            if name != "evidence.json":
                seal(run)
            code = command(what, run)
            said = "".join(capsys.readouterr())
            assert code != 1, (what, trail, new, said)
            assert "\x1b[2J" not in said, (what, trail, new)
        shutil.rmtree(run)
        shutil.copytree(true_run, run)


@pytest.mark.parametrize(
    "facts",
    [
        '"x"',
        "[]",
        "{}",
        '{"epoch": 1, "step": 4, "val_loss": "5"}',
        '{"epoch": true, "step": 4, "val_loss": 5}',
    ],
)
def test_damaged_metadata_of_a_run_that_goes_on_is_named(tmp_path: Path, facts: str) -> None:
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt/epoch-001.metadata.json").write_text(facts)
    with pytest.raises(MalformedFile, match=r"epoch-001\.metadata\.json: .*restore the file"):
        RunDir(tmp_path).epochs()


@pytest.mark.parametrize(
    "call",
    [
        ["report", "r", "-o", "circle"],
        ["tokenize", "encode-corpus", "circle", "--tokenizer", "t", "-o", "o"],
        ["tokenize", "encode-corpus", "t", "--tokenizer", "t", "-o", "circle"],
        ["pretrain", "--mix", "corpus=circle weight=1; corpus=t weight=1", "--model", "llama-demo"],
    ],
)
def test_a_link_in_a_circle_is_named(
    call: list[str], true_run: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(true_run, "r")
    Path("circle").symlink_to("circle")
    Path("t").mkdir()
    assert main(call) not in (0, 1)
    assert capsys.readouterr().err.startswith(f"apr {call[0]}: ")
