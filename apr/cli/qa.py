"""`apr qa MODEL`: decide whether a checkpoint is fit to ship.

All of `apr validate`, then what the model does: the tokenizer gives text back; logits are finite and depend on the position;
the loss on real text is far below the entropy of token frequencies; what it writes is neither repetitive nor a loop; an
export to Hugging Face, read back, has the same logits bit for bit; it writes fast enough. A check that cannot be asked is
SKIPPED with the reason, never passed. Exit code 0 for PASS, 9 for FAIL.

Example: apr qa runs/demo/ckpt/epoch-010.apr --text held-out.txt --min-tokens-per-sec 20"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..backends.select import select
from ..common.files import read_text
from ..common.finding import as_json, exit_code
from ..common.options import device_option, dtype_option, json_option, option, parse, threads_option
from ..evaluation.qa import qa
from .show import Show
from .tables import cell
from .validate import print_checklist


@dataclass(frozen=True)
class Flags:
    """Options of `apr qa`."""

    model: str = option("an .apr or GGUF file or a Hugging Face folder", positional=True, path=True)
    text: str | None = option(
        "file of text that the model must know (default: short texts of three kinds, one must do)",
        metavar="FILE",
        path=True,
    )
    min_tokens_per_sec: float = option(
        "lowest speed of generation, tokens/s; 0: not judged", 1.0, at_least=0, below=1e9, metavar="SPEED"
    )
    device: str = device_option()
    dtype: str | None = dtype_option()
    threads: int | None = threads_option()
    json: bool = json_option()


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code: 9 unless the verdict is PASS. Errors are raised."""
    f = parse(Flags, args, "apr qa", __doc__ or "")
    text = None if f.text is None else read_text(Path(f.text))
    backend = select(f.device, f.dtype, f.threads)
    show = Show(quiet=f.json)
    with show.console.status("") as status:

        def announce(what: str) -> None:
            status.update(cell(what))

        checks = qa(f.model, backend, f.dtype or backend.dtypes[0], text, f.min_tokens_per_sec, announce)
    if f.json:
        rows = as_json(checks.findings, check="name", verdict="verdict", figure="figure", bound="bound")
        print(json.dumps({"model": f.model, "verdict": checks.verdict, "checks": rows}, indent=2))
    else:
        print_checklist(show, f.model, checks)
    return exit_code(checks.verdict)
