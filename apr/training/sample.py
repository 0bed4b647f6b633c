"""Let a model in training continue a prompt."""

from __future__ import annotations

import numpy as np

from ..common.events import Sampled
from ..common.finding import Finding
from ..inference import again
from ..inference.generate import generate
from ..inference.sampling import Sampling, drawable_ids
from ..model.transformer import Model
from .inputs import Inputs

# Of --sample: temperature and top-p.
TEMPERATURE, TOP_P = 0.7, 0.95


def sample_text(i: Inputs, model: Model, prompt: str, tokens: int, step: int) -> tuple[str, Sampled]:
    """Return prompt and continuation, drawn with temperature 0.7 and top-p 0.95, seed of the run; and the event to emit when it
    is written: whether its first tokens are drawn again by a pass of the model without a cache."""
    # As a document of the training data begins.
    ids = [*i.train.shards.prefix_ids, *i.tokenizer.encode(prompt)] or [i.tokenizer.eos_id or 0]
    ends = () if i.tokenizer.eos_id is None else (i.tokenizer.eos_id,)
    among = drawable_ids(i.tokenizer, i.cfg.vocab_size, ends)
    new = list(
        generate(
            i.cfg,
            i.backend,
            model.adapters or model.w,
            ids,
            tokens,
            TEMPERATURE,
            0,
            TOP_P,
            i.settings.seed,
            ends,
            model.dtype,
            among,
        )
    )
    text = prompt + i.tokenizer.decode(new, skip_special=True)
    return text, Sampled(step, _again(model, ids, new, i.settings.seed, among))


def _again(model: Model, ids: list[int], new: list[int], seed: int, among: np.ndarray | None) -> Finding:
    """Draw the first tokens of a sample again, as many as the model in training has positions for."""
    most = model.seq + 1 - len(ids)
    # In training, attention stops at some id; generation reads over it, where such an id may be drawn.
    if model.be.asynchronous or most < 1 or model.document_end in ids:
        return Finding.skipped(again.NAME, "not asked of this prompt or device", again.BOUND)
    if model.document_end in new[:most]:
        most = new.index(model.document_end) + 1

    def logits_of(whole: np.ndarray, count: int) -> np.ndarray:
        model.forward(whole[None])
        return model.last_logits(count)

    sampling = Sampling(len(new) or 1, TEMPERATURE, 0, TOP_P, seed)
    # Weights under adapters are not those that compute.
    exact = None if model.adapters else again.one_pass(model.cfg, model.be, "float32", model.w)
    return again.drawn_again(logits_of, model.dtype, ids, new[:most], sampling, among, exact=exact)
