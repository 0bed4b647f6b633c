"""Runs readers on variants of sound files, and reports whatever is neither accepted nor answered with an AprError.

A finding is: another exception, a reader that takes too much time or memory, a process that dies, a message that names
no file or cannot be printed. Variants that reach a line of apr that none reached before become seeds themselves.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import multiprocessing
import multiprocessing.connection
import os
import random
import re
import resource
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import apr
from apr.common.errors import AprError
from fuzz_formats import FORMATS, MIB, SPECIAL, Case, Format, clear, put, taken

SOURCE = str(Path(apr.__file__).parent)
CHUNK = 4000  # cases of a format that share what they found out; each chunk starts from the sound files again
# Following lines and allocations takes five times the time of reading: it is done with the first cases of a chunk and
# then with every TRACED-th. Of the others the resident memory is measured.
ALWAYS_TRACED, TRACED = 100, 40
MOST_SEEDS = 400
LARGEST_SEED = 200_000  # bytes
KEPT = 3  # inputs stored of each kind of finding


@dataclass(frozen=True)
class Limits:
    """What reading one case may take.

    seconds   of CPU; four times as long by the clock, and a process that does not even answer then is killed
    multiple  bytes of memory for each byte of the files (a JSON object of one key takes 232 bytes in Python, 8 in a file),
              beside what the Format allows whatever their size
    address   bytes of address space that a worker may add: what the allocators of libraries see
    """

    seconds: float = 5.0
    multiple: float = 48.0
    address: int = 1 << 30


@dataclass
class Outcome:
    """What became of one case: "accepted", the name of an AprError class, or what is wrong with the reader."""

    result: str
    finding: bool
    seconds: float = 0.0
    peak: int = 0


@dataclass
class Tally:
    """Sums over cases of one format; findings by kind: how often, and the cases that are kept."""

    files: int = 0
    results: Counter[str] = field(default_factory=Counter)
    findings: Counter[str] = field(default_factory=Counter)
    kept: dict[str, list[Case]] = field(default_factory=dict)
    slowest: float = 0.0  # seconds
    peak: int = 0  # bytes
    multiple: float = 0.0  # of the size of the files, beyond 1 MiB
    lines: int = 0  # of apr reached, in the chunk that reached most

    def count(self, outcome: Outcome, case: Case, size: int) -> None:
        self.files += 1
        self.slowest = max(self.slowest, outcome.seconds)
        self.peak = max(self.peak, outcome.peak)
        self.multiple = max(self.multiple, (outcome.peak - MIB) / max(size, 1))
        if outcome.finding:
            self.find(outcome.result, case)
        else:
            self.results[outcome.result] += 1

    def find(self, kind: str, case: Case) -> None:
        self.findings[kind] += 1
        kept = self.kept.setdefault(kind, [])
        if len(kept) < KEPT:
            kept.append(case)

    def add(self, other: Tally) -> None:
        self.files += other.files
        self.results += other.results
        self.findings += other.findings
        for kind, cases in other.kept.items():
            mine = self.kept.setdefault(kind, [])
            mine += cases[: KEPT - len(mine)]
        for name in ("slowest", "peak", "multiple", "lines"):
            setattr(self, name, max(getattr(self, name), getattr(other, name)))


class _TimeUp(BaseException):
    """Raised by the timer inside a reader."""


class Coverage:
    """Which lines of apr were reached; `fresh` says that there were new ones since it was last set to False."""

    def __init__(self) -> None:
        self._left: dict[int, set[int]] = {}  # lines not reached yet, by id of the code
        self._codes: list[CodeType] = []  # alive, so that ids stay theirs
        self.lines, self.fresh = 0, False

    def call(self, frame: FrameType, event: str, arg: Any) -> Any:
        """For sys.settrace."""
        code = frame.f_code
        left = self._left.get(id(code))
        if left is None:
            ours = code.co_filename.startswith(SOURCE)
            left = {line for *_, line in code.co_lines() if line} if ours else set()
            self._left[id(code)] = left
            self._codes.append(code)
        return self._line if left else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            left = self._left[id(frame.f_code)]
            if frame.f_lineno in left:
                left.discard(frame.f_lineno)
                self.lines += 1
                self.fresh = True
        return self._line


class _Peak:
    """The most memory taken since it was made, in bytes: allocations where tracemalloc is on, else what is resident."""

    def __init__(self) -> None:
        self._traced = tracemalloc.is_tracing()
        if self._traced:
            tracemalloc.reset_peak()
            self._before = tracemalloc.get_traced_memory()[0]
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
            self._before = self._resident()

    @staticmethod
    def _resident() -> int:
        status = Path("/proc/self/status").read_bytes()
        at = status.index(b"VmHWM:")
        return int(status[at + 6 : status.index(b"kB", at)]) << 10

    def __call__(self) -> int:
        return (tracemalloc.get_traced_memory()[1] if self._traced else self._resident()) - self._before


def attempt(
    fmt: Format, folder: Path, size: int, limits: Limits, coverage: Coverage | None = None
) -> Outcome:
    """Read one case, which lies in a folder."""

    def up(number: int, frame: object) -> None:
        raise _TimeUp

    was = signal.signal(signal.SIGALRM, up)
    taken = _Peak()
    start, cpu = time.perf_counter(), time.process_time()
    try:
        signal.setitimer(signal.ITIMER_REAL, 4 * limits.seconds)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                if coverage:
                    sys.settrace(coverage.call)
                fmt.read(folder)
            result, finding = "accepted", False
        finally:
            sys.settrace(None)
            signal.setitimer(signal.ITIMER_REAL, 0)
    except AprError as e:
        problem = _unhelpful(e, folder)
        result, finding = (
            (f"{type(e).__name__} {problem} at {_where(e)}", True) if problem else (type(e).__name__, False)
        )
    except _TimeUp as e:
        result, finding = f"hangs at {_where(e)}", True
    except (Exception, SystemExit) as e:
        result, finding = f"{type(e).__name__} at {_where(e)}", True
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt):
            raise
        result, finding = f"{type(e).__name__} at {_where(e)}", True  # such as the panic of a Rust library
    finally:
        signal.signal(signal.SIGALRM, was)
    cpu = time.process_time() - cpu
    peak = taken()
    if not finding and cpu > limits.seconds:
        result, finding = "takes too long", True
    if not finding and peak > fmt.fixed + limits.multiple * size:
        result, finding = "takes too much memory", True
    return Outcome(result, finding, time.perf_counter() - start, peak)


def _unhelpful(error: AprError, folder: Path) -> str:
    """What is wrong with a message, or ""."""
    text = str(error)
    if any(not c.isprintable() and c != "\n" for c in text):
        return "has a message that cannot be printed"
    if len(text) > 5000:
        return f"has a message of {len(text) // 1000} thousand characters"
    if str(folder) not in text:
        return "has a message that names no file"
    return ""


def _where(error: BaseException) -> str:
    """The innermost place in apr that an exception went through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(SOURCE)]
    if not frames:
        return "the reader of the fuzzer"
    return f"apr{frames[-1].filename.removeprefix(SOURCE)}:{frames[-1].lineno} in {frames[-1].name}"


def variants(fmt: Format, seed: int, chunk: int) -> Iterator[tuple[Case, Callable[[bool], None]]]:
    """The cases of a chunk without end, each with a function that makes it a seed of the later ones, told whether it was
    accepted."""
    corpus = {True: fmt.seeds(), False: []}  # accepted and refused
    number = 0
    while True:
        rng = random.Random(f"{seed} {fmt.name} {chunk} {number}")
        number += 1
        # Most variants of a file that is refused are refused at the same place.
        parent = rng.choice(corpus[not corpus[False] or rng.random() < 0.8])
        case = fmt.mutate(rng, parent, rng.choice(corpus[True]))

        def keep(accepted: bool, case: Case = case) -> None:
            if sum(map(len, case.values())) <= LARGEST_SEED and len(corpus[accepted]) < MOST_SEEDS:
                corpus[accepted].append(case)

        yield case, keep


def run_chunk(
    fmt: Format,
    seed: int,
    chunk: int,
    count: int,
    limits: Limits,
    scratch: Path,
    start: int = 0,
    hear: Callable[[Tally], None] | None = None,
) -> Tally:
    """Cases start..count-1 of a chunk, in this process; the case that is being read lies in `scratch`."""
    tally, coverage = Tally(), Coverage()
    for number, (case, keep) in enumerate(variants(fmt, seed, chunk)):
        if number >= count:
            break
        if number < start:
            continue
        folder = scratch / f"case-{number}"
        size = put(folder, case)
        traced = number < ALWAYS_TRACED or number % TRACED == 0
        if traced:
            tracemalloc.start()
        outcome = attempt(fmt, folder, size, limits, coverage if traced else None)
        tracemalloc.stop()
        clear(folder)
        tally.count(outcome, case, size)
        tally.lines = coverage.lines
        if coverage.fresh:
            keep(outcome.result == "accepted")
            coverage.fresh = False
        if hear and tally.files >= 25:
            hear(tally)
            tally = Tally()
    return tally


# Workers


def worker(
    fmt: Format,
    seed: int,
    chunk: int,
    count: int,
    limits: Limits,
    scratch: Path,
    start: int,
    pipe: multiprocessing.connection.Connection,
) -> None:
    """A chunk in a process of its own, which sends its tallies: what kills it does not kill the fuzzer."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a Rust panic tells the world
    os.environ["RUST_BACKTRACE"] = "0"  # which would take 50 MiB to find the names of functions
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    address = pages * resource.getpagesize() + limits.address
    resource.setrlimit(resource.RLIMIT_AS, (address, address))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        pipe.send(run_chunk(fmt, seed, chunk, count, limits, scratch, start, pipe.send))
        pipe.send(None)
    except Exception:
        pipe.send(traceback.format_exc())


@dataclass
class _Job:
    """A chunk at work. done: cases that were told of. process is None until it starts."""

    fmt: Format
    chunk: int
    count: int
    done: int = 0
    process: Any = None
    pipe: Any = None
    scratch: Path = Path()
    heard: float = 0.0


def fuzz(
    formats: list[Format],
    cases: int,
    seed: int = 1,
    jobs: int = 1,
    limits: Limits | None = None,
    progress: Callable[[dict[str, Tally]], None] | None = None,
    minutes: float = math.inf,
) -> dict[str, Tally]:
    """`cases` variants in all, shared out among formats by their `share`, in `jobs` processes at a time; or as many as there
    is time for."""
    limits = limits or Limits()
    end = time.monotonic() + 60 * minutes
    total = sum(f.share for f in formats)
    waiting: list[_Job] = []
    for fmt in formats:
        left = -(-cases * fmt.share // total)
        waiting += [_Job(fmt, i, min(CHUNK, left - at)) for i, at in enumerate(range(0, left, CHUNK))]
    waiting.sort(key=lambda job: job.chunk)
    tallies = {f.name: Tally() for f in formats}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fuzz_formats"])
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as root:
        running: list[_Job] = []
        try:
            while (waiting or running) and time.monotonic() < end:
                while waiting and len(running) < jobs:
                    running.append(_start(waiting.pop(0), context, seed, limits, Path(root)))
                multiprocessing.connection.wait([job.pipe for job in running], timeout=1)
                for job in list(running):
                    if _advance(job, tallies[job.fmt.name], limits):
                        running.remove(job)
                        if job.done < job.count:
                            waiting.insert(0, _Job(job.fmt, job.chunk, job.count, job.done))
                if progress:
                    progress(tallies)
        finally:
            for job in running:
                job.process.kill()
                job.process.join()
    return tallies


def _start(job: _Job, context: Any, seed: int, limits: Limits, root: Path) -> _Job:
    job.pipe, end = context.Pipe(duplex=False)
    job.scratch = Path(tempfile.mkdtemp(dir=root))
    args = (job.fmt, seed, job.chunk, job.count, limits, job.scratch, job.done, end)
    job.process = context.Process(target=worker, args=args, daemon=True)
    job.process.start()
    end.close()
    job.heard = time.monotonic()
    return job


def _advance(job: _Job, tally: Tally, limits: Limits) -> bool:
    """Take what a job sent; whether it is over. A case that killed its process, or hangs beyond signals, is a finding."""
    end = ""
    try:
        while job.pipe.poll():
            part = job.pipe.recv()
            job.heard = time.monotonic()
            if isinstance(part, str):
                raise RuntimeError(f"the fuzzer itself fails on {job.fmt.name}:\n{part}")
            if part is None:
                job.done = job.count
                break
            tally.add(part)
            job.done += part.files
    except EOFError:
        end = "dies"
    if job.done < job.count and not end and time.monotonic() - job.heard > 60 + 25 * limits.seconds:
        end = "hangs beyond the reach of signals"
        job.process.kill()
    if job.done < job.count and not end:
        return False
    job.process.join()
    job.pipe.close()
    if end:
        last = sorted(job.scratch.iterdir(), key=lambda p: int(p.name[5:]))[-1:]
        code = job.process.exitcode
        kind = f"the process {end}" + (
            f" of {signal.Signals(-code).name}" if code < 0 else f" with code {code}"
        )
        tally.find(kind, taken(last[0]) if last else {})
        number = int(last[0].name[5:]) if last else job.done
        tally.files += number + 1 - job.done
        job.done = number + 1
    clear(job.scratch)
    return True


# Storing


def store(folder: Path, fmt: Format, kind: str, case: Case) -> Path:
    """A case as FOLDER/FORMAT-hash.tar, for `replay`."""
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(repr(sorted(case.items())).encode()).hexdigest()[:12]
    path = folder / f"{fmt.name}-{digest}.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in {**case, ".kind": kind.encode()}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def replay(path: Path, limits: Limits | None = None) -> tuple[Outcome, str]:
    """Read a stored case again, in this process; and the traceback of whatever comes out of the reader."""
    fmt = FORMATS[path.name.split("-")[0]]
    with tarfile.open(path) as tar:
        case = {m.name: tar.extractfile(m).read() for m in tar.getmembers() if m.name != ".kind"}  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "case"
        size = put(folder, case)
        tracemalloc.start()
        outcome = attempt(fmt, folder, size, limits or Limits())
        tracemalloc.stop()
        clear(folder)
        put(folder, case)
        text = io.StringIO()
        if outcome.result.startswith("hangs"):
            return outcome, ""
        with contextlib.redirect_stderr(text):
            try:
                fmt.read(folder)
            except BaseException:
                traceback.print_exc(file=text)
    return outcome, re.sub(r"\n *\^+(?=\n)", "", text.getvalue())


__all__ = ["FORMATS", "SPECIAL", "Limits", "Outcome", "Tally", "fuzz", "replay", "run_chunk", "store"]
