"""The plain CUDA kernels on the host: the text of the .cu files, compiled by g++ with tests/support/shim/cuda_shim.h, launched
with the geometry of _cuda_ops.py, over the rows of cases.py and rows that 16-byte accesses suit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16

from apr.backends.cuda import kernels, ops
from cases import BAND, LARGEST, LOGIT_EDGES, ROWS, Row, edge_logits, make, run
from host_shim import MODULES, Host, backend, folder, over, table  # noqa: F401  folder is a fixture
from precision import accuracy, differing, figures, off

every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


# Where 16-byte accesses are possible, and where a block has several rows, a row several warps, a sum several blocks.
WIDE = [
    *table("embedding", "5 64 97, 257 8 5, 33 1032 3, 1025 16 2, 70 24 1, 1500 3 50"),
    *table("linear", "123 64 5, 257 1032 3"),
    *table("adapted", "70 520 16, 33 64 3"),
    *table("adapted_int8", "70 528 16"),
    *table("adapted_bwd_b", "5 4104 8"),
    *table("add", "5 64, 123 97"),
    *table("dropout", "2 5 64, 3 33 128"),
    *table(
        "rmsnorm_of_all_heads",
        "5 128 0 256 384 0, 3 640 128 768 1024 1, 2 4096 0 4096 4104 0, 2 4096 0 4097 4097 1",
    ),
    *table("add_rmsnorm", "5 64, 97 128, 3 2056, 1100 8"),
    *table("add_rmsnorm_first", "5 896"),
    *table("head_rmsnorm", "5 7 64 0 8 9, 97 1 16 7 8 9, 5 2 128 4 6 8, 3 2 256 0 2 3, 7 1 512 0 1 1"),
    *table("rope", "2 59 4 8 0 8, 1 9 14 32 0 16"),
    *table("attention", "1 59 2 1 80, 1 20 2 2 160"),
    *table("attention_documents", "2 97 2 1 80 0, 2 59 2 2 160 17"),
    *table("swiglu", "5 64, 3 4872"),
    *table("swiglu_again", "5 64"),
    *table("cross_entropy", "5 64, 4 8200, 3 800"),
    # long enough for clusters of blocks; for more than they keep in registers
    *table("cross_entropy_rows_apart", "3 16421 16424, 1 170003 170008"),
    *table("cross_entropy_z", "4 16384"),
    *table("cross_entropy_loss_only", "5 64, 2 16392"),
    *table("adamw", "4096"),
    *table("adamw_master", "4096"),
    *table("add_sum_sq", "4096"),
    *table("add_sum_sq_rows", "5 4096, 7 1024"),
]

APART = {
    "embedding": "59 64 97",
    "linear": "33 64 5",
    "add": "5 64",
    "dropout": "2 5 64",
    "add_rmsnorm": "5 128",
    "rmsnorm_of_all_heads": "5 640 128 768 1024 1",
    "add_rmsnorm_first": "5 64",
    "head_rmsnorm": "59 4 64 0 6 8",
    "rope": "1 59 4 32 0 6",
    "swiglu": "5 64",
    "cross_entropy": "5 1024",
    "add_sum": "4096",
    "adamw": "4096",
    "adamw_master": "4096",
}


@pytest.fixture(scope="module")
def host(folder: Path) -> Host:
    """Every module compiled for both dtypes."""
    made = Host(folder)
    wanted = [(m, act, {"MAX_D": 64} if m == "attention" else {}) for m in MODULES for act in kernels.ACTS]
    with ThreadPoolExecutor(2) as pool:
        for job in [pool.submit(made.library, m, act, **d) for m, act, d in wanted]:
            job.result()
    return made


@pytest.fixture
def shim(host: Host, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The backend on the host."""
    monkeypatch.setattr(ops, "machine", host)
    return backend()


@every_dtype
@over([*ROWS, *WIDE])
def test_accuracy(shim: Any, row: Row, dtype: str) -> None:
    """That nothing but the outputs is written, and all of them are, is checked by run()."""
    found = accuracy(shim, row, dtype)
    assert not off(found), {n: found[n] for n in off(found)}


@every_dtype
@over([rows[0] for rows in (table(name, sizes) for name, sizes in APART.items())])
def test_arrays_that_are_not_aligned(shim: Any, row: Row, dtype: str) -> None:
    """Lengths that 16-byte accesses suit, at addresses that they do not."""
    values = make(row, dtype)
    found = figures(row, dtype, run(shim, row, dtype, values, BAND - 1), values)
    assert not off(found), {n: found[n] for n in off(found)}


@every_dtype
@pytest.mark.parametrize("edge", LOGIT_EDGES)
@over(
    [
        *table("cross_entropy", "2 59, 2 8200, 2 16424"),
        *table("cross_entropy_rows_apart", "2 16421 16424, 1 170003 170008"),
        *table("cross_entropy_loss_only", "2 16424"),
    ]
)
def test_logits_at_the_end_of_a_dtype(shim: Any, row: Row, dtype: str, edge: str) -> None:
    """Minus infinity for all that a thread, or a block of a cluster, has of a row; logits that a product overflows."""
    found = accuracy(shim, row, dtype, edge_logits(row, dtype, edge))
    assert not off(found), {n: found[n] for n in off(found)}


@over([row for row in [*LARGEST, *WIDE] if row.case.name.partition("_")[0] != "attention"])
def test_order_of_threads_does_not_matter(shim: Any, row: Row) -> None:
    """Each launch has its own random order of blocks and threads."""
    values = make(row, "bfloat16")
    assert differing(*(run(shim, row, "bfloat16", values) for _ in range(2))) == []


@every_dtype
def test_a_norm_has_the_same_bits_whoever_has_which_tiles(shim: Any, dtype: str) -> None:
    """Terms of a norm, tile by tile as ranks make them, are those of the whole, and those of the weights that adamw makes."""
    rng, n = np.random.default_rng(0), 3 * 16384 + 640
    gradients, weights = ops.square_tiles[dtype]
    x = rng.standard_normal(n, np.float32)
    w = x if dtype == "float32" else x.astype(bfloat16)
    m, v, g = (np.zeros(n, np.float32) for _ in range(3))
    by_adamw, whole = np.zeros(1), np.zeros(1)
    shim.adamw(w, x, m, v, by_adamw, g, np.ones(1), 1e-3, 0.9, 0.95, 1e-8, 0.1, 1)
    shim.add_sum_sq(whole, x)
    for tile, want in ((gradients, whole), (weights, by_adamw)):
        rows = np.zeros(-(-n // tile) * tile, np.float32)
        rows[:n] = x
        rows, terms, total = rows.reshape(-1, tile), np.zeros(-(-n // tile)), np.zeros(1)
        for first in range(0, len(rows), 2):  # a rank's rows are anywhere in memory
            shim.add_sum_sq(terms[first : first + 2], rows[first : first + 2].copy())
        shim.add_sum(total, terms)
        assert total.tobytes() == want.tobytes()


def test_the_rows_launch_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    used: set[tuple[str, str]] = set()
    machine = SimpleNamespace(
        kernel=lambda module, name, act, **_: lambda *a, **k: used.add((module, name)),
        scratch=lambda shape, dtype, slot: None,
        address=lambda x: int(x.ctypes.data),
        shared_bytes=1 << 16,
        clusters=True,
    )
    monkeypatch.setattr(ops, "machine", machine)
    for row in [*ROWS, *WIDE]:
        run(backend(), row, "bfloat16", make(row, "bfloat16"))
        run(backend(), row, "bfloat16", make(row, "bfloat16"), BAND - 1)
    assert used == {(m, name) for m in (*MODULES, "low_rank") for name in kernels.signatures(m)}


# Planted faults

SMALL = {  # module -> rows that use all of it
    "adapted": [
        *table("adapted", "20 256 70, 5 59 40, 19 64 5"),
        *table("adapted_int8", "20 256 40, 5 59 33"),
    ],
    "attention": [
        *table("attention", "1 59 4 2 6, 1 123 2 1 10"),
        *table("attention_window", "1 97 4 1 5 40"),
        *table("attention_documents", "2 123 2 1 10 0"),
    ],
    "bias": table("linear", "123 64 5, 70 5 3"),
    "dropout": table("dropout", "3 5 64, 3 5 59"),
    "embedding": table("embedding", "257 8 5, 70 24 1, 1500 3 50"),
    "flat": [
        *table("add_sum", "4097"),
        *table("add_sum_sq", "4097"),
        *table("add", "5 59"),
        *table("adamw_master", "1025, 64"),
    ],
    "loss": [*table("cross_entropy", "3 800, 5 59"), *table("cross_entropy_loss_only", "5 1025")],
    "loss_cluster": table("cross_entropy_rows_apart", "3 8197 8200"),
    "norm": [
        *table("add_rmsnorm", "97 128, 5 2056, 9 59"),
        *table("head_rmsnorm", "97 1 16 7 8 9"),
        *table("rmsnorm_of_all_heads", "5 640 0 768 1024 1"),
    ],
    "rope": table("rope", "2 59 4 8 0 8, 2 59 4 5 0 8"),
    "swiglu": [*table("swiglu", "5 64, 5 59"), *table("swiglu_again", "5 64, 5 59")],
}


BARRIER = "__syncthreads();"
# Barriers of common.cuh that a module does not need; and the last of loss_cluster, without which thread 0 may overwrite what
# another warp still reads: the shim's threads run in an order that does not show it, racecheck on a GPU does.
UNUSED = {
    "adapted": {0, 1, 2},
    "attention": {0, 1, 2},
    "bias": {0, 1},
    "dropout": {0, 1, 2},
    "embedding": {0, 1, 2},
    "flat": {1, 2},
    "loss": {0, 1, 2},
    "loss_cluster": {0, 1, 2, 4},
    "rope": {0, 1, 2},
    "swiglu": {0, 1, 2},
}
OFF_BY_ONE = [
    ("adapted", "o < O && r < ranks", "o < O - 1 && r < ranks"),
    ("adapted", "min(first + rows, O);", "min(first + rows, O - 1);"),
    ("adapted", "o + t >= last", "o + t >= last - 1"),
    ("attention", "j <= t + offset", "j < t + offset"),
    ("attention", "j > t + offset - window", "j >= t + offset - window"),
    ("attention", "key >= begin[i]", "key > begin[i]"),
    ("attention", "key >= from", "key + 1 >= from"),
    ("dropout", "b += gridDim.y", "b += B"),
    ("dropout", "own == 3 ? 3 : 2", "own == 3 ? 2 : 3"),
    ("embedding", "sorted[tile * TILE - 1] == id", "sorted[tile * TILE] == id"),
    ("flat", "rest < n", "rest < n - 1"),
    ("flat", "left < length", "left < length - 1"),
    ("flat", "long long j = i; j < n;", "long long j = i; j < n - 1;"),
    ("loss", "target - i * N", "target - i * N - 1"),
    ("loss_cluster", "  cluster_sync();\n  Softmax s{", "  Softmax s{"),
    ("loss_cluster", "b < BLOCKS; b++", "b < BLOCKS - 1; b++"),
    ("loss_cluster", "rank * each, end", "rank * (each - 1), end"),
    ("loss_cluster", "begin + each), first_of", "begin + each - 1), first_of"),
    ("norm", "y < blockDim.y; y++", "y < blockDim.y - 1; y++"),
    ("rope", "first + h * groups < heads", "first + h * groups < heads - 1"),
    ("loss_cluster", "THREADS < left) own", "THREADS < left - 1) own"),
    ("loss_cluster", "on - g * THREADS * N", "on - g * THREADS * N - 1"),
    ("swiglu", "f < F", "f < F - N"),
    ("swiglu", "y[i] = gate[i] * s * up[i]", "y[i] = gate[i] * s"),
]


def planted() -> dict[str, tuple[str, str]]:
    """Faults: name -> (module, its text)."""
    out = {}
    for module in MODULES:
        parts = kernels.source(module).split(BARRIER)
        for n in set(range(len(parts) - 1)) - UNUSED.get(module, set()):
            rest = BARRIER.join(parts[n + 1 :])
            out[f"{module} barrier {n}"] = module, BARRIER.join(parts[: n + 1]) + ";" + rest
    for module, right, wrong in OFF_BY_ONE:
        assert right in kernels.source(module)
        out[f"{module} {wrong}"] = module, kernels.source(module).replace(right, wrong)
    return out


PLANTED = planted()


@pytest.fixture(scope="module")
def spoiled(folder: Path) -> dict[str, Host]:
    """A machine for every fault."""
    hosts = {name: Host(folder, dict([fault])) for name, fault in PLANTED.items()}
    with ThreadPoolExecutor(2) as pool:
        defines = {name: {"MAX_D": 64} if m == "attention" else {} for name, (m, _) in PLANTED.items()}
        jobs = [
            pool.submit(hosts[name].library, m, "float32", **defines[name])
            for name, (m, _) in PLANTED.items()
        ]
        for job in jobs:
            job.result()
    return hosts


@pytest.mark.parametrize("name", PLANTED)
def test_planted_fault_is_seen(name: str, spoiled: dict[str, Host], monkeypatch: pytest.MonkeyPatch) -> None:
    """A barrier less, one too few or too many: a row is off, or threads wait for ever."""
    monkeypatch.setattr(ops, "machine", spoiled[name])
    monkeypatch.setattr(ops, "BLOCKS", 2)
    monkeypatch.setattr(ops, "MAX_GRID_Y", 2)

    def red(row: Row) -> bool:
        try:
            return bool(off(accuracy(backend(), row, "float32")))
        except AssertionError:
            return True

    assert any(red(row) for row in SMALL[PLANTED[name][0]])


def test_small_rows_are_right(shim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the planted faults turn red is green without them; sums are cut into few parts."""
    monkeypatch.setattr(ops, "BLOCKS", 2)
    monkeypatch.setattr(ops, "MAX_GRID_Y", 2)
    for row in (row for some in SMALL.values() for row in some):
        assert not off(accuracy(shim, row, "float32")), row


def test_threads_that_wait_for_ever(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A barrier that not all threads reach."""
    text = kernels.source("norm").replace(BARRIER, "if (threadIdx.x) " + BARRIER)
    monkeypatch.setattr(ops, "machine", Host(folder, {"norm": text}))
    with pytest.raises(AssertionError, match="add_rmsnorm_fwd_1: threads wait for ever"):
        accuracy(backend(), SMALL["norm"][2], "float32")


def test_too_little_shared_memory(shim: Any, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops._attention
    monkeypatch.setattr(ops, "_attention", lambda *a: (*right(*a)[:2], right(*a)[2] - 64))
    with pytest.raises(AssertionError, match="attention_fwd: writes beyond shared memory"):
        accuracy(shim, SMALL["attention"][0], "float32")
