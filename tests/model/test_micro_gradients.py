"""Gradients of a step are sums over its micro-batches in order, each begun at zero: to the last bit, in bounded memory."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from apr import backends
from apr.model.lora import lora_config
from apr.model.micro_gradients import MicroGradients, Pieces
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.model.transformer import Model

NAMES = [name for name in PRESETS if name.endswith("-tiny")]


def built(cfg, be, folds, lora=False, **options):
    """What is trained, a model of random weights or its adapters, and what is to be called for a micro-batch."""
    config = lora_config(2, None, None) if lora else None
    model = Model(cfg, be, 2, 12, be.dtypes[0], folds=folds, lora=config, **options)
    host = np.zeros(model.layout.size, np.float32)
    model.layout.randomise(host, 3)
    if model.adapters is None:
        model.be.from_host(model.w, host.astype(model.dtype))
        return model, model.micro_step
    adapters = model.adapters
    adapters.set_base(model.layout.named(host).__getitem__)
    model.be.from_host(
        adapters.w, np.random.default_rng(5).standard_normal(adapters.layout.size).astype(np.float32)
    )
    return adapters, model.micro_step


def batches(cfg, count=3):
    rng = np.random.default_rng(1)
    return [rng.integers(0, cfg.vocab_size, (2, 2 - (i == 2), 12), dtype=np.int32) for i in range(count)]


def apart(cfg, be, lora, **options):
    """The gradients of each micro-batch by itself, and their sum from the left."""
    trained, micro_step = built(cfg, be, False, lora, **options)
    total = np.zeros(trained.layout.size, trained.g.dtype)
    for ids, targets in batches(cfg):
        be.fill(trained.g, 0)
        micro_step(ids, targets, 0.01, False)
        total = total + be.to_host(trained.g)
    return total


def together(cfg, be, lora, **options):
    trained, micro_step = built(cfg, be, True, lora, **options)
    for ids, targets in batches(cfg):
        micro_step(ids, targets, 0.01, False)
    return be.to_host(trained.g)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", ["cpu", "reference"])
def test_a_step_is_the_sum_of_its_micro_batches(name, which):
    be, cfg = backends.get(which), PRESETS[name]
    assert together(cfg, be, False).tobytes() == apart(cfg, be, False).tobytes()


@pytest.mark.parametrize(
    ("lora", "options"), [(True, {}), (False, {"recompute": True}), (False, {"z_loss": 0.01})]
)
def test_adapters_recomputation_and_z_loss_keep_the_order(lora, options):
    be, cfg = backends.get("cpu"), PRESETS["qwen2-tiny"]
    assert together(cfg, be, lora, **options).tobytes() == apart(cfg, be, lora, **options).tobytes()


@pytest.mark.parametrize("fault", ["clear", "fold"])
def test_the_check_can_fail(fault, monkeypatch):
    """The faults planted: a layer's place is not cleared; a layer is added twice."""
    be, cfg = backends.get("cpu"), PRESETS["qwen2-tiny"]
    right = getattr(MicroGradients, fault)

    def wrong(self, layer):
        for _ in range({"clear": 0, "fold": 2}[fault] if layer == 1 else 1):
            right(self, layer)

    monkeypatch.setattr(MicroGradients, fault, wrong)
    assert together(cfg, be, False).tobytes() != apart(cfg, be, False).tobytes()


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("tied", [False, True])
def test_pieces_are_the_whole_buffer_once(name, tied):
    layout = Layout(dataclasses.replace(PRESETS[name], tie_word_embeddings=tied))
    pieces = Pieces(layout)
    found = sorted(pieces.at.values(), key=lambda s: s.start)
    assert [found[0].start, *(s.stop for s in found)] == [*(s.start for s in found), layout.size]
    for s in layout.slots:
        held, at = (f(s.layer if s.param.decay else None) for f in (pieces.held, pieces.at.get))
        assert at.start <= s.offset
        assert s.offset + s.size <= at.stop
        assert pieces.place(s) - held.start == s.offset - at.start
    layers = layout.cfg.num_layers
    assert pieces.size <= layout.size
    if layers > 1:
        assert pieces.size == layout.size - (layers - 1) * pieces.widest
