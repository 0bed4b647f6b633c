"""Judge programs that a model wrote, in processes that can compute and do nothing else.

Each program runs in a process of its own (python -I -S, its own session, an empty environment and working directory,
standard streams to nowhere, limits of time, memory, file size and processes) and its tests in another one; see
`sandboxed.py`, which both run. On Linux x86-64 a seccomp filter leaves the program only what computing takes: no sockets,
no new processes or threads, no signals to others (trying one ends it), no file opened to write. Where the system lets it,
a user and network namespace of its own comes on top; where there is no seccomp, an audit hook of Python stands in, which a
program written to get around it can. What was in force is part of every verdict.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.errors import AprError
from . import sandboxed

SCRIPT = Path(sandboxed.__file__)
SLACK_SECONDS = 2.0  # on top of the limit, for two interpreters to start on a busy machine
MAX_VERDICT_BYTES = 1 << 16


class NoSandbox(AprError):
    """Programs cannot be judged on this machine."""

    exit_code = 8


@dataclass(frozen=True)
class Limits:
    """Resources of one program. seconds: of a clock on the wall, and of one CPU."""

    seconds: float = 5.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20
    layers: tuple[str, ...] = sandboxed.LAYERS


@dataclass(frozen=True)
class Program:
    """One program to judge: source that defines `entry_point`; `test` defines check(candidate), which raises where an answer
    is wrong, and may use what `prompt` defines."""

    source: str
    entry_point: str
    test: str
    prompt: str = ""


@dataclass(frozen=True)
class Judgement:
    """Result of the tests: passed, the reason if not, and the isolation that was in force."""

    passed: bool
    why: str = ""
    isolation: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def judge(program: Program, limits: Limits = Limits()) -> Judgement:
    """Run one program and its tests. Whatever the program does, this returns within its time and leaves nothing behind.

    Raises NoSandbox: a process cannot be started."""
    start = time.monotonic()
    job = {
        "program": program.source,
        "prompt": program.prompt,
        "test": program.test,
        "entry_point": program.entry_point,
        "layers": list(limits.layers),
        "limits": {
            "cpu_seconds": math.ceil(limits.seconds),
            "memory_bytes": limits.memory_bytes,
            "file_bytes": limits.file_bytes,
        },
    }
    with tempfile.TemporaryDirectory(prefix="apr-eval-", ignore_cleanup_errors=True) as folder:
        try:
            with _pair(folder) as (candidate, tester):
                said = _verdict(tester, json.dumps(job).encode(), limits.seconds + SLACK_SECONDS)
                ended = _ended(candidate)
        except OSError as e:
            raise NoSandbox(f"programs cannot be run here: {sys.executable}: {e.strerror or e}") from None
    seconds = time.monotonic() - start
    if said is None:
        return Judgement(False, f"no verdict within {limits.seconds:g} s", {}, seconds)
    why = said["why"]
    if not said["passed"] and ended and "ended before" in why:
        why += f" ({ended})"
    return Judgement(bool(said["passed"]), why, said["isolation"], seconds)


@contextlib.contextmanager
def _pair(folder: str) -> Iterator[tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]]:
    """Start the processes of the program and of its tests, with a pipe in each direction; end both afterwards."""
    calls, replies = os.pipe(), os.pipe()
    ours = [*calls, *replies]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for role, ends, streams in (
            ("candidate", (calls[0], replies[1]), (subprocess.DEVNULL, subprocess.DEVNULL)),
            ("tester", (replies[0], calls[1]), (subprocess.PIPE, subprocess.PIPE)),
        ):
            started.append(
                subprocess.Popen(
                    [sys.executable, "-I", "-S", str(SCRIPT), role, *map(str, ends)],
                    stdin=streams[0],
                    stdout=streams[1],
                    stderr=subprocess.DEVNULL,
                    pass_fds=ends,
                    cwd=folder,
                    env={},
                    start_new_session=True,
                )
            )
        while ours:
            os.close(ours.pop())
        yield started[0], started[1]
    finally:
        for end in ours:
            os.close(end)
        for process in started:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream:
                    with contextlib.suppress(OSError):
                        stream.close()


def _verdict(tester: subprocess.Popen[bytes], job: bytes, seconds: float) -> dict[str, Any] | None:
    """Read the tester's verdict; None without one in time."""
    try:
        out, _ = tester.communicate(job, timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    try:
        said = json.loads(out[:MAX_VERDICT_BYTES])
    except ValueError:
        return {"passed": False, "why": "the tests ended before they had a verdict", "isolation": {}}
    return said if isinstance(said, dict) else None


def _ended(process: subprocess.Popen[bytes]) -> str:
    """Describe the end of a process; "" while it still runs after a moment."""
    try:
        code = process.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        return ""
    said = {
        -signal.SIGXCPU: "stopped by its limit of time",
        -signal.SIGKILL: "killed: its limit of time or memory",
        -signal.SIGSYS: "stopped at a system call that is forbidden",
        sandboxed.FORBIDDEN: "stopped at something that is forbidden, or exit code 77",
    }
    return said.get(code) or (f"signal {-code}" if code < 0 else f"exit code {code}")


RIGHT = "def answer(x):\n    return x + 1\n"
WRONG = {
    "a wrong answer": "def answer(x):\n    return x\n",
    "an early exit": "import os\nos._exit(0)\n",
    "a socket": "import socket\ntry:\n    socket.socket()\nexcept Exception:\n    pass\n" + RIGHT,
    "a new process": "import os\ntry:\n    os.fork()\nexcept Exception:\n    pass\n" + RIGHT,
    "a written file": "open('written', 'w')\n" + RIGHT,
}


def proven(limits: Limits) -> dict[str, Any]:
    """Prove, before anything is judged, that a right program passes here and that wrong and forbidden ones do not; what
    is in force. Raises NoSandbox."""
    test = "def check(candidate):\n    assert candidate(1) == 2\n"
    good = judge(Program(RIGHT, "answer", test), limits)
    if not good.passed:
        raise NoSandbox(
            f"programs cannot be judged here: one that is right did not pass ({good.why}); is {sys.executable} able to run "
            "with -I -S and an empty environment?"
        )
    for what, source in WRONG.items():
        if judge(Program(source, "answer", test), limits).passed:
            raise NoSandbox(f"programs cannot be judged safely here: one with {what} passed")
    return good.isolation


def judge_all(programs: Iterable[Program], limits: Limits, workers: int) -> Iterator[Judgement]:
    """Judge programs, `workers` at once; results in the order of the programs."""
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda p: judge(p, limits), programs)


def in_words(isolation: dict[str, Any]) -> str:
    """Describe the isolation for a reader."""
    found = isolation.get("program", {})
    if found.get("seccomp") == "on":
        parts = ["seccomp (no sockets, no new processes, no signals, no files written)"]
    else:
        parts = [f"Python's audit hook, which can be got around (seccomp: {found.get('seccomp', 'unknown')})"]
    space = found.get("namespace", "unknown")
    parts.append("a user and network namespace" if space == "on" else f"no namespace ({space})")
    return "; ".join([*parts, "limits of time, memory and processes; tests in a process apart"])
