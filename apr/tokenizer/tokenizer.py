"""Text to token ids and back, and training a byte-level BPE tokenizer.

The file format is `tokenizer.json` of the tokenizers library, which the models people know ship.
"""

from __future__ import annotations

import array
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine

from ..common.atomic import write_json, write_text
from ..common.errors import MalformedFile, Refused
from ..common.files import make_folder, parse_json, read_text, short
from .families import SPLIT
from .vocab_format import BYTE_CHARACTERS, BYTE_LEVEL, OTHER, SENTENCEPIECE, check

# A forked child has none of the library's threads and would wait for them for ever (or, where the
# variable is not set, print a warning): it encodes on its own. The library reads the variable at each call.
os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))

Progress = Callable[[str, int, int], None]  # stage, documents done, documents in all (0: not known)

FORMAT = "apr-tokenizer-1"
MAX_VOCAB = 200_000  # ids, special tokens included: what an embedding can sensibly hold
NORMALIZERS = {"none": None, "nfc": normalizers.NFC}
# The trainer passes over a whole word for each merge inside it, so that its time grows with the square of a word's
# length: seconds at 2^16 characters, hours at 2^20.
LONGEST_WORD = 8192
# What SPLIT keeps together, as Python's expressions can say it: letters, white space, the rest.
RUN = re.compile(r"[^\W\d_]+|\s+|(?:[^\w\s]|_)+")
LONG_SPACE = re.compile(rf"\s{{{LONGEST_WORD + 1}}}")

assert array.array("I").itemsize == 4  # encode_batch hands the library's ids to NumPy through it

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
        self.json = text
        self.source = source
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        self.vocab_size = max(self._engine.get_vocab().values(), default=-1) + 1
        merges = fields["model"].get("merges") or []
        self.merges = (
            len(merges) if isinstance(merges, list) else 0
        )  # the library passes over what BPE alone has
        self.normalization = str((fields.get("normalizer") or {}).get("type", "none"))
        self.format, self.figures, self.byte_level = vocab.name, vocab.figures, vocab.name == BYTE_LEVEL
        self.made: dict[str, Any] | None = None
        self.eos_token, self.eos_id = self._resolve_eos(eos)
        # Some byte-level files name the end of text as the unknown token, which bytes never need: its count would
        # then be the number of documents.
        self.unknown_id = None if self.byte_level and vocab.unknown_id == self.eos_id else vocab.unknown_id

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """From a tokenizer.json or the folder that holds one; tokenizer_config.json beside it names the EOS.

        Raises InputNotFound, MalformedFile (also when a manifest.json of ours has another sha256), Refused, IOFailure."""
        path = Path(path)
        if os.path.isdir(path):
            path = path / "tokenizer.json"
        text = read_text(path, "give a tokenizer.json or the folder that holds one")
        tokenizer = cls(text, str(path), eos_of_config(path.with_name("tokenizer_config.json")))
        manifest = path.with_name("manifest.json")
        d = parse_json(read_text(manifest), str(manifest), unique=True) if os.path.lexists(manifest) else {}
        if d.get("format") == FORMAT:
            if d.get("sha256") != tokenizer.sha256:
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
        """From the text of a tokenizer.json, such as a checkpoint embeds; `source` is for messages.

        eos: text or id of the added token that ends a document, where something beside the text says it.
        """
        return cls(text, source, eos)

    def _check_added(self, added: list[dict[str, Any]], source: str) -> None:
        """MalformedFile unless the engine gives each added token the id that the file says: it numbers those outside
        the vocabulary from the number of tokens on, whatever they are said to be."""
        for token in added:
            got = self._engine.token_to_id(token["content"])
            if got != token["id"]:
                raise MalformedFile(
                    f"{source}: added token {token['content']!r} has id {token['id']}, the library gives it {got}: the ids "
                    "before it have holes; take the vocabulary and the added tokens from the same model"
                )

    def _resolve_eos(self, eos: str | int | None) -> tuple[str | None, int | None]:
        """Text and id of the added token that ends a text. Refused: an ordinary string; MalformedFile: no token."""
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
        """Token ids of a text, uint32 (n,). Refused: a lone surrogate, which no UTF-8 file can hold."""
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_marked(self, text: str) -> np.ndarray:
        """Token ids of a text in which special tokens stand for themselves, as a chat template writes them, uint32 (n,)."""
        self._engine.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._engine.encode_special_tokens = True

    def special_tokens(self) -> dict[int, str]:
        """The special added tokens: text by id."""
        added = self._engine.get_added_tokens_decoder()
        return {i: token.content for i, token in added.items() if token.special}

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[np.ndarray]:
        """Token ids of several texts on all cores, each uint32 (n,)."""
        try:
            with _library(self.source, "text cannot be encoded"):
                rows = self._engine.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except TypeError:
            for text in texts:
                _check_text(text)
            raise
        return [np.frombuffer(array.array("I", row.ids), np.uint32) for row in rows]

    def normalize(self, text: str) -> str:
        """What the encoder makes of a text before it cuts it; the text itself where there is no normalizer."""
        normalizer = self._engine.normalizer
        if normalizer is None:
            return text
        with _library(self.source, "text cannot be normalized"):
            return normalizer.normalize_str(text)

    def check_round_trip(self, text: str) -> str | None:
        """None when decode inverts encode on this text, else what differs.

        Byte-level: the decoded text is normalize(text). Others: it has the same ids again, and the same text after
        normalizing; of WordPiece only the ids, as it loses white space and case, and of vocabularies of no known
        format the text without its white space."""
        ids = self.encode(text)
        back = self.decode(ids)
        if self.byte_level:
            return _difference(back, self.normalize(text))
        again = self.encode(back)
        if not np.array_equal(ids, again):
            n = min(ids.size, again.size)
            at = next(iter(np.flatnonzero(ids[:n] != again[:n])), n)
            got, want = again[at : at + 5].tolist(), ids[at : at + 5].tolist()
            return f"token {at}: the decoded text has ids {got}, the text {want}"
        got, want = self.normalize(back), self.normalize(text)
        if self.format == SENTENCEPIECE:
            return _difference(got, want)
        if self.format == OTHER:
            return _difference("".join(got.split()), "".join(want.split()))
        return None

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = False) -> str:
        """The text of token ids; what is not text (stray bytes, ids that only the embedding has) is U+FFFD."""
        ids = np.asarray(ids, dtype=np.int64)
        if (ids < 0).any():
            raise Refused(f"{self.source}: id {ids.min()} is negative")
        parts, start = [], 0
        # The library would leave out an id it does not know without a word.
        for end in [*np.flatnonzero(ids >= self.vocab_size), ids.size]:
            with _library(self.source, "ids cannot be decoded"):
                parts.append(self._engine.decode(ids[start:end].tolist(), skip_special_tokens=skip_special))
            start = end + 1
        return "\ufffd".join(parts)

    def token_bytes(self) -> np.ndarray | None:
        """Bytes of UTF-8 text that each id stands for, int64 (vocab_size,): 0 for special tokens and holes.

        None unless byte-level: elsewhere that depends on the ids around it."""
        if not self.byte_level:
            return None
        out = np.zeros(self.vocab_size, np.int64)
        for token, i in self._engine.get_vocab(with_added_tokens=False).items():
            out[i] = len(token)  # a byte character stands for one byte
        for i, added in self._engine.get_added_tokens_decoder().items():
            out[i] = 0 if added.special else len(added.content.encode())
        return out

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


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    out_dir: str | Path,
    eos_token: str | None = "<|endoftext|>",
    special_tokens: Sequence[str] = (),
    min_frequency: int = 2,
    progress: Progress | None = None,
    normalization: str = "none",
) -> Tokenizer:
    """Byte-level BPE over the texts, saved in out_dir; the same texts give the same files.

    Ids are the 256 bytes, then the merges, then the EOS, then special_tokens. Fewer than vocab_size come out when the
    texts run out of pairs that occur min_frequency times. normalization: "none" or "nfc". The texts are read once and
    not kept; a word longer than LONGEST_WORD is counted in pieces of that length, and the manifest says how many were.
    Raises Refused: bounds, no text, special tokens that are empty, there twice, or ordinary tokens of these texts."""
    special = [*([] if eos_token is None else [eos_token]), *special_tokens]
    _check_training(vocab_size, special, min_frequency, normalization)
    engine = _untrained(normalization)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special),
        min_frequency=min_frequency,
        show_progress=False,
        initial_alphabet=list(BYTE_CHARACTERS),
    )
    counted = _Counted(texts, progress)
    engine.train_from_iterator(iter(counted), trainer)
    for token in special:
        if engine.token_to_id(token) is not None:
            raise Refused(f"special token {token!r} is an ordinary token of these texts; choose another")
    # After training, not as special tokens of the trainer: so no merge can ever lead to their ids.
    engine.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    out_dir = Path(out_dir)
    tokenizer = Tokenizer(engine.to_str(pretty=True), str(out_dir / "tokenizer.json"), eos_token)
    if eos_token is None:  # not one of special_tokens that happens to have a familiar name
        tokenizer.eos_token = tokenizer.eos_id = None
    tokenizer.made = {
        "by": f"training, tokenizers {tokenizers.__version__}",
        "vocab_size": vocab_size,
        "min_frequency": min_frequency,
        "normalization": normalization,
        "special_tokens": special,
        **counted.figures(),
    }
    tokenizer.save(out_dir)
    return tokenizer


def _check_training(vocab_size: int, special: list[str], min_frequency: int, normalization: str) -> None:
    least = len(BYTE_CHARACTERS) + len(special)
    if not least <= vocab_size <= MAX_VOCAB:
        raise Refused(
            f"vocab_size = {vocab_size} is not in {least}..{MAX_VOCAB}: 256 bytes and {len(special)} special tokens "
            "are the least"
        )
    if min_frequency < 1:
        raise Refused(f"min_frequency = {min_frequency} is not positive")
    if normalization not in NORMALIZERS:
        raise Refused(f"normalization = {normalization!r} is none of {', '.join(NORMALIZERS)}")
    for token in special:
        _check_text(token)
        if not token or special.count(token) > 1:
            raise Refused(f"special token {token!r} is {'there twice' if token else 'empty'} in {special}")


def _untrained(normalization: str) -> Engine:
    engine = Engine(models.BPE())
    normalizer = NORMALIZERS[normalization]
    if normalizer:
        engine.normalizer = normalizer()
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    engine.decoder = decoders.ByteLevel()
    return engine


class _Counted:
    """Texts on their way to the trainer: counted, hashed, and words without end cut into pieces.

    Iterating raises Refused when there is no text, or one that is not Unicode."""

    def __init__(self, texts: Iterable[str], progress: Progress | None) -> None:
        self._texts, self._progress = texts, progress
        self._total = len(texts) if isinstance(texts, Sequence) else 0
        self._digest = hashlib.sha256()
        self.documents = self.bytes = self.words_cut = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            data = _check_text(text)
            if data:
                self.documents += 1
                self.bytes += len(data)
                self._digest.update(hashlib.sha256(data).digest())
            yield from self._pieces(text)
            if self._progress:
                self._progress("train tokenizer", self.documents, self._total)
        if not self.documents:
            raise Refused("no text to train a tokenizer on")

    def _pieces(self, text: str) -> Iterator[str]:
        """The text, or pieces of it that join to it, in which no word is longer than LONGEST_WORD."""
        start = 0
        if len(text) > LONGEST_WORD and (
            max(map(len, text.split()), default=0) > LONGEST_WORD or LONG_SPACE.search(text)
        ):
            for run in RUN.finditer(text):
                self.words_cut += run.end() - run.start() > LONGEST_WORD
                for end in range(run.start() + LONGEST_WORD, run.end(), LONGEST_WORD):
                    yield text[start:end]
                    start = end
        yield text[start:]

    def figures(self) -> dict[str, Any]:
        """For the manifest; documents_sha256 is over the SHA-256 of each document, in their order."""
        return {
            "documents": self.documents,
            "text_bytes": self.bytes,
            "words_cut": self.words_cut,
            "documents_sha256": self._digest.hexdigest(),
        }


def _check_text(text: str) -> bytes:
    """Its UTF-8."""
    try:
        return text.encode()
    except UnicodeEncodeError as e:
        raise Refused(f"text holds a lone surrogate at character {e.start}; it is not Unicode text") from None


def _difference(got: str, want: str) -> str | None:
    """Where two texts first differ, or None."""
    if got == want:
        return None
    at = next(
        (i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want))
    )
    around = slice(max(at - 10, 0), at + 10)
    return f"character {at}: got {got[around]!r}, want {want[around]!r}"


def eos_of_config(path: Path) -> str | None:
    """eos_token of a tokenizer_config.json, which spells it as a string or as {"content": ...}.

    None where there is no such file or key. Raises MalformedFile, InputNotFound: a folder in its place."""
    if not os.path.lexists(path):
        return None
    value: Any = parse_json(read_text(path), str(path), unique=True).get("eos_token")
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise MalformedFile(
            f"{path}: eos_token = {short(value)} is not a string; name a token, or leave it out"
        )
    return value


@contextmanager
def _library(source: str, what: str) -> Iterator[None]:
    """MalformedFile for what the tokenizers library raises: bare Exception, and the panics of its Rust code, which are no
    Exception and would end the process. TypeError is ours: an argument that is none."""
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
