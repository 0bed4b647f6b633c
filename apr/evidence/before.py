"""Gates that are judged before anything large is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from ..common.finding import FAIL, Finding, guards_passed
from ..data.audit import Split
from ..model.config import ModelConfig
from . import measure
from .gates import Gates


def judge_inputs(
    gates: Gates,
    backend: ModuleType,
    dtype: str,
    need_bytes: int,
    splits: Sequence[Split],
    train: Any,
    val: Any,
    cfg: ModelConfig,
    source: str,
    blank: Sequence[str] | None,
    is_frozen: bool,
) -> None:
    """Judge device, memory, data, configuration and tokens. train, val: windows; source: of cfg; blank, is_frozen: see tokens.

    Raises Refused."""
    gates.judge(measure.device(backend, dtype))
    gates.judge(measure.memory(need_bytes, backend.free_memory()))
    gates.judge(data(splits))
    gates.judge(disjoint(splits, train, val))
    gates.judge(measure.architecture(cfg, source))
    gates.judge(tokens(blank, is_frozen))


def tokens(blank: Sequence[str] | None, is_frozen: bool) -> Finding:
    """Judge the rows of special tokens that --init never learnt: blank, None without conversations; is_frozen: they stay so."""
    gate, bound = "before.tokens", "none that stays 0, alike or at the mean"
    if blank is None:
        return Finding.skipped(gate, "no conversations", bound)
    measured = f"{len(blank)} of special tokens that are 0, alike or at the mean{', trained' if blank and not is_frozen else ''}"
    return Finding.of(gate, not (blank and is_frozen), measured, bound, ", ".join(blank))


def data(splits: Sequence[Split]) -> Finding:
    """Sum up the guards of the data; a failed one has ended the run before."""
    of_guards = [(split.name, f) for split in splits for f in split.findings]
    failed = [f"{name}: {f}" for name, f in of_guards if f.verdict == FAIL]
    remarks = [f"{name}: {f.name}: {f.why}" for name, f in of_guards if f.why]
    measured = guards_passed(f for _, f in of_guards)
    return Finding.of("before.data", not failed, measured, "none failed", "; ".join(failed or remarks))


def disjoint(splits: Sequence[Split], train: Any, val: Any) -> Finding:
    """Require that validation windows, or documents, are not trained on."""
    gate, bound = "before.disjoint", "none on both sides"
    if train.shards is val.shards:
        end, last = train.first + train.count, val.first + val.count - 1
        measured = f"windows {train.first:,} to {end - 1:,} and {val.first:,} to {last:,}"
        return Finding.of(gate, end <= val.first, measured, bound)
    found = [f for split in splits for f in split.findings if f.name == "documents on both sides"]
    for f in sorted(found, key=lambda f: f.severity, reverse=True)[:1]:
        measured = "; ".join(x.measured for x in found)
        return Finding(gate, f.verdict, f"documents: {measured}", bound, f.why)
    return Finding.skipped(gate, "the documents of the two sides were not compared", bound)
