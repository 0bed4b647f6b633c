"""Offer apr's models to EleutherAI's lm-evaluation-harness, under the name "apr".

    python -m apr.evaluation.lm_eval run --model apr --model_args pretrained=runs/demo/ckpt/epoch-010.apr --tasks arc_easy

is the harness's own command line with this model known to it. In Python: lm_eval.simple_evaluate(model=AprLM(path), ...).
Needs lm_eval, the extra lm-eval.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ..common.errors import AprError, Refused, UsageError
from ..common.packages import pip_install
from ..common.printable import printable
from ..common.units import plural
from ..inference.chat import no_template
from ..inference.generate import generate
from ..inference.sampling import drawable_ids
from ..tokenizer.chat_template import ChatTemplate
from ..tokenizer.tokenizer import Tokenizer
from .choices import behind, encode_pair, pair_window
from .humaneval import continuation
from .score import Opened, Scorer, Window, fitting, open_model, prefix_ids

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as e:
    raise UsageError(f"lm-evaluation-harness cannot be loaded ({e}): {pip_install('lm_eval')}") from None

NEW_TOKENS = 256  # of a task that does not say
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING = {"until", "do_sample", "temperature", "top_p", "top_k", *LENGTHS}


def rolling_windows(ids: Sequence[int], prefix: int, seq: int) -> Iterator[Window]:
    """Cut windows that score every token of a text once, the first behind `prefix`; all but the first are as long as the model
    reads, so the last one reads again what the one before it scored (get_rolling_token_windows of the harness with
    context_len 1)."""
    done = min(seq, len(ids))
    if done:
        yield Window(np.array([prefix, *ids[:done]], np.int32))
    while done < len(ids):
        end = min(done + seq, len(ids))
        yield Window(np.array(ids[end - seq - 1 : end], np.int32), seq - (end - done))
        done = end


class AprLM(LM):
    """A checkpoint of apr, or a Hugging Face folder, for the harness.

    pretrained: an .apr file or a folder, or one that is open.
    device, dtype, threads, backend, tokenizer: as apr eval takes them. batch_size: rows
    at once, or "auto". max_length: tokens that the model reads at once (default: all its positions). add_bos_token: what
    the tokenizer puts before a text stands before every context (default), or not. seed: of sampled generation.
    Raises AprError; UsageError for an argument that is not one of these."""

    def __init__(
        self,
        pretrained: str | Opened,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str | None = None,
        max_length: int | None = None,
        add_bos_token: bool = True,
        threads: int | None = None,
        backend: str | None = None,
        tokenizer: str | None = None,
        seed: int = 42,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise UsageError(
                f"{', '.join(map(repr, unknown))}: not an argument of the model 'apr'; see docs/eval.md"
            )
        opened = pretrained if isinstance(pretrained, Opened) else None
        self._opened: Opened = opened or open_model(
            str(pretrained), device or "auto", None if dtype == "auto" else dtype, threads, backend, tokenizer
        )
        self._tokenizer: Tokenizer = self._opened.need_tokenizer()
        self._before = prefix_ids(self._tokenizer, "auto" if add_bos_token else "none")
        self._alone = next(iter(prefix_ids(self._tokenizer, "auto")), self._tokenizer.eos_id)
        self._length = int(max_length or self._opened.cfg.max_position_embeddings)
        batch = None if batch_size is None or str(batch_size).startswith("auto") else int(batch_size)
        if batch is None and max_batch_size is not None:
            batch = int(max_batch_size)
        self._batch, self._seed = batch, seed
        self._scorers: dict[int, Scorer] = {}

    @property
    def tokenizer_name(self) -> str:
        """Key of the harness's cache of requests."""
        return self._tokenizer.sha256

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at once."""
        return self._length

    @cached_property
    def _template(self) -> ChatTemplate:
        found = self._opened.loaded.template()
        if found is None:
            raise no_template(self._opened.loaded.source)
        return found

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the text of the checkpoint's template, for the log; "" where none is to be applied.

        Raises Refused: no template; UsageError: a template by name."""
        if isinstance(chat_template, str) and chat_template not in ("", "default"):
            raise UsageError(
                f"--apply_chat_template {chat_template}: apr applies the checkpoint's default template; leave the name out"
            )
        return self._template.text if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render messages as the context of a request; without add_generation_prompt the last message stays open.

        A template that refuses is tried without the system message, as the harness does. Raises Refused."""
        template = self._template
        try:
            text = template.render(chat_history, add_generation_prompt)
        except Refused:
            chat_history = [m for m in chat_history if m["role"] != "system"]
            text = template.render(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        at = text.rfind(last.strip())
        if at < 0:
            raise Refused(
                f"{template.source}: its chat template does not show the last message, {last[:40]!r}"
            )
        kept = last.lstrip() if text.startswith(last.lstrip(), at) else last.strip()
        return text[: at + len(kept)]

    def _scorer(self, windows: Sequence[Window]) -> Scorer:
        """Make or reuse a scorer for windows of these lengths."""
        seq = fitting(windows, self._length)
        if seq not in self._scorers:
            self._scorers = {seq: Scorer(self._opened, seq, self._batch)}
        return self._scorers[seq]

    def _remember(self, kind: str, requests: Sequence[Any], results: Sequence[Any]) -> None:
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial(kind, request.args, result)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score each continuation behind its context: (log-probability in nats, True if greedy decoding gives it)."""
        windows = []
        for request in requests:
            context, following = request.args[:2]
            before = self._before if context else []
            pair = encode_pair(self._tokenizer, context, following, before, self._alone, marked=True)
            windows.append(pair_window(*pair, self._length, repr(following[:40]))[0])
        scored = self._scorer(windows).score(windows, greedy=True)
        results = [(-float(s.losses.sum()), bool(s.greedy)) for s in scored]
        self._remember("loglikelihood", requests, results)
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Compute the log-probability in nats of whole texts, the first token behind the id that begins a text."""
        if self._alone is None:
            raise Refused(
                f"{self._tokenizer.source}: no id that begins or ends a text to stand before the first token"
            )
        windows: list[Window] = []
        counts = []
        for request in requests:
            ids = [int(i) for i in self._tokenizer.encode_marked(request.args[0])]
            own = list(rolling_windows(ids, self._alone, self._length))
            windows += own
            counts.append(len(own))
        scored = self._scorer(windows).score(windows)
        results = [sum(-float(next(scored).losses.sum()) for _ in range(n)) for n in counts]
        self._remember("loglikelihood_rolling", requests, results)
        return results

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate text behind each context up to the first of its stop strings, or what ends a text, be it an id or spelled
        out; neither is part of the text."""
        results = []
        for number, request in enumerate(requests):
            context, options = request.args[:2]
            results.append(self._generate(context, dict(options), self._seed + number))
        self._remember("generate_until", requests, results)
        return results

    def _generate(self, context: str, options: dict[str, Any], seed: int) -> str:
        o, tokenizer = self._opened, self._tokenizer
        unknown = sorted(set(options) - SAMPLING)
        if unknown:
            raise UsageError(
                f"generation option {unknown[0]!r} = {options[unknown[0]]!r}: apr does not have it"
            )
        stop = options.get("until") or []
        stop = [s for s in ([stop] if isinstance(stop, str) else stop) if s]
        ends, special = set(o.loaded.end_ids()), tokenizer.special_tokens()
        # Special tokens are no part of a decoded text: where a stop string names one, its id is the stop.
        ends |= {i for i, text in special.items() if any(s in text for s in stop)}
        stop += [text for i in sorted(o.loaded.end_ids()) if (text := tokenizer.decode([i]))]
        most = int(next((options[k] for k in LENGTHS if options.get(k) is not None), NEW_TOKENS))
        temperature = float(options.get("temperature") or 0.0)
        if options.get("do_sample") is False:
            temperature = 0.0
        elif options.get("do_sample") and not temperature:
            temperature = 1.0
        room = self._length - most
        if room < 1:
            raise UsageError(
                f"max_gen_toks = {most}: must be less than the {plural(self._length, 'token')} that the model reads"
            )
        ids = behind(self._before, tokenizer.encode_marked(context).tolist()) or [*self._prefix()]
        ids = ids[-room:]
        stream = generate(
            o.cfg, o.backend, o.weights, ids, most,
            temperature=temperature, top_k=int(options.get("top_k") or 0), top_p=float(options.get("top_p") or 1.0),
            seed=seed, eos_id=ends, dtype=o.dtype,
            among=drawable_ids(tokenizer, o.cfg.vocab_size, ends),
        )  # fmt: skip
        return continuation(tokenizer, ids, stream, stop)[0]

    def _prefix(self) -> list[int]:
        if self._alone is None:
            raise Refused(
                f"{self._tokenizer.source}: an empty context needs an id that begins or ends a text"
            )
        return [self._alone]


register: Callable[[type], type] = register_model("apr")
register(AprLM)


def main() -> None:
    """Run the harness's command line, to which the model "apr" is known."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except AprError as e:
        print(printable(f"apr: {e}"), file=sys.stderr)
        sys.exit(e.exit_code)


if __name__ == "__main__":
    main()
