"""Let a model in training continue a prompt."""

from __future__ import annotations

from ..inference.generate import generate
from ..inference.sampling import drawable_ids
from ..model.transformer import Model
from .inputs import Inputs


def sample_text(i: Inputs, model: Model, prompt: str, tokens: int) -> str:
    """Return prompt and continuation, drawn with temperature 0.7 and top-p 0.95, seed of the run."""
    # As a document of the training data begins.
    ids = [*i.train.shards.prefix_ids, *i.tokenizer.encode(prompt)] or [i.tokenizer.eos_id or 0]
    ends = () if i.tokenizer.eos_id is None else (i.tokenizer.eos_id,)
    among = drawable_ids(i.tokenizer, i.cfg.vocab_size, ends)
    new = generate(
        i.cfg,
        i.backend,
        model.adapters or model.w,
        ids,
        tokens,
        0.7,
        0,
        0.95,
        i.settings.seed,
        ends,
        model.dtype,
        among,
    )
    return prompt + i.tokenizer.decode(list(new), skip_special=True)
