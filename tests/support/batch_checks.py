"""Checks of the order in which batches read windows; planted faults of data must turn them red."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from apr.common.errors import Refused
from apr.data.batches import Batches, Windows
from apr.data.shards import TokenShards
from apr.tokenizer.tokenizer import Tokenizer
from data_cases import corpus, windows_of, write


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
