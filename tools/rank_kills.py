"""Does a run of several ranks that is disturbed at any moment, and gone on with by another number, end like one process?

    python tools/rank_kills.py --disturbances 200 --jobs 2 --output bench/ranks.json

Runs a tiny job of `apr pretrain` as one process, undisturbed, then again and again with --ranks 2 or 3. In each process one
rank, drawn at random, is killed (SIGKILL), halted (SIGSTOP), meets an error, or finds the disk full, at a moment drawn from
its steps and what lies between; then the run goes on with another number of ranks, 1 to 3. After --each disturbances it is left
alone. Every run must end with the weights, moments, checkpoints and log of the undisturbed one, to the last bit, and every
disturbed process must end by itself, with an error. Exit code 1 when anything is not as it must be.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]

import numpy as np

from apr.checkpoints.apr2 import read_apr
from apr.common.provenance import circumstances
from crashing import TIMED, Job

KINDS = ("SIGKILL", "SIGSTOP", "error", "full disk")
# Seconds after which a process counts as hanging.
PATIENCE = 240
# Put into the processes of a run: the rank that is disturbed, and how, counted from its first step.
SITE = """
import errno, os, random, signal, threading
rank = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("APR_RANK"))
if rank is not None or "ALONE" in os.environ:
    from apr.evidence import end
    from apr.training import run
    # What takes long and has nothing to do with ranks: steps of stock models, a fresh process and pictures at the end.
    end._reload = lambda t, gates, evaluation: None
    run.FormulaChecks = lambda *args: None
    run._close = lambda folder, show: run.seal(folder.path)
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


def arguments(job: Job, run: Path, resume: bool, ranks: int) -> list[str]:
    """Of `apr pretrain`; five micro-batches a step, which no number of ranks divides."""
    if resume:
        return ["--resume", "--run-dir", str(run), "--ranks", str(ranks)]
    made = [
        *job.arguments(run, False), "--batch-size", "5", "--micro-batch-size", "1", "--val-batches", "2", "--spot-check", "-1",
        "--rank-timeout", "4", "--device", "cpu", "--keep-states", "50", "--keep-checkpoints", "0",
    ]  # fmt: skip
    return [*made, "--ranks", str(ranks)]


def start(job: Job, run: Path, ranks: int, more: dict[str, str]) -> tuple[int, str]:
    """Run a process to its end: (exit code, what it said of errors); -1 where it hangs."""
    env = {**os.environ, **more, "APR_CACHE": str(job.folder / "cache"), "OPENBLAS_NUM_THREADS": "1"}
    env |= {"ALONE": "1"} if ranks == 1 else {}
    env["PYTHONPATH"] = f"{job.folder}:{ROOT}"
    resume = (run / "config.json").exists()
    command = [sys.executable, "-m", "apr.cli.main", "pretrain", *arguments(job, run, resume, ranks)]
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=job.folder
    )
    try:
        _, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return -1, "it hangs"
    return process.returncode, err.decode(errors="replace")


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
    return counts, faults if numbers(run) == numbers(job.folder / "undisturbed") else [
        *faults,
        f"run {index}: other bits",
    ]


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--disturbances", type=int, default=200, help="in all")
    p.add_argument("--each", type=int, default=4, help="of one run, at most")
    p.add_argument("--seconds", type=float, default=3600, help="begin no run after so long")
    p.add_argument("--steps", type=int, default=24, help="steps of a run")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--jobs", type=int, default=1, help="runs at a time")
    p.add_argument("--output", type=Path, help="write a record, as JSON")
    f = p.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rank-kills-") as folder:
        job = Job(Path(folder), f.steps, 4).make()
        (job.folder / "sitecustomize.py").write_text(SITE)
        code, said = start(job, job.folder / "undisturbed", 1, {})
        if code:
            raise SystemExit(f"the undisturbed run ended with {code}: {said}")
        total, faults, runs = Counter[str](), list[str](), 0

        def one(index: int) -> None:
            nonlocal total, runs
            if total.total() - total["named"] >= f.disturbances or time.monotonic() - began > f.seconds:
                return
            counts, found = disturbed(job, index, f.seed, f.each)
            total, runs = total + counts, runs + 1
            faults.extend(found)
            seconds, count = time.monotonic() - began, total.total() - total["named"]
            print(f"{seconds:6.0f} s  {count} disturbances, {runs} runs, {found or 'equal'}", flush=True)

        with ThreadPoolExecutor(f.jobs) as pool:
            list(pool.map(one, range(f.disturbances)))
    record = {
        **circumstances(),
        "seed": f.seed,
        "steps": f.steps,
        "seconds": round(time.monotonic() - began, 1),
        "disturbances": total.total() - total["named"],
        "named_in_the_message": total.pop("named"),
        "of": dict(sorted(total.items())),
        "runs": runs,
        "faults": faults,
    }
    print(json.dumps(record, indent=1))
    if f.output:
        f.output.write_text(json.dumps(record, indent=1) + "\n")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
