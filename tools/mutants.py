#!/usr/bin/env python
"""Plant faults in a copy of apr, one at a time, and record which of its own checks sees each.

Example: python tools/mutants.py --record bench/trust.json
         python tools/mutants.py --patch fault.patch --job plain --tests tests/model

A fault is an edit of the source (tools/mutant_*.py, or a patch). It is planted in a copy of this checkout; there a
standard job is trained, the run is verified by the faulty code and by the sound code, and `apr bisect` is asked; with
--tests, so are the tests of the fault's area. Before the faults the sound copy does all of it, and nothing may be seen.
Real data is found through $APR_TEST_DATA.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy as np
import pinned_jobs
from mutant_faults import FAULTS, Mutant
from mutant_fifth import FIFTH
from mutant_fourth import FOURTH
from mutant_jobs import BASE, BEFORE, LINES, more_files, more_inputs, more_jobs
from mutant_second import SECOND
from mutant_third import THIRD

from apr.checkpoints.apr2 import read_apr
from apr.checkpoints.checkpoint import HF_FILES
from apr.common.atomic import write_json
from apr.common.host import cpu_name
from apr.model.hf_config import to_hf
from apr.model.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
COPIED = (
    "apr",
    "tools",
    "tests",
    "docs",
    "README.md",
    "pyproject.toml",
    "setup.cfg",
    "Makefile",
    "mkdocs.yml",
)
LIMIT_S = 600
SMALL = (
    "--num-steps", "12", "--eval-every", "6", "--batch-size", "4", "--micro-batch-size", "2", "--lr", "3e-3",
    "--warmup-steps", "2", "--val-batches", "4", "--val-fraction", "0.2", "--save-every", "3", "--keep-states", "9",
    "--bounds", "speed=1000000,pretrained_share=9", "--widen", "max_top_share=0.9",
)  # fmt: skip
ANSWERS = (
    "--init", BASE, "--instruct", "chats.jsonl", "--chat-template", "template.jinja", *SMALL, "--seq-length", "96",
)  # fmt: skip
UNEVEN = ("--batch-size", "5", "--micro-batch-size", "2")
PLAIN = ("--corpus", "corpus", "--model", "configs/qwen2.json", *SMALL, "--seq-length", "32")
JOBS: dict[str, tuple[str, ...]] = {
    "plain": PLAIN,
    "masked": (
        "--corpus", "corpus", "--model", "configs/llama3.json", *SMALL, "--seq-length", "64", "--mask-documents",
        "--recompute", "--z-loss", "1e-3", "--schedule", "wsd", "--seed", "7",
    ),
    "window": ("--corpus", "corpus", "--model", "configs/mistral.json", *SMALL, "--seq-length", "32", "--no-shuffle"),
    "qknorm": ("--corpus", "corpus", "--model", "configs/qwen3.json", *SMALL, "--seq-length", "32", "--grad-clip", "0.5",
        "--beta1", "0.8", "--beta2", "0.97", "--eps", "1e-6", "--weight-decay", "0.03"),
    "instruct": ANSWERS,
    "lora": (*ANSWERS, "--lora-rank", "4"),
    "uneven": (*ANSWERS, *UNEVEN),
    "bf16": (*PLAIN, *UNEVEN, "--dtype", "bfloat16", "--seq-length", "45"),
    "odd": (
        "--corpus", "corpus", "--model", "configs/odd.json", *SMALL, "--seq-length", "160", "--mask-documents", "--dtype",
        "bfloat16", "--z-loss", "2e-2",
    ),
    "dropout": (*ANSWERS, *UNEVEN, "--lora-rank", "4", "--lora-dropout", "0.2"),
    "dora": (*ANSWERS, "--lora-rank", "4", "--lora-dora"),
    "adapters": (
        *ANSWERS, "--lora-rank", "4", "--lora-alpha", "6.5", "--lora-rslora", "--lora-plus", "8", "--lora-targets",
        "q,v,gate,down,embed", "--lora-modules-to-save", "norm", "--lora-rank-pattern", "down_proj=9",
    ),
    "int8": (*ANSWERS, "--lora-rank", "4", "--lora-base", "int8"),
    "mixture": (
        "--mix", "corpus=corpus/plays weight=0.5; corpus=corpus/stories.jsonl weight=0.3; corpus=corpus/Lib weight=0.2",
        "--model", "configs/qwen2.json", *SMALL, "--seq-length", "128", "--batch-size", "30", "--micro-batch-size", "10",
    ),
    "mixed-chats": (
        "--init", BASE, "--mix", "instruct=chats.jsonl weight=0.5; instruct=more.jsonl weight=0.5", "--chat-template",
        "template.jinja", *SMALL, *UNEVEN, "--seq-length", "96",
    ),
    "dpo": (
        "--init", BASE, "--preferences", "pairs.jsonl", "--chat-template", "template.jinja", *SMALL, *UNEVEN, "--seq-length",
        "128", "--label-smoothing", "0.1", "--beta", "0.3",
    ),
    "simpo": (
        "--init", BASE, "--preferences", "pairs.jsonl", "--chat-template", "template.jinja", *SMALL, *UNEVEN, "--seq-length",
        "128", "--preference-loss", "simpo",
    ),
    "windowed": (
        "--corpus", "corpus", "--model", "configs/windowed.json", *SMALL, "--seq-length", "100", "--mask-documents", "--dtype",
        "bfloat16",
    ),
    "odd-evaluation": (*PLAIN, "--val-batches", "5", "--batch-size", "5", "--micro-batch-size", "4"),
    "sampled": (*PLAIN, "--sample", "The king said"),
    "passes": (
        "--corpus", "corpus/stories.jsonl", "--model", "configs/qwen2.json", *SMALL, "--seq-length", "128", "--batch-size",
        "25", "--micro-batch-size", "25",
    ),
    "marked": ("--corpus", "marked.txt", "--model", "configs/qwen2.json", *SMALL, "--seq-length", "32"),
    "resumed": ("--resume",),
    **{kind: ("--corpus", "corpus", "--model", f"configs/{kind}.json", *SMALL, "--seq-length", "64")
        for kind in ("yarn", "linear", "olmo2", "smollm3")},
    "wide": ("--corpus", "corpus", "--model", "configs/wide.json", *SMALL, "--seq-length", "112"),
    "windowed32": ("--corpus", "corpus", "--model", "configs/windowed.json", *SMALL, "--seq-length", "100", "--mask-documents"),
    "many": (*PLAIN, "--batch-size", "16", "--micro-batch-size", "8", "--dtype", "bfloat16", "--seq-length", "96"),
    "line": (*PLAIN, "--schedule", "linear", "--lr-min", "1e-4"),
    "long": (*PLAIN, "--num-steps", "26", "--eval-every", "26"),
    "kept": (*PLAIN, "--eval-every", "3", "--keep-checkpoints", "1"),
    "worse": (*PLAIN, "--lr", "0.04"),
    "short": (*ANSWERS, "--seq-length", "32"),
    "patterns": (*ANSWERS, "--lora-rank", "4", "--lora-alpha-pattern", "v_proj=20"),
    "budget": (
        "--mix", "corpus=corpus/plays tokens=6000; corpus=corpus/stories.jsonl tokens=3001", "--model", "configs/qwen2.json",
        *SMALL[2:], "--seq-length", "64", "--batch-size", "12", "--micro-batch-size", "6",
    ),
    "beside": (
        "--init", BASE, "--mix", "instruct=asked.jsonl weight=0.5; corpus=corpus/plays weight=0.5", *SMALL, *UNEVEN,
        "--seq-length", "96",
    ),
    **{kind: ("--init", BASE, "--preferences", "pairs.jsonl", "--chat-template", "template.jinja", *SMALL, *UNEVEN,
        "--seq-length", "128", "--preference-loss", kind) for kind in ("ipo", "orpo")},
}  # fmt: skip
JOBS |= more_jobs(SMALL, PLAIN, ANSWERS)
# Faults of figures that are shown beside times, which no two runs share, or kept where nothing is hashed.
SHOWN = (
    "perplexity_of_bits", "entropy_in_bits", "largest_norm_forgotten", "other_side_of_the_entropy",
    "training_loss_of_all_steps", "seconds_of_evaluations_lost", "seconds_begin_again", "means_a_width_early",
    "gigabytes_called_gibibytes", "flops_of_every_key", "copies_without_the_weights",
)  # fmt: skip
# Runs of the sound code that are cut behind a step and gone on with.
RESUMED = "resumed-"
# Job of commands that read checkpoints of sound runs; "commands:eval,chat" asks these alone.
COMMANDS = "commands"
# Commands that use a room of apr.
READERS = {
    "inference": ("run",),
    "model": ("run",),
    "evaluation": ("eval",),
    "checkpoints": ("export", "merge"),
}
LISTS = {"first": FAULTS, "second": SECOND, "third": THIRD, "fourth": FOURTH, "fifth": FIFTH}
# Lists whose faults are compared with the sound code by what a job wrote.
COMPARED = ("third", "fourth", "fifth")
# A head of 24, of which no block is whole; more positions than attention takes in one chunk; a window.
ODD = {"head_dim": 24, "hidden_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 256}
TIMES = ("wall_ms", "tokens_per_sec", "wall_seconds")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
# Folder of the kernels, which are compiled again where one of its files changes, but for the one that only calls them.
CPU, CALLS = "apr/backends/cpu/", "apr/backends/cpu/ops.py"
# What counts as seen while a job runs.
RUN_TIME = ("pretrain", "bisect", "verify")


@dataclass
class Outcome:
    """Answers of the checks for one fault, by check; "" is silence."""

    mutant: Mutant
    seen: dict[str, str] = field(default_factory=dict)
    # Hashes of what a job wrote: a fault after which all are those of the sound code has done nothing.
    files: dict[str, str] = field(default_factory=dict)

    @property
    def has_effect(self) -> bool:
        """Tell if the job came to something else than that of the sound code, or a check said so."""
        return self.seen.get("effect") != "none"

    @property
    def at_run_time(self) -> bool:
        return any(self.seen.get(check) for check in RUN_TIME)


@dataclass(frozen=True)
class Bench:
    """Folder with a sound copy and a faulty copy of the source, and the inputs of the jobs.

    making: job of the sound run that is trained just now"""

    folder: Path
    making: str = ""

    @property
    def sound(self) -> Path:
        return self.folder / "sound"

    @property
    def faulty(self) -> Path:
        return self.folder / "faulty"

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def make(self) -> Bench:
        """Copy the source twice, write the inputs, and train the run that the others start from."""
        for copy in (self.sound, self.faulty):
            for name in COPIED:
                if (ROOT / name).is_dir():
                    # Compiled kernels come along: Numba takes them for those of the copy, whose times are equal.
                    skip = shutil.ignore_patterns("*.pyc", "site", ".*")
                    shutil.copytree(ROOT / name, copy / name, ignore=skip)
                elif (ROOT / name).is_file():
                    copy.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(ROOT / name, copy / name)
        data = Path(os.environ.get("APR_TEST_DATA", ROOT.parent / "shared" / "data"))
        inputs: Any = SimpleNamespace(work=self.work, data=data.resolve())
        pinned_jobs.corpus(inputs)
        pinned_jobs.chats(inputs)
        pinned_jobs.template(inputs)
        for family in pinned_jobs.CONFIGS:
            pinned_jobs.config(inputs, family)
        pinned_jobs.write(inputs, "configs/odd.json", json.dumps(pinned_jobs.CONFIGS["llama3"] | ODD))
        windowed = pinned_jobs.CONFIGS["mistral"] | ODD | {"sliding_window": 40, "num_key_value_heads": 4}
        pinned_jobs.write(inputs, "configs/windowed.json", json.dumps(windowed))
        llama = pinned_jobs.CONFIGS["llama"] | ODD
        others = {
            "yarn": llama | {"max_position_embeddings": 128, "rope_scaling": YARN},
            "linear": llama | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
            "wide": pinned_jobs.CONFIGS["qwen2"] | {"vocab_size": 40960},
        }
        for kind in ("olmo2", "smollm3"):
            sizes = {"vocab_size": pinned_jobs.VOCAB, "max_position_embeddings": 128}
            others[kind] = to_hf(replace(PRESETS[f"{kind}-tiny"], **sizes))
        for name, config in others.items():
            pinned_jobs.write(inputs, f"configs/{name}.json", json.dumps(config))
        more_inputs(inputs)
        prompts = ["The king said", "Once", "What is it that", "A", "The girl went to the", "O"]
        pinned_jobs.write(inputs, "prompts.txt", "\n".join(prompts) + "\n")
        pinned_jobs.write(inputs, "pairs.jsonl", pinned_jobs.jsonl(_pairs(inputs)))
        asked = [{"prompt": row["prompt"], "response": row["chosen"]} for row in _pairs(inputs)]
        pinned_jobs.write(inputs, "asked.jsonl", pinned_jobs.jsonl(asked))
        pinned_jobs.write(inputs, "more.jsonl", pinned_jobs.jsonl(_stories_told(inputs)))
        marked = "\n\n".join(
            f"{text}\nThe token <|endoftext|> ends a text." for text in pinned_jobs.stories(inputs, 90)
        )
        pinned_jobs.write(inputs, "marked.txt", marked)
        done = self.apr(self.sound, "pretrain", "--run-dir", "runs/base", *PLAIN)
        if done.returncode:
            raise SystemExit(f"the run to start from: exit code {done.returncode}\n{done.stderr}")
        more_files(self, self.work)
        return self

    def apr(self, copy: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run `apr` of a copy in the work folder."""
        for job in {m[1] for x in arguments if (m := re.match(r"runs/sound-of-([\w-]+)", x))} - {self.making}:
            self._sound_run(job)
        return self._run([sys.executable, "-m", "apr.cli.main", *arguments], copy, self.work, stdin)

    def _run(
        self, command: list[str], copy: Path, cwd: Path, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(copy), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {**os.environ, "PYTHONPATH": path, "APR_CACHE": str(self.folder / f"cache-{copy.name}")}
        try:
            return subprocess.run(
                command,
                cwd=cwd,
                env=env,
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
                check=False,
                input=stdin,
            )
        except subprocess.TimeoutExpired as e:
            return subprocess.CompletedProcess(e.cmd, 124, "", f"no end after {LIMIT_S} s")

    def judge(self, mutant: Mutant, tests: bool, is_quick: bool = False, is_brief: bool = False) -> Outcome:
        """Plant a fault, and ask every check."""
        out = Outcome(mutant)
        with self.planted(mutant):
            run = f"runs/{mutant.name}"
            shutil.rmtree(self.work / run, ignore_errors=True)
            # What a faulty copy has prepared serves no other.
            shutil.rmtree(self.folder / "cache-faulty", ignore_errors=True)
            if mutant.job.startswith(COMMANDS):
                kinds = {k for path, _, _ in mutant.edits for k in READERS.get(path.split("/")[1], ())}
                out.seen["pretrain"], out.files = self._commands(
                    self.work / run, kinds if is_brief else set(), mutant.job.partition(":")[2]
                )
                shutil.rmtree(self.work / run, ignore_errors=True)
                return out
            if mutant.job == "resumed":
                self._cut(self.work / run)
            elif mutant.job.startswith(RESUMED):
                self._cut(self.work / run, self._sound_run(mutant.job.removeprefix(RESUMED)), step=9, last=11)
            flags = ("--resume",) if mutant.job.startswith(RESUMED) else JOBS[mutant.job]
            if mutant.job in BEFORE:
                earlier = "runs/before"
                shutil.rmtree(self.work / earlier, ignore_errors=True)
                self.apr(self.faulty, "pretrain", "--run-dir", earlier, *flags, *BEFORE[mutant.job])
            done = self.apr(self.faulty, "pretrain", "--run-dir", run, *flags)
            out.seen["pretrain"] = self._verdict(done, self.work / run)
            out.files = _files(self.work / run)
            if is_brief and (out.seen["pretrain"] or not mutant.edits):
                shutil.rmtree(self.work / run, ignore_errors=True)
                return out
            bisect = ["bisect", BASE, "--picture", ""]
            if mutant.job == "masked":
                bisect += ["--mask-documents", "--seq-length", "48"]
            elif mutant.job in ("odd", "windowed"):
                bisect[1] = f"runs/{self._sound_run(mutant.job)}/ckpt/epoch-002.apr"
                bisect += ["--mask-documents", "--seq-length", "160", "--sides", "cpu/bfloat16"]
            elif mutant.job == "bf16":
                bisect += ["--sides", "cpu/float32,cpu/bfloat16"]
            elif mutant.job in ("window", "qknorm"):
                preset = {"window": "mistral-tiny", "qknorm": "qwen3-tiny"}[mutant.job]
                bisect = ["bisect", preset, "--picture", ""]
            # Elsewhere is nothing that bisect runs.
            if not mutant.edits or any(
                p.startswith(("apr/backends", "apr/model")) for p, _, _ in mutant.edits
            ):
                out.seen["bisect"] = _first_fault(self.apr(self.faulty, *bisect, "--json"))
            # A run that was refused or aborted has said so itself.
            if done.returncode in (0, 9) and (self.work / run / "evidence.json").is_file():
                for name, copy in (("verify", self.faulty), ("outside", self.sound))[: 1 if is_quick else 2]:
                    answer = self.apr(copy, "verify", run, "--replay", "3", "--seed", "1", "--json")
                    out.seen[name] = _failed_checks(answer)
            if tests and mutant.tests:
                pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
                done = self._run([*pytest, *mutant.tests], self.faulty, self.faulty)
                red = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
                out.seen["tests"] = (
                    red[0] if red else "" if not done.returncode else f"exit {done.returncode}"
                )
            shutil.rmtree(self.work / run, ignore_errors=True)
        return out

    def _sound_run(self, job: str) -> str:
        """Train a job by the sound code, once; returns the name of its run."""
        name = f"sound-of-{job}"
        if not (self.work / "runs" / name).is_dir():
            maker = replace(self, making=job)
            done = maker.apr(self.sound, "pretrain", "--run-dir", f"runs/{name}", *JOBS[job])
            if done.returncode:
                raise SystemExit(f"the sound run of {job}: exit code {done.returncode}\n{done.stderr}")
        return name

    def _commands(self, folder: Path, kinds: set[str], names: str = "") -> tuple[str, dict[str, str]]:
        """Export, merge, evaluate and generate with checkpoints of sound runs; what failed, and hashes of what came out.

        kinds: commands that are asked, all where none is named; names: lines that are, whatever their kinds."""
        folder.mkdir(parents=True)
        failed, told = [], {}
        for name, (line, stdin) in LINES.items():
            if name not in names.split(",") if names else kinds and line[0] not in kinds:
                continue
            whole = [x.replace("OUT/", f"runs/{folder.name}/") for x in line]
            done = self.apr(self.faulty, *whole, stdin=stdin)
            failed += (
                [f"{name}: exit {done.returncode}: {_last_line(done.stderr)}"] if done.returncode else []
            )
            out = done.stdout.replace(folder.name, "")
            told[name] = hashlib.sha256(
                re.sub(r'"[a-z_]*(second|_sec|ms|speed)[a-z_]*": [0-9.e+-]+', "", out).encode()
            ).hexdigest()
        return ", ".join(failed), told | _files(folder)

    @contextlib.contextmanager
    def planted(self, mutant: Mutant) -> Iterator[None]:
        """Put a fault into the faulty copy."""
        cache = self.faulty / "apr" / "backends" / "cpu" / "__pycache__"
        kept = cache.with_name("kept")
        compiled = cache.is_dir() and any(
            path.startswith(CPU) and path != CALLS for path, _, _ in mutant.edits
        )
        was: dict[Path, tuple[str, os.stat_result]] = {}
        try:
            for path, old, new in mutant.edits:
                file = self.faulty / path
                text = file.read_text(encoding="utf-8")
                was.setdefault(file, (text, file.stat()))
                if text.count(old) != 1:
                    raise SystemExit(
                        f"{mutant.name}: {path} has its text {text.count(old)} times, not once: {old!r}"
                    )
                file.write_text(text.replace(old, new), encoding="utf-8")
            if compiled:
                # Filled anew for the fault, and put back behind it.
                cache.rename(kept)
            yield
        finally:
            for file, (text, stat) in was.items():
                file.write_text(text, encoding="utf-8")
                os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            if kept.is_dir():
                shutil.rmtree(cache, ignore_errors=True)
                kept.rename(cache)

    def _cut(self, run: Path, source: str = "base", step: int = 6, last: int = 8) -> None:
        """Make what a kill after step `last` would leave of a run: the state of `step`, and lines of the log behind it."""
        shutil.copytree(self.work / "runs" / source, run)
        later = [p for p in (run / "ckpt" / "state").glob("step-*.apr") if int(p.stem[5:]) > step]
        later += [p for p in (run / "ckpt").glob("epoch-*") if int(p.name[6:9]) * 6 > step]
        for path in [
            *later,
            *(run / n for n in ("verdict.json", "evidence.json", "report.html", "loss.png")),
        ]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        log = run / "metrics.jsonl"
        lines = log.read_text().splitlines()
        log.write_text("\n".join(line for line in lines if json.loads(line)["step"] <= last) + "\n")

    def _verdict(self, done: subprocess.CompletedProcess[str], run: Path) -> str:
        """Report the gates that did not pass, or how the process ended."""
        if not done.returncode:
            return ""
        path = run / "verdict.json"
        gates = json.loads(path.read_text())["gates"] if path.is_file() else []
        red = [g["id"] for g in gates if g["verdict"] in ("FAIL", "SUSPECT")]
        return ", ".join(red) or f"exit {done.returncode}: {_last_line(done.stderr)}"


def _files(folder: Path) -> dict[str, str]:
    """Hash what a run or a command has written, but for times."""
    out = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name, data = str(path.relative_to(folder)), b""
        if path.name in ("metrics.jsonl", "samples.jsonl"):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            data = json.dumps([{k: x for k, x in r.items() if k not in TIMES} for r in rows]).encode()
        elif path.name.endswith(".metadata.json"):
            facts = json.loads(path.read_text())
            data = json.dumps({k: x for k, x in facts.items() if k not in TIMES}).encode()
        elif path.suffix == ".apr":
            read = read_apr(path)
            data = json.dumps(sorted(read.metadata.get(HF_FILES, {}).items())).encode() + b"".join(
                k.encode() + np.asarray(x).tobytes() for k, x in sorted(read.tensors.items())
            )
        elif path.suffix in (".gguf", ".safetensors", ".bin") or path.name in (
            "adapter_config.json",
            "config.json",
        ):
            data = path.read_bytes()
        else:
            continue
        out[name] = hashlib.sha256(data).hexdigest()
    return out


def _pairs(inputs: Any) -> list[Any]:
    """Write pairs of answers to the same prompts, of different lengths."""
    rows = []
    for i, text in enumerate(pinned_jobs.stories(inputs, 80)):
        parts = [s.strip() for s in text.split(". ") if s.strip()]
        rows.append({"prompt": f"Tell me story {i}.", "chosen": parts[0], "rejected": f"{parts[-1]} {i}"})
    return [{k: x[:90] for k, x in row.items()} for row in rows]


def _stories_told(inputs: Any) -> list[Any]:
    """Write conversations of two turns, the second of many lengths."""
    rows = []
    for i, text in enumerate(pinned_jobs.stories(inputs, 60, 60)):
        turns = (
            ("user", "Go on."),
            ("assistant", text[:30]),
            ("user", "And?"),
            ("assistant", text[30 : 60 + 3 * i]),
        )
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return rows


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line not in ("FAILED", "REFUSED", "SUSPECT")]
    return lines[-1][:160] if lines else ""


def _first_fault(done: subprocess.CompletedProcess[str]) -> str:
    """Report the op that bisect names."""
    if not done.returncode:
        return ""
    try:
        first = json.loads(done.stdout)["reports"][0]["first"]
        return f"{first['stage']}: {first['op']}, {first['tap']}"
    except (ValueError, KeyError, IndexError, TypeError):
        return f"exit {done.returncode}: {_last_line(done.stderr)}"


def _failed_checks(done: subprocess.CompletedProcess[str]) -> str:
    """Report the checks of `apr verify` that failed."""
    if not done.returncode:
        return ""
    try:
        checks = json.loads(done.stdout)["checks"]
        return ", ".join(c["check"] for c in checks if c["verdict"] in ("FAIL", "SUSPECT")) or "no verdict"
    except (ValueError, KeyError):
        return f"exit {done.returncode}: {_last_line(done.stderr)}"


def from_patch(path: Path, job: str, tests: tuple[str, ...]) -> Mutant:
    """Read a unified diff: one edit per hunk. Raises SystemExit for one that cannot be read."""
    edits, file = [], ""
    hunk: list[str] | None = None
    for line in [*path.read_text(encoding="utf-8").splitlines(), "@@"]:
        if line.startswith(("@@", "--- ", "diff ")):
            if hunk:
                old = "\n".join(x[1:] for x in hunk if x[:1] in (" ", "-"))
                new = "\n".join(x[1:] for x in hunk if x[:1] in (" ", "+"))
                edits.append((file, old, new))
            hunk = [] if line.startswith("@@") else None
        elif line.startswith("+++ "):
            file = line[4:].split("\t")[0].removeprefix("b/")
        elif hunk is not None and line[:1] in (" ", "-", "+"):
            hunk.append(line)
    if not edits:
        raise SystemExit(f"{path}: no hunk of a unified diff; `git diff > {path}` writes one")
    return Mutant(path.stem, f"patch {path.name}", tuple(edits), job, tests)


def rates(outcomes: list[Outcome]) -> dict[str, Any]:
    """Count the faults that each check saw, of those it was asked about."""
    checks = [*RUN_TIME, "outside", "tests"]
    # A fault that did nothing is none to be seen.
    outcomes = [o for o in outcomes if o.has_effect]
    out: dict[str, Any] = {}
    for check in checks:
        asked = [o for o in outcomes if check in o.seen]
        out[check] = [sum(bool(o.seen[check]) for o in asked), len(asked)]
    out["at run time"] = [sum(o.at_run_time for o in outcomes), len(outcomes)]
    out["by anything"] = [sum(any(o.seen.get(check) for check in checks) for o in outcomes), len(outcomes)]
    return out


def record(path: Path, name: str, outcomes: list[Outcome], false_alarms: list[str]) -> None:
    """Write answers and rates of a list into a record; what is there of other faults and of the other list stays."""
    whole = json.loads(path.read_text()) if path.is_file() else {"format": "apr-trust-1"}
    part: dict[str, Any] = whole if name == "first" else whole.setdefault(f"{name} list", {})
    now = {o.mutant.name: {"what": o.mutant.what, "job": o.mutant.job, **o.seen} for o in outcomes}
    known = {m.name: m for m in LISTS[name]}
    found = {n: x for n, x in {**part.get("faults", {}), **now}.items() if n in known}
    every = [Outcome(known[n], {k: x[k] for k in x if k not in ("what", "job")}) for n, x in found.items()]
    whole |= {
        "date": datetime.date.today().isoformat(),
        "processor": cpu_name(),
        "false_alarms": false_alarms,
    }
    part |= {"planted": len(found), "of": len(known), "rates": rates(every), "faults": found}
    write_json(path, whole)


def show(out: Outcome) -> None:
    """Print a fault's line: who saw it."""
    print(
        f"{'seen  ' if out.at_run_time else 'UNSEEN'} {out.mutant.name} ({out.mutant.job}): {out.mutant.what}"
    )
    for check, answer in out.seen.items():
        print(f"         {check:9} {answer or '-'}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the campaign."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="REGEX", default="", help="only the faults whose names match")
    parser.add_argument(
        "--patch", metavar="FILE", type=Path, help="plant this unified diff instead of the list"
    )
    parser.add_argument("--job", choices=JOBS, default="plain", help="with --patch, the job that can show it")
    parser.add_argument(
        "--tests", nargs="*", metavar="PATH", help="also run tests: these, or those of each fault"
    )
    parser.add_argument(
        "--processes", metavar="N", type=int, default=1, help="faults planted at once (default 1)"
    )
    parser.add_argument("--quick", action="store_true", help="do not verify by the sound code too")
    parser.add_argument(
        "--brief",
        action="store_true",
        help="ask bisect and verify only of faults that a run did not see, and train sound runs only to compare silent ones with",
    )
    parser.add_argument("--list", choices=LISTS, default="first", help="which list to plant (default first)")
    parser.add_argument(
        "--record",
        metavar="FILE",
        type=Path,
        help="write answers and rates as JSON; those of other faults stay in it",
    )
    parser.add_argument(
        "--keep-going", action="store_true", help="plant faults though the sound copy is accused"
    )
    f = parser.parse_args(argv)
    faults = [m for m in LISTS[f.list] if re.search(f.only, m.name) or re.fullmatch(f.only, m.job)]
    if f.patch:
        faults = [from_patch(f.patch, f.job, tuple(f.tests or ()))]
    outcomes: list[Outcome] = []
    sound_files: dict[str, dict[str, str]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="apr-mutants-") as folder,
        ThreadPoolExecutor(f.processes) as pool,
    ):
        # A bench for each process: two faults in one copy would be one fault.
        benches: SimpleQueue[Bench] = SimpleQueue()
        for made in pool.map(lambda i: Bench(Path(folder) / str(i)).make(), range(f.processes)):
            benches.put(made)

        def judge(mutant: Mutant) -> Outcome:
            bench = benches.get()
            try:
                out = bench.judge(mutant, f.tests is not None and bool(mutant.edits), f.quick, f.brief)
                if (
                    f.list in COMPARED
                    and mutant.edits
                    and not out.at_run_time
                    and mutant.job not in sound_files
                ):
                    sound_of_job = Mutant(f"sound-{mutant.job}", "nothing is planted", (), mutant.job)
                    sound_files[mutant.job] = bench.judge(sound_of_job, False, True, True).files
                return out
            finally:
                benches.put(bench)

        false_alarms = []
        sound = [
            Mutant(f"sound-{job}", "nothing is planted", (), job) for job in sorted({m.job for m in faults})
        ]
        for outcome in pool.map(judge, [] if f.brief else sound):
            show(outcome)
            job = outcome.mutant.job
            sound_files[job] = outcome.files
            false_alarms += [f"{job}: {check}: {answer}" for check, answer in outcome.seen.items() if answer]
        if false_alarms and not f.keep_going:
            print("the sound copy is accused:", *false_alarms, sep="\n  ")
            return 1
        for outcome in pool.map(judge, faults):
            outcomes.append(outcome)
            if f.list in COMPARED:
                own = sound_files.get(outcome.mutant.job, {})
                if f.brief and outcome.mutant.job == COMMANDS:
                    own = {name: x for name, x in own.items() if name in outcome.files}
                is_same = not outcome.at_run_time and outcome.files == own
                outcome.seen["effect"] = "none" if is_same and outcome.mutant.name not in SHOWN else "some"
            show(outcome)
            if f.record and not f.patch:
                record(f.record, f.list, outcomes, false_alarms)
    for check, (seen, asked) in rates(outcomes).items():
        if asked:
            print(f"{check:12} {seen} of {asked}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
