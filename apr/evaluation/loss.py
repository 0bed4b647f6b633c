"""Measure the loss on text or token shards: nats per token, bits per byte, perplexity, and the loss by position."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..common.atomic import write_figure
from ..common.errors import AprError, Refused, UsageError
from ..common.rounding import ceil_div
from ..common.units import plural
from ..data.corpus import Corpus
from ..data.cut import Cutter
from ..data.documents import Document, LongDocument
from ..data.hub_data import held_out_sources, splits_note
from ..data.shards import TokenShards
from ..data.source import Skipped
from ..tokenizer.tokenizer import Tokenizer
from ..tokenizer.vocab_format import FALLBACK_BYTES, SENTENCEPIECE, SPACE_MARK
from .score import Scored, Scorer, Window, prefix_ids

MAX_SHOWN = 20  # of documents that were left out


def windows_in(length: int, seq: int, stride: int) -> int:
    """Count the windows of a stream of `length` tokens: 0 for fewer than two tokens."""
    if length < 2:
        return 0
    return 1 + max(0, ceil_div(length - 1 - seq, stride))


def window_at(k: int, length: int, seq: int, stride: int) -> tuple[int, int, int]:
    """Compute (begin, end, skip) of window k of a stream of `length` tokens: the model reads tokens [begin, end) and predicts
    (begin, end], of which it scores all but the first `skip`.

    Windows begin every `stride` tokens; each scores what no window before it did. So with stride < seq the first
    window is scored whole, of the others the last `stride` tokens, or what is left at the end, and every token but the
    stream's first is scored exactly once (Hugging Face's guide on perplexity, with max_length = seq + 1: its windows count
    the last token too, which is predicted and never read)."""
    begin = k * stride
    return begin, min(begin + seq, length - 1), seq - stride if k else 0


def check_score(k: int, length: int, seq: int, stride: int, first: int, end: int) -> None:
    """Require that window k of a stream scores (first, end] and no token that another one scores: seq tokens in the first, then
    `stride` in each, up to the last token of the stream. Raises AprError."""
    scored = min(seq + k * stride, length - 1), min(seq + (k - 1) * stride, length - 1) if k else 0
    if (end, first) != scored:
        raise AprError(
            f"window {k} scores tokens {first} to {end} of a text of {length}, where {scored[1]} to {scored[0]} are its own"
        )


def check_sums(sums: Sums, scored_bytes: int) -> None:
    """Require what figures are made of to agree with sums made apart: bytes of the scored tokens (0: not counted by token), and
    the squared standard error, sum w (x - mean)^2 over the windows, x their means and w their tokens squared. Raises AprError."""
    if scored_bytes and sums.bytes != scored_bytes:
        raise AprError(f"{plural(sums.bytes, 'byte')} counted for tokens that stand for {scored_bytes:,}")
    w, each = sums.windows, list(zip(sums.window_nats, sums.window_tokens, strict=True))
    if w < 2 or sums.stderr is None:
        return
    mean = math.fsum(nats for nats, _ in each) / sum(n for _, n in each)
    square = math.fsum((n * (nats / n - mean)) ** 2 for nats, n in each if n) * w / (w - 1)
    error = math.sqrt(square) / sums.tokens
    if not abs(sums.stderr - error) <= 1e-6 * (error + abs(mean)):
        raise AprError(f"the standard error of the loss is {sums.stderr:.6g}, made apart {error:.6g}")


def check_stride(seq: int, stride: int) -> None:
    """Raise UsageError for a stride that would leave tokens out."""
    if not 1 <= stride <= seq:
        raise UsageError(f"--stride {stride}: must be 1 to --seq-length, {seq}, or tokens would be left out")


class ByteCount:
    """Counts the bytes of UTF-8 that tokens decode to; exact, token by token, for byte-level and sentencepiece vocabularies.

    Special tokens count 0. Other vocabularies (WordPiece, and those of no known format) are decoded together."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.table = tokenizer.token_bytes()
        self._opens = np.zeros(0, bool)  # ids whose leading space is not text where a document begins
        if self.table is None and tokenizer.format == SENTENCEPIECE:
            self._sentencepiece(tokenizer)
        self.how = "by token" if self.table is not None else "decoded by window"

    def _sentencepiece(self, tokenizer: Tokenizer) -> None:
        fields = json.loads(tokenizer.json)
        vocab = fields["model"]["vocab"]
        pairs = vocab.items() if isinstance(vocab, dict) else ((v[0], i) for i, v in enumerate(vocab))
        table, opens = np.zeros(tokenizer.vocab_size, np.int64), np.zeros(tokenizer.vocab_size, bool)
        single = set(FALLBACK_BYTES)
        for token, i in pairs:
            table[i] = 1 if token in single else len(token.replace(SPACE_MARK, " ").encode())
            opens[i] = token.startswith(SPACE_MARK)
        for added in fields.get("added_tokens") or []:
            table[added["id"]] = 0 if added.get("special") else len(added["content"].encode())
            opens[added["id"]] = False
        self.table = table
        first = tokenizer.encode("a")
        # Two bytes for one character: a space that the text does not have.
        if len(first) and opens[first[0]] and int(table[first].sum()) == 2:
            self._opens = opens

    def of(self, before: np.ndarray, ids: np.ndarray) -> int:
        """Count the bytes of tokens `ids` (n,); before (n,): the token before each."""
        if self.table is None:
            return len(self._tokenizer.decode(ids, skip_special=True).encode())
        total = int(self.table[ids].sum())
        if self._opens.size:  # after a special token a document begins
            total -= int((self._opens[ids] & (self.table[before] == 0)).sum())
        return total


@dataclass
class Sums:
    """Sums over a stream of scored windows. Units: nats, tokens, bytes."""

    seq: int
    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    windows: int = 0
    window_nats: list[float] = field(default_factory=list)
    window_tokens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.position_nats, self.position_squares = np.zeros(self.seq), np.zeros(self.seq)
        self.position_tokens = np.zeros(self.seq, np.int64)

    def add(self, window: Window, scored: Scored, count: ByteCount | None) -> None:
        """Add one window; count: None when the bytes of its tokens are unknown."""
        losses, place = scored.losses, slice(window.skip, window.skip + len(scored.losses))
        nats = float(losses.sum())
        self.nats += nats
        self.tokens += len(losses)
        self.windows += 1
        self.window_nats.append(nats)
        self.window_tokens.append(len(losses))
        self.position_nats[place] += losses
        self.position_squares[place] += losses**2
        self.position_tokens[place] += 1
        if count:
            ids = np.asarray(window.ids, np.int64)
            self.bytes += count.of(ids[place.start : place.stop], ids[place.start + 1 : place.stop + 1])

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def stderr(self) -> float | None:
        """Standard error of the mean, None of one window: windows are taken as drawn at random, as tokens within one depend
        on each other.  sqrt(W / (W - 1) sum_w (L_w - mean n_w)^2) / sum_w n_w  (Cochran 1977, section 2.11: a ratio)."""
        w = self.windows
        if w < 2:
            return None
        off = np.array(self.window_nats) - self.mean * np.array(self.window_tokens)
        return math.sqrt(w / (w - 1) * float((off**2).sum())) / self.tokens

    def figures(self) -> dict[str, Any]:
        """Figures of `apr eval --json`."""
        bits = self.nats / self.bytes / math.log(2) if self.bytes else None
        with np.errstate(over="ignore"):
            perplexity = float(np.exp(self.mean))
        return {
            "loss": self.mean,
            "loss_stderr": self.stderr,
            "bits_per_byte": bits,
            "perplexity": perplexity,
            "nats": self.nats,
            "tokens": self.tokens,
            "bytes": self.bytes or None,
            "windows": self.windows,
        }

    def by_position(self) -> list[dict[str, Any]]:
        """Mean loss of tokens predicted from `first` to `last` tokens of context, in ranges that double."""
        rows, first = [], 0
        while first < self.seq:
            last = 2 * first + 1
            if self.seq - last < (last - first) // 2:  # no range of a few positions at the end
                last = self.seq
            part = slice(first, last)
            n = int(self.position_tokens[part].sum())
            if n:
                mean = float(self.position_nats[part].sum()) / n
                square = float(self.position_squares[part].sum()) / n
                error = math.sqrt(max(square - mean**2, 0) / (n - 1)) if n > 1 else None
                rows.append({"first": first + 1, "last": last, "loss": mean, "stderr": error, "tokens": n})
            first = last
        return rows


@dataclass(frozen=True)
class Texts:
    """A source of windows: documents of files, or shards."""

    windows: Callable[[], Iterator[tuple[Window, int]]]  # with how much of `total` was read when it came
    total: int
    unit: str
    facts: dict[str, Any]


def shard_windows(shards: TokenShards, seq: int, stride: int, max_tokens: int | None) -> Texts:
    """Cut windows within each shard, to its very end. With max_tokens so many tokens or a few more, in windows that are evenly
    spaced over all shards, as the validation loss of training takes them."""
    check_stride(seq, stride)
    sizes = [a.size for a in shards.arrays]
    ends = np.cumsum([windows_in(n, seq, stride) for n in sizes])
    every = int(ends[-1])
    if not every:
        raise Refused(f"{shards.folder}: no shard has two tokens")
    take = every if max_tokens is None else min(every, ceil_div(max_tokens, stride))

    def windows() -> Iterator[tuple[Window, int]]:
        for number in range(take):
            i = number * every // take
            if number + 1 == take and every - i > ceil_div(every, take):
                raise AprError(
                    f"{shards.folder}: the last of {plural(take, 'window')} is number {i:,} of {every:,}"
                )
            shard = int(np.searchsorted(ends, i, side="right"))
            # Reading behind the end of a mapped file would end the process.
            shards.check_sizes(np.array([shard]))
            k = i - int(ends[shard - 1] if shard else 0)
            begin, end, skip = window_at(k, sizes[shard], seq, stride)
            check_score(k, sizes[shard], seq, stride, begin + skip, end)
            yield Window(shards.arrays[shard][begin : end + 1].astype(np.int32), skip), number + 1

    facts = {
        "dataset": str(shards.folder),
        "dataset_sha256": shards.sha256,
        "documents": shards.total_documents,
        "windows_in_all": every,
        "left_out": 0,
        "left_out_first": [],
    }
    return Texts(windows, take, "windows", facts)


def text_windows(
    path: str,
    tokenizer: Tokenizer,
    seq: int,
    stride: int,
    max_tokens: int | None,
    bos: str,
    content_field: str,
) -> Texts:
    """Cut windows of every document by itself, after the ids that --bos asks for. With max_tokens the first ones."""
    check_stride(seq, stride)
    corpus = Corpus(held_out_sources(path), content_field)
    before = prefix_ids(tokenizer, bos)
    facts: dict[str, Any] = {
        "text": path, "documents": 0, "documents_too_short": 0, "left_out": 0, "left_out_first": [],
        "bos": bos, "bos_ids": before,
    }  # fmt: skip

    if note := splits_note(path, is_scored=True):
        facts["splits"] = note

    def windows() -> Iterator[tuple[Window, int]]:
        tokens = 0
        for item in corpus:
            if isinstance(item, Skipped):
                facts["left_out"] += 1
                if len(facts["left_out_first"]) < MAX_SHOWN:
                    facts["left_out_first"].append(f"{item.name}: {item.reason}: {item.detail}")
                continue
            ids = np.concatenate([np.array(before, np.int32), _encode(tokenizer, item)])
            facts["documents"] += 1
            facts["documents_too_short"] += len(ids) < 2
            for k in range(windows_in(len(ids), seq, stride)):
                begin, end, skip = window_at(k, len(ids), seq, stride)
                check_score(k, len(ids), seq, stride, begin + skip, end)
                yield Window(ids[begin : end + 1], skip), corpus.bytes_read
                tokens += end - begin - skip
                if max_tokens is not None and tokens >= max_tokens:
                    return
        if not tokens:
            why = "; ".join(facts["left_out_first"][:3]) or "a document needs two tokens"
            raise Refused(f"--text {path}: no token to score: {why}")

    return Texts(windows, corpus.total_bytes, "bytes", facts)


def _encode(tokenizer: Tokenizer, item: Document | LongDocument) -> np.ndarray:
    if isinstance(item, LongDocument):
        if not tokenizer.byte_level:
            return tokenizer.encode("".join(item.chunks())).astype(np.int32)
        pieces = list(Cutter(tokenizer).pieces(item.chunks()))
        return np.concatenate(tokenizer.encode_batch(pieces)).astype(np.int32)
    return tokenizer.encode(item.text).astype(np.int32)


def measure(
    scorer: Scorer,
    texts: Texts,
    count: ByteCount | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sums:
    """Score all windows. progress(done, total) is called after every window, in the unit of `texts`."""
    sums, scored_bytes = Sums(scorer.seq), 0
    held: deque[tuple[Window, int]] = deque()

    def passing() -> Iterator[Window]:
        for pair in texts.windows():
            held.append(pair)
            yield pair[0]

    for scored in scorer.score(passing()):
        window, at = held.popleft()
        sums.add(window, scored, count)
        if count and count.table is not None:
            # The scored tokens are the last ones of a window.
            n = len(scored.losses)
            scored_bytes += count.of(
                *(np.asarray(x, np.int64) for x in (window.ids[-n - 1 : -1], window.ids[-n:]))
            )
        progress(at, texts.total)
    check_sums(sums, scored_bytes)
    # Files are read by blocks: the place of a document is not known to the byte.
    progress(texts.total, texts.total)
    return sums


def picture(rows: Iterable[dict[str, Any]], sums: Sums, title: str, path: str | Path) -> None:
    """Draw the loss by position in the window as a PNG: each position, and the means of `by_position`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    there = np.flatnonzero(sums.position_tokens)
    axes.plot(
        there + 1,
        sums.position_nats[there] / sums.position_tokens[there],
        color="tab:blue",
        alpha=0.3,
        linewidth=0.8,
        label="each position",
    )
    rows = list(rows)
    middle = [math.sqrt(r["first"] * r["last"]) for r in rows]
    error = [2 * (r["stderr"] or 0) for r in rows]
    axes.errorbar(
        middle, [r["loss"] for r in rows], error, fmt="o-", color="tab:red", markersize=4,
        label="mean of a range, with two standard errors",
    )  # fmt: skip
    axes.axhline(sums.mean, color="grey", linewidth=0.8, linestyle="--", label="mean of all")
    axes.set(xscale="log", xlabel="tokens of context", ylabel="loss (nats/token)", title=title)
    axes.grid(alpha=0.2)
    axes.legend()
    write_figure(path, figure)
