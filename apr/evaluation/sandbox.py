"""Judge programs that a model wrote, in processes that can compute and do nothing else.

Each program runs in a process of its own (python -I -S, its own session, an empty environment and working directory,
standard streams to nowhere, limits of time, memory, file size and processes) and its tests in another one; see
`sandboxed.py`, which both run. It sees no file but what Python needs and no process of others: a root of its own, made by
bubblewrap where that is found, else by a user namespace; Landlock besides, or where there are no namespaces (`walls.py`).
On Linux x86-64 a seccomp filter leaves it only what computing takes: no sockets, no new processes or threads, no signals to
others (trying one ends it), no file opened to write. Where the system offers too little of that, nothing is judged, unless
the caller allows it: an audit hook of Python then stands in, which a program written to get around it can. What was in
force is part of every verdict.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.errors import AprError, Refused
from . import sandboxed, walls

SCRIPT = Path(sandboxed.__file__)
BUBBLEWRAP = "on, by bubblewrap"
PROBE_SECONDS = 30.0  # for bubblewrap to show that it starts Python
PR_GET_DUMPABLE = 3
SLACK_SECONDS = 2.0  # on top of the limit, for two interpreters to start on a busy machine
MAX_SECONDS = 86_400  # of one program
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
    around = bubblewrap(sys.executable, shutil.which("bwrap")) if "namespace" in limits.layers else ()
    job = {
        "program": program.source,
        "prompt": program.prompt,
        "test": program.test,
        "entry_point": program.entry_point,
        "layers": list(limits.layers),
        "files": _files(),
        "inside": BUBBLEWRAP if around else "",
        "limits": {
            "cpu_seconds": math.ceil(limits.seconds),
            "memory_bytes": limits.memory_bytes,
            "file_bytes": limits.file_bytes,
        },
    }
    with tempfile.TemporaryDirectory(prefix="apr-eval-", ignore_cleanup_errors=True) as folder:
        try:
            with _memory_closed(), _pair(folder, around) as (candidate, tester):
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


@functools.cache
def _files() -> dict[str, list[str]]:
    return walls.python_files()


@functools.cache
def bubblewrap(python: str, program: str | None) -> tuple[str, ...]:
    """Make the command line up to Python's own arguments; () where bubblewrap is not found or starts no Python."""
    if program is None:
        return ()
    started = os.path.realpath(python)
    command = [
        *walls.bubblewrap_command(program, _files(), [str(SCRIPT), walls.__file__, started]),
        started,
        "-I",
        "-S",
    ]
    nowhere = subprocess.DEVNULL
    try:
        done = subprocess.run(
            [*command, "-c", ""], stdin=nowhere, stdout=nowhere, stderr=nowhere, env={}, timeout=PROBE_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return () if done.returncode else tuple(command)


_closing, _closed = threading.Lock(), 0


@contextlib.contextmanager
def _memory_closed() -> Iterator[None]:
    """Close the memory and the environment of this process to others of its user, as long as programs run."""
    global _closed
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    with _closing:
        was = libc.prctl(PR_GET_DUMPABLE, 0, 0, 0, 0) if libc and not _closed else 0
        if libc and was:
            libc.prctl(sandboxed.PR_SET_DUMPABLE, 0, 0, 0, 0)
        _closed += 1
    try:
        yield
    finally:
        with _closing:
            _closed -= 1
            if libc and not _closed:
                libc.prctl(sandboxed.PR_SET_DUMPABLE, 1, 0, 0, 0)


@contextlib.contextmanager
def _pair(
    folder: str, around: Sequence[str]
) -> Iterator[tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]]:
    """Start the processes of the program and of its tests, with a pipe in each direction; end both afterwards."""
    command = around or (sys.executable, "-I", "-S")
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
                    [*command, str(SCRIPT), role, *map(str, ends)],
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
    # bubblewrap ends with 128 + N where the program ended by signal N.
    return said.get(code) or said.get(128 - code) or (f"signal {-code}" if code < 0 else f"exit code {code}")


RIGHT = "def answer(x):\n    return x + 1\n"
WRONG = {
    "a wrong answer": "def answer(x):\n    return x\n",
    "an early exit": "import os\nos._exit(0)\n",
    "a socket": "import socket\ntry:\n    socket.socket()\nexcept Exception:\n    pass\n" + RIGHT,
    "a new process": "import os\ntry:\n    os.fork()\nexcept Exception:\n    pass\n" + RIGHT,
    "a written file": "open('written', 'w')\n" + RIGHT,
}


# Only asked where the system hides files and processes: what must fail then.
PRYING = {
    "a file of this machine": "open({path!r}, 'rb').read(1)\n",
    "a process of this machine": "import os\nopen('/proc/%d/cmdline' % os.getppid(), 'rb').read(1)\n",
}


def proven(limits: Limits, allow_unsafe: bool = False, secret: str = "") -> dict[str, Any]:
    """Prove, before anything is judged, that a right program passes here and that wrong, forbidden and prying ones do not;
    what is in force.

    allow_unsafe  judge also where the system cannot hide its files and processes from a program
    secret        a file that no program may read, the benchmark's for instance

    Raises NoSandbox; Refused: too little isolation."""
    test = "def check(candidate):\n    assert candidate(1) == 2\n"
    good = judge(Program(RIGHT, "answer", test), limits)
    if not good.passed:
        raise NoSandbox(
            f"programs cannot be judged here: one that is right did not pass ({good.why}); is {sys.executable} able to run "
            "with -I -S and an empty environment?"
        )
    wrong = dict(WRONG)
    if is_walled := isolated(good.isolation):
        path = os.path.abspath(secret or __file__)
        wrong |= {what: source.format(path=path) + RIGHT for what, source in PRYING.items()}
    for what, source in wrong.items():
        if judge(Program(source, "answer", test), limits).passed:
            raise NoSandbox(f"programs cannot be judged safely here: one with {what} passed")
    if not is_walled and not allow_unsafe:
        raise Refused(
            "programs that a model wrote are not run here: nothing keeps them from the files and processes of this machine "
            f"({in_words(good.isolation)}); install bubblewrap, use Linux 5.13 or newer with Landlock, or give --allow-unsafe "
            "to run them all the same"
        )
    return good.isolation


def isolated(isolation: dict[str, Any]) -> bool:
    """Tell whether the system itself, not Python, keeps a program from files, processes and the network."""
    found = isolation.get("program", {})
    keeps_calls = found.get("seccomp") == "on" or found.get("namespace") == BUBBLEWRAP
    return sandboxed.hides_files(found) and keeps_calls


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
    space, lock = found.get("namespace", "unknown"), found.get("landlock", "unknown")
    if space.startswith("on"):
        by = " made by bubblewrap" if space == BUBBLEWRAP else ""
        parts.append(f"a root of its own{by}, without this machine's files, processes and network")
    else:
        parts.append(f"no root of its own ({space})")
    parts.append("Landlock (no files but Python's own)" if lock == "on" else f"no Landlock ({lock})")
    if not sandboxed.hides_files(found):
        parts.append("files hidden by Python's audit hook, which can be got around")
    return "; ".join([*parts, "limits of time, memory and processes; tests in a process apart"])
