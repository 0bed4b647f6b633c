"""Text to token ids and back.

The file format is `tokenizer.json` of the tokenizers library, which the models people know ship.
"""

from __future__ import annotations

import array
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Engine

from ..common.atomic import write_json, write_text
from ..common.errors import MalformedFile, Refused, UsageError
from ..common.files import make_folder, parse_json, read_text, short
from .byte_characters import spelling
from .identity import identity, older_identities
from .stated import CONFIG, SPECIAL, check_stated, joined_config, objects_beside
from .vocab_format import BYTE_LEVEL, OTHER, SENTENCEPIECE, check

# A forked child has none of the library's threads and would wait for them for ever (or, where the
# variable is not set, print a warning): it encodes on its own. The library reads the variable at each call.
os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))

FORMAT = "apr-tokenizer-1"

assert array.array("I").itemsize == 4  # encode_batch hands the library's ids to NumPy through it

# Names of the end of a text, for files without a tokenizer_config.json that says it. Looked up only among the
# special added tokens: "</s>" as an ordinary string of the vocabulary means nothing.
EOS_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)


class Tokenizer:
    """Encodes text and decodes ids as a tokenizer.json says; knows the id that ends a document.

    vocab_size     the highest id + 1: the rows an embedding needs
    eos_token      text of the token that ends a document, or None
    eos_id         its id, or None
    sha256         of the canonical content of tokenizer.json: identity.py
    json           the text of tokenizer.json
    normalization  "none" or the kind of normalizer, such as "NFC"
    format         of the vocabulary: one of vocab_format.FORMATS
    byte_level     whether that is byte-level: every text has ids and comes back from them
    figures        what the vocabulary holds, in words
    unknown_id     of the token for what the vocabulary cannot spell, or None
    made           how it was made, as the manifest.json of its folder says; None where there is none

    Raises MalformedFile, Refused: the encoder does not speak the format of the vocabulary (see vocab_format.check), or
    gives an added token another id than the file says.
    """

    def __init__(self, text: str, source: str, eos: str | int | None = None) -> None:
        fields = parse_json(text, source, unique=True)
        vocab = check(fields, source)
        with _library(source, "not a tokenizer.json"):
            self._engine = Engine.from_str(text)
        if fields["model"].get("dropout"):
            raise Refused(f"{source}: model.dropout = {fields['model']['dropout']}: ids would be random")
        self._check_added(fields.get("added_tokens") or [], source)
        # A document that spells out "<|endoftext|>" is text about it, not the end of a document.
        self._engine.encode_special_tokens = True
        # A tokenizer.json may carry the settings of its last use, which would cut documents short.
        self._engine.no_truncation()
        self._engine.no_padding()
        self._check_around(source)
        self.json = text
        self.source = source
        merges = fields["model"].get("merges") or []
        # The library passes over merges that are no list, for models other than BPE.
        self.merges = len(merges) if isinstance(merges, list) else 0
        self.normalization = str((fields.get("normalizer") or {}).get("type", "none"))
        self.format, self.figures, self.byte_level = vocab.name, vocab.figures, vocab.name == BYTE_LEVEL
        self.made: dict[str, Any] | None = None
        self.eos_token, self.eos_id = self._resolve_eos(eos)
        # Some byte-level files name the end of text as the unknown token, which bytes never need: its count would
        # then be the number of documents.
        self.unknown_id = None if self.byte_level and vocab.unknown_id == self.eos_id else vocab.unknown_id

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json or the folder that holds one; tokenizer_config.json beside it names the EOS.

        Raises InputNotFound, MalformedFile (also when a manifest.json of ours has another sha256), Refused, IOFailure."""
        path = Path(path)
        if os.path.isdir(path):
            path = path / "tokenizer.json"
        text = read_text(path, "give a tokenizer.json or the folder that holds one")
        tokenizer = cls(text, str(path), eos_of_config(path.parent))
        check_stated(tokenizer._fields(), path)
        manifest = path.with_name("manifest.json")
        d = parse_json(read_text(manifest), str(manifest), unique=True) if os.path.lexists(manifest) else {}
        if d.get("format") == FORMAT:
            if not tokenizer.is_recorded_as(d.get("sha256")):
                raise MalformedFile(
                    f"{path}: sha256 is {tokenizer.sha256}, {manifest} says {d.get('sha256')}; the file was changed: "
                    "make the tokenizer again, or remove the manifest where the change is meant"
                )
            tokenizer.made = d.get("made")
            if not isinstance(tokenizer.made, dict | None):
                raise MalformedFile(
                    f"{manifest}: made = {short(tokenizer.made)} is not an object; remove the manifest"
                )
        return tokenizer

    @classmethod
    def from_json(cls, text: str, source: str, eos: str | int | None = None) -> Tokenizer:
        """Parse the text of a tokenizer.json, such as a checkpoint embeds; `source` is for messages.

        eos: text or id of the added token that ends a document, where something beside the text says it.
        """
        return cls(text, source, eos)

    @cached_property
    def sha256(self) -> str:
        """Hash the canonical content of tokenizer.json, the identity of the tokenizer."""
        return identity(self._fields())

    def is_recorded_as(self, sha256: Any) -> bool:
        """Compare with a recorded identity; of older versions, the hash of any spelling of this tokenizer."""
        if sha256 == self.sha256 or not isinstance(sha256, str):
            return sha256 == self.sha256
        with _library(self.source, "not a tokenizer.json"):
            spelled = str(Engine.from_str(self.json).to_str(pretty=True))
        return sha256 in older_identities(self._fields(), self.json, spelled)

    def _fields(self) -> dict[str, Any]:
        return parse_json(self.json, self.source, unique=True)

    def _check_around(self, source: str) -> None:
        """Raise MalformedFile unless the ids that stand around every text are ids of the vocabulary."""
        self.vocab_size = max(self._engine.get_vocab().values(), default=-1) + 1
        with _library(source, "post_processor"):
            around = self._engine.encode("").ids
        if self.vocab_size and max(around, default=0) >= self.vocab_size:
            raise MalformedFile(
                f"{source}: post_processor adds an id outside the {self.vocab_size:,} of the vocabulary"
            )

    def _check_added(self, added: list[dict[str, Any]], source: str) -> None:
        """Raise MalformedFile unless the engine gives each added token the id that the file says: the engine numbers
        added tokens outside the vocabulary from the number of tokens on, whatever their ids in the file."""
        for token in added:
            got = self._engine.token_to_id(token["content"])
            if got != token["id"]:
                raise MalformedFile(
                    f"{source}: added token {token['content']!r} has id {token['id']}, the library gives it {got}: the ids "
                    "before it have holes; take the vocabulary and the added tokens from the same model"
                )

    def _resolve_eos(self, eos: str | int | None) -> tuple[str | None, int | None]:
        """Find text and id of the added token that ends a text. Refused: an ordinary string; MalformedFile: no token."""
        added = self._engine.get_added_tokens_decoder()
        ids = {token.content: i for i, token in added.items()}
        if eos is None:
            eos = next((n for n in EOS_NAMES if n in ids and added[ids[n]].special), None)
            return (None, None) if eos is None else (eos, ids[eos])
        i = ids.get(eos) if isinstance(eos, str) else eos
        if i in added:
            return added[i].content, i
        few = ", ".join(f"{token!r} ({i})" for token, i in list(ids.items())[:5])
        known = (
            f"its added tokens are {few}{', ...' if len(ids) > 5 else ''}"
            if ids
            else "it has no added tokens"
        )
        advice = f"{known}; name one with --eos TOKEN, or take another tokenizer"
        text = (
            eos
            if isinstance(eos, str)
            else self._engine.id_to_token(eos)
            if 0 <= eos < self.vocab_size
            else None
        )
        i = None if text is None else self._engine.token_to_id(text)
        if i is None:
            raise MalformedFile(f"{self.source}: eos {eos!r} is not one of its tokens; {advice}")
        raise Refused(
            f"{self.source}: {text!r} is an ordinary string of the vocabulary (id {i}), not an added token: it does not "
            f"end a text; {advice}"
        )

    def encode(self, text: str, add_special_tokens: bool = False) -> np.ndarray:
        """Encode a text as token ids, uint32 (n,). Refused: a lone surrogate, which no UTF-8 file can hold."""
        return self.encode_batch([text], add_special_tokens)[0]

    @cached_property
    def prefix_ids(self) -> tuple[int, ...]:
        """Ids that the tokenizer itself puts before a text: <s> of Llama, <bos> of Gemma, nothing for Qwen and for our own.

        Every text begins with them: a document in shards, a prompt with its response, a text or context that is scored, a prompt
        that is continued. What a chat template writes begins as the template says, and a window that begins inside a text
        with the text. transformers and lm-evaluation-harness do the same."""
        plain, whole = (self.encode("a", add_special_tokens=special).tolist() for special in (False, True))
        at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        return tuple(int(i) for i in whole[:at])

    def encode_text(self, text: str) -> list[int]:
        """Encode a text from its beginning: prefix_ids, then its own ids."""
        return [*self.prefix_ids, *(int(i) for i in self.encode(text))]

    def encode_marked(self, text: str) -> np.ndarray:
        """Encode a text in which special tokens stand for themselves, as a chat template writes them, uint32 (n,)."""
        return self.encode_spans([text])[0][0]

    def encode_spans(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Encode texts in which special tokens stand for themselves.

        Returns ids, uint32 (n,), and the characters [start, end) of each token, int64 (n, 2)."""
        self._engine.encode_special_tokens = False
        try:
            with self.encoding_errors(texts):
                rows = self._engine.encode_batch(list(texts), add_special_tokens=False)
        finally:
            self._engine.encode_special_tokens = True
        return [
            (np.array(row.ids, np.uint32), np.array(row.offsets, np.int64).reshape(-1, 2)) for row in rows
        ]

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Pattern of any special token, longer ones first; without special tokens it matches nothing."""
        texts = sorted(filter(None, self.special_tokens().values()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts)) or "(?!)")

    def special_tokens(self) -> dict[int, str]:
        """List the special added tokens: text by id."""
        added = self._engine.get_added_tokens_decoder()
        return {i: token.content for i, token in added.items() if token.special}

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[np.ndarray]:
        """Encode several texts on all cores, each uint32 (n,)."""
        with self.encoding_errors(texts):
            rows = self._engine.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [np.frombuffer(array.array("I", row.ids), np.uint32) for row in rows]

    @contextmanager
    def encoding_errors(self, texts: Sequence[str]) -> Iterator[None]:
        """Raise Refused for a text with a lone surrogate, MalformedFile for errors of the library."""
        try:
            with _library(self.source, "text cannot be encoded"):
                yield
        except TypeError:
            for text in texts:
                utf8_of(text)
            raise

    def normalize(self, text: str) -> str:
        """Normalize a text as the encoder does before it cuts it; without a normalizer the text itself."""
        normalizer = self._engine.normalizer
        if normalizer is None:
            return text
        with _library(self.source, "text cannot be normalized"):
            return normalizer.normalize_str(text)

    def check_round_trip(self, text: str) -> str | None:
        """Decode what encode makes of a text: None for the same text, else the first difference.

        Byte-level: the decoded text is normalize(text). Others: the decoded text has the same ids again, and is the
        same text after normalizing; of WordPiece only the ids, as WordPiece loses white space and case, and of
        vocabularies of no known format the text without its white space."""
        ids = self.encode(text)
        back = self.decode(ids)
        if self.byte_level:
            return text_difference(back, self.normalize(text))
        again = self.encode(back)
        if not np.array_equal(ids, again):
            n = min(ids.size, again.size)
            at = next(iter(np.flatnonzero(ids[:n] != again[:n])), n)
            got, want = again[at : at + 5].tolist(), ids[at : at + 5].tolist()
            return f"token {at}: the decoded text has ids {got}, the text {want}"
        got, want = self.normalize(back), self.normalize(text)
        if self.format == SENTENCEPIECE:
            return text_difference(got, want)
        if self.format == OTHER:
            return text_difference("".join(got.split()), "".join(want.split()))
        return None

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = False) -> str:
        """Decode token ids; stray bytes and ids that only the embedding has become U+FFFD."""
        ids = np.atleast_1d(np.asarray(ids, dtype=np.int64))
        if ids.ndim > 1:
            raise UsageError(f"ids {ids.shape} are those of several texts; decode each row")
        if (ids < 0).any():
            raise Refused(f"{self.source}: id {ids.min()} is negative")
        parts, start = [], 0
        # The library would leave out an id it does not know without a word.
        for end in [*np.flatnonzero(ids >= self.vocab_size), ids.size]:
            with _library(self.source, "ids cannot be decoded"):
                parts.append(self._engine.decode(ids[start:end].tolist(), skip_special_tokens=skip_special))
            start = end + 1
        return "\ufffd".join(parts)

    @cached_property
    def ids(self) -> np.ndarray:
        """Ids that have a token, int64 (n,) ascending; there may be holes below vocab_size."""
        return np.unique(np.fromiter(self._engine.get_vocab().values(), np.int64))

    def spelling(self) -> list[bytes] | None:
        """List the bytes of UTF-8 text that each id stands for, b"" for special tokens and holes; None unless byte-level:
        in other vocabularies they depend on the ids around."""
        return spelling(self._engine, self.vocab_size) if self.byte_level else None

    def token_bytes(self) -> np.ndarray | None:
        """Count the bytes that each id stands for, int64 (vocab_size,); None as `spelling`."""
        return None if (spelt := self.spelling()) is None else np.array([len(x) for x in spelt], np.int64)

    def save(self, folder: str | Path, chat_template: Any = None) -> None:
        """Write tokenizer.json, tokenizer_config.json (EOS, chat template) and manifest.json into a folder.

        Raises IOFailure."""
        folder = make_folder(folder)
        write_text(folder / "tokenizer.json", self.json)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eos_token}
        if chat_template is not None:
            config["chat_template"] = chat_template
        write_json(folder / "tokenizer_config.json", config)
        manifest = {
            "format": FORMAT,
            "vocab_size": self.vocab_size,
            "merges": self.merges,
            "sha256": self.sha256,
            "eos_token": self.eos_token,
            "eos_token_id": self.eos_id,
        }
        if self.made is not None:
            manifest["made"] = self.made
        write_json(folder / "manifest.json", manifest)


def library_spelling(text: str, source: str) -> str:
    """Spell a tokenizer.json as the tokenizers library writes it. Raises MalformedFile, Refused: see Tokenizer."""
    check(parse_json(text, source, unique=True), source)
    with _library(source, "not a tokenizer.json"):
        return str(Engine.from_str(text).to_str(pretty=True))


def utf8_of(text: str) -> bytes:
    """Encode a text as UTF-8. Raises Refused for a lone surrogate."""
    try:
        return text.encode()
    except UnicodeEncodeError as e:
        raise Refused(f"text holds a lone surrogate at character {e.start}; it is not Unicode text") from None


def text_difference(got: str, want: str) -> str | None:
    """Describe where two texts first differ; None for equal texts."""
    if got == want:
        return None
    at = next(
        (i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want))
    )
    around = slice(max(at - 10, 0), at + 10)
    return f"character {at}: got {got[around]!r}, want {want[around]!r}"


def eos_of_config(folder: Path) -> str | None:
    """Read the eos_token that the files beside a tokenizer.json name, spelt as a string or as {"content": ...}.

    None where they name none. Raises MalformedFile, InputNotFound: a folder in the place of a file."""
    value: Any = joined_config(objects_beside(folder, (CONFIG, SPECIAL))).get("eos_token")
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise MalformedFile(
            f"{folder / CONFIG}: eos_token = {short(value)} is not a string; name a token, or leave it out"
        )
    return value


@contextmanager
def _library(source: str, what: str) -> Iterator[None]:
    """Turn what the tokenizers library raises into MalformedFile: bare Exception, and the panics of its Rust code, which
    are no Exception and would end the process. TypeError is apr's own: a wrong argument."""
    try:
        yield
    except TypeError:
        raise
    except BaseException as e:
        if isinstance(e, Exception) or type(e).__name__ == "PanicException":
            raise MalformedFile(
                f"{source}: {what}: {e}; make the tokenizer again, or take another (apr tokenize import-hf)"
            ) from None
        raise
