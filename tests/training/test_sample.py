"""Samples of a model in training: their first tokens are drawn again up to where attention stops in training."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from apr import backends
from apr.common.finding import FAIL, PASS
from apr.inference import again
from apr.model.presets import PRESETS
from apr.model.transformer import Model
from apr.training import sample

CPU = backends.get("cpu")
CFG = PRESETS["qwen2-tiny"]


def inputs(cfg, seed):
    """Those that a sample reads, of a tokenizer whose texts are ids."""
    tokenizer = SimpleNamespace(
        encode=lambda text: [*map(int, text.split())],
        decode=lambda ids, skip_special: " ".join(map(str, ids)),
        eos_id=None,
        ids=list(range(cfg.vocab_size)),
    )
    return SimpleNamespace(
        train=SimpleNamespace(shards=SimpleNamespace(prefix_ids=())),
        tokenizer=tokenizer,
        cfg=cfg,
        backend=CPU,
        settings=SimpleNamespace(seed=seed),
    )


def drawn(document_end=None, cfg=CFG, dtype="float32", seed=3):
    """Draw a sample; returns its new ids and the finding."""
    model = Model(cfg, CPU, 1, 32, dtype, document_end=document_end)
    host = np.zeros(model.layout.size, np.float32)
    model.layout.init(host, 5, 0.3)
    CPU.from_host(model.w, host)
    text, event = sample.sample_text(inputs(cfg, seed), model, "3 14 59 ", 12, 7)
    assert event.step == 7
    return [*map(int, text.split())][3:], event.finding


@pytest.mark.parametrize("place", [0, 1, 4, 9])
def test_a_separator_that_is_drawn_ends_what_is_compared(place, monkeypatch):
    new, found = drawn()
    assert (found.verdict, found.measured) == (PASS, "8 tokens drawn again")
    end = new[place]
    first = new.index(end)
    same, found = drawn(end)
    assert same == new
    assert found.verdict == PASS, found.why
    assert found.measured.startswith(f"{min(8, first + 1)} token")
    right = sample.generate
    monkeypatch.setattr(
        sample, "generate", lambda *a: [(x + 1) % CFG.vocab_size for x in right(*a)] if a[3] else ()
    )
    assert drawn(end)[1].verdict == FAIL


def test_rounding_to_bfloat16_in_many_layers_is_no_fault(monkeypatch):
    """Without any slack, tokens differ; float32 says how far rounding takes logits."""
    monkeypatch.setitem(again.TOLERANCE, "bfloat16", 0.0)
    deep = dataclasses.replace(CFG, num_layers=32)
    for seed in range(3):
        found = drawn(cfg=deep, dtype="bfloat16", seed=seed)[1]
        assert found.verdict == PASS, found.why
    monkeypatch.setattr(again, "one_pass", lambda *a: None)
    assert FAIL in [drawn(cfg=deep, dtype="bfloat16", seed=seed)[1].verdict for seed in range(3)]
