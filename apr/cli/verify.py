"""`apr verify RUN_DIR`: check a run's evidence from outside, on any machine.

Files against their hashes, the log against itself and against the verdict, checkpoints and states against what was
recorded of them, the data against its hashes, the validation loss on another backend, and, with --replay K, K recorded
steps chosen at random and computed again from the saved state before them. Nothing is written but the signature of --sign.

Example: apr verify runs/demo --replay 5"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..common.atomic import locked
from ..common.cache import throwaway_cache
from ..common.errors import Refused
from ..common.finding import PASS, as_json, exit_code, verdict_of
from ..common.options import device_option, json_option, option, parse
from ..common.units import plural
from ..evidence.signature import sign
from ..verify.record import UNMADE, Options, Record
from ..verify.verifier import verify
from .show import Show
from .tables import cell, print_findings


@dataclass(frozen=True)
class Flags:
    """Options of `apr verify`."""

    run_dir: str = option("folder of the run", positional=True, path=True)
    replay: int = option("recorded steps to compute again", 0, at_least=0, metavar="STEPS")
    within: int = option(
        "with --replay, how far after a saved state, or the start, a step may be",
        20,
        at_least=1,
        metavar="STEPS",
    )
    seed: int | None = option("seed of the choice of steps (default: another one each time)")
    backend: str = option(
        "backend that computes the validation loss again; auto: another one than the run's; none: leave it out",
        "auto",
        choices=("auto", "reference", "cpu", "cuda", "none"),
    )
    device: str | None = device_option(
        "device for --replay: auto, cpu, cuda or cuda:N (default: the run's)", None
    )
    dataset: str | None = option(
        "folder of the token shards, when they are no longer where the run read them",
        metavar="FOLDER",
        path=True,
    )
    init: str | None = option(
        "checkpoint that the run began from, when it is no longer where the run read it",
        metavar="MODEL",
        path=True,
    )
    signers: str | None = option(
        "file of allowed signers, NAME KEY-TYPE KEY a line, one of which must have signed the run",
        metavar="FILE",
        path=True,
    )
    sign: str | None = option(
        "sign the run with this SSH key when every check has passed (ssh-keygen -Y sign)",
        metavar="KEY",
        path=True,
    )
    json: bool = json_option()


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code: 9 when a check fails. Errors are raised."""
    f = parse(Flags, args, "apr verify", __doc__ or "")
    show = Show(quiet=f.json)
    seed = secrets.randbelow(1 << 32) if f.seed is None else f.seed
    options = Options(f.replay, f.within, seed, f.backend, f.device, f.dataset, f.init, f.signers)
    with show.console.status("") as status:
        record = Record(Path(f.run_dir), options, lambda text: status.update(cell(text)))
        # A GPU's products may search for algorithms, and would keep them.
        with throwaway_cache("cublaslt"), locked(Path(f.run_dir), "training in it"):
            findings = list(verify(record))
            verdict = verdict_of(findings)
            missing = [x for x in findings if x.where == UNMADE]
            signed = None
            if f.sign and verdict == PASS and not missing:
                signed = sign(Path(f.run_dir), Path(f.sign), record.evidence)
    without = f"without {', '.join(x.name for x in missing)}: {missing[0].figure}" if missing else ""
    if f.json:
        keys = {"check": "name", "verdict": "verdict", "measured": "measured", "bound": "bound", "why": "why"}
        checks = as_json(findings, **keys)
        out = {
            "run_dir": f.run_dir,
            "verdict": verdict,
            "unmade": [x.name for x in missing],
            "checks": checks,
        }
        print(json.dumps(out, indent=2))
    else:
        v = record.verdict
        show.note(
            f"apr verify {f.run_dir}: {v['status']} after {plural(v['steps'], 'step')}, verdict {v['verdict']}"
        )
        print_findings(show.console, findings)
        if signed:
            show.note(f"signed: {signed}")
        show.note(", ".join(filter(None, (verdict, without))))
    if f.sign and verdict == PASS and missing:
        raise Refused(f"{f.run_dir}: not signed, for it was checked {without}")
    return exit_code(verdict)
