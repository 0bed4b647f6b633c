"""Every gate of a run is shown the fault it is for, and must say so; a sound run passes them all."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from apr import backends
from apr.backends.host_copies import HostCopies
from apr.checkpoints import state as states
from apr.checkpoints.apr2 import read_apr, write_apr
from apr.checkpoints.hf import write_hf
from apr.cli.main import main
from apr.common.errors import Aborted, Refused, UsageError
from apr.common.events import GradientsReady
from apr.common.finding import FAIL, PASS, SKIPPED, SUSPECT, Finding
from apr.data import open as opening
from apr.data.batches import Batches
from apr.evidence import end as ending
from apr.evidence import losses, measure, observers
from apr.evidence.follow import Follow
from apr.evidence.gates import BOUNDS, GATES, Gates, parse_bounds
from apr.evidence.seal import EVIDENCE, seal
from apr.model.optim import AdamW, OptimSettings
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.model.schedule import Schedule
from apr.model.transformer import Model
from apr.training import evaluate, inputs, loop, sample, split
from apr.training import run as running
from apr.training.loop import Trainer
from run_cases import (  # noqa: F401  cache and place are fixtures
    RECIPE,
    VOCAB,
    an_unused_weight_becomes_nan,
    cache,
    is_of_the_run,
    place,
    pretrain,
    the_learning_rate_is_ignored,
)

cpu = backends.get("cpu")


@pytest.fixture(scope="module")
def sound(place, tmp_path_factory):
    """An undisturbed run."""
    with pytest.MonkeyPatch.context() as m:
        m.setenv("APR_CACHE", str(place / "cache"))
        path = tmp_path_factory.mktemp("sound") / "run"
        assert pretrain(place, path) == 0
    return path


def verdict(run):
    return json.loads((run / "verdict.json").read_text())


def row(run, gate):
    return next(g for g in verdict(run)["gates"] if g["id"] == gate)


LONGER = ["--num-steps", 24, "--eval-every", 12]  # epochs whose spread is known


# Faults: each gets pytest's monkeypatch, the place and a folder, and gives more arguments of the command line.


def device_computes_wrongly(m, place, folder):
    right = cpu.linear_fwd

    def wrong(y, x, w, b):
        right(y, x, w, b)
        y *= 1.01

    m.setattr(cpu, "linear_fwd", wrong)


def plan_exceeds_memory(m, place, folder):
    m.setattr(cpu, "free_memory", lambda: 1 << 30)
    m.setattr(split, "memory", lambda *a, **k: type("M", (), {"total": 2 << 30})())
    m.setattr(inputs, "choose_micro_batch", lambda *_: 2)


def a_guard_failed_unnoticed(m, place, folder):
    right = opening.enforce_all

    def blind(sides):
        right(sides)
        sides[0].findings[0] = dataclasses.replace(sides[0].findings[0], verdict=FAIL)

    m.setattr(opening, "enforce_all", blind)


def validation_windows_overlap(m, place, folder):
    from apr.data.batches import Windows

    assert (
        main(["tokenize", "train", str(place / "corpus"), "--vocab-size", "300", "-o", str(folder / "tok")])
        == 0
    )
    args = ["--tokenizer", str(folder / "tok"), "--val-fraction", "0", "-o", str(folder / "shards")]
    assert main(["tokenize", "encode-corpus", str(place / "corpus"), *args]) == 0

    def split(self, held_out):
        _, held = right(self, held_out)
        return self, held

    right = Windows.split
    m.setattr(Windows, "split", split)
    return ["--dataset", folder / "shards", "--corpus"]


def a_key_is_not_written(m, place, folder):
    right = measure.to_hf
    m.setattr(measure, "to_hf", lambda cfg: {k: v for k, v in right(cfg).items() if k != "hidden_size"})


def initial_matrices_too_wide(m, place, folder):
    right = Layout.init

    def wide(self, flat, seed, std=0.02):
        right(self, flat, seed, 1.1 * std)

    m.setattr(Layout, "init", wide)


def weights_are_rounded_on_resume(m, place, folder):
    right = AdamW.set_weights
    m.setattr(
        AdamW, "set_weights", lambda self, host: right(self, host.astype(np.float16).astype(np.float32))
    )


def initial_logits_too_large(m, place, folder):
    right = cpu.add_rmsnorm_fwd

    def loud(res, y, *a):
        right(res, y, *a)
        y *= 20

    m.setattr(cpu, "add_rmsnorm_fwd", loud)


def checkpoint_is_noise(m, place, folder):
    from apr.tokenizer.tokenizer import Tokenizer

    cfg = dataclasses.replace(PRESETS["qwen2-tiny"], vocab_size=VOCAB)
    layout = Layout(cfg)
    host = np.zeros(layout.size, np.float32)
    layout.randomise(host, 1)
    trained = next((place / "cache" / "corpora").glob("*/tokenizer"))
    tokenizer = Tokenizer.from_file(trained)
    write_hf(folder / "hf", cfg, layout.named(host), tokenizer_json=tokenizer.json)
    return ["--init", folder / "hf", "--tokenizer", trained]


def recorded_loss_is_another(m, place, folder):
    file = read_apr(place / "sound.apr")
    recorded = {
        **file.metadata["evaluation"],
        "val_loss": file.metadata["evaluation"]["val_loss"] * (1 + 2e-6),
    }
    write_apr(folder / "other.apr", {**file.metadata, "evaluation": recorded}, dict(file.tensors))
    return ["--init", folder / "other.apr"]


def biases_are_dropped(m, place, folder):
    right = cpu.linear_fwd
    m.setattr(cpu, "linear_fwd", lambda y, x, w, b: right(y, x, w, None))


def attention_sees_the_future(m, place, folder):
    right = cpu.attention_fwd

    def leaky(y, lse, q, k, v, first, window):
        right(y, lse, q, k, v, first, window)
        y[:, 0, 0, 0] += 1e-6 * v[:, -1, 0, 0]

    m.setattr(cpu, "attention_fwd", leaky)


def gradients_are_not_clipped(m, place, folder):
    right = cpu.clip_factor
    m.setattr(
        cpu,
        "clip_factor",
        lambda factor, sum_sq, most: factor.fill(1) if most == 0.1 else right(factor, sum_sq, most),
    )
    return ["--grad-clip", 0.1]


def nothing_is_trained(m, place, folder):
    """The optimizer does nothing any more after the second step, as when it holds other arrays than the model."""
    right = AdamW.step

    def step(self, lr, clear=True):
        if self.steps < 2:
            right(self, lr, clear)
        else:
            self.steps += 1
            self.be.fill(self.sum_sq, 1)
            self.be.fill(self.g, 0)

    m.setattr(AdamW, "step", step)


def gradients_are_not_cleared(m, place, folder):
    """In the steps themselves: before them, start.slope would see it."""
    right, micro_step = Trainer._compute_gradients, Model.micro_step

    def compute(self, *a):
        with pytest.MonkeyPatch.context() as here:
            here.setattr(Model, "micro_step", lambda self, *b, begins, draws: micro_step(self, *b))
            return right(self, *a)

    m.setattr(Trainer, "_compute_gradients", compute)


def a_copy_to_the_device_loses_data(m, place, folder):
    right = AdamW.set_weights

    def set_weights(self, host):
        lossy = host.copy()
        lossy[np.flatnonzero(lossy)[-1]] = 0
        right(self, lossy)

    m.setattr(AdamW, "set_weights", set_weights)
    return ["--init", place / "sound.apr"]


def a_bias_has_no_gradient(m, place, folder):
    right = Trainer.emit

    def emit(self, event):
        # In the steps themselves: before them, start.slope would see it.
        if isinstance(event, GradientsReady):
            self.model.layout.views(self.model.g).layer[0].bk[...] = 0
        right(self, event)

    m.setattr(Trainer, "emit", emit)


def the_norm_is_of_one_tensor(m, place, folder):
    right = AdamW.grad_norm
    m.setattr(AdamW, "grad_norm", lambda self, *a: (0.5 if is_of_the_run(self) else 1) * right(self, *a))


def the_weight_norm_lacks_a_tensor(m, place, folder):
    right = AdamW.weight_norm
    m.setattr(AdamW, "weight_norm", lambda self, *a: 0.999 * right(self, *a))


def a_later_step_is_not_clipped(m, place, folder):
    """In a step that no longer is one of the first, nor a tenth."""
    m.setattr(observers, "FOLLOWED_STEPS", 1)
    right, calls = cpu.clip_factor, iter(range(1000))
    m.setattr(
        cpu, "clip_factor", lambda factor, *a: factor.fill(1) if next(calls) == 3 else right(factor, *a)
    )
    return ["--grad-clip", 0.1]


def half_of_the_sequences_are_skipped(m, place, folder):
    right = loop.micro_batches
    m.setattr(loop, "micro_batches", lambda *a: list(right(*a))[::2])


def all_sequences_are_skipped(m, place, folder):
    m.setattr(loop, "micro_batches", lambda *a: [])


def the_loss_is_a_constant(m, place, folder):
    right = Trainer._measure
    m.setattr(
        Trainer,
        "_measure",
        lambda self, *a: {**(line := right(self, *a)), **({"train_loss": 6.0} if line["step"] > 1 else {})},
    )
    return ["--num-steps", 12, "--eval-every", 12]


def bits_have_another_base(m, place, folder):
    right = loop.bits_per_byte
    m.setattr(loop, "bits_per_byte", lambda *a: right(*a) * math.log(2) / math.log(10))


def the_speed_counts_other_tokens(m, place, folder):
    right = Trainer._measure

    def measure(self, *a):
        line = right(self, *a)
        return {**line, "tokens_per_sec": 2 * line["tokens_per_sec"]}

    m.setattr(Trainer, "_measure", measure)


def the_loss_explodes(m, place, folder):
    right = evaluate.evaluate
    m.setattr(
        loop,
        "evaluate",
        lambda model, *a: _changed(right(model, *a), 1.2) if model.tokens_trained else right(model, *a),
    )


def _changed(loss, factor):
    return loss._replace(mean=loss.mean * factor)


def passes_are_not_counted(m, place, folder):
    m.setattr(Batches, "passes", property(lambda self: 7))


def a_batch_is_left_out(m, place, folder):
    right = Batches._draw
    m.setattr(Batches, "_draw", lambda self, read: right(self, read + self.batch_size * (read > 0)))


def a_sample_is_of_another_prompt(m, place, folder):
    right = sample.generate
    m.setattr(
        sample,
        "generate",
        lambda cfg, be, w, ids, n, temperature, *a: right(cfg, be, w, ids[:1], n, 2.0, *a),
    )
    return ["--sample", "def f(x):"]


def validation_is_known(m, place, folder):
    right = evaluate.evaluate

    def known(model, *a):
        return _changed(right(model, *a), 0.88) if model.tokens_trained else right(model, *a)

    m.setattr(loop, "evaluate", known)
    return LONGER


def nobody_reaches_this(m, place, folder):
    right = evaluate.evaluate

    def tiny(model, *a):
        return right(model, *a)._replace(mean=0.0008) if model.tokens_trained else right(model, *a)

    m.setattr(loop, "evaluate", tiny)


def work_is_left_out(m, place, folder):
    m.setattr(ending, "matmul_rate", lambda be, dtype: 1e3)
    m.setattr(ending.os, "getloadavg", lambda: (0.0, 0.0, 0.0))


def the_checkpoint_is_damaged(m, place, folder):
    right = running.judge_end

    def judge_end(subject, *args):
        path = sorted(subject.run.glob("ckpt/epoch-*.apr"))[-1]
        file = read_apr(path)
        name = "model.norm.weight"
        write_apr(path, file.metadata, {**dict(file.tensors), name: 1.001 * np.asarray(file.tensors[name])})
        right(subject, *args)

    m.setattr(running, "judge_end", judge_end)


def a_weight_that_no_loss_sees_is_saved_otherwise(m, place, folder):
    right = running.judge_end

    def judge_end(subject, *args):
        path = sorted(subject.run.glob("ckpt/epoch-*.apr"))[-1]
        file = read_apr(path)
        tensors = {k: np.array(v) for k, v in file.tensors.items()}
        tensors["model.embed_tokens.weight"][-1, -1] += 1e-6
        write_apr(path, file.metadata, tensors)
        right(subject, *args)

    m.setattr(running, "judge_end", judge_end)


def moments_are_rounded_in_the_state(m, place, folder):
    def rounded(path, meta, tensors, *others):
        moments = {
            k: x.astype(np.float16).astype(np.float32)
            for k, x in tensors.items()
            if k.startswith("optimizer.")
        }
        write_apr(path, meta, {**tensors, **moments}, *others)

    m.setattr(states, "write_apr", rounded)


def the_copy_to_be_written_is_another(m, place, folder):
    right = HostCopies.__call__

    def copy(self, name, x):
        host = right(self, name, x)
        if name == "optimizer.v.":
            host[:8] = 0
        return host

    m.setattr(HostCopies, "__call__", copy)


def a_state_holds_a_moment_twice(m, place, folder):
    right = states.TrainingState.buffers
    m.setattr(
        states.TrainingState,
        "buffers",
        lambda self: {**right(self), "optimizer.v.": self.optimizer.state["m"]},
    )


def the_target_is_out_of_reach(m, place, folder):
    return ["--target-val-loss", 0.1]


FAULTS = {
    device_computes_wrongly: ("before.device", FAIL, 5),
    plan_exceeds_memory: ("before.memory", FAIL, 5),
    a_guard_failed_unnoticed: ("before.data", FAIL, 5),
    validation_windows_overlap: ("before.disjoint", FAIL, 5),
    a_key_is_not_written: ("before.architecture", FAIL, 5),
    initial_matrices_too_wide: ("before.weights", FAIL, 5),
    initial_logits_too_large: ("start.loss", FAIL, 6),
    checkpoint_is_noise: ("start.pretrained", FAIL, 6),
    recorded_loss_is_another: ("start.reproduces", FAIL, 6),
    biases_are_dropped: ("start.ops", FAIL, 6),
    attention_sees_the_future: ("start.causal", FAIL, 6),
    an_unused_weight_becomes_nan: ("run.finite", FAIL, 6),
    the_learning_rate_is_ignored: ("run.learning-rate", FAIL, 6),
    gradients_are_not_clipped: ("run.learning-rate", FAIL, 6),
    nothing_is_trained: ("run.learning-rate", FAIL, 6),
    gradients_are_not_cleared: ("run.gradients", FAIL, 6),
    a_copy_to_the_device_loses_data: ("before.weights", FAIL, 5),
    a_bias_has_no_gradient: ("run.gradients", FAIL, 6),
    the_norm_is_of_one_tensor: ("run.gradients", FAIL, 6),
    the_weight_norm_lacks_a_tensor: ("run.gradients", FAIL, 6),
    a_later_step_is_not_clipped: ("run.learning-rate", FAIL, 6),
    half_of_the_sequences_are_skipped: ("run.tokens", FAIL, 6),
    all_sequences_are_skipped: ("run.tokens", FAIL, 6),
    the_loss_is_a_constant: ("run.placeholder", FAIL, 6),
    bits_have_another_base: ("run.log", FAIL, 6),
    the_speed_counts_other_tokens: ("run.log", FAIL, 6),
    a_sample_is_of_another_prompt: ("run.log", FAIL, 6),
    the_loss_explodes: ("run.diverged", FAIL, 6),
    passes_are_not_counted: ("run.data", FAIL, 6),
    a_batch_is_left_out: ("run.data", FAIL, 6),
    validation_is_known: ("run.val-below-train", SUSPECT, 9),
    nobody_reaches_this: ("end.plausible", SUSPECT, 9),
    work_is_left_out: ("end.speed", SUSPECT, 9),
    the_checkpoint_is_damaged: ("end.reload", FAIL, 9),
    a_weight_that_no_loss_sees_is_saved_otherwise: ("end.reload", FAIL, 9),
    moments_are_rounded_in_the_state: ("end.reload", FAIL, 9),
    the_copy_to_be_written_is_another: ("end.reload", FAIL, 9),
    a_state_holds_a_moment_twice: ("end.reload", FAIL, 9),
    the_target_is_out_of_reach: ("end.target", FAIL, 9),
}
ELSEWHERE = {
    "before.settings",
    "start.validation",
    "start.slope",
    "start.dropout",
    "start.borders",
    "start.formulas",
    "start.averages",
    "start.preferences",
    "run.margin",
    "run.mixture",
    # tests/data/test_instruct.py
    "before.tokens",
    "before.resumed",
    "before.ranks",
    "start.ranks",
    "run.ranks-equal",
    "run.cross-check",
    "run.straggler",
    "end.learning",
    "end.base",
}  # faults that need another run, below, in test_start_gates.py, test_first_step.py, test_preference_runs.py, test_mixture.py,
# test_lora.py and test_ranks.py


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_planted_fault_is_named(place, sound, tmp_path, monkeypatch, capsys, fault):
    gate, word, code = FAULTS[fault]
    shutil.copy(sorted((sound / "ckpt").glob("*.apr"))[-1], place / "sound.apr")
    more = fault(monkeypatch, place, tmp_path) or []
    capsys.readouterr()
    run = tmp_path / "run"
    if "--corpus" in more:  # the fault brings its own data
        args = [a for a in more if a != "--corpus"] + ["--model", place / "config.json"]
        assert main(["pretrain", *RECIPE, "--run-dir", str(run), *map(str, args)]) == code
    else:
        assert pretrain(place, run, *more, model="--init" not in more) == code
    found = row(run, gate)
    assert found["verdict"] == word, found
    assert found["look_at"] == GATES[gate].look_at
    if "--sample" in more:  # the text that the fault is about
        assert json.loads((run / "samples.jsonl").read_text())["text"].startswith("def f(x):")
    out, err = capsys.readouterr()
    said = err if code != 9 else out
    assert gate in said
    assert verdict(run)["verdict"] == (
        FAIL if word == FAIL or row(run, "end.reload")["verdict"] == FAIL else SUSPECT
    )
    assert verdict(run)["status"] == {5: "REFUSED", 6: "ABORTED", 9: "DONE"}[code]
    if code != 9:
        assert "Traceback" not in err
        assert err.rstrip().endswith(verdict(run)["status"])
        assert gate in verdict(run)["message"]


def test_every_gate_has_a_fault():
    assert {gate for gate, _, _ in FAULTS.values()} | ELSEWHERE == set(GATES)


def test_a_sound_run_passes_them_all(sound):
    v = verdict(sound)
    assert (v["status"], v["verdict"], v["steps"], v["message"]) == ("DONE", PASS, 6, "")
    assert [g["id"] for g in v["gates"]] == list(GATES)
    skipped = {g["id"]: g["why"] for g in v["gates"] if g["verdict"] == SKIPPED}
    assert set(skipped) == {
        "before.resumed",
        "before.tokens",
        "before.ranks",
        "start.pretrained",
        "start.reproduces",
        "start.preferences",
        "run.margin",
        "run.mixture",
        "start.dropout",
        "start.borders",
        "start.ranks",
        "run.ranks-equal",
        "run.cross-check",
        "run.straggler",
        "end.base",
        "end.target",
    }
    assert all(skipped.values())
    passed = [g for g in v["gates"] if g["verdict"] == PASS]
    assert all(g["measured"] and g["bound"] and g["evaluations"] for g in passed)
    assert row(sound, "run.finite")["evaluations"] == 6 + 3  # steps and evaluations
    assert row(sound, "run.learning-rate")["evaluations"] == 6


def test_weights_that_change_while_a_run_is_resumed(place, tmp_path, monkeypatch, capsys):
    assert pretrain(place, tmp_path / "run") == 0
    # As a kill while it ended leaves it: a run that lies as it was sealed is left alone.
    (tmp_path / "run" / EVIDENCE).unlink()
    weights_are_rounded_on_resume(monkeypatch, place, tmp_path)
    assert main(["pretrain", "--resume", "--run-dir", str(tmp_path / "run")]) == 5
    assert "gate before.resumed" in capsys.readouterr().err
    assert row(tmp_path / "run", "before.resumed")["verdict"] == FAIL


def the_optimizer_counts_anew(m):
    right = states.TrainingState.load

    def load(self, path):
        progress = right(self, path)
        self.optimizer.steps = 0
        return progress

    m.setattr(states.TrainingState, "load", load)


def the_schedule_begins_anew(m):
    right = Schedule.__call__

    def before(self, step):
        is_asked_alone = inspect.currentframe().f_back.f_code.co_name in ("what_is_next", "train_step")
        return right(self, max(1, step - 4) if is_asked_alone else step)

    m.setattr(Schedule, "__call__", before)


def a_batch_is_left_out(m):
    right = Batches.restore

    def restore(self, state):
        right(self, state)
        self._read += self.batch_size

    m.setattr(Batches, "restore", restore)


def a_pass_has_another_order(m):
    right = Batches.restore

    def restore(self, state):
        right(self, state)
        self.seed += 1

    m.setattr(Batches, "restore", restore)


def found_otherwise(m, key, value):
    right = states.TrainingState.load

    def load(self, path):
        progress, sha = right(self, path)
        progress[key] = value
        return progress, sha

    m.setattr(states.TrainingState, "load", load)


def the_best_loss_is_forgotten(m):
    found_otherwise(m, "best_val", math.inf)


def the_tokens_are_counted_anew(m):
    found_otherwise(m, "tokens_seen", 0)


RESUMED = {
    the_best_loss_is_forgotten: "best_val_loss is None",
    the_tokens_are_counted_anew: "tokens_seen is 0",
    the_optimizer_counts_anew: "optimizer_steps is 0",
    the_schedule_begins_anew: "next_lr is",
    a_batch_is_left_out: "next_batch_sha256 is",
    a_pass_has_another_order: "next_batch_sha256 is",
}


def stopped_at(place, run, m, step, *more):
    """A run that was asked to stop after a step."""
    right = Trainer.train_step

    def stopping(self):
        line = right(self)
        self.stop.is_asked = line["step"] == step
        return line

    m.setattr(Trainer, "train_step", stopping)
    assert pretrain(place, run, *more) == 130


@pytest.mark.parametrize("fault", RESUMED, ids=lambda f: f.__name__)
def test_what_comes_next_is_what_the_stopped_process_would_have_done(
    place, tmp_path, monkeypatch, capsys, fault
):
    with monkeypatch.context() as m:
        stopped_at(place, tmp_path / "run", m, 4)
    fault(monkeypatch)
    assert main(["pretrain", "--resume", "--run-dir", str(tmp_path / "run")]) == 5
    found = row(tmp_path / "run", "before.resumed")
    assert found["verdict"] == FAIL
    assert RESUMED[fault] in found["why"]
    assert "gate before.resumed" in capsys.readouterr().err


def test_lines_behind_the_state_are_witnesses(place, tmp_path, monkeypatch, capsys):
    """The log goes on to step 5 when the last state is that of step 3, as a crash leaves it."""
    run = tmp_path / "run"
    with monkeypatch.context() as m:
        stopped_at(place, run, m, 5)
    (run / "ckpt" / "state" / "step-000005.apr").unlink()
    shutil.copytree(run, tmp_path / "other")
    assert main(["pretrain", "--resume", "--run-dir", str(run)]) == 0
    assert "2 steps taken again as before" in row(run, "before.resumed")["measured"]
    path = tmp_path / "other" / "metrics.jsonl"
    lines = [json.loads(x) for x in path.read_text().splitlines()]
    for line in lines:
        if line["step"] == 5 and "train_loss" in line:
            line["train_loss"] *= 1 + 1e-9
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert main(["pretrain", "--resume", "--run-dir", str(tmp_path / "other")]) == 5
    assert "before the run was stopped, this step had" in capsys.readouterr().err


def test_a_resumed_run_must_reproduce_its_loss(place, tmp_path, monkeypatch, capsys):
    assert pretrain(place, tmp_path / "run") == 0
    # As a kill while it ended leaves it: a run that lies as it was sealed is left alone.
    (tmp_path / "run" / EVIDENCE).unlink()
    right = evaluate.evaluate
    monkeypatch.setattr(loop, "evaluate", lambda *a: _changed(right(*a), 1 + 2e-6))
    assert main(["pretrain", "--resume", "--run-dir", str(tmp_path / "run")]) == 6
    assert "gate start.reproduces" in capsys.readouterr().err


def test_a_resumed_run_keeps_what_its_gates_said(place, tmp_path, monkeypatch):
    """The suspicion of the first half is not forgotten by the second."""
    step = Trainer.train_step

    def stopping(self):
        line = step(self)
        self.stop.is_asked = line["step"] == 25
        return line

    with monkeypatch.context() as m:
        m.setattr(Trainer, "train_step", stopping)
        more = [*validation_is_known(m, place, tmp_path), "--num-steps", 36]
        assert pretrain(place, tmp_path / "run", *more) == 130
    assert main(["pretrain", "--resume", "--run-dir", str(tmp_path / "run")]) == 9
    assert row(tmp_path / "run", "run.val-below-train")["verdict"] == SUSPECT
    assert row(tmp_path / "run", "run.val-below-train")["step"] == 24
    assert row(tmp_path / "run", "before.resumed")["verdict"] == PASS


def shards_of(place, folder, change):
    """Shards of the corpus by a tokenizer of their own, and a noise checkpoint that embeds its text as `change` spells it."""
    tok = folder / "tok"
    assert main(["tokenize", "train", str(place / "corpus"), "--vocab-size", str(VOCAB), "-o", str(tok)]) == 0
    args = ["--tokenizer", str(tok), "--val-fraction", "0.3", "-o", str(folder / "shards")]
    assert main(["tokenize", "encode-corpus", str(place / "corpus"), *args]) == 0
    cfg = dataclasses.replace(PRESETS["qwen2-tiny"], vocab_size=VOCAB)
    layout = Layout(cfg)
    host = np.zeros(layout.size, np.float32)
    layout.init(host, 1)
    fields = json.loads((tok / "tokenizer.json").read_text())
    write_hf(folder / "hf", cfg, layout.named(host), tokenizer_json=change(fields))
    return ["--dataset", folder / "shards", "--init", folder / "hf", "--bounds", "pretrained_share=100"]


@pytest.mark.parametrize("indent", [None, 3])
def test_a_tokenizer_in_another_spelling_is_the_same(place, tmp_path, monkeypatch, indent):
    """Also where the checkpoint must leave its white space out, as that of a large vocabulary."""
    from apr.checkpoints import apr2_metadata

    monkeypatch.setattr(apr2_metadata, "MAX_METADATA", 4096 if indent else 1 << 24)
    args = shards_of(place, tmp_path, lambda d: json.dumps(d, indent=indent, ensure_ascii=False))
    run = tmp_path / "run"
    assert main(["pretrain", *RECIPE, "--run-dir", str(run), *map(str, args)]) == 0
    assert row(run, "end.reload")["verdict"] == PASS
    with monkeypatch.context() as m:  # the run of an older version: hashes of bytes
        m.undo()
        old = hashlib.sha256((tmp_path / "tok" / "tokenizer.json").read_bytes()).hexdigest()
        for path in tmp_path.glob("shards/*/manifest.json"):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_sha256": old}))
        config = json.loads((run / "config.json").read_text())
        config["data"]["tokenizer_sha256"] = old
        (run / "config.json").write_text(json.dumps(config, indent=2))
    assert main(["report", str(run)]) == 0
    seal(run)
    assert main(["verify", str(run), "--replay", "2"]) == 0


def test_another_tokenizer_is_refused(place, tmp_path, capsys):
    def other(d):
        d["model"]["merges"].pop()
        return json.dumps(d)

    args = [*shards_of(place, tmp_path, other), "--tokenizer", tmp_path / "hf"]
    assert main(["pretrain", *RECIPE, "--run-dir", str(tmp_path / "run"), *map(str, args)]) == 5
    assert "give the tokenizer that made the shards" in capsys.readouterr().err


def test_a_fine_tune_on_a_new_domain_is_warned_and_goes_on(place, tmp_path, data, capsys):
    """stories260K on Python code: above the loss of a guess, and yet it reads."""
    args = ["--init", data("stories260K") / "hf", "--seq-length", 64]
    assert pretrain(place, tmp_path / "run", *args, model=False) == 0
    found = row(tmp_path / "run", "start.pretrained")
    assert (found["verdict"], "in order" in found["measured"]) == (PASS, True), found
    assert "a kind that the checkpoint does not know" in found["why"]
    assert "start.pretrained: " in capsys.readouterr().out


def test_a_loss_that_falls_faster_than_tokens_teach():
    assert losses.learning(5.0, 6.6, 10_000, 0.3).passed is False
    assert losses.learning(5.446, 6.63, 179_200, 0.3).passed  # the demo job after its first epoch
    assert losses.learning(3.848, 6.63, 1_792_000, 0.3).passed  # and after its last
    assert losses.learning(0.5, 6.63, 1_792_000, 0.3).passed is False
    assert losses.learning(0.5, 6.63, 10**9, 0.3).passed  # then only what nobody reaches is in doubt


def test_speed_is_not_judged_beside_other_processes(place, tmp_path, monkeypatch):
    work_is_left_out(monkeypatch, place, tmp_path)
    monkeypatch.setattr(ending.os, "getloadavg", lambda: (99.0, 0.0, 0.0))
    assert pretrain(place, tmp_path / "run") == 0
    assert row(tmp_path / "run", "end.speed")["verdict"] == SKIPPED
    assert "load of 99.0" in row(tmp_path / "run", "end.speed")["why"]


def test_bounds_that_are_changed_are_shown(place, tmp_path, monkeypatch, capsys):
    more = validation_is_known(monkeypatch, place, tmp_path)
    right = ending.in_fresh_process
    monkeypatch.setattr(ending, "in_fresh_process", lambda *a: (0.88 * right(*a)[0], ""))
    assert pretrain(place, tmp_path / "run", *more, "--bounds", "val_below_train=0.3") == 0
    assert (
        row(tmp_path / "run", "run.val-below-train")["changed"] == "val_below_train changed from 0.05 to 0.3"
    )
    assert verdict(tmp_path / "run")["bounds_changed"] == {"val_below_train": 0.3}
    assert "changed from 0.05 to 0.3" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["speed", "speed=x", "speed=-1", "speed=inf", "nothing=1"])
def test_bounds_that_make_no_sense(text):
    with pytest.raises(UsageError, match="NAME=NUMBER"):
        parse_bounds(text)


def test_bounds_are_those_of_the_table():
    assert parse_bounds("speed=2, val_below_train=0.1") == {"speed": 2, "val_below_train": 0.1}
    assert Gates({}).bound("speed") == BOUNDS["speed"]
    assert len(BOUNDS) == sum(len(g.numbers) for g in GATES.values())  # no name twice


# The mechanism


def test_the_worst_answer_stays():
    gates = Gates({})
    gates.judge(Finding.of("run.val-below-train", True, "a", "", score=2), 1)
    gates.judge(Finding.of("run.val-below-train", True, "b", "", score=1), 2)
    assert gates.findings["run.val-below-train"].measured == "a"
    gates.judge(Finding.of("run.val-below-train", False, "c", ""), 3)
    gates.judge(Finding.of("run.val-below-train", True, "d", "", score=9), 4)
    kept = gates.findings["run.val-below-train"]
    assert (kept.measured, kept.verdict, kept.where) == ("c", SUSPECT, 3)
    assert gates.evaluations["run.val-below-train"] == 4
    assert gates.verdict == SUSPECT


def test_what_could_not_be_asked_is_never_passed():
    gates = Gates({})
    gates.close("planted")
    assert {o.verdict for o in gates.in_order()} == {SKIPPED}
    assert all(g["why"] == "planted" and g["evaluations"] == 0 for g in gates.to_json())
    gates.judge(Finding.of("run.tokens", True, "now", ""))
    assert gates.findings["run.tokens"].verdict == PASS


def test_bad_answers_end_the_run_as_the_table_says():
    with pytest.raises(Refused, match=r"before\.device"):
        Gates({}).judge(Finding.of("before.device", False, "x", "y"))
    with pytest.raises(Aborted, match="step 7: x, must be y"):
        Gates({}).judge(Finding.of("run.finite", False, "x", "y"), 7)
    Gates({}).judge(Finding("start.pretrained", SUSPECT, "x", "y"))
    Gates({}).judge(Finding.of("end.reload", False, "x", "y"))


@pytest.mark.parametrize(
    ("loss", "good"), [(5.9915, True), (6.06, True), (6.4, False), (5.8, False), (math.nan, False)]
)
def test_a_random_guess_has_a_band(loss, good):
    cfg = dataclasses.replace(PRESETS["llama-tiny"], vocab_size=VOCAB, tie_word_embeddings=False)
    assert measure.initial_loss(cfg, loss, 0.02, 1.0, 390, 0.0, 0.05).passed is good


def test_the_band_of_one_target_is_that_of_one(place, tmp_path, monkeypatch):
    """Not that of all the tokens which it was taken from: one of 12 such runs was ended."""
    right, spreads = measure.initial_loss, []

    def asked(cfg, loss, std, rstd, spread, *more):
        spreads.append(spread)
        return right(cfg, loss, std, rstd, spread, *more)

    monkeypatch.setattr(measure, "initial_loss", asked)
    small = ["--batch-size", 1, "--seq-length", 1, "--val-batches", 1, "--num-steps", 1, "--eval-every", 1]
    assert pretrain(place, tmp_path / "run", *small) == 0
    assert spreads == [pytest.approx(1)]


@pytest.mark.parametrize(
    "name", ["llama-tiny", "qwen2-tiny", "qwen3-tiny", "mistral-tiny", "llama-demo", "qwen2-3m"]
)
@pytest.mark.parametrize("std", [0.02, 0.05])
def test_the_band_holds_for_real_random_models(name, std):
    cfg, rng = PRESETS[name], np.random.default_rng(0)
    model = Model(cfg, cpu, 2, 64, train=False)
    model.layout.init(model.w, 3, std)
    ids = rng.integers(0, cfg.vocab_size, (2, 65)).astype(np.int32)
    model.forward(ids[:, :-1])
    model.loss(ids[:, 1:])
    rstd = float(model.buffers["rstd"][:128].mean())
    answer = measure.initial_loss(cfg, float(model.total[0]) / 128, std, rstd, 100, 0.01, 0.05)
    assert answer.passed, answer


def test_pretrained_means_far_below_token_frequencies():
    def judged(loss, gain=0.0):
        return losses.pretrained_loss(
            loss, 5.1, 0.75, 512, lambda: (np.full(8, loss), np.full(8, loss + gain))
        )

    assert judged(1.5).passed
    assert not judged(1.5).why
    assert judged(4.5).passed  # a new domain: with a warning, and without a look at their order
    assert judged(4.5).why
    assert judged(6.68, 1.0).passed  # stories260K on Python code
    assert judged(6.68, 1.0).why
    assert judged(6.3, 0.05).verdict == FAIL
    assert judged(23.0, 0.1).verdict == FAIL
    assert judged(math.nan).verdict == FAIL


@pytest.mark.parametrize("steps", [3, 5, 10, 20, 50])
@pytest.mark.parametrize("shape", ["falls", "begins to fall", "flattens", "flat"])
def test_a_loss_that_falls_is_not_taken_for_the_same_moment(steps, shape):
    """Validation text as easy as that of training, after epochs of few steps."""
    x, rng = np.arange(steps + 1) / steps, np.random.default_rng(0)
    curves = {
        "falls": 6 - 2 * x,
        "begins to fall": 6 - 2 * x**3,
        "flattens": 4 + 2 * np.exp(-4 * x),
        "flat": 5 + 0 * x,
    }
    for _ in range(200):
        values = curves[shape] + 0.03 * rng.standard_normal(steps + 1)
        last = values[:-1][-20:]
        assert losses.below_train(values[-1], 0.02, last, values[:-1], 0.05).passed
    if steps >= 20:  # and what is known from training is still seen
        assert not losses.below_train(0.7 * values[-1], 0.02, last, values[:-1], 0.05).passed


def test_losses_of_few_steps_have_a_spread_that_is_unknown():
    """One hard batch since the last evaluation says nothing; a validation far below all steps is seen all the same."""
    assert losses.below_train(0.169, 0.01, [0.245], [0.245], 0.05).passed is None
    before = [0.20, 0.14, 0.19, 0.16, 0.18]
    assert losses.below_train(0.169, 0.01, [0.245], [0.245], 0.05, [*before, 0.245]).passed
    assert losses.below_train(0.03, 0.001, [0.18], [0.18], 0.05, [0.17, 0.19, 0.18, 0.18]).passed is False


@pytest.mark.parametrize("fault", ["decay of vectors", "stale copy", "one element"])
def test_the_followed_elements_see(fault):
    cfg = PRESETS["qwen2-tiny"]
    model = Model(cfg, cpu, 1, 8)
    model.layout.randomise(model.w, 1)
    opt = AdamW.of(model)
    follow = Follow(opt, OptimSettings(), model.layout)
    model.g[...] = np.random.default_rng(0).standard_normal(model.g.size, np.float32)
    follow.before()
    opt.step(1e-3)
    assert follow.after(1e-3, opt.grad_norm(), 1e-3, 1).passed
    old = model.w.copy()
    if fault == "decay of vectors":
        model.w[model.layout.decayed :] *= 1 - 1e-3 * opt.weight_decay
    elif fault == "one element":
        model.w[follow.parts[0].step * 3] += 1e-5
    else:
        opt.master = model.w.copy()
        model.w[...] = old + 1e-3
    assert follow.after(1e-3, opt.grad_norm(), 1e-3, 1).passed is False


@pytest.mark.parametrize("lr", [3e-5, 1e-6, 4e-8, 2e-8, 3e-9, 1e-12])
def test_moves_near_the_last_place_of_weights_are_followed(lr):
    """All weights of a size lose the same part of such a move; another learning rate is still seen where any of it is left."""
    for share in (1.0, 1.5):
        model = Model(PRESETS["qwen2-tiny"], cpu, 1, 8)
        model.layout.randomise(model.w, 1)
        opt = AdamW.of(model)
        follow = Follow(opt, OptimSettings(), model.layout)
        model.g[...] = np.random.default_rng(0).standard_normal(model.g.size, np.float32)
        follow.before()
        opt.step(share * lr)
        found = follow.after(lr, opt.grad_norm(), 1e-3, 1)
        assert found.passed is (share == 1), found


# The page about them

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gates.md"


def test_the_page_has_every_gate_as_the_table_has_it():
    text = PAGE.read_text()
    for g in GATES.values():
        assert f"| `{g.id}` | {g.protects} | {g.bound_from}" in text
        assert all(f"`{name}` = {value:g}" in text for name, value in g.numbers.items())


def test_the_tests_that_the_page_names_exist():
    named = re.findall(r"`tests/([\w/]+\.py)::(\w+)`", PAGE.read_text())
    assert len(named) > 30
    for file, name in named:
        source = (PAGE.parents[1] / "tests" / file).read_text()
        assert re.search(rf"^(def {name}\(|{name} = )", source, re.MULTILINE), f"{file}::{name}"
        if file == "evidence/test_gates.py" and not name.startswith("test_"):
            assert globals()[name] in FAULTS, name
