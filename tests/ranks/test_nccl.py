"""Ranks that speak NCCL: the binding, who starts them, and training over a NCCL that is played on host memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from apr.checkpoints.apr2 import read_apr
from apr.cli import pretrain
from apr.cli.main import main
from apr.common.errors import RankLost, Refused, UsageError
from apr.ranks import launch, library, star
from apr.ranks.environment import PLACE, RANK, RESULT, SOURCES, STARTED
from apr.ranks.launch import start_gpus
from apr.ranks.library import Config, Library
from apr.ranks.nccl import Nccl
from apr.ranks.star import Meeting, Star
from apr.training.settings import Settings
from fake_nccl import Fake
from run_cases import place  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
JOBS = ROOT / "tests" / "support" / "rank_jobs.py"


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in {n for s in SOURCES for n in (s.rank, s.count, s.needs)} | {STARTED, RESULT, library.SHARED}:
        monkeypatch.delenv(name, raising=False)


# The binding


def test_config_keeps_what_is_not_named():
    c = Config(policy=library.ZERO_BLOCKS)
    assert (c.size, c.magic, c.version, c.policy, c.blocking, c.net) == (
        80,
        0xCAFEBEEF,
        22807,
        2,
        -(1 << 31),
        None,
    )


def test_errors_have_the_words_of_nccl():
    made = Library(Fake(None, 0, error="Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 60"))
    with pytest.raises(
        Refused, match=r"ncclCommInitRankConfig: invalid usage \(5\): Duplicate.*NCCL_MULTI_RANK_GPU_ENABLE=1"
    ):
        made.join(2, b"A" * 128, 0, Config(policy=2))


def test_a_missing_or_old_nccl_is_refused_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv(library.LIBRARY, str(tmp_path / "libnccl.so.2"))
    with pytest.raises(
        Refused, match=r"need NCCL.*cannot be loaded.*libnccl.so.2.*pip install.*nvidia-nccl-cu13"
    ):
        library.load()
    monkeypatch.delenv(library.LIBRARY)
    monkeypatch.setitem(sys.modules, "cuda", None)
    with pytest.raises(Refused, match=r"cannot be loaded.*nvidia-nccl-cu13"):
        library.load()
    source = tmp_path / "old.c"
    source.write_text(
        "int ncclGetVersion(int *v) { *v = 22809; return 0; } const char *ncclGetErrorString(int s) { return 0; }"
        "const char *ncclGetLastError(void *c) { return 0; }"
    )
    old = tmp_path / "old.so"
    if subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(old)], check=False).returncode:
        pytest.skip("no C compiler")
    monkeypatch.setenv(library.LIBRARY, str(old))
    with pytest.raises(Refused, match=r"NCCL 2.28.9 at .*old.so is too old: apr needs 2.30.4.*APR_NCCL"):
        library.load()


class Ranks:
    """Ranks in threads of one process, each with what its function returns or raises."""

    def __init__(self, count, run):
        self.found = [None] * count
        meet = threading.Barrier(count)
        slots = [None] * count

        def share_of(rank):
            def share(x):
                meet.wait(20)
                slots[rank] = x
                meet.wait(20)
                return list(slots)

            return share

        def body(rank):
            try:
                self.found[rank] = run(rank, share_of(rank))
            except Exception as e:
                self.found[rank] = e

        threads = [threading.Thread(target=body, args=(r,)) for r in range(count)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)


def attached(gpus, versions=(23004, 23004)):
    """What two ranks with these GPUs and versions of NCCL say to each other."""

    def run(rank, share):
        ranks = Nccl.__new__(Nccl)
        ranks.rank, ranks.count, ranks._share, ranks._started_by = rank, 2, share, "a test"
        ranks.share = share
        ranks._library = Library(Fake(share, rank, versions[rank]))
        Nccl.attach(ranks, None, gpus[rank])
        return ranks.words

    return Ranks(2, run).found


def test_two_ranks_on_one_gpu_are_refused_unless_asked_for(monkeypatch):
    assert attached(["GPU-a", "GPU-b"]) == ["NCCL 2.30.4, a test"] * 2
    for error in attached(["GPU-a", "GPU-a"]):
        assert isinstance(error, Refused)
        assert "ranks 0 and 1 have the same GPU (GPU-a on " in str(error)
        assert "NCCL_MULTI_RANK_GPU_ENABLE=1" in str(error)
    assert "rank 1 has NCCL 2.32.3, rank 0 2.30.4" in str(attached(["GPU-a", "GPU-b"], (23004, 23203))[0])
    monkeypatch.setenv(library.SHARED, "1")
    assert attached(["GPU-a", "GPU-a"]) == ["NCCL 2.30.4, a test"] * 2


@pytest.mark.parametrize(
    ("shown", "asked", "device"),
    [
        (None, "cuda", "cuda:1"),
        ("0,1", "auto", "cuda:1"),
        ("5", "cuda", "cuda:0"),
        ("GPU-b", "auto", "cuda:0"),
    ],
)
def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one_it_is_shown(monkeypatch, shown, asked, device):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    ranks = Nccl.__new__(Nccl)
    ranks.local, ranks.place = 2, 1
    assert ranks.device(asked) == device


# Who starts ranks, and how they find each other


@pytest.mark.parametrize(
    ("env", "host", "port", "launcher"),
    [
        ({"MASTER_ADDR": "node7", "MASTER_PORT": "29500", "WORLD_SIZE": "2"}, "node7", 29501, "torchrun"),
        (
            {"SLURM_STEP_NODELIST": "node[07-09,12],x", "SLURM_JOB_ID": "11", "SLURM_STEP_ID": "2"},
            "node07",
            20079,
            "srun",
        ),
        ({"SLURM_STEP_NODELIST": "a,b", "SLURM_JOB_ID": "11", "SLURM_STEP_ID": "2"}, "a", 20079, "srun"),
    ],
)
def test_where_rank_0_listens(env, host, port, launcher):
    found = Meeting.of(env)
    assert (found.host, found.port, found.launcher) == (host, port, launcher)
    assert found.token
    assert Meeting.of({**env, "OMPI_COMM_WORLD_SIZE": "2"} if launcher == "srun" else {}) is None


def test_a_port_that_is_none_is_refused():
    with pytest.raises(UsageError, match="MASTER_PORT=x is no port"):
        Meeting.of({"MASTER_ADDR": "a", "MASTER_PORT": "x", "WORLD_SIZE": "2"})


def test_ranks_share_objects_over_tcp_and_strangers_stay_out(tmp_path, monkeypatch):
    monkeypatch.setattr(star, "GRACE_SECONDS", 0)
    meeting, stranger_is_out = Meeting(tmp_path / "at"), threading.Event()

    def run(rank, _):
        if rank == 2:  # knows the port, but not the token
            while not meeting.file.exists():
                time.sleep(0.01)
            number = int(meeting.file.read_text().split()[0])
            stranger = Meeting(None, "127.0.0.1", number, "guessed")
            link = Star(1, 2, stranger, 60)
            with pytest.raises(RankLost, match="closed its connection"):
                link.share(None)
            stranger_is_out.set()
            return None
        if rank == 1:
            assert stranger_is_out.wait(60)
        made = Star(rank, 2, meeting, 60)
        found = [made.share({"rank": rank, "n": n, "x": np.arange(3)}) for n in range(3)]
        if rank == 1:
            made.close()
            return found
        with pytest.raises(RankLost, match="closed its connection"):
            made.share(None)
        return found

    first, second, _ = Ranks(3, run).found
    for found in (first, second):
        assert [[x["rank"] for x in every] for every in found] == [[0, 1]] * 3


class Evil:
    """What a stranger would send who has guessed the token of a launcher."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_what_a_rank_sends_is_built_and_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(star, "GRACE_SECONDS", 0)
    meeting = Meeting(tmp_path / "at")
    shared = (
        Settings(batch_size=3),
        tmp_path,
        {"x": np.arange(3), "y": np.float64(0.5), "z": [None, b"a", {1}]},
    )

    def run(rank, _):
        made = Star(rank, 2, meeting, 60)
        found = made.share(shared)[1]
        with pytest.raises(RankLost, match=r"mkdir is no value that ranks share|closed its connection"):
            made.share(Evil(tmp_path / "made") if rank else None)
        made.close()
        return found

    for settings, path, values in Ranks(2, run).found:
        assert (settings.batch_size, path, values["y"], values["z"]) == (3, tmp_path, 0.5, [None, b"a", {1}])
    assert not (tmp_path / "made").exists()


def test_a_rank_that_does_not_come_is_named(tmp_path):
    with pytest.raises(RankLost, match=r"ranks 1, 2 of 3 did not come within 0.2 s$"):
        Star(0, 3, Meeting(tmp_path / "at"), 0.2)
    with pytest.raises(RankLost, match="rank 1 found no rank 0 at"):
        Star(1, 2, Meeting(tmp_path / "none"), 0.2)


class Gpus:
    def __init__(self, count):
        self.count = count

    def gpus(self):
        return [None] * self.count


@pytest.mark.parametrize(
    ("args", "have", "words", "code"),
    [
        (["--gpus", "3"], 2, "--gpus 3: this process sees 2 GPUs", 8),
        (["--gpus", "all"], 0, "--gpus all: this process sees 0 GPUs", 8),
        (["--gpus", "x"], 2, "--gpus x is no number of GPUs", 2),
        (["--gpus", "2", "--device", "cpu"], 2, "--gpus 2 and --device cpu", 2),
        (["--gpus", "2", "--device", "cuda:1"], 2, "--gpus 2 and --device cuda:1", 2),
        (["--gpus", "2", "--ranks", "2"], 2, "give one", 2),
    ],
)
def test_gpus_that_are_not_there_are_refused(args, have, words, code, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "Driver", lambda: Gpus(have))
    monkeypatch.setattr(pretrain, "start", lambda *a: pytest.fail("started ranks"))
    assert main(["pretrain", *args]) == code
    assert words in " ".join(capsys.readouterr().err.split())


def test_gpus_inside_ranks_are_refused(monkeypatch):
    class Two:
        rank, count, words = 1, 2, "NCCL"

    with pytest.raises(UsageError, match=r"--gpus 2 starts ranks.*one of 2 already \(NCCL\)"):
        launch.check_asked(None, Two(), "2")
    monkeypatch.setenv(STARTED, "2")
    launch.check_asked(None, Two(), "2")
    launch.check_asked(None, Two(), "all")
    with pytest.raises(UsageError, match="--gpus 3"):
        launch.check_asked(None, Two(), "3")


SITE = """
import os, signal, sys, time
rank = os.environ.get("APR_RANK")
if rank is not None:
    what = os.environ["FAULT"]
    if what == "signal":
        signal.signal(signal.SIGUSR1, lambda *a: os._exit(5))
    # Under its name when it is whole, and the rank ready for a signal.
    there = os.environ["FAULT_FILE"] + rank
    with open(there + ".partial", "w") as f:
        f.write(os.environ["APR_RANKS"])
    os.replace(there + ".partial", there)
    if what == "kill" and rank == "1":
        # The other one ends by itself, and not because this one has ended.
        while not os.path.exists(os.environ["FAULT_FILE"] + "0"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "signal":
        time.sleep(600)
    os._exit(0)
"""


@pytest.mark.parametrize(("fault", "code"), [("none", 0), ("kill", None), ("signal", 5)])
def test_gpus_starts_ranks_and_passes_signals_on(fault, code, monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SITE)
    monkeypatch.setattr(launch, "load", lambda: None)
    monkeypatch.setattr(launch, "LEFT_SECONDS", 100)
    for name, value in {
        "PYTHONPATH": str(tmp_path),
        "FAULT": fault,
        "FAULT_FILE": str(tmp_path / "there"),
    }.items():
        monkeypatch.setenv(name, value)

    def interrupt():
        while not all((tmp_path / f"there{r}").exists() for r in range(2)):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    if fault == "signal":
        threading.Thread(target=interrupt).start()
    if code is None:
        with pytest.raises(RankLost, match="rank 1 ended with signal 9, and no rank said why"):
            start_gpus(2, [])
    else:
        assert start_gpus(2, []) == code
    assert [(tmp_path / f"there{r}").read_text() for r in range(2)] == ["2", "2"]


# Training


def together(count, folder, jobs, env):
    """Run jobs on `count` ranks over the fake; returns their outcomes."""
    path = folder / f"jobs-{count}.json"
    path.write_text(json.dumps(jobs))
    of_ranks = {
        STARTED: str(count),
        PLACE: str(folder / f"at-{count}"),
        RESULT: str(folder / f"code-{count}"),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(JOBS), str(path), *(["played"] if count > 1 else [])],
            env=env | (of_ranks | {RANK: str(r)} if count > 1 else {}),
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(count)
    ]
    errors = [p.communicate(timeout=240)[1] for p in processes]
    assert [p.returncode for p in processes] == [0] * count, errors[-1][-3000:]
    return json.loads(Path(f"{path}.out").read_text())


def numbers(run):
    """Everything that a run has computed: weights, moments, checkpoints, and the log but for times."""
    files = [*sorted((run / "ckpt").glob("*.apr")), *sorted((run / "ckpt" / "state").glob("*.apr"))]
    tensors = {f.name: {n: np.asarray(x).tobytes() for n, x in read_apr(f).tensors.items()} for f in files}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return tensors, [
        {k: x for k, x in line.items() if k not in ("wall_ms", "tokens_per_sec")} for line in lines
    ]


def test_ranks_over_nccl_have_the_bits_of_one_process(place, tmp_path):
    """Three micro-batches on two ranks, layers exchanged apart, and faults that gates name."""
    model = json.loads((place / "config.json").read_text())
    model |= {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3}
    (tmp_path / "model.json").write_text(json.dumps(model))
    args = [
        "--corpus",
        str(place / "corpus"),
        "--model",
        str(tmp_path / "model.json"),
        "--seq-length",
        "16",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--lr",
        "3e-3",
        "--num-steps",
        "3",
        "--steps-per-epoch",
        "3",
        "--batch-size",
        "3",
        "--micro-batch-size",
        "1",
        "--val-batches",
        "1",
        "--val-fraction",
        "0.3",
        "--spot-check",
        "-1",
        "--rank-timeout",
        "60",
    ]
    env = {**os.environ, "APR_CACHE": str(place / "cache"), "OPENBLAS_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(JOBS.parent)])

    def job(name, count, **more):
        asked = ["--gpus", "2"] if count == 2 else []
        return {"name": name, "args": [*args, *asked, "--run-dir", str(tmp_path / f"{name}-{count}")], **more}

    faults = ("another_gradient", "one_bit_of_the_weights", "a_border_off_by_one_tile")
    outcomes = together(2, tmp_path, [job("plain", 2), *(job(f, 2, fault=f) for f in faults)], env)
    assert together(1, tmp_path, [job("plain", 1)], env) == {"plain": "DONE"}
    assert outcomes["plain"] == "DONE"
    assert numbers(tmp_path / "plain-1") == numbers(tmp_path / "plain-2")
    record = json.loads((tmp_path / "plain-2" / "ranks.json").read_text())["starts"][0]
    assert record["communicator"] == "NCCL 2.30.4, started by --gpus"
    assert len(record["ranks"][0]["part"]) == 5
    for fault, gate in zip(faults, ("start.ranks", "run.ranks-equal", "before.ranks"), strict=True):
        assert f"[gate {gate}]" in outcomes[fault]
