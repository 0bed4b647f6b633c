"""Ask a checkpoint on a device for logits, losses, text and answers, and save it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, overload

import numpy as np

from .. import backends
from ..checkpoints.apr2 import write_apr
from ..checkpoints.apr2_metadata import config_to_metadata, embed_tokenizer
from ..checkpoints.checkpoint import HF_FILES, Checkpoint, no_tokenizer
from ..checkpoints.exporting import texts_for
from ..checkpoints.hf import write_hf
from ..checkpoints.names import FOLDER, check_name
from ..common.errors import Refused, UsageError
from ..common.units import plural
from ..model.cost import check_fits
from ..model.params import Layout
from ..model.transformer import Model
from ..tokenizer.chat_template import ChatTemplate, Message, answer_ends, chat_ids
from ..tokenizer.tokenizer import Tokenizer
from . import int8
from .chat import Conversation, check_messages, no_template
from .generate import (
    PROMPT_CHUNK_TOKENS,
    Generator,
    check_prompt,
    generator_memory,
    grouped,
    slots_needed,
)
from .ids import Ids, as_batch
from .portable import Portable
from .sampling import Continuation, Sampling, drawable_ids
from .streaming import Text, TextStream

MAX_BATCH_TOKENS = 4096  # computed at once for logits and losses
BATCH_PROMPTS = 8  # as many as the cpu backend computes with the bits of each prompt alone


class LanguageModel(Portable):
    """A checkpoint on a device, made by `load`: numbers, text and answers.

    config         sizes and switches of the model
    tokenizer      its tokenizer, or None
    chat_template  its chat template, or None
    ends           ids that end a text
    backend        the module that computes
    dtype          "float32" or "bfloat16", of activations
    weights        all parameters on the backend, flat (params.Layout order), or int8.Int8Weights
    """

    def __init__(self, checkpoint: Checkpoint, backend: ModuleType, dtype: str) -> None:
        self.checkpoint = checkpoint
        self.source, self.config = checkpoint.source, checkpoint.cfg
        rounded = dtype == "int8"
        self.backend = int8.backend(backend) if rounded else backend
        self.dtype = backend.dtypes[0] if rounded else dtype
        self.tokenizer: Tokenizer | None = checkpoint.tokenizer
        self.ends = checkpoint.end_ids()
        slots = min(PROMPT_CHUNK_TOKENS, self.config.max_position_embeddings)
        check_fits(
            generator_memory(self.config, backend, self.dtype, 1, slots), backend, "use a smaller model"
        )
        if rounded:
            host = checkpoint.on(backends.get("cpu"), "float32")
            self.weights: Any = int8.Int8Weights(self.config, host, backend)
        else:
            self.weights = checkpoint.on(backend, self.dtype)
        self._generator: Generator | None = None

    def __repr__(self) -> str:
        size = plural(Layout(self.config).num_parameters, "parameter")
        kind = "int8" if isinstance(self.weights, int8.Int8Weights) else self.dtype
        return f"<LanguageModel {self.source}: {self.config.family}, {size}, {kind} on {self.backend.name}>"

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """Chat template of the checkpoint, or None. Raises Refused: not a template."""
        return self.checkpoint.template()

    # Numbers

    def logits(self, ids: Ids) -> np.ndarray:
        """Compute logits of the token after each position, float32 (B,T,V); ids (B,T), or (T,) for B = 1.

        Raises UsageError for another shape, Refused for ids outside the vocabulary and more than the positions."""
        batch = as_batch(ids, self.config)
        out = np.empty((*batch.shape, self.config.vocab_size), np.float32)
        flat = out.reshape(-1, self.config.vocab_size)
        for rows, model in self._pieces(batch):
            done = rows.start * batch.shape[1]

            def keep(layer: int | None, name: str, array: Any) -> None:
                nonlocal done
                if name == "logits" or name.startswith("logits."):
                    part = self.backend.to_host(array)
                    flat[done : done + len(part)] = part
                    done += len(part)

            model.loss(np.full(batch[rows].shape, -100, np.int32), tap=keep)
        return out

    def loss(self, ids: Ids, targets: Ids | None = None) -> float:
        """Compute the mean cross-entropy of targets (B,T), or (T,), in nats/token; negative targets do not count.

        Without targets: of every token of ids (B,T+1) given those before it. Raises as `logits` does."""
        batch = as_batch(ids, self.config, 1 if targets is not None else 2)
        if targets is None:
            batch, wanted = batch[:, :-1], batch[:, 1:]
        else:
            wanted = np.asarray(targets)
            wanted = wanted[None] if wanted.ndim == 1 else wanted
            if wanted.shape != batch.shape or not np.issubdtype(wanted.dtype, np.integer):
                raise UsageError(
                    f"targets are {wanted.dtype} {wanted.shape}, not integers {batch.shape} as the ids"
                )
            if wanted.max() >= self.config.vocab_size:
                raise Refused(
                    f"target {wanted.max()} is outside the model's vocabulary of {self.config.vocab_size}"
                )
        count = int((wanted >= 0).sum())
        if not count:
            raise UsageError("no target is at least 0, so there is no loss to take the mean of")
        total = 0.0
        for rows, model in self._pieces(batch):
            self.backend.fill(model.total, 0)
            model.loss(np.maximum(wanted[rows], -1).astype(np.int32))
            total += float(self.backend.to_host(model.total)[0])
        return total / count

    def _pieces(self, batch: np.ndarray) -> Iterator[tuple[slice, Model]]:
        """Yield rows of a batch, and a model that has computed them."""
        n, seq = batch.shape
        rows = min(n, max(1, MAX_BATCH_TOKENS // seq))
        model = Model(
            self.config, self.backend, rows, seq, self.dtype, train=False, loss_rows=None, w=self.weights
        )
        for start in range(0, n, rows):
            part = slice(start, min(n, start + rows))
            model.forward(np.ascontiguousarray(batch[part]))
            yield part, model

    # Text

    @overload
    def generate(
        self, prompt: str, *, stream: Literal[True], stop: Sequence[str] = (), **options: Any
    ) -> Iterator[str]: ...
    @overload
    def generate(
        self, prompt: Ids, *, stream: Literal[True], stop: Sequence[str] = (), **options: Any
    ) -> Iterator[int]: ...
    @overload
    def generate(
        self, prompt: str, *, stream: Literal[False] = False, stop: Sequence[str] = (), **options: Any
    ) -> str: ...
    @overload
    def generate(
        self, prompt: Ids, *, stream: Literal[False] = False, stop: Sequence[str] = (), **options: Any
    ) -> list[int]: ...
    def generate(self, prompt: Any, *, stream: bool = False, stop: Sequence[str] = (), **options: Any) -> Any:
        """Continue a prompt: text for a text, ids for ids (with the end-of-text id, if one was drawn).

        stream: an iterator over pieces of text, or over ids, as they come. stop: strings that end the text and are not
        part of the text. options: of sampling.Sampling (max_tokens, temperature, top_k, top_p, min_p, repetition_penalty,
        seed). Raises UsageError for an option, Refused for a prompt that does not fit."""
        words = isinstance(prompt, str)
        ids = self.encode_prompt(prompt) if words else prompt
        pieces = self.stream(ids, Sampling(**_known(options)), stop)
        if stream:
            return (
                (piece for piece, _ in pieces if piece)
                if words
                else (token for _, token in pieces if token is not None)
            )
        parts = list(pieces)
        if words:
            return "".join(piece for piece, _ in parts)
        return [token for _, token in parts if token is not None]

    def generate_batch(
        self,
        prompts: Sequence[str | Ids],
        sampling: Sampling | Sequence[Sampling] | None = None,
        stop: Sequence[str] = (),
        rows: int = BATCH_PROMPTS,
        **options: Any,
    ) -> list[Text]:
        """Continue several prompts, up to `rows` of them computed together.

        options: of one Sampling for all, in the place of `sampling`. Every prompt gets the continuation that it gets alone; with
        one Sampling for all, prompt i is drawn with its seed + i."""
        if options:
            if sampling is not None:
                raise UsageError(f"give a Sampling or {', '.join(options)}, not both")
            sampling = Sampling(**_known(options))
        return [t for _, t in sorted(self.each(prompts, sampling, stop, rows), key=lambda pair: pair[0])]

    def each(
        self,
        prompts: Sequence[str | Ids],
        sampling: Sampling | Sequence[Sampling] | None = None,
        stop: Sequence[str] = (),
        rows: int = BATCH_PROMPTS,
    ) -> Iterator[tuple[int, Text]]:
        """Yield (number of a prompt, its Text) in the order in which prompts end; see generate_batch."""
        if isinstance(prompts, str):
            raise UsageError(
                f"prompts is a text, not a list of them; give [{prompts[:20]!r}], or call generate"
            )
        ids = [check_prompt(self.config, self.encode_prompt(p) if isinstance(p, str) else p) for p in prompts]
        if sampling is None or isinstance(sampling, Sampling):
            one = sampling or Sampling()
            sampling = [dataclasses.replace(one, seed=one.seed + i) for i in range(len(ids))]
        if rows < 1:
            raise UsageError(f"rows must be at least 1, not {rows}")
        if not all(isinstance(s, Sampling) for s in sampling):
            raise UsageError(
                "sampling is an apr.Sampling, or a list of them; give options by name, such as max_tokens=20"
            )
        if len(sampling) != len(ids):
            raise UsageError(
                f"{plural(len(sampling), 'Sampling')} for {plural(len(ids), 'prompt')}; give one, or one each"
            )
        jobs = [(len(p), s.max_tokens) for p, s in zip(ids, sampling, strict=True)]
        for group in grouped(self.config, jobs, rows):
            generator = self._room(slots_needed(self.config, [jobs[i] for i in group]), len(group))
            streams = {i: self._text_stream(ids[i], stop) for i in group}
            for c, token in generator.run([ids[i] for i in group], [sampling[i] for i in group], self.ends):
                i = group[c.number]
                text = streams[i]
                if text is not None and token not in self.ends:
                    text.feed(token)
                    if text.stopped:
                        c.ended = "stop"
                if c.ended:
                    if text is not None:
                        text.end()
                    yield i, Text(c.prompt, "" if text is None else text.text, c.new, c.ended)

    def stream(
        self,
        ids: Ids,
        sampling: Sampling,
        stop: Sequence[str] = (),
        report: list[Continuation] | None = None,
        ends: Collection[int] | None = None,
    ) -> Iterator[tuple[str, int | None]]:
        """Yield (piece of text, token) after a prompt; the last piece has no token. report gets the Continuation, with
        the reason of its end. ends: in the place of the model's own. Without a tokenizer the pieces are "" and there can
        be no stop strings."""
        ends = self.ends if ends is None else ends
        prompt = check_prompt(self.config, ids)
        text = self._text_stream(prompt, stop)
        generator = self._room(slots_needed(self.config, [(len(prompt), sampling.max_tokens)]), 1)
        for c, token in generator.run([prompt], sampling, ends):
            if report is not None and not report:
                report.append(c)
            piece = "" if text is None or token in ends else text.feed(token)
            if text is not None and text.stopped:
                c.ended = "stop"
            yield piece, token
        if text is not None:
            yield text.end(), None

    def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: bool = False,
        stop: Sequence[str] = (),
        template_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Answer a conversation, a list of {"role": "system" | "user" | "assistant", "content": TEXT}.

        stream: an iterator over pieces of the answer. template_options: further variables of the template, such as
        enable_thinking. Raises Refused: no chat template or no tokenizer in the checkpoint."""
        template, tokenizer = self._chatting()
        ids = chat_ids(template, tokenizer, check_messages(messages), **(template_options or {}))
        ends = self.ends | answer_ends(template, tokenizer)
        pieces = (
            piece for piece, _ in self.stream(ids, Sampling(**_known(options)), stop, ends=ends) if piece
        )
        return pieces if stream else "".join(pieces)

    def conversation(
        self, sampling: Sampling | None = None, stop: Sequence[str] = (), template: ChatTemplate | None = None
    ) -> Conversation:
        """Begin a conversation; see chat.Conversation."""
        template, tokenizer = self._chatting(template)
        return Conversation(
            template,
            tokenizer,
            self._growing,
            self.config.max_position_embeddings,
            self.ends,
            sampling or Sampling(),
            stop,
        )

    def _chatting(self, template: ChatTemplate | None = None) -> tuple[ChatTemplate, Tokenizer]:
        template = template or self.chat_template
        if template is None:
            raise no_template(self.source)
        if self.tokenizer is None:
            raise no_tokenizer(self.source)
        return template, self.tokenizer

    def encode_prompt(self, text: str) -> list[int]:
        """Encode a prompt as the beginning of a text (see Tokenizer.prefix_ids).

        An empty prompt of a tokenizer that puts nothing there is the end-of-text token, which stands before every document but
        the first. Raises Refused: no tokenizer; UsageError: nothing to begin with."""
        if self.tokenizer is None:
            raise no_tokenizer(self.source)
        ids = self.tokenizer.encode_text(text)
        if not ids and self.tokenizer.eos_id is None:
            raise UsageError("an empty prompt needs a tokenizer with an end-of-text token; give some text")
        return ids or [int(self.tokenizer.eos_id or 0)]

    def _text_stream(self, ids: Sequence[int], stop: Sequence[str]) -> TextStream | None:
        if self.tokenizer is None and stop:
            raise no_tokenizer(self.source)
        return None if self.tokenizer is None else TextStream(self.tokenizer, ids, stop)

    def _room(self, slots: int, rows: int) -> Generator:
        """Make a generator of so many slots and rows, or reuse one of these weights that is large enough."""
        old = self._generator
        if old is None or old.slots < slots or old.rows < rows or old.weights is not self.weights:
            self._generator = None  # its memory is free before the new one takes its own
            old = None
            need = generator_memory(self.config, self.backend, self.dtype, rows, slots)
            held = dataclasses.replace(need, weights=0)
            check_fits(held, self.backend, "give fewer max_tokens or prompts at once")
            among = drawable_ids(self.tokenizer, self.config.vocab_size, self.ends)
            old = self._generator = Generator(
                self.config, self.backend, self.weights, slots, self.dtype, rows, among=among
            )
        return old

    def _growing(self, slots: int) -> Generator:
        """Make a generator for a conversation: twice as large each time, so that prompts are seldom read again."""
        if self._generator is None or self._generator.slots < slots:
            slots = min(self.config.max_position_embeddings, max(1024, 1 << (slots - 1).bit_length()))
        return self._room(slots, 1)

    # Files

    def save(self, path: str | Path, dtype: str | None = None) -> None:
        """Write an .apr file, or a Hugging Face folder for a path without that suffix, with tokenizer and chat template.

        dtype: of the stored weights, "float32" or "bfloat16" (default: that of the model in memory). Raises Refused,
        IOFailure."""
        if isinstance(self.weights, int8.Int8Weights):
            raise Refused(
                f"{path}: weights rounded to int8 are not saved; load the model with dtype='float32' to save it"
            )
        path, layout = Path(path).expanduser(), Layout(self.config)
        if path.suffix != ".apr":
            check_name(
                path, FOLDER, "name a folder, or a file that ends in .apr; apr export writes GGUF files"
            )
        tensors = layout.named(self.backend.to_host(self.weights))
        stored, texts = dtype or self.dtype, self.checkpoint.texts
        if path.suffix != ".apr":
            tokenizer = None if self.tokenizer is None else self.tokenizer.json
            texts = texts_for(self.checkpoint, tensors, stored)
            write_hf(path, self.config, tensors, stored, tokenizer_json=tokenizer, texts=texts)
            return
        meta = config_to_metadata(self.config)
        if self.tokenizer is not None:
            bos = self.checkpoint.metadata.get("tokenizer.bos_token_id")
            embed_tokenizer(meta, self.tokenizer.json, self.tokenizer.eos_id, bos)
        if texts:
            meta[HF_FILES] = texts
        if self.chat_template is not None:
            meta["chat_template"] = self.chat_template.text
        write_apr(path, meta, tensors, stored)


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """Check options of Sampling. Raises UsageError for an unknown one."""
    names = [f.name for f in dataclasses.fields(Sampling)]
    for name in options:
        if name not in names:
            raise UsageError(f"{name} is no option of generation; there are {', '.join(names)} and stop")
    return options
