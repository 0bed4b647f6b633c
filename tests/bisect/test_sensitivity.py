"""Kinds of faults that no single element shows: sums that are overwritten, recorded numbers, crowded ids, a small factor on
one operand; and sound work on which nothing may be said."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from apr import backends
from apr.backends import overlay
from apr.bisect import batch as batches
from apr.bisect import passes, rule, stages, watch
from apr.bisect.lockstep import Call, Twin
from apr.bisect.planted import catalogue
from apr.bisect.report import FORCED, FREE, PILED_UP, ArrayComparison, Report
from apr.bisect.side import Side
from apr.bisect.stages import Plan
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.model.transformer import Model

cpu, reference = backends.get("cpu"), backends.get("reference")
QWEN2 = PRESETS["qwen2-tiny"]
WHOLE = Plan()
WIDE = replace(QWEN2, hidden_size=128, intermediate_size=192, num_heads=4, num_kv_heads=2, head_dim=32)


def judge(be: Any, cfg: Any = QWEN2, dtype: str = "float32", plan: Plan = WHOLE, shape=(2, 17)) -> Report:
    report = Report("", ("", ""), "")
    given = batches.at_random(cfg, shape, 0)
    return stages.run(cfg, Side(be, cfg, dtype), catalogue.weights_of(cfg), given, report, plan)


def overwriting(op: str, output: str) -> Any:
    """A cpu backend whose op writes an output in place of adding to it."""
    from apr.backends.contract import OPS

    at = OPS[op].parameters.index(output)

    def call(*args: Any) -> None:
        if args[at] is not None:
            args[at][...] = 0
        getattr(cpu, op)(*args)

    return overlay(cpu, **{op: call})


@pytest.mark.parametrize(
    ("op", "output", "tap"),
    [
        ("linear_bwd", "dw", "grad.1.wdown"),
        ("linear_bwd", "db", "grad.1.bqkv"),
        ("add_rmsnorm_bwd", "dw", "grad.final_norm"),
        ("embedding_bwd", "dw", "grad.embed"),
        ("add_sum", "total", "total"),
        ("add_sum_sq", "total", "sum_sq"),
    ],
)
def test_a_sum_that_is_overwritten_is_named(op, output, tap):
    """In the pass op by op alone, where every sum begins at noise."""
    report = judge(overwriting(op, output), plan=Plan(free=False, state=False))
    rows = [r for r in report.guilty if r.mode == FORCED and r.op == op]
    assert tap in {r.tap for r in rows}
    assert report.first.op == op


def test_squares_of_new_weights_that_are_overwritten_are_named():
    report = judge(overwriting("adamw", "square"), plan=Plan(state=False))
    assert {(r.op, r.tap) for r in report.guilty} == {("adamw", "square"), ("AdamW.step", "square")}


def test_a_first_micro_batch_that_adds_is_named():
    """On the op, and in a whole pass over gradients that are not zero."""

    def linear_bwd(*args: Any) -> None:
        cpu.linear_bwd(*args[:6], True)

    report = judge(overlay(cpu, linear_bwd=linear_bwd), plan=Plan(free=False))
    assert (report.first.op, report.first.tap) == ("linear_bwd", "grad.0.wqkv")
    assert {r.op for r in report.of("state") if not r.ok} == {"begins_anew"}


def test_sums_that_the_first_micro_batch_does_not_clear_are_named(monkeypatch):
    monkeypatch.setattr(Model, "_clear_sums", lambda self: None)
    report = judge(cpu, plan=Plan(free=False))
    assert (report.first.stage, report.first.op) == ("state", "begins_anew")
    assert "norm" in report.first.tap or "bias" in report.first.tap


@pytest.mark.parametrize(
    ("clip", "tap"),
    [
        (lambda norm, most: most / (norm + 1e-6), "factor"),
        (lambda norm, most: np.fmin(1, most / (norm + 1e-6)), "factor of NaN"),
    ],
)
def test_clipping_that_is_right_only_where_it_bites_is_named(clip, tap):
    def clip_factor(factor: Any, sum_sq: Any, most: float) -> None:
        factor[0] = clip(np.sqrt(sum_sq[0]), most)

    report = judge(overlay(cpu, clip_factor=clip_factor), plan=Plan(state=False))
    assert {(r.op, r.tap) for r in report.guilty} == {("clip_factor", tap)}


def test_a_target_at_the_end_of_the_vocabulary_that_is_lost_is_named():
    def cross_entropy(loss: Any, logits: Any, targets: Any, scale: Any, z_loss: float) -> None:
        last = np.flatnonzero(targets == logits.shape[1] - 1)
        cpu.cross_entropy(loss, logits, targets, scale, z_loss)
        if scale is not None:
            logits[last, -1] += np.float32(scale)

    report = judge(overlay(cpu, cross_entropy=cross_entropy), plan=Plan(free=False, state=False))
    assert (report.first.op, report.first.tap) == ("cross_entropy", "d_logits")


def test_targets_and_weights_that_a_recorded_pass_has_frozen_are_named():
    """Each pass is recorded with the targets, or the head, of its first replay."""
    playing: list[dict[str, Any]] = []

    def capture(run: Any) -> Any:
        frozen: dict[str, Any] = {}

        def play() -> None:
            playing.append(frozen)
            run()
            playing.pop()

        return play

    def kept(name: str, x: Any) -> Any:
        return playing[-1].setdefault(name, x.copy()) if playing else x

    def cross_entropy(loss: Any, logits: Any, targets: Any, *rest: Any) -> None:
        cpu.cross_entropy(loss, logits, kept("targets", targets), *rest)

    def embedding_fwd(y: Any, ids: Any, w: Any) -> None:
        cpu.embedding_fwd(y, ids, kept("w", w))

    for ops in (dict(cross_entropy=cross_entropy), dict(embedding_fwd=embedding_fwd)):
        report = judge(overlay(cpu, capture=capture, **ops), plan=Plan(free=False))
        assert {r.op for r in report.guilty} == {"recorded_before"}


def test_a_norm_over_heads_that_is_overwritten_is_named():
    cfg = PRESETS["qwen3-tiny"]
    report = judge(overwriting("head_rmsnorm_bwd", "dw"), cfg, plan=Plan(False, state=False))
    assert report.first.op == "head_rmsnorm_bwd"


def captured_with(frozen: str) -> Any:
    """A backend whose recorded pass replays the first one that was recorded, whatever is asked for."""
    first: list[Any] = []

    def capture(run: Any) -> Any:
        first.append(run)
        return lambda: first[0]()

    assert frozen == "scale"
    return overlay(cpu, capture=capture)


def test_a_recorded_pass_that_ignores_the_loss_scale_is_named():
    report = judge(captured_with("scale"), plan=Plan(free=False))
    assert (report.first.stage, report.first.op) == ("state", "recorded_again")
    assert "loss scale" in report.first.cause


def test_an_id_of_which_only_some_places_count_is_named():
    """As of a kernel that adds up to 16 places of an id: no text of two sequences has more."""

    def embedding_bwd(dw: Any, dy: Any, ids: Any) -> None:
        counts: dict[int, int] = {}
        keep = []
        for i, token in enumerate(ids.tolist()):
            counts[token] = counts.get(token, 0) + 1
            if counts[token] <= 16:
                keep.append(i)
        cpu.embedding_bwd(dw, np.ascontiguousarray(dy[keep]), np.ascontiguousarray(ids[keep]))

    report = judge(overlay(cpu, embedding_bwd=embedding_bwd), plan=Plan(free=False, state=False))
    assert (report.first.op, report.first.tap) == ("embedding_bwd", "grad.embed")
    assert judge(cpu, plan=Plan(free=False, state=False)).agree


@pytest.mark.parametrize("factor", [1.0, 1.002])
def test_a_small_factor_on_one_operand_is_named_in_bfloat16(factor):
    """Every element lies within rounding, 0.4 %; all together do not."""
    low = rule.rounded()

    def linear_fwd(y: Any, x: Any, w: Any, b: Any) -> None:
        scaled = (w.astype(np.float32) * np.float32(factor)).astype(np.float32)
        out = x.astype(np.float32) @ scaled.T
        y[...] = out if b is None else out + b.astype(np.float32)

    be = overlay(low, linear_fwd=linear_fwd)
    report = judge(
        be, WIDE, "bfloat16", Plan(free=False, state=False, backward=False, optimizer=False), (4, 64)
    )
    if factor == 1.0:
        assert report.agree, report.first
    else:
        assert report.first.op == "linear_fwd"
        assert report.first.err < 0.004


def test_systematic_errors_of_rounding_and_of_chance_are_none():
    rng = np.random.default_rng(0)
    want = rng.standard_normal((64, 4, 256))
    low = want.astype(rule.BF16)
    assert rule.systematic(low, want) == 0
    assert rule.systematic(want * 1.002, want) == pytest.approx(0.002, rel=0.05)
    one = want.copy()
    one[:, 2] *= 0.998
    assert rule.systematic(one.astype(rule.BF16), want) > rule.SYSTEMATIC
    assert rule.systematic(want + 0.01, want) > 0.005
    assert rule.systematic(np.zeros((64, 64)), np.zeros((64, 64))) == 0


def test_the_unit_of_tensor_cores_grows_with_the_terms_and_stays_below_a_fault():
    """Errors of sums on an H200, of the largest: the worst of normal, correlated and positive terms, split or not."""
    assert rule.unit("float32", "bfloat16") == 2.0**-19
    measured = {
        64: 2.0e-7,
        512: 1.1e-6,
        2048: 5.3e-6,
        4096: 1.4e-5,
        8192: 3.2e-5,
        16384: 7.6e-5,
        32768: 7.4e-5,
    }
    for terms, worst in measured.items():
        assert 2 * rule.unit("float32", "bfloat16", terms) > 3 * worst
    # An operand that is rounded twice, or off by 0.2 %, and a lost piece of one in 64 are beyond it at 32,768 tokens.
    assert 2 * rule.unit("float32", "bfloat16", 32768) < 0.001
    assert rule.unit("float32", "float32", 2048) == np.finfo(np.float32).eps


def test_a_lost_piece_of_a_long_sum_is_named_in_bfloat16():
    low = rule.rounded()

    def linear_bwd(dx: Any, dw: Any, db: Any, dy: Any, x: Any, w: Any, adds: bool) -> None:
        low.linear_bwd(dx, None, db, dy, x, w, adds)
        if dw is not None:
            kept = len(dy) - len(dy) // 64
            low.linear_bwd(np.empty_like(dx[:kept]), dw, None, dy[:kept], x[:kept], w, adds)

    plan = Plan(free=False, state=False, optimizer=False)
    assert judge(low, WIDE, "bfloat16", plan, (4, 64)).agree
    report = judge(overlay(low, linear_bwd=linear_bwd), WIDE, "bfloat16", plan, (4, 64))
    assert (report.first.op, report.first.tap) == ("linear_bwd", "grad.embed")


@pytest.mark.parametrize("fault", ["rounded twice", "0.2 %", "sound"])
def test_small_faults_of_an_operand_are_named_though_the_tolerance_grows(fault):
    """Of 2,048 tokens, in the gradients of matrices alone."""
    low, root = rule.rounded(), np.float32(2) ** np.float32(0.5)

    def linear_bwd(dx: Any, dw: Any, db: Any, dy: Any, x: Any, w: Any, adds: bool) -> None:
        low.linear_bwd(dx, None, db, dy, x, w, adds)
        if dw is not None and fault == "rounded twice" and dy.dtype == rule.BF16:
            dy = ((dy.astype(np.float32) * root).astype(rule.BF16).astype(np.float32) / root).astype(
                rule.BF16
            )
        if dw is not None:
            scaled = dy.astype(np.float32) * np.float32(1.002 if fault == "0.2 %" else 1)
            dw[...] = (dw if adds else 0) + scaled.T @ x.astype(np.float32)

    plan = Plan(free=False, state=False, optimizer=False)
    report = judge(overlay(low, linear_bwd=linear_bwd), WIDE, "bfloat16", plan, (64, 32))
    if fault == "sound":
        assert report.agree, report.first
    else:
        named = {r.tap for r in report.guilty if r.op == "linear_bwd"}
        assert {"grad.embed", "grad.0.wqkv", "grad.1.wdown"} <= named


def test_gradients_that_are_zero_by_cancellation_are_so_within_float32():
    """A query that sees one key has dp = sum_d dy*y; kernels that sum the two in other orders leave rounding."""
    low = rule.rounded()

    def off_by(size: float) -> Any:
        def attention_bwd(dq: Any, dk: Any, *rest: Any) -> None:
            low.attention_bwd(dq, dk, *rest)
            for x in (dq, dk):
                noise = np.float32(size) * (-1) ** np.arange(x.shape[-1])
                x[...] = (x.astype(np.float32) + noise).astype(rule.BF16)

        return overlay(low, attention_bwd=attention_bwd)

    plan = Plan(free=False, state=False, optimizer=False)
    for size, agrees in ((1e-7, True), (1e-2, False)):
        report = judge(off_by(size), WIDE, "bfloat16", plan, (1, 1))
        assert (not [r for r in report.guilty if r.op == "attention_bwd"]) == agrees


# Errors that pile up


def row(mode: str, ratio: float, op: str = "linear_fwd") -> ArrayComparison:
    return ArrayComparison("forward", op, "0.qkv", mode, ratio, 1.0)


def report_of(*rows: ArrayComparison) -> Report:
    return Report("", ("", ""), "", rows=list(rows))


def test_rounding_that_piled_up_is_no_fault():
    report = report_of(row(FORCED, 0.5), row(FREE, 2.2))
    assert report.agree
    assert report.finding("forward").verdict == "PASS"
    assert [r.ratio for r in report.piled_up] == [2.2]


@pytest.mark.parametrize(
    "rows",
    [
        [row(FORCED, 0.5), row(FREE, 2 * PILED_UP)],
        [row(FORCED, 0.5), row(FREE, float("nan"))],
        [row(FORCED, 1.1), row(FREE, 2.2)],
        # beside a trace, nothing clears it
        [row(FREE, 2.2)],
    ],
)
def test_what_no_op_clears_is_a_fault(rows):
    report = report_of(*rows)
    assert not report.agree
    assert report.finding("forward").verdict == "FAIL"
    assert not report.piled_up


def test_what_piled_up_is_noted(monkeypatch):
    """A sound side, judged by a tolerance that is a fifth of its own."""
    sound = rule.tolerance
    monkeypatch.setattr(
        "apr.bisect.watch.rule.tolerance",
        lambda base, largest, eps, factor: sound(base, largest, eps, factor) * 0.2,
    )
    looked = SimpleNamespace(forced=passes.forced)

    def forced(*args: Any) -> Any:
        with monkeypatch.context() as m:
            m.setattr("apr.bisect.watch.rule.tolerance", sound)
            return looked.forced(*args)

    monkeypatch.setattr(stages, "forced", forced)
    report = judge(cpu, plan=Plan(optimizer=False, state=False))
    assert report.agree
    assert any("piled up to" in note for note in report.notes)


def summed_by_token(be: Any, of_gradients: float = 1.0) -> Any:
    """A backend that adds up the gradient of a matrix in the memory of the gradient, token by token."""

    def linear_bwd(dx: Any, dw: Any, db: Any, dy: Any, x: Any, w: Any, adds: bool) -> None:
        be.linear_bwd(dx, None, db, dy, x, w, adds)
        if dw is not None and not adds:
            dw[...] = 0
        for i in range(len(dy) if dw is not None else 0):
            dw += np.outer(dy[i], x[i] * x.dtype.type(of_gradients))

    return overlay(be, linear_bwd=linear_bwd)


def test_gradients_of_long_batches_that_are_summed_in_order_are_sound():
    plan = Plan(free=False, state=False, optimizer=False)
    sound = judge(summed_by_token(cpu), plan=plan, shape=(32, 64))
    assert sound.agree, sound.first
    wrong = judge(summed_by_token(cpu, 1.0001), plan=plan, shape=(32, 64)).first
    assert wrong is not None
    assert (wrong.op, wrong.tap) == ("linear_bwd", "grad.embed")


def gradient_of_a_norm(be: Any, seed: int, heads: int = 4, width: int = 8) -> ArrayComparison:
    """What is said of the gradient of q_norm as `be` computes it, of 64 tokens whose terms all but cancel.

    Terms resemble those of the tokens beside them, as in text: the sum on its way is larger than its end."""
    rng, n = np.random.default_rng(seed), 64
    x = rng.standard_normal((n, heads, width))
    dy = (
        rng.standard_normal((n, heads, 1)) + 2 * np.repeat(rng.standard_normal((n // 8, heads, 1)), 8, 0)
    ) * x
    dy[..., 2:] *= 0.05
    dy -= (dy * x).mean((0, 1)) / np.square(x).mean((0, 1)) * x * 0.98
    low = {"dx": np.empty_like(x), "dw": np.zeros(width), "dy": dy, "x": x}
    low |= {"rstd": 1 / np.sqrt(np.square(x).mean(-1)), "w": np.ones(width)}
    names = {"dw": "grad.1.q_norm", "w": "1.q_norm"}
    args = {
        n: Twin(names.get(n, n), [a.astype(np.float32).astype(np.float64), a.astype(np.float32)])
        for n, a in low.items()
    }
    looking = watch.Forced([reference, be], "float32", Layout(PRESETS["qwen3-tiny"]))
    looking.stage = "backward"
    looking(Call("head_rmsnorm_bwd", args), lambda: None)
    (row,) = (r for r in looking.rows if r.tap == "grad.1.q_norm")
    return row


def summed_otherwise(terms: Any) -> Any:
    """A backend that adds up the gradient of a norm from what `terms` makes of its terms, float32, one by one."""

    def head_rmsnorm_bwd(dx: Any, dw: Any, dy: Any, x: Any, rstd: Any, w: Any) -> None:
        reference.head_rmsnorm_bwd(dx, None, dy, x, rstd, w)
        for part in terms((dy * (x * rstd[..., None])).reshape(-1, w.size)):
            dw += np.cumsum(part, 0, dtype=np.float32)[-1]

    return overlay(cpu, head_rmsnorm_bwd=head_rmsnorm_bwd)


ORDERS = {
    "cpu": cpu,
    "in order": summed_otherwise(lambda t: [t]),
    "backwards": summed_otherwise(lambda t: [t[::-1]]),
    "halves": summed_otherwise(lambda t: np.split(t, 2)),
    "one by one": summed_otherwise(lambda t: t[:, None]),
    "at random": summed_otherwise(lambda t: [np.random.default_rng(0).permutation(t)]),
}


@pytest.mark.parametrize("order", ORDERS)
def test_a_short_vector_whose_terms_cancel_may_be_summed_in_any_order(order):
    """NumPy's own error of so few elements is a matter of luck."""
    wrong = [seed for seed in range(150) if not gradient_of_a_norm(ORDERS[order], seed).ok]
    assert wrong == []


@pytest.mark.parametrize(
    "fault",
    [
        lambda t: [t[1:]],
        lambda t: [t[:-1]],
        lambda t: [t[: 32 * 4]],
        lambda t: [t.reshape(-1, 4, t.shape[1])[:, 0]],
        lambda t: [t * np.float32(1.0001)],
        lambda t: [t.astype(np.float16).astype(np.float32)],
    ],
    ids=["first term", "last term", "half of them", "first head", "factor", "float16"],
)
def test_a_fault_in_the_sum_of_a_short_vector_is_seen(fault):
    seen = [seed for seed in range(40) if not gradient_of_a_norm(summed_otherwise(fault), seed).ok]
    assert seen == list(range(40))


def product_of_few(be: Any, seed: int, wide: int = 64) -> ArrayComparison:
    """What is said of a product with 32 x 4 elements as `be` computes it, the first factor of an adapter.

    The first half of its terms is positive, the others all but cancel it."""
    rng = np.random.default_rng(seed)
    signs = np.where(np.arange(wide) < wide // 2, 1, -1)
    args = {
        n: Twin(tap, [a.astype(np.float32).astype(np.float64), a.astype(np.float32)])
        for n, tap, a in (
            ("y", "1.low", np.empty((32, 4))),
            ("x", "x", np.abs(rng.standard_normal((32, wide)))),
            ("w", "1.w", np.abs(rng.standard_normal((4, wide))) * signs),
        )
    }
    looking = watch.Forced([reference, be], "float32", Layout(PRESETS["qwen3-tiny"]))
    looking(Call("linear_fwd", {**args, "b": None}), lambda: None)
    return looking.rows[-1]


def multiplied(order: Any, of_term: float = 1.0) -> Any:
    """A backend that adds up the terms of a product one by one, in an order; the first weighs `of_term`."""

    def linear_fwd(y: Any, x: Any, w: Any, b: Any) -> None:
        terms = x[:, None, :] * w
        terms[..., 0] *= np.float32(of_term)
        y[...] = np.cumsum(order(terms), 2, dtype=np.float32)[..., -1]

    return overlay(cpu, linear_fwd=linear_fwd)


@pytest.mark.parametrize(
    "order", [lambda t: t, lambda t: t[..., ::-1], lambda t: t[..., np.random.default_rng(0).permutation(64)]],
    ids=["in order", "backwards", "at random"],
)  # fmt: skip
def test_a_product_of_few_elements_may_be_summed_in_any_order(order: Any) -> None:
    assert max(product_of_few(multiplied(order), seed).ratio for seed in range(60)) < 0.9
    assert not product_of_few(multiplied(order, 1.0001), 0).ok


def within_adapters(be: Any, seed: int) -> dict[str, ArrayComparison]:
    """What is said of the products of adapted_bwd_a and adapted_bwd_b of few tokens, as `be` computes them.

    The first half of the terms of those with few elements is positive, the others all but cancel it."""
    rng, (n, wide, rank) = np.random.default_rng(seed), (32, 64, 4)
    x, low, a = (rng.standard_normal(s) for s in ((n, wide), (n, rank), (rank, wide)))
    x, a = np.abs(x), np.abs(a) * np.where(np.arange(wide) < wide // 2, 1, -1)
    b = np.ascontiguousarray(a.T)
    calls = {
        "adapted_bwd_a": {"u": 0 * low, "da": 0 * a, "x": x, "du": low, "a": a},
        "adapted_bwd_b": {"du": 0 * low, "db": 0 * b, "dy": x, "u": low, "b": b},
    }
    rows: dict[str, ArrayComparison] = {}
    for op, arrays in calls.items():
        looking = watch.Forced([reference, be], "float32", Layout(PRESETS["qwen3-tiny"]))
        looking.stage = "backward"
        args: dict[str, Any] = {
            k: Twin(k, [v.astype(np.float32).astype(np.float64), v.astype(np.float32)])
            for k, v in arrays.items()
        }
        looking(Call(op, args | {"factor": 2.0}), lambda: None)
        rows |= {f"{op}.{r.tap}": r for r in looking.rows}
    return rows


def added_one_by_one(skip: int = 0) -> Any:
    """A backend whose adapters add in float32, term by term, without the last `skip`."""

    def product(x: Any, w: Any) -> Any:
        terms = x[:, None] * w
        return np.cumsum(terms[..., : terms.shape[2] - skip], axis=2, dtype=np.float32)[..., -1]

    def adapted_bwd_a(u: Any, da: Any, x: Any, du: Any, a: Any, factor: float) -> None:
        u[...] = product(x, a)
        da += np.float32(factor) * product(du.T, x.T)

    def adapted_bwd_b(du: Any, db: Any, dy: Any, u: Any, b: Any, factor: float) -> None:
        du[...] = product(dy, b.T)
        db += np.float32(factor) * product(dy.T, u.T)

    return overlay(cpu, adapted_bwd_a=adapted_bwd_a, adapted_bwd_b=adapted_bwd_b)


def test_products_within_ops_are_judged_as_those_that_are_ops():
    """A GPU adds in another order, and NumPy's own error of so few elements is a matter of luck."""
    taps = {"adapted_bwd_a.u", "adapted_bwd_a.da", "adapted_bwd_b.du", "adapted_bwd_b.db"}
    for seed in range(100):
        sound = within_adapters(added_one_by_one(), seed)
        assert set(sound) == taps
        assert max(r.err / r.tol for r in sound.values()) <= 1, seed
    for seed in range(5):
        assert min(r.err / r.tol for r in within_adapters(added_one_by_one(1), seed).values()) > 100
