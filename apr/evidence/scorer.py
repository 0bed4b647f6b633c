"""Score validation windows without the evaluation loop: other reading, other pieces, sums on the host."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..common.events import Line
from ..common.finding import Finding
from ..data.open import HELD_OUT_BATCHES
from ..data.shards import Shards
from ..model.preferences import terms, without_pairs
from ..model.transformer import Model
from .measure import log_sum_exp
from .pairs import validation_losses
from .subject import Subject

Row = tuple[np.ndarray, np.ndarray]
LOSS = {"float32": 1e-5, "bfloat16": 2e-3}  # relative difference of a mean
ERROR = 1e-2  # of a standard error
ROWS_BY_HAND = 32  # whose losses are also computed from logits on the host
BY_HAND = {"float32": 1e-5, "bfloat16": 2e-2}  # nats/token, beside the size of the logits


def places(shards: Shards, seq_length: int) -> list[tuple[int, int]]:
    """List (shard, first token) of every window: tokens of a text are each predicted once, examples lie in rows."""
    found, strides = [], shards.strides(seq_length)
    for i, array in enumerate(shards.arrays):
        first = 0
        while first + seq_length + 1 <= array.size:
            found.append((i, first))
            first += strides[i]
    return found


def chosen(t: Subject) -> list[tuple[int, int]]:
    """Choose the windows of an evaluation, by the settings alone."""
    s, shards = t.settings, t.val.shards
    every = places(shards, s.seq_length)
    if shards is t.batches.windows.shards:  # the last of the training shards are held out
        every = every[-(s.val_batches or HELD_OUT_BATCHES) * s.batch_size :]
    if s.val_batches is None or s.val_batches * s.batch_size >= len(every):
        return every
    most = s.val_batches * s.batch_size
    return [every[i * len(every) // most] for i in range(most)]


def read(shards: Shards, windows: list[tuple[int, int]], seq_length: int) -> Row:
    """Read ids and targets (B,T) int32; a target is -1 where the shards mask it."""
    # The kernel kills a process that reads a mapped file beyond its end.
    shards.check_sizes(np.unique(np.array([shard for shard, _ in windows], np.int64)))
    ids = np.zeros((len(windows), seq_length), np.int32)
    targets = np.zeros_like(ids)
    for i, (shard, first) in enumerate(windows):
        tokens = np.asarray(shards.arrays[shard][first : first + seq_length + 1])
        ids[i], targets[i] = tokens[:seq_length], tokens[1:]
        if shards.masks:
            mask = np.asarray(shards.masks[shard][first + 1 : first + seq_length + 1])
            targets[i][mask == 0] = -1
    return ids, targets


def validation(t: Subject, line: Line) -> Finding:
    """Compare the validation loss of a line of the log, and its number of targets (gate start.validation)."""
    gate, model, dtype = "start.validation", t.model, t.model.dtype
    windows, tokens = chosen(t)[::-1], 0
    size = max(1, model.batch - 1)
    by_hand = 0.0
    # Of each window, from the last to the first: its loss, and what that is a sum over.
    of_windows: list[tuple[float, int]] = []
    names = [name for name, x in t.val.shards.parts for _ in x.arrays]
    apart: dict[str, list[tuple[float, int]]] = {name: [] for name in names}
    for first in range(0, len(windows), size):
        ids, targets = read(t.val.shards, windows[first : first + size], t.settings.seq_length)
        with without_pairs(model):
            rows, logits = _losses(model, ids, targets, not first)
        if logits is not None:
            by_hand = _off(rows[: len(logits)], logits, targets.reshape(-1))
        for own, x, y in zip(rows.reshape(ids.shape), ids[:, None], targets[:, None], strict=True):
            of_row = validation_losses(t, x, y, own) if model.preferences else own
            of_windows.append((float(of_row.sum()), terms(model.preferences, x, y)))
        tokens += int((targets >= 0).sum())
        each = zip(windows[first : first + size], rows.reshape(ids.shape), targets, strict=True)
        for (shard, _), losses, target in each:
            apart[names[shard]].append((float(losses.sum()), int((target >= 0).sum())))
    loss = math.fsum(x for x, _ in of_windows) / max(1, sum(n for _, n in of_windows))
    off = abs(line["val_loss"] - loss) / max(abs(loss), 1e-9)
    measured = (
        f"{line['val_loss']:.6f} on {line['val_tokens']:,} targets, scored apart {loss:.6f} on {tokens:,}; "
        f"{ROWS_BY_HAND} rows from their logits within {by_hand:.1e}"
    )
    is_same = off <= LOSS[dtype] and tokens == line["val_tokens"] and by_hand <= BY_HAND[dtype]
    error, said = standard_error(of_windows[::-1], model.batch), line["val_loss_stderr"]
    is_near = abs(said - error) <= ERROR * error + LOSS[dtype] * abs(loss)
    measured += "" if is_near else f"; standard error {said:.3g}, apart {error:.3g}"
    is_same = is_same and is_near
    for name, found in apart.items() if len(t.val.shards.parts) > 1 else ():
        total, tokens = math.fsum(x for x, _ in found), sum(n for _, n in found)
        said, of_name = line.get(f"val_loss/{name}", math.nan), total / max(1, tokens)
        off = abs(said - of_name) / max(abs(of_name), 1e-9)
        measured += f"; {name} {said:.6f}, apart {of_name:.6f} on {tokens:,}"
        is_same = is_same and off <= LOSS[dtype] and tokens == line.get(f"val_tokens/{name}")
        error = standard_error([x for x in found if x[1]], 1)
        said = line.get(f"val_loss_stderr/{name}", math.nan)
        if not abs(said - error) <= ERROR * error + LOSS[dtype] * abs(of_name):
            measured, is_same = f"{measured}; its standard error {said:.3g}, apart {error:.3g}", False
    return Finding.of(gate, is_same, measured, f"equal, the loss within {LOSS[dtype]:g} of it", score=off)


def standard_error(windows: list[tuple[float, int]], micro: int) -> float:
    """sqrt(sum (x - mean)^2 / (n (n - 1))) of the means x of n micro-batches. windows: (sum of losses, number of their terms)"""
    cuts = [windows[first : first + micro] for first in range(0, len(windows), micro)]
    means = [math.fsum(loss for loss, _ in cut) / max(1, sum(n for _, n in cut)) for cut in cuts]
    n, middle = len(means), math.fsum(means) / len(means)
    return math.sqrt(math.fsum((x - middle) ** 2 for x in means) / (n * (n - 1))) if n > 1 else 0.0


def batch_loss(model: Model, ids: np.ndarray, targets: np.ndarray) -> float:
    """Compute the mean loss of a batch as an evaluation does: forward passes alone, sums on the host."""
    total = 0.0
    for first in range(0, len(ids), model.batch):
        a, b = (np.ascontiguousarray(x[first : first + model.batch]) for x in (ids, targets))
        total += float(_losses(model, a, b, False)[0].sum())
    return total / max(1, terms(model.preferences, ids, targets))


def _losses(model: Model, ids: np.ndarray, targets: np.ndarray, keep: bool) -> tuple[np.ndarray, Any]:
    """Compute the losses of rows (B*T,) float64, and where asked the logits of the first ones."""
    seen: dict[str, np.ndarray] = {}

    def tap(layer: int | None, name: str, x: Any) -> None:
        if name in ("logits", "logits.0"):
            seen["logits"] = np.asarray(model.be.to_host(x[:ROWS_BY_HAND]), np.float64)

    model.forward(ids)
    if keep:
        model.loss(targets, tap=tap)
    else:
        model.loss(targets)
    rows = model.be.to_host(model.buffers["loss"][: ids.size]).astype(np.float64)
    return rows, seen.get("logits")


def _off(rows: np.ndarray, logits: np.ndarray, targets: np.ndarray) -> float:
    """Largest difference of losses from log(sum of exp(logits)) - logit of the target, as a share of 1 + |logits|."""
    want = log_sum_exp(logits)
    place = targets[: len(logits)]
    want -= logits[np.arange(len(logits)), np.maximum(place, 0)]
    want[place < 0] = 0
    return float((np.abs(rows - want) / (1 + np.abs(logits).max(axis=1))).max())
