"""What encoding a corpus would give, from a sample of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..common.rounding import ceil_div
from ..tokenizer.tokenizer import Tokenizer
from .cut import Cutter
from .readers import Corpus, LongDocument, Skipped
from .sources import Source

FILES = 64  # sampled of each kind of file
FILE_BYTES = 1 << 20  # text read of each, at least


@dataclass
class Estimate:
    """Documents, tokens, bytes of UTF-8 text and seconds of the whole; what was read for it."""

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
    """Read the beginnings of up to FILES evenly spaced files of each kind and compression, and scale by bytes on disk."""
    out = Estimate(len(sources), sum(s.size for s in sources))
    cutter = Cutter(tokenizer)
    for kind in sorted({(s.kind, s.compression) for s in sources}):
        of_kind = [s for s in sources if (s.kind, s.compression) == kind]
        step = max(1, ceil_div(len(of_kind), FILES))
        read = documents = size = 0
        tokens = 0.0
        for source in of_kind[step // 2 :: step] or of_kind:
            sample = _read(Corpus([source], content_field, piece_bytes, separator), source)
            start = time.perf_counter()
            found = sum(ids.size for ids in tokenizer.encode_batch(list(cutter.pieces(sample.texts))))
            out.sample_seconds += time.perf_counter() - start
            out.sample_skipped += sample.skipped
            out.sample_documents += sample.documents
            out.sample_bytes += sample.sampled
            out.sample_tokens += found
            documents += sample.documents
            size += sample.bytes
            tokens += found * sample.bytes / max(sample.sampled, 1)
            read += sample.read
        scale = sum(s.size for s in of_kind) / max(read, 1)
        out.documents += round(documents * scale)
        out.tokens += round(tokens * scale)
        out.text_bytes += round(size * scale)
    out.seconds = out.text_bytes * out.sample_seconds / max(out.sample_bytes, 1)
    return out


@dataclass
class _Sample:
    """The beginning of a file: its documents, what of their text is encoded, and the bytes on disk that it is."""

    texts: list[str] = field(default_factory=list)
    documents: int = 0
    skipped: int = 0
    bytes: int = 0  # of text
    sampled: int = 0  # of those, in `texts`
    read: int = 0


def _read(corpus: Corpus, source: Source) -> _Sample:
    """At least FILE_BYTES of text, up to where the reader goes to the disk again: by then it has given all that it read."""
    out, at = _Sample(read=source.size), 0
    for item in corpus:
        if out.bytes >= FILE_BYTES and corpus.bytes_read > at:
            out.read = corpus.bytes_read
            break
        at = corpus.bytes_read
        if isinstance(item, Skipped):
            out.skipped += 1
            continue
        out.documents += 1
        out.bytes += item.bytes if isinstance(item, LongDocument) else len(item.data)
        for text in item.chunks() if isinstance(item, LongDocument) else [item.text]:
            if out.sampled >= FILE_BYTES:
                break
            out.texts.append(text)
            out.sampled += len(text.encode())
    return out
