"""Let a model in training continue a prompt."""

from __future__ import annotations

from ..inference.generate import generate
from ..model.transformer import Model
from .inputs import Inputs


def sample_text(i: Inputs, model: Model, prompt: str, tokens: int) -> str:
    """Return prompt and continuation, drawn with temperature 0.7 and top-p 0.95, seed of the run."""
    ids = list(i.tokenizer.encode(prompt)) or [i.tokenizer.eos_id or 0]
    new = generate(
        i.cfg, i.backend, model.w, ids, tokens, 0.7, 0, 0.95, i.settings.seed, i.tokenizer.eos_id, model.dtype
    )
    return prompt + i.tokenizer.decode(list(new), skip_special=True)
