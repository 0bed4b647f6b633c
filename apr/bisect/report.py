"""Report of a bisection: one comparison per array, grouped into stages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from math import inf
from typing import Any

from ..common.finding import FAIL, PASS, SKIPPED, Finding

STAGES = ("configuration", "data", "upload", "forward", "loss", "backward", "optimizer", "state", "formulas")
PASSES = ("forward", "loss", "backward", "optimizer")  # stages whose comparisons are of ops
FREE, FORCED, EXACT = "free", "forced", "exact"
# Times its tolerance that an error may pile up to where every op alone agrees: it is rounding, and no fault.
PILED_UP = 16.0
WORDS = {PASS: "agree", FAIL: "DIFFER", SKIPPED: "skipped"}  # verdicts of stages, on screen and in JSON


@dataclass(frozen=True)
class ArrayComparison:
    """One array compared with the reference: one that an op wrote or, in the other stages, one parameter or one fact.

    mode       FREE (the side's own inputs, errors accumulate), FORCED (the op had the reference's inputs, err is its
               own) or EXACT (equality is required)
    tap        buffer that was written: "3.qkv", "grad.3.wqkv"
    layer      block, None outside the blocks
    index      of the worst element; got, want: its values
    cause      likely cause in words, "" for none
    """

    stage: str
    op: str
    tap: str
    mode: str
    err: float
    tol: float
    layer: int | None = None
    shape: tuple[int, ...] = ()
    index: tuple[int, ...] = ()
    got: Any = None
    want: Any = None
    cause: str = ""

    @property
    def ok(self) -> bool:
        """True for an error within its tolerance; NaN is not."""
        return bool(self.err <= self.tol)

    @property
    def ratio(self) -> float:
        """Error over tolerance: 0 for equal arrays, above 1 for a fault, infinite for NaN and for unequal arrays of mode
        EXACT."""
        if self.err == 0:
            return 0.0
        if not self.err < inf:
            return inf
        return self.err / self.tol if self.tol > 0 else inf

    @property
    def place(self) -> str:
        """Layer, op and tap in words: "layer 3 linear_fwd -> qkv"."""
        layer = "" if self.layer is None else f"layer {self.layer} "
        return f"{layer}{self.op} -> {self.tap}"

    @property
    def error(self) -> str:
        """Error in words: "512 times the tolerance"."""
        if self.ratio < inf:
            return f"{ratio_text(self.ratio)} times the tolerance"
        return "not equal" if self.tol == 0 else "not finite"


def ratio_text(ratio: float) -> str:
    """Error over tolerance with three digits, or with two from 10,000 on."""
    return f"{ratio:.3g}" if ratio < 1e4 else f"{ratio:.1e}"


@dataclass
class Report:
    """All comparisons of one side, in order of computation.

    sides    names of what is believed and of what is judged: "reference float64", "cpu float32"
    batch    input in words
    skipped  {stage: reason}
    seconds  {stage: time}
    """

    model: str
    sides: tuple[str, str]
    batch: str
    rows: list[ArrayComparison] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, rows: Iterable[ArrayComparison]) -> None:
        """Append comparisons."""
        self.rows.extend(rows)

    def of(self, stage: str, mode: str | None = None) -> list[ArrayComparison]:
        """Comparisons of a stage, of one mode or of all."""
        return [r for r in self.rows if r.stage == stage and mode in (None, r.mode)]

    def finding(self, stage: str) -> Finding:
        """Sum up a stage: FAIL when an array is beyond its tolerance, SKIPPED with the reason when none was compared.

        measured: the largest error over tolerance, errors that are an op's own before those that only accumulate;
        where: its place."""
        rows = self.of(stage)
        if not rows:
            return Finding.skipped(stage, self.skipped.get(stage, ""))
        worst = max(rows, key=lambda r: (not r.ok and r.mode != FREE, r.ratio))
        place = worst.place + (" (free)" if worst.mode == FREE else "")
        bound = "at most 1 of the tolerance"
        if not worst.ok and self._is_rounding(worst):
            bound = f"every op alone at most 1 of the tolerance, errors that pile up at most {PILED_UP:g}"
        return Finding.of(
            stage,
            all(r.ok or self._is_rounding(r) for r in rows),
            ratio_text(worst.ratio),
            bound,
            worst.cause,
            where=place if worst.ratio else "",
        )

    @property
    def guilty(self) -> list[ArrayComparison]:
        """Comparisons beyond their tolerance, likely culprits first: FORCED and EXACT ones in order of computation, then
        those that only accumulate."""
        bad = sorted(
            (r for r in self.rows if not r.ok and not self._is_rounding(r)),
            key=lambda r: (STAGES.index(r.stage), r.mode == EXACT),
        )
        return [r for r in bad if r.mode != FREE] + [r for r in bad if r.mode == FREE]

    def _is_rounding(self, r: ArrayComparison) -> bool:
        """Tell rounding that piled up: no op has a fault of its own, and every fact holds."""
        if r.mode != FREE or not r.ratio <= PILED_UP:
            return False
        # Beside a trace there are accumulated errors alone, and nothing that clears them.
        return any(x.mode == FORCED for x in self.rows) and all(x.ok for x in self.rows if x.mode != FREE)

    @property
    def piled_up(self) -> list[ArrayComparison]:
        """Comparisons of accumulated errors that are beyond their tolerance and no fault."""
        return [r for r in self.rows if not r.ok and self._is_rounding(r)]

    @property
    def first(self) -> ArrayComparison | None:
        """First guilty comparison; None when all agree."""
        return next(iter(self.guilty), None)

    @property
    def agree(self) -> bool:
        """True when arrays were compared and all are within their tolerance."""
        return bool(self.rows) and self.first is None

    def as_json(self) -> dict[str, Any]:
        """Report as plain data, infinities and NaN as text."""

        def plain(x: Any) -> Any:
            if isinstance(x, dict):
                return {k: plain(v) for k, v in x.items()}
            if isinstance(x, (list, tuple)):
                return [plain(v) for v in x]
            if isinstance(x, float) and not abs(x) < inf:
                return str(x)
            return x if x is None or isinstance(x, (int, float, str, bool)) else str(x)

        def row(r: ArrayComparison) -> dict[str, Any]:
            return {**asdict(r), "ok": r.ok, "ratio": r.ratio}

        return plain(
            {
                "model": self.model,
                "sides": self.sides,
                "batch": self.batch,
                "agree": self.agree,
                "first": None if self.first is None else row(self.first),
                "stages": {s: WORDS[self.finding(s).verdict] for s in STAGES},
                "skipped": self.skipped,
                "seconds": self.seconds,
                "notes": self.notes,
                "rows": [row(r) for r in self.rows],
            }
        )
