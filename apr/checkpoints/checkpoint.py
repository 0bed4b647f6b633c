"""Hold a checked model at rest: configuration, tensors by name, tokenizer and side files, alike for every format."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..common.errors import AprError, MalformedFile, Refused
from ..common.files import parse_json, read_text, short
from ..common.units import plural
from ..model.config import ModelConfig
from ..model.hf_config import TRY, from_hf, hf_notes, to_hf
from ..model.params import Layout
from ..tokenizer.chat_template import ChatTemplate, named_tokens
from ..tokenizer.stated import joined_config, named_special
from ..tokenizer.tokenizer import Tokenizer
from .tensors import CHUNK, EMBED, HEAD, INV_FREQ, is_float, mismatch, require_finite, same_bits, spec_of

CONFIG, TOKENIZER, TOKENIZER_CONFIG, TEMPLATE = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
MORE_TEMPLATES = "additional_chat_templates"  # a folder
GENERATION_CONFIG, SPECIAL_TOKENS = "generation_config.json", "special_tokens_map.json"
SIDE_FILES = (  # small files of a Hugging Face folder that an APR file keeps as they are
    CONFIG,
    GENERATION_CONFIG,
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS,
    "added_tokens.json",
    TEMPLATE,
)
# Vocabularies in other files than tokenizer.json, and how to get one from them.
OTHER_TOKENIZERS = ("tokenizer.model", "vocab.json")
CONVERT = "{} is not read; AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of transformers writes a tokenizer.json"
HF_FILES = "hf_files"  # metadata key of an APR file: side files by name


@dataclass(frozen=True)
class Checkpoint:
    """A model that can be computed: made by `registry.open_any`.

    cfg             configuration
    tensors         by Hugging Face name, read-only; mapped, or converted when asked for
    tokenizer_json  text of tokenizer.json, or None
    metadata        of an APR file; config.json of a Hugging Face folder; of a GGUF file what an APR file would say
    source          path, for messages
    kind            "apr", "hf" or "gguf"
    eos             end-of-text token as the files name it: an id, a text, or None
    fault           what is wrong with the files of its tokenizer, for whoever asks for the tokenizer, or None
    """

    cfg: ModelConfig
    tensors: Mapping[str, np.ndarray]
    tokenizer_json: str | None
    metadata: dict[str, Any]
    source: str
    kind: str
    eos: Any = None
    fault: AprError | None = None

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of all parameters as float32 in table order: equal weights, whatever the format."""
        digest = hashlib.sha256()
        for tensor in parameters(Layout(self.cfg), self).values():
            flat = tensor.reshape(-1)
            for start in range(0, flat.size, CHUNK):
                digest.update(flat[start : start + CHUNK].astype("<f4").view(np.uint8).data)
        return digest.hexdigest()

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Tokenizer with its end-of-text id, or None. Raises MalformedFile, Refused: more ids than the model."""
        if self.fault is not None:
            raise self.fault
        if self.tokenizer_json is None:
            return None
        if self.eos is not None and (not isinstance(self.eos, int | str) or isinstance(self.eos, bool)):
            raise MalformedFile(
                f"{self.source}: eos_token_id = {short(self.eos)} is not the id of a token; correct it in the model's config"
            )
        tokenizer = Tokenizer.from_json(self.tokenizer_json, self.source, self.eos)
        require_rows(tokenizer, self.cfg.vocab_size, self.source)
        return tokenizer

    @cached_property
    def texts(self) -> dict[str, str]:
        """Side files by name, of SIDE_FILES; empty for a checkpoint that apr trained. Raises MalformedFile."""
        if self.kind == "hf":
            folder = Path(self.source)
            return read_side_files(folder if os.path.isdir(folder) else folder.parent)
        kept = self.metadata.get(HF_FILES) or {}
        if not isinstance(kept, dict) or not all(isinstance(t, str) for t in kept.values()):
            raise MalformedFile(
                f"{self.source}: metadata {HF_FILES!r} is not an object of texts; import the model again"
            )
        return {name: text for name, text in kept.items() if name in SIDE_FILES}

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the model: the original, if there is one that still describes the model. What is written has the names
        of a model with a head, so its architecture is one."""
        made = to_hf(self.cfg)
        if CONFIG in self.texts:
            config = parse_json(self.texts[CONFIG], f"{self.source}: {CONFIG}")
            if from_hf(config, self.source) == self.cfg:
                is_bare = any(name.endswith("Model") for name in config.get("architectures") or [])
                return config | ({"architectures": made["architectures"]} if is_bare else {})
        return made

    @property
    def notes(self) -> list[str]:
        """Notes on what its config.json leaves to defaults and what of it is not heeded; [] for a file as usual."""
        config = self.metadata if self.kind == "hf" else self.metadata.get("hf_config")
        return hf_notes(config, self.source) if isinstance(config, dict) else []

    @property
    def tokenizer_config(self) -> dict[str, Any]:
        """Object in tokenizer_config.json with the tokens of special_tokens_map.json, as transformers joins them."""
        names = [name for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS) if name in self.texts]
        return joined_config({name: parse_json(self.texts[name], f"{self.source}: {name}") for name in names})

    @property
    def chat_template(self) -> str | None:
        """Text of the chat template: chat_template.jinja, else tokenizer_config.json's, else the metadata's."""
        found = template_in(self.texts)
        template = self.metadata.get("chat_template") if found is None else found
        return template if isinstance(template, str) else None

    @property
    def named_tokens(self) -> dict[str, str]:
        """Texts of bos_token, eos_token and such, as the side files or the metadata spell them."""
        tokens = named_tokens(self.tokenizer_config)
        vocabulary = self.metadata.get("tokenizer.vocabulary") or []
        if not isinstance(vocabulary, list):
            raise MalformedFile(
                f"{self.source}: tokenizer.vocabulary = {short(vocabulary)} is not a list of tokens"
            )
        for name in ("bos_token", "eos_token"):
            i = self.metadata.get(f"tokenizer.{name}_id")
            if isinstance(i, int) and 0 <= i < len(vocabulary) and isinstance(vocabulary[i], str):
                tokens.setdefault(name, vocabulary[i])
        return tokens

    def template(self, file: str | None = None) -> ChatTemplate | None:
        """Compile the chat template, or the one in `file`; None without one.

        Raises InputNotFound and MalformedFile (the file), Refused (see ChatTemplate)."""
        if file is not None:
            return ChatTemplate(read_text(Path(file)), file, self.named_tokens)
        text = self.chat_template
        if text is None:
            return None
        self._check_tokens_of(text)
        for_tools = templates_in(self.texts).get("tool_use")
        return ChatTemplate(text, self.source, self.named_tokens, for_tools=for_tools)

    def _check_tokens_of(self, template: str) -> None:
        """Raise Refused for a special token that a template writes and the tokenizer lacks: transformers makes it a new id, for
        which the model has no row, and here its letters would be text."""
        if self.fault is not None or self.tokenizer is None:
            return
        by_text = {text: name for name, text in self.named_tokens.items()}
        for text in named_special(self.tokenizer_config):
            is_written = text in template or by_text.get(text, text) in template
            if is_written and self.tokenizer.encode_marked(text).size != 1:
                raise Refused(
                    f"{self.source}: its chat template writes {short(text)}, which {TOKENIZER_CONFIG} names as a special token "
                    f"and {TOKENIZER} lacks; add it there, or give another template with --chat-template FILE"
                )

    def end_ids(self) -> frozenset[int]:
        """Collect the ids that end a text: the tokenizer's, and those of generation_config.json and config.json, which
        may list several."""
        values: list[Any] = [self.metadata.get("eos_token_id")]
        if isinstance(original := self.metadata.get("hf_config"), dict):
            values.append(original.get("eos_token_id"))
        for name in (GENERATION_CONFIG, CONFIG):
            if name in self.texts:
                values.append(parse_json(self.texts[name], f"{self.source}: {name}").get("eos_token_id"))
        ids = [] if self.tokenizer is None or self.tokenizer.eos_id is None else [self.tokenizer.eos_id]
        for value in values:
            ids += value if isinstance(value, list) else [value]
        size = self.cfg.vocab_size
        return frozenset(i for i in ids if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < size)

    def on(self, backend: ModuleType, dtype: str = "float32") -> Any:
        """Copy the parameters to a backend: a new flat buffer (Layout order)."""
        layout = Layout(self.cfg)
        host = np.zeros(layout.size, np.float32)
        fill(layout, host, self)
        return upload(backend, host, dtype)


def require_rows(tokenizer: Tokenizer, rows: int, source: str) -> None:
    """Raise Refused, naming the tokens, for a tokenizer with more ids than an embedding has rows."""
    if tokenizer.vocab_size > rows:
        over = [repr(tokenizer.decode([i])) for i in tokenizer.ids if i >= rows]
        raise Refused(
            f"{source}: its tokenizer has {plural(tokenizer.vocab_size, 'id')}, the model {rows}: no row for "
            f"{', '.join(over[:5])}{', ...' if len(over) > 5 else ''}; take {'it' if len(over) == 1 else 'them'} out of "
            "tokenizer.json and the files beside it, or give the embedding more rows (resize_token_embeddings of transformers)"
        )


def no_tokenizer(source: str, hint: str = "") -> Refused:
    """Make the error of a model without tokenizer.json, which says what can be made into one."""
    folder = Path(source) if os.path.isdir(source) else Path(source).parent
    other = next((n for n in OTHER_TOKENIZERS if os.path.lexists(folder / n)), None)
    made = f": {CONVERT.format(other)}" if other and os.path.lexists(folder / CONFIG) else hint
    return Refused(f"{source}: no tokenizer in it; put tokenizer.json beside the weights{made}")


def template_in(texts: Mapping[str, str]) -> str | None:
    """Take the chat template of side files: chat_template.jinja, else tokenizer_config.json's, of several the default one."""
    return templates_in(texts).get("default")


def templates_in(texts: Mapping[str, str]) -> dict[str, str]:
    """Take the chat templates of side files by name; chat_template.jinja stands for all of tokenizer_config.json's."""
    if TEMPLATE in texts:
        return {"default": texts[TEMPLATE]}
    found = parse_json(texts.get(TOKENIZER_CONFIG, "{}"), TOKENIZER_CONFIG).get("chat_template")
    if isinstance(found, list):
        found = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
    named = found if isinstance(found, dict) else {"default": found}
    return {name: text for name, text in named.items() if isinstance(name, str) and isinstance(text, str)}


def read_side_files(folder: Path) -> dict[str, str]:
    """Read the side files of a Hugging Face folder; those that are JSON are parsed as a check. Raises MalformedFile."""
    texts = {name: read_text(folder / name) for name in SIDE_FILES if os.path.lexists(folder / name)}
    for name, text in texts.items():
        if name.endswith(".json"):
            parse_json(text, str(folder / name))
    return _with_more_templates(texts, folder / MORE_TEMPLATES)


def _with_more_templates(texts: dict[str, str], folder: Path) -> dict[str, str]:
    """List the templates of a folder of their own, and chat_template.jinja, in tokenizer_config.json: transformers takes them in
    the place of those that stand there."""
    names = sorted(n for n in os.listdir(folder) if n.endswith(".jinja")) if folder.is_dir() else []
    if not names:
        return texts
    named = {"default": texts.pop(TEMPLATE)} if TEMPLATE in texts else {}
    named |= {name.removesuffix(".jinja"): read_text(folder / name) for name in names}
    config = parse_json(texts.get(TOKENIZER_CONFIG, "{}"), str(folder.parent / TOKENIZER_CONFIG))
    config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    return {**texts, TOKENIZER_CONFIG: json.dumps(config, indent=2, ensure_ascii=False) + "\n"}


def upload(backend: ModuleType, host: np.ndarray, dtype: str) -> Any:
    """Copy a host buffer to a backend, as `dtype`."""
    w = backend.empty(host.size, dtype)
    backend.from_host(w, host)
    return w


class Parameters(Mapping[str, np.ndarray]):
    """Parameters by Hugging Face name in table order; a tensor is mapped or converted when asked for."""

    def __init__(self, tensors: Mapping[str, np.ndarray], stored: dict[str, str]) -> None:
        """stored: the name in `tensors` of each parameter."""
        self._tensors, self._stored = tensors, stored

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[self._stored[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def parameters(layout: Layout, checkpoint: Checkpoint) -> Parameters:
    """Match a checkpoint's tensors with the parameters of a layout, both ways.

    Every parameter is there, every stored tensor is one, shapes are equal. With tied embeddings a
    checkpoint may store the matrix under the head's name, or twice if the copies are bit-equal. A layout whose head is apart
    takes both from a checkpoint where they are one.
    Raises Refused naming what is missing, unexpected or of the wrong shape.
    """
    tensors, source = checkpoint.tensors, checkpoint.source
    stored = {name: name for name in tensors if not name.endswith(INV_FREQ)}
    tied = layout.cfg.tie_word_embeddings
    if not tied and checkpoint.cfg.tie_word_embeddings:
        # An adapter of someone else took them apart.
        stored[EMBED] = stored[HEAD] = EMBED if EMBED in stored else HEAD
    if tied and HEAD in stored:
        del stored[HEAD]
        if EMBED not in stored:
            stored[EMBED] = HEAD
        elif not same_bits(tensors[EMBED], tensors[HEAD]):
            raise Refused(
                f"{source}: tie_word_embeddings is true, but {HEAD} differs from {EMBED}; if the head "
                "was trained apart, set tie_word_embeddings to false in its config"
            )
    specs = {name: spec_of(tensors, at) for name, at in stored.items()}
    problem = mismatch(layout, {name: s.shape for name, s in specs.items()})
    whole = [f"{name} ({s.dtype})" for name, s in specs.items() if not is_float(s.dtype)]
    if whole:
        more = ", ..." if len(whole) > 5 else ""
        problem += f"{'; ' if problem else ''}{len(whole)} not floating point: {', '.join(whole[:5])}{more}"
    if problem:
        headless = not tied and HEAD not in stored
        hint = ""
        if headless:
            hint = (
                f" (without {HEAD} the config must say tie_word_embeddings: true; a model whose head is apart is saved with it "
                "by AutoModelForCausalLM of transformers)"
            )
        rows = layout.in_order()
        if whole:
            hint = f" (apr computes with floating point weights{TRY['quantization_config']})"
        elif len(specs) > len(rows) and all(s.hf in specs and specs[s.hf].shape == s.shape for s in rows):
            hint = " (apr has no place for them; save_pretrained of AutoModelForCausalLM of transformers leaves them out)"
        raise Refused(f"{source}: its tensors do not fit its config: {problem}{hint}")
    return Parameters(tensors, {s.hf: stored[s.hf] for s in layout.in_order()})


def fill(layout: Layout, flat: np.ndarray, checkpoint: Checkpoint) -> None:
    """Copy every tensor of a checkpoint to its place in a host buffer; the padding becomes 0.

    flat (layout.size,) float32 or float64. bfloat16, float16 and float32 keep their values; float64
    is rounded to the buffer's dtype, to nearest even. Raises Refused as `parameters` does, and
    naming the tensor for NaN and infinity; the buffer is then undefined.
    """
    if flat.shape != (layout.size,) or flat.dtype not in (np.float32, np.float64):
        raise Refused(
            f"buffer of {flat.dtype} {flat.shape}; weights need float32 or float64 ({layout.size},)"
        )
    tensors = parameters(layout, checkpoint)
    flat[...] = 0
    for slot in layout.slots:
        stored = tensors[slot.hf].reshape(-1)
        for start in range(0, slot.size, CHUNK):
            part = stored[start : start + CHUNK]
            place = flat[slot.offset + start : slot.offset + start + part.size]
            with np.errstate(over="ignore"):
                place[...] = part
            require_finite(place, start, f"{checkpoint.source}: {slot.hf}")


def reader(layout: Layout, checkpoint: Checkpoint) -> Callable[[str], np.ndarray]:
    """Return a function that gives a tensor by its name, float32, with the checks of `fill`. Raises Refused as it does."""
    tensors = parameters(layout, checkpoint)

    def read(name: str) -> np.ndarray:
        with np.errstate(over="ignore"):
            x = np.asarray(tensors[name], np.float32)
        flat = x.reshape(-1)
        for start in range(0, flat.size, CHUNK):
            require_finite(flat[start : start + CHUNK], start, f"{checkpoint.source}: {name}")
        return x

    return read
