"""The model of every family, its head tied and not, on both backends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from apr import backends
from apr.config import ModelConfig
from apr.errors import Refused
from apr.model import Model
from apr.taps import Compare, Record, Tap, no_tap
from cases import overlay
from checks import (
    CONFIGS,
    EPS,
    B,
    Build,
    T,
    batch,
    difference,
    expected,
    judge,
    loss,
    off_truth,
    on,
    randomised,
    step,
    truth,
    wrong_gradients,
)
from faults import FAULTS

reference, cpu = backends.get("reference"), backends.get("cpu")
every_model = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())
untied = [(name, cfg) for name, cfg in CONFIGS.items() if not cfg.tie_word_embeddings]
every_family = pytest.mark.parametrize("cfg", [c for _, c in untied], ids=[n for n, _ in untied])
both = pytest.mark.parametrize(
    ("be", "dtype"), [(reference, "float64"), (cpu, "float32")], ids=["reference", "cpu"]
)


def forward(model: Model, ids: np.ndarray, past: int = 0) -> np.ndarray:
    """final_norm (B,T,C) of a forward pass, on the host."""
    record = Record(model.be)
    model.forward(ids, record, past)
    return record.seen["final_norm"].reshape(*ids.shape, -1)


# Against the numeric gradient and the reference


@every_model
def test_gradient_of_every_parameter_is_the_numeric_one(cfg: ModelConfig) -> None:
    assert wrong_gradients(on(reference), cfg) == []


@every_model
@pytest.mark.parametrize("force", [False, True], ids=["free", "forced"])
def test_cpu_agrees_with_float64_at_every_tap(cfg: ModelConfig, force: bool) -> None:
    assert off_truth(on(cpu), cfg, force) == []


def test_taps_show_everything() -> None:
    """The comparison above covers hidden states, every op, their gradients and the gradient of every parameter."""
    cfg = CONFIGS["qwen3"]
    block = ["norm1", "qkv", "qk", "q_rope", "k_rope", "lse", "att", "att_out", "res2", "norm2", "gu", "act"]
    back = ["d_act", "d_gu", "d_norm2", "d_res2", "d_att", "d_q_rope", "d_k_rope", "d_v", "d_qk", "d_qkv"]
    names = {f"{i}.{name}" for i in range(cfg.num_layers) for name in [*block, "mlp_out", *back, "d_norm1"]}
    hidden = [f"hidden.{i}" for i in range(cfg.num_layers + 1)]
    names |= {*hidden, *(f"d_{name}" for name in hidden), "final_norm", "d_final_norm", "logits", "d_logits"}
    names |= {"loss_rows", "loss", *(f"grad.{s.hf}" for s in Model(cfg, reference, 1, 1).layout.slots)}
    assert set(truth(cfg)) == names
    assert truth(cfg)["logits"].shape == (B * T, cfg.vocab_size)


# Pieces and sizes that must not matter


@every_model
@both
@pytest.mark.parametrize("rows", [1, 7])
def test_loss_in_pieces_gives_the_same_gradients(cfg: ModelConfig, be: Any, dtype: str, rows: int) -> None:
    def build(cfg: ModelConfig, dtype: str) -> Model:
        return on(be)(cfg, dtype, loss_rows=rows)

    assert off_truth(build, cfg, only=r"grad\.|loss$|(d_)?(hidden|final_norm)", dtype=dtype) == []
    record = Record(be)
    step(randomised(build(cfg, dtype)), *batch(cfg), record)
    pieces = [name for name in record.seen if name.startswith("logits.")]
    assert pieces == [f"logits.{first}" for first in range(0, B * T, rows)]


@every_family
@both
def test_a_batch_smaller_than_its_buffers_is_the_same_bit_for_bit(
    cfg: ModelConfig, be: Any, dtype: str
) -> None:
    large = randomised(on(be)(cfg, dtype, batch=B + 1, seq=T + 6))
    step(large, *batch(cfg, B + 1, T + 6))  # leaves its values in the buffers
    record = Record(be)
    step(randomised(on(be)(cfg, dtype)), *batch(cfg), record)
    compare = Compare(be, record.seen, force=False)
    step(large, *batch(cfg), compare)
    assert [name for name, err, _ in compare.rows if err != 0] == []
    for shape in ((B + 2, 1), (1, T + 7)):
        with pytest.raises(ValueError, match="does not fit"):
            large.forward(np.zeros(shape, np.int32))


@every_family
@both
def test_a_model_without_backward_computes_the_same(cfg: ModelConfig, be: Any, dtype: str) -> None:
    ids, targets = batch(cfg)
    full = randomised(on(be)(cfg, dtype))
    lean = on(be)(cfg, dtype, train=False, w=full.w)
    assert np.array_equal(forward(lean, ids), forward(full, ids))
    assert loss(lean, ids, targets) == loss(full, ids, targets) == step(full, ids, targets)


@every_model
@both
def test_two_steps_are_equal_bit_for_bit(cfg: ModelConfig, be: Any, dtype: str) -> None:
    model = randomised(on(be)(cfg, dtype))
    first = step(model, *batch(cfg)), be.to_host(model.g)
    second = step(model, *batch(cfg)), be.to_host(model.g)
    assert first[0] == second[0]
    assert np.array_equal(first[1], second[1])


@every_model
@both
def test_gradients_of_single_sequences_add_up_to_that_of_the_batch(
    cfg: ModelConfig, be: Any, dtype: str
) -> None:
    """Each scaled by the number of targets in the whole batch, whatever its own number is."""
    ids, targets = batch(cfg)
    model = randomised(on(be)(cfg, dtype))
    for i in range(B):
        model.forward(ids[i : i + 1])
        model.loss(targets[i : i + 1], 1 / int((targets >= 0).sum()))
        model.backward()
    compare = Compare(be, truth(cfg), force=False)
    compare(None, "loss", model.total)
    for name, gradient in model.layout.named(model.g).items():
        compare(None, f"grad.{name}", gradient)
    assert judge(compare.rows, expected(cfg, only=r"grad\.|loss$"), dtype) == []


# Time


CHUNKS = [[1] * T, [5, 1, 7], [12, 1], [T]]


def off_in_chunks(build: Build, cfg: ModelConfig, dtype: str, chunks: list[int]) -> list[str]:
    """final_norm of all positions and logits of the last, of a sequence that goes through a key/value cache."""
    model = randomised(build(cfg, dtype, train=False, cache=T + 2, seq=max(chunks)))
    parts, past = [], 0
    for n in chunks:
        parts.append(forward(model, batch(cfg)[0][:, past : past + n], past))
        past += n
    last = truth(cfg)["logits"].reshape(B, T, -1)[:, -1]
    rows = [
        difference("final_norm", np.concatenate(parts, 1), truth(cfg)["final_norm"]),
        difference("logits", model.last_logits(), last),
    ]
    return judge(rows, expected(cfg, only="final_norm|logits"), dtype)


@every_family
@both
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_cache_gives_what_the_whole_sequence_gives(
    cfg: ModelConfig, be: Any, dtype: str, chunks: list[int]
) -> None:
    """mistral-tiny sees 5 of the 13 positions."""
    assert off_in_chunks(on(be), cfg, dtype, chunks) == []


@every_family
@pytest.mark.parametrize("chunks", CHUNKS[:3], ids=str)
def test_cache_check_can_fail(cfg: ModelConfig, chunks: list[int]) -> None:
    """A cache that is one position late, one that is never written, positions that start from 0 in each chunk."""

    def late(y: Any, x: Any) -> None:
        y[:, 1:] = x[:, :-1]

    class Forgetful(Model):
        def forward(self, ids: np.ndarray, tap: Tap = no_tap, past: int = 0) -> None:
            cos, sin = self.cos, self.sin
            self.cos, self.sin = (np.roll(x, past, axis=0) for x in (cos, sin))
            super().forward(ids, tap, past)
            self.cos, self.sin = cos, sin

    def forgetful(cfg: ModelConfig, dtype: str, **options: Any) -> Model:
        return Forgetful(cfg, reference, B, dtype=dtype, **options)

    unwritten = overlay(reference, copy=lambda y, x: None)
    for build in (on(overlay(reference, copy=late)), on(unwritten), forgetful):
        assert off_in_chunks(build, cfg, "float64", chunks) != [], build


@every_family
@both
def test_the_future_does_not_change_the_past(cfg: ModelConfig, be: Any, dtype: str) -> None:
    """Bit for bit; and every position that sees another token changes. L blocks with a window of W see
    L (W - 1) positions back, and no further."""
    far = cfg.num_layers * (cfg.sliding_window - 1) if cfg.sliding_window else T
    for source in (0, 1, 6, T - 1):
        assert reached(on(be), cfg, dtype, source) == [t for t in range(T) if source <= t <= source + far]


@every_family
def test_check_of_what_is_seen_can_fail(cfg: ModelConfig) -> None:
    right = reached(on(reference), cfg, "float64", 1)
    for name in ("mask_shows_the_next_token", "window_ignored", "window_one_too_wide"):
        if FAULTS[name].applies(cfg):
            assert reached(FAULTS[name].planted(reference), cfg, "float64", 1) != right, name


def reached(build: Build, cfg: ModelConfig, dtype: str, source: int) -> list[int]:
    """Positions whose result changes with the token at `source`."""
    ids = batch(cfg)[0]
    other = ids.copy()
    other[:, source] = (other[:, source] + 1) % cfg.vocab_size
    model = randomised(build(cfg, dtype))
    return np.flatnonzero((forward(model, ids) != forward(model, other)).any(axis=(0, 2))).tolist()


# Parameters


@every_family
@both
def test_tied_head_is_one_tensor(cfg: ModelConfig, be: Any, dtype: str) -> None:
    """Its gradient is the sum of those of an untied model whose head equals its embedding."""
    tied = randomised(on(be)(replace(cfg, tie_word_embeddings=True), dtype))
    assert tied.p.head is tied.p.embed
    assert "lm_head.weight" not in tied.layout.by_hf
    free = randomised(on(be)(cfg, dtype))
    assert free.layout.num_parameters - tied.layout.num_parameters == cfg.vocab_size * cfg.hidden_size
    have, want = free.layout.named(free.w), tied.layout.named(tied.w)
    for name, w in have.items():
        be.copy(w, want.get(name, tied.p.embed))
    assert step(free, *batch(cfg)) == step(tied, *batch(cfg))
    embed, head, whole = (be.to_host(x) for x in (free.d.embed, free.d.head, tied.d.embed))
    assert embed.any()
    assert head.any()
    largest = float(np.abs(embed).max() + np.abs(head).max())
    assert (
        np.abs(embed + head - whole).max() <= B * T * EPS[dtype] * largest
    )  # the B T terms in another order


@every_family
def test_layers_are_ready_in_order_and_complete(cfg: ModelConfig) -> None:
    model = randomised(on(reference)(cfg, "float64"))
    ids, targets = batch(cfg)
    model.forward(ids)
    model.loss(targets, 1.0)
    seen: list[tuple[int | None, dict[str, np.ndarray]]] = []

    def ready(layer: int | None) -> None:
        parts = {
            s.hf: model.layout.named(model.g)[s.hf].copy() for s in model.layout.slots if s.layer == layer
        }
        seen.append((layer, parts))

    model.backward(ready=ready)
    assert [layer for layer, _ in seen] == [*reversed(range(cfg.num_layers)), None]
    final = model.layout.named(model.g)
    assert {name for _, parts in seen for name in parts} == set(final)
    for _, parts in seen:
        for name, gradient in parts.items():
            assert gradient.any(), name
            assert np.array_equal(gradient, final[name]), name


def test_positions_beyond_the_configuration_are_refused() -> None:
    cfg = CONFIGS["llama"]
    for options in (dict(seq=cfg.max_position_embeddings + 1), dict(cache=cfg.max_position_embeddings + 1)):
        with pytest.raises(Refused, match=f"max_position_embeddings = {cfg.max_position_embeddings}"):
            on(reference)(cfg, "float32", **options)


@pytest.mark.parametrize("be", [reference, cpu], ids=["reference", "cpu"])
def test_ids_outside_the_vocabulary_are_refused(be: Any) -> None:
    """A kernel would read, and in backward write, outside the embedding."""
    model = Model(CONFIGS["llama"], be, 1, 2)
    for bad in (123, -1):
        with pytest.raises(ValueError, match="vocabulary of 123"):
            model.forward(np.array([[0, bad]], np.int32))
    model.forward(np.array([[0, 122]], np.int32))
    with pytest.raises(ValueError, match="vocabulary of 123"):
        model.loss(np.array([[123, 0]], np.int32))
    model.loss(np.array([[122, -100]], np.int32))
