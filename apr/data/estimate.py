"""What encoding a corpus would give, from a sample of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .cut import Cutter
from .readers import Corpus, LongDocument, Skipped
from .sources import Source
from .tokenizer import Tokenizer

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
        step = max(1, -(-len(of_kind) // FILES))
        read = documents = size = tokens = 0
        for source in of_kind[step // 2 :: step] or of_kind:
            corpus = Corpus([source], content_field, piece_bytes, separator)
            texts: list[str] = []
            taken, whole = 0, True
            for text, new in _texts(corpus, out):
                texts.append(text)
                documents += new
                taken += len(text.encode())
                if taken >= FILE_BYTES:
                    whole = False
                    break
            start = time.perf_counter()
            tokens += sum(ids.size for ids in tokenizer.encode_batch(list(cutter.pieces(texts))))
            out.sample_seconds += time.perf_counter() - start
            size += taken
            # What was read of a text file is known exactly; of an archive only what was taken off the disk.
            read += source.size if whole else taken if kind == ("text", "") else max(1, corpus.bytes_read)
        scale = sum(s.size for s in of_kind) / max(read, 1)
        out.documents += round(documents * scale)
        out.tokens += round(tokens * scale)
        out.text_bytes += round(size * scale)
        out.sample_documents += documents
        out.sample_bytes += size
        out.sample_tokens += tokens
    out.seconds = out.text_bytes * out.sample_seconds / max(out.sample_bytes, 1)
    return out


def _texts(corpus: Corpus, out: Estimate) -> Iterator[tuple[str, bool]]:
    """Texts, long ones in chunks, and whether each begins a document."""
    for item in corpus:
        if isinstance(item, Skipped):
            out.sample_skipped += 1
            continue
        new = True
        for text in item.chunks() if isinstance(item, LongDocument) else [item.text]:
            yield text, new
            new = False
