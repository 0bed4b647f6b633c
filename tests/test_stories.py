"""A real trained model: stories260K must give its reference logits, loss and text on both backends."""

from __future__ import annotations

import json

import numpy as np
import pytest

from apr import backends
from apr.generate import generate
from apr.loading import open_source, put
from apr.model import Model
from apr.taps import Record

CASES = [("reference", "float64"), ("reference", "float32"), ("cpu", "float32")]


@pytest.fixture(scope="module")
def stories(data):
    folder = data("stories260K")
    want = json.loads((folder / "ref.json").read_text())
    return str(folder / "hf"), want, np.load(folder / "ref_logits_f64_as_f32.npy")


def logits_and_loss(stories, backend, dtype, patch=lambda cfg: cfg):
    source = open_source(stories[0], dtype)
    be = backends.get(backend)
    ids = np.array([stories[1]["ids"]], np.int32)
    model = Model(
        patch(source.cfg), be, *ids.shape, dtype, train=False, loss_rows=ids.size, w=put(be, source, dtype)
    )
    tap = Record(be)
    model.forward(ids)
    targets = np.append(ids[:, 1:], [[-100]], 1).astype(np.int32)
    model.loss(targets, tap=tap)
    return tap.seen["logits"], float(model.total[0]) / (ids.size - 1)


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


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_greedy_text_is_the_reference_text(stories, backend, dtype):
    source = open_source(stories[0], dtype)
    be = backends.get(backend)
    bos = stories[1]["ids"][:1]
    new = list(generate(source.cfg, be, put(be, source, dtype), bos, 200, temperature=0, dtype=dtype))
    assert bos + new == stories[1]["ids"]
    assert source.tokenizer.decode(new, skip_special=True).lstrip() == stories[1]["text"].lstrip()
