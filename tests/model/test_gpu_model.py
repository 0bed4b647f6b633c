"""Whole models on the cuda backend beyond the tiny ones, which test_model.py, test_golden.py and test_stories.py run
there too: the width of real models, recorded passes across optimizer steps, and what buffers must not carry over."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr.backends import reference
from apr.bisect.planted.faults import FAULTS
from apr.model.config import ModelConfig
from apr.model.lora import LINEAR, LoraConfig
from apr.model.optim import AdamW
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.model.taps import Finite, Record, Stats
from apr.model.transformer import IGNORED, Model
from cases import overlay
from checks import (
    CONFIGS,
    END,
    Build,
    Errors,
    Judged,
    batch,
    judge,
    largest_of,
    loss,
    off_truth,
    on,
    randomised,
    results,
    start,
    step,
    truth,
)
from faults import planted
from precision import differing, flash, rounded, tensor_cores

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.gpu
every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
every_model = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())


# The width of real models

# Every row of these is as wide as in the preset, and so is every head; two layers and 4001 ids, so that the float64
# reference takes seconds.
WIDE = {
    "qwen2.5-0.5b": replace(PRESETS["qwen2.5-0.5b"], num_layers=2, vocab_size=4001),
    "qwen3-0.6b": replace(PRESETS["qwen3-0.6b"], num_layers=1, vocab_size=257),
}
SHAPE = (2, 65)


@cache
def wide_truth(name: str) -> dict[str, np.ndarray]:
    """Taps and gradients of the reference in float64."""
    record = Record(reference)
    model = Model(WIDE[name], reference, *SHAPE, "float64")
    reference.from_host(model.w, scaled(name))
    step(model, *batch(WIDE[name], *SHAPE), record)
    return record.seen


@cache
def scaled(name: str) -> np.ndarray:
    """Weights as start(), with matrices of the size that such a width has after its initialisation."""
    host = start(WIDE[name]).copy()
    host[: Layout(WIDE[name]).decayed] *= 0.25
    return host


def wide_errors(build: Build, name: str, dtype: str, force: bool) -> Errors:
    """Errors of a step at every tap and in every gradient."""
    model = build(WIDE[name], dtype, batch=SHAPE[0], seq=SHAPE[1])
    model.be.from_host(model.w, scaled(name))
    judged = Judged(model.be, wide_truth(name), force, slices=dtype == "bfloat16")
    step(model, *batch(WIDE[name], *SHAPE), judged)
    return judged.errors


@cache
def wide_expected(name: str, dtype: str, force: bool) -> Errors:
    """Errors of plain NumPy, with attention as in the reference and as in kernels."""
    some = [rounded(), rounded(tensor_cores())] if dtype == "bfloat16" else [reference, flash()]
    return largest_of([wide_errors(on(be), name, dtype, force) for be in some])


@pytest.mark.parametrize(
    ("name", "dtype", "force"),
    [
        ("qwen2.5-0.5b", "float32", False),
        ("qwen2.5-0.5b", "bfloat16", False),
        ("qwen2.5-0.5b", "bfloat16", True),
        ("qwen3-0.6b", "float32", False),
        ("qwen3-0.6b", "bfloat16", True),
    ],
)
def test_wide_models_agree_with_float64_at_every_tap(cuda: Any, name: str, dtype: str, force: bool) -> None:
    assert judge(wide_errors(on(cuda), name, dtype, force), wide_expected(name, dtype, force), dtype) == []


@pytest.mark.parametrize(
    "fault", ["one_head_two_percent_off", "bias_dropped", "heads_interleaved", "rope_pairs_neighbours"]
)
def test_check_of_wide_models_can_fail(fault: str) -> None:
    """In plain NumPy that stores bfloat16."""
    name = "qwen2.5-0.5b"
    errors = wide_errors(planted(FAULTS[fault], rounded()), name, "bfloat16", True)
    assert judge(errors, wide_expected(name, "bfloat16", True), "bfloat16") != []


# Steps of an optimizer


def trained(
    cuda: Any,
    cfg: ModelConfig,
    dtype: str,
    graph: bool = True,
    recompute: bool = False,
    before: Callable[[Model, AdamW], None] = lambda model, opt: None,
) -> dict[str, np.ndarray]:
    """Losses, gradients and weights of six steps of two micro-batches of one size and one of another; `before` is
    called before each."""
    model = randomised(on(cuda)(cfg, dtype, recompute=recompute))
    opt, (ids, targets), log = AdamW.of(model), batch(cfg), {}
    for n in range(6):
        before(model, opt)
        cuda.fill(model.total, 0)
        for i, rows in enumerate((slice(0, 1), slice(1, 2), slice(0, 3))):
            model.micro_step(np.roll(ids, n + i)[rows], targets[rows], 0.01, graph)
        log[f"loss {n}"], log[f"g {n}"] = cuda.to_host(model.total), cuda.to_host(model.g)
        opt.step(1e-2)
        log[f"norm {n}"], log[f"w {n}"] = np.array(opt.grad_norm()), cuda.to_host(model.w)
    for name in ("m", "v"):
        log[name] = cuda.to_host(opt.buffers[name])
    log["master"] = cuda.to_host(opt.master)
    return log


@every_model
@every_dtype
def test_replayed_and_recomputed_training_is_the_same_bit_for_bit(
    cuda: Any, cfg: ModelConfig, dtype: str
) -> None:
    """Losses, gradients and weights, in every step; also with blocks computed again, and both at once."""
    want = trained(cuda, cfg, dtype, graph=False)
    assert not np.array_equal(want["w 0"], want["w 5"])
    for graph, recompute in ((True, False), (False, True), (True, True)):
        assert differing(want, trained(cuda, cfg, dtype, graph, recompute)) == [], (graph, recompute)


@every_model
@every_dtype
def test_nothing_is_left_over_from_the_step_before(cuda: Any, cfg: ModelConfig, dtype: str) -> None:
    """All that a step does not define as its input is NaN before it."""
    inputs = {"w", "g", "ids", "targets", "total", "cos", "sin", "m", "v", "master"}
    filled = []

    def poison(model: Model, opt: AdamW) -> None:
        for name, x in {**model.buffers.arrays, **opt.buffers.arrays}.items():
            if name not in inputs:
                cuda.fill(x, np.nan)
                filled.append(name)

    for recompute in (False, True):
        filled.clear()
        want = trained(cuda, cfg, dtype, recompute=recompute)
        assert differing(want, trained(cuda, cfg, dtype, True, recompute, poison)) == []
        assert {"res", "dres", "logits", "loss", "factor", "0.res1"} <= set(filled)


def test_check_of_what_is_left_over_can_fail(cuda: Any) -> None:
    """A sum that is not set to zero first."""
    calls = []

    def fill(x: Any, value: float) -> None:
        calls.append(x.size)
        if not (x.size == 1 and value == 0):
            cuda.fill(x, value)

    cfg = CONFIGS["llama"]
    model = randomised(on(overlay(cuda, fill=fill))(cfg, "float32"))
    opt = AdamW.of(model)
    for x in opt.buffers.arrays.values():
        if x.size == 1:
            cuda.fill(x, np.nan)
    step(model, *batch(cfg))
    opt.step(1e-2)
    assert np.isnan(opt.grad_norm())
    assert calls


@every_dtype
def test_scratch_of_kernels_carries_nothing_over(cuda: Any, dtype: str) -> None:
    pytest.importorskip("cupy")
    from apr.backends.cuda import launch

    for cfg in CONFIGS.values():

        def poison(model: Model, opt: AdamW) -> None:
            for buffer in launch.scratch._buffers:
                cuda.fill(buffer, 0xFF)  # NaN in every float type

        assert differing(trained(cuda, cfg, dtype), trained(cuda, cfg, dtype, before=poison)) == []
    assert launch.scratch.nbytes() > 0


@every_model
@every_dtype
def test_evaluation_and_training_do_not_disturb_each_other(cuda: Any, cfg: ModelConfig, dtype: str) -> None:
    """Evaluations between steps change no step, and steps with a learning rate of 0 no evaluation."""
    ids, targets = batch(cfg)
    values = []

    def evaluate(model: Model, opt: AdamW) -> None:
        values.append(loss(model, np.roll(ids, 3), targets))

    assert differing(trained(cuda, cfg, dtype), trained(cuda, cfg, dtype, before=evaluate)) == []
    assert len(set(values)) == 6
    model = randomised(on(cuda)(cfg, dtype))
    opt = AdamW.of(model)
    first, other = loss(model, ids, targets), loss(model, ids[:2], targets[:2])
    for _ in range(3):
        model.micro_step(ids, targets, 0.01)
        opt.step(0.0)
        assert loss(model, ids, targets) == first
        assert loss(model, ids[:2], targets[:2]) == other


@every_dtype
def test_two_models_do_not_disturb_each_other(cuda: Any, dtype: str) -> None:
    """Their recorded passes share the backend's work space."""
    cfgs = [CONFIGS["qwen3"], CONFIGS["llama-tied"]]
    alone = [trained(cuda, cfg, dtype) for cfg in cfgs]
    other = randomised(on(cuda)(cfgs[1], dtype))

    def interrupt(model: Model, opt: AdamW) -> None:
        for _ in range(3):
            other.micro_step(*batch(cfgs[1]), 0.5)

    assert differing(alone[0], trained(cuda, cfgs[0], dtype, before=interrupt)) == []
    assert differing(alone[1], trained(cuda, cfgs[1], dtype)) == []


def some_targets(cfg: ModelConfig, n: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Ids, targets of which a part does not count, and the loss scale of the others, as instruction data has."""
    ids, targets = batch(cfg, *SHAPE)
    targets = np.where(np.arange(targets.size).reshape(targets.shape) % (n + 2), targets, IGNORED)
    return ids, targets.astype(np.int32), 1 / int((targets >= 0).sum())


def test_a_wide_model_replays_bit_for_bit(cuda: Any) -> None:
    """bfloat16, where attention's sums over query heads are split, and with logits in pieces; act kept or computed again."""
    name, log = "qwen2.5-0.5b", []
    for graph, again in ((False, False), (True, False), (False, True), (True, True)):
        model = Model(WIDE[name], cuda, *SHAPE, "bfloat16", loss_rows=64, act_again=again)
        cuda.from_host(model.w, scaled(name))
        for n in range(4):
            model.micro_step(*some_targets(WIDE[name], n), graph)
        log.append({"g": cuda.to_host(model.g), "total": cuda.to_host(model.total)})
    assert [differing(log[0], other) for other in log[1:]] == [[], [], []]


# Adapters


def adapter_gradients(be: Any, dtype: str, base: str | None, graph: bool) -> np.ndarray:
    """Gradients of four passes of a wide model with adapters."""
    name = "qwen2.5-0.5b"
    cfg = WIDE[name]
    model = Model(cfg, be, *SHAPE, dtype, loss_rows=64, lora=LoraConfig(8, 16.0, tuple(LINEAR), base=base))
    adapters: Any = model.adapters
    adapters.set_base(model.layout.named(scaled(name)).__getitem__)
    rng, start = np.random.default_rng(3), np.zeros(adapters.layout.size, np.float32)
    for s in adapters.layout.slots:
        start[s.offset : s.offset + s.size] = 0.02 * rng.standard_normal(s.size)
    be.from_host(adapters.w, start)
    for n in range(4):
        model.micro_step(*some_targets(cfg, n), graph)
    return np.asarray(be.to_host(model.g))


@every_dtype
@pytest.mark.parametrize("base", [None, "int8"])
def test_adapters_replay_bit_for_bit_and_agree_with_the_reference(
    cuda: Any, dtype: str, base: str | None
) -> None:
    alone, replayed = (adapter_gradients(cuda, dtype, base, graph) for graph in (False, True))
    np.testing.assert_array_equal(alone.view(np.uint32), replayed.view(np.uint32))
    want = adapter_gradients(reference, "float64", base, False)
    most = {"float32": 1e-3, "bfloat16": 0.05}[dtype]
    assert np.linalg.norm(alone - want) <= most * np.linalg.norm(want)


# Several documents in a sequence

# Heads for tensor cores, two query heads to a key/value head, and more tokens than a tile of queries or keys has.
DOCUMENTS = {
    f"{name} {width}": replace(
        CONFIGS[name], head_dim=width, num_heads=4, num_kv_heads=2, max_position_embeddings=512
    )
    for name, width in (("qwen2", 64), ("qwen3", 128), ("mistral", 32), ("llama3", 96))
}
LONG = (2, 300)
every_documents = pytest.mark.parametrize("cfg", DOCUMENTS.values(), ids=DOCUMENTS.keys())


def documents(cfg: ModelConfig, shift: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """LONG ids in documents of 1, 5, 97, 59, 123 and 15 tokens, of the second sequence in the other order."""
    ids, targets = (x.copy() for x in batch(cfg, *LONG))
    ids[ids == END] = END + 1
    ends = np.cumsum([1, 5, 97, 59, 123]) - 1
    for row, at in zip(ids, (ends, LONG[1] - 2 - ends), strict=True):
        row[at] = END
    return np.ascontiguousarray(np.roll(ids, shift, 1)), targets


def documents_errors(be: Any, cfg: ModelConfig, dtype: str, want: dict[str, np.ndarray]) -> Errors:
    """Errors of a step of a model that masks them, each op with the true inputs."""
    model = on(be)(cfg, dtype, batch=LONG[0], seq=LONG[1], document_end=END, loss_rows=LONG[0] * LONG[1])
    judged = Judged(be, want, True, slices=dtype == "bfloat16")
    step(randomised(model), *documents(cfg), judged)
    return judged.errors


@every_documents
@every_dtype
def test_documents_agree_with_float64_at_every_tap(cuda: Any, cfg: ModelConfig, dtype: str) -> None:
    record = Record(reference)
    options: dict[str, Any] = dict(batch=LONG[0], seq=LONG[1], loss_rows=LONG[0] * LONG[1])
    step(randomised(on(reference)(cfg, "float64", document_end=END, **options)), *documents(cfg), record)
    plain = Record(reference)
    step(randomised(on(reference)(cfg, "float64", **options)), *documents(cfg), plain)
    assert not np.allclose(record.seen["final_norm"], plain.seen["final_norm"])  # masks matter
    some = [rounded(), rounded(tensor_cores())] if dtype == "bfloat16" else [reference, flash()]
    want = largest_of([documents_errors(be, cfg, dtype, record.seen) for be in some])
    assert judge(documents_errors(cuda, cfg, dtype, record.seen), want, dtype) == []
    assert judge(documents_errors(cuda, cfg, dtype, plain.seen), want, dtype) != []


@every_documents
@every_dtype
def test_a_replayed_step_masks_the_documents_of_its_own_batch(
    cuda: Any, cfg: ModelConfig, dtype: str
) -> None:
    log = []
    for graph in (False, True):
        model = on(cuda)(cfg, dtype, batch=LONG[0], seq=LONG[1], document_end=END)
        randomised(model)
        gradients = {}
        for n in range(5):
            cuda.fill(model.g, 0)
            model.micro_step(*documents(cfg, n), 0.01, graph)
            gradients[str(n)] = cuda.to_host(model.g)
        log.append(gradients)
    assert differing(*log) == []
    assert len({x.tobytes() for x in log[0].values()}) == 5


# Memory


MEMORY = """
import cupy, numpy as np
from apr import backends
from apr.model.presets import PRESETS
from apr.model.transformer import Model
from apr.model.optim import AdamW
from apr.model.cost import memory

cuda, cfg, recompute = backends.get("cuda"), PRESETS["qwen2.5-0.5b"], RECOMPUTE
cuda.set_device(0)
planned = memory(cfg, cuda, 4, 1024, "bfloat16", recompute=recompute)
model = Model(cfg, cuda, 4, 1024, "bfloat16", recompute=recompute)
opt = AdamW.of(model)
ids = np.zeros((4, 1024), np.int32)
for _ in range(3):
    model.micro_step(ids, ids, 1e-3)
opt.step(0.0)
cuda.sync()
assert cuda.memory() == planned.total - planned.backend, (cuda.memory(), planned)
free, total = cupy.cuda.runtime.memGetInfo()
print(total - free, planned.total)
"""


@pytest.mark.alone
@pytest.mark.parametrize("recompute", [False, True])
def test_memory_is_as_planned(cuda: Any, recompute: bool) -> None:
    """What the driver says that a process takes, less what was taken before, is the plan within 3 %."""
    cupy = pytest.importorskip("cupy")
    free, total = cupy.cuda.runtime.memGetInfo()
    code = MEMORY.replace("RECOMPUTE", str(recompute))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    used, planned = map(int, done.stdout.split())
    used -= total - free
    assert abs(used - planned) <= 0.03 * planned, (used, planned)


# Taps


def test_finite_and_stats_read_the_device(cuda: Any) -> None:
    cfg = CONFIGS["qwen3"]
    for dtype in ("float32", "bfloat16"):
        stats, finite = Stats(cuda), Finite(cuda)
        step(randomised(on(cuda)(cfg, dtype)), *batch(cfg), stats)
        exact = Stats(reference)
        for name, x in truth(cfg).items():
            exact(None, name, x)
        assert stats.rows.keys() == exact.rows.keys()
        off = [n for n, row in stats.rows.items() if not np.allclose(row, exact.rows[n], rtol=0.2)]
        assert off == []
        model = randomised(on(cuda)(cfg, dtype))
        cuda.fill(model.p.layer[1].wgu[5:6], np.inf)
        with np.errstate(all="ignore"):
            step(model, *batch(cfg), finite)
        assert finite.first == "1.gu"


@pytest.mark.sanitize
@every_dtype
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral"])
def test_a_small_training_step(cuda: Any, name: str, dtype: str) -> None:
    cfg = CONFIGS[name]
    assert off_truth(on(cuda), cfg, dtype=dtype) == []
    model = randomised(on(cuda)(cfg, dtype))
    before = cuda.to_host(model.w)
    for _ in range(3):
        model.micro_step(*batch(cfg), 0.1)
    AdamW.of(model).step(1e-2)
    assert not np.array_equal(cuda.to_host(model.w), before)


@pytest.mark.sanitize
def test_a_small_step_with_heads_for_tensor_cores(cuda: Any) -> None:
    """Two query heads of 64 to a key/value head, as in real models."""
    cfg = replace(CONFIGS["qwen2"], head_dim=64, hidden_size=64, num_heads=4, num_kv_heads=2)
    assert off_truth(on(cuda), cfg, dtype="bfloat16") == []
    assert (
        differing(*(results(randomised(on(cuda)(cfg, "bfloat16", recompute=r))) for r in (False, True))) == []
    )
