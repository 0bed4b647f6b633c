"""How fast do several GPUs train together, what does it cost beside one, and how does that compare with a peer?

    python tools/bench_ranks.py --gpus 2 --rows qwen2.5-0.5b:16x2048,llama-7b:4x4096:recompute
    ... --peer "python tools/ddp_peer.py --peers FOLDER" --record bench/gpu/ranks.json

A row is MODEL:BATCHxSEQ of a GPU, :recompute behind it. It is measured on one GPU and on all of them, each in processes of its
own, one micro-batch a rank and step, the first of the next step asked for before the numbers of this one are read, as training
does. Ways: "overlapped" (exchange and sum of a layer beside the backward pass of those before it), "after" (behind the pass),
"none" (nothing exchanged: the sums are wrong, the time is that of the rest). "alone_ms" has what is moved and added in a step by
itself, nothing else running: the exchange of all gradients, the same in bfloat16, their sums, and the gathering of weights. A
peer is a command that takes --gpus and a row and
prints one JSON line with "ms".
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np

from apr.backends.select import choose
from apr.common.provenance import git_commit
from apr.model.buffers import Buffers
from apr.model.cost import flops_per_token, memory
from apr.model.optim import AdamW
from apr.model.params import Layout
from apr.model.presets import load_config
from apr.model.transformer import Model
from apr.ranks.communicator import Communicator
from apr.ranks.environment import PLACE, RANK, STARTED
from apr.ranks.launch import joined
from apr.ranks.library import SHARED
from apr.training.rank_memory import on_ranks
from apr.training.split import Split

WARM, LR, CHUNK = 3, 1e-5, 1 << 24
FORMAT = "apr-bench-ranks-1"
DTYPES = {"cuda": "bfloat16", "cpu": "float32"}


def parse(row: str) -> tuple[str, int, int, bool]:
    """Read MODEL:BATCHxSEQ[:recompute]."""
    name, shape, *more = row.split(":")
    batch, seq = map(int, shape.split("x"))
    return name, batch, seq, more == ["recompute"]


class Run:
    """One rank's model, optimizer and batch."""

    def __init__(self, ranks: Communicator, row: str, device: str) -> None:
        name, batch, seq, recompute = parse(row)
        self.ranks, self.be = ranks, choose(ranks.device(device)).backend
        cfg, be, dtype = load_config(name), self.be, DTYPES[device]
        layout = Layout(cfg)
        self.split = Split(ranks, be, cfg) if ranks.count > 1 else None
        make = self.split.make_buffers if self.split else Buffers
        self.model = Model(cfg, be, batch, seq, dtype, recompute=recompute, make_buffers=make)
        if self.split:
            self.split.bind(self.model)
        chunk = np.random.default_rng(0).normal(0, 0.02, CHUNK).astype(np.float32)
        for first in range(0, layout.size, CHUNK):
            part = self.model.w[first : first + CHUNK]
            be.from_host(part, chunk[: part.size])
        if self.split:
            self.split.bind(self.model)
        for flat, own in self.split.shard.runs if self.split else ():
            be.copy(self.split.shard.own[own], self.model.w[flat])
        self.opt = self.split.optimizer(self.model, AdamW) if self.split else AdamW.of(self.model)
        rng = np.random.default_rng(1)
        rows = [
            rng.integers(0, cfg.vocab_size, (batch, seq + 1)).astype(np.int32) for _ in range(ranks.count)
        ]
        self.parts = [(np.ascontiguousarray(r[:, :-1]), np.ascontiguousarray(r[:, 1:])) for r in rows]
        self.tokens = ranks.count * batch * seq
        if self.split:
            self.split.tune(self.tokens)
        else:
            self.model.tune(self.tokens)

    def gradients(self) -> None:
        """Ask for the gradients of a step."""
        if self.split:
            self.split.gradients(self.parts, 1 / self.tokens, True)
        else:
            self.be.fill(self.model.total, 0)
            self.model.micro_step(*self.parts[0], 1 / self.tokens, True, begins=True)

    def update(self) -> Any:
        """Ask for the update; returns what reads its numbers."""
        self.opt.step(LR, clear=False)
        if self.split:
            return self.split.read_later(self.model.total)
        return self.opt.read_later(self.model.total)

    def way(self, name: str) -> None:
        """Exchange in another way from now on, with the passes that were recorded for it."""
        assert self.split
        if not hasattr(self, "at"):
            self.at, self.recorded = self.split._at, dict[str, Any]()
        every = sorted(k for ks in self.at.values() for k in ks)
        late = {layer: (every if layer is None and name == "after" else []) for layer in self.at}
        self.split._at = self.at if name == "overlapped" else late
        self.model._warm, self.model._passes = self.recorded.setdefault(name, (set(), {}))

    def moves(self, count: int) -> dict[str, float]:
        """Time by themselves what a step moves and adds: median milliseconds of the slowest rank."""
        assert self.split
        split, shard, ranks, cut = self.split, self.split.shard, self.ranks, self.split.cut
        pieces = [shard.received[: ranks.count * b.each].reshape(ranks.count, b.each) for b in cut.buckets]

        def exchange(x: Any) -> None:
            with ranks.beside():
                for b, out in zip(cut.buckets, pieces, strict=True):
                    starts = [b.first + r * b.each for r in range(ranks.count)]
                    room = out.reshape(-1).view(x.dtype)[: out.size].reshape(out.shape)
                    ranks.exchange(room, x, starts, [b.each] * ranks.count)
            ranks.join()

        def add() -> None:
            for b, out in zip(cut.buckets, pieces, strict=True):
                shard._add(split.g[b.at : b.at + b.each], list(out), False)

        found = {}
        for name, f in {
            "exchange": lambda: exchange(split._moved["g"]), "exchange_of_weights_dtype": lambda: exchange(split._moved["w"]),
            "sums": add, "gather": shard.gather,
        }.items():  # fmt: skip
            times = []
            for _ in range(count):
                self.be.sync()
                ranks.share(None)
                start = time.perf_counter()
                f()
                self.be.sync()
                times.append(1e3 * (time.perf_counter() - start))
            found[name] = round(max(ranks.share(statistics.median(times))), 3)
        return found

    def steps(self, count: int) -> tuple[list[float], list[float]]:
        """Take steps: (milliseconds of each, loss of each)."""
        self.gradients()
        numbers, times, losses = self.update(), [], []
        last = None
        for _ in range(WARM + count):
            self.gradients()
            losses.append(numbers()[0] / self.tokens)
            now = time.perf_counter()
            if last is not None:
                times.append(1e3 * (now - last))
            last, numbers = now, self.update()
        losses.append(numbers()[0] / self.tokens)
        return times[WARM - 1 :], losses


def worker(a: argparse.Namespace) -> None:
    """Measure one row as one of the ranks; rank 0 prints it."""
    if a.device == "cpu":
        sys.path.insert(0, str(ROOT / "tests/support"))
        import fake_nccl

        fake_nccl.install(setattr)
    with joined() as ranks:
        run, (name, batch, seq, recompute) = Run(ranks, a.worker, a.device), parse(a.worker)
        out: dict[str, Any] = {"row": a.worker, "gpus": ranks.count, "ways": {}}
        ways = a.ways.split(",") if run.split else ["alone"]
        found: dict[str, list[Any]] = {way: [] for way in ways}
        # In rounds: a GPU is not as fast in one minute as in the next.
        for _ in range(a.rounds):
            for way in ways:
                if run.split:
                    run.way(way)
                found[way].append(run.steps(a.steps))
        for way, rounds in found.items():
            times = [t for of_round, _ in rounds for t in of_round]
            every = ranks.share(statistics.median(times))
            out["ways"][way] = {
                "ms": round(max(every), 3), "ms_of_ranks": [round(t, 2) for t in every],
                "ms_of_rounds": [round(statistics.median(of_round), 2) for of_round, _ in rounds],
                "ms_all": [round(t, 2) for t in times], "losses": rounds[0][1][:3],
            }  # fmt: skip
        used = 0
        if a.device == "cuda":
            import cupy

            free, total = cupy.cuda.runtime.memGetInfo()
            used = total - free
            # Several ranks on one GPU, as on a machine that has no more.
            used //= ranks.count if os.environ.get(SHARED) else 1
        if run.split:
            out["alone_ms"] = run.moves(a.steps)
        cfg = load_config(name)
        plan = on_ranks(
            lambda: memory(cfg, run.be, batch, seq, DTYPES[a.device], recompute=recompute),
            Layout(cfg),
            DTYPES[a.device],
            AdamW,
            ranks.count,
        )()
        best = out["ways"]["overlapped" if "overlapped" in out["ways"] else next(iter(out["ways"]))]
        out |= {
            "ms": best["ms"], "tokens_per_sec": round(run.tokens / best["ms"] * 1e3),
            "tflops_of_a_gpu": round(flops_per_token(cfg, seq) * batch * seq / best["ms"] / 1e9, 1),
            "device_gib": round(used / 2**30, 3), "planned_gib": round(plan.total / 2**30, 3),
            "communicator": ranks.words, "device": run.be.describe(),
        }  # fmt: skip
        if ranks.rank == 0:
            print(json.dumps(out), flush=True)


def measured(command: list[str], gpus: int, more: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a worker on so many ranks; returns what rank 0 prints, or why it does not."""
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, **(more or {})}
        processes = []
        for r in range(gpus):
            own = {STARTED: str(gpus), RANK: str(r), PLACE: f"{folder}/at"} if gpus > 1 else {}
            processes.append(
                subprocess.Popen(
                    command, env=env | own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                )
            )
        said = [p.communicate() for p in processes]
    lines = [line for line in said[0][0].splitlines() if line.startswith("{")]
    return dict(json.loads(lines[-1])) if lines else {"error": [e[-800:] for _, e in said]}


def alone(command: list[str], gpus: int) -> list[dict[str, Any]]:
    """Run a worker on each GPU by itself, all at the same time."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    with ThreadPoolExecutor(gpus) as pool:
        return list(pool.map(lambda gpu: measured(command, 1, {"CUDA_VISIBLE_DEVICES": gpu}), visible[:gpus]))


def main() -> None:
    """Measure the rows and write the record."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--gpus", type=int, default=2)
    p.add_argument("--rows", default="qwen2.5-0.5b:16x2048")
    p.add_argument("--steps", type=int, default=8)
    p.add_argument("--rounds", type=int, default=3, help="of all ways, one after the other")
    p.add_argument("--ways", default="overlapped,after,none")
    p.add_argument("--peer", default="")
    p.add_argument("--peer-gpus", default="1,2")
    p.add_argument("--note", default="")
    p.add_argument(
        "--device", default="cuda", choices=list(DTYPES), help="cpu: NCCL played on host memory; does it run?"
    )
    p.add_argument("--record")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.worker:
        worker(a)
        return
    record: dict[str, Any] = {"format": FORMAT, "commit": git_commit(), "note": a.note, "rows": []}
    if a.record and Path(a.record).exists():
        record["rows"] = json.loads(Path(a.record).read_text())["rows"]
    for row in a.rows.split(","):
        command = [
            sys.executable, __file__, "--worker", row, "--steps", str(a.steps), "--rounds", str(a.rounds), "--ways", a.ways,
            "--device", a.device,
        ]  # fmt: skip
        # Each GPU alone, all at once, before and after: as warm as together, and the slowest is what they wait for.
        ones, many = alone(command, a.gpus), measured(command, a.gpus)
        again = alone(command, a.gpus)
        found: dict[str, Any] = {"row": row, "alone": ones, "several": many, "alone_again": again}
        if all("ms" in x for x in (*ones, many, *again)):
            slowest = [max(x["ms"] for x in of_call) for of_call in (ones, again)]
            found["efficiency"] = round(statistics.mean(slowest) / many["ms"], 4)
        if a.peer:
            for gpus in map(int, a.peer_gpus.split(",")):
                done = subprocess.run(
                    [*shlex.split(a.peer), "--gpus", str(gpus), "--row", row],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                lines = [json.loads(x) for x in done.stdout.splitlines() if x.startswith("{")]
                found[f"peer_{gpus}"] = lines[-1] if lines else {"error": done.stderr[-600:]}
        record["rows"].append(found)
        print(json.dumps(found), flush=True)
        if a.record:
            Path(a.record).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
