"""One side against a recorded trace, `apr trace`'s or that of another program: which tap is off, and since where.

The tolerance is the rule's. Plain NumPy says how far two sound sides may be apart: its error at the precision of
the side and its error at that of the trace, each against the reference in float64 on the same weights, are added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..backends import reference
from ..common.errors import Refused
from ..common.units import plural
from ..model.transformer import Model
from . import rule
from .difference import Difference, difference, error_and_tolerance
from .makers import Made, one_pass, with_causes
from .report import FORCED, FREE, ArrayComparison

PERTURBED = 4  # runs on weights that are off by one rounding


def compare_with_trace(
    model: Model,
    weights: np.ndarray,
    ids: np.ndarray,
    targets: np.ndarray,
    want: Mapping[str, np.ndarray],
    dtype: str,
) -> list[ArrayComparison]:
    """Rows of every tap and gradient that is in the trace `want`, in order of computation: FORCED, then FREE.

    model: the side that is judged, its weights in place; it keeps everything (no recompute, all logits at once), and
    trains where the trace has gradients. weights: those that were traced (Source.host), before the side rounds them.
    ids, targets (B,T). want: what `apr trace` writes, or a part of it. dtype: what the trace was computed in.
    In a FORCED row the side had the trace's values up to the tap in the trace that comes before, so that its error is
    that of the ops since then; cause names them where there are several. Raises Refused for a trace that is not of this
    model or batch.
    """
    if model.recompute or model.loss_rows < ids.size:
        raise ValueError("a model that is compared with a trace keeps every block and all logits")
    highest = max(int(ids.max()), int(targets.max()))
    if highest >= model.cfg.vocab_size:
        raise Refused(
            f"the trace was made of id {highest}, this model has {model.cfg.vocab_size}; give the model that was traced"
        )
    coarse = max(model.dtype, dtype, key=lambda d: rule.EPS[d])
    rows = []
    with np.errstate(all="ignore"):
        sound = _Sound(model, weights, ids, targets)
        want = _fitted(want, sound.truth, ids)
        for mode in (FORCED, FREE):
            base = sound.apart((model.dtype, dtype), want, mode == FORCED)
            judge = _Judge(want, mode == FORCED, coarse == "bfloat16")
            for made, cause in with_causes(model.cfg, one_pass(model, ids, targets, judge), judge.seen):
                rows.append(_row(made, mode, judge, base[made.name], coarse, cause))
    return rows


def _fitted(
    want: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray], ids: np.ndarray
) -> dict[str, np.ndarray]:
    """The trace in the shapes of taps, rows of tokens (B*T,...), after comparing names and shapes."""
    strange = [name for name in want if name not in truth]
    if strange or not want:
        what = f"{plural(len(strange), 'tensor')} that this model does not compute, such as {strange[:1]}"
        raise Refused(
            f"the trace has {what if strange else 'no tensors'}; give a trace of this model, and "
            "compare a training model where it has gradients"
        )
    out = {}
    for name in truth:
        if name in want:
            x, shape = want[name], truth[name].shape
            rows = (*ids.shape, *shape[1:]) if shape[0] == ids.size else shape
            if x.shape not in (shape, rows):
                raise Refused(
                    f"tap {name!r} has shape {x.shape} in the trace, but {rows} in this model with tokens "
                    f"{ids.shape}; give the model and the tokens that were traced"
                )
            out[name] = x.reshape(shape)
    return out


def _row(made: Made, mode: str, judge: _Judge, base: _Base, coarse: str, cause: str) -> ArrayComparison:
    """The verdict on an array: on its worst element, or on a slice where only that is off."""
    d, slices = judge.seen[made.name], judge.sliced[made.name]
    factor, expected = 3 if made.gradient else 2, base.slices if slices else ()
    err, tol, axis = error_and_tolerance(d, base.err, rule.EPS[coarse], factor, slices, expected)
    if axis is not None:
        cause = f"a slice across axis {axis} is off by {err:.2g} of its norm" + (cause and f"; {cause}")
    cause = "" if err <= tol else cause
    return ArrayComparison(
        made.stage, made.op, made.name, mode, err, tol, made.layer, d.shape, d.index, d.got, d.want, cause
    )


# How far off


class _Judge:
    """Looks at a pass: compares with what is wanted, into .seen; with force, has that put in place."""

    def __init__(self, want: Mapping[str, np.ndarray], force: bool, slices: bool) -> None:
        self.want, self.force, self.slices = want, force, slices
        self.seen: dict[str, Difference] = {}
        self.sliced: dict[str, tuple[float, ...]] = {}  # rule.relative() of each

    def __call__(self, name: str, got: np.ndarray) -> np.ndarray | None:
        want = self.want.get(name)
        if want is None:
            return None
        self.seen[name] = difference(got, want)
        self.sliced[name] = tuple(rule.relative(got, want)) if self.slices else ()
        return want.astype(np.float64) if self.force else None


class _Base(NamedTuple):
    """The error to expect: of the worst element, and of the slices across each axis."""

    err: float
    slices: tuple[float, ...]

    def __add__(self, other: _Base) -> _Base:  # type: ignore[override]
        return _Base(self.err + other.err, tuple(map(sum, zip(self.slices, other.slices, strict=True))))

    def __mul__(self, by: float) -> _Base:  # type: ignore[override]
        return _Base(self.err * by, tuple(x * by for x in self.slices))


class _Sound:
    """Arrays that sound sides compute from a batch; .truth: those of the reference in float64."""

    def __init__(self, like: Model, weights: np.ndarray, ids: np.ndarray, targets: np.ndarray) -> None:
        self.like, self.weights, self.batch = like, weights, (ids, targets)
        self.truth: dict[str, np.ndarray] = {}
        one_pass(self._model(reference, "float64"), ids, targets, self.truth.__setitem__)

    def _model(self, be: Any, dtype: str, off: float = 0.0, seed: int = 0) -> Model:
        """Build a model whose weights are each larger or smaller by a share `off`, at random."""
        batch, seq = self.batch[0].shape
        model = Model(self.like.cfg, be, batch, seq, dtype, self.like.train, loss_rows=batch * seq)
        weights = self.weights
        if off:
            signs = np.random.default_rng(seed).choice(np.array([-1, 1], np.int8), weights.size)
            weights = weights.astype(np.float64) * (1 + off * signs)
        be.from_host(model.w, weights)
        return model

    def apart(self, dtypes: tuple[str, str], names: Mapping[str, Any], force: bool) -> dict[str, _Base]:
        """Bound the distance of two sound sides of these dtypes: the sum of their errors."""
        plain = {_plain(d): self._errors(_plain(d), names, force) for d in sorted(set(dtypes))}
        a, b = (rule.EPS[d] / rule.EPS[_plain(d)] for d in dtypes)  # errors scale with the unit
        one, two = (plain[_plain(d)] for d in dtypes)
        return {name: one[name] * a + two[name] * b for name in names}

    def _errors(self, dtype: str, names: Mapping[str, Any], force: bool) -> dict[str, _Base]:
        """The largest errors of plain NumPy; where they pile up, how large is luck: then the reference on weights that
        are off by one rounding, at random, is asked too."""
        truth = {name: self.truth[name] for name in names}
        models = [(be, dtype, 0) for be in rule.plain(dtype)]
        if not force:
            models += [(reference, "float64", seed) for seed in range(1, PERTURBED + 1)]
        runs = []
        for be, kind, seed in models:
            judge = _Judge(truth, force, slices=True)
            off = rule.EPS[dtype] / 2 if seed else 0.0
            one_pass(self._model(be, kind, off, seed), *self.batch, judge)
            runs.append(judge)
        return {
            name: _Base(
                max(run.seen[name].err for run in runs),
                tuple(map(max, zip(*(run.sliced[name] for run in runs), strict=True))),
            )
            for name in names
        }


def _plain(dtype: str) -> str:
    """Return the dtype in which plain NumPy computes to measure the error of a dtype."""
    return "float32" if dtype == "float64" else dtype
