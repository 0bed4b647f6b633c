"""Every backend is a module with the same functions, and choosing one loads nothing else."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from apr import backends
from apr.backends import contract, reference
from apr.backends.cuda import kernels
from apr.backends.cuda import ops as cuda_ops
from apr.common.errors import DeviceError, Refused, UsageError
from apr.model.presets import PRESETS
from apr.model.transformer import Model
from cases import CASES, overlay, rows

ROOT = Path(__file__).resolve().parents[2]


PLUMBING = {name: list(inspect.signature(getattr(reference, name)).parameters) for name in contract.PLUMBING}
WANTED = {**{name: list(op.parameters) for name, op in contract.OPS.items()}, **PLUMBING}


def functions(module: Any) -> dict[str, list[str]]:
    """Parameter names, in order, of the public functions of a backend."""
    return {
        name: list(inspect.signature(f).parameters)
        for name, f in vars(module).items()
        if not name.startswith("_") and callable(f) and not inspect.isclass(f)
        and getattr(f, "__module__", "").startswith(("apr.backends", __name__))
    }  # fmt: skip


def declared(*paths: Path) -> dict[str, list[str]]:
    """functions() of modules, of two definitions the first, from their text: cuda can be compared where there is no CuPy."""
    found: dict[str, list[str]] = {}
    for node in (node for path in paths for node in ast.parse(path.read_text()).body):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            found.setdefault(
                node.name, [a.arg for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs]
            )
    return found


def differences(module: Any) -> list[str]:
    """What a backend lacks, has too much of, or calls otherwise than the contract does."""
    have = functions(module)
    wrong = [
        f"{name}{have.get(name)}"
        for name in WANTED.keys() | have.keys()
        if WANTED.get(name) != have.get(name)
    ]
    if not isinstance(getattr(module, "name", None), str):
        wrong.append("name")
    dtypes = getattr(module, "dtypes", None)
    if not (isinstance(dtypes, tuple) and dtypes and all(isinstance(d, str) for d in dtypes)):
        wrong.append("dtypes")
    return sorted(wrong)


@pytest.mark.parametrize("name", backends.NAMES)
def test_backends_have_the_functions_of_the_contract(name: str) -> None:
    try:
        module = backends.get(name)
    except DeviceError as e:
        pytest.skip(str(e))
    assert differences(module) == []
    assert module.name == name
    assert backends.get(name) is module


def test_the_modules_of_cuda_declare_the_functions_of_the_contract() -> None:
    files = [Path(backends.__file__).parent / f"{m.replace('.', '/')}.py" for m in backends.MODULES["cuda"]]
    have = declared(*files)
    rows = kernels.launched_by_rows()
    assert rows["swiglu_fwd"] == rows["swiglu_bwd"] == "swiglu"
    assert rows.keys() <= contract.OPS.keys()
    assert {name: have.get(name) for name in WANTED if name not in rows} == {
        name: parameters for name, parameters in WANTED.items() if name not in rows
    }
    # of the bias, in linear_bwd; of the loss, in kinds.py
    assert have.keys() - WANTED.keys() == {"add_rows", "noted_numbers", "has_long_rows"}


def test_what_is_launched_by_rows_passes_the_arrays_of_the_op_and_the_length_of_a_row() -> None:
    for op, module in kernels.launched_by_rows().items():
        for suffix in ("_v", "_1"):
            names = [p.name for p in kernels.signatures(module)[op + suffix]]
            assert names == [*contract.OPS[op].parameters, "F"], op
            assert list(inspect.signature(getattr(cuda_ops, op)).parameters) == WANTED[op]


def test_no_backend_takes_an_op_of_another() -> None:
    """But for one that computes with a number: a kernel that is forgotten is an error, not a slow op."""
    cpu = backends.get("cpu")
    taken = {
        name for name in contract.OPS if not getattr(cpu, name).__module__.startswith("apr.backends.cpu.")
    }
    assert taken == {"clip_factor"}
    lacking = ModuleType("lacking")
    vars(lacking).update({name: f for name, f in vars(cpu).items() if name not in ("rope", "__name__")})
    with pytest.raises(AttributeError, match="backend cpu: lacking lack rope"):
        backends.assemble("cpu", [lacking], [lacking, reference])


def _renamed(y: Any, x: Any, w: Any, bias: Any) -> None: ...


def _fewer(y: Any) -> None: ...


def _swapped(gu: Any, y: Any) -> None: ...


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (dict(linear_fwd=_renamed), "linear_fwd['y', 'x', 'w', 'bias']"),
        (dict(copy=_fewer), "copy['y']"),
        (dict(swiglu_fwd=_swapped), "swiglu_fwd['gu', 'y']"),
        (dict(rope=None), "ropeNone"),
        (dict(swiglu_fast=_fewer), "swiglu_fast['y']"),
        (dict(name=None), "name"),
        (dict(dtypes="float32"), "dtypes"),
    ],
)
def test_a_backend_that_differs_is_found(plant: dict[str, Any], found: str) -> None:
    assert differences(overlay(reference, **plant)) == [found]


def test_every_op_has_a_row() -> None:
    assert {op for case in CASES for op, _ in rows(case)[0].calls} == contract.OPS.keys()


def test_the_language_of_the_contract() -> None:
    op = contract.Op.read("f: y out N 2*F, dw acc32? F, x inplace64+ N F, s float?; each N")
    assert op.parameters == ("y", "dw", "x", "s")
    assert op.outputs == {"y": "", "dw": "+", "x": "="}
    assert op.crops("y") == [{"y": 0, "x": 0}]
    assert op.crops("dw") == []
    y, dw, x, s = op.arguments
    assert (dw.optional, x.positive, x.bits, s.role, s.optional, y.axes) == (
        True,
        True,
        64,
        "float",
        True,
        ("N", "2*F"),
    )
    kinds = [[str(a.kind(dtype)) for a in (y, dw, x)] for dtype in ("float64", "float32", contract.BF16)]
    assert kinds == [
        ["float64", "float64", "float64"],
        ["float32", "float32", "float64"],
        ["bfloat16", "float32", "float64"],
    ]


def test_unknown_backend_names_the_choices() -> None:
    with pytest.raises(
        DeviceError, match=f"'nope' does not exist; choose one of {', '.join(backends.NAMES)}"
    ):
        backends.get("nope")


def test_importing_apr_loads_no_device_library() -> None:
    """Neither the package, nor the list of backends, nor the model, nor reference needs Numba or CuPy."""
    loaded = "import sys, apr, apr.backends, apr.model, apr.backends.reference; print(*sys.modules)"
    names = subprocess.run(
        [sys.executable, "-c", loaded], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.split()
    assert "numpy" in names  # so that an empty answer fails
    assert not {"numba", "cupy", "llvmlite", "scipy_openblas64"} & set(names)


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_plumbing(name: str) -> None:
    """Arrays start as zeros and are counted; copies are copies; shapes must be equal."""
    be = backends.get(name)
    before = be.memory()
    x = be.empty((3, 5), "float32")
    assert be.memory() - before == x.nbytes == 60
    assert not be.to_host(x).any()
    be.fill(x, 2.5)
    be.fill(x[:, 1:3], 1.5)
    assert be.to_host(x).sum() == 9 * 2.5 + 6 * 1.5
    host = np.arange(15, dtype=np.float64).reshape(3, 5)
    be.from_host(x, host)
    y = be.empty((3, 5), "float32")
    be.copy(y, x)
    got = be.to_host(y)
    be.fill(y, 0)
    be.sync()
    assert np.array_equal(got, host)
    numbers = [be.empty((1,), "float64") for _ in range(2)]
    be.fill(numbers[0], 0.1)
    later = be.read_later(tuple(numbers))
    be.fill(numbers[0], 7)
    assert later() == [0.1, 0.0]
    for bad in (be.copy, be.from_host):
        with pytest.raises(ValueError, match="shapes differ"):
            bad(y, host[:1].astype(np.float32))


def test_threads_asked_for_must_exist() -> None:
    cpu = backends.get("cpu")
    for n in (0, -1, 10**6):
        with pytest.raises(UsageError, match=f"--threads {n}: this process can have 1 to"):
            cpu.set_threads(n)


def test_model_refuses_a_dtype_its_backend_lacks() -> None:
    with pytest.raises(Refused, match="backend cpu computes in float32, bfloat16, not float64"):
        Model(PRESETS["llama-tiny"], backends.get("cpu"), 1, 1, dtype="float64")


STEP = """
import hashlib
import numpy as np
from apr import backends
from apr.model.presets import PRESETS
from apr.model.transformer import Model
from apr.model.optim import AdamW

be = backends.get("cpu")
be.set_threads(1)
model = Model(PRESETS["qwen3-tiny"], be, 3, 37)
host = np.zeros(model.layout.size, np.float32)
model.layout.randomise(host, 1, 0.2)
be.from_host(model.w, host)
ids = np.random.default_rng(0).integers(0, 123, (3, 38)).astype(np.int32)
opt = AdamW.of(model)
for _ in range(3):
    model.forward(ids[:, :-1])
    model.loss(ids[:, 1:], 1 / 111)
    model.backward()
    opt.step(1e-2)
print(hashlib.sha256(model.w.tobytes()).hexdigest(), float(model.total[0]))
"""


def test_the_process_that_compiles_computes_like_the_next(tmp_path: Path) -> None:
    """Kernels that Numba has just compiled and the same ones from its cache can differ in the last bit."""
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    runs = [
        subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, env=env, check=True)
        for _ in range(2)
    ]
    assert "compiling the CPU kernels" in runs[0].stderr
    assert runs[1].stderr == ""
    assert runs[0].stdout == runs[1].stdout
