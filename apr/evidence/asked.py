"""Compare what a run has built with what it was asked for: its config.json, formulas, and the table of parameters.

Nothing here is read from the object that is judged: an optimizer with another beta2 than the settings' would also
judge itself by that one.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..common.finding import Finding
from ..common.options import absolute_paths
from ..data.batches import Batches, Windows
from ..data.mix_text import tables_of
from ..model.adapters import Adapters
from ..model.hf_config import from_hf
from ..model.lora import ALPHA_PER_RANK, PREFIX, TARGETS
from ..model.lora_settings import parse_pattern, parse_saved, parse_targets
from ..model.optim import Optimizer
from ..model.transformer import Model
from . import scorer, stream, unsaid
from .subject import Subject

Row = tuple[str, Any, Any]
# Settings of a process, not of the numbers that it computes.
OF_THE_PROCESS = (
    "resume",
    "run_dir",
    "threads",
    "json",
    "config",
    "ranks",
    "gpus",
    "rank_timeout",
    "cross_check",
)
SHOWN = 3
# Of all steps, the last fifth decays: documented, and apart from the schedule's own number.
WSD_SHARE = 0.2
# Places of a pass that are looked up; and windows of which chance seldom gives two equal orders: of 12, one in 30,000.
MAX_PLACES, FEWEST_SHUFFLED = 1 << 18, 16
READ_WINDOWS = 32


def learning_rate(s: Any, step: int) -> float:
    """lr step / warmup_steps, then lr_min + (lr - lr_min) r; r = cos^2(pi done / 2), or a line from 1 to 0."""
    warm, steps = s.warmup_steps, s.num_steps
    if step < warm:
        return float(s.lr * step / warm)
    if s.schedule == "constant":
        return float(s.lr)
    if s.schedule == "cosine":
        done = min(1.0, (step - warm) / max(1, steps - warm))
        return float(s.lr_min + (s.lr - s.lr_min) * math.cos(math.pi * done / 2) ** 2)
    start = max(warm, steps - round(WSD_SHARE * steps)) if s.schedule == "wsd" else warm
    return float(np.interp(step, [start, max(start + 1, steps)], [s.lr, s.lr_min]))


def is_learning_rate(got: float, s: Any, step: int) -> bool:
    """Compare a learning rate with that of the settings, within the rounding of either formula."""
    return abs(got - learning_rate(s, step)) <= 1e-9 * s.lr


def settings_arrive(
    subject: Subject, schedule: Any, config: Mapping[str, Any], explicit: Mapping[str, Any] | None
) -> Finding:
    """Compare every number that an object was built with with config.json (gate before.settings).

    config: the run's config.json, as the file has it. explicit: settings of the command line or the configuration file, None
    where nobody knows them.
    """
    rows = [*_rows(subject, schedule, config)]
    if explicit is not None:
        rows += _given(config["settings"], absolute_paths(type(subject.settings), explicit))
        rows += [(f"default of {name}", *x) for name, *x in unsaid.defaults(config["settings"], explicit)]
    wrong = [f"{name} is {_said(got)}, asked for {_said(want)}" for name, got, want in rows if got != want]
    more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    why = "; ".join(wrong[:SHOWN]) + more
    measured = f"{len(rows) - len(wrong)} of {len(rows)} numbers"
    return Finding.of("before.settings", not wrong, measured, "all as config.json has them", why)


def _said(x: Any) -> str:
    text = repr(x)
    return text if len(text) <= 80 else text[:77] + "..."


def _rows(t: Subject, schedule: Any, config: Mapping[str, Any]) -> Iterator[Row]:
    """Yield (name, as built, as asked)."""
    s, data = config["settings"], config["data"]
    built = absolute_paths(type(t.settings), dataclasses.asdict(t.settings))
    for f in dataclasses.fields(t.settings):
        # A run of an older version has no entry for a setting that came later.
        if not f.metadata["may_change"] and f.name not in OF_THE_PROCESS and f.name in s:
            yield f"setting {f.name}", built[f.name], s[f.name]
    yield "model", t.model.cfg, from_hf(config["model"], "config.json")
    yield from _model(t, s)
    if t.shard is None:
        in_order = s["micro_batch_size"] < s["batch_size"] and "order_of_sums" in config
        yield "sums over micro-batches", t.adapters.folds if t.adapters else t.model.folds, in_order
    yield from _optimizer(t, s)
    yield from _schedule(t, schedule, s)
    budgets = [float(x["tokens"]) for x in tables_of(s.get("mix") or "") if "tokens" in x]
    if budgets and not config.get("ends") and not t.settings.resume:
        rows = sum(math.ceil(n / s["seq_length"]) for n in budgets)
        yield "steps of the budgets", s["num_steps"], math.ceil(rows / s["batch_size"])
    if s.get("epochs"):
        passes = s["epochs"] * data["train_windows"] / s["batch_size"]
        yield "steps of the passes", s["num_steps"], max(1, -int(-(passes - 1e-9) // 1))
    yield from _batches(t, s, data)
    if t.adapters is not None or s["lora_rank"] or s["lora_init"]:
        yield from _adapters(t.adapters, s)
    val, windows = t.val, s["val_batches"] and s["val_batches"] * s["batch_size"]
    yield "validation, seq_length", val.seq_length, s["seq_length"]
    yield "validation, shards", val.shards.sha256, data["val_sha256"]
    yield "validation, number of windows", val.count, data["val_windows"]
    yield "validation, windows of an evaluation", t.evaluated_on["val_windows"], windows


def _model(t: Subject, s: Mapping[str, Any]) -> Iterator[Row]:
    m: Model = t.model
    shards = t.batches.windows.shards
    end = shards.border_id if shards.masks or s["mask_documents"] else None
    for name, built, key in (
        ("sequences at once", m.batch, "micro_batch_size"),
        ("seq_length", m.seq, "seq_length"),
        ("dtype", m.dtype, "dtype"),
        ("dtype of its weights", m.w.dtype.name, "dtype"),
        ("recompute", m.recompute, "recompute"),
        ("z_loss", m.z_loss, "z_loss"),
    ):
        yield f"model, {name}", built, s[key]
    yield "model, id at which attention stops", m.document_end, end
    # A run may go on with another device than it began with.
    if t.settings.device != "auto":
        yield "device", t.backend.name, t.settings.device.partition(":")[0]


def _optimizer(t: Subject, s: Mapping[str, Any]) -> Iterator[Row]:
    """Yield what the optimizer was built with: it must hold the arrays that the passes read and write."""
    opt, trained = t.optimizer, t.adapters or t.model
    for f in dataclasses.fields(opt):
        # A run of an older version has no entry for a number that came later.
        if f.kw_only and f.name in s:
            yield f"{type(opt).__name__}, {f.name}", getattr(opt, f.name), s[f.name]
    size = t.shard.cut.length if t.shard else trained.layout.size
    yield f"{type(opt).__name__}, weights", (t.shard.trained if t.shard else opt.w) is trained.w, True
    yield f"{type(opt).__name__}, gradients", t.shard is not None or opt.g is trained.g, True
    yield f"{type(opt).__name__}, elements", (opt.w.size, opt.g.size), (size,) * 2
    for slot in trained.layout.slots:
        whole = [slice(slot.offset, slot.offset + slot.size)]
        for part in t.shard.inside(slot.offset, slot.size) if t.shard else whole:
            yield f"{type(opt).__name__}, decay of {slot.hf}", part.stop <= opt.decayed, len(slot.shape) > 1
            share = s.get("lora_plus", 1.0) if ".lora_B." in slot.hf else 1.0
            yield f"{type(opt).__name__}, share of the learning rate of {slot.hf}", _share(opt, part), share


def _share(opt: Optimizer, part: slice) -> float:
    """Look up the share of the learning rate of a part."""
    inside = any(f.start <= part.start and part.stop <= f.stop for f in opt.faster)
    return opt.lora_plus if inside else 1.0


def _schedule(t: Subject, schedule: Any, s: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the numbers of the schedule, and learning rates where its parts meet."""
    keys = {
        "kind": "schedule",
        "lr": "lr",
        "lr_min": "lr_min",
        "warmup_steps": "warmup_steps",
        "num_steps": "num_steps",
    }
    for name, key in keys.items():
        yield f"schedule, {name}", getattr(schedule, name), s[key]
    steps, warm = s["num_steps"], s["warmup_steps"]
    for step in sorted({1, warm, warm + 1, (warm + steps) // 2, round(0.9 * steps), steps - 1, steps}):
        if 1 <= step <= steps:
            got = schedule(step)
            want = got if is_learning_rate(got, t.settings, step) else learning_rate(t.settings, step)
            yield f"schedule, step {step}", got, want


def _batches(t: Subject, s: Mapping[str, Any], data: Mapping[str, Any]) -> Iterator[Row]:
    b, w = t.batches, t.batches.windows
    for name in ("batch_size", "seed", "shuffle", "on_exhausted"):
        yield f"batches, {name}", getattr(b, name), s[name]
    yield "windows, seq_length", w.seq_length, s["seq_length"]
    yield "windows, shards", w.shards.sha256, data["train_sha256"]
    yield "windows, number", w.count, data["train_windows"]
    yield "windows, read as the shards have them", _reads_as_stored(w, s["seq_length"]), True
    yield from _passes(b, s["shuffle"])
    yield "batches, sources", [name for name, *_ in b.sources], list(data.get("mixture", [""]))
    for name, share, turns in zip(
        data.get("mixture", ()),
        stream.asked_shares(s.get("mix") or "", s["seq_length"]),
        b.turns.counts,
        strict=False,
    ):
        is_same = abs(turns / sum(b.turns.counts) - share) <= stream.RESOLUTION
        yield f"batches, turns of {name}", turns if not is_same else share, share
    if w.shards is not t.val.shards:
        yield (
            "windows, number by the sizes of the shards",
            w.count,
            sum(stream.windows_of_shards(w, s["seq_length"])),
        )


def _passes(b: Batches, shuffle: bool) -> Iterator[Row]:
    """Yield what two passes over each source would read: no window twice, in the order of the shards or, shuffled, in two
    others."""
    counts, at, begin = stream.windows_of_shards(b.windows, b.windows.seq_length), 0, 0
    for k, (name, shards) in enumerate(b.windows.shards.parts):
        n = sum(counts[at : at + len(shards.arrays)]) if name else b.windows.count
        of_source = f" of {name}" if name else ""
        asked = min(n, MAX_PLACES)
        # In a mixture the order of a source, as it takes its turns.
        first, second = (b.order(start, asked, k if name else None) - begin for start in (0, n))
        in_order = np.arange(asked)
        for word, x in (("first", first), ("second", second)):
            known = (x >= 0) & (x < n)
            yield f"batches, windows of the {word} pass{of_source}", np.unique(x[known]).size, asked
            if not shuffle or n >= FEWEST_SHUFFLED:
                yield f"batches, the {word} pass{of_source} is shuffled", bool((x != in_order).any()), shuffle
        if shuffle and n >= FEWEST_SHUFFLED:
            same = bool((first == second).all())
            yield f"batches, the second pass{of_source} has the order of the first", same, False
        at, begin = at + len(shards.arrays), begin + n


def _reads_as_stored(w: Windows, seq_length: int) -> bool:
    """Read some windows, ids and targets, and compare them with what the shards have at places counted anew."""
    counts = stream.windows_of_shards(w, seq_length)
    ends = np.cumsum(counts)
    sampled = np.arange(0, w.count, max(1, w.count // READ_WINDOWS))[:READ_WINDOWS]
    if w.first + w.count > ends[-1]:
        return False
    ids, targets = w.read(sampled)
    strides, shard = w.shards.strides(seq_length), np.searchsorted(ends, sampled + w.first, "right")
    within = sampled + w.first - ends[shard] + np.take(counts, shard)
    places = [(int(i), int(n) * strides[i]) for i, n in zip(shard, within, strict=True)]
    want = scorer.read(w.shards, places, seq_length)
    return np.array_equal(ids, want[0]) and np.array_equal(np.maximum(targets, -1), want[1])


def _adapters(a: Adapters | None, s: Mapping[str, Any]) -> Iterator[Row]:
    yield "adapters", a is not None, True
    if a is None:
        return
    yield "adapters, format of the base", a.config.base, s.get("lora_base")
    want = dict(_adapter_tensors(a))
    ends = (
        a.config.saved
        if s["lora_init"]
        else parse_saved(s.get("lora_modules_to_save"), bool(s.get("train_embeddings")))
    )
    want |= _whole_tensors(a, ends)
    if not s["lora_init"]:
        yield "adapters, norms of rows", a.config.dora, bool(s.get("lora_dora"))
    if s.get("lora_dropout") is not None or not s["lora_init"]:
        share = s.get("lora_dropout") or 0.0
        yield "adapters, dropout", a.dropout.p if a.dropout else 0.0, share
    got = {slot.hf: slot.shape for slot in a.layout.slots}
    yield "adapters, tensors", len(got), len(want)
    for name, shape in want.items():
        yield f"adapters, shape of {name}", got.get(name), shape
    if s["lora_init"]:
        return
    alpha = ALPHA_PER_RANK * s["lora_rank"] if s["lora_alpha"] is None else s["lora_alpha"]
    yield "adapters, rank", a.config.rank, s["lora_rank"]
    yield "adapters, alpha", a.config.alpha, alpha
    alphas = dict(parse_pattern("--lora-alpha-pattern", s.get("lora_alpha_pattern")))
    for pair in a.layout.pairs:
        rank = pair.a.shape[0]
        asked = _by_pattern(alphas, pair.module, alpha)
        yield (
            f"adapters, scale of {pair.module}",
            pair.scale,
            asked / (rank**0.5 if s.get("lora_rslora") else rank),
        )
    ranks = dict(parse_pattern("--lora-rank-pattern", s.get("lora_rank_pattern")))
    for pair in a.layout.pairs:
        yield (
            f"adapters, rank of {pair.module}",
            pair.a.shape[0],
            int(_by_pattern(ranks, pair.module, s["lora_rank"])),
        )
    yield "adapters, matrices", a.config.targets, parse_targets(s["lora_targets"])


def _by_pattern(patterns: Mapping[str, float], module: str, otherwise: float) -> float:
    """Look up a number by the first pattern that is the end of a module's name, or all of it."""
    ends = (n for pattern, n in patterns.items() if re.search(rf"(?:^|\.)(?:{pattern})\Z", module))
    return next(ends, otherwise)


def _adapter_tensors(a: Adapters) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (name, shape) of A and B of every matrix that is a target, by the names of the model's own tensors."""
    ends, is_tied = (
        tuple(f".{TARGETS[target]}.weight" for target in a.config.targets),
        a.cfg.tie_word_embeddings,
    )
    for slot in a.model.layout.slots:
        # Embedding and head are one matrix, by the name of either.
        names = [f".{slot.hf}", *([".lm_head.weight"] if is_tied and slot.param.name == "embed" else [])]
        if any(name.endswith(ends) for name in names):
            name = PREFIX + slot.hf.removesuffix(".weight")
            rank = int(
                _by_pattern(dict(a.config.rank_pattern), slot.hf.removesuffix(".weight"), a.config.rank)
            )
            kinds = ("embedding_B", "embedding_A") if slot.param.name == "embed" else ("A.weight", "B.weight")
            yield f"{name}.lora_{kinds[0]}", (rank, slot.shape[1])
            yield f"{name}.lora_{kinds[1]}", (slot.shape[0], rank)
            if a.config.dora:
                yield f"{name}.lora_magnitude_vector", slot.shape[:1]


def _whole_tensors(a: Adapters, ends: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """List the shapes of what is trained whole: the model's own tensors whose modules' names end so."""
    is_tied, out = a.cfg.tie_word_embeddings, {}
    for slot in a.model.layout.slots:
        module = slot.hf.rpartition(".")[0]
        names = [module, "lm_head"] if is_tied and slot.param.name == "embed" else [module]
        if ends and any(name.endswith(ends) for name in names):
            out[PREFIX + slot.hf] = slot.shape
    return out


def _given(s: Mapping[str, Any], explicit: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the settings that were asked for by name, beside config.json."""
    for name, want in explicit.items():
        # None asks for what depends on other settings.
        if name in OF_THE_PROCESS or name not in s or want is None:
            continue
        got = s[name]
        # A micro-batch is no larger than the batch.
        want = min(want, s["batch_size"]) if name == "micro_batch_size" and want else want
        yield f"config.json, {name}", got, want
