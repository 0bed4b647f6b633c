"""Turn a Run into the rows and sentences of its page."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np

from ..common.events import REMOVED
from ..common.files import read_json
from ..common.finding import FAIL, PASS, SKIPPED, SUSPECT
from ..common.units import plural
from .run_files import PAIR, Run
from .words import as_text, clock, decimal, magnitude, or_nan, perplexity

MAX_TASK_LINES = 5
MAX_ROWS = 60  # evaluations in the table; of more, evenly spaced ones with the best
MAX_SAMPLES = 24  # shown, evenly spaced
SAMPLE_CHARACTERS = 4000
RANK = {FAIL: 0, SUSPECT: 1, PASS: 2, SKIPPED: 3}
OTHERWISE = {
    "refuse": "the run does not start",
    "abort": "the run stops",
    SUSPECT: "the run goes on and is SUSPECT",
    FAIL: "the run goes on and is a FAIL",
}


def subject(run: Run) -> str:
    """Describe model, start, corpus and device in one line."""
    model, parameters = run.part("model"), run.config.get("num_parameters")
    device = run.part("device")
    start = f"from {Path(str(run.setting('init'))).name}" if run.setting("init") else "from random weights"
    corpus, lora = str(run.part("data").get("corpus") or ""), run.part("data").get("lora")
    parts = [
        str(model.get("model_type", "")),
        f"{magnitude(parameters)} parameters {start}" if isinstance(parameters, int) else "",
        f"adapters of rank {as_text(lora['rank'])}" if isinstance(lora, dict) and "rank" in lora else "",
        Path(corpus).name if corpus.startswith("/") else corpus,
        " on ".join(str(x) for x in (run.setting("dtype"), device.get("gpu") or device.get("cpu")) if x),
    ]
    return " \u00b7 ".join(p for p in parts if p)


def last_step(run: Run) -> int:
    return int(max([0.0, *run.step[-1:].tolist(), *(float(e["step"]) for e in run.evaluations[-1:])]))


def progress(run: Run) -> dict[str, Any] | None:
    """Measure the progress of a run that has not taken all its steps."""
    total, step = run.setting("num_steps"), last_step(run)
    if (
        not isinstance(total, int)
        or not 0 <= step < total
        or (run.verdict and run.verdict["status"] == "DONE")
    ):
        return None
    return {"text": f"{step:,} of {plural(total, 'step')}", "percent": round(100 * step / total, 1)}


def counts(verdict: dict[str, Any] | None) -> str:
    """Count gates by verdict: 2 failed, 1 suspect, 14 passed, 1 skipped."""
    words = {FAIL: "failed", SUSPECT: "suspect", PASS: "passed", SKIPPED: "skipped"}
    found = [g.get("verdict") for g in verdict["gates"]] if verdict else []
    return ", ".join(f"{found.count(w)} {text}" for w, text in words.items() if w in found)


def _of_pairs(last: dict[str, Any]) -> list[dict[str, str]]:
    """Make the tiles of an evaluation on pairs of preferences."""
    gains = [f"{side} {or_nan(last.get(f'val_{side}_gain')):+.3f}" for side in ("chosen", "rejected")]
    accuracy, margin = (or_nan(last.get(key)) for key in ("val_accuracy", "val_margin"))
    moved = f"answers, nats a token: {', '.join(gains)}"
    return [
        dict(
            label="Pairs ordered rightly",
            value=f"{100 * accuracy:.1f}",
            unit="%",
            note="accuracy on held-out pairs",
        ),
        dict(label="Margin", value=decimal(margin, 3), unit="", note=moved),
    ]


def tiles(run: Run) -> list[dict[str, str]]:
    """List label, value, unit and a note of each key figure."""
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
        of_pairs = run.loss_unit == PAIR
        tile("Validation loss", decimal(loss), run.loss_unit, spread + place)
        if of_pairs:
            tiles += _of_pairs(last)
        bits = or_nan(last.get("val_bits_per_byte"))
        if math.isfinite(bits):
            tile("Bits per byte", decimal(bits, 3), "", "comparable between tokenizers")
        if not of_pairs:
            at_first = f"{perplexity(losses[0][0])} at step {losses[0][1]['step']:,}"
            tile("Perplexity", perplexity(loss), "", at_first)
        entropy = math.nan if of_pairs else or_nan(run.part("data").get("val_unigram_entropy_nats"))
        if math.isfinite(entropy):
            gain = entropy - loss
            tile(
                "Below token frequencies" if gain >= 0 else "Above token frequencies",
                decimal(abs(gain), 3),
                "nats/token",
                f"their entropy is {entropy:.4f}",
            )
    if run.step.size:
        seconds, tokens = float(np.nansum(run.series["wall_ms"])) / 1e3, run.tokens_at(run.step[-1])
        tile("Tokens trained on", magnitude(tokens), "", f"{plural(last_step(run), 'step')}")
        if seconds > 0:
            speed = run.series["tokens_per_sec"]
            middle = float(np.nanmedian(speed)) if np.isfinite(speed).any() else math.nan
            note = f"median step {middle:,.0f}" if math.isfinite(middle) else ""
            first = run.tokens_at(run.step[0] - 1)  # 0, unless the log begins in the middle of a run
            tile("Speed", f"{(tokens - first) / seconds:,.0f}", "tokens/s", note)
            tile("Time in training steps", clock(seconds), "", "without evaluations")
    parameters = run.config.get("num_parameters")
    if isinstance(parameters, int):
        m = run.part("model")
        layers = m.get("num_hidden_layers")
        shape = f"{plural(layers, 'layer')} of {m.get('hidden_size')}" if isinstance(layers, int) else ""
        tile("Parameters", magnitude(parameters), "", shape)
    return tiles


def gate_rows(run: Run) -> list[dict[str, Any]]:
    """List the gates of the verdict, those that did not pass first, with every text, if empty."""
    texts = ("when", "protects", "bound", "bound_from", "verdict", "measured", "why", "look_at", "changed")
    found = []
    for g in run.verdict["gates"] if run.verdict else []:
        step = g.get("step")
        words = {k: as_text(g[k]) if g.get(k) is not None else "" for k in texts}
        found.append(
            words
            | {
                "id": g["id"],
                "step": step if isinstance(step, int) else None,
                "evaluations": g.get("evaluations"),
                "seconds": or_nan(g.get("seconds")),
                "otherwise": OTHERWISE.get(str(g.get("then")), ""),
            }
        )
    return sorted(found, key=lambda g: RANK.get(g["verdict"], 1))


def _tasks(figures: dict[str, Any]) -> str:
    """Describe the figures of tasks; those that are no numbers are left out."""
    found = {
        k: f for k, f in figures.items() if isinstance(f, dict) and math.isfinite(or_nan(f.get("value")))
    }
    return ", ".join(f"{name} {f.get('metric', '')} {f['value']:.3f}" for name, f in found.items())


def check_sentences(run: Run) -> list[str]:
    """Describe spot checks and passes over the data, in a sentence each."""
    out = []
    asked = [c for c in run.spot_checks if c["spot_check"] != "skipped"]
    if asked:
        agreed = sum(c["spot_check"] == "agree" for c in asked)
        worst = max(
            (w for c in asked if math.isfinite(w := or_nan(c.get("worst_of_tolerance")))), default=math.nan
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
        out.append(f"{plural(len(run.spot_checks) - len(asked), 'spot check')} skipped.")
    out += [
        f"Tasks at step {line['step']:,}: {_tasks(line['tasks'])}." for line in run.tasks[-MAX_TASK_LINES:]
    ]
    for source, last in {p.get("source"): p for p in run.passes}.items():
        what = "the data" if source is None else source
        out.append(f"Passes over {what}: {last['passes']}, the last complete at step {last['step']:,}.")
    return out


def _spaced(n: int, most: int) -> list[int]:
    """Choose at most `most` of n indices, evenly spaced, first and last among them."""
    return sorted({round(i * (n - 1) / (most - 1)) for i in range(most)}) if n > most else list(range(n))


def evaluation_rows(run: Run) -> list[dict[str, Any]]:
    """Make a row for each evaluation, or for MAX_ROWS of them."""
    e, x, train = run.evaluations, run.step, run.series["train_loss"]
    losses = [float(m["val_loss"]) for m in e]
    best = min(range(len(e)), key=lambda i: (not math.isfinite(losses[i]), losses[i]), default=0)
    rows = []
    for i in sorted({*_spaced(len(e), MAX_ROWS), best} if e else ()):
        m, step = e[i], e[i]["step"]
        since = e[i - 1]["step"] if i else -1
        part = train[np.searchsorted(x, since, "right") : np.searchsorted(x, step, "right")]
        bits, facts = (
            or_nan(m.get("val_bits_per_byte")),
            _metadata(run.ckpt / f"epoch-{i:03d}.metadata.json", step),
        )
        rows.append(
            dict(
                epoch=i,
                step=f"{step:,}",
                tokens=f"{run.tokens_at(step):,.0f}" if x.size else "",
                train=decimal(float(part.mean())) if part.size else "",
                val=decimal(losses[i]),
                error=f"{m['val_loss_stderr']:.4f}"
                if math.isfinite(or_nan(m.get("val_loss_stderr")))
                else "",
                change=f"{losses[i] - losses[i - 1]:+.4f}".replace("-", "\u2212") if i else "",
                worse=bool(i and not losses[i] < losses[i - 1]),
                bits=f"{bits:.3f}" if math.isfinite(bits) else "",
                perplexity=perplexity(losses[i]),
                accuracy=f"{100 * m['val_accuracy']:.1f} %"
                if math.isfinite(or_nan(m.get("val_accuracy")))
                else "",
                margin=f"{m['val_margin']:+.4f}" if math.isfinite(or_nan(m.get("val_margin"))) else "",
                checkpoint="" if not facts else "removed" if REMOVED in facts else f"epoch-{i:03d}.apr",
                weights=str(facts.get("weights_sha", ""))[:12],
                best=i == best and len(e) > 1,
            )
        )
    return rows


def _metadata(path: Path, step: int) -> dict[str, Any]:
    """Read the metadata beside a checkpoint; {} where there are none of that step."""
    facts = read_json(path) if path.is_file() else {}
    return facts if isinstance(facts, dict) and facts.get("step", step) == step else {}


def sample_groups(run: Run) -> list[dict[str, Any]]:
    """Group samples by prompt, each group in the order of training."""
    losses = {e["step"]: e["val_loss"] for e in run.evaluations}
    groups: dict[str, list[dict[str, Any]]] = {}
    for s in run.samples:
        groups.setdefault(str(s.get("prompt") or ""), []).append(s)
    out = []
    for prompt, samples in itertools.islice(groups.items(), MAX_SAMPLES):
        shown = [samples[i] for i in _spaced(len(samples), max(2, MAX_SAMPLES // len(groups)))]
        items = []
        for s in shown:
            text, loss = s["text"].removeprefix(prompt), losses.get(s["step"])
            cut = len(text) > SAMPLE_CHARACTERS
            items.append(
                dict(
                    step=f"{s['step']:,}",
                    tokens=magnitude(run.tokens_at(s["step"])) if run.step.size else "",
                    loss=decimal(float(loss)) if loss is not None else "",
                    text=text[:SAMPLE_CHARACTERS] + (" \u2026" if cut else ""),
                )
            )
        out.append(dict(prompt=prompt, items=items, left_out=len(samples) - len(shown)))
    return out


def data_rows(run: Run) -> list[tuple[str, str, bool]]:
    """List (name, value, is_hash) of the data."""
    words = {
        "corpus": "corpus",
        "train_tokens": "tokens to train on",
        "train_windows": "windows to train on",
        "val_tokens": "tokens held out",
        "val_windows": "windows held out",
        "val_unigram_entropy_nats": "entropy of token frequencies, held out",
    }
    data = dict(run.part("data"))
    for name in run.sources:
        facts = data["mixture"][name]
        if isinstance(facts, dict):
            data |= {f"{name}, {k}": v for k, v in facts.items()}
    data.pop("mixture", None)
    first = [(words[k], as_text(data[k]), False) for k in words if data.get(k) is not None]
    rest = [
        (k.replace("_", " "), as_text(v), k.endswith("sha256"))
        for k, v in data.items()
        if k not in words and v is not None
    ]
    return first + rest


def guard_rows(run: Run) -> dict[str, list[dict[str, Any]]]:
    """List the sides of the data, and for each guard its verdict on every side; guards that did not pass come first."""
    said: dict[str, dict[str, dict[str, str]]] = {}
    for side, verdicts in run.part("data_guards").items():
        for g in verdicts if isinstance(verdicts, list) else ():
            if not isinstance(g, dict):
                continue
            texts = {k: as_text(g.get(k, "")) for k in ("guard", "verdict", "figure", "bound", "note")}
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


def settings_rows(run: Run, options: Any) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Divide settings into changed ones and defaults, each with name, value, default and help.

    options: the dataclass that declares the flags."""
    fields = {f.name: f for f in dataclasses.fields(options)}
    changed: list[dict[str, str]] = []
    kept: list[dict[str, str]] = []
    for name, value in run.part("settings").items():
        f = fields.get(name)
        default = f.default if f else None
        row = dict(
            name=name,
            value=as_text(value),
            default=as_text(default) if default is not None else "",
            help=f.metadata["help"] if f else "",
        )
        (kept if value == default else changed).append(row)
    return changed, kept


def environment_rows(run: Run) -> list[tuple[str, str, bool]]:
    """List (name, value, is_hash) of device, versions and code."""
    out = [
        (k.replace("_", " "), as_text(v), False) for k, v in run.part("device").items() if k != "memory_bytes"
    ]
    size = run.part("device").get("memory_bytes")
    if isinstance(size, str) and size.isdigit():
        out.append(("memory of the model", f"{int(size) / 2**30:.3g} GiB", False))
    out += [(k, as_text(v), False) for k, v in run.part("versions").items()]
    for key, label in (("git_commit", "git commit"), ("code_sha256", "code sha256")):
        if run.config.get(key):
            out.append((label, as_text(run.config[key]), True))
    return out
