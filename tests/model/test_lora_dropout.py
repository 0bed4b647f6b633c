"""Dropout of adapters: gradients are slopes of the loss with masks that stand still, which go by seed, step, sequence and
matrix, and by nothing else; evaluations have none; and the gate that looks at them. A whole run is in test_lora.py."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from apr import backends
from apr.backends import overlay, reference
from apr.bisect.spot import spot_check
from apr.common.errors import UsageError
from apr.common.options import check_ranges
from apr.evidence.adapters import merge_error
from apr.evidence.dropout import Masks
from apr.model.cost import flops_per_token, memory
from apr.model.lora import LINEAR, LoraConfig, lora_of_json, lora_to_json
from apr.model.lora_dropout import Draws, Dropout
from apr.model.lora_settings import check_rank, lora_config
from apr.model.optim import AdamW
from apr.model.presets import PRESETS
from apr.model.settings import ModelSettings
from apr.model.transformer import Model

cpu = backends.get("cpu")
ALL = tuple(LINEAR)
DRAWS = Draws.of(5, 3, 7, 2)


def adapted(preset, be, dtype, config, shape=(2, 8), **options):
    """A model with noise on every weight and on A and B, and ids."""
    cfg = PRESETS[preset]
    model = Model(cfg, be, *shape, dtype, lora=config, **options)
    host = np.zeros(model.layout.size, "float64" if dtype == "float64" else "float32")
    model.layout.randomise(host, 3)
    model.adapters.set_base(model.layout.named(host).__getitem__)
    rng = np.random.default_rng(3)
    start = np.zeros(model.adapters.layout.size, host.dtype)
    model.adapters.layout.init(start, 3)
    for s in model.adapters.layout.slots:
        if s.param.init == "zeros":
            start[s.offset : s.offset + s.size] = 0.1 * rng.standard_normal(s.size)
    AdamW.of(model.adapters).set_weights(start)
    return model, rng.integers(0, cfg.vocab_size, (shape[0], shape[1] + 1)).astype(np.int32)


def passed(model, ids, draws=DRAWS, backward=False):
    """Loss of a pass, and its gradients where asked."""
    be = model.be
    for flat in (model.g, model.total):
        be.fill(flat, 0)
    model.forward(ids[:, :-1], draws=draws)
    model.loss(ids[:, 1:], scale=1 / 16 if backward else None)
    if backward:
        model.backward()
    return float(be.to_host(model.total)[0]) / 16, np.array(be.to_host(model.g))


def off(model, ids):
    """Names of A and B whose gradient is not the slope of the loss."""
    _, g = passed(model, ids, backward=True)
    rng, wrong, w = np.random.default_rng(0), [], model.adapters.w
    for s in model.adapters.layout.slots:
        place, u = slice(s.offset, s.offset + s.size), rng.standard_normal(s.size)
        u /= np.linalg.norm(u)
        start, ends = w[place].copy(), []
        for sign in (1, -1):
            w[place] = start + sign * 1e-5 * u
            ends.append(passed(model, ids)[0])
        w[place] = start
        slope = (ends[0] - ends[1]) / 2e-5
        wrong += [] if abs(g[place] @ u - slope) <= 1e-6 * max(abs(slope), 1e-3) else [s.hf]
    return wrong


@pytest.mark.parametrize(
    ("preset", "targets", "options"),
    [
        ("llama-tiny", (*ALL, "embed"), {}),
        ("qwen2-tiny", (*ALL, "head"), dict(loss_rows=5)),
        ("qwen3-tiny", ("wq", "wv", "wup"), dict(act_again=True)),
        ("olmo2-tiny", ALL, dict(recompute=True)),
        ("mistral-tiny", (*ALL, "head"), dict(recompute=True, act_again=True, folds=True)),
    ],
)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_gradients_are_slopes_of_the_loss(preset, targets, options, p):
    config = LoraConfig(3, 5.0, targets, rslora=True, dropout=p)
    assert off(*adapted(preset, reference, "float64", config, **options)) == []


@pytest.mark.parametrize("lost", ["add_to_input", "add_gradients"])
def test_a_gradient_with_another_mask_is_seen(monkeypatch, lost):
    right = getattr(Dropout, lost)

    def other(self, *args):
        self._seed += 1
        right(self, *args)
        self._seed -= 1

    monkeypatch.setattr(Dropout, lost, other)
    assert off(*adapted("llama-tiny", reference, "float64", LoraConfig(3, 5.0, ALL, dropout=0.3)))


def test_without_dropout_nothing_is_another():
    """Bit for bit, and no buffer more: draws count for nothing then."""
    model, ids = adapted("qwen2-tiny", cpu, "float32", LoraConfig(4, 8.0, ALL, dropout=0.0))
    assert model.adapters.dropout is None
    assert not {"dropped", "beside", "counters"} & set(model.buffers.arrays)
    (one, g), (other, h) = (passed(model, ids, draws, True) for draws in (DRAWS, None))
    assert (one, g.tobytes()) == (other, h.tobytes())


@pytest.mark.parametrize(("be", "dtype", "near"), [(reference, "float64", 1e-12), (cpu, "float32", 1e-5)])
@pytest.mark.parametrize("base", [None, "int8"])
def test_an_evaluation_drops_nothing_whatever_was_before_it(be, dtype, near, base):
    model, ids = adapted("qwen2-tiny", be, dtype, LoraConfig(4, 8.0, (*ALL, "head"), base=base, dropout=0.3))
    want, _ = passed(model, ids, None)
    dropped, _ = passed(model, ids, backward=True)
    assert abs(dropped - want) > 1e-3
    assert passed(model, ids, None)[0] == want
    # With a share of 0 the products beside each other are those of one matrix.
    model.adapters.dropout.p = 0.0
    assert abs(passed(model, ids)[0] - want) <= near * want
    model.adapters.dropout.p = 0.3
    passed(model, ids)
    assert merge_error(model.adapters)[0] <= 1


def test_masks_go_by_seed_step_and_sequence():
    model, ids = adapted("llama-tiny", cpu, "float32", LoraConfig(4, 8.0, ALL, dropout=0.3))
    want = passed(model, ids, backward=True)
    again = passed(model, ids, Draws(5, 3, (7, 8)), True)
    assert (want[0], want[1].tobytes()) == (again[0], again[1].tobytes())
    for draws in (Draws.of(6, 3, 7, 2), Draws.of(5, 4, 7, 2), Draws.of(5, 3, 8, 2), Draws(5, 3, (7, 7))):
        assert passed(model, ids, draws)[0] != want[0]
    # Sequences in another order, with their masks.
    turned = passed(model, np.ascontiguousarray(ids[::-1]), Draws(5, 3, (8, 7)), True)
    assert abs(turned[0] - want[0]) <= 1e-6
    assert np.abs(turned[1] - want[1]).max() <= 1e-5 * np.abs(want[1]).max()


@pytest.mark.parametrize("options", [dict(recompute=True), dict(act_again=True)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_computed_again_has_the_same_masks(options, dtype):
    config = LoraConfig(4, 8.0, ALL, dropout=0.3)
    want = passed(*adapted("qwen3-tiny", cpu, dtype, config), backward=True)
    got = passed(*adapted("qwen3-tiny", cpu, dtype, config, **options), backward=True)
    assert (got[0], got[1].tobytes()) == (want[0], want[1].tobytes())


def recorded_beside_op_by_op(be, dtype):
    """Gradients of four steps by a recorded pass, and op by op."""
    config, found = LoraConfig(4, 8.0, (*ALL, "head"), dropout=0.3), []
    for graph in (True, False):
        model, ids = adapted("llama-tiny", be, dtype, config)
        gradients = []
        for step in range(1, 5):
            draws = Draws.of(5, step, 0, 2)
            model.micro_step(ids[:, :-1], ids[:, 1:], 1 / 16, graph, begins=True, draws=draws)
            gradients.append(np.array(be.to_host(model.g)).tobytes())
        found.append(gradients)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_recorded_pass_draws_anew_each_step(request, name, dtype):
    be = request.getfixturevalue("cuda") if name == "cuda" else cpu
    recorded, op_by_op = recorded_beside_op_by_op(be, dtype)
    assert recorded == op_by_op
    assert len(set(recorded)) == 4


def test_counters_that_a_recorded_pass_has_frozen_are_seen():
    def capture(f):
        frozen = []

        def replay():
            given = iter([*frozen]) if frozen else None

            def dropout(out, x, counters, *rest):
                if given is None:
                    frozen.append(np.array(counters))
                cpu.dropout(out, x, frozen[-1] if given is None else next(given), *rest)

            be.dropout = dropout
            f()
            be.dropout = cpu.dropout

        return replay

    be = overlay(cpu, capture=capture)
    recorded, op_by_op = recorded_beside_op_by_op(be, "float32")
    assert recorded[:2] == op_by_op[:2]
    assert recorded[2] != op_by_op[2]


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "near"), [("float32", 2e-4), ("bfloat16", 6e-2)])
@pytest.mark.parametrize("options", [{}, dict(recompute=True)])
def test_a_gpu_computes_what_the_reference_does(cuda, dtype, near, options):
    config = LoraConfig(4, 8.0, (*ALL, "head"), dropout=0.3)
    loss, want = passed(*adapted("qwen3-tiny", reference, "float64", config), backward=True)
    got, g = passed(*adapted("qwen3-tiny", cuda, dtype, config, **options), backward=True)
    assert abs(got - loss) <= near * loss
    assert np.linalg.norm(g - want[: g.size]) <= near * np.linalg.norm(want)


def spot(be, dtype, base=None):
    model, ids = adapted("qwen3-tiny", be, dtype, LoraConfig(8, 16.0, (*ALL, "head"), base=base, dropout=0.3))
    return spot_check(model, ids[:, :-1], ids[:, 1:], "x")


@pytest.mark.parametrize("base", [None, "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_spot_check_sees_the_op(dtype, base):
    report = spot(cpu, dtype, base)
    assert report.agree, report.first
    # Forward, and backward to the input and for the gradients; of the head the gradients need no second one.
    assert sum(row.op == "dropout" for row in report.rows) == 3 * 2 * len(ALL) + 2
    assert {row.tap for row in report.rows if row.op == "dropout"} >= {"0.dropped", "1.dropped", "dropped"}


def test_a_spot_check_names_the_op_that_is_wrong():
    def unscaled(out, x, counters, seed, module, p, factor):
        cpu.dropout(out, x, counters, seed, module, p, factor * (1 - p))

    def neighbour(out, x, counters, seed, module, p, factor):
        cpu.dropout(out, x, counters, seed, module + 1, p, factor)

    for fault in (unscaled, neighbour):
        first = spot(overlay(cpu, dropout=fault), "float32").first
        assert (first.op, first.tap, first.layer) == ("dropout", "0.dropped", 0)


def test_the_plan_counts_what_dropout_takes():
    cfg, targets = PRESETS["qwen2-tiny"], (*ALL, "head")
    plain, dropping = (LoraConfig(4, 8.0, targets, dropout=p) for p in (0.0, 0.1))
    before, after = (memory(cfg, cpu, 2, 16, lora=c, optimizer=None) for c in (plain, dropping))
    model = Model(cfg, cpu, 2, 16, lora=dropping)
    buffers = [model.buffers[name].nbytes for name in ("dropped", "beside", "head_beside", "counters")]
    assert sum(buffers) <= after.total - before.total <= sum(buffers) + 4 * 256
    assert model.buffers["dropped"].size == 32 * max(cfg.hidden_size, cfg.intermediate_size)
    more = flops_per_token(cfg, 16, lora=dropping) - flops_per_token(cfg, 16, lora=plain)
    assert more == 4 * sum(p.a.size + p.b.size for p in model.adapters.layout.pairs)
    assert lora_of_json(json.loads(json.dumps(lora_to_json(dropping)))) == dropping
    assert "dropout" not in lora_to_json(plain)


def test_what_makes_no_sense_is_one_line():
    with pytest.raises(UsageError, match="--lora-rank too"):
        lora_config(None, None, None, dropout=0.1)
    with pytest.raises(UsageError, match="--lora-dropout 0"):
        check_rank(PRESETS["llama-tiny"], lora_config(2, None, None, dora=True, dropout=0.1))


@pytest.mark.parametrize("share", [1.0, -0.1, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(UsageError, match="--lora-dropout"):
        check_ranges(ModelSettings, {"lora_dropout": share})


# The gate


def judged(
    fault=lambda m: None, taken=lambda draws: draws, graph=True, monkeypatch=None, sizes=(2, 2), **asked
):
    """Finding of the gate, of a job of micro-batches of so many sequences whose step draws as `taken` says."""
    fault(monkeypatch)
    config = LoraConfig(4, 12.0, (*ALL, "head", "embed"), dropout=0.3)
    model, ids = adapted("llama-tiny", cpu, "float32", config)
    ids = np.concatenate([ids, ids[::-1]])[: sum(sizes)]
    settings = SimpleNamespace(**{"seed": 5, "lora_dropout": 0.3, **asked})
    t = SimpleNamespace(
        model=model, adapters=model.adapters, backend=cpu, cfg=model.cfg, settings=settings, shard=None
    )
    masks = Masks(t, ids[:, :-1], ids[:, 1:], 1 / 32, graph, 3)
    # Other gates compute with the batch of the step, too.
    model.micro_step(ids[:1, :-1], ids[:1, 1:], 1 / 32, False, draws=Draws(5, 3, [1]))
    masks.begin_step()
    for first, size in zip((0, *sizes), sizes, strict=False):
        part = np.ascontiguousarray(ids[first : first + size])
        draws = taken(Draws.of(5, 3, first, size))
        model.micro_step(part[:, :-1], part[:, 1:], 1 / 32, graph, begins=first == 0, draws=draws)
    return masks.finding()


@pytest.mark.parametrize("sizes", [(2, 1), (2,), (1,)])
def test_the_gate_passes_a_step_whose_last_micro_batch_is_shorter(sizes):
    found = judged(sizes=sizes)
    assert (found.verdict, found.why) == ("PASS", "")
    assert judged(sizes=sizes, taken=lambda draws: None).why == "the step drops nothing"


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("asked", [0.3, None])
def test_the_gate_passes_a_sound_job(graph, asked):
    found = judged(graph=graph, lora_dropout=asked)
    assert (found.verdict, found.why) == ("PASS", "")
    assert found.measured.startswith(f"{len(ALL) * 2 + 1} matrices")


def test_the_gate_does_not_ask_for_two_masks_where_next_to_nothing_is_dropped(monkeypatch):
    def rare(m):
        right = LoraConfig.__init__
        m.setattr(LoraConfig, "__init__", lambda self, *a, **k: right(self, *a, **{**k, "dropout": 1e-9}))

    assert judged(rare, monkeypatch=monkeypatch, lora_dropout=1e-9).verdict == "PASS"


def dropped_in_evaluations(m):
    right = Dropout.begin

    def begin(self, draws, shape):
        right(self, draws or (Draws.of(1, 1, 0, shape[0]) if shape[0] else None), shape)

    m.setattr(Dropout, "begin", begin)


def one_mask_for_all_matrices(m):
    right = Dropout.__init__

    def init(self, adapters):
        right(self, adapters)
        self._number = dict.fromkeys(self._number, 0)

    m.setattr(Dropout, "__init__", init)


def one_mask_for_all_steps(m):
    right = Draws.counters.fget
    m.setattr(Draws, "counters", property(lambda self: right(self) * [1, 0]))


def another_seed(m):
    right = Dropout.begin

    def begin(self, draws, shape):
        right(self, draws, shape)
        self._seed += 1

    m.setattr(Dropout, "begin", begin)


def the_scale_of_adapters_is_forgotten(m):
    right = Dropout._drop
    m.setattr(
        Dropout, "_drop", lambda self, out, x, pair: right(self, out, x, dataclasses.replace(pair, scale=1.0))
    )


def the_share_is_another(m):
    right = Dropout.__init__

    def init(self, adapters):
        right(self, adapters)
        self.p = self.p / 2

    m.setattr(Dropout, "__init__", init)


def a_recorded_pass_keeps_its_counters(m):
    right = Model.micro_step

    def step(self, ids, targets, scale, graph=True, **options):
        if graph:
            options["draws"] = self.__dict__.setdefault("first", options["draws"])
        right(self, ids, targets, scale, graph, **options)

    m.setattr(Model, "micro_step", step)


FAULTS = {
    dropped_in_evaluations: "an evaluation drops",
    one_mask_for_all_matrices: "15 matrices share 1 mask",
    one_mask_for_all_steps: "not those of the step",
    another_seed: "another seed",
    the_scale_of_adapters_is_forgotten: "another scale",
    the_share_is_another: "0.15 is dropped, asked for 0.3",
    a_recorded_pass_keeps_its_counters: "recorded pass",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_the_gate_names_what_is_wrong(monkeypatch, fault):
    found = judged(fault, monkeypatch=monkeypatch)
    assert found.verdict == "FAIL"
    assert FAULTS[fault] in found.why


@pytest.mark.parametrize(
    ("taken", "why"),
    [
        (lambda draws: None, "the step drops nothing"),
        (lambda draws: dataclasses.replace(draws, step=2), "the step has masks of others"),
        (lambda draws: Draws.of(5, 3, 0, 2), "the step has masks of others"),
        (lambda draws: Draws(5, 3, (draws.numbers[0],) * 2), "the step has masks of others"),
    ],
)
def test_the_gate_looks_at_the_step_itself(taken, why):
    found = judged(taken=taken)
    assert (found.verdict, found.why) == ("FAIL", why)
