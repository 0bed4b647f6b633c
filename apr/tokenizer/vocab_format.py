"""Recognise the format of a vocabulary, and check that the encoder of its tokenizer.json speaks that format.

An encoder over a vocabulary of another format raises no error: it turns nearly all text into the unknown token, and a
model trains on that for weeks with a loss that looks good.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import pre_tokenizers

from ..common.errors import MalformedFile, Refused
from ..common.files import short
from ..common.rounding import ceil_div
from ..common.units import plural
from .post_processors import check_templates

BYTE_LEVEL, HEX_BYTES, SENTENCEPIECE, WORDPIECE, OTHER = FORMATS = (
    "byte-level",
    "hex bytes",
    "sentencepiece",
    "WordPiece",
    "other",
)
BYTE_CHARACTERS = tuple(sorted(pre_tokenizers.ByteLevel.alphabet()))  # GPT-2's stand-ins for the 256 bytes
FALLBACK_BYTES = tuple(f"<0x{b:02X}>" for b in range(256))
HEX = frozenset(f"{b:02x}" for b in range(256))
SPACE_MARK = "\u2581"  # sentencepiece's space
BYTE_SPACE = "\u0120"  # the byte character of the space
# Share of tokens that must carry a format's mark before the vocabulary is of that format: single ones occur anywhere, as
# the Maltese letter of BYTE_SPACE or the "##" of Markdown do.
MARKED = {BYTE_LEVEL: 0.1, SENTENCEPIECE: 0.01, WORDPIECE: 0.05}
# Byte-level vocabularies are spelt in byte characters alone, but for tokens that were put in later. That those 256 are
# tokens is not enough: they are letters of Latin scripts, which a large vocabulary of another format has too.
MAX_FOREIGN = 0.1
# Of the 256: other vocabularies hold the decimal ones and a few more.
ENOUGH_HEX = 200
MODELS = ("BPE", "Unigram", "WordPiece", "WordLevel")
# No vocabulary in use has more than some 300,000. An embedding gets a row for every id below the highest.
MAX_IDS = 1 << 20
# Characters that normalizers and pre-tokenizers, or decoders, may make of one: a few dozen that each double a text would
# fill any memory.
MAX_GROWTH = 4096
AGAIN = "import the tokenizer again from the model it belongs to (apr tokenize import-hf), or train one (apr tokenize train)"


@dataclass(frozen=True)
class VocabFormat:
    """A vocabulary that its encoder speaks.

    name         one of FORMATS
    figures      what was found, in words
    holes        ids below the highest that have no token
    unknown_id   of the token that the model gives for what it cannot encode, or None
    """

    name: str
    figures: str
    holes: int
    unknown_id: int | None


def check(fields: dict[str, Any], source: str) -> VocabFormat:
    """Check a tokenizer.json and recognise the format of its vocabulary; `source` is for messages.

    Raises MalformedFile: no such model, ids that are no ids. Refused: the encoder or the decoder does not speak the
    vocabulary's format."""
    model = fields.get("model")
    if not isinstance(model, dict):
        raise MalformedFile(f"{source}: not a tokenizer.json: model is {short(model)}, not an object")
    if model.get("type") not in MODELS:
        raise MalformedFile(
            f"{source}: model.type = {short(model.get('type'))} is none of {', '.join(MODELS)}; where an old file has "
            "none, load it with the tokenizers library and save it again"
        )
    vocab = _vocabulary(model, source)
    added = added_tokens(fields, vocab, source)
    encoder = _Encoder.of(fields, model, source)
    for part in (encoder.normalizers + encoder.pre_tokenizers, encoder.decoders):
        if (growth := _growth(part)) > MAX_GROWTH:
            raise Refused(
                f"{source}: its steps can make {plural(growth, 'character')} of one, apr takes at most {MAX_GROWTH}; {AGAIN}"
            )
    check_templates(steps(fields.get("post_processor"), f"{source}: post_processor"), source)
    found = _Found.of(vocab, added, encoder, source)
    _check_encoder(found, encoder)
    _check_decoder(found, encoder)
    ids = set(vocab.values()) | {t["id"] for t in added}
    holes = max(ids) + 1 - len(ids)
    there = f"{plural(len(ids), 'id')} up to {max(ids):,}, {plural(holes, 'hole')}"
    figures = f"{found}; {there}; {plural(len(added), 'added token')}"
    return VocabFormat(found.name, figures, holes, _unknown_id(found, model, source))


@dataclass(frozen=True)
class _Found:
    """Marks of a vocabulary, counted over its ordinary tokens.

    missing       of the 256 byte characters
    foreign       tokens with characters that are none of them
    pieces        tokens with sentencepiece's space
    hexes         of the 256 two-digit hexadecimal numbers
    continuations tokens that begin with WordPiece's prefix
    """

    source: str
    tokens: set[str]
    name: str
    missing: list[str]
    foreign: int
    pieces: int
    hexes: int
    continuations: int
    prefix: str

    @classmethod
    def of(cls, vocab: dict[str, int], added: list[dict[str, Any]], encoder: _Encoder, source: str) -> _Found:
        stated = encoder.model.get("continuing_subword_prefix")
        prefix = stated if stated and isinstance(stated, str) else "##"
        ordinary = vocab.keys() - {t["content"] for t in added} - set(FALLBACK_BYTES)
        missing = [c for c in BYTE_CHARACTERS if c not in vocab]
        alphabet = frozenset(BYTE_CHARACTERS)
        foreign = sum(not alphabet.issuperset(t) for t in ordinary)
        pieces = sum(SPACE_MARK in t for t in ordinary)
        spaces = sum(BYTE_SPACE in t for t in ordinary)
        hexes = len(HEX & ordinary)
        continuations = sum(t.startswith(prefix) and t[len(prefix) :].isalnum() for t in ordinary)
        n = max(len(ordinary), 1)
        name = OTHER
        if foreign <= MAX_FOREIGN * n and (not missing or spaces > MARKED[BYTE_LEVEL] * n):
            name = BYTE_LEVEL
        elif pieces > MARKED[SENTENCEPIECE] * n or (pieces and encoder.space_mark):
            name = SENTENCEPIECE
        elif hexes >= ENOUGH_HEX:
            name = HEX_BYTES
        elif continuations > MARKED[WORDPIECE] * n:
            name = WORDPIECE
        return cls(source, set(vocab), name, missing, foreign, pieces, hexes, continuations, prefix)

    def __str__(self) -> str:
        marks = [f"{256 - len(self.missing)} of the 256 byte characters"]
        for count, what in (
            (self.pieces, "pieces with U+2581"),
            (self.hexes if self.name == HEX_BYTES else 0, "of '00'..'ff'"),
            (self.continuations if self.name == WORDPIECE else 0, f"continuations with {self.prefix!r}"),
        ):
            if count:
                marks.append(f"{count:,} {what}")
        kind = self.name if self.name != OTHER else "of no known format"
        return f"{kind} ({', '.join(marks)})"

    def refuse(self, encoder: str, why: str, what_to_try: str = AGAIN) -> Refused:
        """Make an error that names both sides and the next thing to try."""
        return Refused(f"{self.source}: the vocabulary is {self}, but {encoder}: {why}; {what_to_try}")


@dataclass(frozen=True)
class _Encoder:
    """Model type and options of a tokenizer.json, and the steps before and after the model."""

    model: dict[str, Any]
    normalizers: list[dict[str, Any]]
    pre_tokenizers: list[dict[str, Any]]
    decoders: list[dict[str, Any]]

    @classmethod
    def of(cls, fields: dict[str, Any], model: dict[str, Any], source: str) -> _Encoder:
        keys = ("normalizer", "pre_tokenizer", "decoder")
        return cls(model, *(list(steps(fields.get(key), f"{source}: {key}")) for key in keys))

    @property
    def type(self) -> str:
        return str(self.model["type"])

    @property
    def byte_level(self) -> bool:
        return _has(self.pre_tokenizers, "ByteLevel")

    @property
    def space_mark(self) -> bool:
        """True when spaces become sentencepiece's mark."""
        return any(
            (s["type"] == "Metaspace" and s.get("replacement", SPACE_MARK) == SPACE_MARK)
            or (s["type"] == "Replace" and s.get("content") == SPACE_MARK)
            for s in self.normalizers + self.pre_tokenizers
        )

    @property
    def space_mark_undone(self) -> bool:
        return _has(self.decoders, "Metaspace") or any(
            s["type"] == "Replace" and SPACE_MARK in pattern_of(s) for s in self.decoders
        )


def _check_encoder(found: _Found, encoder: _Encoder) -> None:
    """Raise Refused unless the pre-tokenizer and the model cut text into pieces that the vocabulary has."""
    model_is = f"model.type is {encoder.type}"
    if encoder.byte_level and (found.missing or found.name != BYTE_LEVEL):
        lacks = f"{plural(len(found.missing), 'byte character')} without a token, first {found.missing[:1]}"
        why = (
            lacks
            if found.missing
            else f"{plural(found.foreign, 'token')} with characters that ByteLevel never makes"
        )
        raise found.refuse("the pre_tokenizer is ByteLevel", why)
    if found.name == BYTE_LEVEL and not encoder.byte_level:
        has = "+".join(s["type"] for s in encoder.pre_tokenizers) or "null"
        raise found.refuse(
            f"the pre_tokenizer is {has}, not ByteLevel",
            "spaces and all other than ASCII would be unknown or left out",
        )
    if found.name == HEX_BYTES:
        raise found.refuse(model_is, "no encoder here turns text into hex bytes, so nearly all is unknown")
    if found.name == BYTE_LEVEL and encoder.type not in ("BPE", "Unigram"):
        raise found.refuse(model_is, "it looks up whole words and does not put them together from bytes")
    prefix = encoder.model.get("continuing_subword_prefix")
    if found.name == WORDPIECE and encoder.type != "WordPiece" and prefix != found.prefix:
        raise found.refuse(
            model_is, f"it looks for pieces inside a word without {found.prefix!r} and finds none"
        )
    if encoder.type == "WordPiece" and not found.continuations:
        raise found.refuse(model_is, f"it looks for {found.prefix!r} pieces, so every longer word is unknown")
    if found.name == SENTENCEPIECE and not encoder.space_mark:
        raise found.refuse(
            "neither a Metaspace pre_tokenizer nor a Replace normalizer puts U+2581 for a space",
            "no piece at the start of a word would be found",
        )
    if encoder.space_mark and not found.pieces:
        raise found.refuse("the encoder puts U+2581 for spaces", "every space would be unknown or left out")
    absent = [b for b in FALLBACK_BYTES if b not in found.tokens]
    # without any byte piece the library gives the unknown token, as if byte_fallback were false
    if encoder.model.get("byte_fallback") and 0 < len(absent) < len(FALLBACK_BYTES):
        raise found.refuse(
            "model.byte_fallback is true",
            f"{len(absent)} of '<0x00>'..'<0xFF>' are missing, first {absent[0]!r}",
        )


def _check_decoder(found: _Found, encoder: _Encoder) -> None:
    """Raise Refused unless the decoder undoes the encoder: else a model's output is another text."""
    needs: list[tuple[bool, bool, str]] = [
        (found.name == BYTE_LEVEL, _has(encoder.decoders, "ByteLevel"), "ByteLevel"),
        (found.name == SENTENCEPIECE, encoder.space_mark_undone, "Metaspace, or a Replace of U+2581,"),
        (_falls_back(found, encoder.model), _has(encoder.decoders, "ByteFallback"), "ByteFallback"),
        (found.name == WORDPIECE, _has(encoder.decoders, "WordPiece"), "WordPiece"),
        (bool(encoder.model.get("end_of_word_suffix")), _has(encoder.decoders, "BPEDecoder"), "BPEDecoder"),
        # without one the library joins tokens with spaces
        (encoder.type in ("BPE", "Unigram"), bool(encoder.decoders), "to join pieces"),
    ]
    for needed, there, name in needs:
        if needed and not there:
            has = "+".join(s["type"] for s in encoder.decoders) or "null"
            raise found.refuse(f"the decoder is {has}", f"it needs {name} to turn ids back into the text")


def _falls_back(found: _Found, model: dict[str, Any]) -> bool:
    """True when text without a token becomes byte pieces, which the vocabulary has."""
    return bool(model.get("byte_fallback")) and not found.tokens.isdisjoint(FALLBACK_BYTES)


def _unknown_id(found: _Found, model: dict[str, Any], source: str) -> int | None:
    """Find the id of the model's unknown token. Refused: none, though not all text has tokens."""
    if model["type"] == "Unigram":
        i = model.get("unk_id")
        if i is not None and (type(i) is not int or not 0 <= i < len(model["vocab"])):
            raise MalformedFile(f"{source}: model.unk_id = {short(i)} is not an id of the vocabulary")
        named = i
    else:
        token = model.get("unk_token")
        if token is not None and not isinstance(token, str):
            raise MalformedFile(f"{source}: model.unk_token = {short(token)} is not a string")
        named = None if token is None else model["vocab"].get(token)
        if token is not None and named is None and found.name != BYTE_LEVEL:
            raise MalformedFile(f"{source}: model.unk_token = {short(token)} is not in the vocabulary")
    if named is None and found.name != BYTE_LEVEL and not _falls_back(found, model):
        raise found.refuse(
            "the model has neither an unknown token nor byte_fallback"
            + (" with byte pieces" if model.get("byte_fallback") else ""),
            "text without a token would be left out without a word",
        )
    return named


def _vocabulary(model: dict[str, Any], source: str) -> dict[str, int]:
    """Read ordinary tokens and their ids. Unigram lists [piece, score], where the position is the id."""
    vocab = model.get("vocab")
    if model["type"] != "Unigram":
        return vocabulary_ids(vocab, f"{source}: model.vocab")
    if not isinstance(vocab, list):
        raise MalformedFile(f"{source}: model.vocab of a Unigram model is {short(vocab)}, not a list")
    out: dict[str, int] = {}
    for i, row in enumerate(vocab):
        if not isinstance(row, list) or len(row) != 2 or not isinstance(row[0], str):
            raise MalformedFile(f"{source}: model.vocab[{i}] = {short(row)} is not a piece and its score")
        if out.setdefault(row[0], i) != i:
            raise MalformedFile(f"{source}: model.vocab[{i}]: piece {row[0]!r} has id {out[row[0]]} already")
    return vocabulary_ids(out, f"{source}: model.vocab")


def vocabulary_ids(vocab: Any, source: str) -> dict[str, int]:
    """Check that tokens and ids are a vocabulary: not empty, ids unique and in 0..MAX_IDS-1; returns them.

    Raises MalformedFile, naming the token."""
    if not isinstance(vocab, dict) or not vocab:
        raise MalformedFile(f"{source} is {short(vocab)}, it must be an object of tokens and ids")
    by_id: dict[int, str] = {}
    for token, i in vocab.items():
        check_id(i, f"{source}: token {short(token)}")
        if by_id.setdefault(i, token) != token:
            raise MalformedFile(f"{source}: id {i} belongs to {short(by_id[i])} and to {short(token)}")
    return vocab


def check_id(i: Any, what: str) -> int:
    """Return an id. Raises MalformedFile unless the id is an integer in 0..MAX_IDS-1."""
    if type(i) is not int or not 0 <= i < MAX_IDS:
        raise MalformedFile(f"{what} has id {short(i)}, which is not an integer in 0..{MAX_IDS - 1}")
    return i


def added_tokens(fields: dict[str, Any], vocab: dict[str, int], source: str) -> list[dict[str, Any]]:
    """Read the added tokens of a tokenizer.json, checked against each other and the vocabulary.

    Raises MalformedFile."""
    added = fields.get("added_tokens") or []
    if not isinstance(added, list):
        raise MalformedFile(f"{source}: added_tokens is {short(added)}, not a list")
    by_id: dict[int, str] = {i: token for token, i in vocab.items()}
    seen: set[str] = set()
    for n, token in enumerate(added):
        where = f"{source}: added_tokens[{n}]"
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise MalformedFile(f"{where} = {short(token)} has no content that is a string")
        content, i = token["content"], check_id(token.get("id"), f"{where} {short(token['content'])}")
        if content in seen:
            raise MalformedFile(f"{where}: {short(content)} is there twice")
        seen.add(content)
        if vocab.get(content, i) != i:
            raise MalformedFile(
                f"{where}: {short(content)} has id {i}, model.vocab gives it {vocab[content]}"
            )
        if by_id.setdefault(i, content) != content:
            raise MalformedFile(f"{where}: id {i} of {short(content)} belongs to {short(by_id[i])}")
    return added


SEQUENCES = ("normalizers", "pretokenizers", "processors", "decoders")


def steps(node: Any, source: str) -> Iterator[dict[str, Any]]:
    """Yield the single normalizers, pre-tokenizers, post-processors or decoders of a step that may be a Sequence, in order.

    Raises MalformedFile: not an object with a type."""
    waiting = [] if node is None else [node]  # the next one last: a list is slow at its beginning
    while waiting:  # no recursion: how deep they nest is up to the file
        step = waiting.pop()
        if not isinstance(step, dict) or not isinstance(step.get("type"), str):
            raise MalformedFile(f"{source}: {short(step)} is not an object with a type")
        if step["type"] != "Sequence":
            yield step
            continue
        inner = next((step[k] for k in SEQUENCES if k in step), None)
        if not isinstance(inner, list):
            raise MalformedFile(f"{source}: a Sequence without a list of steps")
        waiting += reversed(inner)


def _has(found: Iterable[dict[str, Any]], name: str) -> bool:
    return any(s["type"] == name for s in found)


def _growth(found: Iterable[dict[str, Any]]) -> int:
    """Bound the characters that steps can make of one, one step after the other."""
    growth = 1
    for s in found:
        growth = min(growth * _factor(s), 1 << 62)
    return growth


def _factor(step: dict[str, Any]) -> int:
    if step["type"] == "ByteLevel":
        return 2  # its letters for bytes from 128 on are two bytes themselves
    if step["type"] == "Precompiled":
        return 32  # a table that the file holds: more than NFKC's 18
    content, pattern = step.get("content"), step.get("pattern")
    if step["type"] != "Replace" or not isinstance(content, str):
        return 1
    literal = pattern.get("String") if isinstance(pattern, dict) else pattern
    if isinstance(literal, str) and literal:
        return max(1, ceil_div(len(content), len(literal)))
    return 1 + len(content)  # an expression may match between any two characters


def pattern_of(step: dict[str, Any]) -> str:
    """Read the pattern of a Replace or Split step, given as {"String": ...} or {"Regex": ...}."""
    pattern = step.get("pattern")
    return str(next(iter(pattern.values()), "")) if isinstance(pattern, dict) else ""
