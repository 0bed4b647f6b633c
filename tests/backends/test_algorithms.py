"""Which cuBLASLt algorithm is chosen, and what is remembered of it on disk."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr.backends.cuda import autotune as _algorithms
from apr.backends.cuda import matmul as cublaslt
from apr.backends.cuda.autotune import Algorithm, Cache
from apr.common.errors import DeviceError
from fake_cublaslt import GPU, VERSION, Library, errors, matrix, products, wrong


def searched(
    tmp_path: Path, ms: list[float], faults: dict[int, str] | None = None
) -> tuple[cublaslt.Products, Library, list[str]]:
    """Products whose algorithms were timed, the library, and the lines of progress."""
    library, lines = Library(len(ms), faults), list[str]()
    lt = products(tmp_path, library, ms)
    with lt.tuning(lines.append):
        errors(lt, "bfloat16", 5, 16, 32, 0)
    return lt, library, lines


@pytest.mark.parametrize(
    ("ms", "faults", "chosen"),
    [
        ([3.0, 1.0, 2.0], {}, 1),
        ([3.0, 1.0, 2.0], {1: "edge"}, 2),
        ([3.0, 1.0, 2.0], {1: "nan"}, 2),
        ([3.0, 1.0, 2.0], {1: "refuse"}, 2),
        ([3.0, 1.0, 2.0], {1: "edge", 2: "nan"}, 0),
        ([3.0, 1.0, 2.0], {0: "refuse"}, 1),
        ([3.0, 2.98, 3.5], {}, 0),  # within the noise of the heuristic's choice
        ([3.0, 1.0, 1.0], {0: "nan"}, 0),  # nothing to compare with
    ],
)
def test_search_takes_the_fastest_right_one(
    tmp_path: Path, ms: list[float], faults: dict[int, str], chosen: int
) -> None:
    lt, library, lines = searched(tmp_path, ms, faults)
    assert errors(lt, "bfloat16", 5, 16, 32, 0) == (
        [] if faults.get(chosen) is None else ["y", "dx", "dw", "dw begun"]
    )
    assert library.used == chosen
    assert [line.split()[0] for line in lines] == ["forward", "grad_input", "grad_weight"]
    first = next(m for i, m in enumerate(ms) if faults.get(i) != "refuse")
    assert all(f"{first:.4f} -> {ms[chosen]:.4f} ms" in line for line in lines)


def test_search_sees_a_product_that_is_not_added(tmp_path: Path) -> None:
    """Only dw is added to: there the algorithm that ignores beta is wrong, elsewhere it is right."""
    lt, _, _ = searched(tmp_path, [3.0, 1.0, 2.0], {1: "beta"})
    assert [ms for _, ms, _ in lt.table()] == [1.0, 1.0, 2.0]


def test_search_leaves_the_gradient_of_one_call(tmp_path: Path) -> None:
    rng, library = np.random.default_rng(0), Library(3)
    lt = products(tmp_path, library, [3.0, 1.0, 2.0])
    dw, dy, x = (matrix(rng, *s, np.float32) for s in ((16, 32), (5, 16), (5, 32)))
    with lt.tuning():
        lt.grad_weight(dw, dy, x)
    assert not wrong(dw, dy.host.T @ x.host, "float32")


def test_search_under_capture_and_outside_tuning(tmp_path: Path) -> None:
    library = Library(3)
    lt = products(tmp_path, library, [3.0, 1.0, 2.0])
    assert errors(lt, "float32", 5, 16, 32, 0) == []
    assert (library.used, lt.table()) == (0, [])
    lt._gpu.is_capturing = True
    with lt.tuning():
        errors(lt, "float32", 5, 16, 32, 0)
    assert (library.used, lt._gpu.timed, lt.table()) == (0, 0, [])
    lt._gpu.is_capturing = False
    with lt.tuning():  # what the heuristic chose before is searched now
        errors(lt, "float32", 5, 16, 32, 0)
    assert library.used == 1
    assert len(lt.table()) >= 3


def test_refusal_by_every_algorithm(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="refuses all"):
        searched(tmp_path, [1.0, 2.0], {0: "refuse", 1: "refuse"})


def test_table_and_digest(tmp_path: Path) -> None:
    lt, _, _ = searched(tmp_path / "a", [3.0, 1.0, 2.0])
    name, ms, tflops = lt.table()[0]
    assert name.startswith("forward bfloat16 5x16x32 ")
    assert (ms, tflops) == (1.0, pytest.approx(2 * 5 * 16 * 32 / 1e-3 / 1e12))
    one = {"k": Algorithm(bytes(64), 0, 1.0), "l": Algorithm(bytes(64), 0)}
    assert _algorithms.digest(one) == _algorithms.digest({"l": one["l"], "k": Algorithm(bytes(64), 9, 2.0)})
    assert _algorithms.digest(one) != _algorithms.digest({**one, "k": Algorithm(bytes(63) + b"1", 0, 1.0)})
    assert lt.digest() != products(tmp_path / "b").digest()


def test_time_all_looks_once_at_slow_ones() -> None:
    ms, calls = [1.0, 0.010, 0.012, 5.0], Counter[int]()

    def milliseconds(run: Callable[[], int], n: int) -> float:
        calls[run()] += n
        return ms[run()] * (1.0 if n == 1 else 0.9)

    runs = [lambda i=i: i for i in range(4)]
    assert _algorithms.time_all(runs, milliseconds) == pytest.approx([1.0, 0.009, 0.0108, 5.0])
    assert calls == {0: 1, 1: 101, 2: 101, 3: 1}


def test_same_result() -> None:
    first = np.array([1000.0, 10.0, 0.0], np.float32)
    assert _algorithms.same(first * (1 + 2.0**-8), first, 2.0**-7)
    assert not _algorithms.same(first * (1 + 2.0**-5), first, 2.0**-7)
    assert not _algorithms.same(first + [0, 0, 2], first, 2.0**-7)
    assert not _algorithms.same(first * np.nan, first * np.nan, 2.0**-7)
    assert not _algorithms.same(first, np.array([np.inf, 10, 0], np.float32), 2.0**-7)


# The cache


def cache(path: Path, warn: Any = pytest.fail, gpu: str = GPU, version: str = VERSION) -> Cache:
    return Cache(path, gpu, version, warn)


def test_cache_is_used_without_a_search(tmp_path: Path) -> None:
    before, _, _ = searched(tmp_path, [3.0, 1.0, 2.0])
    library = Library(3)
    lt = products(tmp_path, library)  # no times: a search would fail
    with lt.tuning():
        assert errors(lt, "bfloat16", 5, 16, 32, 0) == []
    assert library.used == 1
    assert library.calls["cublasLtMatmulAlgoGetHeuristic"] == 0
    assert (lt.digest(), lt.table()) == (before.digest(), before.table())


def test_outside_tuning_the_cache_changes_nothing(tmp_path: Path) -> None:
    """Or what another run has searched meanwhile would change the bits of this one."""
    searched(tmp_path, [3.0, 1.0, 2.0])
    library = Library(3)
    assert errors(products(tmp_path, library), "bfloat16", 5, 16, 32, 0) == []
    assert library.used == 0


@pytest.mark.parametrize("fault", ["check", "greedy"])
def test_cached_algorithm_that_is_refused_is_searched_anew(tmp_path: Path, fault: str) -> None:
    searched(tmp_path, [3.0, 1.0, 2.0])
    lt, library, _ = searched(tmp_path, [3.0, 4.0, 2.0], {1: fault})
    assert library.used == 2
    assert cache(lt._cache.path).get(lt.table()[0][0]) == Algorithm(bytes([2] * 64), 0, 2.0)


def good(**change: Any) -> dict[str, Any]:
    entry = {"algorithm": "01" * 64, "workspace": 0, "ms": 1.5, **change}
    return {"format": 1, "gpu": GPU, "cublaslt": VERSION, "algorithms": {"k": entry}}


DAMAGED = {
    "empty": "",
    "cut": json.dumps(good())[:-9],
    "list": "[]",
    "deep": "[" * 100_000,
    "no algorithms": '{"format": 1}',
    "binary": "\udcff\udcfe",
    "format": json.dumps({**good(), "format": 2}),
    "gpu": json.dumps({**good(), "gpu": "NVIDIA A100"}),
    "version": json.dumps({**good(), "cublaslt": "12.9.1"}),
    "short": json.dumps(good(algorithm="01" * 63)),
    "no hex": json.dumps(good(algorithm="zz" * 64)),
    "number": json.dumps(good(algorithm=7)),
    "workspace": json.dumps(good(workspace=-1)),
    "workspace type": json.dumps(good(workspace="0")),
    "nan": json.dumps(good(ms=float("nan"))),
    "true": json.dumps(good(ms=True)),
    "zero": json.dumps(good(ms=0)),
    "entry": json.dumps({**good(), "algorithms": {"k": None}}),
}


def test_cache_reads_what_is_good(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    assert cache(path).get("k") is None  # no file, no warning
    path.write_text(json.dumps(good()))
    assert cache(path).get("k") == Algorithm(b"\1" * 64, 0, 1.5)


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED.keys())
def test_cache_that_is_damaged_or_foreign_is_warned_of(tmp_path: Path, text: str) -> None:
    path, warnings = tmp_path / "gpu.json", list[str]()
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    held = cache(path, warnings.append)
    assert held.get("k") is None
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{path}: not used: ")
    held.put("l", Algorithm(bytes(64), 0, 1.0))
    held.save()
    assert cache(path).get("l") == Algorithm(bytes(64), 0, 1.0)


def test_cache_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, warnings = tmp_path / "gpu.json", list[str]()
    path.write_text(json.dumps(good()))
    monkeypatch.setattr(_algorithms, "MAX_FILE_BYTES", 100)
    assert cache(path, warnings.append).get("k") is None
    assert "larger than 100 bytes" in warnings[0]


def test_cache_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    warnings: list[str] = []
    held = cache(tmp_path / "file" / "gpu.json", warnings.append)
    held.put("k", Algorithm(bytes(64), 0, 1.0))
    held.save()
    assert "searched again next time" in warnings[-1]
    assert held.get("k")


def test_processes_that_save_at_once_leave_a_good_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "gpu.json"
    caches = [cache(path) for _ in range(8)]

    def save(i: int) -> None:
        for round_ in range(5):
            caches[i].put(f"{i} {round_}", Algorithm(bytes(64), i, 1.0))
            caches[i].save()

    with ThreadPoolExecutor() as pool:
        list(pool.map(save, range(8)))
    caches[0].put("last", Algorithm(bytes(64), 0, 1.0))
    caches[0].save()
    assert cache(path).get("last")
    assert [p.name for p in path.parent.iterdir()] == ["gpu.json"]
    one, two = cache(path), cache(path)  # one after the other, both stay
    for held, name in ((one, "one"), (two, "two")):
        held.put(name, Algorithm(bytes(64), 0, 1.0))
        held.save()
    assert cache(path).get("one")
    assert cache(path).get("two")


def test_cache_file_names_gpu_and_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("APR_CACHE", str(tmp_path))
    assert (
        _algorithms.cache_file("NVIDIA H200 (x/..)", VERSION)
        == tmp_path / "cublaslt" / "NVIDIA-H200-x-13.1.0.json"
    )
