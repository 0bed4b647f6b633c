"""Render a run directory as one HTML page: what the run reached, its gates, curves, samples, data, settings.

`render` reads files of the run directory and nothing else: no clock, no network, no state of the machine; the same files
give the same page. It works while a run is going on: what is not there yet is left out.
"""

from __future__ import annotations

import base64
import hashlib
import math
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from ..common.files import real
from ..common.finding import FAIL, SUSPECT
from .charts import Line, Mark, Plot, Rule, finite, moving_mean, plot
from .ranks import rank_chart, rank_section
from .run_files import PAIR, TOKEN, Run, load
from .sections import (
    check_sentences,
    counts,
    data_rows,
    environment_rows,
    evaluation_rows,
    gate_rows,
    guard_rows,
    last_step,
    progress,
    sample_groups,
    settings_rows,
    subject,
    tiles,
)
from .words import as_text, or_nan, prose

MEAN_STEPS = 500  # of the moving mean, at most
RELOAD_SECONDS = 30  # while a run is going on
CONTROL = {c: chr(0x2400 + c) for c in range(32) if c not in (9, 10, 13)} | {13: None, 127: "\u2421"}
STATUS = {
    "RUNNING": f"Training goes on. This page reloads every {RELOAD_SECONDS} seconds; apr report writes it anew.",
    "DONE": "Every step was taken.",
    "EARLY_STOP": "The validation loss had stopped improving.",
    "TARGET_REACHED": "The validation loss reached its target.",
    "ABORTED": "The run was stopped by an error.",
    "INTERRUPTED": "Stopped from outside, its state saved: apr pretrain --resume goes on.",
}


def render(run_dir: Path, options: Any) -> str:
    """Render the page of a run directory; options: the dataclass that declares the flags of `apr pretrain`.

    Raises: InputNotFound, MalformedFile."""
    run = load(run_dir)
    v, (changed, kept) = run.verdict, settings_rows(run, options)
    page = _template().render(
        name=Path(str(run.setting("run_dir") or real(run_dir))).name,
        subject=subject(run),
        running=bool(v and v["status"] == "RUNNING"),
        reload_seconds=RELOAD_SECONDS,
        verdict=v,
        status_text=STATUS.get(v["status"], "") if v else "",
        progress=progress(run),
        tiles=tiles(run),
        gates=gate_rows(run),
        counts=counts(v),
        checks=check_sentences(run),
        charts=charts(run),
        rows=evaluation_rows(run),
        of_pairs=run.loss_unit == PAIR,
        evaluations=len(run.evaluations),
        samples=sample_groups(run),
        data=data_rows(run),
        guards=guard_rows(run),
        model=list(run.part("model").items()),
        changed=changed,
        kept=kept,
        environment=environment_rows(run),
        ranks=rank_section(run),
    )
    clean = page.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate of a JSON file is no text
    return clean.translate(CONTROL)


def charts(run: Run) -> list[Plot]:
    """Plot the loss, large, and then every other series of the log."""
    x, last = run.step, float(last_step(run))
    marks = [
        Mark(float(g["step"]), g["id"], g["verdict"])
        for g in gate_rows(run)
        if g["verdict"] in (FAIL, SUSPECT) and g["step"] is not None and g["step"] <= last
    ]
    data, vocab = run.part("data"), run.part("model").get("vocab_size")
    rules, of_text = [], run.loss_unit == TOKEN
    if of_text and isinstance(vocab, int) and vocab > 1:
        rules.append(Rule(math.log(vocab), f"uniform guess, ln V = {math.log(vocab):.2f}"))
    entropy = or_nan(data.get("val_unigram_entropy_nats"))
    if of_text and math.isfinite(entropy):
        rules.append(Rule(entropy, f"entropy of token frequencies = {entropy:.2f}"))
    e = run.evaluations
    errors = np.array([or_nan(m.get("val_loss_stderr")) for m in e])
    at = np.array([m["step"] for m in e], np.float64)
    val_loss = np.array([m["val_loss"] for m in e], np.float64)
    val = Line("validation", at, val_loss, "dots", "b", errors if np.isfinite(errors).any() else None)
    lines = [*with_mean("train", x, run.series["train_loss"]), val]
    tokens_at = run.tokens_at if x.size else None
    charts = [
        plot("loss", "Loss", run.loss_unit, lines, rules, marks, last_x=last, height=380, tokens_at=tokens_at)
    ]
    for name in run.sources:
        found = np.array([or_nan(m.get(f"val_loss/{name}")) for m in e])
        errors = np.array([or_nan(m.get(f"val_loss_stderr/{name}")) for m in e])
        own = run.series[f"train_loss/{name}"]
        has = np.isfinite(own)
        lines = [*with_mean("train", x[has], own[has]), Line("validation", at, found, "dots", "b", errors)]
        charts.append(plot(f"loss-{name}", f"Loss of {name}", run.loss_unit, lines, last_x=last))
    clip = or_nan(run.setting("grad_clip"))
    clips = [Rule(clip, f"clipped to {clip:g}")] if clip > 0 else []

    def small(name: str, title: str, unit: str, mean: bool, log: bool = False, zero: bool = False) -> None:
        y = run.series[name]
        if np.isfinite(y).any():
            series = with_mean("", x, y, log) if mean else [Line(title.lower(), x, y)]
            charts.append(
                plot(name, title, unit, series, clips if log else [], last_x=last, log=log, zero=zero)
            )

    small("lr", "Learning rate", "", mean=False, zero=True)
    small("grad_norm", "Gradient norm", "unclipped", mean=True, log=True)
    small("weight_norm", "Weight norm", "", mean=False)
    small("tokens_per_sec", "Throughput", "tokens/s", mean=True, zero=True)
    charts += rank_chart(run, last)
    return charts if x.size or e else []


def with_mean(label: str, x: np.ndarray, y: np.ndarray, log: bool = False) -> list[Line]:
    """Draw a series, faint, and its moving mean over a fiftieth of the run, MEAN_STEPS at most; geometric if `log`."""
    width, label = min(len(y) // 50, MEAN_STEPS), f"{label}, " if label else ""
    if width < 2:
        return [Line(f"{label}each step", x, y)]
    x_kept, y_kept = finite(x, y, log)
    if len(y_kept) < width:
        return [Line(f"{label}each step", x, y, "raw")]
    mean_x, mean = moving_mean(x_kept, np.log(y_kept) if log else y_kept, width)
    kind = "geometric mean" if log else "mean"
    return [
        Line(f"{label}each step", x, y, "raw"),
        Line(f"{label}{kind} of {width:,}", mean_x, np.exp(mean) if log else mean, "mean"),
    ]


@cache
def _template() -> jinja2.Template:
    env = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    env.filters["text"] = as_text
    env.filters["prose"] = prose
    env.filters["sha256"] = lambda text: base64.b64encode(
        hashlib.sha256(str(text).encode()).digest()
    ).decode()
    return env.from_string(
        resources.files(__package__).joinpath("report_template.html").read_text(encoding="utf-8")
    )
