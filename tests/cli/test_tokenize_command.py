"""`apr tokenize ...` as a user calls it: output, exit codes, --json, and training on what it wrote."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apr.cli.main import main
from apr.cli.tokenize import COMMANDS
from apr.data.shards import TokenShards
from apr.tokenizer.tokenizer import Tokenizer
from data_cases import corpus, files_of, flip_byte

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder of text, JSONL and packed JSONL, some of it of no use."""
    folder = tmp_path / "text"
    folder.mkdir()
    for d in corpus(60):
        (folder / f"{d.name}.txt").write_text(d.text)
    lines = [json.dumps({"text": d.text, "id": d.name}) for d in corpus(30, seed=6)]
    (folder / "a.jsonl").write_text("\n".join([*lines[:15], "{broken", '{"id": 1}', *lines[:3]]) + "\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[15:]).encode()))
    (folder / "latin1.txt").write_bytes(b"caf\xe9")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    return folder


@pytest.fixture
def tok(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["tokenize", "train", str(text), "--vocab-size", "400", "-o", str(tmp_path / "tok")]) == 0
    capsys.readouterr()
    return tmp_path / "tok"


def call(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main(["tokenize", *map(str, args)])
    out, err = capsys.readouterr()
    return code, out, err


def test_train(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = (
        "train",
        text,
        "--vocab-size",
        "330",
        "--special-tokens",
        "<|pad|>",
        "--special-tokens",
        "<|user|>",
    )
    code, out, _ = call(capsys, *args, "-o", tmp_path / "a")
    assert code == 0
    assert "330 ids" in out
    assert "id 327 '<|endoftext|>'" in out
    tokenizer = Tokenizer.from_file(tmp_path / "a")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (330, 327)
    code, out, _ = call(capsys, *args, "-o", tmp_path / "b", "--json")
    d = json.loads(out)
    assert d["sha256"] == tokenizer.sha256
    assert d["documents"] == 93  # with the copies
    assert d["skipped"] == {"broken JSON": 1, "no field": 1, "not UTF-8": 1}
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    code, out, _ = call(capsys, *args, "-o", tmp_path / "c", "--json", "--val-fraction", "0.5")
    assert json.loads(out)["documents"] < 80


def test_import_hf(tok: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "import-hf", tok, "-o", tmp_path / "b", "--json")
    assert code == 0
    assert json.loads(out)["sha256"] == Tokenizer.from_file(tok).sha256
    code, out, _ = call(capsys, "import-hf", tok / "tokenizer.json", "-o", tmp_path / "c")
    assert code == 0
    assert "byte-level" in out


def encode(
    capsys: pytest.CaptureFixture[str], text: Path, tok: Path, out: Path, *more: object
) -> tuple[int, str, str]:
    return call(capsys, "encode-corpus", text, "--tokenizer", tok, "-o", out, "--val-fraction", "0.2", *more)


def test_encode_audit_repair_train(
    text: Path, tok: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out_dir = tmp_path / "shards"
    code, out, _ = encode(capsys, text, tok, out_dir, "--json", "--shard-tokens", "5000")
    assert code == 0
    d = json.loads(out)
    assert d["counts"]["skipped"] == {"broken JSON": 1, "no field": 1, "not UTF-8": 1}
    assert d["counts"]["duplicates"] == 3
    assert d["train"]["total_documents"] + d["val"]["total_documents"] == 90
    code, out, _ = call(capsys, "audit", out_dir)
    assert code == 0
    assert out.rstrip().endswith("PASS")
    assert (out_dir / "audit.png").exists()
    (out_dir / "train" / "manifest.json").write_text("{")
    code, out, _ = call(capsys, "audit", out_dir, "--picture", "none")
    assert code == 9
    assert "not JSON" in out
    code, out, _ = call(capsys, "repair-manifest", out_dir / "train")
    assert code == 0
    assert call(capsys, "audit", out_dir, "--json")[0] == 0
    code, _, err = call(capsys, "repair-manifest", out_dir / "train")
    assert code == 5
    assert "nothing was changed" in err
    train = ["pretrain", "--dataset", str(out_dir), "--model", str(model(tmp_path)), "--num-steps", "2"]
    more = ["--seq-length", "32", "--batch-size", "2", "--run-dir", str(tmp_path / "run"), "--json"]
    assert main([*train, *more]) == 0
    guards = json.loads((tmp_path / "run" / "config.json").read_text())["data_guards"]
    assert {g["verdict"] for side in guards.values() for g in side} <= {"PASS", "SKIPPED"}
    assert {g["guard"] for g in guards["train"]} > {"documents on both sides", "vocabulary", "end of text"}


def model(tmp_path: Path) -> Path:
    """A config.json of a very small model for 400 ids."""
    from dataclasses import replace

    from apr.model.hf_config import to_hf
    from apr.model.presets import PRESETS

    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(to_hf(replace(PRESETS["llama-tiny"], vocab_size=400, max_position_embeddings=64)))
    )
    return path


FAULTS: dict[str, tuple[Callable[[Path], Any], int, str]] = {
    "damaged shard": (lambda f: flip_byte(f / "train", "shard-00000.bin"), 4, "sha256 is"),
    "val inside train": (lambda f: steal(f), 5, "documents on both sides: 1 of"),
    "another tokenizer": (lambda f: (f / "train/manifest.json").write_text((f / "train/manifest.json").read_text().replace(
        json.loads((f / "train/manifest.json").read_text())["tokenizer_sha256"], "0" * 64)), 5, "encoded with tokenizer 0000"),
    "shard missing": (lambda f: (f / "val/shard-00000.bin").unlink(), 4, "missing"),
}  # fmt: skip


def steal(folder: Path) -> None:
    """Put a validation document among those of training, with a manifest that is true otherwise."""
    import numpy as np

    from apr.data.repair import repair_manifest

    tokenizer = Tokenizer.from_file(folder / "tokenizer")
    val = np.concatenate(TokenShards(folder / "val").arrays)
    stolen = val[: int(np.flatnonzero(val == tokenizer.eos_id)[0]) + 1]
    path = sorted((folder / "train").glob("shard-*.bin"))[-1]
    path.write_bytes(path.read_bytes() + stolen.tobytes())
    repair_manifest(folder / "train", tokenizer)


@pytest.mark.parametrize("fault", FAULTS)
def test_training_refuses_what_an_audit_finds(
    text: Path, tok: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    plant, code, words = FAULTS[fault]
    out_dir = tmp_path / "shards"
    assert encode(capsys, text, tok, out_dir)[0] == 0
    plant(out_dir)
    found, out, _ = call(capsys, "audit", out_dir, "--picture", "none", "--json")
    assert found == 9
    failed = [
        g for side in json.loads(out)["sides"].values() for g in side["guards"] if g["verdict"] == "FAIL"
    ]
    assert len(failed) == 1
    assert words in f"{failed[0]['guard']}: {failed[0]['figure']}"
    args = ["pretrain", "--dataset", str(out_dir), "--model", str(model(tmp_path)), "--num-steps", "2"]
    assert (
        main([*args, "--seq-length", "32", "--batch-size", "2", "--run-dir", str(tmp_path / "run")]) == code
    )
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_constant_corpus_needs_a_number(
    tok: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "constant"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"{i}" + "~" * 2000)
    code, _, err = encode(capsys, folder, tok, tmp_path / "a")
    assert code == 5
    assert "commonest id" in err or "entropy" in err
    resume, widen, wide = err.split("go on with ")[1].split()[:3]
    assert (resume, widen) == ("--resume", "--widen")
    assert encode(capsys, folder, tok, tmp_path / "a", resume, widen, wide)[0] == 0
    args = ["pretrain", "--dataset", str(tmp_path / "a"), "--model", str(model(tmp_path)), "--num-steps", "1"]
    more = ["--seq-length", "32", "--batch-size", "2", "--run-dir", str(tmp_path / "run")]
    assert main([*args, *more]) == 5  # a number given once is not a number given for ever
    assert main([*args, *more, "--widen", wide]) == 0
    assert "max_top_share widened from" in capsys.readouterr().out


def test_estimate_is_near(text: Path, tok: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = encode(capsys, text, tok, tmp_path / "none", "--estimate-only", "--json")
    assert code == 0
    assert not (tmp_path / "none").exists()
    e = json.loads(out)
    code, out, _ = encode(capsys, text, tok, tmp_path / "a", "--json")
    d = json.loads(out)
    tokens = d["train"]["total_tokens"] + d["val"]["total_tokens"]
    assert abs(e["tokens"] - tokens) < 0.1 * tokens
    assert e["documents"] == 93


def test_estimate_of_packed_and_parquet_files(
    tok: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is only read in part is scaled by what was read of it."""
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    rng = random.Random(3)
    rows = [" ".join(rng.choices(["alpha", "beta", "None", "x1"], k=400)) + f" {i}" for i in range(4000)]
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet")
    records = "".join(json.dumps({"text": r, "id": i}) + "\n" for i, r in enumerate(rows))
    (tmp_path / "b.jsonl").write_text(records)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(records.encode()))
    (tmp_path / "d.txt").write_text("\n".join(rows))
    total = sum(len(r) for r in rows)
    for name in ("a.parquet", "b.jsonl", "c.jsonl.gz", "d.txt"):
        _, out, _ = encode(capsys, tmp_path / name, tok, tmp_path / "none", "--estimate-only", "--json")
        e = json.loads(out)
        assert e["sample_bytes"] < total / 2, name
        near = 0.25 if name.endswith(".gz") else 0.1  # an archive is read ahead of what it gives
        assert abs(e["text_bytes"] - total) < near * total, name
        assert e["documents"] == 1 if name == "d.txt" else abs(e["documents"] - 4000) < near * 4000, name
        assert abs(e["tokens"] / e["text_bytes"] - e["sample_tokens"] / e["sample_bytes"]) < 0.01, name


def test_nothing_is_written_among_the_input_or_over_a_tokenizer(
    text: Path, tok: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out in (text, text / "out"):
        code, _, err = encode(capsys, text, tok, out)
        assert code == 2
        assert "the next encoding would read it too" in err
    code, _, err = encode(capsys, text, tok, tok)
    assert code == 2
    assert "holds a tokenizer" in err
    before = files_of(tok)
    code, _, err = call(capsys, "train", text, "--vocab-size", "300", "-o", tok)
    assert code == 5
    assert "holds a tokenizer; remove it, or choose another folder" in err
    assert files_of(tok) == before


def test_what_does_nothing_is_said(
    text: Path, tok: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = encode(capsys, text, tok, tmp_path / "a", "--separator", "###", "--resume")
    assert "no line of a text file is exactly '###'" in out
    assert "nothing to resume in" in out


def test_of_a_folder_with_splits_train_is_read(
    tok: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As apr pretrain --corpus reads it: by the tokenizer and by the encoder."""
    folder = tmp_path / "in"
    folder.mkdir()
    texts = [d.text for d in corpus(40)]
    for name, part in (("train", texts[:30]), ("test", texts[30:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in part))
    code, out, _ = encode(capsys, folder, tok, tmp_path / "a")
    assert (code, "trained on the split train; left out:" in " ".join(out.split())) == (0, True)
    code, out, _ = encode(capsys, folder, tok, tmp_path / "b", "--json")
    assert sum(json.loads(out)["counts"]["documents"].values()) == 30
    code, out, _ = call(capsys, "train", folder, "--vocab-size", 300, "-o", tmp_path / "t", "--json")
    assert 20 < json.loads(out)["documents"] <= 30


def test_one_file_in_documents(tok: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(d.text for d in corpus(30)))
    code, out, _ = encode(capsys, path, tok, tmp_path / "a", "--separator", "<|endoftext|>", "--json")
    assert code == 0
    assert sum(json.loads(out)["counts"]["documents"].values()) == 30
    code, out, _ = encode(capsys, path, tok, tmp_path / "b", "--piece-bytes", "2000", "--json")
    assert sum(json.loads(out)["counts"]["documents"].values()) > 10
    code, _, err = encode(capsys, path, tok, tmp_path / "c")
    assert code == 5
    assert "--piece-bytes" in err


# apr whose first whole shard waits until a signal is there.
HELD = """
import os, select, signal, sys
from pathlib import Path
from apr.cli.main import main
replace, (reads, writes) = os.replace, os.pipe()
os.set_blocking(writes, False)
def held(a, b):
    replace(a, b)
    if Path(b).name == "shard-00000.bin" and Path(b).parent.name == "train":
        signal.set_wakeup_fd(writes)
        print("a shard", flush=True)
        select.select([reads], [], [], 300)
os.replace = held
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_says_how_to_go_on(tok: Path, tmp_path: Path) -> None:
    source = tmp_path / "big"
    source.mkdir()
    rng = random.Random(1)
    for i in range(60):
        (source / f"{i}.txt").write_text(" ".join(str(rng.random()) for _ in range(1000)))
    line = [
        sys.executable,
        "-c",
        HELD,
        "tokenize",
        "encode-corpus",
        str(source),
        "--tokenizer",
        str(tok),
    ]
    line += ["-o", str(tmp_path / "out"), "--shard-tokens", "20000", "--val-fraction", "0.2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "a shard\n" in process.stdout
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert "Go on with: apr tokenize encode-corpus" in err
    assert err.rstrip().endswith("INTERRUPTED")
    assert "Traceback" not in err
    assert not list((tmp_path / "out").glob("*/.*"))
    stopped = len(list((tmp_path / "out" / "train").glob("shard-*.bin")))
    line[1:3] = ["-m", "apr.cli.main"]
    assert subprocess.run([*line, "--resume"], env=env, capture_output=True).returncode == 0
    assert 0 < stopped < len(list((tmp_path / "out" / "train").glob("shard-*.bin")))
    assert TokenShards(tmp_path / "out" / "train").total_documents > 30


BAD: list[tuple[list[str], int, str]] = [
    ([], 2, "no command; choose one of train"),
    (["nope"], 2, "unknown command 'nope'"),
    (["train"], 2, "INPUTS"),
    (["train", "TEXT"], 2, "--output or -o is needed"),
    (["train", "nowhere", "-o", "OUT"], 3, "nowhere"),
    (["train", "TEXT", "-o", "OUT", "--vocab-size", "10"], 5, "256"),
    (["train", "TEXT", "-o", "OUT", "--val-fraction", "2"], 2, "--val-fraction"),
    (["import-hf", "nowhere", "-o", "OUT"], 3, "nowhere"),
    (["import-hf", "TOK"], 2, "--output or -o is needed"),
    (["encode-corpus", "TEXT", "-o", "OUT"], 2, "--tokenizer is needed"),
    (["encode-corpus", "TEXT", "--tokenizer", "TOK"], 2, "--output or -o is needed"),
    (["encode-corpus", "TEXT", "--tokenizer", "nowhere", "-o", "OUT"], 3, "nowhere"),
    (["encode-corpus", "TEXT", "--tokenizer", "TOK", "-o", "OUT", "--val-fraction", "1"], 2, "--val-fraction"),
    (["encode-corpus", "TEXT", "--tokenizer", "TOK", "-o", "OUT", "--workers", "0"], 2, "--workers = 0"),
    (["encode-corpus", "TEXT", "--tokenizer", "TOK", "-o", "OUT", "--widen", "x=1"], 2, "NAME=NUMBER"),
    (["encode-corpus", "TEXT/a.jsonl", "--tokenizer", "TOK", "-o", "OUT", "--content-field", "body"], 5, "body"),
    (["audit", "nowhere"], 3, "nowhere"),
    (["audit", "TEXT"], 3, "--tokenizer"),
    (["repair-manifest", "TEXT", "--tokenizer", "TOK"], 3, "shard-00000.bin"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "code", "words"), BAD, ids=[" ".join(b[0][:2]) + b[2] for b in BAD])
def test_bad_input_is_one_clear_error(
    text: Path,
    tok: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    code: int,
    words: str,
) -> None:
    put = {
        "TEXT": str(text),
        "TOK": str(tok),
        "OUT": str(tmp_path / "out"),
        "TEXT/a.jsonl": str(text / "a.jsonl"),
    }
    found, _, err = call(capsys, *[put.get(a, a) for a in args])
    assert found == code, err
    assert words in err
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "train").exists() or code == 5


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["tokenize", name, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"Example: apr tokenize {name}" in out
    assert "--json" in out
