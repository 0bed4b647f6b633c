"""Compare what config.json, verdict.json, the page and the samples of a run say with the files that they follow from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ..checkpoints.registry import open_any
from ..common.errors import UsageError
from ..common.files import read_text
from ..common.finding import FAIL, PASS, SUSPECT, Finding
from ..common.provenance import code_sha256
from ..common.units import plural
from ..evidence.gates import Gates, parse_bounds
from ..evidence.measure import rate_text
from ..model.cost import flops_per_token
from ..model.hf_config import from_hf
from ..model.lora import lora_of_json
from ..model.params import Layout
from ..report.page import render
from ..training.metrics import read_lines
from ..training.settings import Settings, check_together
from .record import Record


def config(r: Record) -> Finding:
    """Compare the model and the number of parameters in config.json with every checkpoint."""
    bound, cfg = "the checkpoints, and what the settings ask for", from_hf(r.config["model"], "config.json")

    def failed(measured: str) -> Finding:
        return Finding.of("config", False, measured, bound)

    if wrong := _wrong_settings(r):
        return failed(wrong)
    counted, said = Layout(cfg).num_parameters, r.config["num_parameters"]
    if said != counted:
        return failed(f"num_parameters = {said}, its model has {counted:,}")
    found = r.run.checkpoints()
    for path in found:
        if open_any(str(path)).cfg != cfg:
            return failed(f"{path.name} holds another model than config.json")
    guards = r.config.get("data_guards")
    if (
        not isinstance(guards, dict)
        or set(guards) != set(r.config["data_folders"])
        or not all(guards.values())
    ):
        return failed("data_guards: not those of each side of the data")
    return Finding.of(
        "config",
        True,
        f"{plural(counted, 'parameter')}, the model of {plural(len(found), 'checkpoint')}",
        bound,
    )


def _wrong_settings(r: Record) -> str:
    """Say why no run can have started with the recorded settings, or had the recorded adapters by them; "" where one can."""
    try:
        check_together(r.settings)
    except UsageError as e:
        return f"settings with which no run starts: {e}"
    said, rank = r.config["data"].get("lora"), r.settings.lora_rank
    if (said is None) != (rank is None and r.settings.lora_init is None):
        return f"lora_rank = {rank} in the settings, {'no ' if said is None else ''}adapters in the record of the data"
    if said is not None and rank is not None and lora_of_json(said).rank != rank:
        return f"lora_rank = {rank} in the settings, {lora_of_json(said).rank} in the record of the data"
    return ""


def gates(r: Record) -> Finding:
    """Compare each gate of verdict.json with the settings: which were asked, by which bounds, with which figures."""
    bound, rows = "what the settings let each gate be", r.verdict["gates"]
    wrong = next(_wrong_gates(r, rows), "")
    return Finding.of("gates", not wrong, wrong or plural(len(rows), "gate"), bound)


def _wrong_gates(r: Record, rows: list[dict[str, Any]]) -> Iterator[str]:
    given = parse_bounds(r.settings.bounds)
    if r.verdict["bounds_changed"] != given:
        yield f"bounds_changed = {r.verdict['bounds_changed']}, the settings say {given}"
    table, unasked = Gates(given), _unasked(r)
    for row in rows:
        name, is_judged = row["id"], row["verdict"] in (PASS, SUSPECT, FAIL)
        if bool(row["changed"]) != bool(table.changed(name)):
            yield f"{name}: changed = {row['changed']!r}, the settings say {table.changed(name)!r}"
        if is_judged and not (type(row["evaluations"]) is int and row["evaluations"] > 0):
            yield f"{name} is {row['verdict']}, and evaluations = {row['evaluations']}"
        if is_judged and name in unasked:
            yield f"{name} is {row['verdict']}, though {unasked[name]}"
        if row["verdict"] == PASS and (wrong := _wrong_figure(r, row)):
            yield f"{name}: {row['measured']!r}, {wrong}"


def _unasked(r: Record) -> dict[str, str]:
    """List the gates that this run could not ask, with the reason."""
    s, out = r.settings, {}
    is_resumed = "went_on_with" in r.config["device"]
    if s.target_val_loss is None:
        out["end.target"] = "there was no target"
    if not s.mix:
        out["run.mixture"] = "the data had one source"
    if "lora" not in r.config["data"]:
        out["end.base"] = "there were no adapters"
    if s.init:
        out |= dict.fromkeys(("start.loss", "end.learning"), "the weights come from a checkpoint")
    else:
        out["start.pretrained"] = "the weights began as random numbers"
        if not is_resumed:
            out["start.reproduces"] = out["start.pretrained"]
    if not is_resumed:
        out["before.resumed"] = "the run was never resumed"
    if not any("spot_check" in line for line in r.log):
        out["start.ops"] = "the log has no spot check"
    return out


def _wrong_figure(r: Record, row: dict[str, Any]) -> str:
    """Compare the figure of a gate that may be SKIPPED, or that nothing else repeats, with the log; "" where it fits."""
    name, measured, last = row["id"], row["measured"], r.evaluations[-1]["val_loss"] if r.evaluations else 0.0
    if name == "end.reload" and f"recorded {last:.6f}" not in measured:
        return f"the last validation loss is {last:.6f}"
    if name == "before.memory" and "GiB planned" not in measured:
        return "no memory is planned in it"
    if name == "before.disjoint" and "documents" not in measured and "windows" not in measured:
        return "no documents or windows are compared in it"
    # The first step of a process compiles, and is no measure; where the later ones began is not in the log.
    steps = [line["wall_ms"] for line in r.steps if line["step"] > 1]
    if name == "end.speed" and steps and "went_on_with" not in r.config["device"]:
        s, cfg = r.settings, from_hf(r.config["model"], "config.json")
        said = r.config["data"].get("lora")
        # Older versions computed, and counted, all gradients of a run of adapters.
        kinds = [lora_of_json(said), None] if said else [None]
        rates = [
            rate_text(
                flops_per_token(cfg, s.seq_length, lora=kind)
                * s.batch_size
                * s.seq_length
                / (min(steps) / 1e3)
            )
            for kind in kinds
        ]
        if not measured.startswith(tuple(rates)):
            return f"the fastest step of the log gives {rates[0]}"
    return ""


def samples(r: Record) -> Finding:
    """Compare the samples with the settings: the prompt that was asked for, at evaluations of the log."""
    bound, prompt, path = (
        "the prompt of --sample, after evaluations of the log",
        r.settings.sample,
        r.run.log.samples,
    )
    lines = list(read_lines(path)) if path.is_file() else []
    due = {line["step"] for line in r.evaluations}
    for line in lines:
        if prompt is None:
            return Finding.of("samples", False, f"{path.name} is there, without --sample", bound)
        if (
            line.get("prompt") != prompt
            or line["step"] not in due
            or not str(line.get("text")).startswith(prompt)
        ):
            return Finding.of("samples", False, f"step {line['step']}: {line.get('prompt')!r}", bound)
    if prompt is not None and not r.is_cut and {line["step"] for line in lines} != due:
        return Finding.of(
            "samples", False, f"{plural(len(lines), 'sample')}, {plural(len(due), 'evaluation')}", bound
        )
    return Finding.of("samples", True, plural(len(lines), "sample"), bound)


def _wrong_on_page(r: Record, there: str) -> str:
    """Say which figure of the last epoch is not on the page as its metadata and the log have it: the page is rendered by the
    code that it is compared with."""
    facts, line = r.run.epochs(), r.evaluations[-1] if r.evaluations else None
    if not facts or line is None or facts[-1]["step"] != line["step"]:
        return ""
    row = re.search(rf'<th scope="row">{facts[-1]["step"]:,}</th>(.*?)</tr>', there, re.DOTALL)
    figures = {
        key: f"{facts[-1][key]:,.4f}</td>" for key in ("train_loss", "val_loss") if facts[-1][key] < 1e6
    }
    if missing := [
        key for key, x in figures.items() if row is None or f">{x}" not in row[1].replace("> ", ">")
    ]:
        return f"{missing[0]} of epoch {facts[-1]['epoch']} is another in report.html"
    entropy = r.config["data"].get("val_unigram_entropy_nats")
    if "val_accuracy" in line or not isinstance(entropy, float):
        return ""
    side = "Above" if line["val_loss"] > entropy else "Below"
    return (
        ""
        if f"{side} token frequencies" in there
        else f"the loss lies {side.lower()} the entropy, report.html says otherwise"
    )


def page(r: Record) -> Finding:
    """Render the page of the run anew, and compare; that of another version must have the same figures."""
    path, bound = r.run.path / "report.html", "the page that the files of the run give"
    if not path.is_file() or r.verdict["status"] == "RUNNING":
        return Finding.skipped("page", "there is no report.html of a run that has ended", bound)
    there = read_text(path)
    if there == render(r.run.path, Settings):
        wrong = _wrong_on_page(r, there) if r.config.get("code_sha256") == code_sha256() else ""
        return Finding.of("page", not wrong, wrong or plural(len(there), "character"), bound)
    if r.config.get("code_sha256") == code_sha256():
        return Finding.of("page", False, "report.html is another page", bound)
    figures = [r.verdict["status"], r.verdict["verdict"]]
    figures += [f"{line['val_loss']:.4f}" for line in r.evaluations[-1:]]
    missing = [x for x in figures if x not in there]
    why = "written by another version of apr, whose pages look otherwise: only its figures were looked for"
    measured = f"{', '.join(missing)} is not in report.html" if missing else ", ".join(figures)
    return Finding.of("page", not missing, measured, bound, why)
