"""Adapters of embedding and head, and modules trained whole: slopes, lockstep, and runs that are verified, resumed, merged."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

from apr import backends
from apr.backends import reference
from apr.bisect.spot import spot_check
from apr.checkpoints import peft_write
from apr.checkpoints.peft import read_adapter
from apr.cli.main import main
from apr.common.errors import UsageError
from apr.evidence.adapters import merge_error
from apr.model.adapters import Adapters
from apr.model.dora import Dora
from apr.model.lora import AdapterLayout, LoraConfig, cut, lora_of_json, lora_to_json
from apr.model.lora_settings import check_rank, lora_config
from apr.model.optim import AdamW, Optimizer
from apr.model.presets import PRESETS
from apr.model.transformer import Model
from lora_runs import cache, cached, metrics, place, pretrain, steps, steps_begun, weights  # noqa: F401
from precision import rounded

cpu = backends.get("cpu")
CONFIGS = {
    "factors": LoraConfig(3, 5.0, ("wq", "embed", "head")),
    "head": LoraConfig(3, 5.0, ("head",)),
    "whole": LoraConfig(3, 5.0, ("wq",), saved=("embed_tokens", "lm_head", "norm")),
    "vectors": LoraConfig(3, 5.0, ("wdown",), saved=("lm_head", "input_layernorm", "q_norm")),
    "dora": LoraConfig(3, 5.0, ("wk", "wv", "wup", "wdown"), saved=("k_norm",), dora=True),
}


def adapted(be, dtype, config, is_tied, **options):
    """A model of which all that is trained is noise, ids of two sequences."""
    cfg = dataclasses.replace(PRESETS["qwen3-tiny"], tie_word_embeddings=is_tied)
    check_rank(cfg, config)
    model = Model(cfg, be, 2, 8, dtype, lora=config, loss_rows=5, **options)
    host = np.zeros(model.layout.size, dtype if dtype == "float64" else "float32")
    model.layout.randomise(host, 3)
    read = model.layout.named(host).__getitem__
    model.adapters.set_base(read)
    layout, rng = model.adapters.layout, np.random.default_rng(3)
    start = np.zeros(layout.size, host.dtype)
    layout.init(start, 3, read)
    for s in layout.slots:
        if s.param.init == "zeros":
            cut(start, s)[...] = 0.1 * rng.standard_normal(s.shape)
        elif s.param.init == "norms":
            cut(start, s)[...] *= 1 + 0.1 * rng.standard_normal(s.shape)
    AdamW.of(model.adapters).set_weights(start)
    return model, rng.integers(0, cfg.vocab_size, (2, 9)).astype(np.int32)


def loss(model, ids, scale=None):
    model.be.fill(model.total, 0)
    model.forward(ids[:, :-1])
    model.loss(ids[:, 1:], scale=scale)
    return float(model.be.to_host(model.total)[0]) / 16


def off(config, is_tied):
    """Names of what is trained whose gradient is not the slope of the loss, and the gradients."""
    model, ids = adapted(reference, "float64", config, is_tied)
    loss(model, ids, 1 / 16)
    model.backward()
    w, found, rng = model.adapters.w, [], np.random.default_rng(0)
    if model.adapters.dora:
        model.adapters.dora.holds = True
    for s in model.adapters.layout.slots:
        place = slice(s.offset, s.offset + s.size)
        direction, start, ends = rng.standard_normal(s.size), w[place].copy(), []
        direction /= np.linalg.norm(direction)
        for sign in (+1, -1):
            w[place] = start + sign * 1e-5 * direction
            ends.append(loss(model, ids))
        w[place] = start
        slope = (ends[0] - ends[1]) / 2e-5
        if not abs(float(model.adapters.g[place] @ direction) - slope) <= 1e-6 * max(abs(slope), 1e-3):
            found.append(s.hf)
    return found, model.adapters.g


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_the_slopes_of_the_loss_on_every_backend(name, is_tied):
    config = CONFIGS[name]
    wrong, want = off(config, is_tied)
    assert wrong == []
    model, ids = adapted(cpu, "float32", config, is_tied, folds=True)
    model.micro_step(ids[:, :-1], ids[:, 1:], 1 / 16, begins=True)
    assert merge_error(model.adapters)[0] <= 1
    for s in model.adapters.layout.slots:
        assert np.abs(cut(model.adapters.g, s) - cut(want, s)).max() <= 1e-5 * np.abs(cut(want, s)).max(), (
            s.hf
        )
    assert lora_of_json(json.loads(json.dumps(lora_to_json(config)))) == config


@pytest.mark.parametrize("lost", ["add_embedding_gradients", "add_head_gradients"])
def test_a_gradient_that_is_lost_is_seen(lost, monkeypatch):
    monkeypatch.setattr(Adapters, lost, lambda *a: None)
    assert any("embed_tokens" in name for name in off(CONFIGS["factors"], True)[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "is_tied"),
    [("factors", True), ("factors", False), ("whole", True), ("vectors", False), ("dora", True)],
)
def test_a_spot_check_sees_every_op(name, is_tied, dtype):
    model, ids = adapted(cpu if dtype == "float32" else rounded(), dtype, CONFIGS[name], is_tied)
    report = spot_check(model, ids[:, :-1], ids[:, 1:], "x")
    assert report.agree, report.first
    taps = {row.tap for row in report.rows}
    head = "embed" if is_tied else "head"
    own = {"factors": {f"grad.{head}.B", "grad.embed.A"}, "dora": {"grad.1.wdown.M", "grad.0.wk.B"}}
    assert own.get(name, {f"grad.{head}"}) <= taps


def test_names_that_mean_nothing_are_refused():
    cfg = PRESETS["qwen2-tiny"]
    for options, said in (
        (dict(saved="score"), "'score' matches no module"),
        (dict(saved="q_proj"), "a linear map"),
        (dict(saved=" "), "empty"),
        (dict(saved="lm_head", targets="q,embed"), "train it whole or adapt it"),
        (dict(embeddings=True, targets="lm_head"), "train it whole or adapt it"),
        (dict(dora=True, base="int8"), "--lora-base int8"),
        (dict(dora=True, targets="q,embed"), "not of embed_tokens"),
    ):
        targets = options.pop("targets", None)
        with pytest.raises(UsageError, match=said):
            check_rank(cfg, lora_config(2, None, targets, **options))
    with pytest.raises(UsageError, match="lora-rank too"):
        lora_config(None, None, None, embeddings=True)


RUN = (
    "--lora-rank",
    "4",
    "--lora-targets",
    "q,v",
    "--train-embeddings",
    "--lora-modules-to-save",
    "norm",
    "--lora-plus",
    "4",
)


@pytest.fixture(scope="module")
def run(place, cached, tmp_path_factory):
    """A finished run that trains embedding and norms whole beside adapters."""
    with pytest.MonkeyPatch.context() as m:
        m.setenv("APR_CACHE", str(cached))
        path = tmp_path_factory.mktemp("whole") / "run"
        assert pretrain(place, path, *RUN) == 0
    return path


def test_a_run_is_verified_and_what_it_saved_is_its_checkpoint(place, run, tmp_path, capsys):
    verdict = json.loads((run / "verdict.json").read_text())
    assert verdict["verdict"] == "PASS"
    rates = [(m["lr"], m["lr_b"]) for m in metrics(run) if "train_loss" in m]
    assert rates
    assert all(b == 4 * a for a, b in rates)
    assert main(["verify", str(run), "--replay", "2", "--json"]) == 0
    rows = {r["check"]: r["verdict"] for r in json.loads(capsys.readouterr().out)["checks"]}
    assert set(rows.values()) == {"PASS"}
    assert "adapters" in rows
    base, out = str(place / "base/ckpt/epoch-002.apr"), tmp_path / "m.apr"
    assert main(["merge", base, str(run / "ckpt/epoch-002-adapter"), "-o", str(out)]) == 0
    merged, checkpoint, start = weights(out), weights(run / "ckpt/epoch-002.apr"), weights(base)
    for name, want in checkpoint.items():
        np.testing.assert_allclose(merged[name], want, rtol=0, atol=4e-7)
        is_trained = name.endswith(("q_proj.weight", "v_proj.weight", "norm.weight", "embed_tokens.weight"))
        assert (want != start[name]).any() == is_trained, name


def test_resumed_is_bit_equal(run, tmp_path):
    half = tmp_path / "run"
    shutil.copytree(run, half)
    for path in [*(half / "ckpt").glob("epoch-002*"), half / "ckpt/state/step-000006.apr"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(["pretrain", "--resume", "--run-dir", str(half)]) == 0
    assert steps(half) == steps(run)
    adapter = "ckpt/epoch-002-adapter/adapter_model.safetensors"
    assert (half / adapter).read_bytes() == (run / adapter).read_bytes()


def test_an_adapter_goes_on(place, run, tmp_path):
    out = tmp_path / "more"
    more = (
        "--lora-init",
        run / "ckpt/epoch-002-adapter",
        "--bounds",
        "pretrained_share=2",
        "--num-steps",
        "2",
    )
    assert pretrain(place, out, *more, "--spot-check", "-1") == 0
    end = [m["val_loss"] for m in metrics(run) if "val_loss" in m][-1]
    assert abs(next(m["val_loss"] for m in metrics(out) if "val_loss" in m) - end) <= 1e-6


FAULTS = {
    "B by the rate of A": ("run.learning-rate", 6),
    "forgotten in the file": ("end.reload", 9),
    "stale": ("end.base", 9),
    "frozen": ("start.slope", 6),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_turn_their_gate_red(place, tmp_path, monkeypatch, fault):
    more, begin, taken = [*RUN], Adapters.begin_forward, steps_begun(monkeypatch)
    if fault == "forgotten in the file":
        more[3] = "q,embed"
        more.remove("--train-embeddings")
        right = peft_write.adapter_tensors
        monkeypatch.setattr(
            peft_write,
            "adapter_tensors",
            lambda *a: {k: x * ("embedding_A" not in k) for k, x in right(*a).items()},
        )
    elif fault == "B by the rate of A":
        monkeypatch.setattr(Optimizer, "_pieces", lambda self, part: [(part, 1.0)])
    elif fault == "stale":

        def stale(self):
            # From the fourth step on: before it, start.slope would see it.
            if not taken or taken[-1] < 3:
                begin(self)

        monkeypatch.setattr(Adapters, "begin_forward", stale)
    else:
        right_gradients = Adapters.gradients

        def gradients(self):
            out = right_gradients(self)
            out.layer[1].attn_norm = None
            return out

        monkeypatch.setattr(Adapters, "gradients", gradients)
    gate, code = FAULTS[fault]
    out = tmp_path / "run"
    assert pretrain(place, out, *more, "--spot-check", "-1") == code
    rows = {g["id"]: g["verdict"] for g in json.loads((out / "verdict.json").read_text())["gates"]}
    assert rows[gate] == "FAIL"


DORA = ("--lora-rank", "4", "--lora-targets", "q,v,down", "--lora-dora")


def test_a_run_of_dora_is_verified_and_what_it_saved_is_its_checkpoint(place, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "m.apr"
    assert pretrain(place, run, *DORA) == 0
    capsys.readouterr()
    assert main(["verify", str(run), "--replay", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["checks"]
    assert {r["verdict"] for r in rows} == {"PASS"}
    base = str(place / "base/ckpt/epoch-002.apr")
    assert main(["merge", base, str(run / "ckpt/epoch-002-adapter"), "-o", str(out)]) == 0
    merged, checkpoint = weights(out), weights(run / "ckpt/epoch-002.apr")
    for name, want in checkpoint.items():
        np.testing.assert_allclose(merged[name], want, rtol=0, atol=1e-6)
    again = [
        "pretrain",
        "--init",
        base,
        "--lora-init",
        str(run / "ckpt/epoch-002-adapter"),
        "--lora-base",
        "int8",
    ]
    again += ["--corpus", str(place / "corpus"), "--seq-length", "16", "--run-dir", str(tmp_path / "again")]
    assert main(again) == 2
    assert "norms of rows of 8-bit integers" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["norms are frozen", "norms are not saved"])
def test_faults_of_dora_turn_their_gate_red(place, tmp_path, monkeypatch, fault):
    gate, code = ("start.slope", 6) if "frozen" in fault else ("end.reload", 9)
    if "frozen" in fault:
        right = Dora.add

        def add(self, pair, dy, x, first, named):
            kept = np.array(cut(self.a.part, pair.m))
            right(self, pair, dy, x, first, named)
            cut(self.a.part, pair.m)[...] = kept

        monkeypatch.setattr(Dora, "add", add)
    else:
        tensors = peft_write.adapter_tensors
        monkeypatch.setattr(
            peft_write,
            "adapter_tensors",
            lambda *a: {k: x * (1 + ("magnitude" in k)) for k, x in tensors(*a).items()},
        )
    out = tmp_path / "run"
    assert pretrain(place, out, *DORA, "--spot-check", "-1") == code
    rows = {g["id"]: g["verdict"] for g in json.loads((out / "verdict.json").read_text())["gates"]}
    assert rows[gate] == "FAIL"


def test_nothing_else_has_a_copy():
    """The layout holds what is trained, and no more; its matrices decay."""
    cfg = PRESETS["qwen3-tiny"]
    layout = AdapterLayout(cfg, CONFIGS["whole"])
    assert {base.hf for base, _ in layout.saved} >= {"model.embed_tokens.weight", "model.norm.weight"}
    for s in layout.slots:
        assert (s.offset + s.size <= layout.decayed) == (len(s.shape) > 1)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_patterns_of_a_tied_embedding_hold_for_the_head_too(key, module, tmp_path):
    """The one matrix stands in the file twice, and by either name has one rank and scale."""
    config = LoraConfig(4, 8.0, ("wq", "embed"), **{key: ((module, 2),)})
    cfg = dataclasses.replace(PRESETS["qwen3-tiny"], tie_word_embeddings=True)
    layout = AdapterLayout(cfg, config)
    flat = np.random.default_rng(0).standard_normal(layout.size).astype(np.float32)
    peft_write.write_adapter(tmp_path, layout, flat, "base")
    found = read_adapter(str(tmp_path), cfg)
    assert found.cfg.tie_word_embeddings
    assert found.note == ""
    assert {hf: d.scale for hf, d in found.deltas.items()} == {p.base.hf: p.scale for p in layout.pairs}
