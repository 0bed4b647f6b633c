"""Adapters with dropout against PEFT, whose dropout modules keep what apr's masks keep: losses, gradients, steps."""

from __future__ import annotations

import json

import numpy as np
import pytest

from apr import backends
from apr.backends import overlay, reference
from apr.checkpoints.checkpoint import fill
from apr.checkpoints.hf import read_safetensors
from apr.checkpoints.peft import adapter_start, read_adapter
from apr.checkpoints.peft_config import CONFIG
from apr.checkpoints.peft_write import adapter_tensors, write_adapter
from apr.checkpoints.registry import open_any
from apr.common.errors import MalformedFile
from apr.evidence.adapters import base_unchanged
from apr.model.lora_dropout import Draws, Dropout
from apr.model.optim import AdamW
from apr.model.transformer import Model
from peft_cases import GOLDEN, bases, change, metadata_of, put_adapter  # noqa: F401

FILE = GOLDEN / "peft" / "dropout.safetensors"
BASES, SEED = {"dropout": "mistral", "dropout-tied": "llama"}, 0x123456789ABCDEF


@pytest.fixture(scope="module")
def golden():
    return read_safetensors(FILE)


@pytest.fixture(scope="module")
def folders(golden, tmp_path_factory):
    root, metadata = tmp_path_factory.mktemp("dropout"), metadata_of(FILE)
    return {case: put_adapter(golden, case, root / case, metadata) for case in BASES}


def start_of(bases, folders, case, be, dtype, **options):
    """A model with the adapters of a case, as training has it."""
    base, ids, targets = bases(BASES[case])
    loaded = open_any(str(base))
    adapter = read_adapter(str(folders[case]), loaded.cfg)
    model = Model(loaded.cfg, be, *ids.shape, dtype, lora=adapter.lora_config(loaded.cfg), **options)
    host = np.zeros(model.layout.size, dtype)
    fill(model.layout, host, loaded)
    model.adapters.set_base(model.layout.named(host).__getitem__)
    opt = AdamW.of(model.adapters, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_clip=1.0)
    opt.set_weights(adapter_start(model.adapters.layout, adapter).astype(dtype))
    return model, opt, ids, targets


def wrong_beside_peft(golden, case, model, opt, ids, targets, near):
    """List what differs from PEFT's: losses, gradients of the first step, and the end of the steps."""
    be, adapters, count = model.be, model.adapters, int((targets >= 0).sum())
    wrong, is_tied = [], model.cfg.tie_word_embeddings
    for step, want in enumerate(np.asarray(golden[f"{case}.losses"]), 1):
        be.fill(model.total, 0)
        draws = Draws.of(SEED, step, 0, len(ids))
        model.micro_step(ids, targets, 1 / count, begins=True, draws=draws)
        got = float(be.to_host(model.total)[0]) / count
        wrong += [] if abs(got - want) <= near * want else [f"loss {step}"]
        if step == 1:
            for name, x in adapter_tensors(adapters.layout, be.to_host(adapters.g)).items():
                grad = golden[f"{case}.grad.{name}"]
                if is_tied and ".lora_embedding_" in name:
                    other = "A" if name.endswith("B") else "B"
                    grad = grad + golden[f"{case}.grad.base_model.model.lm_head.lora_{other}.weight"].T
                if not (is_tied and "lm_head" in name):
                    wrong += [] if np.abs(x - grad).max() <= 10 * near * np.abs(grad).max() else [name]
        opt.step(1e-2)
    for name, x in adapter_tensors(adapters.layout, be.to_host(adapters.w)).items():
        if (after := golden.get(f"{case}.after.{name}")) is not None:
            wrong += [] if np.abs(x - after).max() <= 100 * near * np.abs(after).max() else [f"after {name}"]
    return wrong + ([] if base_unchanged(adapters).passed else ["base"])


@pytest.mark.parametrize(
    ("backend", "dtype", "near"), [("reference", "float64", 1e-7), ("cpu", "float32", 1e-5)]
)
@pytest.mark.parametrize(
    "options", [{}, {"recompute": True, "act_again": True, "loss_rows": 5}], ids=["", "again"]
)
@pytest.mark.parametrize("case", BASES)
def test_steps_are_those_of_torch_through_peft(golden, bases, folders, case, options, backend, dtype, near):
    start = start_of(bases, folders, case, backends.get(backend), dtype, **options)
    assert wrong_beside_peft(golden, case, *start, near) == []


def _changed(**changes):
    def dropout(out, x, counters, seed, module, p, factor):
        given = dict(out=out, x=x, counters=counters, seed=seed, module=module, p=p, factor=factor)
        reference.dropout(**{name: changes.get(name, lambda x: x)(value) for name, value in given.items()})

    return dropout


FAULTS = {
    "scale forgotten": _changed(),
    "one mask for all matrices": _changed(module=lambda m: 0),
    "one mask for all steps": _changed(counters=lambda c: c * [1, 0] + [0, 1]),
    "one mask for all sequences": _changed(counters=lambda c: c * [0, 1]),
    "half of the seed": _changed(seed=lambda seed: seed & 0xFFFFFFFF),
    "nothing dropped": _changed(p=lambda p: 0.0),
}


def _unscaled(out, x, counters, seed, module, p, factor):
    reference.dropout(out, x, counters, seed, module, p, factor * (1 - p))


FAULTS["scale forgotten"] = _unscaled


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_masks_is_seen(golden, bases, folders, fault):
    be = overlay(reference, dropout=FAULTS[fault])
    found = wrong_beside_peft(golden, "dropout", *start_of(bases, folders, "dropout", be, "float64"), 1e-7)
    assert ("loss 1" in found) == (fault != "one mask for all steps")
    assert "loss 2" in found


@pytest.mark.parametrize("part", ["add_to_input", "end_head"])
def test_a_gradient_that_is_lost_is_seen(golden, bases, folders, monkeypatch, part):
    monkeypatch.setattr(Dropout, part, lambda *a: None)
    start = start_of(bases, folders, "dropout", reference, "float64")
    found = wrong_beside_peft(golden, "dropout", *start, 1e-7)
    assert "loss 1" not in found
    assert any("lora_A" in name for name in found)


def test_another_mask_in_backward_is_seen(golden, bases, folders, monkeypatch):
    right = Dropout.add_to_input

    def other(self, parts, dx, dy):
        self._seed += 1
        right(self, parts, dx, dy)
        self._seed -= 1

    monkeypatch.setattr(Dropout, "add_to_input", other)
    start = start_of(bases, folders, "dropout", reference, "float64")
    assert any("lora_A" in name for name in wrong_beside_peft(golden, "dropout", *start, 1e-7))


def test_what_was_read_is_written_again(bases, folders, tmp_path):
    for case, share in (("dropout", 0.25), ("dropout-tied", 0.5)):
        cfg = open_any(str(bases(BASES[case])[0])).cfg
        adapter = read_adapter(str(folders[case]), cfg)
        config = adapter.lora_config(cfg)
        assert config.dropout == share
        assert (
            adapter.lora_config(cfg, "int8", 0.1).dropout,
            adapter.lora_config(cfg, None, 0.0).dropout,
        ) == (0.1, 0)
        layout = Model(cfg, reference, 1, 2, lora=config).adapters.layout
        write_adapter(tmp_path / case, layout, adapter_start(layout, adapter), "base")
        assert json.loads((tmp_path / case / CONFIG).read_text())["lora_dropout"] == share


@pytest.mark.parametrize("share", [1.0, -0.1, "0.1", True])
def test_a_dropout_that_is_none_is_refused_where_training_goes_on(bases, folders, tmp_path, share):
    cfg = open_any(str(bases("mistral")[0])).cfg
    layout = Model(
        cfg, reference, 1, 2, lora=read_adapter(str(folders["dropout"]), cfg).lora_config(cfg)
    ).adapters.layout
    write_adapter(tmp_path, layout, np.zeros(layout.size, np.float32), "base")
    change(tmp_path, lora_dropout=share)
    adapter = read_adapter(str(tmp_path), cfg)
    with pytest.raises(MalformedFile, match="--lora-dropout"):
        adapter.lora_config(cfg)
    assert adapter.lora_config(cfg, None, 0.2).dropout == 0.2
