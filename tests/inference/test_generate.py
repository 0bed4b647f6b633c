"""Sampling: what each option lets through; the cache; several prompts at once; where generation ends."""

from __future__ import annotations

import dataclasses
import json
import warnings

import numpy as np
import pytest

from apr import backends
from apr.common.errors import Refused, UsageError
from apr.inference.generate import (
    Generator,
    generate,
    generator_memory,
    grouped,
    slots_needed,
)
from apr.inference.sampling import Sampling, drawable_ids, penalise, pick
from apr.inference.streaming import StopText, TextStream
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.model.transformer import Model
from apr.tokenizer.tokenizer import Tokenizer
from apr.tokenizer.vocab_format import BYTE_CHARACTERS
from cases import overlay
from tokenizer_cases import BL, bpe, fields_of

LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.3, 0.15]))
FAMILIES = [name for name in PRESETS if name.endswith("-tiny")]
BACKENDS = [
    ("reference", "float64"),
    ("cpu", "float32"),
    ("cpu", "bfloat16"),
    pytest.param("cuda", "float32", marks=pytest.mark.gpu),
    pytest.param("cuda", "bfloat16", marks=pytest.mark.gpu),
]


def draws(logits=LOGITS, n=4000, **options):
    rng = np.random.default_rng(0)
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options}
    counts = np.bincount([pick(logits, rng, **options) for _ in range(n)], minlength=5)
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
    assert set(np.flatnonzero(draws(min_p=0.74))) == {1, 3}
    assert set(np.flatnonzero(draws(min_p=0.76))) == {1}
    assert set(np.flatnonzero(draws(min_p=0.3, top_k=2))) == {1, 3}
    assert pick(np.zeros(5), np.random.default_rng(0), 0, 0, 1.0) == 0  # the lowest id among equals


def by_sorting_all(logits, rng, temperature, top_k, top_p, min_p):
    """pick, as the definitions say it."""
    order = np.argsort(-logits, kind="stable")
    p = np.exp((logits[order].astype(np.float64) - logits.max()) / temperature)
    if top_k:
        order, p = order[:top_k], p[:top_k]
    p /= p.sum()
    if top_p < 1:
        keep = int(np.searchsorted(np.cumsum(p), top_p)) + 1
        order, p = order[:keep], p[:keep]
    keep = p >= min_p * p[0]
    order, p = order[keep], p[keep] / p[keep].sum()
    return int(order[min(np.searchsorted(np.cumsum(p), rng.random(), side="right"), len(p) - 1)])


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])  # equal, nearly flat, peaked
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_p": 0.8999},
        {"top_k": 1500},
        {"min_p": 0.05},
        {"top_p": 0.9899, "min_p": 1e-3, "top_k": 3000},
    ],
)
def test_a_large_vocabulary_is_not_sorted_and_draws_the_same(scale, options):
    options = {"temperature": 0.9, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **options}
    source = np.random.default_rng(1)
    for seed in range(40):
        logits = (scale * source.standard_normal(5000)).astype(np.float32).round(2)  # many are equal
        got = pick(logits, np.random.default_rng(seed), **options)
        assert got == by_sorting_all(logits, np.random.default_rng(seed), **options)


def test_repetition_penalty():
    logits = np.array([2.0, -2.0, 1.0, 0.0])
    assert penalise(logits, [0, 1, 1], 2.0).tolist() == [1.0, -4.0, 1.0, 0.0]
    assert penalise(logits, [0, 1], 1.0) is logits
    assert logits.tolist() == [2.0, -2.0, 1.0, 0.0]


def test_damaged_logits_are_refused():
    with pytest.raises(Refused, match="not finite"):
        pick(np.array([0.0, np.nan]), np.random.default_rng(0), 1.0, 0, 1.0)


def weights(cfg, dtype="float32", seed=7):
    w = np.zeros(Layout(cfg).size, "float64" if dtype == "float64" else "float32")
    Layout(cfg).randomise(w, seed, 0.2)
    return w


def on(backend, w, dtype):
    put = backend.empty(w.size, dtype)
    backend.from_host(put, w)
    return put


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    cfg = PRESETS[request.param]
    return cfg, weights(cfg)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
# Windows shorter and longer than the prompt, on the family that has one; the text goes past both.
@pytest.mark.parametrize(
    ("name", "window"), [*((name, 0) for name in FAMILIES), ("mistral-tiny", 5), ("mistral-tiny", 40)]
)
def test_logits_with_a_cache_equal_those_without(name, backend, dtype, window):
    cfg, be = dataclasses.replace(PRESETS[name], sliding_window=window), backends.get(backend)
    w = on(be, weights(cfg, dtype), dtype)
    ids = np.random.default_rng(3).integers(0, cfg.vocab_size, 60).astype(np.int32)
    full = Model(cfg, be, 1, len(ids), dtype, train=False, loss_rows=len(ids), w=w)
    want = []
    full.forward(ids[None])
    full.loss(
        np.full((1, len(ids)), -100, np.int32),
        tap=lambda _, n, x: want.append(be.to_host(x)) if n == "logits" else None,
    )
    want = want[0].astype(np.float64)
    cached = Model(cfg, be, 1, 12, dtype, train=False, loss_rows=1, cache=60, w=w)
    cached.forward(ids[None, :12], past=0)
    got = [cached.last_logits()[0]]
    for i in range(12, 60):
        cached.step(ids[i : i + 1], np.array([i]), i)
        got.append(cached.last_logits()[0])
    off = np.abs(np.array(got, np.float64) - want[11:]).max() / np.abs(want).max()
    assert off <= {"float64": 1e-13, "float32": 2e-5, "bfloat16": 5e-2}[dtype]


@pytest.mark.parametrize("fault", ["position", "window"])
def test_a_fault_of_the_cache_is_seen_in_the_logits(fault):
    """The angles of the position before; a window that is one too long."""
    cfg, be = PRESETS["mistral-tiny"], backends.get("cpu")
    ids, w = np.arange(3, 33, dtype=np.int32), weights(cfg)
    full = Model(cfg, be, 1, 30, train=False, w=w)
    full.forward(ids[None])
    want = full.last_logits()
    wrong = dataclasses.replace(cfg, sliding_window=6) if fault == "window" else cfg
    for c, planted, good in ((cfg, False, True), (wrong, fault == "position", False)):
        cached = Model(c, be, 1, 29, train=False, loss_rows=1, cache=30, w=w)
        cached.forward(ids[None, :29], past=0)
        if planted:
            for table in (cached.cos, cached.sin):
                table[1:] = table[:-1].copy()
        cached.step(ids[29:], np.array([29]), 29)
        assert (np.abs(cached.last_logits() - want).max() <= 2e-5 * np.abs(want).max()) == good


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


PROMPTS = [[5, 9, 2], [1], list(range(30)), [7] * 11, [3, 4, 5, 6, 7], [80, 81], [90] * 29, [8, 1, 2, 3]]


def together(cfg, be, w, dtype, sampling, ends=(), rows=8, slots=64):
    """New ids of PROMPTS computed at once, and why each ended."""
    seen: dict[int, list] = {}
    generator = Generator(cfg, be, w, slots, dtype, rows=rows)
    for c, _ in generator.run(PROMPTS[:rows], sampling, ends):
        seen[c.number] = [c.new, c.ended]
    return [seen[i] for i in range(rows)]


# Not in bfloat16: a GPU's products may round otherwise for other shapes, and many logits are equal there.
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS[:3])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_gets_what_each_prompt_gets_alone(name, backend, dtype):
    """Greedy and drawn, prompts of other lengths, ending at other times, past a sliding window of 5."""
    cfg, be = PRESETS[name], backends.get(backend)
    w = on(be, weights(cfg, dtype), dtype)
    sampling = [
        Sampling(
            30, 0.0 if i % 2 else 0.9, seed=i, min_p=0.01 * (i % 3), repetition_penalty=1 + 0.1 * (i % 4)
        )
        for i in range(len(PROMPTS))
    ]
    ends = {17, 50, 99}
    got = together(cfg, be, w, dtype, sampling, ends)
    for prompt, s, (new, ended) in zip(PROMPTS, sampling, got, strict=True):
        options = dict(min_p=s.min_p, repetition_penalty=s.repetition_penalty)
        alone = list(generate(cfg, be, w, prompt, 30, s.temperature, 0, 1.0, s.seed, ends, dtype, **options))
        assert (new, ended) == (alone, "end" if alone[-1] in ends else "length")
    assert {ended for _, ended in got} == {"end", "length"}


def test_a_batch_has_the_very_logits_of_each_prompt_alone(model, monkeypatch):
    """Bit for bit on the cpu backend, which is why no draw can differ."""
    cfg, w = model
    be, rows = backends.get("cpu"), {}

    def record(seen):
        def keep(logits, *_):
            seen.append(logits.copy())
            return int(logits.argmax())

        monkeypatch.setattr("apr.inference.sampling.pick", keep)

    alone = []
    for prompt in PROMPTS:
        record(seen := [])
        assert len(list(generate(cfg, be, w, prompt, 12, temperature=0))) == 12
        alone.append(np.array(seen))
    record(seen := [])
    order = [c.number for c, _ in Generator(cfg, be, w, 64, rows=8).run(PROMPTS, Sampling(12, 0.0))]
    for number, logits in zip(order, seen, strict=True):
        rows.setdefault(number, []).append(logits)
    for i, want in enumerate(alone):
        assert np.array(rows[i]).tobytes() == want.tobytes(), i


def shifted(backend):
    """A fault: the keys of a batch of sequences of different lengths are seen from slot 0 on, what is not theirs too."""

    def attention(y, lse, q, k, v, first, window):
        backend.attention_fwd(y, lse, q, k, v, None if first is None else np.zeros_like(first), window)

    return overlay(backend, attention_fwd=attention)


def same_angles(backend):
    """A fault: all sequences of a batch are turned by the angles of the first."""

    def rope(x, cos, sin, sign):
        backend.rope(
            x, np.repeat(cos[:1], len(cos), 0) if x.shape[0] == 1 and x.shape[1] > 1 else cos, sin, sign
        )

    return overlay(backend, rope=rope)


@pytest.mark.parametrize("fault", [shifted, same_angles])
def test_a_fault_in_a_batch_is_seen(fault):
    cfg, be = PRESETS["llama-tiny"], backends.get("cpu")
    w, sampling = weights(cfg), Sampling(25, 0.0)
    good = together(cfg, be, w, "float32", sampling)
    assert together(cfg, fault(be), w, "float32", sampling) != good


def test_groups_of_prompts():
    cfg = PRESETS["llama-tiny"]  # 64 positions
    assert grouped(cfg, [(3, 10), (20, 10), (5, 10)], 2) == [[1, 2], [0]]
    assert grouped(cfg, [(60, 50), (3, 50), (60, 4)], 8) == [[0, 2], [1]]  # 60 + 50 slots are more than 64
    assert slots_needed(cfg, [(60, 50)]) == 64
    assert slots_needed(cfg, [(60, 4), (3, 10)]) == 70
    assert grouped(cfg, [], 8) == []
    jobs = [(int(n), 20) for n in np.random.default_rng(0).integers(1, 64, 50)]
    groups = grouped(cfg, jobs, 8)
    assert sorted(i for g in groups for i in g) == list(range(50))
    assert all(len(g) <= 8 and slots_needed(cfg, [jobs[i] for i in g]) <= 64 for g in groups)


def test_a_group_that_does_not_fit_is_refused():
    cfg = PRESETS["llama-tiny"]
    generator = Generator(cfg, backends.get("cpu"), weights(cfg), 20, rows=2)
    for prompts, most in ((PROMPTS[:3], 2), ([[1] * 15, [2]], 10)):
        with pytest.raises(Refused, match="20 positions"):
            list(generator.run(prompts, Sampling(most)))


def test_every_byte_of_a_generator_is_planned():
    cfg, be = PRESETS["qwen3-tiny"], backends.get("cpu")
    w = weights(cfg)
    for rows, slots in ((1, 20), (4, 64)):
        before = be.memory()
        Generator(cfg, be, w, slots, rows=rows)
        assert be.memory() - before == generator_memory(cfg, be, "float32", rows, slots).total - w.nbytes


def test_what_the_cache_holds_is_not_computed_again(model):
    cfg, w = model
    be = backends.get("cpu")
    count = [0]

    def embedding(y, ids, table):
        count[0] += len(ids)
        be.embedding_fwd(y, ids, table)

    generator = Generator(cfg, overlay(be, embedding_fwd=embedding), w, 64)
    first = [t for _, t in generator.run([[5, 9, 2]], Sampling(6, 0.0), reuse=True)]
    count[0] = 0
    longer = [5, 9, 2, *first, 40, 41]
    got = [t for _, t in generator.run([longer], Sampling(6, 0.0), reuse=True)]
    assert count[0] == 3 + 5  # the last answer's last token, two more, and what was generated but the last
    assert got == list(generate(cfg, be, w, longer, 6, temperature=0))
    other = [5, 9, 3, 1]
    assert [t for _, t in generator.run([other], Sampling(6, 0.0), reuse=True)] == list(
        generate(cfg, be, w, other, 6, temperature=0)
    )
    assert [t for _, t in generator.run([other], Sampling(6, 0.0), reuse=True)] == list(
        generate(cfg, be, w, other, 6, temperature=0)
    )


def test_two_generations_at_once_are_refused():
    cfg = PRESETS["llama-tiny"]
    generator = Generator(cfg, backends.get("cpu"), weights(cfg), 20)
    first = generator.run([[1, 2]], Sampling(5))
    next(first)
    next(generator.run([[3]], Sampling(5)))
    with pytest.raises(UsageError, match="another generation"):
        next(first)


def test_where_generation_ends(model):
    cfg, w = model
    be = backends.get("cpu")
    free = list(generate(cfg, be, w, [1], 1000, seed=1))
    assert len(free) == cfg.max_position_embeddings - 1
    eos = free[5]
    assert list(generate(cfg, be, w, [1], 1000, seed=1, eos_id=eos)) == free[: free.index(eos) + 1]
    first = min(free.index(free[5]), free.index(free[9]))
    assert list(generate(cfg, be, w, [1], 1000, seed=1, eos_id={free[5], free[9]})) == free[: first + 1]
    assert list(generate(cfg, be, w, [1], 1000, seed=1)) == free
    assert list(generate(cfg, be, w, [1], 1000, seed=2)) != free


@pytest.mark.parametrize(
    ("prompt", "options", "error", "words"),
    [
        ([], {}, UsageError, "prompt"),
        ([123], {}, Refused, "123"),
        ([-1], {}, Refused, "-1"),
        ([1] * 64, {}, Refused, "64"),
        ([[1, 2]], {}, UsageError, "list of token ids"),
        ([0.5], {}, UsageError, "list of token ids"),
        ([1], {"temperature": -1.0}, UsageError, "--temperature"),
        ([1], {"temperature": float("nan")}, UsageError, "--temperature"),
        ([1], {"top_p": 1.5}, UsageError, "--top-p"),
        ([1], {"top_k": -1}, UsageError, "--top-k"),
        ([1], {"min_p": 1.5}, UsageError, "--min-p"),
        ([1], {"repetition_penalty": 0.0}, UsageError, "--repetition-penalty"),
    ],
)
def test_bad_input(prompt, options, error, words):
    cfg = PRESETS["llama-tiny"]
    w = np.zeros(Layout(cfg).size, np.float32)
    with pytest.raises(error, match=words):
        list(generate(cfg, backends.get("cpu"), w, prompt, 5, **options))


@pytest.mark.parametrize(
    ("text", "stops", "want"),
    [
        ("hello world", ["wor"], "hello "),
        ("hello world", ["xyz"], "hello world"),
        ("aaab", ["aab"], "a"),
        ("abcd", ["bcd", "c"], "ab"),  # "c" is complete first
        ("abcd", ["abc", "bc"], ""),  # both at once: the one that begins first
        ("ababac", ["abac"], "ab"),
        ("User: hi", ["User:", ""], ""),
        ("the end\n\n", ["\n\n"], "the end"),
        ("the end\n", ["\n\n"], "the end\n"),
    ],
)
def test_stop_strings_whatever_the_pieces(text, stops, want):
    for seed in range(30):
        rng, stop, out, rest = np.random.default_rng(seed), StopText(stops), "", text
        while rest:
            n = int(rng.integers(1, len(rest) + 1)) if seed else 1
            out, rest = out + stop.feed(rest[:n]), rest[n:]
            assert want.startswith(out)  # nothing of the stop string was shown before
        assert out + stop.rest() == want
        assert stop.stopped == (want != text)


def test_text_comes_in_whole_characters(tmp_path):
    from apr.tokenizer.training import train_tokenizer

    tokenizer = train_tokenizer(["a\u00e9\u65e5\U0001f600 b " * 3], 258, tmp_path)
    text = "x\u00e9y \u65e5\u672c \U0001f600!\U0001f469\u200d\U0001f52c"
    ids = [int(i) for i in tokenizer.encode(text)]
    for cut in (0, 1, 4):
        prompt = [int(i) for i in tokenizer.encode("\u00e9" * cut)]
        stream = TextStream(tokenizer, prompt)
        pieces = [stream.feed(i) for i in ids] + [stream.end()]
        assert "".join(pieces) == stream.text == text
        assert not any("\ufffd" in p for p in pieces)
    broken = TextStream(tokenizer, [])
    assert broken.feed(ids[1]) == ""  # half a character
    assert broken.end() == "\ufffd"


def test_text_of_a_real_tokenizer_in_pieces_is_the_text_at_once(data):
    from apr.tokenizer.tokenizer import Tokenizer

    for name in ("stories260K/hf", "qwen2-tokenizer"):
        tokenizer = Tokenizer.from_file(data(name))
        text = (
            "Once upon a time,  there was \u00e9\u65e5\u672c \U0001f600 a little girl.\n\n  She said: 'no' "
        )
        ids = [int(i) for i in tokenizer.encode(text)]
        for cut in (1, 3, 7):
            stream = TextStream(tokenizer, ids[:cut])
            got = "".join(stream.feed(i) for i in ids[cut:]) + stream.end()
            assert tokenizer.decode(ids[:cut]) + got == tokenizer.decode(ids)


def test_a_temperature_near_0_is_that_of_0_without_a_warning():
    for temperature in (5e-324, 1e-320, 1e-300):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert pick(LOGITS, np.random.default_rng(0), temperature, 0, 1.0) == 1
            assert pick(LOGITS * 1e30, np.random.default_rng(0), temperature, 3, 0.9) == 1


def test_ids_without_a_token_are_never_drawn(tmp_path):
    """At a high temperature all ids are about as likely; half of them have no token, one of those between others."""
    cfg = dataclasses.replace(PRESETS["llama-tiny"], vocab_size=600)
    model = bpe(list(BYTE_CHARACTERS), ["a b"])
    model["vocab"]["ab"] = 300
    fields = fields_of(model, BL, BL)
    tokenizer = Tokenizer.from_json(json.dumps(fields), "made")
    among = drawable_ids(tokenizer, cfg.vocab_size, ())
    assert among.tolist() == [*range(256), 300]
    w, be = weights(cfg), backends.get("cpu")
    free = set(generate(cfg, be, w, [1], 60, temperature=50.0))
    assert not free <= set(among.tolist())
    drawn = list(generate(cfg, be, w, [1], 60, temperature=50.0, among=among))
    assert set(drawn) <= set(among.tolist())
    assert len(set(drawn)) > 10
    # What ends a text may be drawn: the model's config names it.
    assert drawable_ids(tokenizer, cfg.vocab_size, [599]).tolist() == [*among.tolist(), 599]
    # Where every id has a token, the draws are those of before.
    assert drawable_ids(tokenizer, 257, ()) is None
    assert drawable_ids(None, 64, ()) is None
    every = np.arange(cfg.vocab_size)
    for options in ({}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.8, "repetition_penalty": 1.3}):
        plain, subset = (list(generate(cfg, be, w, [1], 20, among=a, **options)) for a in (None, every))
        assert plain == subset
