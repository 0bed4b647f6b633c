"""`apr validate MODEL`: every check of a checkpoint, each with PASS, FAIL or SKIPPED and its figure.

MODEL is an .apr file, a Hugging Face folder, or a .safetensors file with config.json beside it. Nothing that is found wrong
keeps the next check from being asked. Exit code 0 when nothing failed; 4 when the file is damaged or not what its format
says (checksums, length, index, metadata); 9 when the file is whole but what it holds is wrong.

Example: apr validate runs/demo/ckpt/epoch-010.apr"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.table import Table
from rich.text import Text

from ..checkpoints.validate import validate
from ..common.errors import MalformedFile
from ..common.finding import FAIL, Checklist
from ..common.options import json_option, option, parse
from .show import COLOURS, Show

WRONG = 9  # exit code


@dataclass(frozen=True)
class Flags:
    """Options of `apr validate`."""

    model: str = option(
        "an .apr file, a Hugging Face folder or a .safetensors file", positional=True, path=True
    )
    json: bool = json_option()


def main(args: Sequence[str]) -> int:
    """Returns the exit code: 4 or 9 when a check fails; errors are raised."""
    f = parse(Flags, args, "apr validate", __doc__ or "")
    checks = validate(f.model)
    report(f.model, checks, f.json)
    failed = [r for r in checks.rows if r.verdict == FAIL]
    return MalformedFile.exit_code if any(r.of_file for r in failed) else WRONG if failed else 0


def report(model: str, checks: Checklist, as_json: bool) -> None:
    """Print a checklist."""
    if as_json:
        rows = [asdict(r) for r in checks.rows]
        print(json.dumps({"model": model, "verdict": checks.verdict, "checks": rows}, indent=2))
        return
    show = Show()
    show.note(model)
    table = Table(show_header=False, box=None, padding=(0, 1))
    for r in checks.rows:
        more = f"\nmust be: {r.bound}" if r.verdict == FAIL and r.bound else ""
        table.add_row(f"  {r.verdict}", r.name, Text(r.figure + more), style=COLOURS[r.verdict])
    show.console.print(table)
    show.note(f"{checks.verdict}: {checks.counts()}")
