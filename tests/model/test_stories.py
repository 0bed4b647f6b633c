"""A real trained model: stories260K must give its reference logits, loss and text on every backend."""

from __future__ import annotations

import json

import numpy as np
import pytest

from apr import backends
from apr.bisect.planted.faults import FAULTS
from apr.checkpoints.registry import open_host
from apr.inference.generate import generate
from apr.model.taps import Record
from apr.model.transformer import Model
from cases import overlay
from precision import relative, relative_tolerance, rounded, tensor_cores

CASES = [
    ("reference", "float64"),
    ("reference", "float32"),
    ("cpu", "float32"),
    pytest.param("cuda", "float32", marks=pytest.mark.gpu),
]


@pytest.fixture(scope="module")
def stories(data):
    folder = data("stories260K")
    want = json.loads((folder / "ref.json").read_text())
    return str(folder / "hf"), want, np.load(folder / "ref_logits_f64_as_f32.npy")


def logits_and_loss(stories, backend, dtype, patch=lambda cfg: cfg):
    source = open_host(stories[0], dtype)
    be = backends.get(backend) if isinstance(backend, str) else backend
    ids = np.array([stories[1]["ids"]], np.int32)
    model = Model(
        patch(source.cfg), be, *ids.shape, dtype, train=False, loss_rows=ids.size, w=source.on(be, dtype)
    )
    tap = Record(be)
    model.forward(ids)
    targets = np.append(ids[:, 1:], [[-100]], 1).astype(np.int32)
    model.loss(targets, tap=tap)
    return tap.seen["logits"], float(be.to_host(model.total)[0]) / (ids.size - 1)


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_logits_and_loss(stories, backend, dtype):
    logits, loss = logits_and_loss(stories, backend, dtype)
    want, exact = stories[2], logits_and_loss(stories, "reference", "float64")[0]
    plain = np.abs(logits_and_loss(stories, "reference", "float32")[0] - exact).max()
    tolerance = (
        2 * plain + 2 * np.finfo(np.float32).eps * np.abs(want).max()
    )  # the file is rounded to float32
    assert np.abs(logits - want).max() <= tolerance
    assert abs(loss - stories[1]["nll_mean"]) <= 2e-6
    assert f"{loss:.6f}" == "0.473418" or dtype == "float32"


def test_a_wrong_eps_is_seen(stories):
    import dataclasses

    logits, loss = logits_and_loss(
        stories, "reference", "float64", lambda cfg: dataclasses.replace(cfg, rms_norm_eps=2e-5)
    )
    assert not abs(loss - stories[1]["nll_mean"]) <= 2e-6
    assert not np.abs(logits - stories[2]).max() <= 1e-4


def off_in_bfloat16(stories, backend):
    """What is off in bfloat16, judged by plain NumPy that stores it; the loss, a mean of 200, by 0.4 % as well."""
    exact, loss = stories[2], stories[1]["nll_mean"]
    base, got = (logits_and_loss(stories, be, "bfloat16") for be in (rounded(), backend))
    bounds = [relative_tolerance(b, 2.0**-7, 2) for b in relative(base[0], exact)]
    off = [
        f"logits {i}"
        for i, (g, b) in enumerate(zip(relative(got[0], exact), bounds, strict=True))
        if not g <= b
    ]
    return off + ["loss"] * (not abs(got[1] - loss) <= 2 * abs(base[1] - loss) + 2.0**-8 * loss)


@pytest.mark.parametrize("backend", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bfloat16(stories, backend):
    assert off_in_bfloat16(stories, backend) == []


def test_faults_are_seen_in_bfloat16(stories):
    assert off_in_bfloat16(stories, rounded(tensor_cores())) == []
    for fault in ("rope_pairs_neighbours", "heads_interleaved", "mask_shows_the_next_token"):
        be = rounded()
        assert off_in_bfloat16(stories, overlay(be, **FAULTS[fault].ops(be))) != [], fault


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_greedy_text_is_the_reference_text(stories, backend, dtype):
    source = open_host(stories[0], dtype)
    be = backends.get(backend)
    bos = stories[1]["ids"][:1]
    new = list(generate(source.cfg, be, source.on(be, dtype), bos, 200, temperature=0, dtype=dtype))
    assert bos + new == stories[1]["ids"]
    assert source.tokenizer.decode(new, skip_special=True).lstrip() == stories[1]["text"].lstrip()
