"""The pass over shards: documents, identities, counts, against a reading that is as plain as can be."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest

from apr.data import scan as module
from apr.data.scan import R_INVERSE, R, Scan, mix, scan

V, EOS = 300, 299


def documents_of(ids: list[int]) -> list[tuple[int, ...]]:
    """Runs between end-of-text ids, empty ones left out."""
    out: list[tuple[int, ...]] = []
    held: list[int] = []
    for i in [*ids, EOS]:
        if i == EOS:
            if held:
                out.append(tuple(held))
            held = []
        else:
            held.append(i)
    return out


def split(ids: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    return [a.astype(np.uint32) for a in np.split(ids, np.cumsum(sizes)[:-1])]


def random_ids(seed: int, n: int, eos_share: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 250, n)
    ids[rng.random(n) < eos_share] = EOS
    return ids


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("eos_share", [0.0, 0.002, 0.05, 0.5])
@pytest.mark.parametrize("chunk", [64, 1 << 20])
def test_documents_are_those_between_ends(
    monkeypatch: pytest.MonkeyPatch, chunk: int, eos_share: float, threads: int
) -> None:
    monkeypatch.setattr(module, "CHUNK_TOKENS", chunk)
    ids = random_ids(3, 1999, eos_share)
    arrays = split(ids, [1, 700, 64, 128, 1, 1105])
    found = scan(arrays, V, EOS, keep=True, threads=threads)
    want = documents_of(ids.tolist())
    assert found.documents == len(want)
    assert found.lengths.sum() == len(want)
    assert found.ends == (ids == EOS).sum()
    np.testing.assert_array_equal(found.counts, np.bincount(ids, minlength=V))
    assert found.sha256 == [hashlib.sha256(a.tobytes()).hexdigest() for a in arrays]
    for length, count in zip(*np.unique([len(d) for d in want], return_counts=True), strict=True):
        same_bin = [d for d in want if int(4 * math.log2(len(d))) == int(4 * math.log2(length))]
        assert found.lengths[int(4 * math.log2(length))] == len(same_bin) >= count
    # Equal documents, and no others, have equal identities.
    assert np.unique(found.identities).size == len(set(want))
    assert found.identities.size == len(want)


def identities(ids: np.ndarray, sizes: list[int]) -> np.ndarray:
    return scan(split(ids, sizes), V, EOS, keep=True).identities


def test_identities_do_not_depend_on_shards_or_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(4, 3000, 0.01)
    want = identities(ids, [3000])
    for size in (1, 7, 999):
        sizes = [size] * (3000 // size) + ([3000 % size] if 3000 % size else [])
        np.testing.assert_array_equal(identities(ids, sizes), want)
    for chunk in (1, 3, 100):
        monkeypatch.setattr(module, "CHUNK_TOKENS", chunk)
        np.testing.assert_array_equal(identities(ids, [1500, 1500]), want)


@pytest.mark.parametrize("change", ["swap", "one id", "shorter", "repeat"])
def test_another_document_has_another_identity(change: str) -> None:
    document = np.arange(1, 60)
    other = document.copy()
    if change == "swap":
        other[[10, 11]] = other[[11, 10]]
    elif change == "one id":
        other[0] = 0
    elif change == "shorter":
        other = other[:-1]
    else:
        other = np.concatenate([other, other])
    both = scan([np.concatenate([document, [EOS], other, [EOS]]).astype(np.uint32)], V, EOS, keep=True)
    assert np.unique(both.identities).size == 2
    # What tells two places apart is the power of R; it must be odd, and not repeat soon.
    assert R * R_INVERSE % (1 << 64) == 1
    assert R % 8 == 5


def test_documents_of_one_side_are_found_among_those_of_the_other() -> None:
    val = random_ids(5, 2000, 0.01)
    train = random_ids(6, 9000, 0.01)
    held = scan([val.astype(np.uint32)], V, EOS, keep=True).identities
    sound = scan(split(train, [4000, 5000]), V, EOS, against=held)
    common = set(documents_of(val.tolist())) & set(documents_of(train.tolist()))
    assert sound.shared == sum(d in common for d in documents_of(train.tolist()))
    stolen = max(documents_of(val.tolist()), key=len)
    planted = np.concatenate([train[:5000], [EOS], stolen, [EOS], train[5000:]])
    # Wherever shards are cut, inside the stolen document too.
    for first in (4990, 5003, 5000 + len(stolen) // 2):
        found = scan(split(planted, [first, planted.size - first]), V, EOS, against=held)
        assert found.shared == sound.shared + 1


def test_the_last_document_needs_no_end() -> None:
    ids = np.array([1, 2, EOS, EOS, 3, 4, 5], np.uint32)
    found = scan([ids], V, EOS, keep=True)
    assert (found.documents, found.ends) == (2, 2)
    assert np.array_equal(found.identities, identities(np.array([3, 4, 5, EOS, 1, 2]), [6]))


def test_without_an_end_of_text_nothing_is_delimited() -> None:
    found = scan([np.array([1, 2, EOS, 3], np.uint32)], V, None, keep=True)
    assert (found.documents, found.ends, found.identities.size) == (0, 0, 0)
    assert found.counts.sum() == 4


@pytest.mark.parametrize("place", [0, 1, 99])
def test_an_id_outside_the_vocabulary_is_named(monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    monkeypatch.setattr(module, "CHUNK_TOKENS", 16)
    ids = np.zeros(100, np.uint32)
    ids[place] = 2**32 - 1
    found = scan([np.zeros(3, np.uint32), ids], V, EOS)
    assert found.outside == (1, place, 2**32 - 1)
    assert found.counts.sum() == 102
    assert scan([np.zeros(3, np.uint32)], V, EOS).outside is None


def test_progress_hears_every_token() -> None:
    heard: list[int] = []
    out = scan(split(random_ids(1, 5000, 0.1), [10, 4990]), V, EOS, threads=2, progress=heard.append)
    assert isinstance(out, Scan)
    assert sum(heard) == 5000


def test_mix_is_splitmix64() -> None:
    # The first outputs of SplitMix64 from state 0 (java.util.SplittableRandom(0), Vigna's splitmix64.c).
    state = np.array([0x9E3779B97F4A7C15, 0x3C6EF372FE94F82A], np.uint64)
    assert [hex(int(x)) for x in mix(state)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]
