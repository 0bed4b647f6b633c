"""Several documents in one sequence: what a model computes of each is what it computes of that document alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

import apr.model.transformer
from apr import backends
from apr.bisect import batch as batches
from apr.bisect.planted import catalogue
from apr.bisect.planted.faults import FAULTS
from apr.bisect.report import Report
from apr.bisect.side import Batch, Side
from apr.bisect.spot import spot_check
from apr.bisect.stages import Plan, run
from apr.bisect.upload import borders
from apr.common.errors import Refused
from apr.model.config import ModelConfig
from apr.model.cost import memory
from apr.model.documents import document_starts
from apr.model.presets import PRESETS
from apr.model.taps import Record
from apr.model.transformer import Model
from cases import overlay
from checks import CONFIGS, END, Build, batch, off_truth, on, randomised, results, wrong_gradients
from faults import planted
from precision import differing

reference, cpu = backends.get("reference"), backends.get("cpu")
every_model = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())
every_backend = pytest.mark.parametrize(
    ("be", "dtype"),
    [
        ("reference", "float64"),
        ("cpu", "float32"),
        pytest.param("cuda", "float32", marks=pytest.mark.gpu),
        pytest.param("cuda", "bfloat16", marks=pytest.mark.gpu),
    ],
    indirect=["be"],
)
LENGTHS = [
    [1, 5, 19, 34],
    [29, 2, 28],
    [59],
]  # of the documents of each sequence: 59 tokens in all, the last one has no end


@pytest.fixture
def be(request: pytest.FixtureRequest) -> Any:
    """The backend of a name; the test is skipped where there is no GPU for cuda."""
    return request.getfixturevalue("cuda") if request.param == "cuda" else backends.get(request.param)


def masked(be: Any) -> Build:
    """Builds models that mask documents."""
    return partial(on(be), document_end=END)


def packed(cfg: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Ids and targets of documents of LENGTHS; the last target of a document is the first token of the next."""
    rng = np.random.default_rng(0)
    ids = rng.integers(END + 1, cfg.vocab_size, (len(LENGTHS), sum(LENGTHS[0])), dtype=np.int32)
    for row, lengths in zip(ids, LENGTHS, strict=True):
        row[np.cumsum(lengths)[:-1] - 1] = END
    targets = np.roll(ids, -1, 1)
    targets[:, ::7] = -100
    return ids, targets


def documents(ids: np.ndarray) -> Iterator[tuple[int, slice]]:
    """(sequence, positions) of each document, found by counting."""
    for b, row in enumerate(ids):
        begin = 0
        for t, i in enumerate(row):
            if i == END or t == len(row) - 1:
                yield b, slice(begin, t + 1)
                begin = t + 1


def final(model: Model, ids: np.ndarray) -> np.ndarray:
    """final_norm (B,T,C) of a forward pass."""
    record = Record(model.be)
    model.forward(ids, record)
    return record.seen["final_norm"].reshape(*ids.shape, -1)


def apart(model: Model, alone: Model, ids: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """How far documents in one batch are from each alone, from position 0: of final_norm, logits, loss and every
    gradient the largest difference as a share of the largest value."""
    for m in (model, alone):
        m.be.fill(m.g, 0)
        m.be.fill(m.total, 0)
    seen, want = Record(model.be), Record(alone.be)
    model.forward(ids, seen)
    model.loss(targets, 0.01, seen)
    model.backward()
    out: dict[str, float] = {}
    for b, at in documents(ids):
        alone.forward(ids[b : b + 1, at], want)
        alone.loss(targets[b : b + 1, at], 0.01, want)
        alone.backward()
        for name in ("final_norm", "logits"):
            true = want.seen[name]
            got = seen.seen[name].reshape(*ids.shape, -1)[b, at]
            out[name] = max(out.get(name, 0.0), float(np.abs(got - true).max() / np.abs(true).max()))
    pairs = {"loss": (model.total, alone.total)}
    others = alone.layout.named(alone.g)
    pairs |= {name: (g, others[name]) for name, g in model.layout.named(model.g).items()}
    return out | {name: float(np.abs(g - w).max() / np.abs(w).max()) for name, (g, w) in pairs.items()}


def both(build: Build, cfg: ModelConfig) -> tuple[Model, Model]:
    """A model for the batch and one for single documents, whose positions begin at 0, with the same weights."""
    b, t = len(LENGTHS), sum(LENGTHS[0])
    options: dict[str, Any] = dict(seq=t, loss_rows=b * t)
    return tuple(
        randomised(f(cfg, "float64", batch=n, **options)) for f, n in ((build, b), (on(reference), 1))
    )  # type: ignore[return-value]


@every_model
def test_documents_in_a_sequence_are_as_each_alone(cfg: ModelConfig) -> None:
    """In float64, though positions run on: with rotary embeddings (scaled, too) only their differences count. The
    gradient of the batch is the sum of those of its documents."""
    ids, targets = packed(cfg)
    assert [at.stop - at.start for _, at in documents(ids)] == [n for row in LENGTHS for n in row]
    far = {n: x for n, x in apart(*both(masked(reference), cfg), ids, targets).items() if not x <= 1e-12}
    assert far == {}


@pytest.mark.parametrize("fault", [f for f in FAULTS.values() if f.documents], ids=lambda f: f.name)
def test_the_check_of_each_alone_can_fail(fault: Any) -> None:
    cfg = CONFIGS["mistral"]
    models = both(lambda *args, **options: planted(fault, reference)(*args, **options), cfg)
    if fault.name == "borders_of_the_first_batch":
        models[0].forward(np.roll(packed(cfg)[0], 3, 1))
    assert max(apart(*models, *packed(cfg)).values()) > 1e-3


def test_without_masks_documents_see_each_other() -> None:
    assert max(apart(*both(on(reference), CONFIGS["llama"]), *packed(CONFIGS["llama"])).values()) > 1e-3


# What is seen


def reached(model: Model, ids: np.ndarray) -> list[tuple[int, int]]:
    """(changed document, other document) where a token of the first changes what is computed of the second."""
    before, places, found = final(model, ids), list(documents(ids)), []
    for n, (b, at) in enumerate(places):
        changed = ids.copy()
        changed[b, at.start] = (ids[b, at.start] + 1) % 50 + 50  # the end of none
        if ids[b, at.start] == END:
            continue  # a document of one token: its end would go
        after = final(model, changed)
        assert (after[b, at] != before[b, at]).any()
        found += [
            (n, m)
            for m, (c, other) in enumerate(places)
            if m != n and (after[c, other] != before[c, other]).any()
        ]
    return found


@every_model
@every_backend
def test_a_token_changes_nothing_in_other_documents(cfg: ModelConfig, be: Any, dtype: str) -> None:
    """Bit for bit; in its own it does."""
    ids, _ = packed(cfg)
    model = randomised(masked(be)(cfg, dtype, batch=len(ids), seq=ids.shape[1]))
    assert reached(model, ids) == []


@pytest.mark.parametrize("name", ["documents_see_each_other", "document_begins_one_early"])
def test_check_of_other_documents_can_fail(name: str) -> None:
    cfg = CONFIGS["llama"]
    ids, _ = packed(cfg)
    model = randomised(planted(FAULTS[name], cpu)(cfg, "float32", batch=len(ids), seq=ids.shape[1]))
    assert reached(model, ids) != []


# As for any model


@every_model
def test_gradient_of_every_parameter_is_the_numeric_one(cfg: ModelConfig) -> None:
    assert wrong_gradients(masked(reference), cfg) == []


@every_model
@pytest.mark.parametrize("force", [False, True], ids=["free", "forced"])
@every_backend
def test_backend_agrees_with_float64_at_every_tap(cfg: ModelConfig, be: Any, dtype: str, force: bool) -> None:
    assert off_truth(masked(be), cfg, force, dtype=dtype) == []


@every_model
@every_backend
def test_blocks_computed_again_are_masked_too(cfg: ModelConfig, be: Any, dtype: str) -> None:
    again = results(randomised(masked(be)(cfg, dtype, recompute=True)))
    assert differing(results(randomised(masked(be)(cfg, dtype))), again) == []
    assert differing(results(randomised(on(be)(cfg, dtype))), again) != []


def micro_steps(model: Model, graph: bool) -> dict[str, np.ndarray]:
    """Gradients of five micro-steps whose documents end elsewhere each time; from the third on they may be replayed."""
    ids, targets = batch(model.cfg, end=END)
    out = {}
    for n in range(5):
        model.be.fill(model.g, 0)
        model.micro_step(np.ascontiguousarray(np.roll(ids, n, 1)), targets, 0.01, graph)
        out[str(n)] = model.be.to_host(model.g)
    return out


@every_model
@every_backend
def test_a_recorded_step_masks_the_documents_of_its_own_batch(cfg: ModelConfig, be: Any, dtype: str) -> None:
    models = [randomised(masked(be)(cfg, dtype)) for _ in range(2)]
    assert differing(*(micro_steps(m, graph) for m, graph in zip(models, (False, True), strict=True))) == []


def test_check_of_recorded_steps_can_fail() -> None:
    """With a step that keeps the borders that it was recorded with."""
    cfg = CONFIGS["llama"]
    stale = planted(FAULTS["borders_of_the_first_batch"], reference)(cfg, "float64")
    sound = masked(reference)(cfg, "float64")
    assert differing(micro_steps(randomised(sound), False), micro_steps(randomised(stale), True)) != []


# Where documents begin


def test_where_documents_begin() -> None:
    ids = np.array([[9, END, 9, 9, END, END, 9], [END, 9, 9, 9, 9, 9, END], [9] * 7], np.int32)
    want = [[0, 0, 2, 2, 2, 5, 6], [0, 1, 1, 1, 1, 1, 1], [0] * 7]
    got = document_starts(ids, END)
    assert got.dtype == np.int32
    assert got.tolist() == want
    assert document_starts(ids[:, :1], END).tolist() == [[0], [0], [0]]
    long = np.random.default_rng(0).integers(0, 9, (3, 257), dtype=np.int32)
    starts = {(b, t): at.start for b, at in documents(long) for t in range(at.start, at.stop)}
    assert document_starts(long, END).tolist() == [[starts[b, t] for t in range(257)] for b in range(3)]


def test_only_a_model_that_masks_has_a_buffer_for_it() -> None:
    cfg = CONFIGS["llama"]
    plain, model = (on(cpu)(cfg, "float32", document_end=end) for end in (None, END))
    assert "doc_start" not in plain.buffers.arrays
    assert model.buffers["doc_start"].dtype == np.int32
    for documents, m in ((False, plain), (True, model)):
        whole = sum(x.nbytes for x in m.buffers.arrays.values())
        assert (
            0
            <= memory(cfg, cpu, m.batch, m.seq, optimizer=None, documents=documents).total - whole
            < 256 * len(m.buffers.arrays)
        )
    need = [memory(cfg, cpu, 3, 130, documents=d).total for d in (False, True)]
    assert need[1] - need[0] == 1792  # 3 * 130 int32, rounded up to 256 bytes


def test_a_cache_is_refused() -> None:
    with pytest.raises(Refused, match="document_end does not go with"):
        Model(CONFIGS["llama"], cpu, 1, 4, cache=8, train=False, document_end=END)


# Bisect and spot checks


def test_a_spot_check_masks_what_training_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = CONFIGS["qwen2"]
    ids, targets = batch(cfg, end=END)
    seen = []

    def attention_fwd(*args: Any) -> None:
        seen.append(args[-2])
        cpu.attention_fwd(*args)

    report = spot_check(
        randomised(masked(overlay(cpu, attention_fwd=attention_fwd))(cfg, "float32")), ids, targets, "m"
    )
    assert report.agree
    assert {r.tap for r in report.of("upload")} == {"doc_start"}
    assert all(first is not None and first.any() for first in seen)
    for fault in ("documents_see_each_other", "documents_not_masked_in_backward"):
        report = spot_check(randomised(planted(FAULTS[fault], cpu)(cfg, "float32")), ids, targets, "m")
        assert report.first is not None
        assert FAULTS[fault].named.op == report.first.op
    report = spot_check(randomised(on(cpu)(cfg, "float32")), ids, targets, "m")
    assert report.agree  # nothing is masked on either side
    assert not report.of("upload")


def test_bisect_counts_the_borders_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The formula of the model is on both sides; what it gives is compared with a count."""
    cfg = PRESETS["qwen2-tiny"]
    given = batches.in_documents(batches.at_random(cfg, (2, 17), 0), END)
    assert given.document_end == END
    assert "documents of 6 tokens" in given.words

    def bisected() -> Report:
        report = Report("", ("reference float64", "cpu float32"), given.words)
        side = Side(cpu, cfg, "float32")
        return run(cfg, side, catalogue.weights_of(cfg), given, report, Plan(free=False, state=False))

    assert bisected().agree
    sound = document_starts
    monkeypatch.setattr(
        apr.model.transformer, "document_starts", lambda ids, end: np.maximum(sound(ids, end) - 1, 0)
    )
    first = bisected().first
    assert first is not None
    assert (first.stage, first.tap, first.cause) == (
        "upload",
        "doc_start",
        "attention does not stop where a document ends",
    )


def test_borders_are_those_of_the_batch_at_hand() -> None:
    model = masked(cpu)(CONFIGS["llama"], "float32")
    ids, targets = batch(model.cfg, end=END)
    model.forward(ids)
    assert [r.ok for r in borders(model, Batch(ids, targets, "", END))] == [True]
    assert [r.ok for r in borders(model, Batch(np.roll(ids, 1, 1), targets, "", END))] == [False]
    assert borders(model, Batch(ids, targets, "")) == []


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("documents_see_each_other", "document mask missing: tokens of other documents are seen"),
        ("document_begins_one_early", "document border off by one: the token before the document is seen"),
        ("document_begins_one_late", "document border off by one: its first token is hidden"),
        ("documents_not_masked_in_backward", "document mask missing: tokens of other documents are seen"),
    ],
)
def test_the_cause_is_named(name: str, cause: str) -> None:
    row = catalogue.bisect(FAULTS[name], cpu, "float32").first
    assert row is not None
    assert row.cause == cause
