"""Make the tables of docs/faults.md: edits of kernels, faults that the tests of gates plant, those of the campaigns."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mutant_faults import FAULTS, Mutant
from mutant_fifth import FIFTH
from mutant_fourth import FOURTH
from mutant_second import SECOND
from mutant_third import THIRD

from apr.bisect.planted.kernel_faults import KERNEL_FAULTS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "faults.md"
RECORD = ROOT / "bench" / "trust.json"
# Tests that plant faults, and the names of their lists; the gate of a list that does not name one for each fault.
PLANTED = {
    "tests/evidence/test_gates.py": {"FAULTS": "", "RESUMED": "before.resumed"},
    "tests/evidence/test_start_gates.py": {
        "BUILT": "before.settings", "STEPPED": "run.learning-rate", "INITIAL": "before.weights",
    },
    "tests/evidence/test_first_step.py": {"FAULTS": ""},
    "tests/model/test_lora.py": {"FAULTS": ""},
    "tests/model/test_lora_dropout.py": {"FAULTS": "start.dropout"},
    "tests/data/test_accounts.py": {"FAULTS": "before.data"},
    "tests/data/test_answers.py": {"FAULTS": "before.data"},
}  # fmt: skip
SEEN_BY = {
    "pretrain": "",
    "bisect": "`apr bisect`: ",
    "verify": "`apr verify`: ",
    "outside": "an unpatched `apr verify`: ",
}


def kernels_table() -> str:
    """Make a table of the edits of CUDA kernels."""
    faults = KERNEL_FAULTS.values()
    lines = [
        f"| `{f.name}` | {f.what} | `{f.module}.cu` | `{f.op}`, `{f.output}` | {', '.join(f.acts)} | {f.needs or '-'} |"
        for f in faults
    ]
    both = sum(len(f.acts) == 2 for f in faults)
    alone = [sum(f.acts == (act,) for f in faults) for act in ("float32", "bfloat16")]
    said = f"{len(lines)} edits: {both} with both dtypes, {alone[0]} with float32 alone, {alone[1]} with bfloat16 alone."
    head = "| fault | what it does | module | op named, output | dtypes | needs |"
    return "\n".join([said, "", head, "|---|---|---|---|---|---|", *lines]) + "\n"


def gates_table() -> str:
    """Make a table of the faults that tests plant in a run, by the gate that must turn red."""
    rows: dict[str, list[str]] = {}
    for path, lists in PLANTED.items():
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        values = {
            t.id: n.value
            for n in tree.body
            if isinstance(n, ast.Assign)
            for t in n.targets
            if isinstance(t, ast.Name)
        }
        for name, gate in lists.items():
            for fault, found in _pairs(values[name], values):
                rows.setdefault(gate or found, []).append(fault.replace("_s_", "'s_").replace("_", " "))
    count = sum(map(len, rows.values()))
    lines = [f"| `{gate}` | {'; '.join(sorted(faults))} |" for gate, faults in sorted(rows.items())]
    where = ", ".join(f"`{path}`" for path in PLANTED)
    said = f"{count} faults, planted in {where}: each turns its gate red."
    return "\n".join([said, "", "| gate | planted faults |", "|---|---|", *lines]) + "\n"


def _pairs(node: ast.expr, values: dict[str, ast.expr]) -> Iterator[tuple[str, str]]:
    """Yield (fault, gate or "") of a list, or of a dict whose values begin with a gate."""
    if isinstance(node, ast.List | ast.Tuple):
        for item in node.elts:
            yield _name(item), ""
    elif isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if key is None:
                # **dict.fromkeys(LIST, gate)
                assert isinstance(value, ast.Call)
                of, gate = value.args
                yield from ((fault, _text(gate)) for fault, _ in _pairs(values[_name(of)], values))
            else:
                yield _name(key), _text(value.elts[0] if isinstance(value, ast.Tuple) else value)


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else _text(node)


def _text(node: ast.expr) -> str:
    assert isinstance(node, ast.Constant)
    return str(node.value)


def campaign_table(name: str) -> str:
    """Make a table of a list of the campaign, with who saw each fault by the record."""
    record = json.loads(RECORD.read_text())
    known = {"first": FAULTS, "second": SECOND, "third": THIRD, "fourth": FOURTH, "fifth": FIFTH}[name]
    part = record if name == "first" else record.get(f"{name} list", {})
    found: dict[str, Any] = part.get("faults", {})
    lines = [f"| {m.what} | {m.job} | {_seen(m, found)} |" for m in known]
    seen, asked = part.get("rates", {}).get("at run time", (0, 0))
    changed = f"{part.get('planted', 0)} planted, {asked} of them changed something"
    said = f"{len(known)} faults, {changed}, {seen} seen at run time."
    return "\n".join([said, "", "| fault | job | seen by |", "|---|---|---|", *lines]) + "\n"


def _seen(m: Mutant, found: dict[str, Any]) -> str:
    if m.name not in found:
        return "not planted yet"
    if found[m.name].get("effect") == "none":
        return "changed nothing"
    for check, said in SEEN_BY.items():
        if answer := found[m.name].get(check):
            words = answer.replace("|", "/")
            return f"{said}{words if len(words) <= 60 else words[:57] + '...'}"
    return "**nothing**"
