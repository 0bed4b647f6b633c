"""How fast is a training step, where does its time go, and how does that compare with a peer?

    python tools/bench.py                                   steps and ops of two models on this machine
    python tools/bench.py --peer "python cpu_peer.py"       the same, a peer measured in the same run
    python tools/bench.py --dtype float32,bfloat16          both, in turn
    python tools/bench.py --record bench/cpu.json           add the result to a record, with --note for
                                                            the versions of the peers
    python tools/bench.py --device cuda --models qwen2.5-0.5b --shapes 16x2048,4x512 --ops 1
                                                            on a GPU, see bench_cuda.py

Every measurement is a process of its own, so that its peak memory is its own; apr and peers take
turns, and medians over the rounds are reported. A record is written after each round: one that is cut off
counts as far as it came. A peer is a command that takes `--model NAME --B 8
--T 256` and prints one JSON line with "ms" (median of its steps) and "rss_gb" (peak, GiB); a
command given with `--compile` appended is a second peer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
from rich.console import Console
from rich.table import Table

from apr import backends
from apr.common.host import cores, cpu_name
from apr.common.provenance import git_commit, versions
from apr.model.cost import flops_per_token, matmul_rate
from apr.model.optim import AdamW
from apr.model.presets import PRESETS
from apr.model.transformer import Model

PRESET = {"3m": "qwen2-3m", "15m": "qwen2-15m"}  # the sizes of the peer script
WARM = 2  # steps before the first that counts


def timed(backend: ModuleType, times: dict[str, float]) -> Any:
    """The backend with every op adding its seconds to times["op (N,M)"]."""

    def wrap(name: str, f: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            out = f(*args)
            backend.sync()
            key = f"{name} {_shape(args)}" if name.startswith("linear") else name
            times[key] = times.get(key, 0) + time.perf_counter() - start
            return out

        return call

    members = {name: getattr(backend, name) for name in dir(backend) if not name.startswith("_")}
    return SimpleNamespace(**{k: wrap(k, v) if callable(v) else v for k, v in members.items()})


def _shape(args: tuple[Any, ...]) -> str:
    """(N, I, O) of a linear map, forward or backward."""
    y, x, w = (
        (args[0], args[1], args[2])
        if args[2] is not None and args[2].ndim == 2
        else (args[3], args[4], args[5])
    )
    return f"({len(y)},{x.shape[1]},{w.shape[0]})"


def measure_step(
    preset: str, dtype: str, batch: int, seq: int, steps: int, threads: int, ops: bool
) -> dict[str, Any]:
    """One process's measurement: median step time, tokens/s, FLOP/s, peak memory, time per op."""
    backend = backends.get("cpu")
    backend.set_threads(threads)
    rate = matmul_rate(backend, dtype)
    cfg, times = PRESETS[preset], dict[str, float]()
    model = Model(cfg, timed(backend, times) if ops else backend, batch, seq, dtype)
    opt = AdamW.of(model, weight_decay=0.01)
    host = np.zeros(model.layout.size, np.float32)
    model.layout.init(host, 0)
    opt.set_weights(host)
    ids = np.random.default_rng(0).integers(0, cfg.vocab_size, (batch, seq + 1)).astype(np.int32)
    inputs, targets = ids[:, :-1], np.ascontiguousarray(ids[:, 1:])
    seconds = []
    for i in range(WARM + steps):
        if i == WARM:
            times.clear()
        start = time.perf_counter()
        backend.fill(model.total, 0)
        model.forward(inputs)
        model.loss(targets, 1 / targets.size)
        model.backward()
        opt.step(1e-4)
        loss = float(model.total[0]) / targets.size
        seconds.append(time.perf_counter() - start)
    step = statistics.median(seconds[WARM:])
    flops = flops_per_token(cfg, seq) * batch * seq
    return {
        "ms": 1e3 * step,
        "tokens_per_sec": batch * seq / step,
        "gflops": flops / step / 1e9,
        "matmul_gflops": rate / 1e9,
        "limit_ms": 1e3 * flops / rate,
        "rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "loss": loss,
        **({} if dtype == "float32" else {"products": backend.describe()["products"]}),
        "ops_ms": {k: 1e3 * v / steps for k, v in sorted(times.items(), key=lambda kv: -kv[1])},
    }


def in_process(command: list[str]) -> dict[str, Any]:
    """The last JSON line that a command prints. A peer, in an environment of its own, gets none of our folders."""
    own = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])] if command[0] == sys.executable else []
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(own)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    found = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not found:
        print(f"{shlex.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}", file=sys.stderr)
        sys.exit(done.returncode or 1)
    return json.loads(found[-1])


def median_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the numbers in several measurements."""
    keys = [k for k, v in runs[0].items() if isinstance(v, int | float) and not isinstance(v, bool)]
    return {k: round(statistics.median(r[k] for r in runs), 3) for k in keys}


def compare(a: argparse.Namespace, name: str, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """apr and the peers in turn, a.rounds times; keep gets the row after each round."""
    size = ["--B", str(a.batch), "--T", str(a.seq)]
    own = [
        sys.executable,
        __file__,
        "--one",
        name,
        *size,
        "--steps",
        str(a.steps),
        "--threads",
        str(a.threads),
    ]
    commands = {
        "apr" if dtype == "float32" else f"apr {dtype}": [*own, "--dtype", dtype]
        for dtype in a.dtype.split(",")
    }
    for peer in a.peer:
        words = shlex.split(peer)
        script = max(i for i, word in enumerate(words) if not word.startswith("-"))
        who = " ".join([Path(words[script]).stem, *words[script + 1 :]])
        if not a.compiled_only:
            commands[who] = [*words, "--model", name, *size]
        commands[who + " --compile"] = [*words, "--model", name, *size, "--compile"]
    runs: dict[str, list[dict[str, Any]]] = {who: [] for who in commands}
    row: dict[str, Any] = {"model": name, "batch": a.batch, "seq": a.seq}
    for i in range(a.rounds):
        for who, command in commands.items():
            runs[who].append(in_process(command))
            print(f"{name}, round {i + 1} of {a.rounds}: {who} {runs[who][-1]['ms']:.1f} ms", flush=True)
        row |= {"rounds": i + 1, "results": {who: median_of(r) for who, r in runs.items()}}
        keep(row)
    for who, command in commands.items():
        if who.startswith("apr"):
            timed_apart = in_process([*command, "--ops", "1"])
            row["results"][who] |= {k: timed_apart[k] for k in ("products", "ops_ms") if k in timed_apart}
    keep(row)
    return row


def show(row: dict[str, Any], console: Console) -> None:
    """A table of who took how long, and one of the ops."""
    results = row["results"]
    own = next(iter(results.values()))
    table = Table(
        title=f"{row['model']}: one optimizer step of {row['batch']} x {row['seq']} tokens", min_width=72
    )
    for column in ("who", "ms", "tokens/s", "peak GiB", "times the first"):
        table.add_column(column, justify="left" if column == "who" else "right")
    tokens = row["batch"] * row["seq"]
    for who, r in results.items():
        table.add_row(
            who,
            f"{r['ms']:.1f}",
            f"{tokens / r['ms'] * 1e3:,.0f}",
            f"{r['rss_gb']:.2f}",
            f"{r['ms'] / own['ms']:.2f}",
        )
    for who, r in results.items():
        if "limit_ms" in r:
            limit = f"limit of {who}: all FLOPs at matmul rate"
            table.add_row(limit, f"{r['limit_ms']:.1f}", f"{tokens / r['limit_ms'] * 1e3:,.0f}", "",
                          f"{r['limit_ms'] / own['ms']:.2f}")  # fmt: skip
    console.print(table)
    for who, r in results.items():
        if "ops_ms" not in r:
            continue
        ops = Table(title=f"{who}: time per op in a step, timed one by one", min_width=72)
        ops.add_column("op")
        ops.add_column("ms", justify="right")
        for name, ms in list(r["ops_ms"].items())[:14]:
            ops.add_row(name, f"{ms:.2f}")
        console.print(ops)


def main() -> None:
    """Parse and call."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--models", help="comma-separated: names of PRESET on the cpu (3m,15m), presets on cuda")
    p.add_argument("--batch", "--B", type=int, default=8)
    p.add_argument("--seq", "--T", type=int, default=256)
    p.add_argument("--steps", type=int, default=9, help="steps that count, in each process")
    p.add_argument("--rounds", type=int, default=3, help="processes for each of apr and the peers")
    p.add_argument("--threads", type=int, default=cores())
    p.add_argument(
        "--lora", type=int, default=0, help="with --device cuda: train adapters of this rank on all maps"
    )
    p.add_argument(
        "--dtype", help="float32 or bfloat16; on the cpu also both, with a comma (float32; bfloat16 on cuda)"
    )
    p.add_argument("--peer", action="append", default=[], help="command of a peer; may be repeated")
    p.add_argument(
        "--compiled-only", action="store_true", help="peers with --compile alone, which takes less time"
    )
    p.add_argument("--note", default="", help="what the peers are, for the record: their versions")
    p.add_argument("--record", type=Path, help="JSON file to add the result to")
    p.add_argument("--one", help=argparse.SUPPRESS)  # one measurement in this process
    p.add_argument("--ops", type=int, default=0, help="on cuda: also steps timed op by op")
    cuda = p.add_argument_group("with --device cuda")
    cuda.add_argument("--shapes", default="16x2048,4x512", help="BATCHxTOKENS, comma-separated")
    cuda.add_argument("--recompute", action="store_true")
    cuda.add_argument("--no-graph", dest="graph", action="store_false")
    cuda.add_argument("--started", type=float, default=0.0, help=argparse.SUPPRESS)
    a = p.parse_args()
    a.models = a.models or ("3m,15m" if a.device == "cpu" else "qwen2.5-0.5b")
    a.dtype = a.dtype or ("float32" if a.device == "cpu" else "bfloat16")
    kinds = a.dtype.split(",")
    if not set(kinds) <= {"float32", "bfloat16"} or (len(kinds) > 1 and a.device == "cuda"):
        p.error(f"--dtype {a.dtype}: float32 or bfloat16, and both only on the cpu")
    if a.device == "cuda":
        import bench_cuda

        bench_cuda.main(a, in_process)
        return
    if a.one:
        print(json.dumps(measure_step(PRESET[a.one], a.dtype, a.batch, a.seq, a.steps, a.threads, a.ops > 0)))
        return
    console = Console()
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_commit(),
        "machine": f"{cpu_name()}, {a.threads} threads, {platform.system()} {platform.machine()}",
        "versions": versions(),
        "peers": a.note,
        "rows": [],
    }
    old = json.loads(a.record.read_text()) if a.record and a.record.exists() else []

    def keep(row: dict[str, Any]) -> None:
        if a.record:
            a.record.write_text(
                json.dumps([*old, {**record, "rows": [*record["rows"], row]}], indent=1) + "\n"
            )

    for name in a.models.split(","):
        row = compare(a, name, keep)
        record["rows"].append(row)
        show(row, console)


if __name__ == "__main__":
    main()
