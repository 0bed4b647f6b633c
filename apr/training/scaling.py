"""Speed of several GPUs that train together, computed before anything starts: a timeline of one step, bucket by bucket.

What is built is what is computed: gradients of a bucket go from every GPU straight to their owners, over NVLink within a node and
over the network between nodes, while the layers before it are computed; owners add them; weights are gathered behind the update.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..model.lora import AdapterLayout
from ..model.params import Layout
from ..ranks.shard import Cut
from .buckets import completed

# Measured on two H200s on NVLink (bench/gpu/ranks.json). Bytes a second that a GPU sends by copy engines, and reads and writes in
# its own memory; seconds before the bytes of a bucket begin to move; share of the time in which bytes move beside products that
# products take longer; times that a sum takes longer beside them; share of the rate of products that a step comes to; bytes of
# its own memory that a GPU moves for each weight that it updates, norm and zeroing included; share of a step that is spent in
# waiting for the slower GPU.
SENT, MOVED, BEGINS, SLOWS, BESIDE, SHARE, UPDATE, WAITS = 326e9, 4.3e12, 40e-6, 0.4, 1.48, 0.7, 44, 0.01
# Assumed, since no network and no more than two GPUs were there: what of a network's rate is used, seconds of its messages, and
# waiting among several machines.
USED, MESSAGE, WAITS_FAR = 0.85, 30e-6, 0.015
# Gbit/s of the network for each GPU, where --network-gbits does not say
GBITS = 400.0


@dataclass(frozen=True)
class Step:
    """Seconds of a step of several GPUs; alone: of the same step of one, which has no others to add."""

    alone: float
    computing: float
    slowed: float
    exposed: float
    sums: float
    update: float
    gather: float
    waiting: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return sum(x for name, x in vars(self).items() if name != "alone")

    @property
    def efficiency(self) -> float:
        """Tokens a second of a GPU beside those of one alone."""
        return self.alone / self.seconds


def step(
    layout: Layout | AdapterLayout, seconds: float, gpus: int, nodes: int = 1, *, gbits: float = GBITS, micro_steps: int = 1,
    backward: float = 2 / 3, bytes_of_a_weight: int = 2,
) -> Step:  # fmt: skip
    """Compute a step of `micro_steps` micro-batches a GPU. seconds: of one of them; backward: share of its backward pass"""
    ready, borders = completed(layout)
    cut = Cut(layout.size, layout.decayed, gpus, borders)
    alone = UPDATE * layout.size / MOVED
    if gpus == 1:
        return Step(micro_steps * seconds + alone, micro_steps * seconds, 0.0, 0.0, 0.0, alone, 0.0, 0.0)
    near, network = gpus // nodes, gbits / 8 * 1e9 * USED

    def moved(each: int) -> float:
        """Seconds in which every GPU sends `each` bytes to every other one."""
        far = each * (gpus - near) / network + MESSAGE if nodes > 1 else 0.0
        return BEGINS + max(each * (near - 1) / SENT, far)

    layers = max([0, *(1 + n for b in cut.buckets if (n := ready(b)) is not None)])
    # The head's part of the backward pass comes first, that of the embedding is the end.
    of_backward = backward * seconds
    of_layer = of_backward / (layers + 0.4)
    free = busy = sums = 0.0
    # Pieces are added one after the other, each of three streams; the first of a step takes the place of what was there.
    streams = 3 * (gpus - 1 / micro_steps)
    for b in cut.buckets:
        layer, time = ready(b), moved(4 * b.each)
        begins = of_backward if layer is None else of_layer * (0.4 + layers - layer)
        free = max(free, begins) + time
        busy += time if layer is not None else 0.0
        sums += (BESIDE if layer is not None else 1.0) * 4 * b.each * streams / MOVED
    exposed = max(0.0, free - of_backward)
    found = Step(
        micro_steps * seconds + alone,
        micro_steps * seconds,
        micro_steps * SLOWS * min(busy, of_backward),
        micro_steps * exposed,
        micro_steps * sums,
        UPDATE * cut.length / MOVED,
        sum(moved(bytes_of_a_weight * b.each) for b in cut.buckets),
        0.0,
    )
    return Step(**{**vars(found), "waiting": (WAITS_FAR if nodes > 1 else WAITS) * found.seconds})


def described(s: Step, gpus: int, nodes: int, gbits: float, rate: float) -> list[tuple[str, str]]:
    """Say what is computed, from what: rows of a table. rate: FLOP/s of this device, measured now"""
    parts = {
        "computing": s.computing, "slower meanwhile": s.slowed, "exchange that nothing hides": s.exposed, "sums": s.sums,
        "update": s.update, "gathering weights": s.gather, "waiting": s.waiting,
    }  # fmt: skip
    where = f"{gpus} GPUs" + (f" on {nodes} nodes" if nodes > 1 else "")
    assumed = []
    if nodes > 1:
        assumed.append(f"{gbits:g} Gbit/s of network for each GPU, {USED:.0%} of it used (--network-gbits)")
    if gpus // nodes > 2:
        assumed.append("NVLink as fast among more than two")
    if gpus > 2 or nodes > 1:
        assumed.append(f"{WAITS_FAR if nodes > 1 else WAITS:.1%} of waiting")
    measured = (
        f"{rate / 1e12:.0f} TFLOP/s here, now; on two H200s a step at {SHARE:.0%} of it, {SENT / 1e9:.0f} GB/s between GPUs, "
        f"{MOVED / 1e12:.1f} TB/s within one, {WAITS:.0%} of waiting"
    )
    return [
        ("efficiency", f"{s.efficiency:.1%} of {where} that train alone, computed"),
        ("step", f"{1e3 * s.seconds:.1f} ms: " + ", ".join(f"{1e3 * x:.1f} {n}" for n, x in parts.items())),
        ("measured", measured),
        ("assumed", "; ".join(assumed) or "nothing, on H200s"),
    ]
