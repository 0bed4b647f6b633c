"""Measurements of the gates: each function measures one part of a run and returns the Finding of one gate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from ..checkpoints.checkpoint import Checkpoint, parameters
from ..checkpoints.tensors import CHUNK
from ..common.errors import AprError
from ..common.finding import Finding
from ..common.units import plural
from ..model.config import ModelConfig
from ..model.hf_config import from_hf, to_hf
from ..model.optim import Optimizer, Trained
from ..model.transformer import Model
from ..ranks.shard import Shard

EPS32 = float(np.finfo(np.float32).eps)
# Put into gradients before a step, and the least norm of those that still hold some of it; sums of squares may be float32.
SPOILED, LEFT = 2.0**56, 2.0**50


def log_sum_exp(logits: np.ndarray) -> np.ndarray:
    """log(sum(exp(logits))) of each row, in the dtype of logits (N,V)."""
    top = logits.max(axis=1)
    out: np.ndarray = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
    return out


def device(backend: ModuleType, dtype: str) -> Finding:
    """Measure the error of a small matrix product on the device against NumPy in float64, relative to |x| |w|^T."""
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((32, 64), (48, 64)))
    arrays = [backend.empty(shape, dtype) for shape in ((32, 48), (32, 64), (48, 64))]
    for array, host in zip(arrays[1:], (x, w), strict=True):
        backend.from_host(array, host)
    backend.linear_fwd(*arrays, None)
    y, xd, wd = (np.asarray(backend.to_host(a), np.float64) for a in arrays)
    eps = 2.0**-8 if dtype == "bfloat16" else EPS32
    error = float(np.abs(y - xd @ wd.T).max() / (np.abs(xd) @ np.abs(wd).T).max())
    what = backend.describe()
    name = f"{backend.name}: {what.get('gpu') or what['cpu']}"
    return Finding.of(
        "before.device",
        error <= 4 * eps,
        f"{name}, product off by {error:.1e}",
        f"at most {4 * eps:.1e}",
        score=error,
    )


def memory(need: int, have: int | None) -> Finding:
    """Compare the bytes of all planned buffers with those that are free; have: None where the backend cannot tell."""
    gib = f"{need / 2**30:.2f} GiB planned"
    if have is None:
        return Finding.of(
            "before.memory", None, gib, "what is free", "the backend cannot tell how much memory is free"
        )
    return Finding.of("before.memory", need <= have, gib, f"at most the {have / 2**30:.2f} GiB that are free")


def architecture(cfg: ModelConfig, source: str) -> Finding:
    """Compare a configuration with its config.json as the strict reader reads it."""
    written = to_hf(cfg)
    try:
        same = from_hf(written, source) == cfg
    except AprError as e:
        return Finding.of("before.architecture", False, str(e), "the same configuration")
    return Finding.of(
        "before.architecture", same, f"{plural(len(written), 'key')} of {source}", "the same configuration"
    )


def loaded_weights(model: Model, opt: Optimizer, init: Checkpoint) -> Finding:
    """Compare the weights on the device with those of a checkpoint, bit for bit."""
    be, count = model.be, 0
    tensors = parameters(model.layout, init)
    for s in model.layout.slots:
        stored = tensors[s.hf].reshape(-1)
        for start in range(0, s.size, CHUNK):
            part = stored[start : start + CHUNK]
            place = slice(s.offset + start, s.offset + start + part.size)
            wide = part.astype(np.float32)
            back = be.to_host(opt.master[place])
            there = be.to_host(model.w[place])
            exact = part.dtype.itemsize > 4 or np.array_equal(bits(wide.astype(part.dtype)), bits(part))
            equal = np.array_equal(bits(back), bits(wide))
            if not (exact and equal and np.array_equal(bits(there), bits(wide.astype(there.dtype)))):
                at = int(np.argmax(bits(back) != bits(wide))) if not equal else 0
                measured = (
                    f"{s.hf}: element {start + at} is {part[at]} in the file and {back[at]} on the device"
                )
                return Finding.of("before.weights", False, measured, "equal bits")
            count += part.size
    return Finding.of(
        "before.weights",
        True,
        f"{plural(len(tensors), 'tensor')}, {plural(count, 'value')} read back from the device",
        "equal bits",
    )


def bits(x: np.ndarray) -> np.ndarray:
    """View an array as unsigned integers of its width."""
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


def initial_loss(
    cfg: ModelConfig, loss: float, std: float, rstd: float, spread: float, repeated: float, margin: float
) -> Finding:
    """Compare the loss of random weights with that of a uniform guess.

    The final norm gives the hidden state h the length sqrt(C), so logits h . w have the variance s^2 = C std^2 and
    E[logsumexp] = ln V + s^2 / 2. With a tied head the logit of the input token itself is C std^2 rstd: this term may
    raise the sum, and it lowers the loss of targets that repeat their input token.

    rstd      1 / RMS of the residual stream, mean over positions
    spread    effective number of target ids, 1 / sum of p^2
    repeated  share of targets that equal their input token
    margin    slack in nats/token
    """
    s2 = cfg.hidden_size * std**2
    uniform = math.log(cfg.vocab_size)
    low, high = uniform, uniform + s2 / 2
    if cfg.tie_word_embeddings:
        high = float(np.logaddexp(high, s2 * rstd))
        low -= repeated * s2 * rstd
    slack = margin + 5 * math.sqrt(s2 / max(spread, 1.0))
    return Finding.of(
        "start.loss",
        low - slack <= loss <= high + slack,
        f"{loss:.4f} nats/token",
        f"{low - slack:.3f} to {high + slack:.3f}, ln V = {uniform:.4f}",
    )


def reproduced(gate: str, loss: float, recorded: float, tolerance: float) -> Finding:
    """Measure the relative difference of a validation loss from the recorded one, for start.reproduces or end.reload."""
    off = abs(loss - recorded) / max(abs(recorded), 1e-9)
    return Finding.of(
        gate,
        off <= tolerance,
        f"{loss:.6f}, recorded {recorded:.6f}: {off:.1e} of it apart",
        f"at most {tolerance:.0e}",
        score=off,
    )


def causal(model: Model, ids: np.ndarray) -> Finding:
    """Measure how final hidden states change when the tokens in the second half of sequences (B,T) change: none before the
    middle, some at every later position."""
    bound = "0 before the middle, above 0 after it"
    middle = ids.shape[1] // 2
    if not middle or model.cfg.vocab_size < 2:
        return Finding.of("start.causal", None, "", bound, "sequences of one token have no future")
    other = ids.copy()
    other[:, middle:] = (other[:, middle:] + 1) % model.cfg.vocab_size
    a, b = final_hidden(model, ids), final_hidden(model, other)
    change = np.abs(a - b)
    before, after = float(change[:, :middle].max()), float(change[:, middle:].max(axis=(1, 2)).min())
    measured = f"changes before the middle {before:.3g}, after it {after:.3g}, {ids.shape[0]} x {ids.shape[1]} tokens"
    return Finding.of("start.causal", before == 0 and after > 0, measured, bound)


def final_hidden(model: Model, ids: np.ndarray) -> np.ndarray:
    """Compute the hidden states behind the final norm, the input of the head: float32 (B,T,C)."""
    seen: dict[str, np.ndarray] = {}

    def tap(layer: int | None, name: str, x: Any) -> None:
        if name == "final_norm":
            seen[name] = model.be.to_host(x)

    model.forward(ids, tap)
    return seen["final_norm"].astype(np.float32).reshape(*ids.shape, -1)


def squares(trained: Any, flat: Any, shard: Shard | None) -> list[float]:
    """Sum the squares of each tensor on the host. flat: all elements, or a rank's part of them; then of all ranks together."""
    own = []
    for s in trained.layout.slots:
        parts = shard.inside(s.offset, s.size) if shard else [slice(s.offset, s.offset + s.size)]
        host = (trained.be.to_host(flat[p]).astype(np.float32, copy=False) for p in parts)
        own.append(sum(map(host_square, host), 0.0))
    return own if shard is None else [sum(parts) for parts in zip(*shard.ranks.share(own), strict=True)]


def gradients(trained: Any, g: Any, shard: Shard | None) -> tuple[list[str], float]:
    """Read (names of tensors with an all-zero gradient, L2 norm of all gradients summed tensor by tensor).

    g: gradients of the step, shard: the part that they are, None for all."""
    zero, total = [], 0.0
    for s, square in zip(trained.layout.slots, squares(trained, g, shard), strict=True):
        total += square
        if square == 0:
            zero.append(s.hf)
    return zero, math.sqrt(total) if total >= 0 else math.nan


def weight_norm(opt: Optimizer, trained: Any, logged: float, shard: Shard | None) -> Finding:
    """Compare the weight norm of the log with that of all tensors, squared and summed on the host in float64."""
    norm = math.sqrt(sum(squares(trained, opt.master, shard)))
    measured, bound = f"weight norm {logged:.6g}, all tensors apart {norm:.6g}", "equal within 1e-5 of it"
    return Finding.of("run.gradients", abs(norm - logged) <= 1e-5 * max(norm, logged), measured, bound)


def host_square(x: np.ndarray) -> float:
    """Sum the squares of an array in float64, part by part."""
    flat = x.reshape(-1)
    parts = (flat[i : i + CHUNK] for i in range(0, flat.size, CHUNK))
    return sum(float(np.square(part, dtype=np.float64).sum()) for part in parts)


def spoil_gradients(trained: Trained) -> None:
    """Put a huge number into all gradients: a step whose first micro-batch adds to what it finds cannot hide it."""
    for s in trained.layout.slots:
        trained.be.fill(trained.g[s.offset : s.offset + s.size], SPOILED)


def gradients_left(trained: Optimizer, scratch: Any) -> float:
    """Read the L2 norm of the gradients of a step before which they were spoiled; 0 where nothing of that is in them."""
    trained.be.fill(scratch, 0)
    trained.be.add_sum_sq(scratch, trained.g)
    square = float(trained.be.to_host(scratch)[0])
    return math.sqrt(square) if LEFT**2 <= square < math.inf else 0.0


def gradient_norm(zero: Sequence[str], apart: float, logged: float) -> Finding:
    """Compare the gradient norm of the log with the norm over tensors.

    zero: tensors without a gradient; apart: norm summed tensor by tensor; logged: norm in the log."""
    bound = "equal within 1e-5 of it, no tensor without a gradient"
    measured = f"log {logged:.6g}, all tensors apart {apart:.6g}"
    if zero:
        more = f" and {len(zero) - 3} more" if len(zero) > 3 else ""
        return Finding.of(
            "run.gradients", False, measured, bound, f"no gradient reaches {', '.join(zero[:3])}{more}"
        )
    return Finding.of("run.gradients", not abs(apart - logged) > 1e-5 * max(apart, logged), measured, bound)


def speed(flops: float, rate: float, most: float) -> Finding:
    """Compare FLOP/s of the fastest step with those of one large matrix product."""
    share = flops / rate
    return Finding.of(
        "end.speed",
        share <= most,
        f"{rate_text(flops)}, {100 * share:.0f} % of one large product",
        f"at most {most:g} times {rate_text(rate)}",
        "" if share <= most else "faster than the device can multiply: work was left out",
        score=share,
    )


def rate_text(flops: float) -> str:
    """Format FLOP/s."""
    return f"{flops / 1e12:.1f} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.1f} GFLOP/s"
