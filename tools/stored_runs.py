"""Verify the stored runs of the last release, or make them anew and write down why.

    python tools/stored_runs.py                    # verifies each with every step replayed; exit 1 if one is red
    python tools/stored_runs.py --because "TEXT"   # makes them anew: TEXT and what changed go to made.json beside them

`make test` verifies them too (tests/verify/test_stored_runs.py). A change that moves the last bit of a step turns them red on
the processor that they were made on; one that moves more than rounding does so everywhere. Make them anew when that is meant, and
say what changed; never to get rid of a red that nobody can explain.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]

import run_store as stored
from apr.backends.select import choose
from apr.common.files import sha256_of
from apr.common.finding import FAIL
from apr.common.provenance import git_commit, versions

KEYS = ("train_loss", "grad_norm", "weight_norm", "lr", "val_loss")


def lines(run: Path) -> dict[tuple[int, str], float]:
    """Read the figures of a log: {(step, key): value}."""
    path = run / "metrics.jsonl"
    rows = [json.loads(row) for row in path.read_text().splitlines()] if path.is_file() else []
    return {(row["step"], key): row[key] for row in rows for key in KEYS if key in row}


def difference(old: Path, new: Path) -> str:
    """Say in a line what changed between two makings of a run."""
    if not old.is_dir():
        return "new"
    a, b = lines(old), lines(new)
    settings = [json.loads((run / "config.json").read_text())["settings"] for run in (old, new)]
    changed = sorted(k for k in {*settings[0], *settings[1]} if settings[0].get(k) != settings[1].get(k))
    said = [f"settings {', '.join(changed)}"] if changed else []
    moved = [
        (abs(b[k] - a[k]) / max(abs(a[k]), 1e-12), k) for k in sorted(a.keys() & b.keys()) if a[k] != b[k]
    ]
    if moved or a.keys() != b.keys():
        step, key = moved[0][1] if moved else (0, "steps")
        worst = max(moved)[0] if moved else 0.0
        said.append(f"figures from step {step} ({key}) on, by up to {worst:.1e} of them")
    return "; ".join(said) or "no figure: other files alone"


def remake(because: str) -> None:
    """Make the runs anew, with a new entry in made.json."""
    record = stored.STORED / stored.MADE
    history: list[dict[str, Any]] = json.loads(record.read_text())["made"] if record.is_file() else []
    with tempfile.TemporaryDirectory() as place:
        new = Path(place) / "runs"
        stored.make(new)
        entry = {
            "date": time.strftime("%Y-%m-%d"),
            "commit": git_commit(),
            "because": because,
            "changed": {name: difference(stored.STORED / name, new / name) for name in stored.JOBS},
            "device": choose("cpu", None, 1).backend.describe(),
            "versions": versions(),
        }
        stored.replace(new)
    evidence = {name: sha256_of(stored.STORED / name / "evidence.json")[0] for name in stored.JOBS}
    record.write_text(json.dumps({"evidence": evidence, "made": [entry, *history]}, indent=1) + "\n")


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--because", metavar="TEXT", help="make the runs anew; what changed, and why")
    args = parser.parse_args()
    if args.because is not None:
        if len(args.because.split()) < 4:
            parser.error("--because: say in a sentence what changed and why")
        remake(args.because)
    red = 0
    for name in stored.JOBS:
        findings = stored.check(name)
        bad = [f for f in findings if f.verdict == FAIL]
        replayed = next(f for f in findings if f.name == "replay")
        print(f"{name:9} {'RED' if bad else 'good'}   replay: {replayed.measured}; bound {replayed.bound}")
        for f in bad:
            print(f"          {f.name}: {f.measured}; bound {f.bound}")
        red += bool(bad)
    return int(bool(red))


if __name__ == "__main__":
    sys.exit(main())
