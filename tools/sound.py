#!/usr/bin/env python
"""Ask `apr bisect` about sound checkpoints of every kind on the CPU: none may be called wrong.

Example: python tools/sound.py --record bench/sound.json
         python tools/sound.py --only 4096

A case is a model (sizes of a preset or of a published model, made small), weights (fresh, noise on every parameter,
trained for some steps, with adapters merged, with channels as large as those of published models), a way of storing them,
and a batch. Each is written as a checkpoint and given to `apr bisect` as a user would. Exit code 9 when one is accused.
Real text is found through $APR_TEST_DATA.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pinned_jobs

from apr.checkpoints.apr2 import write_apr
from apr.checkpoints.apr2_metadata import config_to_metadata
from apr.checkpoints.hf import write_hf
from apr.cli.main import main as apr
from apr.common.atomic import write_json
from apr.common.host import cpu_name
from apr.model.config import ModelConfig
from apr.model.hf_config import to_hf
from apr.model.params import Layout
from apr.model.presets import PRESETS

INTERRUPTED = 130
ROOT = Path(__file__).resolve().parents[1]
VOCAB = pinned_jobs.VOCAB
TEXTS: dict[str, Any] = dict(max_position_embeddings=4096, vocab_size=VOCAB)
STEPS = (
    "--batch-size", "8", "--seq-length", "64", "--lr", "5e-3", "--warmup-steps", "5", "--val-batches", "4",
    "--bounds", "speed=1000000,pretrained_share=9", "--widen", "max_top_share=0.9",
)  # fmt: skip
# In shares of what is usual: weights of norms in some channels, biases of keys, and one row that writes into the residual stream.
OUTLIERS = {"norm.weight": 30.0, "k_proj.bias": 100.0, "down_proj.weight": 40.0}


def shrunk(name: str, by: int = 4, layers: int = 2) -> ModelConfig:
    """Make a published model small: its heads, switches, theta, scaling and epsilons are kept."""
    c = PRESETS[name]
    width = {
        "hidden_size": max(8, c.hidden_size // by // 8 * 8),
        "intermediate_size": c.intermediate_size // by,
    }
    return replace(c, **width, num_layers=layers, vocab_size=1009)


def tiny(name: str, **more: Any) -> ModelConfig:
    """Give a tiny preset positions and a vocabulary for text."""
    return replace(PRESETS[f"{name}-tiny"], **{**TEXTS, **more})


# Rows that Q8_0 can store, in blocks of 32.
EVEN = dict(hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=16)
MODELS: dict[str, ModelConfig] = {
    **{name: tiny(name) for name in ("llama", "llama3", "mistral", "qwen2", "qwen3", "olmo2", "smollm3")},
    "llama-even": tiny("llama", **EVEN),
    "qwen2-even": tiny("qwen2", **EVEN),
    "qwen3-even": tiny("qwen3", **EVEN),
    "smollm3-window-64": tiny("smollm3", sliding_window=64),
    "deep": tiny("llama", num_layers=32),
    "deep-qwen3": tiny("qwen3", num_layers=24),
    # One head of one block: at 4,096 tokens the reference takes its minute.
    "one-head-llama3": tiny("llama3", num_layers=1, num_heads=1, num_kv_heads=1),
    "one-head-qwen3": tiny("qwen3", num_layers=1, num_heads=1, num_kv_heads=1),
    "window-512": tiny("mistral", num_layers=1, num_heads=1, num_kv_heads=1, sliding_window=512),
    "one-layer": tiny("llama", num_layers=1),
    "one-head": tiny("llama", num_heads=1, num_kv_heads=1),
    "wide-vocabulary": tiny("qwen2", vocab_size=50257),
    **{
        name: shrunk(name)
        for name in (
            "llama-3.2-1b", "smollm2-135m", "smollm2-360m", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen3-0.6b",
            "llama-370m", "llama-demo", "qwen2-15m", "qwen2-3m",
        )
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A checkpoint and the batch that it is judged with.

    weights: fresh, noise, outliers, trained, masked (trained so), lora. stored: a format and a dtype."""

    model: str
    weights: str
    stored: str = "apr float32"
    shape: tuple[int, int] = (2, 32)
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name the case by all that makes it."""
        said = [self.model, self.weights, self.stored, f"{self.shape[0]} x {self.shape[1]}", *self.flags]
        return ", ".join(said)


MASK, TEXT = ("--mask-documents",), ("--dataset", "shards")
FAMILIES = ("llama", "llama3", "mistral", "qwen2", "qwen3", "olmo2", "smollm3")
# fmt: off
CASES: tuple[Case, ...] = (
    *(Case(family, "trained", shape=(4, 64), flags=TEXT) for family in FAMILIES),
    *(Case(family, "trained") for family in FAMILIES),
    *(Case(family, "noise", "hf bfloat16", (1, 257)) for family in FAMILIES),
    *(Case(family, "fresh", shape=(3, 59)) for family in ("llama", "qwen2", "qwen3", "olmo2")),
    *(Case(name, "noise", "hf bfloat16", (2, 48)) for name in MODELS if name in PRESETS),
    Case("llama", "trained", "hf float16", (1, 1025)),
    Case("qwen2", "trained", "apr bfloat16", (2, 512)),
    Case("smollm3", "trained", "hf float32", (1, 2048)),
    Case("one-head-llama3", "trained", shape=(1, 4096)),
    Case("one-head-qwen3", "trained", "hf bfloat16", (1, 4096)),
    Case("window-512", "noise", shape=(1, 4096)),
    Case("smollm3-window-64", "noise", "hf bfloat16", (2, 1024)),
    Case("llama", "masked", shape=(2, 256), flags=(*TEXT, *MASK)),
    Case("one-layer", "masked", shape=(1, 2048), flags=MASK),
    Case("mistral", "trained", "apr bfloat16", (2, 97), MASK),
    Case("olmo2", "trained", "apr bfloat16", (4, 123), MASK),
    Case("llama-even", "trained", "gguf float16", (2, 128)),
    Case("qwen2-even", "trained", "gguf q8_0", (2, 128)),
    Case("qwen3-even", "trained", "gguf bfloat16", (2, 128)),
    Case("llama", "lora", shape=(2, 96), flags=TEXT),
    Case("qwen2", "lora", "hf bfloat16", (2, 96)),
    Case("smollm3", "lora", "apr bfloat16", (1, 300), MASK),
    Case("qwen2", "outliers", "hf bfloat16", (2, 200)),
    Case("llama", "outliers", shape=(2, 200)),
    Case("qwen3", "outliers", "hf float16", (2, 200)),
    Case("deep", "noise", shape=(2, 64)),
    Case("deep-qwen3", "noise", "hf bfloat16", (1, 128)),
    Case("one-layer", "trained", shape=(8, 5)),
    Case("one-head", "noise", shape=(1, 2)),
    Case("wide-vocabulary", "noise", shape=(1, 17)),
    Case("stories260K", "published", "hf float32", (1, 512)),
    Case("stories260K", "published", "hf float32", (4, 128), MASK),
)
# fmt: on


@dataclass
class Maker:
    """Folder in which checkpoints are made; trained ones once for all cases."""

    folder: Path
    data: Path

    def apr(self, *arguments: str | Path) -> str:
        """Run a command line in this process; returns what it printed. Raises SystemExit for one that fails."""
        code, said = quietly(lambda: apr([str(a) for a in arguments]))
        if code:
            raise SystemExit(f"apr {' '.join(map(str, arguments))}: exit code {code}\n{said}")
        return said

    @cached_property
    def shards(self) -> Path:
        """Encode the corpus of the pinned jobs."""
        inputs: Any = SimpleNamespace(work=self.folder, data=self.data)
        pinned_jobs.corpus(inputs)
        text, tok = self.folder / "corpus", self.folder / "tok"
        self.apr("tokenize", "train", text, "--vocab-size", str(VOCAB), "-o", tok)
        self.apr("tokenize", "encode-corpus", text, "--tokenizer", tok, "--val-fraction", "0.2",
                 "-o", self.folder / "shards")  # fmt: skip
        return self.folder / "shards"

    def checkpoint(self, case: Case) -> Path:
        """Write the checkpoint of a case; returns its path."""
        if case.weights == "published":
            return self.data / case.model / "hf"
        path = self.folder / "made" / re.sub(r"\W+", "-", f"{case.model} {case.weights} {case.stored}")
        kind, dtype = case.stored.split()
        if path.exists():
            return path
        path.parent.mkdir(exist_ok=True)
        if case.weights in ("trained", "masked", "lora"):
            return self._stored(self._trained(case), path, kind, dtype)
        cfg = MODELS[case.model]
        layout = Layout(cfg)
        host = np.zeros(layout.size, np.float32)
        layout.init(host, 7) if case.weights == "fresh" else layout.randomise(host, 7)
        tensors = layout.named(host)
        if case.weights == "outliers":
            _enlarge(tensors)
        if kind == "hf":
            write_hf(path, cfg, tensors, dtype)
        else:
            write_apr(path, config_to_metadata(cfg), tensors, dtype)
        return path

    def _stored(self, made: Path, path: Path, kind: str, dtype: str) -> Path:
        """Store a trained checkpoint as the case asks."""
        if kind in ("hf", "gguf"):
            self.apr("export", made, "--format", kind, "--dtype", dtype, "-o", path)
        elif dtype == "float32":
            return made
        else:
            folder = path.with_name(path.name + "-folder")
            self.apr("export", made, "--format", "hf", "--dtype", dtype, "-o", folder)
            self.apr("import", folder, "-o", path)
        return path

    def _trained(self, case: Case) -> Path:
        """Train a model, with adapters on top where asked."""
        run = self.folder / "runs" / f"{case.model}-{case.weights}"
        made = run / "ckpt" / "epoch-001.apr"
        merged = run.with_suffix(".apr")
        if case.weights == "lora":
            base = self._trained(replace(case, weights="trained"))
            if not merged.exists():
                self.apr("pretrain", "--run-dir", run, "--init", base, "--dataset", self.shards, "--lora-rank", "4",
                         "--num-steps", "20", "--eval-every", "20", *STEPS)  # fmt: skip
                self.apr("merge", base, run / "ckpt" / "epoch-001-adapter", "-o", merged)
            return merged
        if not made.exists():
            config = self.folder / f"{case.model}.json"
            config.write_text(json.dumps(to_hf(MODELS[case.model])))
            more = MASK if case.weights == "masked" else ()
            self.apr("pretrain", "--run-dir", run, "--model", config, "--dataset", self.shards, "--num-steps", "60",
                     "--eval-every", "60", *STEPS, *more)  # fmt: skip
        return made


def _enlarge(tensors: dict[str, np.ndarray]) -> None:
    """Give a few channels the sizes that they have in published models."""
    for name, x in tensors.items():
        for end, times in OUTLIERS.items():
            if name.endswith(end):
                x[..., 3] = times * (1 if x.ndim == 1 else float(x.std()))


def quietly(call: Callable[[], int]) -> tuple[int, str]:
    """Call with what is printed held back; returns the exit code and it."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        return call(), out.getvalue()


def judge(maker: Maker, case: Case) -> dict[str, Any]:
    """Ask `apr bisect` about a case."""
    path, start = maker.checkpoint(case), time.perf_counter()
    flags = [str(maker.shards) if f == "shards" else f for f in case.flags]
    sizes = ("--batch-size", str(case.shape[0]), "--seq-length", str(case.shape[1]))
    code, said = quietly(lambda: apr(["bisect", str(path), *sizes, *flags, "--json", "--picture", ""]))
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    out: dict[str, Any] = {"exit code": code, "seconds": round(time.perf_counter() - start, 1)}
    try:
        report = json.loads(said)["reports"][0]
    except (ValueError, KeyError):
        return {**out, "said": said.strip()[-300:]}
    for mode in ("forced", "free"):
        rows = [r for r in report["rows"] if r["mode"] == mode]
        worst = max(rows, key=lambda r: float(r["ratio"]))
        out[mode] = [round(float(worst["ratio"]), 3), f"{worst['op']}, {worst['tap']}"]
    out["arrays"] = len(report["rows"])
    if report["first"]:
        out["accused"] = f"{report['first']['stage']}: {report['first']['op']}, {report['first']['tap']}"
    return out


def main(argv: list[str] | None = None) -> int:
    """Judge all cases, or those that match."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="REGEX", default="", help="only the cases whose names match")
    parser.add_argument(
        "--record", metavar="FILE", type=Path, help="write answers as JSON; those of other cases stay in it"
    )
    f = parser.parse_args(argv)
    data = Path(os.environ.get("APR_TEST_DATA", ROOT.parent / "shared" / "data")).resolve()
    answers: dict[str, dict[str, Any]] = {}
    if f.record and f.only and f.record.is_file():
        names = {case.name for case in CASES}
        kept = json.loads(f.record.read_text())["checkpoints"]
        answers = {name: found for name, found in kept.items() if name in names}
    with tempfile.TemporaryDirectory(prefix="apr-sound-") as folder:
        os.environ["APR_CACHE"] = str(Path(folder) / "cache")
        maker = Maker(Path(folder), data)
        for case in CASES:
            if not re.search(f.only, case.name):
                continue
            answers[case.name] = found = judge(maker, case)
            figures = ", ".join(f"{k} {v}" for k, v in found.items() if k != "exit code")
            print(f"{'ACCUSED' if found['exit code'] else 'sound  '} {case.name}: {figures}", flush=True)
            if f.record:
                write_json(f.record, recorded(answers))
    wrong = recorded(answers)["accused"]
    print(f"{len(answers)} sound checkpoints, {len(wrong)} accused")
    return 9 if wrong else 0


def recorded(answers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Build the record: what was judged, and who was accused."""
    return {
        "format": "apr-sound-1",
        "date": datetime.date.today().isoformat(),
        "processor": cpu_name(),
        "judged": len(answers),
        "accused": [name for name, found in answers.items() if found["exit code"]],
        "checkpoints": answers,
    }


if __name__ == "__main__":
    sys.exit(main())
