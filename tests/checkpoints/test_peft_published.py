"""Adapters as people publish them, against PEFT: embeddings and heads, whole modules, tied or apart, DoRA; both ways."""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest

from apr import backends
from apr.backends import reference
from apr.checkpoints import peft
from apr.checkpoints.checkpoint import fill
from apr.checkpoints.hf import read_safetensors, write_safetensors
from apr.checkpoints.peft import WEIGHTS, adapter_start, add_adapter, read_adapter
from apr.checkpoints.peft_config import CONFIG
from apr.checkpoints.peft_write import adapter_tensors, write_adapter
from apr.checkpoints.registry import open_any
from apr.cli.main import main
from apr.common.errors import MalformedFile, Refused
from apr.evidence.adapters import base_unchanged, checkpoint_merge_error
from apr.evidence.asked import _optimizer
from apr.model.adapters import Adapters
from apr.model.lora import AdapterLayout
from apr.model.optim import AdamW
from apr.model.params import Layout
from apr.model.transformer import Model
from finetune_cases import published_adapter
from peft_cases import GOLDEN, bases, change, logits, metadata_of, put_adapter  # noqa: F401

FILE = GOLDEN / "peft" / "published.safetensors"
BASES = {
    "embed": "mistral", "whole": "mistral", "embed-tied": "llama", "whole-tied": "llama", "embed-apart": "qwen3",
    "whole-apart": "qwen3", "plus": "mistral", "dora": "mistral", "dora-embed": "mistral",
}  # fmt: skip
TRAINED = ("embed", "whole", "embed-tied", "whole-tied", "dora")
TOKENS = 12


@pytest.fixture(scope="module")
def golden():
    return read_safetensors(FILE)


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory):
    """case -> the folder that PEFT saved, for tests that change nothing in it."""
    root, metadata = tmp_path_factory.mktemp("published"), metadata_of(FILE)
    return {case: put_adapter(golden, case, root / case, metadata) for case in BASES}, metadata


def copied(folder, case, tmp_path):
    """A folder to change."""
    out = tmp_path / "adapter"
    out.mkdir()
    for name in (CONFIG, WEIGHTS):
        (out / name).write_bytes((folder[0][case] / name).read_bytes())
    return out


def merged_logits(base, adapter, ids, out):
    assert main(["merge", str(base), str(adapter), "-o", str(out), "--force"]) == 0
    merged = open_any(str(out))
    host = np.zeros(Layout(merged.cfg).size, np.float32)
    fill(Layout(merged.cfg), host, merged)
    return merged, logits(merged.cfg, host, ids[:1])[:, :TOKENS]


@pytest.mark.parametrize("case", BASES)
def test_merged_is_what_peft_computes(golden, bases, folder, tmp_path, case):
    base, ids, _ = bases(BASES[case])
    merged, got = merged_logits(base, folder[0][case], ids, tmp_path / "m.apr")
    want = np.asarray(golden[f"{case}.logits"])
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    loaded = open_any(str(base))
    assert merged.cfg.tie_word_embeddings == (loaded.cfg.tie_word_embeddings and "apart" not in case)
    adapter = read_adapter(str(folder[0][case]), loaded.cfg)
    assert checkpoint_merge_error(loaded, adapter, merged, "float32")[0] <= 1
    assert checkpoint_merge_error(loaded, adapter, loaded, "float32")[0] > 1


@pytest.mark.parametrize("fault", ["embedding forgotten", "whole forgotten", "magnitude forgotten"])
def test_a_part_that_a_merge_forgets_is_seen(golden, bases, folder, tmp_path, monkeypatch, fault):
    case = {"e": "embed", "w": "whole", "m": "dora"}[fault[0]]
    base, ids, _ = bases(BASES[case])
    loaded, right = open_any(str(base)), read_adapter

    def forgetful(source, *more):
        found = right(source, *more)
        if case == "dora":
            return replace(found, deltas={k: replace(d, magnitude=None) for k, d in found.deltas.items()})
        deltas = {k: d for k, d in found.deltas.items() if "embed" not in k}
        return replace(found, deltas=deltas, saved={} if case == "whole" else found.saved)

    monkeypatch.setattr("apr.cli.merge.read_adapter", forgetful)
    merged, got = merged_logits(base, folder[0][case], ids, tmp_path / "m.apr")
    want = np.asarray(golden[f"{case}.logits"])
    assert np.abs(got - want).max() > 1e-3 * np.abs(want).max()
    assert checkpoint_merge_error(loaded, right(str(folder[0][case]), loaded.cfg), merged, "float32")[0] > 1


@pytest.mark.parametrize("case", ["embed", "embed-tied", "whole", "whole-tied"])
def test_an_adapter_of_ours_is_what_peft_opened(golden, bases, folder, tmp_path, case):
    base, ids, _ = bases(BASES[case])
    loaded, out = open_any(str(base)), tmp_path / "adapter"
    published_adapter(out, (base / "config.json").read_text(), case, dict(loaded.tensors))
    hashes = (hashlib.sha256((out / name).read_bytes()).hexdigest() for name in (CONFIG, WEIGHTS))
    assert " ".join(hashes) == folder[1][f"ours-{case}.sha256"]
    host = np.zeros(Layout(loaded.cfg).size, np.float64)
    fill(Layout(loaded.cfg), host, loaded)
    adapter = read_adapter(str(out), loaded.cfg)
    assert adapter.cfg == loaded.cfg
    add_adapter(Layout(loaded.cfg), host, adapter)
    want = np.asarray(golden[f"ours-{case}.logits"])
    assert np.abs(logits(loaded.cfg, host, ids[:1])[:, :TOKENS] - want).max() <= 1e-6 * np.abs(want).max()


def start_of(bases, folder, case, be, dtype, **options):
    """A model with the adapters of a case, as training has it."""
    base, ids, targets = bases(BASES[case])
    loaded = open_any(str(base))
    adapter = read_adapter(str(folder[0][case]), loaded.cfg)
    model = Model(loaded.cfg, be, *ids.shape, dtype, lora=adapter.lora_config(loaded.cfg))
    host = np.zeros(model.layout.size, dtype)
    fill(model.layout, host, loaded)
    model.adapters.set_base(model.layout.named(host).__getitem__)
    opt = AdamW.of(
        model.adapters, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_clip=1.0, **options
    )
    opt.set_weights(adapter_start(model.adapters.layout, adapter).astype(dtype))
    return model, opt, ids, targets


def compare_steps(golden, case, model, opt, ids, targets, near):
    """Losses, gradients and the end of some steps beside PEFT's."""
    be, adapters, count = model.be, model.adapters, int((targets >= 0).sum())
    is_tied = model.cfg.tie_word_embeddings
    for step, want in enumerate(np.asarray(golden[f"{case}.losses"])):
        be.fill(model.total, 0)
        model.micro_step(ids, targets, 1 / count, begins=True)
        assert abs(float(be.to_host(model.total)[0]) / count - want) <= near * want
        if step == 0:
            for name, got in adapter_tensors(adapters.layout, be.to_host(adapters.g)).items():
                grad = golden.get(f"{case}.grad.{name}")
                if is_tied and ".lora_embedding_" in name:
                    other = "A" if name.endswith("B") else "B"
                    grad = grad + golden[f"{case}.grad.base_model.model.lm_head.lora_{other}.weight"].T
                if grad is not None and not (is_tied and "lm_head" in name):
                    assert np.abs(got - grad).max() <= 10 * near * np.abs(grad).max(), name
        opt.step(1e-2)
    for name, got in adapter_tensors(adapters.layout, be.to_host(adapters.w)).items():
        if (after := golden.get(f"{case}.after.{name}")) is not None:
            assert np.abs(got - after).max() <= 100 * near * np.abs(after).max(), name
    assert base_unchanged(adapters).passed


LEFT_OUT = {
    "target_modules": ({"target_modules": ["q_proj"]}, "target_modules"),
    "a pattern": ({"target_modules": r".*layers\.0\..*v_proj"}, "target_modules"),
    "exclude_modules": ({"exclude_modules": ["self_attn.v_proj"]}, "exclude_modules"),
    "a pattern to exclude": ({"exclude_modules": r".*\.1\..*"}, "exclude_modules"),
    "a layer": ({"layers_to_transform": 0}, "layers_to_transform"),
    "layers by a name": (
        {"layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
        "layers_to_transform",
    ),
    "all-linear": ({"target_modules": "All-Linear"}, ""),
    "all layers": ({"layers_to_transform": [0, 1, 2, 3]}, ""),
    "no layers": ({"layers_to_transform": []}, ""),
    "whole names": (
        {
            "target_modules": [f"model.layers.{i}.self_attn.v_proj" for i in range(4)],
            "layers_to_transform": [0],
        },
        "",
    ),
    "a pattern for names": ({"target_modules": r".*\.(q|v)_proj", "layers_to_transform": [0]}, ""),
    "a pattern too long to search": ({"target_modules": "(?:(?:.*x)*y)*.*q_proj"}, ""),
    "an exclusion of nothing": ({"exclude_modules": ["proj", "layers.9"]}, ""),
}


def test_an_adapter_of_mica_is_merged_but_not_gone_on_with(bases, folder, tmp_path):
    """PEFT leaves its base as it is, and trains A alone."""
    cfg = open_any(str(bases("mistral")[0])).cfg
    out = copied(folder, "whole", tmp_path)
    plain = read_adapter(str(out), cfg)
    change(out, init_lora_weights="mica")
    assert read_adapter(str(out), cfg).sha256 == plain.sha256
    with pytest.raises(Refused, match="MiCA, whose B is not trained"):
        read_adapter(str(out), cfg).lora_config(cfg)


@pytest.mark.parametrize("what", LEFT_OUT)
def test_an_adapter_of_a_module_that_the_config_leaves_out_is_refused(bases, folder, tmp_path, what):
    """PEFT 0.21 passes such tensors over without a word, and its logits are others than those of the merged file."""
    keys, named = LEFT_OUT[what]
    cfg = open_any(str(bases("mistral")[0])).cfg
    out = copied(folder, "whole", tmp_path)
    change(out, **keys)
    if named:
        with pytest.raises(Refused, match=rf"adapts model\.layers\.\d\.self_attn\.v_proj, which {named} of"):
            read_adapter(str(out), cfg)
    else:
        assert read_adapter(str(out), cfg).deltas


@pytest.mark.parametrize(
    ("backend", "dtype", "near"), [("reference", "float64", 1e-7), ("cpu", "float32", 1e-5)]
)
@pytest.mark.parametrize("case", TRAINED)
def test_gradients_and_steps_are_those_of_torch_through_peft(
    golden, bases, folder, case, backend, dtype, near
):
    compare_steps(golden, case, *start_of(bases, folder, case, backends.get(backend), dtype), near)


def test_a_gradient_of_the_embedding_that_is_lost_is_seen(golden, bases, folder, monkeypatch):
    monkeypatch.setattr(Adapters, "add_embedding_gradients", lambda *a: None)
    with pytest.raises(AssertionError):
        compare_steps(
            golden, "embed-tied", *start_of(bases, folder, "embed-tied", reference, "float64"), 1e-7
        )


def test_what_was_read_is_written_again(golden, bases, folder, tmp_path):
    for case in TRAINED:
        cfg = open_any(str(bases(BASES[case])[0])).cfg
        adapter = read_adapter(str(folder[0][case]), cfg)
        layout_of = Model(cfg, reference, 1, 2, lora=adapter.lora_config(cfg)).adapters.layout
        write_adapter(tmp_path / case, layout_of, adapter_start(layout_of, adapter), "base")
        assert read_adapter(str(tmp_path / case), cfg).sha256 == adapter.sha256
        theirs, ours = (read_safetensors(place / WEIGHTS) for place in (folder[0][case], tmp_path / case))
        assert theirs.keys() == ours.keys()
        for name in theirs:
            np.testing.assert_array_equal(theirs[name], ours[name])


def test_what_takes_a_tied_head_apart_is_merged_but_not_gone_on_with(bases, folder):
    for case in ("embed-apart", "whole-apart", "dora-embed"):
        cfg = open_any(str(bases(BASES[case])[0])).cfg
        with pytest.raises(Refused, match="apr merge"):
            read_adapter(str(folder[0][case]), cfg).lora_config(cfg)


def test_files_that_say_one_thing_and_hold_another_are_refused(bases, folder, tmp_path):
    cfg = open_any(str(bases("mistral")[0])).cfg
    out = copied(folder, "whole", tmp_path)
    whole = {k: np.array(v) for k, v in read_safetensors(out / WEIGHTS).items()}
    norm, head = "base_model.model.model.norm.weight", "base_model.model.lm_head.weight"
    for tensors, keys, kind, said in (
        (whole, {"modules_to_save": ["score"]}, Refused, "'score'"),
        (whole, {"modules_to_save": "norm"}, MalformedFile, "list of names"),
        (whole, {"modules_to_save": ["lm_head", "norm"]}, Refused, "embed_tokens"),
        (whole, {"use_dora": True}, MalformedFile, "has no lora_magnitude_vector"),
        ({k: v for k, v in whole.items() if k != norm}, {}, MalformedFile, norm),
        ({**whole, head: whole[head][:-3]}, {}, Refused, "more tokens"),
        (
            {**whole, "base_model.model.lm_head.lora_embedding_A": whole[head]},
            {},
            MalformedFile,
            "lm_head has",
        ),
    ):
        config = (folder[0]["whole"] / CONFIG).read_text()
        (out / CONFIG).write_text(config)
        change(out, **keys)
        write_safetensors(out / WEIGHTS, tensors)
        with pytest.raises(kind) as e:
            read_adapter(str(out), cfg)
        assert said in str(e.value)
    assert peft.read_adapter(str(folder[0]["dora"]), cfg).deltas


@pytest.mark.parametrize(
    ("backend", "dtype", "near"), [("reference", "float64", 1e-7), ("cpu", "float32", 1e-5)]
)
def test_steps_of_lora_plus_are_those_of_peft(golden, bases, folder, backend, dtype, near):
    start = start_of(bases, folder, "plus", backends.get(backend), dtype, lora_plus=8.0)
    compare_steps(golden, "plus", *start, near)


def test_a_ratio_on_a_in_the_place_of_b_is_seen(golden, bases, folder, monkeypatch):
    monkeypatch.setattr(
        AdapterLayout,
        "faster",
        property(lambda s: tuple(slice(p.a.offset, p.a.offset + p.a.size) for p in s.pairs[::-1])),
    )
    model, opt, ids, targets = start_of(bases, folder, "plus", reference, "float64", lora_plus=8.0)
    with pytest.raises(AssertionError):
        compare_steps(golden, "plus", model, opt, ids, targets, 1e-7)
    settings = SimpleNamespace(**{f.name: getattr(opt, f.name) for f in fields(opt) if f.kw_only})
    assert asked_rates(model, opt, settings)


def asked_rates(model, opt, settings):
    """Rows of gate before.settings on learning rates that are not as asked for."""
    subject = SimpleNamespace(
        optimizer=opt, adapters=model.adapters, model=model, shard=None, settings=settings
    )
    rows = _optimizer(subject, vars(settings))
    return [name for name, built, asked in rows if "learning rate" in name and built != asked]
