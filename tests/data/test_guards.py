"""The guards of token data, each with the fault it is for; and `audit`, which asks them all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr.cli.tokenize.show import draw_audit
from apr.common.errors import MalformedFile, Refused, UsageError
from apr.common.finding import SKIPPED, Finding
from apr.data import guards
from apr.data.audit import Split, audit, enforce_all, sides_of, tokenizer_beside
from apr.data.conservation import conserved
from apr.data.documents import Document
from apr.data.encode import encode_corpus
from apr.data.guards import Bounds, enforce, figures_again, fits_model, plausible, round_trip
from apr.data.manifest import figures
from apr.data.repair import repair_manifest
from apr.data.shard_writer import ShardWriter
from apr.data.shards import TokenShards
from apr.tokenizer.tokenizer import Tokenizer
from apr.tokenizer.training import train_tokenizer
from data_cases import Memory, corpus, edit_json, edit_shard_row, flip_byte, put, rewrite, write


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer([d.text for d in corpus(60)], 400, tmp_path_factory.mktemp("tok"))


@pytest.fixture
def dataset(tmp_path: Path, tok: Tokenizer) -> Path:
    encode_corpus(
        Memory([*corpus(99), *corpus(99, seed=6)]),
        tok,
        tmp_path / "data",
        val_fraction=0.3,
        shard_tokens=4000,
    )
    return tmp_path / "data"


def verdicts(folder: Path, tok: Tokenizer, **options: Any) -> dict[str, Finding]:
    """Of train and val together, the worst of each guard."""
    out: dict[str, Finding] = {}
    for side in audit(sides_of(folder), tok, lenient=True, **options):
        for v in side.findings:
            if v.name not in out or out[v.name].passed is not False:
                out[v.name] = v
    return out


def failed(folder: Path, tok: Tokenizer, **options: Any) -> set[str]:
    return {name for name, v in verdicts(folder, tok, **options).items() if v.passed is False}


ALL = {
    "manifest, sizes and tokenizer", "sha256, ids and counts", "end of text", "unknown tokens",
    "entropy of token frequencies", "distinct ids", "commonest id", "bytes per token", "encode(decode(ids)) = ids",
    "vocabulary", "documents on both sides", "bytes of ids = bytes of text", "figures of the tokens",
}  # fmt: skip


def test_sound_data_passes_every_guard(dataset: Path, tok: Tokenizer) -> None:
    found = verdicts(dataset, tok, model_vocab=tok.vocab_size)
    assert set(found) == ALL
    assert all(v.passed is True for v in found.values()), [str(v) for v in found.values()]
    assert tokenizer_beside(dataset) == tokenizer_beside(dataset / "train") == dataset / "tokenizer"
    enforce_all(audit(sides_of(dataset), tok))


def all_one_id(ids: np.ndarray) -> None:
    ids[ids != ids[-1]] = 65


def reencode(folder: Path, tok: Tokenizer, edit: Callable[[np.ndarray], Any]) -> None:
    """Ids changed in all shards of a side, with a manifest as true as if they had been encoded that way."""
    for path in sorted(folder.glob("shard-*.bin")):
        ids = np.fromfile(path, "<u4")
        edit(ids)
        path.write_bytes(ids.tobytes())
    old = json.loads((folder / "manifest.json").read_text())
    repair_manifest(folder, tok)
    new = json.loads((folder / "manifest.json").read_text())
    figures = {**new["audit"], "bytes_per_token": old["total_bytes"] / new["total_tokens"]}
    edit_json(folder / "manifest.json", total_bytes=old["total_bytes"], audit=figures)


def a_document_is_lost(folder: Path, tok: Tokenizer) -> None:
    """The last one, by a manifest that counts documents and tokens without it."""
    path = sorted((folder / "train").glob("shard-*.bin"))[-1]
    ids = np.fromfile(path, "<u4")
    path.write_bytes(ids[: np.flatnonzero(ids == tok.eos_id)[-2] + 1].tobytes())
    reencode(folder / "train", tok, lambda ids: None)


def shuffle(ids: np.ndarray) -> None:
    text = ids[ids != ids.max()]
    np.random.default_rng(1).shuffle(text)
    ids[ids != ids.max()] = text


def val_inside_train(folder: Path, tok: Tokenizer) -> None:
    """One validation document among those of training."""
    val = np.concatenate(TokenShards(folder / "val").arrays)
    stolen = np.split(val, np.flatnonzero(val == tok.eos_id) + 1)[3]
    path = sorted((folder / "train").glob("shard-*.bin"))[-1]
    path.write_bytes(path.read_bytes() + stolen.tobytes())
    repair_manifest(folder / "train", tok)


def test_figures_are_those_of_the_counts() -> None:
    for counts in ([7], [1] * 400, [0, 1 << 40, 3], [0, 50, 3, 0, 900]):
        right = figures(np.array(counts), 1234, None)
        assert figures_again(right, np.array(counts), 1234).passed
    for key, wrong in (
        ("unigram_entropy_nats", 1.4427),
        ("top_id_share", 0.99),
        ("bytes_per_token", 2),
        ("distinct_ids", 2),
    ):
        found = figures_again({**right, key: right[key] * wrong}, np.array(counts), 1234)
        assert found.passed is False
        assert key in found.measured


FAULTS: dict[str, tuple[Callable[[Path, Tokenizer], Any], set[str]]] = {
    "a bit of a shard": (lambda f, t: flip_byte(f / "train"), {"sha256, ids and counts"}),
    "a shard is missing": (lambda f, t: (f / "train/shard-00000.bin").unlink(), {"manifest, sizes and tokenizer"}),
    "a shard is short": (
        lambda f, t: (f / "train/shard-00000.bin").write_bytes((f / "train/shard-00000.bin").read_bytes()[:-4]),
        {"manifest, sizes and tokenizer"},
    ),
    "a count of the manifest": (
        lambda f, t: edit_json(f / "train/manifest.json", total_documents=7),
        {"manifest, sizes and tokenizer"},
    ),
    "tokenizer hash": (
        lambda f, t: edit_json(f / "train/manifest.json", tokenizer_sha256="0" * 64),
        {"manifest, sizes and tokenizer"},
    ),
    "no end of text, it says": (
        lambda f, t: edit_json(f / "train/manifest.json", eos_policy="none"),
        {"sha256, ids and counts"},
    ),
    "another normalization": (
        lambda f, t: edit_json(f / "train/manifest.json", normalization="NFC"),
        {"manifest, sizes and tokenizer"},
    ),
    "an id outside": (lambda f, t: rewrite(f / "train", lambda ids: ids.__setitem__(5, 400)), {"sha256, ids and counts"}),
    "all one id": (
        lambda f, t: reencode(f / "train", t, all_one_id),
        {"entropy of token frequencies", "distinct ids", "commonest id", "bytes of ids = bytes of text"},
    ),
    "shuffled ids": (lambda f, t: reencode(f / "train", t, shuffle), {"encode(decode(ids)) = ids"}),
    "a document is lost": (a_document_is_lost, {"bytes of ids = bytes of text"}),
    "val inside train": (val_inside_train, {"documents on both sides"}),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_turns_its_guard_red(dataset: Path, tok: Tokenizer, fault: str) -> None:
    plant, guards_ = FAULTS[fault]
    assert not failed(dataset, tok)
    plant(dataset, tok)
    assert failed(dataset, tok) == guards_
    with pytest.raises((Refused, MalformedFile)):
        enforce_all(audit(sides_of(dataset), tok))


def test_bytes_are_counted_only_where_ids_give_them_back(dataset: Path, tok: Tokenizer) -> None:
    """A prefix space, a normalizer, a token that takes the space before it: their ids stand for other bytes."""
    shards = TokenShards(dataset / "train")
    counts = np.bincount(np.concatenate(shards.arrays), minlength=tok.vocab_size)
    assert conserved(shards, counts, tok).passed is True
    for change in (
        lambda d: d.update(normalizer={"type": "NFC"}),
        lambda d: d["pre_tokenizer"].update(add_prefix_space=True)
        if d["pre_tokenizer"]["type"] == "ByteLevel"
        else d.update(normalizer={"type": "NFC"}),
        lambda d: d["added_tokens"].append(
            {"id": tok.vocab_size, "content": "zz", "single_word": False, "lstrip": True, "rstrip": False,
             "normalized": False, "special": False}
        ),
    ):  # fmt: skip
        fields = json.loads(tok.json)
        change(fields)
        other = Tokenizer.from_json(json.dumps(fields), "memory")
        assert conserved(shards, counts, other).passed is None


def test_an_end_of_text_that_the_tokenizer_does_not_mean_is_found(dataset: Path, tok: Tokenizer) -> None:
    other = int(tok.encode("\n")[0])
    count = int((np.concatenate(TokenShards(dataset / "train").arrays) == other).sum())
    edit_json(dataset / "train/manifest.json", eos_token_id=other, total_documents=count)
    found = verdicts(dataset, tok)["end of text"]
    assert found.passed is False
    assert f"id {other}" in found.measured
    assert "'<|endoftext|>'" in found.bound


def test_a_vocabulary_larger_than_the_models_is_found(dataset: Path, tok: Tokenizer) -> None:
    assert failed(dataset, tok, model_vocab=tok.vocab_size - 1) == {"vocabulary"}
    assert fits_model(tok, tok.vocab_size).passed is True


def test_unknown_tokens(tok: Tokenizer, dataset: Path) -> None:
    counts = np.bincount(np.concatenate(TokenShards(dataset / "train").arrays), minlength=tok.vocab_size)
    size = int(2 * counts.sum())

    def judged(unknown_id: int | None, byte_level: bool, given: Bounds = guards.USUAL) -> Finding:
        class Odd:
            vocab_size = tok.vocab_size
            decode = tok.decode

        odd: Any = Odd()
        odd.unknown_id, odd.byte_level = unknown_id, byte_level
        return plausible(counts, size, odd, given)[0]

    rare = int(np.flatnonzero(counts == 0)[0])
    common = int(counts.argmax())
    assert judged(None, True).passed is True
    assert judged(rare, True).passed is True
    assert judged(common, True).passed is False  # one is too many for a tokenizer that has all bytes
    assert judged(rare, False).passed is True
    assert judged(common, False).passed is False
    assert "0.1 %" in judged(common, False).bound
    widened = judged(common, False, Bounds(max_unknown_share=0.5))
    assert widened.passed is True
    assert "widened from 0.001 to 0.5" in widened.why
    assert judged(common, True, Bounds(max_unknown_share=0.5)).passed is False  # nothing to widen


@pytest.mark.parametrize(
    ("name", "wide"),
    [
        ("entropy of token frequencies", "min_entropy=0"),
        ("commonest id", "max_top_share=1"),
        ("distinct ids", "min_distinct=1"),
    ],
)
def test_a_bound_can_be_widened_by_a_number_and_the_verdict_says_so(
    dataset: Path, tok: Tokenizer, name: str, wide: str
) -> None:
    reencode(dataset / "train", tok, all_one_id)
    before = verdicts(dataset, tok)[name]
    assert before.passed is False
    with pytest.raises(Refused, match=r"go on with --widen m[a-z_]+="):
        enforce({dataset: [before]})
    after = verdicts(dataset, tok, bounds=Bounds.parse(wide))
    assert after[name].passed is True
    assert "widened from" in str(after[name])
    others = {"entropy of token frequencies", "commonest id", "distinct ids"} - {name}
    assert all(after[o].passed is False for o in others)


def test_a_bound_is_never_narrowed(dataset: Path, tok: Tokenizer) -> None:
    assert not failed(
        dataset, tok, bounds=Bounds.parse("max_top_share=0.0001 min_distinct=399,min_entropy=9")
    )


def test_bytes_per_token_out_of_bounds(tok: Tokenizer, dataset: Path) -> None:
    counts = np.bincount(np.concatenate(TokenShards(dataset / "train").arrays), minlength=tok.vocab_size)
    for rate, passed in ((0.5, False), (0.8, True), (2.2, True), (9.0, False)):
        found = {v.name: v for v in plausible(counts, int(rate * counts.sum()), tok)}
        assert found["bytes per token"].passed is passed


def test_random_ids_are_too_even(tok: Tokenizer) -> None:
    counts = np.full(tok.vocab_size, 100)
    found = {v.name: v for v in plausible(counts, int(2 * counts.sum()), tok)}
    assert found["entropy of token frequencies"].passed is False


def test_few_tokens_are_not_judged_and_it_is_said(tok: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path, tok, [Document("x", "~" * 500)])
    found = verdicts(tmp_path, tok)
    for name in ("entropy of token frequencies", "distinct ids", "commonest id", "bytes per token"):
        assert found[name].verdict == SKIPPED
        assert "too few to judge" in found[name].why


@pytest.mark.parametrize(
    "text", ["x=1", "max_top_share", "max_top_share=x", "max_top_share=-1", "max_top_share=nan"]
)
def test_widen_says_how_it_is_written(text: str) -> None:
    with pytest.raises(UsageError, match="write NAME=NUMBER with a name of min_entropy, "):
        Bounds.parse(text)


def test_without_borders_two_guards_say_that_they_were_not_asked(tok: Tokenizer, tmp_path: Path) -> None:
    encode_corpus(Memory(corpus(60)), tok, tmp_path, val_fraction=0.3, eos_policy="none")
    found = verdicts(tmp_path, tok)
    for name in ("end of text", "documents on both sides", "encode(decode(ids)) = ids"):
        assert found[name].verdict == SKIPPED
        assert found[name].why
    assert not failed(tmp_path, tok)


def test_documents_for_the_round_trip_are_whole(dataset: Path, tok: Tokenizer) -> None:
    texts = {d.text for d in [*corpus(99), *corpus(99, seed=6)]}
    shards = TokenShards(dataset / "train")
    found = list(guards.sample_documents(shards))
    assert len(found) > 10
    for where, ids in found:
        assert tok.decode(ids) in texts
        name, place = where.split(":")
        array = np.fromfile(dataset / "train" / name, "<u4")
        assert array[int(place) : int(place) + ids.size].tolist() == ids.tolist()
    assert len({where for where, _ in found}) == len(found)  # none twice, however few there are
    assert round_trip(shards, tok).passed is True
    one = [where for where, _ in guards.sample_documents(TokenShards(dataset / "val"), 500)]
    assert len(set(one)) == len(one) <= TokenShards(dataset / "val").total_documents


def test_a_folder_without_val_is_audited_alone(dataset: Path, tok: Tokenizer) -> None:
    shutil.rmtree(dataset / "val")
    assert list(sides_of(dataset)) == ["train"]
    found = verdicts(dataset, tok)
    assert "documents on both sides" not in found
    assert sides_of(dataset / "train") == {"train": dataset / "train"}


def test_repair_gives_what_was_written(dataset: Path, tok: Tokenizer) -> None:
    path = dataset / "train" / "manifest.json"
    old = json.loads(path.read_text())
    path.unlink()
    made = repair_manifest(dataset / "train", tok)
    new = json.loads(path.read_text())
    totals = ("total_tokens", "total_documents", "total_bytes", "shard_count", "vocab_size", "audit")
    for key in (*totals, "eos_policy", "eos_token_id"):
        assert new[key] == old[key], key
    assert [(s["name"], s["tokens"], s["sha256"]) for s in new["shards"]] == [
        (s["name"], s["tokens"], s["sha256"]) for s in old["shards"]
    ]
    assert made.made == {"repaired": True}
    assert new["corpus_sha256"] is None
    TokenShards(dataset / "train", tok)
    repair_manifest(dataset / "train", tok)
    assert json.loads(path.read_text()) == new


@pytest.mark.parametrize("policy", ["after", "between", "none"])
def test_repair_reads_the_eos_policy_off_the_shards(tok: Tokenizer, tmp_path: Path, policy: str) -> None:
    write(tmp_path, tok, corpus(9), 300, policy)
    (tmp_path / "manifest.json").unlink()
    assert repair_manifest(tmp_path, tok).eos_policy == policy
    TokenShards(tmp_path, tok)


def test_repair_refuses_what_is_no_shard(tok: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path, tok, corpus(9), 300)
    (tmp_path / "shard-00001.bin").rename(tmp_path / "shard-00099.bin")
    with pytest.raises(MalformedFile, match=r"shard-00001\.bin: missing"):
        repair_manifest(tmp_path, tok)
    (tmp_path / "shard-00099.bin").rename(tmp_path / "shard-00001.bin")
    (tmp_path / "shard-00000.bin").write_bytes(b"\0" * 7)
    with pytest.raises(MalformedFile, match="a size of 7 bytes is no whole number of 4-byte ids"):
        repair_manifest(tmp_path, tok)
    (tmp_path / "shard-00000.bin").write_bytes(b"\xff" * 8)
    with pytest.raises(MalformedFile, match="token 0 has id 4294967295"):
        repair_manifest(tmp_path, tok)


@pytest.mark.parametrize("plant", [os.mkdir, os.mkfifo, lambda p: os.symlink("gone", p)])
def test_repair_refuses_what_is_no_file(tok: Tokenizer, tmp_path: Path, plant: Callable[[Path], Any]) -> None:
    write(tmp_path, tok, corpus(9), 300)
    (tmp_path / "shard-00001.bin").unlink()
    plant(tmp_path / "shard-00001.bin")
    with pytest.raises(MalformedFile, match=r"shard-00001\.bin: is not a file"):
        repair_manifest(tmp_path, tok)


def test_a_killed_encoding_can_be_used_after_a_repair(tok: Tokenizer, tmp_path: Path) -> None:
    put(ShardWriter(tmp_path, tok, 200), tok, corpus(20)[:12])
    with pytest.raises(MalformedFile, match="did not finish"):
        TokenShards(tmp_path)
    made = repair_manifest(tmp_path, tok)
    assert made.eos_policy == "between"  # the last document is cut off in the middle
    assert TokenShards(tmp_path, tok).total_tokens == made.total_tokens


def test_the_picture_shows_both_sides(dataset: Path, tok: Tokenizer, tmp_path: Path) -> None:
    found = audit(sides_of(dataset), tok)
    draw_audit(found, tok.vocab_size, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    draw_audit([Split("train", dataset)], tok.vocab_size, tmp_path / "b.png")
    assert (tmp_path / "a.png").stat().st_size > (tmp_path / "b.png").stat().st_size


def test_a_row_of_the_manifest_is_no_proof(dataset: Path, tok: Tokenizer) -> None:
    edit_shard_row(dataset / "val", sha256="0" * 64)
    assert failed(dataset, tok) == {"sha256, ids and counts"}
