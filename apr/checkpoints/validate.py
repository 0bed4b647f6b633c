"""Every check of a checkpoint, each with a verdict and a figure; none keeps the others from being asked.

Loading a checkpoint stops at the first thing wrong. Here the parts of the file are looked at one by one, so that a report
says all that is wrong: a flipped byte in a weight turns the row of the checksum red, and no other.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..common.errors import AprError, InputNotFound, MalformedFile, Refused
from ..common.files import opened, parse_json, read_text
from ..common.finding import FILE, Checklist, Fault, Skip
from ..model.config import ModelConfig
from ..model.hf_config import from_hf
from ..model.params import Layout
from ..tokenizer.import_hf import PROBE
from ..tokenizer.tokenizer import Tokenizer
from . import apr2, hf
from .apr2_metadata import TOKENIZER, embed_tokenizer, metadata_to_config
from .tensors import BF16, CHUNK, EMBED, HEAD, INV_FREQ, TensorFile, is_float

SEVERAL = 3  # names in a figure
LEAST = 256  # elements of a matrix whose distribution says something
# Of normally distributed weights 10 % are below an eighth of their root mean square, of heavy-tailed ones more. Bits of
# bfloat16 read as float16 have their exponents squeezed into four values, so that nearly none are; bits of float16 read
# as bfloat16 have them stretched over a hundred decades, so that nearly all are.
FEWEST, MOST = 0.001, 0.8
SMALLEST, LARGEST = 1e-7, 1e3  # root mean square of a matrix


@dataclass
class _Subject:
    """What is known of a checkpoint so far; None where a check before has failed to find it."""

    source: str
    tensors: Mapping[str, np.ndarray] | None = None
    metadata: dict[str, Any] | None = None
    cfg: ModelConfig | None = None
    tokenizer_json: str | None = None
    eos: Any = None  # id, as the configuration says it
    tied: bool | None = None
    why: str = "the tensors could not be read"
    notes: dict[str, Any] = field(default_factory=dict)

    def need_tensors(self) -> Mapping[str, np.ndarray]:
        if self.tensors is None:
            raise Skip(self.why)
        return self.tensors

    def need_cfg(self) -> ModelConfig:
        if self.cfg is None:
            raise Skip("the configuration could not be read")
        return self.cfg


def validate(source: str) -> Checklist:
    """All checks of an .apr file, a Hugging Face folder, or a .safetensors file with config.json beside it.

    Raises InputNotFound, and MalformedFile for a file of no kind that apr knows: there is nothing to check in it."""
    path, checks = Path(source), Checklist()
    if not os.path.exists(path):
        raise InputNotFound(
            f"{source}: not found; give an .apr file, a Hugging Face folder or a .safetensors file"
        )
    subject = _Subject(source)
    if path.is_dir() or path.suffix == ".safetensors":
        _hf_rows(checks, subject, path)
    else:
        with opened(path) as (f, size):
            magic = f.read(4)
            if magic[:3] != apr2.MAGIC[:3]:
                raise MalformedFile(
                    f"{source}: starts with {magic!r}: not an APR file, and no folder or .safetensors file"
                )
            f.seek(0)
            _apr_rows(checks, subject, path, f, size)
    _content_rows(checks, subject)
    return checks


# --- the bytes of an APR file --------------------------------------------------------------------------------------


@dataclass
class _Places:
    """Fields of a header, believed only as far as the file is long."""

    flags: int = 0
    count: int = 0
    meta_at: int = 0
    meta_size: int = 0
    index_at: int = 0
    data_at: int = 0


def _apr_rows(checks: Checklist, subject: _Subject, path: Path, f: BinaryIO, size: int) -> None:
    head, places = f.read(apr2.HEADER.size), _Places()
    state: dict[str, Any] = {"places": False, "rows": None, "end": None}

    def header() -> str:
        if len(head) < apr2.HEADER.size:
            raise Fault(f"{size} bytes, shorter than a header")
        magic, major, minor, flags, count, meta_at, meta_size, index_at, data_at, _, rest = (
            apr2.HEADER.unpack(head)
        )
        if magic != apr2.MAGIC:
            raise Fault(
                f"magic {magic!r}: APR v1, which apr does not read; convert it with the program that wrote it"
            )
        if (major, minor) != (2, 0) or any(rest):
            raise Fault(f"version {major}.{minor}, reserved bytes {rest.hex()}")
        places.flags, places.count, places.meta_at, places.meta_size = flags, count, meta_at, meta_size
        places.index_at, places.data_at = index_at, data_at
        state["header"] = True
        return f"APR 2.0, {count} tensors"

    def checksum() -> str:
        if len(head) < apr2.HEADER.size:
            raise Skip("no whole header")
        (stored,) = struct.unpack_from("<I", head, 40)
        found = apr2._header_crc(head)
        if found != stored:
            raise Fault(f"{found:#010x}, stored {stored:#010x}")
        return f"{stored:#010x}"

    def features() -> str:
        if "header" not in state:
            raise Skip("no readable header")
        wrong = [
            f"{bit:#06x} {apr2.REFUSED_FLAGS.get(bit, 'unknown')}"
            for bit in (1 << i for i in range(16))
            if places.flags & bit & ~apr2.HARMLESS
        ]
        if wrong:
            raise Fault(", ".join(wrong))
        return f"flags {places.flags:#06x}"

    def sections() -> str:
        if "header" not in state:
            raise Skip("no readable header")
        p, up = places, apr2._up
        if (
            p.meta_at != apr2.HEADER.size
            or p.index_at != up(p.meta_at + p.meta_size)
            or p.data_at < p.index_at
        ):
            raise Fault(
                f"metadata at {p.meta_at} of {p.meta_size} bytes, index at {p.index_at}, data at {p.data_at}"
            )
        if p.meta_size > apr2.MAX_METADATA:
            raise Fault(f"metadata of {p.meta_size} bytes")
        state["places"] = True
        return f"metadata {p.meta_size:,} bytes, index {p.data_at - p.index_at:,} bytes"

    def metadata() -> str:
        if not state["places"] or places.meta_at + places.meta_size > size:
            raise Skip("the file does not reach to its end" if state["places"] else "its place is not known")
        f.seek(places.meta_at)
        subject.metadata = parse_json(f.read(places.meta_size), "metadata")
        return f"{len(subject.metadata)} keys"

    def index() -> str:
        longest = 2 + apr2.MAX_NAME + 2 + 8 * apr2.MAX_NDIM + 16
        if not state["places"] or places.data_at > size:
            raise Skip("the file does not reach to its end" if state["places"] else "its place is not known")
        if places.data_at - places.index_at > apr2._up(places.count * longest):
            raise Fault(f"{places.data_at - places.index_at} bytes for {places.count} tensors")
        f.seek(places.index_at)
        rows = apr2._read_index(f.read(places.data_at - places.index_at), places.count, path)
        end = 0
        for row in sorted(rows, key=lambda r: r.offset):
            if row.offset != apr2._up(end):
                raise Fault(f"{row.name} at {row.offset}, the one before ends at {end}: an overlap or a gap")
            end = row.offset + row.size
        state["rows"], state["end"] = rows, places.data_at + apr2._up(end) + 4
        return f"{len(rows)} tensors, sorted, without overlap or gap"

    def dtypes() -> str:
        if state["rows"] is None:
            raise Skip("no readable index")
        entries = [apr2._stored(row, places.data_at, path) for row in state["rows"]]
        state["entries"] = entries
        kinds = sorted({str(e.dtype) for e in entries})
        return f"{', '.join(kinds)}; dtype, shape and size of each agree"

    def length() -> str:
        if state["places"] and places.data_at + 4 > size:
            raise Fault(f"{size:,} bytes, truncated: the tensors would begin at {places.data_at:,}")
        if state["end"] is None:
            raise Skip("no readable index says how long it must be")
        if size != state["end"]:
            raise Fault(
                f"{size:,} bytes, {'truncated' if size < state['end'] else 'too long'}: must be {state['end']:,}"
            )
        state["whole"] = True
        return f"{size:,} bytes"

    def footer() -> str:
        if "whole" not in state:
            raise Skip("where the footer stands is not known")
        crc, stored = _crc(f, size)
        if crc != stored:
            raise Fault(f"{crc:#010x}, stored {stored:#010x}: a byte has changed since it was written")
        return f"{crc:#010x} over {size - 4:,} bytes"

    def counts() -> str:
        if subject.metadata is None or "entries" not in state:
            raise Skip("metadata or tensors could not be read")
        entries, said = state["entries"], subject.metadata
        have = {
            "param_count": sum(prod(e.shape) for e in entries),
            "total_size": sum(e.nbytes for e in entries),
        }
        wrong = [
            f"{k} = {said[k]!r}, {have[k]} in the file" for k in have if said.get(k) not in (None, have[k])
        ]
        if wrong:
            raise Fault("; ".join(wrong))
        if not any(said.get(k) is not None for k in have):
            raise Skip("the metadata do not say")
        return f"{have['param_count']:,} elements, {have['total_size']:,} bytes"

    def vocabulary_flag() -> str:
        if subject.metadata is None or "header" not in state:
            raise Skip("no readable header and metadata")
        flag, there = bool(places.flags & apr2.HAS_VOCAB), bool(subject.metadata.get("tokenizer.vocabulary"))
        if flag != there:
            raise Fault(
                f"flag {'set' if flag else 'not set'}, vocabulary {'there' if there else 'not there'}"
            )
        return "set, and a vocabulary is there" if flag else "not set, and none is there"

    for name, bound, check in (
        ("header", "APR v2", header),
        ("header checksum", "the CRC-32 that is stored", checksum),
        ("features", "no flag of a feature that apr does not honour", features),
        ("sections", "header, metadata, index and data follow one another", sections),
        ("metadata", "a JSON object", metadata),
        ("index", "names sorted, places without overlap or gap", index),
        ("tensor types", "dtypes that apr reads; bytes that fit the shapes", dtypes),
        ("length", "where the index says that the file ends", length),
        ("footer checksum", "the CRC-32 that is stored", footer),
        ("counts", "param_count and total_size of the metadata are those of the tensors", counts),
        ("vocabulary flag", "set when there is a vocabulary", vocabulary_flag),
    ):
        checks.ask(name, bound, check, FILE)
    if "entries" in state and "whole" in state:
        subject.tensors = TensorFile(path, f, state["entries"])
    elif "entries" in state:
        subject.why = "the file has not the length that its index says"
    if subject.metadata is not None:
        meta = subject.metadata
        subject.eos = meta.get("tokenizer.eos_token_id")
        text = meta.get(TOKENIZER)
        subject.tokenizer_json = text if isinstance(text, str) else None
    checks.ask(
        "config complete",
        "every size and switch is stated, none contradicts another",
        lambda: _apr_config(subject),
    )
    checks.ask(
        "recorded hash", "weights_sha of the metadata.json beside it", lambda: _recorded(subject, path)
    )


def _crc(f: BinaryIO, size: int) -> tuple[int, int]:
    f.seek(0)
    crc, left = 0, size - 4
    while left and (piece := f.read(min(left, 1 << 20))):
        crc = zlib.crc32(piece, crc)
        left -= len(piece)
    return crc, int.from_bytes(f.read(4), "little")


def _apr_config(subject: _Subject) -> str:
    if subject.metadata is None:
        raise Skip("no readable metadata")
    names = set(subject.tensors or ())
    if subject.tensors is None and "hf_config" not in subject.metadata:
        raise Skip(subject.why)
    subject.cfg = metadata_to_config(subject.metadata, subject.source, names)
    said = subject.metadata.get("tie_word_embeddings")
    subject.tied = said if isinstance(said, bool) else subject.cfg.tie_word_embeddings
    return _describe(subject.cfg)


def _describe(cfg: ModelConfig) -> str:
    return f"{cfg.family}, {cfg.num_layers} layers of {cfg.hidden_size}, vocabulary {cfg.vocab_size:,}"


def _recorded(subject: _Subject, path: Path) -> str:
    beside = path.with_suffix(".metadata.json")
    if not os.path.lexists(beside):
        raise Skip(f"no {beside.name} beside it")
    want = parse_json(read_text(beside), str(beside)).get("weights_sha")
    tensors, digest = subject.need_tensors(), sha256()
    names = [s.hf for s in Layout(subject.need_cfg()).in_order()]
    if missing := [n for n in names if n not in tensors]:
        raise Skip(f"{_few(missing)} missing")
    for name in names:
        digest.update(np.ascontiguousarray(tensors[name]).view(np.uint8).reshape(-1).data)
    if digest.hexdigest() != want:
        raise Fault(f"{digest.hexdigest()[:12]}, recorded {str(want)[:12]}")
    return digest.hexdigest()[:12]


# --- a Hugging Face checkpoint -------------------------------------------------------------------------------------


def _hf_rows(checks: Checklist, subject: _Subject, path: Path) -> None:
    folder = path if path.is_dir() else path.parent

    def weights() -> str:
        tensors = hf.read_folder(path) if path.is_dir() else hf.read_safetensors(path)
        subject.tensors = tensors
        size = sum(t.nbytes for t in tensors.values())
        return f"{len(tensors)} tensors, {size:,} bytes: headers, offsets, lengths and index agree"

    def config() -> str:
        where = folder / "config.json"
        subject.metadata = parse_json(read_text(where), str(where))
        subject.cfg = from_hf(subject.metadata, str(where))
        subject.tied = subject.cfg.tie_word_embeddings
        eos = subject.metadata.get("eos_token_id")
        subject.eos = eos[0] if isinstance(eos, list) and eos else eos
        return _describe(subject.cfg)

    def texts() -> str:
        names = [n for n in os.listdir(folder) if n.endswith(".json") and not n.endswith(".index.json")]
        for name in sorted(set(names) - {"config.json"}):
            try:
                json.loads(read_text(folder / name))
            except (ValueError, RecursionError) as e:
                raise Fault(f"{name}: {e}") from None
        return ", ".join(sorted(names)) or "none"

    checks.ask(
        "weights files",
        "safetensors whose headers and lengths agree, shards as the index says",
        weights,
        FILE,
    )
    checks.ask("json files", "readable", texts, FILE)
    checks.ask("config complete", "every size and switch is stated, none contradicts another", config)
    tokenizer = folder / "tokenizer.json"
    if os.path.lexists(tokenizer):
        try:
            subject.tokenizer_json = read_text(tokenizer)
        except AprError as e:
            subject.notes["tokenizer"] = str(e)


# --- what the tensors and the tokenizer say ------------------------------------------------------------------------


def _content_rows(checks: Checklist, s: _Subject) -> None:
    values: dict[str, Figures] = {}

    def of(name: str, x: np.ndarray) -> Figures:
        if name not in values:
            values[name] = figures_of(x)
        return values[name]

    def each(judge: Callable[[str, np.ndarray], str | None]) -> tuple[int, list[str]]:
        wrong, count = [], 0
        for name, x in s.need_tensors().items():
            if is_float(x.dtype):
                said = judge(name, x)
                count += 1
                wrong += [f"{name}: {said}"] if said else []
        return count, wrong

    def finite() -> str:
        def judge(name: str, x: np.ndarray) -> str | None:
            bad = of(name, x).not_finite
            return f"{bad:,} of {x.size:,}" if bad else None

        count, wrong = each(judge)
        if wrong:
            raise Fault(f"not finite: {_few(wrong)}")
        return f"{count} tensors, {sum(x.size for x in s.need_tensors().values()):,} values"

    def varied() -> str:
        def judge(name: str, x: np.ndarray) -> str | None:
            v = of(name, x)
            if x.ndim < 2 or x.size < 2 or v.low != v.high:
                return None
            return "all zero" if v.low == 0 else f"all {v.low:g}"

        count, wrong = each(judge)
        if wrong:
            raise Fault(_few(wrong))
        return f"{count} tensors, none all zero or constant"

    def dtype_sane() -> str:
        smallest, largest = np.inf, 0.0

        def judge(name: str, x: np.ndarray) -> str | None:
            nonlocal smallest, largest
            v = of(name, x)
            if x.ndim < 2 or x.size < LEAST or v.not_finite or v.low == v.high:
                return None
            smallest, largest = min(smallest, v.rms), max(largest, v.rms)
            if not SMALLEST <= v.rms <= LARGEST:
                return f"root mean square {v.rms:.3g} as {x.dtype}"
            if not FEWEST <= v.small <= MOST:
                other = (
                    "bfloat16" if x.dtype == np.float16 else "float16" if x.dtype == BF16 else "another dtype"
                )
                return f"{v.small:.2%} below an eighth of the root mean square {v.rms:.3g}: bits of {other} read as {x.dtype}?"
            return None

        _, wrong = each(judge)
        if wrong:
            raise Fault(_few(wrong))
        if largest == 0:
            raise Skip(f"no finite matrix of {LEAST} elements or more")
        return f"root mean squares of matrices {smallest:.3g} to {largest:.3g}"

    def names() -> str:
        tensors, layout = s.need_tensors(), _layout(s)
        want = {slot.hf for slot in layout.in_order()} - {HEAD}  # the head: see tied head
        have = {n for n in tensors if not n.endswith(INV_FREQ)} - {HEAD}
        if s.cfg is not None and s.cfg.tie_word_embeddings and HEAD in tensors:
            have.add(EMBED)  # a tied pair may be stored under either name
        wrong = [
            f"{len(ns)} {what}: {_few(sorted(ns))}"
            for ns, what in ((want - have, "missing"), (have - want, "unexpected"))
            if ns
        ]
        if wrong:
            raise Fault("; ".join(wrong))
        return f"{len(have)} tensors, as the configuration wants"

    def shapes() -> str:
        tensors, layout = s.need_tensors(), _layout(s)
        want = {slot.hf: slot.shape for slot in layout.in_order()}
        wrong = [
            f"{n} {list(tensors[n].shape)}, not {list(want[n])}"
            for n in want
            if n in tensors and tensors[n].shape != want[n]
        ]
        whole = [
            f"{n} is {tensors[n].dtype}" for n in want if n in tensors and not is_float(tensors[n].dtype)
        ]
        if wrong or whole:
            raise Fault(_few(wrong + whole))
        return f"{sum(n in tensors for n in want)} as the configuration wants"

    def tied_head() -> str:
        tensors = s.need_tensors()
        if s.tied is None:
            raise Skip("the configuration could not be read")
        head, embed = tensors.get(HEAD), tensors.get(EMBED)
        same = head is not None and embed is not None and _same(head, embed)
        if s.tied:
            if head is not None and embed is not None and not same:
                raise Fault(f"tie_word_embeddings is true, but {HEAD} differs from {EMBED}")
            return "tied, " + ("stored once" if head is None or embed is None else "stored twice, equal bits")
        if head is None:
            raise Fault(f"tie_word_embeddings is false, but there is no {HEAD}")
        if same:
            raise Fault(
                f"tie_word_embeddings is false, but {HEAD} has the bits of {EMBED}: a tied model, stored twice"
            )
        return "not tied, a head of its own"

    def tokenizer() -> str:
        if "tokenizer" in s.notes:
            raise Fault(s.notes["tokenizer"])
        if s.tokenizer_json is None:
            if s.metadata is not None and s.metadata.get("tokenizer.vocabulary"):
                raise Skip("a vocabulary without the rules that cut text, as the original wrote them")
            raise Skip("none")
        tok = Tokenizer.from_json(s.tokenizer_json, s.source, s.eos if isinstance(s.eos, int | str) else None)
        if tok.byte_level and (why := tok.check_round_trip(PROBE)):
            raise Fault(f"loses text: {why}")
        listed = (s.metadata or {}).get("tokenizer.vocabulary")
        if listed is not None:
            other = _vocabulary_differs(listed, s.tokenizer_json)
            if other:
                raise Fault(other)
        return f"{tok.vocab_size:,} ids, end of text {tok.eos_token!r} ({tok.eos_id})"

    def fits() -> str:
        cfg = s.need_cfg()
        if s.tokenizer_json is None:
            raise Skip("no tokenizer")
        try:
            tok = Tokenizer.from_json(s.tokenizer_json, s.source)
        except AprError:
            raise Skip("the tokenizer cannot be read") from None
        if tok.vocab_size > cfg.vocab_size:
            raise Fault(f"{tok.vocab_size:,} ids, the model has {cfg.vocab_size:,}")
        return f"{tok.vocab_size:,} of {cfg.vocab_size:,} ids of the model"

    for name, bound, check in (
        ("names", "every parameter there, nothing left over", names),
        ("shapes", "as the configuration wants, floating point", shapes),
        ("tied head", "tie_word_embeddings agrees with the tensors", tied_head),
        ("finite values", "no NaN or infinity", finite),
        ("matrices vary", "no matrix is all zero or constant", varied),
        ("dtype sanity", "values distributed like weights, not like bits of another dtype", dtype_sane),
        ("tokenizer", "readable, gives text back, names an end of text that is an added token", tokenizer),
        ("tokenizer fits", "no more ids than the embedding has rows", fits),
    ):
        checks.ask(name, bound, check)


@dataclass(frozen=True)
class Figures:
    """Figures of a tensor: how many values are not finite; of the others lowest, highest, root mean square, and the share
    below an eighth of it."""

    not_finite: int
    low: float
    high: float
    rms: float
    small: float


def figures_of(x: np.ndarray) -> Figures:
    flat, bad, squares, count = x.reshape(-1), 0, 0.0, 0
    low, high = np.inf, -np.inf
    for at in range(0, flat.size, CHUNK):
        part = flat[at : at + CHUNK].astype(np.float64)
        good = part[np.isfinite(part)]
        bad += part.size - good.size
        if good.size:
            low, high = min(low, float(good.min())), max(high, float(good.max()))
            squares += float(good @ good)
            count += good.size
    rms, small = (squares / max(count, 1)) ** 0.5, 0
    if x.ndim > 1 and rms > 0:
        for at in range(0, flat.size, CHUNK):
            part = flat[at : at + CHUNK].astype(np.float64)
            small += int(np.count_nonzero(np.abs(part) < rms / 8))
    return Figures(bad, low, high, rms, small / max(count, 1))


def _layout(s: _Subject) -> Layout:
    cfg, tensors = s.need_cfg(), s.need_tensors()
    if cfg.num_layers > max(len(tensors), 1):
        raise Refused(f"{cfg.num_layers} layers in the config, but only {len(tensors)} tensors")
    return Layout(cfg)


def _vocabulary_differs(listed: Any, text: str) -> str | None:
    """Where the vocabulary in its own metadata key says otherwise than tokenizer.json; None when they agree."""
    meta: dict[str, Any] = {}
    embed_tokenizer(meta, text, None)
    want = meta["tokenizer.vocabulary"]
    if not isinstance(listed, list) or len(listed) != len(want):
        return f"tokenizer.vocabulary has {len(listed) if isinstance(listed, list) else 0} tokens, tokenizer.json {len(want)}"
    at = next((i for i, (a, b) in enumerate(zip(listed, want, strict=True)) if a != b), None)
    return (
        None
        if at is None
        else f"id {at} is {listed[at]!r} in tokenizer.vocabulary, {want[at]!r} in tokenizer.json"
    )


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    x, y = (
        np.ascontiguousarray(a).view(np.uint8).reshape(-1),
        np.ascontiguousarray(b).view(np.uint8).reshape(-1),
    )
    return all(np.array_equal(x[i : i + CHUNK], y[i : i + CHUNK]) for i in range(0, x.size, CHUNK))


def _few(names: list[str]) -> str:
    return "; ".join(names[:SEVERAL]) + (f"; and {len(names) - SEVERAL} more" if len(names) > SEVERAL else "")
