"""Token shards: what is written is the corpus, and every fault planted in files or manifest is found."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr.common.errors import InputNotFound, IOFailure, MalformedFile, Refused
from apr.data.documents import Document
from apr.data.manifest import FIGURES, MAX_VOCAB
from apr.data.repair import repair_manifest
from apr.data.shard_writer import ShardWriter
from apr.data.shards import TokenShards
from apr.tokenizer.tokenizer import Tokenizer
from apr.tokenizer.training import train_tokenizer
from data_cases import corpus, edit_json, edit_shard_row, files_of, flip_byte, put, rewrite, write


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer([d.text for d in corpus()], 400, tmp_path_factory.mktemp("tok"))


@pytest.fixture
def shard_dir(tmp_path: Path, tok: Tokenizer) -> Path:
    return write(tmp_path / "shards", tok, corpus())


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


MANIFEST_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"total_tokens": 7}, r"total_tokens = 7, its shards add up to \d+"),
    ({"total_bytes": 7}, r"audit\.bytes_per_token"),
    ({"total_documents": 41}, r"total_documents = 41, .* say 40"),
    ({"total_documents": 7}, r"shards\[0\]\.documents = 12 is not a whole number in 0..7"),
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
    ({"audit": dict.fromkeys(FIGURES, "1")}, "is not a figure"),
    ({"audit": dict.fromkeys(FIGURES, -1)}, "is not a figure"),
    ({"audit": dict.fromkeys(FIGURES, math.nan)}, "NaN is not a JSON number"),
    ({"audit": dict.fromkeys(FIGURES, 10**400)}, r"audit\.bytes_per_token = 10{20}"),
    ({"vocab_size": MAX_VOCAB + 1}, r"vocab_size = \d+ is not a whole number in 1\.\."),
    ({"shards": 5}, "shards lists 5"),
    ({"tokenizer_sha256": "x"}, "tokenizer_sha256 = 'x'"),
]
ROW_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"name": "../x.bin"}, r"shards\[0\]\.name = '\.\./x\.bin'"),
    ({"tokens": True}, r"shards\[0\]\.tokens = True"),
    ({"sha256": "0" * 63}, r"shards\[0\]\.sha256"),
    ({"more": 1}, r"does not have the keys"),
    ({"documents": -1}, r"shards\[0\]\.documents = -1"),
    ({"documents": 41}, r"shards\[0\]\.documents = 41"),
    ({"partial": "1"}, r"shards\[0\]\.partial = '1'"),
    ({"corpus_sha256": "x"}, r"shards\[0\]\.corpus_sha256 = 'x'"),
]
FILE_FAULTS: list[tuple[Callable[[Path], Any], str]] = [
    (flip_byte, r"shard-00001\.bin: sha256 is \w+, manifest.json says \w+"),
    (lambda f: cut(f, 4), r"shard-00000\.bin: 3,996 bytes, .* 1,000 tokens"),
    (lambda f: cut(f, 1), r"shard-00000\.bin: 3,999 bytes"),
    (lambda f: append(f, 1), r"shard-00000\.bin: 4,001 bytes"),
    (lambda f: append(f, 4), r"shard-00000\.bin: 4,004 bytes"),
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
    check_fault(shard_dir, lambda f: edit_json(f / "manifest.json", **changes), pattern)


def test_a_manifest_with_more_ids_than_its_tokenizer_is_found(shard_dir: Path, tok: Tokenizer) -> None:
    """Ids that no tokenizer gives would read outside the embedding."""
    TokenShards(shard_dir, tok)
    edit_json(shard_dir / "manifest.json", vocab_size=tok.vocab_size + 1)
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
    with pytest.raises(MalformedFile, match="4,004 bytes"):
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


@pytest.mark.parametrize("eos", ["after", "between", "none"])
@pytest.mark.parametrize("shard_tokens", [11, 97, 400])
def test_a_writer_that_was_killed_goes_on_to_the_same_bytes(
    tok: Tokenizer, tmp_path: Path, eos: str, shard_tokens: int
) -> None:
    docs = corpus(5 if shard_tokens == 11 else 20)
    write(tmp_path / "whole", tok, docs, shard_tokens, eos)
    whole = files_of(tmp_path / "whole")
    seen = set()
    for killed_after in range(1, len(docs), 1 if shard_tokens == 11 else 4):
        folder = tmp_path / f"killed-{killed_after}"
        put(ShardWriter(folder, tok, shard_tokens, eos), tok, docs[:killed_after])  # and never closed
        seen.add(len(list(folder.glob("shard-*.bin"))))
        with ShardWriter(folder, tok, shard_tokens, eos, resume=True) as writer:
            put(writer, tok, docs)
        assert files_of(folder) == whole
    assert len(seen) > 2


def test_a_manifest_is_true_after_every_shard(tok: Tokenizer, tmp_path: Path) -> None:
    docs = corpus(20)
    writer = ShardWriter(tmp_path, tok, 150)
    for d in docs:
        put(writer, tok, [d])
        path = tmp_path / "manifest.json"
        if not path.exists():
            continue
        m = json.loads(path.read_text())
        assert m["complete"] is False
        assert [s["name"] for s in m["shards"]] == sorted(p.name for p in tmp_path.glob("shard-*.bin"))
        last = m["shards"][-1]
        whole = [i for e in docs[: last["documents"]] for i in [*tok.encode(e.text), tok.eos_id]]
        assert len(whole) + last["partial"] == m["total_tokens"] == 150 * m["shard_count"]
        next_ids = [*tok.encode(docs[last["documents"]].text), tok.eos_id]
        stream = np.concatenate([np.fromfile(tmp_path / s["name"], "<u4") for s in m["shards"]])
        assert stream.tolist() == whole + next_ids[: last["partial"]]
    writer.abandon()
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(MalformedFile, match="did not finish; go on with the same command and --resume"):
        TokenShards(tmp_path)


def killed(tmp_path: Path, tok: Tokenizer) -> Path:
    """A folder with whole shards of some of the documents."""
    put(ShardWriter(tmp_path / "k", tok, 200), tok, corpus(20)[:12])
    assert len(list((tmp_path / "k").glob("shard-*.bin"))) > 3
    return tmp_path / "k"


def resume(folder: Path, tok: Tokenizer, docs: list[Document], **options: Any) -> None:
    with ShardWriter(folder, tok, 200, **{"resume": True, **options}) as writer:
        put(writer, tok, docs)


def test_resuming_with_other_documents_is_refused(tok: Tokenizer, tmp_path: Path) -> None:
    docs = corpus(20)
    folder = killed(tmp_path, tok)
    with pytest.raises(Refused, match="are not those that were encoded here: the input has changed"):
        resume(folder, tok, [Document("x", "other"), *docs[1:]])
    with pytest.raises(Refused, match=r"holds \d+ documents, and now there are 2"):
        resume(folder, tok, docs[:2])
    resume(folder, tok, docs)  # neither refusal has harmed it
    assert TokenShards(folder).total_documents == 20


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"eos_policy": "none"}, "eos_policy = 'after'"), ({"made": {"side": "val"}}, "made = {}")],
)
def test_resuming_with_other_settings_is_refused(
    tok: Tokenizer, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(Refused, match=words):
        resume(killed(tmp_path, tok), tok, corpus(20), **changes)


def test_resuming_finds_damaged_shards(tok: Tokenizer, tmp_path: Path) -> None:
    folder = killed(tmp_path, tok)
    flip_byte(folder)
    with pytest.raises(MalformedFile, match=r"shard-00001\.bin: sha256 is"):
        resume(folder, tok, corpus(20))


@pytest.mark.parametrize("changes", [{"partial": 9}, {"documents": 1}])
def test_resuming_finds_a_manifest_that_the_shards_do_not_bear_out(
    tok: Tokenizer, tmp_path: Path, changes: dict[str, int]
) -> None:
    folder = killed(tmp_path, tok)
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    shards[-1].update(changes)
    edit_json(folder / "manifest.json", shards=shards)
    with pytest.raises(MalformedFile, match="the last shard ends after"):
        resume(folder, tok, corpus(20))


def test_a_repaired_manifest_cannot_be_resumed(tok: Tokenizer, tmp_path: Path) -> None:
    folder = killed(tmp_path, tok)
    repair_manifest(folder, tok)
    with pytest.raises(Refused, match=r"manifest\.json: corpus_sha256 = null"):
        resume(folder, tok, corpus(20), made={"repaired": True}, eos_policy="between")


def test_a_shard_that_cannot_be_mapped(
    tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, tok, corpus(9))

    def full(*args: Any, **options: Any) -> Any:
        raise OSError(12, "Cannot allocate memory")  # the kernel's answer to one mapping too many

    monkeypatch.setattr(mmap, "mmap", full)
    with pytest.raises(IOFailure, match=r"shard-00000\.bin: cannot be mapped: .*fewer and larger shards"):
        TokenShards(tmp_path)


def test_what_a_kill_left_half_done_is_removed(tok: Tokenizer, tmp_path: Path) -> None:
    folder = killed(tmp_path, tok)
    (folder / "shard-00077.bin").write_bytes(b"\0" * 8)  # written, and killed before the manifest was
    (folder / ".shard-00004.bin.1-ab.tmp").write_bytes(b"\0")
    (folder / "notes.txt").write_text("somebody's")
    resume(folder, tok, corpus(20))
    write(tmp_path / "whole", tok, corpus(20), 200)
    assert files_of(folder) == {**files_of(tmp_path / "whole"), "notes.txt": b"somebody's"}


def test_a_full_disk_leaves_whole_shards(
    tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = killed(tmp_path, tok)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr("apr.common.atomic.os.fsync", full)
        with pytest.raises(IOFailure, match=r"No space left|disk full"):
            resume(folder, tok, corpus(20))
    assert not list(folder.glob(".*"))
    resume(folder, tok, corpus(20))
    assert TokenShards(folder).total_documents == 20
