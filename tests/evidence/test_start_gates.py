"""Gates of a run before its first step: each planted fault turns exactly one of them red; sound runs pass them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from apr import backends
from apr.common.finding import FAIL
from apr.data import batches
from apr.evidence import asked, initial
from apr.evidence.follow import Follow
from apr.model import optim
from apr.model import schedule as schedule_module
from apr.model.optim import AdamW
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.model.schedule import SCHEDULES, Schedule
from apr.model.transformer import Model
from apr.training import loop
from apr.training import run as running
from run_cases import cache, is_of_the_run, place, pretrain  # noqa: F401

cpu = backends.get("cpu")


def red(run):
    """{gate: why or measured} of the gates that failed."""
    gates = json.loads((run / "verdict.json").read_text())["gates"]
    return {g["id"]: g["why"] or g["measured"] for g in gates if g["verdict"] == FAIL}


# Faults of what is built: each gets pytest's monkeypatch and gives more arguments of the command line.


def a_rate_is_lost(m):
    right = loop.hyper_parameters
    m.setattr(loop, "hyper_parameters", lambda *a: {k: v for k, v in right(*a).items() if k != "beta2"})
    return ["--beta2", 0.9]


def rates_change_places(m):
    right = loop.hyper_parameters

    def swapped(*a):
        found = right(*a)
        return {**found, "beta1": found["beta2"], "beta2": found["beta1"]}

    m.setattr(loop, "hyper_parameters", swapped)


def vectors_decay(m):
    right = AdamW.__init__

    def init(self, be, w, g, decayed, *a, **k):
        right(self, be, w, g, w.size, *a, **k)

    m.setattr(AdamW, "__init__", init)


def the_optimizer_has_other_arrays(m):
    right = AdamW.__init__

    def init(self, be, w, g, decayed, *a, **k):
        right(self, be, w.copy(), g, decayed, *a, **k)

    m.setattr(AdamW, "__init__", init)


def warm_up_is_a_step_longer(m):
    m.setattr(loop, "Schedule", lambda kind, lr, low, warm, steps: Schedule(kind, lr, low, warm + 1, steps))


def the_cosine_ends_in_the_middle(m):
    m.setattr(Schedule, "__call__", lambda self, step: self.lr * min(1.0, step / max(1, self.warmup_steps)))


def wsd_decays_over_a_tenth(m):
    m.setattr(schedule_module, "WSD_DECAY_SHARE", 0.1)
    return ["--schedule", "wsd", "--num-steps", 20]


def the_order_has_another_seed(m):
    right = loop.Batches
    m.setattr(loop, "Batches", lambda w, size, seed, *a: right(w, size, seed + 1, *a))


def windows_are_not_shuffled(m):
    right = loop.Batches
    m.setattr(loop, "Batches", lambda w, size, seed, shuffle, *a: right(w, size, seed, False, *a))


def the_last_windows_are_left_out(m):
    from apr.data import open as opening

    right = opening.windows_of

    def fewer(*a):
        train, val = right(*a)
        train.count -= 3
        return train, val

    m.setattr(opening, "windows_of", fewer)


def built(m, **changes):
    right = loop.Model
    m.setattr(loop, "Model", lambda *a, **k: right(*a, **{**k, **changes}))


def the_z_loss_is_dropped(m):
    built(m, z_loss=0.0)
    return ["--z-loss", 0.01]


def recompute_is_ignored(m):
    built(m, recompute=False)
    return ["--recompute"]


def documents_are_not_masked(m):
    built(m, document_end=None)
    return ["--mask-documents"]


def documents_are_masked_unasked(m):
    built(m, document_end=0)


def a_flag_is_lost_on_its_way(m):
    right = running.resolve
    m.setattr(running, "resolve", lambda *a: dataclasses.replace(right(*a), grad_clip=1.0))
    return ["--grad-clip", 0.5]


def windows_come_twice_and_never(m):
    right = batches.Permutation.__call__
    m.setattr(batches.Permutation, "__call__", lambda self, x: right(self, x // 2 * 2))


def every_pass_has_the_order_of_the_first(m):
    right = batches.Permutation.__init__
    m.setattr(batches.Permutation, "__init__", lambda self, n, seed, number: right(self, n, seed, 0))


def targets_are_two_ahead(m):
    right = batches.Windows.read

    def read(self, indices):
        ids, targets = right(self, indices)
        return ids, np.roll(targets, -1, axis=1)

    m.setattr(batches.Windows, "read", read)


def the_number_of_validation_batches_is_lost(m):
    right = running.evaluated_on
    m.setattr(running, "evaluated_on", lambda i: {**right(i), "val_windows": None})


BUILT = [
    a_rate_is_lost, rates_change_places, vectors_decay, the_optimizer_has_other_arrays, warm_up_is_a_step_longer,
    the_cosine_ends_in_the_middle, wsd_decays_over_a_tenth, the_order_has_another_seed, windows_are_not_shuffled,
    the_last_windows_are_left_out, the_z_loss_is_dropped, recompute_is_ignored, documents_are_not_masked,
    documents_are_masked_unasked,
    a_flag_is_lost_on_its_way, the_number_of_validation_batches_is_lost, windows_come_twice_and_never,
    every_pass_has_the_order_of_the_first, targets_are_two_ahead,
]  # fmt: skip


@pytest.mark.parametrize("fault", BUILT, ids=lambda f: f.__name__)
def test_a_number_that_does_not_arrive_is_named(place, tmp_path, monkeypatch, capsys, fault):
    more = fault(monkeypatch) or []
    assert pretrain(place, tmp_path / "run", *more) == 5
    assert set(red(tmp_path / "run")) == {"before.settings"}, red(tmp_path / "run")
    assert "gate before.settings" in capsys.readouterr().err


# Faults of the optimizer's steps, judged by the settings' numbers


def the_steps_are_counted_from_two(m):
    right = AdamW.reset

    def reset(self):
        right(self)
        self.steps = 1

    m.setattr(AdamW, "reset", reset)


def a_rate_drifts(m):
    right = AdamW.update

    def update(self, *a):
        self.beta2 = 0.9 if is_of_the_run(self) else self.beta2
        right(self, *a)

    m.setattr(AdamW, "update", update)


def clipping_is_twice_as_wide(m):
    right = AdamW.step

    def step(self, lr, **options):
        self.grad_clip = 0.2 if is_of_the_run(self) else self.grad_clip
        right(self, lr, **options)

    m.setattr(AdamW, "step", step)
    return ["--grad-clip", 0.1]


def norms_decay(m):
    right = AdamW.update

    def update(self, part, lr, decay):
        right(self, part, lr, self.weight_decay if is_of_the_run(self) else decay)

    m.setattr(AdamW, "update", update)


def the_rate_of_the_step_before(m):
    right = Schedule.__call__
    m.setattr(loop.Schedule, "__call__", lambda self, step: right(self, max(1, step - (step > 4))))


STEPPED = [the_steps_are_counted_from_two, a_rate_drifts, clipping_is_twice_as_wide, norms_decay]


@pytest.mark.parametrize("fault", STEPPED, ids=lambda f: f.__name__)
def test_steps_are_judged_by_the_numbers_of_the_settings(place, tmp_path, monkeypatch, capsys, fault):
    more = fault(monkeypatch) or []
    assert pretrain(place, tmp_path / "run", *more) == 6
    assert set(red(tmp_path / "run")) == {"run.learning-rate"}, red(tmp_path / "run")
    assert "gate run.learning-rate" in capsys.readouterr().err


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(("warm", "steps"), [(0, 1), (0, 7), (3, 7), (7, 7), (9, 7), (100, 1000)])
@pytest.mark.parametrize("low", [0.0, 1e-5, 3e-3])
def test_the_second_formula_of_the_schedule_is_the_same(kind, warm, steps, low):
    s = type("S", (), dict(schedule=kind, lr=3e-3, lr_min=low, warmup_steps=warm, num_steps=steps))
    schedule = Schedule(kind, 3e-3, low, warm, steps)
    assert all(asked.is_learning_rate(schedule(step), s, step) for step in range(1, steps + 1))
    assert not asked.is_learning_rate(1.001 * schedule(steps) + 1e-7, s, steps)


# Initial weights


def seeds_are_ignored(layout, flat, seed, std):
    layout.init(flat, 0, std)


def layers_are_equal(layout, flat, seed, std):
    layout.init(flat, seed, std)
    views = layout.views(flat)
    views.layer[1].wgate[...] = views.layer[0].wgate


def rows_are_repeated(layout, flat, seed, std):
    layout.init(flat, seed, std)
    layout.views(flat).embed[17] = layout.views(flat).embed[5]


def one_stream_for_all(layout, flat, seed, std):
    layout.init(flat, seed, std)
    views = layout.views(flat)
    views.layer[1].wo[...] = -views.layer[0].wo


def a_gap_is_filled(layout, flat, seed, std):
    layout.init(flat, seed, std)
    last = max(layout.slots, key=lambda s: s.offset)
    flat[last.offset + last.size :] = 1


INITIAL = [layers_are_equal, rows_are_repeated, one_stream_for_all, a_gap_is_filled]


def judged(fault, preset="qwen2-tiny"):
    model = Model(PRESETS[preset], cpu, 1, 8)
    opt = AdamW.of(model)
    fault(model.layout, opt.master, 3, 0.02)
    return initial.random_weights(model, opt, 0.02, 3)


@pytest.mark.parametrize("fault", INITIAL, ids=lambda f: f.__name__)
def test_weights_that_are_not_random_are_seen_without_their_seed(monkeypatch, fault):
    monkeypatch.setattr(initial, "_other_stream", lambda *a: "")
    assert judged(fault).passed is False


@pytest.mark.parametrize("fault", [seeds_are_ignored, *INITIAL[:3]], ids=lambda f: f.__name__)
def test_weights_of_another_seed_are_seen(fault):
    assert judged(fault).passed is False


@pytest.mark.parametrize(
    "preset", ["llama-tiny", "qwen2-tiny", "qwen3-tiny", "olmo2-tiny", "smollm3-tiny", "llama-demo"]
)
def test_random_weights_pass(preset):
    assert judged(Layout.init, preset).passed


def test_a_seed_that_does_not_arrive_ends_the_run(place, tmp_path, monkeypatch, capsys):
    right = Layout.init
    monkeypatch.setattr(
        Layout, "init", lambda self, flat, seed, std=0.02: right(self, flat, 42 + (seed > 50), std)
    )
    assert pretrain(place, tmp_path / "sound") == 0
    assert pretrain(place, tmp_path / "run", "--seed", 51) == 5
    assert set(red(tmp_path / "run")) == {"before.weights"}


# Followed elements


def test_vectors_of_a_large_model_are_followed_too():
    model = Model(PRESETS["llama-demo"], cpu, 1, 8)
    follow = Follow(AdamW.of(model), optim.OptimSettings(), model.layout)
    cut = model.layout.decayed
    places = np.concatenate([np.arange(model.w.size)[p] for p in follow.parts])
    assert (places >= cut).sum() > 500
