"""Prove that a change of the code changes no behaviour: record a pinned set of jobs, and compare two records.

    python tools/pinned.py record before.json --apr path/to/the/commit/before/.venv/bin/apr
    python tools/pinned.py record after.json
    python tools/pinned.py compare before.json after.json        exit code 1 when anything differs
    python tools/pinned.py compare a.json b.json --strict        help texts and messages too
    python tools/pinned.py record part.json --only demo lora     some jobs; compare leaves the others out

The jobs (tools/pinned_jobs.py) go through the command line alone, and files are read here by their formats, so
that any commit can be recorded. Recorded are tensors, states, logs, verdicts, shards, exported files, exit codes
and what --json prints. The tables below name everything that is left out, with the reason. Prose stands apart:
`behaviour` keeps only the numbers of a sentence, `messages` the sentence itself, `help` the text of --help.

Real data comes from $APR_TEST_DATA (default: ../shared/data beside the checkout). Records of two machines, Python
versions or numbers of cores can differ in last bits: compare records of one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pinned_jobs

FORMAT = "apr-pinned-1"
ROOT = Path(__file__).resolve().parents[1]
SHOWN = 40  # differences of a job that `compare` prints without --all
LONG = 400  # characters of a text, or of a list of numbers as JSON, above which its SHA-256 is recorded

# Fields that are left out wherever they occur in JSON.
LEFT_OUT = {
    "wall_ms": "time",
    "wall_seconds": "time",
    "seconds": "time",
    "sample_seconds": "time",
    "first_token_seconds": "time",
    "created_at": "time",
    "hours_at_limit": "follows from speed",
    "tokens_per_sec": "speed",
    "tokens_per_sec_limit": "speed",
    "prompt_tokens_per_sec": "speed",
    "new_tokens_per_sec": "speed",
    "matmul_flops_per_sec": "speed",
    "best_flops": "speed",
    "available_bytes": "free memory of the machine",
    "fits": "follows from free memory",
    "cpu": "name of the processor",
    "versions": "versions of packages",
    "producer": "version of apr and of a package",
    "by": "version of apr or of a package",
    "git_commit": "names the commit",
    "code_sha256": "hash of apr's own source",
}
# Rows of checklists (gates, `apr qa`) whose figures are left out; the verdict is kept.
TIMED = {
    "before.device": "names the processor",
    "before.memory": "free memory of the machine",
    "end.speed": "speed",
    "footer checksum": "covers the date in the metadata",
    "speed": "speed",
}
ROW_NAMES = ("id", "gate", "name", "check")  # fields that name a row of a checklist
# Fields of prose: their numbers are behaviour, their words are messages.
PROSE = {
    "measured", "bound", "why", "protects", "bound_from", "look_at", "changed", "figure", "note", "notes", "message",
    "cause", "detail",
}  # fmt: skip
FIGURES = PROSE - {"protects", "bound_from", "look_at"} | {"score"}  # what a row of TIMED loses
# Files of which only the existence is recorded.
UNREAD = {
    "evidence.json": "hashes of files that hold times",
    ".html": "shows times and versions",
    ".png": "pixels depend on versions of fonts and of the plotting package",
    ".lock": "empty",
}

BY_BYTES = {"tokenizer.json", "vocab.json"}  # JSON without fields of LEFT_OUT, too large to keep its values

# magic, major, minor, flags, tensors, metadata at, its size, index at, data at, CRC, reserved
APR_HEADER = struct.Struct("<4sBBHIQIQQI20s")
NUMBER = re.compile(
    r"0x[0-9a-f]+|\b(?=[0-9a-f]*\d)[0-9a-f]{12,64}\b|(?<![\w.-])[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?"
)
CHECKSUM = re.compile(r"\b0x[0-9a-f]{8}\b")  # of files with a date in them
PREPARED = re.compile(
    r"\bcorpora/[0-9a-f]{16}\b"
)  # cache folder of a corpus, named by its path on this machine


def main() -> int:
    """Run the command line; returns the exit code: 1 when records differ."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    r = commands.add_parser("record", help="run the jobs and write a record")
    r.add_argument("output", type=Path, help="record to write, JSON")
    r.add_argument(
        "--apr", type=Path, default=Path(sys.executable).with_name("apr"), help="executable to run"
    )
    r.add_argument(
        "--work", type=Path, help="new folder for what the jobs write, kept (default: a temporary one)"
    )
    r.add_argument("--only", nargs="+", metavar="NAME", help=f"jobs, of {', '.join(pinned_jobs.JOBS)}")
    r.add_argument("--jobs", type=int, default=2, help="jobs at a time")
    c = commands.add_parser("compare", help="print every difference of two records")
    c.add_argument("a", type=Path)
    c.add_argument("b", type=Path)
    c.add_argument("--strict", action="store_true", help="help texts and messages count too")
    c.add_argument("--all", action="store_true", help=f"print more than {SHOWN} differences of a job")
    f = p.parse_args()
    if f.command == "compare":
        return print_differences(read(f.a), read(f.b), f.strict, f.all)
    if unknown := set(f.only or ()) - set(pinned_jobs.JOBS):
        p.error(f"--only {', '.join(sorted(unknown))}: choose from {', '.join(pinned_jobs.JOBS)}")
    if f.work and f.work.exists() and any(f.work.iterdir()):
        p.error(f"--work {f.work}: not empty; give a new folder")
    data = Path(os.environ.get("APR_TEST_DATA", ROOT.parent / "shared" / "data")).resolve()
    if not (data / "stories260K").is_dir():
        p.error(f"{data}: no stories260K in it; set APR_TEST_DATA to the folder of real data")
    with nullcontext(f.work) if f.work else tempfile.TemporaryDirectory(prefix="pinned-") as work:
        record = record_jobs(f.apr, Path(work), data, f.only or list(pinned_jobs.JOBS), f.jobs)
    f.output.write_text(_text(record) + "\n", encoding="utf-8")
    return 0


def _text(value: Any, depth: int = 3) -> str:
    """Write JSON with a line for each label of a job."""
    if not depth or not isinstance(value, dict) or not value:
        return json.dumps(value, sort_keys=True, ensure_ascii=False)
    return (
        "{\n"
        + ",\n".join(f"{json.dumps(k)}: {_text(v, depth - 1)}" for k, v in sorted(value.items()))
        + "\n}"
    )


def record_jobs(apr: Path, work: Path, data: Path, names: Sequence[str], at_once: int) -> dict[str, Any]:
    """Run jobs, each in a folder of its own below `work`; returns the whole record."""
    seconds: dict[str, float] = {}

    def one(name: str) -> Recorder:
        recorder, start = Recorder(apr, work / name, data, name), time.monotonic()
        pinned_jobs.JOBS[name](recorder)
        seconds[name] = round(time.monotonic() - start, 1)
        print(f"{seconds[name]:6.1f} s  {name}", flush=True)
        return recorder

    with ThreadPoolExecutor(at_once) as pool:  # the longest jobs are the last of the table: they begin first
        done = {r.job: r for r in pool.map(one, [n for n in reversed(pinned_jobs.JOBS) if n in names])}
    return {
        "format": FORMAT,
        "complete": set(names) == set(pinned_jobs.JOBS),
        "made": {  # `compare` notes differences of these, and does not count them
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "seconds": seconds,
            "left_out": {**LEFT_OUT, **TIMED, **UNREAD},
        },
        "behaviour": {name: r.behaviour for name, r in done.items()},
        "help": {command: text for r in done.values() for command, text in r.help.items()},
        "messages": {name: r.messages for name, r in done.items()},
    }


class Recorder:
    """Runs the commands of a job in a folder of its own, and keeps the results in three sections, by label."""

    def __init__(self, apr: Path, work: Path, data: Path, job: str) -> None:
        work.mkdir(parents=True)
        self.apr, self.work, self.data, self.job = apr.absolute(), work.resolve(), data, job
        self.behaviour: dict[str, Any] = {}
        self.messages: dict[str, str] = {}
        self.help: dict[str, str] = {}
        self._texts: set[tuple[str, str]] = set()  # (field, sentence) that are recorded already
        # COLUMNS fixes where lines break; APR_COMMIT stands for the checkout's own, which differs by commit.
        self.env = {
            **os.environ, "APR_CACHE": str(self.work / "cache"), "APR_COMMIT": "pinned", "COLUMNS": "110",
            "NO_COLOR": "1", "TERM": "dumb", "PYTHONHASHSEED": "0",
        }  # fmt: skip

    # What jobs call

    def run(self, label: str, *args: str | Path, expect: int = 0, stdin: str = "") -> str:
        """Run `apr ARGS` in the work folder and record its exit code, with --json what it prints, and the message
        of a failure. Returns standard output. expect: exit code of a sound commit; another is reported at once."""
        done = self._run([str(a) for a in args], stdin)
        self.put(f"{label}: exit code", done.returncode)
        if done.returncode != expect:
            found = f"exit code {done.returncode}, not {expect}: {done.stderr[-500:]}"
            print(f"{self.job}, {label}: {found}", file=sys.stderr)
        if done.returncode not in (0, 9):
            self._message(f"{label}: stderr", done.stderr)
        if "--json" in args and done.stdout.strip():
            try:
                self.put(label, json.loads(done.stdout))
            except ValueError:
                self.put(label, f"no JSON: {done.stdout}")
        return done.stdout

    def run_text(self, label: str, *args: str | Path, expect: int = 0, stdin: str = "") -> None:
        """Like `run`, for output in words: it is recorded as a message."""
        self._message(f"{label}: stdout", self.run(label, *args, expect=expect, stdin=stdin))

    def put(self, label: str, value: Any) -> None:
        """Record a value, plain data, without what is left out."""
        self.behaviour[label] = self._plain(value, label)

    def put_help(self, command: str) -> None:
        """Record the help text of a command ("" for apr itself); its hash is no behaviour."""
        self.help[f"apr {command}".strip()] = self._scrub(self._run([*command.split(), "--help"]).stdout)

    def keep(self, label: str, path: Path | str) -> None:
        """Record a file, or every file of a folder, by what its format says."""
        whole = self.work / path
        if whole.is_dir():
            files = sorted(p for p in whole.rglob("*") if p.is_file())
            self.put(f"{label}: files", [p.relative_to(whole).as_posix() for p in files])
            for p in files:
                self._file(f"{label}/{p.relative_to(whole).as_posix()}", p)
        elif whole.is_file():
            self._file(label, whole)
        else:
            self.put(label, "missing")

    # How

    def _run(self, args: Sequence[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
        command = [str(self.apr), *args]
        return subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            cwd=self.work,
            env=self.env,
            check=False,
        )

    def _file(self, label: str, path: Path) -> None:
        if path.name in UNREAD or path.suffix in UNREAD:
            return
        data = path.read_bytes()
        try:
            self.put(label, _read_file("" if path.name in BY_BYTES else path.suffix, data))
        except (ValueError, struct.error, KeyError):  # damaged on purpose, or by a fault
            self.put(label, {"sha256": sha(data)})

    def _message(self, label: str, text: str) -> None:
        self.messages[label] = CHECKSUM.sub("0x...", self._scrub(text))

    def _scrub(self, text: str) -> str:
        """Replace the folders of this machine by names, and drop blanks at the ends of lines."""
        for folder, name in ((self.work, "$WORK"), (self.data, "$DATA"), (self.apr.parent, "$BIN")):
            text = text.replace(str(folder), name)
        text = PREPARED.sub("corpora/...", text)
        return "\n".join(line.rstrip() for line in text.split("\n"))

    def _plain(self, value: Any, where: str) -> Any:
        """Drop LEFT_OUT and TIMED from a value, and replace prose by its numbers, what is LONG by its SHA-256."""
        if isinstance(value, dict):
            timed = any(isinstance(value.get(k), str) and value[k] in TIMED for k in ROW_NAMES)
            kept = {k: v for k, v in value.items() if k not in LEFT_OUT and not (timed and k in FIGURES)}
            return {k: self._field(k, v, f"{where}/{k}") for k, v in kept.items()}
        if isinstance(value, list):
            if all(isinstance(x, int | float) for x in value) and len(text := json.dumps(value)) > LONG:
                return f"{len(value)} numbers, sha256 {sha(text.encode())}"
            return [self._plain(x, f"{where}/{i}") for i, x in enumerate(value)]
        if isinstance(value, str):
            text = self._scrub(value)
            return text if len(text) <= LONG else f"{len(text)} characters, sha256 {sha(text.encode())}"
        return value

    def _field(self, name: str, value: Any, where: str) -> Any:
        if name not in PROSE or isinstance(value, dict | int | float) or not value:
            return self._plain(value, where)
        text = self._scrub(value if isinstance(value, str) else json.dumps(value))
        if (name, text) not in self._texts:
            self._texts.add((name, text))
            self._message(where, text)
        return " ".join(NUMBER.findall(text))


def _read_file(suffix: str, data: bytes) -> Any:
    """Plain data that stands for a file: JSON itself, and for tensors their SHA-256 beside the metadata.

    Raises ValueError, struct.error, KeyError."""
    if suffix == ".json":
        return json.loads(data)
    if suffix == ".jsonl":
        return [json.loads(line) for line in data.splitlines() if line.strip()]
    if suffix == ".apr":
        fields = APR_HEADER.unpack(data[:64])
        meta_at, meta_size, index_at, data_at = fields[5:9]
        return {
            "header": [fields[0].decode(), *fields[1:5]],
            "metadata": json.loads(data[meta_at : meta_at + meta_size]),
            "index": sha(data[index_at:data_at]),
            "tensors": sha(data[data_at:-4]),
        }
    if suffix == ".safetensors":
        end = 8 + struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8:end])
        facts = {k: json.loads(v) if v[:1] == "{" else v for k, v in header.pop("__metadata__", {}).items()}
        return {"metadata": facts, "index": sha(json.dumps(header).encode()), "tensors": sha(data[end:])}
    return {"bytes": len(data), "sha256": sha(data)}


def sha(data: bytes) -> str:
    """SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def read(path: Path) -> dict[str, Any]:
    """Read a record; ends the program where the file is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] == FORMAT:
            return record
    except (OSError, ValueError, KeyError, TypeError):
        pass
    sys.exit(f"{path}: not a record of {FORMAT}; write one with: python tools/pinned.py record {path}")


def print_differences(a: dict[str, Any], b: dict[str, Any], strict: bool, everything: bool) -> int:
    """Print every difference by name, job by job; returns 1 when there is any."""
    for key in ("python", "machine"):
        if a["made"][key] != b["made"][key]:
            print(f"note: {key} is {a['made'][key]} in a, {b['made'][key]} in b")
    count = compared = 0
    for section in ("behaviour", "messages", "help") if strict else ("behaviour",):
        x, y = a[section], b[section]
        chosen = [name for name in {**x, **y} if _answers(a, name, section) and _answers(b, name, section)]
        left = sorted({*x, *y} - {*chosen})
        if left:
            print(f"note: {section} of {len(left)} jobs is in one record only: {', '.join(left)}")
        for name in chosen:
            found = list(differences(x.get(name), y.get(name), f"{section} of {name}"))
            compared, count = compared + 1, count + len(found)
            shown = found if everything else found[:SHOWN]
            print(*shown, sep="\n", end="\n" if shown else "")
            if len(found) > len(shown):
                print(f"... and {len(found) - len(shown)} more of {section} of {name}; --all shows them")
    word = "DIFFERENT" if count else "EQUAL" if compared else "NOTHING TO COMPARE"
    print(f"{word}: {count} differences in {compared} parts")
    return int(word != "EQUAL")


def _answers(record: dict[str, Any], name: str, section: str) -> bool:
    """Tell whether a record can answer for a job: a complete one can for all. Help is a job of its own."""
    job = "help" if section == "help" else name
    return record["complete"] or job in record["made"]["seconds"]


def differences(x: Any, y: Any, where: str) -> Iterator[str]:
    """Yield one line for each leaf that is not the same in two values of plain data."""
    if isinstance(x, dict) and isinstance(y, dict):
        for key in {**x, **y}:
            if key not in y or key not in x:
                side, value = ("b", x[key]) if key in x else ("a", y[key])
                yield f"{where} > {key}: not in {side}; {_short(value)} in the other"
            else:
                yield from differences(x[key], y[key], f"{where} > {key}")
    elif isinstance(x, list) and isinstance(y, list) and len(x) == len(y):
        for i, (p, q) in enumerate(zip(x, y, strict=True)):
            yield from differences(p, q, f"{where} > {i}")
    elif repr(x) != repr(y):  # NaN equals itself here, 1 is not 1.0
        yield f"{where}: {_short(x)} in a, {_short(y)} in b"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 300 else f"{text[:300]} ..."


if __name__ == "__main__":
    sys.exit(main())
