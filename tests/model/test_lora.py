"""Adapters: their gradients against finite differences, their steps against a model that adds them itself, and whole runs."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from apr import backends
from apr.backends import reference
from apr.bisect import rule
from apr.checkpoints import peft
from apr.checkpoints.apr2 import read_apr
from apr.checkpoints.registry import open_any
from apr.cli.main import main
from apr.common.errors import UsageError
from apr.common.options import check_ranges
from apr.evidence.adapters import adapter_gradients, base_unchanged, merge_error
from apr.evidence.gates import GATES
from apr.model.cost import memory
from apr.model.hf_config import to_hf
from apr.model.lora import LINEAR, AdapterLayout, Adapters, LoraConfig, lora_config, parse_targets
from apr.model.optim import AdamW
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.model.settings import ModelSettings
from apr.model.transformer import Model
from apr.training.settings import Settings, resolve
from precision import rounded

cpu = backends.get("cpu")
FAMILIES = ["llama-tiny", "mistral-tiny", "olmo2-tiny", "qwen2-tiny", "qwen3-tiny", "smollm3-tiny"]
ALL = tuple(LINEAR)


def adapted(preset, be, dtype, config, seed=3, b=True):
    """A model with noise on every weight, adapters with noise on A and B, ids and targets."""
    cfg = PRESETS[preset]
    model = Model(cfg, be, 2, 8, dtype)
    host = np.zeros(model.layout.size, dtype if dtype == "float64" else "float32")
    model.layout.randomise(host, seed)
    adapters = Adapters(model, config)
    adapters.set_base(host)
    rng = np.random.default_rng(seed)
    start = np.zeros(adapters.layout.size, host.dtype)
    adapters.layout.init(start, seed)
    for s in adapters.layout.slots:
        if s.param.init == "zeros" and b:
            start[s.offset : s.offset + s.size] = 0.1 * rng.standard_normal(s.size)
    opt = AdamW.of(adapters, after_update=adapters.merge, grad_clip=0.0)
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
    adapters.collect_gradients()
    rng, step = np.random.default_rng(0), 1e-5
    for s in adapters.layout.slots:
        place = slice(s.offset, s.offset + s.size)
        direction = rng.standard_normal(s.size)
        direction /= np.linalg.norm(direction)
        start, ends = adapters.w[place].copy(), []
        for sign in (+1, -1):
            adapters.w[place] = start + sign * step * direction
            adapters.merge()
            ends.append(loss(model, ids))
            model.be.fill(model.g, 0)
        adapters.w[place] = start
        yield s.hf, float(adapters.g[place] @ direction), (ends[0] - ends[1]) / (2 * step)


def off(rows):
    return [name for name, got, slope in rows if not abs(got - slope) <= 1e-6 * max(abs(slope), 1e-3)]


@pytest.mark.parametrize("preset", FAMILIES)
@pytest.mark.parametrize("rslora", [False, True])
def test_gradients_are_the_slopes_of_the_loss(preset, rslora):
    assert off(slopes(preset, LoraConfig(3, 5.0, ALL, rslora))) == []


def test_a_gradient_without_its_scale_is_seen(monkeypatch):
    right = Adapters.collect_gradients

    def unscaled(self):
        right(self)
        for _, db in self.layout.views(self.g):
            db /= self.config.scale

    monkeypatch.setattr(Adapters, "collect_gradients", unscaled)
    found = off(slopes("llama-tiny", LoraConfig(2, 6.0, ("wq",))))
    assert len(found) == PRESETS["llama-tiny"].num_layers
    assert all("lora_B" in name for name in found)


def test_a_merge_that_is_wrong_in_a_middle_layer_is_seen():
    cfg = dataclasses.replace(PRESETS["llama-tiny"], num_layers=3)
    model = Model(cfg, cpu, 1, 8)
    adapters = Adapters(model, LoraConfig(2, 4.0, ALL))
    host = np.zeros(model.layout.size, np.float32)
    model.layout.init(host, 1)
    adapters.set_base(host)
    adapters.merge()
    assert merge_error(adapters)[0] <= 1
    name = "model.layers.1.mlp.down_proj.weight"
    model.layout.named(model.w)[name][0, 0] += 1e-3
    worst, where = merge_error(adapters)
    assert (worst > 1, where) == (True, name)


@pytest.mark.parametrize("preset", FAMILIES)
def test_merged_weights_and_gradients_on_the_cpu_are_those_of_the_formula(preset):
    config = LoraConfig(4, 8.0, ALL)
    model, adapters, _, ids = adapted(preset, cpu, "float32", config)
    exact, reference_, _, _ = adapted(preset, reference, "float64", config)
    for m, a in ((model, adapters), (exact, reference_)):
        loss(m, ids)
        m.backward()
        a.collect_gradients()
    assert merge_error(adapters)[0] <= 1
    assert merge_error(reference_)[0] <= 1
    for s in adapters.layout.slots:
        place = slice(s.offset, s.offset + s.size)
        got, want = adapters.g[place].astype(np.float64), reference_.g[place]
        assert np.abs(got - want).max() <= 2e-4 * np.abs(want).max(), s.hf


@pytest.mark.parametrize("rank", [1, 5, 16])
@pytest.mark.parametrize("preset", FAMILIES)
def test_products_are_as_exact_as_those_of_plain_numpy(preset, rank):
    """W + s B A, s B^T dW and s dW A^T of the same float32 inputs, against float64, by the rule of the tolerances."""
    config = LoraConfig(rank, 3.0 * rank, ALL, rslora=True)
    model, adapters, _, _ = adapted(preset, cpu, "float32", config)
    rng = np.random.default_rng(rank)
    gradient = rng.standard_normal(model.g.size, np.float32)
    model.g[...] = gradient
    adapters.collect_gradients()
    assert not model.g.any()

    def formulas(dtype, base, a, b, d):
        base, a, b, d = (x.astype(dtype) for x in (base, a, b, d))
        s = dtype(config.scale)
        return base + s * (b @ a), s * (b.T @ d), s * (d @ a.T)

    views = zip(adapters.layout.views(adapters.w), adapters.layout.views(adapters.g), strict=True)
    for p, base, ((a, b), gradients) in zip(adapters.layout.pairs, adapters.base, views, strict=True):
        place = slice(p.base.offset, p.base.offset + p.base.size)
        inputs = base, a, b, gradient[place].reshape(p.base.shape)
        got = model.w[place].reshape(p.base.shape), *gradients
        for x, plain, exact, factor in zip(
            got, formulas(np.float32, *inputs), formulas(np.float64, *inputs), (2, 3, 3), strict=True
        ):
            largest = float(np.abs(exact).max())
            tolerance = rule.tolerance(
                float(np.abs(plain - exact).max()), largest, rule.EPS["float32"], factor
            )
            assert np.abs(x - exact).max() <= tolerance, p.base.hf


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
        adapters.collect_gradients()
        g = adapters.g.copy()
        g *= min(1.0, 1.0 / (np.sqrt((g * g).sum()) + 1e-6))
        opt.step(1e-2)
        m += (1 - opt.beta1) * (g - m)
        v += (1 - opt.beta2) * (g * g - v)
        mhat, vhat = m / (1 - opt.beta1**step), v / (1 - opt.beta2**step)
        w -= 1e-2 * (mhat / (np.sqrt(vhat) + opt.eps) + opt.weight_decay * w)
        w[adapters.layout.decayed :] = 0
        np.testing.assert_allclose(adapters.w, w, rtol=1e-10, atol=1e-13)
        assert not model.g.any()
        assert not adapters.g.any()
    touched = np.zeros(model.layout.size, bool)
    for p in adapters.layout.pairs:
        touched[p.base.offset : p.base.offset + p.base.size] = True
    np.testing.assert_array_equal(model.w[~touched], base[~touched])
    assert (model.w[touched] != base[touched]).mean() > 0.99
    assert base_unchanged(adapters).passed


def test_nothing_adds_up_over_merges():
    model, adapters, _, _ = adapted("llama-tiny", cpu, "float32", LoraConfig(4, 8.0, ALL))
    once = np.array(model.w)
    for _ in range(50):
        adapters.merge()
    np.testing.assert_array_equal(model.w, once)


def test_with_b_zero_the_model_is_the_base_bit_for_bit():
    model, adapters, _, _ = adapted("qwen3-tiny", cpu, "float32", LoraConfig(4, 8.0, ALL), b=False)
    host = np.zeros(model.layout.size, np.float32)
    model.layout.randomise(host, 3)
    np.testing.assert_array_equal(model.w, host)
    assert adapters.base_hash() == adapters.base_sha256


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


def test_the_gate_of_the_base_sees_a_changed_weight_and_a_wrong_merge():
    model, adapters, _, _ = adapted("llama-tiny", cpu, "float32", LoraConfig(4, 8.0, ("wq",)))
    assert base_unchanged(adapters).passed
    slot = model.layout.by_hf["model.norm.weight"]
    model.w[slot.offset] += 1e-3  # a weight that has no adapter
    assert not base_unchanged(adapters).passed
    model.w[slot.offset] -= 1e-3
    before = adapters.base[0][0, 0]
    adapters.base[0][0, 0] = np.nextafter(before, 9)  # a matrix under an adapter, by one bit
    answer = base_unchanged(adapters)
    assert answer.passed is False
    assert "changed" in answer.why
    adapters.base[0][0, 0] = before
    slot = adapters.layout.pairs[0].base
    model.w[slot.offset] += 1e-3  # what is computed with, alone
    answer = base_unchanged(adapters)
    assert answer.passed is False
    assert "its base plus its adapters" in answer.why


def test_gradients_that_must_be_zero_and_those_that_must_not():
    model, adapters, opt, ids = adapted(
        "llama-tiny", cpu, "float32", LoraConfig(2, 4.0, ("wq", "wo")), b=False
    )
    scratch = cpu.empty((1,), "float64")

    def answer(change=lambda: None):
        loss(model, ids)
        model.backward()
        adapters.collect_gradients()
        change()
        found = adapter_gradients(adapters, scratch)
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
    adapters.collect_gradients()
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
    for bad in ((4, None, "embed"), (4, None, " "), (None, 8.0, None)):
        with pytest.raises(UsageError):
            lora_config(*bad)
    for outside in ({"lora_rank": 0}, {"lora_alpha": -1.0}, {"lora_alpha": 0.0}):
        with pytest.raises(UsageError):
            check_ranges(ModelSettings, outside)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_plan_is_what_is_taken(dtype):
    config = LoraConfig(4, 8.0, ALL)
    before = reference.memory()
    model = Model(PRESETS["qwen2-tiny"], reference, 2, 16, dtype)
    AdamW.of(Adapters(model, config))
    taken = reference.memory() - before
    assert memory(PRESETS["qwen2-tiny"], reference, 2, 16, dtype, lora=config).total == taken


def test_moments_are_of_the_adapters_only():
    cfg, config = PRESETS["qwen2.5-0.5b"], LoraConfig(16, 32.0, ALL)
    full, low = (memory(cfg, reference, 1, 128, "float32", lora=c) for c in (None, config))
    n = AdapterLayout(cfg, config).size
    assert low.moments == 2 * 4 * n
    assert full.moments == 2 * 4 * Layout(cfg).size
    assert low.gradients >= full.gradients  # those of all weights are needed
    assert (
        0.9 * low.moments / full.moments
        < AdapterLayout(cfg, config).num_parameters / Layout(cfg).num_parameters
    )


# Whole runs

RECIPE = [
    "--lr", "1e-2", "--warmup-steps", "2", "--num-steps", "6", "--steps-per-epoch", "3", "--batch-size", "4",
    "--micro-batch-size", "2", "--seq-length", "16", "--val-batches", "4", "--val-fraction", "0.3", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A folder for tokenised corpora."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def place(tmp_path_factory, cached):
    """A corpus of real Python, and a checkpoint of a small Qwen2 with a tokenizer, trained for a few steps."""
    folder = tmp_path_factory.mktemp("lora")
    (folder / "corpus").mkdir()
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for source in sorted((stdlib / "json").glob("*.py")) + sorted((stdlib / "email").glob("*.py")):
        shutil.copy(source, folder / "corpus" / source.name)
    cfg = dataclasses.replace(PRESETS["qwen2-tiny"], vocab_size=400)
    (folder / "config.json").write_text(json.dumps(to_hf(cfg)))
    with pytest.MonkeyPatch.context() as m:
        m.setenv("APR_CACHE", str(cached))
        args = [
            "--corpus",
            str(folder / "corpus"),
            "--model",
            str(folder / "config.json"),
            *RECIPE,
            "--spot-check",
            "-1",
        ]
        assert main(["pretrain", *args, "--run-dir", str(folder / "base")]) == 0
    return folder


@pytest.fixture(autouse=True)
def cache(cached, monkeypatch):
    monkeypatch.setenv("APR_CACHE", str(cached))


def pretrain(place, run_dir, *more, init="base/ckpt/epoch-002.apr"):
    args = ["--corpus", str(place / "corpus"), "--init", str(place / init), "--run-dir", str(run_dir)]
    return main(["pretrain", *args, *RECIPE, *map(str, more)])


@pytest.fixture(scope="module")
def run(place, cached, tmp_path_factory):
    """A finished run of adapters."""
    with pytest.MonkeyPatch.context() as m:
        m.setenv("APR_CACHE", str(cached))
        path = tmp_path_factory.mktemp("adapters") / "run"
        assert pretrain(place, path, "--lora-rank", "4") == 0
    return path


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps(run):
    keys = ("step", "train_loss", "grad_norm", "weight_norm", "lr", "tokens_seen")
    return [tuple(m[k] for k in keys) for m in metrics(run) if "train_loss" in m]


def weights(path):
    return {name: np.asarray(x) for name, x in read_apr(path).tensors.items()}


def test_a_run_lowers_the_loss_and_passes_its_gates(run):
    verdict = json.loads((run / "verdict.json").read_text())
    rows = {g["id"]: g for g in verdict["gates"]}
    assert verdict["verdict"] == "PASS"
    assert rows["end.base"]["verdict"] == "PASS"
    assert rows["run.learning-rate"]["verdict"] == "PASS"
    assert "whose lora_B is zero" in rows["run.gradients"]["measured"]
    assert rows["start.reproduces"]["verdict"] == "PASS"  # with B zero it is the base
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
    assert pretrain(place, out, "--lora-init", adapter, "--bounds", "pretrained_share=2") == 0
    losses = [m["val_loss"] for m in metrics(out) if "val_loss" in m]
    end = [m["val_loss"] for m in metrics(run) if "val_loss" in m][-1]
    assert abs(losses[0] - end) <= 1e-6
    assert losses[-1] < losses[0]


FAULTS = {
    "base_drifts": ("end.base", 9),
    "adapters_are_not_merged": ("end.base", 9),
    "adapters_move_otherwise": ("run.learning-rate", 6),
    "a_target_gets_none": ("before.settings", 5),
    "a_layer_gets_none": ("before.settings", 5),
    "another_scale_is_saved": ("end.reload", 9),
    "adapters_are_saved_in_bfloat16": ("end.reload", 9),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_turn_their_gate_red(place, tmp_path, monkeypatch, fault):
    right_step, right_merge, steps = AdamW.step, Adapters.merge, []

    def is_of_adapters(opt):
        return isinstance(getattr(opt.after_update, "__self__", None), Adapters)

    if fault == "base_drifts":

        def drift(self):
            if any(b.any() for _, b in self.layout.views(self.w)):  # from the first step on
                self.base[0][0, 0] += np.float32(1e-3)
            right_merge(self)

        monkeypatch.setattr(Adapters, "merge", drift)
    elif fault == "adapters_are_not_merged":

        def step(self, lr):
            steps.extend([lr] * is_of_adapters(self))
            right_step(self, lr)

        # From the first step on: moved before it, start.slope would see them.
        monkeypatch.setattr(Adapters, "merge", lambda self: None if steps else right_merge(self))
        monkeypatch.setattr(AdamW, "step", step)
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
        monkeypatch.setattr(peft, "adapter_config", lambda c, b: {**right_config(c, b), "lora_alpha": c.rank})
    elif fault == "adapters_are_saved_in_bfloat16":
        right_write = peft.write_safetensors
        monkeypatch.setattr(peft, "write_safetensors", lambda path, x, _: right_write(path, x, "bfloat16"))
    else:
        monkeypatch.setattr(
            AdamW, "step", lambda self, lr: right_step(self, (1 + 0.1 * is_of_adapters(self)) * lr)
        )
    gate, code = FAULTS[fault]
    out = tmp_path / "run"
    assert pretrain(place, out, "--lora-rank", "4", "--spot-check", "-1") == code
    rows = {g["id"]: g["verdict"] for g in json.loads((out / "verdict.json").read_text())["gates"]}
    assert rows[gate] == "FAIL"
    assert set(rows) == set(GATES)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--lora-alpha", "8"], "--lora-rank"),
        (["--lora-rank", "0"], "at least 1"),
        (["--lora-rank", "4", "--lora-targets", "head"], "--lora-targets head"),
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
    assert adapters.base[0].dtype == model.w.dtype
    for p, base, (a, b) in zip(
        adapters.layout.pairs, adapters.base, adapters.layout.views(adapters.w), strict=True
    ):
        want = base.astype(np.float64) + config.scale * (b.astype(np.float64) @ a.astype(np.float64))
        got = model.w[p.base.offset : p.base.offset + p.base.size].reshape(p.base.shape)
        nearest = want.astype(np.float32).astype(got.dtype)
        assert (got != nearest).mean() < 0.002  # where the sum in float32 lies beside a tie
    assert merge_error(adapters)[0] <= 1
    loss(model, ids)
    model.backward()
    adapters.collect_gradients()
    loss(exact.model, ids)
    exact.model.backward()
    exact.collect_gradients()
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
    assert low["bytes"]["base"] > full["bytes"]["base"] == 0
    assert main([*args, "--no-train", "--lora-rank", "4"]) == 2
