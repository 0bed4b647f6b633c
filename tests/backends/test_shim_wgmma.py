"""Hopper's asynchronous machinery on the host: wgmma.cuh with tests/support/shim/wgmma_shim.h in place of its PTX, by a
probe that multiplies in every way that the kernels do. What a missing wait, a lost or a doubled arrival, a wrong descriptor
or a missing fence does, turns it red."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nvrtc
import wgmma_probe
from apr.backends.cuda import tensor_maps
from apr.backends.cuda.arguments import Arguments
from apr.backends.cuda.kernels.signatures import parse
from apr.common.errors import DeviceError
from host_shim import Library, folder, host_map, on_the_host  # noqa: F401  folder is a fixture

BF16 = np.dtype(ml_dtypes.bfloat16)
PLAIN = dict(W=96, LEFT_TURNED=0, RIGHT_TURNED=1, LEFT_KEPT=0)


def heads(x: np.ndarray) -> np.ndarray:
    """A matrix as one head of one sequence."""
    return x[None, :, None, :]


def compiled(folder: Path, text: str, defines: dict[str, int]) -> Library:
    """The probe for the host."""
    return Library(on_the_host(text, "wgmma_shim.h"), ["probe"], "bfloat16", defines, folder)


def probe(library: Library, text: str, defines: dict[str, int], seed: int = 1) -> tuple[float, float]:
    """Errors of the probe's product and of what TMA stored of it, both 0 when they are right: values are whole numbers."""
    rng, w = np.random.default_rng(seed), defines["W"]
    a, b = (rng.integers(-4, 5, (n, wgmma_probe.K)).astype(BF16) for n in (64, w))
    want = a.astype(np.float32) @ b.astype(np.float32).T
    d, y = np.full((64, w), np.nan, np.float32), np.zeros((50, 48), BF16)
    at, bt = (
        heads(np.ascontiguousarray(x.T if t else x))
        for x, t in ((a, defines["LEFT_TURNED"]), (b, defines["RIGHT_TURNED"]))
    )
    check = Arguments("probe", parse(text, "probe")["probe"], "bfloat16", np.ndarray)
    rows = 64 if defines["RIGHT_TURNED"] else w
    maps = [host_map(at, 64), host_map(bt, rows), host_map(heads(y), 64)]
    args = check((d, *maps, wgmma_probe.K))
    for turn in range(3):
        library("probe", (1,), (256,), args, wgmma_probe.SHARED, seed + turn)
    stored = want[:50, :48].astype(BF16).astype(np.float32)
    return float(np.abs(d - want).max()), float(np.abs(y.astype(np.float32) - stored).max())


@pytest.mark.parametrize("defines", wgmma_probe.VARIANTS, ids=lambda d: " ".join(map(str, d.values())))
def test_products_are_exact(folder: Path, defines: dict[str, int]) -> None:
    text = wgmma_probe.text()
    assert probe(compiled(folder, text, defines), text, defines) == (0, 0)


FAULTS = {  # old, new, what is said of it; nothing where the numbers may be wrong instead
    "wait_forgotten": ("      ring.wait();\n", "", ""),
    "stage_released_early": (
        "      products_wait<0>(sum);\n      ring.release();",
        "      ring.release();\n      products_wait<0>(sum);",
        "",
    ),
    "stage_released_twice": ("ring.release();", "ring.release(), ring.release();", ""),
    "stage_never_released": ("      ring.release();\n", "", "threads wait for ever"),
    "fewer_bytes_announced": (
        "ring.claim(A_BYTES + B_BYTES)",
        "ring.claim(A_BYTES)",
        "threads wait for ever",
    ),
    "claim_forgotten": ("barrier_wait(full() + 8, parity ^ 1);", "", ""),
    "step_of_k": ("bt + kk * 2048", "bt + kk * 1024", ""),
    "next_tile": ("across_k(bt + kk * 2048, 8192)", "across_k(bt + kk * 2048, 4096)", ""),
    "turned": ("product<LEFT_TURNED, RIGHT_TURNED>", "product<LEFT_TURNED, 1 - RIGHT_TURNED>", ""),
    "begin_forgotten": ("      products_begin(sum);\n", "", "without products_begin"),
    "read_before_the_wait": (
        "      products_wait<0>(sum);\n",
        "      const float early = sum[0];\n      products_wait<0>(sum);\n      sum[0] = early;\n",
        "wrong",
    ),
    "changed_before_the_wait": (
        "      products_wait<0>(sum);\n",
        "      sum[0] = 2;\n      products_wait<0>(sum);\n",
        "changes the sums of products at work",
    ),
    "products_wait_forgotten": ("      products_wait<0>(sum);\n", "", "while copies or products are at work"),
    "fence_forgotten": ("    fence_async();\n", "", "without a fence"),
    "store_not_waited_for": ("      stores_wait();\n", "", "while copies or products are at work"),
    "barrier_not_made": ("ring.make(1);", "barrier_make(begin, 1);", "a barrier that nobody made"),
    "registers": ("registers_of_others(1)", "480", "more registers than there are"),
    "threads_disagree": ("kk * 32), right", "kk * 32 + lane / 31 * 32), right", "disagree on a product"),
}
SEEDS = range(1, 5)  # a race does not show with every order of threads


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(folder: Path, name: str) -> None:
    old, new, said = FAULTS[name]
    text = wgmma_probe.text()
    assert text.count(old) >= 1
    text = text.replace(old, new)
    library, found = compiled(folder, text, PLAIN), []
    for seed in SEEDS:
        try:
            found += ["wrong"] * (max(probe(library, text, PLAIN, seed)) != 0)
        except AssertionError as e:
            found.append(str(e))
        if found:
            break
    assert found
    assert said in found[0]


# Compilation


def test_the_probe_compiles_for_hopper() -> None:
    major = max((m for m in nvrtc.FOLDERS if nvrtc.installed(m)), default=0)
    if not major:
        pytest.skip("NVRTC is not installed")
    for r in nvrtc.compile_all(major, nvrtc.probe_jobs()):
        assert r.ok, r.log
        assert "C75" not in r.log
        (u,) = nvrtc.usage(r.log)
        assert u.spilled == 0


# Tensor maps


class Cuda:
    """A driver that writes down what it is asked."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.calls = code, list[tuple[Any, ...]]()

    def cuTensorMapEncodeTiled(self, out: Any, kind: int, rank: int, address: Any, *rest: Any) -> int:
        assert out.value % 64 == 0
        self.calls.append(
            (kind, rank, address.value, *(list(x) if hasattr(x, "__len__") else x for x in rest))
        )
        return self.code


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Cuda]:
    """driver(code): what stands for libcuda."""

    def made(code: int = 0) -> Cuda:
        cuda = Cuda(code)
        monkeypatch.setattr(tensor_maps, "_driver", lambda: cuda)
        tensor_maps._encode.cache_clear()
        return cuda

    yield made
    tensor_maps._encode.cache_clear()


class Device(np.ndarray):
    """An array with the address where CuPy has it."""

    @property
    def data(self) -> Any:
        return type("Data", (), {"ptr": self.ctypes.data})


def test_a_map_is_made_once_for_an_array(driver: Callable[[int], Cuda]) -> None:
    cuda = driver(0)
    qkv = np.zeros((2, 5, 18, 64), BF16).view(Device)
    k = qkv[:, :, 14:16]
    first = tensor_maps.tensor_map(k, 128)
    assert tensor_maps.tensor_map(qkv[:, :, 14:16], 128) is first
    assert (first.dtype, first.shape, first.ctypes.data % 64) == (tensor_maps.KIND, (1,), 0)
    assert len(cuda.calls) == 1
    row = 18 * 128
    assert cuda.calls[0] == (
        *(9, 4, k.ctypes.data, [64, 2, 5, 2], [128, row, 5 * row], [64, 1, 128, 1], [1] * 4),
        *(0, 3, 2, 0),
    )
    tensor_maps.tensor_map(k, 64)
    tensor_maps.tensor_map(k[:1], 64)
    assert len(cuda.calls) == 3


def test_a_map_that_the_driver_refuses_is_named(driver: Callable[[int], Cuda]) -> None:
    driver(1)
    with pytest.raises(DeviceError, match=r"error 1 for an array \(1, 3, 2, 64\) at 0x"):
        tensor_maps.tensor_map(np.zeros((1, 3, 2, 64), BF16).view(Device), 64)


def test_a_kernel_takes_maps_only_as_maps() -> None:
    text = 'extern "C" __global__ void f(act* y, const __grid_constant__ TensorMap y_map, int n)'
    (y, m, _) = parameters = parse(text, "x.cu")["f"]
    assert (y.gaps, m.ctype, m.pointer) == (0, "TensorMap", False)
    check = Arguments("f", parameters, "bfloat16", np.ndarray)
    whole, given = np.zeros((1, 4, 1, 64), BF16), tensor_maps.aligned()
    assert check((whole, given, 1))[1] is given
    for wrong in (whole, None, 5, np.zeros(2, tensor_maps.KIND)):
        with pytest.raises(TypeError, match="f: y_map must be a tensor map, not"):
            check((whole, wrong, 1))
    for text in ("(TensorMap m)", "(const TensorMap m)", "(__grid_constant__ TensorMap m)"):
        with pytest.raises(ValueError, match="const __grid_constant__ TensorMap"):
            parse(f'extern "C" __global__ void f{text} {{}}', "x.cu")
