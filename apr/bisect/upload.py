"""Check what a side was given: its configuration, its parameters on the device, its tables and its kernels' numbers."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from ..model.buffers import WIDE
from ..model.config import ModelConfig
from ..model.families import layers_of
from ..model.params import FUSED, Layout
from ..model.rope_scaling import Llama3Scaling, RopeScaling, YarnScaling
from ..model.transformer import Model
from . import explain, rule
from .comparisons import exact, holds, measured, same_bits, unequal
from .difference import difference
from .report import EXACT, ArrayComparison
from .side import Batch

FUSED_IN = {part: name for name, parts in FUSED.items() for part in parts}


def configuration(truth: ModelConfig, side: ModelConfig) -> list[ArrayComparison]:
    """Compare the configurations that both sides believe in."""
    return [
        exact("configuration", "config", f.name, getattr(side, f.name), getattr(truth, f.name))
        for f in fields(ModelConfig)
    ]


def upload(model: Model, weights: np.ndarray) -> list[ArrayComparison]:
    """Compare every parameter on the device with the weights, rounded to the model's dtype, bit for bit; the padding with
    zero; and the rope tables with formulas of their own."""
    kind = np.dtype(model.dtype)
    rows = []
    back = model.be.to_host(model.w)
    named = {s.hf: weights[s.offset : s.offset + s.size].reshape(s.shape) for s in model.layout.slots}
    covered = 0
    for s in model.layout.in_order():
        at = slice(s.offset, s.offset + s.size)
        got, want = back[at].reshape(s.shape), named[s.hf].astype(kind)
        covered += s.size
        tap = s.param.name if s.layer is None else f"{s.layer}.{s.param.name}"
        if same_bits(got, want):
            rows.append(ArrayComparison("upload", "from_host", tap, EXACT, 0.0, 0.0, s.layer, s.shape))
            continue
        d = unequal(got, want)
        others = {k: v for k, v in named.items() if k != s.hf and v.shape == s.shape}
        cause = explain.explain_parameter(
            tap, got.astype(np.float64), want.astype(np.float64),
            {k: v.astype(np.float64) for k, v in others.items()} if s.size < 1 << 22 else {},
        )  # fmt: skip
        rows.append(measured("upload", "from_host", tap, d, 0.0, s.layer, s.shape, cause))
    if covered < back.size:
        used = np.zeros(back.size, bool)
        for s in model.layout.slots:
            used[s.offset : s.offset + s.size] = True
        rest = back[~used].astype(np.float64)
        rows.append(
            holds("upload", "from_host", "padding", not rest.any(), "what lies between parameters is not 0")
        )
    return rows + tables(model)


def tables(model: Model) -> list[ArrayComparison]:
    """Compare cos and sin on the device with angles computed one by one: t * theta^(-2i/D), scaled as the config says."""
    c = model.cfg
    rows = []
    positions, size = model.cos.shape[0], _amplitude(c.rope_scaling)
    angles = np.outer(np.arange(positions), [_frequency(c, i) for i in range(c.head_dim // 2)])
    for name, table, want in (
        ("cos", model.cos, size * np.cos(angles)),
        ("sin", model.sin, size * np.sin(angles)),
    ):
        d = difference(model.be.to_host(table), want)
        eps = rule.EPS[WIDE[model.dtype]]
        tol = rule.tolerance(0.0, size, eps, 2) + 4 * size * positions * rule.EPS["float64"]
        rows.append(measured("upload", "rope_tables", name, d, tol))
    return rows


def borders(model: Model, batch: Batch) -> list[ArrayComparison]:
    """Compare doc_start, by which attention is masked, with document borders counted id by id."""
    if batch.document_end is None:
        return []
    want = np.zeros(batch.shape, np.int32)
    for row, ids in zip(want, batch.ids, strict=True):
        begin = 0
        for t, i in enumerate(ids):
            row[t] = begin
            begin = t + 1 if i == batch.document_end else begin
    d = difference(model.be.to_host(model._at(*batch.shape)[1].doc_start), want)
    cause = "" if d.err == 0 else "attention does not stop where a document ends"
    return [measured("upload", "from_host", "doc_start", d, 0.0, cause=cause)]


def _frequency(c: ModelConfig, i: int) -> float:
    """Radians per position of pair i (Su et al. 2021); linear scaling stretches all wavelengths, Llama 3.1 the long ones, YaRN
    those that fit less than beta_fast times into the original length."""
    wavelength = 2 * np.pi * c.rope_theta ** (2 * i / c.head_dim)
    s = c.rope_scaling
    if s is None or s.rope_type == "dynamic":
        return float(2 * np.pi / wavelength)
    if s.rope_type == "linear":
        return float(2 * np.pi / (wavelength * s.factor))
    if isinstance(s, YarnScaling):
        return float(2 * np.pi / wavelength * (1 - _share(s, c, i) * (1 - 1 / s.factor)))
    if not isinstance(s, Llama3Scaling):
        raise NotImplementedError(f"{s!r}: upload.py computes no angles of this kind")
    low, high = (s.original_max_position_embeddings / f for f in (s.low_freq_factor, s.high_freq_factor))
    if wavelength < high:
        stretch = 1.0
    elif wavelength > low:
        stretch = s.factor
    else:
        x = (s.original_max_position_embeddings / wavelength - s.low_freq_factor) / (
            s.high_freq_factor - s.low_freq_factor
        )
        stretch = 1 / ((1 - x) / s.factor + x)
    return float(2 * np.pi / (wavelength * stretch))


def _share(s: YarnScaling, c: ModelConfig, i: int) -> float:
    """Share of pair i that YaRN divides, from the pairs, with fractions, whose wavelengths fit beta times into the length."""
    first, last = (
        c.head_dim
        / 2
        * np.log2(s.original_max_position_embeddings / (2 * np.pi * beta))
        / np.log2(c.rope_theta)
        for beta in (s.beta_fast, s.beta_slow)
    )
    if s.truncate:
        first, last = np.floor(first), np.ceil(last)
    first, last = max(first, 0.0), min(last, c.head_dim - 1.0)
    return float(np.clip((i - first) / (last - first or 0.001), 0, 1))


def _amplitude(s: RopeScaling | None) -> float:
    """Length of (cos, sin): 1, but for YaRN, which sharpens attention (Peng et al. 2023, eq. 22)."""
    if not isinstance(s, YarnScaling):
        return 1.0
    grown = np.log(max(s.factor, 1.0)) / 10
    both = s.mscale is not None and s.mscale_all_dim is not None
    ratio = (1 + grown * (s.mscale or 0)) / (1 + grown * (s.mscale_all_dim or 0)) if both else 1 + grown
    return float(ratio if s.attention_factor is None else s.attention_factor)


def all_used(layout: Layout, passed: set[str], trained: bool) -> list[ArrayComparison]:
    """Require that an op was given every parameter and, in training, every gradient.

    passed: names of the buffers that ops were given."""
    rows = []
    for s in layout.in_order():
        prefix = "" if s.layer is None else f"{s.layer}."
        names = {prefix + s.param.name, prefix + FUSED_IN.get(s.param.name, s.param.name)}
        for kind in ("", "grad.") if trained else ("",):
            used = any(kind + n in passed for n in names)
            rows.append(
                holds(
                    "upload",
                    "used",
                    f"{kind}{prefix}{s.param.name}",
                    used,
                    "no op was given this buffer",
                    s.layer,
                )
            )
    return rows


def kernels_given(cfg: ModelConfig, seen: dict[tuple[str, str], set[float]]) -> list[ArrayComparison]:
    """Compare the numbers that kernels were launched with, {(kernel, parameter): values}, with the configuration."""
    want = {
        "eps": {cfg.rms_norm_eps},
        "window": {float(layer.window) for layer in layers_of(cfg)},
        "sign": {1.0, -1.0},
    }
    rows = []
    for (kernel, parameter), values in seen.items():
        if parameter in want and not kernel.startswith("adamw"):
            rows.append(
                exact(
                    "configuration",
                    kernel,
                    parameter,
                    sorted(values),
                    sorted(want[parameter] & values) or sorted(want[parameter]),
                )
            )
    return rows
