"""Every setting of `apr pretrain` reaches what it is for: two short runs that differ in it alone differ in their outcome."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sysconfig
from pathlib import Path

import pytest

from apr.checkpoints.apr2 import read_apr
from apr.checkpoints.state import sha256
from apr.cli.main import main
from apr.evidence import end as ending
from apr.model.hf_config import to_hf
from apr.model.presets import PRESETS
from apr.tokenizer.tokenizer import Tokenizer
from apr.training import run as running
from apr.training.settings import Settings
from run_cases import VOCAB, cache, place  # noqa: F401

BASE = [
    "--lr", "3e-3", "--warmup-steps", "1", "--num-steps", "3", "--eval-every", "3", "--batch-size", "4",
    "--micro-batch-size", "2", "--seq-length", "16", "--val-batches", "2", "--val-fraction", "0.3", "--seed", "42",
    "--weight-decay", "0.1", "--min-epochs", "0", "--spot-check", "-1",
]  # fmt: skip
# More than all there is.
LARGE = [
    "--corpus", "few", "--num-steps", "30", "--eval-every", "30", "--batch-size", "50", "--micro-batch-size", "50",
]  # fmt: skip
# Documents are long: all validation windows.
BORDERS = ["--seq-length", "64", "--val-batches", "500"]
# Arguments that the run is given in the place of, or beside, those of the base; and of the run that it is compared with.
OTHER = {
    "val_fraction": (["--val-fraction", "0.5"], []),
    "val_batches": (["--val-batches", "3"], []),
    "seq_length": (["--seq-length", "15"], []),
    "batch_size": (["--batch-size", "6"], []),
    "shuffle": (["--no-shuffle"], []),
    "mask_documents": (["--mask-documents", *BORDERS], BORDERS),
    "seed": (["--seed", "43"], []),
    "micro_batch_size": (["--micro-batch-size", "1"], []),
    "initializer_range": (["--initializer-range", "0.021"], []),
    "z_loss": (["--z-loss", "0.01"], []),
    "num_steps": (["--num-steps", "4"], []),
    "lr": (["--lr", "3.01e-3"], []),
    "lr_min": (["--lr-min", "1e-4"], []),
    "warmup_steps": (["--warmup-steps", "2"], []),
    "schedule": (["--schedule", "wsd"], []),
    "weight_decay": (["--weight-decay", "0.11"], []),
    "beta1": (["--beta1", "0.89"], []),
    "beta2": (["--beta2", "0.94"], []),
    "eps": (["--eps", "2e-8"], []),
    "grad_clip": (["--grad-clip", "0.9"], []),
    "eval_every": (["--eval-every", "2"], []),
    # The rate is so small that the loss does not get better: after one evaluation that is no better the run ends.
    "patience": (
        ["--patience", "0", "--lr", "1e-30", "--eval-every", "1"],
        ["--lr", "1e-30", "--eval-every", "1"],
    ),
    "min_epochs": (
        ["--min-epochs", "2", "--patience", "0", "--lr", "1e-30", "--eval-every", "1"],
        ["--patience", "0", "--lr", "1e-30", "--eval-every", "1"],
    ),
    "target_val_loss": (["--target-val-loss", "7", "--eval-every", "1"], ["--eval-every", "1"]),
    "sample": (["--sample", "import"], []),
    "bounds": (["--bounds", "speed=9"], []),
    "spot_check": (["--spot-check", "1"], []),
    "save_every": (["--save-every", "2"], []),
    "keep_states": (["--save-every", "1", "--keep-states", "3"], ["--save-every", "1"]),
    "ladder_mib": (["--save-every", "1", "--keep-states", "1"], ["--save-every", "1", "--keep-states", "1", "--ladder-mib", "0"]),
    "mode": ("init", ["--mode", "finetune"], ["--mode", "finetune", "--lr", "4e-5"]),
    "model": (["--model", "wide"], []),
    "config": (["--config", "file"], []),
    "lora_rank": ("init", ["--lora-rank", "3"], ["--lora-rank", "2"]),
    "lora_rslora": ("init", ["--lora-rank", "2", "--lora-rslora"], ["--lora-rank", "2"]),
    "lora_rank_pattern": (
        "init",
        ["--lora-rank", "2", "--lora-rank-pattern", "layers.0.*q_proj=3"],
        ["--lora-rank", "2"],
    ),
    "lora_alpha_pattern": (
        "init",
        ["--lora-rank", "2", "--lora-alpha-pattern", "gate_proj=1"],
        ["--lora-rank", "2"],
    ),
    "lora_alpha": ("init", ["--lora-rank", "2", "--lora-alpha", "5"], ["--lora-rank", "2"]),
    "lora_targets": ("init", ["--lora-rank", "2", "--lora-targets", "q,v"], ["--lora-rank", "2"]),
    "lora_modules_to_save": (
        "init", ["--lora-rank", "2", "--lora-modules-to-save", "norm"], ["--lora-rank", "2"],
    ),
    "train_embeddings": ("init", ["--lora-rank", "2", "--train-embeddings"], ["--lora-rank", "2"]),
    "lora_plus": ("init", ["--lora-rank", "2", "--lora-plus", "4"], ["--lora-rank", "2"]),
    "lora_dropout": ("init", ["--lora-rank", "2", "--lora-dropout", "0.5"], ["--lora-rank", "2"]),
    "lora_dora": ("init", ["--lora-rank", "2", "--lora-dora"], ["--lora-rank", "2"]),
    "lora_base": ("init", ["--lora-rank", "2", "--lora-base", "int8"], ["--lora-rank", "2"]),
    "lora_init": ("init", ["--lora-init", "adapter"], ["--lora-rank", "2"]),
    "init": ("init", [], ["--init", "other"]),
    "tokenizer": (["--tokenizer", "tokenizer"], []),
    "corpus": (["--corpus", "less"], []),
    "dataset": ("shards", [], ["--dataset", "other shards"]),
    "val_dataset": ("shards", ["--val-dataset", "third shards"], []),
    "on_exhausted": (["--on-exhausted", "stop", *LARGE], LARGE),
    "content_field": ("records", [], ["--content-field", "upper"]),
}  # fmt: skip
# Settings that change no number, file or line of the log of such a run, and where they are tested.
REASONS = {
    "instruct": "another kind of data: tests/data/test_instruct.py",
    "chat_template": "of instruction data: tests/data/test_instruct.py",
    "map": "keys of instruction data: tests/data/test_shapes.py",
    "mix": "several sources: tests/training/test_mixture.py",
    "preferences": "another kind of data: tests/training/test_preference_runs.py",
    "preference_loss": "of pairs: tests/model/test_preferences.py",
    "beta": "of pairs: tests/model/test_preferences.py",
    "label_smoothing": "of pairs: tests/model/test_preferences.py",
    "simpo_gamma": "of pairs: tests/model/test_preferences.py",
    "eval_tasks": "files of questions: tests/training/test_preference_runs.py",
    "eval_tasks_every": "files of questions: tests/training/test_preference_runs.py",
    "eval_tasks_limit": "files of questions: tests/training/test_preference_runs.py",
    "bos": "of tokenizers that put something before a text, as none here: tests/data/test_begins.py",
    "widen": "bounds of data that fails them: tests/data/test_guards.py",
    "dtype": "the cpu backend has one: tests/training/test_gpu_training.py",
    "recompute": "the same bits in less memory: tests/training/test_training.py",
    "graph": "the same bits, on a GPU: tests/training/test_gpu_training.py",
    "run_dir": "the folder itself",
    "device": "one device on this machine: tests/training/test_gpu_training.py",
    "threads": "the same bits on few threads: tests/backends/test_backends.py",
    "ranks": "the same bits: tests/ranks/test_ranks.py",
    "gpus": "the same bits: tests/ranks/test_nccl.py",
    "cross_check": "a gate of several ranks: tests/ranks/test_ranks.py",
    "rank_timeout": "when a rank hangs: tests/ranks/test_ranks.py",
    "resume": "the same bits: tests/training/test_training.py",
    "other_kernels": "one kind of kernels on this machine: tests/training/test_failures.py",
    "epochs": "a number of steps: tests/training/test_habits.py",
    "log": "loggers of other packages: tests/training/test_failures.py",
    "checkpoint_every": "when files are written: tests/training/test_saving.py",
    "keep_checkpoints": "files that are removed: tests/training/test_saving.py",
    "background_saves": "the same bytes: tests/training/test_saving.py",
    "json": "what is printed: tests/cli/test_commands.py",
}


@pytest.fixture(scope="module")
def made(place, tmp_path_factory):
    """Inputs that differ: a checkpoint, an adapter, shards, records, a tokenizer, a smaller corpus."""
    folder = tmp_path_factory.mktemp("made")
    names = {"corpus": str(place / "corpus"), "model": str(place / "config.json")}
    wide = dataclasses.replace(PRESETS["qwen2-tiny"], vocab_size=VOCAB, intermediate_size=80)
    (folder / "wide.json").write_text(json.dumps(to_hf(wide)))
    (folder / "file.json").write_text(json.dumps({"eps": 3e-8}))
    shutil.copytree(place / "corpus", folder / "less")
    next((folder / "less").glob("*.py")).unlink()
    sources = sorted((place / "corpus").glob("*.py"))
    (folder / "few").mkdir()
    for source in (p for p in sources if p.name in ("decoder.py", "encoder.py", "scanner.py", "message.py")):
        shutil.copy(source, folder / "few" / source.name)
    lines = [json.dumps({"text": p.read_text(), "upper": p.read_text().upper()}) for p in sources]
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("APR_CACHE", str(place / "cache"))
        assert (
            main(
                ["tokenize", "train", str(folder / "less"), "--vocab-size", "390", "-o", str(folder / "tok")]
            )
            == 0
        )
        shutil.copytree(
            Path(sysconfig.get_paths()["stdlib"]) / "unittest",
            folder / "third",
            ignore=shutil.ignore_patterns("*cache*"),
        )
        for corpus in ("corpus", "less", "third"):
            source = str(place / corpus) if corpus == "corpus" else str(folder / corpus)
            args = [
                "--tokenizer",
                str(folder / "tok"),
                "--val-fraction",
                "0.3",
                "-o",
                str(folder / f"shards-{corpus}"),
            ]
            assert main(["tokenize", "encode-corpus", source, *args]) == 0
        found = names | {
            "wide": str(folder / "wide.json"), "file": str(folder / "file.json"), "less": str(folder / "less"),
            "few": str(folder / "few"),
            "records": str(folder / "records.jsonl"), "tokenizer": str(folder / "tok"),
            "shards": str(folder / "shards-corpus"), "other shards": str(folder / "shards-less"),
            "third shards": str(folder / "shards-third"),
        }  # fmt: skip
        for name, seed in (("checkpoint", 1), ("other", 2)):
            run = folder / name
            args = ["--corpus", names["corpus"], "--model", names["model"], "--run-dir", str(run)]
            assert main(["pretrain", *BASE, *args, "--seed", str(seed)]) == 0
            found[name] = str(run / "ckpt" / "epoch-001.apr")
        args = ["--corpus", names["corpus"], "--init", found["checkpoint"], "--lora-rank", "2", "--run-dir"]
        assert main(["pretrain", *BASE, *args, str(folder / "lora")]) in (0, 9)
        found["adapter"] = str(folder / "lora" / "ckpt" / "epoch-001-adapter")
    return found


def command(made, kind, more):
    """The command line of a run of a kind, names in the place of paths."""
    sides = {
        "plain": ["--corpus", "corpus", "--model", "model"],
        "init": ["--corpus", "corpus", "--init", "checkpoint"],
        "shards": ["--dataset", "shards", "--model", "model", "--tokenizer", "tokenizer"],
        "records": ["--corpus", "records", "--model", "model"],
    }[kind]
    args = [*sides, *BASE]
    for name, *value in _pairs(more):
        if name in args and value:
            args[args.index(name) + 1] = value[0]
        else:
            if name == "--init":
                args[args.index("--corpus") : args.index("--corpus")] = []
            args += [name, *value]
    if "--lora-rank" not in more and "--mode" in more and "--lr" not in more:
        args[args.index("--lr") : args.index("--lr") + 2] = []
    return [made.get(a, a) if i and args[i - 1].startswith("--") else a for i, a in enumerate(args)]


def _pairs(args):
    rows = []
    for a in args:
        if a.startswith("--"):
            rows.append([a])
        else:
            rows[-1].append(a)
    return rows


def outcome(run):
    """Losses, weights, files and log of a run, without times, paths and config.json."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in line.items() if k not in ("wall_ms", "tokens_per_sec")} for line in lines]
    files = {str(p.relative_to(run)): "" for p in run.rglob("*.apr")}
    for name in files:
        tensors = read_apr(run / name).tensors
        files[name] = sha256(tensors[k] for k in sorted(tensors))
    samples = (run / "samples.jsonl").read_text() if (run / "samples.jsonl").exists() else ""
    v = json.loads((run / "verdict.json").read_text())
    verdict = [v["status"], v["bounds_changed"], v["steps"]]
    return json.dumps(
        [timeless, files, hashlib.sha256(samples.encode()).hexdigest(), verdict], sort_keys=True
    )


@pytest.fixture(scope="module")
def known():
    """{command line: outcome} of runs that several settings are compared with."""
    return {}


def run_once(made, known, kind, more, folder, monkeypatch):
    args = command(made, kind, more)
    if tuple(args) not in known:
        # What comes after the last step is not asked here.
        monkeypatch.setattr(ending, "in_fresh_process", lambda run, *a: (0.0, ""))
        monkeypatch.setattr(running, "_close", lambda *a: None)
        assert main(["pretrain", *args, "--run-dir", str(folder)]) in (0, 6, 9)
        known[tuple(args)] = outcome(folder)
    return known[tuple(args)]


def test_every_setting_is_here():
    names = {f.name for f in dataclasses.fields(Settings)}
    assert set(OTHER) | set(REASONS) == names
    assert not set(OTHER) & set(REASONS)


@pytest.mark.parametrize("name", OTHER)
def test_a_setting_makes_a_difference(made, known, tmp_path, monkeypatch, name):
    kind, one, two = OTHER[name] if len(OTHER[name]) == 3 else ("plain", *OTHER[name])
    first = run_once(made, known, kind, one, tmp_path / "one", monkeypatch)
    second = run_once(made, known, kind, two, tmp_path / "two", monkeypatch)
    assert first != second


def test_the_same_settings_make_none(made, known, tmp_path, monkeypatch):
    first = run_once(made, {}, "plain", [], tmp_path / "one", monkeypatch)
    assert first == run_once(made, {}, "plain", [], tmp_path / "two", monkeypatch)
    assert Tokenizer.from_file(made["tokenizer"]).vocab_size
