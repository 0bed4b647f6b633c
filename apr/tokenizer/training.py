"""Train a byte-level BPE tokenizer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine

from ..common.errors import AprError, Refused
from ..common.progress import Progress
from ..common.units import plural
from .families import SPLIT
from .tokenizer import Tokenizer, utf8_of
from .vocab_format import BYTE_CHARACTERS

MAX_VOCAB = 200_000  # ids, special tokens included: as many as an embedding can sensibly hold
LEAST_VOCABULARY = 257  # 256 bytes and the end of text
NORMALIZERS = {"none": None, "nfc": normalizers.NFC}
# The trainer passes over a whole word for each merge inside it, so that its time grows with the square of a word's
# length: seconds at 2^16 characters, hours at 2^20.
MAX_WORD_CHARACTERS = 8192
# Runs that SPLIT keeps together, as Python's expressions can say it: letters, white space, the rest.
RUN = re.compile(r"[^\W\d_]+|\s+|(?:[^\w\s]|_)+")
LONG_SPACE = re.compile(rf"\s{{{MAX_WORD_CHARACTERS + 1}}}")


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
    """Train byte-level BPE on texts and save it in out_dir; equal texts give equal files.

    Ids are the 256 bytes, then the merges, then the EOS, then special_tokens. Fewer than vocab_size come out when the
    texts run out of pairs that occur min_frequency times. normalization: "none" or "nfc". The texts are read once and
    not kept; a word longer than MAX_WORD_CHARACTERS is counted in pieces of that length, and the manifest says how many were.
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
    built = trainer.min_frequency, trainer.vocab_size, tokenizer.normalization.lower()
    if built != (asked := (min_frequency, vocab_size - len(special), normalization)):
        raise AprError(
            f"the trainer has frequency, size and normalization {built}, asked for {asked}: a fault of apr"
        )
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
            f"vocab_size = {vocab_size} is not in {least}..{MAX_VOCAB}: 256 bytes and {plural(len(special), 'special token')} "
            "are the least"
        )
    if min_frequency < 1:
        raise Refused(f"min_frequency = {min_frequency} is not positive")
    if normalization not in NORMALIZERS:
        raise Refused(f"normalization = {normalization!r} is none of {', '.join(NORMALIZERS)}")
    for token in special:
        utf8_of(token)
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
    """Counts and hashes texts on their way to the trainer, and cuts words of more than MAX_WORD_CHARACTERS.

    Iterating raises Refused when there is no text, or one that is not Unicode."""

    def __init__(self, texts: Iterable[str], progress: Progress | None) -> None:
        self._texts, self._progress = texts, progress
        self._total = len(texts) if isinstance(texts, Sequence) else 0
        self._digest = hashlib.sha256()
        self.documents = self.bytes = self.words_cut = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            data = utf8_of(text)
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
        """Yield the text, or pieces that join to it, in which no word is longer than MAX_WORD_CHARACTERS."""
        start = 0
        if len(text) > MAX_WORD_CHARACTERS and (
            max(map(len, text.split()), default=0) > MAX_WORD_CHARACTERS or LONG_SPACE.search(text)
        ):
            for run in RUN.finditer(text):
                self.words_cut += run.end() - run.start() > MAX_WORD_CHARACTERS
                for end in range(run.start() + MAX_WORD_CHARACTERS, run.end(), MAX_WORD_CHARACTERS):
                    yield text[start:end]
                    start = end
        yield text[start:]

    def figures(self) -> dict[str, Any]:
        """Figures for the manifest; documents_sha256 is over the SHA-256 of each document, in order."""
        return {
            "documents": self.documents,
            "text_bytes": self.bytes,
            "words_cut": self.words_cut,
            "documents_sha256": self._digest.hexdigest(),
        }
