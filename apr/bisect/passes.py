"""Run a training step op by op: each op on the reference's inputs (forced), and on the side's own (free)."""

from __future__ import annotations

import numpy as np

from ..backends import reference
from ..model.config import ModelConfig
from ..model.lora_dropout import Draws
from ..model.optim import OPTIMIZERS, Optimizer
from ..model.transformer import Model
from . import rule
from .lockstep import PERIOD, fill_with_noise, join, join_optimizers
from .pieces import in_parallel, in_pieces, norm_of
from .side import Batch
from .watch import Forced, Free

LR, CLIP, DECAY, STEPS = 0.003, 0.5, 0.1, 2  # of an optimizer step: CLIP is a share of the gradients' norm
SEED = 0x5EED0123456789  # of dropout: both words of its key count


def _beside(judged: Model, cfg: ModelConfig, be: rule.Backend, shape: tuple[int, int], dtype: str) -> Model:
    """Build a model on another backend to run in lockstep with `judged`, on batches of `shape`."""
    rows = min(judged.loss_rows, shape[0] * shape[1])
    return Model(
        cfg, in_parallel(be), *shape, dtype=dtype, train=judged.train, loss_rows=rows, recompute=judged.recompute,
        z_loss=judged.z_loss, document_end=judged.document_end, act_again=judged.act_again,
        lora=judged.adapters.config if judged.adapters else None,
    )  # fmt: skip


def passes(both: Model, watch: Forced | Free, batch: Batch) -> None:
    """Forward, loss and, of a model that trains, backward of a batch, watched; with dropout an evaluation before it."""
    watch.stage, draws = "forward", None
    if both.train and both.adapters and both.adapters.dropout:
        draws = Draws.of(SEED, 1, 0, len(batch.ids))
        both.forward(batch.ids)
    both.forward(batch.ids, draws=draws)
    watch.stage = "loss"
    both.loss(batch.targets, 1 / batch.count if both.train else None)
    if both.train:
        watch.stage = "backward"
        both.backward()


def forced(truth: ModelConfig, judged: Model, batch: Batch, optimizer: bool) -> Forced:
    """Every op of a step with the reference's inputs."""
    model = _beside(judged, truth, reference, batch.shape, "float64")
    watch = Forced([model.be, judged.be], judged.dtype, model.layout)
    both = join([model, judged], watch)
    watch.begin(both)
    passes(both, watch, batch)
    if optimizer:
        watch.stage = "backward"
        _crowded_ids(both, batch)
        if not both.adapters:
            _begun(both)
        watch.stage = "loss"
        _edge_targets(both, batch)
        watch.stage, norm = "optimizer", norm_of(model.g)
        for number, kind in enumerate(OPTIMIZERS.values()):
            _one_step(kind, both, [model, judged], norm, own_gradients=number == 0)
    return watch


def _crowded_ids(both: Model, batch: Batch) -> None:
    """Add up the embedding's gradient for ids as no text has them: one id at two places of three, all others once."""
    n, scratch = batch.ids.size, both._at(*batch.shape)[1]
    ids = np.arange(n, dtype=np.int32) % both.cfg.vocab_size
    ids[np.arange(n) % 3 > 0] = batch.ids.flat[0]
    both.be.from_host(scratch.ids, ids)
    both.be.embedding_bwd(both.d.embed, scratch.dres, scratch.ids)


def _edge_targets(both: Model, batch: Batch) -> None:
    """Compute losses, of the logits as the pass left them, for the first and the last ids of the vocabulary, and for rows
    that are ignored."""
    s, rows = both._at(*batch.shape)[1], min(both.loss_rows, batch.ids.size)
    kept = batch.targets.reshape(-1)
    edges = np.resize(np.array([-1, 0, 1 - both.cfg.vocab_size], np.int32) % both.cfg.vocab_size, kept.size)
    both.be.from_host(s.targets, np.where(kept < 0, kept, edges).astype(np.int32))
    logits = both._logits[:rows, : both.cfg.vocab_size]
    both.be.cross_entropy(s.loss[:rows], logits, s.targets[:rows], 1.0, both.z_loss)
    both.be.from_host(s.targets, kept)


def _begun(both: Model) -> None:
    """Compute the last gradient of a block again, as the first micro-batch of a step does: over what was there."""
    block, s = both._at(both.b, both.t)[0][0], both._at(both.b, both.t)[1]
    g, w = both.d.layer[0].wqkv, both.p.layer[0].wqkv
    both.be.linear_bwd(s.dnorm, g, None, s.dqkv, block.norm1, w, False)


def _one_step(
    kind: type[Optimizer], both: Model, models: list[Model], norm: float, own_gradients: bool
) -> None:
    """Run the third step of an optimizer, with state that is not zero and clipping that bites.

    own_gradients: of the pass before; otherwise another optimizer's step has cleared them, and noise takes their place.
    """
    opts = [kind.of(m, weight_decay=DECAY, grad_clip=CLIP) for m in models]
    joined = join_optimizers(both, opts)
    joined.grad_clip, joined.steps = CLIP * norm, STEPS
    for name, power in joined.moments.items():
        fill_with_noise(joined.state[name], models[1].be, 0.1 * norm, power)
    if not own_gradients:
        fill_with_noise(joined.g, models[1].be, norm, 1)
    joined.master.sides[0][...] = models[0].w
    if joined.master.sides[1] is not models[1].w:
        models[1].be.from_host(joined.master.sides[1], models[0].w.astype(joined.master.sides[1].dtype))
    joined.step(LR)
    # Gradients that are not too large.
    both.be.clip_factor(joined.factor, joined.sum_sq, 2 * norm)


def free(truth: ModelConfig, judged: Model, weights: np.ndarray, batch: Batch) -> Free:
    """Every op of a step as errors pile up, and how far rounding alone moves the reference: plain NumPy at that
    precision, and the reference in float64 whose weights, and so its inputs, are off by one rounding."""
    low = "bfloat16" if judged.dtype == "bfloat16" else "float32"
    models = [
        _beside(judged, truth, be, batch.shape, dtype)
        for be, dtype in ((reference, "float64"), (rule.plain(low)[-1], low), (reference, "float64"))
    ]
    block = np.random.default_rng(1).choice([-0.5, 0.5], PERIOD)

    def fill(at: slice) -> None:
        sent = weights[at].astype(judged.dtype).astype(np.float64)
        moved = sent * (1 + rule.EPS[low] * np.resize(np.roll(block, at.start % PERIOD), sent.size))
        for m, values in zip(models, (sent, sent, moved), strict=True):
            m.w[at] = values

    in_pieces(fill, weights.size)
    models.append(judged)
    watch = Free([m.be for m in models], judged.dtype, judged.layout)
    both = join(models, watch)
    if judged.train:
        judged.be.fill(judged.g, 0)
    judged.be.fill(judged.total, 0)
    passes(both, watch, batch)
    return watch
