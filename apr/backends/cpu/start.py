# mypy: ignore-errors
"""Start Numba: judge its settings, find a folder for compiled kernels, fill it once, and read from it ever after."""

import os
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from threading import Thread

from ...common.atomic import locked
from ...common.errors import DeviceError
from ...common.files import sha256_of
from ...common.host import cores
from ...common.printable import printable
from ...common.temporary import private_temporary

# Settings of Numba in the working folder, and among them where compiled kernels lie: files that Numba runs as it reads them.
SETTINGS_FILE = ".numba_config.yaml"
if os.path.lexists(SETTINGS_FILE):
    raise DeviceError(
        f"{os.path.abspath(SETTINGS_FILE)}: a folder must not say how Numba computes, or where its compiled kernels lie: "
        "whoever made the folder could run code here; run apr in another folder, or give its settings as NUMBA_ variables"
    )


def settings():
    """Name the settings of Numba that this process was given, for a message."""
    names = [name for name in sorted(os.environ) if name.startswith("NUMBA_") and name != "NUMBA_CACHE_DIR"]
    given = [f"{name}={os.environ[name]}" for name in names]
    return f"; unset {' and '.join(given)}" if given else ""


try:
    import numba
    from numba.core.caching import FunctionCache
except ValueError as e:
    raise DeviceError(f"Numba does not start: {e}{settings()}") from None

_temporary = []  # the folder of elsewhere(), once it is used
_WARMING = "APR_COMPILES_KERNELS"  # in a process that fills Numba's cache: the module, which part of how many
_COMPILED, _OTHERS_ENDED = "compiled", "others ended\n"
MAX_PROCESSES = 4  # that compile, some 200 MB each
PROGRESS_SECONDS = 15
_KINDS = {"kernels": "", "vectors": " in vectors of 512 bits"}
_WITHOUT_KERNELS = {"__init__.py", "ops.py", "start.py"}


def start_numba():
    """Choose the folder of Numba's cache. Raises DeviceError: settings with which nothing can be computed."""
    if numba.config.DISABLE_JIT:
        raise DeviceError(
            "NUMBA_DISABLE_JIT is set: the kernels of the CPU are compiled by Numba or not there at all; unset it"
        )
    try:
        FunctionCache(start_numba)
    except RuntimeError:  # no locator: neither NUMBA_CACHE_DIR nor apr's folder nor the user's can be written
        elsewhere()


def start_threads(n=None):
    """Let Numba use n threads, or as many as it does. Raises DeviceError: settings with which no thread starts."""
    try:
        numba.set_num_threads(n or numba.get_num_threads())
    except (ValueError, ImportError) as e:
        reason = " ".join(str(e).split())
        raise DeviceError(f"Numba cannot start threads: {reason}{settings()}") from None


def elsewhere():
    """Let Numba, here and in processes that this one starts, keep what it compiles among this user's temporary files.

    Raises DeviceError: there is no place for those either."""
    folder = private_temporary("numba")
    if folder is None:
        raise DeviceError(
            "no folder for compiled kernels: neither apr's own, nor the user's cache, nor one for temporary files can be "
            "written; set NUMBA_CACHE_DIR to one that can"
        )
    numba.config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"] = str(folder)
    _temporary.append(folder)
    try:
        FunctionCache(start_numba)
    except RuntimeError as e:
        raise DeviceError(f"Numba has no folder for compiled kernels: {e}{settings()}") from None


def compile_all(kernels, module, seconds=20):
    """Compile (kernel, signature) pairs of a module, or read them from Numba's cache on disk.

    Code that Numba has just compiled may add in another order than the same code from its cache (a
    parallel loop exists twice then, optimised apart), so that a first run would differ from the next
    in the last bit. Therefore other processes fill the cache, and this one always reads it. seconds: on one core."""
    start_threads()
    _stamp(kernels)
    if _WARMING in os.environ:
        _compile_part(kernels, module)
        return
    if not is_cached(kernels):
        _fill(kernels, module, seconds)
    try:
        _read(kernels)
    except Exception:  # damaged files, in whatever way: they are written anew
        _forget(kernels)
        _fill(kernels, module, seconds)
        _read(kernels)
    for k, _ in kernels:
        k.disable_compile()  # other dtypes are an error


@cache
def _sources():
    """Hash the files of this room that hold kernels: Numba asks of one in its cache only if its own file is still the same, not
    those of the functions that it calls."""
    files = sorted(p for p in Path(__file__).parent.glob("*.py") if p.name not in _WITHOUT_KERNELS)
    return tuple(sha256_of(p)[0] for p in files)


def _stamp(kernels):
    """Let the cache of kernels hold for these sources alone."""
    for k, _ in kernels:
        file = k._cache._cache_file
        if not (isinstance(file._source_stamp, tuple) and file._source_stamp[-1] == _sources()):
            file._source_stamp = (file._source_stamp, _sources())


def _compile_part(kernels, module):
    """Compile what this process was asked for; the first kernel of all when the other processes have ended."""
    target, part, parts = os.environ[_WARMING].split()
    if module != target:
        return
    # All signatures of a kernel by one process: they share an index on disk.
    names = list(dict.fromkeys(_name(k) for k, _ in kernels))
    own = set(names[1 + int(part) :: int(parts)])
    for k, signature in kernels:
        if _name(k) in own:
            k.compile(signature)
            sys.stdout.write(f"{_COMPILED}\n")
            sys.stdout.flush()
    if part == "0":
        if parts != "1" and sys.stdin.readline() != _OTHERS_ENDED:
            return
        for k, signature in reversed(kernels):
            if _name(k) == names[0]:
                k.compile(signature)


def _name(kernel):
    return kernel.py_func.__module__, kernel.py_func.__qualname__


def _read(kernels):
    """Read kernels from the cache, and compile what is not in it; the first one last: where it is, all are."""
    for k, signature in reversed(kernels):
        k.disable_compile(False)
        k.compile(signature)


def is_cached(kernels):
    """Say whether kernels are in Numba's cache; damaged files are taken away."""
    _stamp(kernels)
    first, signature = kernels[0]
    try:
        return first._cache.load_overload(signature, first.targetctx) is not None
    except Exception:  # damaged files
        _forget(kernels)
        return False


def _forget(kernels):
    """Write empty indices in the place of those that name damaged files."""
    with suppress(OSError):
        for k, _ in kernels:
            k._cache.flush()


def _fill(kernels, module, seconds):
    """Fill the cache in other processes, or wait for those that do; where that fails, once more in a temporary folder."""
    first = kernels[0][0]
    while True:
        folder = Path(first._cache.cache_path)
        with ExitStack() as stack:
            with suppress(OSError):  # without locks two processes do the same work
                stack.enter_context(locked(folder, "compiling the CPU kernels", _say_waiting))
            if is_cached(kernels):
                return
            where = f" into {folder}, no lasting place for them can be written" if _temporary else ""
            parts = max(1, min(cores(), MAX_PROCESSES, len(kernels) // 2))
            kind = _KINDS.get(module.rpartition(".")[2], " of bfloat16")
            _say(f"compiling the CPU kernels{kind}, once (about {max(5, seconds // parts)} s){where}")
            reason = _compile_elsewhere(module, parts, len(kernels))
            if is_cached(kernels):
                return
        if _temporary:
            break
        _say(f"{folder} cannot be filled: {reason}")
        elsewhere()
        for k, _ in kernels:
            k.enable_caching()
    raise DeviceError(
        f"the CPU kernels cannot be compiled into {folder}: {reason}; set NUMBA_CACHE_DIR to a folder with 20 MB to spare"
        f"{settings()}"
    )


def _compile_elsewhere(module, parts, number):
    """Import the module in processes that compile a part of its kernels each; returns why one of them failed, if one did."""
    command, processes, lines = [sys.executable, "-c", f"import {module}"], [], []
    path = os.pathsep.join(p for p in sys.path if p)

    def listen(process, said):
        said.extend(line.decode("utf-8", "replace").strip() for line in process.stdout)

    try:
        for part in range(parts):
            env = {**os.environ, _WARMING: f"{module} {part} {parts}", "PYTHONPATH": path}
            # In a session of its own, for Ctrl-C in a terminal reaches all processes in it: this one ends the others.
            process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            said = []
            processes.append((process, Thread(target=listen, args=(process, said), daemon=True)))
            lines.append(said)
            processes[-1][1].start()
        last = time.monotonic()
        for process, _ in [*processes[1:], processes[0]]:
            if process is processes[0][0]:
                with suppress(OSError):
                    if not any(other.returncode for other, _ in processes[1:]):
                        process.stdin.write(_OTHERS_ENDED.encode())
                    process.stdin.close()
            while process.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(1)
                if time.monotonic() - last > PROGRESS_SECONDS:
                    last = time.monotonic()
                    _say(f"{sum(said.count(_COMPILED) for said in lines)} of {number} kernels compiled")
    finally:
        for process, listener in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
            listener.join()
            process.stdout.close()
            with suppress(OSError):
                process.stdin.close()
    failed = [i for i, (process, _) in enumerate(processes) if process.returncode] or [0]
    said = [line for line in lines[failed[0]] if line and line != _COMPILED]
    return (
        said[-1]
        if said
        else f"the process ended with code {processes[failed[0]][0].returncode} and said nothing"
    )


def _say_waiting():
    _say("another process is compiling the CPU kernels; waiting for it")


def _say(text):
    print(printable(f"apr: {text} ..."), file=sys.stderr, flush=True)
