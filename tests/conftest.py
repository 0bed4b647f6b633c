"""What all tests share: where the real data lies, and threads that do not spin."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# Before NumPy and Numba load. Tests multiply tiny matrices, often several runs on one machine: threads that spin while
# they wait for each other make them ten times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

ROOT = Path(__file__).resolve().parents[1]
SLOWEST_FILES = 12  # that are named at the end
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


@pytest.fixture(scope="module", autouse=True)
def one_picture() -> Iterator[None]:
    """The first run of a file draws its losses, the others copy the picture: it takes longer than the steps of a small run."""
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
