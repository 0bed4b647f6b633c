"""Numba's settings, and the cache of compiled kernels: not to be written, full, damaged, or filled by two at once."""

from __future__ import annotations

import fcntl
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from numba.core.caching import FunctionCache

from apr.backends.cpu import start

ROOT = Path(__file__).resolve().parents[2]
TINY = """
import os, sys, time
from numba import njit
from apr.backends.cpu import start

def double(x):
    return 2 * x

def triple(x):
    return 3 * x

if start._WARMING in os.environ and "SLOW" in os.environ:
    open(os.environ["SLOW"], "w").write(str(os.getpid()))
    time.sleep(600)
made = [(njit(cache=True)(f), "float32(float32)") for f in (double, triple)]
start.compile_all(made, __name__)
"""
USE = """
import sys
from apr.common.errors import AprError
try:
    from tiny import made
    print([k(7.0) for k, _ in made], [sum(k.stats.cache_hits.values()) for k, _ in made])
except AprError as e:
    print(f"error {e.exit_code}: {e}")
"""
SOUND = "[14.0, 21.0] [1, 1]\n"
Command = list[str]


@pytest.fixture
def tiny(tmp_path: Path):
    """tiny(**environment): a process that computes with two kernels of a module of its own, not yet started."""
    (tmp_path / "tiny.py").write_text(TINY)

    return partial(computing, tmp_path)


def computing(
    folder: Path, code: str = USE, /, limit: int | None = None, **changes: str
) -> subprocess.Popen[str]:
    """A process that computes with the module of a folder."""

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    env = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    env |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "PYTHONDONTWRITEBYTECODE": "1", **changes}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        preexec_fn=limited,
    )


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the module, and with its kernels in "c"."""
    folder = tmp_path_factory.mktemp("filled")
    (folder / "tiny.py").write_text(TINY)
    assert end(computing(folder, NUMBA_CACHE_DIR=str(folder / "c")))[0] == SOUND
    return folder


def end(process: subprocess.Popen) -> tuple[str, str]:
    return process.communicate(timeout=120)


# Settings


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("NUMBA_DISABLE_JIT", "1", "NUMBA_DISABLE_JIT is set"),
        ("NUMBA_NUM_THREADS", "0", "unset NUMBA_NUM_THREADS=0"),
        ("NUMBA_THREADING_LAYER", "none-such", "unset NUMBA_THREADING_LAYER=none-such"),
        ("NUMBA_THREADING_LAYER_PRIORITY", "omp", "unset NUMBA_THREADING_LAYER_PRIORITY=omp"),
        ("NUMBA_CACHE_LOCATOR_CLASSES", "none.Such", "unset NUMBA_CACHE_LOCATOR_CLASSES=none.Such"),
    ],
)
def test_settings_with_which_nothing_can_be_computed(name: str, value: str, said: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), name: value}
    code = "import sys; from apr.cli.main import main; sys.exit(main())"
    command = [
        sys.executable,
        "-c",
        code,
        "plan",
        "--model",
        "llama-demo",
        "--seq-length",
        "16",
        "--device",
        "cpu",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert (done.returncode, done.stdout) == (8, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_folder_does_not_set_numba(tmp_path: Path) -> None:
    """Its cache_dir would name pickles of whoever made the folder."""
    (tmp_path / ".numba_config.yaml").write_text("cache_dir: cache\n")
    code = "import sys; from apr.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "plan", "--model=llama-demo", "--seq-length=16", "--device=cpu"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (8, "")
    assert f"{tmp_path}/.numba_config.yaml: a folder must not say how Numba computes" in done.stderr
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("name", "value", "threads"),
    [
        ("NUMBA_NUM_THREADS", "1", "1"),
        ("NUMBA_NUM_THREADS", "many", None),
        ("OMP_NUM_THREADS", "many", None),
        ("OMP_THREAD_LIMIT", "1", None),
        ("OPENBLAS_NUM_THREADS", "many", None),
    ],
)
def test_settings_that_are_honoured_or_without_effect(name: str, value: str, threads: str | None) -> None:
    """The default of --threads is one that the process can have; products are whole whatever threads there are."""
    code = (
        "import numpy as np; from apr.backends.select import choose; from apr.common.host import cores\n"
        "be = choose('cpu').backend; x = np.arange(40 * 40, dtype=np.float32).reshape(40, 40) / 40; y = np.empty_like(x)\n"
        "be.gemm(y, x, x, 1.0, 0.0, False, True)\n"
        "print(be.describe()['threads'], cores(), np.allclose(y, x @ x.T))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), name: value}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    used, cores, is_right = done.stdout.split()
    assert (used, is_right) == (threads or cores, "True")


# The folder


def test_nowhere_to_cache(tiny, tmp_path: Path) -> None:
    """Neither beside the module nor in the user's cache: among temporary files, with one note, and once."""
    (tmp_path / "__pycache__").write_text("no folder")
    (tmp_path / "t").mkdir()
    nowhere = {"HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none", "TMPDIR": str(tmp_path / "t")}
    # The package itself may have a folder that can be written: that of the module decides here.
    code = f"import numba.core.caching as c; c.CacheImpl._locator_classes.remove(c.InTreeCacheLocator)\n{USE}"
    out, err = end(tiny(code, **nowhere))
    assert out == SOUND
    assert err.count("\n") == 1
    assert "no lasting place" in err
    assert str(tmp_path / "t") in err
    assert end(tiny(code, **nowhere)) == (SOUND, "")
    (folder,) = (tmp_path / "t").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_cache_folder_that_cannot_be_written_is_passed_over(tiny, tmp_path: Path) -> None:
    out, err = end(tiny(NUMBA_CACHE_DIR="/proc/none"))
    assert out == SOUND
    assert (tmp_path / "__pycache__").is_dir()
    assert "no lasting place" not in err


def test_a_full_disk(tiny, tmp_path: Path) -> None:
    out, err = end(tiny(limit=64, NUMBA_CACHE_DIR=str(tmp_path / "c"), TMPDIR=str(tmp_path)))
    assert out.startswith("error 8: the CPU kernels cannot be compiled into")
    assert "NUMBA_CACHE_DIR" in out
    assert "File too large" in out
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("*.tmp.*"))


def test_a_full_disk_and_room_among_temporary_files(tiny, tmp_path: Path) -> None:
    code = (
        "from apr.backends.cpu import start; ask = start._compile_elsewhere\n"
        "def once(*args):\n    start._compile_elsewhere = ask\n    return 'OSError: disk full'\n"
        f"start._compile_elsewhere = once\n{USE}"
    )
    out, err = end(tiny(code, NUMBA_CACHE_DIR=str(tmp_path / "c"), TMPDIR=str(tmp_path)))
    assert out == SOUND
    assert f"{tmp_path / 'c'}" in err
    assert "cannot be filled: OSError: disk full" in err


@pytest.mark.parametrize(
    ("what", "content"),
    [("*.nbi", b""), ("*triple-*.nbi", b"\x80\x05garbage"), ("*double-*.nbc", b""), ("*.nbc", b"cos\nno\n.")],
)
def test_damaged_files_are_written_anew(filled: Path, tmp_path: Path, what: str, content: bytes) -> None:
    shutil.copytree(filled / "c", tmp_path / "c")
    tiny = partial(computing, filled, NUMBA_CACHE_DIR=str(tmp_path / "c"))
    damaged = list((tmp_path / "c").rglob(what))
    assert damaged
    for path in damaged:
        path.write_bytes(content)
    out, err = end(tiny())
    assert out == SOUND
    assert "compiling the CPU kernels" in err
    assert end(tiny()) == (SOUND, "")


# Two processes


def test_a_second_process_waits_for_the_first(filled: Path, tmp_path: Path) -> None:
    shutil.copytree(filled / "c", tmp_path / "c")
    (folder,) = (tmp_path / "c").glob(f"{filled.name}*")
    kept = {p: p.read_bytes() for p in folder.iterdir()}
    for path in kept:
        path.unlink()
    fd = os.open(folder, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    process = computing(filled, NUMBA_CACHE_DIR=str(tmp_path / "c"))
    assert process.stderr is not None
    assert "another process is compiling the CPU kernels; waiting for it" in process.stderr.readline()
    for path, content in kept.items():
        path.write_bytes(content)
    os.close(fd)
    assert end(process) == (SOUND, "")


def test_processes_share_the_kernels(tiny, tmp_path: Path) -> None:
    """Each compiles a part, and the first kernel, which stands for all, comes last: where one of them ends, it does not."""
    (tmp_path / "tiny.py").write_text(TINY.replace("(double, triple)", "(double, triple, double, triple)"))
    code = (
        "import os, sys; from apr.backends.cpu import start\n"
        "start.MAX_PROCESSES, start.PROGRESS_SECONDS, start.cores = 2, 0, lambda: 2\n" + USE
    )
    out, err = end(tiny(code, NUMBA_CACHE_DIR=str(tmp_path / "c"), PYTHONWARNINGS="always::ResourceWarning"))
    assert out == "[14.0, 21.0, 14.0, 21.0] [1, 1, 1, 1]\n"
    assert "compiling the CPU kernels of bfloat16, once (about 10 s)" in err
    assert "of 4 kernels compiled" in err
    assert "unclosed" not in err


def test_kernels_of_other_sources_are_not_in_the_cache(filled: Path) -> None:
    """Numba asks only if the file of the kernel itself is the same, not those of the functions that it calls."""
    code = USE + (
        "from apr.backends.cpu import start\n"
        "print(start.is_cached(made))\n"
        "start._sources = lambda: 'changed'\n"
        "print(start.is_cached(made))"
    )
    out, err = end(computing(filled, code, NUMBA_CACHE_DIR=str(filled / "c")))
    assert (out, err) == (SOUND + "True\nFalse\n", "")


def test_files_that_kernels_are_made_of_are_their_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = start._sources()
    for file in Path(start.__file__).parent.glob("*.py"):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(start, "__file__", str(tmp_path / "start.py"))

    def after(name: str) -> str:
        with (tmp_path / name).open("a") as f:
            f.write("# changed\n")
        return start._sources.__wrapped__()

    assert after("ops.py") == before
    assert after("tiles.py") != before


def test_functions_that_kernels_call_are_not_cached_apart() -> None:
    """Such a one would stay when another file changes: a kernel compiled anew would be made of code of two ages."""
    files = [p.stem for p in Path(start.__file__).parent.glob("*.py") if p.name not in start._WITHOUT_KERNELS]
    rooms = [vars(import_module(f"apr.backends.cpu.{name}")) for name in files]
    kernels = {id(k) for room in rooms for name in ("_kernels", "low") for k, _ in room.get(name, ())}
    cached = [
        x for room in rooms for x in room.values() if isinstance(getattr(x, "_cache", None), FunctionCache)
    ]
    assert len(kernels & {id(x) for x in cached}) > 20
    assert [x.py_func.__qualname__ for x in cached if id(x) not in kernels] == []


def test_signatures_of_a_kernel_share_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """They share an index on disk: two processes that write it would leave one signature with the code of the other."""
    compiled: dict[str, list[str]] = {}

    class Kernel:
        def __init__(self, name: str) -> None:
            self.py_func = SimpleNamespace(__module__="m", __qualname__=name)
            self._cache = SimpleNamespace(_cache_file=SimpleNamespace(_source_stamp=(1, 2)))

        def compile(self, signature: str) -> None:
            compiled.setdefault(os.environ[start._WARMING], []).append(
                f"{self.py_func.__qualname__} {signature}"
            )

    kernels = [(Kernel(name), n) for n, name in enumerate(["a", "b", "c", "b", "d", "a"])]
    monkeypatch.setattr(sys, "stdin", io.StringIO(start._OTHERS_ENDED))
    for part in (1, 0):
        monkeypatch.setenv(start._WARMING, f"m {part} 2")
        start.compile_all(kernels, "m")
    assert compiled == {"m 1 2": ["c 2"], "m 0 2": ["b 1", "b 3", "d 4", "a 5", "a 0"]}


def test_a_process_that_compiles_and_ends(tiny, tmp_path: Path) -> None:
    """Nothing says that all kernels are there when one of two processes was killed."""
    breaks = "if os.environ.get(start._WARMING, '').endswith('1 2'):\n    os.kill(os.getpid(), 9)\nmade = ["
    four = TINY.replace("(double, triple)", "(double, triple, double, triple)")
    (tmp_path / "tiny.py").write_text(four.replace("made = [", breaks))
    code = "from apr.backends.cpu import start\nstart.cores = lambda: 2\n" + USE
    out, _ = end(tiny(code, NUMBA_CACHE_DIR=str(tmp_path / "c"), TMPDIR=str(tmp_path)))
    assert "error 8" in out
    assert "ended with code -9" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_kernels_are_compiled(tiny, tmp_path: Path, number: int) -> None:
    """One line, and the process that compiles ends too."""
    code = (
        "import sys, types; from apr.cli import main as m\n"
        "def main(args):\n    import tiny\n"
        "sys.modules['apr.cli.plan'] = types.SimpleNamespace(main=main)\n"
        "sys.exit(m.main(['plan']))"
    )
    mark = tmp_path / "pid"
    process = tiny(code, NUMBA_CACHE_DIR=str(tmp_path / "c"), SLOW=str(mark))
    assert process.stderr is not None
    assert "compiling" in process.stderr.readline()
    while not mark.exists() or not mark.read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    assert end(process) == ("", "apr plan: interrupted\n")
    assert process.returncode == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)
