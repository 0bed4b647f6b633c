"""Gradients of a step are sums over its micro-batches in order, each begun at zero: to the last bit, in bounded memory."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from apr import backends
from apr.backends import overlay
from apr.model.cost import fitted, memory
from apr.model.lora_settings import lora_config
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


def together(cfg, be, lora, begins=False, **options):
    """begins: over gradients that are not zero, which the first micro-batch overwrites."""
    trained, micro_step = built(cfg, be, True, lora, **options)
    for s in trained.layout.slots if begins else []:
        be.fill(trained.g[s.offset : s.offset + s.size], np.nan)
    for i, (ids, targets) in enumerate(batches(cfg)):
        micro_step(ids, targets, 0.01, False, begins=begins and i == 0)
    return be.to_host(trained.g)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", ["cpu", "reference"])
def test_a_step_is_the_sum_of_its_micro_batches(name, which):
    be, cfg = backends.get(which), PRESETS[name]
    assert together(cfg, be, False).tobytes() == apart(cfg, be, False).tobytes()
    # But for the sign of zeros: 0 + -0 is 0.
    assert np.array_equal(together(cfg, be, False, begins=True), apart(cfg, be, False))


@pytest.mark.parametrize(
    ("lora", "options"), [(True, {}), (False, {"recompute": True}), (False, {"z_loss": 0.01})]
)
def test_adapters_recomputation_and_z_loss_keep_the_order(lora, options):
    be, cfg = backends.get("cpu"), PRESETS["qwen2-tiny"]
    assert together(cfg, be, lora, **options).tobytes() == apart(cfg, be, lora, **options).tobytes()


@pytest.mark.parametrize("fault", ["vectors", "matrices", "fold"])
def test_the_check_can_fail(fault, monkeypatch):
    """The faults planted: the place of vectors is not cleared, that of matrices is added to; a layer is added twice."""
    be, cfg = backends.get("cpu"), PRESETS["qwen2-tiny"]
    fold = MicroGradients.fold

    def twice(self, layer, begins):
        for _ in range(2 if layer == 1 else 1):
            fold(self, layer, begins)

    if fault == "vectors":
        monkeypatch.setattr(Model, "_clear_sums", lambda self: None)
    elif fault == "matrices":
        be = overlay(be, linear_bwd=lambda *a: backends.get("cpu").linear_bwd(*a[:6], True))
    else:
        monkeypatch.setattr(MicroGradients, "fold", twice)
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


# The input of the down product, computed again


@pytest.mark.parametrize("name", NAMES)
def test_act_that_is_computed_again_changes_no_bit(name):
    be, cfg = backends.get("cpu"), PRESETS[name]
    assert together(cfg, be, False, act_again=True).tobytes() == together(cfg, be, False).tobytes()


@pytest.mark.parametrize("options", [{"recompute": True}, {"folds": True}, {"lora": True}])
def test_act_again_goes_with_the_rest(options):
    be, cfg = backends.get("cpu"), PRESETS["qwen2-tiny"]
    grads = []
    for again in (False, True):
        given = {"folds": False, **options}
        trained, micro_step = built(cfg, be, given.pop("folds"), **given, act_again=again)
        for ids, targets in batches(cfg):
            micro_step(ids, targets, 0.01, False)
        grads.append(trained.g.tobytes())
    assert grads[0] == grads[1]


def test_act_of_another_layer_is_seen():
    """As it lies in the buffer that all blocks share, before it is computed again."""
    be, cfg = backends.get("cpu"), PRESETS["qwen2-tiny"]

    def stale(y, gu, dy):
        be.swiglu_again(np.empty_like(y), gu, dy)

    ids, targets = batches(cfg)[0]
    grads = []
    for backend, again in ((be, False), (be, True), (overlay(be, swiglu_again=stale), True)):
        model, micro_step = built(cfg, backend, False, act_again=again)
        micro_step(ids, targets, 0.01, False)
        grads.append(model.g.tobytes())
    assert grads[0] == grads[1] != grads[2]


def test_act_is_computed_again_where_the_job_fits_only_then():
    cfg, be = PRESETS["qwen2-tiny"], backends.get("cpu")

    def need(again):
        return memory(cfg, be, 2, 12, act_again=again)

    kept, again = need(False), need(True)
    # act of all layers but one, and dgu
    less = 2 * 12 * cfg.intermediate_size * 4 * (cfg.num_layers - 1 + 2)
    assert 0 <= kept.total - again.total - less < 256 * cfg.num_layers
    for have, want in ((None, False), (kept.total, False), (kept.total - 1, True), (again.total - 1, False)):
        assert fitted(need, have, False) == (need(want), want)
        assert fitted(need, have, True) == (need(True), True)
