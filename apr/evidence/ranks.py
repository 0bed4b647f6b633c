"""Judge that several ranks are one run: the same code, data and settings, the same gradients, the same weights.

ranks.json is the record: who trained together from which step on, and at the evaluations hashes of the weights and how long a
micro-batch takes each rank.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..common.atomic import write_json
from ..common.events import Evaluated, RanksComputed, StepBegun, Stepped
from ..common.files import read_json
from ..common.finding import Finding
from ..common.units import plural
from ..model.lora_dropout import Draws
from ..ranks.shard import crc, hashes
from .gates import Gates
from .subject import Subject

FORMAT, RANKS = "apr-ranks-1", "ranks.json"
BEFORE, START, EQUAL, CROSS, SLOW = (
    "before.ranks", "start.ranks", "run.ranks-equal", "run.cross-check", "run.straggler",
)  # fmt: skip
# Steps over which the fastest time of a rank is taken: what else its machine does passes, a slow processor does not.
SLOW_STEPS = 20
# The same on GPUs, which are timed at cross-checks alone: in other passes they wait for each other.
SLOW_CHECKS = 3
# Steps between comparisons of all weights; the first step of a process is compared too.
EQUAL_EVERY = 10


def same_job(all_facts: Sequence[Mapping[str, Any]], size: int) -> Finding:
    """Compare what the ranks have been given, and that their parts of the weights are the whole, once (gate before.ranks).

    all_facts: of each rank; "part" lists [first, behind the last] of `size` elements."""
    first, wrong = _flat(all_facts[0]), list[str]()
    for rank, facts in enumerate(map(_flat, all_facts)):
        keys = [key for key in first | facts if facts.get(key) != first.get(key)]
        wrong += [f"{key} of rank {rank} is {facts.get(key)}, of rank 0 {first.get(key)}" for key in keys]
    parts = sorted(part for facts in all_facts for part in facts["part"])
    borders = [0, *(n for part in parts for n in part), size]
    if borders[::2] != borders[1::2]:
        off = next(
            n for n, pair in enumerate(zip(borders[::2], borders[1::2], strict=True)) if pair[0] != pair[1]
        )
        near = ", ".join(f"{a} to {b}" for a, b in parts[max(0, off - 1) : off + 2])
        wrong.append(f"the parts of the weights are {near} of {size}: not each element once")
    hosts = len({facts["host"] for facts in all_facts})
    measured = f"{len(all_facts)} ranks on {plural(hosts, 'host')}"
    return Finding.of(
        BEFORE, not wrong, measured, "equal on all ranks, parts that are the whole", "; ".join(wrong[:3])
    )


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Name every fact that must be equal, {"data": {"x": 1}} as "data, x"; not the host, the GPU and the part of the weights."""
    out: dict[str, Any] = {}
    for key, x in facts.items():
        if isinstance(x, Mapping):
            out |= {f"{key}, {name}": value for name, value in x.items()}
        elif key not in ("host", "part", "uuid"):
            out[key] = x
    return out


def different(hashes: Sequence[Sequence[tuple[str, int]]]) -> str:
    """Name the ranks that differ from most others, and the first tensor in which they do; "" where all are equal."""
    most = Counter(map(tuple, hashes)).most_common(1)[0][0]
    odd = [rank for rank, own in enumerate(hashes) if tuple(own) != most]
    if not odd:
        return ""
    name = next(a[0] for a, b in zip(hashes[odd[0]], most, strict=True) if a != b)
    others = len(hashes) - len(odd)
    beside = (
        f"the other {others}" if others > 1 else f"rank {next(r for r in range(len(hashes)) if r not in odd)}"
    )
    return f"rank {', '.join(map(str, odd))} has another {name} than {beside}"


def crossed(found: Sequence[tuple[int, Any, Any]]) -> str:
    """Name a rank whose gradients another does not find again; "" where all do. found: (other, own, again) of each rank"""
    wrong = [
        (rank, other) for rank, (other, _, again) in enumerate(found) if list(found[other][1]) != list(again)
    ]
    if not wrong:
        return ""
    rank, other = wrong[0]
    name = next(a[0] for a, b in zip(found[other][1], found[rank][2], strict=True) if a != b)
    suspects = set.intersection(*map(set, wrong))
    whom = f"it is rank {suspects.pop()} that differs" if len(suspects) == 1 else "one of the two is wrong"
    return f"rank {rank} computes a micro-batch of rank {other} again, and finds another {name}: {whom}"


def slowest(seconds: Sequence[Sequence[float]]) -> tuple[int, float]:
    """Find the rank whose fastest step takes longest: (rank, times the median of the others). seconds: of steps, of ranks"""
    fastest = np.min(np.asarray(seconds), axis=0)
    rank = int(np.argmax(fastest))
    return rank, float(fastest[rank] / max(np.median(np.delete(fastest, rank)), 1e-9))


class RankGates:
    """Gates start.ranks, run.cross-check, run.straggler and run.ranks-equal, and the record of the ranks.

    Raises Aborted, on all ranks at once."""

    def __init__(self, subject: Subject, gates: Gates, facts: Sequence[Mapping[str, Any]]) -> None:
        self.subject, self.gates, self.facts = subject, gates, facts
        self.steps, self.is_recorded = 0, False
        times = SLOW_CHECKS if subject.backend.asynchronous else SLOW_STEPS
        self.seconds: deque[Sequence[float]] = deque(maxlen=times)
        self.path = subject.run / RANKS

    def step_begun(self, e: StepBegun) -> None:
        """Compute the first micro-batch on every rank, and compare all gradients."""
        t, trained = self.subject, self.subject.adapters or self.subject.model
        if self.steps or t.ranks.count == 1:
            self._record(e.step - 1)
            return
        with self.gates.timed(START):
            ids, targets = (np.ascontiguousarray(x[: t.model.batch]) for x in (e.ids, e.targets))
            before = t.model.tokens_trained
            t.backend.fill(t.model.total, 0)
            draws = Draws.of(t.settings.seed, e.step, 0, len(ids))
            t.model.micro_step(ids, targets, 1 / e.targets.size, False, draws=draws)
            found = [
                ("loss", crc(t.backend.to_host(t.model.total))),
                *hashes(t.backend, trained.layout, trained.g),
            ]
            t.model.tokens_trained = before
            for flat in (trained.g, t.model.total):
                t.backend.fill(flat, 0)
            why = different(t.ranks.share(found))
        why = why and f"one micro-batch, computed on every rank: {why}"
        measured = f"{plural(len(found) - 1, 'gradient')} of one micro-batch on {t.ranks.count} ranks"
        self.gates.judge(Finding.of(START, not why, measured, "equal bits", why), e.step)
        self._record(e.step - 1)

    def ranks_computed(self, e: RanksComputed) -> None:
        """Compare gradients that another rank has computed again, where that was due, and the times of the ranks."""
        t, count = self.subject, self.subject.ranks.count
        if e.other >= 0:
            why = crossed(t.ranks.share((e.other, e.own, e.again)))
            measured = f"{plural(len(e.own), 'gradient')} of a micro-batch of each of {count} ranks, computed by another"
            self.gates.judge(Finding.of(CROSS, not why, measured, "equal bits", why), e.step)
        if not e.seconds:
            self.gates.skip(SLOW, f"GPUs are timed at cross-checks; there were fewer than {SLOW_CHECKS}")
            return
        self.seconds.append(e.seconds)
        if len(self.seconds) == self.seconds.maxlen:
            rank, times = slowest(self.seconds)
            bound, host = self.gates.bound("straggler"), self.facts[rank].get("host")
            measured = f"rank {rank} on {host} takes {times:.3g} times as long as the median of the others"
            found = Finding.of(SLOW, times <= bound, measured, f"at most {bound:g}", score=times)
            self.gates.judge(found, e.step)

    def stepped(self, e: Stepped) -> None:
        """Compare the weights of all ranks, now and then."""
        self.steps += 1
        if self.steps == 1 or self.steps % EQUAL_EVERY == 0:
            self._compare(e.line["step"])

    def evaluated(self, e: Evaluated) -> None:
        """Compare the weights of all ranks, and record their hash."""
        self._compare(e.line["step"])

    def _compare(self, step: int) -> None:
        t = self.subject
        if t.ranks.count == 1:
            for gate in (EQUAL, START, CROSS, SLOW):
                self.gates.skip(gate, "one process")
            return
        with self.gates.timed(EQUAL):
            trained = t.adapters or t.model
            found = hashes(t.backend, trained.layout, trained.w)
            why = different(t.ranks.share(found))
        sha = hashlib.sha256(repr(found).encode()).hexdigest()
        measured = f"{plural(len(found), 'tensor')} on {t.ranks.count} ranks, {sha[:12]}"
        self.gates.judge(Finding.of(EQUAL, not why, measured, "equal bits", why), step)
        self._record(step, sha)

    def _record(self, step: int, sha: str = "") -> None:
        """Add to ranks.json, on rank 0; one process has none, but goes on with that of several."""
        t = self.subject
        if t.ranks.rank or (t.ranks.count == 1 and not self.path.exists()) or (self.is_recorded and not sha):
            return
        d: Any = {"format": FORMAT, "starts": [], "weights": {}}
        if self.path.exists():
            d = read_json(self.path)
        if not self.is_recorded:
            self.is_recorded = True
            d["starts"].append({"after_step": step, "communicator": t.ranks.words, "ranks": list(self.facts)})
        if sha:
            d["weights"][str(step)] = sha
        if sha and self.seconds:
            fastest = np.min(np.asarray(self.seconds), axis=0)
            d.setdefault("seconds", {})[str(step)] = [round(float(s), 6) for s in fastest]
        write_json(self.path, d)


def times(run: Path) -> list[tuple[int, list[float]]]:
    """List (step, seconds of the fastest micro-batch of each rank before it) as ranks.json has them."""
    d = read_json(run / RANKS) if (run / RANKS).is_file() else {}
    found = d.get("seconds") if isinstance(d, dict) else None
    rows = found.items() if isinstance(found, dict) else ()
    return sorted(
        (int(step), [float(s) for s in seconds])
        for step, seconds in rows
        if step.isascii()
        and step.isdigit()
        and isinstance(seconds, list)
        and all(isinstance(s, int | float) for s in seconds)
    )


def members(run: Path) -> list[tuple[Any, list[dict[str, Any]]]]:
    """List (step, ranks) of the starts that ranks.json has; nothing where there is none."""
    d = read_json(run / RANKS) if (run / RANKS).is_file() else {}
    starts = d.get("starts") if isinstance(d, dict) else None
    return [
        (start.get("after_step", 0), [r for r in start["ranks"] if isinstance(r, dict)])
        for start in (starts if isinstance(starts, list) else [])
        if isinstance(start, dict) and isinstance(start.get("ranks"), list)
    ]


def read_ranks(run: Path) -> Iterator[tuple[Any, int]]:
    """List (step, number of ranks) of the starts."""
    return ((step, len(ranks)) for step, ranks in members(run))
