"""`apr qa MODEL`: is this checkpoint fit to ship?

All of `apr validate`, then what the model does: the tokenizer gives text back; logits are finite and depend on the position;
the loss on real text is far below the entropy of token frequencies; what it writes is neither repetitive nor a loop; an
export to Hugging Face, read back, has the same logits bit for bit; it writes fast enough. A check that cannot be asked is
SKIPPED with the reason, never passed. Exit code 0 for PASS, 9 for FAIL.

Example: apr qa runs/demo/ckpt/epoch-010.apr --text held-out.txt --min-tokens-per-sec 20"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..backends.select import select
from ..common.files import read_text
from ..common.finding import PASS
from ..common.options import device_option, dtype_option, json_option, option, parse, threads_option
from ..evaluation.qa import document, qa
from .show import Show
from .validate import report

UNFIT = 9  # exit code


@dataclass(frozen=True)
class Flags:
    """Options of `apr qa`."""

    model: str = option("an .apr file or a Hugging Face folder", positional=True, path=True)
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
    """Returns the exit code: 9 unless the verdict is PASS; errors are raised."""
    f = parse(Flags, args, "apr qa", __doc__ or "")
    text = None if f.text is None else read_text(Path(f.text))
    backend = select(f.device, f.dtype, f.threads)
    show = Show(quiet=f.json)
    with show.console.status("") as status:
        checks = qa(f.model, backend, f.dtype or backend.dtypes[0], text, f.min_tokens_per_sec, status.update)
    if f.json:
        print(document(f.model, checks))
    else:
        report(f.model, checks, False)
    return 0 if checks.verdict == PASS else UNFIT
