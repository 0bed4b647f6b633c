"""How many tokens a second does generation give, on the CPU or a GPU, and how does that compare with transformers?

    python tools/bench_generate.py                                  two models on this machine
    python tools/bench_generate.py --peer /path/to/python           and Hugging Face transformers under that Python
    python tools/bench_generate.py --stories DIR                    a Hugging Face folder in the place of random weights
    python tools/bench_generate.py --record bench/generate.json     add the result to a record
    python tools/bench_generate.py --device cuda --models qwen2.5-0.5b --peer python3       on a GPU, 1 and 32 together
    (...) --humaneval HumanEval.jsonl.gz --tokenizer tokenizer.json       and the completions of all its problems, 32 together

Every measurement is a process of its own; apr, apr with int8 matrices and the peer take turns, and medians over the
rounds are reported. Greedy, float32 (on a GPU bfloat16), always the same number of new tokens: a prompt alone, and 8 of the
same length together (on a GPU 32). Prompt: tokens/s up to the first new token; new: tokens/s of those after it. First: time
to the first token of longer prompts. HumanEval: greedy, the same number of new tokens for each problem; apr as `apr eval` does
it, with its texts and stop strings, and transformers the ids alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the peer's Python gets no further than this and the standard library

ROWS = {"cpu": 8, "cuda": 32}
FIRST = {"cpu": (), "cuda": (512, 2048)}  # tokens of prompts whose first new token is timed
WHO = ("apr", "apr, BLAS alone", "apr int8", "transformers")
SIZES = {
    "stories260k": (32, 64),
    "smollm2-135m": (32, 16),
    "qwen2.5-0.5b": (64, 128),
}  # tokens of the prompt, new tokens


def prompts(vocab: int, length: int, rows: int) -> list[list[int]]:
    """So many prompts of token ids."""
    return [[(7 * i + 13 * row + 5) % (vocab - 10) + 3 for i in range(length)] for row in range(rows)]


def measure(who: str, model: str, folder: str, threads: int, device: str) -> dict[str, float]:
    """One process's figures."""
    (length, new), rows = SIZES[model], ROWS[device]
    run, vocab = (_transformers if who == "transformers" else _apr)(who, model, folder, threads, device)
    batch = prompts(vocab, length, rows)
    run(batch[:1], 4)
    run(batch, 4)
    jobs = ((batch[:1], 1), (batch[:1], new), (batch, 1), (batch, new))
    first, whole, first8, whole8 = (_usual(run, some, n) for some, n in jobs)
    longer = {}
    for n in FIRST[device]:
        long = prompts(vocab, n, 1)
        longer[f"first_token_ms_of_{n}"] = 1e3 * statistics.median(run(long, 1) for _ in range(5))
    return {
        "prompt_tokens_per_sec": length / first,
        "new_tokens_per_sec": (new - 1) / (whole - first),
        f"prompt_tokens_per_sec_of_{rows}": rows * length / first8,
        f"new_tokens_per_sec_of_{rows}": rows * (new - 1) / (whole8 - first8),
        **longer,
        "rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def _usual(run: Any, rows: list[list[int]], n: int) -> float:
    """Median of so many runs as take a second, 5 at most."""
    times: list[float] = []
    while not times or (len(times) < 5 and sum(times) < 1):
        times.append(run(rows, n))
    return statistics.median(times)


def complete(who: str, model: str, folder: str, threads: int, device: str, job: str) -> dict[str, float]:
    """Seconds of one process for the completions of a job that `humaneval` has written, and new tokens."""
    asked = json.loads(Path(job).read_text())
    ids, new, rows = asked["ids"], asked["new"], ROWS[device]
    if who == "transformers":
        run = _transformers(who, model, folder, threads, device)[0]
        run([prompt[:8] for prompt in ids[:rows]], 4)
        seconds = sum(run(ids[i : i + rows], new) for i in range(0, len(ids), rows))
        return {"seconds": seconds, "tokens": len(ids) * new, "problems": len(ids)}
    completer = _completer(who, model, folder, threads, device, asked)
    jobs = [(text, 0) for text in asked["texts"]]
    list(completer(jobs[:rows], 4))
    start = time.perf_counter()
    tokens = sum(n for _, (_, n) in completer(jobs, new))
    return {"seconds": time.perf_counter() - start, "tokens": tokens, "problems": len(ids)}


def _completer(who: str, model: str, folder: str, threads: int, device: str, asked: dict[str, Any]) -> Any:
    from types import SimpleNamespace

    from apr.evaluation.humaneval import Completer, HumanEvalSettings
    from apr.evaluation.score import Opened
    from apr.tokenizer.tokenizer import Tokenizer

    cfg, backend, weights, dtype = _weights(who, model, folder, threads, device)
    loaded: Any = SimpleNamespace(cfg=cfg, source=model, end_ids=lambda: ())
    opened = Opened(loaded, backend, dtype, Tokenizer.from_file(asked["tokenizer"]), weights)

    def completions(jobs: list[tuple[str, int]], new: int) -> Any:
        return Completer(opened, HumanEvalSettings(max_new_tokens=new)).complete(jobs)

    return completions


def _apr(who: str, model: str, folder: str, threads: int, device: str) -> Any:
    """(function that generates n tokens for each prompt and returns its seconds, vocabulary)."""
    from apr.inference.generate import Generator
    from apr.inference.sampling import Sampling

    cfg, backend, placed, dtype = _weights(who, model, folder, threads, device)
    slots = sum(SIZES[model])
    generators = {n: Generator(cfg, backend, placed, slots, dtype, rows=n) for n in (1, ROWS[device])}

    def run(rows: list[list[int]], n: int) -> float:
        longer = len(rows[0]) + n > slots
        generator = (
            Generator(cfg, backend, placed, len(rows[0]) + n, dtype) if longer else generators[len(rows)]
        )
        backend.sync()
        start = time.perf_counter()
        made = sum(1 for _ in generator.run(rows, Sampling(n, 0.0)))
        assert made == n * len(rows)
        return time.perf_counter() - start

    return run, cfg.vocab_size


def _weights(who: str, model: str, folder: str, threads: int, device: str) -> tuple[Any, Any, Any, str]:
    """(configuration, backend, weights on it, dtype)."""
    import numpy as np

    from apr import backends
    from apr.checkpoints.registry import open_host
    from apr.inference import int8
    from apr.model.params import Layout
    from apr.model.presets import PRESETS

    if folder:
        source = open_host(folder)
        cfg, host = source.cfg, source.host
    else:
        cfg = PRESETS[model]
        host = np.zeros(Layout(cfg).size, np.float32)
        Layout(cfg).init(host, 0)
    backend = backends.get(device)
    backend.set_threads(threads)
    dtype = backend.dtypes[0]
    if device == "cuda":
        placed = backend.empty(host.size, dtype)
        backend.from_host(placed, host)
    if who == "apr, BLAS alone":
        from apr.backends.cpu import ops

        ops.FEW_ROWS = 0
    if who == "apr int8":
        backend, placed = int8.backend(backend), int8.Int8Weights(cfg, host, backend)
    elif device == "cpu":
        placed = host
    return cfg, backend, placed, dtype


def _transformers(who: str, model: str, folder: str, threads: int, device: str) -> Any:
    """As _apr, for a folder with config.json, with weights or without."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(threads)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if (Path(folder) / "model.safetensors").exists():
        net = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    else:
        net = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    net.eval().to(device)
    net.generation_config.eos_token_id = None

    def run(rows: list[list[int]], n: int) -> float:
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        start = time.perf_counter()
        with torch.inference_mode():
            out = net.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=n,
                min_new_tokens=n,
                do_sample=False,
                pad_token_id=0,
            )
        out = out.cpu()
        assert out.shape == (len(rows), ids.shape[1] + n)
        return time.perf_counter() - start

    return run, net.config.vocab_size


def in_process(python: str, args: list[str]) -> dict[str, float]:
    """The figures that this file prints when it measures once. Prints how long it took, and what came of it."""
    start = time.perf_counter()
    env = {**os.environ, **({} if python == sys.executable else {"PYTHONPATH": ""})}
    done = subprocess.run([python, __file__, *args], capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"{python} {' '.join(args)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    figures = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    what = ", ".join(f"{key} {value:,.1f}" for key, value in figures.items())
    print(f"{args[1]}, {time.perf_counter() - start:.0f} s in all: {what}", file=sys.stderr, flush=True)
    return figures


def compare(a: argparse.Namespace, model: str) -> dict[str, Any]:
    """All of them in turn, a.rounds times; medians."""
    from apr.model.hf_config import to_hf
    from apr.model.presets import PRESETS

    own = a.stories if model == "stories260k" else ""
    with tempfile.TemporaryDirectory() as made:
        job = humaneval(a, made) if a.humaneval else ""
        completions: dict[str, list[dict[str, float]]] = {}
        if not own:  # the peer gets the sizes as a config.json
            (Path(made) / "config.json").write_text(json.dumps(to_hf(PRESETS[model])))
        runs: dict[str, list[dict[str, float]]] = {}
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else -1.0
        for _ in range(a.rounds):
            for who in WHO:
                python = a.peer if who == "transformers" else sys.executable
                if who == "apr int8" and a.no_int8:
                    continue
                if python and (a.blas or who != "apr, BLAS alone"):
                    folder = own or (made if who == "transformers" else "")
                    args = ["--one", who, "--models", model, "--stories", folder, "--threads", str(a.threads)]
                    args += ["--device", a.device]
                    runs.setdefault(who, []).append(in_process(python, args))
                    if job:
                        completions.setdefault(who, []).append(in_process(python, [*args, "--job", job]))
    length, new = SIZES[model]
    return {
        "model": model,
        "device": a.device,
        "prompt": length,
        "new": new,
        "rounds": a.rounds,
        "load_average": load,
        "results": medians(runs),
        **({"humaneval": {"new": a.humaneval_new, **medians(completions)}} if completions else {}),
    }


def medians(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Of each figure of everyone."""
    return {
        who: {key: round(statistics.median(r[key] for r in rows), 3) for key in rows[0]}
        for who, rows in runs.items()
    }


def humaneval(a: argparse.Namespace, folder: str) -> str:
    """Write the problems as texts and ids into a folder; returns the file."""
    from apr.evaluation.humaneval import read_problems
    from apr.tokenizer.tokenizer import Tokenizer

    texts = [p.prompt for p in read_problems(a.humaneval)]
    encode = Tokenizer.from_file(a.tokenizer).encode_text
    ids = [[int(i) for i in encode(text)] for text in texts]
    job = {"texts": texts, "ids": ids, "new": a.humaneval_new, "tokenizer": str(Path(a.tokenizer).resolve())}
    (Path(folder) / "humaneval.json").write_text(json.dumps(job))
    return str(Path(folder) / "humaneval.json")


def machine(a: argparse.Namespace) -> str:
    """Name what computes."""
    if a.device == "cuda":
        from apr import backends

        return backends.get("cuda").describe()["gpu"]
    from apr.common.host import cpu_name

    return f"{cpu_name()}, {a.threads} threads, {platform.system()} {platform.machine()}"


def show(row: dict[str, Any]) -> None:
    """A table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{row['model']}: {row['prompt']} tokens of prompt, {row['new']} new; tokens/s", min_width=78
    )
    rows = ROWS[row["device"]]
    for column in ("who", "prompt", "new", f"prompt, {rows} at once", f"new, {rows} at once", "peak GiB"):
        table.add_column(column, justify="left" if column == "who" else "right")
    for who, r in row["results"].items():
        table.add_row(who, *(f"{v:,.1f}" for k, v in r.items() if "tokens_per" in k), f"{r['rss_gib']:.2f}")
    Console().print(table)
    for who, r in row["results"].items():
        for key, ms in r.items():
            if key.startswith("first_token"):
                print(f"{who}: first token after a prompt of {key.rsplit('_', 1)[1]}: {ms:,.1f} ms")
    for who, r in row.get("humaneval", {}).items():
        if who != "new":
            print(
                f"{who}: {r['problems']:.0f} problems of HumanEval, {r['tokens']:,.0f} tokens: {r['seconds']:,.2f} s"
            )


def main() -> None:
    """Parse and call."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", default=",".join(SIZES), help=f"comma-separated, of {', '.join(SIZES)}")
    p.add_argument(
        "--stories", default="", help="Hugging Face folder of stories260K; without it the model is left out"
    )
    p.add_argument("--peer", default="", help="a Python that has torch and transformers")
    p.add_argument("--device", default="cpu", choices=ROWS)
    p.add_argument("--rounds", type=int, default=3, help="processes for each")
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    p.add_argument(
        "--blas", action="store_true", help="also apr without its own product of a matrix and few rows"
    )
    p.add_argument("--no-int8", action="store_true", help="without apr's 8-bit weights")
    p.add_argument("--note", default="", help="what else the record should say: versions of the peer")
    p.add_argument("--record", type=Path, help="JSON file to add the result to")
    p.add_argument("--humaneval", default="", metavar="FILE", help="problems to complete as well")
    p.add_argument("--humaneval-new", type=int, default=128, metavar="TOKENS", help="new tokens of each")
    p.add_argument("--tokenizer", default="", metavar="FILE", help="tokenizer.json for them")
    p.add_argument("--one", choices=WHO, help=argparse.SUPPRESS)
    p.add_argument("--job", default="", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.job:
        print(json.dumps(complete(a.one, a.models, a.stories, a.threads, a.device, a.job)))
        return
    if a.one:
        print(json.dumps(measure(a.one, a.models, a.stories, a.threads, a.device)))
        return
    from apr.common.provenance import git_commit, versions

    record: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_commit(),
        "machine": machine(a),
        "versions": versions(),
        "peer": a.note,
        "rows": [],
    }
    for name in a.models.split(","):
        if name in SIZES and (name != "stories260k" or a.stories):
            record["rows"].append(compare(a, name))
            show(record["rows"][-1])
    if a.record:
        old = json.loads(a.record.read_text()) if a.record.exists() else []
        a.record.write_text(json.dumps([*old, record], indent=1) + "\n")


if __name__ == "__main__":
    main()
