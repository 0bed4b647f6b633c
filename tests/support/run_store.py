"""Runs as the last release made them, in tests/golden/runs: how they are made, and what `apr verify --replay` must find.

| run     | model          | what it is there for                                                                     |
|---------|----------------|------------------------------------------------------------------------------------------|
| plain   | qwen2          | random weights, biases, document masks, z-loss, clipping, two micro-batches              |
| instruct| plain's last   | answers of packed conversations, four micro-batches                                      |
| resumed | qwen3          | norms on q and k, four query heads to a key, stopped behind step 5, gone on with         |
| lora    | resumed's last | adapters on all linear maps                                                              |

made.json says when, by which commit and why they were made, what changed, and has the SHA-256 of each evidence.json. The
paths that a run wrote down lie in PLACE; checks are told where its files are now. tools/stored_runs.py makes them anew.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from apr.backends.select import choose
from apr.cli.main import COMMANDS, main
from apr.common.finding import Finding
from apr.evidence.resumed import computes_the_same
from apr.model.hf_config import to_hf
from apr.model.presets import PRESETS
from apr.verify.record import Options, Record
from apr.verify.verifier import verify
from crashing import stop_after

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "tests" / "golden" / "runs"
MADE = "made.json"
PLACE = Path("/tmp/apr-stored-runs")  # the same on every machine: the runs have paths in them
TEXT = ("adding-a-family", "adding-an-op", "adding-an-optimizer", "cuda", "generation", "golden", "index")
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|user|>", "<|assistant|>", "<|end|>")
VOCAB = 300
# Of losses and norms of the steps, and of weights and moments at states, on another processor or with other packages.
CLOSE = 2e-5
# {run: where its data and the checkpoint that it begins with lie}
DATA = {"plain": "text", "instruct": "chats", "resumed": "text", "lora": "text"}
INIT = {"instruct": "plain/ckpt/epoch-002.apr", "lora": "resumed/ckpt/epoch-002.apr"}
COMMON = {
    "device": "cpu", "threads": 1, "num-steps": 16, "eval-every": 8, "save-every": 8, "keep-states": 1,
    "ladder-mib": 1, "batch-size": 4, "seq-length": 32, "val-batches": 4, "seed": 6, "eps": 1e-6,
}  # fmt: skip
JOBS: dict[str, dict[str, Any]] = {
    "plain": {"model": "qwen2", "lr": 3e-3, "warmup-steps": 4, "micro-batch-size": 2, "z-loss": 1e-3, "mask-documents": True},
    "instruct": {"seq-length": 64, "ladder-mib": 0, "lr": 3e-3, "warmup-steps": 2, "micro-batch-size": 1, "schedule": "linear"},
    "resumed": {"model": "qwen3", "lr": 3e-3, "warmup-steps": 4, "micro-batch-size": 4, "schedule": "wsd", "grad-clip": 0.5},
    "lora": {"lr": 3e-3, "eps": 1e-5, "warmup-steps": 2, "micro-batch-size": 2, "lora-rank": 4},
}  # fmt: skip


def _apr(*args: object) -> None:
    code = main([str(a) for a in args])
    # A verdict may be SUSPECT, as of a small checkpoint that knows little.
    is_suspect = (
        code == 9 and '"verdict": "SUSPECT"' in (Path(str(args[2])) / "verdict.json").read_text()[:400]
    )
    if code and not is_suspect:
        raise SystemExit(f"apr {' '.join(map(str, args))}: exit code {code}")


def make(folder: Path) -> None:
    """Make tokenizer, data and runs in PLACE, and move what is kept to a folder."""
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir(parents=True)
    try:
        with pytest.MonkeyPatch.context() as m:
            m.setenv("APR_CACHE", str(PLACE / "cache"))
            _data()
            for name in JOBS:
                _run(name)
            chats = json.loads((PLACE / "instruct" / "config.json").read_text())["data_folders"]
            for side, place in chats.items():
                shutil.copytree(place, PLACE / "chats" / side)
        for name in ("text", "chats", *JOBS):
            shutil.copytree(PLACE / name, folder / name)
    finally:
        shutil.rmtree(PLACE, ignore_errors=True)


def replace(new: Path) -> None:
    """Put runs and data that were made anew in the place of the stored ones."""
    STORED.mkdir(parents=True, exist_ok=True)
    for part in new.iterdir():
        shutil.rmtree(STORED / part.name, ignore_errors=True)
        shutil.copytree(part, STORED / part.name)


def _data() -> None:
    """Write corpus, conversations, template, tokenizer, shards and configurations."""
    corpus = PLACE / "corpus"
    corpus.mkdir()
    for name in TEXT:
        shutil.copy(ROOT / "docs" / f"{name}.md", corpus)
    rows = [
        [{"role": "user", "content": f"What does {ask} {name} do?"}, {"role": "assistant", "content": f"{name}: {does[:40]}"}]
        for name, does in COMMANDS.items()
        for ask in ("apr", "the command", "./apr")
    ]  # fmt: skip
    (PLACE / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    (PLACE / "chat.jinja").write_text(TEMPLATE)
    special = [x for token in SPECIAL for x in ("--special-tokens", token)]
    tokenizer, shards = PLACE / "tokenizer", PLACE / "text"
    _apr("tokenize", "train", corpus, "--vocab-size", VOCAB, *special, "-o", tokenizer)
    _apr("tokenize", "encode-corpus", corpus, "--tokenizer", tokenizer, "--val-fraction", 0.3, "-o", shards)
    sizes = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, head_dim=8
    )
    for family, groups in (("qwen2", 2), ("qwen3", 1)):
        cfg = dataclasses.replace(PRESETS[f"{family}-tiny"], **sizes, num_kv_heads=groups)  # type: ignore[arg-type]
        (PLACE / f"{family}.json").write_text(json.dumps(to_hf(cfg)))


def _run(name: str) -> None:
    """Train one of the runs, to PLACE/NAME."""
    job, run = {**COMMON, **JOBS[name]}, PLACE / name
    args: list[object] = ["--run-dir", run]
    if name == "instruct":
        args += [
            "--instruct",
            PLACE / "chats.jsonl",
            "--chat-template",
            PLACE / "chat.jinja",
            "--val-fraction",
            0.3,
        ]
    else:
        args += ["--dataset", PLACE / DATA[name], "--tokenizer", PLACE / "tokenizer"]
    if name in INIT:
        args += ["--init", PLACE / INIT[name]]
    for key, value in job.items():
        if key == "model":
            value = PLACE / f"{value}.json"
        args += [f"--{key}"] if value is True else [f"--{key}", value]
    if name != "resumed":
        _apr("pretrain", *args)
        return
    with pytest.MonkeyPatch.context() as m:
        stop_after(m, 5)
        assert main(["pretrain", *map(str, args)]) == 130
    _apr("pretrain", "--resume", "--run-dir", run)


def tolerance(config: dict[str, Any]) -> float:
    """Choose what a step may differ by: nothing where processor and packages are those that the run was made with."""
    now = choose("cpu", None, 1).backend.describe()
    return 0.0 if computes_the_same(config, now, config["code_sha256"]) else CLOSE


def record(name: str, within: float | None = None) -> Record:
    """Open a stored run for `apr verify --replay`.  within: a tolerance in place of the one that follows"""
    path = STORED / name
    config = json.loads((path / "config.json").read_text())
    options = Options(
        replay=COMMON["num-steps"],
        within=COMMON["num-steps"],
        backend="reference",
        dataset=str(STORED / DATA[name]),
        init=str(STORED / INIT[name]) if name in INIT else None,
        tolerance=tolerance(config) if within is None else within,
    )
    return Record(path, options, lambda text: None)


def check(name: str) -> list[Finding]:
    """Verify a stored run, with every step replayed."""
    return list(verify(record(name)))
