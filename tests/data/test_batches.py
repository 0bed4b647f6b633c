"""Windows and batches: every token once, shuffled without memory, resumable to the window."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr.common.errors import Refused
from apr.data.batches import BATCHES_AHEAD, Batches, Exhausted, Permutation, Windows, sequential
from apr.tokenizer.tokenizer import Tokenizer
from apr.tokenizer.training import train_tokenizer
from batch_checks import (  # noqa: F401  tests, run here too
    stream,
    test_a_pass_reads_every_window_once,
    test_windows_predict_each_token_once,
)
from data_cases import corpus, windows_of


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer([d.text for d in corpus()], 400, tmp_path_factory.mktemp("tok"))


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


def test_reading_ahead_changes_nothing_but_when_data_is_read(tok: Tokenizer, tmp_path: Path) -> None:
    windows = windows_of(tmp_path, tok, 11)
    stream_ = Batches(windows, 3, seed=9)
    start, threads = stream_.state(), set()
    read = windows.read

    def watched(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        threads.add(threading.current_thread().name)
        calls.append(indices.tolist())
        return read(indices)

    calls: list[list[int]] = []
    windows.read = watched  # type: ignore[method-assign]
    want = [Batches(windows, 3, seed=9)._indices(np.arange(3 * i, 3 * i + 3)).tolist() for i in range(20)]
    for i in range(9):
        assert stream_.state()["pass"] * 11 + stream_.state()["position"] == 3 * i
        stream_.next()
    stream_._ahead[-1].result()  # what was asked for is read, in order, and no further
    assert calls == want[: 9 + BATCHES_AHEAD]
    assert len(threads) == 2
    stream_.restore(start)  # forgets what was read ahead
    assert np.array_equal(stream_.next()[0], read(np.array(want[0]))[0])


def test_reading_ahead_stops_where_the_data_does(tok: Tokenizer, tmp_path: Path) -> None:
    b = Batches(windows_of(tmp_path, tok, 11), 3, seed=9, on_exhausted="stop")
    for left in (2, 1, 0):
        b.next()
        assert len(b._ahead) == left
    with pytest.raises(Exhausted):
        b.next()


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
    for bad in ({"batch_size": 0}, {"on_exhausted": "x"}):
        with pytest.raises(Refused):
            Batches(**{"windows": b.windows, "batch_size": 3, "seed": 0, **bad})  # type: ignore[arg-type]


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
