"""Do the readers of apr withstand hostile files? Variants of sound files of every format, read in processes with limits.

    python tools/fuzz.py --cases 200000 --jobs 2 --output bench/fuzz.json
    python tools/fuzz.py --formats apr,tokenizer --cases 5000 --seed 7
    python tools/fuzz.py --replay fuzz-findings/apr-0123456789ab.tar

A variant must be accepted, or refused with an error of apr/common/errors.py that names the file, within limits of time
and memory; whatever else happens is a finding, and its input is kept in --keep. The same --seed and --cases give the same
variants. tests/support/fuzz_formats.py says what is read, tests/support/mutations.py how variants are made. Exit code 1 when
there are findings.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]

from rich.console import Console
from rich.table import Table

from apr.common.host import cores
from apr.common.provenance import circumstances
from fuzzing import FORMATS, Tally, fuzz, replay, store


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cases", type=int, default=20_000, help="variants in all")
    p.add_argument("--formats", default=",".join(FORMATS), help="which, with commas between (default: all)")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument(
        "--minutes", type=float, default=math.inf, help="stop after this time, whatever --cases says"
    )
    p.add_argument("--jobs", type=int, default=cores(), help="processes at a time")
    p.add_argument(
        "--keep", type=Path, default=Path("fuzz-findings"), help="folder for inputs that are findings"
    )
    p.add_argument("--output", type=Path, help="write a record, as JSON")
    p.add_argument("--replay", type=Path, help="read one kept input again")
    f = p.parse_args()
    if f.replay:
        outcome, text = replay(f.replay)
        print(text + f"{outcome.result}: {1000 * outcome.seconds:.1f} ms, {outcome.peak / 2**20:.1f} MiB")
        return int(outcome.finding)
    names = f.formats.split(",")
    if unknown := set(names) - set(FORMATS):
        p.error(f"--formats: {', '.join(unknown)}: choose from {', '.join(FORMATS)}")
    began, told, known = time.monotonic(), [0.0], set[tuple[str, str]]()

    def progress(tallies: dict[str, Tally]) -> None:
        for name, tally in tallies.items():
            for kind in tally.findings:
                if (name, kind) not in known:
                    known.add((name, kind))
                    paths = [store(f.keep, FORMATS[name], kind, case) for case in tally.kept[kind]]
                    print(f"{name}: {kind}, such as {paths[0]}", flush=True)
        if time.monotonic() - told[0] > 15:
            told[0] = time.monotonic()
            files, found = (
                sum(t.files for t in tallies.values()),
                sum(t.findings.total() for t in tallies.values()),
            )
            print(f"{told[0] - began:6.0f} s  {files:,} of {f.cases:,} files  {found:,} findings", flush=True)

    tallies = fuzz([FORMATS[n] for n in names], f.cases, f.seed, f.jobs, progress=progress, minutes=f.minutes)
    seconds = time.monotonic() - began
    show(tallies)
    rows: list[dict[str, Any]] = []
    for name, tally in tallies.items():
        for kind, count in tally.findings.most_common():
            paths = [str(store(f.keep, FORMATS[name], kind, case)) for case in tally.kept[kind]]
            rows.append({"format": name, "what": kind, "count": count, "inputs": paths})
            print(f"{name}: {kind}: {count:,} times, such as {paths[0]}")
    if f.output:
        f.output.write_text(json.dumps(record(tallies, rows, f.seed, seconds), indent=1) + "\n")
    return int(bool(rows))


def show(tallies: dict[str, Tally]) -> None:
    """The closing table."""
    table = Table(
        "format", "files", "accepted", "refused", "findings", "slowest ms", "peak MiB", "x size", "lines"
    )
    for name, t in tallies.items():
        refused = ", ".join(f"{k} {n:,}" for k, n in t.results.most_common() if k != "accepted")
        figures = (
            f"{1000 * t.slowest:.0f}",
            f"{t.peak / 2**20:.1f}",
            f"{max(t.multiple, 0):.1f}",
            f"{t.lines:,}",
        )
        table.add_row(
            name, f"{t.files:,}", f"{t.results['accepted']:,}", refused, f"{t.findings.total():,}", *figures
        )
    Console(width=150).print(table)


def record(
    tallies: dict[str, Tally], findings: list[dict[str, Any]], seed: int, seconds: float
) -> dict[str, Any]:
    """What --output holds. memory_multiple: peak beyond 1 MiB, over the bytes of the files."""
    formats = {
        name: {
            "files": t.files,
            "accepted": t.results["accepted"],
            "refused": {k: n for k, n in sorted(t.results.items()) if k != "accepted"},
            "findings": t.findings.total(),
            "slowest_ms": round(1000 * t.slowest, 1),
            "peak_mib": round(t.peak / 2**20, 2),
            "memory_multiple": round(max(t.multiple, 0.0), 2),
            "lines_reached": t.lines,
        }
        for name, t in tallies.items()
    }
    return {
        **circumstances(),
        "seed": seed,
        "seconds": round(seconds, 1),
        "files": sum(t.files for t in tallies.values()),
        "slowest_ms": max(x["slowest_ms"] for x in formats.values()),
        "memory_multiple": max(x["memory_multiple"] for x in formats.values()),
        "formats": formats,
        "findings": findings,
    }


if __name__ == "__main__":
    sys.exit(main())
