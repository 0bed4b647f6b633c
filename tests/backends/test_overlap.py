"""Products that run beside other ops change no bit, however late they are done: nothing that they read is written before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from apr import backends
from apr.backends import overlay
from apr.backends.contract import OPS, PLUMBING
from apr.backends.cuda.overlap import Overlap
from apr.model.lora import lora_config
from apr.model.presets import PRESETS
from apr.model.transformer import Model

NAMES = [name for name in PRESETS if name.endswith("-tiny")]


class Late:
    """A second stream that does nothing before the first one waits for it."""

    def __init__(self) -> None:
        self.asked: list[Callable[[], None]] = []
        self.done = self.waits = 0

    def fork(self) -> None:
        pass

    def mark(self) -> int:
        return len(self.asked)

    def wait(self, event: int) -> None:
        self.waits += 1
        for product in self.asked[self.done : event]:
            product()
        self.done = max(self.done, event)


def late_backend() -> tuple[Any, Overlap, Late]:
    be, late = backends.get("cpu"), Late()
    overlap = Overlap(late, lambda x: int(x.ctypes.data))

    def linear_bwd(dx: Any, dw: Any, db: Any, dy: Any, x: Any, w: Any, adds: bool) -> None:
        def product(on_second: bool) -> None:
            def do() -> None:
                be.linear_bwd(np.empty_like(dx), dw, None, dy, x, w, adds)

            late.asked.append(do) if on_second else do()

        if dw is not None:
            overlap.run(product, dw, dy, x)
        overlap.before((dx, db), (dy, w))
        be.linear_bwd(dx, None, db, dy, x, w, adds)

    def ordered(name: str) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            overlap.before_call(name, args, more)
            return getattr(be, name)(*args, **more)

        return call

    functions = {name: ordered(name) for name in (*OPS, *PLUMBING)}
    return overlay(be, **{**functions, "linear_bwd": linear_bwd}), overlap, late


def gradients(name: str, be: Any, overlap: Overlap | None, **options: Any) -> np.ndarray:
    cfg = PRESETS[name]
    model = Model(cfg, be, 2, 12, **options)
    host = np.zeros(model.layout.size, np.float32)
    model.layout.randomise(host, 3)
    if model.adapters is not None:
        model.adapters.set_base(model.layout.named(host).__getitem__)
        values = np.random.default_rng(5).standard_normal(model.adapters.layout.size)
        model.adapters.w[:] = values.astype(np.float32)
    else:
        model.w[:] = host
    rng = np.random.default_rng(1)
    for begins in (True, False):
        ids, targets = rng.integers(0, cfg.vocab_size, (2, 2, 12), dtype=np.int32)
        if overlap is None:
            model.micro_step(ids, targets, 0.01, False, begins)
            continue
        with overlap.allowed():
            model.micro_step(ids, targets, 0.01, False, begins)
    return np.array(model.g)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [{}, {"folds": True}, {"recompute": True, "loss_rows": 7}, {"lora": lora_config(2, None, None)}],
)
def test_no_bit_changes(name: str, options: dict[str, Any]) -> None:
    be, overlap, late = late_backend()
    plain = gradients(name, backends.get("cpu"), None, **options)
    assert gradients(name, be, overlap, **options).tobytes() == plain.tobytes()
    assert late.done == len(late.asked)
    assert not overlap.running
    if "lora" in options:
        assert not late.asked
    else:
        # products of several ops are under way at once
        assert 0 < late.waits < len(late.asked)


def forgetful(side: int) -> Callable[..., Any]:
    """Overlap.before without what an op writes (0) or reads (1)."""
    before = Overlap.before

    def call(self: Overlap, *sides: Any) -> None:
        before(self, *([] if i == side else x for i, x in enumerate(sides)))

    return call


@pytest.mark.parametrize(
    ("fault", "options"),
    [
        ({"before": forgetful(0)}, {}),
        ({"before": forgetful(1)}, {"folds": True}),
        ({"join": lambda self: None}, {"folds": True}),
        ({"_bytes": lambda self, arrays: []}, {}),
    ],
)
def test_an_op_that_does_not_wait_is_seen(
    fault: dict[str, Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = gradients("qwen2-tiny", backends.get("cpu"), None, **options)
    for name, wrong in fault.items():
        monkeypatch.setattr(Overlap, name, wrong)
    be, overlap, _ = late_backend()
    assert gradients("qwen2-tiny", be, overlap, **options).tobytes() != plain.tobytes()


def test_nothing_overlaps_outside_a_recorded_pass() -> None:
    be, overlap, late = late_backend()
    gradients("qwen2-tiny", be, None)
    assert not late.asked

    def fails() -> None:
        x = np.ones((4, 4), np.float32)
        with overlap.allowed():
            be.linear_bwd(x.copy(), x.copy(), None, x, x, x, False)
            assert overlap.running
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fails()
    assert not overlap.running
