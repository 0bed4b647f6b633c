"""Does a run that is killed at any moment, and gone on with, end like one that nobody disturbed?

    python tools/crash.py --kills 100 --in-training 0.5 --jobs 2 --output bench/crash.json
    python tools/crash.py --kills 30 --signals SIGKILL,SIGTERM,SIGINT --seed 7

Runs a small job of `apr pretrain` undisturbed, then again and again, stopping its process at moments drawn evenly from
the whole duration, from the start of Python to the last file, and --in-training of them from that of steps, evaluations
and saving alone, of which a small job has too little. Each process after a stop goes on with --resume. Every run
that comes to its end is compared with the undisturbed one: metrics without times, checkpoints, moments, samples, verdict.
SIGTERM and SIGINT must end with exit code 130 and INTERRUPTED. Exit code 1 when anything is not as it must be; the
folders of runs that differ are left in --folder. tests/support/crashing.py has how it is done.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]

from rich.console import Console
from rich.table import Table

from apr.common.provenance import circumstances
from crashing import Job, Report, crash


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=100, help="processes to stop, in all")
    p.add_argument("--signals", default="SIGKILL", help="by which signals, in turn, with commas between")
    p.add_argument("--in-training", type=float, default=0.0, help="share of the moments that lie in training")
    p.add_argument("--steps", type=int, default=96, help="steps of a run")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--jobs", type=int, default=1, help="runs at a time")
    p.add_argument("--folder", type=Path, help="where the runs write (default: a new temporary folder)")
    p.add_argument("--output", type=Path, help="write a record, as JSON")
    f = p.parse_args()
    if unknown := set(f.signals.split(",")) - set(signal.Signals.__members__):
        p.error(f"--signals: {', '.join(unknown)}")
    numbers = tuple(signal.Signals[name] for name in f.signals.split(","))
    folder = f.folder or Path(tempfile.mkdtemp(prefix="crash-"))
    began, told = time.monotonic(), 0

    def progress(report: Report) -> None:
        nonlocal told
        done, seconds = len(report.stops), time.monotonic() - began
        runs, faults = len(report.results), len(report.faults)
        print(f"{seconds:6.0f} s  {done} of {f.kills} stopped  {runs} runs done  {faults} faults", flush=True)
        for fault in report.faults[told:]:
            print(fault, flush=True)
        told = faults

    report = crash(Job(folder, f.steps).make(), f.kills, f.seed, numbers, f.jobs, f.in_training, progress)
    seconds = time.monotonic() - began
    show(report)
    if f.output:
        f.output.write_text(json.dumps(record(report, f, seconds), indent=1) + "\n")
    return int(bool(report.faults))


def show(report: Report) -> None:
    """The closing table."""
    names = sorted({name for _, counts in report.table() for name in counts})
    table = Table("stopped while", *names)
    for phase, counts in report.table():
        table.add_row(phase, *(str(counts[name]) for name in names))
    Console(width=100).print(table)
    equal = sum(not r.differs for r in report.results)
    print(
        f"{len(report.stops)} processes stopped, {len(report.results)} runs came to their end, {equal} of them equal to the "
        f"undisturbed one ({report.duration:.1f} s)"
    )
    for fault in report.faults:
        print(fault)


def record(report: Report, f: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """What --output holds. seconds_to_stop: from SIGTERM or SIGINT to the end of the process, by what it was doing."""
    stops: dict[str, list[float]] = {}
    for s in report.stops:
        if s.number != signal.SIGKILL:
            stops.setdefault(s.phase, []).append(round(s.seconds, 2))
    return {
        **circumstances(),
        "seed": f.seed,
        "steps": f.steps,
        "moments_in_training": f.in_training,
        "seconds": round(seconds, 1),
        "seconds_undisturbed": round(report.duration, 2),
        "stopped": len(report.stops),
        "stopped_while": {phase: dict(counts) for phase, counts in report.table()},
        "runs": len(report.results),
        "equal": sum(not r.differs for r in report.results),
        "seconds_to_stop": {phase: sorted(found) for phase, found in stops.items()},
        "faults": report.faults,
    }


if __name__ == "__main__":
    sys.exit(main())
