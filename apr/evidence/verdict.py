"""Write and read verdict.json: the status of a run and the findings of its gates."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..common.atomic import write_json
from ..common.errors import MalformedFile
from ..common.files import read_json
from .gates import FORMAT, Gates

VERDICT = "verdict.json"


def save_verdict(
    run: Path, gates: Gates, status: str, steps: int, val_loss: float | None, message: str = ""
) -> str:
    """Write verdict.json, with the status RUNNING while the run goes on; returns the verdict."""
    verdict = {
        "format": FORMAT,
        "status": status,
        "verdict": gates.verdict,
        "message": message,
        "steps": steps,
        "val_loss": val_loss if val_loss is not None and math.isfinite(val_loss) else None,
        "bounds_changed": gates.given,
        "gates": gates.to_json(),
    }
    write_json(run / VERDICT, verdict)
    return gates.verdict


def read_verdict(run: Path) -> dict[str, Any] | None:
    """Read verdict.json; None where there is none. Raises MalformedFile."""
    path = run / VERDICT
    if not path.is_file():
        return None
    v = read_json(path)
    if not isinstance(v, dict) or v.get("format") != FORMAT:
        raise MalformedFile(f"{path}: expected a JSON object with format = {FORMAT!r}")
    if not isinstance(v.get("status"), str) or not isinstance(v.get("verdict"), str):
        raise MalformedFile(f"{path}: no status or no verdict in it")
    v = {"message": "", "bounds_changed": {}} | v
    if not isinstance(v["bounds_changed"], dict):
        raise MalformedFile(f"{path}: bounds_changed must be an object of numbers")
    gates = v.get("gates")
    if not isinstance(gates, list) or not all(
        isinstance(g, dict) and isinstance(g.get("id"), str) for g in gates
    ):
        raise MalformedFile(f"{path}: gates must be a list of objects with an id")
    return v
