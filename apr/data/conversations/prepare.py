"""Make conversations ready for training: render, encode and pack them into a folder of the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from ...common.atomic import locked
from ...common.errors import IOFailure, Refused
from ...common.files import make_folder, sha256_of
from ...common.progress import Progress
from ...tokenizer.chat_template import ChatTemplate
from ...tokenizer.tokenizer import Tokenizer
from ..documents import is_held_out
from ..seen import Seen
from ..source import Skipped
from .examples import Conversations, Example, canonical, open_conversations
from .pack import Spool, fit, separator_of
from .packed import FORMAT, RECORD, PackManifest
from .render import Encoder

# Examples that are encoded at once.
BATCH_EXAMPLES = 256
SIDES = ("train", "val")


@dataclass(frozen=True)
class PreparedConversations:
    """A folder of `prepare_conversations`: FOLDER/train and FOLDER/val."""

    folder: Path

    @property
    def sides(self) -> dict[str, Path]:
        return {side: self.folder / side for side in SIDES}

    def left_out(self) -> str:
        """Report the examples that were skipped or cut; "" without any."""
        m = PackManifest.read(self.folder / "train" / RECORD)
        lines = []
        if m.skipped:
            counts = ", ".join(f"{n:,} {reason}" for reason, n in sorted(m.skipped.items()))
            lines.append(f"examples that cannot be used: {counts}; the first: {m.skipped_first}")
        if m.cut:
            lines.append(
                f"{m.cut:,} examples longer than {m.seq_length} tokens lost the beginning of their context"
            )
        return "\n".join(lines)


def prepare_conversations(
    path: str,
    root: Path,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    seq_length: int,
    val_fraction: float,
    progress: Progress | None = None,
) -> PreparedConversations:
    """Render, encode and pack the examples of a path into a folder below `root`, named by all that determines it.

    A whole folder of an earlier call is used again. Copies are dropped, and the side of an example follows from its content
    alone. Raises InputNotFound, Refused: nothing to train on, a side without examples; IOFailure."""
    corpus = open_conversations(path)
    rendering = [template.text, template.tokens] if template else None
    made_by = [FORMAT, tokenizer.sha256, tokenizer.eos_token, rendering, seq_length, val_fraction]
    folder = root / _digest(canonical(made_by), corpus)[:16]
    if not _is_whole(folder):
        encoder = Encoder(tokenizer, template)
        template_sha = hashlib.sha256(template.text.encode()).hexdigest() if template else None
        m = PackManifest("", seq_length, None, tokenizer.sha256, template_sha, tokenizer.vocab_size)

        def wait() -> None:
            if progress:
                progress("wait for another process, which encodes these conversations,", 0, 0)

        try:
            with locked(make_folder(folder), "encoding into it", wait), ExitStack() as stack:
                # Another process may have made it while this one waited.
                if not _is_whole(folder):
                    spools = {s: Spool(folder / s, m.vocab_size, stack) for s in SIDES}
                    _encode(corpus, encoder, m, val_fraction, spools, progress)
                    separator = separator_of(spools["train"].inside + spools["val"].inside, tokenizer)
                    for side, spool in spools.items():
                        spool.pack(replace(m, side=side, separator=separator))
        except OSError as e:
            raise IOFailure(
                f"{e.filename or folder}: cannot write: {e.strerror}; make room or set APR_CACHE"
            ) from e
    return PreparedConversations(folder)


def _is_whole(folder: Path) -> bool:
    return all((folder / side / RECORD).is_file() for side in SIDES)


def _digest(made_by: str, corpus: Conversations) -> str:
    """Hash the settings and every file."""
    digest = hashlib.sha256(made_by.encode())
    for source in corpus.sources:
        digest.update(source.compression.encode() + b"\0")
        digest.update(bytes.fromhex(sha256_of(source.path)[0]))
    return digest.hexdigest()


def _examples(corpus: Conversations, m: PackManifest) -> Iterator[Example]:
    """Yield the usable records; in m, count the others."""
    for item in corpus:
        if isinstance(item, Skipped):
            m.skip(item)
        elif isinstance(item, Example):
            yield item


def _encode(
    corpus: Conversations,
    encoder: Encoder,
    m: PackManifest,
    val_fraction: float,
    spools: dict[str, Spool],
    progress: Progress | None,
) -> None:
    """Encode examples into the spool of their side; in m, count those that are skipped, cut, or copies."""
    room, examples = m.seq_length + 1, _examples(corpus, m)
    with closing(Seen()) as seen:
        while batch := list(islice(examples, BATCH_EXAMPLES)):
            for example, encoded in zip(batch, encoder(batch), strict=True):
                if isinstance(encoded, Skipped):
                    m.skip(encoded)
                    continue
                fitted = fit(encoded, room)
                if fitted is None:
                    detail = f"{encoded.ids.size} tokens, and no whole answer in {room}"
                    m.skip(Skipped(example.name, "longer than --seq-length", detail))
                    continue
                sha256 = hashlib.sha256(fitted.ids.tobytes() + fitted.trained.tobytes()).hexdigest()
                if not seen.add(sha256):
                    m.duplicates += 1
                    continue
                m.cut += fitted is not encoded
                spools["val" if is_held_out(sha256, val_fraction) else "train"].add(fitted, sha256)
            if progress:
                progress("encode examples", corpus.bytes_read, corpus.total_bytes)
    counts = {side: len(spool.sizes) for side, spool in spools.items()}
    if not any(counts.values()):
        why = f"; the first that cannot be used: {m.skipped_first}" if m.skipped_first else ""
        raise Refused(f"--instruct {corpus}: no example to train on{why}")
    for side, n in counts.items():
        if not n:
            raise Refused(
                f"--instruct {corpus}: --val-fraction {val_fraction} of {sum(counts.values())} examples leaves none for {side}; "
                "give another fraction, or more examples"
            )
