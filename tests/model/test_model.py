"""The model of every family, its head tied and not, on every backend. Larger ones on a GPU are in test_gpu_model.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from apr import backends
from apr.backends.contract import OPS
from apr.bisect.planted.fault import VALUES, Fault
from apr.bisect.planted.faults import FAULTS
from apr.common.errors import Refused
from apr.model.config import ModelConfig
from apr.model.cost import memory
from apr.model.families import layers_of
from apr.model.optim import AdamW
from apr.model.taps import Compare, Record, Tap, no_tap
from apr.model.transformer import MAX_GRAPHS, Model
from cases import overlay
from checks import (
    CONFIGS,
    B,
    Build,
    Judged,
    T,
    batch,
    difference,
    expected,
    judge,
    loss,
    off_truth,
    on,
    randomised,
    results,
    step,
    truth,
    wrong_gradients,
)
from faults import planted
from precision import differing, rounded, tensor_cores

reference, cpu = backends.get("reference"), backends.get("cpu")
every_model = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())
untied = [(name, cfg) for name, cfg in CONFIGS.items() if not cfg.tie_word_embeddings]
every_family = pytest.mark.parametrize("cfg", [c for _, c in untied], ids=[n for n, _ in untied])
every_backend = pytest.mark.parametrize(
    ("be", "dtype"),
    [
        ("reference", "float64"),
        ("cpu", "float32"),
        ("cpu", "bfloat16"),
        ("rounded", "bfloat16"),
        pytest.param("cuda", "float32", marks=pytest.mark.gpu),
        pytest.param("cuda", "bfloat16", marks=pytest.mark.gpu),
    ],
    indirect=["be"],
)
LOW = rounded()


@pytest.fixture
def be(request: pytest.FixtureRequest) -> Any:
    """The backend of a name; the test is skipped where there is no GPU for cuda."""
    if request.param == "rounded":
        return LOW
    return request.getfixturevalue("cuda") if request.param == "cuda" else backends.get(request.param)


def forward(model: Model, ids: np.ndarray, past: int = 0) -> np.ndarray:
    """final_norm (B,T,C) of a forward pass, on the host."""
    record = Record(model.be)
    model.forward(ids, record, past)
    return record.seen["final_norm"].reshape(*ids.shape, -1)


# The ops of a family

BRANCHES = {  # forward ops of the first block, of attention and of the MLP
    "llama": (
        "add_rmsnorm_fwd linear_fwd rope attention_fwd linear_fwd",
        "add_rmsnorm_fwd linear_fwd swiglu_fwd linear_fwd",
    ),
    "qwen3": (
        "add_rmsnorm_fwd linear_fwd head_rmsnorm_fwd head_rmsnorm_fwd rope attention_fwd linear_fwd",
        "add_rmsnorm_fwd linear_fwd swiglu_fwd linear_fwd",
    ),
    "olmo2": (
        "linear_fwd head_rmsnorm_fwd head_rmsnorm_fwd rope attention_fwd linear_fwd head_rmsnorm_fwd",
        "add linear_fwd swiglu_fwd linear_fwd head_rmsnorm_fwd",
    ),
}


def ops_of(cfg: ModelConfig) -> tuple[list[str], list[str]]:
    """Names of the ops of a forward and of a backward pass."""
    called: list[str] = []

    def noted(op: str) -> Callable[..., None]:
        def call(*args: Any) -> None:
            called.append(op)
            getattr(reference, op)(*args)

        return call

    model = randomised(on(overlay(reference, **{op: noted(op) for op in OPS}))(cfg, "float64"))
    ids, targets = batch(cfg)
    model.forward(ids)
    forward = called.copy()
    model.loss(targets, 1.0)
    called.clear()
    model.backward()
    return forward, called


@pytest.mark.parametrize("family", BRANCHES)
def test_a_pass_calls_the_ops_of_the_parts_and_no_other(family: str) -> None:
    """A Llama's ops, and so its bits, do not depend on what other families can do."""
    cfg = replace(CONFIGS[family], num_layers=2)
    forward, backward = ops_of(cfg)
    block = " ".join(BRANCHES[family]).split()
    second = block if block[0] == "add_rmsnorm_fwd" else ["add", *block]
    assert forward == ["embedding_fwd", *block, *second, "add_rmsnorm_fwd"]
    mirrored = [op.replace("_fwd", "_bwd") for op in reversed(second)]
    upwards = [op for op in mirrored if op != "head_rmsnorm_bwd"]
    assert [op for op in backward if op != "head_rmsnorm_bwd"] == [
        "add_rmsnorm_bwd", *upwards, *upwards, "embedding_bwd",
    ]  # fmt: skip
    assert backward.count("head_rmsnorm_bwd") == forward.count("head_rmsnorm_fwd")


def test_layers_without_rotary_embedding_turn_nothing() -> None:
    forward, backward = ops_of(CONFIGS["smollm3"])
    assert forward.count("rope") == backward.count("rope") == 2
    assert forward.count("attention_fwd") == backward.count("attention_bwd") == 3


# Against the numeric gradient and the reference


@every_model
def test_gradient_of_every_parameter_is_the_numeric_one(cfg: ModelConfig) -> None:
    assert wrong_gradients(on(reference), cfg) == []


@every_model
@pytest.mark.parametrize("force", [False, True], ids=["free", "forced"])
@pytest.mark.parametrize(
    ("be", "dtype"),
    [
        ("cpu", "float32"),
        ("cpu", "bfloat16"),
        pytest.param("cuda", "float32", marks=pytest.mark.gpu),
        pytest.param("cuda", "bfloat16", marks=pytest.mark.gpu),
    ],
    indirect=["be"],
)
def test_backend_agrees_with_float64_at_every_tap(cfg: ModelConfig, be: Any, dtype: str, force: bool) -> None:
    assert off_truth(on(be), cfg, force, dtype=dtype) == []


@every_model
@pytest.mark.parametrize("force", [False, True], ids=["free", "forced"])
def test_sound_roundings_of_bfloat16_are_not_off(cfg: ModelConfig, force: bool) -> None:
    for be in (LOW, rounded(tensor_cores())):
        assert off_truth(on(be), cfg, force, dtype="bfloat16") == []


TOO_SMALL = {  # for bfloat16, as they stand
    "rope_off_by_a_thousandth",
    "norm_eps_doubled",
    "one_position_off",
    "one_product_of_one_layer",
    "weight_gradient_a_thousandth_off",
}
PLANTED = [
    pytest.param(fault, cfg, id=f"{fault.name}-{name}")
    for fault in FAULTS.values()
    for name, cfg in untied + [("qwen2-tied", CONFIGS["qwen2-tied"])]
    if fault.applies(cfg) and fault.seen_by >= VALUES and fault.name not in TOO_SMALL
]


@pytest.mark.parametrize(("fault", "cfg"), PLANTED)
def test_faults_are_seen_in_bfloat16(fault: Fault, cfg: ModelConfig) -> None:
    for force in (False, True):
        assert off_truth(planted(fault, LOW), cfg, force, dtype="bfloat16") != []


@every_family
def test_a_doubled_eps_that_matters_is_seen_in_bfloat16(cfg: ModelConfig) -> None:
    """0.01 beside a mean square of the embeddings of 0.04."""
    if not layers_of(cfg)[0].attn_norm:
        pytest.skip("the embeddings are not normalised")
    cfg = replace(cfg, rms_norm_eps=0.01)
    assert off_truth(on(LOW), cfg, force=True, dtype="bfloat16") == []
    off = off_truth(planted(FAULTS["norm_eps_doubled"], LOW), cfg, force=True, dtype="bfloat16")
    assert "0.norm1" in off


def test_every_fault_is_planted_in_bfloat16_or_too_small() -> None:
    seen = {name for name, fault in FAULTS.items() if fault.seen_by >= VALUES}
    assert {param.values[0].name for param in PLANTED} | TOO_SMALL == seen


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
@every_backend
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
@every_backend
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
@every_backend
def test_a_model_without_backward_computes_the_same(cfg: ModelConfig, be: Any, dtype: str) -> None:
    ids, targets = batch(cfg)
    full = randomised(on(be)(cfg, dtype))
    lean = on(be)(cfg, dtype, train=False, w=full.w)
    assert np.array_equal(forward(lean, ids), forward(full, ids))
    assert loss(lean, ids, targets) == loss(full, ids, targets) == step(full, ids, targets)


@every_model
@every_backend
def test_two_steps_are_equal_bit_for_bit(cfg: ModelConfig, be: Any, dtype: str) -> None:
    model = randomised(on(be)(cfg, dtype))
    assert differing(results(model), results(model)) == []


@every_model
@every_backend
def test_computing_blocks_again_gives_the_same_bit_for_bit(cfg: ModelConfig, be: Any, dtype: str) -> None:
    kept, again = (randomised(on(be)(cfg, dtype, recompute=r)) for r in (False, True))
    assert differing(results(kept), results(again)) == []
    assert loss(again, *batch(cfg)) == loss(kept, *batch(cfg))


@every_family
def test_check_of_blocks_computed_again_can_fail(cfg: ModelConfig) -> None:
    """A block that is not computed again leaves the last block's values; one that starts from the wrong stream."""

    class Stale(Model):
        def _block(self, i: int, res: Any, delta: Any, tap: Tap, past: int = 0) -> tuple[Any, Any]:
            back = delta is None and i + 1 < self.cfg.num_layers and hasattr(self, "forward_done")
            return (res, delta) if back else super()._block(i, res, delta, tap, past)

        def backward(self, *args: Any, **options: Any) -> None:
            self.forward_done = True
            super().backward(*args, **options)
            del self.forward_done

    kept = randomised(on(reference)(cfg, "float64"))
    stale = randomised(Stale(cfg, reference, B, T, "float64", recompute=True))
    assert "grad.model.layers.0.mlp.down_proj.weight" in differing(results(kept), results(stale))


def unequal_micro_steps(build: Build, cfg: ModelConfig, dtype: str, graph: bool) -> list[int]:
    """Which of four micro-steps is not forward, loss and backward bit for bit; gradients and total add up."""
    ids, targets = batch(cfg)
    want, got = (randomised(build(cfg, dtype)) for _ in range(2))
    unequal = []
    for n, source in enumerate((ids, np.roll(ids, 1), np.roll(ids, 2), ids)):
        want.forward(source)
        want.loss(targets, 0.25)
        want.backward()
        got.micro_step(source, targets, 0.25, graph)
        if differing(sums(want), sums(got)):
            unequal.append(n)
    return unequal


def sums(model: Model) -> dict[str, np.ndarray]:
    """Gradients and total."""
    return {"g": model.be.to_host(model.g), "total": model.be.to_host(model.total)}


@every_model
@every_backend
@pytest.mark.parametrize("graph", [False, True], ids=["op by op", "recorded"])
def test_a_micro_step_is_forward_loss_and_backward(
    cfg: ModelConfig, be: Any, dtype: str, graph: bool
) -> None:
    """The first is op by op, the second recorded, the later ones replayed."""
    assert unequal_micro_steps(on(be), cfg, dtype, graph) == []


@every_model
@every_backend
def test_a_first_micro_step_overwrites_gradients_and_later_ones_add(
    cfg: ModelConfig, be: Any, dtype: str
) -> None:
    """Op by op, recorded and replayed; of every parameter, and of several pieces of logits."""
    ids, targets = batch(cfg)
    want, got = (randomised(on(be)(cfg, dtype, loss_rows=B * T // 2)) for _ in range(2))
    for n in range(4):
        be.fill(want.g, 0)
        for s in got.layout.slots:
            be.fill(got.g[s.offset : s.offset + s.size], np.nan)
        for first in (True, False):
            source = np.roll(ids, n + first)
            want.micro_step(source, targets, 0.25, graph=False)
            got.micro_step(source, targets, 0.25, begins=first)
            assert differing(sums(want), sums(got)) == []


@every_family
def test_check_of_micro_steps_can_fail(cfg: ModelConfig) -> None:
    """A record that replays nothing, one that replays the ids it was recorded with."""
    deaf = overlay(reference, capture=lambda f: lambda: None)
    assert unequal_micro_steps(on(deaf), cfg, "float64", True) == [1, 2, 3]
    recorded: list[np.ndarray] = []

    def embedding_fwd(y: Any, ids: Any, w: Any) -> None:
        reference.embedding_fwd(y, recorded[0] if recorded else ids, w)

    def capture(f: Callable[[], None]) -> Callable[[], None]:
        def play() -> None:
            recorded.append(np.roll(batch(cfg)[0], 1).reshape(-1))
            f()
            recorded.clear()

        return play

    stale = overlay(reference, capture=capture, embedding_fwd=embedding_fwd)
    assert unequal_micro_steps(on(stale), cfg, "float64", True) == [2, 3]


def test_a_micro_step_is_recorded_once_for_a_shape_and_scale() -> None:
    cfg, made, played = CONFIGS["llama"], [], []

    def capture(f: Callable[[], None]) -> Callable[[], None]:
        made.append(f)

        def play() -> None:
            played.append(f)
            f()

        return play

    model = randomised(on(overlay(reference, capture=capture))(cfg, "float32"))
    ids, targets = batch(cfg)
    steps = [(ids, 1.0), (ids, 1.0), (ids, 1.0), (ids[:1], 1.0), (ids[:1], 1.0), (ids, 0.5), (ids, 1.0)]
    counts = []
    for rows, scale in steps:
        model.micro_step(rows, targets[: len(rows)], scale)
        counts.append((len(made), len(played)))
    assert counts == [(0, 0), (1, 1), (1, 2), (1, 2), (2, 3), (2, 3), (2, 4)]
    for n in range(2 * MAX_GRAPHS):  # scales that never come back
        for _ in range(3):
            model.micro_step(ids, targets, 2.0 + n)
        assert len(model._passes) <= MAX_GRAPHS
    model.micro_step(ids, targets, 1.0, graph=False)
    assert len(played) == 4 + 2 * 2 * MAX_GRAPHS


def test_loss_scales_share_what_is_recorded_where_calls_are_asynchronous() -> None:
    """A step for each number of targets that a batch has: one record, the bits of the steps op by op."""
    cfg, made = CONFIGS["llama"], []

    def capture(f: Callable[[], None]) -> Callable[[], None]:
        made.append(f)
        return f

    ids, targets = batch(cfg)
    got = randomised(on(overlay(reference, capture=capture, asynchronous=True))(cfg, "float32"))
    want = randomised(on(reference)(cfg, "float32"))
    for n in range(2 * MAX_GRAPHS):
        got.micro_step(ids, targets, 1 / (n + 3))
        want.micro_step(ids, targets, 1 / (n + 3), graph=False)
        assert differing(sums(want), sums(got)) == [], n
    assert len(made) == 1


@every_model
@every_backend
def test_tuning_leaves_no_trace(cfg: ModelConfig, be: Any, dtype: str) -> None:
    fresh, tuned = (randomised(on(be)(cfg, dtype)) for _ in range(2))
    tuned.tune(B * T)
    for x in (tuned.g, tuned.total):
        assert not be.to_host(x).any()
    assert differing(results(fresh), results(tuned)) == []


@every_family
@every_backend
def test_computing_blocks_again_takes_less_memory_as_planned(cfg: ModelConfig, be: Any, dtype: str) -> None:
    """apr plan and the allocation agree to the byte, and what is saved per layer is the residual stream alone."""
    cfg, plans = replace(cfg, num_layers=3), []
    for recompute in (False, True):
        plans.append(memory(cfg, be, B, T, dtype, recompute=recompute))
        before = be.memory()
        AdamW.of(on(be)(cfg, dtype, recompute=recompute))
        assert be.memory() - before == plans[-1].total - plans[-1].backend
    kept, again = plans
    wide = 2 if dtype == "bfloat16" else 4 if dtype == "float32" else 8
    stream = -(-B * T * cfg.hidden_size * wide // 256) * 256
    assert again.saved == cfg.num_layers * stream
    assert (kept.saved - again.saved) % cfg.num_layers == 0
    assert again.scratch - kept.scratch == (kept.saved - again.saved) // cfg.num_layers
    assert again.total < kept.total


@every_model
@every_backend
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
    judged = Judged(be, truth(cfg))
    judged(None, "loss", model.total)
    for name, gradient in model.layout.named(model.g).items():
        judged(None, f"grad.{name}", gradient)
    assert judge(judged.errors, expected(cfg, False, r"grad\.|loss$", dtype), dtype) == []


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
    return judge(rows, expected(cfg, False, "final_norm|logits", dtype), dtype)


@every_family
@every_backend
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
@every_backend
def test_the_future_does_not_change_the_past(cfg: ModelConfig, be: Any, dtype: str) -> None:
    """Bit for bit; and every position that sees another token changes. L blocks with a window of W see
    L (W - 1) positions back, and no further."""
    far = sum(layer.window - 1 if layer.window else T for layer in layers_of(cfg))
    for source in (0, 1, 6, T - 1):
        assert reached(on(be), cfg, dtype, source) == [t for t in range(T) if source <= t <= source + far]


@every_family
def test_check_of_what_is_seen_can_fail(cfg: ModelConfig) -> None:
    right = reached(on(reference), cfg, "float64", 1)
    for name in ("mask_shows_the_next_token", "window_ignored", "window_one_too_wide"):
        seen = name.startswith("mask") or all(layer.window for layer in layers_of(cfg))
        if FAULTS[name].applies(cfg) and seen:
            assert reached(planted(FAULTS[name], reference), cfg, "float64", 1) != right, name


def reached(build: Build, cfg: ModelConfig, dtype: str, source: int) -> list[int]:
    """Positions whose result changes with the token at `source`."""
    ids = batch(cfg)[0]
    other = ids.copy()
    other[:, source] = (other[:, source] + 1) % cfg.vocab_size
    model = randomised(build(cfg, dtype))
    return np.flatnonzero((forward(model, ids) != forward(model, other)).any(axis=(0, 2))).tolist()


# Parameters


@every_family
@every_backend
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
    eps = np.finfo(whole.dtype).eps
    assert np.abs(embed + head - whole).max() <= B * T * eps * largest  # the B T terms in another order


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


@pytest.mark.parametrize(
    "be", ["reference", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)
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


def test_z_loss_changes_what_is_minimised_and_not_what_is_reported() -> None:
    cfg = CONFIGS["qwen2"]
    ids, targets = batch(cfg)
    plain, pulled = (randomised(on(reference)(cfg, "float64", z_loss=z)) for z in (0.0, 0.1))
    assert step(plain, ids, targets) == step(pulled, ids, targets)
    for name, gradient in plain.layout.named(plain.g).items():
        assert not np.array_equal(gradient, pulled.layout.named(pulled.g)[name]), name


@every_model
def test_a_padded_vocabulary_computes_the_same_and_stays_zero(cfg: ModelConfig) -> None:
    """As on a GPU: logits have columns beyond V = 123, the head rows of zeros, through steps of AdamW too."""
    padded = on(overlay(reference, pad_vocab=True))
    assert off_truth(padded, cfg, dtype="float64") == []
    model = randomised(padded(cfg, "float64"))
    assert model.buffers["logits"].shape[1] == 128
    opt, embed = AdamW.of(model), next(s for s in model.layout.slots if s.param.name == "embed")
    used = np.concatenate([np.arange(s.offset, s.offset + s.size) for s in model.layout.slots])
    rest = np.setdiff1d(np.arange(embed.offset, embed.offset + 128 * cfg.hidden_size), used)
    assert len(rest) == 5 * cfg.hidden_size
    for _ in range(3):
        step(model, *batch(cfg))
        assert not model.g[rest].any()
        opt.step(0.01)
        assert not model.w[rest].any()
    assert model.last_logits().shape == (B, cfg.vocab_size)
