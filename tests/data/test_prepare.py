"""A corpus made ready: split, tokenizer and shards in a folder that is reused, gone on with or built again."""

from __future__ import annotations

import hashlib
import importlib
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr.common.atomic import locked
from apr.common.errors import MalformedFile, Refused
from apr.data.batches import Batches, Windows, sequential
from apr.data.corpus import Corpus
from apr.data.documents import Document, is_held_out
from apr.data.encode_folder import RECORD as ENCODED
from apr.data.find import find_sources
from apr.data.prepare import PreparedCorpus, prepare
from apr.data.shards import TokenShards
from apr.tokenizer.tokenizer import Tokenizer
from apr.tokenizer.training import train_tokenizer
from data_cases import Memory, corpus, edit_json, files_of, flip_byte, write

preparing = importlib.import_module("apr.data.prepare")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer([d.text for d in corpus()], 400, tmp_path_factory.mktemp("tok"))


def made_from(docs: Iterable[Document], folder: Path, **options: Any) -> PreparedCorpus:
    return prepare(Memory(docs), folder, **options)


def texts(made: PreparedCorpus) -> dict[str, set[str]]:
    """The documents of both sides."""
    ids = {
        side: np.concatenate(TokenShards(path, made.tokenizer).arrays) for side, path in made.sides.items()
    }
    return {side: set(made.tokenizer.decode(i).split("<|endoftext|>")) - {""} for side, i in ids.items()}


def test_prepare_splits_encodes_and_reuses(tmp_path: Path) -> None:
    docs = corpus(60)
    calls: list[tuple[str, int, int]] = []
    made = made_from(
        docs, tmp_path / "p", vocab_size=300, val_fraction=0.2, progress=lambda *a: calls.append(a)
    )
    assert not made.reused
    assert made.reason == "nothing prepared yet"
    assert {c[0] for c in calls} == {"read corpus", "train tokenizer", "encode"}
    assert calls[-1] == ("encode", 60, 60)
    sides = texts(made)
    assert sides["train"] | sides["val"] == {d.text for d in docs}
    assert sides["val"] == {d.text for d in docs if is_held_out(d.sha256, 0.2)}
    assert not sides["train"] & sides["val"]
    before = files_of(tmp_path / "p")
    again = made_from(docs, tmp_path / "p", vocab_size=300, val_fraction=0.2)
    assert again.reused
    assert files_of(tmp_path / "p") == before
    made_from(docs, tmp_path / "q", vocab_size=300, val_fraction=0.2)
    assert files_of(tmp_path / "q") == before


def test_prepare_keeps_copies_on_one_side(tmp_path: Path) -> None:
    docs = corpus(30) + [Document(f"copy of {d.name}", d.text) for d in corpus(30)]
    sides = texts(made_from(docs, tmp_path, vocab_size=300, val_fraction=0.3))
    assert not sides["train"] & sides["val"]
    assert len(sides["train"] | sides["val"]) == 30


class Dies(Memory):
    """A corpus whose n-th document cannot be had in the pass of this number."""

    def __init__(self, docs: Iterable[Document], n: int, number: int) -> None:
        super().__init__(docs)
        self.n, self.left = n, number

    def __iter__(self) -> Iterator[Any]:
        self.left -= 1
        for i, item in enumerate(self.items):
            if i == self.n and not self.left:
                raise KeyboardInterrupt
            yield item


@pytest.mark.parametrize("number", [1, 2, 3])
def test_prepare_goes_on_where_it_was_killed(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the pass that looks, the one that trains the tokenizer, the one that encodes."""
    monkeypatch.setattr("apr.data.encode.BATCH_CHARACTERS", 300)
    docs = corpus(40)
    made_from(docs, tmp_path / "whole", vocab_size=300, val_fraction=0.3, shard_tokens=300)
    with pytest.raises(KeyboardInterrupt):
        prepare(Dies(docs, 35, number), tmp_path / "p", vocab_size=300, val_fraction=0.3, shard_tokens=300)
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "p" / "train").glob("shard-*.bin")}
    assert bool(kept) == (number == 3)
    made_from(docs, tmp_path / "p", vocab_size=300, val_fraction=0.3, shard_tokens=300)
    assert files_of(tmp_path / "p") == files_of(tmp_path / "whole")
    assert all((tmp_path / "p" / "train" / name).stat().st_mtime_ns == t for name, t in kept.items())


def test_prepare_trains_its_tokenizer_on_the_training_side(tmp_path: Path) -> None:
    docs = corpus(30)
    held = next(d for d in docs if is_held_out(d.sha256, 0.3))
    marked = [d for d in docs if d is not held]
    i = 0
    while not is_held_out(hashlib.sha256((secret := f"zqzq{i} " * 500).encode()).hexdigest(), 0.3):
        i += 1
    made = made_from([*marked, Document("secret", secret)], tmp_path, vocab_size=400, val_fraction=0.3)
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
        made = made_from(docs, tmp_path, **{"val_fraction": 0.2, **kwargs})
        assert not made.reused
        assert made_from(docs, tmp_path, **{"val_fraction": 0.2, **kwargs}).reused
        keys.add(made.key)
    made = made_from([*docs, Document("new", "one more")], tmp_path, tokenizer=tok, val_fraction=0.2)
    assert made.reason == "made from other input"
    assert made.tokenizer.sha256 == tok.sha256
    assert len(keys | {made.key}) == 6


def test_prepare_rebuilds_what_is_damaged(tmp_path: Path) -> None:
    docs = corpus(20)

    def again() -> Any:
        return made_from(docs, tmp_path, vocab_size=300, val_fraction=0.2, shard_tokens=1500)

    again()
    good = files_of(tmp_path)
    shard = tmp_path / "train" / "shard-00001.bin"
    damages: list[tuple[Callable[[], Any], str]] = [
        (lambda: flip_byte(tmp_path / "train"), "sha256 is"),
        (lambda: shard.unlink(), "missing"),
        (lambda: shutil.rmtree(tmp_path / "val"), "no such file"),
        (lambda: (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}"), "not a tokenizer.json"),
        (lambda: (tmp_path / "prepared.json").write_text("{"), "not JSON"),
        (
            lambda: (tmp_path / "prepared.json").write_text('{"format": "apr-prepared-1"}'),
            "of another version",
        ),
        (lambda: edit_json(tmp_path / "prepared.json", val_sha256="0"), "val_sha256 = '0'"),
    ]
    for damage, reason in damages:
        damage()
        made = again()
        assert not made.reused
        assert reason in made.reason
        assert files_of(tmp_path) == good
    assert again().reused


class Killed(BaseException):
    """The end of a process."""


@pytest.mark.parametrize("moment", range(6))
def test_a_kill_while_another_input_takes_the_place_is_gone_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """After each file that is removed or written at the beginning."""
    options: dict[str, Any] = {"vocab_size": 300, "val_fraction": 0.3}
    made_from(corpus(30), tmp_path / "p", **options)
    left = [moment]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> None:
            real(*args, **kwargs)
            if not left[0]:
                raise Killed
            left[0] -= 1

        return call

    with monkeypatch.context() as m:
        m.setattr(Path, "unlink", counted(Path.unlink))
        m.setattr(preparing, "write_json", counted(preparing.write_json))
        with pytest.raises(Killed):
            made_from(corpus(40), tmp_path / "p", **options)
    made = made_from(corpus(40), tmp_path / "p", **options)
    fresh = made_from(corpus(40), tmp_path / "fresh", **options)
    assert made.key == fresh.key
    for side in ("train", "val"):
        assert files_of(made.folder / side) == files_of(fresh.folder / side)


def test_a_kill_after_any_file_is_gone_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each file that is written, the last of the encoding and the record of the whole included."""
    monkeypatch.setattr("apr.data.encode.BATCH_CHARACTERS", 300)
    options: dict[str, Any] = {"vocab_size": 300, "val_fraction": 0.3, "shard_tokens": 700}
    fresh = made_from(corpus(30), tmp_path / "fresh", **options)
    real, kills = os.replace, 0

    def dying(n: int) -> Callable[..., None]:
        left = [n]

        def replace(*args: Any, **kwargs: Any) -> None:
            real(*args, **kwargs)
            if not left[0]:
                raise Killed
            left[0] -= 1

        return replace

    for moment in range(100):
        folder = tmp_path / str(moment)
        with monkeypatch.context() as m:
            m.setattr(os, "replace", dying(moment))
            try:
                made_from(corpus(30), folder, **options)
                break
            except Killed:
                kills += 1
        made_from(corpus(30), folder, **options)
        assert files_of(folder) == files_of(fresh.folder)
    assert kills > 10


@pytest.mark.parametrize("left", ["shard-00000.bin", "manifest.json"])
@pytest.mark.parametrize("moment", ["encoding", "encoded"])
def test_what_a_killed_call_left_damaged_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, left: str
) -> None:
    monkeypatch.setattr("apr.data.encode.BATCH_CHARACTERS", 300)
    options: dict[str, Any] = {"vocab_size": 300, "val_fraction": 0.3, "shard_tokens": 300}
    fresh = made_from(corpus(40), tmp_path / "fresh", **options)
    folder = tmp_path / "p"
    if moment == "encoding":
        with pytest.raises(KeyboardInterrupt):
            prepare(Dies(corpus(40), 35, 3), folder, **options)
    else:
        made_from(corpus(40), folder, **options)
        edit_json(folder / "prepared.json", complete=False)
    (folder / "train" / left).write_bytes(b"damaged")
    made_from(corpus(40), folder, **options)
    assert files_of(folder) == files_of(fresh.folder)


def test_calls_for_one_corpus_wait_for_each_other(tmp_path: Path) -> None:
    options: dict[str, Any] = {"vocab_size": 300, "val_fraction": 0.3, "in_cache": True}
    stages: list[set[str]] = [set() for _ in range(3)]

    def call(i: int) -> Any:
        def hear(stage: str, done: int, total: int) -> None:
            stages[i].add(stage)

        return made_from(corpus(40), tmp_path, progress=hear, **options)

    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(call, range(3)))
    assert sorted(m.reused for m in made) == [False, True, True]
    assert sum("encode" in s for s in stages) == 1
    with locked(made[0].folder, "preparing a corpus in it"):
        # A folder that is whole is opened without waiting.
        assert call(0).reused


def test_a_cache_has_a_folder_for_each_input(tmp_path: Path) -> None:
    options: dict[str, Any] = {"vocab_size": 300, "val_fraction": 0.3, "in_cache": True}
    first = made_from(corpus(30), tmp_path, **options)
    was = {p: p.stat().st_mtime_ns for p in first.folder.rglob("*")}
    other = made_from(corpus(40), tmp_path, **options)
    assert other.folder != first.folder
    assert {p: p.stat().st_mtime_ns for p in first.folder.rglob("*")} == was
    again = made_from(corpus(30), tmp_path, **options)
    assert (again.folder, again.reused) == (first.folder, True)
    assert sorted(tmp_path.iterdir()) == sorted([first.folder, other.folder])


def test_prepare_refuses(tmp_path: Path, tok: Tokenizer) -> None:
    docs = corpus(10)
    for kwargs in ({}, {"vocab_size": 300, "tokenizer": tok}):
        with pytest.raises(Refused, match="either a vocab_size"):
            made_from(docs, tmp_path, **kwargs)  # type: ignore[arg-type]
    for fraction in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(Refused, match="val_fraction"):
            made_from(docs, tmp_path, vocab_size=300, val_fraction=fraction)
    for same in (docs[:1], docs[:1] * 3):
        with pytest.raises(Refused, match="one document cannot be divided"):
            made_from(same, tmp_path, vocab_size=300, val_fraction=0.5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_prepare_divides_a_few_documents(tmp_path: Path, fraction: float) -> None:
    """The one that moves to the empty side is no text that the tokenizer is trained on, or the only one."""
    docs = corpus(10)
    made = made_from(docs, tmp_path, vocab_size=300, val_fraction=fraction)
    one = "val" if fraction < 0.5 else "train"
    counts = {side: TokenShards(path).total_documents for side, path in made.sides.items()}
    assert counts == {"train": 9, "val": 9} | {one: 1}
    assert made_from(docs, tmp_path, vocab_size=300, val_fraction=fraction).reused


def test_prepare_never_removes_what_it_did_not_make(tmp_path: Path, tok: Tokenizer) -> None:
    write(tmp_path / "train", tok, corpus(5))
    before = files_of(tmp_path)
    for _ in range(2):
        with pytest.raises(Refused, match="not made by an earlier run"):
            made_from(corpus(10), tmp_path, vocab_size=300, val_fraction=0.5)
        assert files_of(tmp_path) == before


TWICE = """
import sys
from pathlib import Path
from apr.data.prepare import prepare
from apr.data.corpus import Corpus
from apr.data.find import find_sources
prepare(Corpus(find_sources([sys.argv[1]])), sys.argv[2], vocab_size=350, val_fraction=0.3)
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
    assert len(outputs[0]) == 10


def test_tinyshakespeare_through_the_whole_path(data: Callable[[str], Path], tmp_path: Path) -> None:
    path = data("tinyshakespeare/input.txt")

    def made() -> PreparedCorpus:
        corpus_ = Corpus(find_sources([path]), piece_bytes=4000)
        return prepare(corpus_, tmp_path, vocab_size=512, val_fraction=0.1)

    first = made()
    train, val = (TokenShards(folder, first.tokenizer) for folder in first.sides.values())
    assert first.tokenizer.vocab_size == 512
    assert train.total_bytes + val.total_bytes == path.stat().st_size == 1115394
    assert 0.05 < val.total_bytes / 1115394 < 0.15
    for shards in (train, val):
        assert 1.8 < shards.manifest.audit["bytes_per_token"] < 2.6
        assert 4.5 < shards.unigram_entropy < math.log(512)
    ids, targets = Batches(Windows(train, 128), 8, seed=42).next()
    assert ids.shape == targets.shape == (8, 128)
    whole, text = path.read_text(), first.tokenizer.decode(ids[0])
    assert all(part in whole for part in text.split("<|endoftext|>"))
    held = sum(t.size for _, t in sequential(Windows(val, 128), 32))
    assert held == val.total_tokens - 1 - Windows(val, 128).tokens_dropped
    assert made().reused


@pytest.mark.parametrize(
    "record",
    ["[]", "{}", '{"result": null}', '{"result": {"skipped": 5}}', '{"result": {"skipped": {"a": []}}}'],
)
def test_a_record_that_was_changed_says_so(tok: Tokenizer, tmp_path: Path, record: str) -> None:
    (tmp_path / ENCODED).write_text(record)
    with pytest.raises(MalformedFile, match=f"{ENCODED}: no counts of skipped documents; remove"):
        PreparedCorpus(tmp_path, tok, "", True, "").left_out()
