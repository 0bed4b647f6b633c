"""A stranger's first hour: messages that can be followed, placeholders that say what to write, words in their number."""

from __future__ import annotations

import ast
import configparser
import dataclasses
import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from apr.cli.main import COMMANDS, MODULES, main
from apr.common.options import field_types, flag, placeholder
from apr.common.packages import OPTIONAL, pip_install
from apr.common.units import plural

ROOT = Path(__file__).resolve().parents[2]
Call = Callable[..., tuple[int, str, str]]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 280,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """apr, with a command line; returns (exit code, output, errors)."""

    def run(*args: object) -> tuple[int, str, str]:
        code = main([str(a) for a in args])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one document to train on and one held out, and what a run of one step of a model of one layer made."""
    folder = tmp_path_factory.mktemp("first")
    words = re.findall(r"\w+", "the quick brown fox jumps over a lazy dog and seventeen men watch it")
    (folder / "text").mkdir()
    for k, n in enumerate((1500, 300)):
        lines = [" ".join(words[(i * i + j * (i + k)) % 14] for j in range(12)) for i in range(n)]
        (folder / "text" / f"{k}.txt").write_text("\n".join(lines))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tok, shards = folder / "tok", folder / "shards"
    assert main(["tokenize", "train", str(folder / "text"), "--vocab-size", "280", "-o", str(tok)]) == 0
    for side, k in (("train", 0), ("val", 1)):
        text = str(folder / "text" / f"{k}.txt")
        args = ["--tokenizer", str(tok), "-o", str(folder / side), "--val-fraction", "0"]
        assert main(["tokenize", "encode-corpus", text, *args]) == 0
        shards.mkdir(exist_ok=True)
        (folder / side / "train").rename(shards / side)
    args = [
        "--num-steps",
        "1",
        "--seq-length",
        "16",
        "--batch-size",
        "1",
        "--eval-every",
        "1",
        "--val-batches",
        "8",
    ]
    model = ["--model", str(folder / "config.json"), "--tokenizer", str(tok)]
    run = ["--run-dir", str(folder / "run"), "--device", "cpu"]
    assert main(["pretrain", "--dataset", str(shards), *model, *args, *run]) in (0, 9)
    return folder


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
    "SIZE", "STATES", "STEPS", "TEMPERATURE", "THREADS", "TOKEN", "TOKENS", "ALPHA", "PATH", "CHECKPOINTS",
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


# Words in their number


def test_plural():
    found = [plural(n, "matrix") for n in (0, 1, 2048)]
    assert found == ["0 matrices", "1 matrix", "2,048 matrices"]
    assert [plural(2, n) for n in ("copy", "key", "pass", "batch")] == [
        "2 copies",
        "2 keys",
        "2 passes",
        "2 batches",
    ]


# "1 documents", but not "1 tokens/s", "of 1 KiB" and words that are no plural.
ONE_OF_MANY = re.compile(
    r"(?<![\w.,:/x-])(?<!x )1 (?!is\b|was\b|has\b|of\b|epochs? )[a-z]+(?: [a-z]+)?(?<![su])s\b(?![/\w])"
)


def test_the_pattern_sees_what_it_should():
    for text in ("1 documents", "has 1 layers of 32", "(1 prompts)", "1 new tokens", "1 matrices"):
        assert ONE_OF_MANY.search(text), text
    for text in (
        "11 documents",
        "1 document",
        "0.1 tokens",
        "1 pass",
        "1 tokens/s",
        "8 x 1 tokens",
        "1,001 ids",
    ):
        assert not ONE_OF_MANY.search(text), text


def test_no_output_has_one_of_many(call: Call, made: Path, tmp_path: Path):
    run, text = made / "run", made / "text" / "1.txt"
    checkpoint, shards = run / "ckpt" / "epoch-001.apr", made / "shards"
    lines = [
        ("tokenize", "train", text, "--vocab-size", 280, "-o", tmp_path / "tok"),
        ("tokenize", "encode-corpus", text, "--tokenizer", made / "tok", "-o", tmp_path / "s", "--val-fraction", 0),
        ("tokenize", "encode-corpus", text, "--tokenizer", made / "tok", "-o", tmp_path / "e", "--estimate-only"),
        ("tokenize", "audit", shards, "--picture", "none", "--tokenizer", made / "tok"),
        ("pretrain", "--dataset", shards, "--init", checkpoint, "--num-steps", 1, "--seq-length", 16, "--batch-size", 1,
         "--eval-every", 1, "--run-dir", tmp_path / "run", "--lora-rank", 1, "--lora-targets", "q",
         "--tokenizer", made / "tok", "--val-batches", 1),
        ("verify", tmp_path / "run", "--replay", 1),
        ("inspect", checkpoint, "--tensors"),
        ("validate", checkpoint),
        ("diff", checkpoint, checkpoint),
        ("export", checkpoint, "-o", tmp_path / "hf"),
        ("import", tmp_path / "hf", "-o", tmp_path / "m.apr"),
        ("plan", "--init", checkpoint, "--seq-length", 1, "--batch-size", 1),
        ("run", checkpoint, "a", "--max-tokens", 1),
        ("eval", checkpoint, "--text", text, "--seq-length", 16, "--max-tokens", 1, "--batch-size", 1),
        ("qa", checkpoint),
        ("bisect", checkpoint, "--batch-size", 1, "--seq-length", 2, "--picture", ""),
    ]  # fmt: skip
    for line in lines:
        code, out, err = call(*line)
        assert code in (0, 9), (line, err)
        assert not (found := ONE_OF_MANY.findall(out + err)), (line, found)


NOUNS = {
    "adapters", "arrays", "bytes", "characters", "checkpoints", "choices", "documents", "elements", "epochs", "evaluations",
    "examples", "files", "gates", "guards", "ids", "keys", "layers", "matrices", "merges", "messages", "parameters", "positions",
    "problems", "prompts", "rows", "sequences", "shards", "states", "steps", "tensors", "tokens", "values", "windows",
}  # fmt: skip
# Kernels take no part in what a user reads; faults are planted with counts that are constants.
NO_NUMBER = {
    "there",
    "short(out['split.count'])",
    "magnitude(parameters)",
    "_millions(tokens)",
    "len(data)",
    "most",
}
# Programs that run apart from apr import nothing of it.
NO_USER = (
    "apr/backends/cuda/",
    "apr/bisect/planted/",
    "apr/evaluation/sandboxed.py",
    "apr/tokenizer/template_worker.py",
)


def test_counts_are_written_by_one_function():
    """In f-strings: a number before such a noun comes from `plural`, but for constants and for shapes such as "8 x 64"."""
    wrong = []
    for path in sorted((ROOT / "apr").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(NO_USER):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else []
            for i, part in enumerate(parts[1:], 1):
                before, value = parts[i - 2] if i > 1 else None, parts[i - 1]
                text = part.value if isinstance(part, ast.Constant) else ""
                word = re.match(r" ([a-z]+)\b(?!/)", text)
                shape = isinstance(before, ast.Constant) and before.value.endswith(" x ")
                if word is None or word[1] not in NOUNS or shape or not isinstance(value, ast.FormattedValue):
                    continue
                spelt = ast.unparse(value.value)
                spec = ast.unparse(value.format_spec) if value.format_spec else ""
                if (
                    not spelt.isupper()
                    and spelt not in NO_NUMBER
                    and "f}" not in spec
                    and ".1f" not in spec
                    and ".3f" not in spec
                ):
                    wrong.append(f"{name}:{value.lineno} {{{spelt}}} {word[1]}")
    assert not wrong
