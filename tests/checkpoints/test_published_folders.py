"""Habits of published folders: names without their prefix, an index with more than its shards, and what is said of the rest."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from apr.backends import reference
from apr.bisect import upload
from apr.checkpoints.hf import INDEX, SINGLE, read_safetensors, write_hf, write_safetensors
from apr.checkpoints.importing import import_model
from apr.checkpoints.registry import open_any, open_host, validate
from apr.cli.main import main
from apr.common.errors import AprError, Refused
from apr.common.finding import FAIL
from apr.inference.language_model import no_tokenizer
from apr.model.hf_config import from_hf, to_hf
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.model.rope import rope_tables
from apr.model.rope_scaling import LinearScaling
from apr.model.transformer import Model
from apr.tokenizer.tokenizer import Tokenizer
from tokenizer_cases import added, gpt2_like

CFG = PRESETS["qwen3-tiny"]


def written(cfg, folder):
    layout = Layout(cfg)
    host = np.zeros(layout.size, np.float32)
    layout.randomise(host, 3)
    tensors = {s.hf: host[s.offset : s.offset + s.size].reshape(s.shape) for s in layout.slots}
    write_hf(folder, cfg, tensors, max_shard_bytes=20_000)
    return folder


@pytest.fixture
def folder(tmp_path):
    """A tied model in two shards or more."""
    return written(CFG, tmp_path / "model")


def change_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("is_whole", [True, False], ids=["one file", "shards"])
def test_a_model_that_was_saved_without_its_head_has_the_names_of_one_with_a_head(folder, is_whole, tmp_path):
    """Qwen3-Embedding is published so, and AutoModel.save_pretrained of transformers says so in the config; transformers reads
    all of them."""
    want = open_host(str(folder)).host
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["Qwen3Model"]}
    (folder / "config.json").write_text(json.dumps(config))
    shards = sorted(folder.glob("*.safetensors"))
    files = {
        p: {k.removeprefix("model."): np.array(v) for k, v in read_safetensors(p).items()} for p in shards
    }
    for p in shards:
        p.unlink()
    if is_whole:
        (folder / INDEX).unlink()
        write_safetensors(folder / SINGLE, {k: v for tensors in files.values() for k, v in tensors.items()})
    else:
        for p, tensors in files.items():
            write_safetensors(p, tensors)
        change_index(folder, lambda names: {k.removeprefix("model."): v for k, v in names.items()})
    assert np.array_equal(open_host(str(folder)).host, want)
    assert not [row for row in validate(str(folder)).findings if row.verdict == FAIL]
    import_model(str(folder), tmp_path / "x.apr")
    assert np.array_equal(open_host(str(tmp_path / "x.apr")).host, want)
    assert main(["diff", str(folder), str(tmp_path / "x.apr")]) == 0
    assert main(["export", str(tmp_path / "x.apr"), "-o", str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["architectures"] == ["Qwen3ForCausalLM"]  # its tensors have the names of one
    assert np.array_equal(open_host(str(tmp_path / "out")).host, want)


def test_a_head_of_its_own_that_was_not_saved_is_missing(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Qwen3Model"], "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refused, match=r"missing: lm_head\.weight.*saved with it by AutoModelForCausalLM"):
        open_any(str(folder))


def test_some_names_without_the_prefix_are_no_habit_but_a_fault(folder):
    p = next(p for p in folder.glob("*.safetensors") if "model.embed_tokens.weight" in read_safetensors(p))
    tensors = {k: np.array(v) for k, v in read_safetensors(p).items()}
    tensors["embed_tokens.weight"] = tensors.pop("model.embed_tokens.weight")
    write_safetensors(p, tensors)
    change_index(folder, lambda names: {k.replace("model.embed", "embed"): v for k, v in names.items()})
    with pytest.raises(Refused, match=r"missing: model\.embed_tokens"):
        open_any(str(folder))


def test_a_table_of_frequencies_may_stand_in_the_index_alone(folder):
    first = min(p.name for p in folder.glob("*.safetensors"))
    want = open_host(str(folder)).host
    change_index(folder, lambda names: names | {"model.layers.0.self_attn.rotary_emb.inv_freq": first})
    assert np.array_equal(open_host(str(folder)).host, want)
    change_index(folder, lambda names: names | {"model.layers.0.self_attn.other": first})
    with pytest.raises(AprError, match=r"lacks 1 tensor: model\.layers\.0\.self_attn\.other"):
        open_any(str(folder))


def joined(folder):
    """All tensors of a folder in one file, without an index."""
    shards = sorted(folder.glob("*.safetensors"))
    tensors = {k: np.array(v) for p in shards for k, v in read_safetensors(p).items()}
    for p in (*shards, folder / INDEX):
        p.unlink()
    write_safetensors(folder / SINGLE, tensors)
    return tensors


def test_an_index_of_one_file_is_the_index_of_that_file(folder, tmp_path):
    """As mlx-lm writes it. One that names other files belongs to another model."""
    want = open_host(str(folder)).host
    shards = (folder / INDEX).read_text()
    tensors = joined(folder)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, SINGLE)}
    (folder / INDEX).write_text(json.dumps(index))
    assert np.array_equal(open_host(str(folder)).host, want)
    (folder / "consolidated.safetensors").write_bytes(b"not read")
    files = import_model(str(folder), tmp_path / "x.apr")["files"]
    assert [f["name"] for f in files if f["name"].endswith(".safetensors")] == [SINGLE]
    change_index(folder, lambda names: names | {"model.other": SINGLE})
    with pytest.raises(AprError, match=r"lacks 1 tensor: model\.other"):
        open_any(str(folder))
    (folder / INDEX).write_text(shards)
    with pytest.raises(Refused, match="remove the one"):
        open_any(str(folder))


def test_weights_in_other_files_are_named_with_what_to_do(folder):
    joined(folder)
    (folder / SINGLE).rename(folder / "model.fp16.safetensors")
    with pytest.raises(AprError, match=r"if model\.fp16\.safetensors holds the model, give that file$"):
        open_any(str(folder))
    assert open_any(str(folder / "model.fp16.safetensors"))
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(
        AprError, match=r"model-00001-of-00002\.safetensors is a part .*index\.json names: fetch it"
    ):
        open_any(str(folder))
    for name in ("training_args.bin", "pytorch_model-00001-of-00002.bin"):
        (folder / name).write_bytes(b"")
    with pytest.raises(
        AprError, match=r"pytorch_model-\S+ is a pickle.*from_pretrained\(FOLDER\)\.save_pretrained"
    ):
        open_any(str(folder))
    for p in folder.glob("*model*"):
        p.unlink()
    with pytest.raises(
        AprError, match=r"training_args\.bin is a pickle, .*: save the model as safetensors where"
    ):
        open_any(str(folder))


def test_weights_that_were_not_gathered_are_called_so(folder):
    tensors = {k: v for k, v in joined(folder).items() if k != "model.norm.weight"}
    write_safetensors(folder / SINGLE, tensors)
    raw = (folder / SINGLE).read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    header["model.norm.weight"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(raw) - 8 - n] * 2}
    text = json.dumps(header).encode()
    (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + n :])
    with pytest.raises(AprError, match=r"'model\.norm\.weight' has no elements, \[0\]; .*ZeRO-3"):
        open_any(str(folder))


def test_integers_are_not_a_matter_of_what_stands_beside_them(folder):
    """As bitsandbytes saves them, beside their scales: leaving out the scales helps nobody."""
    tensors = joined(folder)
    name = "model.layers.0.self_attn.q_proj.weight"
    scales = {name.replace("weight", "SCB"): np.ones(4, np.float32)}
    write_safetensors(folder / SINGLE, tensors | scales | {name: tensors[name].astype(np.int8)})
    with pytest.raises(Refused, match=r"1 unexpected: \S+SCB; 1 not floating point: .*dequantize") as e:
        open_any(str(folder))
    assert "leaves them out" not in str(e.value)


def test_tensors_of_another_head_are_named_with_what_leaves_them_out(folder):
    p = min(folder.glob("*.safetensors"))
    write_safetensors(
        p, {**{k: np.array(v) for k, v in read_safetensors(p).items()}, "score.weight": np.ones((1, 4), "f4")}
    )
    change_index(folder, lambda names: names | {"score.weight": p.name})
    with pytest.raises(Refused, match=r"1 unexpected: score\.weight \(.*AutoModelForCausalLM"):
        open_any(str(folder))


def test_a_vocabulary_that_is_not_read_is_named_with_what_converts_it(folder, tmp_path):
    assert "tokenizer.model" not in str(no_tokenizer(str(folder)))
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    assert "tokenizer.model is not read; AutoTokenizer" in str(no_tokenizer(str(folder)))
    notes = import_model(str(folder), tmp_path / "x.apr")["notes"]
    assert [n for n in notes if n.startswith("tokenizer.model is not read")]


def test_an_added_token_that_another_file_states_is_one_however_the_folder_is_opened(tmp_path):
    """transformers reads it too; the folder alone gave it other ids than its own import."""
    folder, tokenizer = written(replace(CFG, vocab_size=300), tmp_path / "model"), gpt2_like()
    text, rows = "he<think>", len(tokenizer["model"]["vocab"]) + 1
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    flags = {k: v for k, v in added(rows, "<think>").items() if k != "id"}
    for name, stated in (
        ("added_tokens.json", {"<think>": rows}),
        ("tokenizer_config.json", {"added_tokens_decoder": {str(rows): flags}}),
    ):
        (folder / name).write_text(json.dumps(stated))
        found = open_any(str(folder)).tokenizer.encode_marked(text).tolist()
        assert found[-1] == rows
        import_model(str(folder), tmp_path / "x.apr", force=True)
        assert open_any(str(tmp_path / "x.apr")).tokenizer.encode_marked(text).tolist() == found
        assert not [row for row in validate(str(folder)).findings if row.verdict == FAIL]
        with pytest.raises(
            Refused, match=rf"{name}: states the added token '<think>', .*import-hf {folder} -o"
        ):
            Tokenizer.from_file(folder)
        (folder / name).unlink()
    assert Tokenizer.from_file(folder)


def test_a_token_of_the_vocabulary_that_is_named_special_is_an_added_one(tmp_path):
    """As in transformers 5.24, where each of these gave the id of the vocabulary; a chat template writes them."""
    folder, tokenizer = written(replace(CFG, vocab_size=300), tmp_path / "model"), gpt2_like()
    tokenizer["model"]["vocab"]["<|user|>"] = user = tokenizer["added_tokens"][0]["id"]
    tokenizer["added_tokens"][0]["id"] += 1
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    flags = {"content": "<|user|>", "lstrip": True, "normalized": False}
    for name, named, is_stripped in (
        ("tokenizer_config.json", {"additional_special_tokens": ["<|user|>"], "add_bos_token": False}, False),
        ("tokenizer_config.json", {"pad_token": "<|user|>"}, False),
        ("tokenizer_config.json", {"extra_special_tokens": {"user": "<|user|>"}}, False),
        ("tokenizer_config.json", {"mask_token": flags}, True),
        ("special_tokens_map.json", {"additional_special_tokens": [flags]}, True),
    ):
        (folder / name).write_text(json.dumps(named))
        opened = open_any(str(folder)).tokenizer
        token = next(t for t in json.loads(opened.json)["added_tokens"] if t["content"] == "<|user|>")
        assert (token["id"], token["special"], token["lstrip"]) == (user, True, is_stripped)
        assert opened.encode_marked("he<|user|>").tolist()[-1] == user
        with pytest.raises(Refused, match=rf"{name}: .*'<\|user\|>', which tokenizer.json lacks"):
            Tokenizer.from_file(folder)
        (folder / name).unlink()
    assert Tokenizer.from_file(folder).encode_marked("he<|user|>").tolist()[-1] != user


def test_files_of_a_tokenizer_that_contradict_each_other_keep_nobody_from_the_weights(folder):
    (folder / "tokenizer.json").write_text(json.dumps(gpt2_like()))
    (folder / "added_tokens.json").write_text(json.dumps({"<think>": 258}))
    checkpoint = open_any(str(folder))
    assert len(checkpoint.tensors)
    with pytest.raises(Refused, match="take all files from the same model"):
        assert checkpoint.tokenizer


def test_tokens_without_a_row_are_named(folder, tmp_path):
    tokenizer = gpt2_like()
    rows = max([*tokenizer["model"]["vocab"].values(), *(t["id"] for t in tokenizer["added_tokens"])]) + 1
    tokenizer["added_tokens"].append(added(rows, "<pad>"))
    assert rows > CFG.vocab_size
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    for ask in (
        lambda: open_any(str(folder)).tokenizer,
        lambda: import_model(str(folder), tmp_path / "x.apr"),
    ):
        with pytest.raises(
            Refused,
            match=rf"{rows + 1} ids, the model {CFG.vocab_size}: no row for .*resize_token_embeddings",
        ):
            ask()


@pytest.mark.parametrize("kind", ["default", "dynamic", "linear"])
def test_a_factor_of_one_scales_nothing(kind):
    d = to_hf(PRESETS["llama-tiny"])
    assert from_hf({**d, "rope_scaling": {"rope_type": kind, "factor": 1.0}}) == from_hf(d)


def test_a_factor_of_two_without_a_kind_is_refused():
    with pytest.raises(Refused, match="default"):
        from_hf({**to_hf(PRESETS["llama-tiny"]), "rope_scaling": {"rope_type": "default", "factor": 2.0}})


def test_a_quantised_model_is_refused_with_its_method_and_what_to_try():
    quantised = {"quant_method": "gptq", "bits": 4, "modules": ["x" * 5000]}
    with pytest.raises(Refused, match=r"quant_method = 'gptq'.*dequantize\(\)") as e:
        from_hf({**to_hf(CFG), "quantization_config": quantised})
    assert len(str(e.value)) < 400


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_linear_scaling_turns_by_a_fraction_of_the_position(place, folder, tmp_path):
    """deepseek-coder, LongChat and Vicuna 16k: position t turns as position t / factor of the model as it was."""
    d = to_hf(CFG)
    scaling = {"type": "linear", "factor": 4.0} | (
        {"rope_theta": d["rope_theta"]} if place != "rope_scaling" else {}
    )
    d = {k: v for k, v in d.items() if k != "rope_theta" or place == "rope_scaling"} | {place: scaling}
    cfg = from_hf(d)
    assert cfg.rope_scaling == LinearScaling(4.0)
    assert from_hf(to_hf(cfg)) == cfg
    for scaled, plain in zip(rope_tables(cfg, 61), rope_tables(CFG, 16), strict=True):
        assert np.allclose(scaled[::4], plain, rtol=0, atol=1e-12)
        assert np.abs(scaled[:16] - plain).max() > 0.5
    model = Model(cfg, reference, 1, 32, "float64")
    assert [row.ok for row in upload.tables(model)] == [True, True]
    for table, values in zip((model.cos, model.sin), rope_tables(CFG, 32), strict=True):
        reference.from_host(table, values)
    assert [row.ok for row in upload.tables(model)] == [False, False]

    (folder / "config.json").write_text(json.dumps(d))
    import_model(str(folder), tmp_path / "x.apr")
    assert open_any(str(tmp_path / "x.apr")).cfg == cfg
    assert main(["export", str(tmp_path / "x.apr"), "--format", "hf", "-o", str(tmp_path / "out")]) == 0
    assert open_any(str(tmp_path / "out")).cfg == cfg
