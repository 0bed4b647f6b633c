"""`apr run` as a user calls it: one prompt, a file of prompts, stop strings, speeds, --json."""

from __future__ import annotations

import codecs
import dataclasses
import json
import shutil

import numpy as np
import pytest

from apr.checkpoints.apr2 import write_apr
from apr.checkpoints.apr2_metadata import config_to_metadata, embed_tokenizer
from apr.checkpoints.hf import write_hf
from apr.cli.main import main
from apr.cli.run import read_prompts
from apr.common.errors import InputNotFound, Refused
from apr.inference.language_model import LanguageModel
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.tokenizer.training import train_tokenizer

WORDS = "def f(x):\n    return x + 1\nclass A:\n    pass\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random llama with a tokenizer, as an .apr file and as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([WORDS] * 3, 280, folder / "tok")
    cfg = dataclasses.replace(PRESETS["llama-tiny"], vocab_size=tokenizer.vocab_size)
    host = np.zeros(Layout(cfg).size, np.float32)
    Layout(cfg).randomise(host, 3, 0.2)
    meta = config_to_metadata(cfg)
    embed_tokenizer(meta, tokenizer.json, tokenizer.eos_id)
    write_apr(folder / "m.apr", meta, Layout(cfg).named(host), "float32")
    write_hf(folder / "hf", cfg, Layout(cfg).named(host), tokenizer_json=tokenizer.json)
    return folder


def call(capsys, *args):
    code = main(["run", *[str(a) for a in args]])
    out, err = capsys.readouterr()
    return code, out, err


def as_json(capsys, *args):
    code, out, err = call(capsys, *args, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


@pytest.mark.parametrize("more", [["--temperature", 0], ["--seed", 3], ["--top-k", 5, "--min-p", 0.1]])
def test_streamed_text_is_the_text_of_json(capsys, checkpoint, more):
    args = [checkpoint / "m.apr", "def f", "--max-tokens", 40, *more]
    d = as_json(capsys, *args)
    code, out, err = call(capsys, *args)
    assert code == 0
    assert out == d["text"] + "\n"
    assert out.startswith("def f")
    assert d["ended"] == "length"
    assert len(d["ids"]) == 40
    assert d["tokens_per_sec"] > 0
    assert d["prompt_tokens_per_sec"] > 0
    assert "40 new tokens at" in err
    assert "--max-tokens" in err
    assert as_json(capsys, *args)["ids"] == d["ids"]


def test_a_stop_string_ends_the_text_and_is_not_shown(capsys, checkpoint):
    args = [checkpoint / "hf", "def", "--max-tokens", 60, "--temperature", 1.0, "--seed", 4]
    free = as_json(capsys, *args)["text"].removeprefix("def")
    at = next(
        i for i in range(5, len(free)) if free[i : i + 4].isprintable() and free.find(free[i : i + 4]) == i
    )
    stop = free[at : at + 4]  # longer than most tokens, so it spans several
    d = as_json(capsys, *args, "--stop", "never there", "--stop", stop)
    assert d["text"] == "def" + free[:at]
    assert d["ended"] == "stop"
    assert len(d["ids"]) < 60
    code, out, err = call(capsys, *args, "--stop", stop)
    assert (code, out) == (0, "def" + free[:at] + "\n")
    assert "a stop string" in err


def test_repetition_penalty_changes_greedy_text(capsys, checkpoint):
    args = [checkpoint / "hf", "def", "--max-tokens", 30, "--temperature", 0]
    plain = as_json(capsys, *args)["ids"]
    penal = as_json(capsys, *args, "--repetition-penalty", 1e6)["ids"]
    assert len(set(plain)) < len(plain)  # else the test shows nothing
    assert len(set(penal)) == len(penal)


def test_prompts_in_another_form_are_no_lines_of_text(tmp_path):
    """A table's header and an array's brackets would be prompts."""
    for name, text in (("a.csv", "prompt\nx\n"), ("a.json", '["x", "y"]'), ("a.txt.gz", "x")):
        (tmp_path / name).write_text(text)
        with pytest.raises(Refused, match="prompts are lines of text"):
            read_prompts(tmp_path / name)
    for name in ("none.txt", "none.csv", "none.json", "none.parquet", "none.jsonl.gz", "none.jsonl"):
        with pytest.raises(InputNotFound, match=f"{name}: no such file$"):
            read_prompts(tmp_path / name)
    for name in ("a.JSONL", "a.ndjson"):
        (tmp_path / name).write_text('{"prompt": "x"}\n')
        assert read_prompts(tmp_path / name) == ["x"]


def test_prompts_that_are_drawn_with_one_seed_are_a_fault(capsys, checkpoint, tmp_path, monkeypatch):
    """The last of several is drawn again too."""
    right = LanguageModel.each
    (tmp_path / "p.txt").write_text("def f(x):\nclass\nx\n")
    args = [checkpoint / "m.apr", "--prompts", tmp_path / "p.txt", "--max-tokens", 8, "--temperature", 1.5]
    assert call(capsys, *args)[0] == 0
    monkeypatch.setattr(LanguageModel, "each", lambda self, p, s, *a: right(self, p, [s] * len(p), *a))
    code, _, err = call(capsys, *args)
    assert (code, "the rule gives" in err) == (9, True)


@pytest.mark.parametrize("form", ["lines", "jsonl"])
@pytest.mark.parametrize("more", [["--temperature", 0], ["--seed", 11]])
def test_prompts_of_a_file_get_what_each_gets_alone(capsys, checkpoint, tmp_path, form, more):
    prompts = [
        "def f(x):",
        "class",
        "x",
        "return x + 1 return x + 1",
        "pass",
        "d",
        "(",
        "def A",
        "class B: pass",
        "  ",
    ]
    prompts = prompts[:-1]
    path = tmp_path / ("p.jsonl" if form == "jsonl" else "p.txt")
    lines = [json.dumps({"prompt": p, "id": 1}) if form == "jsonl" else p for p in prompts]
    path.write_text("\n".join(lines) + "\n\n")
    args = ["--max-tokens", 25, "--stop", "zz", *more]
    d = as_json(capsys, checkpoint / "m.apr", "--prompts", path, *args)
    assert [row["prompt"] for row in d["results"]] == prompts
    for i, row in enumerate(d["results"]):
        alone_args = [
            a + i if before == "--seed" else a for before, a in zip(["", *args], args, strict=False)
        ]
        alone = as_json(capsys, checkpoint / "m.apr", prompts[i], *alone_args)
        assert (row["ids"], row["prompt_ids"]) == (alone["ids"], alone["prompt_ids"])
        assert prompts[i] + row["text"] == alone["text"]
        assert row["ended"] == alone["ended"]
    assert d["tokens_per_sec"] > 0
    code, out, err = call(capsys, checkpoint / "m.apr", "--prompts", path, *args)
    assert code == 0
    assert out == "".join(
        f"--- {i + 1}\n{row['prompt']}{row['text']}\n" for i, row in enumerate(d["results"])
    )
    assert f"{len(prompts)} prompts" in err


def marked(path):
    """Begin a file with the byte order mark that Windows' editors write."""
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())


@pytest.mark.parametrize("form", ["lines", "jsonl"])
def test_files_saved_on_windows_say_the_same(capsys, checkpoint, tmp_path, form):
    shutil.copytree(checkpoint / "hf", tmp_path / "hf")
    path = tmp_path / ("p.jsonl" if form == "jsonl" else "p.txt")
    path.write_text('{"prompt": "def f(x):"}\n' if form == "jsonl" else "def f(x):\r\n", newline="")
    args = ["--prompts", path, "--max-tokens", 5, "--temperature", 0]
    plain = as_json(capsys, checkpoint / "hf", *args)["results"]
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages[-1].content }}")
    chat = ["def f(x):", "--chat", "--chat-template", template, "--max-tokens", 5, "--temperature", 0]
    said = json.loads(call(capsys, checkpoint / "hf", *chat, "--json")[1])
    for file in [path, template, *(tmp_path / "hf").glob("*.json")]:
        marked(file)
    assert as_json(capsys, tmp_path / "hf", *args)["results"] == plain
    again = json.loads(call(capsys, tmp_path / "hf", *chat, "--json")[1])
    assert again["messages"] == said["messages"]


def test_every_end_of_text_id_ends(capsys, checkpoint, tmp_path):
    """eos_token_id may be a list, in config.json or generation_config.json."""
    import shutil

    args = ["def", "--max-tokens", 60, "--temperature", 1.0, "--seed", 4]
    free = as_json(capsys, checkpoint / "hf", *args)["ids"]
    first = next(i for i in range(4, 60) if free.index(free[i]) == i)
    for name in ("generation_config.json", "config.json"):
        folder = tmp_path / name.split(".")[0]
        shutil.copytree(checkpoint / "hf", folder)
        path = folder / name
        d = json.loads(path.read_text()) if path.exists() else {}
        eos = json.loads((folder / "tokenizer.json").read_text())["added_tokens"][0]["id"]
        path.write_text(json.dumps({**d, "eos_token_id": [eos, free[first]]}))
        got = as_json(capsys, folder, *args)
        assert got["ids"] == free[: first + 1]
        assert got["ended"] == "end"


def test_the_last_position_ends(capsys, checkpoint):
    d = as_json(capsys, checkpoint / "hf", "def", "--max-tokens", 5000, "--temperature", 0)
    assert d["ended"] == "positions"
    assert len(d["prompt_ids"]) + len(d["ids"]) == 64


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["x", "--prompts", "FILE"], 2, "--prompts"),
        (["--prompts", "none.txt"], 3, "none.txt"),
        (["--prompts", "EMPTY"], 5, "no prompts"),
        (["--prompts", "BAD"], 4, "line 2"),
        (["--prompts", "NOT"], 4, "line 1"),
        (["--prompts", "FILE", "--batch-size", "0"], 2, "at least 1"),
        (["x", "--system", "y"], 2, "--chat"),
        (["x", "--min-p", "2"], 2, "--min-p"),
        (["x", "--repetition-penalty", "0"], 2, "--repetition-penalty"),
        (["x", "--max-tokens", "0"], 2, "--max-tokens"),
        (["x", "--chat"], 5, "no chat template"),
        (["x", "--chat", "--chat-template", "none.jinja"], 3, "none.jinja"),
    ],
)
def test_bad_input_is_one_clear_line(capsys, checkpoint, tmp_path, args, code, words):
    files = {
        "FILE": ("p.txt", "a\nb\n"),
        "EMPTY": ("e.txt", "\n \n"),
        "BAD": ("b.jsonl", '{"prompt": "a"}\n{"text": 1}'),
        "NOT": ("n.jsonl", "a"),
    }
    for name, text in files.values():
        (tmp_path / name).write_text(text)
    args = [str(tmp_path / files[a][0]) if a in files else a for a in args]
    got, out, err = call(capsys, checkpoint / "m.apr", *args)
    assert got == code
    assert words in err
    assert err.startswith("apr run:")
    assert "Traceback" not in out + err
