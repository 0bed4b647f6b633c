"""Make conversations ready for training: render, encode and pack them into a folder of the cache."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ...common.atomic import locked
from ...common.errors import IOFailure, Refused
from ...common.files import make_folder, sha256_of
from ...common.progress import Progress
from ...common.units import plural
from ...tokenizer.chat_template import ChatTemplate
from ...tokenizer.tokenizer import Tokenizer
from ..documents import Sides
from ..plain import DAMAGES
from ..seen import Seen
from ..source import Skipped
from .beside import ASKED
from .examples import Conversations, open_conversations
from .pack import Spool, fit, separator_of
from .packed import FORMAT, RECORD, PackManifest
from .pairs import TOO_LONG, Pairs, encode_pairs, open_pairs
from .render import EncodedExample, Encoder
from .shapes import Example, canonical

# Examples that are encoded at once.
BATCH_EXAMPLES = 256
SIDES = ("train", "val")
# Of the table of shapes: folders of other versions are not used again.
READ_AS, PAIRED_AS = 5, 4


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
        if m.unread:
            keys = ", ".join(map(repr, m.unread))
            lines.append(
                f"keys of records that are not read: {keys}; --map OURS=THEIRS says which key is which"
            )
        if m.by_turn:
            lines.append(
                f"{m.by_turn:,} conversations are trained on turn by turn: the chat template writes earlier turns otherwise than "
                "the last, so an answer is an example of its own, in the conversation up to it, where they differ"
            )
        if m.cut:
            lines.append(
                f"{plural(m.cut, 'example')} longer than {plural(m.seq_length, 'token')} lost the beginning of their context"
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
    bos: str = "auto",
    keys: str | None = None,
    pairs: bool = False,
) -> PreparedConversations:
    """Render, encode and pack the examples, or pairs, of a path into a folder below `root`, named by all that determines it.

    A whole folder of an earlier call is used again. Copies are dropped, and the side of an example follows from its content
    alone (see Sides). bos: "auto" puts the tokenizer's prefix_ids before a prompt that no template writes; keys: --map. Raises
    InputNotFound, Refused: nothing to train on, a side without examples; IOFailure."""
    corpus = open_pairs(path, keys) if pairs else open_conversations(path, keys)
    rendering = [template.text, template.tokens] if template else None
    read_by, encoded_by = (
        [FORMAT, READ_AS, corpus.map.names],
        [tokenizer.sha256, tokenizer.eos_token, rendering],
    )
    made_by: list[Any] = [
        *read_by,
        *encoded_by,
        seq_length,
        val_fraction,
        *(["pairs", PAIRED_AS] if pairs else []),
    ]
    if template is None and bos == "auto" and tokenizer.prefix_ids:
        made_by.append(list(tokenizer.prefix_ids))
    if skipped := getattr(corpus.sources, "skipped", ()):
        # The record counts them.
        made_by.append(sorted(f"{item.name}: {item.reason}" for item in skipped))
    folder = root / _digest(canonical(made_by), corpus)[:16]
    if not _is_whole(folder):
        encoder = Encoder(tokenizer, template, bos)
        template_sha = hashlib.sha256(template.text.encode()).hexdigest() if template else None
        empty = PackManifest("", seq_length, None, tokenizer.sha256, template_sha, tokenizer.vocab_size)

        def wait() -> None:
            if progress:
                progress("wait for another process, which encodes these conversations,", 0, 0)

        try:
            with locked(make_folder(folder), "encoding into it", wait):
                # Another process may have made it while this one waited.
                if not _is_whole(folder):
                    sides = Sides(val_fraction)
                    found = _pack(corpus, encoder, empty, sides, folder, progress)
                    # All examples fell on one side: once more, and one of them moves.
                    if found != sides:
                        _pack(corpus, encoder, empty, found, folder, progress)
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


def _examples(corpus: Conversations, m: PackManifest, records: _Counted) -> Iterator[Example]:
    """Yield the usable records; in m and records, count the others."""
    for item in corpus:
        if isinstance(item, Skipped):
            m.skip(item)
            records.unusable(item)
        elif isinstance(item, Example):
            yield item
    corpus.map.refuse_unmet(corpus)
    m.unread = sorted(corpus.map.unread)


def _pack(
    corpus: Conversations,
    encoder: Encoder,
    empty: PackManifest,
    sides: Sides,
    folder: Path,
    progress: Progress | None,
) -> Sides:
    """Encode and pack both sides; returns the rule that gives both sides examples, with which nothing is packed yet if it is
    another than `sides`. Raises Refused: no example, or only one."""
    m, flag = replace(empty, skipped={}), "--preferences" if isinstance(corpus, Pairs) else "--instruct"
    with ExitStack() as stack:
        spools = {s: Spool(folder / s, m.vocab_size, stack) for s in SIDES}
        rest = encoder, m, sides, spools, progress
        hashes = encode_pairs(corpus, *rest) if isinstance(corpus, Pairs) else _encode(corpus, *rest)
        counts = {side: len(spool.sizes) for side, spool in spools.items()}
        why = f"; the first that cannot be used: {m.skipped_first}" if m.skipped_first else ""
        if not any(counts.values()):
            raise Refused(f"{flag} {corpus}: no example to train on{why}")
        if not all(counts.values()):
            if len(set(hashes)) < 2 or sides.moved:
                raise Refused(
                    f"{flag} {corpus}: one example cannot be divided into one to train on and one to validate with; give "
                    f"more examples{why}"
                )
            return Sides.of(hashes, sides.fraction)
        separator = separator_of(spools["train"].inside + spools["val"].inside, encoder.tokenizer)
        together = 2 if isinstance(corpus, Pairs) else 1
        if separator is None and together > 1:
            raise Refused(
                f"{flag} {corpus}: every id of the vocabulary occurs, so none can stand between two answers"
            )
        for side, spool in spools.items():
            spool.pack(replace(m, side=side, separator=separator), together)
    return sides


def _encode(
    corpus: Conversations,
    encoder: Encoder,
    m: PackManifest,
    sides: Sides,
    spools: dict[str, Spool],
    progress: Progress | None,
) -> tuple[str, str]:
    """Encode examples into the spool of their side; in m, count those that are skipped, cut, or copies.

    All texts of a conversation are on the side of its last one. Returns the lowest and the highest hash of those."""
    low, high, records = "", "", _Counted()
    examples = _examples(corpus, m, records)
    with closing(Seen()) as seen:
        while batch := list(islice(examples, BATCH_EXAMPLES)):
            for example, encoded in zip(batch, encoder(batch), strict=True):
                if isinstance(encoded, Skipped):
                    m.skip(encoded)
                    records.unusable(encoded)
                    continue
                records.usable(example.name)
                kept = _fitted(example.name, encoded, m)
                if not kept:
                    continue
                m.by_turn += len(encoded) > 1
                side = kept[-1].sha256
                low, high = min(low or side, side), max(high, side)
                spool = spools["val" if sides.hold_out(side) else "train"]
                for text in kept:
                    if seen.add(text.sha256):
                        spool.add(text.encoded, text.sha256)
                        m.cut += text.is_cut
                    else:
                        m.duplicates += 1
            if progress:
                progress("encode examples", corpus.bytes_read, corpus.total_bytes)
    records.refuse_most()
    return low, high


class _Counted:
    """Records of each file: those that can be used and those that cannot, with the first of these."""

    def __init__(self) -> None:
        self._usable: Counter[str] = Counter()
        self._unusable: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def usable(self, name: str) -> None:
        """Count a record that becomes an example."""
        self._usable[_file_of(name)] += 1

    def unusable(self, item: Skipped) -> None:
        """Count a record that does not; a file without records has none."""
        if item.reason in (TOO_LONG, "no records", "empty", *ASKED, *DAMAGES):
            return
        self._unusable[_file_of(item.name)] += 1
        self._first.setdefault(_file_of(item.name), f"{item.name}: {item.reason}: {item.detail}")

    def refuse_most(self) -> None:
        """Raise Refused for a file of which more than half of the records cannot be used."""
        for file, bad in self._unusable.items():
            good = self._usable[file]
            if bad > good and (good or sum(self._usable.values())):
                raise Refused(
                    f"--instruct {file}: {bad:,} of {good + bad:,} records cannot be used, more than half; the first: "
                    f"{self._first[file]}. Mend them, or take them out where they are not meant to be trained on"
                )


def _file_of(name: str) -> str:
    """Drop the number of a record from its name."""
    return name.rsplit(":", 1)[0]


class _Fitted(NamedTuple):
    encoded: EncodedExample
    sha256: str
    is_cut: bool


def _fitted(name: str, texts: list[EncodedExample], m: PackManifest) -> list[_Fitted]:
    """Cut the texts of an example to the length of a row; in m, count those that are left out."""
    out, room = [], m.seq_length + 1
    for encoded in texts:
        fitted = fit(encoded, room)
        if fitted is None:
            detail = f"{plural(encoded.ids.size, 'token')}, and no whole answer in {room}"
            m.skip(Skipped(name, TOO_LONG, detail))
            continue
        sha256 = hashlib.sha256(fitted.ids.tobytes() + fitted.trained.tobytes()).hexdigest()
        out.append(_Fitted(fitted, sha256, fitted is not encoded))
    return out
