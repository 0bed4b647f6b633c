"""Gates of the first step: slopes, borders, averages, validation. Each planted fault turns exactly one of them red."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from apr import backends
from apr.backends import reference
from apr.bisect.golden import golden_steps
from apr.bisect.planted import catalogue
from apr.cli.main import main
from apr.common.finding import FAIL
from apr.evidence.slope import Job, slope_finding, slopes
from apr.evidence.start import planted, with_borders
from apr.model import transformer
from apr.model.adapters import Adapters
from apr.model.families import FAMILIES
from apr.model.lora import LINEAR, LoraConfig, cut
from apr.model.optim import AdamW
from apr.model.params import MAPS
from apr.model.presets import PRESETS
from apr.model.transformer import Model
from apr.training import evaluate, loop
from run_cases import RECIPE, cache, place, pretrain  # noqa: F401

cpu = backends.get("cpu")
LONG = ["--seq-length", 64]
# Positions that the spot check of start.ops does not come to.
BEHIND = 40


def red(run):
    gates = json.loads((run / "verdict.json").read_text())["gates"]
    return {g["id"]: g["why"] or g["measured"] for g in gates if g["verdict"] == FAIL}


def both(m, name, change):
    """Plant a fault in the backend and in the reference: what is wrong in both sides of a comparison."""
    for backend in (cpu, reference):
        m.setattr(backend, name, change(getattr(backend, name)))


# Slopes


def rotation_is_not_turned_back_anywhere(m):
    both(m, "rope", lambda right: lambda x, cos, sin, sign: right(x, cos, sin, sign) if sign > 0 else None)


def norms_forget_a_term_everywhere(m):
    def change(right):
        def without(dres, dw, dy, res, rstd, w):
            xhat = res * rstd[..., None]
            dw += (dy * xhat).sum(0)
            dres += rstd[..., None] * dy * w

        return without

    both(m, "add_rmsnorm_bwd", change)


def the_gradient_of_a_z_loss_is_forgotten_everywhere(m):
    both(m, "cross_entropy", lambda right: lambda loss, x, t, scale, z: right(loss, x, t, scale, 0.0))
    return ["--z-loss", 0.02]


def embeddings_of_late_positions_get_no_gradient(m):
    right = cpu.embedding_bwd

    def early(dw, dy, ids):
        at = (np.arange(len(ids)) % 64 < BEHIND) | (len(ids) <= 64)
        right(dw, np.ascontiguousarray(dy[at]), np.ascontiguousarray(ids[at]))

    m.setattr(cpu, "embedding_bwd", early)
    return LONG


def late_values_get_half_a_gradient(m):
    right = cpu.attention_bwd

    def half(dq, dk, dv, *a):
        right(dq, dk, dv, *a)
        dv[:, BEHIND:] *= 0.5

    m.setattr(cpu, "attention_bwd", half)
    return LONG


def recomputed_blocks_are_others(m):
    right = Model.backward

    def backward(self, *a, **options):
        if self.recompute and self.t > 32:
            self.buffers["0.res1"][...] *= 1.5
        right(self, *a, **options)

    m.setattr(Model, "backward", backward)
    return [*LONG, "--recompute"]


SLOPES = [
    rotation_is_not_turned_back_anywhere, norms_forget_a_term_everywhere, the_gradient_of_a_z_loss_is_forgotten_everywhere,
    embeddings_of_late_positions_get_no_gradient, late_values_get_half_a_gradient, recomputed_blocks_are_others,
]  # fmt: skip

# Borders


def late_positions_see_other_documents(m):
    def change(right):
        def leaky(*a):
            *others, doc_start, window = a
            if doc_start is not None and doc_start.shape[1] > BEHIND:
                doc_start = doc_start.copy()
                doc_start[:, BEHIND:] = 0
            right(*others, doc_start, window)

        return leaky

    for name in ("attention_fwd", "attention_bwd"):
        both(m, name, change)
    return [*LONG, "--mask-documents"]


def ends_belong_to_the_next_document(m):
    def starts(ids, end):
        first = np.zeros(ids.shape, np.int32)
        first[:, 1:] = np.where(ids[:, 1:] == end, np.arange(1, ids.shape[1]), 0)
        return np.maximum.accumulate(first, axis=1)

    m.setattr(transformer, "document_starts", starts)
    return ["--mask-documents", "--spot-check", -1]


# Formulas


def neighbours_are_paired_everywhere(m):
    def change(right):
        def pairs(x, cos, sin, sign):
            c, s = cos[:, None], sign * sin[:, None]
            a, b = x[..., ::2].copy(), x[..., 1::2].copy()
            x[..., ::2] = a * c - b * s
            x[..., 1::2] = b * c + a * s

        return pairs

    both(m, "rope", change)


def epsilon_is_a_constant_everywhere(m):
    both(m, "add_rmsnorm_fwd", lambda right: lambda *a: right(*a[:-1], 1e-6))


def the_gradient_of_a_z_loss_is_halved_everywhere(m):
    both(m, "cross_entropy", lambda right: lambda *a: right(*a[:-1], a[-1] / 2))


def the_model_s_rotation_is_faster(m):
    right = transformer.rope_tables
    m.setattr(transformer, "rope_tables", lambda c, n: tuple(np.roll(x, 1, axis=0) for x in right(c, n)))


FORMULAS = [
    neighbours_are_paired_everywhere,
    epsilon_is_a_constant_everywhere,
    the_model_s_rotation_is_faster,
    the_gradient_of_a_z_loss_is_halved_everywhere,
]

# Averages


def gradients_of_the_last_pieces_alone(m):
    right = Model.micro_step

    def step(self, *a, begins=False, draws=None):
        right(self, *a, begins=True)

    m.setattr(Model, "micro_step", step)


def the_loss_of_the_log_is_another(m):
    right = loop.Trainer._measure
    m.setattr(
        loop.Trainer,
        "_measure",
        lambda self, *a: {**(line := right(self, *a)), "train_loss": 1.001 * line["train_loss"]},
    )


def the_loss_of_training_is_not_the_evaluated_one(m):
    right = Model._loss

    def loss(self, scale, *a, **options):
        is_of_the_job = isinstance(self.total, np.ndarray)
        before = float(self.total[0]) if is_of_the_job else 0.0
        right(self, scale, *a, **options)
        if is_of_the_job and scale is not None:
            rows = self.buffers["loss"]
            rows *= np.float32(1.0001)
            self.total[0] = before + 1.0001 * (float(self.total[0]) - before)

    m.setattr(Model, "_loss", loss)


# Validation


def the_error_is_the_deviation(m):
    right = evaluate.evaluate

    def deviation(model, windows, micro, most, *more):
        found = right(model, windows, micro, most, *more)
        return found._replace(stderr=found.stderr * (-(-(most or len(windows)) // micro)) ** 0.5)

    m.setattr(loop, "evaluate", deviation)


def the_mean_of_means(m):
    right = evaluate.evaluate

    def means(model, windows, micro, most, *more):
        parts = [right(model, windows, micro, most)]
        model.be.fill(model.total, 0)
        found = []
        for ids, targets in evaluate.sequential(windows, micro, most):
            before = float(model.total[0])
            model.forward(ids)
            model.loss(targets)
            found.append((float(model.total[0]) - before) / targets.size)
        return parts[0]._replace(mean=float(np.mean(found)))

    m.setattr(loop, "evaluate", means)
    return ["--micro-batch-size", 3]


def the_first_windows_only(m):
    right = evaluate.sequential

    def first(windows, size, most=None):
        for start in range(0, most, size):
            yield windows.read(np.arange(start, min(start + size, most)))

    assert right
    m.setattr(evaluate, "sequential", first)


def the_last_batch_is_dropped(m):
    right = evaluate.sequential
    m.setattr(evaluate, "sequential", lambda *a: list(right(*a))[:-1])


FAULTS = {
    **dict.fromkeys(SLOPES, "start.slope"),
    late_positions_see_other_documents: "start.borders",
    ends_belong_to_the_next_document: "start.borders",
    **dict.fromkeys(FORMULAS, "start.formulas"),
    gradients_of_the_last_pieces_alone: "start.averages",
    the_loss_of_the_log_is_another: "start.averages",
    the_loss_of_training_is_not_the_evaluated_one: "start.averages",
    the_mean_of_means: "start.validation",
    the_error_is_the_deviation: "start.validation",
    the_first_windows_only: "start.validation",
    the_last_batch_is_dropped: "start.validation",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_planted_fault_turns_exactly_one_gate_red(place, tmp_path, monkeypatch, capsys, fault):
    more = fault(monkeypatch) or []
    assert pretrain(place, tmp_path / "run", *more) == 6
    assert set(red(tmp_path / "run")) == {FAULTS[fault]}, red(tmp_path / "run")
    assert f"gate {FAULTS[fault]}" in capsys.readouterr().err


SOUND = {
    "documents and recomputation": ["--mask-documents", "--seq-length", 48, "--recompute"],
    "z-loss, pieces of three": ["--z-loss", 0.01, "--micro-batch-size", 3],
    "one sequence": ["--batch-size", 1, "--micro-batch-size", 1],
    "two tokens": ["--seq-length", 2],
    "one token": ["--seq-length", 1],
    "all validation windows, other spread": ["--val-fraction", 0.5, "--initializer-range", 0.1],
}


@pytest.mark.parametrize("kind", SOUND)
def test_sound_runs_pass(place, tmp_path, kind):
    assert pretrain(place, tmp_path / "run", *SOUND[kind]) == 0
    assert red(tmp_path / "run") == {}


def test_windows_that_are_held_out_of_the_training_shards_pass(place, tmp_path):
    shards, tokenizer = tmp_path / "shards", tmp_path / "tok"
    assert (
        main(["tokenize", "train", str(place / "corpus"), "--vocab-size", "300", "-o", str(tokenizer)]) == 0
    )
    args = ["--tokenizer", str(tokenizer), "--val-fraction", "0", "-o", str(shards)]
    assert main(["tokenize", "encode-corpus", str(place / "corpus"), *args]) == 0
    job = ["--dataset", str(shards), "--tokenizer", str(tokenizer), "--model", str(place / "config.json")]
    (tmp_path / "file.json").write_text(json.dumps({"lr_min": None, "eps": 1e-7}))
    assert (
        main(
            [
                "pretrain",
                *RECIPE,
                *job,
                "--config",
                str(tmp_path / "file.json"),
                "--run-dir",
                str(tmp_path / "run"),
            ]
        )
        == 0
    )
    assert red(tmp_path / "run") == {}


def test_a_resumed_run_asks_again_and_keeps_its_bits(place, tmp_path):
    assert pretrain(place, tmp_path / "run", "--num-steps", 6) == 0
    assert pretrain(place, tmp_path / "cut", "--num-steps", 6, "--save-every", 2) == 0
    for left in (tmp_path / "cut" / "ckpt" / "state").glob("step-000006.apr"):
        left.unlink()
    assert main(["pretrain", "--resume", "--run-dir", str(tmp_path / "cut")]) == 0
    lines = [
        [
            line["train_loss"]
            for line in map(json.loads, (tmp_path / r / "metrics.jsonl").read_text().splitlines())
            if "lr" in line
        ]
        for r in ("run", "cut")
    ]
    assert lines[0] == lines[1]
    gates = {g["id"]: g for g in json.loads((tmp_path / "cut" / "verdict.json").read_text())["gates"]}
    assert gates["start.slope"]["evaluations"] == 2


# The slopes of every family, and of adapters


def job(preset, std=0.02, batch=2, seq=16, lora=None, **options):
    cfg = PRESETS[preset]
    model = Model(cfg, cpu, batch, seq, lora=lora, **options)
    adapters, host = model.adapters, np.zeros(model.layout.size, np.float32)
    model.layout.init(host, 3, std)
    if adapters:
        adapters.set_base(model.layout.named(host).__getitem__)
        opt = AdamW.of(adapters)
        host = np.zeros(adapters.layout.size, np.float32)
        adapters.layout.init(host, 1)
        opt.set_weights(host)
    else:
        cpu.from_host(model.w, host)
        opt = AdamW.of(model)
    ids = np.random.default_rng(0).integers(0, cfg.vocab_size, (batch, seq + 1)).astype(np.int32)
    return Job(model, opt, adapters, (ids[:, :-1], ids[:, 1:]), 1 / (batch * seq), False)


@pytest.mark.parametrize("std", [0.01, 0.02, 0.1])
@pytest.mark.parametrize("preset", [p for p in PRESETS if p.endswith("-tiny")])
def test_sound_gradients_of_every_family_pass(preset, std):
    j = job(preset, std)
    before = j.model.w.copy()
    found = slope_finding(j)
    assert found.passed, found
    assert found.score < 0.5
    assert np.array_equal(before.view(np.uint32), j.model.w.view(np.uint32))
    assert not j.model.g.any()


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-4])
@pytest.mark.parametrize("preset", ["qwen2-tiny", "olmo2-tiny"])
def test_rows_that_nothing_was_learnt_for_pass(preset, size):
    """A norm magnifies a row of next to nothing: the loss is no parabola along it."""
    j = job(preset, 0.1)
    rows = j.model.p.embed[np.unique(j.ids)[::3]]
    j.model.p.embed[np.unique(j.ids)[::3]] = size * np.sign(rows)
    j.saved = j.model.w.copy()
    found = slope_finding(j)
    assert found.passed, found
    assert np.array_equal(j.saved.view(np.uint32), j.model.w.view(np.uint32))


@pytest.mark.parametrize("targets", [("wq", "wv"), tuple(LINEAR)])
@pytest.mark.parametrize("preset", ["qwen2-tiny", "olmo2-tiny", "llama-demo"])
def test_adapters_pass_and_a_scale_that_is_lost_does_not(monkeypatch, preset, targets):
    assert slope_finding(job(preset, lora=LoraConfig(2, 8.0, targets))).passed
    right = Adapters.add_gradients

    def unscaled(self, layer, name, dy, x):
        right(self, layer, name, dy, x)
        for p in self.layout.pairs:
            if p.base.layer == layer and p.base.param.name in MAPS[name]:
                cut(self.g, p.a)[...] /= self.config.scale

    monkeypatch.setattr(Adapters, "add_gradients", unscaled)
    assert slope_finding(job(preset, lora=LoraConfig(2, 8.0, targets))).passed is False


@pytest.mark.parametrize("targets", [("wq", "wv"), ("wq", "embed")])
def test_adapters_of_a_large_scale_pass(targets):
    """The noise in B must not make the matrix another one: along no step would the loss be a parabola."""
    assert slope_finding(job("llama-demo", lora=LoraConfig(16, 512.0, targets))).passed


def test_slopes_are_asked_behind_borders_too(monkeypatch):
    """Of rows of one long document each, whose attention is wrong in backward where one begins in the row."""
    right = cpu.attention_bwd

    def later(*a):
        *others, doc_start, window = a
        right(
            *others,
            np.where(doc_start > 0, np.minimum(doc_start + 4, np.arange(doc_start.shape[1])), 0).astype(
                np.int32
            ),
            window,
        )

    j = job("llama-tiny", 0.05, document_end=0)
    j.ids[j.ids == 0] = 1
    shards = SimpleNamespace(masks=[], border_id=0)
    windows = SimpleNamespace(shards=shards)
    t = SimpleNamespace(
        batches=SimpleNamespace(windows=windows), settings=SimpleNamespace(mask_documents=True)
    )
    ids, bare = with_borders(t, j.ids), j.ids
    assert (ids == 0).sum(1).tolist() == [1, 0]
    for is_wrong in (False, True):
        if is_wrong:
            monkeypatch.setattr(cpu, "attention_bwd", later)
        j.ids = bare
        assert slope_finding(j).passed
        j.ids = ids
        assert slope_finding(j).passed is not is_wrong
    t.settings.mask_documents = False
    assert with_borders(t, bare) is bare


def test_what_the_slopes_can_resolve():
    """A gradient of one kind that is 5 % too large is seen along most directions, one of 0.1 % along none."""
    j = job("llama-demo", 0.05, 2, 64)
    found = [s for s in slopes(j) if abs(s.gradient) > 0.3 * s.size]
    j.restore()
    assert len(found) > 10
    assert all(0.05 * abs(s.gradient) > s.allowed for s in found)
    assert all(0.001 * abs(s.gradient) < s.allowed for s in found)


@pytest.mark.parametrize("name", ["cpu", "reference", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("family", FAMILIES)
def test_golden_steps_agree(family, name):
    rows = golden_steps(backends.get(name), family)
    assert len(rows) > 40
    assert max(r.ratio for r in rows) < 0.5


@pytest.mark.parametrize("fault", FORMULAS[:2], ids=lambda f: f.__name__)
def test_bisect_names_a_formula_that_both_sides_have(monkeypatch, fault):
    fault(monkeypatch)
    sound = dataclasses.replace(catalogue.FAULTS["loss_in_bits"], ops=lambda be: {}, applies=lambda c: True)
    report = catalogue.bisect(sound, cpu, "float32", "qwen2-tiny")
    assert report.first.stage == "formulas"
    assert {r.stage for r in report.guilty} == {"formulas"}


def test_rows_without_a_border_get_one():
    ids = np.array([[5, 6, 7, 8, 9], [1, 5, 6, 1, 7], [5, 6, 1, 7, 1], [1, 1, 5, 5, 5]], np.int32)
    changed, places = planted(ids, 1)
    assert places == [2, 3, 2, 2]
    assert all(changed[row, p] == 1 for row, p in enumerate(places))
    assert all((changed[row, :p] != 1).any() for row, p in enumerate(places))
