"""`apr pretrain` on a small corpus: the loop, its records, resume, and what bad input gets."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from apr import backends
from apr.checkpoints.apr2 import read_apr
from apr.checkpoints.registry import open_any, open_host
from apr.cli.main import main
from apr.common import atomic
from apr.common.atomic import locked
from apr.data.batches import Windows, sequential
from apr.data.documents import Document
from apr.data.shard_writer import ShardWriter
from apr.data.shards import TokenShards
from apr.model.cost import Memory, advice
from apr.model.hf_config import to_hf
from apr.model.presets import PRESETS
from apr.model.schedule import Schedule
from apr.model.transformer import Model
from apr.tokenizer.tokenizer import Tokenizer
from apr.training.demo_job import DEMO
from apr.training.loop import Trainer
from apr.training.rundir import next_free
from apr.training.settings import Settings, from_command_line, resolve
from data_cases import put as put_documents

ROOT = Path(__file__).resolve().parents[2]
STEPS = ["--num-steps", "12", "--eval-every", "4"]
SIZES = [
    "--batch-size",
    "4",
    "--micro-batch-size",
    "2",
    "--seq-length",
    "16",
    "--val-batches",
    "4",
    "--val-fraction",
    "0.3",
]
RECIPE = ["--lr", "3e-3", "--warmup-steps", "3", *STEPS, *SIZES]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a corpus of real Python, a model's config.json, and the cache of the tokenised corpus."""
    folder = tmp_path_factory.mktemp("training")
    corpus = folder / "corpus"
    corpus.mkdir()
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for source in sorted((stdlib / "json").glob("*.py")) + sorted((stdlib / "email").glob("*.py")):
        shutil.copy(source, corpus / source.name)
    cfg = dataclasses.replace(PRESETS["llama-tiny"], vocab_size=400)
    (folder / "config.json").write_text(json.dumps(to_hf(cfg)))
    return folder


@pytest.fixture(autouse=True)
def cache(place, monkeypatch):
    monkeypatch.setenv("APR_CACHE", str(place / "cache"))


def pretrain(place, run_dir, *more, model=True):
    args = ["--corpus", str(place / "corpus"), "--model", str(place / "config.json")] if model else []
    return main(["pretrain", *args, *RECIPE, "--run-dir", str(run_dir), *map(str, more)])


def process_of(place, run_dir, *more, program=(ROOT / "tools" / "pretrain.py",)):
    """The same run as pretrain(), in a process of its own with its output in pipes."""
    args = [
        "--corpus",
        place / "corpus",
        "--model",
        place / "config.json",
        *RECIPE,
        "--run-dir",
        run_dir,
        *more,
    ]
    command = [sys.executable, *program, *args]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    """An undisturbed run."""
    path = tmp_path_factory.mktemp("run") / "a"
    with pytest.MonkeyPatch.context() as m:
        m.setenv("APR_CACHE", str(place / "cache"))
        assert pretrain(place, path) == 0
    return path


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_time(metrics):
    """What training computed: a resumed run has a spot check more."""
    timed = ("wall_ms", "tokens_per_sec")
    return [{k: v for k, v in m.items() if k not in timed} for m in metrics if "spot_check" not in m]


def state(run_dir):
    path = sorted((run_dir / "ckpt" / "state").glob("*.apr"))[-1]
    file = read_apr(path)
    timed = ("seconds", "best_flops", "gates")  # gates: their words hold such figures too
    training = {k: v for k, v in file.metadata["training"].items() if k not in timed}
    return path.name, training, {name: np.array(x) for name, x in file.tensors.items()}


def prepared(run_dir, place):
    """Folder of the tokenised corpus that a run used."""
    want = json.loads((run_dir / "config.json").read_text())["data"]["train_sha256"]
    records = (place / "cache" / "corpora").glob("*/prepared.json")
    return next(p.parent for p in records if json.loads(p.read_text())["train_sha256"] == want)


def same_state(a, b):
    (name_a, training_a, tensors_a), (name_b, training_b, tensors_b) = state(a), state(b)
    return (
        name_a == name_b
        and training_a == training_b
        and tensors_a.keys() == tensors_b.keys()
        and all(np.array_equal(tensors_a[k], tensors_b[k]) for k in tensors_a)
    )


# What a run leaves behind


def test_metrics_say_what_happened(run):
    steps = [m for m in lines(run) if "train_loss" in m]
    evals = [m for m in lines(run) if "val_loss" in m]
    schedule = Schedule("cosine", 3e-3, 3e-5, 3, 12)
    assert [m["step"] for m in steps] == list(range(1, 13))
    assert [m["lr"] for m in steps] == [schedule(i) for i in range(1, 13)]
    assert [m["tokens_seen"] for m in steps] == [64 * i for i in range(1, 13)]
    assert all(m["grad_norm"] > 0 and m["tokens_per_sec"] > 0 and m["wall_ms"] > 0 for m in steps)
    assert [m["step"] for m in evals] == [0, 4, 8, 12]
    assert all(m["val_tokens"] == 4 * 4 * 16 for m in evals)
    assert abs(evals[0]["val_loss"] - math.log(400)) < 0.1  # random weights know nothing
    assert evals[-1]["val_loss"] < evals[0]["val_loss"] - 0.1


def test_run_directory_is_complete(run):
    config = json.loads((run / "config.json").read_text())
    assert config["settings"]["lr"] == 3e-3
    assert config["settings"]["micro_batch_size"] == 2
    assert config["settings"]["lr_min"] == pytest.approx(3e-5)
    assert config["data"]["train_sha256"] != config["data"]["val_sha256"]
    assert config["versions"]["numpy"] == np.__version__
    assert (run / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert [p.name for p in sorted((run / "ckpt").glob("*.apr"))] == [f"epoch-{i:03d}.apr" for i in (1, 2, 3)]
    assert len(list((run / "ckpt" / "state").iterdir())) == 2  # --keep-states
    for epoch in (1, 2, 3):
        facts = json.loads((run / "ckpt" / f"epoch-{epoch:03d}.metadata.json").read_text())
        steps = [m for m in lines(run) if "train_loss" in m][4 * epoch - 4 : 4 * epoch]
        assert facts["train_loss"] == pytest.approx(np.mean([m["train_loss"] for m in steps]), rel=1e-12)
        assert facts["grad_norm_max"] == max(m["grad_norm"] for m in steps)
        assert facts["val_ppl"] == pytest.approx(math.exp(facts["val_loss"]))
        assert facts["tokens_seen"] == 256 * epoch
        assert len(facts["optimizer_state_sha"]) == len(facts["weights_sha"]) == 64
        assert facts["weights_sha"] == open_any(str(run / "ckpt" / f"epoch-{epoch:03d}.apr")).sha256


def test_checkpoint_gives_the_recorded_validation_loss(run, place):
    source = open_host(str(run / "ckpt" / "epoch-003.apr"))
    be = backends.get("cpu")
    model = Model(source.cfg, be, 2, 16, train=False, w=source.on(be))
    val = Windows(TokenShards(prepared(run, place) / "val", source.tokenizer), 16)
    tokens = 0
    for ids, targets in sequential(val, 2, 16):
        model.forward(ids)
        model.loss(targets)
        tokens += targets.size
    assert model.total[0] / tokens == lines(run)[-1]["val_loss"]


def test_the_held_out_side_is_never_trained_on(run, place):
    config = json.loads((run / "config.json").read_text())
    cache = prepared(run, place)
    sides = {side: np.fromfile(cache / side / "shard-00000.bin", "<u4") for side in ("train", "val")}
    eos = json.loads((cache / "train" / "manifest.json").read_text())["eos_token_id"]
    documents = {
        side: {tuple(d) for d in np.split(x, np.flatnonzero(x == eos) + 1) if len(d)}
        for side, x in sides.items()
    }
    assert documents["val"]
    assert not documents["train"] & documents["val"]
    assert config["data"]["val_tokens"] == sides["val"].size


# Equal runs


def test_two_runs_are_bit_equal_and_other_seeds_are_not(run, place, tmp_path):
    assert pretrain(place, tmp_path / "b") == 0
    assert without_time(lines(run)) == without_time(lines(tmp_path / "b"))
    assert same_state(run, tmp_path / "b")
    assert pretrain(place, tmp_path / "c", "--seed", 43) == 0
    assert not same_state(run, tmp_path / "c")
    assert without_time(lines(run))[1] != without_time(lines(tmp_path / "c"))[1]


@pytest.mark.parametrize("stop_after", [1, 3, 4, 7, 11])
def test_a_stopped_run_goes_on_bit_for_bit(run, place, tmp_path, monkeypatch, capsys, stop_after):
    step = Trainer.train_step

    def stopping(self):
        line = step(self)
        self.stop.is_asked = line["step"] == stop_after
        return line

    path = tmp_path / "b"
    with monkeypatch.context() as m:
        m.setattr(Trainer, "train_step", stopping)
        assert pretrain(place, path) == 130
    err = capsys.readouterr().err
    assert f"--resume --run-dir {path}" in err
    assert err.rstrip().endswith("INTERRUPTED")
    with (path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 99, "train_loss": 1}\n{"step": 1')  # as a crash leaves it
    assert main(["pretrain", "--resume", "--run-dir", str(path)]) == 0
    assert without_time(lines(run)) == without_time(lines(path))
    assert same_state(run, path)


def test_a_lost_data_position_is_seen(place, tmp_path, monkeypatch, capsys):
    """The fault planted: the stream starts again from its beginning after a resume."""
    from apr.data.batches import Batches

    step = Trainer.train_step

    def stopping(self):
        line = step(self)
        self.stop.is_asked = line["step"] == 3
        return line

    with monkeypatch.context() as m:
        m.setattr(Trainer, "train_step", stopping)
        assert pretrain(place, tmp_path / "b") == 130
    monkeypatch.setattr(Batches, "restore", lambda self, state: None)
    assert main(["pretrain", "--resume", "--run-dir", str(tmp_path / "b")]) == 5
    err = capsys.readouterr().err
    assert "next_batch_sha256 is" in err
    assert "gate before.resumed" in err


def test_micro_batches_do_not_change_the_result(run, place, tmp_path):
    for micro in (1, 3, 4):
        path = tmp_path / str(micro)
        assert pretrain(place, path, "--micro-batch-size", micro) == 0
        a, b = ([m["train_loss"] for m in lines(p) if "train_loss" in m] for p in (run, path))
        assert np.abs(np.subtract(a, b)).max() < 1e-4  # rounding, carried through 12 steps
        norms = [[m["grad_norm"] for m in lines(p) if "grad_norm" in m] for p in (run, path)]
        assert np.allclose(*norms, rtol=1e-3)


# tools/pretrain.py whose third step waits until a signal is there.
HELD = """
import os, select, signal, sys
from apr.cli.main import run_command
from apr.training.loop import Trainer
step, (reads, writes) = Trainer.train_step, os.pipe()
os.set_blocking(writes, False)
signal.set_wakeup_fd(writes)
def train_step(self):
    if self.progress.step == 2:
        print("the third step", flush=True)
        select.select([reads], [], [], 300)
    return step(self)
Trainer.train_step = train_step
sys.exit(run_command("pretrain", sys.argv[1:]))
"""


def test_ctrl_c_saves_and_says_how_to_go_on(run, place, tmp_path):
    """A real SIGINT to a real process in its third step; then the run is resumed and equals the undisturbed one."""
    process = process_of(place, tmp_path / "b", "--threads", _threads(run), program=["-c", HELD])
    assert "the third step\n" in process.stdout
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "apr pretrain --resume" in err
    assert len([m for m in lines(tmp_path / "b") if "train_loss" in m]) == 3
    assert main(["pretrain", "--resume", "--run-dir", str(tmp_path / "b")]) == 0
    assert same_state(run, tmp_path / "b")


def _threads(run_dir):
    return json.loads((run_dir / "config.json").read_text())["device"]["threads"]


# Ends


def test_fine_tuning_starts_from_the_checkpoint(run, place, tmp_path):
    init = run / "ckpt" / "epoch-003.apr"
    code = pretrain(place, tmp_path / "b", "--corpus", place / "corpus", "--init", init, model=False)
    assert code == 0
    assert lines(tmp_path / "b")[0]["val_loss"] == lines(run)[-1]["val_loss"]
    assert json.loads((tmp_path / "b" / "config.json").read_text())["settings"]["mode"] == "finetune"


def test_target_and_early_stop(place, tmp_path, capsys):
    assert pretrain(place, tmp_path / "a", "--target-val-loss", "100", "--min-epochs", "2") == 0
    assert capsys.readouterr().out.rstrip().endswith("TARGET_REACHED")
    assert lines(tmp_path / "a")[-1]["step"] == 8
    assert pretrain(place, tmp_path / "b", "--lr", "1e-12", "--patience", "0", "--min-epochs", "1") == 0
    assert capsys.readouterr().out.rstrip().endswith("EARLY_STOP")
    assert lines(tmp_path / "b")[-1]["step"] < 12


def held_out(run, place):
    """Options of a run on the few windows that another run holds out, 64 at once."""
    source = prepared(run, place)
    data = [
        "--dataset",
        source / "val",
        "--tokenizer",
        source / "tokenizer",
        "--model",
        place / "config.json",
    ]
    return [*data, "--batch-size", 64, "--micro-batch-size", 64]


def test_data_that_ends(place, run, tmp_path, capsys):
    args = [*held_out(run, place), "--on-exhausted", "stop", "--num-steps", 10_000, "--val-batches", 1]
    assert pretrain(place, tmp_path / "a", *args, "--eval-every", 50, model=False) == 0
    assert "cycle" in capsys.readouterr().out
    last = lines(tmp_path / "a")[-1]
    assert 0 < last["step"] < 10_000
    assert "val_loss" in last
    reached = [*args, "--eval-every", 10_000, "--min-epochs", 1, "--target-val-loss", 100]
    assert pretrain(place, tmp_path / "b", *reached, model=False) == 0
    assert json.loads((tmp_path / "b" / "verdict.json").read_text())["status"] == "TARGET_REACHED"


def test_each_pass_over_the_data_has_a_line(place, run, tmp_path, capsys):
    args = [*held_out(run, place), "--num-steps", 100, "--val-batches", 1]
    assert pretrain(place, tmp_path / "a", *args, "--eval-every", 100, model=False) == 0
    out = capsys.readouterr().out
    whole = [json.loads(x) for x in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    passes = [x for x in whole if "passes" in x]
    assert len(passes) == 2
    for number, line in enumerate(passes, 1):
        assert line["passes"] == number
        assert line["step"] == -(-number * line["windows"] // 64)  # the step that read the last window
        assert f"step {line['step']:>5}  pass {number} over the {line['windows']:,} windows" in out


def test_a_run_that_explodes_is_aborted(place, tmp_path, capsys):
    args = ["--lr", "1e30", "--grad-clip", "0", "--warmup-steps", "0"]
    assert pretrain(place, tmp_path / "a", *args) == 6
    err = capsys.readouterr().err
    assert "not finite" in err or "diverged" in err
    assert err.rstrip().endswith("ABORTED")


def test_json_is_one_document(place, tmp_path, capsys):
    assert pretrain(place, tmp_path / "a", "--json", "--sample", "def ") == 0
    d = json.loads(capsys.readouterr().out)
    assert d["status"] == "DONE"
    assert d["steps"] == 12
    assert d["sample"].startswith("def ")
    assert d["val_loss"] == lines(tmp_path / "a")[-1]["val_loss"]


def test_a_full_disk_leaves_the_previous_checkpoint_whole(place, tmp_path, monkeypatch, capsys):
    real, wrote = os.fsync, []

    def full(fd):
        name = os.readlink(f"/proc/self/fd/{fd}") if os.path.exists("/proc/self/fd") else ""
        if "epoch-002.apr" in name:
            wrote.append(name)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr(atomic.os, "fsync", full)
    assert pretrain(place, tmp_path / "a") == 7
    assert wrote
    err = capsys.readouterr().err
    assert "epoch-002.apr" in err
    assert "Traceback" not in err
    assert [p.name for p in (tmp_path / "a" / "ckpt").glob("*.apr*")] == ["epoch-001.apr"]
    assert open_any(str(tmp_path / "a" / "ckpt" / "epoch-001.apr")).cfg.vocab_size == 400
    monkeypatch.undo()
    monkeypatch.setenv("APR_CACHE", str(place / "cache"))
    assert main(["pretrain", "--resume", "--run-dir", str(tmp_path / "a")]) == 0


# Bad input


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--corpus", "no/such"], 3, "no/such"),
        (["--corpus", "EMPTY"], 5, "EMPTY"),
        (["--corpus", "LATIN1"], 5, "latin1.py: not UTF-8"),
        (["--seq-length", "65"], 5, "max_position_embeddings"),
        (["--seq-length", "64", "--corpus", "SHORT"], 5, "--seq-length"),
        (["--model", "gpt-5"], 3, "gpt-5"),
        (["--model", "UNKNOWN_KEY"], 5, "swish_limit"),
        (["--model", "BERT"], 5, "bert"),
        (["--model", "NOT_JSON"], 4, "not_json"),
        (["--init", "TRUNCATED"], 4, "truncated.apr"),
        (["--frobnicate", "1"], 2, "--frobnicate"),
        (["--lr", "0"], 2, "--lr"),
        (["--lr", "nan"], 2, "--lr"),
        (["--lr", "fast"], 2, "fast"),
        (["--batch-size", "0"], 2, "--batch-size"),
        (["--schedule", "zigzag"], 2, "zigzag"),
        (["--device", "cuda"], 8, "cuda"),
        (["--device", "cuda:3"], 8, "cuda:3"),
        (["--device", "gpu"], 8, "gpu"),
        (["--dtype", "float16"], 2, "float16"),
        (["--threads", "9999"], 2, "9999"),
        (["--dataset", "x"], 2, "--corpus"),
        (["--mode", "finetune"], 2, "--init"),
        (["--resume"], 3, "no run"),
        (["--config", "no.json"], 3, "no.json"),
        (["--config", "BAD_KEY"], 2, "learning_rate"),
        (["--config", "BAD_TYPE"], 2, "num_steps"),
        (["--run-dir", "READ_ONLY"], 7, "read-only"),
    ],
)
def test_bad_input_is_one_clear_error(place, run, tmp_path, capsys, args, code, words):
    made = _bad_inputs(place, run, tmp_path)
    args = [str(made.get(a, a)) for a in args]
    base = {"--corpus": place / "corpus", "--model": place / "config.json", "--run-dir": tmp_path / "r"}
    given = dict(zip(args[::2], args[1::2], strict=False))
    if "--init" in given:
        del base["--model"]
    if "--dataset" in given:
        base["--tokenizer"] = "x"
    line = [str(x) for k, v in base.items() if k not in given for x in (k, v)]
    assert main(["pretrain", *SIZES, *line, *args]) == code
    out, err = capsys.readouterr()
    assert words in err
    assert "Traceback" not in out + err
    assert err.count("\n") <= 2  # the message and the status word
    if code == 5:
        assert err.rstrip().endswith("REFUSED")


def _bad_inputs(place, run, folder):
    for name in ("EMPTY", "LATIN1", "SHORT"):
        (folder / name).mkdir()
    (folder / "LATIN1" / "latin1.py").write_bytes(b"x = 'caf\xe9'\n")
    for i in range(9):
        (folder / "SHORT" / f"{i}.py").write_text(f"{i}\n")
    config = json.loads((place / "config.json").read_text())
    (folder / "unknown.json").write_text(json.dumps({**config, "swish_limit": 7.0}))
    (folder / "bert.json").write_text(json.dumps({**config, "model_type": "bert"}))
    (folder / "not_json.json").write_text("{")
    (folder / "bad_key.json").write_text('{"learning_rate": 1e-3}')
    (folder / "bad_type.json").write_text('{"num_steps": "many"}')
    data = (run / "ckpt" / "epoch-001.apr").read_bytes()
    (folder / "truncated.apr").write_bytes(data[: len(data) // 20])
    (folder / "read-only").write_text("a file where a folder should be")
    return {
        "EMPTY": folder / "EMPTY",
        "LATIN1": folder / "LATIN1",
        "SHORT": folder / "SHORT",
        "UNKNOWN_KEY": folder / "unknown.json",
        "BERT": folder / "bert.json",
        "NOT_JSON": folder / "not_json.json",
        "TRUNCATED": folder / "truncated.apr",
        "BAD_KEY": folder / "bad_key.json",
        "BAD_TYPE": folder / "bad_type.json",
        "READ_ONLY": folder / "read-only",
    }


def test_shards_that_were_damaged_are_refused(run, place, tmp_path, capsys):
    source = prepared(run, place)
    shutil.copytree(source, tmp_path / "data")
    args = ["--dataset", tmp_path / "data", "--model", place / "config.json"]
    assert pretrain(place, tmp_path / "ok", *args, model=False) == 0
    shard = tmp_path / "data" / "train" / "shard-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-6])
    assert pretrain(place, tmp_path / "bad", *args, model=False) == 4
    assert "shard-00000.bin" in capsys.readouterr().err


def test_documents_are_masked_in_training_and_evaluation(place, tmp_path, capsys, monkeypatch):
    """The losses are others from the first evaluation on; what was trained evaluates the same by itself; a run that
    is resumed masks too, and every kernel was checked with masks."""
    (tmp_path / "corpus").mkdir()
    text = [
        line for p in sorted((place / "corpus").glob("*.py")) for line in p.read_text().splitlines() if line
    ]
    for i in range(400):  # documents that are shorter than a window of 16 tokens
        (tmp_path / "corpus" / f"{i}.py").write_text(text[3 * i])
    short = ["--corpus", tmp_path / "corpus", "--model", place / "config.json", "--spot-check", "4"]
    for name, more in (("p", []), ("m", ["--mask-documents"])):
        assert pretrain(place, tmp_path / name, *short, *more, model=False) == 0
    assert capsys.readouterr().out.count("spot check") == 6
    metrics = lines(tmp_path / "m")
    plain = [m["val_loss"] for m in lines(tmp_path / "p") if "val_loss" in m]
    masked = [m["val_loss"] for m in metrics if "val_loss" in m]
    assert len(plain) == len(masked)
    assert all(a != b for a, b in zip(plain, masked, strict=True))
    assert {m["spot_check"] for m in metrics if "spot_check" in m} == {"agree"}
    source = open_host(str(sorted((tmp_path / "m" / "ckpt").glob("epoch-*.apr"))[-1]))
    val = Windows(TokenShards(prepared(tmp_path / "m", place) / "val"), 16)
    be = backends.get("cpu")
    losses = []
    for end in (source.tokenizer.eos_id, None):
        model = Model(source.cfg, be, 2, 16, train=False, w=source.on(be), document_end=end)
        be.fill(model.total, 0)
        for ids, targets in sequential(val, 2, 16):
            model.forward(ids)
            model.loss(targets)
        losses.append(float(model.total[0]) / (16 * 16))
    assert losses[0] == masked[-1]
    assert losses[1] != masked[-1]
    monkeypatch.setattr(
        Trainer, "train", lambda self: (_ for _ in ()).throw(AssertionError(self.model.document_end))
    )
    (tmp_path / "m" / "evidence.json").unlink()  # it has not ended
    with pytest.raises(AssertionError, match=str(source.tokenizer.eos_id)):
        main(["pretrain", "--resume", "--run-dir", str(tmp_path / "m")])


@pytest.mark.parametrize(
    ("policy", "eos", "words"),
    [("none", True, "encoded with eos_policy none"), ("none", False, "has no end-of-text id")],
)
def test_masks_are_refused_where_no_id_ends_a_document(place, run, tmp_path, capsys, policy, eos, words):
    tokenizer = Tokenizer.from_file(prepared(run, place) / "tokenizer")
    shutil.copytree(prepared(run, place) / "tokenizer", tmp_path / "data" / "tokenizer")
    if not eos:
        raw = json.loads((tmp_path / "data" / "tokenizer" / "tokenizer.json").read_text())
        raw["added_tokens"] = []
        (tmp_path / "data" / "tokenizer" / "tokenizer.json").write_text(json.dumps(raw))
        for name in ("tokenizer_config.json", "manifest.json"):
            (tmp_path / "data" / "tokenizer" / name).unlink()
        tokenizer = Tokenizer.from_file(tmp_path / "data" / "tokenizer")
        assert tokenizer.eos_id is None
    for side in ("train", "val"):
        with ShardWriter(tmp_path / "data" / side, tokenizer, eos_policy=policy) as out:
            files = sorted((place / "corpus").glob("*.py"))[:4]
            put_documents(out, tokenizer, [Document(p.name, p.read_text()) for p in files])
    args = ["--dataset", tmp_path / "data", "--model", place / "config.json"]
    assert pretrain(place, tmp_path / "ok", *args, model=False) == 0
    capsys.readouterr()
    assert pretrain(place, tmp_path / "refused", *args, "--mask-documents", model=False) == 5
    err = capsys.readouterr().err
    assert "--mask-documents" in err
    assert words in err
    assert not (tmp_path / "refused").exists()


def test_validation_windows_are_held_out_of_a_plain_dataset(run, place, tmp_path, capsys):
    source = prepared(run, place)
    args = [
        "--dataset",
        source / "train",
        "--tokenizer",
        source / "tokenizer",
        "--model",
        place / "config.json",
    ]
    assert pretrain(place, tmp_path / "a", *args, "--val-batches", 2, model=False) == 0
    data = json.loads((tmp_path / "a" / "config.json").read_text())["data"]
    total = TokenShards(source / "train").total_tokens
    assert (
        f"{total - 8 * 16:,} tokens to train on, the last 128 of the shards held out"
        in capsys.readouterr().out
    )
    assert data["val_windows"] == 8
    assert data["train_windows"] == len(Windows(TokenShards(source / "train"), 16)) - 8


def test_a_run_directory_is_never_overwritten(run, place, capsys):
    before = without_time(lines(run))
    assert pretrain(place, run) == 5
    assert "--resume" in capsys.readouterr().err
    assert without_time(lines(run)) == before


def test_a_run_on_relative_paths_can_be_resumed(place, run, tmp_path, monkeypatch, capsys):
    shutil.copytree(prepared(run, place), tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    args = ["--dataset", "data", "--model", place / "config.json", "--num-steps", 8]
    assert pretrain(place, "a", *args, model=False) == 0
    state = sorted((tmp_path / "a" / "ckpt" / "state").glob("*.apr"))
    state[-1].unlink()  # as if it had been stopped before the last save
    assert main(["pretrain", "--resume", "--run-dir", "a"]) == 0, capsys.readouterr().err
    monkeypatch.chdir(place)
    assert main(["pretrain", "--resume", "--run-dir", str(tmp_path / "a")]) == 0


def test_two_runs_in_one_directory_are_refused(run, capsys):
    before = without_time(lines(run))
    with locked(run, "training in it"):
        assert main(["pretrain", "--resume", "--run-dir", str(run)]) == 5
        assert "another process is training in it" in capsys.readouterr().err
    assert without_time(lines(run)) == before


def test_a_resumed_run_keeps_its_settings(run, capsys):
    assert main(["pretrain", "--resume", "--run-dir", str(run), "--lr", "1"]) == 5
    assert "--lr" in capsys.readouterr().err
    assert main(["pretrain", "--resume"]) == 2


def test_a_damaged_state_is_named_and_the_one_before_it_taken(run, place, tmp_path, capsys):
    assert pretrain(place, tmp_path / "a") == 0
    before, path = sorted((tmp_path / "a" / "ckpt" / "state").iterdir())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    capsys.readouterr()
    assert main(["pretrain", "--resume", "--run-dir", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert f"{path}: footer CRC" in out
    assert f"{path.name}.damaged" in out
    assert path.with_name(path.name + ".damaged").read_bytes() == data
    assert same_state(run, tmp_path / "a")
    assert without_time(lines(run)) == without_time(lines(tmp_path / "a"))
    for left in (before, path):
        left.write_bytes(b"nothing")
    assert main(["pretrain", "--resume", "--run-dir", str(tmp_path / "a")]) == 4
    assert "no other saved state is left" in capsys.readouterr().err


# Settings


def test_no_arguments_is_the_demo_job():
    settings, _ = from_command_line([])
    assert all(getattr(settings, k) == v for k, v in DEMO.items())
    settings, _ = from_command_line(["--num-steps", "7", "--corpus", "x", "--model", "y"])
    assert settings.batch_size == Settings().batch_size


def test_a_configuration_file_gives_settings_and_flags_win(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"num-steps": 5, "lr": 1, "corpus": "x", "shuffle": false}')
    settings, explicit = from_command_line(["--config", str(path), "--num-steps", "6"])
    assert (settings.num_steps, settings.lr, settings.corpus, settings.shuffle) == (6, 1.0, "x", False)
    assert set(explicit) == {"num_steps", "lr", "corpus", "shuffle", "config"}


def test_modes_set_rate_and_warm_up_and_flags_win():
    scratch = resolve(Settings(corpus="x", model="m", num_steps=100_000))
    tuned = resolve(Settings(corpus="x", init="m", num_steps=100_000))
    assert (scratch.mode, scratch.lr, scratch.warmup_steps) == ("from-scratch", 3e-4, 1000)
    assert (tuned.mode, tuned.lr, tuned.warmup_steps) == ("finetune", 5e-5, 100)
    short = resolve(Settings(corpus="x", init="m", num_steps=50, lr=1e-3))
    assert (short.lr, short.lr_min, short.warmup_steps) == (1e-3, 1e-5, 5)


# What a first user met


def test_a_resumed_run_refuses_other_validation_data(place, tmp_path, capsys):
    assert pretrain(place, tmp_path / "a") == 0
    path = tmp_path / "a" / "config.json"
    config = json.loads(path.read_text())
    config["data"]["val_sha256"] = "0" * 64
    path.write_text(json.dumps(config))
    assert main(["pretrain", "--resume", "--run-dir", str(tmp_path / "a")]) == 5
    assert "val_sha256" in capsys.readouterr().err


def test_a_run_that_saved_nothing_leaves_its_directory_free(place, tmp_path):
    assert pretrain(place, tmp_path / "a", "--lr", "1e30", "--grad-clip", "0", "--warmup-steps", "0") == 6
    assert pretrain(place, tmp_path / "a") == 0
    assert (tmp_path / "a" / "metrics.old.jsonl").exists()
    assert lines(tmp_path / "a")[0]["step"] == 0
    (tmp_path / "a" / "config.json").unlink()  # somebody's checkpoints are never written over
    assert pretrain(place, tmp_path / "a") == 5


@pytest.mark.parametrize("join", ["\r\n", "\n", "\n\n"])
def test_one_file_without_blank_lines_is_a_corpus(place, tmp_path, join):
    text = join.join(f"line {i} is not line {i * 7 % 11}" for i in range(800))
    (tmp_path / "notes.txt").write_bytes(text.encode())
    args = ["--corpus", tmp_path / "notes.txt", "--model", place / "config.json"]
    assert pretrain(place, tmp_path / "a", *args, model=False) == 0


def test_a_run_goes_on_when_its_reader_goes_away(place, tmp_path):
    """`apr pretrain ... | head -1` must not end the training."""
    process = process_of(place, tmp_path / "b")
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=120) == 0, err
    assert lines(tmp_path / "b")[-1]["step"] == 12


def test_small_mistakes_are_answered_in_a_line(place, tmp_path, monkeypatch, capsys):
    (tmp_path / "null.json").write_text('{"num_steps": null}')
    assert pretrain(place, tmp_path / "r", "--config", tmp_path / "null.json") == 2
    assert "num_steps" in capsys.readouterr().err
    assert main(["trace", "qwen3-tiny", "--tokens", "1,2", "-o", str(tmp_path / "t"), "--seed", "-1"]) == 2
    assert main(["plan", "--model", "llama-demo", "--seq-length", "8192"]) == 5
    assert main(["plan", "--model", "llama-demo", "--seq-length", "128", "--num-steps", "-5"]) == 2
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "config").write_text("a file")
    assert next_free("config") == Path("runs/config-2")
    # Runs that begin at the same moment.
    with ThreadPoolExecutor(8) as pool:
        found = {*pool.map(lambda _: next_free("config"), range(8))}
    assert found == {Path(f"runs/config-{n}") for n in range(3, 11)}


def test_advice_names_options_with_which_a_job_fits() -> None:
    """The largest micro-batch that divides the batch; recomputation only where nothing else helps."""

    def need(batch: int, recompute: bool) -> Memory:
        return Memory(weights=10, saved=batch * (1 if recompute else 10))

    assert advice(need, [8, 4, 2, 1], 51, False) == "--micro-batch-size 4 would fit"
    assert advice(need, [8, 4, 2, 1], 19, False) == "--recompute --micro-batch-size 8 would fit"
    assert (
        advice(need, [8, 4, 2, 1], 51, True) == "--recompute --micro-batch-size 8 would fit"
    )  # asked for already
    assert advice(need, [8, 4, 2, 1], 13, True) == "--recompute --micro-batch-size 2 would fit"
    assert advice(need, [8, 4, 2, 1], 9, False) == "use a smaller --seq-length or --model"
