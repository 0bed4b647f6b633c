"""One pass of a model, in which every tap and gradient is named with the op that makes it.

No table says which op makes a tap: the calls of the pass are noted, and the maker of an array is the op of the latest call
that wrote to its memory, by the outputs of the contract.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from ..backends import overlay
from ..backends.contract import OPS
from ..common.errors import Refused
from ..model.config import ModelConfig
from ..model.taps import key
from ..model.transformer import Model
from .difference import Difference

IN_LOSS = ("logits", "loss_rows", "d_logits", "loss")
Span = tuple[int, int]  # addresses of the first byte of an array and behind its last one


class Made(NamedTuple):
    """An array of a pass: the tap, or grad.NAME, and the op that makes it."""

    name: str
    layer: int | None
    op: str
    stage: str
    gradient: bool


def span(x: Any) -> Span:
    """Addresses of an array in main memory or on a GPU."""
    start = int(x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr)
    if 0 in x.shape:
        return start, start
    return start, start + sum((n - 1) * s for n, s in zip(x.shape, x.strides, strict=True)) + x.itemsize


def overlap(a: Span, b: Span) -> bool:
    """Tell whether two spans share a byte."""
    return a[0] < b[1] and b[0] < a[1]


class Makers:
    """The calls of a pass: (op, span of an output) in order."""

    def __init__(self) -> None:
        self.writes: list[tuple[str, Span]] = []

    @contextmanager
    def noted(self, model: Model) -> Iterator[None]:
        """Note the calls of a model's ops inside."""
        sound = model.be

        def noting(op: str) -> Callable[..., None]:
            run, names, outputs = getattr(sound, op), OPS[op].parameters, OPS[op].outputs

            def call(*args: Any) -> None:
                run(*args)
                written = (x for n, x in zip(names, args, strict=True) if n in outputs and x is not None)
                self.writes += [(op, span(x)) for x in written]

            return call

        model.be = overlay(sound, **{op: noting(op) for op in OPS})  # type: ignore[assignment]
        try:
            yield
        finally:
            model.be = sound

    def latest(self, x: Any) -> int:
        """Index of the latest write to an array."""
        at = span(x)
        return next(i for i in range(len(self.writes) - 1, -1, -1) if overlap(at, self.writes[i][1]))


def one_pass(
    model: Model, ids: np.ndarray, targets: np.ndarray, look: Callable[[str, np.ndarray], np.ndarray | None]
) -> list[Made]:
    """Run forward, mean loss and backward; every array, gradients of parameters behind the tap they are complete with.

    look(name, host copy) may return what to put in the array's place. Raises Refused where all targets are ignored.
    """
    be, count, makers = model.be, int((targets >= 0).sum()), Makers()
    if not count:
        raise Refused("no target to compute a loss of: all are ignored")
    taps: list[tuple[Made, int]] = []  # with the number of writes so far

    def made(layer: int | None, name: str, x: Any) -> None:
        op = "embedding_fwd" if name == "hidden.0" else makers.writes[makers.latest(x)][0]
        taps.append((_made(model.cfg, layer, name, op), len(makers.writes)))

    def tap(layer: int | None, name: str, x: Any) -> None:
        put = look(key(layer, name), be.to_host(x))
        if put is not None:
            be.from_host(x, put)
        made(layer, name, x)

    with makers.noted(model):
        be.fill(model.total, 0)
        model.forward(ids, tap)
        if model.train:
            be.fill(model.g, 0)
        model.loss(targets, 1 / count if model.train else None, tap)
        look("loss", be.to_host(model.total) / count)
        made(None, "loss", model.total)
        if model.train:
            model.backward(tap)
    behind: list[list[Made]] = [[] for _ in range(len(taps) + 1)]
    for slot in model.layout.in_order() if model.train else []:
        name, x = f"grad.{slot.hf}", model.g[slot.offset : slot.offset + slot.size]
        look(name, be.to_host(x).reshape(slot.shape))
        write = makers.latest(x)
        later = (i for i, (m, writes) in enumerate(taps) if writes > write and m.stage == "backward")
        at = next(later, len(taps))
        behind[at].append(Made(name, slot.layer, makers.writes[write][0], "backward", True))
    shown = [[m, *gradients] for (m, _), gradients in zip(taps, behind, strict=False)]
    return [*(m for part in shown for m in part), *behind[-1]]


def _made(cfg: ModelConfig, layer: int | None, tap: str, op: str) -> Made:
    name, _, number = tap.partition(".")
    within = number and int(number) < cfg.num_layers and tap != "hidden.0"
    stage = "loss" if name in IN_LOSS else "backward" if name.startswith("d_") else "forward"
    return Made(key(layer, tap), int(number) if within else layer, op, stage, name.startswith("d_"))


def with_causes(
    cfg: ModelConfig, arrays: list[Made], seen: Mapping[str, Difference]
) -> list[tuple[Made, str]]:
    """The arrays that the trace has, and where several ops may be guilty of an error, which."""
    out: list[tuple[Made, str]] = []
    unseen: list[Made] = []  # since the last tap that the trace has
    kept: list[Made] = []  # which the trace lacks, and attention_bwd reads
    for made in arrays:
        tap = made.name.rsplit(".", 1)[-1]
        if made.name.startswith("grad."):
            tied = made.op == "embedding_bwd" and cfg.tie_word_embeddings
            cause = (
                "embedding_bwd or linear_bwd of the head, whose weights are the embedding's" if tied else ""
            )
        elif made.name not in seen:
            unseen.append(made)
            kept += [made] if tap in ("q_rope", "k_rope", "lse") else []
            continue
        else:
            suspects = [*unseen, made]
            if any(m.op == "attention_bwd" for m in suspects):
                suspects = [*(m for m in kept if m.layer == made.layer), *suspects]
            ops = list(dict.fromkeys(m.op for m in suspects))
            lacking = ", ".join(m.name for m in suspects[:-1])
            cause = f"{' or '.join(ops)}; the trace lacks {lacking}" if len(ops) > 1 else ""
            unseen = [m for m in unseen if tap == "d_qk" and m.name.endswith("d_v")]  # which is no part of it
        if made.name in seen:
            out.append((made, cause))
    return out
