"""Gates of a run that came to its end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from ..common.events import Line
from ..common.finding import FAIL, SKIPPED, Finding
from ..common.host import cores, importing_this
from ..common.units import plural
from ..model.cost import matmul_rate, memory
from . import measure
from .adapters import base_unchanged
from .gates import Gates
from .judge import target
from .seal import Early
from .subject import Subject

RATE_TRIES = 20  # at most, of about 0.1 s on a CPU, to measure the rate of one large product
PROCESS_SECONDS = 24 * 3600


def judge_end(t: Subject, gates: Gates, evaluation: Line, best_flops: float, early: Early) -> None:
    """Judge the end of a run. evaluation: its last line of the log; best_flops: FLOP/s of the fastest step, 0 for none.

    early: begins to hash what was saved beside the process that loads it, when nothing is timed any more."""
    s, step = t.settings, evaluation["step"]
    if s.target_val_loss is None:
        gates.skip("end.target", "no --target-val-loss was given")
    else:
        gates.judge(target(evaluation, s.target_val_loss), step)
    if best_flops:
        gates.judge(_speed(t, best_flops, gates.bound("speed")))
    if t.adapters:
        gates.judge(base_unchanged(t.adapters), step)
    else:
        gates.skip("end.base", "no adapters: every weight is trained")
    early.begin("ckpt")
    with gates.timed("end.reload"):
        _reload(t, gates, evaluation)
    if s.spot_check < 0:
        gates.skip("start.ops", "--spot-check -1")
    if t.init is not None:
        gates.skip("end.learning", "the weights come from a checkpoint, which had learned before")
    gates.close("the run did not come to a place where it is asked")


def _reload(t: Subject, gates: Gates, evaluation: Line) -> None:
    """Compare the validation loss of the last checkpoint, loaded in a fresh process, with the recorded one."""
    s, be, dtype = t.settings, t.backend, t.model.dtype
    documents = t.document_end is not None
    need = memory(t.cfg, be, t.model.batch, s.seq_length, dtype, train=False, documents=documents).total
    have = be.free_memory()
    if have is not None and need > have:
        gib = f"{need / 2**30:.1f} GiB beside this one, {have / 2**30:.1f} are free"
        gates.skip("end.reload", f"another process needs {gib}; `apr verify` does it when this one is gone")
        return
    device = s.device if s.device.startswith(be.name) else be.name
    found = in_fresh_process(t.run, device, dtype, s.threads)
    if isinstance(found, str):
        why = f"the last checkpoint cannot be loaded again: {found}"
        gates.judge(Finding.of("end.reload", False, found, "the recorded loss", why), evaluation["step"])
        return
    loss, differs = found
    tolerance = gates.bound(f"reproduce_{dtype}")
    finding = measure.reproduced("end.reload", loss, evaluation["val_loss"], tolerance)
    bound = f"{finding.bound}, and the bits that were on the device"
    finding = replace(finding, bound=bound, measured=f"{finding.measured}; {differs or 'the bits as saved'}")
    if differs:
        finding = replace(finding, verdict=FAIL, why=differs)
    gates.judge(finding, evaluation["step"])


def in_fresh_process(run: Path, device: str, dtype: str, threads: int | None) -> tuple[float, str] | str:
    """Load a run's last checkpoint in another process: its validation loss and where its files are not what was on the
    device; or the reason of a failure."""
    command = [sys.executable, "-m", "apr.verify.reload", str(run), device, dtype, str(threads or 0)]
    env = importing_this(os.environ)
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PROCESS_SECONDS, check=False, env=env
    )
    try:
        loss, differs = json.loads(done.stdout)
        return float(loss), str(differs)
    except (ValueError, TypeError, LookupError):
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"the process ended with code {done.returncode} and said nothing"


def _speed(t: Subject, flops: float, most: float) -> Finding:
    """Compare the fastest step with one large product, measured again while another process may have the device."""
    be, rate, tries = t.backend, 0.0, 0
    while tries < RATE_TRIES and (not tries or flops > most * rate):
        rate, tries = max(rate, matmul_rate(be, t.model.dtype)), tries + 1
    finding, load = measure.speed(flops, rate, most), os.getloadavg()[0]
    if not finding.passed and be.name == "cpu" and load > cores():
        busy = f"a load of {load:.1f} on {plural(cores(), 'core')}"
        why = f"{busy}: the rate of a product cannot be measured beside other processes"
        return replace(finding, verdict=SKIPPED, why=why)
    return finding
