"""`apr bisect MODEL`: find the op and the layer that are wrong. Each side runs a training step op by op beside the reference
in float64; or beside a trace (--against T.safetensors), or beside Hugging Face transformers (--against hf).

Example: apr bisect qwen2-tiny --sides cuda/float32,cuda/bfloat16"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from .. import backends
from ..backends.select import choose
from ..bisect import against, hf, stored, traces
from ..bisect import batch as batches
from ..bisect.picture import picture
from ..bisect.planted.catalogue import catalogue_json, plant_all
from ..bisect.report import ArrayComparison, Report
from ..bisect.side import Batch, Side
from ..bisect.stages import Plan, host_bytes, run
from ..bisect.token_ids import read_ids, read_targets
from ..bisect.upload import configuration, upload
from ..checkpoints.registry import HostModel, open_host
from ..common.atomic import drawn, try_output
from ..common.errors import IOFailure, Refused, UsageError
from ..common.files import read_text
from ..common.finding import FAIL, PASS, exit_code
from ..common.host import available_memory
from ..common.options import given, json_option, option, threads_option
from ..model.config import ModelConfig
from ..model.cost import check_fits, check_positions, memory
from ..model.presets import PRESETS
from ..model.transformer import IGNORED
from .bisect_tables import print_catalogue, print_report
from .show import Output
from .tables import cell

# Of a batch: an array for each of some hundred taps follows from it.
MAX_TOKENS = 1 << 24


@dataclass(frozen=True)
class Flags:
    """Options of `apr bisect`."""

    model: str = option(
        "an .apr or GGUF file, a Hugging Face folder, or a preset (random weights)",
        "",
        positional=True,
        path=True,
        names=tuple(PRESETS),
    )
    sides: str = option(
        "sides to judge: DEVICE[/DTYPE], several with commas: cpu, cuda/bfloat16, cuda:1/float32, reference/float32",
        "auto",
    )
    against: str = option(
        "judge by a file of `apr trace`, or by `hf`: Hugging Face transformers (default: the reference in float64)",
        "",
        metavar="TRACE",
        path=True,
        names=("hf",),
    )
    tokens: str = option(
        'ids: "1,2,3", or a .json or .npy file of one row or (B,T)', "", metavar="IDS", path=True
    )
    targets: str = option(
        "file of targets (B,T), -100 ignored (default: the next tokens)", "", metavar="FILE", path=True
    )
    text: str = option("a text file (default: a passage of prose and code)", "", metavar="FILE", path=True)
    dataset: str = option(
        "a folder of token shards: the first batch that training draws of it", "", metavar="FOLDER", path=True
    )
    mask_documents: bool = option(
        "attention stops where a document ends, as `apr pretrain --mask-documents`", False
    )
    batch_size: int = option("sequences", 2, at_least=1, metavar="SEQUENCES")
    seq_length: int = option(
        "tokens per sequence; one position would show no fault of attention", 32, at_least=2, metavar="TOKENS"
    )
    first: bool = option("stop at the first stage that finds a fault", False)
    backward: bool = option("also backward, optimizer and state; --no-backward: forward and loss", True)
    free: bool = option("also errors as they accumulate; --no-free: each op alone", True)
    picture: str = option('the picture to write; "" for none', "bisect.png", metavar="FILE", path=True)
    rows: int = option("rows of faults to list", 8, at_least=0)
    catalogue: bool = option(
        "plant every fault of the catalogue in a small model and list the ops that are named", False
    )
    threads: int | None = threads_option()
    seed: int = option("seed of a preset's random weights and of ids drawn at random", 42, at_least=0)
    json: bool = json_option()


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code: 0 when all agree, 9 when not. Errors are raised."""
    explicit = given(Flags, args, "apr bisect", __doc__ or "")
    f = Flags(**explicit)
    _refuse_unused(f, explicit)
    console = Output(quiet=f.json)
    if f.catalogue:
        planted = list(plant_all(backends.get("cpu"), "float32"))
        print_catalogue(planted, console)
        if f.json:
            print(json.dumps(catalogue_json(planted), indent=1))
        return exit_code(PASS if all(p.is_named for p in planted) else FAIL)
    if not f.model:
        raise UsageError(
            "say which model: an .apr file, a Hugging Face folder or a preset such as qwen2-tiny"
        )
    if sum(map(bool, (f.tokens, f.text, f.dataset))) > 1:
        raise UsageError(
            "--tokens, --text and --dataset are three ways to say what goes in; give one of them"
        )
    if f.targets and not f.tokens and f.against in ("", "hf"):
        raise UsageError("--targets goes with --tokens")
    _check_picture(f)
    reports = _against(f, console) if f.against else _beside_reference(f, console)
    pictures = _pictures(f, reports)
    for report in reports:
        print_report(report, console, f.rows)
    if f.json:
        print(json.dumps({"reports": [r.as_json() for r in reports], "pictures": pictures}, indent=1))
    # Last, so that the reports are printed even when the file cannot be written.
    for report, path in zip(reports, pictures, strict=True):
        if path:
            drawn(functools.partial(picture, report), path)
            console.print(cell(f"picture: {path}"), soft_wrap=True)
    return exit_code(PASS if all(r.agree for r in reports) else FAIL)


def _beside_reference(f: Flags, console: Console) -> list[Report]:
    """Run each side in lockstep with the reference."""
    source = open_host(f.model, "float32", f.seed)
    batch, checked = _batch(f, source)
    check_positions(source.cfg, batch.shape[1])
    as_stored = stored.rows(f.model, source.cfg, source.host)
    plan = Plan(f.free, f.backward, f.backward, f.backward, f.first)
    reports = []
    for side in _sides(f, source):
        _check_memory(side, batch, plan)
        report = Report(f.model, ("reference float64", side.name), batch.words)
        report.add([*checked, *batches.rows(batch, source.cfg), *as_stored])
        report.notes += [n for n in [batches.can_show(batch)] if n]
        if side.name == report.sides[0]:
            report.notes.append(
                "the reference is compared with itself: this can only show what changes from run to run"
            )
        with console.status("") as status:

            def progress(stage: str, status: Any = status, side: Side = side) -> None:
                status.update(cell(f"{side.name}: {stage}"))

            run(source.cfg, side, source.host, batch, report, plan, progress)
        reports.append(report)
    return reports


@dataclass(frozen=True)
class _Believed:
    """Arrays that a side is compared with, and what they were computed from."""

    source: HostModel
    batch: Batch
    tensors: dict[str, np.ndarray]
    dtype: str
    name: str
    backward: bool
    cfg: ModelConfig | None = None


def _against(f: Flags, console: Console) -> list[Report]:
    """Compare each side with a trace: a file, or one that transformers computes now."""
    want = _transformers(f, console) if f.against == "hf" else _trace(f)
    batch, host = want.batch, want.source.host
    reports = []
    for side in _sides(f, want.source):
        report = Report(f.model, (want.name, side.name), batch.words)
        _check_memory(side, batch, Plan(free=True, backward=want.backward, optimizer=False, state=False))
        with console.status(cell(f"{side.name} beside {want.name}")):
            model = side.model(host, batch.shape, train=want.backward)
            report.add(upload(model, host))
            report.add(
                against.compare_with_trace(model, host, batch.ids, batch.targets, want.tensors, want.dtype)
            )
        if want.cfg is not None:
            report.add(configuration(want.cfg, side.cfg))
        broken = [k for k, x in want.tensors.items() if not np.isfinite(x).all() and not k.endswith("lse")]
        if broken:
            report.notes.append(f"the trace itself holds NaN or infinity, first in {broken[0]}")
        for stage in ("configuration", "data", "optimizer", "state", "formulas"):
            if not report.of(stage):
                report.skipped[stage] = "a trace does not show it"
        reports.append(report)
    return reports


def _transformers(f: Flags, console: Console) -> _Believed:
    """Compute a trace with transformers in float64."""
    source = open_host(f.model, "float64", f.seed)
    batch, _ = _batch(f, source)
    check_positions(source.cfg, batch.shape[1])
    with console.status("transformers"):
        if f.model in PRESETS:
            named = source.layout.named(source.host)
            tensors = hf.trace_of_weights(source.cfg, named, batch.ids, batch.targets, gradients=f.backward)
        else:
            tensors = hf.trace_of(f.model, batch.ids, batch.targets, gradients=f.backward)
    return _Believed(source, batch, tensors, "float64", "transformers float64", f.backward)


def _trace(f: Flags) -> _Believed:
    """Read the trace file of --against and check that it is of this model."""
    cfg = open_host(f.model, "float32", f.seed).cfg
    tokens = read_ids(f.tokens, cfg.vocab_size, "--tokens", lowest=0) if f.tokens else None
    targets = read_ids(f.targets, cfg.vocab_size, "--targets", lowest=IGNORED) if f.targets else None
    trace = traces.read_trace(f.against, tokens, targets)
    source = open_host(f.model, "float64" if trace.dtype == "float64" else "float32", f.seed)
    traces.same_model(f.against, trace, source.sha256)
    batch = Batch(trace.ids, trace.targets, f"what went into {f.against}")
    name = f"{f.against} ({trace.metadata.get('backend', 'a trace')} {trace.dtype})"
    believed = traces.config_of(f.against, trace)
    return _Believed(source, batch, trace.tensors, trace.dtype, name, trace.gradients, believed)


def _batch(f: Flags, source: HostModel) -> tuple[Batch, list[ArrayComparison]]:
    """Make the batch with its document mask; returns it with comparisons of the data."""
    batch, rows = _given(f, source)
    if not f.mask_documents:
        return batch, rows
    if source.tokenizer is None and f.model not in PRESETS:
        raise Refused(
            f"{f.model}: no tokenizer in it, so nothing says which id ends a document; drop --mask-documents"
        )
    end = source.tokenizer.eos_id if source.tokenizer else 0
    if end is None:
        raise Refused(f"{f.model}: its tokenizer has no end-of-text id; drop --mask-documents")
    if not (f.tokens or f.dataset):
        return batches.in_documents(batch, end), rows
    return replace(
        batch, document_end=end, words=f"{batch.words}, documents masked that end with id {end}"
    ), rows


def _given(f: Flags, source: HostModel) -> tuple[Batch, list[ArrayComparison]]:
    """Make the batch of --tokens, --dataset or --text; without them, of a passage or of random ids."""
    shape = (f.batch_size, f.seq_length)
    if f.tokens:
        ids = read_ids(f.tokens, source.cfg.vocab_size, "--tokens", lowest=0)
        return batches.from_ids(ids, read_targets(f.targets, ids, source.cfg.vocab_size), "--tokens"), []
    if f.dataset:
        return batches.from_dataset(f.dataset, shape, f.seed, source.cfg.vocab_size)
    if source.tokenizer is None:
        if f.text:
            raise Refused(f"{f.model}: no tokenizer in it, so --text cannot be read; give --tokens")
        return batches.at_random(source.cfg, shape, f.seed), []
    if shape[0] * shape[1] > MAX_TOKENS:
        raise UsageError(
            f"--batch-size {shape[0]} x --seq-length {shape[1]}: at most {MAX_TOKENS:,} tokens are compared"
        )
    text = read_text(Path(f.text)) if f.text else batches.PASSAGE * (1 + shape[0] * shape[1] // 128)
    return batches.from_text(text, source.tokenizer, shape, f.text or "a passage of prose and code")


def _sides(f: Flags, source: HostModel) -> list[Side]:
    """Parse --sides."""
    sides: list[Side] = []
    for text in f.sides.split(","):
        asked = re.fullmatch(r"(auto|cpu|reference|cuda(?::\d+)?)(?:/(\w+))?", text.strip())
        if not asked:
            raise UsageError(
                f"--sides {f.sides}: expected DEVICE or DEVICE/DTYPE, such as cpu or cuda/bfloat16"
            )
        device, dtype = asked[1], asked[2]
        backend: Any = (
            backends.get("reference") if device == "reference" else choose(device, dtype, f.threads).backend
        )
        dtype = dtype or backend.dtypes[0]
        if dtype not in backend.dtypes:
            raise Refused(
                f"--sides {text}: the {backend.name} backend computes in {', '.join(backend.dtypes)}"
            )
        side = Side(backend, source.cfg, dtype)
        if side.name in (s.name for s in sides):
            raise UsageError(f"--sides {f.sides}: {side.name} twice")
        sides.append(side)
    return sides


def _check_memory(side: Side, batch: Batch, plan: Plan) -> None:
    """Raise Refused when the side, or the reference beside it, does not fit in memory."""
    if side.backend.name == "cuda":
        need = memory(
            side.cfg,
            side.backend,
            *batch.shape,
            dtype=side.dtype,
            train=plan.backward,
            loss_rows=batch.ids.size,
        )
        check_fits(need, side.backend, "use --no-backward, or a smaller --batch-size or --seq-length")
    need_host, have = host_bytes(side, batch.shape, plan), available_memory()
    if have is not None and need_host > have:
        other = {
            "--no-free": replace(plan, free=False),
            "--no-backward": replace(plan, backward=False, optimizer=False, state=False),
            "--no-free --no-backward": Plan(free=False, backward=False, optimizer=False, state=False),
        }
        sizes = {flag: host_bytes(side, batch.shape, p) / 2**30 for flag, p in other.items()}
        less = ", ".join(f"with {flag} {size:.1f}" for flag, size in sizes.items())
        raise Refused(
            f"the reference in float64 needs {need_host / 2**30:.1f} GiB of main memory and {have / 2**30:.1f} GiB are "
            f"free; {less}"
        )


def _pictures(f: Flags, reports: list[Report]) -> list[str]:
    """Name the picture of each report, "" for none."""
    path = Path(f.picture)
    if not f.picture or len(reports) == 1:
        return [f.picture] * len(reports)
    return [str(path.with_stem(f"{path.stem}-{re.sub('[^a-z0-9]+', '-', r.sides[1])}")) for r in reports]


def _refuse_unused(f: Flags, explicit: dict[str, Any]) -> None:
    """Raise UsageError for options that would change nothing."""
    unused: tuple[str, ...] = ()
    beside, why = "", ""
    of_trace = ("dataset", "first", "free", "mask_documents")
    if f.catalogue:
        unused = tuple(name for name in explicit if name not in ("catalogue", "json"))
        beside, why = "--catalogue", "it plants its faults in small models on the cpu backend"
    elif f.against == "hf":
        unused = of_trace
        beside, why = "--against hf", "all taps are compared, free and forced, in one go"
    elif f.against:
        unused = (*of_trace, "text", "batch_size", "seq_length", "backward")
        beside, why = f"--against {f.against}", "what went in and which taps there are is in the file"
    elif f.tokens:
        unused = ("batch_size", "seq_length")
        beside, why = "--tokens", "the ids say how many there are"
    for name in unused:
        if name in explicit:
            flag = name.replace("_", "-")
            typed = "MODEL" if name == "model" else f"--no-{flag}" if explicit[name] is False else f"--{flag}"
            raise UsageError(f"{typed} does not go with {beside}: {why}")


def _check_picture(f: Flags) -> None:
    """Raise IOFailure, before anything is computed, for a picture that cannot be written."""
    path = Path(f.picture)
    if f.picture and (path.is_dir() or not path.parent.is_dir()):
        what = "is a folder" if path.is_dir() else f"the folder {path.parent} does not exist"
        raise IOFailure(
            f"--picture {f.picture}: {what}; name a file in a folder that exists, or --picture '' for none"
        )
    if f.picture:
        try_output(path)
