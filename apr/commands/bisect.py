"""`apr bisect MODEL`: which op of which layer is wrong. Each side runs a training step op by op beside the reference in
float64; or beside a trace (--against T.safetensors), or beside Hugging Face transformers (--against hf)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from .. import backends
from ..bisect import against, hf, show
from ..bisect import batch as batches
from ..bisect.report import Report, Row
from ..bisect.stages import Batch, Plan, Side, host_bytes, run, upload
from ..config import PRESETS
from ..device import available_memory, check_fits, choose
from ..errors import Refused, UsageError
from ..flags import option, parse
from ..loading import Source, open_source
from ..plan import check_positions, memory
from .trace import IGNORED, read_ids

AGREE, DIFFER = 0, 9


@dataclass(frozen=True)
class Flags:
    """Options of `apr bisect`."""

    model: str = option(
        "an .apr file, a Hugging Face folder, or a preset (random weights)", "", positional=True
    )
    sides: str = option(
        "what is judged: DEVICE[/DTYPE], several with commas: cpu, cuda/bfloat16, cuda:1/float32, reference/float32",
        "auto",
    )
    against: str = option(
        "judge by a file of `apr trace`, or by `hf`: Hugging Face transformers (default: the reference in float64)",
        "",
    )
    tokens: str = option('ids: "1,2,3", or a .json or .npy file of one row or (B,T)', "")
    targets: str = option("file of targets (B,T), -100 ignored (default: the next tokens)", "")
    text: str = option("a text file (default: a passage of prose and code)", "")
    dataset: str = option("a folder of token shards: the first batch that training draws of it", "")
    batch_size: int = option("sequences", 2)
    seq_length: int = option("tokens per sequence", 32)
    first: bool = option("stop at the first stage that finds a fault", False)
    backward: bool = option("also backward, optimizer and state; --no-backward: forward and loss", True)
    free: bool = option("also errors as they accumulate; --no-free: each op alone", True)
    picture: str = option('the picture to write; "" for none', "bisect.png")
    rows: int = option("rows of faults to list", 8)
    catalogue: bool = option(
        "plant every fault of the catalogue in a small model and list what is found", False
    )
    threads: int | None = option("CPU threads (default: all cores)")
    seed: int = option("of a preset's random weights and of ids drawn at random", 42)
    json: bool = option("print one JSON document and nothing else", False)


def main(args: Sequence[str]) -> int:
    """Returns the exit code: 0 when all agree, 9 when not; errors are raised."""
    f = parse(Flags, args, "apr bisect", __doc__ or "")
    if f.catalogue:
        from ..bisect.catalogue import print_catalogue

        return print_catalogue(f.json)
    if not f.model:
        raise UsageError(
            "say which model: an .apr file, a Hugging Face folder or a preset such as qwen2-tiny"
        )
    if min(f.batch_size, f.seq_length, f.rows + 1) < 1 or f.seed < 0:
        raise UsageError("--batch-size and --seq-length must be at least 1, --rows and --seed at least 0")
    if sum(map(bool, (f.tokens, f.text, f.dataset))) > 1:
        raise UsageError(
            "--tokens, --text and --dataset are three ways to say what goes in; give one of them"
        )
    if f.targets and not f.tokens:
        raise UsageError("--targets goes with --tokens")
    console = Console(highlight=False, quiet=f.json)
    reports = _against(f, console) if f.against else _beside_reference(f, console)
    pictures = _pictures(f, reports)
    for report, picture in zip(reports, pictures, strict=True):
        show.print_report(report, console, f.rows)
        if picture:
            console.print(f"picture: {picture}", soft_wrap=True)
    if f.json:
        print(json.dumps({"reports": [r.as_json() for r in reports], "pictures": pictures}, indent=1))
    return AGREE if all(r.agree for r in reports) else DIFFER


def _beside_reference(f: Flags, console: Console) -> list[Report]:
    """Each side in lockstep with the reference."""
    source = open_source(f.model, "float32", f.seed)
    given, checked = _batch(f, source)
    check_positions(source.cfg, given.shape[1])
    plan = Plan(f.free, f.backward, f.backward, f.backward, f.first)
    reports = []
    for side in _sides(f, source):
        _check_memory(side, given, plan)
        report = Report(f.model, ("reference float64", side.name), given.words)
        report.add([*checked, *batches.rows(given, source.cfg)])
        report.notes += [n for n in [batches.can_show(given)] if n]
        with console.status("") as status:

            def progress(stage: str, status: Any = status, side: Side = side) -> None:
                status.update(f"{side.name}: {stage}")

            run(source.cfg, side, source.host, given, report, plan, progress)
        reports.append(report)
    return reports


def _against(f: Flags, console: Console) -> list[Report]:
    """Each side after a trace: a file, or what transformers computes now."""
    if f.dataset or f.first:
        raise UsageError("--dataset and --first do not go with --against")
    made_here = f.against == "hf"
    source = open_source(f.model, "float64" if made_here else "float32", f.seed)
    if made_here:
        given, _ = _batch(f, source)
        check_positions(source.cfg, given.shape[1])
        with console.status("transformers"):
            if f.model in PRESETS:
                named = source.layout.named(source.host)
                want = hf.trace_of_weights(source.cfg, named, given.ids, given.targets, gradients=f.backward)
            else:
                want = hf.trace_of(f.model, given.ids, given.targets, gradients=f.backward)
        name, dtype, words, backward = "transformers float64", "float64", given.words, f.backward
    else:
        tokens = read_ids(f.tokens, source.cfg, "--tokens", lowest=0) if f.tokens else None
        targets = read_ids(f.targets, source.cfg, "--targets", lowest=IGNORED) if f.targets else None
        trace = against.read_trace(f.against, tokens, targets)
        dtype, backward = trace.dtype, trace.gradients
        source = open_source(f.model, "float64" if dtype == "float64" else "float32", f.seed)
        against.same_model(f.against, trace, source.sha256)
        want = trace.tensors
        given = Batch(trace.ids, trace.targets, f"what went into {f.against}")
        name = f"{f.against} ({trace.metadata.get('backend', 'a trace')} {dtype})"
        words = given.words
    reports = []
    for side in _sides(f, source):
        report = Report(f.model, (name, side.name), words)
        with console.status(f"{side.name} beside {name}"):
            model = side.model(source.host, given.shape, train=backward)
            report.add(upload(model, source.host))
            report.add(against.compare_with_trace(model, source.host, given.ids, given.targets, want, dtype))
        for stage in ("configuration", "data", "optimizer", "state"):
            report.skipped[stage] = "a trace does not show it"
        reports.append(report)
    return reports


def _batch(f: Flags, source: Source) -> tuple[Batch, list[Row]]:
    shape = (f.batch_size, f.seq_length)
    if f.tokens:
        ids = read_ids(f.tokens, source.cfg, "--tokens", lowest=0)
        targets = read_ids(f.targets, source.cfg, "--targets", lowest=IGNORED) if f.targets else None
        if targets is not None and targets.shape != ids.shape:
            raise UsageError(f"--targets has shape {targets.shape}, --tokens {ids.shape}; they must be equal")
        return batches.from_ids(ids, targets, "--tokens"), []
    if f.dataset:
        return batches.from_dataset(f.dataset, shape, f.seed)
    if source.tokenizer is None:
        if f.text:
            raise Refused(f"{f.model}: no tokenizer in it, so --text cannot be read; give --tokens")
        return batches.at_random(source.cfg, shape, f.seed), []
    text = batches.read_text(f.text) if f.text else batches.PASSAGE * (1 + shape[0] * shape[1] // 128)
    return batches.from_text(text, source.tokenizer, shape, f.text or "a passage of prose and code")


def _sides(f: Flags, source: Source) -> list[Side]:
    sides = []
    for text in f.sides.split(","):
        asked = re.fullmatch(r"(auto|cpu|reference|cuda(?::\d+)?)(?:/(\w+))?", text.strip())
        if not asked:
            raise UsageError(f"--sides {text}: expected DEVICE or DEVICE/DTYPE, such as cpu or cuda/bfloat16")
        device, dtype = asked[1], asked[2]
        backend: Any = (
            backends.get("reference") if device == "reference" else choose(device, dtype, f.threads).backend
        )
        dtype = dtype or backend.dtypes[0]
        if dtype not in backend.dtypes:
            raise Refused(
                f"--sides {text}: the {backend.name} backend computes in {', '.join(backend.dtypes)}"
            )
        sides.append(Side(backend, source.cfg, dtype))
    return sides


def _check_memory(side: Side, given: Batch, plan: Plan) -> None:
    if side.backend.name == "cuda":
        need = memory(
            side.cfg,
            side.backend,
            *given.shape,
            dtype=side.dtype,
            train=plan.backward,
            loss_rows=given.ids.size,
        )
        check_fits(need, side.backend, "use --no-backward, or a smaller --batch-size or --seq-length")
    need_host, have = host_bytes(side, given.shape, plan), available_memory()
    if have is not None and need_host > have:
        raise Refused(
            f"the reference in float64 needs {need_host / 2**30:.1f} GiB of main memory and {have / 2**30:.1f} GiB are "
            "free; --no-free needs about half, --no-backward half of that"
        )


def _pictures(f: Flags, reports: list[Report]) -> list[str]:
    """Write a picture for each report; their names."""
    if not f.picture:
        return [""] * len(reports)
    out = []
    for report in reports:
        path = Path(f.picture)
        if len(reports) > 1:
            path = path.with_stem(f"{path.stem}-{re.sub('[^a-z0-9]+', '-', report.sides[1])}")
        show.picture(report, path)
        out.append(str(path))
    return out
