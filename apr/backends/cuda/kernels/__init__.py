"""CUDA kernels: NAME.cu files beside this one, and what each is compiled for. No CuPy is needed here.

The text, the options and the table of variants are the ones that both the run-time loader (launch.py) and
the compile tests use, so that what is tested is what runs. A new NAME.cu is a module compiled for float32
and bfloat16; one that differs has a row in SPECIAL.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from ....common.errors import DeviceError
from .signatures import Parameter, parse

FOLDER = Path(__file__).parent
ACTS = {"float32": "float", "bfloat16": "__nv_bfloat16"}  # dtype of activations: its name in C
OLDEST = (8, 0)  # compute capability; bf16 tensor cores and cp.async begin here


@dataclass(frozen=True)
class Variants:
    """Compilations of a module: every combination of acts and defines, on every arch or on a few."""

    acts: tuple[str, ...] = tuple(ACTS)
    defines: dict[str, tuple[int, ...]] = field(default_factory=dict)
    archs: tuple[str, ...] | None = None  # None: all


SPECIAL = {
    "attention": Variants(defines={"MAX_D": (64, 128, 256)}),
    "decode_attention": Variants(defines={"HEADS": (1, 4), "LANES": (8, 16)}),
    "decode_linear": Variants(defines={"TOKEN_TILES": (0, 1, 2)}),
    "low_rank": Variants(("bfloat16",)),
    "loss_cluster": Variants(archs=("sm_90a", "sm_100")),
    "attention_mma": Variants(("bfloat16",), {"HEAD_DIM": (32, 64, 96, 128), "DOCUMENTS": (0, 1)}),
    "attention_wgmma": Variants(("bfloat16",), {"HEAD_DIM": (64, 96, 128), "DOCUMENTS": (0, 1)}, ("sm_90a",)),
}


def modules() -> list[str]:
    """Names of all modules, sorted: the .cu files of this folder."""
    return sorted(path.stem for path in FOLDER.glob("*.cu"))


def variants(module: str, arch: str | None = None) -> list[tuple[str, dict[str, int]]]:
    """(act, defines) of every compilation of a module; none where the module is not for `arch`."""
    v = SPECIAL.get(module, Variants())
    if arch is not None and v.archs is not None and arch not in v.archs:
        return []
    values = itertools.product(*v.defines.values())
    return [(act, dict(zip(v.defines, at, strict=True))) for at in values for act in v.acts]


def arch_of(capability: tuple[int, int]) -> str:
    """The -arch value for a compute capability (major, minor): sm_90a for 9.0, because wgmma exists only
    there, otherwise sm_XY. Raises DeviceError for a GPU that is too old.
    """
    if capability < OLDEST:
        raise DeviceError(
            f"compute capability {capability[0]}.{capability[1]}, apr needs {OLDEST[0]}.{OLDEST[1]} (Ampere) or newer"
        )
    return f"sm_{capability[0]}{capability[1]}" + "a" * (capability == (9, 0))


def options(act: str, arch: str, defines: dict[str, int]) -> tuple[str, ...]:
    """Compiler options of one variant. CuPy adds -ftz=true and its include folders."""
    return (
        "-std=c++17",
        f"-arch={arch}",
        "-lineinfo",
        f"-DACT={ACTS[act]}",
        *(f"-D{name}={value}" for name, value in sorted(defines.items())),
    )


@cache
def source(module: str) -> str:
    """The text of module.cu with every #include "..." pasted in once, and #line so that messages name the
    file: CuPy's cache of compiled kernels looks at this text and not at headers.

    Raises ValueError for a module or header that does not exist.
    """
    return _paste(module + ".cu", set(), "kernel module")


def header(name: str) -> str:
    """The text of name.cuh in the same way, for kernels that stand elsewhere."""
    return _paste(name + ".cuh", set(), "header")


def _paste(name: str, seen: set[str], wanted_by: str) -> str:
    path = FOLDER / name
    if Path(name).name != name or not path.is_file():
        raise ValueError(f"{wanted_by}: {name} does not exist in {FOLDER}")
    seen.add(name)
    lines = [f'#line 1 "{name}"']
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        include = re.match(r'\s*#\s*include\s*"([^"]*)"', line)
        if include is None:
            lines.append("" if re.match(r"\s*#\s*pragma\s+once\b", line) else line)
        elif include[1] not in seen:
            lines += [_paste(include[1], seen, f"{name}:{number}"), f'#line {number + 1} "{name}"']
        else:
            lines.append("")
    return "\n".join(lines)


@cache
def signatures(module: str) -> dict[str, tuple[Parameter, ...]]:
    """Parameters of every kernel of a module. Raises ValueError for a declaration we cannot launch."""
    return parse(source(module), module + ".cu")


@cache
def launched_by_rows() -> dict[str, str]:
    """Ops whose launch is all that their kernels need: op -> module, of the lines "// Launched by rows: OP, OP".

    A block has one row, the arrays of the op are passed in its order, and then the length of a row.
    """
    lines = (
        (module, re.search(r"^// Launched by rows: (.*)$", source(module), re.M)) for module in modules()
    )
    return {op.strip(): module for module, found in lines if found for op in found[1].split(",")}
