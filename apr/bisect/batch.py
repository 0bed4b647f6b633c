"""Batches to bisect with: text through the model's tokenizer, given ids, random ids, or windows of a dataset, and their
checks."""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..common.errors import Refused, UsageError
from ..common.files import opened
from ..common.units import plural
from ..data.batches import Batches, Windows
from ..data.manifest import MANIFEST, read_manifest
from ..data.shards import TokenShards
from ..model.config import ModelConfig
from ..model.transformer import IGNORED
from ..tokenizer.tokenizer import Tokenizer
from .comparisons import exact, holds
from .report import EXACT, ArrayComparison
from .side import Batch

IGNORE_EVERY = 7  # so many targets are left out of the loss, so that leaving them out is tested
MAX_WINDOWS = 4096
DOCUMENT = 6  # tokens of a document, in ids that have none of their own
FEWEST_DISTINCT = 4

# Prose in several scripts, code, digits and punctuation: what a tokenizer and a mask have to get right.
PASSAGE = """The old clockmaker wound the last of his clocks and listened. Every tick was a little late, he thought,
and the one on the shelf had stopped at 7:45. "You will outlast me," he told it, "but not by much."

def mean(values: list[float]) -> float:
    total = sum(values)
    return total / len(values)  # 0 / 0 raises

Der Zug nach Zürich fährt um 12.30 Uhr ab. Où est la gare, s'il vous plaît? Сегодня идёт снег. 今日はとても寒い。
The sum of the first 1024 numbers is 524800; in 2026 nobody was surprised that 3.14159 is not pi.
A dog, a cat and a small grey mouse lived in one house. One day the mouse said: let us bake bread. The cat slept.
"""


def in_documents(batch: Batch, end: int) -> Batch:
    """Put `end` in place of every DOCUMENT-th id; attention stops there."""
    ids = batch.ids.copy()
    ids.reshape(-1)[DOCUMENT - 1 :: DOCUMENT] = end
    return replace(
        batch, ids=ids, document_end=end, words=f"{batch.words}, in documents of {DOCUMENT} tokens"
    )


def from_text(
    text: str, tokenizer: Tokenizer, shape: tuple[int, int], source: str
) -> tuple[Batch, list[ArrayComparison]]:
    """Make a batch of the first B * T + 1 tokens of a text, and compare the decoded ids with the text. Raises Refused for a
    text that is too short."""
    b, t = shape
    ids = np.asarray(tokenizer.encode(text), np.int32)
    if len(ids) < b * t + 1:
        raise Refused(
            f"{source}: {plural(len(ids), 'token')}, {plural(b, 'sequence')} of {t} and one more are "
            f"{b * t + 1}; give a longer text, "
            "or lower --batch-size or --seq-length"
        )
    back = tokenizer.decode(ids)
    want = unicodedata.normalize("NFC", text)
    lost = next(
        (i for i, (x, y) in enumerate(zip(back, want, strict=False)) if x != y), min(len(back), len(want))
    )
    same = unicodedata.normalize("NFC", back.strip()) == want.strip()
    rows = [
        holds("data", "decode(encode)", "text", same,
              f"the ids are not the text: from character {lost} on {back[lost:lost + 20]!r} for {want[lost:lost + 20]!r}")
    ]  # fmt: skip
    flat = ids[: b * t + 1]
    windows = np.stack([flat[i * t : (i + 1) * t + 1] for i in range(b)])
    batch = Batch(windows[:, :-1], _thinned(windows[:, 1:]), f"{b} x {t} tokens of {source}")
    return batch, rows


def at_random(cfg: ModelConfig, shape: tuple[int, int], seed: int) -> Batch:
    """Draw ids at random, for models without a tokenizer."""
    rng = np.random.default_rng(seed)
    ids, targets = rng.integers(0, cfg.vocab_size, (2, *shape), dtype=np.int32)
    return Batch(ids, _thinned(targets), f"{shape[0]} x {shape[1]} ids drawn at random, seed {seed}")


def from_ids(ids: np.ndarray, targets: np.ndarray, source: str) -> Batch:
    """Make a batch of given ids and targets. Raises UsageError for ids that show no fault."""
    if ids.shape[1] < 2:
        raise UsageError(f"{source}: one position shows no fault of attention; give at least 2")
    if not (targets >= 0).any():
        raise UsageError("no target to compute a loss of: give at least two tokens, or --targets")
    return Batch(ids, targets, f"{ids.shape[0]} x {ids.shape[1]} ids of {source}")


def from_dataset(
    folder: str, shape: tuple[int, int], seed: int, vocab_size: int
) -> tuple[Batch, list[ArrayComparison]]:
    """Make the first batch that training would draw of a folder of token shards, and check windows and their order."""
    path = Path(folder)
    if not (path / MANIFEST).is_file() and (path / "train").is_dir():
        path /= "train"
    shards = TokenShards(path)
    if shards.vocab_size > vocab_size:
        raise Refused(
            f"{path}: encoded with {plural(shards.vocab_size, 'id')}, the model has {vocab_size}; give "
            f"the dataset that the model was "
            "trained on, or one that was encoded with its tokenizer"
        )
    windows = Windows(shards, shape[1])
    if len(windows) < shape[0]:
        raise Refused(
            f"{path}: {plural(len(windows), 'window')} of {plural(shape[1], 'token')}, asked for {shape[0]}; lower --batch-size"
        )
    ids, targets = Batches(windows, shape[0], seed).next()
    batch = Batch(
        ids, _thinned(targets), f"the first {shape[0]} x {shape[1]} tokens that training draws of {path}"
    )
    return batch, [*windows_rows(windows, path), *order_rows(windows, seed)]


def windows_rows(windows: Windows, path: Path) -> list[ArrayComparison]:
    """Compare the windows of training with the bytes of the shards: ids, and as targets the ids that follow."""
    t, rows = windows.seq_length, []
    raw = []
    for shard in read_manifest(path / MANIFEST).shards:
        with opened(path / shard["name"]) as (f, _):
            flat = np.fromfile(f, "<u4", count=min(shard["tokens"], MAX_WINDOWS * t + 1))
        raw += [flat[i * t : (i + 1) * t + 1] for i in range((len(flat) - 1) // t)]
        if len(raw) >= MAX_WINDOWS or len(flat) < shard["tokens"]:
            break
    raw = raw[: min(MAX_WINDOWS, len(windows))]
    want = np.stack(raw).astype(np.int64)
    ids, targets = windows.read(np.arange(len(raw)))
    for name, got, true in (("ids", ids, want[:, :-1]), ("targets", targets, want[:, 1:])):
        rows.append(_equal("Windows.read", name, got, true))
    return rows


def order_rows(windows: Windows, seed: int) -> list[ArrayComparison]:
    """Require that one pass of training reads every window once."""
    n = len(windows)
    if n > MAX_WINDOWS:
        return []
    stream = Batches(windows, 1, seed, on_exhausted="cycle")
    first = windows.read(np.arange(n))[0]
    seen = np.concatenate([stream.next()[0] for _ in range(n)])
    order = [np.lexsort(x.T) for x in (seen, first)]
    return [_equal("Batches.next", "one_pass", seen[order[0]], first[order[1]])]


def _equal(op: str, tap: str, got: np.ndarray, want: np.ndarray) -> ArrayComparison:
    bad = np.argwhere(got.astype(np.int64) != want)
    if not len(bad):
        return ArrayComparison("data", op, tap, EXACT, 0.0, 0.0, None, want.shape)
    at = tuple(int(i) for i in bad[0])
    shifted = got.shape == want.shape and bool((got[:, 1:] == want[:, :-1]).all())
    cause = "shifted by one token" if shifted else f"{len(bad)} of {plural(want.size, 'id')} are others"
    return ArrayComparison(
        "data", op, tap, EXACT, float(abs(int(got[at]) - int(want[at]))) or np.inf, 0.0, None, want.shape, at,
        int(got[at]), int(want[at]), cause,
    )  # fmt: skip


def rows(batch: Batch, cfg: ModelConfig) -> list[ArrayComparison]:
    """Check that a batch can show faults: ids are in the vocabulary, and enough of them differ."""
    ids, targets = batch.ids, batch.targets
    distinct = len(np.unique(ids))
    out = [
        holds(
            "data",
            "batch",
            "ids",
            ids.min() >= 0 and ids.max() < cfg.vocab_size,
            "an id is outside the vocabulary",
        ),
        holds(
            "data", "batch", "targets", targets.max() < cfg.vocab_size, "a target is outside the vocabulary"
        ),
    ]
    counted = targets >= 0
    repeats = targets == ids
    if distinct >= FEWEST_DISTINCT and counted.sum() > FEWEST_DISTINCT:
        out.append(
            exact("data", "batch", "targets are not the ids", bool(repeats[counted].all()), False, None,
                  "every target is the token itself: off by one" if repeats[counted].all() else "")
        )  # fmt: skip
    return out


def can_show(batch: Batch) -> str:
    """Explain the faults that a batch cannot show; "" for none."""
    b, t = batch.ids.shape
    distinct = len(np.unique(batch.ids))
    if distinct < FEWEST_DISTINCT or t < 3:
        return (
            f"only {plural(distinct, 'different id')} in {b} x {t} positions: so few show little of "
            f"RoPE, mask and grouped heads; give "
            "real text"
        )
    if batch.document_end is not None and not (batch.ids[:, :-1] == batch.document_end).any():
        return "no document ends before the last token, so no border is masked; give ids with some"
    return ""


def _thinned(targets: np.ndarray) -> np.ndarray:
    """Ignore every IGNORE_EVERY-th target."""
    out = np.array(targets, np.int32)
    out.reshape(-1)[IGNORE_EVERY // 2 :: IGNORE_EVERY] = IGNORED
    return out
