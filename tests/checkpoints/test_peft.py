"""Adapters against PEFT: what it computes with its own, with ours, its gradients and its steps; and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from types import SimpleNamespace

import ml_dtypes  # noqa: F401
import numpy as np
import pytest

from apr import backends
from apr.backends import reference
from apr.checkpoints.checkpoint import fill
from apr.checkpoints.hf import read_safetensors, write_safetensors
from apr.checkpoints.peft import WEIGHTS, Delta, adapter_start, add_adapter, read_adapter
from apr.checkpoints.peft_config import CONFIG
from apr.checkpoints.peft_write import write_adapter
from apr.checkpoints.registry import open_any
from apr.cli.main import main
from apr.common.errors import InputNotFound, MalformedFile, Refused
from apr.evidence.adapters import base_unchanged, checkpoint_merge_error, merged_error
from apr.model.optim import AdamW
from apr.model.params import Layout
from apr.model.taps import Record
from apr.model.transformer import Model
from finetune_cases import our_adapter
from peft_cases import GOLDEN, bases, change, logits, metadata_of, put_adapter  # noqa: F401

BASES = {
    "plain": "llama",
    "two": "qwen2",
    "rslora": "qwen3",
    "patterns": "llama",
    "some-layers": "mistral",
    "head": "qwen2-untied",
    "train": "qwen2",
}
METADATA = metadata_of(GOLDEN / "peft" / "peft.safetensors")


@pytest.fixture(scope="module")
def golden():
    return read_safetensors(GOLDEN / "peft" / "peft.safetensors")


@pytest.mark.parametrize("case", BASES)
def test_merged_is_what_peft_computes(golden, bases, tmp_path, case):
    base, ids, _ = bases(BASES[case])
    adapter, out = put_adapter(golden, case, tmp_path / "adapter", METADATA), tmp_path / "merged.apr"
    assert main(["merge", str(base), str(adapter), "-o", str(out)]) == 0
    merged = open_any(str(out))
    host = np.zeros(Layout(merged.cfg).size, np.float32)
    fill(Layout(merged.cfg), host, merged)
    ids = ids[:1]
    got, want = logits(merged.cfg, host, ids), np.asarray(golden[f"{case}.logits"])
    assert np.abs(got - want).max() <= 2e-6 * np.abs(want).max()  # the merged weights are rounded to float32
    untouched = np.zeros_like(host)
    fill(Layout(merged.cfg), untouched, open_any(str(base)))
    assert np.abs(logits(merged.cfg, untouched, ids) - want).max() > 1e-3 * np.abs(want).max()


def test_an_adapter_of_ours_is_what_peft_opened(golden, bases, tmp_path):
    base, ids, _ = bases("qwen2")
    layout, _ = our_adapter(tmp_path / "adapter", (base / "config.json").read_text())
    files = [tmp_path / "adapter" / name for name in (CONFIG, WEIGHTS)]
    assert " ".join(hashlib.sha256(p.read_bytes()).hexdigest() for p in files) == METADATA["ours.sha256"]
    host = np.zeros(Layout(layout.cfg).size, np.float64)
    fill(Layout(layout.cfg), host, open_any(str(base)))
    add_adapter(Layout(layout.cfg), host, read_adapter(str(tmp_path / "adapter"), layout.cfg))
    want = np.asarray(golden["ours.logits"])
    assert np.abs(logits(layout.cfg, host, ids[:1]) - want).max() <= 1e-9 * np.abs(want).max()


@pytest.mark.parametrize("case", ["rslora", "patterns"])
def test_scales_and_ranks_by_pattern_are_those_of_peft(golden, bases, tmp_path, case):
    """Adapters to go on training with compute what PEFT computed, and are written with the numbers that PEFT wrote."""
    base, ids, _ = bases(BASES[case])
    loaded = open_any(str(base))
    adapter = read_adapter(str(put_adapter(golden, case, tmp_path / "adapter", METADATA)), loaded.cfg)
    ids = ids[:1]
    model = Model(
        loaded.cfg, reference, *ids.shape, "float64", loss_rows=ids.size, lora=adapter.lora_config(loaded.cfg)
    )
    host = np.zeros(model.layout.size)
    fill(model.layout, host, loaded)
    model.adapters.set_base(model.layout.named(host).__getitem__)
    flat = adapter_start(model.adapters.layout, adapter)
    AdamW.of(model.adapters).set_weights(flat.astype(np.float64))
    tap = Record(reference)
    model.forward(ids)
    model.loss(np.zeros_like(ids), tap=tap)
    want = np.asarray(golden[f"{case}.logits"])
    assert np.abs(tap.seen["logits"].reshape(want.shape) - want).max() <= 1e-9 * np.abs(want).max()
    write_adapter(tmp_path / "ours", model.adapters.layout, flat, "base")
    theirs, ours = (json.loads((tmp_path / x / CONFIG).read_text()) for x in ("adapter", "ours"))
    for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        assert ours[key] == theirs[key], key
    again = read_adapter(str(tmp_path / "ours"), loaded.cfg)
    assert again.sha256 == adapter.sha256


def start_of(golden, bases, tmp_path, be, dtype):
    """The adapters of the case "train" on a model, ids and targets."""
    base, ids, targets = bases("qwen2")
    loaded = open_any(str(base))
    adapter = read_adapter(str(put_adapter(golden, "train", tmp_path / "adapter", METADATA)), loaded.cfg)
    model = Model(loaded.cfg, be, *ids.shape, dtype, lora=adapter.lora_config(loaded.cfg))
    adapters = model.adapters
    host = np.zeros(model.layout.size, dtype)
    fill(model.layout, host, loaded)
    adapters.set_base(model.layout.named(host).__getitem__)
    opt = AdamW.of(
        adapters,
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
        weight_decay=0.1,
        grad_clip=1.0,
    )
    opt.set_weights(adapter_start(adapters.layout, adapter).astype(dtype))
    return model, adapters, opt, ids, targets


@pytest.mark.parametrize(
    ("backend", "dtype", "near"), [("reference", "float64", 1e-9), ("cpu", "float32", 2e-4)]
)
def test_gradients_and_steps_are_those_of_torch_through_peft(golden, bases, tmp_path, backend, dtype, near):
    be = backends.get(backend)
    model, adapters, opt, ids, targets = start_of(golden, bases, tmp_path, be, dtype)
    count = int((targets >= 0).sum())
    for step, want in enumerate(np.asarray(golden["train.losses"])):
        be.fill(model.total, 0)
        model.micro_step(ids, targets, 1 / count)
        assert abs(float(be.to_host(model.total)[0]) / count - want) <= near * want
        if step == 0:
            for name, got in adapters.layout.named(be.to_host(adapters.g)).items():
                grad = np.asarray(golden[f"train.grad.{name}"])
                assert np.abs(got - grad).max() <= 10 * near * np.abs(grad).max(), name
        opt.step(1e-2)
    for name, got in adapters.layout.named(be.to_host(adapters.w)).items():
        after = np.asarray(golden[f"train.after.{name}"])
        assert np.abs(got - after).max() <= (1e-8 if dtype == "float64" else 1e-3) * np.abs(after).max(), name
    assert base_unchanged(adapters).passed


def test_a_wrong_scale_is_seen(golden, bases, tmp_path, monkeypatch):
    from apr.checkpoints import peft

    right = peft._delta
    monkeypatch.setattr(peft, "_delta", lambda *a: peft.Delta((d := right(*a)).a, d.b, 1.01 * d.scale))
    with pytest.raises(AssertionError):
        test_merged_is_what_peft_computes(golden, bases, tmp_path, "plain")


@pytest.mark.parametrize(
    ("keys", "kind", "said"),
    [
        ({"use_dora": True}, MalformedFile, "use_dora"),
        ({"bias": "all"}, Refused, "bias = 'all'"),
        ({"modules_to_save": ["lm_head"]}, MalformedFile, "modules_to_save"),
        (
            {"alpha": 8, "peft_type": "LOHA"},
            Refused,
            "peft_type = 'LOHA'; apr merges LORA only. PEFT's merge_and",
        ),
        (
            {"alpha": 8, "peft_type": "PREFIX_TUNING"},
            Refused,
            "peft_type = 'PREFIX_TUNING'; apr merges LORA only. Its",
        ),
        ({"lora_bias": True}, Refused, "lora_bias"),
        ({"fan_in_fan_out": True}, Refused, "fan_in_fan_out"),
        ({"layer_replication": [[0, 2], [1, 3]]}, Refused, "layer_replication"),
        ({"init_lora_weights": "pissa"}, Refused, "init_lora_weights"),
        ({"something_new": 3}, Refused, "something_new"),
        ({"r": 5}, Refused, "rank 5"),
        ({"r": "4"}, MalformedFile, "r = '4'"),
        ({"lora_alpha": 0}, MalformedFile, "lora_alpha"),
        ({"rank_pattern": {"q_proj": 3}}, Refused, "q_proj"),
        (
            {"rank_pattern": {"(": 3}},
            MalformedFile,
            "adapter_config.json: rank_pattern: '(' is not a regular expression",
        ),
        ({"alpha_pattern": {"(([a-z._0-9])+)+X": 3}}, MalformedFile, "could take hours"),
        ({"rank_pattern": {str(i): 3 for i in range(5000)}}, Refused, "5000 patterns"),
        ({"trainable_token_indices": [1, 2]}, Refused, "merge_and_unload"),
        ({"alpha_pattern": [1]}, MalformedFile, "alpha_pattern"),
        ({"alpha_pattern": {"q_proj": "x"}}, MalformedFile, "'q_proj' = 'x' is not a number"),
        ({"rank_pattern": {"none": None}}, MalformedFile, "'none' = None is not a number"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(golden, bases, tmp_path, keys, kind, said):
    folder = put_adapter(golden, "plain", tmp_path / "adapter", METADATA)
    cfg = open_any(str(bases("llama")[0])).cfg
    read_adapter(str(folder), cfg)
    change(folder, **keys)
    with pytest.raises(kind, match="(?s)" + ".*") as e:
        read_adapter(str(folder), cfg)
    assert said in str(e.value)


def test_folders_that_are_no_adapter(golden, bases, tmp_path):
    cfg = open_any(str(bases("llama")[0])).cfg
    with pytest.raises(InputNotFound, match=CONFIG):
        read_adapter(str(tmp_path), cfg)
    folder = put_adapter(golden, "plain", tmp_path / "adapter", METADATA)
    whole = dict(read_safetensors(folder / WEIGHTS).items())
    whole = {k: np.array(v) for k, v in whole.items()}
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(InputNotFound, match="pickle"):
        read_adapter(str(folder), cfg)
    (folder / "adapter_model.bin").unlink()
    first, square = next(iter(whole)), np.ones((4, 4), np.float32)
    for tensors, kind, said in (
        ({k: v for k, v in whole.items() if k != first}, MalformedFile, "only"),
        ({**whole, "base_model.model.model.embed_tokens.lora_embedding_A": square}, MalformedFile, "embed"),
        ({**whole, "base_model.model.lm_head.weight": square}, Refused, "lm_head"),
        ({**whole, "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": square}, Refused, "layers.9"),
        ({**whole, first: whole[first].astype(np.int32)}, Refused, "int32, not floating point"),
        ({**whole, first.replace(".weight", ".default.weight"): whole[first]}, MalformedFile, "two tensors"),
    ):  # fmt: skip
        write_safetensors(folder / WEIGHTS, tensors)
        with pytest.raises(kind) as e:
            read_adapter(str(folder), cfg)
        assert said in str(e.value)
    other = open_any(str(bases("qwen3")[0])).cfg
    write_safetensors(folder / WEIGHTS, whole)
    with pytest.raises(Refused, match="another model"):
        read_adapter(str(folder), other)


def test_an_adapter_that_differs_between_layers_is_merged_but_not_gone_on_with(golden, bases, tmp_path):
    cfg = open_any(str(bases("mistral")[0])).cfg
    adapter = read_adapter(str(put_adapter(golden, "some-layers", tmp_path / "adapter", METADATA)), cfg)
    with pytest.raises(Refused, match="apr merge"):
        adapter.lora_config(cfg)


def test_a_pattern_that_matches_nothing_counts_for_nothing(golden, bases, tmp_path, capsys):
    base, _, _ = bases("qwen2")
    cfg, folder = open_any(str(base)).cfg, put_adapter(golden, "train", tmp_path / "adapter", METADATA)
    plain = read_adapter(str(folder), cfg)
    assert plain.note == ""
    want = plain.lora_config(cfg)
    change(folder, alpha_pattern={"embed_tokens": 64, "proj": 7}, rank_pattern={"lm_head": 9})
    found = read_adapter(str(folder), cfg)
    assert found.lora_config(cfg) == want
    assert found.sha256 == plain.sha256
    for idle in ("alpha_pattern 'embed_tokens'", "alpha_pattern 'proj'", "rank_pattern 'lm_head'"):
        assert idle in found.note
    assert main(["merge", str(base), str(folder), "-o", str(tmp_path / "m.apr")]) == 0
    assert "note: " + found.note in capsys.readouterr().err
    change(folder, alpha_pattern={"embed_tokens": 64, ".*_proj": 7}, rank_pattern={})
    found = read_adapter(str(folder), cfg)
    assert found.lora_config(cfg).alpha == 7
    assert "_proj" not in found.note


def test_a_whole_matrix_is_there_once(golden, bases, tmp_path):
    base, folder = bases("qwen2-untied")[0], put_adapter(golden, "plain", tmp_path / "adapter", METADATA)
    tensors = {k: np.array(v) for k, v in read_safetensors(folder / WEIGHTS).items()}
    cfg, head = open_any(str(base)).cfg, np.array(open_any(str(base)).tensors["lm_head.weight"])
    change(folder, modules_to_save=["lm_head"])
    tensors["base_model.model.lm_head.weight"] = head
    tensors |= {"lm_head.weight": head + 1}
    write_safetensors(folder / WEIGHTS, tensors)
    with pytest.raises(
        MalformedFile, match=r"lm_head\.weight is there twice, once as .*save the adapter again"
    ):
        read_adapter(str(folder), cfg)


def test_an_adapted_head_as_peft_saves_it(golden, bases, tmp_path):
    """save_embedding_layers="auto" stores the untouched matrix of the head beside A and B, True that of the embedding."""
    base, _, _ = bases("qwen2-untied")
    loaded = open_any(str(base))
    folder = put_adapter(golden, "head", tmp_path / "adapter", METADATA)
    want = read_adapter(str(folder), loaded.cfg).sha256
    whole = {k: np.array(v) for k, v in read_safetensors(folder / WEIGHTS).items()}
    tensors = {k: np.array(v) for k, v in loaded.tensors.items()}
    head, embedding = tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
    key, prefix = "base_model.model.lm_head.base_layer.weight", "base_model.model."
    rounded = head.astype(np.float16)
    for more in ({key: head}, {key: rounded}, {key: head, f"{prefix}model.embed_tokens.weight": embedding}):
        write_safetensors(folder / WEIGHTS, whole)
        assert main(["merge", str(base), str(folder), "-o", str(tmp_path / "m.apr"), "--force"]) == 0
        merged = open_any(str(tmp_path / "m.apr")).sha256
        safetensors_file(folder / WEIGHTS, {**whole, **more})
        assert read_adapter(str(folder), loaded.cfg, loaded.tensors).sha256 == want
        assert main(["merge", str(base), str(folder), "-o", str(tmp_path / "m.apr"), "--force"]) == 0
        assert open_any(str(tmp_path / "m.apr")).sha256 == merged
    other = head.copy()
    other[3, 4] += 0.01
    for trained in (
        {key: other},
        {key: other.astype(np.float16)},
        {f"{prefix}lm_head.weight": embedding[:, ::-1].copy()},
    ):
        safetensors_file(folder / WEIGHTS, {**whole, **trained})
        with pytest.raises(Refused, match=r"lm_head.*differs from lm_head\.weight of the base"):
            read_adapter(str(folder), loaded.cfg, loaded.tensors)
    safetensors_file(folder / WEIGHTS, {**whole, f"{prefix}model.layers.9.mlp.up_proj.weight": head})
    with pytest.raises(Refused, match="no A or B"):
        read_adapter(str(folder), loaded.cfg, loaded.tensors)


def safetensors_file(path, tensors):
    """Write arrays in their own dtypes."""
    header, at, kinds = {}, 0, {"float32": "F32", "float16": "F16"}
    for name, x in tensors.items():
        header[name] = {
            "dtype": kinds[x.dtype.name],
            "shape": list(x.shape),
            "data_offsets": [at, at + x.nbytes],
        }
        at += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(x.tobytes() for x in tensors.values()))


def test_merge_says_what_it_did_and_writes_over_nothing(golden, bases, tmp_path, capsys):
    base, _, _ = bases("llama")
    adapter, out = put_adapter(golden, "plain", tmp_path / "adapter", METADATA), tmp_path / "m.apr"
    assert main(["merge", str(base), str(adapter), "-o", str(out), "--json", "--dtype", "bfloat16"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["matrices"], said["ranks"], said["dtype"]) == (14, [4], "bfloat16")
    assert said["sha256"] == open_any(str(out)).sha256
    assert main(["merge", str(base), str(adapter), "-o", str(out)]) == 5
    assert "--force" in capsys.readouterr().err
    assert main(["merge", str(base), str(adapter), "-o", str(out), "--force"]) == 0
    assert main(["merge", str(base), str(adapter), "-o", str(tmp_path / "folder")]) == 2
    assert main(["merge", str(base), str(adapter)]) == 2


@pytest.mark.parametrize("case", BASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merge_is_summed_again(golden, bases, tmp_path, monkeypatch, case, dtype):
    """Sound merges pass; without the scale, or with A of another matrix, nothing is written."""
    base, _, _ = bases(BASES[case])
    adapter, out = put_adapter(golden, case, tmp_path / "adapter", METADATA), tmp_path / "m.apr"
    command = ["merge", str(base), str(adapter), "-o", str(out), "--dtype", dtype, "--force"]
    assert main(command) == 0
    right = Delta.added
    monkeypatch.setattr(Delta, "added", lambda d, w: right(dataclasses.replace(d, scale=0.9 * d.scale), w))
    assert main(command) != 0
    assert not out.exists()


def test_the_error_of_a_merge_is_seen(golden, bases, tmp_path):
    base, _, _ = bases("llama")
    folder, out = put_adapter(golden, "plain", tmp_path / "adapter", METADATA), tmp_path / "m.apr"
    main(["merge", str(base), str(folder), "-o", str(out)])
    loaded, merged = open_any(str(base)), open_any(str(out))
    adapter = read_adapter(str(folder), loaded.cfg)
    assert checkpoint_merge_error(loaded, adapter, merged, "float32")[0] <= 1
    change(folder, lora_alpha=9)
    assert checkpoint_merge_error(loaded, read_adapter(str(folder), loaded.cfg), merged, "float32")[0] > 1
    assert checkpoint_merge_error(merged, adapter, merged, "float32")[0] > 1


def test_tensors_without_a_and_b_are_those_of_the_adapter_or_of_the_base():
    rng = np.random.default_rng(0)
    norm, matrix, other = (rng.normal(size=n).astype(np.float32) for n in ((8,), (6, 8), (8,)))
    before = {"model.norm.weight": norm, "model.layers.0.mlp.up_proj.weight": matrix}
    adapter = SimpleNamespace(deltas={}, saved={"model.norm.weight": other})
    for kind in ("float32", "bfloat16"):
        right = {name: x.astype(kind) for name, x in (before | adapter.saved).items()}
        assert merged_error(before, adapter, right, kind)[0] == 0
        left = right | {"model.norm.weight": norm.astype(kind)}
        assert merged_error(before, adapter, left, kind) == (np.inf, "model.norm.weight")
        changed = right | {"model.layers.0.mlp.up_proj.weight": (1.01 * matrix).astype(kind)}
        assert merged_error(before, adapter, changed, kind)[0] == np.inf
