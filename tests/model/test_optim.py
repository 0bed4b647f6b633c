"""AdamW and clipping. That ten steps equal torch's is in test_golden.py."""

from __future__ import annotations

import numpy as np
import pytest

from apr import backends
from apr.model.config import ModelConfig
from apr.model.optim import OPTIMIZERS, AdamW, Optimizer
from apr.model.transformer import Model
from checks import CONFIGS, batch, on, randomised, step

every_model = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())
both = pytest.mark.parametrize("backend", ["reference", "cpu"])


def prepared(cfg: ModelConfig, backend: str) -> Model:
    """A model in float32 with gradients of one batch."""
    model = randomised(on(backends.get(backend))(cfg, "float32"))
    step(model, *batch(cfg))
    return model


@every_model
@both
def test_a_step_moves_every_parameter_and_clears_the_gradients(cfg: ModelConfig, backend: str) -> None:
    model = prepared(cfg, backend)
    before = model.w.copy()
    AdamW.of(model).step(1e-2)
    moved = model.layout.named(model.w != before)
    assert [name for name, where in moved.items() if not where.all()] == []
    assert int((model.w != before).sum()) == model.layout.num_parameters  # and no padding
    assert not model.g.any()


@pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=OPTIMIZERS)
@both
def test_the_formula_for_the_host_is_that_of_the_op(kind: type[Optimizer], backend: str) -> None:
    """Gates and bisect judge by `next_state` and `direction`: three steps beside them in float64, with decay and clipping."""
    be, rng, lr = backends.get(backend), np.random.default_rng(0), 0.01
    w, g = (be.empty((1025,), "float32") for _ in range(2))
    w[...] = rng.standard_normal(1025)
    opt = kind(be, w, g, 1000, grad_clip=3.0)
    state = {name: np.zeros(1025) for name in opt.state}
    exact, decay = w.astype(np.float64), np.where(np.arange(1025) < 1000, opt.weight_decay, 0.0)
    for _ in range(3):
        g[...] = rng.standard_normal(1025)
        clipped = g.astype(np.float64) * 3.0 / (np.linalg.norm(g.astype(np.float64)) + 1e-6)
        opt.step(lr)
        state = opt.next_state(state, clipped)
        exact = exact - lr * opt.direction(exact, state, decay)
        np.testing.assert_allclose(w, exact, rtol=1e-6, atol=1e-6)
        for name, want in state.items():
            np.testing.assert_allclose(opt.state[name], want, rtol=1e-5, atol=1e-8)


@every_model
@both
def test_clipping_gives_the_norm_asked_for(cfg: ModelConfig, backend: str) -> None:
    """m after the first step is (1 - beta1) times the gradient that was used."""
    for share in (0.01, 0.5, 2.0):
        model = prepared(cfg, backend)
        g = model.g.astype(np.float64)
        norm = np.linalg.norm(g)
        adamw = AdamW.of(model, grad_clip=share * norm)
        adamw.step(1e-3)
        assert np.isclose(adamw.grad_norm(), norm, rtol=1e-6)
        used = adamw.state["m"].astype(np.float64) / (1 - adamw.beta1)
        assert np.isclose(np.linalg.norm(used), min(1, share) * norm, rtol=1e-5)
        assert np.allclose(used, min(1, share) * g, rtol=1e-4, atol=1e-9)


@both
def test_no_clipping_when_it_is_off(backend: str) -> None:
    model = prepared(CONFIGS["llama"], backend)
    g = model.g.copy() * np.float32(1e6)
    model.g[...] = g
    adamw = AdamW.of(model, grad_clip=0)
    adamw.step(1e-3)
    assert np.allclose(adamw.state["m"] / np.float32(0.1), g, rtol=1e-5)


@both
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_is_not_hidden(backend: str, clip: float) -> None:
    for value in (np.nan, np.inf):
        model = prepared(CONFIGS["llama"], backend)
        model.g[5] = value
        adamw = AdamW.of(model, grad_clip=clip)
        with np.errstate(all="ignore"):
            adamw.step(1e-3)
        assert not np.isfinite(adamw.grad_norm())
        assert not np.isfinite(adamw.factor)  # no parameter escapes, and nobody clips it to 0
        assert not np.isfinite(model.w).all()


@every_model
@both
def test_matrices_decay_and_norms_and_biases_do_not(cfg: ModelConfig, backend: str) -> None:
    model = prepared(cfg, backend)
    model.g[...] = 0
    before = {name: w.copy() for name, w in model.layout.named(model.w).items()}
    AdamW.of(model, weight_decay=0.1).step(0.5)
    for name, w in model.layout.named(model.w).items():
        if w.ndim == 2:
            assert np.allclose(w, before[name] * (1 - 0.5 * 0.1), rtol=1e-6), name
        else:
            assert "norm" in name or "bias" in name
            assert np.array_equal(w, before[name]), name


@both
def test_steps_are_counted(backend: str) -> None:
    """With a constant gradient every bias-corrected step has the size of the learning rate."""
    model = prepared(CONFIGS["llama"], backend)
    adamw = AdamW.of(model, weight_decay=0.0, grad_clip=0.0, eps=0.0)
    for n in range(1, 6):
        before = model.w.copy()
        model.g[...] = 1
        adamw.step(1e-2)
        assert adamw.steps == n
        assert np.allclose(before - model.w, 1e-2, rtol=1e-3)
