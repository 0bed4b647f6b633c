"""Settings of a run that the evidence room reads."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.options import option


@dataclass(frozen=True)
class EvidenceSettings:
    """Evidence: bounds of gates, spot checks."""

    bounds: str | None = option(
        "bounds of gates to change, such as val_below_train=0.2,speed=2; the verdict shows that they were changed",
        metavar="NAME=NUMBER",
        may_change=True,
    )
    spot_check: int = option(
        "before the first step, and then every so many steps, compare every op with the float64 reference on a piece of "
        "the batch and stop when one disagrees; 0: before the first step only; -1: never",
        0,
        at_least=-1,
        metavar="STEPS",
        may_change=True,
    )
