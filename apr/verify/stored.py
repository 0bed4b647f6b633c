"""Verify the files of a run: hashes, checkpoints, saved states, adapters, token shards."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.apr2 import read_apr
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.peft import read_adapter
from ..checkpoints.registry import open_any
from ..checkpoints.state import OPTIMIZER, STATE_SHA, saved_hashes, sha256
from ..common.events import REMOVED, by_source
from ..common.files import read_json, short
from ..common.finding import FAIL, Finding
from ..common.provenance import code_sha256
from ..common.units import plural
from ..data.audit import Split, audit
from ..data.batches import Windows
from ..data.guards import Bounds
from ..data.mixture import sources_of, stream
from ..data.open import facts_of, mixture_facts, windows_of
from ..evidence.adapters import checkpoint_merge_error
from ..evidence.seal import EVIDENCE, compare, standing, unlisted
from ..evidence.signature import signer
from ..model.params import Layout
from ..training.rundir import epoch_of
from .record import NONE_SAVED, Record, unmade
from .reload import recorded

NORM_TOLERANCE = 1e-5  # of a norm of weights: float64, and the device's sum of squares


def files(r: Record) -> Finding:
    """Compare every file with evidence.json."""
    differences = compare(r.run.path)
    count = 0 if differences else len(read_json(r.run.path / EVIDENCE)["files"])  # not hashed twice
    more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
    measured = "; ".join(differences[:3]) + more if differences else f"{plural(count, 'file')}"
    if left := unlisted(r.run.path):
        measured += (
            f"; no hash of {plural(len(left), 'file')} behind links, which an older version did not list"
        )
    return Finding.of("files", not differences, measured, "the SHA-256 of evidence.json")


def signature(r: Record) -> Finding:
    """Check the signature of evidence.json."""
    bound = "by a key of --signers"
    if r.options.signers is None:
        why = "there is one, not asked for; --signers FILE names the keys that may sign"
        return Finding.skipped("signature", why, bound)
    return Finding.of(
        "signature", True, f"by {signer(r.run.path, Path(r.options.signers), r.evidence)}", bound
    )


def unchanged(r: Record) -> Finding:
    """Compare how files and folders stand with how they stood before the first check: each check opens them anew, and what was
    exchanged between two of them would be vouched for unread."""
    now, bound = standing(r.run.path), "as before the first check: same files, lengths, times of change"
    changed = sorted(name for name in now.keys() | r.stood.keys() if now.get(name) != r.stood.get(name))
    measured = f"{changed[0]} has changed meanwhile" if changed else f"{plural(len(now), 'file')} and folders"
    return Finding.of("unchanged", not changed, measured, bound)


def checkpoints(r: Record) -> Finding:
    """Compare each checkpoint with its recorded hash; one that is gone must be recorded as removed."""
    found, epochs = r.run.checkpoints(), r.run.epochs()
    bound = "the SHA-256 of their metadata"
    if not found and not epochs and r.is_cut:
        return Finding.skipped("checkpoints", NONE_SAVED, bound)
    if wrong := _unrecorded({epoch_of(p) for p in found}, epochs, r.is_cut):
        return Finding.of(
            "checkpoints", False, wrong, "the same epochs, but those that are recorded as removed"
        )
    for path in found:
        said, loaded = recorded(r.run.path, path), open_any(str(path))
        names = [s.hf for s in Layout(loaded.cfg).in_order()]
        sha, want = sha256(np.asarray(loaded.tensors[n]) for n in names), said.metadata["weights_sha"]
        if sha != want:
            measured = f"{path.name}: weights {sha[:12]}"
            return Finding.of("checkpoints", False, measured, f"recorded {want[:12]}")
        if loaded.metadata["evaluation"]["val_loss"] != said.val_loss:
            measured = f"{path.name}: another val_loss inside than in its metadata"
            return Finding.of("checkpoints", False, measured, "equal")
        if wrong := _other_inside(r, loaded):
            return Finding.of("checkpoints", False, f"{path.name}: {wrong}", bound)
    removed = len(epochs) - len(found)
    more = f", {removed} removed by --keep-checkpoints" if removed else ""
    return Finding.of("checkpoints", bool(found), f"{plural(len(found), 'checkpoint')}{more}", bound)


def _other_inside(r: Record, loaded: Checkpoint) -> str:
    """Say what a checkpoint holds beside its weights that is not the run's: the conditions of its loss, its tokenizer; "" where
    all is. Weights alone are hashed in its metadata."""
    s, said = r.settings, loaded.metadata["evaluation"]
    want = {
        "val_sha256": r.config["data"]["val_sha256"],
        "seq_length": s.seq_length,
        "val_windows": s.val_batches and s.val_batches * s.batch_size,
    }
    for key, value in want.items():
        if key in said and said[key] != value:
            return f"{key} = {short(said[key])} of its evaluation, the run has {short(value)}"
    if loaded.tokenizer is None or not loaded.tokenizer.is_recorded_as(r.config["data"]["tokenizer_sha256"]):
        return "its tokenizer is not the run's"
    return ""


def _unrecorded(there: set[int], epochs: list[dict[str, Any]], is_cut: bool) -> str:
    """Say which checkpoint is there without metadata, or gone without being recorded as removed; "" for none.

    The best checkpoint and the last one are never removed; those of a run that was cut may have been, by its part that was
    lost."""
    known = {facts["epoch"] for facts in epochs}
    if there - known:
        return f"epoch {min(there - known)}: a checkpoint without metadata"
    best = min(epochs, key=lambda facts: facts["val_loss"], default=None)
    for facts in epochs:
        if facts["epoch"] in there:
            continue
        if REMOVED not in facts:
            return f"epoch {facts['epoch']}: its checkpoint is gone, and not recorded as removed"
        if is_cut:
            continue
        if facts is best or facts is epochs[-1] or not facts["step"] < facts[REMOVED] <= epochs[-1]["step"]:
            return f"epoch {facts['epoch']}: recorded as removed, which no --keep-checkpoints does"
    return ""


def states(r: Record) -> Finding:
    """Compare each saved state with its hash, and its moments with those of the epoch that ends there."""
    bound = "the SHA-256 recorded in the state, and in the metadata of an epoch that ends there"
    found = r.run.all_states().values()
    if not found and r.is_cut:
        return Finding.skipped("states", "no state was saved", bound)
    ends = {m["step"]: m for m in r.run.epochs()}
    for path in found:
        file = read_apr(path)
        sha, optimizer_sha = saved_hashes(file.metadata, file.tensors, str(path))
        if sha != file.metadata[STATE_SHA]:
            return Finding.of("states", False, f"{path.name}: {sha[:12]}", bound)
        step = file.metadata["training"]["step"]
        end = ends.get(step)
        if wrong := _other_weights(r, path, step, file.tensors, end):
            return Finding.of("states", False, wrong, bound)
        if end and end["optimizer_state_sha"] != optimizer_sha:
            measured = f"{path.name}: its moments are not those of epoch {end['epoch']}"
            return Finding.of("states", False, measured, bound)
    return Finding.of("states", bool(found), f"{plural(len(found), 'state')}", bound)


def _other_weights(
    r: Record, path: Path, step: int, tensors: Mapping[str, np.ndarray], end: dict[str, Any] | None
) -> str:
    """Compare the weights of a state with their norm in the log, and with the checkpoint of the same step; "" where they
    are the same."""
    weights = {name: x for name, x in tensors.items() if not name.startswith(OPTIMIZER)}
    line = next((line for line in r.steps if line["step"] == step), None)
    norm = math.sqrt(sum(float(np.square(x, dtype=np.float64).sum()) for x in weights.values()))
    if line is not None and not abs(norm - line["weight_norm"]) <= NORM_TOLERANCE * norm:
        return f"{path.name}: its weights have the norm {norm:.6g}, the log says {line['weight_norm']:.6g}"
    checkpoint = r.run.ckpt / f"epoch-{end['epoch']:03d}.apr" if end else None
    if checkpoint is None or not checkpoint.is_file() or "lora" in r.config["data"]:
        return ""
    there = open_any(str(checkpoint)).tensors
    for name, x in weights.items():
        if (
            name in there
            and np.asarray(x).astype(there[name].dtype).tobytes() != np.asarray(there[name]).tobytes()
        ):
            return (
                f"{path.name}: {name} is not that of {checkpoint.name}, which was saved after the same step"
            )
    return ""


def adapters(r: Record) -> Finding:
    """Add the last adapter to the base, and compare the sum with the checkpoint of its epoch."""
    path, bound = r.last, "the checkpoint, within rounding"
    if path is None:
        return Finding.skipped("adapters", NONE_SAVED, bound)
    folder, init = path.with_name(f"{path.stem}-adapter"), str(r.settings.init)
    if not Path(init).exists():
        return unmade("adapters", f"the base {init} is not there; --init says where it is now", bound)
    base, merged, want = open_any(init), open_any(str(path)), r.config["data"]["init_sha256"]
    if base.sha256 != want:
        return Finding.of("adapters", False, f"{init}: weights {base.sha256[:12]}", f"{want[:12]}")
    adapter, dtype = read_adapter(str(folder), base.cfg), r.settings.dtype or "float32"
    worst, name = checkpoint_merge_error(base, adapter, merged, dtype, r.config["data"]["lora"].get("base"))
    measured = f"{folder.name}: off by {worst:.2f} of rounding at {name}"
    return Finding.of("adapters", worst <= 1, measured, bound)


def data(r: Record) -> Finding:
    """Compare the shards as they are on disk with the hashes in config.json."""
    want, bound = r.config["data"], "the SHA-256 of config.json"
    if r.last is None:
        return unmade("data", NONE_SAVED, bound)
    loaded, tokens = open_any(str(r.last)), 0
    tokenizer, folders = loaded.tokenizer, r.folders()
    if tokenizer is None or not tokenizer.is_recorded_as(want["tokenizer_sha256"]):
        return Finding.of("data", False, "the tokenizer in the checkpoint is not the run's", bound)
    if gone := [folder for folder in folders.values() if not folder.is_dir()]:
        why = f"{gone[0]} is not there; --dataset says where the shards are now"
        return unmade("data", why, bound)
    splits = audit(folders, tokenizer, Bounds.parse(r.settings.widen), loaded.cfg.vocab_size)
    for split in splits:
        side, folder, shards = split.side, split.folder, split.shards
        assert shards is not None
        of_source = want["mixture"][split.source] if split.source else want
        if shards.sha256 != of_source[f"{side}_sha256"]:
            return Finding.of("data", False, f"{folder}: {shards.sha256[:12]}", bound)
        tokens += shards.total_tokens
    wrong = _other_facts(r, splits) or _other_guards(r, splits)
    return Finding.of(
        "data",
        not wrong,
        wrong or f"{plural(tokens, 'token')} read, {plural(_guards(splits), 'guard')} asked again",
        bound,
    )


def _other_facts(r: Record, splits: list[Split]) -> str:
    """Find a figure of the data in config.json that the shards do not have; "" for none."""
    train, val = windows_of(r.settings, splits)
    facts: dict[str, Any] = facts_of(train, val)
    if r.settings.mix:
        facts["mixture"] = mixture_facts(train, val, {x.name: x.share for x in sources_of(r.settings)})
    for key, value in facts.items():
        if key in r.config["data"] and r.config["data"][key] != value:
            return f"{key} = {r.config['data'][key]}, the shards have {value}"
    return _miscounted(r, train) if train.shards.masks or r.settings.mix else ""


def _other_guards(r: Record, splits: list[Split]) -> str:
    """Find a guard whose finding in config.json is not what the data give; "" for none. Older versions had fewer guards."""
    for split in splits:
        said = {row["guard"]: row for row in r.config["data_guards"][split.name]}
        for f in split.findings:
            if f.verdict == FAIL:  # no run begins with such data, whatever is on record
                return f"{split.name}: {f}"
            if f.name not in said and r.config.get("code_sha256") == code_sha256():
                return f"{split.name}: {f.name} is not on record, the data give {f.verdict}, {f.measured}"
            row = said.get(f.name, {"verdict": f.verdict, "figure": f.measured})
            if row["verdict"] != f.verdict or _figure(row["figure"]) != _figure(f.measured):
                return f"{split.name}: {f.name} is {row['verdict']}, {row['figure']}; the data give {f.verdict}, {f.measured}"
    return ""


def _figure(text: str) -> str:
    """Leave out the hash of the tokenizer, of which `data` asks what it stands for: older versions had another one."""
    return re.sub(r"\btokenizer [0-9a-f]{12}\b", "tokenizer", str(text))


def _guards(splits: list[Split]) -> int:
    return sum(len(split.findings) for split in splits)


def _miscounted(r: Record, windows: Windows) -> str:
    """Find the first step whose trained tokens are not those of the windows that it read, in all or of a source; "" for none."""
    batches, counted = stream(windows, r.settings), 0
    for line in r.steps:
        counted += batches.skip()
        if line["tokens_seen"] != counted:
            seen = f"tokens_seen = {line['tokens_seen']}"
            return f"step {line['step']}: {seen}, its windows and those before have {counted}"
        if r.settings.mix:
            want = zip(windows.sources, batches.targets_by_source(), strict=True)
            expected = {name: n for (name, *_), n in want}
            if (said := by_source(line, "tokens_seen")) != expected:
                return f"step {line['step']}: tokens_seen of sources {said}, the windows up to it have {expected}"
    return ""
