"""Text to token ids and back, and training a byte-level BPE tokenizer.

The file format is `tokenizer.json` of the tokenizers library, which the models people know ship.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine

from ..config import read_json
from ..errors import InputNotFound, MalformedFile, Refused
from ..formats.atomic import write_json, write_text
from .corpus import make_folder

# A forked child has none of the library's threads and would wait for them for ever (or, where the
# variable is not set, print a warning): it encodes on its own. The library reads the variable at each call.
os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))

Progress = Callable[[str, int, int], None]  # stage, documents done, documents in all (0: not known)

FORMAT = "apr-tokenizer-1"
MIN_VOCAB, MAX_VOCAB = (
    257,
    200_000,
)  # 256 bytes and the end-of-text token; what an embedding can sensibly hold

# The split of GPT-4 (cl100k_base, github.com/openai/tiktoken): contractions, words with one leading
# character, up to three digits, punctuation runs, line ends, and runs of spaces whose last space goes
# to the next word, so that indentation is one piece.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What the end of a text is called where no tokenizer_config.json says it. Looked up only among the
# special added tokens: "</s>" as an ordinary string of the vocabulary means nothing.
EOS_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)


class Tokenizer:
    """A tokenizer.json: `encode` and `decode`, the id that ends a document, and the file's identity.

    vocab_size     the highest id + 1: the rows an embedding needs
    eos_token      text of the token that ends a document, or None
    eos_id         its id, or None
    sha256         of the UTF-8 bytes of tokenizer.json
    json           the text of tokenizer.json
    normalization  "none" or the kind of normalizer, such as "NFC"
    """

    def __init__(self, text: str, source: str, eos: str | int | None = None) -> None:
        try:
            fields = json.loads(text)
            self._engine = Engine.from_str(text)
        except Exception as e:  # the library raises bare Exception
            raise MalformedFile(f"{source}: not a tokenizer.json: {e}") from None
        if fields["model"].get("dropout"):
            raise Refused(f"{source}: model.dropout = {fields['model']['dropout']}: ids would be random")
        # A document that spells out "<|endoftext|>" is text about it, not the end of a document.
        self._engine.encode_special_tokens = True
        # A tokenizer.json may carry the settings of its last use, which would cut documents short.
        self._engine.no_truncation()
        self._engine.no_padding()
        self.json = text
        self.source = source
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        self.vocab_size = max(self._engine.get_vocab().values(), default=-1) + 1
        self.merges = len(fields["model"].get("merges") or [])
        self.normalization = str((fields.get("normalizer") or {}).get("type", "none"))
        self.eos_token, self.eos_id = self._resolve_eos(eos)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """From a tokenizer.json or the folder that holds one; tokenizer_config.json beside it names the EOS.

        Raises InputNotFound, MalformedFile (also when a manifest.json of ours has another sha256)."""
        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.json"
        if not path.is_file():
            raise InputNotFound(f"{path}: no such tokenizer.json; give the folder that holds one")
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError as e:
            raise MalformedFile(f"{path}: not UTF-8 at byte {e.start}") from None
        tokenizer = cls(text, str(path), _eos_of_config(path.with_name("tokenizer_config.json")))
        manifest = path.with_name("manifest.json")
        if manifest.is_file():
            d = read_json(manifest)
            if isinstance(d, dict) and d.get("format") == FORMAT and d.get("sha256") != tokenizer.sha256:
                raise MalformedFile(
                    f"{path}: sha256 is {tokenizer.sha256}, {manifest} says {d.get('sha256')}"
                )
        return tokenizer

    @classmethod
    def from_json(cls, text: str, source: str, eos: str | int | None = None) -> Tokenizer:
        """From the text of a tokenizer.json, such as a checkpoint embeds; `source` is for messages.

        eos: text or id of the added token that ends a document, where something beside the text says it.
        """
        return cls(text, source, eos)

    def _resolve_eos(self, eos: str | int | None) -> tuple[str | None, int | None]:
        added = self._engine.get_added_tokens_decoder()
        ids = {token.content: i for i, token in added.items()}
        if eos is None:
            eos = next((n for n in EOS_NAMES if n in ids and added[ids[n]].special), None)
            return (None, None) if eos is None else (eos, ids[eos])
        i = ids.get(eos) if isinstance(eos, str) else eos
        if i not in added:
            raise MalformedFile(f"{self.source}: eos {eos!r} is not one of its added tokens {ids}")
        return added[i].content, i

    def encode(self, text: str, add_special_tokens: bool = False) -> np.ndarray:
        """Token ids of a text, uint32 (n,). Refused: a lone surrogate, which no UTF-8 file can hold."""
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[np.ndarray]:
        """Token ids of several texts on all cores, each uint32 (n,)."""
        try:
            rows = self._engine.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except TypeError:
            for text in texts:
                _check_text(text)
            raise
        return [np.array(row.ids, dtype=np.uint32) for row in rows]

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = False) -> str:
        """The text of token ids; what is not text (stray bytes, ids that only the embedding has) is U+FFFD."""
        ids = np.asarray(ids, dtype=np.int64)
        if (ids < 0).any():
            raise Refused(f"{self.source}: id {ids.min()} is negative")
        parts, start = [], 0
        # The library would leave out an id it does not know without a word.
        for end in [*np.flatnonzero(ids >= self.vocab_size), ids.size]:
            parts.append(self._engine.decode(ids[start:end].tolist(), skip_special_tokens=skip_special))
            start = end + 1
        return "\ufffd".join(parts)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json (names the EOS) and manifest.json into a folder."""
        folder = make_folder(folder)
        write_text(folder / "tokenizer.json", self.json)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eos_token}
        write_json(folder / "tokenizer_config.json", config)
        manifest = {
            "format": FORMAT,
            "vocab_size": self.vocab_size,
            "merges": self.merges,
            "sha256": self.sha256,
            "eos_token": self.eos_token,
            "eos_token_id": self.eos_id,
        }
        write_json(folder / "manifest.json", manifest)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    out_dir: str | Path,
    eos_token: str = "<|endoftext|>",
    progress: Progress | None = None,
) -> Tokenizer:
    """Byte-level BPE over the texts, saved in out_dir; the same texts give the same file.

    Ids are the 256 bytes, then the merges, then the EOS. Fewer ids than vocab_size come out when the
    texts run out of pairs that occur twice. Raises Refused: bounds, no text, or an eos_token that the
    texts themselves made an ordinary token."""
    if not MIN_VOCAB <= vocab_size <= MAX_VOCAB:
        raise Refused(f"vocab_size = {vocab_size} is not in {MIN_VOCAB}..{MAX_VOCAB}")
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    engine.train_from_iterator(_watched(texts, progress), trainer)
    if engine.token_to_id(eos_token) is not None:
        raise Refused(f"eos_token = {eos_token!r} is an ordinary token of these texts; choose another")
    # After training, not as a special token of the trainer: so no merge can ever lead to its id.
    engine.add_special_tokens([AddedToken(eos_token, special=True, normalized=False)])
    out_dir = Path(out_dir)
    tokenizer = Tokenizer(engine.to_str(pretty=True), str(out_dir / "tokenizer.json"), eos_token)
    tokenizer.save(out_dir)
    return tokenizer


def _watched(texts: Iterable[str], progress: Progress | None) -> Iterator[str]:
    """The texts, counted; Refused when there is none."""
    total = len(texts) if isinstance(texts, Sequence) else 0
    done = 0
    for text in texts:
        _check_text(text)
        yield text
        done += bool(text)
        if progress:
            progress("train tokenizer", done, total)
    if not done:
        raise Refused("no text to train a tokenizer on")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise Refused(f"text holds a lone surrogate at character {e.start}; it is not Unicode text") from None


def _eos_of_config(path: Path) -> str | None:
    """eos_token of a tokenizer_config.json, which spells it as a string or as {"content": ...}."""
    if not path.is_file():
        return None
    d = read_json(path)
    value: Any = d.get("eos_token") if isinstance(d, dict) else d
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise MalformedFile(f"{path}: eos_token = {value!r} is not a string")
    return value
