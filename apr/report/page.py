"""A run directory as one HTML page: what the run reached, what its gates said, curves, samples, data, settings.

`render` reads files of the run directory and nothing else: no clock, no network, no state of the machine; the same files
give the same page. It works while a run is going on: what is not there yet is left out.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
import json
import math
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape

from ..common.errors import InputNotFound, MalformedFile
from ..common.files import read_json
from ..evidence.gates import FAIL, FORMAT, PASS, SKIPPED, SUSPECT
from ..training.settings import Settings
from .charts import DRAWABLE, Line, Mark, Plot, Rule, finite, moving_mean, plot

SERIES = ("train_loss", "grad_norm", "weight_norm", "lr", "tokens_per_sec", "tokens_seen", "wall_ms")
MEAN_STEPS = 500  # of the moving mean, at most
ROWS = 60  # evaluations in the table; of more, evenly spaced ones with the best
SAMPLES = 24  # samples shown, evenly spaced
SAMPLE_CHARACTERS = 4000
CHUNK = 1 << 20  # bytes of metrics.jsonl that are parsed at once
RELOAD_SECONDS = 30  # while a run is going on
CONTROL = {c: chr(0x2400 + c) for c in range(32) if c not in (9, 10, 13)} | {13: None, 127: "\u2421"}
CODE = re.compile(r"(`[^`]+`|(?<![\w-])--[a-z][a-z0-9-]*)")
RANK = {FAIL: 0, SUSPECT: 1, PASS: 2, SKIPPED: 3}
OTHERWISE = {
    "refuse": "the run does not start",
    "abort": "the run stops",
    SUSPECT: "the run goes on and is SUSPECT",
    FAIL: "the run goes on and is a FAIL",
}
STATUS = {
    "RUNNING": f"Training goes on. This page reloads every {RELOAD_SECONDS} seconds; apr report writes it anew.",
    "DONE": "Every step was taken.",
    "EARLY_STOP": "The validation loss had stopped improving.",
    "TARGET_REACHED": "The validation loss reached its target.",
    "ABORTED": "The run was stopped by an error.",
    "INTERRUPTED": "Stopped from outside, its state saved: apr pretrain --resume goes on.",
}


@dataclass
class Run:
    """What the files of a run directory say."""

    config: dict[str, Any]
    verdict: dict[str, Any] | None
    step: np.ndarray  # of every training step that is logged
    series: dict[str, np.ndarray]  # the columns SERIES at those steps, nan where a line has no figure
    evaluations: list[dict[str, Any]]
    spot_checks: list[dict[str, Any]]
    passes: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    ckpt: Path

    def tokens_at(self, step: float) -> float:
        """Tokens seen when a step was done; between logged steps in proportion."""
        return float(np.interp(step, np.append(0, self.step), np.append(0, self.series["tokens_seen"])))

    def setting(self, name: str) -> Any:
        """A setting of config.json, None where it has none."""
        return self.part("settings").get(name)

    def part(self, name: str) -> dict[str, Any]:
        """An object of config.json, empty where it has none."""
        found = self.config.get(name)
        return found if isinstance(found, dict) else {}


def render(run_dir: Path) -> str:
    """The page. Raises InputNotFound, MalformedFile."""
    run = load(run_dir)
    v, (changed, kept) = run.verdict, _settings(run)
    page = _template().render(
        name=Path(str(run.setting("run_dir") or run_dir.resolve())).name,
        subject=_subject(run),
        running=bool(v and v["status"] == "RUNNING"),
        reload_seconds=RELOAD_SECONDS,
        verdict=v,
        status_text=STATUS.get(v["status"], "") if v else "",
        progress=_progress(run),
        tiles=_tiles(run),
        gates=_gates(run),
        counts=_counts(v),
        checks=_checks(run),
        charts=_charts(run),
        rows=_evaluations(run),
        evaluations=len(run.evaluations),
        samples=_samples(run),
        data=_data(run),
        guards=_guards(run),
        model=list(run.part("model").items()),
        changed=changed,
        kept=kept,
        environment=_environment(run),
    )
    clean = page.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate of a JSON file is no text
    return clean.translate(CONTROL)


# Reading


def load(run_dir: Path) -> Run:
    """Read a run directory, finished or not. Raises InputNotFound, MalformedFile."""
    path = run_dir / "config.json"
    if not run_dir.is_dir():
        raise InputNotFound(f"{run_dir}: no such folder; give the --run-dir of `apr pretrain`")
    if not path.is_file():
        raise InputNotFound(f"{path}: no such file; give a folder that `apr pretrain` wrote")
    config = read_json(path)
    if not isinstance(config, dict):
        raise MalformedFile(f"{path}: expected a JSON object")
    flat = array("d")  # 8 bytes a figure: a run may have a million steps
    other: list[dict[str, Any]] = []
    for line in _lines(run_dir / "metrics.jsonl", "step"):
        if "train_loss" not in line:
            other.append(line)
            continue
        try:
            flat.append(line["step"])
            flat.extend(map(line.get, SERIES, itertools.repeat(math.nan)))
        except (TypeError, OverflowError):
            raise MalformedFile(
                f"{run_dir / 'metrics.jsonl'}: a figure of step {line['step']} is not a number"
            ) from None
    table = np.frombuffer(flat, np.float64).reshape(-1, 1 + len(SERIES)).copy()
    series = dict(zip(SERIES, table[:, 1:].T, strict=True))
    seen = series["tokens_seen"]
    np.copyto(seen, 0.0, where=~np.isfinite(seen))
    evaluations = [e for e in other if "val_loss" in e]
    for e in evaluations:
        value = e["val_loss"]
        if not isinstance(value, int | float) or DRAWABLE < abs(value) < math.inf:
            raise MalformedFile(f"{run_dir / 'metrics.jsonl'}: val_loss of step {e['step']} is not a number")
    return Run(
        config,
        _verdict(run_dir / "verdict.json"),
        table[:, 0],
        series,
        evaluations,
        [e for e in other if "spot_check" in e],
        [e for e in other if "passes" in e],
        [s for s in _lines(run_dir / "samples.jsonl", "step") if isinstance(s.get("text"), str)],
        run_dir / "ckpt",
    )


def _lines(path: Path, key: str) -> Iterator[dict[str, Any]]:
    """Objects of a JSON lines file that hold a whole number `key`; none where there is no file. A last line cut short,
    by a crash or because it is being written, is left out."""
    if not path.is_file():
        return
    number = 0
    with path.open("rb") as f:
        lines = f.readlines(CHUNK)
        while lines:
            following = f.readlines(CHUNK)
            try:  # one call for many lines is faster
                found = json.loads(b"[" + b",".join(lines) + b"]")
            except (ValueError, RecursionError):
                found = [_parsed(line) for line in lines]
                if found[-1] is None and not following:
                    found.pop()
            for d in found:
                number += 1
                if not isinstance(d, dict) or type(d.get(key)) is not int or not 0 <= d[key] < 2**53:
                    raise MalformedFile(f"{path}: line {number} is not a JSON object with a {key}")
                yield d
            lines = following


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _verdict(path: Path) -> dict[str, Any] | None:
    """verdict.json, None where there is none."""
    if not path.is_file():
        return None
    v = read_json(path)
    if not isinstance(v, dict) or v.get("format") != FORMAT:
        raise MalformedFile(f"{path}: expected a JSON object with format = {FORMAT!r}")
    if not isinstance(v.get("status"), str) or not isinstance(v.get("verdict"), str):
        raise MalformedFile(f"{path}: no status or no verdict in it")
    v = {"message": "", "bounds_changed": {}} | v
    if not isinstance(v["bounds_changed"], dict):
        raise MalformedFile(f"{path}: bounds_changed must be an object of numbers")
    gates = v.get("gates")
    if not isinstance(gates, list) or not all(
        isinstance(g, dict) and isinstance(g.get("id"), str) for g in gates
    ):
        raise MalformedFile(f"{path}: gates must be a list of objects with an id")
    return v


# Figures in words


def _number(value: float, digits: int = 4) -> str:
    return f"{value:,.{digits}f}" if abs(value) < 1e6 else f"{value:.4g}"


def _size(n: float) -> str:
    """2.36 M, or 12,800 where that says more."""
    if not math.isfinite(n):
        return str(n)
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if n >= unit:
            return f"{n / unit:.3g} {letter}"
    return f"{n / 1e3:.4g} k" if n >= 1e5 else f"{n:,.0f}"


def _clock(seconds: float) -> str:
    """45 s, 3 min 20 s, 5 h 12 min, 3 d 4 h."""
    s = round(seconds)
    if s < 60:
        return f"{seconds:.1f} s" if s < 10 else f"{s} s"
    for big, small, a, b in ((86400, 3600, "d", "h"), (3600, 60, "h", "min"), (60, 1, "min", "s")):
        if s >= big:
            return f"{s // big} {a} {s % big // small} {b}"
    raise AssertionError("s is at least 60")


def _perplexity(loss: float) -> str:
    if not loss < 700:
        return "inf"
    value = math.exp(loss)
    return f"{value:,.2f}" if value < 1e3 else f"{value:,.0f}" if value < 1e6 else f"{value:.3g}"


def _text(value: Any) -> str:
    """A value of a JSON file as a person reads it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return ", ".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _prose(text: str) -> Markup:
    """Text with flags, and what stands between backticks, as code."""
    parts = CODE.split(text)
    return Markup("").join(
        Markup("<code>{}</code>").format(p.strip("`")) if i % 2 else escape(p) for i, p in enumerate(parts)
    )


# Parts of the page


def _subject(run: Run) -> str:
    """What was trained on what, in one line."""
    model, parameters = run.part("model"), run.config.get("num_parameters")
    device = run.part("device")
    start = f"from {Path(str(run.setting('init'))).name}" if run.setting("init") else "from random weights"
    corpus = str(run.part("data").get("corpus") or "")
    parts = [
        str(model.get("model_type", "")),
        f"{_size(parameters)} parameters {start}" if isinstance(parameters, int) else "",
        Path(corpus).name if corpus.startswith("/") else corpus,
        " on ".join(str(x) for x in (run.setting("dtype"), device.get("gpu") or device.get("cpu")) if x),
    ]
    return " \u00b7 ".join(p for p in parts if p)


def _last_step(run: Run) -> int:
    return int(max([0.0, *run.step[-1:].tolist(), *(float(e["step"]) for e in run.evaluations[-1:])]))


def _progress(run: Run) -> dict[str, Any] | None:
    """How far a run is that has not taken all its steps."""
    total, step = run.setting("num_steps"), _last_step(run)
    if (
        not isinstance(total, int)
        or not 0 <= step < total
        or (run.verdict and run.verdict["status"] == "DONE")
    ):
        return None
    return {"text": f"{step:,} of {total:,} steps", "percent": round(100 * step / total, 1)}


def _counts(verdict: dict[str, Any] | None) -> str:
    """2 failed, 1 suspect, 14 passed, 1 skipped."""
    words = {FAIL: "failed", SUSPECT: "suspect", PASS: "passed", SKIPPED: "skipped"}
    found = [g.get("verdict") for g in verdict["gates"]] if verdict else []
    return ", ".join(f"{found.count(w)} {text}" for w, text in words.items() if w in found)


def _tiles(run: Run) -> list[dict[str, str]]:
    """Label, value, unit and a note of each key figure."""
    tiles: list[dict[str, str]] = []

    def tile(label: str, value: str, unit: str = "", note: str = "") -> None:
        tiles.append(dict(label=label, value=value, unit=unit, note=note))

    losses = [(float(e["val_loss"]), e) for e in run.evaluations]
    if losses:
        loss, last = losses[-1]
        best, at = min(losses, key=lambda pair: (not math.isfinite(pair[0]), pair[0]))
        error = last.get("val_loss_stderr")
        spread = f"\u00b1 {error:.2g} \u00b7 " if isinstance(error, float) and math.isfinite(error) else ""
        place = "the best so far" if at is last else f"best {best:.4f} at step {at['step']:,}"
        tile("Validation loss", _number(loss), "nats/token", spread + place)
        bits = _or_nan(last.get("val_bits_per_byte"))
        if math.isfinite(bits):
            tile("Bits per byte", _number(bits, 3), "", "comparable between tokenizers")
        tile(
            "Perplexity",
            _perplexity(loss),
            "",
            f"{_perplexity(losses[0][0])} at step {losses[0][1]['step']:,}",
        )
        entropy = _or_nan(run.part("data").get("val_unigram_entropy_nats"))
        if math.isfinite(entropy):
            gain = entropy - loss
            tile(
                "Below token frequencies" if gain >= 0 else "Above token frequencies",
                _number(abs(gain), 3),
                "nats/token",
                f"their entropy is {entropy:.4f}",
            )
    if run.step.size:
        seconds, tokens = float(np.nansum(run.series["wall_ms"])) / 1e3, run.tokens_at(run.step[-1])
        tile("Tokens trained on", _size(tokens), "", f"{_last_step(run):,} steps")
        if seconds > 0:
            speed = run.series["tokens_per_sec"]
            middle = float(np.nanmedian(speed)) if np.isfinite(speed).any() else math.nan
            note = f"median step {middle:,.0f}" if math.isfinite(middle) else ""
            first = run.tokens_at(run.step[0] - 1)  # 0, unless the log begins in the middle of a run
            tile("Speed", f"{(tokens - first) / seconds:,.0f}", "tokens/s", note)
            tile("Time in training steps", _clock(seconds), "", "without evaluations")
    parameters = run.config.get("num_parameters")
    if isinstance(parameters, int):
        m = run.part("model")
        shape = f"{m.get('num_hidden_layers')} layers of {m.get('hidden_size')}" if m else ""
        tile("Parameters", _size(parameters), "", shape)
    return tiles


def _gates(run: Run) -> list[dict[str, Any]]:
    """Gates of the verdict, those that did not pass first; every text there, if empty."""
    texts = ("when", "protects", "bound", "bound_from", "verdict", "measured", "why", "look_at", "changed")
    found = []
    for g in run.verdict["gates"] if run.verdict else []:
        step = g.get("step")
        words = {k: _text(g[k]) if g.get(k) is not None else "" for k in texts}
        found.append(
            words
            | {
                "id": g["id"],
                "step": step if isinstance(step, int) else None,
                "evaluations": g.get("evaluations"),
                "otherwise": OTHERWISE.get(str(g.get("then")), ""),
            }
        )
    return sorted(found, key=lambda g: RANK.get(g["verdict"], 1))


def _checks(run: Run) -> list[str]:
    """Spot checks and passes over the data, in a sentence each."""
    out = []
    asked = [c for c in run.spot_checks if c["spot_check"] != "skipped"]
    if asked:
        agreed = sum(c["spot_check"] == "agree" for c in asked)
        worst = max(
            (w for c in asked if math.isfinite(w := _or_nan(c.get("worst_of_tolerance")))), default=math.nan
        )
        steps = (
            f"at step {asked[0]['step']:,}"
            if len(asked) == 1
            else f"from step {asked[0]['step']:,} to {asked[-1]['step']:,}"
        )
        out.append(
            f"Spot checks against the float64 reference: {agreed} of {len(asked)} agree, {steps}; the worst array at "
            f"{worst:.3g} of its tolerance."
        )
    if len(asked) < len(run.spot_checks):
        out.append(f"{len(run.spot_checks) - len(asked)} spot checks were skipped.")
    if run.passes:
        last = run.passes[-1]
        out.append(f"Passes over the data: {last['passes']}, the last complete at step {last['step']:,}.")
    return out


def _charts(run: Run) -> list[Plot]:
    """The loss, large, and then what else was logged at each step."""
    x, last = run.step, float(_last_step(run))
    marks = [
        Mark(float(g["step"]), g["id"], g["verdict"])
        for g in _gates(run)
        if g["verdict"] in (FAIL, SUSPECT) and g["step"] is not None and g["step"] <= last
    ]
    data, vocab = run.part("data"), run.part("model").get("vocab_size")
    rules = []
    if isinstance(vocab, int) and vocab > 1:
        rules.append(Rule(math.log(vocab), f"uniform guess, ln V = {math.log(vocab):.2f}"))
    entropy = _or_nan(data.get("val_unigram_entropy_nats"))
    if math.isfinite(entropy):
        rules.append(Rule(entropy, f"entropy of token frequencies = {entropy:.2f}"))
    e = run.evaluations
    errors = np.array([_or_nan(m.get("val_loss_stderr")) for m in e])
    at = np.array([m["step"] for m in e], np.float64)
    val_loss = np.array([m["val_loss"] for m in e], np.float64)
    val = Line("validation", at, val_loss, "dots", "b", errors if np.isfinite(errors).any() else None)
    lines = [*_with_mean("train", x, run.series["train_loss"]), val]
    tokens_at = run.tokens_at if x.size else None
    charts = [
        plot("loss", "Loss", "nats/token", lines, rules, marks, last_x=last, height=380, tokens_at=tokens_at)
    ]
    clip = _or_nan(run.setting("grad_clip"))
    clips = [Rule(clip, f"clipped to {clip:g}")] if clip > 0 else []

    def small(name: str, title: str, unit: str, mean: bool, log: bool = False, zero: bool = False) -> None:
        y = run.series[name]
        if np.isfinite(y).any():
            series = _with_mean("", x, y, log) if mean else [Line(title.lower(), x, y)]
            charts.append(
                plot(name, title, unit, series, clips if log else [], last_x=last, log=log, zero=zero)
            )

    small("lr", "Learning rate", "", mean=False, zero=True)
    small("grad_norm", "Gradient norm", "unclipped", mean=True, log=True)
    small("weight_norm", "Weight norm", "", mean=False)
    small("tokens_per_sec", "Throughput", "tokens/s", mean=True, zero=True)
    return charts if x.size or e else []


def _with_mean(label: str, x: np.ndarray, y: np.ndarray, log: bool = False) -> list[Line]:
    """A series, faint, and its moving mean over a fiftieth of the run, MEAN_STEPS at most; the geometric one for a
    logarithmic axis."""
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


def _or_nan(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and abs(value) <= DRAWABLE else math.nan


def _spaced(n: int, most: int) -> list[int]:
    """Indices of at most `most` of n things, evenly spaced, first and last among them."""
    return sorted({round(i * (n - 1) / (most - 1)) for i in range(most)}) if n > most else list(range(n))


def _evaluations(run: Run) -> list[dict[str, Any]]:
    """A row for each evaluation, or for ROWS of them."""
    e, x, train = run.evaluations, run.step, run.series["train_loss"]
    losses = [float(m["val_loss"]) for m in e]
    best = min(range(len(e)), key=lambda i: (not math.isfinite(losses[i]), losses[i]), default=0)
    rows = []
    for i in sorted({*_spaced(len(e), ROWS), best} if e else ()):
        m, step = e[i], e[i]["step"]
        since = e[i - 1]["step"] if i else -1
        part = train[np.searchsorted(x, since, "right") : np.searchsorted(x, step, "right")]
        bits, facts = (
            _or_nan(m.get("val_bits_per_byte")),
            _metadata(run.ckpt / f"epoch-{i:03d}.metadata.json", step),
        )
        rows.append(
            dict(
                epoch=i,
                step=f"{step:,}",
                tokens=f"{run.tokens_at(step):,.0f}" if x.size else "",
                train=_number(float(part.mean())) if part.size else "",
                val=_number(losses[i]),
                error=f"{m['val_loss_stderr']:.4f}"
                if math.isfinite(_or_nan(m.get("val_loss_stderr")))
                else "",
                change=f"{losses[i] - losses[i - 1]:+.4f}".replace("-", "\u2212") if i else "",
                worse=bool(i and not losses[i] < losses[i - 1]),
                bits=f"{bits:.3f}" if math.isfinite(bits) else "",
                perplexity=_perplexity(losses[i]),
                checkpoint=f"epoch-{i:03d}.apr" if facts else "",
                weights=str(facts.get("weights_sha", ""))[:12],
                best=i == best and len(e) > 1,
            )
        )
    return rows


def _metadata(path: Path, step: int) -> dict[str, Any]:
    """What was written beside a checkpoint; empty where there is none of that step."""
    facts = read_json(path) if path.is_file() else {}
    return facts if isinstance(facts, dict) and facts.get("step", step) == step else {}


def _samples(run: Run) -> list[dict[str, Any]]:
    """Samples prompt by prompt, and of each prompt in the order of training."""
    losses = {e["step"]: e["val_loss"] for e in run.evaluations}
    groups: dict[str, list[dict[str, Any]]] = {}
    for s in run.samples:
        groups.setdefault(str(s.get("prompt") or ""), []).append(s)
    out = []
    for prompt, samples in itertools.islice(groups.items(), SAMPLES):
        shown = [samples[i] for i in _spaced(len(samples), max(2, SAMPLES // len(groups)))]
        items = []
        for s in shown:
            text, loss = s["text"].removeprefix(prompt), losses.get(s["step"])
            cut = len(text) > SAMPLE_CHARACTERS
            items.append(
                dict(
                    step=f"{s['step']:,}",
                    tokens=_size(run.tokens_at(s["step"])) if run.step.size else "",
                    loss=_number(float(loss)) if loss is not None else "",
                    text=text[:SAMPLE_CHARACTERS] + (" \u2026" if cut else ""),
                )
            )
        out.append(dict(prompt=prompt, items=items, left_out=len(samples) - len(shown)))
    return out


def _data(run: Run) -> list[tuple[str, str, bool]]:
    """Name, value and whether it is a hash, of what was trained on."""
    words = {
        "corpus": "corpus",
        "train_tokens": "tokens to train on",
        "train_windows": "windows to train on",
        "val_tokens": "tokens held out",
        "val_windows": "windows held out",
        "val_unigram_entropy_nats": "entropy of token frequencies, held out",
    }
    data = run.part("data")
    first = [(words[k], _text(data[k]), False) for k in words if data.get(k) is not None]
    rest = [
        (k.replace("_", " "), _text(v), k.endswith("sha256"))
        for k, v in data.items()
        if k not in words and v is not None
    ]
    return first + rest


def _guards(run: Run) -> dict[str, list[dict[str, Any]]]:
    """What the guards said: sides of the data, and a row for each guard with what it said of every side, those that did
    not pass first."""
    said: dict[str, dict[str, dict[str, str]]] = {}
    for side, verdicts in run.part("data_guards").items():
        for g in verdicts if isinstance(verdicts, list) else ():
            if not isinstance(g, dict):
                continue
            texts = {k: _text(g.get(k, "")) for k in ("guard", "verdict", "figure", "bound", "note")}
            said.setdefault(texts["guard"], {})[side] = texts
    sides = []
    for side in run.part("data_guards"):
        words = [by_side[side]["verdict"] for by_side in said.values() if side in by_side]
        sides.append(dict(name=side, summary=f"{words.count(PASS)} of {len(words)} passed"))
    rows = [
        dict(
            guard=guard,
            cells=[(side["name"], by_side.get(side["name"])) for side in sides],
            rank=min((v["verdict"] == PASS, RANK.get(v["verdict"], 1)) for v in by_side.values()),
        )
        for guard, by_side in said.items()
    ]
    return dict(sides=sides, rows=sorted(rows, key=lambda r: r["rank"]))


def _settings(run: Run) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Settings that differ from their defaults, and the others: name, value, default, help."""
    fields = {f.name: f for f in dataclasses.fields(Settings)}
    changed: list[dict[str, str]] = []
    kept: list[dict[str, str]] = []
    for name, value in run.part("settings").items():
        f = fields.get(name)
        default = f.default if f else None
        row = dict(
            name=name,
            value=_text(value),
            default=_text(default) if default is not None else "",
            help=f.metadata["help"] if f else "",
        )
        (kept if value == default else changed).append(row)
    return changed, kept


def _environment(run: Run) -> list[tuple[str, str, bool]]:
    """Name, value and whether it is a hash, of what computed."""
    out = [
        (k.replace("_", " "), _text(v), False) for k, v in run.part("device").items() if k != "memory_bytes"
    ]
    size = run.part("device").get("memory_bytes")
    if isinstance(size, str) and size.isdigit():
        out.append(("memory of the model", f"{int(size) / 2**30:.3g} GiB", False))
    out += [(k, _text(v), False) for k, v in run.part("versions").items()]
    for key, label in (("git_commit", "git commit"), ("code_sha256", "code sha256")):
        if run.config.get(key):
            out.append((label, _text(run.config[key]), True))
    return out


def _template() -> jinja2.Template:
    env = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    env.filters["text"] = _text
    env.filters["prose"] = _prose
    env.filters["sha256"] = lambda text: base64.b64encode(
        hashlib.sha256(str(text).encode()).digest()
    ).decode()
    return env.from_string(
        resources.files(__package__).joinpath("report_template.html").read_text(encoding="utf-8")
    )
