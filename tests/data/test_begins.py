"""The beginning of a text: ids that a tokenizer puts there stand before documents, prompts, scored texts and contexts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from apr.common.errors import MalformedFile, UsageError
from apr.data.conversations.packed import PackedShards
from apr.data.conversations.prepare import prepare_conversations
from apr.data.conversations.render import Encoder
from apr.data.conversations.shapes import example_of
from apr.data.encode import encode_corpus
from apr.data.guards import round_trip
from apr.data.prepare import prepare
from apr.data.repair import repair_manifest
from apr.data.settings import DataSettings, check_data
from apr.data.shards import TokenShards
from apr.evaluation.choices import encode_pair
from apr.evaluation.loss import text_windows
from apr.evaluation.score import prefix_ids
from apr.inference.language_model import LanguageModel
from apr.tokenizer.chat_template import ChatTemplate, chat_ids
from apr.tokenizer.families import FAMILIES
from apr.tokenizer.tokenizer import Tokenizer
from data_cases import Memory, corpus, edit_json
from tokenizer_cases import added, fallback, gpt2_like

TEMPLATE = "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"


def begin_with(token: str, i: int) -> dict[str, Any]:
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]}},
    }


def made(kind: str) -> Tokenizer:
    """A small tokenizer: byte-level as Llama 3's, pieces as Gemma's, byte-level as Qwen's, which puts nothing before a text."""
    if kind == "gemma":
        d = fallback(tuple(chr(97 + i) for i in range(2, 26)))
        n = len(d["model"]["vocab"])
        d["added_tokens"] = [added(n, "<s>"), added(n + 1, "</s>")]
        d["post_processor"] = begin_with("<s>", n)
        return Tokenizer.from_json(json.dumps(d), kind, "</s>")
    d = gpt2_like()
    d["added_tokens"] = [added(258, "</s>"), added(259, "<s>")]
    if kind == "llama3":
        steps = FAMILIES["llama3"].steps["post_processor"]["processors"]
        d["post_processor"] = {"type": "Sequence", "processors": [steps[0], begin_with("<s>", 259)]}
    return Tokenizer.from_json(json.dumps(d), kind, "</s>")


@pytest.fixture(params=["llama3", "gemma", "qwen"])
def tok(request: pytest.FixtureRequest) -> Tokenizer:
    return made(request.param)


def begins(tok: Tokenizer) -> list[int]:
    return [] if tok.source == "qwen" else [i for i, t in tok.special_tokens().items() if t == "<s>"]


def documents(array: np.ndarray, eos: int) -> list[list[int]]:
    parts = np.split(array, np.flatnonzero(array == eos) + 1)
    return [p[:-1].tolist() for p in parts if p.size]


def encoded(tok: Tokenizer, folder: Path, **options: Any) -> TokenShards:
    encode_corpus(Memory(corpus(12)), tok, folder, val_fraction=0, **options)
    return TokenShards(folder / "train", tok)


def test_one_text_begins_alike_wherever_it_is_read(tok: Tokenizer, tmp_path: Path) -> None:
    """A document that is trained on, a prompt, a text that is scored, a context: the same ids."""
    text = "def f(x): return alpha"
    want = [*begins(tok), *tok.encode(text).tolist()]
    assert tok.encode_text(text) == want
    # As transformers encodes a text.
    assert tok.encode(text, add_special_tokens=True).tolist() == want
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}) + "\n")
    encode_corpus(Memory(corpus(3)), tok, tmp_path / "s", val_fraction=0)
    shard = documents(TokenShards(tmp_path / "s" / "train").arrays[0], int(tok.eos_id or 0))
    assert shard == [tok.encode_text(d.text) for d in corpus(3)]
    for name in ("a.txt", "b.jsonl"):
        windows = text_windows(str(tmp_path / name), tok, 512, 512, None, "auto", "text").windows()
        assert next(windows)[0].ids.tolist() == want
    model = SimpleNamespace(tokenizer=tok)
    assert LanguageModel.encode_prompt(model, text) == want  # type: ignore[arg-type]
    assert encode_pair(tok, text, " beta", prefix_ids(tok, "auto"))[0] == want
    pair = example_of("x:1", {"prompt": text, "response": " beta"})
    ((e,),) = Encoder(tok)([pair])
    assert e.ids[: len(want)].tolist() == want
    assert not e.trained[: len(want)].any()
    assert e.ids[-1] == tok.eos_id
    ((plain,),) = Encoder(tok, bos="none")([pair])
    assert plain.ids.tolist() == e.ids[len(begins(tok)) :].tolist()
    assert plain.answer_bytes == e.answer_bytes


def test_a_chat_template_says_itself_what_begins_a_conversation(tok: Tokenizer) -> None:
    """As apply_chat_template of transformers: nothing comes before what the template writes."""
    template = ChatTemplate(TEMPLATE, "test")
    ids = chat_ids(template, tok, [{"role": "user", "content": "alpha"}])
    assert (
        ids.count(tok.special_tokens() and next(i for i, t in tok.special_tokens().items() if t == "<s>"))
        == 1
    )
    pair = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    ((e,),) = Encoder(tok, template)([example_of("x:1", pair)])
    assert (e.ids == ids[0]).sum() == 2


def test_a_window_inside_a_text_begins_with_the_text(tok: Tokenizer, tmp_path: Path) -> None:
    """As in training, where windows are cut anywhere, and as the harness's rolling windows."""
    text = corpus(20)[-1].text
    (tmp_path / "a.txt").write_text(text)
    windows = [
        w for w, _ in text_windows(str(tmp_path / "a.txt"), tok, 16, 16, None, "auto", "text").windows()
    ]
    ids = tok.encode_text(text)
    assert len(windows) > 3
    for k, w in enumerate(windows):
        assert w.ids.tolist() == ids[16 * k : 16 * k + len(w.ids)]


def test_shards_hold_it_and_say_so(tok: Tokenizer, tmp_path: Path) -> None:
    shards = encoded(tok, tmp_path / "auto")
    assert list(shards.prefix_ids) == begins(tok)
    rows = documents(shards.arrays[0], int(tok.eos_id or 0))
    assert rows == [[*begins(tok), *tok.encode(d.text).tolist()] for d in corpus(12)]
    assert round_trip(shards, tok).passed
    plain = encoded(tok, tmp_path / "none", bos="none")
    assert plain.prefix_ids == ()
    assert documents(plain.arrays[0], int(tok.eos_id or 0)) == [r[len(begins(tok)) :] for r in rows]
    assert round_trip(plain, tok).passed
    assert (shards.sha256 == plain.sha256) == (not begins(tok))


def test_the_same_bytes_after_a_stop(tok: Tokenizer, tmp_path: Path) -> None:
    want = encoded(tok, tmp_path / "whole", shard_tokens=300)

    class Stopping(Memory):
        def __iter__(self) -> Any:
            for n, item in enumerate(self.items):
                if n == 9:
                    raise KeyboardInterrupt
                yield item

    with pytest.raises(KeyboardInterrupt):
        encode_corpus(Stopping(corpus(12)), tok, tmp_path / "cut", val_fraction=0, shard_tokens=300)
    got = encoded(tok, tmp_path / "cut", shard_tokens=300, resume=True)
    assert got.sha256 == want.sha256


@pytest.mark.parametrize("kind", ["llama3", "gemma"])
def test_shards_that_say_so_and_do_not_are_found(kind: str, tmp_path: Path) -> None:
    tok = made(kind)
    shards = encoded(tok, tmp_path, bos="none")
    edit_json(tmp_path / "train/manifest.json", made={"bos_ids": begins(tok)})
    shards = TokenShards(tmp_path / "train", tok)
    assert not round_trip(shards, tok).passed
    for wrong in (3, ["a"], [-1], [10**9]):
        edit_json(tmp_path / "train/manifest.json", made={"bos_ids": wrong})
        with pytest.raises(MalformedFile, match="bos_ids"):
            TokenShards(tmp_path / "train", tok)


def test_a_repaired_manifest_says_so_too(tok: Tokenizer, tmp_path: Path) -> None:
    for bos in ("auto", "none"):
        was = encoded(tok, tmp_path / bos, bos=bos, shard_tokens=300)
        (tmp_path / bos / "train/manifest.json").unlink()
        repair_manifest(tmp_path / bos / "train", tok)
        assert TokenShards(tmp_path / bos / "train", tok).prefix_ids == was.prefix_ids


def test_caches_are_others_only_where_their_content_is(tok: Tokenizer, tmp_path: Path) -> None:
    def key(**more: Any) -> str:
        return prepare(
            Memory(corpus(12)), tmp_path / "c", tokenizer=tok, val_fraction=0.3, in_cache=True, **more
        ).key

    assert (key() == key(bos="none")) == (not begins(tok))
    pairs = [{"prompt": f"ask {i}", "response": "say"} for i in range(9)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))

    def folder(template: ChatTemplate | None, bos: str) -> Path:
        path, root = str(tmp_path / "p.jsonl"), tmp_path / "i"
        return prepare_conversations(path, root, tok, template, 64, 0.3, None, bos).folder

    assert (folder(None, "auto") == folder(None, "none")) == (not begins(tok))
    for row in PackedShards(folder(None, "auto") / "train", tok).examples([0]):
        assert row[: len(begins(tok))].tolist() == begins(tok)
    chat = ChatTemplate(TEMPLATE, "test")
    assert folder(chat, "auto") == folder(chat, "none")


def test_bos_is_no_option_of_shards() -> None:
    with pytest.raises(UsageError, match="--bos goes with"):
        check_data(DataSettings(dataset="d", bos="none"))
    check_data(DataSettings(dataset="d"))
    check_data(DataSettings(corpus="d", bos="none"))
