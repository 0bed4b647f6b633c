"""What differs between two files of tensors, tensor by tensor, and between what they say of themselves."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import AprError, InputNotFound, MalformedFile
from ..common.files import parse_json, read_text
from ..model.config import ModelConfig
from ..model.hf_config import from_hf
from .apr2 import MAGIC, read_apr
from .apr2_metadata import metadata_to_config
from .hf import read_folder, read_safetensors
from .tensors import CHUNK, TensorFile

GGUF_MAGIC = b"GGUF"
EQUAL, VALUES, DIFFERENT, SHAPE, MISSING, EXTRA = (
    "equal",
    "equal values",
    "different",
    "shape",
    "missing",
    "extra",
)
ORDER = {MISSING: 0, EXTRA: 1, SHAPE: 2, DIFFERENT: 3, VALUES: 4, EQUAL: 5}


@dataclass(frozen=True)
class Side:
    """A file or folder of tensors.

    tensors: by name as stored (GGUF: mapped back). cfg: of a model, where the file says it completely. facts: what it says
    of itself, flat, for comparing."""

    source: str
    kind: str  # "APR v2", "Hugging Face", "safetensors", "GGUF"
    tensors: Mapping[str, np.ndarray]
    cfg: ModelConfig | None
    facts: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One tensor on both sides.

    state: EQUAL (bits), VALUES (of two dtypes), DIFFERENT, SHAPE, MISSING (in b), EXTRA (in b). max_abs, rms: of b - a.
    relative: rms by the root mean square of a. cosine: of the angle between a and b, as vectors; NaN where either is 0.
    differ: elements whose values differ. All figures in float64, None where there is nothing to compare."""

    name: str
    state: str
    a: str = ""  # dtype and shape
    b: str = ""
    max_abs: float | None = None
    rms: float | None = None
    relative: float | None = None
    cosine: float | None = None
    differ: int | None = None

    def within(self, tolerance: float | None) -> bool:
        """Whether the row counts as equal: bits, or given a tolerance a relative root mean square of at most that."""
        if self.state == EQUAL:
            return True
        return tolerance is not None and self.relative is not None and self.relative <= tolerance

    @property
    def badness(self) -> tuple[int, float, float]:
        """Sorts worst first: not there, of another shape, not finite, then by relative difference."""
        r = math.inf if self.relative is None or math.isnan(self.relative) else self.relative
        m = math.inf if self.max_abs is None or math.isnan(self.max_abs) else self.max_abs
        return (ORDER[self.state], -r, -m)


@dataclass(frozen=True)
class Difference:
    """All rows, worst first, and facts that differ as (key, of a, of b)."""

    rows: list[Row]
    facts: list[tuple[str, Any, Any]]
    tolerance: float | None = None
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.facts and all(r.within(self.tolerance) for r in self.rows)


def open_side(source: str) -> Side:
    """An .apr file, a Hugging Face folder, a .safetensors file (a trace, say) or a GGUF file.

    More lenient than loading: a config that apr does not compute is a fact like others. Raises InputNotFound,
    MalformedFile, Refused for files that cannot be read."""
    path = Path(source)
    if not os.path.exists(path):
        raise InputNotFound(
            f"{source}: not found; give an .apr file, a Hugging Face folder, a .safetensors or .gguf file"
        )
    if path.is_dir():
        return _folder(source, path)
    if path.suffix == ".safetensors":
        return _safetensors(source, path)
    with open(path, "rb") as f:
        magic = f.read(4)
    if magic == GGUF_MAGIC:
        from .gguf_reader import read_gguf

        file = read_gguf(path)
        facts = {f"config.{k}": v for k, v in asdict(file.cfg).items()}
        facts["eos_token_id"] = file.keys.get("tokenizer.ggml.eos_token_id")
        return Side(source, "GGUF", file.tensors, file.cfg, facts)
    if magic[:3] != MAGIC[:3]:
        raise MalformedFile(
            f"{source}: starts with {magic!r}: neither an APR v2 nor a GGUF file; a safetensors file ends in .safetensors"
        )
    apr = read_apr(path)
    cfg = _config(lambda: metadata_to_config(apr.metadata, source, apr.tensors))
    facts = {} if cfg else {f"config.{k}": v for k, v in _flat(apr.metadata.get("hf_config") or {})}
    facts |= {
        "tokenizer.json": _sha(apr.metadata.get("tokenizer.json")),
        "eos_token_id": apr.metadata.get("tokenizer.eos_token_id"),
    }
    return Side(source, "APR v2", apr.tensors, cfg, _with(cfg, facts))


def _folder(source: str, path: Path) -> Side:
    tensors = read_folder(path)
    facts: dict[str, Any] = {}
    cfg = None
    if os.path.lexists(path / "config.json"):
        config = parse_json(read_text(path / "config.json"), str(path / "config.json"))
        cfg = _config(lambda: from_hf(config, source))
        facts = {} if cfg else {f"config.{k}": v for k, v in _flat(config)}
        eos = config.get("eos_token_id")
        facts["eos_token_id"] = eos[0] if isinstance(eos, list) and eos else eos
    tokenizer = path / "tokenizer.json"
    facts["tokenizer.json"] = _sha(read_text(tokenizer) if os.path.lexists(tokenizer) else None)
    return Side(source, "Hugging Face", tensors, cfg, _with(cfg, facts))


def _safetensors(source: str, path: Path) -> Side:
    tensors = read_safetensors(path)
    facts: dict[str, Any] = {f"metadata.{k}": v for k, v in _metadata(tensors).items()}
    cfg = None
    if "metadata.config" in facts:  # a trace, or a golden file
        text = facts.pop("metadata.config")
        cfg = _config(lambda: from_hf(parse_json(text, f"{source}: config"), source))
        facts |= {} if cfg else {"metadata.config": text}
    for key in ("metadata.versions", "metadata.model", "metadata.format"):  # who wrote it, and from where
        facts.pop(key, None)
    return Side(source, "safetensors", tensors, cfg, _with(cfg, facts))


def _metadata(file: TensorFile) -> dict[str, str]:
    """The texts beside the tensors of a safetensors file."""
    with open(file.path, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        header = parse_json(f.read(size), str(file.path))
    return dict(header.get("__metadata__") or {})


def _config(make: Any) -> ModelConfig | None:
    try:
        cfg: ModelConfig = make()
    except AprError:
        return None
    return cfg


def _with(cfg: ModelConfig | None, facts: dict[str, Any]) -> dict[str, Any]:
    return ({f"config.{k}": v for k, v in asdict(cfg).items()} if cfg else {}) | facts


def _flat(d: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in d.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _sha(text: Any) -> str | None:
    return hashlib.sha256(text.encode()).hexdigest() if isinstance(text, str) else None


def compare(a: Side, b: Side, tolerance: float | None = None, prefix: str = "") -> Difference:
    """Every tensor of two sides, and their facts.

    tolerance: None wants equal bits; else tensors whose relative root mean square is at most that count as equal, whatever
    their dtype. prefix: only tensors whose names start with it. Reads both sides once, a piece at a time."""
    rows = []
    for name in [*a.tensors, *(n for n in b.tensors if n not in a.tensors)]:
        if name.startswith(prefix):
            rows.append(_row(name, a.tensors.get(name), b.tensors.get(name)))
    rows.sort(key=lambda r: r.badness)
    shared = a.facts.keys() & b.facts.keys()  # a bare .safetensors file says nothing of a tokenizer
    if tolerance is not None:  # traces of two backends are compared like that
        shared -= {"metadata.backend", "metadata.dtype"}
    facts = [(k, a.facts[k], b.facts[k]) for k in sorted(shared) if a.facts[k] != b.facts[k]]
    counts: dict[str, int] = {}
    for r in rows:
        counts[r.state] = counts.get(r.state, 0) + 1
    return Difference(rows, facts, tolerance, counts)


def _row(name: str, x: np.ndarray | None, y: np.ndarray | None) -> Row:
    if x is None or y is None:
        assert x is not None or y is not None
        return Row(name, EXTRA if x is None else MISSING, _describe(x), _describe(y))
    what = (_describe(x), _describe(y))
    if x.shape != y.shape:
        return Row(name, SHAPE, *what)
    same_bits = x.dtype == y.dtype
    max_abs = squares = of_a = of_b = product = 0.0
    differ = 0
    p, q = x.reshape(-1), y.reshape(-1)
    for at in range(0, p.size, CHUNK):
        u, v = p[at : at + CHUNK], q[at : at + CHUNK]
        if same_bits and not np.array_equal(
            np.ascontiguousarray(u).view(np.uint8), np.ascontiguousarray(v).view(np.uint8)
        ):
            same_bits = False
        f, g = u.astype(np.float64), v.astype(np.float64)
        with np.errstate(all="ignore"):
            d = g - f
            d[f == g] = 0  # two infinities
            max_abs = max(max_abs, float(np.abs(d).max())) if not np.isnan(d).any() else math.nan
            squares += float(d @ d)
            of_a, of_b, product = of_a + float(f @ f), of_b + float(g @ g), product + float(f @ g)
        differ += int(np.count_nonzero(~((f == g) | (np.isnan(f) & np.isnan(g)))))
    n = max(p.size, 1)
    with np.errstate(all="ignore"):
        rms = math.sqrt(squares / n) if squares == squares and squares != math.inf else squares
        relative = 0.0 if squares == 0 else rms / math.sqrt(of_a / n) if 0 < of_a < math.inf else math.inf
        cosine = product / math.sqrt(of_a) / math.sqrt(of_b) if of_a > 0 and of_b > 0 else math.nan
    state = EQUAL if same_bits else VALUES if differ == 0 else DIFFERENT
    if differ == 0:
        max_abs = rms = relative = 0.0
    return Row(name, state, *what, max_abs, rms, relative, min(cosine, 1.0), differ)


def _describe(x: np.ndarray | None) -> str:
    return "" if x is None else f"{x.dtype} {list(x.shape)}"
