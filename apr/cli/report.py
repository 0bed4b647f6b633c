"""`apr report RUN_DIR`: a run as one self-contained HTML page, also while it is training.

Example: apr report runs/demo -o demo.html"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..common.atomic import write_text
from ..common.files import real
from ..common.options import json_option, option, parse
from ..common.printable import printable
from ..evidence.seal import EVIDENCE, resealed
from ..report.page import render
from ..training.settings import Settings


@dataclass(frozen=True)
class Flags:
    """Options of `apr report`."""

    run_dir: str = option("run directory that `apr pretrain` writes or wrote", positional=True, path=True)
    output: str | None = option(
        "HTML file to write (default: RUN_DIR/report.html)", short="o", metavar="FILE", path=True
    )
    json: bool = json_option()


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code. Errors are raised."""
    f = parse(Flags, args, "apr report", __doc__ or "")
    folder = Path(f.run_dir)
    path = Path(f.output) if f.output else folder / "report.html"
    page = render(folder, Settings)
    if real(path).is_relative_to(real(folder)) and (folder / EVIDENCE).is_file():
        resealed(folder, path, page)  # a page of a newer apr is no tampering
    else:
        write_text(path, page)
    print(json.dumps({"report": str(path)}) if f.json else printable(f"report  {path}"))
    return 0
