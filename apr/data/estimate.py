"""Estimate documents, tokens, bytes and time of encoding a corpus, from a sample."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..common.rounding import ceil_div
from ..tokenizer.tokenizer import Tokenizer
from .corpus import Corpus
from .cut import Cutter
from .source import Skipped, Source

# Sampled of each kind of file.
MAX_FILES = 64
# Text read of each file, at least.
SAMPLE_BYTES = 1 << 20


@dataclass
class Estimate:
    """Documents, tokens, bytes of UTF-8 text and seconds of the whole; size of the sample."""

    files: int = 0
    disk_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    seconds: float = 0.0
    sample_documents: int = 0
    sample_bytes: int = 0
    sample_tokens: int = 0
    sample_skipped: int = 0
    sample_seconds: float = 0.0

    @property
    def bytes_per_token(self) -> float:
        return self.text_bytes / max(self.tokens, 1)


def estimate(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    content_field: str = "text",
    piece_bytes: int | None = None,
    separator: str | None = None,
) -> Estimate:
    """Read the beginnings of up to MAX_FILES evenly spaced files of each kind and compression, and scale by bytes on disk."""
    out = Estimate(len(sources), sum(s.size for s in sources))
    cutter = Cutter(tokenizer)
    for kind in sorted({(s.kind, s.compression) for s in sources}):
        of_kind = [s for s in sources if (s.kind, s.compression) == kind]
        step = max(1, ceil_div(len(of_kind), MAX_FILES))
        read = documents = size = 0
        tokens = 0.0
        for source in of_kind[step // 2 :: step] or of_kind:
            sample = _read(Corpus([source], content_field, piece_bytes, separator), source)
            start = time.perf_counter()
            tokens_here = sum(ids.size for ids in tokenizer.encode_batch(list(cutter.pieces(sample.texts))))
            out.sample_seconds += time.perf_counter() - start
            out.sample_skipped += sample.skipped
            out.sample_documents += sample.documents
            out.sample_bytes += sample.sampled
            out.sample_tokens += tokens_here
            documents += sample.documents
            size += sample.bytes
            tokens += tokens_here * sample.bytes / max(sample.sampled, 1)
            read += sample.read
        scale = sum(s.size for s in of_kind) / max(read, 1)
        out.documents += round(documents * scale)
        out.tokens += round(tokens * scale)
        out.text_bytes += round(size * scale)
    out.seconds = out.text_bytes * out.sample_seconds / max(out.sample_bytes, 1)
    return out


@dataclass
class _Sample:
    """Beginning of a file.

    texts    text to encode
    bytes    of the text of its documents; sampled: of `texts`
    read     bytes on disk
    """

    texts: list[str] = field(default_factory=list)
    documents: int = 0
    skipped: int = 0
    bytes: int = 0
    sampled: int = 0
    read: int = 0


def _read(corpus: Corpus, source: Source) -> _Sample:
    """Read at least SAMPLE_BYTES of text, up to the next read from disk: by then every document read was yielded."""
    out, at = _Sample(read=source.size), 0
    for item in corpus:
        if out.bytes >= SAMPLE_BYTES and corpus.bytes_read > at:
            out.read = corpus.bytes_read
            break
        at = corpus.bytes_read
        if isinstance(item, Skipped):
            out.skipped += 1
            continue
        out.documents += 1
        out.bytes += item.num_bytes
        for text in item.chunks():
            if out.sampled >= SAMPLE_BYTES:
                break
            out.texts.append(text)
            out.sampled += len(text.encode())
    return out
