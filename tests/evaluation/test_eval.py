"""`apr eval`: losses and choices are those of transformers, every token is scored once, bytes are those of the text."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import numpy as np
import pytest

from apr import backends
from apr.checkpoints.apr2 import write_apr
from apr.checkpoints.apr2_metadata import config_to_metadata, embed_tokenizer
from apr.checkpoints.hf import write_hf
from apr.cli.eval import Flags
from apr.cli.main import main
from apr.common.errors import Aborted, AprError, MalformedFile, Refused, UsageError
from apr.common.options import check_ranges, field_types
from apr.data.batches import Windows
from apr.data.shards import TokenShards
from apr.evaluation import choices, humaneval, loss, tasks
from apr.evaluation.loss import ByteCount, Sums, measure, shard_windows, text_windows, window_at, windows_in
from apr.evaluation.score import Scored, Scorer, Window, open_model
from apr.inference.generate import generator_memory
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.model.transformer import Model
from apr.tokenizer.tokenizer import Tokenizer
from apr.tokenizer.training import train_tokenizer
from apr.training.evaluate import evaluate
from checks import GOLDEN, golden, golden_config
from data_cases import corpus, flip_byte, write

WANT = json.loads((GOLDEN[0].parent / "eval.json").read_text())
MODELS = [p for p in GOLDEN if p.stem in WANT["tiny"]["models"]]
CLOSE = 1e-5  # nats a token
BACKENDS = [
    ("cpu", "float32"),
    ("reference", "float64"),
    pytest.param("cuda", "float32", marks=pytest.mark.gpu),
]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A random llama with a byte-level tokenizer, as a Hugging Face folder and an .apr file, and shards of documents."""
    folder = tmp_path_factory.mktemp("eval")
    docs = corpus(30)
    tokenizer = train_tokenizer([d.text for d in docs], 300, folder / "tok")
    cfg = dataclasses.replace(PRESETS["llama-tiny"], vocab_size=tokenizer.vocab_size)
    layout = Layout(cfg)
    host = np.zeros(layout.size, np.float32)
    layout.randomise(host, 3)
    write_hf(folder / "hf", cfg, layout.named(host), tokenizer_json=tokenizer.json)
    write_hf(folder / "bare", cfg, layout.named(host))
    meta = config_to_metadata(cfg)
    embed_tokenizer(meta, tokenizer.json, tokenizer.eos_id)
    write_apr(folder / "m.apr", meta, layout.named(host), "float32")
    write(folder / "shards", tokenizer, docs, 2000)
    other = train_tokenizer([d.text for d in docs], 290, folder / "other")
    write(folder / "foreign", other, docs)
    (folder / "t.txt").write_text("".join(d.text for d in docs))
    (folder / "t.jsonl").write_text("".join(json.dumps({"text": d.text}) + "\n" for d in docs))
    return folder


def call(capsys, *args):
    code = main(["eval", *map(str, args)])
    out, err = capsys.readouterr()
    return code, out, err


def result(capsys, *args):
    code, out, err = call(capsys, *args, "--json", "--device", "cpu")
    assert code == 0, err
    return json.loads(out)


# Windows


def test_every_token_but_the_first_is_scored_once_and_the_first_window_whole():
    rng = random.Random(3)
    for _ in range(400):
        length, seq = rng.randint(0, 60), rng.randint(1, 20)
        stride = rng.randint(1, seq)
        scored = []
        found = [window_at(k, length, seq, stride) for k in range(windows_in(length, seq, stride))]
        for k, (begin, end, skip) in enumerate(found):
            assert begin == k * stride
            assert 0 < end - begin <= seq
            assert skip == (0 if k == 0 else seq - stride)
            scored += range(begin + skip + 1, end + 1)
        assert scored == list(range(1, length))


@pytest.mark.parametrize("off", [-1, 1, 5])
def test_windows_that_score_a_token_twice_or_never_are_refused(off):
    for length, seq, stride in ((100, 16, 16), (100, 16, 5), (7, 16, 16), (18, 16, 1)):
        for k in range(windows_in(length, seq, stride)):
            begin, end, skip = window_at(k, length, seq, stride)
            loss.check_score(k, length, seq, stride, begin + skip, end)
            with pytest.raises(AprError, match="are its own"):
                loss.check_score(k, length, seq, stride, begin + skip + off, end)


def test_scored_windows_are_those_of_the_guide():
    """The loop of Hugging Face's guide, word for word but for the models."""
    for length, seq, stride in ((100, 16, 16), (100, 16, 5), (7, 16, 16), (18, 16, 1)):
        want, before = [], 0
        for begin in range(0, length, stride):
            end = min(begin + seq + 1, length)
            count = end - before
            want.append((begin, end - 1, max(0, end - begin - count - 1)))
            before = end
            if end == length:
                break
        assert [window_at(k, length, seq, stride) for k in range(windows_in(length, seq, stride))] == want


# The figures of transformers


def golden_model(path, tmp_path, backend, dtype):
    tensors = golden(path)[0]
    weights = {k.removeprefix("weight."): x for k, x in tensors.items() if k.startswith("weight.")}
    write_hf(tmp_path / "m", golden_config(path), weights)
    return open_model(str(tmp_path / "m"), backend=backend, dtype=dtype)


def ids_of(vocab_size):
    w = WANT["tiny"]
    return np.random.default_rng(w["seed"]).integers(0, vocab_size, w["length"]).astype(np.int32)


def score_ids(opened, ids, seq, stride, batch=5, skip=lambda s: s):
    scorer, sums = Scorer(opened, seq, batch), Sums(seq)
    spans = [window_at(k, len(ids), seq, stride) for k in range(windows_in(len(ids), seq, stride))]
    windows = [Window(ids[b : e + 1], skip(s)) for b, e, s in spans]
    for window, scored in zip(windows, scorer.score(windows), strict=True):
        sums.add(window, scored, None)
    return sums


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_losses_of_every_family_are_those_of_transformers(path, backend, dtype, tmp_path):
    opened = golden_model(path, tmp_path, backend, dtype)
    ids = ids_of(opened.cfg.vocab_size)
    for want in WANT["tiny"]["models"][path.stem]["windows"]:
        sums = score_ids(opened, ids, want["seq"], want["stride"])
        assert sums.tokens == want["tokens"]
        assert abs(sums.mean - want["nats"] / want["tokens"]) < CLOSE


def test_every_family_is_among_them():
    assert {golden_config(p).family for p in MODELS} == {"llama", "mistral", "qwen2", "qwen3"}
    assert len(MODELS) == len(WANT["tiny"]["models"])


def test_scoring_what_was_scored_before_is_seen(tmp_path):
    opened = golden_model(MODELS[0], tmp_path, "cpu", "float32")
    ids = ids_of(opened.cfg.vocab_size)
    want = WANT["tiny"]["models"][MODELS[0].stem]["windows"][1]
    for skip in (lambda s: 0, lambda s: max(0, s - 1)):
        sums = score_ids(opened, ids, want["seq"], want["stride"], skip=skip)
        assert sums.tokens != want["tokens"]
        assert not abs(sums.nats - want["nats"]) < 1


def test_stories_are_scored_as_transformers_does(capsys, data, tmp_path):
    want = WANT["stories"]
    text = data("tinystories-excerpt/tinystories-train-head.txt").read_text()[: want["characters"]]
    (tmp_path / "t.txt").write_text(text)
    model = data("stories260K/hf")
    for w in want["windows"]:
        args = [model, "--text", tmp_path / "t.txt", "--seq-length", w["seq"], "--stride", w["stride"]]
        d = result(capsys, *args)
        assert d["tokens"] == w["tokens"]
        assert abs(d["loss"] - w["nats"] / w["tokens"]) < CLOSE
        assert abs(d["perplexity"] - math.exp(w["nats"] / w["tokens"])) < 1e-3
        assert d["bytes"] == want["bytes"]  # <s> stands before the text: all of it is scored
        assert abs(d["bits_per_byte"] - w["nats"] / want["bytes"] / math.log(2)) < 1e-5
        assert d["bos_ids"] == [1]


def test_choices_are_scored_as_transformers_does(capsys, data, tmp_path):
    model, file = data("stories260K/hf"), tmp_path / "c.jsonl"
    file.write_text("".join(json.dumps(c["item"]) + "\n" for c in WANT["choices"]))
    d = result(capsys, model, "--choices", file, "--output", tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert d["items"] == len(rows) == len(WANT["choices"])
    for row, want in zip(rows, WANT["choices"], strict=True):
        assert row["tokens"] == [s["tokens"] for s in want["scores"]]
        got = np.array(row["log_probabilities"])
        assert np.abs(got - [s["logp"] for s in want["scores"]]).max() < 1e-4
    right = [max(range(len(c["scores"])), key=lambda i, s=c["scores"]: s[i]["logp"]) for c in WANT["choices"]]
    share = np.mean([r == row["answer"] for r, row in zip(right, rows, strict=True)])
    assert d["accuracy"]["sum"]["value"] == pytest.approx(share)
    assert d["accuracy"]["sum"]["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / (len(rows) - 1)))


def test_greedy_is_that_of_transformers(data):
    opened = open_model(str(data("stories260K/hf")), "cpu")
    scorer = Scorer(opened, 128, 4)
    windows, want = [], []
    for c in WANT["choices"]:
        item = choices._item("i", c["item"])
        for text, score in zip(item.continuations, c["scores"], strict=True):
            before = opened.tokenizer.prefix_ids if item.context else []
            pair = choices.encode_pair(opened.tokenizer, item.context, text, before, 1)
            windows.append(choices.pair_window(*pair, 128, "i")[0])
            want.append(score["greedy"])
    assert [s.greedy for s in scorer.score(windows, greedy=True)] == want
    assert {True, False} == set(want)


# Scoring


def test_the_batch_does_not_matter(small):
    opened = open_model(str(small / "hf"), "cpu")
    rng = np.random.default_rng(0)
    windows = []
    for n in rng.integers(1, 48, 40):
        windows.append(
            Window(
                rng.integers(0, 300, n + 1).astype(np.int32) % opened.cfg.vocab_size, int(rng.integers(0, n))
            )
        )
    alone, together = ([s.losses for s in Scorer(opened, 48, batch).score(windows)] for batch in (1, 7))
    for a, b, w in zip(alone, together, windows, strict=True):
        assert len(a) == len(b) == len(w.ids) - 1 - w.skip
        assert np.abs(a - b).max() < 1e-5


def test_ids_outside_the_vocabulary_and_losses_that_are_not_finite(small, tmp_path):
    opened = open_model(str(small / "hf"), "cpu")
    with pytest.raises(MalformedFile, match="outside the vocabulary"):
        list(Scorer(opened, 16, 1).score([Window(np.array([1, 5000], np.int32))]))
    layout = Layout(opened.cfg)
    host = np.full(layout.size, 3e37, np.float32)
    write_hf(tmp_path / "huge", opened.cfg, layout.named(host))
    huge = open_model(str(tmp_path / "huge"), "cpu")
    with np.errstate(all="ignore"), pytest.raises(Aborted, match="damaged"):
        list(Scorer(huge, 16, 1).score([Window(np.array([1, 2, 3], np.int32))]))


def test_a_job_that_does_not_fit(small):
    opened = open_model(str(small / "hf"), "cpu")
    with pytest.raises(Refused, match="--seq-length"):
        Scorer(opened, 4096)
    with pytest.raises(Refused, match="--batch-size"):
        Scorer(opened, 64, 1 << 40)


def test_standard_error_of_windows_of_equal_length():
    rng, sums = np.random.default_rng(1), Sums(8)
    rows = rng.random((50, 8))
    for row in rows:
        sums.add(Window(np.zeros(9, np.int32)), Scored(row, None), None)
    assert sums.mean == pytest.approx(rows.mean())
    assert sums.stderr == pytest.approx(rows.mean(1).std(ddof=1) / math.sqrt(50))
    positions = sums.by_position()
    assert [(r["first"], r["last"]) for r in positions] == [(1, 1), (2, 3), (4, 8)]
    assert sum(r["tokens"] for r in positions) == 400
    assert positions[1]["loss"] == pytest.approx(rows[:, 1:3].mean())
    one = Sums(8)
    one.add(Window(np.zeros(9, np.int32)), Scored(rows[0], None), None)
    assert one.stderr is None


def test_sums_that_do_not_agree_with_others_are_refused():
    rng = np.random.default_rng(1)

    def summed():
        sums = Sums(8)
        for n in (8, 8, 3, 1):
            sums.add(Window(np.zeros(n + 1, np.int32)), Scored(rng.random(n), None), None)
        sums.bytes = 50
        return sums

    loss.check_sums(summed(), 50)
    loss.check_sums(summed(), 0)
    with pytest.raises(AprError, match="50 bytes counted for tokens that stand for 51"):
        loss.check_sums(summed(), 51)
    wrong = summed()
    wrong.windows = 40
    wrong.window_nats[0] *= 1.5
    with pytest.raises(AprError, match="standard error"):
        loss.check_sums(
            Half(
                8,
                **{k: x for k, x in vars(wrong).items() if k in ("nats", "tokens", "windows")},
                window_nats=wrong.window_nats,
                window_tokens=wrong.window_tokens,
            ),
            0,
        )


class Half(Sums):
    """Sums with another standard error."""

    @property
    def stderr(self):
        return 0.5 * super().stderr


def test_a_window_scores_its_continuation_and_nothing_else():
    window = Window(np.array([5, 6, 7, 8, 9], np.int32), 2)
    choices.check_scored(window, [8, 9], "a")
    for skip in (1, 3):
        with pytest.raises(AprError, match="would be scored"):
            choices.check_scored(window._replace(skip=skip), [8, 9], "a")


# Bytes


def test_bytes_of_byte_level_tokens(small):
    tokenizer = Tokenizer.from_file(small / "tok")
    text = "def \u00e9\u4e2d\U0001f600 x\n"
    ids = np.array([*tokenizer.encode(text), tokenizer.eos_id], np.int64)
    count = ByteCount(tokenizer)
    total = count.of(np.array([tokenizer.eos_id, *ids[:-1]]), ids)
    assert total == len(text.encode())
    parts = [count.of(ids[i - 1 : i], ids[i : i + 1]) for i in range(1, len(ids))]
    assert sum(parts) == total - count.of(ids[-1:], ids[:1])


def test_bytes_of_sentencepiece_tokens(data):
    tokenizer = Tokenizer.from_file(data("stories260K/hf"))
    count = ByteCount(tokenizer)
    assert count.how == "by token"
    for text in ("Once upon a time", " two  spaces", "\u00e9t\u00e9 \U0001f600\nx", "a"):
        ids = np.array([1, *tokenizer.encode(text)], np.int64)
        assert tokenizer.decode(ids, skip_special=True) == text
        assert count.of(ids[:-1], ids[1:]) == len(text.encode())
        # behind other text the space that opens a document is a space
        inner = np.array([1, ids[1], *ids[1:]], np.int64)
        more = len(tokenizer.decode(inner, skip_special=True).encode())
        assert count.of(inner[:-1], inner[1:]) == more


def test_bytes_that_are_not_counted_by_token(small):
    tokenizer = Tokenizer.from_file(small / "tok")
    count = ByteCount(tokenizer)
    count.table = None
    ids = tokenizer.encode("def f(x): return x").astype(np.int64)
    assert count.of(ids[:-1], ids[1:]) == len(tokenizer.decode(ids[1:]).encode())


# Data


def test_shards_give_the_validation_loss_of_training(capsys, small):
    opened = open_model(str(small / "hf"), "cpu")
    shards = TokenShards(small / "shards", opened.tokenizer)
    seq = 37
    windows = Windows(shards, seq)
    model = Model(opened.cfg, opened.backend, 4, seq, train=False, w=opened.weights)
    want = evaluate(model, windows, 4, None)
    d = result(capsys, small / "hf", "--dataset", small / "shards", "--seq-length", seq)
    dropped = windows.tokens_dropped
    assert d["tokens"] == want.tokens + dropped == shards.total_tokens - len(shards.arrays)
    assert abs(d["loss"] - want.mean) < 0.2 * dropped / want.tokens + 1e-5
    scored = Scorer(opened, seq, 4)
    whole = [
        Window(np.concatenate([ids[i], targets[i, -1:]]))
        for ids, targets in (windows.read(np.array([i])) for i in range(len(windows)))
        for i in range(len(ids))
    ]
    mean = np.mean([s.losses.mean() for s in scored.score(whole)])
    assert abs(mean - want.mean) < 1e-5
    assert d["bytes"] == shards.total_bytes - first_bytes(shards, opened.tokenizer)
    same = result(capsys, small / "m.apr", "--dataset", small / "shards", "--seq-length", seq)
    assert same["loss"] == d["loss"]
    assert same["model_sha256"] == d["model_sha256"]


def first_bytes(shards, tokenizer):
    """Bytes of the first token of each shard, which nothing predicts."""
    return int(sum(tokenizer.token_bytes()[a[0]] for a in shards.arrays))


def test_some_windows_of_shards_are_evenly_spaced(small):
    tokenizer = Tokenizer.from_file(small / "tok")
    shards = TokenShards(small / "shards", tokenizer)
    every = [w for w, _ in shard_windows(shards, 16, 16, None).windows()]
    some = shard_windows(shards, 16, 16, 160)
    found = [w for w, _ in some.windows()]
    assert some.total == len(found) == 10
    want = [every[i * len(every) // 10] for i in range(10)]
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(found, want, strict=True))
    assert sum(len(w.ids) - 1 - w.skip for w in every) == shards.total_tokens - len(shards.arrays)


def test_more_context_lowers_the_loss_of_a_trained_model(capsys, data, tmp_path):
    text = data("tinystories-excerpt/tinystories-train-head.txt").read_text()[:6000]
    (tmp_path / "t.txt").write_text(text)
    args = [data("stories260K/hf"), "--text", tmp_path / "t.txt", "--seq-length", 64]
    short, long = (result(capsys, *args, "--stride", s) for s in (64, 16))
    assert short["tokens"] == long["tokens"]
    assert long["loss"] < short["loss"] - 0.05


def test_documents_are_scored_each_by_itself(capsys, small):
    d = result(capsys, small / "hf", "--text", small / "t.jsonl", "--bos", "eos")
    docs = corpus(30)
    tokenizer = Tokenizer.from_file(small / "tok")
    assert d["documents"] == 30
    assert d["tokens"] == sum(len(tokenizer.encode(x.text)) for x in docs)
    assert d["bytes"] == sum(len(x.data) for x in docs)
    assert d["bos_ids"] == [tokenizer.eos_id]
    none = result(capsys, small / "hf", "--text", small / "t.jsonl")  # its tokenizer puts nothing there
    assert none["tokens"] == d["tokens"] - 30
    first = result(capsys, small / "hf", "--text", small / "t.jsonl", "--max-tokens", 100)
    assert 100 <= first["tokens"] < 100 + 64


def test_long_documents_are_cut_without_changing_their_tokens(small, tmp_path, monkeypatch):
    from apr.data import text as text_module

    tokenizer = Tokenizer.from_file(small / "tok")
    texts = []
    for limit in (text_module.MAX_HELD_BYTES, 1000):
        monkeypatch.setattr(text_module, "MAX_HELD_BYTES", limit)
        found = text_windows(str(small / "t.txt"), tokenizer, 64, 64, None, "none", "text")
        texts.append([w.ids for w, _ in found.windows()])
    assert all(np.array_equal(a, b) for a, b in zip(*texts, strict=True))


def test_documents_are_masked_on_request(capsys, small):
    args = [small / "hf", "--dataset", small / "shards", "--seq-length", 64]
    plain, masked = result(capsys, *args), result(capsys, *args, "--mask-documents")
    assert plain["tokens"] == masked["tokens"]
    assert plain["loss"] != masked["loss"]


def test_of_a_folder_with_splits_validation_is_scored(capsys, small, tmp_path):
    for name, count in (("train", 5), ("test", 3), ("validation", 2)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(f'{{"text": "def f(x): return {i}"}}\n' for i in range(count))
        )
    d = result(capsys, small / "hf", "--text", tmp_path)
    assert d["documents"] == 2
    assert "test.jsonl" in d["splits"]
    assert "train.jsonl" in d["splits"]
    code, out, _ = call(capsys, small / "hf", "--text", tmp_path, "--device", "cpu")
    assert (code, "scored on a split that is not trained on" in " ".join(out.split())) == (0, True)
    named = result(capsys, small / "hf", "--text", tmp_path / "test.jsonl")
    assert (named["documents"], "splits" in named) == (3, False)


def test_lines_that_cannot_be_read_are_named(capsys, small, tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text('{"text": "def f(x): return x"}\n{"body": "x"}\n{\n')
    d = result(capsys, small / "hf", "--text", file)
    assert d["documents"] == 1
    assert d["left_out"] == 2
    assert [x.split(": ")[1] for x in d["left_out_first"]] == ["no field", "broken JSON"]
    code, out, _ = call(capsys, small / "hf", "--text", file, "--device", "cpu")
    assert code == 0
    assert "left out" in out
    d = result(capsys, small / "hf", "--text", file, "--content-field", "body", "--bos", "eos")
    assert d["documents"] == 1


def test_reference_and_picture(capsys, small, tmp_path):
    args = [small / "hf", "--text", small / "t.txt", "--max-tokens", 200, "--seq-length", 50]
    picture = tmp_path / "p.png"
    d = result(capsys, *args, "--picture", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, out, _ = call(capsys, *args, "--backend", "reference", "--json")
    exact = json.loads(out)
    assert (code, exact["dtype"]) == (0, "float64")
    assert 0 < abs(exact["loss"] - d["loss"]) < 1e-5
    assert sum(r["tokens"] for r in d["by_position"]) == d["tokens"]


# Choices


def test_the_three_formats():
    arc = {"question": "Q", "choices": {"text": ["a", "bc"], "label": ["A", "B"]}, "answerKey": "B"}
    item = choices._item("x", arc)
    assert (item.context, item.continuations, item.answer) == ("Question: Q\nAnswer:", (" a", " bc"), 1)
    assert item.choices == ("a", "bc")
    item = choices._item("x", {"goal": "G", "sol1": "s", "sol2": "t", "label": "0"})
    assert (item.context, item.continuations, item.answer) == ("Question: G\nAnswer:", (" s", " t"), 0)
    item = choices._item("x", {"context": "C", "choices": [" a", "b"], "answer": "b"})
    assert (item.context, item.continuations, item.choices, item.answer) == ("C", (" a", "b"), ("a", "b"), 1)


def test_questions_saved_on_windows(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(
        '{"context": "C", "choices": ["a", "b"], "answer": 1}\r\n' * 2, newline="", encoding="utf-8-sig"
    )
    assert [item.context for item in choices.read_items(str(path))] == ["C", "C"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "Q", "choices": ["a", "b"], "answerKey": "A"}, "choices ="),
        ({"question": "Q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"}, "at least 2"),
        (
            {"question": "Q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "C"},
            "answerKey",
        ),
        (
            {"question": "Q", "choices": {"text": ["a", ""], "label": ["A", "B"]}, "answerKey": "A"},
            "not text",
        ),
        ({"goal": "G", "sol1": "s", "label": 0}, "sol2"),
        ({"goal": "G", "sol1": "s", "sol2": "t", "label": 2}, "label = 2"),
        ({"goal": "G", "sol1": "s", "sol2": "t", "label": True}, "label = True"),
        ({"context": "C", "choices": ["a"], "answer": 0}, "at least 2"),
        ({"context": "C", "choices": ["a", "b"], "answer": 2}, "answer = 2"),
        ({"context": "C", "choices": ["a", "b"], "answer": "c"}, "answer = 'c'"),
        ({"text": "x"}, "expected lines of"),
    ],
)
def test_broken_questions_are_named(row, words):
    with pytest.raises(MalformedFile, match="file:7") as e:
        choices._item("file:7", row)
    assert words in str(e.value)


def test_rules_pick_differently(small):
    """A long choice with likelier tokens loses by sum and wins by length."""
    tokenizer = Tokenizer.from_file(small / "tok")

    class Fixed:
        def score(self, windows):
            return iter([Scored(np.array([3.0]), None), Scored(np.array([1.0, 1.0, 1.0, 1.0]), None)])

    item = choices.Item("i", "def", (" f", " f(x): return"), ("f", "f(x): return"), 1)
    windows, short = choices.windows_of(tokenizer, [item], 64)
    found = choices.measure(Fixed(), [item], windows)
    assert short == 0
    assert found["rows"][0]["picked"] == {"sum": 0, "per_byte": 1, "per_token": 1}
    assert found["accuracy"]["per_byte"] == {"value": 1.0, "stderr": None}
    assert found["chance"] == 0.5


def test_contexts_are_cut_at_the_left_and_counted():
    window, short = choices.pair_window(range(10), [20, 21], 6, "i")
    assert short
    assert window.ids.tolist() == [5, 6, 7, 8, 9, 20, 21]
    assert window.skip == 4
    window, short = choices.pair_window([1], [2, 3], 6, "i")
    assert (short, window.ids.tolist(), window.skip) == (False, [1, 2, 3], 0)
    with pytest.raises(Refused, match="--seq-length"):
        choices.pair_window([1], range(7), 6, "i")


@pytest.mark.parametrize(
    ("tokenizer", "context", "following"),
    [
        ("stories260K/hf", "wan", "ted to play"),
        ("stories260K/hf", "Once upon a ti", "me, there"),
        ("qwen2-tokenizer", "\u4ed6\u662f\u4e2d\u534e\u4eba\u6c11\u5171", "\u548c\u56fd\u516c\u6c11"),
        ("qwen2-tokenizer", "def read(pa", "th):"),
    ],
)
def test_a_context_keeps_its_own_ids_where_a_token_spans_its_end(data, tokenizer, context, following):
    t = Tokenizer.from_file(data(tokenizer))
    own, whole = (t.encode(text).tolist() for text in (context, context + following))
    assert whole[: len(own)] != own
    assert choices.encode_pair(t, context, following, [1]) == ([1, *own], whole[len(own) :])


def test_ids_that_stand_before_a_text_are_put_there_once(data):
    t = Tokenizer.from_file(data("stories260K/hf"))
    plain = t.encode("a b").tolist()
    assert choices.behind([1], plain) == [1, *plain]
    assert choices.behind([1], [1, *plain]) == [1, *plain]
    assert choices.behind([], []) == []
    head, rest = choices.encode_pair(t, "<s>user: a</s>", " b", [1], marked=True)
    assert (head[0], head[-1], head.count(1)) == (1, 2, 1)
    assert head + rest == t.encode_marked("<s>user: a</s> b").tolist()
    assert 2 not in choices.encode_pair(t, "a</s>", " b", [1])[0]
    assert choices.encode_pair(t, "", "<s>a", [], 1, marked=True)[0] == [1]


def test_a_context_of_spaces_and_one_without_tokens(small):
    tokenizer = Tokenizer.from_file(small / "tok")
    head, rest = choices.encode_pair(tokenizer, "def f:  ", "return", [])
    assert tokenizer.decode(head) == "def f:"
    assert tokenizer.decode(rest) == "  return"
    assert choices.encode_pair(tokenizer, "", "x", [], 7)[0] == [7]
    with pytest.raises(Refused, match="nothing before it"):
        choices.encode_pair(tokenizer, "", "x", [])
    with pytest.raises(Refused, match="no token"):
        choices.encode_pair(tokenizer, "x", "", [])


def test_a_long_completion_is_looked_through_as_one_text(data, monkeypatch):
    """Stop strings that span what is decoded together, at every distance from it; and without the end of the text before."""
    t, stops = Tokenizer.from_file(data("stories260K/hf")), ("\nxyz", "zebra!")
    prompt = t.encode_text("Once upon")
    cases = [t.encode_text("a b c " * 4 + "d" * n + stop + " e") for n in range(24) for stop in stops]

    def ends(ids):
        growing = humaneval.Growing(t, prompt, stops)
        taken = next((i for i, token in enumerate(ids) if growing.feed(token)), None)
        return taken, growing.result()[0]

    def expected(ids):
        shown = len(t.decode(prompt, skip_special=True))
        texts = [t.decode(prompt + ids[: i + 1], skip_special=True)[shown:] for i in range(len(ids))]
        taken = next(i for i, text in enumerate(texts) if any(s in text for s in stops))
        return taken, humaneval.cut(texts[taken], stops)

    assert [ends(ids) for ids in cases] == [expected(ids) for ids in cases]
    look = humaneval.Growing._look_from
    monkeypatch.setattr(
        humaneval.Growing, "_look_from", lambda self, ids: (look(self, ids), setattr(self, "_before", ""))
    )
    assert [ends(ids) for ids in cases] != [expected(ids) for ids in cases]


# The command


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["HF"], 2, "--dataset, --text, --choices, --humaneval"),
        (["HF", "--text", "T", "--dataset", "S"], 2, "not 2"),
        (["HF", "--text", "T", "--stride", "0"], 2, "--stride 0"),
        (["HF", "--text", "T", "--seq-length", "8", "--stride", "9"], 2, "--stride 9"),
        (["HF", "--text", "T", "--seq-length", "0"], 2, "--seq-length = 0"),
        (["HF", "--text", "T", "--seq-length", "99999"], 5, "99999"),
        (["HF", "--text", "T", "--max-tokens", "0"], 2, "--max-tokens = 0"),
        (["HF", "--text", "T", "--samples", "3"], 2, "--samples goes with --humaneval"),
        (["HF", "--humaneval", "T", "--stride", "3"], 2, "--stride goes with"),
        (["HF", "--humaneval", "T", "--timeout", "1e10"], 2, "--timeout = 10000000000.0: must be above 0 and at most"),
        (["HF", "--humaneval", "T", "--timeout", "1e400"], 2, "--timeout = inf"),
        (["HF", "--humaneval", "T", "--samples", "9" * 30], 2, "--samples = 9"),
        (["HF", "--humaneval", "T", "--seed", "9" * 30], 2, "--seed = 9"),
        (["HF", "--humaneval", "T", "--top-p", "7"], 2, "--top-p = 7.0: must be above 0 and at most 1"),
        (["HF", "--dataset", "S", "--bos", "eos"], 2, "--bos goes with"),
        (["HF", "--text", "none.txt"], 3, "none.txt"),
        (["HF", "--dataset", "none"], 3, "--dataset none: no token shards"),
        (["HF", "--choices", "T", "--seq-length", "99999"], 4, "t.txt:1"),
        (["none.apr", "--text", "T"], 3, "none.apr"),
        (["HF", "--choices", "T"], 4, "t.txt:1"),
        (["HF", "--humaneval", "T"], 4, "t.txt:1"),
        (["BARE", "--text", "T"], 5, "--tokenizer"),
        (["HF", "--text", "T", "--tokenizer", "OTHER"], 5, "--tokenizer"),
        (["HF", "--dataset", "FOREIGN"], 5, "encoded with tokenizer"),
        (["HF", "--text", "T", "--backend", "cpu", "--device", "cuda"], 2, "--backend cpu"),
        (["HF", "--text", "T", "--device", "cuda"], 8, "cuda"),
        (["HF", "--text", "T", "--backend", "cpu", "--dtype", "float64"], 5, "float64"),
        (["HF", "--text", "EMPTY"], 5, "empty"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(capsys, small, tmp_path, args, code, words):
    (tmp_path / "e.txt").write_text("")
    names = {
        "HF": "hf", "BARE": "bare", "T": "t.txt", "S": "shards", "OTHER": "other", "FOREIGN": "foreign",
    }  # fmt: skip
    args = [
        str(small / names[a]) if a in names else str(tmp_path / "e.txt") if a == "EMPTY" else a for a in args
    ]
    if "cuda" in args and code == 8:
        from apr.backends.select import choose
        from apr.common.errors import DeviceError

        try:
            choose("cuda")
            pytest.skip("there is a GPU")
        except DeviceError:
            pass
    got, out, err = call(capsys, *args)
    assert got == code, err
    assert words in err
    assert "Traceback" not in out + err


def test_every_number_has_a_range():
    """Of those without one here, --stride depends on --seq-length and --threads on the machine."""
    kinds = field_types(Flags)
    numeric = {f.name: f.metadata for f in dataclasses.fields(Flags) if kinds[f.name] in (int, float)}
    assert {"timeout", "samples", "top_k", "limit"} <= set(numeric)
    bounded = [n for n, m in numeric.items() if m["at_most"] is not None]
    assert set(numeric) - set(bounded) == {"threads"}
    for name in bounded:
        for value in (10**30, math.inf, math.nan, *([-1, -(10**30)] if name != "stride" else [])):
            with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} = .*at most"):
                check_ranges(Flags, {name: value})


def test_damaged_files_are_named(capsys, small, tmp_path):
    import shutil

    shutil.copytree(small / "shards", tmp_path / "shards")
    flip_byte(tmp_path / "shards", "shard-00000.bin")
    code, _, err = call(capsys, small / "hf", "--dataset", tmp_path / "shards")
    assert (code, "shard-00000.bin" in err) == (4, True)
    data = bytearray((small / "m.apr").read_bytes())
    data[-100] ^= 1
    (tmp_path / "bad.apr").write_bytes(data)
    code, _, err = call(capsys, tmp_path / "bad.apr", "--dataset", small / "shards")
    assert (code, "bad.apr" in err) == (4, True)


def test_a_checkpoint_without_a_tokenizer_takes_the_one_of_the_shards(capsys, small):
    d = result(capsys, small / "bare", "--dataset", small / "shards", "--tokenizer", small / "tok")
    same = result(capsys, small / "hf", "--dataset", small / "shards")
    assert (d["loss"], d["bytes"]) == (same["loss"], same["bytes"])


# of HumanEval, but for its test
PROBLEM = {"task_id": "t/0", "prompt": "def f(x):\n", "entry_point": "f"}


def test_humaneval_end_to_end(capsys, small, tmp_path):
    """Random weights write no right program: the score is 0, and every line says why."""
    problem = {**PROBLEM, "test": "def check(candidate):\n    assert candidate(1) == 2\n"}
    (tmp_path / "h.jsonl").write_text(json.dumps(problem))
    args = [small / "hf", "--humaneval", tmp_path / "h.jsonl", "--max-new-tokens", 12, "--timeout", 20]
    d = result(capsys, *args, "--samples", 2, "--output", tmp_path / "o.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert set(d["pass_at_k"]) == {"1", "2"}
    assert d["pass_at_k"]["1"]["value"] == 0
    assert d["temperature"] == 0.8
    assert all(r["why"] and not r["passed"] for r in rows)
    assert d["isolation"]["program"]
    code, out, _ = call(capsys, *args, "--samples", 2, "--device", "cpu")
    assert code == 0
    assert "kept in by" in out
    code, out, err = call(capsys, *args, "--device", "cpu")  # the most likely tokens are white space alone
    assert (code, "empty" in err, "pass" in out) == (5, True, False)
    cfg = open_model(str(small / "hf"), "cpu").cfg
    layout = Layout(cfg)
    tokenizer = Tokenizer.from_file(small / "tok")
    huge = layout.named(np.full(layout.size, 3e37, np.float32))
    write_hf(tmp_path / "huge", cfg, huge, tokenizer_json=tokenizer.json)
    with np.errstate(all="ignore"):
        code, out, err = call(capsys, tmp_path / "huge", *args[1:], "--device", "cpu")
    assert (code, "not finite" in err, "pass" in out) == (5, True, False)
    problem["prompt"] = "x = 1\n" * 500
    (tmp_path / "h.jsonl").write_text(json.dumps(problem))
    code, _, err = call(capsys, *args)
    assert (code, "t/0" in err, "pass" in err) == (5, True, False)


def test_code_of_a_model_in_training_is_scored(small, tmp_path, monkeypatch):
    """What it completes is what its checkpoint does, also where there is room for one prompt alone; white space is a 0."""
    problem = {**PROBLEM, "test": "def check(f):\n    assert 0\n"}
    (tmp_path / "h.jsonl").write_text(json.dumps(problem))
    stored = open_model(str(small / "hf"), "cpu")
    be, tokenizer = stored.backend, stored.need_tokenizer()
    opened = tasks.held(stored.cfg, be, "float32", tokenizer, stored.weights)
    monkeypatch.setattr(tasks, "MAX_NEW_TOKENS", 8)
    task = tasks.Task("h", tasks.HUMANEVAL, str(tmp_path / "h.jsonl"))
    assert tasks.score(opened, [task], 32)["h"]["value"] == 0
    problems = [humaneval.Problem(f"t/{i}", "def f(x):\n" * (1 + i), "f", "") for i in range(4)]
    settings = humaneval.HumanEvalSettings(1, 0.8, max_new_tokens=8)
    jobs, found = [(p.prompt, i) for i, p in enumerate(problems)], []
    alone = generator_memory(stored.cfg, be, "float32", 1, 64).total
    for of, have in ((stored, None), (opened, None), (opened, alone)):
        low = dataclasses.replace(of, backend=backends.overlay(be, free_memory=lambda have=have: have))
        completer = humaneval.Completer(low, settings)
        completer.check_fits(problems)
        found.append((completer._rows, dict(completer.complete(jobs))))
    assert [rows for rows, _ in found] == [4, 4, 1]
    assert found[0][1] == found[1][1] == found[2][1]


def test_a_table_for_people(capsys, small):
    code, out, _ = call(
        capsys, small / "hf", "--text", small / "t.txt", "--device", "cpu", "--seq-length", 32
    )
    assert code == 0
    for words in ("nats/token", "bits per byte", "perplexity", "tokens/s", "+-"):
        assert words in out


def test_progress_is_reported(small):
    opened = open_model(str(small / "hf"), "cpu")
    texts = text_windows(str(small / "t.jsonl"), opened.tokenizer, 32, 32, None, "auto", "text")
    seen = []
    measure(Scorer(opened, 32, 4), texts, None, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == (small / "t.jsonl").stat().st_size
    with pytest.raises(UsageError, match="--stride"):
        text_windows(str(small / "t.jsonl"), opened.tokenizer, 32, 33, None, "auto", "text")
