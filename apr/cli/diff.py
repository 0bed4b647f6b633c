"""`apr diff A B`: compare two checkpoints or traces tensor by tensor, and print what differs, worst first.

A and B are .apr files, Hugging Face folders, .safetensors files (what `apr trace` writes, say) or GGUF files, in any pairing.
Exit code 0 when they are equal, 9 when they differ, in tensors or in what they say of themselves (config, tokenizer).
Without --tolerance tensors must have equal bits; --tolerance 0 wants equal values, whatever the dtype.

Example: apr diff runs/demo/ckpt/epoch-009.apr runs/demo/ckpt/epoch-010.apr --top 10"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..checkpoints.compare import Comparison, TensorDifference, compare
from ..checkpoints.registry import open_contents
from ..common.errors import UsageError
from ..common.finding import exit_code
from ..common.options import json_option, option, parse
from .show import Show
from .tables import cell, plain_table


@dataclass(frozen=True)
class Flags:
    """Options of `apr diff`."""

    a: str = option(
        "an .apr file, a Hugging Face folder, a .safetensors or a GGUF file", positional=True, path=True
    )
    b: str = option("the file or folder to compare A with", positional=True, path=True)
    tolerance: float | None = option(
        "largest relative root mean square of a tensor's difference that counts as equal (default: equal bits)",
        at_least=0,
        metavar="ERROR",
    )
    prefix: str = option("compare only tensors whose names start with PREFIX", "")
    top: int = option(
        "rows to show, with --json tensors to list, worst first; 0: all", 20, at_least=0, metavar="ROWS"
    )
    json: bool = json_option()


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code: 9 when a and b differ. Errors are raised."""
    f = parse(Flags, args, "apr diff", __doc__ or "")
    comparison = compare(open_contents(f.a), open_contents(f.b), f.tolerance, f.prefix)
    if f.prefix and not comparison.rows:
        raise UsageError(f"--prefix {f.prefix}: no tensor of either side starts with it")
    if f.json:
        document = {
            "a": f.a,
            "b": f.b,
            "equal": comparison.equal,
            "counts": comparison.counts,
            "facts": [{"key": k, "a": x, "b": y} for k, x, y in comparison.facts],
            "tensors": [_plain(asdict(r)) for r in comparison.rows[: f.top or None]],
        }
        print(json.dumps(document, indent=2))
    else:
        _print(Show(), f, comparison)
    return exit_code(comparison.verdict)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN and infinity by text; JSON has neither."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def _print(show: Show, f: Flags, comparison: Comparison) -> None:
    """Print the tensors that differ, the facts that differ, and the verdict."""
    rows = comparison.wrong
    shown = rows[: f.top] if f.top else rows
    if shown:
        table = plain_table(
            "tensor", "state_", "max abs|", "rms|", "relative|", "cosine|", "dtype and shape",
            title=f"a = {f.a}, b = {f.b}",
        )  # fmt: skip
        table.columns[0].min_width = min(56, max(len(r.name) for r in shown))
        for r in shown:
            table.add_row(*map(cell, _cells(r)))
        show.console.print(table)
    if len(rows) > len(shown):
        show.note(f"... and {len(rows) - len(shown)} more that differ; --top 0 shows all")
    for key, x, y in comparison.facts:
        show.note(f"{key}: {x!r} in a, {y!r} in b")
    counts = ", ".join(f"{n} {state}" for state, n in comparison.counts.items()) or "no tensors"
    number = len(comparison.facts)
    facts = f"; {number} fact{'s differ' if number > 1 else ' differs'}" if number else ""
    show.note(f"{'EQUAL' if comparison.equal else 'DIFFERENT'}: {counts}{facts}")


def _cells(r: TensorDifference) -> list[str]:
    """Format one tensor for the columns of the table."""

    def figure(x: float | None, digits: str = ".3g") -> str:
        return "" if x is None else format(x, digits)

    described = r.a if r.a == r.b else f"{r.a or 'none'} / {r.b or 'none'}"
    figures = (figure(r.max_abs), figure(r.rms), figure(r.relative), figure(r.cosine, ".6f"))
    return [r.name, r.state, *figures, described]
