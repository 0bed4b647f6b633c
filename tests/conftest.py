"""What all tests share: where the real data lies, and threads that do not spin."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# Before NumPy and Numba load. Tests multiply tiny matrices, often several runs on one machine: threads that spin while
# they wait for each other make them ten times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# What a terminal, a user, a launcher of jobs or a hook of git has set: widths of help and tables, colours, the user's own
# cache, ranks, another repository.
os.environ.update(COLUMNS="80", LINES="24")
for name in (
    "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "APR_CACHE", "APR_RANK", "APR_RANKS", "APR_RANKS_AT",
    "APR_RANKS_RESULT", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE", "SLURM_NTASKS",
    "GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE", "GIT_OPTIONAL_LOCKS",
):  # fmt: skip
    os.environ.pop(name, None)
# A shell ignores Ctrl-C for what it runs in the background, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
SLOWEST_FILES = 12  # that are named at the end
LONG_TEXTS = 10_000  # characters; fewer are encoded at once
SUPPORT = ROOT / "tests" / "support"  # on the path by setup.cfg, but for tests of this file elsewhere
sys.path += [] if str(SUPPORT) in sys.path else [str(SUPPORT)]


@pytest.fixture(scope="session")
def data() -> Callable[[str], Path]:
    """data("NAME"): a file or folder of the real data, in $APR_TEST_DATA or else ../shared/data beside the
    repository. Skips the test, saying what is missing, where there is none."""
    root = Path(os.environ.get("APR_TEST_DATA", ROOT.parent / "shared" / "data"))

    def find(name: str) -> Path:
        path = root / name
        if not path.exists():
            pytest.skip(f"no real data: {path} does not exist (set APR_TEST_DATA)")
        return path

    return find


@pytest.fixture(scope="session")
def cuda() -> ModuleType:
    """The cuda backend on the first GPU. Skips the test, saying why, where there is none."""
    from apr.backends.select import choose
    from apr.common.errors import DeviceError

    try:
        backend = choose("cuda").backend
    except DeviceError as e:
        pytest.skip(str(e))
    if os.environ.get(
        "APR_SANITIZE"
    ):  # arrays beside each other in CuPy's pool would hide a write past the end
        import cupy

        cupy.cuda.set_allocator(None)
    return backend


@pytest.fixture(scope="session", autouse=True)
def clean_process() -> Iterator[None]:
    """The fresh process at the end of a run is a fork of a clean one: tests make hundreds of runs."""
    from apr.evidence import end
    from clean_process import CleanProcess

    with pytest.MonkeyPatch.context() as m:
        clean = CleanProcess()
        m.setattr(end, "subprocess", clean)
        yield
        clean.end()


@pytest.fixture(scope="session", autouse=True)
def one_picture() -> Iterator[None]:
    """The first run draws its losses, the others copy the picture: it takes longer than the steps of a small run."""
    from apr.common.atomic import atomic_write
    from apr.training import run as running

    draw, found = running.loss_curve, list[bytes]()

    def picture(*given: Any) -> None:
        path = given[-1]
        if found:
            with atomic_write(path) as f:
                f.write(found[0])
        else:
            draw(*given)
            found.append(path.read_bytes())

    with pytest.MonkeyPatch.context() as m:
        m.setattr(running, "loss_curve", picture)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_rate() -> Iterator[None]:
    """The rate of a product of the processor is measured by the first run, and again by those that were faster than it says:
    it takes longer than the steps of a small run."""
    from apr.evidence import end, measure

    real, measured, known = end._speed, end.matmul_rate, dict[Any, float]()

    def rate(backend: ModuleType, dtype: str) -> float:
        known[dtype] = max(known.get(dtype, 0.0), found := measured(backend, dtype))
        return found

    def speed(t: Any, flops: float, most: float) -> Any:
        # A test that has a rate of its own is asked for it.
        least = known.get(t.model.dtype, 0.0) if t.backend.name == "cpu" and end.matmul_rate is rate else 0.0
        return measure.speed(flops, least, most) if least and flops <= most * least else real(t, flops, most)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(end, "matmul_rate", rate)
        m.setattr(end, "_speed", speed)
        yield


@pytest.fixture(scope="module", autouse=True)
def encoded_once() -> Iterator[None]:
    """What a tokenizer makes of texts that it has encoded in a file of tests is found, not encoded again: every run on a
    folder of shards encodes the same documents of it."""
    from apr.tokenizer.tokenizer import Tokenizer

    encode, found = Tokenizer.encode_batch, dict[tuple[Any, ...], list[Any]]()

    def encode_batch(self: Tokenizer, texts: Sequence[str], add_special_tokens: bool = False) -> list[Any]:
        key = (self.json, tuple(texts), add_special_tokens)
        if sum(map(len, texts)) < LONG_TEXTS:
            return encode(self, texts, add_special_tokens)
        if key not in found:
            found[key] = encode(self, texts, add_special_tokens)
        return [ids.copy() for ids in found[key]]

    with pytest.MonkeyPatch.context() as m:
        m.setattr(Tokenizer, "encode_batch", encode_batch)
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that takes `cuda` is marked gpu, and one that is marked gpu takes `cuda`, so that it skips."""
    for item in items:
        names = getattr(item, "fixturenames", [])
        if "cuda" in names:
            item.add_marker("gpu")
        elif item.get_closest_marker("gpu"):
            item.fixturenames = ["cuda", *names]  # not insert: the items of a function share the list


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the slowest files of a whole run, so that growth is seen."""
    seconds: Counter[str] = Counter()
    for report in chain.from_iterable(terminalreporter.stats.values()):
        if isinstance(report, pytest.TestReport):
            seconds[report.nodeid.split("::")[0]] += report.duration
    if len(seconds) > SLOWEST_FILES:
        slowest = "".join(f"\n{s:6.0f}  {name}" for name, s in seconds.most_common(SLOWEST_FILES))
        terminalreporter.write_line(f"slowest files, of {seconds.total():.0f} s:{slowest}")
