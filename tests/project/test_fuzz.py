"""Readers withstand a few thousand hostile files, and the fuzzer finds a reader that does not."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr.checkpoints.apr2 import read_apr
from apr.common.errors import MalformedFile
from fuzz_formats import FORMATS, MIB, Case, Format, put
from fuzzing import Limits, Tally, fuzz, replay, run_chunk, store, variants
from mutations import mutate_json, with_crcs

CASES = {"shards": 60, "tokenizer": 200, "import": 100, "hf": 200, "apr": 250}  # the others: 400


@pytest.mark.parametrize("name", FORMATS)
def test_readers_withstand_hostile_files(name: str, tmp_path: Path) -> None:
    tally = run_chunk(FORMATS[name], 20, 0, CASES.get(name, 400), Limits(), tmp_path)
    assert not tally.findings, f"tools/fuzz.py --formats {name} --seed 20 stores the inputs"
    assert tally.results["accepted"] > 0  # else nothing behind the first check was read
    assert tally.results.total() == tally.files == CASES.get(name, 400)


@pytest.mark.parametrize("name", FORMATS)
def test_sound_files_are_accepted(name: str, tmp_path: Path) -> None:
    fmt, refused = FORMATS[name], []
    for i, case in enumerate(fmt.seeds()):
        put(tmp_path / str(i), case)
        try:
            fmt.read(tmp_path / str(i))
        except Exception as e:
            refused.append(f"{i}: {e}")
    assert len(refused) <= {"apr": 1, "ids": 3}.get(name, 0), refused  # those seeds are for the reader below


def test_the_same_seed_gives_the_same_files() -> None:
    def some(seed: int) -> list[Case]:
        found = variants(FORMATS["apr"], seed, 3)
        return [next(found)[0] for _ in range(50)]

    assert some(1) == some(1)
    assert some(1) != some(2)


def test_checksums_are_made_right(tmp_path: Path) -> None:
    (case,) = FORMATS["apr"].seeds()[:1]
    data = bytearray(case["m.apr"])
    data[70] ^= 1  # in the metadata
    (tmp_path / "a.apr").write_bytes(data)
    with pytest.raises(MalformedFile, match="footer CRC"):
        read_apr(tmp_path / "a.apr")
    data[10] ^= 1  # in the header
    (tmp_path / "b.apr").write_bytes(with_crcs(bytes(data)))
    with pytest.raises(MalformedFile) as e:
        read_apr(tmp_path / "b.apr")
    assert "CRC" not in str(e.value)


def test_most_variants_of_json_are_json_still() -> None:
    text, good = json.dumps({"a": {"b": [1, 2, {"c": "x"}]}, "d": 1.5}).encode(), 0
    for i in range(300):
        changed = mutate_json(random.Random(i), text, text)
        try:
            good += json.loads(changed) != json.loads(text)
        except ValueError:
            continue
    assert good > 200


# Planted faults: what a reader could do wrong is a finding


def raises(folder: Path) -> None:
    raise KeyError("weight_map")


def hangs(folder: Path) -> None:
    while True:
        pass


def waits_for_a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "pipe").read_bytes()


def allocates(folder: Path) -> None:
    np.zeros(8 * MIB)


def says_nothing(folder: Path) -> None:
    raise MalformedFile("something is wrong")


def quotes_all(folder: Path) -> None:
    raise MalformedFile.__base__.__new__(MalformedFile, f"{folder}: \x1b[2J")  # type: ignore[union-attr]


def warns(folder: Path) -> None:
    np.float32(1e30) * np.float32(1e30)


def aborts(folder: Path) -> None:
    os.abort()


def exits(folder: Path) -> None:
    os._exit(3)


def planted(read: Callable[[Path], Any]) -> Format:
    return replace(FORMATS["config"], read=read)


LIMITS = Limits(seconds=0.2)


@pytest.mark.parametrize(
    ("read", "what"),
    [
        (raises, "KeyError at the reader"),
        (hangs, "hangs at the reader"),
        (waits_for_a_pipe, "hangs at the reader"),
        (allocates, "takes too much memory"),
        (says_nothing, "MalformedFile has a message that names no file"),
        (quotes_all, "MalformedFile has a message that cannot be printed"),
        (warns, "RuntimeWarning at the reader"),
    ],
)
def test_a_planted_fault_is_a_finding(read: Callable[[Path], Any], what: str, tmp_path: Path) -> None:
    tally = run_chunk(planted(read), 1, 0, 2, LIMITS, tmp_path)
    (found,) = tally.findings
    assert found.startswith(what)
    assert (tally.findings[found], tally.files, tally.results.total()) == (2, 2, 0)
    assert len(tally.kept[found]) == 2


def test_a_reader_that_kills_its_process_is_a_finding_and_the_others_go_on() -> None:
    formats = [
        replace(planted(aborts), name="aborts"),
        replace(planted(exits), name="exits"),
        FORMATS["settings"],
    ]
    seen: list[int] = []

    def progress(tallies: dict[str, Tally]) -> None:
        seen.append(sum(t.files for t in tallies.values()))

    tallies = fuzz([replace(f, share=1) for f in formats], 12, jobs=2, progress=progress)
    assert dict(tallies["aborts"].findings) == {"the process dies of SIGABRT": 4}
    assert dict(tallies["exits"].findings) == {"the process dies with code 3": 4}
    assert tallies["aborts"].kept["the process dies of SIGABRT"][0].keys() == {"config.json"}
    assert (tallies["settings"].files, tallies["settings"].findings.total()) == (4, 0)
    assert (seen[-1], sorted(seen)) == (12, seen)


def test_a_finding_can_be_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "config", planted(raises))
    case = FORMATS["config"].seeds()[0]
    path = store(tmp_path, FORMATS["config"], "KeyError", {**case, "pipe": b"<pipe>"})
    outcome, text = replay(path)
    assert (outcome.finding, outcome.result) == (True, "KeyError at the reader of the fuzzer")
    assert "KeyError: 'weight_map'" in text
    monkeypatch.undo()
    assert replay(path)[0].result == "accepted"
