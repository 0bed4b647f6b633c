"""A mixture of sources: which they are, and the share of the stream that each has."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..common.errors import UsageError
from ..common.files import real
from .batches import Batches, Windows
from .mix_text import EXAMPLE, KINDS, OWN, as_text, name_of, tables_of
from .settings import DataSettings

# Places of a period, for weights: shares of up to four decimals, thirds and ninths are exact.
PERIOD = 90_000
# For budgets a period is the run itself, up to so many windows.
MAX_PERIOD = 1 << 20
# How far from 1 the sum of shares may be that were rounded by hand, such as three of 0.33.
ROUNDED = 0.02


@dataclass(frozen=True)
class MixSource:
    """One source. share: its part of all weights or budgets; tokens: its budget over the whole run, None with weights;
    settings: those of the run as if this source were all of its data."""

    name: str
    kind: str
    path: str
    share: float
    tokens: int | None
    settings: DataSettings


def sources_of(s: DataSettings) -> list[MixSource]:
    """List the sources of a run; without --mix the only one, whose name is "". Raises UsageError."""
    if s.mix is None:
        kind = next((k for k in (*KINDS, "preferences") if getattr(s, k) is not None), "")
        return [MixSource("", kind, str(getattr(s, kind, "")), 1.0, None, s)]
    found = [_source(s, t) for t in tables_of(s.mix)]
    if len(found) < 2:
        raise UsageError(f"--mix names {len(found)} source: give one with its own option, such as --corpus")
    for i, x in enumerate(found):
        for y in found[:i]:
            if (_place(x), x.kind) == (_place(y), y.kind):
                raise UsageError(
                    f"--mix: {x.kind} {x.path} stands there twice; give it once, with both shares"
                )
            if x.name == y.name:
                raise UsageError(f"--mix: two sources are called {x.name}; give one another name=NAME")
    return _shared(found)


def _place(x: MixSource) -> str:
    return x.path if x.path.startswith("hf://") or x.path == "stdlib" else str(real(x.path))


def _source(s: DataSettings, table: Mapping[str, str]) -> MixSource:
    kinds = [k for k in KINDS if k in table]
    if len(kinds) != 1:
        said = " ".join(f"{k}={v}" for k, v in table.items())
        raise UsageError(f"--mix: {said}: a source is one of {', '.join(KINDS)}; {EXAMPLE}")
    kind, path = kinds[0], table[kinds[0]]
    name = table.get("name") or name_of(path)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise UsageError(
            f"--mix: {kind}={path}: {name!r} is no name of letters, digits, _, . and -; give it a name=NAME"
        )
    if ("map" in table and kind != "instruct") or ("content_field" in table and kind != "corpus"):
        raise UsageError(f"--mix: {name}: map goes with instruct, content_field with corpus")
    weight, budget = (_number(name, key, table.get(key)) for key in ("weight", "tokens"))
    if (weight is None) == (budget is None):
        raise UsageError(
            f"--mix: {name}: give it a weight, its share of the sequences, or tokens, its budget over the whole run"
        )
    if budget is not None and budget != int(budget):
        raise UsageError(f"--mix: {name}: tokens={table['tokens']} is no whole number")
    own: dict[str, Any] = {key: table[key] for key in OWN if key in table}
    settings = replace(s, **{"mix": None, kind: path, **own})
    return MixSource(name, kind, path, weight or 0.0, None if budget is None else int(budget), settings)


def _number(name: str, key: str, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UsageError(
            f"--mix: {name}: {key}={text} is not a number above 0; leave a source out that has none"
        )
    return value


def _shared(found: list[MixSource]) -> list[MixSource]:
    """Give each source its part of the whole."""
    with_budget = [x.name for x in found if x.tokens is not None]
    if 0 < len(with_budget) < len(found):
        raise UsageError(
            f"--mix: {', '.join(with_budget)} by tokens, others by weight: give every source a weight, or every one its tokens"
        )
    parts = [float(x.share if x.tokens is None else x.tokens) for x in found]
    total = sum(parts)
    if not with_budget and max(parts) < 1 and abs(total - 1) > ROUNDED:
        raise UsageError(
            f"--mix: the weights sum to {total:g}: shares sum to 1; or give relative ones, of which one is at least 1"
        )
    smallest = min(found, key=lambda x: x.share if x.tokens is None else x.tokens)
    if min(parts) / total < 1 / PERIOD:
        raise UsageError(
            f"--mix: {smallest.name} has a share of {min(parts) / total:.1e}; at least {1 / PERIOD:.1e}"
        )
    return [replace(x, share=part / total) for x, part in zip(found, parts, strict=True)]


def windows_of_budget(tokens: int, seq_length: int) -> int:
    """Count the windows of a budget."""
    return -(-tokens // seq_length)


def turns_of(s: DataSettings) -> list[int]:
    """Count the windows of each source in a period of the stream: see Turns. Raises UsageError."""
    sources = sources_of(s)
    if len(sources) == 1:
        return [1]
    budgets = [windows_of_budget(x.tokens, s.seq_length) for x in sources if x.tokens is not None]
    if budgets and sum(budgets) <= MAX_PERIOD:
        return budgets
    return apportioned([x.share for x in sources], PERIOD)


def as_datasets(s: DataSettings, folders: Mapping[str, str]) -> str:
    """Write --mix with the same sources and shares, each the folder of its token shards, by name."""
    tables = zip(sources_of(s), tables_of(str(s.mix)), strict=True)
    return as_text(
        [
            {
                "dataset": folders[x.name],
                "name": x.name,
                **{k: t[k] for k in ("weight", "tokens") if k in t},
            }
            for x, t in tables
        ],
        "--mix",
    )


def stream(windows: Windows, s: DataSettings) -> Batches:
    """Make the stream of batches that the settings ask for."""
    return Batches(windows, s.batch_size, s.seed, s.shuffle, s.on_exhausted, turns_of(s))


def apportioned(shares: Sequence[float], places: int) -> list[int]:
    """Divide places by shares: whole numbers, of which those with the largest remainders are rounded up; none is 0."""
    exact = [share * places for share in shares]
    counts = [max(1, int(x + 1e-9)) for x in exact]
    order = sorted(range(len(exact)), key=lambda k: (counts[k] - exact[k], k))
    for k in order[: max(0, places - sum(counts))]:
        counts[k] += 1
    return counts


def steps_of_budgets(s: DataSettings) -> int | None:
    """Count the steps that draw the budgets of all sources; None without budgets."""
    if s.mix is None:
        return None
    budgets = [x.tokens for x in sources_of(s) if x.tokens is not None]
    windows = sum(windows_of_budget(n, s.seq_length) for n in budgets)
    return -(-windows // s.batch_size) if budgets else None
