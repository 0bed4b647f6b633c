"""`apr eval MODEL`: score a checkpoint by one of five measures.

  --dataset FOLDER  loss on token shards: nats/token, bits/byte, perplexity
  --text PATH       the same on text, JSONL or Parquet (a file or a folder)
  --choices FILE    multiple choice by loss: ARC, PIQA and plain JSONL
  --humaneval FILE  programs that pass their tests: pass@k on HumanEval.jsonl.gz
  --tasks NAMES     tasks of lm-evaluation-harness, and files of the two kinds above, with commas

Examples:
  apr eval runs/demo/ckpt/epoch-010.apr --dataset shards/val
  apr eval path/to/hf-folder --text wiki.txt --seq-length 1024 --stride 512 --picture loss.png
  apr eval path/to/hf-folder --choices ARC-Easy-Test.jsonl
  apr eval path/to/hf-folder --humaneval HumanEval.jsonl.gz --samples 20 --temperature 0.2 --output programs.jsonl

docs/eval.md says what each figure is."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..common.atomic import drawn, try_output, write_text
from ..common.errors import AprError, InputNotFound, Refused, UsageError
from ..common.files import sha256_of
from ..common.options import given
from ..common.provenance import versions
from ..common.units import plural
from ..data.audit import sides_of, tokenizer_beside
from ..data.guards import enforce, fits_model
from ..data.manifest import MANIFEST
from ..data.shards import TokenShards
from ..evaluation import choices, humaneval, loss
from ..evaluation.again import check_choices, check_sums_of_positions
from ..evaluation.sandbox import Limits, in_words
from ..evaluation.score import Opened, Scorer, fitting, open_model, prefix_ids
from ..evaluation.tasks import in_words as in_words_of
from ..evaluation.tasks import parse_tasks, score
from ..model.cost import check_positions
from ..tokenizer.tokenizer import Tokenizer
from .eval_flags import ALWAYS, HONOURED, MODES, SEQ_LENGTH, Flags
from .show import Show


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code. Errors are raised."""
    named = given(Flags, args, "apr eval", __doc__ or "")
    f = Flags(**named)
    mode = _mode(named)
    if f.backend == "reference" and mode == "humaneval" and f.dtype is None:
        f = replace(f, dtype="float32")  # a program needs thousands of tokens
    for output in filter(None, (f.output, f.picture)):
        try_output(output)
    if f.tasks:
        parse_tasks(f.tasks, "--tasks")
    opened = open_model(f.model, f.device, f.dtype, f.threads, f.backend, f.tokenizer)
    show = Show(quiet=f.json)
    run: Callable[[Flags, Opened, Show], dict[str, Any]] = {
        "dataset": _loss, "text": _loss, "choices": _choices, "humaneval": _humaneval, "tasks": _tasks,
    }[mode]  # fmt: skip
    try:
        result = run(f, opened, show)
    finally:
        show.stop()
    rows, draw = result.pop("rows", None), result.pop("draw", None)
    result |= {
        "model": f.model,
        "model_sha256": opened.loaded.sha256,
        "backend": opened.backend.name,
        "dtype": opened.dtype,
        "versions": versions(),
    }
    if f.json:
        print(json.dumps(result))
    else:
        _print(show, f, mode, result)
    # Last, so that the figures are printed even when a file cannot be written.
    if f.output and rows is not None:
        write_text(f.output, "".join(json.dumps(r) + "\n" for r in rows))
    if f.picture and draw is not None:
        drawn(draw, f.picture)
    return 0


def _mode(named: dict[str, Any]) -> str:
    """Choose the measure that a command line asks for.

    Raises UsageError for none, for several, or for a flag that the measure does not honour."""
    modes = [m for m in MODES if named.get(m) is not None]
    if len(modes) != 1:
        flags = ", ".join(f"--{m}" for m in MODES)
        raise UsageError(
            f"give one of {flags}" + (f", not {len(modes)} of them" if modes else ": what to evaluate on")
        )
    for name in named:
        if name not in ALWAYS | HONOURED[modes[0]] | {modes[0]}:
            where = " and ".join(f"--{m}" for m in MODES if name in HONOURED[m])
            raise UsageError(f"--{name.replace('_', '-')} goes with {where}, not with --{modes[0]}")
    return modes[0]


def _seq_length(f: Flags, opened: Opened) -> int:
    return f.seq_length or min(SEQ_LENGTH, opened.cfg.max_position_embeddings)


def _loss(f: Flags, opened: Opened, show: Show) -> dict[str, Any]:
    seq = _seq_length(f, opened)
    stride = f.stride if f.stride is not None else seq
    loss.check_stride(seq, stride)
    end = None
    if f.dataset is not None:
        tokenizer, shards = _shards(f, opened)
        if f.mask_documents:
            end = shards.border_id
            if end is None:
                raise Refused(
                    f"--mask-documents: {shards.folder} was encoded with eos_policy none: no id ends a document"
                )
        texts = loss.shard_windows(shards, seq, stride, f.max_tokens)
    else:
        tokenizer = opened.need_tokenizer()
        texts = loss.text_windows(str(f.text), tokenizer, seq, stride, f.max_tokens, f.bos, f.content_field)
    scorer = Scorer(opened, seq, f.batch_size, end)
    count = loss.ByteCount(tokenizer)
    start = time.perf_counter()
    sums = loss.measure(
        scorer, texts, count, lambda done, total: show.preparing(f"score ({texts.unit})", done, total)
    )
    seconds = time.perf_counter() - start
    rows = sums.by_position()
    check_sums_of_positions(rows, sums.tokens, sums.nats)
    is_masked = scorer.model.document_end is not None
    if is_masked != f.mask_documents:
        raise AprError(
            f"--mask-documents is {f.mask_documents}, the model was made otherwise: a fault of apr"
        )
    title = f"{Path(f.model).name} on {Path(str(f.dataset or f.text)).name}: loss by position"
    return {
        **sums.figures(),
        "bytes_counted": count.how,
        "tokens_per_sec": sums.tokens / seconds,
        "seconds": seconds,
        "seq_length": seq,
        "stride": stride,
        "batch_size": scorer.batch,
        "mask_documents": is_masked,
        "tokenizer_sha256": tokenizer.sha256,
        **texts.facts,
        "by_position": rows,
        "draw": lambda path: loss.picture(rows, sums, title, path),
    }


def _shards(f: Flags, opened: Opened) -> tuple[Tokenizer, TokenShards]:
    """Open shards, checked in full, and the tokenizer that made them: the model's own, where it has one."""
    given_folder = Path(str(f.dataset))
    sides = sides_of(given_folder)
    folder = sides.get("val", sides["train"])
    if not (folder / MANIFEST).is_file():
        raise InputNotFound(
            f"--dataset {folder}: no token shards there, no {MANIFEST}: make them with apr tokenize encode-corpus, or use --text"
        )
    tokenizer = opened.tokenizer or Tokenizer.from_file(tokenizer_beside(given_folder))
    enforce({tokenizer.source: [fits_model(tokenizer, opened.cfg.vocab_size)]})
    return tokenizer, TokenShards(folder, tokenizer)


def _choices(f: Flags, opened: Opened, show: Show) -> dict[str, Any]:
    tokenizer = opened.need_tokenizer()
    items = choices.read_items(str(f.choices))[: f.limit]
    before = prefix_ids(tokenizer, f.bos)
    alone = next(iter(prefix_ids(tokenizer, "auto")), tokenizer.eos_id)
    seq = _seq_length(f, opened)
    check_positions(opened.cfg, seq)
    start = time.perf_counter()
    windows, cut = choices.windows_of(tokenizer, items, seq, before, alone)
    scorer = Scorer(opened, fitting(windows, seq), f.batch_size)
    result = choices.measure(
        scorer, items, windows, lambda done, total: show.preparing("score (questions)", done, total)
    )
    check_choices(str(f.choices), f.limit, result)
    return {
        **result,
        "seconds": time.perf_counter() - start,
        "choices": f.choices,
        "choices_sha256": _sha256(str(f.choices)),
        "contexts_cut": cut,
        "seq_length": seq,
        "batch_size": scorer.batch,
        "bos": f.bos,
        "bos_ids": before,
    }


def _humaneval(f: Flags, opened: Opened, show: Show) -> dict[str, Any]:
    temperature = f.temperature if f.temperature is not None else 0.0 if f.samples == 1 else 0.8
    settings = humaneval.HumanEvalSettings(
        f.samples,
        temperature,
        f.top_k,
        f.top_p,
        f.max_new_tokens,
        f.seed,
        Limits(f.timeout),
        f.allow_unsafe,
        str(f.humaneval),
    )
    settings.check()
    problems = humaneval.read_problems(str(f.humaneval))[: f.limit]
    completer = humaneval.Completer(opened, settings)
    completer.check_fits(problems)
    start = time.perf_counter()
    result = humaneval.run(completer.complete, problems, settings, show.preparing)
    return {
        **result,
        "seconds": time.perf_counter() - start,
        "humaneval": f.humaneval,
        "humaneval_sha256": _sha256(str(f.humaneval)),
        "temperature": temperature,
        "top_k": f.top_k,
        "top_p": f.top_p,
        "max_new_tokens": f.max_new_tokens,
        "seed": f.seed,
        "timeout": f.timeout,
        "stop": list(humaneval.STOP),
    }


def _tasks(f: Flags, opened: Opened, show: Show) -> dict[str, Any]:
    seq, start = _seq_length(f, opened), time.perf_counter()
    found = score(
        opened,
        parse_tasks(str(f.tasks), "--tasks"),
        seq,
        f.batch_size,
        f.limit,
        f.allow_unsafe,
        show.preparing,
    )
    return {"tasks": found, "seconds": time.perf_counter() - start, "seq_length": seq}


def _sha256(path: str) -> str:
    return sha256_of(Path(path))[0]


def _plus_minus(value: float, error: float | None, digits: int = 4) -> str:
    return f"{value:.{digits}f}" + (f" +- {error:.{digits}f}" if error is not None else "")


def _print(show: Show, f: Flags, mode: str, r: dict[str, Any]) -> None:
    rows: list[tuple[str, str]] = []
    if mode in ("dataset", "text"):
        rows += [
            ("loss", f"{_plus_minus(r['loss'], r['loss_stderr'])} nats/token"),
            (
                "bits per byte",
                f"{r['bits_per_byte']:.4f}" if r["bits_per_byte"] is not None else "no bytes to count",
            ),
            ("perplexity", f"{r['perplexity']:.4g}"),
            (
                "scored",
                f"{plural(r['tokens'], 'token')}, {plural(r['bytes'] or 0, 'byte')}, {plural(r['documents'], 'document')}",
            ),
            ("windows", f"{r['windows']:,} of {plural(r['seq_length'], 'token')}, {r['stride']} apart"),
            ("speed", f"{r['tokens_per_sec']:,.0f} tokens/s, {plural(r['batch_size'], 'window')} at once"),
        ]
        if mode == "text":
            rows.append(("before each text", f"{r['bos_ids'] or 'nothing'} (--bos {r['bos']})"))
            if r["documents_too_short"]:
                rows.append(
                    ("without a prediction", f"{plural(r['documents_too_short'], 'document')} of one token")
                )
        if r.get("splits"):
            rows.append(("splits", r["splits"]))
        if r["left_out"]:
            rows.append(("left out", f"{r['left_out']:,}, the first: {r['left_out_first'][0]}"))
    elif mode == "choices":
        rows += [
            (f"accuracy, {k.replace('_', ' ')}", _plus_minus(**_renamed(v))) for k, v in r["accuracy"].items()
        ]
        cut = f"{plural(r['contexts_cut'], 'choice')} with a cut context"
        rows += [("by chance", f"{r['chance']:.4f}"), ("questions", f"{r['items']:,}, {cut}")]
    elif mode == "tasks":
        rows += [(name, in_words_of("", figure).strip()) for name, figure in r["tasks"].items()]
    else:
        rows += [(f"pass@{k}", _plus_minus(**_renamed(v))) for k, v in r["pass_at_k"].items()]
        rows += [
            (
                "programs",
                f"{r['passed']:,} of {r['problems'] * r['samples']:,} passed ({plural(r['problems'], 'problem')})",
            ),
            ("drawn", f"{r['samples']} for each problem at temperature {r['temperature']:g}"),
            ("kept in by", in_words(r["isolation"])),
        ]
    rows.append(("computed on", f"{r['backend']}, {r['dtype']}, {r['seconds']:.1f} s"))
    show.table(f"{f.model} on {getattr(f, mode)}", rows)


def _renamed(figure: dict[str, Any]) -> dict[str, Any]:
    return {"value": figure["value"], "error": figure["stderr"]}
