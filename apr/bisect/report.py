"""What a comparison found: one row per array, grouped into stages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

STAGES = ("configuration", "data", "upload", "forward", "loss", "backward", "optimizer", "state")
PASSES = ("forward", "loss", "backward", "optimizer")  # the stages whose rows are ops
FREE, FORCED, EXACT = "free", "forced", "exact"


@dataclass(frozen=True)
class Row:
    """One array compared: that an op wrote, or, in the other stages, one fact or one parameter.

    mode: FREE (the side's own inputs, errors as they accumulate), FORCED (the op had the reference's inputs,
    so that err is its own), EXACT (equality is asked for). index: of the worst element, with got and want.
    tap: the buffer that was written ("3.qkv", "grad.3.wqkv"); layer: the block, None outside.
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
    cause: str = ""  # what is likely, in words; "" when nothing is known

    @property
    def ok(self) -> bool:
        """Whether the error is within its tolerance; NaN is not."""
        return bool(self.err <= self.tol)

    @property
    def ratio(self) -> float:
        """Error over tolerance: 0 for none at all, above 1 is a fault, infinite where a NaN is or where
        equality was asked for and not found."""
        if self.err == 0:
            return 0.0
        if not self.err < float("inf"):
            return float("inf")
        return self.err / self.tol if self.tol > 0 else float("inf")

    @property
    def place(self) -> str:
        """For a reader: "layer 3 linear_fwd -> qkv"."""
        where = "" if self.layer is None else f"layer {self.layer} "
        return f"{where}{self.op} -> {self.tap}"


@dataclass
class Report:
    """Everything that was compared, in order of computation."""

    model: str
    sides: tuple[
        str, str
    ]  # names of what is believed and of what is judged: "reference float64", "cpu float32"
    batch: str  # in words: what went in
    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # stage: why it did not run
    seconds: dict[str, float] = field(default_factory=dict)  # stage: time it took
    notes: list[str] = field(default_factory=list)

    def add(self, rows: Iterable[Row]) -> None:
        """More rows."""
        self.rows.extend(rows)

    def of(self, stage: str, mode: str | None = None) -> list[Row]:
        """The rows of a stage, of one mode or of all."""
        return [r for r in self.rows if r.stage == stage and mode in (None, r.mode)]

    def verdict(self, stage: str) -> str:
        """ "agree", "DIFFER" or "skipped"."""
        rows = self.of(stage)
        if not rows:
            return "skipped"
        return "agree" if all(r.ok for r in rows) else "DIFFER"

    @property
    def guilty(self) -> list[Row]:
        """Rows beyond their tolerance, the likely culprits first: what is exact or forced in order of
        computation, then what only accumulates."""
        bad = sorted(
            (r for r in self.rows if not r.ok), key=lambda r: (STAGES.index(r.stage), r.mode == EXACT)
        )
        return [r for r in bad if r.mode != FREE] + [r for r in bad if r.mode == FREE]

    @property
    def first(self) -> Row | None:
        """The first guilty row; None when all agree."""
        return next(iter(self.guilty), None)

    @property
    def agree(self) -> bool:
        """Whether everything that was compared is within its tolerance, and something was."""
        return bool(self.rows) and self.first is None

    def as_json(self) -> dict[str, Any]:
        """Plain data, infinities and NaN as text."""

        def plain(x: Any) -> Any:
            if isinstance(x, dict):
                return {k: plain(v) for k, v in x.items()}
            if isinstance(x, (list, tuple)):
                return [plain(v) for v in x]
            if isinstance(x, float) and not abs(x) < float("inf"):
                return str(x)
            return x if x is None or isinstance(x, (int, float, str, bool)) else str(x)

        def row(r: Row) -> dict[str, Any]:
            return {**asdict(r), "ok": r.ok, "ratio": r.ratio}

        return plain(
            {
                "model": self.model,
                "sides": self.sides,
                "batch": self.batch,
                "agree": self.agree,
                "first": None if self.first is None else row(self.first),
                "stages": {s: self.verdict(s) for s in STAGES},
                "skipped": self.skipped,
                "seconds": self.seconds,
                "notes": self.notes,
                "rows": [row(r) for r in self.rows],
            }
        )
