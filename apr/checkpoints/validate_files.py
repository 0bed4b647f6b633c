"""Check the parts of a file one by one: those of APR, Hugging Face and GGUF checkpoints."""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..common.errors import AprError
from ..common.files import opened, parse_json, parse_value, read_text
from ..common.finding import FILE, Checklist, Fault, Skip
from ..common.units import plural
from ..model.config import ModelConfig
from ..model.hf_config import from_hf, hf_notes
from ..model.params import Layout
from ..tokenizer.import_hf import read_tokenizer
from . import apr2, hf
from .apr2_metadata import TOKENIZER, metadata_to_config
from .gguf_reader import map_tensors, read_header
from .gguf_vocab import special_of, tokenizer_json
from .tensors import TensorFile
from .validate import Subject, few

# --- the bytes of an APR file --------------------------------------------------------------------------------------


@dataclass
class _Places:
    """Fields of a header, believed only as far as the file reaches."""

    flags: int = 0
    count: int = 0
    meta_at: int = 0
    meta_size: int = 0
    index_at: int = 0
    data_at: int = 0


def apr_rows(checks: Checklist, subject: Subject, path: Path) -> None:
    """Check the bytes of an APR file, and what its metadata say of it."""
    with opened(path) as (f, size):
        _apr_rows(checks, subject, path, f, size)


def _apr_rows(checks: Checklist, subject: Subject, path: Path, f: BinaryIO, size: int) -> None:
    head, places = f.read(apr2.HEADER.size), _Places()
    state: dict[str, Any] = {"places": False, "rows": None, "end": None}

    def header() -> str:
        if len(head) < apr2.HEADER.size:
            raise Fault(f"{plural(size, 'byte')}, shorter than a header")
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
        return f"APR 2.0, {plural(count, 'tensor')}"

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
        p, up = places, apr2.aligned
        if (
            p.meta_at != apr2.HEADER.size
            or p.index_at != up(p.meta_at + p.meta_size)
            or p.data_at < p.index_at
        ):
            raise Fault(
                f"metadata at {p.meta_at} of {plural(p.meta_size, 'byte')}, index at {p.index_at}, data at {p.data_at}"
            )
        if p.meta_size > apr2.MAX_METADATA:
            raise Fault(f"metadata of {plural(p.meta_size, 'byte')}")
        state["places"] = True
        return f"metadata {plural(p.meta_size, 'byte')}, index {plural(p.data_at - p.index_at, 'byte')}"

    def metadata() -> str:
        if not state["places"] or places.meta_at + places.meta_size > size:
            raise Skip("the file does not reach to its end" if state["places"] else "its place is not known")
        f.seek(places.meta_at)
        subject.metadata = parse_json(f.read(places.meta_size), "metadata")
        return f"{plural(len(subject.metadata), 'key')}"

    def index() -> str:
        longest = 2 + apr2.MAX_NAME + 2 + 8 * apr2.MAX_NDIM + 16
        if not state["places"] or places.data_at > size:
            raise Skip("the file does not reach to its end" if state["places"] else "its place is not known")
        if places.data_at - places.index_at > apr2.aligned(places.count * longest):
            raise Fault(
                f"{plural(places.data_at - places.index_at, 'byte')} for {plural(places.count, 'tensor')}"
            )
        f.seek(places.index_at)
        rows = apr2._read_index(f.read(places.data_at - places.index_at), places.count, path)
        end = 0
        for row in sorted(rows, key=lambda r: r.offset):
            if row.offset != apr2.aligned(end):
                raise Fault(f"{row.name} at {row.offset}, the one before ends at {end}: an overlap or a gap")
            end = row.offset + row.size
        state["rows"], state["end"] = rows, places.data_at + apr2.aligned(end) + 4
        return f"{plural(len(rows), 'tensor')}, sorted, without overlap or gap"

    def dtypes() -> str:
        if state["rows"] is None:
            raise Skip("no readable index")
        entries = [apr2._stored(row, places.data_at, path) for row in state["rows"]]
        state["entries"] = entries
        kinds = sorted({str(e.dtype) for e in entries})
        return f"{', '.join(kinds)}; dtype, shape and size of each agree"

    def length() -> str:
        if state["places"] and places.data_at + 4 > size:
            raise Fault(f"{plural(size, 'byte')}, truncated: the tensors would begin at {places.data_at:,}")
        if state["end"] is None:
            raise Skip("no readable index says how long it must be")
        if size != state["end"]:
            raise Fault(
                f"{plural(size, 'byte')}, {'truncated' if size < state['end'] else 'too long'}: must be {state['end']:,}"
            )
        state["whole"] = True
        return f"{plural(size, 'byte')}"

    def footer() -> str:
        if "whole" not in state:
            raise Skip("where the footer stands is not known")
        crc, stored = _crc(f, size)
        if crc != stored:
            raise Fault(f"{crc:#010x}, stored {stored:#010x}: a byte has changed since it was written")
        return f"{crc:#010x} over {plural(size - 4, 'byte')}"

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
        return f"{plural(have['param_count'], 'element')}, {plural(have['total_size'], 'byte')}"

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


def _apr_config(subject: Subject) -> str:
    if subject.metadata is None:
        raise Skip("no readable metadata")
    names = set(subject.tensors or ())
    if subject.tensors is None and "hf_config" not in subject.metadata:
        raise Skip(subject.why)
    subject.cfg = metadata_to_config(subject.metadata, subject.source, names)
    said = subject.metadata.get("tie_word_embeddings")
    subject.tied = said if isinstance(said, bool) else subject.cfg.tie_word_embeddings
    config = subject.metadata.get("hf_config")
    return "; ".join([_describe(subject.cfg), *(hf_notes(config, subject.source) if config else [])])


def _describe(cfg: ModelConfig) -> str:
    return (
        f"{cfg.family}, {plural(cfg.num_layers, 'layer')} of {cfg.hidden_size}, vocabulary {cfg.vocab_size:,}"
    )


def _recorded(subject: Subject, path: Path) -> str:
    beside = path.with_suffix(".metadata.json")
    if not os.path.lexists(beside):
        raise Skip(f"no {beside.name} beside it")
    want = parse_json(read_text(beside), str(beside)).get("weights_sha")
    tensors, digest = subject.need_tensors(), sha256()
    names = [s.hf for s in Layout(subject.need_cfg()).in_order()]
    if missing := [n for n in names if n not in tensors]:
        raise Skip(f"{few(missing)} missing")
    for name in names:
        digest.update(np.ascontiguousarray(tensors[name]).view(np.uint8).reshape(-1).data)
    if digest.hexdigest() != want:
        raise Fault(f"{digest.hexdigest()[:12]}, recorded {str(want)[:12]}")
    return digest.hexdigest()[:12]


# --- a Hugging Face checkpoint -------------------------------------------------------------------------------------


def hf_rows(checks: Checklist, subject: Subject, path: Path) -> None:
    """Check the files of a Hugging Face checkpoint."""
    folder = path if path.is_dir() else path.parent

    def weights() -> str:
        tensors = hf.read_weights(path)
        subject.tensors = tensors
        size = sum(t.nbytes for t in tensors.values())
        return f"{plural(len(tensors), 'tensor')}, {plural(size, 'byte')}: headers, offsets, lengths and index agree"

    def config() -> str:
        where = folder / "config.json"
        subject.metadata = parse_json(read_text(where), str(where))
        subject.cfg = from_hf(subject.metadata, str(where))
        subject.tied = subject.cfg.tie_word_embeddings
        eos = subject.metadata.get("eos_token_id")
        subject.eos = eos[0] if isinstance(eos, list) and eos else eos
        return "; ".join([_describe(subject.cfg), *hf_notes(subject.metadata, str(where))])

    def texts() -> str:
        names = [n for n in os.listdir(folder) if n.endswith(".json") and not n.endswith(".index.json")]
        for name in sorted(set(names) - {"config.json"}):
            try:
                parse_value(read_text(folder / name), name)
            except AprError as e:
                raise Fault(str(e)) from None
        return ", ".join(sorted(names)) or "none"

    checks.ask(
        "weights files",
        "safetensors whose headers and lengths agree, shards as the index says",
        weights,
        FILE,
    )
    checks.ask("json files", "readable", texts, FILE)
    checks.ask("config complete", "every size and switch is stated, none contradicts another", config)
    try:
        found = read_tokenizer(folder)
        subject.tokenizer_json = found[0] if found else None
    except AprError as e:
        subject.notes["tokenizer"] = str(e)


# --- a GGUF file ---------------------------------------------------------------------------------------------------


def gguf_rows(checks: Checklist, subject: Subject, path: Path) -> None:
    """Check the header of a GGUF file, its configuration and the keys of its tokenizer."""
    state: dict[str, Any] = {}

    def header() -> str:
        with opened(path) as (f, size):
            state["header"] = found = read_header(f, size, path)
        kinds = sorted({kind for _, kind in found.infos})
        tensors = f"{plural(len(found.infos), 'tensor')} of {', '.join(kinds)}"
        return f"{plural(len(found.keys), 'key')}, {tensors}, {plural(size, 'byte')}"

    def config() -> str:
        if "header" not in state:
            raise Skip("no readable header")
        with opened(path) as (f, _):
            file = map_tensors(state["header"], f)
        subject.tensors, subject.cfg = file.tensors, file.cfg
        subject.metadata, subject.tied = {}, file.cfg.tie_word_embeddings
        file.check_honoured()
        return _describe(file.cfg)

    checks.ask("header", "GGUF 2 or 3; tensors follow one another up to the end of the file", header, FILE)
    checks.ask("config complete", "every size is stated, no key would go unheeded", config)
    if "header" in state:
        keys = state["header"].keys
        try:
            subject.tokenizer_json = tokenizer_json(keys, subject.source)
            subject.eos = special_of(keys, "eos", subject.source)
        except AprError as e:
            subject.notes["tokenizer"] = str(e)
