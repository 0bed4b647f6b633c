"""Training steps on a GPU: tokens/s, memory, time to the first step, and time per op against its floor.

`tools/bench.py --device cuda` calls this. The floor of an op is the larger of its FLOPs at the rate of a
large matrix product and its bytes, each array once, at the rate of a large copy; both are measured first.
A peer is a command that prints JSON lines with "what", "B", "T", "ms", "tok_s" and "peak_gb".
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from apr.backends.contract import OPS
from apr.backends.select import choose
from apr.common.errors import AprError, UsageError
from apr.common.provenance import git_commit, versions
from apr.model.cost import attended, flops_per_token, matmul_rate, memory
from apr.model.lora import LINEAR, LoraConfig
from apr.model.optim import AdamW
from apr.model.presets import PRESETS
from apr.model.transformer import Model

FEWEST_CALLS = 20  # of an op in a graph that is timed
WARM = 4  # steps before the first that counts: op by op, record, replay, replay
# Arguments that are read and written; all others count once.
TWICE = {"rope": {0}, "cross_entropy": {1}, "add_rmsnorm_bwd": {0}, "adamw": {1, 2, 3}, "swiglu_again": {1}}
SMALL = {
    "embedding_fwd": {2},
    "embedding_bwd": {0},
}  # arguments of which only the rows of the batch are touched


def floor_of(name: str, args: tuple[Any, ...], window: int, flops_rate: float, bytes_rate: float) -> float:
    """Seconds that an op takes at least."""
    arrays = [(i, a) for i, a in enumerate(args) if hasattr(a, "nbytes")]
    twice = {1} if name == "linear_bwd" and args[6] else TWICE.get(name, set())
    moved = sum(a.nbytes * (2 if i in twice else 1) for i, a in arrays if i not in SMALL.get(name, ()))
    if name in SMALL:  # the rows of the table: read, or read and written in float32
        moved += args[0].nbytes if name == "embedding_fwd" else 4 * args[1].nbytes
    flops = 0.0
    if name == "linear_fwd":
        flops = 2.0 * args[1].shape[0] * args[2].shape[0] * args[2].shape[1]
    elif name == "gemm":
        flops = 2.0 * args[1].size * args[2].size / args[1].shape[0 if args[5] else 1]
    elif name == "linear_bwd":
        flops = (2.0 + 2.0 * (args[1] is not None)) * args[3].shape[0] * args[5].shape[0] * args[5].shape[1]
    elif name.startswith("attention"):
        b, t, h, d = args[2 if name.endswith("fwd") else 0].shape
        keys = attended(window, t)
        flops = (4.0 if name.endswith("fwd") else 10.0) * b * t * h * d * keys
    return max(flops / flops_rate, moved / bytes_rate)


class Clock:
    """A backend that notes the calls of its ops, and their times: those of one kind, of all layers, follow each other in a
    recorded graph, so that neither the host nor the launch of a kernel counts.
    """

    def __init__(self, backend: ModuleType, window: int, flops_rate: float, bytes_rate: float) -> None:
        self.calls: dict[str, list[Callable[[], None]]] = {}
        self.floors: dict[str, float] = {}
        self.limits, self.sound = (window, flops_rate, bytes_rate), backend
        members = {k: getattr(backend, k) for k in dir(backend) if not k.startswith("_")}
        self.backend = SimpleNamespace(
            **{k: self._noted(k, v) if self._is_op(k, v) else v for k, v in members.items()}
        )

    @staticmethod
    def _is_op(name: str, member: Any) -> bool:
        return name in ("fill", "copy") or name in OPS

    def _noted(self, name: str, f: Any) -> Any:
        def call(*args: Any) -> None:
            f(*args)
            label = self._label(name, args)
            self.calls.setdefault(label, []).append(lambda: f(*args))
            self.floors[label] = self.floors.get(label, 0.0) + floor_of(name, args, *self.limits)

        return call

    @staticmethod
    def _label(name: str, args: tuple[Any, ...]) -> str:
        if name.startswith(("adapted", "gemm")):
            rows = args[2 if name.startswith("adapted_bwd") else 0]
            return f"{name} {rows.shape[0]}x{rows.shape[1]}"
        if not name.startswith("linear"):
            return name
        x, w = (args[1], args[2]) if name == "linear_fwd" else (args[4], args[5])
        if name == "linear_bwd" and args[1] is None:
            name += " of input"
        return f"{name} {x.shape[0]}x{w.shape[0]}x{w.shape[1]}"

    def table(self, repeats: int) -> dict[str, dict[str, float]]:
        """Milliseconds of a step, by label: the median of so many replays. Arrays hold what the calls leave in them."""
        out: dict[str, dict[str, float]] = {}
        for label, calls in self.calls.items():
            many = max(1, FEWEST_CALLS // len(calls)) * calls
            ms = statistics.median(milliseconds(self.sound, many, repeats)) * len(calls) / len(many)
            out[label] = {"calls": len(calls), "ms": ms, "floor_ms": 1e3 * self.floors[label]}
        order = sorted(out.items(), key=lambda kv: kv[1]["floor_ms"] - kv[1]["ms"])
        return {k: {n: round(x, 4) for n, x in v.items()} for k, v in order}


def milliseconds(backend: ModuleType, calls: list[Callable[[], None]], repeats: int) -> list[float]:
    """Times of replays of a graph of these calls, the first one left out."""
    import cupy

    def all_of_them() -> None:
        for call in calls:
            call()

    replay, times = backend.capture(all_of_them), []
    for _ in range(1 + repeats):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end))
    return times[1:]


def copy_rate(backend: ModuleType) -> float:
    """Bytes per second, read and written, of a copy of 2 GiB."""
    x, y = (backend.empty(1 << 29, "float32") for _ in range(2))
    best = float("inf")
    for _ in range(5):
        backend.sync()
        start = time.perf_counter()
        for _ in range(10):
            backend.copy(y, x)
        backend.sync()
        best = min(best, (time.perf_counter() - start) / 10)
    return 2 * x.nbytes / best


def measure(a: argparse.Namespace) -> dict[str, Any]:
    """One process's measurement of one model and shape."""
    backend = choose("cuda").backend  # first: it says what is missing

    import cupy

    cfg = PRESETS[a.one]
    batch, seq = a.batch, a.seq
    lora = LoraConfig(a.lora, 2.0 * a.lora, tuple(LINEAR)) if a.lora else None
    again = backend.act_again and not lora
    model = Model(cfg, backend, batch, seq, a.dtype, recompute=a.recompute, act_again=again, lora=lora)
    host = np.zeros(model.layout.size, np.float32)
    model.layout.init(host, 0)
    trained: Any = model
    if model.adapters:
        trained = model.adapters
        trained.set_base(model.layout.named(host).__getitem__)
        host = np.zeros(trained.layout.size, np.float32)
        trained.layout.init(host, 0)
    opt = AdamW.of(trained)
    opt.set_weights(host)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, cfg.vocab_size, (batch, seq + 1)).astype(np.int32)
    inputs, targets = np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:])
    tuning = time.time()
    model.tune(targets.size)
    backend.sync()
    tuned = time.time()

    def step(lr: float = 1e-4, m: Model = model) -> None:
        backend.fill(m.total, 0)
        m.micro_step(inputs, targets, 1 / targets.size, a.graph, begins=True)
        opt.step(lr, clear=False)

    losses, times = [], []
    first = 0.0
    for i in range(WARM + a.steps):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        step()
        end.record()
        losses.append(float(backend.to_host(model.total)[0]) / targets.size)
        end.synchronize()
        if i == 0:
            first = time.time()
        if i >= WARM:
            times.append(cupy.cuda.get_elapsed_time(start, end))
    flops = flops_per_token(cfg, seq, lora=lora) * batch * seq
    ms = statistics.median(times)
    plan = memory(cfg, backend, batch, seq, a.dtype, recompute=a.recompute, act_again=again, lora=lora)
    free, total = cupy.cuda.runtime.memGetInfo()
    result = {
        "model": a.one, "B": batch, "T": seq, "dtype": a.dtype, "graph": a.graph, "recompute": a.recompute, "lora": a.lora,
        "ms": round(ms, 3), "ms_all": [round(t, 2) for t in times], "tok_s": round(batch * seq / ms * 1e3),
        "tflops": round(flops / ms / 1e9, 1),
        "peak_gib": round(cupy.get_default_memory_pool().total_bytes() / 2**30, 3),
        "planned_gib": round(plan.total / 2**30, 3),
        "device_gib": round((total - free) / 2**30, 3),  # the driver's part included
        "loss_first": losses[0], "loss_last": losses[-1],
        "start_to_first_step_s": round(first - a.started, 2) if a.started else None,
        "tuning_s": round(tuned - tuning, 2),
        "device": backend.describe(),
    }  # fmt: skip
    if a.ops:
        rate, copied = matmul_rate(backend, a.dtype), copy_rate(backend)
        clock = Clock(backend, cfg.sliding_window, rate, copied)
        model.be = clock.backend  # type: ignore[assignment]
        opt.be = model.be
        if model.adapters:
            model.adapters.be = model.be
        model.be.fill(model.total, 0)
        model.micro_step(inputs, targets, 1 / targets.size, False, begins=True)
        opt.step(1e-4, clear=False)
        backend.sync()
        result |= {
            "matmul_tflops": round(rate / 1e12, 1), "copy_tbs": round(copied / 1e12, 3),
            "limit_ms": round(1e3 * flops / rate, 2), "ops": clock.table(a.ops),
        }  # fmt: skip
    return result


def run_peer(command: str) -> list[dict[str, Any]]:
    """The measurements that a peer prints."""
    done = subprocess.run(shlex.split(command), capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    rows = [r for r in rows if "ms" in r]
    if not rows:
        print(
            f"{command}: exit code {done.returncode}\n{done.stdout[-500:]}{done.stderr[-1500:]}",
            file=sys.stderr,
        )
    return rows


def show(row: dict[str, Any], console: Console) -> None:
    """What a step took, and the ops by their distance from the floor."""
    adapters = f" adapters of rank {row['lora']}" if row["lora"] else ""
    console.print(
        f"{row['model']} {row['B']} x {row['T']} {row['dtype']}{' recompute' if row['recompute'] else ''}{adapters}: "
        f"{row['ms']:.2f} ms, {row['tok_s']:,} tokens/s, {row['tflops']} TFLOP/s, {row['peak_gib']:.2f} GiB allocated "
        f"({row['planned_gib']:.2f} planned, device {row['device_gib']:.2f}), loss {row['loss_first']:.3f} -> "
        f"{row['loss_last']:.3f}, first step {row['start_to_first_step_s']} s after start, tuning {row['tuning_s']} s"
    )
    if "ops" not in row:
        return
    table = Table(title=f"ops: products at {row['matmul_tflops']} TFLOP/s, copies at {row['copy_tbs']} TB/s")
    for column in ("op", "calls", "ms", "floor", "gap"):
        table.add_column(column, justify="left" if column == "op" else "right")
    for label, r in row["ops"].items():
        numbers = (r["ms"], r["floor_ms"], r["ms"] - r["floor_ms"])
        table.add_row(label, f"{r['calls']:.0f}", *(f"{x:.3f}" for x in numbers))
    sums = [sum(r[k] for r in row["ops"].values()) for k in ("ms", "floor_ms")]
    table.add_row("sum", "", f"{sums[0]:.2f}", f"{sums[1]:.2f}", f"{sums[0] - sums[1]:.2f}")
    console.print(table)


def main(a: argparse.Namespace, in_process: Callable[[list[str]], dict[str, Any]]) -> None:
    """All models and shapes, each in a process of its own, then the peers; see tools/bench.py for the options."""
    try:
        if a.one:
            print(json.dumps(measure(a)))
            return
        shapes = [tuple(map(int, shape.split("x"))) for shape in a.shapes.split(",")]
        unknown = [name for name in a.models.split(",") if name not in PRESETS]
        if unknown or any(len(shape) != 2 for shape in shapes):
            raise UsageError(f"--models {a.models} --shapes {a.shapes}: presets, and shapes such as 16x2048")
    except ValueError:
        sys.exit(f"--shapes {a.shapes}: expected shapes such as 16x2048,4x512")
    except AprError as e:
        print(f"{e.status}: {e}", file=sys.stderr)
        sys.exit(e.exit_code)
    console = Console(width=130)
    record: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "commit": git_commit(), "versions": versions(),
        "peers": a.note, "rows": [], "peer_rows": [],
    }  # fmt: skip
    for name in a.models.split(","):
        for batch, seq in shapes:
            command = [
                sys.executable, str(Path(__file__).with_name("bench.py")), "--device", "cuda", "--one", name, "--B", str(batch),
                "--T", str(seq), "--steps", str(a.steps), "--dtype", a.dtype, "--started", str(time.time()),
                "--ops", str(a.ops), "--lora", str(a.lora), *(["--recompute"] if a.recompute else []),
                *([] if a.graph else ["--no-graph"]),
            ]  # fmt: skip
            row = in_process(command)
            record["rows"].append(row)
            show(row, console)
    for command in a.peer:
        for row in run_peer(command):
            record["peer_rows"].append({"command": command, **row})
            console.print(json.dumps(row), markup=False)
    if a.record:
        old = json.loads(a.record.read_text()) if a.record.exists() else []
        a.record.parent.mkdir(parents=True, exist_ok=True)
        a.record.write_text(json.dumps([*old, record], indent=1) + "\n")
