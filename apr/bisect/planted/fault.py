"""The type of a planted fault, how one is entered, and arrays of any backend to make faults with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...backends import overlay
from ...backends.contract import OPS
from ...model.config import ModelConfig
from ...model.params import Layout
from ..rule import Backend

Ops = dict[str, Callable[..., Any]]
Weights = dict[tuple[int | None, str], np.ndarray]  # (layer, name) -> a view that can be changed
entered: dict[str, Fault] = {}  # by name: those of faults.py, once it is imported
# the checks of the test suite that see a fault which is its own derivative's
VALUES = frozenset({"truth", "golden"})
EVERY = VALUES | {"gradient"}
TRUTH = frozenset({"truth"})
BACKWARD = EVERY  # wrong gradients show in all three
ADAMW = frozenset({"adamw"})
REPEAT = frozenset({"repeat"})
LAYOUT = frozenset({"layout"})
DATA = frozenset({"data"})


@dataclass(frozen=True)
class Named:
    """First fault that bisect must report: stage, op and tap, each a regular expression."""

    stage: str
    op: str
    tap: str


@dataclass(frozen=True)
class Fault:
    """A fault: the functions of a backend that it replaces, and what sees it.

    seen_by: the checks of the test suite that must turn red (tests/bisect/test_faults.py). applies: the models it can
    be seen in. config, weights: what the faulty side believes the model and its parameters to be. patch: of the code
    that reads data, which has no sides. documents: attention stops where documents end, and the fault shows there only.
    """

    name: str
    what: str
    named: Named
    ops: Callable[[Any], Ops]
    seen_by: frozenset[str]
    applies: Callable[[ModelConfig], bool]
    config: Callable[[ModelConfig], ModelConfig]
    weights: Callable[[Weights], None] | None
    patch: Callable[[], AbstractContextManager[Any]]
    documents: bool = False

    def backend(self, be: Backend, cfg: ModelConfig) -> Backend:
        """A backend with the fault, for a model of the (sound) configuration."""
        ops = self.ops(be)
        if self.weights is not None:
            ops["from_host"] = _uploads(be, Layout(cfg), self.weights)
        return overlay(be, **ops)


def _uploads(
    be: Backend, layout: Layout, change: Callable[[Weights], None]
) -> Callable[[Any, np.ndarray], None]:
    def from_host(x: Any, host: np.ndarray) -> None:
        if host.shape == (layout.size,):
            host = host.copy()
            change(
                {
                    (s.layer, s.param.name): host[s.offset : s.offset + s.size].reshape(s.shape)
                    for s in layout.slots
                }
            )
        be.from_host(x, host)

    return from_host


def _no_ops(be: Any) -> Ops:
    return {}


def fault(
    named: str,
    seen_by: frozenset[str],
    applies: Callable[[ModelConfig], bool] = lambda c: True,
    config: Callable[[ModelConfig], ModelConfig] = lambda c: c,
    documents: bool = False,
) -> Callable[[Callable[[Any], Ops]], Callable[[Any], Ops]]:
    """Put a function that makes the faulty ops into `entered`, under its name; `named` is "stage op tap"."""

    def enter(ops: Callable[[Any], Ops]) -> Callable[[Any], Ops]:
        options = dict(ops=ops, applies=applies, config=config, documents=documents)
        _enter(ops.__name__, ops.__doc__, named, seen_by, **options)
        return ops

    return enter


def _enter(name: str, doc: str | None, named: str, seen_by: frozenset[str], **options: Any) -> None:
    what = (doc or name.replace("_", " ")).strip().split("\n")[0].rstrip(".")
    plain: dict[str, Any] = dict(
        ops=_no_ops, applies=lambda c: True, config=lambda c: c, weights=None, patch=nullcontext
    )
    entered[name] = Fault(name, what, Named(*named.split(" ", 2)), seen_by=seen_by, **{**plain, **options})


def loaded(
    named: str, seen_by: frozenset[str] = TRUTH, applies: Callable[[ModelConfig], bool] = lambda c: True
) -> Any:
    """Put a function that changes the weights of a side into `entered`, under its name."""

    def enter(change: Callable[[Weights], None]) -> Callable[[Weights], None]:
        _enter(change.__name__, change.__doc__, named, seen_by, weights=change, applies=applies)
        return change

    return enter


def believed(named: str, seen_by: frozenset[str], config: Any, applies: Any, what: str) -> None:
    """A fault of the configuration alone."""
    _enter(
        what.split(":")[0].replace(" ", "_"),
        what.split(": ")[1],
        named,
        seen_by,
        config=config,
        applies=applies,
    )


def read(named: str) -> Any:
    """Put a context in which data is read wrongly into `entered`, under its name."""

    def enter(patch: Callable[[], AbstractContextManager[Any]]) -> Any:
        _enter(patch.__name__, patch.__doc__, named, DATA, patch=patch)
        return patch

    return enter


# Ops with other arguments


def changed(be: Any, ops: str, **changes: Callable[[Any], Any]) -> Ops:
    """Ops of a backend that get change(x) in place of x, for the arguments that `changes` names."""

    def with_changes(op: str) -> Callable[..., None]:
        names, sound = OPS[op].parameters, getattr(be, op)

        def call(*args: Any) -> None:
            sound(*(changes[n](x) if n in changes else x for n, x in zip(names, args, strict=True)))

        return call

    return {op: with_changes(op) for op in ops.split()}


def none(x: Any) -> None:
    """None, in place of any argument."""


# Arrays of any backend


def dense(be: Any, x: Any) -> Any:
    out = be.empty(x.shape, x.dtype)
    be.from_host(out, np.ascontiguousarray(be.to_host(x)))
    return out


def times(be: Any, x: Any, c: float) -> Any:
    """A new array c * x."""
    out = be.empty(x.shape, x.dtype)
    be.from_host(out, np.asarray(be.to_host(x), np.float64) * c)
    return out


def rolled(be: Any, x: Any) -> Any:
    """A new array whose rows are those before."""
    out = be.empty(x.shape, x.dtype)
    be.from_host(out, np.roll(be.to_host(x), 1, axis=0))
    return out
