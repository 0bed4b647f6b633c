"""How long does a save hold training up?

    python tools/bench_save.py --corpus FILE --tokenizer tokenizer.json        on a GPU, 0.75 B parameters
    (...) --record bench/gpu/save.json                                         add the result to a record

Trains for a few steps with a state and a checkpoint in the middle, as `apr pretrain` does, and reports the seconds of the
step behind each save: how much longer than the median step it took, evaluation left out; of the steps beside which files were
written, with what the threads were at when one of them took long; and how long the end of the run took: its last save, and
everything behind it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import apr
from apr.common.provenance import git_commit, versions
from apr.model.params import Layout
from apr.model.presets import PRESETS

LONG_SECONDS = 0.15  # of a step: from then on is noted what the threads are at
OURS = f"{ROOT / 'apr'}/"
MODEL = "qwen3-0.6b"  # with a head of its own: 0.75 B parameters


class Clock(apr.Callback):
    """The time at the end of each step, and behind its evaluation; steps beside which a save was under way."""

    def __init__(self, last: int) -> None:
        self.last = last  # step: behind it the run waits for its files
        self.ends: dict[int, float] = {}
        self.evaluated: dict[int, float] = {}
        self.beside: set[int] = set()
        self.long: dict[str, int] = {}

    def on_step(self, line: dict[str, Any]) -> None:
        """Note the time, and tell of a step behind an evaluation."""
        n = line["step"]
        self.ends[n] = time.perf_counter()
        if any(thread.name == "saving" for thread in threading.enumerate()):
            self.beside.add(n)
        if n - 1 in self.evaluated:
            print(
                f"step {n}: {self.ends[n] - self.evaluated[n - 1]:.3f} s with the save before it", flush=True
            )

    def watch(self) -> None:
        """Note every 20 ms, in a thread of its own, what the threads are at while a step beside a save takes long."""
        while True:
            time.sleep(0.02)
            n = max(list(self.ends), default=0)
            if (
                0 < n < self.last
                and n not in self.evaluated
                and time.perf_counter() - self.ends[n] > LONG_SECONDS
            ):
                names = {t.ident: t.name for t in threading.enumerate()}
                own = [self._place(names.get(i, ""), f) for i, f in sys._current_frames().items()]
                if any(name.startswith("saving") for name in own):
                    what = f"step {n + 1}: " + "; ".join(sorted(filter(None, own)))
                    self.long[what] = self.long.get(what, 0) + 1

    def _place(self, name: str, frame: Any) -> str:
        """The two innermost functions of apr that a thread is in, and the line."""
        places: list[str] = []
        while frame is not None and len(places) < 2:
            if frame.f_code.co_filename.startswith(OURS):
                places.append(
                    f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
                )
            frame = frame.f_back
        return f"{name} in {' of '.join(places)}" if places else ""

    def on_evaluation(self, line: dict[str, Any]) -> None:
        """Note the time."""
        self.evaluated[line["step"]] = time.perf_counter()


def measure(a: argparse.Namespace) -> dict[str, Any]:
    """Train, and compute the figures."""
    if a.layers:
        small = {"num_layers": a.layers, "hidden_size": 64, "intermediate_size": 96}
        PRESETS[MODEL] = dataclasses.replace(PRESETS[MODEL], **small)
    cfg = PRESETS[MODEL] = dataclasses.replace(PRESETS[MODEL], tie_word_embeddings=False)
    clock = Clock(a.steps)
    with tempfile.TemporaryDirectory(dir=a.folder) as made:
        settings = {
            "corpus": a.corpus, "tokenizer": a.tokenizer, "model": MODEL, "run_dir": f"{made}/run",
            "num_steps": a.steps, "batch_size": a.batch_size, "seq_length": a.seq_length, "eval_every": a.every,
            "val_batches": 1, "device": a.device, "patience": 0, "spot_check": -1, "ladder_mib": 0,
        }  # fmt: skip
        threading.Thread(target=clock.watch, name="watch", daemon=True).start()
        result = apr.train(settings, callbacks=[clock])
        ended = time.perf_counter()
    steps = {n: clock.ends[n] - clock.ends[n - 1] for n in clock.ends if n - 1 in clock.ends}
    behind = {n: clock.ends[n + 1] - clock.evaluated[n] for n in clock.evaluated if n and n + 1 in clock.ends}
    plain = {n: s for n, s in steps.items() if n - 1 not in behind and n > 3}
    usual = [s for n, s in plain.items() if n not in clock.beside]
    beside = [s for n, s in plain.items() if n in clock.beside]
    pauses = {n: s - statistics.median(usual) for n, s in behind.items()}
    return {
        "parameters": Layout(cfg).num_parameters,
        "batch": [a.batch_size, a.seq_length],
        "verdict": result.verdict,
        "steps": {"no save": _figures(usual), "beside a save": _figures(beside)},
        "long": [f"{20 * n} ms: {what}" for what, n in clock.long.items()],
        "pause_ms": {str(n): round(1e3 * s, 1) for n, s in pauses.items()},
        "end_s": round(ended - max(clock.ends.values()), 2),
    }


def _figures(seconds: list[float]) -> dict[str, float]:
    """Number, median and longest, in ms."""
    return {
        "steps": len(seconds),
        "median_ms": round(1e3 * statistics.median(seconds), 2) if seconds else 0.0,
        "longest_ms": round(1e3 * max(seconds, default=0.0), 2),
    }


def main() -> None:
    """Parse and call."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--corpus", required=True, help="text to train on")
    p.add_argument("--tokenizer", required=True, help="tokenizer.json with Qwen's vocabulary")
    p.add_argument("--device", default="cuda")
    p.add_argument("--folder", help="where the run is written, and removed: its disk is measured too")
    p.add_argument("--batch-size", type=int, default=4)
    p.add_argument("--seq-length", type=int, default=512)
    p.add_argument("--steps", type=int, default=24)
    p.add_argument("--every", type=int, default=8, help="steps between saves")
    p.add_argument("--layers", type=int, default=0, help="a small model of so many layers, to try this file")
    p.add_argument("--record", type=Path, help="JSON file to add the result to")
    a = p.parse_args()
    from apr import backends

    gpu = backends.get("cuda").describe()["gpu"] if a.device == "cuda" else a.device
    row = {"date": time.strftime("%Y-%m-%d"), "commit": git_commit(), "machine": gpu, "versions": versions()}
    row |= measure(a)
    print(json.dumps(row, indent=1))
    if a.record:
        old = json.loads(a.record.read_text()) if a.record.exists() else []
        a.record.write_text(json.dumps([*old, row], indent=1) + "\n")


if __name__ == "__main__":
    main()
