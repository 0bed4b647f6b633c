"""`apr validate MODEL`: every check of a checkpoint, each with PASS, FAIL or SKIPPED and its figure.

MODEL is an .apr or GGUF file, a Hugging Face folder, or a .safetensors file with config.json beside it. All checks are made,
whatever the ones before found. Exit code 0 when nothing failed; 4 when the file is damaged or not what its format
says (checksums, length, index, metadata); 9 when the file is whole but what it holds is wrong.

Example: apr validate runs/demo/ckpt/epoch-010.apr"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from ..checkpoints.registry import validate
from ..common.errors import MalformedFile
from ..common.finding import FAIL, FILE, Checklist, as_json, exit_code
from ..common.options import json_option, option, parse
from .show import Show
from .tables import print_findings


@dataclass(frozen=True)
class Flags:
    """Options of `apr validate`."""

    model: str = option(
        "an .apr, .safetensors or GGUF file or a Hugging Face folder", positional=True, path=True
    )
    json: bool = json_option()


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code: 4 or 9 when a check fails. Errors are raised."""
    f = parse(Flags, args, "apr validate", __doc__ or "")
    checks = validate(f.model)
    if f.json:
        rows = as_json(checks.findings, name="name", verdict="verdict", figure="figure", bound="bound")
        for row, finding in zip(rows, checks.findings, strict=True):
            row["of_file"] = finding.where == FILE
        print(json.dumps({"model": f.model, "verdict": checks.verdict, "checks": rows}, indent=2))
    else:
        print_checklist(Show(), f.model, checks)
    is_damaged = any(x.verdict == FAIL and x.where == FILE for x in checks.findings)
    return MalformedFile.exit_code if is_damaged else exit_code(checks.verdict)


def print_checklist(show: Show, model: str, checks: Checklist) -> None:
    """Print the findings of a model, the verdict and the counts."""
    show.note(model)
    print_findings(show.console, checks.findings)
    show.note(f"{checks.verdict}: {checks.counts()}")
