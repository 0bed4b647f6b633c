"""Settings of a run: each is declared by one room, and read."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
from pathlib import Path

import apr
from apr.evidence.resumed import DECIDING
from apr.model.optim import OPTIMIZERS
from apr.training.demo_job import DEMO
from apr.training.resume import DECIDE_BITS
from apr.training.run import continued
from apr.training.rundir import of_run
from apr.training.settings import RunSettings, Settings

APR = Path(apr.__file__).parent
# Variables and attributes that hold the settings of a run.
HOLDERS = {"s", "settings"}


def read_settings(source: str) -> set[str]:
    """Collect the attributes of settings that a module reads, and the keys that it takes out of a dict of settings."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            holder = node.value
            name = holder.id if isinstance(holder, ast.Name) else getattr(holder, "attr", "")
            if name in HOLDERS:
                found.add(node.attr)
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            found.add(str(node.slice.value))
    return found


def test_every_setting_is_read():
    read = set().union(*(read_settings(p.read_text()) for p in APR.rglob("*.py")))
    # An optimizer reads the settings that its keyword-only fields name.
    read |= {f.name for kind in OPTIMIZERS.values() for f in dataclasses.fields(kind) if f.kw_only}
    assert {f.name for f in dataclasses.fields(Settings)} <= read


def test_a_dead_setting_is_seen():
    assert read_settings(
        "def f(s):\n    s.alive = 1\n    return s.lr, i.settings.seed, d['config'], x.dead"
    ) == {
        "lr",
        "seed",
        "config",
    }


def test_a_setting_is_declared_once_by_the_room_that_reads_it():
    declared = [name for base in Settings.__bases__ for name in inspect.get_annotations(base)]
    assert len(declared) == len(set(declared)) == len(dataclasses.fields(Settings))
    rooms = [base.__module__.split(".")[1] for base in Settings.__bases__]
    assert set(rooms) == {"data", "model", "training"}


def test_a_resumed_run_keeps_what_decides_its_numbers():
    may_change = {f.name for f in dataclasses.fields(Settings) if f.metadata["may_change"]}
    assert may_change == {
        "device", "run_dir", "resume", "save_every", "keep_states", "ladder_mib", "json", "config", "threads", "graph",
        "spot_check", "bounds", "log", "keep_checkpoints", "background_saves", "other_kernels",
        "eval_tasks", "eval_tasks_every", "eval_tasks_limit",
        "ranks", "gpus", "rank_timeout", "cross_check",
    }  # fmt: skip
    assert not may_change & set(DEMO)
    assert {f.name for f in dataclasses.fields(RunSettings)} - may_change == {"mode"}


def test_a_run_from_before_bos_goes_on_without_it(tmp_path):
    """Its shards have nothing before a document; another default would make others of the same corpus."""
    settings = dataclasses.asdict(Settings(corpus="c", model="llama-demo", run_dir=str(tmp_path)))
    for said, want in ((None, "none"), ("auto", "auto"), ("none", "none")):
        settings.pop("bos", None)
        settings |= {"bos": said} if said else {}
        (tmp_path / "config.json").write_text(json.dumps({"settings": settings}))
        going_on = continued(Settings(run_dir=str(tmp_path), resume=True), {})
        assert (going_on.bos, going_on.corpus, going_on.resume) == (want, "c", True)


def test_what_decides_bits_is_one_list():
    """What a resumed run notes of another device is compared where its steps are computed again."""
    assert set(DECIDE_BITS) <= set(DECIDING)


def test_settings_of_an_older_run_are_completed_by_what_it_did() -> None:
    assert of_run({"lora_init": "adapter"})["lora_dropout"] == 0.0
    assert of_run({"lora_init": "adapter", "lora_dropout": None})["lora_dropout"] is None
    assert "lora_dropout" not in of_run({"lora_init": None})
    assert of_run({"bos": "auto"})["bos"] == "auto"
    assert of_run({})["bos"] == "none"
