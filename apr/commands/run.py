"""`apr run MODEL "prompt"`: generate text from a checkpoint."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..data.tokenizer import Tokenizer
from ..device import check_fits, select
from ..errors import Refused, UsageError
from ..flags import option, parse
from ..formats.models import load_model
from ..generate import generate
from ..loading import tokenizer_of, weights_on
from ..plan import memory


@dataclass(frozen=True)
class Flags:
    """Options of `apr run`."""

    model: str = option("an .apr file or a Hugging Face folder", positional=True)
    prompt: str = option("text to continue", "", positional=True)
    max_tokens: int = option("most new tokens", 128)
    temperature: float = option("0 always takes the most likely token", 0.8)
    top_k: int = option("draw from the k most likely tokens only; 0: from all", 0)
    top_p: float = option("draw from the fewest tokens that together have this probability", 1.0)
    seed: int = option("of the draws", 42)
    device: str = option("auto, cpu, cuda or cuda:N", "auto")
    dtype: str | None = option(
        "of weights and activations (default: bfloat16 on cuda, float32 on cpu)",
        choices=("float32", "bfloat16"),
    )
    threads: int | None = option("CPU threads (default: all cores)")
    json: bool = option("print one JSON document and nothing else", False)


def main(args: Sequence[str]) -> int:
    """Returns the exit code; errors are raised."""
    f = parse(Flags, args, "apr run", __doc__ or "")
    backend = select(f.device, f.dtype, f.threads)
    dtype = f.dtype or backend.dtypes[0]
    loaded = load_model(f.model)
    cfg, tokenizer = loaded.cfg, tokenizer_of(loaded)
    if tokenizer is None:
        raise Refused(f"{f.model}: no tokenizer in it; put tokenizer.json beside the weights")
    ids = [int(t) for t in tokenizer.encode(f.prompt, add_special_tokens=True)]
    if not ids:
        if tokenizer.eos_id is None:
            raise UsageError("an empty prompt needs a tokenizer with an end-of-text token; give some text")
        ids = [tokenizer.eos_id]  # what stands before every document
    cache = min(len(ids) + max(f.max_tokens, 1), cfg.max_position_embeddings)
    need = memory(cfg, backend, 1, min(len(ids), 256), dtype, train=False, loss_rows=1, cache=cache)
    check_fits(need, backend, "use a smaller model or fewer --max-tokens")
    weights = weights_on(backend, loaded, dtype)
    start = time.perf_counter()
    stream = generate(
        cfg, backend, weights, ids, f.max_tokens, f.temperature, f.top_k, f.top_p, f.seed, tokenizer.eos_id, dtype
    )  # fmt: skip
    new: list[int] = []
    for piece in _pieces(tokenizer, ids, stream, new):
        if not f.json:
            sys.stdout.write(piece)
            sys.stdout.flush()
    seconds = time.perf_counter() - start
    if f.json:
        text = tokenizer.decode(ids + new, skip_special=True)
        print(json.dumps({"text": text, "prompt_ids": ids, "ids": new, "tokens_per_sec": len(new) / seconds}))
    else:
        print()
    return 0


def _pieces(tokenizer: Tokenizer, prompt: list[int], stream: Iterator[int], new: list[int]) -> Iterator[str]:
    """Text as it grows, prompt first; half a character waits for its other half. Fills `new`."""
    shown = tokenizer.decode(prompt, skip_special=True)
    yield shown
    for token in stream:
        new.append(token)
        text = tokenizer.decode(prompt + new, skip_special=True)
        if text.startswith(shown) and not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    text = tokenizer.decode(prompt + new, skip_special=True)
    yield text[len(shown) :]
