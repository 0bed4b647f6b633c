"""Matrices rounded to 8 bits: how far off, in the same tokens as a model of the rounded weights, nothing else changed."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import apr
from apr import backends
from apr.checkpoints.hf import write_hf
from apr.common.errors import Refused
from apr.inference import int8
from apr.inference.generate import Generator
from apr.inference.sampling import Sampling
from apr.model.params import FUSED, Layout
from apr.model.presets import PRESETS
from apr.tokenizer.training import train_tokenizer


def rounded(cfg, host):
    """The float32 weights that the int8 ones stand for."""
    out = host.copy()
    layout = Layout(cfg)
    first = {(s.layer, s.param.name): s for s in layout.slots}
    for s in layout.slots:
        group = next((g for g in FUSED.values() if s.param.name in g), (s.param.name,))
        assert (s.layer, group[0]) in first
        if len(s.shape) == 2:
            view = out[s.offset : s.offset + s.size].reshape(s.shape)
            view[...] = int8.Int8Matrix.of(view).to_float()
    return out


def test_every_element_is_at_most_half_a_step_off():
    w = np.random.default_rng(0).standard_normal((700, 33)).astype(np.float32)
    w[5] = 0
    w[6] *= 1e4
    m = int8.Int8Matrix.of(w)
    assert (np.abs(m.to_float() - w) <= 0.5001 * m.scale[:, None]).all()
    assert (np.abs(m.q).max(1) == np.where(np.arange(700) == 5, 0, 127)).all()
    assert (m.shape, len(m), m[2:5].shape) == ((700, 33), 700, (3, 33))


@pytest.mark.parametrize("name", [n for n in PRESETS if n.endswith("-tiny")])
def test_tokens_are_those_of_the_rounded_weights(name):
    cfg = PRESETS[name]
    host = np.zeros(Layout(cfg).size, np.float32)
    Layout(cfg).randomise(host, 7, 0.2)
    prompts = [[5, 9, 2], list(range(30)), [1]]
    got = {}
    for key, be, w in (
        ("int8", int8.backend(), int8.Int8Weights(cfg, host, backends.get("cpu"))),
        ("float", backends.get("cpu"), rounded(cfg, host)),
        ("exact", backends.get("cpu"), host),
    ):
        new: dict[int, list[int]] = {}
        for c, _ in Generator(cfg, be, w, 64, rows=3).run(prompts, Sampling(30, 0.0)):
            new[c.number] = c.new
        got[key] = new
    assert got["int8"] == got["float"]
    assert got["int8"] != got["exact"]  # else nothing was rounded


def test_a_quarter_of_the_memory():
    cfg = PRESETS["llama-demo"]
    host = np.zeros(Layout(cfg).size, np.float32)
    Layout(cfg).init(host, 0)
    assert int8.Int8Weights(cfg, host, backends.get("cpu")).nbytes < 0.27 * host.nbytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["def f(x):\n    return x + 1\n"] * 3, 270, path / "tok")
    cfg = dataclasses.replace(
        PRESETS["qwen2-tiny"], vocab_size=tokenizer.vocab_size, tie_word_embeddings=False
    )
    host = np.zeros(Layout(cfg).size, np.float32)
    Layout(cfg).randomise(host, 3, 0.2)
    write_hf(path / "hf", cfg, Layout(cfg).named(host), tokenizer_json=tokenizer.json)
    return path


def test_the_interface(folder, tmp_path, capsys):
    from apr.cli.main import main

    model, exact = (apr.load(folder / "hf", dtype=dtype) for dtype in ("int8", "float32"))
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 30))
    off = np.abs(model.logits(ids) - exact.logits(ids)).max() / np.abs(exact.logits(ids)).max()
    assert 0 < off < 0.1
    assert abs(model.loss(ids) - exact.loss(ids)) < 0.05
    with pytest.raises(Refused, match="int8"):
        model.save(tmp_path / "m.apr")
    args = [
        "run",
        str(folder / "hf"),
        "def",
        "--dtype",
        "int8",
        "--max-tokens",
        "9",
        "--temperature",
        "0",
        "--json",
    ]
    assert main(args) == 0
    assert json.loads(capsys.readouterr().out)["text"] == "def" + model.generate(
        "def", max_tokens=9, temperature=0
    )


def test_a_real_model_loses_little(data):
    """stories260K: mean loss of its reference text, nats/token."""
    want = json.loads((data("stories260K") / "ref.json").read_text())
    model = apr.load(data("stories260K") / "hf", "cpu", "int8")
    loss = model.loss(want["ids"])
    assert 1e-6 < abs(loss - want["nll_mean"]) < 0.01
