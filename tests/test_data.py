"""The data path: tokenizer, corpus, shards, batches, prepare. Each check is shown a planted fault."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr.data.batches import Batches, Exhausted, Permutation, Windows, sequential
from apr.data.corpus import Document, documents, is_held_out, pieces, stdlib_documents
from apr.data.prepare import prepare
from apr.data.shards import ShardWriter, TokenShards
from apr.data.tokenizer import Tokenizer, train_tokenizer
from apr.errors import InputNotFound, IOFailure, MalformedFile, Refused

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("APR_TEST_DATA", ROOT.parent / "shared" / "data"))

CODE = 'def f(x):\n    if x:\n        return "%d" % x\n\n    return None  # 1234567 \u00e9\u4e2d\U0001f600\n'


def corpus(n: int = 40) -> list[Document]:
    """Small documents of varied length, some of them non-ASCII."""
    rng = random.Random(5)
    words = [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "return",
        "self",
        "None",
        "import",
        "\u00e9t\u00e9",
        "\u4e2d\u6587",
    ]
    return [
        Document(f"d{i}", f"# {i}\n" + CODE + " ".join(rng.choices(words, k=5 + 7 * i))) for i in range(n)
    ]


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer([d.text for d in corpus()], 400, tmp_path_factory.mktemp("tok"))


def write(
    folder: Path, tok: Tokenizer, docs: Iterable[Document], shard_tokens: int = 1000, eos: str = "after"
) -> Path:
    with ShardWriter(folder, tok, shard_tokens, eos) as writer:
        writer.add(docs)
    return folder


@pytest.fixture
def shard_dir(tmp_path: Path, tok: Tokenizer) -> Path:
    return write(tmp_path / "shards", tok, corpus())


def windows_of(
    tmp_path: Path, tok: Tokenizer, count: int, t: int = 4, shard_tokens: int = 1 << 20
) -> Windows:
    """`count` windows of known ids: the token at position i of the corpus is i % 300."""
    folder = tmp_path / f"w{count}-{shard_tokens}"
    with ShardWriter(folder, tok, shard_tokens, "none") as writer:
        writer._append((np.arange(count * t + 1) % 300).astype(np.uint32))
        writer.manifest.total_documents = writer.manifest.total_bytes = 1
    return Windows(TokenShards(folder), t)


def data_file(name: str) -> Path:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is absent; set APR_TEST_DATA")
    return path


# --- tokenizer


def random_text(rng: random.Random, n: int) -> str:
    ranges = [
        (0, 0x7F),
        (9, 13),
        (0x20, 0x20),
        (0x80, 0x7FF),
        (0x800, 0xD7FF),
        (0xE000, 0xFFFF),
        (0x10000, 0x10FFFF),
    ]
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(n))


def test_decode_inverts_encode(tok: Tokenizer) -> None:
    rng = random.Random(0)
    texts = [random_text(rng, rng.randint(0, 80)) for _ in range(300)] + [
        CODE,
        "",
        "\ufeffx",
        "\x00",
        " " * 97,
    ]
    rows = tok.encode_batch(texts)
    for text, ids in zip(texts, rows, strict=True):
        assert ids.dtype == np.uint32
        assert ids.ndim == 1
        assert tok.decode(ids) == text
        assert np.array_equal(ids, tok.encode(text))


def test_all_bytes_have_a_token(tmp_path: Path) -> None:
    tok = train_tokenizer(["a"], 257, tmp_path)
    assert (tok.vocab_size, tok.merges, tok.eos_id) == (257, 0, 256)
    text = "".join(map(chr, range(0x250))) + "\U0001f600"
    assert tok.decode(tok.encode(text)) == text
    assert len(tok.encode(text)) == len(text.encode())


def test_indentation_is_one_token(tmp_path: Path) -> None:
    tok = train_tokenizer(["def f():\n        return 1\n" * 20], 300, tmp_path)
    pieces_ = [tok.decode([i]) for i in tok.encode("x\n        return")]
    assert pieces_ == ["x", "\n", " " * 7, " return"]


def test_an_id_without_a_token_is_visible(tok: Tokenizer) -> None:
    ids = [*tok.encode("ab"), tok.vocab_size, 1 << 40, *tok.encode("cd"), tok.vocab_size]
    assert tok.decode(ids) == "ab\ufffd\ufffdcd\ufffd"
    assert tok.decode([]) == ""


def test_special_text_in_a_document_is_text(tok: Tokenizer) -> None:
    text = "a<|endoftext|>b"
    ids = tok.encode(text)
    assert tok.eos_id not in ids
    assert tok.decode(ids) == text
    assert tok.decode([tok.eos_id]) == "<|endoftext|>"
    assert tok.decode([tok.eos_id], skip_special=True) == ""
    # the library's own default is the fault that this guards against
    tok._engine.encode_special_tokens = False
    try:
        assert tok.eos_id in tok.encode(text)
    finally:
        tok._engine.encode_special_tokens = True


def test_truncation_and_padding_of_the_file_are_off(tok: Tokenizer) -> None:
    d = json.loads(tok.json)
    d["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    d["padding"] = {
        "strategy": {"Fixed": 999}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "!",
    }  # fmt: skip
    other = Tokenizer.from_json(json.dumps(d), "memory")
    assert np.array_equal(other.encode(CODE), tok.encode(CODE))
    assert other.sha256 != tok.sha256


def test_tokenizer_files(tok: Tokenizer, tmp_path: Path) -> None:
    tok.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = Tokenizer.from_file(path)
        assert (again.sha256, again.eos_id, again.vocab_size) == (tok.sha256, tok.eos_id, tok.vocab_size)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["sha256"] == hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
    assert manifest["vocab_size"] == tok.vocab_size == 257 + manifest["merges"]
    assert manifest["eos_token_id"] == tok.eos_id == tok.vocab_size - 1
    (tmp_path / "tokenizer.json").write_text(tok.json + "\n")
    with pytest.raises(MalformedFile, match=tok.sha256):
        Tokenizer.from_file(tmp_path)


def test_eos_comes_from_added_tokens_only(tok: Tokenizer, tmp_path: Path) -> None:
    d = json.loads(tok.json)
    d["added_tokens"] = []  # the string stays in no table: no EOS, although the vocabulary has "<"
    d["model"]["vocab"]["</s>"] = len(d["model"]["vocab"])
    bare = Tokenizer.from_json(json.dumps(d), "memory")
    assert bare.eos_id is None
    assert bare.eos_token is None
    with pytest.raises(Refused, match="no EOS"):
        ShardWriter(tmp_path / "s", bare)
    (tmp_path / "tokenizer.json").write_text(json.dumps(d))
    for eos in ('"</s>"', '{"content": "</s>"}'):
        (tmp_path / "tokenizer_config.json").write_text(f'{{"eos_token": {eos}}}')
        with pytest.raises(MalformedFile, match="not one of its added tokens"):
            Tokenizer.from_file(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": 7}')
    with pytest.raises(MalformedFile, match="eos_token = 7"):
        Tokenizer.from_file(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tok.json)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    assert Tokenizer.from_file(tmp_path).eos_id == tok.eos_id


def test_eos_by_id(tok: Tokenizer) -> None:
    d = json.loads(tok.json)
    d["added_tokens"].append({**d["added_tokens"][-1], "content": "<stop>", "id": tok.vocab_size})
    text = json.dumps(d)
    assert Tokenizer.from_json(text, "memory").eos_id == tok.eos_id
    for eos in ("<stop>", tok.vocab_size):
        other = Tokenizer.from_json(text, "memory", eos)
        assert (other.eos_token, other.eos_id) == ("<stop>", tok.vocab_size)
    d["added_tokens"][0]["special"] = False  # an ordinary string with a familiar spelling
    assert Tokenizer.from_json(json.dumps(d), "memory").eos_id is None
    for bad in (0, tok.vocab_size + 1, "a"):
        with pytest.raises(MalformedFile, match=f"eos {bad!r} is not one of its added tokens"):
            Tokenizer.from_json(text, "memory", bad)


def test_eos_of_real_tokenizers() -> None:
    qwen = Tokenizer.from_file(data_file("qwen2-tokenizer"))
    assert (qwen.eos_token, qwen.eos_id, qwen.normalization) == ("<|im_end|>", 151645, "NFC")
    assert Tokenizer.from_json(qwen.json, "memory").eos_id == 151643
    assert qwen.vocab_size == 151646
    stories = Tokenizer.from_file(data_file("stories260K/hf/tokenizer.json"))
    assert (stories.eos_token, stories.eos_id) == ("</s>", 2)
    assert 2 not in stories.encode("once</s>upon")


def test_tokenizer_refuses(tok: Tokenizer, tmp_path: Path) -> None:
    for size in (0, 256, 200_001):
        with pytest.raises(Refused, match=str(size)):
            train_tokenizer(["abc"], size, tmp_path)
    with pytest.raises(Refused, match="no text"):
        train_tokenizer([""], 300, tmp_path)
    with pytest.raises(Refused, match="ordinary token"):
        train_tokenizer(["eos " * 50], 300, tmp_path, eos_token="eos")
    assert not list(tmp_path.iterdir())
    with pytest.raises(Refused, match="character 1"):
        tok.encode("a\ud800")
    with pytest.raises(Refused, match="-1"):
        tok.decode([5, -1])
    with pytest.raises(InputNotFound):
        Tokenizer.from_file(tmp_path / "nowhere")
    dropout = json.loads(tok.json)
    dropout["model"]["dropout"] = 0.1
    with pytest.raises(Refused, match="dropout"):
        Tokenizer.from_json(json.dumps(dropout), "memory")
    for text in ("", "{}", "[]", '{"model": {"type": "BPE"}}', tok.json[:-20], "[" * 100_000):
        with pytest.raises(MalformedFile, match="memory"):
            Tokenizer.from_json(text, "memory")
    (tmp_path / "tokenizer.json").write_bytes(b"{\xff")
    with pytest.raises(MalformedFile, match="byte 1"):
        Tokenizer.from_file(tmp_path)


def test_errors_of_the_text_source_pass_through(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ok")
    (tmp_path / "b.txt").write_bytes(b"ab\xff")
    with pytest.raises(MalformedFile, match=r"b\.txt: not UTF-8 at byte 2"):
        train_tokenizer((d.text for d in documents(tmp_path)), 300, tmp_path / "tok")


# --- corpus


def test_documents_order_patterns_and_duplicates(tmp_path: Path) -> None:
    for name in ("b.py", "a/z.txt", "a/y.md", "c.bin", "B.py", "a.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(f"text\r\nof {name}".encode())
    (tmp_path / "copy.py").write_bytes((tmp_path / "b.py").read_bytes())
    (tmp_path / "empty.py").write_bytes(b"")
    docs = documents(tmp_path)
    found = list(docs)
    assert [d.name for d in found] == ["B.py", "a.py", "a/y.md", "a/z.txt", "b.py"]
    assert found[0].text == "text\r\nof B.py"
    assert (docs.count, docs.duplicates, docs.empty) == (5, 1, 1)
    assert [d.name for d in documents(tmp_path, ["*.bin"])] == ["c.bin"]
    assert [d.name for d in documents(tmp_path / "c.bin")] == ["c.bin"]


def test_documents_refuse(tmp_path: Path) -> None:
    with pytest.raises(InputNotFound, match="nowhere"):
        documents(tmp_path / "nowhere")
    with pytest.raises(Refused, match=r"\*\.py, \*\.txt, \*\.md"):
        documents(tmp_path)
    (tmp_path / "a.py").write_bytes(b"")
    with pytest.raises(Refused, match="1 empty"):
        list(documents(tmp_path))
    (tmp_path / "a.py").write_bytes(b"abc\xe9")
    with pytest.raises(MalformedFile, match=r"a\.py: not UTF-8 at byte 3"):
        list(documents(tmp_path))
    (tmp_path / "a.py").unlink()
    (tmp_path / "a.py").symlink_to("gone")
    with pytest.raises(InputNotFound, match=r"a\.py"):
        documents(tmp_path)


def test_links_and_pipes_do_not_hang(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text("a")
    (tmp_path / "deep" / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "zelf").symlink_to("zelf")
    os.mkfifo(tmp_path / "pipe.txt")
    elsewhere = tmp_path.parent / f"{tmp_path.name}-linked"
    elsewhere.mkdir()
    (elsewhere / "b.txt").write_text("b")
    (tmp_path / "linked").symlink_to(elsewhere, target_is_directory=True)
    assert [d.name for d in documents(tmp_path)] == ["deep/a.txt", "linked/b.txt"]
    with pytest.raises(InputNotFound):
        documents(tmp_path / "pipe.txt")


def test_stdlib_documents() -> None:
    docs = stdlib_documents()
    found = list(docs)
    names = [d.name for d in found]
    assert names == sorted(names)
    assert len(set(names)) == len(names) == docs.count > 400
    assert 5e6 < sum(len(d.data) for d in found) < 5e7
    assert {"json/decoder.py", "os.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"site-packages", "test", "tests", "idle_test", "__pycache__"}
    assert docs.duplicates > 0
    assert docs.empty > 0


def test_not_utf8_is_skipped_only_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_bytes(b"# \xe9")
    (tmp_path / "b.py").write_bytes(b"# ok")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    docs = stdlib_documents()
    assert [d.name for d in docs] == ["b.py"]
    assert docs.not_utf8 == 1
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path / "x.zip")})
    with pytest.raises(InputNotFound, match=r"x\.zip"):
        stdlib_documents()


def test_pieces_join_to_the_document() -> None:
    text = "\n\n".join("p" * n for n in (5, 0, 40, 3, 3, 100, 1, 0)) + "\n\n"
    cut = list(pieces(Document("d", text), 30))
    assert "".join(p.text for p in cut) == text
    assert len(cut) > 3
    assert len({p.name for p in cut}) == len(cut)
    assert all(p.text for p in cut)
    assert all(len(p.data) <= 32 or p.text.rstrip("\n").count("\n\n") == 0 for p in cut)
    assert [p.text for p in pieces(Document("d", "a\n\nb"), 100)] == ["a\n\nb"]


def test_held_out_is_decided_by_content() -> None:
    shas = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(2000)]
    held = {s for s in shas if is_held_out(s, 0.1)}
    assert 140 < len(held) < 260
    assert held <= {s for s in shas if is_held_out(s, 0.2)}
    assert Document("x", "same").sha256 == Document("y", "same").sha256
    assert not any(is_held_out(s, 0.0) for s in shas)
    assert all(is_held_out(s, 1.0) for s in shas)


# --- shards


def test_shards_hold_the_corpus(tok: Tokenizer, tmp_path: Path) -> None:
    docs = corpus()
    rows = [tok.encode(d.text) for d in docs]
    eos = np.array([tok.eos_id], dtype=np.uint32)
    wanted = {
        "after": [part for row in rows for part in (row, eos)],
        "between": [part for row in rows for part in (row, eos)][:-1],
        "none": rows,
    }
    for policy, parts in wanted.items():
        shards = TokenShards(write(tmp_path / policy, tok, docs, 1000, policy), tok)
        stream = np.concatenate(parts)
        assert np.array_equal(np.concatenate(shards.arrays), stream)
        assert [a.size for a in shards.arrays[:-1]] == [1000] * (len(shards.arrays) - 1)
        raw = b"".join(p.read_bytes() for p in sorted((tmp_path / policy).glob("shard-*.bin")))
        assert raw == stream.astype("<u4").tobytes()
        assert shards.total_tokens == stream.size
        assert shards.total_documents == len(docs)
        assert shards.total_bytes == sum(len(d.text.encode()) for d in docs)
        p = np.unique(stream, return_counts=True)[1] / stream.size
        assert math.isclose(shards.unigram_entropy, -(p * np.log(p)).sum(), rel_tol=1e-12)
        m = shards.manifest
        assert m.audit["distinct_ids"] == p.size
        assert m.audit["top_id_share"] == p.max()
        assert math.isclose(m.audit["bytes_per_token"], shards.total_bytes / stream.size)
        assert (m.eos_policy, m.vocab_size, m.tokenizer_sha256) == (policy, tok.vocab_size, tok.sha256)
        assert not shards.arrays[0].flags.writeable
        assert TokenShards(tmp_path / policy, verify=False).sha256 == shards.sha256


def test_shard_size_never_changes_the_stream(tok: Tokenizer, tmp_path: Path) -> None:
    streams = []
    for size in (59, 123, 1 << 20):
        streams.append(np.concatenate(TokenShards(write(tmp_path / str(size), tok, corpus(5), size)).arrays))
    assert np.array_equal(streams[0], streams[1])
    assert np.array_equal(streams[0], streams[2])


def test_constant_corpus_has_no_entropy(tok: Tokenizer, tmp_path: Path) -> None:
    # the failure this figure exists for: a corpus of one repeated id has next to no entropy
    shards = TokenShards(write(tmp_path / "s", tok, [Document("d", "~" * 500)], eos="none"))
    assert shards.unigram_entropy < 1.0 < TokenShards(write(tmp_path / "t", tok, corpus())).unigram_entropy


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    d = json.loads(path.read_text())
    d.update(changes)
    path.write_text(json.dumps(d))


def flip_byte(folder: Path) -> None:
    path = folder / "shard-00001.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def rewrite(folder: Path, edit: Callable[[np.ndarray], Any]) -> None:
    """Change the ids of the first shard, with a manifest whose hash agrees with the file."""
    path = folder / "shard-00000.bin"
    ids = np.fromfile(path, dtype="<u4")
    edit(ids)
    path.write_bytes(ids.tobytes())
    edit_shard_row(folder, sha256=hashlib.sha256(ids.tobytes()).hexdigest())


def plant_id(folder: Path) -> None:
    rewrite(folder, lambda ids: ids.__setitem__(17, 12345))


def swap_ids(folder: Path) -> None:
    rewrite(folder, lambda ids: ids.fill(0))


def cut(folder: Path, n: int) -> None:
    path = folder / "shard-00000.bin"
    path.write_bytes(path.read_bytes()[:-n])


def append(folder: Path, n: int) -> None:
    path = folder / "shard-00000.bin"
    path.write_bytes(path.read_bytes() + b"\0" * n)


def edit_shard_row(folder: Path, **changes: Any) -> None:
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    shards[0].update(changes)
    edit_manifest(folder, shards=shards)


AUDIT = ("distinct_ids", "unigram_entropy_nats", "top_id_share", "bytes_per_token")
MANIFEST_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"total_tokens": 7}, r"total_tokens = 7, its shards add up to \d+"),
    ({"total_bytes": 7}, r"audit\.bytes_per_token"),
    ({"total_documents": 7}, r"total_documents = 7, .* say 40"),
    ({"shard_count": 3}, r"shard_count = 3, shards lists"),
    ({"vocab_size": 300}, r"eos_token_id = 330 .* 0\.\.299"),
    ({"vocab_size": 1 << 40}, r"vocab_size = 1099511627776"),
    ({"vocab_size": "331"}, r"vocab_size = '331'"),
    ({"eos_token_id": 5}, r"total_documents = 40, .* say \d+"),
    ({"eos_token_id": None}, r"eos_token_id = None"),
    ({"eos_policy": "between"}, r"total_documents = 40, .* say 41"),
    ({"eos_policy": "x"}, r"eos_policy = 'x'"),
    ({"complete": False}, "did not finish"),
    ({"format": "apr-shards-9"}, "apr-shards-9"),
    ({"seq": 1}, r"unknown keys \['seq'\]"),
    ({"audit": {}}, "audit = {}"),
    ({"audit": dict.fromkeys(AUDIT, "1")}, "is not a figure"),
    ({"audit": dict.fromkeys(AUDIT, math.nan)}, "is not a figure"),
    ({"shards": 5}, "shards lists 5"),
    ({"tokenizer_sha256": "x"}, "tokenizer_sha256 = 'x'"),
]
ROW_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"name": "../x.bin"}, r"shards\[0\]\.name = '\.\./x\.bin'"),
    ({"tokens": True}, r"shards\[0\]\.tokens = True"),
    ({"sha256": "0" * 63}, r"shards\[0\]\.sha256"),
    ({"more": 1}, r"does not have the keys name, tokens, sha256"),
]
FILE_FAULTS: list[tuple[Callable[[Path], Any], str]] = [
    (flip_byte, r"shard-00001\.bin: sha256 is \w+, manifest.json says \w+"),
    (lambda f: cut(f, 4), r"shard-00000\.bin: 3996 bytes, .* 1000 tokens"),
    (lambda f: cut(f, 1), r"shard-00000\.bin: 3999 bytes"),
    (lambda f: append(f, 1), r"shard-00000\.bin: 4001 bytes"),
    (lambda f: append(f, 4), r"shard-00000\.bin: 4004 bytes"),
    (lambda f: cut(f, 4000), r"shard-00000\.bin: 0 bytes"),
    (lambda f: (f / "shard-00001.bin").unlink(), r"shard-00001\.bin: missing"),
    (lambda f: (f / "shard-00077.bin").write_bytes(b"\0" * 8), r"shard-00077\.bin: not in"),
    (lambda f: (f / "more.bin").write_bytes(b"\0" * 8), r"more\.bin: not in"),
    (plant_id, r"shard-00000\.bin: token 17 has id 12345, vocab_size is 331"),
    (swap_ids, r"audit\.\w+ = .*, measured"),
    (lambda f: (f / "manifest.json").write_text("{"), "not JSON"),
    (lambda f: (f / "manifest.json").write_text("[]"), "format = 'list'"),
]


def check_fault(folder: Path, fault: Callable[[Path], Any], pattern: str) -> None:
    TokenShards(folder)
    fault(folder)
    with pytest.raises(MalformedFile, match=pattern) as e:
        TokenShards(folder)
    assert str(folder) in str(e.value)


@pytest.mark.parametrize(("fault", "pattern"), FILE_FAULTS)
def test_faults_of_the_files_are_found(shard_dir: Path, fault: Callable[[Path], Any], pattern: str) -> None:
    check_fault(shard_dir, fault, pattern)


@pytest.mark.parametrize(("changes", "pattern"), MANIFEST_FAULTS)
def test_faults_of_the_manifest_are_found(shard_dir: Path, changes: dict[str, Any], pattern: str) -> None:
    check_fault(shard_dir, lambda f: edit_manifest(f, **changes), pattern)


def test_a_manifest_with_more_ids_than_its_tokenizer_is_found(shard_dir: Path, tok: Tokenizer) -> None:
    """Ids that no tokenizer gives would read outside the embedding."""
    TokenShards(shard_dir, tok)
    edit_manifest(shard_dir, vocab_size=tok.vocab_size + 1)
    TokenShards(shard_dir)
    with pytest.raises(MalformedFile, match=r"vocab_size = \d+, its tokenizer has"):
        TokenShards(shard_dir, tok)


@pytest.mark.parametrize(("changes", "pattern"), ROW_FAULTS)
def test_faults_of_a_shard_row_are_found(shard_dir: Path, changes: dict[str, Any], pattern: str) -> None:
    check_fault(shard_dir, lambda f: edit_shard_row(f, **changes), pattern)


def test_without_verify_only_the_data_goes_unread(shard_dir: Path) -> None:
    flip_byte(shard_dir)
    assert TokenShards(shard_dir, verify=False).total_documents == 40
    append(shard_dir, 4)
    with pytest.raises(MalformedFile, match="4004 bytes"):
        TokenShards(shard_dir, verify=False)


def test_another_tokenizer_is_refused(shard_dir: Path, tok: Tokenizer, tmp_path: Path) -> None:
    other = train_tokenizer(["abc"], 300, tmp_path / "other")
    with pytest.raises(Refused, match=f"{tok.sha256}.*{other.sha256}"):
        TokenShards(shard_dir, other)
    with pytest.raises(InputNotFound, match=r"manifest\.json"):
        TokenShards(tmp_path)


def test_writer_refuses(shard_dir: Path, tok: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="holds shards already"):
        ShardWriter(shard_dir, tok)
    with pytest.raises(Refused, match="eos_policy = 'x'"):
        ShardWriter(tmp_path / "a", tok, eos_policy="x")
    with pytest.raises(Refused, match="shard_tokens = 0"):
        ShardWriter(tmp_path / "a", tok, shard_tokens=0)
    with pytest.raises(Refused, match="empty"):
        write(tmp_path / "b", tok, [])
    (tmp_path / "file").write_text("")
    with pytest.raises(IOFailure, match="file"):
        ShardWriter(tmp_path / "file" / "below", tok)
    d = json.loads(tok.json)
    d["added_tokens"][-1]["special"] = False  # then the library finds it in text, whatever it is told
    loose = Tokenizer.from_json(json.dumps(d), "memory", "<|endoftext|>")
    with pytest.raises(Refused, match="doc-7: its text encodes to the EOS id"):
        write(tmp_path / "c", loose, [Document("doc-7", "a<|endoftext|>b")])


def test_interrupted_encoding_is_known(
    tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def documents_then_ctrl_c() -> Iterator[Document]:
        yield from corpus()
        raise KeyboardInterrupt

    monkeypatch.setattr("apr.data.shards.BATCH_CHARS", 1000)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, tok, documents_then_ctrl_c(), 500)
    m = json.loads((tmp_path / "manifest.json").read_text())
    assert m["complete"] is False
    assert m["shard_count"] == len(list(tmp_path.glob("shard-*.bin"))) > 1
    with pytest.raises(MalformedFile, match="did not finish"):
        TokenShards(tmp_path)


# --- windows and batches


def test_windows_predict_each_token_once(tok: Tokenizer, tmp_path: Path) -> None:
    shards = TokenShards(write(tmp_path / "s", tok, corpus(12), 97))
    windows = Windows(shards, 5)
    ids, targets = windows.read(np.arange(len(windows)))
    assert ids.dtype == targets.dtype == np.int32
    assert ids.shape == targets.shape == (len(windows), 5)
    whole = [a[1 : 1 + (a.size - 1) // 5 * 5] for a in shards.arrays]
    assert np.array_equal(targets.ravel(), np.concatenate(whole))
    assert np.array_equal(ids[:, 1:], targets[:, :-1])
    firsts = sum(a.size > 5 for a in shards.arrays)
    assert windows.tokens_dropped == shards.total_tokens - targets.size - firsts > 0
    assert 97 % 5 == 2  # each full shard: a first token, 19 windows, one token dropped
    with pytest.raises(Refused, match=f"seq_length = 97 .* {shards.total_tokens} tokens"):
        Windows(shards, 97)
    assert len(Windows(shards, 96)) == sum(a.size == 97 for a in shards.arrays)
    with pytest.raises(Refused, match="seq_length = 0"):
        Windows(shards, 0)


def test_split_holds_out_the_last_windows(tok: Tokenizer, tmp_path: Path) -> None:
    whole = windows_of(tmp_path, tok, 30, shard_tokens=50)
    train, val = whole.split(7)
    parts = [np.concatenate([t for _, t in sequential(w, 4)]) for w in (train, val)]
    assert [len(p) for p in parts] == [len(train), len(val)] == [len(whole) - 7, 7]
    assert np.array_equal(np.concatenate(parts), whole.read(np.arange(len(whole)))[1])
    rows = {row.tobytes() for row in stream(Batches(train, 3, seed=0), 50).reshape(-1, 4)}
    assert len(rows) == len(train)
    assert not rows & {row.tobytes() for row in val.read(np.arange(7))[0]}
    with pytest.raises(Refused, match="data position: windows = "):
        Batches(train, 3, seed=0).restore(Batches(whole, 3, seed=0).state())
    with pytest.raises(Refused, match="first_window = "):  # as many windows, but others
        Batches(val, 3, seed=0).restore(Batches(train.split(7)[1], 3, seed=0).state())
    for held in (0, len(whole)):
        with pytest.raises(Refused, match=f"{held} of {len(whole)} windows held out"):
            whole.split(held)


@pytest.mark.parametrize("n", [1, 2, 5, 59, 97, 1025])
def test_permutation(n: int) -> None:
    everything = np.arange(n)
    images = [Permutation(n, seed, number)(everything) for seed in (0, 1) for number in (0, 1, 2)]
    for image in images:
        assert np.array_equal(np.sort(image), everything)
    if n > 50:
        assert len({image.tobytes() for image in images}) == len(images)
        for image in images:
            assert abs(np.corrcoef(everything, image)[0, 1]) < 4 / math.sqrt(n)
            assert (np.abs(np.diff(image)) == 1).mean() < 0.1
            assert np.array_equal(Permutation(n, 0, 0)(everything[::-1]), images[0][::-1])


def test_permutation_is_frozen() -> None:
    # a saved position means the same windows in every version: a change here breaks --resume
    assert Permutation(10, 42, 0)(np.arange(10)).tolist() == [5, 3, 8, 0, 4, 2, 1, 7, 9, 6]
    assert (Permutation(1 << 40, 1, 0)(np.array([0, 1, (1 << 40) - 1])) < 1 << 40).all()


def stream(b: Batches, steps: int) -> np.ndarray:
    return np.stack([b.next()[0] for _ in range(steps)])


def test_a_pass_reads_every_window_once(tok: Tokenizer, tmp_path: Path) -> None:
    windows = windows_of(tmp_path, tok, 60)
    in_order = windows.read(np.arange(60))[0]
    b = Batches(windows, 5, seed=3)
    first, second = (stream(b, 12).reshape(60, 4) for _ in range(2))
    assert b.passes == 2
    for seen in (first, second):
        assert np.array_equal(
            seen[np.argsort(seen[:, 0], kind="stable")], in_order[np.argsort(in_order[:, 0])]
        )
        assert not np.array_equal(seen, in_order)
    assert not np.array_equal(first, second)
    plain = Batches(windows, 5, seed=3, shuffle=False)
    assert np.array_equal(stream(plain, 24).reshape(120, 4), np.concatenate([in_order, in_order]))
    assert np.array_equal(stream(Batches(windows, 5, seed=3), 12).reshape(60, 4), first)
    assert not np.array_equal(stream(Batches(windows, 5, seed=4), 12).reshape(60, 4), first)
    ids, targets = Batches(windows, 5, seed=3).next()
    assert np.array_equal(ids[:, 1:], targets[:, :-1])
    assert ids.dtype == targets.dtype == np.int32
    assert ids.flags.c_contiguous
    assert targets.flags.c_contiguous


@pytest.mark.parametrize(("count", "size"), [(7, 3), (2, 5), (1, 3)])
def test_batches_straddle_passes(tok: Tokenizer, tmp_path: Path, count: int, size: int) -> None:
    windows = windows_of(tmp_path, tok, count)
    seen = stream(Batches(windows, size, seed=1), count).reshape(-1, 4)
    order = windows.read(np.arange(count))[0]
    for i in range(size):  # `size` passes in `count` batches
        rows = seen[i * count : (i + 1) * count]
        assert np.array_equal(rows[np.argsort(rows[:, 0])], order)


@pytest.mark.parametrize("shuffle", [True, False])
def test_resume_is_exact_across_a_pass_boundary(tok: Tokenizer, tmp_path: Path, shuffle: bool) -> None:
    windows = windows_of(tmp_path, tok, 11)
    whole = stream(Batches(windows, 3, seed=9, shuffle=shuffle), 12)
    for at in range(12):
        a = Batches(windows, 3, seed=9, shuffle=shuffle)
        for _ in range(at):
            a.next()
        state = json.loads(json.dumps(a.state()))
        assert (state["pass"], state["position"]) == divmod(3 * at, 11)
        assert a.passes == state["pass"]
        b = Batches(windows, 3, seed=9, shuffle=shuffle)
        b.restore(state)
        assert b.state() == state
        if at < 12:
            assert np.array_equal(stream(b, 12 - at), whole[at:])


def test_drawing_ahead_changes_nothing_but_when_data_is_read(tok: Tokenizer, tmp_path: Path) -> None:
    windows = windows_of(tmp_path, tok, 11)
    plain, ahead = Batches(windows, 3, seed=9), Batches(windows, 3, seed=9)
    start = plain.state()
    for _ in range(9):
        ahead.draw_ahead()
        ahead.draw_ahead()  # once is enough
        assert ahead.state() == plain.state()
        assert all(np.array_equal(a, b) for a, b in zip(ahead.next(), plain.next(), strict=True))
    ahead.draw_ahead()
    ahead.restore(start)  # forgets what was drawn
    assert np.array_equal(ahead.next()[0], Batches(windows, 3, seed=9).next()[0])


def test_state_of_other_data_is_refused(tok: Tokenizer, tmp_path: Path) -> None:
    windows = windows_of(tmp_path, tok, 11)
    b = Batches(windows, 3, seed=9)
    b.next()
    good = b.state()
    others = {
        "data_sha256": Batches(windows_of(tmp_path, tok, 12), 3, seed=9),
        "seq_length": Batches(Windows(windows.shards, 5), 3, seed=9),
        "step_windows": Batches(windows, 4, seed=9),
        "seed": Batches(windows, 3, seed=8),
        "shuffle": Batches(windows, 3, seed=9, shuffle=False),
    }
    for key, other in others.items():
        with pytest.raises(Refused, match=f"{key} = "):
            other.restore(good)
    bad: list[tuple[str, Any]] = [
        ("position", 11),
        ("position", -1),
        ("position", 1.0),
        ("pass", -1),
        ("pass", None),
    ]
    for key, value in bad:
        with pytest.raises(Refused, match=f"{key} = {value}"):
            b.restore({**good, key: value})
    with pytest.raises(Refused, match="seed = None"):
        b.restore({k: v for k, v in good.items() if k != "seed"})
    with pytest.raises(Refused, match="not a state"):
        b.restore([])  # type: ignore[arg-type]
    assert b.state() == good


def test_exhausted_is_typed_and_repeats(tok: Tokenizer, tmp_path: Path) -> None:
    b = Batches(windows_of(tmp_path, tok, 11), 3, seed=9, on_exhausted="stop")
    seen = stream(b, 3).reshape(-1, 4)
    assert len(np.unique(seen[:, 0])) == 9
    for _ in range(2):
        with pytest.raises(Exhausted, match="2 of 11 windows left, a step takes 3"):
            b.next()
    with pytest.raises(Refused, match="a step takes 12 windows, there are 11"):
        Batches(b.windows, 12, seed=9, on_exhausted="stop")
    for bad in ({"batch_size": 0}, {"rank": 1}, {"world": 0}, {"on_exhausted": "x"}):
        with pytest.raises(Refused):
            Batches(**{"windows": b.windows, "batch_size": 3, "seed": 0, **bad})  # type: ignore[arg-type]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_are_the_single_stream(tok: Tokenizer, tmp_path: Path, world: int) -> None:
    windows = windows_of(tmp_path, tok, 25)
    one = Batches(windows, 2 * world, seed=7)
    ranks = [Batches(windows, 2, seed=7, rank=r, world=world) for r in range(world)]
    for _ in range(30):
        assert np.array_equal(np.concatenate([r.next()[0] for r in ranks]), one.next()[0])
        assert all(r.state() == one.state() for r in ranks)
    fresh = Batches(windows, 2 * world, seed=7)
    fresh.restore(ranks[-1].state())  # another number of ranks, the same step
    assert np.array_equal(fresh.next()[1], one.next()[1])


def test_sequential_reads_every_window_once(tok: Tokenizer, tmp_path: Path) -> None:
    windows = windows_of(tmp_path, tok, 11, shard_tokens=20)
    got = list(sequential(windows, 3))
    assert [len(ids) for ids, _ in got] == [3] * (len(windows) // 3) + [len(windows) % 3] * (
        len(windows) % 3 > 0
    )
    assert np.array_equal(np.concatenate([t for _, t in got]), windows.read(np.arange(len(windows)))[1])
    assert [len(ids) for ids, _ in sequential(windows, 4, max_windows=6)] == [4, 2]
    few = np.concatenate([ids for ids, _ in sequential(windows, 3, max_windows=6)])
    assert np.array_equal(few, np.concatenate([ids for ids, _ in sequential(windows, 4, max_windows=6)]))
    spaced = windows.read(np.arange(6) * windows.count // 6)[0]
    assert np.array_equal(few, spaced)
    assert len(np.unique(few, axis=0)) == 6
    with pytest.raises(Refused, match="batch_size = 0"):
        next(sequential(windows, 0))


# --- prepare


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_prepare_splits_encodes_and_reuses(tmp_path: Path) -> None:
    docs = corpus(60)
    calls: list[tuple[str, int, int]] = []
    made = prepare(
        docs, tmp_path / "p", vocab_size=300, val_fraction=0.2, progress=lambda *a: calls.append(a)
    )
    assert not made.reused
    assert made.reason == "nothing prepared yet"
    assert {c[0] for c in calls} == {"train tokenizer", "encode train", "encode val"}
    assert ("encode train", made.train.total_documents, made.train.total_documents) in calls

    def texts(shards: TokenShards) -> set[str]:
        return set(made.tokenizer.decode(np.concatenate(shards.arrays)).split("<|endoftext|>")) - {""}

    train, val = texts(made.train), texts(made.val)
    assert train | val == {d.text for d in docs}
    assert not train & val
    assert val == {d.text for d in docs if is_held_out(d.sha256, 0.2)}
    in_train = made.tokenizer.decode(made.train.arrays[0]).split("<|endoftext|>")[:-1]
    assert in_train == sorted(in_train, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    before = files_of(tmp_path / "p")
    again = prepare(reversed(docs), tmp_path / "p", vocab_size=300, val_fraction=0.2)
    assert again.reused
    assert files_of(tmp_path / "p") == before
    assert again.train.sha256 == made.train.sha256
    assert (again.train_dir, again.val_dir) == (tmp_path / "p" / "train", tmp_path / "p" / "val")
    # the same set in another order, prepared from nothing, is the same bytes
    prepare(reversed(docs), tmp_path / "q", vocab_size=300, val_fraction=0.2)
    assert files_of(tmp_path / "q") == before


def test_prepare_keeps_copies_on_one_side(tmp_path: Path) -> None:
    docs = corpus(30) + [Document(f"copy of {d.name}", d.text) for d in corpus(30)]
    made = prepare(docs, tmp_path, vocab_size=300, val_fraction=0.3)
    sides = []
    for shards in (made.train, made.val):
        sides.append(set(made.tokenizer.decode(np.concatenate(shards.arrays)).split("<|endoftext|>")) - {""})
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 30


def test_prepare_trains_its_tokenizer_on_the_training_side(tmp_path: Path) -> None:
    docs = corpus(30)
    held = next(d for d in docs if is_held_out(d.sha256, 0.3))
    marked = [d for d in docs if d is not held]
    i = 0
    while not is_held_out(hashlib.sha256((secret := f"zqzq{i} " * 500).encode()).hexdigest(), 0.3):
        i += 1
    made = prepare([*marked, Document("secret", secret)], tmp_path, vocab_size=400, val_fraction=0.3)
    assert len(made.tokenizer.encode(" zqzq")) >= 4


def test_prepare_rebuilds_what_changed(tmp_path: Path, tok: Tokenizer) -> None:
    docs = corpus(40)
    keys = set()
    variants: list[dict[str, Any]] = [
        {"vocab_size": 300},
        {"vocab_size": 301},
        {"vocab_size": 301, "val_fraction": 0.3},
        {"tokenizer": tok},
        {"tokenizer": tok, "shard_tokens": 500},
    ]
    for kwargs in variants:
        made = prepare(docs, tmp_path, **{"val_fraction": 0.2, **kwargs})
        assert not made.reused
        assert prepare(docs, tmp_path, **{"val_fraction": 0.2, **kwargs}).reused
        keys.add(made.key)
    made = prepare([*docs, Document("new", "one more")], tmp_path, tokenizer=tok, val_fraction=0.2)
    assert made.reason == "made from other input"
    assert made.tokenizer.sha256 == tok.sha256
    assert len(keys | {made.key}) == 6


def test_prepare_rebuilds_what_is_damaged(tmp_path: Path) -> None:
    docs = corpus(20)

    def again() -> Any:
        return prepare(docs, tmp_path, vocab_size=300, val_fraction=0.2, shard_tokens=1500)

    again()
    good = files_of(tmp_path)
    shard = tmp_path / "train" / "shard-00001.bin"
    damages: list[tuple[Callable[[], Any], str]] = [
        (lambda: flip_byte(tmp_path / "train"), "sha256 is"),
        (lambda: shard.unlink(), "missing"),
        (lambda: shutil.rmtree(tmp_path / "val"), "no such file"),
        (lambda: (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}"), "not a tokenizer.json"),
        (lambda: (tmp_path / "prepared.json").write_text("{"), "not JSON"),
        (lambda: (tmp_path / "prepared.json").write_text('{"format": "apr-prepared-1"}'), "did not finish"),
        (lambda: edit_json(tmp_path / "prepared.json", val_sha256="0"), "val_sha256 = '0'"),
    ]
    for damage, reason in damages:
        damage()
        made = again()
        assert not made.reused
        assert reason in made.reason
        assert files_of(tmp_path) == good
    assert again().reused


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_prepare_refuses(tmp_path: Path, tok: Tokenizer) -> None:
    docs = corpus(10)
    for kwargs in ({}, {"vocab_size": 300, "tokenizer": tok}):
        with pytest.raises(Refused, match="either a vocab_size"):
            prepare(docs, tmp_path, **kwargs)  # type: ignore[arg-type]
    for fraction in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(Refused, match="val_fraction"):
            prepare(docs, tmp_path, vocab_size=300, val_fraction=fraction)
    with pytest.raises(Refused, match="leaves none for val"):
        prepare(docs, tmp_path, vocab_size=300, val_fraction=1e-9)
    with pytest.raises(Refused, match="leaves none for train"):
        prepare(docs, tmp_path, vocab_size=300, val_fraction=1 - 1e-9)
    assert not list(tmp_path.iterdir())


def test_prepare_never_removes_what_it_did_not_make(tmp_path: Path, tok: Tokenizer) -> None:
    write(tmp_path / "train", tok, corpus(5))
    before = files_of(tmp_path)
    for _ in range(2):
        with pytest.raises(Refused, match="not made by an earlier run"):
            prepare(corpus(10), tmp_path, vocab_size=300, val_fraction=0.5)
        assert files_of(tmp_path) == before


TWICE = """
import sys
from pathlib import Path
from apr.data.prepare import prepare
from apr.data.corpus import documents
prepare(documents(sys.argv[1]), sys.argv[2], vocab_size=350, val_fraction=0.3)
"""


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    for d in corpus(30):
        (tmp_path / f"{d.name}.txt").write_text(d.text)
    outputs = []
    for i, threads in enumerate(("true", "false")):
        out = tmp_path / f"out{i}"
        env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONHASHSEED": str(i),
            "TOKENIZERS_PARALLELISM": threads,
        }
        run = [sys.executable, "-c", TWICE, str(tmp_path), str(out)]
        done = subprocess.run(run, env=env, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        assert done.stdout == ""
        outputs.append(files_of(out))
        shutil.rmtree(out)
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 8


FORK = """
import os
from apr.data.tokenizer import train_tokenizer
tok = train_tokenizer(["ab ab ab"] * 100, 300, "tok")
rows = len(tok.encode_batch(["ab"] * 100))
pid = os.fork()
if not pid:
    os._exit(0 if len(tok.encode_batch(["ab"] * 100)) == rows else 1)
print(os.waitpid(pid, 0)[1])
"""


@pytest.mark.parametrize("setting", [{}, {"TOKENIZERS_PARALLELISM": "true"}], ids=["unset", "true"])
def test_a_fork_neither_warns_nor_hangs(tmp_path: Path, setting: dict[str, str]) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    env = {**env, **setting, "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-c", FORK]
    done = subprocess.run(run, env=env, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_tinyshakespeare_through_the_whole_path(tmp_path: Path) -> None:
    (document,) = documents(data_file("tinyshakespeare/input.txt"))
    docs = list(pieces(document, 4000))
    made = prepare(docs, tmp_path, vocab_size=512, val_fraction=0.1)
    assert made.tokenizer.vocab_size == 512
    assert made.train.total_bytes + made.val.total_bytes == len(document.data) == 1115394
    assert 0.05 < made.val.total_bytes / 1115394 < 0.15
    for shards in (made.train, made.val):
        assert 1.8 < shards.manifest.audit["bytes_per_token"] < 2.6
        assert 4.5 < shards.unigram_entropy < math.log(512)
    windows = Windows(made.train, 128)
    ids, targets = Batches(windows, 8, seed=42).next()
    assert ids.shape == targets.shape == (8, 128)
    text = made.tokenizer.decode(ids[0])
    assert all(part in document.text for part in text.split("<|endoftext|>"))
    held = sum(t.size for _, t in sequential(Windows(made.val, 128), 32))
    assert held == made.val.total_tokens - 1 - Windows(made.val, 128).tokens_dropped
    assert prepare(docs, tmp_path, vocab_size=512, val_fraction=0.1).reused
