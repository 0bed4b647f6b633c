"""CUDA kernels compiled by g++ for the host, with tests/support/shim/cuda_shim.h, and a machine that launches them."""

from __future__ import annotations

import ctypes
import inspect
import itertools
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from apr.backends import reference
from apr.backends.cuda import kernels, low_rank, ops
from apr.backends.cuda.arguments import Arguments
from apr.backends.cuda.tensor_maps import KIND, aligned, axes
from cases import CASES, Row, overlay, rows

SHIM = Path(__file__).with_name("shim")


MODULES = (
    "adapted",
    "attention",
    "bias",
    "dropout",
    "embedding",
    "flat",
    "loss",
    "loss_cluster",
    "norm",
    "rope",
    "swiglu",
)


FAST, OPTIMISED = "-O0", "-O1"  # compiled fast, for kernels that run a few times; or run fast
FLAGS = (
    "-std=c++20",
    "-U_FORTIFY_SOURCE",  # it forbids jumps between stacks
    "-fPIC",
    "-shared",
    "-w",
    "-ffp-contract=off",
    "-fno-gnu-unique",
    "-fno-extern-tls-init",
)


FAULTS = {  # what a launch may end with
    1: "threads wait for ever",
    2: "writes beyond shared memory",
    3: "uses a barrier that nobody made",
    4: "more threads arrive at a barrier than it counts",
    5: "a tile or a barrier is at a place where it must not be",
    6: "the threads of a group disagree on a product",
    7: "a product stands without products_begin",
    8: "TMA or wgmma reads what plain code wrote, without a fence",
    9: "a block ends while copies or products are at work",
    10: "setmaxnreg asks for more registers than there are",
    11: "plain code changes the sums of products at work",
}


NUMBERS = itertools.count()  # of libraries


CASE = {case.name: case for case in CASES}


def table(name: str, sizes: str) -> list[Row]:
    """A case of cases.py at other sizes."""
    return rows(replace(CASE[name], table=f"{CASE[name].table.split(':')[0]}: {sizes}"))


def precompile(folder: Path, level: str = FAST) -> None:
    """Put the precompiled header of a level into a folder: half of the time that a kernel takes."""
    (folder / "cuda_shim.h.gch").mkdir(exist_ok=True)
    gpp("-x", "c++-header", SHIM / "cuda_shim.h", level, "-o", folder / "cuda_shim.h.gch" / level[1:])


def gpp(*args: Any) -> None:
    """Run g++. A precompiled header is looked for in the folders of `args` first."""
    done = subprocess.run(["g++", *FLAGS, *map(str, args), f"-I{SHIM}"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)


def on_the_host(text: str, shim: str) -> str:
    """A text of a module with the parts of PTX in it replaced by a header of the shim."""
    plain = re.split(r"^// PTX$.*?^// end of PTX$", text, flags=re.M | re.S)
    assert len(plain) > 1
    assert "asm" not in "".join(plain)
    return f'#include "{shim}"\n'.join([plain[0], "".join(plain[1:])])


class Library:
    """A kernel module compiled for the host."""

    def __init__(
        self, text: str, names: list[str], act: str, defines: dict[str, int], folder: Path, level: str = FAST
    ) -> None:
        number, found = next(NUMBERS), re.search(r"\bCLUSTER = (\d+)", text)
        self._cluster = int(found[1]) if found else 1
        source, out = folder / f"{number}.cpp", folder / f"{number}.so"
        source.write_text("\n".join([text, *(f"SHIM_KERNEL({n})" for n in names)]))
        options = kernels.options(act, "sm_80", defines)
        macros = [o for o in options if o.startswith("-D")]
        gpp(level, *macros, f"-I{folder}", "-include", "cuda_shim.h", source, "-o", out)
        self._loaded = ctypes.CDLL(str(out))

    def __call__(self, name: str, grid: Any, block: Any, args: list[Any], shared: int, seed: int) -> None:
        """Run a kernel. args: arrays, None, NumPy scalars, tensor maps of host_map."""
        numbers = [*grid, 1, 1][:3] + [*block, 1, 1][:3] + [shared, seed, self._cluster]
        held = [
            ctypes.c_void_p(0 if a is None else a.ctypes.data)
            if not isinstance(a, np.generic)
            else np.array(a)
            for a in args
        ]
        at = [ctypes.addressof(h) if isinstance(h, ctypes.c_void_p) else h.ctypes.data for h in held]
        for i, a in enumerate(args):
            if isinstance(a, np.ndarray) and a.dtype == KIND:
                at[i] = a.ctypes.data
        status = getattr(self._loaded, "shim_" + name)(
            (ctypes.c_int * 9)(*numbers), (ctypes.c_void_p * len(at))(*at)
        )
        assert status == 0, f"{name}: {FAULTS[status]}"


def host_map(x: Any, rows: int) -> np.ndarray:
    """What stands for tensor_maps.tensor_map: the Map of shim/wgmma_shim.h."""
    out, (batch, row) = aligned(), x.strides[:2]
    fields = [x.ctypes.data, *axes(x.shape), 2 * x.shape[3], row, batch, rows]
    out.view(np.int64)[: len(fields)] = fields
    return out


class Host:
    """A machine for _cuda_ops that runs kernels here. texts: of modules, in place of their files."""

    def __init__(self, folder: Path, texts: dict[str, str] | None = None) -> None:
        self.shared_bytes = ops.SHARED_STATIC + 2048  # so little that a row of logits does not fit
        self.clusters = True
        self._folder, self._texts, self._libraries = folder, texts or {}, dict[Any, Library]()
        self.seed = 0

    def library(self, module: str, act: str, **defines: int) -> Library:
        key = module, act, *defines.values()
        if key not in self._libraries:
            text = self._texts.get(module) or kernels.source(module)
            level = FAST
            if '#line 1 "cluster.cuh"' in text:
                text = on_the_host(text, "cluster_shim.h")
            elif module == "low_rank":
                text, level = on_the_host(text, "low_rank_shim.h"), OPTIMISED
            elif module.startswith("decode_"):
                text = on_the_host(text, "decode_shim.h")
            names = list(kernels.signatures(module))
            self._libraries[key] = Library(text, names, act, defines, self._folder, level)
        return self._libraries[key]

    def kernel(self, module: str, name: str, act: str, **defines: int) -> Callable[..., None]:
        check = Arguments(name, kernels.signatures(module)[name], act, np.ndarray)

        def launch(
            grid: Any, block: Any, args: tuple[Any, ...], shared: int = 0, early: bool = False
        ) -> None:
            assert np.prod(block) % 32 == 0 or module == "flat"
            self.seed += 1
            self.library(module, act, **defines)(name, grid, block, check(args), shared, self.seed)

        return launch

    def scratch(self, shape: tuple[int, ...], dtype: str, slot: int) -> Any:
        """NaN or ones, with room around it for the kernels that tests have spoiled."""
        n, room = int(np.prod(shape)), 1 << 14
        whole = np.full(n + 2 * room, 1 if dtype == "int32" else np.nan, dtype)
        return whole[room : room + n].reshape(shape)

    def address(self, x: Any) -> int:
        return int(x.ctypes.data)


def backend() -> SimpleNamespace:
    """The reference with all ops that are our own kernels, launched on ops.machine."""

    def linear_bwd(dx: Any, dw: Any, db: Any, dy: Any, x: Any, w: Any, adds: bool) -> None:
        wide = [a.astype(np.float32) for a in (dy, x, w)]
        reference.linear_bwd(dx, dw, None, *wide, adds)
        if db is not None:
            ops.add_rows(db, dy)

    def linear_fwd(y: Any, x: Any, w: Any, b: Any) -> None:
        reference.linear_fwd(y, *(None if a is None else a.astype(np.float32) for a in (x, w, b)))

    def adapted_bwd(name: str, *args: Any) -> None:
        if low_rank.serves(args[0], args[2], args[3]):
            getattr(low_rank, name)(*args)
        else:
            getattr(reference, name)(*args[:2], *(a.astype(np.float32) for a in args[2:5]), args[5])

    own: dict[str, Any] = {name: partial(adapted_bwd, name) for name in ("adapted_bwd_a", "adapted_bwd_b")}
    own |= {n: f for n, f in vars(ops).items() if inspect.isfunction(f) and hasattr(reference, n)}
    return overlay(reference, **own, linear_fwd=linear_fwd, linear_bwd=linear_bwd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where libraries are put, with the precompiled header."""
    gcc = shutil.which("g++") and subprocess.run(["g++", "--version"], capture_output=True, text=True).stdout
    if not gcc or "Free Software Foundation" not in gcc:
        pytest.skip("there is no g++ of GCC to compile the kernels for the host")
    made = tmp_path_factory.mktemp("shim")
    precompile(made)
    return made


def over(some: list[Row]) -> pytest.MarkDecorator:
    """Run a test once per row."""
    return pytest.mark.parametrize("row", some, ids=str)
