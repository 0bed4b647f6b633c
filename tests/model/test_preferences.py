"""Losses of pairs and their gradients are those of TRL; what people get wrong about them is seen."""

from __future__ import annotations

import json
import math
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import apr.model.preferences as p
from apr import backends
from apr.checkpoints.hf import read_safetensors
from apr.common.errors import Refused, UsageError
from apr.model.hf_config import from_hf
from apr.model.preferences import Preferences, PreferenceSettings, check_preferences, terms, within
from apr.model.transformer import Model

GOLDEN = Path(__file__).parents[1] / "golden"
TRL = json.loads((GOLDEN / "preferences.json").read_text())


@pytest.fixture(scope="module")
def weights():
    raw = (GOLDEN / "llama.safetensors").read_bytes()
    config = json.loads(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]["config"])
    return from_hf(config, "llama"), read_safetensors(GOLDEN / "llama.safetensors")


def packed(border, width=44, rows=((0, 1), (2,)), swap=False, prompt_counts=False):
    """The golden pairs as rows: ids and targets (2,width)."""
    ids, targets = (
        np.full((len(rows), width + 1), border, np.int32),
        np.full((len(rows), width + 1), -100, np.int32),
    )
    for x, y, row in zip(ids, targets, rows, strict=True):
        at = 0
        for prompt, chosen, rejected in (TRL["pairs"][k] for k in row):
            for answer in (rejected, chosen) if swap else (chosen, rejected):
                end = at + len(prompt) + len(answer)
                x[at:end] = prompt + answer
                first = at + 1 if prompt_counts else at + len(prompt)
                y[first:end] = x[first:end]
                at = end + 1
    return np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(targets[:, 1:])


def reference_of(preferences, ids, targets):
    """The golden log-probabilities by the keys of the answers."""
    values = [x for k in (0, 1, 2) for x in TRL["reference"][k]]
    preferences.width = ids.shape[1]
    flat = ids.reshape(-1), targets.reshape(-1)
    places = [place for pair in preferences.pairs(ids, targets) for place in pair]
    return {preferences.key(*flat, place): x for place, x in zip(places, values, strict=True)}


def step(weights, case, be="reference", loss_rows=None, micro=2, folds=False, dtype=None, **packing):
    """(mean loss, gradients by name, preferences) of the golden pairs."""
    cfg, file = weights
    be, border = backends.get(be), cfg.vocab_size - 1
    ids, targets = packed(border, **packing)
    model = Model(
        cfg,
        be,
        micro,
        ids.shape[1],
        dtype or be.dtypes[0],
        loss_rows=loss_rows,
        document_end=border,
        folds=folds,
    )
    host = np.zeros(model.layout.size, np.float64 if model.dtype == "float64" else np.float32)
    for s in model.layout.in_order():
        host[s.offset : s.offset + s.size] = np.asarray(file[f"weight.{s.hf}"]).reshape(-1)
    be.from_host(model.w, host)
    preferences = model.preferences = Preferences(
        PreferenceSettings(**TRL["losses"][case]["settings"]), border
    )
    preferences.reference = reference_of(preferences, ids, targets)
    be.fill(model.total, 0)
    pairs = terms(preferences, ids, targets)
    for n in range(0, len(ids), micro):
        model.micro_step(ids[n : n + micro], targets[n : n + micro], 1 / pairs, False, begins=n == 0)
    return float(model.total[0]) / pairs, model.layout.named(be.to_host(model.g)), preferences


def off(found, case):
    """Largest difference from TRL, of the loss and of any gradient, as shares."""
    loss, gradients, _ = found
    want = TRL["losses"][case]
    worst = abs(loss - want["loss"]) / want["loss"]
    for name, (norm, along) in want["gradients"].items():
        if name not in gradients:
            continue
        g = np.asarray(gradients[name], np.float64)
        u = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 2, g.shape) * 2.0 - 1.0
        worst = max(worst, abs(np.linalg.norm(g) - norm) / norm, abs((g * u).sum() - along) / norm)
    return worst


@pytest.mark.parametrize("case", TRL["losses"])
def test_loss_and_gradients_are_those_of_trl(weights, case):
    """Pairs packed two by two, in float64, beside TRL's padded batch; logits in pieces or at once, one row at a time or two."""
    found = step(weights, case)
    assert len(found[1]) == len(TRL["losses"][case]["gradients"])
    assert off(found, case) <= 1e-6, off(found, case)
    assert off(step(weights, case, loss_rows=7, micro=1), case) <= 1e-6
    sums = [x for pair in TRL["logps"] for x in pair]
    figures = found[2].tally.figures(len(TRL["logps"]))
    assert figures["chosen_logp"] == pytest.approx(np.mean(sums[::2]), rel=1e-6)
    gains = np.array(TRL["logps"]) - np.array(TRL["reference"])
    if case == "dpo":
        assert figures["accuracy"] == pytest.approx((gains[:, 0] > gains[:, 1]).mean())
        assert figures["margin"] == pytest.approx(0.3 * (gains[:, 0] - gains[:, 1]).mean(), rel=1e-6)


@pytest.mark.parametrize("case", ["dpo", "orpo"])
def test_the_cpu_backend_computes_the_same_in_float32(weights, case):
    assert off(step(weights, case, "cpu", loss_rows=16, micro=1, folds=True), case) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-3), ("bfloat16", 0.2)])
@pytest.mark.parametrize("case", TRL["losses"])
def test_a_gpu_computes_the_same(weights, cuda, case, dtype, most):
    """Rows of answers lie anywhere in the pieces of logits: one call of the op for each part of each answer."""
    assert off(step(weights, case, "cuda", loss_rows=7, micro=1, dtype=dtype), case) <= most


def mean_gain(answer):
    return (answer.logp - answer.reference) / answer.tokens


FAULTS = {
    "swapped": ("dpo", dict(swap=True)),
    # The prompt is the same in both answers: from the difference of sums it falls out, from that of means it does not.
    "prompt counted": ("ipo", dict(prompt_counts=True)),
    "mean in the place of the sum": ("dpo", lambda m: m.setattr(p.Answer, "gain", property(mean_gain))),
    "sum in the place of the mean": ("ipo", lambda m: m.setattr(p.Answer, "tokens", 1)),
    "reference that follows": ("dpo", lambda m: m.setattr(p.Answer, "gain", property(lambda a: 0.0))),
    "beta forgotten": ("dpo", lambda m: m.setattr(p, "Constants", lambda b, e, g: CONSTANTS(1.0, e, g))),
    "sign of label smoothing": ("dpo-smoothed", lambda m: m.setattr(p, "Constants", lambda b, e, g: CONSTANTS(b, -e, g))),
    "gamma on the other side": ("simpo", lambda m: m.setattr(p, "Constants", lambda b, e, g: CONSTANTS(b, e, -g))),
    "odds without the other side": ("orpo", lambda m: m.setattr(p, "log_odds", lambda x: (x, 1.0))),
    "one weight for both": ("dpo", lambda m: m.setattr(p, "PairLoss", lambda a, c, r, *x: PAIR_LOSS(a, c, c, *x))),
}  # fmt: skip
CONSTANTS, PAIR_LOSS = p.Constants, p.PairLoss


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_seen(weights, monkeypatch, name):
    case, fault = FAULTS[name]
    if callable(fault):
        fault(monkeypatch)
    assert off(step(weights, case, **({} if callable(fault) else fault)), case) > 1e-2


def test_slopes_are_those_of_the_losses():
    """Numeric derivatives along both sums, also where sigmoids are saturated."""
    for name, kind in p.LOSSES.items():
        k = p.Constants(0.7, 0.1 if kind.is_smoothed else 0.0, 0.3)
        for c, r in ((-12.0, -9.0), (-3.0, -600.0), (-600.0, -3.0)):
            a, b = p.Answer(c, 7, -11.0), p.Answer(r, 4, -10.0)
            at, e = kind.loss(a, b, k), 1e-4
            up, down = (kind.loss(a._replace(logp=c + x), b, k).loss for x in (e, -e))
            assert (up - down) / (2 * e) == pytest.approx(at.chosen_slope, rel=1e-5, abs=1e-9), name
            up, down = (kind.loss(a, b._replace(logp=r + x), k).loss for x in (e, -e))
            assert (up - down) / (2 * e) == pytest.approx(at.rejected_slope, rel=1e-5, abs=1e-9), name


def test_pieces_of_weights_cover_all_rows():
    weights = [(slice(0, 5), 1.0), (slice(5, 9), 2.0), (slice(9, 20), 0.0)]
    pieces = [x for a, b in pairwise([0, 3, 7, 20]) for x in within(weights, slice(a, b))]
    assert [(s.start, s.stop, w) for s, w in pieces] == [
        (0, 3, 1),
        (3, 5, 1),
        (5, 7, 2),
        (7, 9, 2),
        (9, 20, 0),
    ]


def test_what_does_not_go_together_is_refused(weights):
    for wrong in (dict(label_smoothing=0.1, preference_loss="ipo"), dict(simpo_gamma=1.0)):
        with pytest.raises(UsageError):
            check_preferences(PreferenceSettings(**wrong))
    preferences = Preferences(PreferenceSettings(), 9)
    ids, targets = np.array([[1, 2, 9, 3, 4]]), np.array([[2, -100, -100, 4, -100]])
    with pytest.raises(Refused, match="reference"):
        preferences.weigh(ids, targets, np.ones(5), 1.0)
    with pytest.raises(Refused, match="1 answers"):
        list(preferences.pairs(ids[:, :2], targets[:, :2]))
    assert preferences.at_zero == pytest.approx(math.log(2))
    assert terms(None, *packed(7)) == sum(len(c) + len(r) for _, c, r in TRL["pairs"])
