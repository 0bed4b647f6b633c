"""Adapters: their gradients against finite differences, their steps against a model that adds them itself, and whole runs."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from apr import backends
from apr.backends import overlay, reference
from apr.bisect import rule
from apr.bisect.spot import spot_check
from apr.checkpoints import peft_write as peft
from apr.checkpoints.apr2 import read_apr
from apr.checkpoints.peft import LoadedAdapter
from apr.checkpoints.registry import open_any
from apr.cli.main import main
from apr.common.errors import UsageError
from apr.common.options import check_ranges
from apr.evidence.adapters import adapter_gradients, base_loaded, base_unchanged, merge_error
from apr.evidence.gates import GATES
from apr.model.adapters import Adapters
from apr.model.cost import memory
from apr.model.lora import (
    LINEAR,
    AdapterLayout,
    LoraConfig,
    cut,
    lora_of_json,
    lora_to_json,
)
from apr.model.lora_settings import check_rank, lora_config, parse_targets
from apr.model.optim import AdamW
from apr.model.params import ALIGN, Layout
from apr.model.presets import PRESETS
from apr.model.settings import ModelSettings
from apr.model.transformer import Model
from apr.training import loop
from apr.training.settings import Settings, resolve
from lora_runs import cache, cached, metrics, place, pretrain, steps, steps_begun, weights  # noqa: F401
from precision import rounded

cpu = backends.get("cpu")
FAMILIES = ["llama-tiny", "mistral-tiny", "olmo2-tiny", "qwen2-tiny", "qwen3-tiny", "smollm3-tiny"]
ALL = tuple(LINEAR)


def adapted(preset, be, dtype, config, seed=3, b=True):
    """A model with noise on every weight, adapters with noise on A and B, ids and targets."""
    cfg = PRESETS[preset]
    model = Model(cfg, be, 2, 8, dtype, lora=config)
    host = np.zeros(model.layout.size, dtype if dtype == "float64" else "float32")
    model.layout.randomise(host, seed)
    adapters = model.adapters
    adapters.set_base(model.layout.named(host).__getitem__)
    rng = np.random.default_rng(seed)
    start = np.zeros(adapters.layout.size, host.dtype)
    adapters.layout.init(start, seed)
    for s in adapters.layout.slots:
        if s.param.init == "zeros" and b:
            start[s.offset : s.offset + s.size] = 0.1 * rng.standard_normal(s.size)
    opt = AdamW.of(adapters, grad_clip=0.0)
    opt.set_weights(start)
    ids = rng.integers(0, cfg.vocab_size, (2, 9)).astype(np.int32)
    return model, adapters, opt, ids


def loss(model, ids, scale=1 / 16):
    be = model.be
    be.fill(model.total, 0)
    model.forward(ids[:, :-1])
    model.loss(ids[:, 1:], scale=scale)
    return float(be.to_host(model.total)[0]) * scale


def slopes(preset, config):
    """(name, gradient along a random direction, slope of the loss along it) of every A and B."""
    model, adapters, _, ids = adapted(preset, reference, "float64", config)
    loss(model, ids)
    model.backward()
    rng, step = np.random.default_rng(0), 1e-5
    for s in adapters.layout.slots:
        place = slice(s.offset, s.offset + s.size)
        direction = rng.standard_normal(s.size)
        direction /= np.linalg.norm(direction)
        start, ends = adapters.w[place].copy(), []
        for sign in (+1, -1):
            adapters.w[place] = start + sign * step * direction
            ends.append(loss(model, ids))
        adapters.w[place] = start
        yield s.hf, float(adapters.g[place] @ direction), (ends[0] - ends[1]) / (2 * step)


def off(rows):
    return [name for name, got, slope in rows if not abs(got - slope) <= 1e-6 * max(abs(slope), 1e-3)]


@pytest.mark.parametrize("preset", FAMILIES)
@pytest.mark.parametrize("rslora", [False, True])
def test_gradients_are_the_slopes_of_the_loss(preset, rslora):
    assert off(slopes(preset, LoraConfig(3, 5.0, ALL, rslora))) == []


def test_ranks_and_scales_may_differ_between_matrices():
    """By patterns as PEFT has them: the gradients are slopes, and the first pattern that matches holds."""
    ranks, alphas = (("layers.0.*q_proj", 1), ("q_proj|gate_proj", 4)), (("down_proj", 9.0),)
    config = LoraConfig(2, 5.0, ALL, True, None, ranks, alphas)
    layout = AdapterLayout(PRESETS["llama-tiny"], config)
    found = {p.module: (p.a.shape[0], p.scale) for p in layout.pairs}
    assert found["model.layers.0.self_attn.q_proj"] == (1, 5.0)
    assert found["model.layers.1.self_attn.q_proj"] == (4, 2.5)
    assert found["model.layers.1.mlp.down_proj"] == (2, 9.0 / math.sqrt(2))
    assert off(slopes("llama-tiny", config)) == []
    assert lora_of_json(json.loads(json.dumps(lora_to_json(config)))) == config


def test_patterns_that_count_for_nothing_are_refused():
    cfg = PRESETS["llama-tiny"]
    for ranks, alphas, said in (
        ("embed=3", None, "matches no adapted matrix"),
        (None, "layers.9.*=3", "matches no adapted matrix"),
        ("q_proj=4000", None, "rank 4000"),
        ("q_proj", None, "PATTERN=NUMBER"),
        ("q_proj=1.5", None, "whole number"),
        ("(=3", None, "PATTERN=NUMBER"),
    ):
        with pytest.raises(UsageError, match=said):
            check_rank(cfg, lora_config(2, None, None, None, False, ranks, alphas))
    with pytest.raises(UsageError, match="lora-rank too"):
        lora_config(None, None, None, ranks="q_proj=3")


def test_a_gradient_without_its_scale_is_seen(monkeypatch):
    right = Adapters.add_gradients

    def unscaled(self, layer, name, dy, x):
        right(self, layer, name, dy, x)
        for p in self.layout.pairs:
            if (p.base.layer, p.base.param.name) == (layer, "wq") and name == "wqkv":
                cut(self.g, p.b)[...] /= self.config.scale

    monkeypatch.setattr(Adapters, "add_gradients", unscaled)
    found = off(slopes("llama-tiny", LoraConfig(2, 6.0, ("wq",))))
    assert len(found) == PRESETS["llama-tiny"].num_layers
    assert all("lora_B" in name for name in found)


def test_a_merge_that_is_wrong_in_a_middle_layer_is_seen(monkeypatch):
    cfg = dataclasses.replace(PRESETS["llama-tiny"], num_layers=3)
    model = Model(cfg, cpu, 1, 8, lora=LoraConfig(2, 4.0, ALL))
    adapters = model.adapters
    host = np.zeros(model.layout.size, np.float32)
    model.layout.init(host, 1)
    adapters.set_base(model.layout.named(host).__getitem__)
    assert merge_error(adapters)[0] <= 1
    right = Adapters.effective

    def wrong(self, layer, name):
        out = right(self, layer, name)
        if (layer, name) == (1, "wdown"):
            out[0, 0] += 1e-3
        return out

    monkeypatch.setattr(Adapters, "effective", wrong)
    worst, where = merge_error(adapters)
    assert (worst > 1, where) == (True, "model.layers.1.mlp.down_proj.weight")


@pytest.mark.parametrize("preset", FAMILIES)
def test_merged_weights_and_gradients_on_the_cpu_are_those_of_the_formula(preset):
    config = LoraConfig(4, 8.0, ALL)
    model, adapters, _, ids = adapted(preset, cpu, "float32", config)
    exact, reference_, _, _ = adapted(preset, reference, "float64", config)
    for m in (model, exact):
        loss(m, ids)
        m.backward()
    assert merge_error(adapters)[0] <= 1
    assert merge_error(reference_)[0] <= 1
    for s in adapters.layout.slots:
        place = slice(s.offset, s.offset + s.size)
        got, want = adapters.g[place].astype(np.float64), reference_.g[place]
        assert np.abs(got - want).max() <= 2e-4 * np.abs(want).max(), s.hf


@pytest.mark.parametrize("base", [None, "int8"])
@pytest.mark.parametrize("rank", [1, 5, 16])
@pytest.mark.parametrize("preset", FAMILIES)
def test_products_are_as_exact_as_those_of_plain_numpy(preset, rank, base):
    """W + s B A, s (dy B)^T x and s dy^T (x A^T) of the same float32 inputs, against float64, by the rule of the tolerances."""
    config = LoraConfig(rank, 3.0 * rank, ALL, rslora=True, base=base)
    _, adapters, _, _ = adapted(preset, cpu, "float32", config)
    rng = np.random.default_rng(rank)
    views = zip(adapters.layout.views(adapters.w), adapters.layout.views(adapters.g), strict=True)
    values = {s.hf: arrays for s, arrays in adapters.base_values()}

    def formulas(dtype, w, a, b, dy, x):
        w, a, b, dy, x = (y.astype(dtype) for y in (w, a, b, dy, x))
        s = dtype(config.scale)
        return w + s * (b @ a), s * ((dy @ b).T @ x), s * (dy.T @ (x @ a.T))

    adapters.begin_backward()
    for p, ((a, b), (da, db)) in zip(adapters.layout.pairs, views, strict=True):
        w, *row = values[p.base.hf]
        w = w.reshape(p.base.shape) * (row[0][:, None] if row else np.float32(1))
        dy, x = (rng.standard_normal((16, n), np.float32) for n in p.base.shape)
        adapters.be.fill(adapters.g, 0)
        adapters.add_gradients(p.base.layer, p.base.param.name, dy, x)
        got = adapters.effective(p.base.layer, p.base.param.name), da, db
        inputs = w, a, b, dy, x
        for y, plain, exact, factor in zip(
            got, formulas(np.float32, *inputs), formulas(np.float64, *inputs), (2, 3, 3), strict=True
        ):
            largest = float(np.abs(exact).max())
            tolerance = rule.tolerance(
                float(np.abs(plain - exact).max()), largest, rule.EPS["float32"], factor
            )
            assert np.abs(y - exact).max() <= tolerance, p.base.hf


def test_steps_are_those_of_adamw_on_the_factors():
    """Ten steps beside AdamW written out on A and B in float64."""
    config = LoraConfig(3, 6.0, ("wq", "wv", "wdown"))
    model, adapters, opt, ids = adapted("qwen2-tiny", reference, "float64", config)
    opt.grad_clip = 1.0
    base = np.array(model.w)
    w, m, v = adapters.w.copy(), np.zeros_like(adapters.w), np.zeros_like(adapters.w)
    for step in range(1, 11):
        loss(model, ids)
        model.backward()
        g = adapters.g.copy()
        g *= min(1.0, 1.0 / (np.sqrt((g * g).sum()) + 1e-6))
        opt.step(1e-2)
        m += (1 - opt.beta1) * (g - m)
        v += (1 - opt.beta2) * (g * g - v)
        mhat, vhat = m / (1 - opt.beta1**step), v / (1 - opt.beta2**step)
        w -= 1e-2 * (mhat / (np.sqrt(vhat) + opt.eps) + opt.weight_decay * w)
        w[adapters.layout.decayed :] = 0
        np.testing.assert_allclose(adapters.w, w, rtol=1e-10, atol=1e-13)
        assert not adapters.g.any()
    np.testing.assert_array_equal(model.w, base)
    touched = {p.base.hf for p in adapters.layout.pairs}
    for s, x in adapters.tensors():
        assert ((x != cut(base, s)).mean() > 0.99) == (s.hf in touched)
    assert base_unchanged(adapters).passed


def test_with_b_zero_the_model_is_the_base_bit_for_bit():
    model, adapters, _, _ = adapted("qwen3-tiny", cpu, "float32", LoraConfig(4, 8.0, ALL), b=False)
    host = np.zeros(model.layout.size, np.float32)
    model.layout.randomise(host, 3)
    np.testing.assert_array_equal(model.w, host)
    for s, x in adapters.tensors():
        np.testing.assert_array_equal(x, cut(host, s))
    assert adapters.base_hash() == adapters.base_sha256


def test_losses_are_those_of_the_merged_weights_bit_for_bit():
    model, adapters, _, ids = adapted("qwen2-tiny", cpu, "float32", LoraConfig(4, 8.0, ("wq", "wdown")))
    merged = Model(PRESETS["qwen2-tiny"], cpu, 2, 8)
    for s, x in adapters.tensors():
        cut(merged.w, s)[...] = x
    assert loss(model, ids) == loss(merged, ids)


@pytest.mark.parametrize("base", [None, "int8"])
def test_a_model_that_shares_adapters_computes_the_same(base):
    config = LoraConfig(4, 8.0, ("wq", "wdown"), base=base)
    model, adapters, _, ids = adapted("qwen2-tiny", cpu, "float32", config)
    other = Model(PRESETS["qwen2-tiny"], cpu, 2, 8, train=False, w=adapters)
    losses = []
    for m in (model, other):
        m.be.fill(m.total, 0)
        m.forward(ids[:, :-1])
        m.loss(ids[:, 1:])
        losses.append(float(m.total[0]))
    assert losses[0] == losses[1]


def test_eight_bits_are_the_same_on_every_backend():
    """Without adapters an element is one product of two float32 numbers: equal bits."""
    config = LoraConfig(4, 8.0, ("wq",), base="int8")
    models = [adapted("qwen3-tiny", be, "float32", config)[1] for be in (cpu, reference)]
    for (s, x), (_, y) in zip(*(a.tensors() for a in models), strict=True):
        if s.param.name != "wq":
            np.testing.assert_array_equal(np.array(x).view(np.uint32), np.array(y).view(np.uint32))


def spot(be, dtype, base, preset="qwen3-tiny"):
    """Report of a spot check of a model with new adapters."""
    model, _, _, _ = adapted(preset, be, dtype, LoraConfig(8, 16.0, ALL, base=base), b=False)
    ids = np.random.default_rng(0).integers(0, 123, (2, 9)).astype(np.int32)[:, :9]
    return spot_check(model, ids[:, :-1], ids[:, 1:], "x")


@pytest.mark.parametrize("base", [None, "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_spot_check_sees_every_op_of_adapters(dtype, base):
    be = cpu if dtype == "float32" else rounded()
    report = spot(be, dtype, base)
    assert report.agree, report.first
    taps = {row.tap for row in report.rows}
    assert {"grad.1.wdown.A", "grad.0.wq.B", "0.low", "1.d_low"} <= taps
    # What is frozen has no gradient, and none is judged.
    assert all(tap.endswith((".A", ".B")) for tap in taps if tap.startswith("grad."))
    made = "adapted_int8" if base else "adapted"
    assert sum(row.op == made for row in report.rows) == 2 * 2 * len(ALL)


def test_a_spot_check_names_the_factor_of_the_neighbour_row():
    def adapted_int8(out, w, row, b, a, factor):
        cpu.adapted_int8(out, w, np.roll(row, 1), b, a, factor)

    report = spot(overlay(cpu, adapted_int8=adapted_int8), "float32", "int8")
    assert (report.first.op, report.first.layer) == ("adapted_int8", 0)


def test_nothing_frozen_has_a_gradient_or_a_copy():
    cfg, config = PRESETS["qwen2-tiny"], LoraConfig(2, 4.0, ALL)
    model = Model(cfg, cpu, 2, 8, lora=config)
    large = [name for name, x in model.buffers.arrays.items() if x.size >= model.layout.matrices]
    assert large == ["w"]
    assert model.g is model.adapters.g
    assert model.d.layer[1].wqkv is model.d.embed is None


def test_a_start_is_that_of_peft():
    """kaiming_uniform with a = sqrt(5): uniform in +-1/sqrt(I); B zeros; the same for the same seed only."""
    layout = AdapterLayout(PRESETS["qwen2-3m"], LoraConfig(8, 16.0, ALL))
    flat, again, other = (np.zeros(layout.size, np.float32) for _ in range(3))
    for x, seed in ((flat, 1), (again, 1), (other, 2)):
        layout.init(x, seed)
    np.testing.assert_array_equal(flat, again)
    for s in layout.slots:
        x = flat[s.offset : s.offset + s.size]
        if s.param.init == "zeros":
            assert not x.any()
            continue
        bound = s.shape[1] ** -0.5
        assert np.abs(x).max() <= bound
        assert np.abs(x).max() > 0.99 * bound
        assert abs(x.std() - bound / 3**0.5) <= 0.05 * bound
        assert (x != other[s.offset : s.offset + s.size]).any()


@pytest.mark.parametrize("base", [None, "int8"])
def test_the_gate_of_the_base_sees_what_has_moved(base, monkeypatch):
    _, adapters, _, _ = adapted("llama-tiny", cpu, "float32", LoraConfig(4, 8.0, ("wq",), base=base))
    assert base_unchanged(adapters).passed
    for name in ("norm.weight", "layers.1.mlp.up_proj.weight", "layers.0.self_attn.q_proj.weight"):
        _, arrays = next(row for row in adapters.base_values() if row[0].hf == f"model.{name}")
        for x in arrays:
            before = x[5]
            x[5] = before + 1 if x.dtype == np.int8 else np.nextafter(before, x.dtype.type(9))
            answer = base_unchanged(adapters)
            assert answer.passed is False
            assert "changed" in answer.why
            x[5] = before
    assert base_unchanged(adapters).passed
    stale = [np.array(x) for s, x in adapters.tensors() if s.hf == "model.layers.1.self_attn.q_proj.weight"]
    adapters.w *= 1.1
    right = Adapters.effective
    monkeypatch.setattr(
        Adapters, "effective", lambda a, i, name: stale[0] if (i, name) == (1, "wq") else right(a, i, name)
    )
    answer = base_unchanged(adapters)
    assert answer.passed is False
    assert "its base plus its adapters" in answer.why


def test_a_base_of_eight_bits_is_compared_with_the_file():
    """A factor of the neighbour row, one of twice the size, integers that use a part of the range: none is the file's."""
    config = LoraConfig(2, 4.0, ("wq",), base="int8")
    model, adapters, _, _ = adapted("qwen2-tiny", cpu, "float32", config)
    host = np.zeros(model.layout.size, np.float32)
    model.layout.randomise(host, 3)
    file = SimpleNamespace(tensors=model.layout.named(host), source="file")
    assert base_loaded(adapters, file).passed
    assert "within half a step of 8 bits" in base_loaded(adapters, file).measured
    slot = model.layout.by_hf["model.layers.1.mlp.down_proj.weight"]
    row, q = adapters.row(slot), cut(model.w, slot)
    kept, integers = row.copy(), q.copy()
    for change in (np.roll(kept, 1), 2 * kept, kept * np.float32(1.02)):
        row[...] = change
        answer = base_loaded(adapters, file)
        assert answer.passed is False
        assert slot.hf in answer.measured
    row[...], q[...] = 2 * kept, np.rint(integers / 2)
    assert base_loaded(adapters, file).passed is False
    row[...], q[...] = kept, integers
    assert base_loaded(adapters, file).passed


def test_gradients_that_must_be_zero_and_those_that_must_not():
    model, adapters, opt, ids = adapted(
        "llama-tiny", cpu, "float32", LoraConfig(2, 4.0, ("wq", "wo")), b=False
    )
    scratch = cpu.empty((1,), "float64")

    def answer(change=lambda: None):
        loss(model, ids)
        model.backward()
        change()
        found = adapter_gradients(adapters, scratch, adapters.g, None)
        norm = float(np.sqrt(np.square(adapters.g, dtype=np.float64).sum()))
        return found(norm)

    first = answer()
    assert first.passed
    assert "none for 4 lora_A, whose lora_B is zero" in first.measured
    a, b = adapters.layout.pairs[0].a, adapters.layout.pairs[0].b

    def leak():
        adapters.g[a.offset] = 1e-3

    def lose():
        adapters.g[b.offset : b.offset + b.size] = 0

    assert answer(leak).passed is False
    assert answer(lose).passed is False
    loss(model, ids)
    model.backward()
    opt.step(1e-2)
    later = answer()
    assert later.passed
    assert "none for" not in later.measured


def test_targets_and_numbers_of_the_command_line():
    assert parse_targets(None) == parse_targets("all-linear") == ALL
    assert parse_targets("v,q_proj") == ("wq", "wv")
    assert lora_config(4, None, None) == LoraConfig(4, 8.0, ALL)
    assert LoraConfig(4, 8.0, ALL).scale == 2.0
    assert LoraConfig(4, 8.0, ALL, rslora=True).scale == 4.0
    assert lora_config(None, None, None) is None
    for bad in ((4, None, "norm"), (4, None, " "), (None, 8.0, None)):
        with pytest.raises(UsageError):
            lora_config(*bad)
    for outside in ({"lora_rank": 0}, {"lora_alpha": -1.0}, {"lora_alpha": 0.0}):
        with pytest.raises(UsageError):
            check_ranges(ModelSettings, outside)


@pytest.mark.parametrize("base", [None, "int8"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_plan_is_what_is_taken(dtype, base):
    config = LoraConfig(4, 8.0, ALL, base=base)
    before = reference.memory()
    model = Model(PRESETS["qwen2-tiny"], reference, 2, 16, dtype, lora=config)
    AdamW.of(model.adapters)
    taken = reference.memory() - before
    assert memory(PRESETS["qwen2-tiny"], reference, 2, 16, dtype, lora=config).total == taken


def test_moments_are_of_the_adapters_only():
    cfg, config = PRESETS["qwen2.5-0.5b"], LoraConfig(16, 32.0, ALL)
    full, low = (memory(cfg, reference, 1, 128, "float32", lora=c) for c in (None, config))
    n = AdapterLayout(cfg, config).size
    assert low.moments == 2 * 4 * n
    assert full.moments == 2 * 4 * Layout(cfg).size
    assert low.gradients == 4 * n
    assert (low.master, low.base) == (0, full.weights)
    eight = memory(cfg, reference, 1, 128, "float32", lora=dataclasses.replace(config, base="int8"))
    matrices = Layout(cfg).matrices
    assert matrices < eight.base - 4 * (Layout(cfg).size - matrices) < 1.01 * matrices
    assert (
        0.9 * low.moments / full.moments
        < AdapterLayout(cfg, config).num_parameters / Layout(cfg).num_parameters
    )


# Whole runs


@pytest.fixture(scope="module")
def run(place, cached, tmp_path_factory):
    """A finished run of adapters, with dropout."""
    with pytest.MonkeyPatch.context() as m:
        m.setenv("APR_CACHE", str(cached))
        path = tmp_path_factory.mktemp("adapters") / "run"
        assert pretrain(place, path, "--lora-rank", "4", "--lora-dropout", "0.1") == 0
    return path


def test_a_run_lowers_the_loss_and_passes_its_gates(run):
    verdict = json.loads((run / "verdict.json").read_text())
    rows = {g["id"]: g for g in verdict["gates"]}
    assert verdict["verdict"] == "PASS"
    assert rows["end.base"]["verdict"] == "PASS"
    assert rows["run.learning-rate"]["verdict"] == "PASS"
    assert "whose lora_B is zero" in rows["run.gradients"]["measured"]
    assert rows["start.reproduces"]["verdict"] == "PASS"  # with B zero it is the base
    assert [rows[f"start.{g}"]["verdict"] for g in ("ops", "slope", "dropout", "averages")] == ["PASS"] * 4
    losses = [m["val_loss"] for m in metrics(run) if "val_loss" in m]
    assert losses[-1] < losses[0]


def test_apr_verify_passes_and_replays(run, capsys):
    capsys.readouterr()
    assert main(["verify", str(run), "--replay", "4", "--seed", "1", "--json"]) == 0
    rows = {r["check"]: r for r in json.loads(capsys.readouterr().out)["checks"]}
    assert {r["verdict"] for r in rows.values()} == {"PASS"}
    assert "adapters" in rows
    assert "worst 0.0e+00" in rows["replay"]["measured"]


def test_resumed_is_bit_equal(place, run, tmp_path):
    half = tmp_path / "run"
    shutil.copytree(run, half)
    for path in [*(half / "ckpt").glob("epoch-002*"), half / "ckpt/state/step-000006.apr"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(["pretrain", "--resume", "--run-dir", str(half)]) == 0
    assert steps(half) == steps(run)
    for name in ("ckpt/epoch-002.apr", "ckpt/state/step-000006.apr"):
        a, b = weights(half / name), weights(run / name)
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
    adapter = "ckpt/epoch-002-adapter/adapter_model.safetensors"
    assert (half / adapter).read_bytes() == (run / adapter).read_bytes()


def test_a_state_of_another_base_is_refused(place, run, tmp_path, capsys):
    other = tmp_path / "run"
    shutil.copytree(run, other)
    config = json.loads((other / "config.json").read_text())
    config["settings"]["init"] = str(place / "base/ckpt/epoch-001.apr")
    config["data"]["init_sha256"] = open_any(config["settings"]["init"]).sha256
    (other / "config.json").write_text(json.dumps(config))
    assert main(["pretrain", "--resume", "--run-dir", str(other)]) == 5
    assert "resume with the --init" in capsys.readouterr().err


def test_a_state_holds_adapters_and_not_the_base(run):
    (path,) = sorted((run / "ckpt/state").glob("step-000006.apr"))
    file = read_apr(path)
    assert all("lora_" in name for name in file.tensors)
    assert file.metadata["lora"]["rank"] == 4
    assert len(file.tensors) == 3 * 2 * len(LINEAR) * PRESETS["qwen2-tiny"].num_layers


def test_base_and_adapter_are_the_checkpoint(place, run, tmp_path):
    out = tmp_path / "merged.apr"
    base = str(place / "base/ckpt/epoch-002.apr")
    assert main(["merge", base, str(run / "ckpt/epoch-002-adapter"), "-o", str(out)]) == 0
    merged, checkpoint, start = weights(out), weights(run / "ckpt/epoch-002.apr"), weights(base)
    assert merged.keys() == checkpoint.keys()
    for name, want in checkpoint.items():
        if name.endswith("proj.weight"):
            assert (want != start[name]).any()
            np.testing.assert_allclose(merged[name], want, rtol=0, atol=4e-7)
        else:
            np.testing.assert_array_equal(want, start[name])
            np.testing.assert_array_equal(merged[name], want)
    assert open_any(str(out)).tokenizer_json == open_any(base).tokenizer_json


def test_an_adapter_goes_on(place, run, tmp_path):
    adapter = run / "ckpt/epoch-002-adapter"
    out = tmp_path / "more"
    assert json.loads((adapter / "adapter_config.json").read_text())["lora_dropout"] == 0.1
    more = ["--lora-dropout", "0.2", "--bounds", "pretrained_share=2"]
    assert pretrain(place, out, "--lora-init", adapter, *more) == 0
    assert json.loads((out / "config.json").read_text())["data"]["lora"]["dropout"] == 0.2
    losses = [m["val_loss"] for m in metrics(out) if "val_loss" in m]
    end = [m["val_loss"] for m in metrics(run) if "val_loss" in m][-1]
    assert abs(losses[0] - end) <= 1e-6
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("what", ["B is zero", "alpha is twice the rank"])
def test_an_adapter_that_goes_on_otherwise_is_refused(place, run, tmp_path, monkeypatch, capsys, what):
    if what == "B is zero":
        right = loop.adapter_start

        def start(layout, adapter):
            flat = right(layout, adapter)
            for _, b in layout.views(flat):
                b[...] = 0
            return flat

        monkeypatch.setattr(loop, "adapter_start", start)
    else:
        right = LoadedAdapter.lora_config

        def config(self, *a, **k):
            found = right(self, *a, **k)
            return dataclasses.replace(found, alpha=3.0 * found.alpha)

        monkeypatch.setattr(LoadedAdapter, "lora_config", config)
    adapter, more = run / "ckpt/epoch-002-adapter", ["--bounds", "pretrained_share=2"]
    assert pretrain(place, tmp_path / "more", "--lora-init", adapter, *more) == 5
    (gate,) = (
        g for g in json.loads((tmp_path / "more/verdict.json").read_text())["gates"] if g["verdict"] == "FAIL"
    )
    assert gate["id"] == "before.weights"
    assert ("is not that of" if what == "B is zero" else "the scale of") in gate["why"]


FAULTS = {
    "a_frozen_matrix_moves": ("end.base", 9),
    "merged_weights_are_stale": ("end.base", 9),
    "factor_of_the_neighbour_row": ("before.weights", 5),
    "a_gradient_is_lost": ("start.slope", 6),
    "adapters_move_otherwise": ("run.learning-rate", 6),
    "a_target_gets_none": ("before.settings", 5),
    "a_layer_gets_none": ("before.settings", 5),
    "another_scale_is_saved": ("end.reload", 9),
    "adapters_are_saved_in_bfloat16": ("end.reload", 9),
    "steps_drop_nothing": ("start.dropout", 6),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_turn_their_gate_red(place, tmp_path, monkeypatch, fault):
    right, steps, more = AdamW.step, steps_begun(monkeypatch), []
    effective, add, load = Adapters.effective, Adapters.add_gradients, Adapters.set_base
    if fault == "a_frozen_matrix_moves":

        def moving(self, layer, name):
            if steps and steps[-1] > 2 and layer == 1:
                self.model.p.layer[1].wup[0, 0] += np.float32(1e-3)
            return effective(self, layer, name)

        monkeypatch.setattr(Adapters, "effective", moving)
    elif fault == "merged_weights_are_stale":
        kept = {}

        def stale(self, layer, name):
            # From the fourth step on: before it, start.slope would see them.
            if (layer, name) not in kept and steps and steps[-1] >= 3:
                kept[layer, name] = np.array(effective(self, layer, name))
            return kept.get((layer, name)) if (layer, name) in kept else effective(self, layer, name)

        monkeypatch.setattr(Adapters, "effective", stale)
    elif fault in ("a_target_gets_none", "a_layer_gets_none"):
        right_init = AdapterLayout.__init__
        lost = "v_proj" if fault == "a_target_gets_none" else ".layers.1."

        def init(self, *a):
            right_init(self, *a)
            self.pairs = [p for p in self.pairs if lost not in p.base.hf]
            self.slots = [s for p in self.pairs for s in (p.a, p.b)]

        monkeypatch.setattr(AdapterLayout, "__init__", init)
    elif fault == "another_scale_is_saved":
        right_config = peft.adapter_config
        monkeypatch.setattr(
            peft, "adapter_config", lambda c, *a: {**right_config(c, *a), "lora_alpha": c.rank}
        )
    elif fault == "adapters_are_saved_in_bfloat16":
        right_write = peft.write_safetensors
        monkeypatch.setattr(peft, "write_safetensors", lambda path, x, _: right_write(path, x, "bfloat16"))
    elif fault == "factor_of_the_neighbour_row":
        more = ["--lora-base", "int8"]

        def shifted(self, read):
            load(self, read)
            self.model.p.layer[1].wo_row[...] = np.roll(self.model.p.layer[1].wo_row, 1)
            self.base_sha256 = self.base_hash()

        monkeypatch.setattr(Adapters, "set_base", shifted)
    elif fault == "steps_drop_nothing":
        more = ["--lora-dropout", "0.1"]
        monkeypatch.setattr(loop, "Draws", SimpleNamespace(of=lambda *a: None))
    elif fault == "a_gradient_is_lost":
        monkeypatch.setattr(
            Adapters,
            "add_gradients",
            lambda a, i, name, *x: None if (i, name) == (1, "wo") else add(a, i, name, *x),
        )
    else:
        # The golden steps of the family have an optimizer of their own, whose vectors are more than padding.
        monkeypatch.setattr(
            AdamW,
            "step",
            lambda o, lr, **k: right(o, (1.1 if o.w.size - o.decayed == ALIGN else 1) * lr, **k),
        )
    gate, code = FAULTS[fault]
    out = tmp_path / "run"
    assert pretrain(place, out, "--lora-rank", "4", "--spot-check", "-1", *more) == code
    rows = {g["id"]: g["verdict"] for g in json.loads((out / "verdict.json").read_text())["gates"]}
    assert rows[gate] == "FAIL"
    assert set(rows) == set(GATES)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--lora-alpha", "8"], "--lora-rank"),
        (["--lora-base", "int8"], "--lora-rank"),
        (["--lora-rank", "0"], "at least 1"),
        (["--lora-rank", "4", "--lora-targets", "norm"], "--lora-targets norm"),
        (["--lora-rank", "4", "--lora-init", "x"], "--lora-init"),
        (["--lora-init", "nowhere"], "adapter_config.json"),
    ],
)
def test_what_makes_no_sense_is_one_line(place, tmp_path, capsys, more, said):
    assert pretrain(place, tmp_path / "run", *more) in (2, 3)
    assert said in capsys.readouterr().err


def test_random_weights_get_no_adapters(place, tmp_path, capsys):
    args = ["--corpus", str(place / "corpus"), "--model", str(place / "config.json"), "--lora-rank", "4"]
    assert main(["pretrain", *args, "--run-dir", str(tmp_path / "run")]) == 2
    assert "--init" in capsys.readouterr().err


def test_in_bfloat16_the_merged_weights_are_rounded_once():
    """Plain NumPy that stores bfloat16: adapters and their sums stay float32."""
    config = LoraConfig(4, 8.0, ALL)
    model, adapters, opt, ids = adapted("qwen2-tiny", rounded(), "bfloat16", config)
    _, exact, _, _ = adapted("qwen2-tiny", reference, "float64", config)
    assert adapters.w.dtype == adapters.g.dtype == opt.state["m"].dtype == np.float32
    for p, (a, b) in zip(adapters.layout.pairs, adapters.layout.views(adapters.w), strict=True):
        base = cut(model.w, p.base)
        want = base.astype(np.float64) + config.scale * (b.astype(np.float64) @ a.astype(np.float64))
        got = adapters.effective(p.base.layer, p.base.param.name)
        assert got.dtype == base.dtype == "bfloat16"
        nearest = want.astype(np.float32).astype(got.dtype)
        assert (got != nearest).mean() < 0.002  # where the sum in float32 lies beside a tie
    assert merge_error(adapters)[0] <= 1
    loss(model, ids)
    model.backward()
    loss(exact.model, ids)
    exact.model.backward()
    got, want = adapters.g.astype(np.float64), exact.g
    assert np.linalg.norm(got - want) <= 0.03 * np.linalg.norm(want)
    base = adapters.base_hash()
    opt.step(1e-2)
    assert adapters.base_hash() == base == adapters.base_sha256
    assert base_unchanged(adapters).passed


def test_adapters_have_a_learning_rate_of_their_own():
    settings = Settings(corpus="x", init="y", num_steps=100)
    assert resolve(settings).lr == 5e-5
    assert resolve(dataclasses.replace(settings, lora_rank=4)).lr == 2e-4
    assert resolve(dataclasses.replace(settings, lora_init="z")).lr == 2e-4
    assert resolve(dataclasses.replace(settings, lora_rank=4, lr=1e-3)).lr == 1e-3


def test_apr_plan_counts_adapters(capsys):
    args = [
        "plan",
        "--model",
        "qwen2-tiny",
        "--seq-length",
        "16",
        "--batch-size",
        "2",
        "--device",
        "cpu",
        "--json",
    ]
    found = []
    for more in ([], ["--lora-rank", "4", "--lora-targets", "q,v"]):
        capsys.readouterr()
        assert main([*args, *more]) == 0
        found.append(json.loads(capsys.readouterr().out))
    full, low = found
    assert (
        low["trained_parameters"]
        == AdapterLayout(PRESETS["qwen2-tiny"], LoraConfig(4, 8.0, ("wq", "wv"))).num_parameters
    )
    assert low["bytes"]["moments"] < full["bytes"]["moments"]
    assert low["bytes"]["base"] == full["bytes"]["weights"]
    assert low["bytes"]["gradients"] < full["bytes"]["gradients"]
    assert 4 / 6 < low["flops_per_token"] / full["flops_per_token"] < 0.8
    assert main([*args, "--lora-rank", "4", "--lora-base", "int8"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"]["base"] < low["bytes"]["base"]
    assert main([*args, "--no-train", "--lora-rank", "4"]) == 2
