"""What is fuzzed: for each kind of input the sound files that variants are made of, and the reader that must withstand them.

A case is the content of a folder, {name: bytes}; the value may also be a SPECIAL, what is no plain file. A reader also
uses what it accepts (touches every tensor, encodes and decodes a line), so that what is checked late is reached.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

import data_cases
import tokenizer_cases
from apr.bisect import stored, traces
from apr.bisect.token_ids import read_ids
from apr.checkpoints.apr2 import read_apr, write_apr
from apr.checkpoints.apr2_metadata import config_to_metadata, embed_tokenizer
from apr.checkpoints.checkpoint import fill
from apr.checkpoints.gguf import write_gguf
from apr.checkpoints.gguf_reader import read_gguf
from apr.checkpoints.gguf_vocab import vocabulary_keys
from apr.checkpoints.hf import read_safetensors, write_hf, write_safetensors
from apr.checkpoints.registry import open_any
from apr.checkpoints.tensors import TensorFile
from apr.common.errors import InputNotFound, MalformedFile, UsageError
from apr.common.finding import SEVERITY
from apr.data.audit import audit
from apr.data.batches import Windows
from apr.data.repair import repair_manifest
from apr.data.shards import TokenShards
from apr.evaluation.choices import read_items
from apr.evaluation.humaneval import read_problems
from apr.evidence.gates import Gates
from apr.evidence.seal import seal
from apr.evidence.verdict import save_verdict
from apr.model.config import ModelConfig
from apr.model.hf_config import from_hf, to_hf
from apr.model.optim import AdamW  # noqa: F401 -- so that a forked worker has it already
from apr.model.params import Layout
from apr.model.presets import PRESETS, load_config
from apr.model.schedule import Schedule
from apr.report.page import render
from apr.tokenizer import import_hf as importing
from apr.tokenizer.families import FAMILIES, Family
from apr.tokenizer.tokenizer import Tokenizer
from apr.tokenizer.vocab_format import BYTE_CHARACTERS
from apr.training import demo_job, settings
from apr.training.metrics import read_lines
from apr.training.rundir import RunDir
from apr.verify.record import Options, Record
from apr.verify.verifier import verify
from mutations import mutate_file

Case = dict[str, bytes]
SPECIAL = {  # content -> what stands in the place of the file
    b"<pipe>": os.mkfifo,
    b"<folder>": os.mkdir,
    b"<device>": lambda path: os.symlink("/dev/zero", path),
    b"<circle>": lambda path: os.symlink(os.path.basename(path), path),
    b"<nothing>": lambda path: os.symlink("gone", path),
}
MIB = 1 << 20
LINE = "def f(x):\n\treturn 'caf\u00e9 \u4e2d' + x  # 123\r\n \x00<|endoftext|> ab"


def as_it_is(rng: random.Random, case: Case) -> Case:
    """Nothing to make right."""
    return case


@dataclass(frozen=True)
class Format:
    """A kind of input.

    seeds     of sound files
    read      a folder, using what it holds
    share     of all cases
    fixed     bytes of memory that reading may take whatever the size of the files
    specials  whether a file may be replaced by a SPECIAL
    mend      makes right, after a change, what would hide the checks behind the first one
    """

    name: str
    seeds: Callable[[], list[Case]]
    read: Callable[[Path], object]
    share: int
    fixed: int = 16 * MIB
    specials: bool = True
    mend: Callable[[random.Random, Case], Case] = as_it_is

    def mutate(self, rng: random.Random, case: Case, other: Case) -> Case:
        """A variant of a case: one or two files changed, rarely one replaced by what is no file."""
        out = dict(case)
        for _ in range(rng.choice((1, 1, 1, 1, 2))):
            name = rng.choice(list(out))
            if rng.random() < 0.01 and self.specials:
                out[name] = rng.choice(list(SPECIAL))
            elif rng.random() < 0.01 and len(out) > 1:
                del out[name]
            elif out[name] not in SPECIAL:
                out[name] = mutate_file(rng, name, out[name], other.get(name, case.get(name, b"")))
        return self.mend(rng, out)


def put(folder: Path, case: Case) -> int:
    """Write a case into a new folder; returns the bytes of its files."""
    folder.mkdir()
    for name, data in case.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if data in SPECIAL:
            SPECIAL[data](path)
        else:
            path.write_bytes(data)
    return sum(map(len, case.values()))


def taken(folder: Path) -> Case:
    """The case that lies in a folder."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def made(make: Callable[[Path], Any]) -> Case:
    """The case that `make` writes into a folder."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "case"
        folder.mkdir()
        make(folder)
        return taken(folder)


def touch(tensors: TensorFile) -> None:
    """Read every byte."""
    for x in tensors.values():
        assert x.view(np.uint8).sum() >= 0 if x.ndim else x.tobytes()


# Models


def small(name: str = "qwen2-tiny", **changes: Any) -> ModelConfig:
    """A preset with sizes so small that reading it takes a millisecond."""
    sizes = dict(
        vocab_size=11,
        hidden_size=6,
        intermediate_size=5,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=2,
    )
    return replace(PRESETS[name], **{**sizes, **changes})


def described(cfg: ModelConfig) -> dict[str, Any]:
    """Metadata that are the same at every run."""
    return config_to_metadata(cfg, "2026-01-01T00:00:00+00:00")


def weights(cfg: ModelConfig) -> dict[str, np.ndarray]:
    layout = Layout(cfg)
    flat = np.zeros(layout.size, np.float32)
    layout.randomise(flat, seed=7)
    return layout.named(flat)


@cache
def tokenizer_text() -> str:
    return json.dumps(tokenizer_cases.gpt2_like(), ensure_ascii=False)


def apr_seeds() -> list[Case]:
    cfg, wide = small(), small(vocab_size=300)
    full = described(wide)
    embed_tokenizer(full, tokenizer_text(), 258)
    old = {k: v for k, v in described(small("mistral-tiny")).items() if k != "hf_config"} | {
        "sliding_window": 5
    }
    kinds = {
        f"t.{d}": np.arange(3).astype(d) for d in ("float16", "float64", "int32", "int64", "int8", "uint8")
    }
    models: list[tuple[Any, Any, Any]] = [
        (described(cfg), weights(cfg), "bfloat16"),
        (full, weights(wide), "bfloat16"),
        (old, weights(small("mistral-tiny")), "float32"),
        (described(PRESETS["qwen2-tiny"]), weights(PRESETS["qwen2-tiny"]), "bfloat16"),
        ({"x": 1}, kinds | {"scalar": np.float32(1).reshape(())}, None),
    ]
    return [made(lambda f, m=m: write_apr(f / "m.apr", *m)) for m in models]


def use_model(source: str) -> None:
    """All that a command does with a checkpoint before it computes."""
    loaded = open_any(source)
    layout = Layout(loaded.cfg)
    flat = np.zeros(layout.size, np.float32)
    fill(layout, flat, loaded)
    assert loaded.sha256
    assert isinstance(loaded.named_tokens, dict)
    assert isinstance(loaded.chat_template, str | None)
    loaded.end_ids()
    if loaded.kind == "hf":
        assert all(row.err <= row.tol for row in stored.rows(source, loaded.cfg, flat))
    tokenizer = loaded.tokenizer
    if tokenizer:
        tokenizer.decode(tokenizer.encode(LINE))


def read_apr_case(folder: Path) -> None:
    touch(read_apr(folder / "m.apr").tensors)
    use_model(str(folder / "m.apr"))


def safetensors_seeds() -> list[Case]:
    kinds = {
        f"t.{d}": np.arange(4).astype(d)
        for d in ("float16", "float64", "int32", "int64", "int16", "int8", "uint8", "bool")
    }
    tensors = [
        kinds | {"scalar": np.float32(1).reshape(())},
        weights(small()),
        weights(PRESETS["qwen2-tiny"]),
    ]
    return [
        made(lambda f, t=t: write_safetensors(f / "t.safetensors", t, metadata={"a": "b"})) for t in tensors
    ]


def read_safetensors_case(folder: Path) -> None:
    touch(read_safetensors(folder / "t.safetensors"))


def gguf_seeds() -> list[Case]:
    cfg, scaled = small("mistral-tiny", vocab_size=300), small("llama3-tiny")
    wide = small("llama-tiny", vocab_size=300, hidden_size=32, intermediate_size=32)
    keys = vocabulary_keys(tokenizer_text(), "seed", 300, 258)
    models: list[tuple[Any, Any, Any, Any]] = [
        (cfg, weights(cfg), "float32", keys),
        (wide, weights(wide), "q8_0", keys),
        (scaled, weights(scaled), "bfloat16", None),
        (small("qwen3-tiny"), weights(small("qwen3-tiny")), "float16", None),
    ]
    return [made(lambda f, m=m: write_gguf(f / "m.gguf", *m)) for m in models]


def read_gguf_case(folder: Path) -> None:
    touch(read_gguf(folder / "m.gguf").tensors)
    use_model(str(folder / "m.gguf"))


def hf_seeds() -> list[Case]:
    cfg, tied = small("llama-tiny", vocab_size=300), small("llama3-tiny")
    rare = {**weights(cfg), "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(1, np.float32)}

    def with_table(folder: Path) -> None:
        write_hf(folder, cfg, weights(cfg))
        write_safetensors(folder / "model.safetensors", rare)

    return [
        made(lambda f: write_hf(f, cfg, weights(cfg), "bfloat16", tokenizer_json=tokenizer_text())),
        made(lambda f: write_hf(f, tied, weights(tied), "float32", 300)),
        made(lambda f: write_hf(f, cfg, weights(cfg), "float32", 3000, tokenizer_text())),
        made(with_table),
    ]


def read_hf_case(folder: Path) -> None:
    use_model(str(folder))


def config_seeds() -> list[Case]:
    new = to_hf(PRESETS["qwen3-tiny"]) | {"layer_types": ["full_attention"] * 2}
    new["rope_parameters"] = {"rope_theta": new.pop("rope_theta"), "rope_type": "default"}
    dicts = [*(to_hf(cfg) for name, cfg in PRESETS.items() if name.endswith("-tiny")), new]
    return [{"config.json": json.dumps(d).encode()} for d in dicts]


def read_config_case(folder: Path) -> None:
    cfg = load_config(str(folder))
    assert from_hf(to_hf(cfg)) == cfg
    assert Layout(cfg).num_parameters > 0


def ids_seeds() -> list[Case]:
    out: list[Case] = [{"ids.json": json.dumps(v).encode()} for v in ([1, 2, 3], [[1, 2], [3, 4]])]
    for array in (np.arange(6).reshape(2, 3), np.arange(5, dtype=np.uint16), np.array(["a"]), np.arange(4.0)):
        f = BytesIO()
        np.save(f, array)
        out.append({"ids.npy": f.getvalue()})
    f = BytesIO()
    np.savez_compressed(f, np.arange(1000))
    return [*out, {"ids.npy": f.getvalue()}]


def read_ids_case(folder: Path) -> None:
    name = "ids.json" if (folder / "ids.json").exists() else "ids.npy"
    read_ids(str(folder / name), PRESETS["qwen2-tiny"].vocab_size, "--tokens", lowest=0)


def trace_seeds() -> list[Case]:
    ids = np.arange(8, dtype=np.int32).reshape(2, 4)
    taps = {
        "ids": ids,
        "targets": ids,
        "loss": np.float32(1).reshape(()),
        "0.qkv": np.ones((2, 4, 3), np.float32),
    }
    facts = {"dtype": "float32", "model": "m", "model_sha256": "0", "config": json.dumps(to_hf(small()))}
    return [
        made(lambda f, t=t: write_safetensors(f / "t.safetensors", t, metadata=facts, finite=False))
        for t in (taps, taps | {"grad.model.norm.weight": np.ones(6), "ids": ids.astype(np.int64)})
    ]


def read_trace_case(folder: Path) -> None:
    path = folder / "t.safetensors"
    trace = traces.read_trace(path)
    assert trace.ids.min() >= 0
    assert trace.gradients in (True, False)
    traces.config_of(path, trace)
    traces.same_model(path, trace, "0")
    for x in trace.tensors.values():
        np.isfinite(x).all()


# Data


@cache
def data_tokenizer() -> Tokenizer:
    return Tokenizer.from_json(tokenizer_text(), "memory")


def shards_seeds() -> list[Case]:
    tokenizer, docs = data_tokenizer(), data_cases.corpus(6)
    return [
        *(
            made(lambda f, eos=eos: data_cases.write(f, tokenizer, docs, 600, eos))
            for eos in ("after", "between", "none")
        ),
        made(lambda f: (data_cases.write(f, tokenizer, docs, 900), repair_manifest(f, tokenizer))),
    ]


def mend_shards(rng: random.Random, case: Case) -> Case:
    """Mostly, the hash and size of a changed shard are made to agree in the manifest: the checks of ids come after."""
    if rng.random() < 0.2:
        return case
    try:
        d = json.loads(case["manifest.json"])
        for row in d["shards"]:
            data = case[row["name"]]
            if data not in SPECIAL and row["sha256"] != hashlib.sha256(data).hexdigest():
                row["sha256"], row["tokens"] = hashlib.sha256(data).hexdigest(), len(data) // 4
                d["total_tokens"] = sum(r["tokens"] for r in d["shards"])
        text = json.dumps(d)
    except (KeyError, TypeError, ValueError, RecursionError):
        return case
    return {**case, "manifest.json": text.encode("utf-8", "surrogatepass")}


def read_shards_case(folder: Path) -> None:
    size = sum(p.stat().st_size for p in folder.iterdir() if p.is_file())
    if os.path.lexists(folder / "manifest.json") and size % 3:
        shards = TokenShards(folder, verify=True)
        Windows(shards, 16).read(np.arange(1))
        audit({"train": folder}, data_tokenizer(), lenient=True)
    else:
        repair_manifest(folder, data_tokenizer())
        TokenShards(folder, data_tokenizer())


def tokenizer_seeds() -> list[Case]:
    config = json.dumps(
        {"eos_token": {"content": "<|endoftext|>"}, "tokenizer_class": "GPT2Tokenizer"}
    ).encode()
    out: list[Case] = [
        {"tokenizer.json": json.dumps(make(), ensure_ascii=False).encode()}
        for name, (make, _, _) in tokenizer_cases.SOUND.items()
        if "many" not in name and "wide" not in name
    ]
    rich = tokenizer_cases.gpt2_like()
    begin = FAMILIES["llama3"].steps["post_processor"]
    rich |= {
        "post_processor": json.loads(
            json.dumps(begin).replace("begin_of_text", "endoftext").replace("128000", "258")
        )
    }
    rich |= {"truncation": {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}}
    rich |= {
        "padding": {
            "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "!",
        }
    }  # fmt: skip
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    much = tokenizer_cases.fallback()
    much["decoder"] = tokenizer_cases.seq("decoders", *much["decoder"]["decoders"], strip)
    out += [{"tokenizer.json": json.dumps(d).encode()} for d in (rich, much)]
    out.append(
        {"tokenizer.json": json.dumps(tokenizer_cases.gpt2_like()).encode(), "tokenizer_config.json": config}
    )
    out.append(made(data_tokenizer().save))
    return out


def use_tokenizer(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(LINE)
    tokenizer.encode("ab a b", add_special_tokens=True)
    tokenizer.decode(ids)
    tokenizer.decode(np.arange(min(tokenizer.vocab_size, 400)), skip_special=True)
    tokenizer.check_round_trip("ab  he\u00e9\u4e2d\n")
    tokenizer.token_bytes()


def read_tokenizer_case(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(folder)
    use_tokenizer(tokenizer)
    tokenizer.save(folder / "again")
    assert Tokenizer.from_file(folder / "again").sha256 == tokenizer.sha256


def import_seeds() -> list[Case]:
    """vocab.json and merges.txt of a family that is as small as the vocabulary; and a tokenizer.json with what goes with it."""
    d = tokenizer_cases.gpt2_like()
    decoder = {"258": {"content": "<|endoftext|>", "special": True, "lstrip": False}}
    config = {"eos_token": "<|endoftext|>", "added_tokens_decoder": decoder, "chat_template": "{{ x }}"}
    merges = "#version: 0.2\n" + "\n".join(d["model"]["merges"]) + "\n"
    beside: dict[str, Any] = {
        "tokenizer_config.json": config,
        "added_tokens.json": {"<|endoftext|>": 258},
        "special_tokens_map.json": {
            "eos_token": {"content": "<|endoftext|>"},
            "additional_special_tokens": ["<|endoftext|>"],
        },
    }
    some = {name: json.dumps(v).encode() for name, v in beside.items()}
    vocab = {"vocab.json": json.dumps(d["model"]["vocab"]).encode(), "merges.txt": merges.encode()}
    return [vocab, {**vocab, **some}, {"tokenizer.json": json.dumps(d).encode(), **some}]


def read_import_case(folder: Path) -> None:
    gpt2 = FAMILIES["gpt2"]
    FAMILIES["tiny"] = Family(
        len(BYTE_CHARACTERS) + 2, {258: ("<|endoftext|>", True)}, gpt2.eos, gpt2.steps, gpt2.options
    )
    try:
        family = "tiny" if (folder / "vocab.json").exists() else None
        tokenizer = importing.import_hf(str(folder), folder / "out", family)
    finally:
        del FAMILIES["tiny"]
    use_tokenizer(tokenizer)
    Tokenizer.from_file(folder / "out")


# Runs


def settings_seeds() -> list[Case]:
    dicts: list[dict[str, Any]] = [
        demo_job.DEMO,
        dict(dataset="d", tokenizer="t", init="m.apr", lr=1, val_batches=None, shuffle=False, device="cpu"),
        {
            "num-steps": 5,
            "model": "qwen2-tiny",
            "corpus": "x",
            "widen": "max_top_share=0.6",
            "dtype": "float32",
        },
    ]
    return [{"settings.json": json.dumps(d).encode()} for d in dicts]


def read_settings_case(folder: Path) -> None:
    found = settings.read_config(folder / "settings.json")
    with contextlib.suppress(UsageError):  # which names flags
        settings.resolve(settings.Settings(**found))


def run_seeds() -> list[Case]:
    config = {"settings": demo_job.DEMO, "device": {"name": "cpu"}, "data": {"train": {"sha256": "0" * 64}}}
    lines = "".join(json.dumps({"step": i, "train_loss": 5.5, "val_loss": None}) + "\n" for i in range(4))
    return [{"config.json": json.dumps(config).encode(), "metrics.jsonl": lines.encode()}]


def read_run_case(folder: Path) -> None:
    run = RunDir(folder)
    settings.check(run.read_config()["settings"], str(folder / "config.json"))
    run.log.lines()


def record_seeds() -> list[Case]:
    """A run that was stopped after four steps, before anything was saved, as its files tell it."""
    asked = dict(model="qwen2-tiny", corpus="c", run_dir="r", num_steps=9, eval_every=2, dtype="float32")
    s = settings.resolve(settings.Settings(**asked, batch_size=2, micro_batch_size=2, seq_length=8))  # type: ignore[arg-type]
    assert s.lr and s.lr_min is not None and s.warmup_steps is not None  # noqa: PT018
    schedule = Schedule(s.schedule, s.lr, s.lr_min, s.warmup_steps, s.num_steps)
    val = {
        "val_loss": 5.5,
        "val_loss_stderr": 0.1,
        "val_bits_per_byte": 2.0,
        "val_tokens": 16,
        "wall_ms": 5.0,
    }
    lines: list[dict[str, Any]] = [{"step": 0, **val}]
    for i in range(1, 5):
        line = {"step": i, "train_loss": 5.5, "grad_norm": 1.0, "weight_norm": 3.0, "lr": schedule(i)}
        lines.append({**line, "tokens_seen": 16 * i, "wall_ms": 8.0, "tokens_per_sec": 2000.0})
        lines += [{"step": i, **val}] if i % 2 == 0 else []
    data = {
        "train_sha256": "0",
        "val_sha256": "0",
        "tokenizer_sha256": "0",
        "val_tokens": 16,
        "val_bytes": 64,
    }
    config = {
        "settings": asdict(s),
        "model": to_hf(PRESETS["qwen2-tiny"]),
        "num_parameters": 5,
        "data": {**data, "val_unigram_entropy_nats": 5.0},
        "data_folders": {"train": "gone", "val": "gone"},
        "device": {"backend": "cpu"},
    }

    def make(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        sample = {"step": 2, "prompt": "a", "text": "ab"}
        (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
        gates = Gates({})
        gates.close("not asked")
        save_verdict(folder, gates, "INTERRUPTED", 4, 5.5)
        seal(folder)

    return [made(make)]


def read_record_case(folder: Path) -> None:
    """Mostly, what was changed is sealed again: the checks behind the first one come after."""
    size = sum(p.stat().st_size for p in folder.iterdir() if p.is_file())
    if size % 5 and os.path.isfile(folder / "evidence.json"):
        seal(folder)
    for line in read_lines(folder / "metrics.jsonl", strict=False):
        assert isinstance(line["step"], int)
    try:
        record = Record(folder, Options(backend="none"), lambda text: None)
        for finding in verify(record):
            assert finding.verdict in SEVERITY
    except UsageError as e:  # which names flags, and settings
        raise MalformedFile(f"{folder}: {e}") from None
    finally:
        if size % 3 == 0:
            with contextlib.suppress(InputNotFound, MalformedFile):
                assert render(folder, settings.Settings)


def question_seeds() -> list[Case]:
    rows: list[dict[str, Any]] = [
        {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
        {"goal": "g", "sol1": "a", "sol2": "b", "label": 0},
        {"context": "c", "choices": [" a", " b"], "answer": 0},
    ]
    problem = {"task_id": "t/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f): f()\n"}
    texts = ["".join(json.dumps(row) + "\n" for row in rows).encode(), json.dumps(problem).encode()]
    return [
        {"q.jsonl": texts[0]},
        {"h.jsonl": texts[1]},
        {"q.jsonl": gzip.compress(texts[0], mtime=0)},
        {"h.jsonl": gzip.compress(texts[1] + b"\n" + b" " * (1 << 20), mtime=0)},
    ]


def read_question_case(folder: Path) -> None:
    """A file beside another one is named as well as one alone."""
    for name, read in (("q.jsonl", read_items), ("h.jsonl", read_problems)):
        if os.path.lexists(folder / name):
            assert read(str(folder / name))  # type: ignore[operator]


def clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


FORMATS = {
    f.name: f
    for f in (
        Format("apr", apr_seeds, read_apr_case, 10),
        Format("safetensors", safetensors_seeds, read_safetensors_case, 10),
        Format("hf", hf_seeds, read_hf_case, 6),
        *(
            [Format("gguf", gguf_seeds, read_gguf_case, 10)] if find_spec("gguf") else []
        ),  # written by the package gguf
        Format("config", config_seeds, read_config_case, 12),
        Format("trace", trace_seeds, read_trace_case, 6),
        Format("ids", ids_seeds, read_ids_case, 6),
        Format("shards", shards_seeds, read_shards_case, 2, 160 * MIB, mend=mend_shards),
        Format("tokenizer", tokenizer_seeds, read_tokenizer_case, 8, 48 * MIB),
        Format("import", import_seeds, read_import_case, 4, 48 * MIB),
        Format("settings", settings_seeds, read_settings_case, 6),
        Format("run", run_seeds, read_run_case, 5),
        Format("record", record_seeds, read_record_case, 6, 64 * MIB),
        Format("questions", question_seeds, read_question_case, 6),
    )
}
