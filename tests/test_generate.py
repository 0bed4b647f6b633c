"""Sampling: what each option lets through, and where generation ends."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from apr import backends
from apr.config import PRESETS
from apr.errors import Refused, UsageError
from apr.generate import generate, pick
from apr.model import Model
from apr.params import Layout

LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.3, 0.15]))


def draws(n=4000, **options):
    rng = np.random.default_rng(0)
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options}
    counts = np.bincount([pick(LOGITS, rng, **options) for _ in range(n)], minlength=5)
    return counts / n


def test_pick_draws_from_the_softmax():
    assert np.abs(draws() - np.exp(LOGITS)).max() < 0.03
    p = np.exp(LOGITS) ** 2
    assert np.abs(draws(temperature=0.5) - p / p.sum()).max() < 0.03


def test_pick_limits():
    assert set(np.flatnonzero(draws(top_k=2))) == {1, 3}
    assert set(np.flatnonzero(draws(top_k=1))) == {1}
    assert set(np.flatnonzero(draws(top_p=0.7 - 1e-9))) == {1, 3}
    assert set(np.flatnonzero(draws(top_p=0.71))) == {1, 3, 4}
    assert set(np.flatnonzero(draws(top_p=1e-9))) == {1}
    assert set(np.flatnonzero(draws(temperature=0))) == {1}
    assert pick(np.zeros(5), np.random.default_rng(0), 0, 0, 1.0) == 0  # the lowest id among equals


def test_damaged_logits_are_refused():
    with pytest.raises(Refused, match="not finite"):
        pick(np.array([0.0, np.nan]), np.random.default_rng(0), 1.0, 0, 1.0)


@pytest.fixture(
    scope="module", params=["llama-tiny", "llama3-tiny", "mistral-tiny", "qwen2-tiny", "qwen3-tiny"]
)
def model(request):
    cfg = PRESETS[request.param]
    w = np.zeros(Layout(cfg).size, np.float32)
    Layout(cfg).randomise(w, 7, 0.2)
    return cfg, w


def test_greedy_with_a_cache_equals_computing_everything_again(model):
    cfg, w = model
    be = backends.get("cpu")
    got = list(generate(cfg, be, w, [5, 9, 2], 20, temperature=0))
    ids = [5, 9, 2]
    for _ in range(20):
        full = Model(cfg, be, 1, len(ids), train=False, w=w)
        full.forward(np.array([ids], np.int32))
        ids.append(int(full.last_logits()[0].argmax()))
    assert got == ids[3:]


def test_long_prompts_go_in_by_pieces(model):
    cfg, w = model
    cfg = dataclasses.replace(cfg, max_position_embeddings=400)
    be, prompt = backends.get("cpu"), [i * 7 % 123 for i in range(300)]
    full = Model(cfg, be, 1, 300, train=False, w=w)
    full.forward(np.array([prompt], np.int32))
    assert next(generate(cfg, be, w, prompt, 1, temperature=0)) == full.last_logits()[0].argmax()


def test_where_generation_ends(model):
    cfg, w = model
    be = backends.get("cpu")
    free = list(generate(cfg, be, w, [1], 1000, seed=1))
    assert len(free) == cfg.max_position_embeddings - 1
    eos = free[5]
    assert list(generate(cfg, be, w, [1], 1000, seed=1, eos_id=eos)) == free[: free.index(eos) + 1]
    assert list(generate(cfg, be, w, [1], 1000, seed=1)) == free
    assert list(generate(cfg, be, w, [1], 1000, seed=2)) != free


@pytest.mark.parametrize(
    ("prompt", "options", "error", "words"),
    [
        ([], {}, UsageError, "prompt"),
        ([123], {}, Refused, "123"),
        ([-1], {}, Refused, "-1"),
        ([1] * 64, {}, Refused, "64"),
        ([1], {"temperature": -1.0}, UsageError, "--temperature"),
        ([1], {"top_p": 1.5}, UsageError, "--top-p"),
        ([1], {"top_k": -1}, UsageError, "--top-k"),
    ],
)
def test_bad_input(prompt, options, error, words):
    cfg = PRESETS["llama-tiny"]
    w = np.zeros(Layout(cfg).size, np.float32)
    with pytest.raises(error, match=words):
        list(generate(cfg, backends.get("cpu"), w, prompt, 5, **options))
