"""FLOPs and bytes of a job, before anything is allocated."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from ..common.errors import Refused
from ..common.host import available_memory
from .buffers import WIDE, plan_buffers
from .config import ModelConfig
from .families import layers_of
from .lora import AdapterLayout, LoraConfig
from .optim import AdamW, Optimizer
from .params import Layout
from .settings import ModelSettings

# Of the free memory, that a micro-batch chosen here may take.
FREE_SHARE = 0.8


def check_positions(c: ModelConfig, seq_length: int) -> None:
    """Raise Refused for sequences longer than the model has positions for."""
    if seq_length > c.max_position_embeddings:
        raise Refused(
            f"--seq-length {seq_length} is more than the model's max_position_embeddings = {c.max_position_embeddings}"
            f"{c.rope_scaling.beyond(c.max_position_embeddings) if c.rope_scaling else ''}; "
            f"give --seq-length {c.max_position_embeddings} or less"
        )


def matmul_parameters(c: ModelConfig) -> int:
    """Weights that take part in a matrix product for every token: all matrices, the head once, the
    embedding look-up not."""
    layer = sum(s.size for s in Layout(c).slots if s.layer is not None and len(s.shape) == 2)
    return layer + c.vocab_size * c.hidden_size


def attended(window: int, seq: int) -> float:
    """Keys a query sees, averaged over the positions of a sequence; window 0: all before it."""
    w = min(window or seq, seq)
    return (w * (w + 1) / 2 + (seq - w) * w) / seq


def flops_per_token(c: ModelConfig, seq: int, backward: bool = True, lora: LoraConfig | None = None) -> float:
    """Floating-point operations of matrix products per token: 2 per weight forward and 4 backward
    (Kaplan et al. 2020, section 2.1), and of q k^T and p v, 2 * 2 * H * D per key seen, likewise.

    Under adapters 2 per weight backward, for its input alone, 2 more of a head that is trained whole, and 4 for each element of
    A and B: their gradients, and the low-rank products that these follow from. Recomputed activations, masked scores and what
    is computed once a pass, as W + s B A, are not counted.
    """
    layers = Counter(layer.window for layer in layers_of(c))
    scores = sum(4 * n * c.num_heads * c.head_dim * attended(window, seq) for window, n in layers.items())
    if backward and lora:
        layout = AdapterLayout(c, lora)
        adapters = sum(p.a.size + p.b.size for p in layout.pairs)
        # A head that is trained whole has a gradient.
        head = "embed" if c.tie_word_embeddings else "head"
        heads = sum(s.size for s, _ in layout.saved if s.param.name == head)
        # What the gradient of the norms of DoRA is made of: each product once more.
        again = sum(p.base.size for p in layout.pairs if p.m)
        if lora.dropout:
            # Their products stand beside W's: forward, backward to the input, and du for it.
            adapters += sum(p.a.size + p.b.size for p in layout.dropped)
        return 4 * matmul_parameters(c) + 3 * scores + 4 * adapters + 2 * (heads + again)
    return (2 * matmul_parameters(c) + scores) * (3 if backward else 1)


@dataclass(frozen=True)
class Memory:
    """Bytes that a training or inference job takes on its device, by purpose."""

    weights: int = 0
    master: int = 0  # float32 copy of weights that are kept in bfloat16
    gradients: int = 0
    moments: int = 0
    base: int = 0  # weights that adapters leave as they are, in the format of --lora-base
    saved: int = 0  # kept by every layer for backward
    scratch: int = 0  # shared by all layers, rope tables and batch included
    logits: int = 0
    cache: int = 0  # keys and values of past positions
    copies: int = 0  # that saves are written from, where the device computes in main memory
    backend: int = 0  # work space of the backend, and what its driver keeps

    @property
    def total(self) -> int:
        """Sum of all, bytes."""
        return sum(vars(self).values())


def memory(
    c: ModelConfig,
    backend: ModuleType,
    batch: int,
    seq: int,
    dtype: str = "float32",
    train: bool = True,
    loss_rows: int | None = None,
    cache: int = 0,
    recompute: bool = False,
    optimizer: type[Optimizer] | None = AdamW,
    documents: bool = False,
    lora: LoraConfig | None = None,
    saves: bool = False,
    folds: bool = False,
    act_again: bool = False,
) -> Memory:
    """Bytes of a Model for batches of batch x seq tokens and, when it trains, of the optimizer of its weights or adapters.

    saves: with the copies that checkpoints and states are written from, where they lie in the memory of the device.
    folds: a step has several micro-batches. act_again: as of BufferPlan."""
    plan = plan_buffers(
        c, backend, batch, seq, loss_rows,
        dtype=dtype, train=train, recompute=recompute, cache=cache, documents=documents, folds=folds,
        lora=lora if train else None,
        act_again=act_again,
    )  # fmt: skip
    specs = list(plan.specs(c).values())
    if train and optimizer:
        layout = AdapterLayout(c, lora) if lora else Layout(c)
        specs += optimizer.specs(layout.size, WIDE[dtype] if lora else dtype).values()
    sums: dict[str, int] = {}
    for spec in specs:
        sums[spec.purpose] = sums.get(spec.purpose, 0) + spec.nbytes
    copies = save_copies(c, dtype, optimizer, lora) if train and optimizer and saves else 0
    return Memory(**sums, copies=0 if has_own_memory(backend) else copies, backend=backend.overhead())


def has_own_memory(backend: ModuleType) -> bool:
    """Tell the memory of a GPU from main memory."""
    return backend.name == "cuda"


def save_copies(c: ModelConfig, dtype: str, optimizer: type[Optimizer], lora: LoraConfig | None) -> int:
    """Bytes in main memory of the copies that a checkpoint and a state are written from: the weights that the optimizer
    updates and its state, and the weights that compute where these are others."""
    trained = AdapterLayout(c, lora) if lora else Layout(c)
    wide = WIDE[dtype]
    copies = (1 + len(optimizer.moments)) * trained.size * np.dtype(wide).itemsize
    return copies + (Layout(c).size * np.dtype(dtype).itemsize if lora or wide != dtype else 0)


def check_main_memory(backend: ModuleType, copies: int) -> None:
    """Raise Refused where main memory cannot hold the copies of what a GPU computes."""
    have = available_memory()
    if has_own_memory(backend) and have is not None and copies > have:
        raise Refused(
            f"a save is written from copies in main memory, {copies / 2**30:.2f} GiB, and {have / 2**30:.2f} GiB are free; "
            "use a smaller --model, or adapters (--lora-rank)"
        )


def matmul_rate(backend: ModuleType, dtype: str = "float32", repeats: int = 5) -> float:
    """FLOP/s of a large square matrix product on this device: the best of a few, about 0.1 s on a CPU."""
    size = 8192 if backend.name == "cuda" else 1024
    x, w, y = (backend.empty((size, size), dtype) for _ in range(3))
    host = np.random.default_rng(0).standard_normal((size, size), np.float32)
    for a in (x, w):
        backend.from_host(a, host)
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        backend.linear_fwd(y, x, w, None)
        backend.sync()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def check_fits(need: Memory, backend: ModuleType, advice: str) -> None:
    """Raise Refused when a job needs more memory than its device has, before anything is allocated."""
    have = backend.free_memory()
    if have is not None and need.total > have:
        activations = need.saved + need.scratch + need.logits + need.cache + need.backend
        weights = need.weights + need.base
        raise Refused(
            f"the job needs {need.total / 2**30:.2f} GiB of memory (weights {weights / 2**30:.2f}, gradients and "
            f"moments {(need.gradients + need.moments + need.master) / 2**30:.2f}, activations "
            f"{activations / 2**30:.2f}) and {have / 2**30:.2f} GiB are "
            f"free; {advice}"
        )


def choose_micro_batch(
    need: Callable[..., Memory],
    s: ModelSettings,
    backend: ModuleType,
    batch: int,
    ranks: int = 1,
    local: int = 1,
) -> int:
    """Choose the sequences computed at once: those asked for, or the largest divisor of the batch that fits. need: `needs`

    ranks: each gets a micro-batch, where nobody has asked for a size. local: of them, that share the memory.

    Raises Refused for a job that does not fit, with the options that would."""
    have = backend.free_memory()
    have = have and have // local
    divisors = [d for d in range(batch // min(ranks, batch), 0, -1) if batch % d == 0]
    if s.micro_batch_size:
        size = min(s.micro_batch_size, batch)
    else:
        fitting = (
            d for d in divisors if have is None or need(d, again=backend.act_again).total < FREE_SHARE * have
        )
        size = next(fitting, 1)
    if have is not None and need(size, again=True).total > have:
        check_fits(need(size), backend, advice(need, divisors, have, s.recompute))
    return size


def computes_act_again(need: Callable[..., Memory], backend: ModuleType, size: int) -> bool:
    """Decide whether backward computes `act` again: where that is cheap, or `size` sequences do not fit otherwise."""
    return fitted(lambda again: need(size, again=again), backend.free_memory(), backend.act_again)[1]


def needs(
    s: ModelSettings,
    cfg: ModelConfig,
    backend: ModuleType,
    batch: int,
    seq: int,
    lora: LoraConfig | None,
    optimizer: type[Optimizer],
    folds: bool = True,
) -> Callable[..., Memory]:
    """Describe a job's memory: a function of the sequences computed at once, and of what is computed again.

    folds: one process adds up several micro-batches, other than ranks, which exchange them"""

    def need(size: int, recompute: bool = s.recompute, again: bool = False) -> Memory:
        return memory(
            cfg, backend, size, seq, s.dtype or backend.dtypes[0],
            recompute=recompute, optimizer=optimizer, lora=lora, saves=True,
            folds=folds and size < batch, act_again=again,
        )  # fmt: skip

    return need


def fitted(need: Callable[[bool], Memory], have: int | None, cheap: bool) -> tuple[Memory, bool]:
    """Memory of a job, and whether it computes `act` again: where that is cheap, or it does not fit otherwise, and fits then."""
    for again in (True,) if cheap else (False, True):
        if have is None or need(again).total <= have:
            return need(again), again
    return need(cheap), cheap


def advice(need: Callable[..., Memory], sizes: list[int], have: int, recompute: bool) -> str:
    """Name the options with which a job fits: the largest micro-batch of `sizes`, without recomputation if possible."""
    for again in [False, True][recompute:]:
        size = next((d for d in sizes if need(d, again).total <= have), 0)
        if size:
            return f"{'--recompute ' if again else ''}--micro-batch-size {size} would fit"
    return "use a smaller --seq-length or --model"
