"""Parts of ranks: each element once, sums as one process makes them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from apr import backends
from apr.model.cost import memory
from apr.model.lora import LoraConfig
from apr.model.optim import AdamW
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.model.transformer import Model
from apr.ranks import shard as shards
from apr.ranks.shard import TILE, Cut, Shard
from apr.training.buckets import completed, layout_of
from apr.training.rank_memory import NCCL_BYTES, on_ranks
from apr.training.split import Split

SIZES = [
    (64, 64),
    (TILE, TILE - 64),
    (TILE + 64, TILE),
    (5 * TILE + 128, 5 * TILE + 64),
    (40 * TILE, 39 * TILE + 640),
]


def test_parts_are_cut_between_what_backends_sum_at_a_time():
    for tiles in (*backends.get("cpu").square_tiles.values(), (1 << 14, 1024), (1 << 14, 2048)):
        assert all(TILE % tile == 0 for tile in tiles)


@pytest.mark.parametrize("count", range(1, 10))
@pytest.mark.parametrize(("size", "decayed"), SIZES)
def test_parts_are_the_whole_once(size, decayed, count):
    for borders in ((), (TILE, TILE, 3 * TILE, 17 * TILE)):
        cut, owners = Cut(size, decayed, count, borders), np.zeros(size, int)
        taken = []
        for rank in range(count):
            runs = cut.runs(rank)
            taken.append(sum(flat.stop - flat.start for flat, _ in runs))
            local = np.zeros(cut.length, int)
            for flat, own in runs:
                owners[flat] += 1
                local[own] += 1
                assert flat.start % TILE == 0
                assert own.stop <= cut.decayed or flat.start >= cut.tail
            assert local.max(initial=0) <= 1
        assert (owners == 1).all()
        assert max(taken[1:] or [0]) <= -(-sum(taken) // count) + len(cut.buckets) * TILE
        assert cut.padded >= size
        # What a rank sends too much of one bucket is overwritten by the next, and the last has room.
        assert [b.stop for b in cut.buckets[:-1]] == [b.first for b in cut.buckets[1:]]


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "llama-tiny"])
def test_a_bucket_waits_for_the_layers_that_it_holds(name):
    """Every tensor in a bucket is complete when the bucket is exchanged."""
    layout = Layout(PRESETS[name])
    ready, borders = completed(layout)
    last, order = PRESETS[name].num_layers - 1, []
    for b in Cut(layout.size, layout.decayed, 2, borders).buckets:
        order.append(-1 if (layer := ready(b)) is None else layer)
        for s in layout.slots:
            if s.offset < b.stop and s.offset + s.size > b.first:
                of = s.layer if s.param.decay else None
                assert order[-1] == -1 or (of is not None and of >= order[-1])
    assert order == sorted(order, reverse=True)
    assert name == "llama-tiny" or order[0] == last
    # a border one tile later is found too late for one layer
    late = Cut(layout.size, layout.decayed, 2, [b + TILE for b in borders])
    assert name == "llama-tiny" or {ready(b) for b in late.buckets} != {
        ready(b) for b in Cut(layout.size, layout.decayed, 2, borders).buckets
    }


class Together:
    """Ranks in one process: calls of each are kept until all have made theirs."""

    def __init__(self, rank, count, arrays, even, shared):
        self.rank, self.count, self.arrays, self.even, self.shared = rank, count, arrays, even, shared

    def empty(self, be, size, dtype):
        return be.empty((size,), dtype)

    def beside(self):
        return nullcontext()

    def join(self):
        pass

    def exchange(self, out, x, starts, sizes):
        for r in range(self.count):
            first = starts[self.rank]
            out[r] = self.arrays[r][first : first + sizes[self.rank]]

    def gather(self, out, x, sizes):
        self.shared.setdefault(self.rank, {})[out.size] = x.copy()
        parts = [self.shared.get(r, {}).get(out.size, np.zeros(n, x.dtype)) for r, n in enumerate(sizes)]
        out[:] = np.concatenate(parts)


# Of many tiles the backend may join the sums in an order of its own.
@pytest.mark.parametrize("decayed", [3 * TILE + 128, 3 * TILE, 37 * TILE])
@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("at_a_time", [TILE, 1 << 22])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_folds_and_norms_have_the_bits_of_one_process(count, at_a_time, even, decayed, monkeypatch):
    monkeypatch.setattr(shards, "AT_A_TIME", at_a_time)
    be, rng, size = backends.get("cpu"), np.random.default_rng(0), decayed // TILE * TILE + 640
    cut = Cut(size, decayed, count, (TILE,) if even else ())
    arrays = np.zeros((count, cut.padded), np.float32)
    # Far apart, or all sums would be exact.
    scales = np.repeat(np.exp(6 * rng.standard_normal(size // TILE + 1)).astype(np.float32), TILE)[:size]
    arrays[:, :size] = scales * rng.standard_normal((count, size), np.float32)
    start = scales * rng.standard_normal(size, np.float32)
    want, parts = start.copy(), max(1, count - 1)
    for a in arrays[:parts]:
        want += a[:size]
    first = arrays[0, :size].copy()
    for a in arrays[1:parts]:
        first += a[:size]
    norm, weights = np.zeros(1), np.zeros(1)
    be.add_sum_sq(norm, want)
    for part in (want[:decayed], want[decayed:]):
        be.add_sum_sq(weights, part)
    shared, w = {}, np.zeros(cut.padded, np.float32)
    ranks = [Together(r, count, arrays, even, shared) for r in range(count)]
    made = [
        Shard(be, r, cut, w, np.zeros(cut.length, np.float32), np.zeros(count * cut.length, np.float32))
        for r in ranks
    ]
    got, begun = [s.take(start) for s in made], [s.take(start) for s in made]
    for s, total, anew in zip(made, got, begun, strict=True):
        for k in range(len(cut.buckets)):
            s.fold(k, total, arrays[s.ranks.rank], parts, False)
            s.fold(k, anew, arrays[s.ranks.rank], parts, True)
        assert total.tobytes() == s.take(want).tobytes()
        assert anew.tobytes() == s.take(first).tobytes()
    for _ in range(2):  # in the second round all have shared
        sums, of_weights = ([np.zeros(1) for _ in made] for _ in range(2))
        for s, x, y, total in zip(made, sums, of_weights, got, strict=True):
            s.add_gradients(x, total)
            s.add_weights(y, total)
    assert [x.tobytes() for x in sums] == [norm.tobytes()] * count
    assert [x.tobytes() for x in of_weights] == [weights.tobytes()] * count


@pytest.mark.parametrize("lora", [None, LoraConfig(4, 8.0, ("wq", "wo"))])
def test_memory_of_a_rank_is_what_the_plan_says(lora):
    be, cfg = backends.get("cpu"), replace(PRESETS["llama-demo"], num_layers=2)
    layout, first = layout_of(cfg, lora), be.memory()
    split = Split(Together(0, 2, None, True, {}), be, cfg, lora)
    model = Model(cfg, be, 2, 16, lora=lora, make_buffers=split.make_buffers)
    split.optimizer(model, AdamW)
    made = be.memory() - first
    planned = {}
    for count in (1, 2):
        describe = partial(memory, cfg, be, 2, 16, lora=lora)
        planned[count] = on_ranks(describe, layout, "float32", AdamW, count)()
    want = planned[2].total - planned[2].backend
    assert abs(made - want) <= 0.03 * want + (1 << 18)
    assert planned[2].moments < 0.8 * planned[1].moments or lora
    assert planned[2].backend - planned[1].backend == NCCL_BYTES
