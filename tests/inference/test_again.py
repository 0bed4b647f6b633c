"""Tokens drawn again: the rule written a second time allows what `pick` draws and little else; faults of generation are seen."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from apr import backends
from apr.common.finding import FAIL, PASS, SKIPPED
from apr.inference import again, generate, sampling
from apr.inference.again import MAX_PROMPT_TOKENS, allowed, drawn_again
from apr.inference.generate import Generator, slots_needed
from apr.inference.sampling import Sampling, penalise, pick
from apr.model.block import Block
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.model.transformer import Model

cpu = backends.get("cpu")
PROMPT = [3, 14, 59, 26, 53]
OPTIONS = [
    dict(temperature=0.0),
    dict(temperature=0.8),
    dict(temperature=1.3, top_p=0.6),
    dict(temperature=1.0, top_k=7, top_p=0.9),
    dict(temperature=0.7, min_p=0.2),
    dict(temperature=0.0, repetition_penalty=1.7),
    dict(temperature=0.9, repetition_penalty=1.3, top_k=40, top_p=0.95, min_p=0.02),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_second_rule_is_the_first(options):
    """Of logits of several widths and sizes, some of them equal."""
    rng, count = np.random.default_rng(1), 0
    for width in (1, 2, 5, 97, 1500):
        for _ in range(20):
            logits = (rng.normal(0, 2, width) * rng.choice([0.1, 1, 5])).round(2).astype(np.float32)
            among = np.sort(rng.choice(width, max(1, width // 2), replace=False)) if width > 2 else None
            s = Sampling(seed=int(rng.integers(1 << 30)), **options)
            before = rng.integers(0, width, 6).tolist() if s.repetition_penalty != 1 else []
            found = penalise(logits, before, s.repetition_penalty)
            own = np.random.default_rng(s.seed)
            token = pick(
                found if among is None else found[among], own, s.temperature, s.top_k, s.top_p, s.min_p
            )
            token = token if among is None else int(among[token])
            draw = float(np.random.default_rng(s.seed).random())
            got = allowed(logits, before, s, draw, among, 1e-6)
            assert got[token]
            count += int(got.sum()) - int((np.abs(found[got] - found[token]) < 1e-3).sum())
    # Others than those of the same logit: next to none.
    assert count <= 2


def test_the_second_rule_has_no_line_for_each_token():
    """Large vocabularies have 150,000."""

    def lines(width):
        count = 0

        def count_one(frame, event, arg):
            nonlocal count
            count += 1
            return count_one if frame.f_code.co_filename == again.__file__ else None

        x, traced = np.zeros(width), sys.gettrace()
        sys.settrace(count_one)
        try:
            found = allowed(x, [], Sampling(top_p=0.9, min_p=0.1), 0.5, None, 1e-3)
        finally:
            sys.settrace(traced)
        assert found.all()
        return count

    assert lines(3000) < lines(30) + 300


@pytest.mark.parametrize("temperature", [1e-310, 5e-324])
def test_a_temperature_next_to_0_is_that_of_the_likeliest(temperature):
    logits = np.array([1, 3, 2], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = allowed(logits, [], Sampling(temperature=temperature), 0.3, None, 0.0)
    assert np.flatnonzero(found).tolist() == [1]


def test_ids_that_may_not_be_drawn_are_never_allowed():
    """Also where a slack as wide as the logits leaves all others."""
    found = allowed(np.array([5, 1, 2, 9], np.float32), [], Sampling(), 0.5, np.array([0, 2]), 20.0)
    assert np.flatnonzero(found).tolist() == [0, 2]


def deep(seed, layers=32, name="qwen2-tiny"):
    """Generate from weights in bfloat16 whose rounding grows from layer to layer; returns what again.check gets."""
    cfg, weights = model_of(name, "bfloat16", num_layers=layers)
    generator, new, said = Generator(cfg, cpu, weights, 14, "bfloat16"), [], []
    s = Sampling(max_tokens=9, temperature=0.8, seed=seed)
    for c, token in generator.run([PROMPT], s):
        new, said = [*new, token], c.logits
    model = SimpleNamespace(
        config=cfg, backend=cpu, dtype="bfloat16", weights=weights, tokenizer=None, ends=set()
    )
    return model, PROMPT, new, s, said


def test_bfloat16_of_many_layers_passes():
    verdicts = set()
    for seed in range(3):
        model, prompt, new, s, said = deep(seed)
        found = again.check(model, prompt, new, s, said=said)
        assert found.verdict == PASS, found.why
        own = again.one_pass(model.config, cpu, "bfloat16", model.weights)
        verdicts.add(drawn_again(own, "bfloat16", prompt, new, s, said=said).verdict)
    # Else the test shows nothing.
    assert FAIL in verdicts


def test_a_fault_in_bfloat16_of_many_layers_is_seen(monkeypatch):
    with monkeypatch.context() as m:
        the_cache_is_a_token_behind(m)
        model, prompt, new, s, said = deep(0)
    assert again.check(model, prompt, new, s, said=said).verdict == FAIL


def model_of(name="qwen2-tiny", dtype="float32", **sizes):
    cfg = dataclasses.replace(PRESETS[name], **sizes)
    host = np.zeros(Layout(cfg).size, np.float32)
    Layout(cfg).init(host, 5, 0.3)
    weights = cpu.empty(host.size, np.float32 if dtype == "float32" else "bfloat16")
    cpu.from_host(weights, host)
    return cfg, weights


def judged(name="qwen2-tiny", dtype="float32", prompt=PROMPT, chunk=0, **options):
    """Generate, then draw again with the model as it is."""
    cfg, weights = model_of(name, dtype)
    s = Sampling(**{"max_tokens": 9, **options})
    slots = slots_needed(cfg, [(len(prompt), s.max_tokens)])
    generator = Generator(cfg, cpu, weights, slots, dtype, chunk=chunk)
    new, said = [], []
    for c, token in generator.run([prompt], s):
        new, said = [*new, token], c.logits

    def logits_of(ids, count):
        model = Model(cfg, cpu, 1, len(ids), dtype, train=False, loss_rows=count, w=weights)
        model.forward(ids[None])
        return model.last_logits(count)

    return drawn_again(logits_of, dtype, prompt, new, s, said=said)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith("-tiny")])
def test_sound_generation_passes(name):
    for dtype in ("float32", "bfloat16"):
        for n, options in enumerate(OPTIONS):
            found = judged(name, dtype, PROMPT * (1 + 3 * (n % 2)), chunk=n % 3 and 4, seed=n, **options)
            assert found.verdict == PASS, (dtype, options, found.why)


def test_what_is_not_asked():
    long = drawn_again(lambda ids, n: None, "float32", [1] * (MAX_PROMPT_TOKENS + 1), [2], Sampling())
    assert long.verdict == SKIPPED
    assert drawn_again(lambda ids, n: None, "float32", [1], [], Sampling()).verdict == SKIPPED


def the_likeliest_is_drawn_at_1(m):
    right = sampling.pick
    m.setattr(sampling, "pick", lambda x, rng, t, *a: right(x, rng, t or 1.0, *a))
    return dict(temperature=0.0)


def top_p_leaves_out_one_more(m):
    right = sampling.pick
    m.setattr(sampling, "pick", lambda x, rng, t, k, p, q: right(x, rng, t, k, 0.6 * p, q))
    return dict(temperature=1.0, top_p=0.8)


def the_penalty_is_one_for_all(m):
    def penalise(logits, ids, penalty):
        out = logits.copy()
        out[list(ids)] /= penalty
        return out

    m.setattr(sampling, "penalise", penalise)
    return dict(temperature=2.0, repetition_penalty=3.0)


def a_number_is_drawn_twice(m):
    right = sampling.pick

    def twice(x, rng, *a):
        rng.random()
        return right(x, rng, *a)

    m.setattr(sampling, "pick", twice)
    return dict(temperature=1.0)


def cached_tokens_are_turned_further(m):
    right = Block._rope

    def rope(self, x, at, sign):
        right(self, x, dataclasses.replace(at, past=at.past + 1) if at.past else at, sign)

    m.setattr(Block, "_rope", rope)
    return dict(temperature=0.0)


def the_cache_is_a_token_behind(m):
    right = Block._remember

    def remember(self, k, v, at):
        keys, values = right(self, k, v, at)
        if k.shape[1] == 1:
            values[:, -1] = 0
        return keys, values

    m.setattr(Block, "_remember", remember)
    return dict(temperature=0.0)


def chunks_of_a_prompt_see_themselves_alone(m):
    def read(self, ids, row, slot, known, alone):
        for past in range(0, len(ids), self.chunk):
            self.model.forward(
                np.array([ids[past : past + self.chunk]], np.int32), past=0, row=row, slot=slot
            )

    m.setattr(generate.Generator, "_read", read)
    return dict(temperature=0.0, prompt=PROMPT * 4, chunk=8)


@pytest.mark.parametrize(
    "fault",
    [
        the_likeliest_is_drawn_at_1,
        top_p_leaves_out_one_more,
        the_penalty_is_one_for_all,
        a_number_is_drawn_twice,
        cached_tokens_are_turned_further,
        the_cache_is_a_token_behind,
        chunks_of_a_prompt_see_themselves_alone,
    ],
    ids=lambda f: f.__name__,
)
def test_a_fault_of_generation_is_seen(monkeypatch, fault):
    with monkeypatch.context() as m:
        options = fault(m)
        with np.errstate(all="ignore"):
            found = judged(**options)
    assert found.verdict == FAIL, found


def test_a_stop_string_in_the_text_is_seen():
    assert again.check(None, PROMPT, [1] * 4, Sampling(max_tokens=3), "so").verdict == FAIL
    found = again.check(None, PROMPT, [1], Sampling(), "so it ends", ["it"])
    assert found.verdict == FAIL
    assert "'it'" in found.why
