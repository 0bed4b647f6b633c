"""Does a run of several ranks that is disturbed at any moment, and gone on with by another number, end like one process?

    python tools/rank_kills.py --disturbances 200 --output bench/ranks.json

Runs a tiny job of `apr pretrain` as one process, undisturbed, then again and again with --ranks 2 or 3. In each process one
rank, drawn at random, is killed (SIGKILL), halted (SIGSTOP), meets an error, or finds the disk full, at a moment drawn from
its steps and what lies between; then the run goes on with another number of ranks, 1 to 3. After --each disturbances it is left
alone. Every run must end with the weights, moments, checkpoints and log of the undisturbed one, to the last bit, and every
disturbed process must end by itself, with an error. The record is written after every run, and a later call with the same
seed goes on from it. Exit code 1 when anything is not as it must be.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]

import numpy as np

from apr.checkpoints.apr2 import read_apr
from apr.cli.main import main as apr
from apr.common.provenance import circumstances
from apr.training import run as training  # noqa: F401  # what every process that is forked needs
from crashing import TIMED, Job

KINDS = ("SIGKILL", "SIGSTOP", "error", "full disk")
# Seconds after which a process counts as hanging.
PATIENCE = 600
# Seconds of --rank-timeout where a rank is halted, and where none is: whatever else the machine does.
HALTED, OTHERWISE = 6, 240
# Put into the processes of a run: the rank that is disturbed, and how, counted from its first step.
SITE = """
import errno, os, random, signal, threading
rank = next((os.environ[n] for n in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "APR_RANK") if n in os.environ), None)
if rank is not None or "ALONE" in os.environ:
    from apr.evidence import end
    from apr.training import run
    # What takes long and has nothing to do with ranks: steps of stock models, a fresh process and pictures at the end.
    end._reload = lambda t, gates, evaluation: None
    run.FormulaChecks = lambda *args: None
    run._close = lambda folder, show, early=None: run.seal(folder.path, early)
if rank is not None and rank == os.environ.get("DISTURBED"):
    from apr.common import atomic
    from apr.common.errors import IOFailure
    from apr.model.transformer import Model
    from apr.training.loop import Trainer
    kind, moment = os.environ["KIND"], float(os.environ["MOMENT"])
    step, micro_step, written = Trainer.train_step, Model.micro_step, atomic.os.fsync
    calls = [0]

    def due(share):
        calls[0] += 1
        return calls[0] == 2 + int(moment * share)

    def train_step(self):
        calls[0] = calls[0] or 1
        return step(self)

    def failing(self, *args, **options):
        if calls[0] and kind != "full disk" and due(16):
            if kind == "error":
                raise RuntimeError("planted")
            threading.Timer(0.03 * random.random(), os.kill, (os.getpid(), getattr(signal, kind))).start()
        return micro_step(self, *args, **options)

    def full(f):
        if calls[0] and kind == "full disk" and due(6):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written(f)

    Trainer.train_step, Model.micro_step, os.fsync = train_step, failing, full
"""


def arguments(job: Job, run: Path, resume: bool, ranks: int, timeout: int) -> list[str]:
    """Of `apr pretrain`; five micro-batches a step, which no number of ranks divides."""
    more = ["--ranks", str(ranks), "--rank-timeout", str(timeout)]
    if resume:
        return ["--resume", "--run-dir", str(run), *more]
    made = [
        *job.arguments(run, False), "--batch-size", "5", "--micro-batch-size", "1", "--val-batches", "2", "--spot-check", "-1",
        "--device", "cpu", "--keep-states", "50", "--keep-checkpoints", "0",
    ]  # fmt: skip
    return [*made, *more]


def start(job: Job, run: Path, ranks: int, more: dict[str, str]) -> tuple[int, str]:
    """Run a process to its end: (exit code, what it said of errors); -1 where it hangs."""
    resume, timeout = (run / "config.json").exists(), HALTED if more.get("KIND") == "SIGSTOP" else OTHERWISE
    args, errors = arguments(job, run, resume, ranks, timeout), job.folder / "stderr"
    # A copy of this process has imported everything already; ranks do that themselves.
    if not (pid := os.fork()):
        code = 1
        try:
            nowhere, to = (
                os.open(os.devnull, os.O_WRONLY),
                os.open(errors, os.O_CREAT | os.O_TRUNC | os.O_WRONLY),
            )
            os.dup2(nowhere, 1)
            os.dup2(to, 2)
            os.chdir(job.folder)
            os.environ |= {
                **more,
                "APR_CACHE": str(job.folder / "cache"),
                "PYTHONPATH": f"{job.folder}:{ROOT}",
            }
            os.environ |= {"ALONE": "1"} if ranks == 1 else {}
            if ranks == 1:
                exec(SITE, {})
            code = apr(["pretrain", *args])
        finally:
            os._exit(code)
    end, code = time.monotonic() + PATIENCE, None
    while code is None and time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if done else None
        time.sleep(0.05)
    if code is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return -1, "it hangs"
    return code, errors.read_text(errors="replace")


def numbers(run: Path) -> tuple[dict[str, dict[str, bytes]], list[dict[str, Any]]]:
    """Read everything that a run has computed: checkpoints, the last state, and the log but for times."""
    files = [*sorted((run / "ckpt").glob("*.apr")), sorted((run / "ckpt" / "state").glob("*.apr"))[-1]]
    tensors = {f.name: {n: np.asarray(x).tobytes() for n, x in read_apr(f).tensors.items()} for f in files}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return tensors, [{k: x for k, x in line.items() if k not in TIMED["metrics"]} for line in lines]


def disturbed(job: Job, index: int, seed: int, most: int) -> tuple[Counter[str], list[str]]:
    """Disturb a run `most` times, then let it end: ({kind and rank: count}, faults)."""
    rng, run, counts, faults = (
        random.Random(f"{seed} {index}"),
        job.folder / f"run-{index}",
        Counter[str](),
        list[str](),
    )
    ranks = rng.choice((2, 3))
    for _ in range(most):
        kind, rank = rng.choice(KINDS), rng.randrange(ranks)
        rank = 0 if kind == "full disk" else rank
        more = {"DISTURBED": str(rank), "KIND": kind, "MOMENT": str(rng.random())}
        code, said = start(job, run, ranks, more)
        if code in (0, -1):
            if code:
                faults.append(f"run {index}, {kind} of rank {rank} of {ranks}: {said}")
            continue
        counts[f"{kind}, rank {rank} of {ranks}"] += 1
        counts["named"] += f"rank {rank} (" in said or (rank == 0 and code not in (10, 137))
        if "Traceback" in said and kind != "error":
            faults.append(f"run {index}, {kind} of rank {rank} of {ranks}: {said[-600:]}")
        ranks = rng.choice([n for n in (2, 3) if n != ranks])
    code, said = start(job, run, rng.choice((1, ranks)), {})
    if code:
        return counts, [*faults, f"run {index}: exit code {code}: {said[-600:]}"]
    if numbers(run) != numbers(job.folder / "undisturbed"):
        faults.append(f"run {index}: other bits")
    shutil.rmtree(run)
    return counts, faults


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--disturbances", type=int, default=200, help="in all")
    p.add_argument("--each", type=int, default=4, help="of one run, at most")
    p.add_argument("--seconds", type=float, default=3600, help="begin no run after so long")
    p.add_argument("--steps", type=int, default=24, help="steps of a run")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument(
        "--output", type=Path, help="write a record, as JSON, and go on with the one that is there"
    )
    f = p.parse_args()
    began, record = time.monotonic(), {"seed": f.seed, "steps": f.steps, "each": f.each}
    before = json.loads(f.output.read_text()) if f.output and f.output.exists() else {}
    before = before if all(before.get(k) == x for k, x in record.items()) else {}
    kept = {"seconds": 0.0, "disturbances": 0, "named_in_the_message": 0, "of": {}, "runs": 0, "faults": []}
    record = {**circumstances(), **record, **{k: before.get(k, x) for k, x in kept.items()}}
    spent = record["seconds"]
    with tempfile.TemporaryDirectory(prefix="rank-kills-") as folder:
        job = Job(Path(folder), f.steps, 4).make()
        (job.folder / "sitecustomize.py").write_text(SITE)
        code, said = start(job, job.folder / "undisturbed", 1, {})
        if code:
            raise SystemExit(f"the undisturbed run ended with {code}: {said}")
        while record["disturbances"] < f.disturbances and time.monotonic() - began < f.seconds:
            most = min(f.each, f.disturbances - record["disturbances"])
            counts, found = disturbed(job, record["runs"], f.seed, most)
            record["named_in_the_message"] += counts.pop("named", 0)
            record["of"] = dict(sorted((Counter(record["of"]) + counts).items()))
            record |= {"disturbances": sum(record["of"].values()), "runs": record["runs"] + 1}
            record |= {
                "seconds": round(spent + time.monotonic() - began, 1),
                "faults": record["faults"] + found,
            }
            print(
                f"{record['seconds']:6.0f} s  {record['disturbances']} disturbances, {found or 'equal'}",
                flush=True,
            )
            if f.output:
                f.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    return int(bool(record["faults"]))


if __name__ == "__main__":
    sys.exit(main())
