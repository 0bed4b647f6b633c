"""Names out of files of strangers, and names of files: no command lets them move the cursor, set a title or take colours,
and none swallows what looks like markup."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tokenizer_cases
from apr.api import Printed
from apr.checkpoints.apr2 import read_apr, write_apr
from apr.checkpoints.apr2_metadata import config_to_metadata, embed_tokenizer
from apr.checkpoints.hf import write_hf, write_safetensors
from apr.cli.main import COMMANDS, main
from apr.cli.show import Show
from apr.cli.tables import cell, print_findings
from apr.common.finding import FAIL, PASS, Finding
from apr.common.printable import json_line, printable
from apr.model.params import Layout
from apr.model.presets import PRESETS

# A title of the window, the clipboard, a colour, C1's CSI, a turn of the direction, markup of rich that does not close.
EVIL = "\x1b]0;pwn\x07\x1b]52;c;YQ==\x07\x1b[31m\x9b2J\u202e[bold red]x[/nope][link=a]"
SPELT = r"\x1b]0;pwn\x07\x1b]52;c;YQ==\x07\x1b[31m\x9b2J\u202e[bold red]x[/nope][link=a]"
RAW = ("\x1b", "\x07", "\x9b", "\u202e")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, corpora, questions and records whose every name is EVIL, in a folder whose name is too."""
    folder = tmp_path_factory.mktemp("names") / EVIL.replace("/", "|")
    folder.mkdir()
    tokenizer = tokenizer_cases.gpt2_like()
    tokenizer["added_tokens"].append(
        {
            **tokenizer["added_tokens"][0],
            "id": max(t["id"] for t in tokenizer["added_tokens"]) + 1,
            "content": EVIL,
        }
    )
    text = json.dumps(tokenizer)
    cfg = dataclasses.replace(PRESETS["llama-tiny"], vocab_size=300)
    layout = Layout(cfg)
    host = np.zeros(layout.size, np.float32)
    layout.randomise(host, 3)
    meta: dict[str, Any] = {**config_to_metadata(cfg), EVIL: EVIL, "license": EVIL}
    embed_tokenizer(meta, text, 258)
    write_apr(folder / "m.apr", meta, layout.named(host), "float32")
    write_apr(folder / "more.apr", meta, {**layout.named(host), EVIL[:40]: np.ones(1, np.float32)}, "float32")
    write_hf(folder / "hf", cfg, layout.named(host), tokenizer_json=text)
    shutil.copytree(folder / "hf", folder / "odd")
    config = json.loads((folder / "odd/config.json").read_text())
    (folder / "odd/config.json").write_text(json.dumps({**config, EVIL: EVIL}))
    write_safetensors(folder / "a.safetensors", {EVIL: np.ones(2, np.float32)}, metadata={EVIL: EVIL})
    write_safetensors(folder / "b.safetensors", {EVIL: np.zeros(2, np.float32)}, metadata={EVIL: "b"})
    (folder / "corpus").mkdir()
    for i in range(9):
        (folder / "corpus" / f"{EVIL.replace('/', '|')}{i}.txt").write_text("def f(x): return x\n" * 50)
    (folder / "corpus" / os.fsdecode(b"\xff.txt")).write_text("text of a name that is not UTF-8\n" * 9)
    (folder / "corpus" / "bad\x1b[2J.jsonl").write_text(json.dumps({EVIL: EVIL}) + "\n")
    (folder / "q.jsonl").write_text(json.dumps({EVIL: EVIL}) + "\n")
    (folder / "t.jinja").write_text("{{ raise_exception(" + json.dumps(EVIL) + ") }}")
    (folder / "s.json").write_text(json.dumps({EVIL: EVIL}))
    run = folder / "run"
    (run / "ckpt").mkdir(parents=True)
    (run / "config.json").write_text(
        json.dumps({"settings": {}, "model": {}, "data": {}, "data_folders": {}, "device": {EVIL: EVIL}})
    )
    (run / "verdict.json").write_text(
        json.dumps(
            {
                "format": "apr-verdict-1",
                "status": EVIL,
                "verdict": EVIL,
                "steps": 0,
                "val_loss": None,
                "gates": [],
            }
        )
    )
    (run / "metrics.jsonl").write_text("")
    (run / "evidence.json").write_text(json.dumps({"format": "apr-evidence-1", "files": {EVIL: EVIL}}))
    (run / EVIL.replace("/", "|")).write_text("")
    return folder


CALLS: list[tuple[str, ...]] = [
    ("inspect", "a.safetensors", "--tensors"),
    ("inspect", "m.apr", "--tensors"),
    ("inspect", "more.apr"),
    ("inspect", "odd"),
    ("validate", "a.safetensors"),
    ("validate", "m.apr"),
    ("validate", "more.apr"),
    ("validate", "odd"),
    ("diff", "a.safetensors", "b.safetensors"),
    ("diff", "m.apr", "more.apr"),
    ("import", "odd", "-o", "out.apr"),
    ("import", "hf", "-o", "new.apr"),
    ("export", "m.apr", "--format=hf", "-o", "exported"),
    ("export", "more.apr", "--format", "gguf", "-o", "x.gguf"),
    ("merge", "m.apr", "run", "-o", "merged.apr"),
    ("eval", "m.apr", "--choices", "q.jsonl"),
    ("eval", "m.apr", "--humaneval", "q.jsonl"),
    ("eval", "m.apr", "--text", "corpus/bad\x1b[2J.jsonl"),
    ("run", "m.apr", "x", "--chat", "--chat-template", "t.jinja", "--max-tokens", "1"),
    ("run", "odd", "x"),
    ("plan", "--init", "m.apr", "--seq-length", "16", "--batch-size", "2"),
    ("plan", "--model", EVIL),
    ("verify", "run"),
    ("verify", EVIL),
    ("report", "run"),
    ("pretrain", "--resume", "--run-dir", "run"),
    ("pretrain", "--config", "s.json"),
    ("pretrain", "--corpus", "corpus", "--model", EVIL),
    ("tokenize", "audit", "corpus"),
    ("tokenize", "train", "corpus", "--vocab-size", "300", "-o", "tok"),
    ("tokenize", "encode-corpus", "corpus", "--tokenizer", "hf", "-o", "shards", "--val-fraction", "0.3"),
    (
        *("pretrain", "--corpus", "corpus", "--init", "m.apr", "--num-steps", "1", "--batch-size", "1"),
        *(
            "--seq-length",
            "8",
            "--val-fraction",
            "0.3",
            "--val-batches",
            "1",
            "--spot-check",
            "-1",
            "--run-dir",
            "fresh",
        ),
    ),
    ("tokenize", "import-hf", "odd", "-o", "imported"),
    ("tokenize", "repair-manifest", "corpus"),
    ("trace", "odd", "--tokens", "1,2", "-o", "trace.safetensors"),
    ("trace", "m.apr", "--tokens", "1,2", "-o", "trace.safetensors"),
    ("bisect", "odd"),
    ("bisect", "m.apr", "--text", "q.jsonl", "--batch-size", "1", "--seq-length", "4"),
    ("qa", "odd"),
    ("completion", EVIL),
    ("sweep", EVIL),
    ("sweep", "a.safetensors"),
    (EVIL,),
    ("inspect", "--" + EVIL),
]


def test_every_command_is_called() -> None:
    assert {call[0] for call in CALLS} >= set(COMMANDS)


@pytest.mark.parametrize("call", CALLS, ids=lambda c: " ".join(c)[:30].encode("ascii", "replace").decode())
@pytest.mark.parametrize("as_json", [False, True], ids=["", "json"])
def test_no_name_is_obeyed(
    place: Path, call: tuple[str, ...], as_json: bool, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In a folder of its own, whose name is hostile too."""
    here = tmp_path / place.name
    shutil.copytree(place, here, symlinks=True)
    args = [str(here / a) if (i and (here / a).exists()) or a in OUTPUTS else a for i, a in enumerate(call)]
    args = [str(here / a) if a in OUTPUTS else a for a in args]
    code = main([*args, "--json"] if as_json and call[0] in COMMANDS else args)
    out, err = capsys.readouterr()
    assert code != 1
    assert not [c for c in RAW if c in out + err], (code, out, err)
    if as_json and code in (0, 9):
        json.loads(out)


OUTPUTS = {
    "out.apr",
    "merged.apr",
    "fresh",
    "new.apr",
    "exported",
    "x.gguf",
    "tok",
    "shards",
    "imported",
    "trace.safetensors",
}


@pytest.mark.parametrize(
    "call",
    [
        ("inspect", "a.safetensors", "--tensors"),
        ("diff", "a.safetensors", "b.safetensors", "--top", "0"),
        ("validate", "more.apr"),
        ("inspect", "m.apr"),
    ],
)
def test_nothing_is_swallowed(place: Path, call: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    main([call[0], *(str(place / a) if (place / a).exists() else a for a in call[1:])])
    shown = "".join(capsys.readouterr().out.split())
    assert "".join(SPELT.replace("/", "|").split()) in shown
    assert "[boldred]" in shown


def test_displays_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    show = Show()
    show.note(EVIL)
    show.table(EVIL, [(EVIL, EVIL)])
    show.preparing(EVIL, 1, 2)
    show.stop()
    bad = Finding(EVIL, FAIL, EVIL, EVIL, EVIL, remedy=EVIL)
    print_findings(show.console, [bad, Finding(EVIL, PASS, EVIL)], title=EVIL, bounds=True)
    print_findings(show.console, [bad])
    Printed().note(EVIL)
    out = capsys.readouterr().out
    assert not [c for c in RAW if c in out]
    assert "".join(out.split()).count("".join(SPELT.split())) >= 7


def test_paths_whose_bytes_are_no_utf8(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    shutil.copytree(place, odd)
    for call in (*CALLS[:11], ("verify", "run"), ("report", "run"), ("tokenize", "audit", "corpus")):
        assert (
            main([call[0], *(str(odd / a) if (odd / a).exists() or a in OUTPUTS else a for a in call[1:])])
            != 1
        ), call
        out, err = capsys.readouterr()
        (out + err).encode()
    corpus = str(place / "corpus")
    for more in (["--corpus", corpus, "--run-dir", str(odd / "r")], ["--corpus", str(odd / "corpus")]):
        assert main(["pretrain", "--model", "qwen2-tiny", *more]) == 7
        assert r"\xff\xfe" in capsys.readouterr().err


def test_a_working_folder_whose_name_is_no_utf8(tmp_path: Path) -> None:
    here = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(here)
    root = str(Path(__file__).resolve().parents[2])
    command = [
        sys.executable,
        "-m",
        "apr.cli.main",
        "pretrain",
        "--corpus",
        root + "/apr/common",
        "--model",
        "qwen2-tiny",
        "--run-dir",
        "r",
    ]
    done = subprocess.run(
        command, cwd=here, env={**os.environ, "PYTHONPATH": root}, capture_output=True, check=False
    )
    assert done.returncode == 7, done.stderr
    assert rb"\xff: its name is not UTF-8" in done.stderr


def test_one_function_spells() -> None:
    assert printable(EVIL) == SPELT
    assert printable("a\tb\nc \u00e9 \u4e2d \U0001f600") == "a\tb\nc \u00e9 \u4e2d \U0001f600"
    assert printable("a\tb\nc", "") == r"a\tb\nc"
    assert printable(os.fsdecode(b"\xff\x80a")) == r"\xff\x80a"
    assert cell("[b]\n\x1b").plain == r"[b]\n\x1b"
    line = json_line({"a": EVIL + "\u00e9\n\U000e0001"})
    assert line.isprintable()
    assert "\u00e9" in line
    assert json.loads(line) == {"a": EVIL + "\u00e9\n\U000e0001"}


@pytest.mark.parametrize("value", [None, True, 1, -1, 1e300, "x", [], [None], [1] * 300, {}, {"a": 1}])
@pytest.mark.parametrize("key", ["tokenizer.vocabulary", "tokenizer.bos_token_id", "tokenizer.eos_token_id"])
def test_metadata_of_any_type(
    place: Path, key: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a checkpoint whose checksums are right says of its tokenizer is an answer or an error of ours."""
    sound = read_apr(place / "m.apr")
    path = tmp_path / "m.apr"
    write_apr(path, {**sound.metadata, key: value}, dict(sound.tensors), "float32")
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}")
    chat = [
        "run",
        str(path),
        "x",
        "--chat",
        "--chat-template",
        str(tmp_path / "t.jinja"),
        "--max-tokens",
        "1",
    ]
    for args in (chat, ["inspect", str(path)], ["validate", str(path)]):
        assert main(args) in (0, 4, 5, 9)
    if key == "tokenizer.vocabulary" and value in (1, -1, 1e300, "x"):
        assert main(chat) == 4
        assert "is not a list of tokens" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["99999999999999999999", "-1", str(1 << 63)])
def test_a_count_that_the_library_cannot_take(value: str, place: Path, tmp_path: Path) -> None:
    args = ["tokenize", "train", str(place / "corpus"), "--vocab-size", "300", "-o", str(tmp_path / "t")]
    assert main([*args, "--min-frequency", value]) == 2


def test_more_tokens_than_a_comparison_can_hold(place: Path) -> None:
    assert main(["bisect", str(place / "m.apr"), "--batch-size", str((1 << 63) - 1)]) == 2
