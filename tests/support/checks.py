"""The checks of whole models: test_model.py and test_golden.py want them green, test_faults.py wants them red.

A check returns the names of what is off: [] is green. It gets its models from `build`, a function
(cfg, dtype, **options) -> Model, and that is where a fault is planted.

How far off is judged by the tolerance rule of precision.py. The error to expect is that of plain NumPy in float32, against
float64 or a golden file; for float64 it is scaled by the ratio of the units in the last place (that errors do scale so
is checked in test_ops.py). In bfloat16 it is that of plain NumPy which stores bfloat16, and the slices of every array
are judged too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from apr.backends import reference
from apr.model.config import ModelConfig
from apr.model.hf_config import from_hf
from apr.model.optim import AdamW
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.model.taps import Compare, Record, Tap, key, no_tap
from apr.model.transformer import Model
from cases import BF16, Arrays, Backend
from precision import plain_numpy, relative, relative_tolerance, tolerance

Build = Callable[..., Model]
EPS = {"float32": 2.0**-23, "float64": 2.0**-52, "bfloat16": 2.0**-7}
END = 5  # the id that ends a document, where models mask them
B, T = 3, 13  # longer than the window of mistral-tiny; positions for which the scaling of llama3-tiny matters


class Error(NamedTuple):
    """How far an array is off."""

    name: str
    err: float  # the largest
    largest: float  # true value
    slices: list[float]  # relative(): of each axis


Errors = list[Error]

CONFIGS = {  # every tiny preset, its head tied and not
    f"{name.removesuffix('-tiny')}{'-tied' if tied else ''}": replace(cfg, tie_word_embeddings=tied)
    for name, cfg in PRESETS.items()
    if name.endswith("-tiny")
    for tied in (False, True)
}


def on(be: Backend) -> Build:
    """Builds models on a backend; without options for batches of (B,T)."""

    def build(cfg: ModelConfig, dtype: str, **options: Any) -> Model:
        return Model(cfg, be, dtype=dtype, **{"batch": B, "seq": T, **options})

    return build


@cache
def start(cfg: ModelConfig) -> np.ndarray:
    """Weights with noise on every parameter, float32 in Layout order, exact in bfloat16."""
    layout = Layout(cfg)
    host = np.zeros(layout.size, np.float32)
    layout.randomise(host, seed=0, std=0.2)
    return host.astype(BF16).astype(np.float32)


def randomised(model: Model) -> Model:
    """The model with start(): the same numbers whatever the backend and dtype."""
    model.be.from_host(model.w, start(model.cfg))
    return model


@cache
def batch(cfg: ModelConfig, n: int = B, t: int = T, end: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Random ids and targets (n,t); every seventh target is ignored. end: the id that ends a document, every eighth."""
    rng = np.random.default_rng([n, t])
    ids, targets = rng.integers(0, cfg.vocab_size, (2, n, t), dtype=np.int32)
    targets.reshape(-1)[::7] = -100
    if end is not None:
        ids.reshape(-1)[4::8] = end
    return ids, targets


def batch_for(model: Model) -> tuple[np.ndarray, np.ndarray]:
    """batch(), of several documents for a model that masks them."""
    return batch(model.cfg, end=model.document_end)


def step(model: Model, ids: np.ndarray, targets: np.ndarray, tap: Tap = no_tap) -> float:
    """The mean loss, with its gradients in model.g, which are tapped too: as grad.NAME."""
    be, counted = model.be, int((targets >= 0).sum())
    be.fill(model.g, 0)
    be.fill(model.total, 0)
    model.forward(ids, tap)
    model.loss(targets, 1 / counted, tap)
    model.backward(tap)
    tap(None, "loss", model.total)
    for name, gradient in model.layout.named(model.g).items():
        tap(None, f"grad.{name}", gradient)
    return float(be.to_host(model.total)[0]) / counted


def results(model: Model) -> Arrays:
    """Loss and gradients of a step on batch(), on the host."""
    tap = Record(model.be)

    def gradients(layer: int | None, name: str, x: Any) -> None:
        if layer is None and (name == "loss" or name.startswith("grad.")):
            tap(layer, name, x)

    step(model, *batch_for(model), gradients)
    return tap.seen


def loss(model: Model, ids: np.ndarray, targets: np.ndarray) -> float:
    """The mean loss alone."""
    model.be.fill(model.total, 0)
    model.forward(ids)
    model.loss(targets)
    return float(model.be.to_host(model.total)[0]) / int((targets >= 0).sum())


# The numeric gradient


def wrong_gradients(build: Build, cfg: ModelConfig, most: int | None = None) -> list[str]:
    """Parameters whose gradient is not (L(w + e u) - L(w - e u)) / 2e along a random direction u, in float64; the first
    `most` of them."""
    model = randomised(build(cfg, "float64"))
    ids, targets = batch_for(model)
    step(model, ids, targets)
    rng, e, wrong = np.random.default_rng(1), 1e-5, []
    weights = model.layout.named(model.w)
    for name, gradient in model.layout.named(model.g).items():
        if len(wrong) == most:
            break
        w, start = weights[name], weights[name].copy()
        u = rng.normal(size=w.shape)
        u /= np.linalg.norm(u)
        losses = []
        for signed in (e, -e):
            w[...] = start + signed * u
            losses.append(loss(model, ids, targets))
        w[...] = start
        numeric, exact = (losses[0] - losses[1]) / (2 * e), float((gradient * u).sum())
        if not abs(exact - numeric) <= 1e-8 + 1e-6 * abs(numeric):
            wrong.append(name)
    return wrong


# The tolerance rule


def judge(got: Errors, expected: Errors, dtype: str) -> list[str]:
    """Names of the arrays whose error breaks the rule; `expected` holds the errors of plain NumPy, in bfloat16 for
    bfloat16 and else in float32."""
    assert [e.name for e in got] == [e.name for e in expected]
    return [g.name for g, e in zip(got, expected, strict=True) if not _sound(g, e, dtype)]


def _sound(got: Error, base: Error, dtype: str) -> bool:
    factor = 3 if re.match(r"grad\.|(\d+\.)?d_", got.name) else 2
    eps = EPS[dtype]
    if dtype != "bfloat16":
        return got.err <= tolerance(base.err * eps / EPS["float32"], got.largest, eps, factor)
    parts = zip(got.slices, base.slices, strict=True)
    return got.err <= tolerance(base.err, got.largest, eps, factor) and all(
        g <= relative_tolerance(b, eps, factor) for g, b in parts
    )


def largest_of(runs: list[Errors]) -> Errors:
    """The largest errors of several runs, by name."""
    return [
        Error(
            rows[0].name,
            float(np.max([row.err for row in rows])),
            rows[0].largest,
            np.max([row.slices for row in rows], axis=0).tolist(),
        )
        for rows in zip(*runs, strict=True)
    ]


# Against the reference in float64


@cache
def truth(cfg: ModelConfig, document_end: int | None = None) -> Arrays:
    """Every tap and every gradient of a step of the reference in float64."""
    record, model = Record(reference), on(reference)(cfg, "float64", document_end=document_end)
    step(randomised(model), *batch_for(model), record)
    return record.seen


class Judged(Compare):
    """Compare, with the errors of slices, unless they are not asked for: in .errors."""

    def __init__(
        self, backend: Backend, want: Arrays, force: bool = False, only: str = "", slices: bool = True
    ) -> None:
        super().__init__(backend, want, force)
        self.only, self.slices, self.errors = re.compile(only), slices, Errors()

    def __call__(self, layer: int | None, name: str, x: Any) -> None:
        name_ = key(layer, name)
        if self.only.match(name_):
            got = self.backend.to_host(x)
            self.errors.append(difference(name_, got, self.want[name_], self.slices))
            super().__call__(layer, name, x)


def errors(model: Model, cfg: ModelConfig, force: bool = False, only: str = "") -> Errors:
    """Errors of a step against the truth, free or forced, of the names that match a pattern."""
    want = truth(cfg, model.document_end)
    judged = Judged(model.be, want, force, only, slices=model.dtype == "bfloat16")
    step(randomised(model), *batch_for(model), judged)
    return judged.errors


@cache
def expected(
    cfg: ModelConfig,
    force: bool = False,
    only: str = "",
    dtype: str = "float32",
    document_end: int | None = None,
) -> Errors:
    """Errors of plain NumPy in float32 or bfloat16."""
    dtype = "bfloat16" if dtype == "bfloat16" else "float32"
    models = [on(be)(cfg, dtype, document_end=document_end) for be in plain_numpy(dtype)]
    return largest_of([errors(model, cfg, force, only) for model in models])


def off_truth(
    build: Build, cfg: ModelConfig, force: bool = False, only: str = "", dtype: str = "float32"
) -> list[str]:
    """Taps and gradients of a step that are off, where `force` puts the truth in place after each tap."""
    model = build(cfg, dtype)
    want = expected(cfg, force, only, dtype, model.document_end)
    return judge(errors(model, cfg, force, only), want, dtype)


# Against golden files


GOLDEN = sorted(Path(__file__).parents[1].joinpath("golden").glob("*.safetensors"))


@cache
def golden(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """Tensors and metadata of a golden file; tools/golden/models.py says what they are."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    meta = {name: json.loads(text) for name, text in header.pop("__metadata__").items()}
    kinds, tensors = {"F32": "<f4", "F64": "<f8", "I32": "<i4"}, {}
    for name, entry in header.items():
        lo, hi = entry["data_offsets"]
        tensors[name] = np.frombuffer(data[start + lo : start + hi], kinds[entry["dtype"]]).reshape(
            entry["shape"]
        )
    return tensors, meta


def golden_config(path: Path) -> ModelConfig:
    """The configuration of a golden file."""
    return from_hf(golden(path)[1]["config"], path.name)


def golden_model(build: Build, path: Path, dtype: str) -> Model:
    """A model with the weights of a golden file."""
    tensors = golden(path)[0]
    n, t = tensors["ids"].shape
    model = build(golden_config(path), dtype, batch=n, seq=t)
    for name, w in model.layout.named(model.w).items():
        model.be.from_host(w, tensors[f"weight.{name}"])
    return model


def stepped(build: Build, path: Path, dtype: str) -> Errors:
    """Errors of the values and gradients of one step."""
    want, model = golden(path)[0], golden_model(build, path, dtype)
    record = Record(model.be)
    mean = step(model, want["ids"], want["targets"], record)
    names = [name for name in want if re.match(r"hidden|final_norm|logits|loss|grad\.", name)]
    return [difference(name, {**record.seen, "loss": np.array(mean)}[name], want[name]) for name in names]


def trained(build: Build, path: Path, dtype: str) -> Errors:
    """Errors of the losses, gradient norms and last parameter norms of ten steps of our optimizer."""
    (want, meta), model = golden(path), golden_model(build, path, dtype)
    a = meta["adamw"]
    hyper = dict(zip(("beta1", "beta2"), a["betas"], strict=True))
    hyper |= dict(eps=a["eps"], weight_decay=a["weight_decay"], grad_clip=a["max_norm"])
    opt = AdamW.of(model, **hyper)
    log = []
    for ids, targets, lr in zip(want["adamw.ids"], want["adamw.targets"], want["adamw.lrs"], strict=True):
        mean = step(model, ids, targets)
        opt.step(float(lr))
        log.append((mean, opt.grad_norm()))
    losses, norms = np.array(log).T
    last = {
        name: np.linalg.norm(model.be.to_host(w).astype(float))
        for name, w in model.layout.named(model.w).items()
    }
    return [
        difference("losses", losses, want["adamw.losses"]),
        difference("grad_norms", norms, want["adamw.grad_norms"]),
        difference("last_norms", list(last.values()), [want[f"adamw.final_norm2.{name}"] for name in last]),
    ]


def difference(name: str, got: Any, want: Any, slices: bool = True) -> Error:
    """How far an array is off; shapes may differ, (B,T) from (B*T)."""
    want = np.asarray(want)
    got = np.reshape(got, want.shape).astype(np.float64)
    parts = relative(got, want) if slices else []
    return Error(name, float(np.abs(got - want).max()), float(np.abs(want).max()), parts)


@cache
def expected_golden(run: Callable[[Build, Path, str], Errors], path: Path) -> Errors:
    """Errors of plain NumPy in float32. Ten steps of AdamW amplify rounding: where a gradient is next to nothing (of the
    bias of the keys, which softmax hardly sees) its sign decides, and the errors of two runs differ by a factor of 100."""
    orders = 24 if run is trained else 4
    return largest_of([run(on(be), path, "float32") for be in plain_numpy(orders=orders)])


def off_golden(build: Build, path: Path, dtype: str) -> list[str]:
    """Hidden states, logits, loss and gradients that are not those of the stock model."""
    return judge(stepped(build, path, dtype), expected_golden(stepped, path), dtype)


def off_adamw(build: Build, path: Path, dtype: str) -> list[str]:
    """Losses, gradient norms and last norms of ten AdamW steps that are not those of the stock optimizer."""
    return judge(trained(build, path, dtype), expected_golden(trained, path), dtype)
