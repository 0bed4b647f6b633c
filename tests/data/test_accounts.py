"""The account of documents: every kind of file, sound and with what happens to files; and the faults it is for."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
from pathlib import Path
from typing import Any

import pytest

from apr.common.finding import FAIL, PASS, SKIPPED, Finding
from apr.data import accounts, corpus, encode, jsonl, shard_writer, text
from apr.data.accounts import accounted
from apr.data.corpus import Corpus
from apr.data.documents import Document, Sides
from apr.data.find import find_sources
from apr.data.prepare import prepare
from apr.data.seen import Seen
from apr.data.shards import TokenShards
from apr.tokenizer.tokenizer import Tokenizer
from apr.tokenizer.training import train_tokenizer
from data_cases import CODE
from data_cases import corpus as documents

TEXTS = [d.text for d in documents(30)]


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(TEXTS, 400, tmp_path_factory.mktemp("tok"))


def records(texts: list[Any]) -> bytes:
    return b"".join(json.dumps({"text": t, "n": 10**400}).encode() + b"\n" for t in texts)


def packed_zst(data: bytes) -> bytes:
    import zstandard

    half = len(data) // 2
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in (data[:half], data[half:]))


def write_parquet(path: Path, texts: list[Any]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": texts, "other": [1] * len(texts)}), path)


def plant_files(folder: Path) -> None:
    """Files of every kind, with what happens to files; each text many times."""
    for i, t in enumerate(TEXTS):
        (folder / f"{i:02}.txt").write_text(t)
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf" + ("marked\r\n" + CODE).encode())
    (folder / "b.txt").write_bytes(("wide " + CODE).encode("utf-16"))
    (folder / "c.txt").write_bytes(b"nul \0 inside" + CODE.encode())
    (folder / "d.txt").write_bytes(b"latin-1 \xe9" + CODE.encode())
    (folder / "e.txt").write_bytes(b"")
    (folder / "f.txt").write_text(TEXTS[3])
    (folder / "g.txt").write_text("<|endoftext|> as a text, \u212b and e\u0301 " + CODE)
    (folder / "h.txt.gz").write_bytes(gzip.compress(b"packed " + CODE.encode()) + gzip.compress(b" twice"))
    (folder / "i.txt.xz").write_bytes(lzma.compress(b"packed by xz " + CODE.encode()))
    (folder / "j.txt.bz2").write_bytes(bz2.compress(b"packed by bz2 " + CODE.encode()))
    (folder / "k.txt.zst").write_bytes(packed_zst(b"packed by zst " + CODE.encode()))
    odd = ["", None, 5, "a\ud800b", "line\u2028end\x85", TEXTS[5], "\ufeffmarked", "x"]
    broken = b'{"text": "broken\n\n   \n{"other": 1}\n["text"]\n' + b"\xff\n"
    (folder / "l.jsonl").write_bytes(b"\xef\xbb\xbf" + records([t + "jsonl" for t in TEXTS[:9]]) + broken)
    (folder / "m.jsonl.zst").write_bytes(packed_zst(records(odd)))
    (folder / "n.jsonl").write_bytes(
        b"\r\n".join(records(["last without an end", "twice"]).split(b"\n"))[:-2]
    )
    (folder / "o.json").write_text(json.dumps([{"text": t + "array"} for t in [*TEXTS[:5], ""]], indent=1))
    (folder / "p.json").write_text('{\n"a": [\n{"text": "is no record"}\n]}')
    (folder / "q.json").write_bytes(records(["lines in .json"]))
    write_parquet(
        folder / "r.parquet", [t + "parquet" if t else t for t in [*TEXTS[:80], None, "", "\u00e9"]]
    )


def account(corpus: Corpus, folder: Path, tok: Tokenizer, fraction: float = 0.3, **options: Any) -> Finding:
    made = prepare(corpus, folder, tokenizer=tok, val_fraction=fraction, shard_tokens=700, **options)
    shards = {side: TokenShards(path, tok) for side, path in made.sides.items()}
    return accounted(corpus, made.folder, shards, tok, fraction, made.distinct)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    plant_files(tmp_path / "in")
    return tmp_path / "in"


def test_every_kind_of_file_is_followed(files: Path, tmp_path: Path, tok: Tokenizer) -> None:
    found = account(Corpus(find_sources([files])), tmp_path / "out", tok)
    assert found.passed, found
    assert "of all files" in found.measured
    assert " 2 copies" in found.measured


def test_a_tokenizer_that_normalizes(files: Path, tmp_path: Path, data: Any) -> None:
    """NFC, and two documents that differ before it alone."""
    qwen = Tokenizer.from_file(data("qwen2-tokenizer"))
    assert qwen.normalization == "NFC"
    (files / "s.txt").write_text("e\u0301 " + CODE)
    (files / "t.txt").write_text("\u00e9 " + CODE)
    found = account(Corpus(find_sources([files])), tmp_path / "out", qwen)
    assert found.passed, found
    assert "of all files" in found.measured


@pytest.mark.parametrize("change", ["a copy more", "a copy less"])
def test_a_cache_that_is_used_again_says_nothing_of_copies(
    tmp_path: Path, tok: Tokenizer, change: str
) -> None:
    for name in "abcdef" + "x" * (change == "a copy less"):
        (tmp_path / f"{name}.txt").write_text(("a" if name == "x" else name) + CODE)
    prepare(Corpus(find_sources([tmp_path])), tmp_path / "out", tokenizer=tok, val_fraction=0.3)
    (tmp_path / "x.txt").unlink(missing_ok=True)
    if change == "a copy more":
        (tmp_path / "x.txt").write_text("a" + CODE)
    corpus = Corpus(find_sources([*sorted(tmp_path.glob("*.txt"))]))
    made = prepare(corpus, tmp_path / "out", tokenizer=tok, val_fraction=0.3)
    shards = {side: TokenShards(path, tok) for side, path in made.sides.items()}
    assert made.reused
    found = accounted(corpus, made.folder, shards, tok, 0.3, made.distinct, made.reused)
    assert found.passed, found


def test_a_long_text_is_followed_as_far_as_a_check_reads(
    tmp_path: Path, tok: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounts, "BUDGET_BYTES", 4001)
    (tmp_path / "one.txt").write_text("".join(f"{i} \u00e9\u00e9 line\n" for i in range(2000)))
    corpus = Corpus(find_sources([tmp_path / "one.txt"]), piece_bytes=500)
    found = account(corpus, tmp_path / "out", tok)
    assert found.passed, found
    assert "of the beginning of the files" in found.measured
    with monkeypatch.context() as m:
        m.setattr(accounts, "beginning", lambda source, left: (b"other " * 600, False))
        assert account(corpus, tmp_path / "out", tok).passed is False


@pytest.mark.parametrize("seed", range(4))
def test_pieces_of_a_file_that_repeats_itself(tmp_path: Path, tok: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    lines = ["aa\n", "\n", "b c\n", "\r\n", "", "\n\n"]
    text = "".join(rng.choices(lines[: 2 + seed], k=3000)) + "the end"
    (tmp_path / "one.txt").write_bytes(text.encode())
    found = account(Corpus(find_sources([tmp_path / "one.txt"]), piece_bytes=64), tmp_path / "out", tok)
    assert found.passed, found
    assert "of all files" in found.measured


def test_what_only_another_decoder_reads_is_no_fault(tmp_path: Path, tok: Tokenizer) -> None:
    for name in "abcdef":
        (tmp_path / f"{name}.txt").write_text(name + CODE)
    (tmp_path / "g.txt.bz2").write_bytes(bz2.compress(("g" + CODE).encode()) + b"bytes behind the archive")
    (tmp_path / "h.txt").write_text("h" + CODE)
    assert account(Corpus(find_sources([tmp_path])), tmp_path / "out", tok).verdict != FAIL


def test_a_check_that_compared_nothing_has_not_passed(
    tmp_path: Path, tok: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounts, "BUDGET_BYTES", 50)
    (tmp_path / "a.jsonl").write_bytes(records(["a" * 200, "b", "c" * 90, *"defghi"]))
    assert account(Corpus(find_sources([tmp_path / "a.jsonl"])), tmp_path / "out", tok).verdict == SKIPPED


def test_what_no_shard_says_is_not_asked(tmp_path: Path, files: Path, data: Any) -> None:
    stories = Tokenizer.from_file(data("stories260K") / "hf")
    (files / "c.txt").unlink()
    plain = Corpus(find_sources([*sorted(files.glob("0*.txt"))]))
    found = account(plain, tmp_path / "out", stories)
    assert found.passed is None
    assert "do not give back" in found.why


DAMAGED = {
    "h.txt.gz": "the beginning",
    "m.jsonl.zst": "all",
    "o.json": "the beginning",
    "r.parquet": "the beginning",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_ends_the_walk(files: Path, tmp_path: Path, tok: Tokenizer, name: str) -> None:
    """Or is left out, where what is damaged cannot be read at all, or ends like a shorter file."""
    data = (files / name).read_bytes()
    (files / name).write_bytes(data[: len(data) * 2 // 3])
    found = account(Corpus(find_sources([files])), tmp_path / "out", tok)
    assert found.passed, found
    assert f" of {DAMAGED[name]}" in found.measured


@pytest.mark.parametrize("budget", [1, 300, 2000, 9000, 20000])
def test_a_large_corpus_is_followed_for_a_while(
    files: Path, tmp_path: Path, tok: Tokenizer, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    monkeypatch.setattr(accounts, "BUDGET_BYTES", budget)
    found = account(Corpus(find_sources([files])), tmp_path / "out", tok)
    assert found.verdict == (SKIPPED if budget == 1 else PASS), found
    assert budget == 1 or "the beginning of the files" in found.measured


def lower_case(m: pytest.MonkeyPatch) -> None:
    m.setattr(
        Tokenizer,
        "encode_batch",
        lambda self, texts, *a, _right=Tokenizer.encode_batch: _right(self, [t.lower() for t in texts], *a),
    )
    m.setattr(Tokenizer, "check_round_trip", lambda self, text: None)


def copies_are_kept(m: pytest.MonkeyPatch) -> None:
    m.setattr(encode.Seen, "add", lambda self, sha: True)


def copies_are_kept_by_the_encoder(m: pytest.MonkeyPatch) -> None:
    class Blind(Seen):
        def add(self, sha256: str) -> bool:
            super().add(sha256)
            return True

    m.setattr(encode, "Seen", Blind)


def another_document_is_a_copy(m: pytest.MonkeyPatch) -> None:
    right = Seen.add
    m.setattr(encode, "Seen", type("Blind", (Seen,), {"add": lambda self, sha: right(self, sha[:1] * 64)}))


def files_are_left_out(m: pytest.MonkeyPatch) -> None:
    right = text._whole

    def whole(source: Any, blocks: Any) -> Any:
        return text.Skipped(source.name, "not UTF-8", "") if "07" in source.name else right(source, blocks)

    m.setattr(text, "_whole", whole)


def a_reader_strips(m: pytest.MonkeyPatch) -> None:
    right = jsonl.text_record

    def record(name: str, line: bytes, keys: Any) -> Any:
        item = right(name, line, keys)
        return Document(name, item.text.swapcase()) if isinstance(item, Document) else item

    m.setattr(corpus, "text_record", record)


def sides_are_exchanged(m: pytest.MonkeyPatch) -> None:
    right = Sides.hold_out
    m.setattr(Sides, "hold_out", lambda self, sha256: right(self, sha256[::-1]))


def documents_are_exchanged(m: pytest.MonkeyPatch) -> None:
    right = shard_writer.ShardWriter.append
    m.setattr(shard_writer.ShardWriter, "append", lambda self, ids: right(self, ids[::-1]))


FAULTS = {
    lower_case: "the shards have",
    copies_are_kept: "a copy of an earlier document",
    copies_are_kept_by_the_encoder: "a copy of an earlier document",
    another_document_is_a_copy: "the shards have",
    files_are_left_out: "was left out: not UTF-8",
    a_reader_strips: "the shards have",
    sides_are_exchanged: "on the other side",
    documents_are_exchanged: "the shards have",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_planted_fault_is_found(
    files: Path, tmp_path: Path, tok: Tokenizer, monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    with monkeypatch.context() as m:
        fault(m)
        made = prepare(Corpus(find_sources([files])), tmp_path / "out", tokenizer=tok, val_fraction=0.3)
    shards = {side: TokenShards(path, tok) for side, path in made.sides.items()}
    found = accounted(Corpus(find_sources([files])), made.folder, shards, tok, 0.3, made.distinct)
    assert found.passed is False, found
    assert FAULTS[fault] in found.measured
