"""Instruction data: which tokens are answers, how examples are packed, and that nothing of it shows in the loss."""

from __future__ import annotations

import dataclasses
import fcntl
import gzip
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import zstandard

from apr.api import load
from apr.backends import reference
from apr.checkpoints.apr2 import read_apr
from apr.checkpoints.checkpoint import fill
from apr.checkpoints.exporting import export_gguf, export_hf
from apr.checkpoints.gguf_reader import read_gguf
from apr.checkpoints.hf import write_hf, write_safetensors
from apr.checkpoints.importing import import_model
from apr.checkpoints.registry import open_any
from apr.cli.main import main
from apr.common.errors import MalformedFile, Refused
from apr.common.finding import SKIPPED
from apr.data.audit import Split, audit
from apr.data.batches import IGNORED, Batches, Windows
from apr.data.conversations import prepare
from apr.data.conversations.pack import best_fit, fit
from apr.data.conversations.packed import PackedShards, guard_answers, guard_examples, guard_packed
from apr.data.conversations.prepare import prepare_conversations
from apr.data.conversations.render import EncodedExample, Encoder
from apr.data.conversations.shapes import example_of
from apr.data.open import windows_of
from apr.data.settings import DataSettings
from apr.data.source import Skipped, Unusable
from apr.evidence.before import tokens
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.model.transformer import Model
from apr.tokenizer.chat_template import ChatTemplate
from apr.tokenizer.tokenizer import Tokenizer
from apr.training.evaluate import evaluate
from apr.training.inputs import open_inputs
from apr.training.settings import Settings
from data_cases import windows_of as text_windows
from finetune_cases import CONVERSATIONS, MARKED, OWN_TEMPLATE, llama_tokenizer, own_tokenizer

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/instruct.json").read_text())["cases"]
VOCAB = 320


def own():
    return Tokenizer.from_json(own_tokenizer(), "own", "<|endoftext|>")


def template(text=OWN_TEMPLATE, bos="<|bos|>"):
    return ChatTemplate(text, "test", {"bos_token": bos} if bos else {})


def marked(name, text):
    for old, new in MARKED[name]:
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


def encoded(encoder, conversations=CONVERSATIONS):
    """One text of each conversation, or why it is left out."""
    got = encoder([example_of(f"test:{i}", {"messages": c}) for i, c in enumerate(conversations)])
    assert all(isinstance(e, Skipped) or len(e) == 1 for e in got)
    return [e if isinstance(e, Skipped) else e[0] for e in got]


def labels(e):
    return np.where(e.trained, e.ids.astype(np.int64), IGNORED).tolist()


def same(encoder, case):
    for got, want in zip(encoded(encoder), GOLDEN[case], strict=True):
        assert got.ids.tolist() == want["ids"]
        assert labels(got) == want["labels"]


# Which tokens are answers


@pytest.mark.parametrize("blocks", [False, True])
def test_our_own_template_gives_the_labels_of_transformers(blocks):
    same(Encoder(own(), template(marked("own", OWN_TEMPLATE) if blocks else OWN_TEMPLATE)), "own")


@pytest.fixture(scope="module")
def real(data):
    """(encoder, template text) of a real model's template."""
    folder, qwen = (
        data("chat-templates"),
        (data("qwen2-tokenizer") / "tokenizer.json").read_text(encoding="utf-8"),
    )
    files = {"qwen2.5": "Qwen-Qwen2.5-7B-Instruct.jinja", "llama3": "meta-llama-Llama-3.1-8B-Instruct.jinja"}
    made = {}

    def get(name):
        if name not in made:
            text = qwen if name == "qwen2.5" else llama_tokenizer(qwen)
            made[name] = Tokenizer.from_json(text, name), (folder / files[name]).read_text(encoding="utf-8")
        return made[name]

    return get


@pytest.mark.parametrize("name", ["qwen2.5", "llama3"])
@pytest.mark.parametrize("blocks", [False, True])
def test_real_templates_give_the_labels_of_transformers(real, name, blocks):
    tokenizer, text = real(name)
    bos = None if name == "qwen2.5" else "<|begin_of_text|>"
    same(Encoder(tokenizer, template(marked(name, text) if blocks else text, bos)), name)


@pytest.mark.parametrize("name", ["qwen2.5", "llama3"])
def test_the_labels_of_trl_differ_by_newlines_only(real, name):
    """TRL's templates for training: Llama's has the same labels (behind a system turn that 3.1 always writes), Qwen's also the
    newline of the generation prompt and the one behind <|im_end|>, which is never generated."""
    tokenizer, _ = real(name)
    newline = int(tokenizer.encode("\n")[0])
    end = next((i for i, text in tokenizer.special_tokens().items() if text == "<|im_end|>"), -1)
    for ours, trl in zip(GOLDEN[name], GOLDEN[f"{name}-trl"], strict=True):
        a, b = ([i for i in row["labels"] if i >= 0] for row in (ours, trl))
        if name == "llama3":
            assert a == b
            continue
        turns = a.count(end)
        assert turns
        assert len(b) == len(a) + 2 * turns
        assert b.count(newline) == a.count(newline) + 2 * turns
        rest = iter(b)
        assert all(i in rest for i in a)  # in this order


def test_a_prompt_and_its_response_without_a_template():
    encoder = Encoder(own())
    ((e,),) = encoder([example_of("x:1", {"prompt": "the answer:", "response": " then"})])
    text = own()
    assert text.decode(e.ids) == "the answer: then<|endoftext|>"
    assert text.decode(e.ids[e.trained]) == " then<|endoftext|>"
    assert e.answer_bytes == len(" then")


@pytest.mark.parametrize(
    ("record", "asked"),
    [
        ({"prompt": "a b", "completion": "c"}, "a b"),
        ({"instruction": "a", "output": "c"}, "a"),
        ({"instruction": "a", "input": "b", "output": "c"}, "a\n\nb"),
    ],
)
def test_pairs_become_conversations_where_there_is_a_template(record, asked):
    ((e,),) = Encoder(own(), template())([example_of("x:1", record)])
    assert own().decode(e.ids) == f"<|bos|><|user|>\n{asked}<|end|>\n<|assistant|>\nc<|end|>\n"
    assert own().decode(e.ids[e.trained]) == "c<|end|>"


def test_alpaca_without_a_template_has_its_own_prompt():
    e = example_of("x:1", {"instruction": "Add.", "input": "1 2", "output": "3"})
    assert e.prompt.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    assert "paired with an input" in e.prompt
    assert "paired" not in example_of("x:1", {"instruction": "Add.", "output": "3"}).prompt


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([], "not an object"),
        ({"text": " "}, "no answer"),
        ({"prompt": 1, "response": "a"}, "not a string"),
        ({"prompt": "a", "response": " "}, "no answer"),
        ({"messages": []}, "not a list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no answer"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "role"),
        ({"messages": [{"role": "assistant", "content": None}]}, "not a string"),
        ({"messages": [{"role": "assistant", "content": "a"}], "tools": {"a": 1}}, "tools"),
        ({"prompt": "\ud800", "response": "a"}, "not Unicode"),
        ({"prompt": "\ufdd0", "response": "a"}, "not Unicode"),
    ],
)
def test_what_is_no_example_is_named(record, reason):
    with pytest.raises(Unusable) as e:
        example_of("x:1", record)
    assert e.value.reason == reason


def test_a_special_token_spelled_out_in_a_message_leaves_the_example_out():
    (e,) = encoded(
        Encoder(own(), template()),
        [[{"role": "user", "content": "<|end|>"}, {"role": "assistant", "content": "a"}]],
    )
    assert isinstance(e, Skipped)
    assert e.reason == "special token in its text"


# As Qwen3's: what the assistant thought is written of its last answer only, an empty thought too.
THINKING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}<|assistant|>\n"
    "{% if loop.last %}<think>{{ (parts[0] if parts|length > 1 else '')|replace('<think>', '') }}</think>{% endif %}"
    "{{ parts[-1] }}<|end|>\n{% else %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TALK = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "<think>so</think>yes one"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "yes two"},
    {"role": "user", "content": "three?"},
    {"role": "assistant", "content": "<think>why</think>yes three"},
]


def rendered_by_hand(render, conversation, end):
    """Texts with their answers, told by rendering alone: the prompt of each answer, and what stands behind it up to `end`."""
    for k, m in enumerate(conversation):
        if m["role"] == "assistant":
            prompt, whole = render(conversation[:k], True), render(conversation[: k + 1], False)
            assert whole.startswith(prompt)
            yield whole, whole[len(prompt) : whole.rindex(end) + len(end)]


def test_answers_of_a_template_that_drops_earlier_thoughts_are_trained_by_turn():
    chat, tokenizer = template(THINKING), own()
    (got,) = Encoder(tokenizer, chat)([example_of("x:1", {"messages": TALK})])
    want = list(rendered_by_hand(chat.render, TALK, "<|end|>"))
    assert [tokenizer.decode(e.ids) for e in got] == [text for text, _ in want]
    assert [tokenizer.decode(e.ids[e.trained]) for e in got] == [answer for _, answer in want]
    assert [answer for _, answer in want] == [
        "<think>so</think>yes one<|end|>", "<think></think>yes two<|end|>", "<think>why</think>yes three<|end|>",
    ]  # fmt: skip
    # A conversation that goes on behind its last answer: what stands behind is no part of any text.
    (again,) = Encoder(tokenizer, chat)([example_of("x:1", {"messages": [*TALK, TALK[0]]})])
    assert [e.ids.tolist() for e in again] == [e.ids.tolist() for e in got]


def test_answers_that_a_text_agrees_with_share_it():
    """Here the first answer alone is written otherwise once the conversation goes on."""
    text = OWN_TEMPLATE.replace(
        "{{ m.content }}", "{{ m.content }}{% if loop.index == 2 and not loop.last %} (first){% endif %}"
    )
    chat, tokenizer = template(text), own()
    (got,) = Encoder(tokenizer, chat)([example_of("x:1", {"messages": TALK})])
    assert len(got) == 2
    want = [answer for _, answer in rendered_by_hand(chat.render, TALK, "<|end|>")]
    assert tokenizer.decode(got[0].ids[got[0].trained]) == want[0]
    assert tokenizer.decode(got[1].ids[got[1].trained]) == want[1] + want[2]
    assert tokenizer.decode(got[1].ids) == chat.render(TALK, False)


@pytest.mark.parametrize("turns", [1, 2, 3, 5])
def test_the_template_of_qwen3_trains_every_answer(data, turns):
    """Qwen3's own template, of which no copy is ours: $APR_TEST_DATA/chat-templates/qwen3.jinja."""
    text = data("chat-templates/qwen3.jinja").read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_json((data("qwen2-tokenizer") / "tokenizer.json").read_text(), "qwen")
    chat = ChatTemplate(text, "qwen3")
    talk = [m for i in range(turns) for m in (
        {"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}
    )]  # fmt: skip
    (got,) = Encoder(tokenizer, chat)([example_of("x:1", {"messages": talk})])
    want = list(rendered_by_hand(chat.render, talk, "<|im_end|>"))
    assert [tokenizer.decode(e.ids) for e in got] == [text for text, _ in want]
    assert [tokenizer.decode(e.ids[e.trained]) for e in got] == [answer for _, answer in want]


def test_turns_of_a_conversation_stay_on_one_side(prepared):
    rows = [
        {"messages": [
            {"role": r, "content": f"{c} {i} {k}"} for k in range(3) for r, c in (("user", "ask"), ("assistant", "say"))
        ]}
        for i in range(12)
    ]  # fmt: skip
    folder = prepared(rows, template=template(THINKING), val_fraction=0.3)
    shards = {side: PackedShards(path, own()) for side, path in folder.sides.items()}
    assert {s.manifest.by_turn for s in shards.values()} == {12}
    assert "12 conversations are trained on turn by turn" in folder.left_out()
    texts = {s: [own().decode(x) for x in shards[s].examples(range(shards[s].manifest.rows))] for s in shards}
    assert sum(map(len, texts.values())) == 36
    of = {side: {t.split("ask ")[1].split(" ")[0] for t in texts[side]} for side in texts}
    assert not of["train"] & of["val"]
    assert len(of["train"]) + len(of["val"]) == 12


def test_a_record_of_before_turns_were_counted_is_read(prepared):
    path = prepared().sides["train"] / "instruct.json"
    d = json.loads(path.read_text())
    assert d.pop("by_turn") == 0
    path.write_text(json.dumps(d))
    assert "by_turn" not in PackedShards(path.parent, own()).facts


def test_a_generation_prompt_that_no_answer_begins_with_is_refused():
    text = OWN_TEMPLATE.replace("%}<|assistant|>\n{% endif", "%}<|assistant|>\nthinking{% endif")
    with pytest.raises(Refused, match="otherwise with its generation prompt"):
        encoded(Encoder(own(), template(text)))


def test_what_a_template_refuses_is_counted():
    text = "{% if messages|length > 2 %}{{ raise_exception('too long') }}{% endif %}" + OWN_TEMPLATE
    got = encoded(Encoder(own(), template(text)))
    assert [isinstance(e, Skipped) for e in got] == [len(c) > 2 for c in CONVERSATIONS]
    assert "too long" in got[1].detail


def test_messages_without_a_template_are_refused():
    with pytest.raises(Refused, match="--chat-template"):
        encoded(Encoder(own()))


def test_ids_that_are_not_the_text_are_refused(monkeypatch):
    encoder = Encoder(own(), template())
    monkeypatch.setattr(Tokenizer, "normalize", lambda self, text: text.replace("4", "5"))
    with pytest.raises(Refused, match="encode, then decode is not the text"):
        encoded(encoder)


# Cutting and packing


def example(trained):
    """An example of answers of 10 bytes a token."""
    t, byte_runs = np.array(trained, bool), np.zeros(len(trained), np.int64)
    for first, last in np.flatnonzero(np.diff([0, *trained, 0])).reshape(-1, 2):
        byte_runs[first] = 10 * (last - first)
    return EncodedExample(np.arange(t.size, dtype=np.uint32), t, byte_runs)


@pytest.mark.parametrize(
    ("trained", "room", "kept", "ids"),
    [
        ([0, 0, 1, 1], 4, [0, 0, 1, 1], [0, 1, 2, 3]),  # it fits
        ([0, 0, 1, 1, 0], 4, [0, 0, 1, 1], [0, 1, 2, 3]),  # what stands behind goes first
        ([0, 0, 0, 1, 1], 3, [0, 1, 1], [2, 3, 4]),  # then the beginning
        ([0, 1, 1, 0, 1], 4, [0, 0, 0, 1], [1, 2, 3, 4]),  # an answer without its beginning is context
        ([0, 0, 1, 1], 2, None, None),  # no token before the answer is left
        ([0, 1, 1, 1], 3, None, None),
    ],
)
def test_long_examples_lose_their_beginning(trained, room, kept, ids):
    e = fit(example(trained), room)
    if kept is None:
        assert e is None
    else:
        assert e.trained.tolist() == [bool(k) for k in kept]
        assert e.ids.tolist() == ids
        assert e.answer_bytes == 10 * sum(kept)


def test_bytes_of_a_cut_example_are_those_of_the_answers_that_are_left():
    """Whatever the bytes of a token are in the answer that is lost."""
    e = EncodedExample(
        np.arange(5, dtype=np.uint32), np.array([0, 1, 1, 0, 1], bool), np.array([0, 90, 0, 0, 3])
    )
    assert (e.answer_bytes, fit(e, 4).answer_bytes, fit(e, 2).answer_bytes) == (93, 3, 3)


@pytest.mark.parametrize("seed", range(4))
def test_packing_holds_every_example_once_and_fills_rows(seed):
    rng = np.random.default_rng(seed)
    room = int(rng.integers(8, 60))
    sizes = rng.integers(1, room + 1, 500)
    rows = best_fit(sizes, room)
    assert sorted(i for row in rows for i in row) == list(range(500))
    sums = [int(sizes[row].sum()) for row in rows]
    assert max(sums) <= room
    assert len(rows) <= 11 / 9 * np.ceil(sizes.sum() / room) + 1  # best fit decreasing (Johnson 1974)
    assert best_fit(sizes, room) == rows


CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"the {a} in an {b}"},
            {"role": "assistant", "content": f"{b} then {a}" * (1 + a % 4)},
        ]
    }
    for a in range(20)
    for b in ("hat", "box")
]  # fmt: skip


@pytest.fixture
def prepared(tmp_path):
    def make(rows=CHATS, seq_length=96, name="chats.jsonl", val_fraction=0.2, **more):
        path = tmp_path / name
        data = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows).encode()
        if name.endswith(".gz"):
            data = gzip.compress(data)
        elif name.endswith(".zst"):
            data = zstandard.ZstdCompressor().compress(data)
        path.write_bytes(data)
        more.setdefault("template", template())
        return prepare_conversations(
            str(path),
            tmp_path / "cache",
            more.get("tokenizer", own()),
            more["template"],
            seq_length,
            val_fraction,
            more.get("progress"),
        )

    return make


def test_a_folder_is_made_once_and_used_again(prepared, monkeypatch):
    first = prepared()
    monkeypatch.setattr(prepare, "Encoder", None)
    assert prepared().folder == first.folder
    with pytest.raises(TypeError):
        prepared(seq_length=97)


def test_a_second_process_waits_for_the_first(prepared, monkeypatch):
    """It uses what the first has made."""
    first, order = prepared(), []
    train = first.folder / "train" / prepare.RECORD
    record = train.read_bytes()
    train.unlink()

    def wait(stage, done, total):
        order.append(stage)
        os.close(fd)
        train.write_bytes(record)

    fd = os.open(first.folder, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    monkeypatch.setattr(prepare, "_encode", None)
    assert prepared(progress=wait).folder == first.folder
    assert order == ["wait for another process, which encodes these conversations,"]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".ndjson"])
def test_compressed_files_hold_the_same_examples(prepared, suffix):
    plain, packed = (PackedShards(prepared(name=n).sides["train"], own()) for n in ("a.jsonl", "a" + suffix))
    assert plain.sha256 == packed.sha256


def test_examples_share_windows_and_stay_apart(prepared):
    folder = prepared()
    sides = audit(folder.sides, own(), model_vocab=VOCAB)
    shards = sides[0].shards
    m = shards.manifest
    assert m.separator == own().eos_id  # occurs in no rendered conversation
    assert m.rows < m.examples / 1.5
    assert m.examples + sides[1].shards.manifest.examples == len(CHATS)
    windows = Windows(shards, 96)
    ids, targets = windows.read(np.arange(len(windows)))
    assert (targets >= 0).sum() == m.trained == windows.targets
    assert ((targets == IGNORED) | (targets[:, :] == np.roll(ids, -1, 1)))[:, :-1].all()
    assert not ((ids == m.separator) & (targets >= 0)).any()
    one = [windows.read(np.array([i])) for i in range(len(windows))]
    np.testing.assert_array_equal(np.concatenate([i for i, _ in one]), ids)
    np.testing.assert_array_equal(np.concatenate([t for _, t in one]), targets)
    texts = {own().decode(x) for row in ids for x in np.split(row, np.flatnonzero(row == m.separator))}
    assert any("<|user|>\nthe 3 in an hat<|end|>" in t for t in texts)
    assert all(v.passed for v in sides[0].findings)


def test_what_is_left_out_is_counted(prepared):
    long_ = {"messages": [{"role": "user", "content": "a" * 300}, {"role": "assistant", "content": "short"}]}
    never = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 300}]}
    rows = [*CHATS, CHATS[0], CHATS[1], "no json", {"body": 1}, long_, never]
    m = PackedShards(prepared(rows).sides["train"], own()).manifest
    assert m.duplicates == 2
    assert m.skipped == {"broken JSON": 1, "no field": 1, "longer than --seq-length": 1}
    assert m.cut == 1
    assert "broken JSON" in prepared(rows).left_out()


def test_a_file_of_which_more_than_half_cannot_be_used_is_refused(prepared):
    other = {"dialog": [{"speaker": "human", "text": "a"}]}
    half = len(CHATS)
    assert PackedShards(prepared([*CHATS, *[other] * half]).sides["train"], own()).manifest.skipped
    with pytest.raises(
        Refused, match=f"{half + 1} of {2 * half + 1} records cannot be used, more than half"
    ) as e:
        prepared([*CHATS, *[other] * (half + 1)])
    assert "--map messages=dialog,role=speaker,content=text" in str(e.value)
    # Examples that are too long say nothing of the file.
    long_ = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 300}]}
    assert prepared([*CHATS, *[long_] * (half + 1)]).left_out()


def test_a_side_without_examples_is_refused(prepared):
    for same in (CHATS[:1], CHATS[:1] * 3):
        with pytest.raises(Refused, match="one example cannot be divided"):
            prepared(same, val_fraction=0.5)
    with pytest.raises(Refused, match="no example to train on"):
        prepared(["{}"])


@pytest.mark.parametrize("fraction", [1e-9, 0.2, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 20])
def test_a_few_examples_are_divided_whatever_their_hashes(prepared, fraction, count):
    folder = prepared(CHATS[:count], val_fraction=fraction)
    counts = {side: PackedShards(path, own()).manifest.examples for side, path in folder.sides.items()}
    assert sum(counts.values()) == count
    assert min(counts.values()) >= 1
    if fraction != 0.2:
        assert counts["val" if fraction < 0.2 else "train"] == 1


def test_without_a_free_id_an_example_has_a_window_of_its_own(prepared, monkeypatch):
    monkeypatch.setattr(prepare, "separator_of", lambda inside, tokenizer: None)
    shards = PackedShards(prepared().sides["train"], own())
    assert shards.manifest.rows == shards.manifest.examples


def losses_of(model, windows, micro):
    return evaluate(model, windows, micro, None)


def small_model(batch, seq, document_end, dtype="float64"):
    cfg = dataclasses.replace(PRESETS["qwen2-tiny"], vocab_size=VOCAB, max_position_embeddings=128)
    model = Model(cfg, reference, batch, seq, dtype, document_end=document_end)
    host = np.zeros(model.layout.size)
    model.layout.randomise(host, 3)
    model.w[...] = host
    return model


def test_the_loss_of_packed_examples_is_that_of_each_alone(prepared, monkeypatch):
    packed = PackedShards(prepared().sides["train"], own())
    monkeypatch.setattr(prepare, "separator_of", lambda inside, tokenizer: None)
    alone = PackedShards(prepared(name="again.jsonl", seq_length=95).sides["train"], own())
    found = [
        losses_of(
            small_model(3, s.manifest.seq_length, s.manifest.separator),
            Windows(s, s.manifest.seq_length),
            3,
        )
        for s in (packed, alone)
    ]
    assert packed.manifest.rows < alone.manifest.rows
    assert found[0].tokens == found[1].tokens
    assert abs(found[0].mean - found[1].mean) <= 1e-12 * found[0].mean
    leaky = losses_of(small_model(3, 96, None), Windows(packed, 96), 3)  # the mask of borders left out
    assert abs(leaky.mean - found[0].mean) > 1e-6


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_the_mean_is_over_trained_tokens_whatever_the_micro_batch(prepared, micro):
    shards = PackedShards(prepared().sides["train"], own())
    windows = Windows(shards, 96)
    ids, targets = Batches(windows, 4, seed=1).next()
    model = small_model(4, 96, shards.manifest.separator)
    count = int((targets >= 0).sum())
    for i in range(0, 4, micro):
        model.micro_step(ids[i : i + micro], targets[i : i + micro], 1 / count, graph=False)
    assert model.tokens_trained == count
    whole = small_model(4, 96, shards.manifest.separator)
    whole.forward(ids)
    whole.loss(targets, scale=1 / count)
    whole.backward()
    np.testing.assert_allclose(model.g, whole.g, rtol=0, atol=1e-12)
    assert abs(model.total[0] - whole.total[0]) <= 1e-9


def test_targets_read_follow_from_the_position_in_the_data(prepared):
    windows = Windows(PackedShards(prepared().sides["train"], own()), 96)
    batches, counted = Batches(windows, 3, seed=5), 0
    for _ in range(3 * len(windows)):
        counted += int((batches.next()[1] >= 0).sum())
        assert batches.targets_read == counted
    again = Batches(windows, 3, seed=5)
    again.restore(batches.state())
    assert again.targets_read == counted
    assert counted // windows.targets == batches.passes
    again.rewind()
    assert again.targets_read == 0
    assert sum(again.skip() for _ in range(3 * len(windows))) == counted


@pytest.mark.parametrize("name", ["ids.bin", "trained.bin"])
def test_a_changed_or_cut_file_is_found(prepared, name):
    folder = prepared().sides["val"]
    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(MalformedFile, match=name):
        PackedShards(folder, own())
    path.write_bytes(whole[:9] + bytes([whole[9] ^ 1]) + whole[10:])
    with pytest.raises(MalformedFile):
        PackedShards(folder, own())


def test_a_file_that_becomes_shorter_while_it_is_read_is_found(prepared):
    folder = prepared().sides["val"]
    windows = Windows(PackedShards(folder, own()), 96)
    with (folder / "trained.bin").open("r+b") as f:
        f.truncate(7)
    with pytest.raises(MalformedFile, match=r"trained\.bin: became shorter"):
        windows.read(np.arange(1))


def test_packed_examples_are_audited_and_held_out_as_text_is(prepared, tmp_path, capsys):
    folder = prepared().folder
    own().save(tmp_path / "tok")
    args = [str(folder), "--tokenizer", str(tmp_path / "tok"), "--picture", "none", "--json"]
    assert main(["tokenize", "audit", *args]) == 0
    sides = json.loads(capsys.readouterr().out)["sides"]
    guards = {g["guard"]: g["verdict"] for g in sides["train"]["guards"]}
    assert guards["answers"] == guards["documents on both sides"] == "PASS"
    settings = DataSettings(dataset=str(folder), seq_length=96, batch_size=2, val_batches=1)
    train = Split("train", folder / "train", PackedShards(folder / "train", own()))
    rest, held = windows_of(settings, [train])
    assert (len(rest), len(held)) == (train.shards.manifest.rows - 2, 2)
    assert rest.targets + held.targets == train.shards.manifest.trained
    text = Split("val", tmp_path, text_windows(tmp_path, own(), 2, 100).shards)
    with pytest.raises(Refused, match="one holds packed examples, the other text"):
        windows_of(settings, [train, text])


def test_guards_see_labels_behind_a_border_and_rows_without_an_answer(prepared):
    folder = prepared()
    shards = PackedShards(folder.sides["train"], own())
    m = shards.manifest
    trained = shards.trained.copy()
    row, at = (int(x[0]) for x in np.nonzero(shards.ids[:, :-1] == m.separator))
    trained[row, at + 1] = 1
    shards.masks = [trained.reshape(-1)]
    assert guard_answers(shards).passed is False
    trained[row] = 0
    shards.row_targets = trained[:, 1:].sum(1)
    assert guard_answers(shards).passed is False


def test_guards_see_bytes_of_answers_that_count_other_text(prepared):
    """As when special tokens count, or what was cut off."""
    shards = PackedShards(prepared().sides["train"], own())
    m, right = shards.manifest, shards.manifest.answer_bytes
    for count, is_right in (
        (right, True),
        (right + 13 * m.examples, False),
        (right // 2, False),
        (2 * right, False),
    ):
        m.answer_bytes = count
        found = next(f for f in guard_packed(shards, own(), None) if f.name == "bytes of answers")
        assert found.passed is is_right, found
    m.cut, m.counted_as = 1, 1  # in proportion, by an apr of before
    assert (
        next(f for f in guard_packed(shards, own(), None) if f.name == "bytes of answers").verdict == SKIPPED
    )


def test_guards_see_an_example_without_a_separator_and_one_that_is_lost(prepared):
    shards = PackedShards(prepared().sides["train"], own())
    sound = guard_examples(shards)
    assert sound.passed, sound
    right, border = shards.arrays[0], shards.border_id
    ids = shards.ids.copy()
    # Between two examples of a row: the second begins where the separator of the first stood.
    inside = (ids[:, :-2] != border) & (ids[:, 1:-1] == border) & (ids[:, 2:] != border)
    row, at = (int(x[0]) for x in np.nonzero(inside))
    ids[row, at + 1] = ids[row, at + 2]
    shards.arrays[0] = ids.reshape(-1)
    assert guard_examples(shards).passed is False
    lost = right.reshape(ids.shape).copy()
    lost[row, at + 1 :] = border
    shards.arrays[0] = lost.reshape(-1)
    assert guard_examples(shards).passed is False


# Whole runs

RECIPE = [
    "--lr", "3e-3", "--warmup-steps", "2", "--num-steps", "6", "--eval-every", "3", "--batch-size", "4",
    "--micro-batch-size", "2", "--seq-length", "96", "--val-fraction", "0.2", "--device", "cpu",
    "--bounds", "pretrained_share=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A Hugging Face folder of a small model with a chat template, and examples."""
    folder = tmp_path_factory.mktemp("instruct")
    cfg = dataclasses.replace(PRESETS["qwen2-tiny"], vocab_size=VOCAB, max_position_embeddings=128)
    layout = Layout(cfg)
    host = np.zeros(layout.size, np.float32)
    layout.init(host, 1, 0.05)
    write_hf(folder / "hf", cfg, layout.named(host), "float32")
    (folder / "hf/tokenizer.json").write_text(own_tokenizer())
    config = {"eos_token": "<|endoftext|>", "bos_token": "<|bos|>", "chat_template": OWN_TEMPLATE}
    (folder / "hf/tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chats.jsonl").write_text("".join(json.dumps(r) + "\n" for r in CHATS))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("APR_CACHE", str(tmp_path_factory.getbasetemp() / "instruct-cache"))


def pretrain(place, run_dir, *more):
    args = ["--init", str(place / "hf"), "--instruct", str(place / "chats.jsonl"), "--run-dir", str(run_dir)]
    return main(["pretrain", *args, *RECIPE, *map(str, more)])


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    """A finished run."""
    with pytest.MonkeyPatch.context() as m:
        m.setenv("APR_CACHE", str(tmp_path_factory.getbasetemp() / "instruct-cache"))
        path = tmp_path_factory.mktemp("chat") / "run"
        assert pretrain(place, path) in (0, 9)  # from random weights: start.pretrained may be SUSPECT
    return path


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps(run):
    keys = ("step", "train_loss", "grad_norm", "weight_norm", "lr", "tokens_seen")
    return [tuple(m[k] for k in keys) for m in metrics(run) if "train_loss" in m]


def test_a_run_learns_and_counts_its_answers(run):
    rows = {g["id"]: g for g in json.loads((run / "verdict.json").read_text())["gates"]}
    assert {
        rows[g]["verdict"] for g in ("run.tokens", "run.data", "start.ops", "end.reload", "before.disjoint")
    } == {"PASS"}
    assert rows["end.plausible"]["verdict"] == "SKIPPED"
    val = [m["val_loss"] for m in metrics(run) if "val_loss" in m]
    assert val[-1] < val[0] - 0.3
    config = json.loads((run / "config.json").read_text())
    seen = [m["tokens_seen"] for m in metrics(run) if "train_loss" in m]
    assert 0 < seen[0] < 4 * 96
    assert config["data"]["packed"]["trained"] == config["data"]["train_tokens"]


def test_the_checkpoint_carries_the_template(run):
    assert "chat_template" in json.dumps(read_apr(run / "ckpt/epoch-002.apr").metadata["hf_files"])


def ends_of(tokenizer):
    """The end of a turn and the end of a text."""
    return {i for i, text in tokenizer.special_tokens().items() if text in ("<|end|>", "<|endoftext|>")}


def test_the_end_of_a_turn_ends_a_text_in_every_file_that_is_written(run, tmp_path):
    tuned = open_any(str(run / "ckpt/epoch-002.apr"))
    ends = ends_of(tuned.tokenizer)
    assert tuned.end_ids() == ends
    assert len(ends) == 2
    turn = max(ends - {tuned.tokenizer.eos_id})
    export_hf(tuned, tmp_path / "hf")
    for name in ("config.json", "generation_config.json"):
        assert set(json.loads((tmp_path / "hf" / name).read_text())["eos_token_id"]) == ends
    assert json.loads((tmp_path / "hf/tokenizer_config.json").read_text())["eos_token"] == "<|end|>"
    export_gguf(tuned, tmp_path / "x.gguf")
    keys = read_gguf(tmp_path / "x.gguf").keys
    assert {keys["tokenizer.ggml.eos_token_id"], keys["tokenizer.ggml.eot_token_id"]} == ends
    assert keys["tokenizer.ggml.eot_token_id"] == turn
    import_model(str(tmp_path / "hf"), tmp_path / "hf.apr")
    import_model(str(tmp_path / "x.gguf"), tmp_path / "gguf.apr")
    load(str(tmp_path / "gguf.apr")).save(tmp_path / "again")
    load(str(tmp_path / "again")).save(tmp_path / "again.apr")
    for name in ("hf", "x.gguf", "hf.apr", "gguf.apr", "again", "again.apr"):
        got = open_any(str(tmp_path / name))
        assert got.end_ids() == ends, name
        assert got.chat_template == OWN_TEMPLATE, name
    assert (
        open_any(str(tmp_path / "hf")).tokenizer.eos_id == open_any(str(tmp_path / "hf.apr")).tokenizer.eos_id
    )


def test_a_checkpoint_that_was_not_tuned_keeps_its_side_files(place, tmp_path):
    base = open_any(str(place / "hf"))
    assert base.end_ids() == {base.tokenizer.eos_id}
    export_hf(base, tmp_path / "hf")
    for name in ("config.json", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_text() == (place / "hf" / name).read_text()


def test_special_tokens_that_the_base_never_learnt_are_named(place, tmp_path):
    base, folder = open_any(str(place / "hf")), tmp_path / "base"
    shutil.copytree(place / "hf", folder)
    (folder / "model.safetensors").unlink()
    tensors = {name: np.array(t) for name, t in base.tensors.items()}
    ids = {text: i for i, text in base.tokenizer.special_tokens().items()}
    table = tensors["model.embed_tokens.weight"]
    table[ids["<|end|>"]] = 0
    table[ids["<|user|>"]] = table[ids["<|assistant|>"]]
    # No conversation uses it.
    table[ids["<|endoftext|>"]] = 0
    write_safetensors(folder / "model.safetensors", tensors)

    def note(init, **more):
        settings = Settings(
            init=str(init), instruct=str(place / "chats.jsonl"), seq_length=96, val_fraction=0.2, **more
        )
        opened = open_inputs(settings)
        found = tokens(opened.blank_rows, opened.leaves_blank)
        # The gate: of adapters alone, and not of those that train the rows.
        assert found.passed == (not opened.blank_rows or rank is None or bool(more.keys() - {"lora_rank"}))
        return opened.blank_rows_note

    rank = None
    assert note(place / "hf") == ""
    assert tokens(None, True).verdict == SKIPPED
    for rank in (None, 3):
        said = note(folder, lora_rank=rank)
        for name in ("<|end|>", "<|user|>", "<|assistant|>"):
            assert f"{name} ({ids[name]}, norm" in said
        assert "<|endoftext|>" not in said
        assert f"<|end|> ({ids['<|end|>']}, norm 0)" in said
        assert ("adapters leave them as they are: give --train-embeddings" in said) == bool(rank)
    for more in (
        dict(train_embeddings=True),
        dict(lora_modules_to_save="lm_head"),
        dict(lora_targets="q,embed"),
    ):
        assert "adapters leave" not in note(folder, lora_rank=3, **more)
    # Rows as others add them to a model: at the mean of all rows, or next to nothing.
    usual = np.array(base.tensors["model.embed_tokens.weight"])
    for row in (usual.mean(0), usual[ids["<|end|>"]] * 1e-3):
        table[...] = usual
        table[ids["<|end|>"]] = row
        write_safetensors(folder / "model.safetensors", tensors)
        assert f"<|end|> ({ids['<|end|>']}, norm" in note(folder, lora_rank=3)


def test_a_merged_adapter_carries_the_template_too(place, tmp_path):
    run = tmp_path / "run"
    assert pretrain(place, run, "--lora-rank", "3", "--num-steps", "3", "--spot-check", "-1") in (0, 9)
    out = tmp_path / "merged.apr"
    assert main(["merge", str(place / "hf"), str(run / "ckpt/epoch-001-adapter"), "-o", str(out)]) == 0
    merged, checkpoint = open_any(str(out)), open_any(str(run / "ckpt/epoch-001.apr"))
    assert merged.chat_template == checkpoint.chat_template == OWN_TEMPLATE
    assert merged.end_ids() == checkpoint.end_ids() == ends_of(merged.tokenizer)
    a, b = (fill_of(x) for x in (merged, checkpoint))
    np.testing.assert_allclose(a, b, rtol=0, atol=4e-7)


def fill_of(loaded):
    host = np.zeros(Layout(loaded.cfg).size, np.float32)
    fill(Layout(loaded.cfg), host, loaded)
    return host


def test_a_template_that_is_given_is_the_one_that_is_carried(place, tmp_path):
    other = OWN_TEMPLATE.replace("\n{{ m.content }}", ": {{ m.content }}").replace(
        "|>\n{% endif", "|>: {% endif"
    )
    (tmp_path / "other.jinja").write_text(other)
    run = tmp_path / "run"
    more = ["--num-steps", "3", "--spot-check", "-1", "--chat-template", tmp_path / "other.jinja"]
    assert pretrain(place, run, *more) in (0, 9)
    tuned = open_any(str(run / "ckpt/epoch-001.apr"))
    assert tuned.chat_template == other
    # The template of --init stands nowhere any more, whichever place a reader looks at.
    export_hf(tuned, tmp_path / "hf")
    assert json.loads((tmp_path / "hf/tokenizer_config.json").read_text())["chat_template"] == other
    assert (tmp_path / "hf/chat_template.jinja").read_text() == other


def test_apr_verify_passes_and_sees_a_changed_count(run, tmp_path, capsys):
    capsys.readouterr()
    assert main(["verify", str(run), "--replay", "3", "--seed", "2", "--json"]) == 0
    rows = {r["check"]: r for r in json.loads(capsys.readouterr().out)["checks"]}
    assert {r["verdict"] for r in rows.values()} == {"PASS"}
    assert "worst 0.0e+00" in rows["replay"]["measured"]
    other = Path(shutil.copytree(run, tmp_path / "run"))
    lines = metrics(other)
    for m in lines:
        if "train_loss" in m and m["step"] == 2:
            m["tokens_seen"] += 1
    (other / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    assert main(["verify", str(other), "--backend", "none", "--json"]) == 9
    rows = {r["check"]: r for r in json.loads(capsys.readouterr().out)["checks"]}
    assert rows["data"]["verdict"] == "FAIL"
    assert "step 2: tokens_seen" in rows["data"]["measured"]


def test_verify_finds_examples_that_were_moved(run, tmp_path, capsys):
    config = json.loads((run / "config.json").read_text())
    moved = tmp_path / "moved"
    shutil.copytree(Path(config["data_folders"]["train"]).parent, moved)
    capsys.readouterr()
    assert main(["verify", str(run), "--replay", "2", "--dataset", str(moved), "--json"]) == 0


@pytest.mark.parametrize("more", [(), ("--lora-rank", "3")])
def test_resumed_is_bit_equal(place, run, tmp_path, more):
    whole = run
    if more:
        whole = tmp_path / "whole"
        assert pretrain(place, whole, *more) in (0, 9)
    half = Path(shutil.copytree(whole, tmp_path / "half"))
    for path in [*(half / "ckpt").glob("epoch-002*"), half / "ckpt/state/step-000006.apr"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(["pretrain", "--resume", "--run-dir", str(half)]) in (0, 9)
    assert steps(half) == steps(whole)
    a, b = (open_any(str(r / "ckpt/epoch-002.apr")).sha256 for r in (half, whole))
    assert a == b


def test_whatever_the_micro_batch_the_loss_is_the_same(place, run, tmp_path):
    other = tmp_path / "run"
    assert pretrain(place, other, "--micro-batch-size", "4", "--spot-check", "-1", "--num-steps", "3") in (
        0,
        9,
    )
    for a, b in zip(steps(other), steps(run), strict=False):
        assert abs(a[1] - b[1]) <= 2e-6 * b[1]
        assert a[-1] == b[-1]


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--init", "HF", "--instruct", "CHATS", "--corpus", "x"], 2, "one of them"),
        (["--model", "qwen2-tiny", "--instruct", "CHATS"], 2, "--init"),
        (["--init", "HF", "--instruct", "CHATS", "--val-dataset", "x"], 2, "--val-dataset"),
        (["--init", "HF", "--corpus", "CHATS", "--chat-template", "x"], 2, "--chat-template"),
        (["--init", "HF", "--instruct", "nowhere.jsonl"], 3, "nowhere.jsonl"),
        (["--init", "HF", "--instruct", "HF/config.json"], 5, "neither an array of records nor JSON Lines"),
        (["--init", "HF", "--instruct", "CHATS", "--chat-template", "nowhere"], 3, "nowhere"),
    ],
)
def test_bad_input_is_one_line(place, tmp_path, capsys, args, code, said):
    places = {
        "HF": str(place / "hf"),
        "CHATS": str(place / "chats.jsonl"),
        "HF/config.json": str(place / "hf/config.json"),
    }
    args = [places.get(a, a) for a in args]
    assert main(["pretrain", *args, *RECIPE, "--run-dir", str(tmp_path / "run")]) == code
    assert said in capsys.readouterr().err
