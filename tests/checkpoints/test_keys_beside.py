"""Keys of the files beside a tokenizer.json: as transformers 5.24 acts on them, or refused by name."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from apr.checkpoints.hf import write_hf
from apr.checkpoints.importing import import_model
from apr.checkpoints.registry import open_any
from apr.common.errors import Refused
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.tokenizer.chat_template import chat_ids
from apr.tokenizer.tokenizer import Tokenizer
from tokenizer_cases import added, fallback, gpt2_like, metaspace

CFG = replace(PRESETS["qwen3-tiny"], vocab_size=400)
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
ASK = [{"role": "user", "content": "he"}]
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


@pytest.fixture
def folder(tmp_path):
    """A model whose tokenizer has the added tokens <|endoftext|> 258 and <|x|> 259."""
    layout = Layout(CFG)
    host = np.zeros(layout.size, np.float32)
    layout.randomise(host, 3)
    path = tmp_path / "model"
    write_hf(path, CFG, {s.hf: host[s.offset : s.offset + s.size].reshape(s.shape) for s in layout.slots})
    fields = gpt2_like()
    fields["added_tokens"].append(added(259, "<|x|>"))
    (path / "tokenizer.json").write_text(json.dumps(fields))
    return path


def state(folder, name="tokenizer_config.json", **keys):
    (folder / name).write_text(json.dumps(keys))


def refused(folder, tmp_path, match):
    """However the folder is read, and nobody is kept from its weights."""
    assert len(open_any(str(folder)).tensors)
    for read in (
        lambda: open_any(str(folder)).tokenizer,
        lambda: Tokenizer.from_file(folder),
        lambda: import_model(str(folder), tmp_path / "x.apr"),
    ):
        with pytest.raises(Refused, match=match):
            read()


def test_special_tokens_that_would_be_cut_up_are_refused(folder, tmp_path):
    for value in (False, None):
        state(folder, split_special_tokens=value)
        assert Tokenizer.from_file(folder)
    state(folder, split_special_tokens=True)
    refused(folder, tmp_path, "tokenizer_config.json: split_special_tokens is set")


def test_another_file_by_the_version_of_transformers_is_refused(folder, tmp_path):
    state(folder, fast_tokenizer_files=["tokenizer.json"])
    assert Tokenizer.from_file(folder)
    state(folder, fast_tokenizer_files=["tokenizer.4.0.0.json", "tokenizer.json"])
    refused(folder, tmp_path, r"fast_tokenizer_files names 'tokenizer.4.0.0.json'")


@pytest.mark.parametrize("make", [gpt2_like, metaspace, fallback])
def test_a_space_that_one_file_puts_and_the_other_does_not_is_refused(folder, tmp_path, make):
    fields, puts = make(), make is metaspace
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    for value in (puts, None):
        state(folder, add_prefix_space=value)
        assert Tokenizer.from_file(folder)
    state(folder, add_prefix_space=not puts)
    refused(folder, tmp_path, f"add_prefix_space = {str(not puts).lower()}, but tokenizer.json puts")


def test_tokens_of_the_map_come_first_where_the_config_lists_no_added_tokens(folder, tmp_path):
    template = "{{ eos_token }}{{ sep_token }}" + PLAIN
    table = {"258": {"content": "<|endoftext|>", **FLAGS}, "259": {"content": "<|x|>", **FLAGS}}
    state(folder, eos_token="<|x|>", chat_template=template)
    state(folder, "special_tokens_map.json", eos_token="<|endoftext|>", sep_token={"content": "<|x|>"})
    checkpoint = open_any(str(folder))
    assert checkpoint.tokenizer.eos_id == Tokenizer.from_file(folder).eos_id == 258
    assert checkpoint.template().render(ASK) == "<|endoftext|><|x|>he"
    import_model(str(folder), tmp_path / "x.apr")
    imported = open_any(str(tmp_path / "x.apr"))
    assert (imported.tokenizer.eos_id, imported.template().render(ASK)) == (258, "<|endoftext|><|x|>he")
    state(folder, eos_token="<|x|>", chat_template=template, added_tokens_decoder=table)
    checkpoint = open_any(str(folder))
    assert checkpoint.tokenizer.eos_id == Tokenizer.from_file(folder).eos_id == 259
    assert checkpoint.template().render(ASK) == "<|x|>he"


def test_a_template_is_handed_all_tokens_that_the_files_name(folder):
    names = ("sep_token", "cls_token", "mask_token", "image_token", "boi", "tools")
    template = "".join(f"[{{{{ {name} or '' }}}}]" for name in names) + PLAIN
    keys = dict.fromkeys(names[:4], "<|x|>") | {"add_bos_token": True}
    state(folder, **keys, extra_special_tokens={"boi": "<|x|>", "tools": "<|x|>"}, chat_template=template)
    checkpoint = open_any(str(folder))
    assert checkpoint.template().render(ASK) == "[<|x|>]" * 5 + "[]he"
    assert chat_ids(checkpoint.template(), checkpoint.tokenizer, ASK).count(259) == 5


@pytest.mark.parametrize(
    ("keys", "template"),
    [
        ({"pad_token": "<pad>"}, PLAIN + "<pad>"),
        ({"additional_special_tokens": ["<pad>"]}, "<pad>" + PLAIN),
        ({"pad_token": "<pad>"}, PLAIN + "{{ pad_token }}"),
    ],
)
def test_a_template_that_writes_a_special_token_without_an_id_is_refused(folder, keys, template):
    """transformers makes it a new id behind the last row of the model."""
    state(folder, **keys, chat_template=template)
    checkpoint = open_any(str(folder))
    with pytest.raises(Refused, match=r"its chat template writes '<pad>', which .* tokenizer.json lacks"):
        checkpoint.template()
    state(folder, **keys, chat_template=PLAIN)
    assert open_any(str(folder)).template()


def test_flags_of_an_added_token_are_those_of_the_config(folder, tmp_path):
    listed = {"259": {"content": "<|x|>", **FLAGS, "lstrip": True}}
    state(folder, added_tokens_decoder=listed)
    found = open_any(str(folder)).tokenizer.encode_marked("he  <|x|>").tolist()
    assert found == [256, 259]
    import_model(str(folder), tmp_path / "x.apr")
    assert open_any(str(tmp_path / "x.apr")).tokenizer.encode_marked("he  <|x|>").tolist() == found
    with pytest.raises(Refused, match=r"states lstrip = true of the added token '<\|x\|>'.*import-hf"):
        Tokenizer.from_file(folder)
    listed["259"]["lstrip"] = False
    state(folder, added_tokens_decoder=listed)
    assert Tokenizer.from_file(folder).encode_marked("he  <|x|>").size > 2


def several(folder, form):
    named = {"default": "D" + PLAIN, "tool_use": "T" + PLAIN}
    if form == "object":
        state(folder, chat_template=named)
    elif form == "list":
        state(folder, chat_template=[{"name": n, "template": t} for n, t in named.items()])
    else:
        state(folder, chat_template="wrong")
        more = folder / "additional_chat_templates"
        more.mkdir()
        (more / "tool_use.jinja").write_text(named["tool_use"])
        default = folder / "chat_template.jinja" if form == "folder" else more / "default.jinja"
        default.write_text(named["default"])


@pytest.mark.parametrize("form", ["object", "list", "folder", "folder alone"])
def test_a_template_for_tools_is_not_passed_over(folder, tmp_path, form):
    several(folder, form)
    import_model(str(folder), tmp_path / "x.apr")
    for source in (folder, tmp_path / "x.apr"):
        template = open_any(str(source)).template()
        assert template.render(ASK) == template.marked(None).render(ASK) == "Dhe"
        for copied in (template, template.marked(("a", "b"))):
            with pytest.raises(Refused, match="another chat template for conversations with tools"):
                copied.render(ASK, tools=[{"type": "function"}])
    given = tmp_path / "given.jinja"
    given.write_text("G" + PLAIN)
    assert open_any(str(folder)).template(str(given)).render(ASK, tools=[{}]) == "Ghe"


def test_a_folder_of_templates_stands_for_that_of_the_config(folder):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text(PLAIN)
    state(folder, chat_template=PLAIN)
    assert open_any(str(folder)).template() is None
