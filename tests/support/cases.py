"""One row per way of calling an op, and the machine that runs a row on a backend.

A call is "OP: CHANGE, CHANGE": the op's row in apr/backends/contract.py, but for the arguments that a change names by
their parameter, in the language of that row, a number as NAME=VALUE, or NAME none where None is passed. PARAMETER>NAME
is an argument that is another array than its parameter is called after. An array is described where it is named first.

An axis is a length; H@K/W is a slice of length H that starts at K of an axis of length W: a strided view, as the model
passes them. Every fourth of `targets` is -100; `doc_start` is borders(). A backward call starts from upstream gradients:
dy is that of y; dres, which is added to, starts as that of res. Sizes are odd on purpose: one row per line of the table
"LETTERS: sizes, sizes, ...".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from apr.backends import overlay as overlay  # most tests that use cases want it too
from apr.backends.contract import BF16 as BF16
from apr.backends.contract import OPS, SCALARS, Argument

Backend = ModuleType | SimpleNamespace
Arrays = dict[str, np.ndarray]
WRITTEN = ("out", "save", "acc", "inplace")


@dataclass(frozen=True)
class Case:
    """A row: the forward call, the backward call ("" where there is none) and a table of sizes."""

    name: str
    fwd: str
    bwd: str
    table: str


QKV = "q in B T H@0/H+2*K D, k in B T K@H/H+2*K D, v in B T K@H+K/H+2*K D"
DQKV = "dq out B T H@0/H+2*K D, dk out B T K@H/H+2*K D, dv out B T K@H+K/H+2*K D"
# of a key/value cache of P positions
CACHE = "q in B T H@0/H+2*K D, k in B S@0/P K D, v in B S@0/P K D"
DCACHE = "dq out B T H@0/H+2*K D, dk out B S@0/P K D, dv out B S@0/P K D"
DOCUMENTS = (1, 5, 59, 2, 97, 17, 123, 257)  # lengths of documents
ADAMW = "lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8, decay=0.1, step=3"
DROPOUT = "seed=0x123456789ABCDEF, module=7, p=0.25, factor=0.7"

# Cases of ops that take float64 by contract: add_sum adds sums of tiles too.
TAKE_64 = ("clip_factor", "add_sum", "add_sum_of_losses", "add_sum_of_tiles")
CASES = [
    Case("embedding", "embedding_fwd", "embedding_bwd", "N C V: 1 1 1, 5 59 97, 257 123 59"),
    Case(
        "linear",
        "linear_fwd",
        "linear_bwd: adds=True",
        "N O I: 1 1 1, 5 97 59, 123 5 97, 59 257 123, 257 1 5",
    ),
    Case(
        "linear_no_bias",
        "linear_fwd: b none",
        "linear_bwd: db none, adds=True",
        "N O I: 1 59 5, 97 123 59, 257 5 97",
    ),
    Case(
        "linear_frozen",
        "linear_fwd: w const O I, b none",
        "linear_bwd: dw none, db none, adds=True",
        "N O I: 5 97 59",
    ),
    # of the first micro-batch
    Case("linear_begun", "linear_fwd", "linear_bwd: dw out32 O I, adds=False", "N O I: 5 97 59, 257 5 97"),
    # the last position of each sequence
    Case("linear_rows_apart", "linear_fwd: x in N I@2*I/3*I, b none", "", "N O I: 1 123 59, 5 97 59"),
    Case("adapted", "adapted: factor=0.7", "", "O I R: 1 1 1, 5 59 4, 97 123 33, 59 128 16"),
    Case("adapted_copy", "adapted: b none, a none, factor=0.7", "", "O I: 5 59, 97 128"),
    Case("adapted_int8", "adapted_int8: factor=0.7", "", "O I R: 1 1 1, 5 59 4, 97 123 33, 59 128 16"),
    Case("adapted_int8_alone", "adapted_int8: b none, a none, factor=0.7", "", "O I: 5 59, 97 128"),
    Case("adapted_bwd_a", "adapted_bwd_a: factor=0.7", "", "N I R: 1 1 1, 5 59 4, 97 123 33, 59 128 16"),
    Case("adapted_bwd_b", "adapted_bwd_b: factor=0.7", "", "N O R: 1 1 1, 5 59 4, 97 123 33, 59 128 16"),
    # the outputs of one of several joined maps
    Case(
        "adapted_bwd_rows_apart",
        "adapted_bwd_b: dy in N O@8/P, factor=0.7",
        "",
        "N O R P: 37 72 8 88, 59 97 5 123",
    ),
    *[
        Case(
            f"gemm_{a[0]}{b[0]}",
            f"gemm: a in32 {a[2:]}, b in32 {b[2:]}, alpha=0.7, beta=0.3, "
            f"trans_a={a[0] == 't'}, trans_b={b[0] == 't'}",
            "",
            "M N K: 1 1 1, 5 59 97, 123 97 5, 59 5 257",
        )
        for a in ("n M K", "t K M")
        for b in ("n K N", "t N K")
    ],
    Case(
        "gemm_fresh",
        "gemm: out out32 M N, alpha=-1.5, beta=0.0, trans_a=False, trans_b=False",
        "",
        "M N K: 97 5 59",
    ),
    Case(
        "gemm_rows_apart",
        "gemm: out inplace32 M N@0/P, a in32 M K@0/P, b in32 N K@1/P, alpha=1.0, beta=1.0, trans_a=False, trans_b=True",
        "",
        "M N K P: 59 97 5 123",
    ),
    Case("add", "add", "", "N C: 1 1, 5 59, 97 123, 123 5"),
    Case("dropout", f"dropout: {DROPOUT}", "", "B T C: 1 1 1, 2 5 59, 3 13 64, 1 257 97"),
    Case("dropout_in_place", f"dropout: out>x inplace B T C, {DROPOUT}", "", "B T C: 2 5 59, 3 13 64"),
    Case("add_in_place", "add: out>a inplace N C", "", "N C: 5 59, 123 97"),
    Case(
        "add_rmsnorm", "add_rmsnorm_fwd: eps=1e-5", "add_rmsnorm_bwd", "N C: 1 2, 5 59, 97 123, 123 5, 59 257"
    ),
    Case(
        "add_rmsnorm_first",  # no delta, and res is res_in
        "add_rmsnorm_fwd: res inplace N C, res_in>res, delta none, eps=1e-6",
        "add_rmsnorm_bwd",
        "N C: 1 5, 257 3, 59 97",
    ),
    Case(
        "add_rmsnorm_frozen",
        "add_rmsnorm_fwd: w const C, eps=1e-5",
        "add_rmsnorm_bwd: dw none",
        "N C: 5 59, 97 123",
    ),
    Case(
        "head_rmsnorm_frozen",
        "head_rmsnorm_fwd: w const D, eps=1e-6",
        "head_rmsnorm_bwd: dw none",
        "N H D: 5 7 59, 97 2 10",
    ),
    Case(
        "head_rmsnorm",  # H heads from head S: of P in y, of Q in x
        "head_rmsnorm_fwd: y out N H@S/P D, rstd save32 N H@S/P, x in N H@S/Q D, eps=1e-6",
        "head_rmsnorm_bwd: dx out N H@S/Q D, dy in N H@S/P D",
        "N H D S P Q: 1 1 2 0 1 1, 5 7 59 0 8 9, 97 1 10 7 8 9, 123 4 12 0 6 8, 59 2 97 4 6 8",
    ),
    Case(
        "rmsnorm_of_all_heads",  # D elements from S of rows of P in y, of Q in x; rstd of q and of k side by side
        "head_rmsnorm_fwd: y out N 1 D@S/P, rstd save32 N 1@R/2, x in N 1 D@S/Q, eps=1e-6",
        "head_rmsnorm_bwd: dx out N 1 D@S/Q, dy in N 1 D@S/P",
        "N D S P Q R: 5 59 0 97 123 0, 97 123 59 257 258 1, 5 1025 7 1100 1148 1, 3 2049 0 2049 4100 0",
    ),
    Case(
        "rope",
        "rope: x inplace B T H@S/P 2*E, sign=1",
        "rope: x>dx inplace B T H@S/P 2*E, sign=-1",
        "B T H E S P: 1 1 1 1 0 1, 2 59 4 5 0 8, 1 97 2 6 4 8, 5 5 7 30 1 9",
    ),
    Case(
        "attention",
        f"attention_fwd: {QKV}, doc_start none, window=0",
        f"attention_bwd: {DQKV}, window=0",
        "B T H K D: 2 5 4 4 10, 1 59 4 2 6, 2 9 4 1 8, 1 13 7 1 5, 1 123 2 1 59, 1 257 1 1 8",
    ),
    Case(
        "attention_window",
        f"attention_fwd: {QKV}, doc_start none, window=W",
        f"attention_bwd: {DQKV}, window=W",
        "B T H K D W: 1 5 2 2 8 2, 2 13 4 2 6 5, 1 97 4 1 5 59, 1 123 2 1 10 5, 1 59 1 1 4 97",
    ),
    Case(
        "attention_cache",  # the last T of S positions ask; keys and values lie in a cache of P positions
        f"attention_fwd: {CACHE}, doc_start none, window=W",
        f"attention_bwd: {DCACHE}, window=W",
        "B T S P H K D W: 1 1 3 5 2 1 6 0, 2 1 59 97 4 2 5 0, 2 5 13 59 7 1 8 0, 1 5 59 60 4 4 6 7, 1 97 123 123 2 1 5 59",
    ),
    Case(
        "attention_documents",
        f"attention_fwd: {QKV}, window=W",
        f"attention_bwd: {DQKV}, window=W",
        "B T H K D W: 2 5 2 2 4 0, 3 13 4 4 8 0, 2 59 4 2 6 0, 2 97 4 1 5 0, 1 123 7 1 6 0, 2 123 2 1 10 5, 1 257 2 2 8 59,"
        "2 257 4 1 8 0",
    ),
    Case(
        "attention_documents_cache",
        f"attention_fwd: {CACHE}, window=W",
        f"attention_bwd: {DCACHE}, window=W",
        "B T S P H K D W: 2 1 59 97 4 2 5 0, 2 13 97 98 4 1 6 7, 2 59 257 259 2 1 8 0",
    ),
    Case("swiglu", "swiglu_fwd", "swiglu_bwd", "N F: 1 1, 5 59, 97 123, 123 5, 1 257"),
    Case("swiglu_again", "swiglu_again", "", "N F: 1 1, 5 59, 97 123, 1 257"),
    Case("cross_entropy", "cross_entropy: scale=0.37, z_loss=0.0", "", "N V: 1 5, 5 59, 97 123, 59 1025"),
    Case(
        "cross_entropy_rows_apart",
        "cross_entropy: logits inplace N V@0/P, scale=0.37, z_loss=0.0",
        "",
        "N V P: 5 59 64, 1 5 64, 59 1025 1032",
    ),
    Case("cross_entropy_z", "cross_entropy: scale=0.37, z_loss=0.01", "", "N V: 5 59, 59 1025"),
    Case(
        "cross_entropy_loss_only",
        "cross_entropy: logits in N V, scale=None, z_loss=0.01",
        "",
        "N V: 1 5, 5 59, 97 1025",
    ),
    Case("add_sum", "add_sum", "", "N: 1, 59, 257"),
    Case("add_sum_of_losses", "add_sum: x in32+ N", "", "N: 40001"),
    Case("add_sum_of_tiles", "add_sum: x in64 N", "", "N: 1, 59, 257"),
    Case("add_sum_sq", "add_sum_sq", "", "N: 1, 59, 257, 40001"),
    Case("add_sum_sq_rows", "add_sum_sq: total acc64+ R, x in32 R N", "", "R N: 1 1, 5 59, 3 1024, 2 2048"),
    Case("clip_factor", "clip_factor: max_norm=0.5", "", "N: 1"),
    # the weights are their own master
    Case("adamw", f"adamw: w inplace32 N, master>w, {ADAMW}", "", "N: 1, 59, 257, 40001"),
    Case("adamw_master", f"adamw: {ADAMW}", "", "N: 1, 59, 257, 40001"),
    Case(
        "adamw_first_step",
        "adamw: lr=0.01, beta1=0.9, beta2=0.95, eps=1e-3, decay=0.0, step=1",
        "",
        "N: 97",
    ),
]


@dataclass(frozen=True)
class Arg(Argument):
    """One argument of a call. axes: (length, start, whole) of each axis; value: of a number."""

    value: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the view."""
        return tuple(length for length, _, _ in self.axes)


@dataclass(frozen=True, eq=False)
class Row:
    """A case at one line of its sizes."""

    case: Case
    sizes: dict[str, int]

    def __str__(self) -> str:
        return "-".join([self.case.name, *map(str, self.sizes.values())])

    @cached_property
    def calls(self) -> list[tuple[str, list[Arg]]]:
        """The op and the arguments of the forward call and, where there is one, of the backward call."""
        named: dict[str, Arg] = {}
        return [self._parse(call, named) for call in (self.case.fwd, self.case.bwd) if call]

    @property
    def written(self) -> dict[str, tuple[int, int]]:
        """Every array that the row writes: name -> (number of the call, position of the argument)."""
        return {
            a.name: (n, i)
            for n, (_, args) in enumerate(self.calls)
            for i, a in enumerate(args)
            if a.role in WRITTEN
        }

    def factor(self, name: str) -> int:
        """Of the tolerance rule: 2 for values, 3 for gradients."""
        return 2 if self.written[name][0] == 0 and name != "logits" else 3

    def _parse(self, call: str, named: dict[str, Arg]) -> tuple[str, list[Arg]]:
        op, _, rest = call.partition(":")
        changes = dict(self._change(text.strip()) for text in rest.split(",") if text)
        args = []
        for argument in OPS[op].arguments:
            arg = changes.pop(argument.name, argument)
            if arg.name in named:
                arg = Arg(arg.name, "again")
            elif not isinstance(arg, Arg):
                assert arg.role not in SCALARS, f"{self}: {op} needs a value of {arg.name}"
                arg = self._sized(arg)
            if arg.role != "scalar":
                named[arg.name] = arg
            args.append(arg)
        assert not changes, f"{self}: {op} has no {', '.join(changes)}"
        return op, args

    def _change(self, text: str) -> tuple[str, Arg]:
        """(parameter, argument) of a change."""
        name, equals, value = text.partition("=")
        if equals:
            return name, Arg(name, "scalar", value=self._number(value))
        parameter, other, rest = text.partition(">")
        name, *role = (rest if other else text).split()
        return parameter.split()[0], self._sized(Argument.read(f"{name} {' '.join(role) or 'again'}"))

    def _sized(self, a: Argument) -> Arg:
        def axis(token: str) -> tuple[int, int, int]:
            length, _, place = token.partition("@")
            start, _, whole = place.partition("/")
            return self._number(length), self._number(start or "0"), self._number(whole or length)

        return Arg(a.name, a.role, a.bits, a.positive, a.optional, tuple(map(axis, a.axes)))

    def _number(self, text: str) -> Any:
        return eval(text, {}, self.sizes)


def rows(case: Case) -> list[Row]:
    """A case at all its sizes."""
    letters, lines = case.table.split(":")
    return [
        Row(case, dict(zip(letters.split(), map(int, line.split()), strict=True)))
        for line in lines.split(",")
    ]


ROWS = [row for case in CASES for row in rows(case)]
LARGEST = [rows(case)[-1] for case in CASES]


def make(row: Row, dtype: Any, seed: int = 0) -> Arrays:
    """Starting values of all arrays that are read, exact in their dtypes, as float64 (integers as int32)."""
    rng, values = np.random.default_rng([seed, *row.sizes.values()]), {}
    for a in (a for _, args in row.calls for a in args):
        if a.role in ("ids", "targets"):
            values[a.name] = rng.integers(0, row.sizes["V"], a.shape, dtype=np.int32)
            values[a.name][3::4] = -100 if a.role == "targets" else 0
        elif a.role == "counters":
            values[a.name] = rng.integers(0, 2**31, a.shape, dtype=np.int32)
        elif a.role == "bytes":
            values[a.name] = rng.integers(-127, 128, a.shape, dtype=np.int8)
        elif a.role == "doc_start":
            values[a.name] = borders(rng, *a.shape, row.sizes.get("S", row.sizes["T"]))
        elif a.role in ("in", "const", "acc", "inplace"):
            x = rng.normal(size=a.shape)
            x = np.abs(x) + 0.1 if a.positive else x
            values[a.name] = x.astype(a.kind(dtype)).astype(np.float64)
    return values


LOGIT_EDGES = ("minus infinity", "lowest", "large", "huge")


def edge_logits(row: Row, dtype: Any, edge: str) -> Arrays:
    """Values of a row of cross_entropy with logits where a dtype ends: minus infinity, or the lowest finite number, for the
    middle three quarters of the vocabulary but the targets; or all large, or so huge that 1.44 times them is infinite.
    """
    values = make(row, dtype)
    x, targets = values["logits"], values["targets"]
    n, v = x.shape
    if edge == "large":
        x *= 1e6
    elif edge == "huge":
        x[...] = 2.5e38 + 1e37 * x
        x[:, v // 3] = 3.3e38  # alone: the logarithm of a number of largest ones would be lost beside them
    else:
        at = np.maximum(targets, 0)
        own = x[np.arange(n), at]
        x[:, v // 8 : v - v // 8] = -np.inf if edge == "minus infinity" else -3.38e38
        x[np.arange(n), at] = own
    return {**values, "logits": x.astype(dtype).astype(np.float64)}


def borders(rng: np.random.Generator, batch: int, queries: int, keys: int) -> np.ndarray:
    """Where the documents of the last `queries` of `keys` positions begin: in each sequence another order of those of
    DOCUMENTS that are shorter than half of it."""
    out, some = np.zeros((batch, keys), np.int32), [n for n in DOCUMENTS if n == 1 or 2 * n < keys]
    for row in out:
        lengths = np.concatenate([rng.permutation(some) for _ in range(1 + keys // sum(some))])
        row[:] = np.repeat(np.cumsum(lengths) - lengths, lengths)[:keys]
    return out[:, keys - queries :]


BAND, GUARD = 64, 7.0  # elements before and after each array, and what is in them and between strided rows


@dataclass
class Buffer:
    """An argument as it lies in memory, with what surrounds it. Outputs start as NaN, inputs lie in NaN."""

    arg: Arg
    whole: Any  # on the backend, flat
    last: np.ndarray  # copy of whole on the host
    band: int

    @classmethod
    def of(cls, be: Backend, arg: Arg, dtype: Any, start: np.ndarray | None, band: int) -> Buffer:
        """A new buffer whose view holds `start`."""
        kind = arg.kind(dtype)
        size = prod(whole for _, _, whole in arg.axes) + 2 * band
        host = np.full(size, np.nan if arg.role in ("in", "const") else GUARD).astype(kind)
        whole = be.empty(size, kind)
        out = cls(arg, whole, host, band)
        out.view(host)[...] = np.nan if start is None else start
        be.from_host(whole, host)
        return out

    def view(self, flat: Any) -> Any:
        """The argument inside its memory."""
        shape = tuple(whole for _, _, whole in self.arg.axes)
        inner = flat[self.band : self.band + prod(shape)].reshape(shape)
        return inner[tuple(slice(start, start + n) for n, start, _ in self.arg.axes)]

    def check(self, be: Backend, op: str, may_change: bool) -> None:
        """Raise AssertionError if an op changed anything that it must not."""
        now = be.to_host(self.whole)
        if may_change:
            self.view(self.last)[...] = self.view(now)
        where = f"outside its output {self.arg.name}" if may_change else f"to its input {self.arg.name}"
        assert now.tobytes() == self.last.tobytes(), f"{op} wrote {where}"


def run(be: Backend, row: Row, dtype: Any, values: Arrays, band: int = BAND) -> Arrays:
    """The calls of a row: every array written. Inputs, and all memory around arrays, must survive.

    A band that is no multiple of 16 bytes puts arrays where wide accesses must not go.
    """
    have: dict[str, Buffer] = {}
    for op, args in row.calls:
        have |= {a.name: Buffer.of(be, a, dtype, values.get(a.name), band) for a in args if a.axes}
        getattr(be, op)(*(have[a.name].view(have[a.name].whole) if a.name in have else a.value for a in args))
        outputs = {a.name for a in args if a.role in WRITTEN}
        for name, buffer in have.items():
            buffer.check(be, op, name in outputs)
    return {name: have[name].view(have[name].last) for name in row.written}
