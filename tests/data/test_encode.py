"""encode_corpus: the ids of the library, whatever the batches; split, copies, guards, kills."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr.common.atomic import locked
from apr.common.errors import IOFailure, Refused
from apr.data import cut, encode
from apr.data.documents import Document, Sides, is_held_out
from apr.data.encode import Counts, EncodedCorpus, encode_corpus
from apr.data.guards import Bounds
from apr.data.seen import Seen
from apr.data.shards import TokenShards
from apr.data.source import Skipped
from apr.tokenizer.tokenizer import Tokenizer
from apr.tokenizer.training import train_tokenizer
from data_cases import CODE, Memory, corpus, edit_json, files_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer([d.text for d in corpus()], 400, tmp_path_factory.mktemp("tok"))


def run(items: Any, tok: Tokenizer, folder: Path, **options: Any) -> EncodedCorpus:
    return encode_corpus(Memory(items), tok, folder, **{"val_fraction": 0.2, "shard_tokens": 1000, **options})


def stream(folder: Path) -> np.ndarray:
    return np.concatenate(TokenShards(folder).arrays)


def long_document(seed: int, n: int = 300_000) -> Document:
    rng = random.Random(seed)
    lines = [" " * rng.choice([0, 4, 8]) + rng.choice(CODE.splitlines()).strip() for _ in range(n // 20)]
    return Document(f"long{seed}", "\n".join(lines)[:n])


@pytest.mark.parametrize("eos", ["after", "between", "none"])
def test_ids_are_those_of_the_library(tok: Tokenizer, tmp_path: Path, eos: str) -> None:
    docs = [*corpus(30), long_document(1), *corpus(10, seed=6), long_document(2, 400_000)]
    made = run(docs, tok, tmp_path, eos_policy=eos, shard_tokens=40_000)
    for side in ("train", "val"):
        rows = [tok.encode(d.text) for d in docs if is_held_out(d.sha256, 0.2) == (side == "val")]
        end = [np.array([tok.eos_id], np.uint32)] if eos != "none" else []
        parts = [part for row in rows for part in (row, *end)]
        want = np.concatenate(parts[:-1] if eos == "between" else parts)
        np.testing.assert_array_equal(stream(tmp_path / side), want)
    assert made.counts.documents == {"train": made.train.total_documents, "val": made.val.total_documents}  # type: ignore[union-attr]
    assert made.counts.all == 42
    assert made.counts.text_bytes == sum(len(d.data) for d in docs)


def test_batches_and_threads_change_nothing(
    tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = [*corpus(30), long_document(1)]
    run(docs, tok, tmp_path / "usual")
    want = files_of(tmp_path / "usual")
    for batch, pieces, ahead in ((1, 4096, 1), (5000, 3, 9), (1 << 20, 1, 2)):
        monkeypatch.setattr(encode, "BATCH_CHARACTERS", batch)
        monkeypatch.setattr(encode, "BATCH_PIECES", pieces)
        monkeypatch.setattr(encode, "BATCHES_AHEAD", ahead)
        run(docs, tok, tmp_path / f"{batch}-{pieces}")
        assert files_of(tmp_path / f"{batch}-{pieces}") == want


def test_copies_are_dropped_and_bad_documents_named(tok: Tokenizer, tmp_path: Path) -> None:
    docs = corpus(20)
    bad = [Skipped("a.jsonl:7", "broken JSON", "no closing quote"), Skipped("b.txt", "not UTF-8", "byte 3")]
    copies = [Document(f"copy of {d.name}", d.text) for d in docs[:7]]
    made = run([bad[0], *docs, *copies, bad[1]], tok, tmp_path)
    assert made.counts.duplicates == 7
    assert made.counts.all == 20
    assert made.counts.skipped == {"broken JSON": 1, "not UTF-8": 1}
    named = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [(n["name"], n["reason"]) for n in named] == [(b.name, b.reason) for b in bad]
    record = json.loads((tmp_path / "encode.json").read_text())
    assert record["complete"] is True
    assert record["result"]["skipped"] == made.counts.skipped
    ids = [
        s
        for side in ("train", "val")
        for s in "".join(map(chr, stream(tmp_path / side))).split(chr(tok.eos_id or 0))
    ]
    assert len(ids) - 2 == 20  # an empty piece after the last EOS of each side


def test_a_document_is_on_the_same_side_in_every_run(tok: Tokenizer, tmp_path: Path) -> None:
    docs = corpus(60)
    run(docs, tok, tmp_path / "all")
    run(docs[20:][::-1] + corpus(9, seed=8), tok, tmp_path / "others")

    def texts(folder: Path) -> set[str]:
        return set(tok.decode(stream(folder)).split("<|endoftext|>")) - {""}

    a, b = ({side: texts(tmp_path / run_ / side) for side in ("train", "val")} for run_ in ("all", "others"))
    assert a["val"]
    assert b["val"]
    assert not (a["train"] | b["train"]) & (a["val"] | b["val"])
    assert a["train"] | a["val"] == {d.text for d in docs}


def test_without_a_split_there_is_no_val(tok: Tokenizer, tmp_path: Path) -> None:
    made = run(corpus(14), tok, tmp_path, val_fraction=0.0)
    assert made.val is None
    assert made.train.total_documents == 14
    assert not (tmp_path / "val").exists()


def test_the_same_shards_for_any_number_of_threads(tmp_path: Path, tok: Tokenizer) -> None:
    source = tmp_path / "text"
    source.mkdir()
    for d in [*corpus(30), long_document(3)]:
        (source / f"{d.name}.txt").write_text(d.text)
    tok.save(tmp_path / "tok")
    outputs = []
    for workers in ("1", "2", "5"):
        out = tmp_path / f"out{workers}"
        done = command(source, tmp_path / "tok", out, "--workers", workers)
        assert done.returncode == 0, done.stderr
        outputs.append(files_of(out))
    assert outputs[0] == outputs[1] == outputs[2]


def command(source: Path, tok: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command_line(source, tok, out, *more), env=environment(), capture_output=True, text=True
    )


def command_line(source: Path, tok: Path, out: Path, *more: str) -> list[str]:
    fixed = ["--val-fraction", "0.2", "--shard-tokens", "900", *more]
    command = [sys.executable, "-m", "apr.cli.main", "tokenize", "encode-corpus", str(source)]
    return [*command, "--tokenizer", str(tok), "-o", str(out), *fixed]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


# apr that is killed where so many more shards are written, before the last one has its name or behind that.
KILLED = """
import os, signal, sys
from pathlib import Path
from apr.cli.main import main
left, has_name, *args = sys.argv[1:]
left, replace = int(left), os.replace
def replaced(a, b):
    global left
    left -= Path(b).name.startswith("shard-")
    if left or has_name == "yes":
        replace(a, b)
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replaced
sys.exit(main(args))
"""


def test_a_kill_at_any_moment_and_resume_give_the_same_bytes(tmp_path: Path, tok: Tokenizer) -> None:
    """kill -9 when so many shards are there, again and again, until it is done."""
    source = tmp_path / "text"
    source.mkdir()
    for d in [*corpus(40), *corpus(40, seed=7), long_document(3)]:
        (source / f"{d.name}-{d.sha256[:4]}.txt").write_text(d.text)
    tok.save(tmp_path / "tok")
    assert command(source, tmp_path / "tok", tmp_path / "whole").returncode == 0
    whole = files_of(tmp_path / "whole")
    out = tmp_path / "killed"
    rng = random.Random(11)
    for more, has_name in [
        *((rng.randint(1, 15), name) for name in ("yes", "no", "yes", "no")),
        (1 << 30, ""),
    ]:
        goes_on = ["--resume"] if (out / "encode.json").exists() else []
        line = command_line(source, tmp_path / "tok", out, *goes_on)
        line[1:3] = ["-c", KILLED, str(more), has_name]
        done = subprocess.run(line, env=environment(), capture_output=True, text=True)
        assert done.returncode == (-signal.SIGKILL if has_name else 0), done.stderr
        shards = {name for name in files_of(out) if name.endswith(".bin")}
        assert not has_name or shards < {name for name in whole if name.endswith(".bin")}
        for side in ("train", "val"):  # whole shards and a true manifest
            path = out / side / "manifest.json"
            for row in json.loads(path.read_text())["shards"] if path.exists() else []:
                assert hashlib.sha256((out / side / row["name"]).read_bytes()).hexdigest() == row["sha256"]
    assert files_of(out) == whole


class Stopped(Exception):
    pass


def stop_after(items: list[Any], n: int) -> Iterator[Any]:
    yield from items[:n]
    raise Stopped


class Stopping(Memory):
    """A corpus whose reading dies after so many documents."""

    def __init__(self, items: list[Any], n: int) -> None:
        super().__init__(items)
        self.n = n

    def __iter__(self) -> Iterator[Any]:
        return stop_after(self.items, self.n)


def test_stopped_at_every_place_and_resumed(
    tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 300)
    monkeypatch.setattr(encode, "BATCHES_AHEAD", 1)
    docs: list[Any] = [long_document(4), *corpus(24), *corpus(5), Skipped("x", "empty", "")]
    run(docs, tok, tmp_path / "whole", shard_tokens=17_000)
    whole = files_of(tmp_path / "whole")
    for n in range(0, 31, 5):
        folder = tmp_path / str(n)
        with pytest.raises(Stopped):
            encode_corpus(Stopping(docs, n), tok, folder, val_fraction=0.2, shard_tokens=17_000)
        with pytest.raises(Refused, match="an unfinished encoding; go on with --resume"):
            run(docs, tok, folder, shard_tokens=17_000)
        run(docs, tok, folder, shard_tokens=17_000, resume=True)
        assert files_of(folder) == whole
    with pytest.raises(Refused, match="complete: nothing to resume"):
        run(docs, tok, tmp_path / "5", shard_tokens=17_000, resume=True)
    with pytest.raises(Refused, match="holds shards already"):
        run(docs, tok, tmp_path / "5", shard_tokens=17_000)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"val_fraction": 0.3}, r"val_fraction = 0\.2 when it was begun, 0\.3 now"),
        ({"shard_tokens": 171}, "shard_tokens = 170 when it was begun, 171 now"),
        ({"made": {"inputs": ["b"]}}, r"inputs = None when it was begun, \['b'\] now"),
    ],
)
def test_resuming_with_other_settings_is_refused(
    tok: Tokenizer, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(Stopped):
        encode_corpus(Stopping(corpus(20), 15), tok, tmp_path, val_fraction=0.2, shard_tokens=170)
    with pytest.raises(Refused, match=words):
        run(corpus(20), tok, tmp_path, **{"shard_tokens": 170, "resume": True, **options})


def test_two_encodings_of_one_folder_are_refused(tok: Tokenizer, tmp_path: Path) -> None:
    with (
        locked(tmp_path, "encoding into it"),
        pytest.raises(Refused, match="another process is encoding into it"),
    ):
        run(corpus(14), tok, tmp_path)
    run(corpus(14), tok, tmp_path)


@pytest.mark.parametrize("fraction", [1e-9, 0.2, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 20])
def test_a_few_documents_are_divided_whatever_their_hashes(
    tok: Tokenizer, tmp_path: Path, fraction: float, count: int
) -> None:
    """The document that the fraction leaves over is the one of the lowest hash, or of the highest."""
    docs = corpus(count)
    counts = run(docs, tok, tmp_path, val_fraction=fraction).counts.documents
    assert min(counts.values()) >= 1
    by_hash = [is_held_out(d.sha256, fraction) for d in docs]
    if any(by_hash) and not all(by_hash):
        assert counts["val"] == sum(by_hash)
        return
    side, chosen = ("val", min) if not any(by_hash) else ("train", max)
    assert counts[side] == 1
    want = chosen(docs, key=lambda d: d.sha256)
    assert tok.decode(stream(tmp_path / side)[:-1]) == want.text


def test_a_corpus_with_both_sides_is_read_no_further_and_moves_nothing() -> None:
    read = []

    def hashes() -> Iterator[str]:
        for d in corpus(40):
            read.append(d.sha256)
            yield d.sha256

    sides = Sides.of(hashes(), 0.5)
    assert sides == Sides(0.5)
    assert len(read) < 40
    for d in corpus(40):
        assert sides.hold_out(d.sha256) == is_held_out(d.sha256, 0.5)


def test_refusals(tok: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"val_fraction = 1\.0"):
        run(corpus(14), tok, tmp_path, val_fraction=1.0)
    for same in (corpus(1), corpus(1) * 3):
        with pytest.raises(Refused, match="leaves none for val; use another --val-fraction, more documents"):
            run(same, tok, tmp_path / f"a{len(same)}", val_fraction=1e-9)
    with pytest.raises(
        Refused, match=r"no document to encode; 1 could not be used, the first: x: not UTF-8: byte 2"
    ):
        run([Skipped("x", "not UTF-8", "byte 2")], tok, tmp_path / "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "encode.json").write_text('{"format": "mine"}')
    run(
        corpus(14), tok, tmp_path / "c"
    )  # somebody's file of that name is replaced only here, where it says nothing of ours
    with pytest.raises(IOFailure):
        run(corpus(14), tok, tmp_path / "c" / "encode.json")


def test_progress_hears_of_everything(
    tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 500)
    heard: list[tuple[int, int, int, int]] = []

    def hear(counts: Counts, read: int, total: int) -> None:
        heard.append((counts.all, counts.tokens, read, total))

    made = run(corpus(20), tok, tmp_path, progress=hear)
    assert len(heard) > 10
    assert heard == sorted(heard)
    assert heard[-1][:2] == (20, made.train.total_tokens + (made.val.total_tokens if made.val else 0))


# --- guards, each with its fault


def changed(tok: Tokenizer, edit: Any) -> Tokenizer:
    d = json.loads(tok.json)
    edit(d)
    return Tokenizer.from_json(json.dumps(d), "memory", "<|endoftext|>")


def test_an_end_of_text_that_is_an_ordinary_string_is_refused(tok: Tokenizer, tmp_path: Path) -> None:
    loose = changed(tok, lambda d: d["added_tokens"][-1].update(special=False))
    docs = corpus(20)
    run(docs, loose, tmp_path / "a")  # as long as no text says it
    with pytest.raises(Refused, match=r"doc-7: its text encodes to the end-of-text id \d+"):
        run([*docs, Document("doc-7", "a<|endoftext|>b")], loose, tmp_path / "b")
    made = run([*docs, Document("doc-7", "a<|endoftext|>b")], tok, tmp_path / "c")
    assert made.counts.all == 21  # with a special token the string is text like any other


def test_an_unknown_token_is_refused(tok: Tokenizer, tmp_path: Path) -> None:
    odd = changed(tok, lambda d: None)
    odd.unknown_id = int(tok.encode("~~")[0])
    run([Document("x", "no such sign " * 9), *corpus(14)], odd, tmp_path / "a")
    with pytest.raises(
        Refused, match=r"doc-3: encodes to the unknown token, id \d+, though memory is byte-level"
    ):
        run([*corpus(14), Document("doc-3", "a ~~ b")], odd, tmp_path / "b")


def test_ids_that_do_not_give_the_text_back_are_refused(
    tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A decoder that loses spaces, as one for another kind of vocabulary does.
    monkeypatch.setattr(
        tok, "decode", lambda ids, skip_special=False: Tokenizer.decode(tok, ids).replace(" ", "")
    )
    with pytest.raises(Refused, match=r"d0: decoding its ids does not give its text back"):
        run(corpus(14), tok, tmp_path)


def test_a_constant_corpus_is_refused_while_it_is_encoded(
    tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "FIRST_CHECK_TOKENS", 20_000)
    constant = [Document(f"c{i}", f"{i}\n" + "~" * 4000) for i in range(30)]
    with pytest.raises(Refused, match=r"so far: (entropy|distinct|commonest).*--widen") as e:
        run(constant, tok, tmp_path / "a")
    assert "commonest id" in str(e.value) or "entropy" in str(e.value)
    wide = Bounds(min_entropy=0.0, max_top_share=1.0, min_distinct=1, max_bytes_per_token=99)
    assert run(constant, tok, tmp_path / "b", bounds=wide).counts.all == 30


def test_unfinished_documents_are_judged_by_their_own_text(
    tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long document that comes first, and a side whose shards are there while its text is read again."""
    monkeypatch.setattr(encode, "FIRST_CHECK_TOKENS", 1000)
    monkeypatch.setattr(encode, "BATCHES_AHEAD", 1)
    docs: list[Any] = [long_document(9, 900_000), *corpus(60)]
    run(docs, tok, tmp_path / "whole", shard_tokens=20_000)
    for n in (2, 30, 60):
        with pytest.raises(Stopped):
            encode_corpus(Stopping(docs, n), tok, tmp_path / str(n), val_fraction=0.2, shard_tokens=20_000)
        run(docs, tok, tmp_path / str(n), shard_tokens=20_000, resume=True)
        assert files_of(tmp_path / str(n)) == files_of(tmp_path / "whole")


def test_what_cannot_be_cut_is_named(tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut, "MAX_PIECE_CHARACTERS", 1 << 19)
    made = run([*corpus(20), Document("wall", "a" * (1 << 20))], tok, tmp_path)
    assert made.counts.skipped == {"cannot be cut": 1}
    assert "wall" in (tmp_path / "skipped.jsonl").read_text()


def test_seen_is_a_set() -> None:
    seen = Seen()
    hashes = [hashlib.sha256(bytes([i % 200])).hexdigest() for i in range(500)]
    assert [seen.add(h) for h in hashes] == [i < 200 for i in range(500)]
    seen.close()


def test_a_tampered_record_is_no_excuse(tok: Tokenizer, tmp_path: Path) -> None:
    run(corpus(14), tok, tmp_path)
    edit_json(tmp_path / "encode.json", complete=False)
    edit_json(tmp_path / "train" / "manifest.json", complete=False)
    want = files_of(tmp_path)["train/shard-00000.bin"]
    run(corpus(14), tok, tmp_path, resume=True)
    assert files_of(tmp_path)["train/shard-00000.bin"] == want
