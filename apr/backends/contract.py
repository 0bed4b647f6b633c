"""The ops of a backend: one row per op, and what follows from it.

A row is "OP: ARGUMENT, ARGUMENT, ...; each LETTER LETTER" in the order of the parameters. An argument is NAME ROLE AXES:

    in        read; its gradient is the array d+NAME of the backward op
    const     read; has no gradient         ids, targets   integers below V; a target may be negative
    doc_start int32 of (B,T), the position at which the document of each query begins
    counters  int32 of (B,2), the number of each sequence in its step, and the step
    bytes     8-bit integers in -127 to 127
    out       overwritten                   save           overwritten, and read by the backward op
    acc       added to                      inplace        read and overwritten
    float, int, bool   a number

A role ending in 64 is float64 whatever the dtype of the job, one ending in 32 is float32 in a bfloat16 job, one ending
in + has values above zero; after ?, None may be passed. Axes are letters (reference.py), an axis "2*F" has twice the
length of F. Along the letters behind "each", slices of the outputs do not depend on each other.

What an op computes is told in reference.py, under the same name, with the same parameters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

import ml_dtypes  # isort: skip -- behind NumPy, without which it prints a traceback

BF16 = np.dtype(ml_dtypes.bfloat16)
WRITES = {"out": "", "save": "", "inplace": "=", "acc": "+"}  # role -> "" anew, "=" in place, "+" added to
SCALARS = ("float", "int", "bool")
_ROLE = re.compile(r"(\D+?)(32|64|)([+]?)([?]?)")


@dataclass(frozen=True)
class Argument:
    """One argument of a row."""

    name: str
    role: str
    bits: int = 0
    positive: bool = False
    optional: bool = False
    axes: tuple[str, ...] = ()

    @classmethod
    def read(cls, text: str) -> Argument:
        """The argument of "NAME ROLE AXES"."""
        name, role, *axes = text.split()
        found = _ROLE.fullmatch(role)
        assert found, text
        kind, bits, positive, optional = found.groups()
        return cls(name, kind, int(bits or 0), bool(positive), bool(optional), tuple(axes))

    @property
    def writes(self) -> str | None:
        """Way of writing: "" anew, "=" in place, "+" added to; None for an array that is not written."""
        return WRITES.get(self.role)

    def kind(self, dtype: Any) -> np.dtype:
        """Dtype of the array in a job of `dtype`."""
        if self.role in ("ids", "targets", "doc_start", "counters"):
            return np.dtype(np.int32)
        if self.role == "bytes":
            return np.dtype(np.int8)
        if self.bits == 32 and np.dtype(dtype) == BF16:
            return np.dtype(np.float32)
        return np.dtype(np.float64 if self.bits == 64 else dtype)


@dataclass(frozen=True)
class Op:
    """One row. each: letters of axes along which slices of the outputs do not depend on each other."""

    name: str
    arguments: tuple[Argument, ...]
    each: tuple[str, ...] = ()

    @classmethod
    def read(cls, text: str) -> Op:
        """The op of "OP: ARGUMENT, ...; each LETTERS"."""
        name, _, rest = text.partition(":")
        arguments, _, each = rest.partition(";")
        return cls(name, tuple(map(Argument.read, arguments.split(","))), tuple(each.split()[1:]))

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters, in order."""
        return tuple(a.name for a in self.arguments)

    @property
    def outputs(self) -> dict[str, str]:
        """Parameters that the op writes to: name -> "" anew, "=" in place, "+" added to."""
        return {a.name: a.writes for a in self.arguments if a.writes is not None}

    @property
    def is_update(self) -> bool:
        """Tell an optimizer's op, whose arrays are parts of flat buffers of all parameters, from the others."""
        return "master" in self.outputs

    def crops(self, output: str) -> list[dict[str, int]]:
        """For each axis along which an output may be cropped: parameter -> axis of every array to crop with it."""
        at = {a.name: a.axes for a in self.arguments}
        return [
            {name: axes.index(letter) for name, axes in at.items() if letter in axes}
            for letter in at[output]
            if letter in self.each
        ]


_Q, _KV = "q in B T H D", "k in B S K D, v in B S K D"
_SEEN = "doc_start doc_start? B T, window int"

OPS = {
    op.name: op
    for op in map(
        Op.read,
        (
            "embedding_fwd: y out N C, ids ids N, w in V C; each N C",
            "embedding_bwd: dw acc32 V C, dy in N C, ids ids N; each C",
            "linear_fwd: y out N O, x in N I, w in O I, b in? O; each N O",
            "linear_bwd: dx out N I, dw acc32? O I, db acc32? O, dy in N O, x in N I, w in O I, adds bool; "
            "each N O I",
            "adapted: out out O I, w in O I, b in32? O R, a in32? R I, factor float; each O I",
            "adapted_int8: out out O I, w bytes O I, row const32+ O, b in32? O R, a in32? R I, factor float; each O I",
            "adapted_bwd_a: u out N R, da acc32 R I, x in N I, du in N R, a in R I, factor float; each N I R",
            "adapted_bwd_b: du out N R, db acc32 O R, dy in N O, u in N R, b in O R, factor float; each N O R",
            "gemm: out inplace32 M N, a in32 M K, b in32 K N, alpha float, beta float, trans_a bool, trans_b bool",
            "add: out out N C, a in N C, b in N C; each N C",
            "dropout: out out B T C, x in B T C, counters counters B 2, seed int, module int, p float, factor float; each B",
            "add_rmsnorm_fwd: res out N C, y out N C, rstd save32 N, res_in in N C, delta in? N C, w in C, eps float; each N",
            "add_rmsnorm_bwd: dres acc N C, dw acc32? C, dy in N C, res in N C, rstd in32 N, w in C; each N",
            "head_rmsnorm_fwd: y out N H D, rstd save32 N H, x in N H D, w in D, eps float; each N",
            "head_rmsnorm_bwd: dx out N H D, dw acc32? D, dy in N H D, x in N H D, rstd in32 N H, w in D; each N",
            "rope: x inplace B T H 2*E, cos const32 T E, sin const32 T E, sign int; each B",
            f"attention_fwd: y out B T H D, lse save32 B H T, {_Q}, {_KV}, {_SEEN}; each B",
            f"attention_bwd: dq out B T H D, dk out B S K D, dv out B S K D, dy in B T H D, y in B T H D, lse in32 B H T, "
            f"{_Q}, {_KV}, {_SEEN}; each B",
            "swiglu_fwd: y out N F, gu in N 2*F; each N",
            "swiglu_bwd: dgu out N 2*F, dy in N F, gu in N 2*F; each N",
            "swiglu_again: y out N F, gu inplace N 2*F, dy in N F; each N",
            "cross_entropy: loss out32 N, logits inplace N V, targets targets N, scale float?, z_loss float; each N",
            "add_sum: total acc64 1, x in32 N",
            "add_sum_sq: total acc64+ 1, x in32 N",
            "clip_factor: factor out64 1, sum_sq in64+ 1, max_norm float",
            "adamw: w out N, master inplace32 N, m inplace32 N, v inplace32+ N, square acc64+ 1, g in32 N, factor in64+ 1, "
            "lr float, beta1 float, beta2 float, eps float, decay float, step int; each N",
        ),
    )
}

# functions of a backend that do not compute
PLUMBING = frozenset(
    (
        *("empty", "from_host", "to_host", "fill", "copy", "sync", "memory", "overhead", "free_memory"),
        *("set_threads", "set_device", "describe", "tune", "capture", "read_later", "decoder"),
    )
)
# attributes of a backend that are no functions
FACTS = ("name", "dtypes", "pad_vocab", "loss_elements", "asynchronous", "act_again", "square_tiles")
