"""A stranger's first hour: a path that was not meant, a pipe, a job that does not fit, an error that a program must read."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from apr.bisect.report import STAGES
from apr.checkpoints.apr2 import write_apr
from apr.checkpoints.apr2_metadata import config_to_metadata, embed_tokenizer
from apr.cli.inspect import _but_not
from apr.cli.main import COMMANDS, main
from apr.common import hub
from apr.common.errors import InputNotFound, IOFailure, UsageError
from apr.common.finding import PASS, Finding, guards_passed
from apr.common.run_paths import instead_of, is_state, latest_checkpoint, run_of
from apr.model.config import ModelConfig
from apr.model.lora import LoraConfig
from apr.model.lora_settings import check_rank, lora_config
from apr.model.params import Layout
from apr.tokenizer.tokenizer import Tokenizer
from apr.tokenizer.training import train_tokenizer
from apr.training.settings import Settings, resolve
from apr.training.summary import warmup_note

Call = Callable[..., tuple[int, str, str]]
CFG = ModelConfig(
    family="llama",
    vocab_size=270,
    hidden_size=32,
    intermediate_size=64,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    tie_word_embeddings=True,
    qkv_bias=False,
    qk_norm=False,
)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """apr, with a command line; returns (exit code, output, errors)."""

    def run(*args: object) -> tuple[int, str, str]:
        code = main([str(a) for a in args])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def write(path: Path, tokenizer: Tokenizer) -> Path:
    layout = Layout(CFG)
    host = np.zeros(layout.size, np.float32)
    layout.randomise(host, 3)
    meta = config_to_metadata(CFG)
    embed_tokenizer(meta, tokenizer.json, tokenizer.eos_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_apr(path, meta, layout.named(host), "float32")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a run leaves it, with ten hundred checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    tokenizer = train_tokenizer(["def f(x):\n    return x + 1\n"] * 3, 270, folder / "tok")
    for name in ("epoch-999", "epoch-1000", "state/step-000100"):
        write(folder / "ckpt" / f"{name}.apr", tokenizer)
    (folder / "ckpt" / "epoch-1000.metadata.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps({"settings": {}}))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return folder


# Paths of a run


def test_paths_of_a_run(run: Path, tmp_path: Path) -> None:
    assert latest_checkpoint(run) == latest_checkpoint(run / "ckpt") == run / "ckpt" / "epoch-1000.apr"
    for inside in ("", "ckpt", "ckpt/state", "ckpt/state/step-000100.apr", "metrics.jsonl"):
        assert run_of(run / inside) == run
        assert "epoch-1000.apr" in instead_of(run / inside)
    assert run_of(tmp_path) is None
    assert instead_of(tmp_path) == ""
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "config.json").touch()
    assert "no checkpoint yet" in instead_of(tmp_path)
    assert is_state(run / "ckpt" / "state" / "step-000100.apr")
    assert not is_state(run / "ckpt" / "epoch-999.apr")


# Every command that takes a MODEL, with what else it needs.
TAKES_MODEL = {
    "run": ["x"],
    "inspect": [],
    "validate": [],
    "qa": [],
    "eval": ["--text", "a.txt"],
    "export": ["-o", "out"],
    "import": ["-o", "out.apr"],
    "merge": ["adapter", "-o", "out.apr"],
    "diff": ["b.apr"],
    "bisect": ["--picture", ""],
    "trace": ["--tokens", "1,2", "-o", "t.safetensors"],
}
AS_A_FLAG = {"plan": ["--init"], "pretrain": ["--num-steps", "1", "--corpus", "text", "--init"]}
NO_MODEL = {"tokenize", "verify", "report", "completion", "sweep"}


def test_the_commands_are_all_there() -> None:
    assert {*TAKES_MODEL, *AS_A_FLAG} | NO_MODEL == set(COMMANDS)


@pytest.mark.parametrize("command", [*TAKES_MODEL, *AS_A_FLAG])
@pytest.mark.parametrize("inside", ["", "ckpt", "ckpt/state", "ckpt/state/step-000100.apr", "metrics.jsonl"])
def test_a_path_of_a_run_names_the_checkpoint(
    call: Call, run: Path, command: str, inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if command == "diff" and inside.endswith("apr"):
        pytest.skip("two states can be compared")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    more = TAKES_MODEL.get(command, [])
    line = (
        [command, run / inside, *more]
        if command in TAKES_MODEL
        else [command, *AS_A_FLAG[command], run / inside]
    )
    code, out, err = call(*line, "--json")
    assert code in (2, 3, 4, 5), err
    assert f"give a checkpoint of the run, such as {run / 'ckpt' / 'epoch-1000.apr'}" in err
    document = json.loads(out)
    assert document["exit_code"] == code
    assert document["error"] in err


def test_a_folder_without_a_model(call: Call, run: Path, tmp_path: Path) -> None:
    code, _, err = call("validate", tmp_path)
    assert code == 3
    assert "no model in it" in err
    (tmp_path / "m.apr").touch()
    assert "give one, such as" in call("validate", tmp_path)[2]
    assert "the folder of the run is" in call("verify", run / "ckpt")[2]
    assert "the folder of the run is" in call("report", run / "ckpt" / "epoch-999.apr")[2]
    assert "not the config.json of a model" in call("plan", "--model", run)[2]
    assert "give it as --init" in call("plan", "--model", tmp_path / "m.apr")[2]


# Errors that a program reads


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_json_is_a_document_on_errors_too(call: Call, command: str) -> None:
    code, out, err = call(command, "--json", "--no-such-flag")
    assert code == 2
    assert json.loads(out) == {
        "error": err.removeprefix(f"apr {command}: ").removesuffix("\n"),
        "status": "FAILED",
        "exit_code": 2,
    }
    assert call(command, "--no-such-flag")[1] == ""
    assert call(command, "--json", "--no-json", "--no-such-flag")[1] == ""


def test_json_of_every_kind_of_error(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, code, words in (
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 5, "out of memory"),
        (RuntimeError("can't start new thread"), 5, "the system gives no more threads: raise `ulimit -u`"),
        (OSError(28, "No space left on device", "x"), 7, "x: No space left on device"),
    ):

        def fail(args: object, error: BaseException = error) -> int:
            raise error

        monkeypatch.setattr("apr.cli.plan.main", fail)
        got, out, err = call("plan", "--json")
        assert (got, json.loads(out)["exit_code"]) == (code, code)
        assert words in json.loads(out)["error"]
        assert words in err


# A job that does not fit, a piped prompt, an argument too many


def test_a_plan_that_does_not_fit(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from apr import backends

    line = ("plan", "--model", "qwen2-3m", "--seq-length", "64", "--batch-size", "1", "--device", "cpu")
    assert call(*line)[0] == 0
    monkeypatch.setattr(backends.get("cpu"), "free_memory", lambda: 1 << 20)
    code, out, _ = call(*line)
    assert code == 5
    assert "DOES NOT FIT" in out
    code, out, _ = call(*line, "--json")
    assert code == 5
    assert json.loads(out)["fits"] is False


def piped(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_a_piped_prompt_is_read(call: Call, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ("run", run / "ckpt" / "epoch-999.apr", "--max-tokens", 4, "--json")
    given = json.loads(call(*line, "def f")[1])
    for data in (b"def f", b"def f\n", b"\xef\xbb\xbfdef f\r\n"):
        piped(monkeypatch, data)
        assert json.loads(call(*line)[1])["ids"] == given["ids"]
    piped(monkeypatch, b"not read")
    assert json.loads(call(*line, "def f")[1])["ids"] == given["ids"]
    piped(monkeypatch, b"\xff\xfe\x00")
    assert "standard input: not UTF-8" in call(*line)[2]


def test_an_argument_too_many(call: Call) -> None:
    code, _, err = call("run", "m.apr", "a", "b")
    assert code == 2
    assert "b: one argument too many; a text with spaces needs quotes around it" in err
    assert "--prompts FILE" in err
    assert "unrecognized arguments: --wrong" in call("run", "m.apr", "a", "--wrong")[2]


# Comparisons


def test_top_limits_the_document_of_diff_too(call: Call, run: Path) -> None:
    a = run / "ckpt" / "epoch-999.apr"
    whole = json.loads(call("diff", a, a, "--json", "--top", 0)[1])["tensors"]
    assert len(whole) > 3
    assert json.loads(call("diff", a, a, "--json", "--top", 3)[1])["tensors"] == whole[:3]


def test_a_checkpoint_is_no_trace(call: Call, run: Path, tmp_path: Path) -> None:
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF" + bytes(100))
    for other in (run / "ckpt" / "epoch-999.apr", gguf, tmp_path):
        line = ("bisect", run / "ckpt" / "epoch-999.apr", "--against", other, "--picture", "")
        code, _, err = call(*line)
        assert code == 5
        assert "is a checkpoint, not a trace" in err


@pytest.mark.parametrize("flag", ["--output", "--out", "-o"])
def test_merge_writes_to_output_as_the_others_do(call: Call, run: Path, flag: str) -> None:
    code, _, err = call("merge", run / "ckpt" / "epoch-999.apr", "none", flag, "x.txt")
    assert code == 2
    assert "--output x.txt: give a file that ends in .apr" in err


# The Hub


def test_a_download_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not found, 3: 7 stands for what cannot be written. The library's message ends in an empty "Got:"."""
    errors = {
        n: type(n, (Exception,), {})
        for n in ("HFValidationError", "RepositoryNotFoundError", "RevisionNotFoundError")
    }
    package, inner = ModuleType("huggingface_hub"), ModuleType("huggingface_hub.errors")
    vars(inner).update(errors)
    monkeypatch.setitem(sys.modules, "huggingface_hub", package)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", inner)

    def raising(error: Exception) -> None:
        def snapshot_download(*args: object, **more: object) -> str:
            raise error

        vars(package).update(snapshot_download=snapshot_download)

    for error in (
        ConnectionError("Cannot reach the Hub. Got: \nmore"),
        RuntimeError("Cannot reach the Hub. Got:"),
        OSError("Cannot reach the Hub."),
    ):
        raising(error)
        with pytest.raises(
            InputNotFound, match=r"cannot be downloaded: Cannot reach the Hub; check the network"
        ):
            hub.download("hf://a/b", ["config.json"])
    raising(OSError(28, "No space left on device", "/cache/x"))
    with pytest.raises(IOFailure, match="/cache/x: No space left on device"):
        hub.download("hf://a/b", ["config.json"])


# Settings of a run that make no sense, or do


def adapters(rank: int) -> LoraConfig:
    config = lora_config(rank, None, "q,v")
    assert config is not None
    return config


def test_settings_of_a_first_run(tmp_path: Path) -> None:
    made = Settings(init="x.apr", corpus="c", mode="from-scratch", num_steps=20_000)
    assert (resolve(made).lr, resolve(made).warmup_steps) == (3e-4, 1000)
    for warmup, steps, words in (
        (100, 1000, ""),
        (50, 50, "its peak only in the last step"),
        (100, 50, "only 0.5 of"),
    ):
        note = warmup_note(Settings(warmup_steps=warmup, num_steps=steps))
        assert words in note
        assert bool(note) == bool(words)
    check_rank(CFG, adapters(32))
    with pytest.raises(
        UsageError, match="--lora-rank 33: the adapted matrices have at most 32 rows or columns"
    ):
        check_rank(CFG, adapters(33))


def test_a_tiny_preset_says_that_it_is_not_for_text(call: Call, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    line = ("pretrain", "--corpus", tmp_path, "--model", "llama-tiny", "--seq-length", 16, "--device", "cpu")
    code, _, err = call(*line, "--run-dir", tmp_path / "run")
    assert code == 5
    assert "-tiny are for tests" in err
    assert "llama-demo" in err


# Data


def test_a_refused_encoding_leaves_nothing_that_refuses_the_next(
    call: Call, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": "one document"}\nno json\n')
    line = (
        "tokenize",
        "encode-corpus",
        tmp_path / "one.jsonl",
        "--tokenizer",
        run / "tok",
        "-o",
        tmp_path / "out",
    )
    code, _, err = call(*line)
    assert code == 5
    assert "1 could not be used, the first: " in err
    assert not [p for p in (tmp_path / "out").rglob("*") if not p.name.startswith(".")]
    assert call(*line, "--val-fraction", 0)[0] == 0
    # What was there before stays.
    (tmp_path / "kept" / "tokenizer").mkdir(parents=True)
    (tmp_path / "kept" / "notes.txt").touch()
    assert call(*line[:-1], tmp_path / "kept")[0] == 5
    assert {p.name for p in (tmp_path / "kept").iterdir()} >= {"notes.txt", "tokenizer"}


def test_a_file_of_windows_that_is_no_utf8_is_named(call: Call, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("text\r\n".encode("utf-16") * 20)
    code, _, err = call("tokenize", "train", tmp_path / "a.txt", "--vocab-size", 300, "-o", tmp_path / "tok")
    assert code == 5
    assert "the first that cannot be used: " in err
    assert "a.txt" in err


def test_an_audit_of_what_holds_no_shards(call: Call, run: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "missing", tmp_path):
        code, out, err = call("tokenize", "audit", folder, "--tokenizer", run / "tok")
        assert (code, out) == (3, "")
        assert "no such folder" in err or "no token shards there" in err


def test_guards_that_were_not_asked_are_counted_apart() -> None:
    asked = [Finding("a", PASS), Finding("b", PASS), Finding.skipped("c", "too few", "0")]
    assert guards_passed(asked) == "2 of 2 guards passed, 1 not asked"
    assert guards_passed(asked[:1]) == "1 of 1 guard passed"


# Lines and tables


def test_lines_in_a_pipe_do_not_end_in_spaces(call: Call, run: Path) -> None:
    for line in (("inspect", run / "ckpt" / "epoch-999.apr"), ("validate", run / "ckpt" / "epoch-999.apr")):
        out = call(*line)[1]
        assert len(out.splitlines()) > 4
        assert not [x for x in out.splitlines() if x != x.rstrip()]


def test_a_row_of_bisect_is_a_line(call: Call, run: Path) -> None:
    line = ("bisect", run / "ckpt" / "epoch-999.apr", "--batch-size", 1, "--seq-length", 8, "--picture", "")
    out = call(*line)[1]
    table = out.split("stage ")[1].split("\n\n")[0].splitlines()[1:]
    assert [row.split()[0] for row in table] == list(STAGES)


def test_blocks_of_a_gguf_file_are_named(call: Call, run: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")
    a, gguf = run / "ckpt" / "epoch-999.apr", tmp_path / "m.gguf"
    assert call("export", a, "--format", "gguf", "--dtype", "q8_0", "-o", gguf)[0] == 0
    assert json.loads(call("inspect", gguf, "--json")[1])["dtypes"] == ["Q8_0", "float32"]
    rows = json.loads(call("diff", a, gguf, "--json")[1])["tensors"]
    assert "Q8_0 [64, 32]" in {row["b"] for row in rows}


def test_layers_without_are_named_as_such() -> None:
    assert [_but_not(x) for x in ((), (1,), (1, 3))] == ["", " but not on layer 1", " but not on layers 1, 3"]
