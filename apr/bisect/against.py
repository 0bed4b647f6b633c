"""One side against a recorded trace, `apr trace`'s or that of another program: which tap is off, and since where.

The tolerance is the rule's. Plain NumPy says how far two sound sides may be apart: its error at the precision of
the side and its error at that of the trace, each against the reference in float64 on the same weights, are added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..backends import reference
from ..checkpoints.hf import read_safetensors
from ..checkpoints.tensors import is_float
from ..common.errors import MalformedFile, Refused
from ..common.files import parse_json
from ..model.config import ModelConfig
from ..model.families import layers_of
from ..model.hf_config import from_hf
from ..model.params import Slot
from ..model.taps import key
from ..model.transformer import Model
from . import rule
from .difference import Difference, difference, error_and_tolerance
from .report import FORCED, FREE, ArrayComparison

MADE = {  # tap -> the op that makes it, and the parameters whose gradients it gives besides
    "hidden": "add_rmsnorm_fwd",
    "norm1": "add_rmsnorm_fwd",
    "qkv": "linear_fwd",
    "qk": "head_rmsnorm_fwd",
    "q_rope": "rope",
    "k_rope": "rope",
    "lse": "attention_fwd",
    "att": "attention_fwd",
    "att_out": "linear_fwd",
    "post1": "head_rmsnorm_fwd",
    "res2": "add_rmsnorm_fwd",
    "norm2": "add_rmsnorm_fwd",
    "gu": "linear_fwd",
    "act": "swiglu_fwd",
    "mlp_out": "linear_fwd",
    "post2": "head_rmsnorm_fwd",
    "final_norm": "add_rmsnorm_fwd",
    "logits": "linear_fwd",
    "loss_rows": "cross_entropy",
    "d_logits": "cross_entropy",
    "loss": "add_sum",
    "d_final_norm": "linear_bwd head",
    "d_mlp_out": "head_rmsnorm_bwd mlp_post_norm",
    "d_act": "linear_bwd wdown",
    "d_gu": "swiglu_bwd",
    "d_norm2": "linear_bwd wgate wup",
    "d_res2": "add_rmsnorm_bwd mlp_norm",
    "d_att_out": "head_rmsnorm_bwd attn_post_norm",
    "d_att": "linear_bwd wo",
    "d_q_rope": "attention_bwd",
    "d_k_rope": "attention_bwd",
    "d_v": "attention_bwd",
    "d_qk": "rope",
    "d_qkv": "head_rmsnorm_bwd q_norm k_norm",  # rope, in a model without them
    "d_norm1": "linear_bwd wq wk wv bq bk bv",
    "d_hidden": "add_rmsnorm_bwd attn_norm final_norm",
}
PERTURBED = 4  # runs on weights that are off by one rounding
IN_LOSS = ("logits", "loss_rows", "d_logits", "loss")


class Trace(NamedTuple):
    """A recorded trace: taps and gradients by name, the texts of its metadata, what went in (B,T)."""

    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]
    ids: np.ndarray
    targets: np.ndarray

    @property
    def dtype(self) -> str:
        """What the traced side computed in: a key of rule.EPS."""
        return self.metadata["dtype"]

    @property
    def gradients(self) -> bool:
        """Whether it holds any: then it takes a training model to compare with."""
        return any(name.startswith(("grad.", "d_hidden", "d_final")) for name in self.tensors)


def read_trace(
    path: str | Path,
    ids: np.ndarray | None = None,
    targets: np.ndarray | None = None,
) -> Trace:
    """A file of `apr trace`, or any safetensors file whose tensors are named like taps and whose metadata has a dtype.

    ids, targets: what went in, where the file does not hold it. Raises InputNotFound, MalformedFile, Refused.
    """
    path = Path(path)
    file = read_safetensors(path)
    tensors, metadata = dict(file), file.metadata
    if metadata.get("dtype") not in rule.EPS:
        raise MalformedFile(
            f"{path}: metadata dtype = {metadata.get('dtype')!r} is not one of {', '.join(rule.EPS)}; "
            "is this a file that `apr trace` wrote?"
        )
    given = {"ids": (ids, "--tokens"), "targets": (targets, "--targets")}
    ids, targets = (
        _what_went_in(path, name, tensors.pop(name, None), *given[name]) for name in ("ids", "targets")
    )
    if ids.shape != targets.shape:
        raise Refused(f"{path}: targets are {targets.shape}, ids {ids.shape}; they must be equal")
    for name, x in tensors.items():
        if not is_float(x.dtype):
            raise MalformedFile(f"{path}: tensor {name!r} is {x.dtype}; taps are floating point")
    return Trace(tensors, metadata, ids, targets)


def _what_went_in(
    path: Path, name: str, stored: np.ndarray | None, given: np.ndarray | None, flag: str
) -> np.ndarray:
    """ids or targets: as stored, as given, or both when they are the same."""
    if stored is None:
        if given is None:
            raise Refused(f"{path}: has no tensor {name!r}; give {flag} as the trace was made with")
        return given
    if stored.dtype.kind not in "iu" or stored.ndim != 2:
        raise MalformedFile(f"{path}: tensor {name!r} is {stored.dtype} {stored.shape}, not integers (B,T)")
    lowest = 0 if name == "ids" else -(1 << 31)  # a target below 0 is ignored
    if int(stored.min()) < lowest or int(stored.max()) >= 1 << 31:
        bad = stored.min() if stored.min() < lowest else stored.max()
        raise MalformedFile(f"{path}: tensor {name!r} holds {bad}, which is no token id; is it a trace?")
    if given is not None and not np.array_equal(stored, given):
        raise Refused(f"{path}: was made of other {name} than {flag} gives; leave {flag} out")
    return np.array(stored, np.int32)


def same_model(path: str | Path, trace: Trace, model_sha256: str) -> None:
    """Raise Refused for a trace of another model than the one of this hash (Source.sha256)."""
    traced = trace.metadata.get("model_sha256", model_sha256)
    if traced != model_sha256:
        raise Refused(
            f"{path}: a trace of {trace.metadata.get('model', 'a model')} with model_sha256 {traced}, but this model has "
            f"{model_sha256}; compare the model that was traced"
        )


def config_of(path: str | Path, trace: Trace) -> ModelConfig | None:
    """What the traced side believed the model to be; None for a trace that does not say. Raises MalformedFile, Refused."""
    text = trace.metadata.get("config")
    if text is None:
        return None
    return from_hf(parse_json(text.encode(), f"{path}: metadata config"), f"{path}: metadata config")


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
            for made, cause in _causes(model.cfg, _pass(model, ids, targets, judge), judge.seen):
                rows.append(_row(made, mode, judge, base[made.name], coarse, cause))
    return rows


def _fitted(
    want: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray], ids: np.ndarray
) -> dict[str, np.ndarray]:
    """The trace in the shapes of taps, rows of tokens (B*T,...), after comparing names and shapes."""
    strange = [name for name in want if name not in truth]
    if strange or not want:
        what = f"{len(strange)} tensors that this model does not compute, such as {strange[:1]}"
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


def _row(made: _Made, mode: str, judge: _Judge, base: _Base, coarse: str, cause: str) -> ArrayComparison:
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
    """What sound sides make of a batch: .truth is the reference's in float64."""

    def __init__(self, like: Model, weights: np.ndarray, ids: np.ndarray, targets: np.ndarray) -> None:
        self.like, self.weights, self.batch = like, weights, (ids, targets)
        self.truth: dict[str, np.ndarray] = {}
        _pass(self._model(reference, "float64"), ids, targets, self.truth.__setitem__)

    def _model(self, be: Any, dtype: str, off: float = 0.0, seed: int = 0) -> Model:
        """A model with the weights, each larger or smaller by a share `off`, at random."""
        batch, seq = self.batch[0].shape
        model = Model(self.like.cfg, be, batch, seq, dtype, self.like.train, loss_rows=batch * seq)
        weights = self.weights
        if off:
            signs = np.random.default_rng(seed).choice(np.array([-1, 1], np.int8), weights.size)
            weights = weights.astype(np.float64) * (1 + off * signs)
        be.from_host(model.w, weights)
        return model

    def apart(self, dtypes: tuple[str, str], names: Mapping[str, Any], force: bool) -> dict[str, _Base]:
        """How far two sound sides of these dtypes are apart: the sum of their errors."""
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
            _pass(self._model(be, kind, off, seed), *self.batch, judge)
            runs.append(judge)
        return {
            name: _Base(
                max(run.seen[name].err for run in runs),
                tuple(map(max, zip(*(run.sliced[name] for run in runs), strict=True))),
            )
            for name in names
        }


def _plain(dtype: str) -> str:
    """What plain NumPy computes in, to tell the error of a dtype."""
    return "float32" if dtype == "float64" else dtype


# One pass


class _Made(NamedTuple):
    """An array of a pass: the tap, or grad.NAME, and the op that makes it."""

    name: str
    layer: int | None
    op: str
    stage: str
    gradient: bool


def _pass(
    model: Model, ids: np.ndarray, targets: np.ndarray, look: Callable[[str, np.ndarray], np.ndarray | None]
) -> list[_Made]:
    """One forward pass, mean loss and backward pass; every array, gradients of parameters where they are complete.

    look(name, host copy) may return what to put in the array's place.
    """
    be, count = model.be, int((targets >= 0).sum())
    if not count:
        raise Refused("no target to compute a loss of: all are ignored")
    gradients = model.layout.named(model.g) if model.train else {}
    out: list[_Made] = []

    def gradient(slot: Slot, op: str) -> None:
        name = f"grad.{slot.hf}"
        look(name, be.to_host(gradients[slot.hf]))
        out.append(_Made(name, slot.layer, op, "backward", True))

    def tap(layer: int | None, name: str, x: Any) -> None:
        put = look(key(layer, name), be.to_host(x))
        if put is not None:
            be.from_host(x, put)
        made, parameters = _maker(model.cfg, layer, name)
        out.append(made)
        for slot in model.layout.in_order():
            if slot.layer == made.layer and slot.param.name in parameters:
                gradient(slot, made.op)

    be.fill(model.total, 0)
    model.forward(ids, tap)
    if model.train:
        be.fill(model.g, 0)
    model.loss(targets, 1 / count if model.train else None, tap)
    look("loss", be.to_host(model.total) / count)
    out.append(_maker(model.cfg, None, "loss")[0])
    if model.train:
        model.backward(tap)
        gradient(model.layout.by_hf["model.embed_tokens.weight"], "embedding_bwd")
    return out


def _maker(cfg: ModelConfig, layer: int | None, tap: str) -> tuple[_Made, list[str]]:
    """Who makes a tap, and the parameters whose gradients are complete with it."""
    name, _, number = tap.partition(".")
    op, *parameters = MADE[name].split()
    at = int(number) if number and int(number) < cfg.num_layers else layer
    parts = layers_of(cfg)[at or 0]
    if name == "d_qkv" and not parts.qk_norm:
        op = "rope"
    if op == "rope" and not parts.rope:
        op = (
            "attention_bwd"
            if name.startswith("d_")
            else "head_rmsnorm_fwd"
            if parts.qk_norm
            else "linear_fwd"
        )
    if (name in ("hidden", "d_hidden") and at is not None and not parts.attn_norm) or (
        name in ("res2", "d_res2") and not parts.mlp_norm
    ):
        op = "add"
    if tap == "hidden.0":
        op, at = "embedding_fwd", layer
    gradient = name.startswith("d_")
    stage = "loss" if name in IN_LOSS else "backward" if gradient else "forward"
    return _Made(key(layer, tap), at, op, stage, gradient), parameters


def _causes(cfg: ModelConfig, arrays: list[_Made], seen: Mapping[str, Difference]) -> list[tuple[_Made, str]]:
    """The arrays that the trace has, and where several ops may be guilty of an error, which."""
    out: list[tuple[_Made, str]] = []
    unseen: list[_Made] = []  # since the last tap that the trace has
    kept: list[_Made] = []  # which the trace lacks, and attention_bwd reads
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
