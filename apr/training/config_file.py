"""Make the folder of a run and its config.json: settings, data and versions, and the devices that it was trained on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..common.files import make_folder, real
from ..common.host import threads
from ..common.options import absolute_paths
from ..common.provenance import code_sha256, git_commit, versions
from ..model.hf_config import to_hf
from ..model.params import Layout
from .demo import is_demo
from .display import Display
from .inputs import Inputs
from .resume import DECIDE_BITS
from .rundir import MICRO_BATCHES, SUMS, RunDir, next_free
from .settings import Settings


def first_config(i: Inputs, run: RunDir) -> dict[str, Any]:
    """Make the first config.json of a run."""
    s = i.settings
    return {
        "settings": {
            **absolute_paths(Settings, dataclasses.asdict(s)),
            "resume": False,
            "other_kernels": False,
            "ranks": None,
            "gpus": None,
            "run_dir": str(run.path),
            "threads": s.threads or threads(),
        },
        "model": to_hf(i.cfg),
        "num_parameters": Layout(i.cfg).num_parameters,
        "data": i.describe(),
        "data_guards": i.guards(),
        "data_folders": {side.name: str(real(side.folder)) for side in i.audit},
        "versions": versions(),
        "git_commit": git_commit(),
        "code_sha256": code_sha256(),
        SUMS: MICRO_BATCHES,
    }


def record_device(show: Display, i: Inputs, run: RunDir) -> None:
    """Record device and memory in config.json, and note where they differ from those of the resumed run."""
    facts, was = (
        {**i.backend.describe(), "memory_bytes": str(i.backend.memory())},
        run.read_config().get("device"),
    )
    if i.settings.dtype != "bfloat16":  # of another job of this process
        facts.pop("products", None)
    if i.settings.resume and isinstance(was, dict):
        for key in DECIDE_BITS:
            # Older runs recorded fewer keys.
            if key in was and was[key] != facts.get(key):
                show.note(
                    f"{key} was {was[key]} when the run began and is {facts.get(key)} now: its numbers may differ "
                    "in the last bits from here on"
                )
        facts = {**was, "went_on_with": [*was.get("went_on_with", []), facts]}
    run.record("device", facts)


def run_dir(i: Inputs) -> RunDir:
    """Make the folder of the run where it is missing, and write nothing in it: another run may be in there."""
    s = i.settings
    if s.resume:
        assert s.run_dir is not None
        return RunDir(Path(s.run_dir))
    name = "demo" if is_demo(s) else Path(str(s.model or s.init)).stem
    return RunDir(make_folder(Path(s.run_dir)) if s.run_dir else next_free(name))
