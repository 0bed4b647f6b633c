"""Verify a run from outside, on any machine, without writing into its folder: `apr verify`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..common.errors import AprError
from ..common.finding import Finding
from ..evidence.seal import SIGNATURE
from . import claims, log, stored
from .record import Record
from .replay import evaluations, replay, validation_loss
from .start import start

CHECKS: dict[str, Callable[[Record], Finding]] = {
    "files": stored.files,
    "signature": stored.signature,
    "metrics": log.metrics,
    "learning rate": log.learning_rate,
    "verdict": log.verdict,
    "config": claims.config,
    "gates": claims.gates,
    "samples": claims.samples,
    "page": claims.page,
    "epochs": log.epochs,
    "checkpoints": stored.checkpoints,
    "states": stored.states,
    "adapters": stored.adapters,
    "data": stored.data,
    "start": start,
    "validation loss": validation_loss,
    "evaluations": evaluations,
    "replay": replay,
    "unchanged": stored.unchanged,
}

# Checks of what most runs do not have.
UNASKED: dict[str, Callable[[Record], bool]] = {
    "adapters": lambda r: "lora" not in r.config["data"],  # an object: see Record
    "signature": lambda r: r.options.signers is None and not (r.run.path / SIGNATURE).exists(),
    "samples": lambda r: r.settings.sample is None and not r.run.log.samples.exists(),
}

# What an entry raises that is missing, of another type or out of all proportion.
DAMAGES = (
    LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError, RecursionError, MemoryError,
)  # fmt: skip


def verify(record: Record) -> Iterator[Finding]:
    """Make every check; one that cannot be made because something is missing or damaged fails, with the reason."""
    for name, check in CHECKS.items():
        if name in UNASKED and UNASKED[name](record):
            continue
        record.announce(name)
        try:
            yield check(record)
        except AprError as e:
            yield Finding.of(name, False, str(e), "readable")
        except DAMAGES as e:
            measured = f"an entry is missing or of the wrong kind: {e!r}"
            yield Finding.of(name, False, measured, "complete")
