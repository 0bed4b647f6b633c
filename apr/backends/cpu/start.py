# mypy: ignore-errors
"""Start Numba: judge its settings, find a folder for compiled kernels, fill it once, and read from it ever after."""

import os
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

from ...common.atomic import locked
from ...common.errors import DeviceError
from ...common.printable import printable
from ...common.temporary import private_temporary


def settings():
    """Name the settings of Numba that this process was given, for a message."""
    names = [name for name in sorted(os.environ) if name.startswith("NUMBA_") and name != "NUMBA_CACHE_DIR"]
    given = [f"{name}={os.environ[name]}" for name in names]
    given += [".numba_config.yaml in this folder"] if os.path.exists(".numba_config.yaml") else []
    return f"; unset {' and '.join(given)}" if given else ""


try:
    import numba
    from numba.core.caching import FunctionCache
except ValueError as e:
    raise DeviceError(f"Numba does not start: {e}{settings()}") from None

_temporary = []  # the folder of elsewhere(), once it is used
_WARMING = "APR_COMPILES_KERNELS"  # set in the process that fills Numba's cache


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


def compile_all(kernels, module):
    """Compile (kernel, signature) pairs of a module, or read them from Numba's cache on disk.

    Code that Numba has just compiled may add in another order than the same code from its cache (a
    parallel loop exists twice then, optimised apart), so that a first run would differ from the next
    in the last bit. Therefore another process fills the cache, and this one always reads it."""
    start_threads()
    if _WARMING in os.environ:
        _read(kernels)
        return
    if not _is_cached(kernels):
        _fill(kernels, module)
    try:
        _read(kernels)
    except Exception:  # damaged files, in whatever way: they are written anew
        _forget(kernels)
        _fill(kernels, module)
        _read(kernels)
    for k, _ in kernels:
        k.disable_compile()  # other dtypes are an error


def _read(kernels):
    """Read kernels from the cache, and compile what is not in it; the first one last: where it is, all are."""
    for k, signature in reversed(kernels):
        k.disable_compile(False)
        k.compile(signature)


def _is_cached(kernels):
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


def _fill(kernels, module):
    """Fill the cache in another process, or wait for one that does; where that fails, once more in a temporary folder."""
    first = kernels[0][0]
    while True:
        folder = Path(first._cache.cache_path)
        with ExitStack() as stack:
            with suppress(OSError):  # without locks two processes do the same work
                stack.enter_context(locked(folder, "compiling the CPU kernels", _say_waiting))
            if _is_cached(kernels):
                return
            where = f" into {folder}, no lasting place for them can be written" if _temporary else ""
            _say(f"compiling the CPU kernels, once (about 20 s){where}")
            reason = _compile_in_another_process(module)
            if _is_cached(kernels):
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


def _compile_in_another_process(module):
    """Import the module in a process that compiles; returns the last line that it said."""
    env = {**os.environ, _WARMING: "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    # In a session of its own, for Ctrl-C in a terminal reaches all processes in it: this one ends the other.
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}"],
        env=env,
        check=False,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else f"the process ended with code {done.returncode} and said nothing"


def _say_waiting():
    _say("another process is compiling the CPU kernels; waiting for it")


def _say(text):
    print(printable(f"apr: {text} ..."), file=sys.stderr, flush=True)
