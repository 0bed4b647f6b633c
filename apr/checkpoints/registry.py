"""Open whatever format a path is: one table of formats, and what a run's folder is answered with.

| format       | path                                                              | tensors | model |
|--------------|-------------------------------------------------------------------|---------|-------|
| Hugging Face | folder with config.json and safetensors, or a .safetensors beside | yes     | yes   |
| safetensors  | .safetensors file without config.json: a trace                    | yes     | no    |
| GGUF         | file that begins with "GGUF": F32, F16, BF16 and Q8_0 tensors      | yes     | yes   |
| APR v2       | file that begins with "APR\\0"                                     | yes     | yes   |
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..common.errors import AprError, InputNotFound, MalformedFile, Refused
from ..common.files import opened
from ..common.finding import Checklist
from ..common.hub import hub_name
from ..common.run_paths import instead_of, is_state
from ..common.shell import word
from ..common.units import plural
from ..model.config import ModelConfig
from ..model.params import Layout
from ..model.presets import PRESETS
from ..tokenizer.import_hf import read_tokenizer
from ..tokenizer.tokenizer import Tokenizer
from .apr2 import MAGIC as APR_MAGIC
from .apr2 import read_apr
from .apr2_metadata import extract_tokenizer, metadata_to_config
from .checkpoint import (
    GENERATION_CONFIG,
    HF_FILES,
    Checkpoint,
    fill,
    parameters,
    upload,
)
from .contents import Contents, apr_contents, folder_contents, gguf_contents, safetensors_contents
from .gguf_reader import MAGIC as GGUF_MAGIC
from .gguf_reader import read_gguf
from .gguf_vocab import special_of, tokenizer_json
from .hf import INDEX, SINGLE, read_hf
from .named_ids import end_of_text
from .peft import WEIGHTS
from .peft_config import CONFIG
from .side_files import as_text
from .validate import Subject, content_rows
from .validate_files import apr_rows, gguf_rows, hf_rows

# Files that are looked at for a folder that was meant.
MAX_BELOW = 1000
_MERGE = "holds a LoRA adapter and no model: apr merge BASE {path} -o OUT.apr makes it part of its base"


@dataclass(frozen=True)
class Format:
    """One way to store a model.

    kind      for code: Checkpoint.kind
    title     for people
    detect    path, first bytes of a file -> True for this format
    read      path, name for messages -> Checkpoint; tensors not yet compared with the configuration
    contents  name, path -> tensors and statements, for comparing
    check     adds the findings about the file to a checklist, and its parts to a Subject
    """

    kind: str
    title: str
    detect: Callable[[Path, bytes], bool]
    read: Callable[[Path, str], Checkpoint]
    contents: Callable[[str, Path], Contents]
    check: Callable[[Checklist, Subject, Path], None]


def _read_apr(path: Path, source: str) -> Checkpoint:
    file = read_apr(path)
    _check_no_state(path, source)
    meta = file.metadata
    cfg = metadata_to_config(meta, source, file.tensors)
    eos = meta.get("tokenizer.eos_token_id")
    return Checkpoint(cfg, file.tensors, extract_tokenizer(meta, source), meta, source, "apr", eos)


def _read_hf(path: Path, source: str) -> Checkpoint:
    hf, folder = read_hf(path), path if path.is_dir() else path.parent
    text, said, fault = hf.tokenizer_json, dict[str, Any](), None
    try:
        # with the added tokens that only the files beside it state, as `apr import` and transformers have it
        text, said = read_tokenizer(folder) or (None, said)
    except AprError as e:
        fault = e
    eos = end_of_text(text, said, hf.config)
    return Checkpoint(hf.cfg, hf.tensors, text, hf.config, source, "hf", eos, fault)


def _read_gguf(path: Path, source: str) -> Checkpoint:
    file = read_gguf(path)
    file.check_honoured()
    keys = file.keys
    eos, bos = (special_of(keys, name, source) for name in ("eos", "bos"))
    text = tokenizer_json(keys, source)
    meta: dict[str, Any] = {
        k: v for k, v in keys.items() if isinstance(v, str | int | float) and not k.startswith("tokenizer.")
    }
    if text is not None:
        meta |= {"tokenizer.eos_token_id": eos, "tokenizer.vocabulary": keys["tokenizer.ggml.tokens"]}
    # Such as the end of a turn.
    others = [i for name in ("eot", "eom") if (i := special_of(keys, name, source)) not in (None, eos)]
    if others:
        meta[HF_FILES] = {GENERATION_CONFIG: as_text({"eos_token_id": [eos, *others]})}
    if bos != eos:  # a header names one always: without a bos the end of text
        meta["tokenizer.bos_token_id"] = bos
    if isinstance(template := keys.get("tokenizer.chat_template"), str):
        meta["chat_template"] = template
    return Checkpoint(file.cfg, file.tensors, text, meta, source, "gguf", eos)


def is_bare(path: Path) -> bool:
    """True for a .safetensors file without config.json beside it: tensors, but no model."""
    return path.suffix == ".safetensors" and not os.path.lexists(path.with_name("config.json"))


FORMATS = (
    Format("hf", "Hugging Face safetensors", lambda p, _: p.is_dir(), _read_hf, folder_contents, hf_rows),
    Format(
        "hf",
        "Hugging Face safetensors",
        lambda p, _: p.suffix == ".safetensors",
        _read_hf,
        safetensors_contents,
        hf_rows,
    ),
    Format("gguf", "GGUF", lambda _, magic: magic == GGUF_MAGIC, _read_gguf, gguf_contents, gguf_rows),
    # Of APR v1 the first three bytes: its reader says what to do.
    Format("apr", "APR v2", lambda _, magic: magic[:3] == APR_MAGIC[:3], _read_apr, apr_contents, apr_rows),
)
TITLES = {f.kind: f.title for f in FORMATS}


def format_of(source: str) -> Format:
    """Find the format of a path.

    Raises InputNotFound listing what was looked for, or naming a run's checkpoint; MalformedFile."""
    path = Path(source)
    if not os.path.exists(path):
        hint = f"; {source!r} is a preset: a preset has sizes but no weights" if source in PRESETS else ""
        if name := hub_name(source):
            hint = (
                f"; a model of the Hub is imported first: apr import hf://{name} -o {name.split('/')[1]}.apr"
            )
        raise InputNotFound(
            f"{source}: not found. Looked for an .apr file, a GGUF file, a folder with config.json and model.safetensors "
            f"(or model.safetensors.index.json), and a .safetensors file with config.json beside it{hint}"
        )
    _check_meant(path)
    magic = b""
    if not path.is_dir():
        with opened(path) as (f, _):
            magic = f.read(4)
    for form in FORMATS:
        if form.detect(path, magic):
            return form
    hint = _instead_of_file(path)
    raise MalformedFile(
        f"{source}: starts with {magic!r}: neither an APR v2 nor a GGUF file; {hint or 'a safetensors file ends in .safetensors'}"
    )


def _check_meant(path: Path) -> None:
    """Raise InputNotFound, naming what was meant, for a folder of a run and for any other that holds no model."""
    if not path.is_dir():
        return
    if _is_adapter(path):
        raise InputNotFound(f"{path}: {_MERGE.format(path=word(path))}")
    if any(path.glob("*.safetensors*")):
        return
    if instead := instead_of(path):
        raise InputNotFound(f"{path}: is a folder of a run; {instead}")
    if os.path.lexists(path / "config.json"):
        return
    files = sorted(p for p in path.iterdir() if p.suffix in (".apr", ".gguf"))
    if files:
        raise InputNotFound(f"{path}: is a folder of checkpoints; give one, such as {files[-1]}")
    below, adapters = _models_below(path)
    give = "give a Hugging Face folder, or an .apr or GGUF file"
    if below:
        more = f", or another of {len(below)} folders in it that hold one" if len(below) > 1 else ""
        give = f"give {below[-1]}{more}"
    elif adapters:
        give = f"{adapters[-1]} {_MERGE.format(path=word(adapters[-1]))}"
    raise InputNotFound(f"{path}: no model in it, neither config.json nor safetensors; {give}")


def _is_adapter(path: Path) -> bool:
    """Tell if a folder holds an adapter as PEFT saves it, and no model beside it."""
    return os.path.lexists(path / CONFIG) and not any(
        os.path.lexists(path / name) for name in ("config.json", SINGLE, INDEX)
    )


def _models_below(path: Path) -> tuple[list[Path], list[Path]]:
    """List the folders one and two levels down that hold a model, and those that hold an adapter, the latest last: checkpoint-500
    of a trainer, snapshots/HASH of Hugging Face's cache."""
    patterns = ("*/*.safetensors", "*/*/*.safetensors")
    files = [p for pattern in patterns for p in islice(path.glob(pattern), MAX_BELOW)]
    found = sorted({p.parent for p in files}, key=_age)
    whole = {p.parent for p in files if p.name != WEIGHTS}
    models = [p for p in found if p in whole and os.path.lexists(p / "config.json")]
    return models, [p for p in found if _is_adapter(p)]


def _age(path: Path) -> tuple[Any, ...]:
    """Order folders by the numbers in their names; snapshots, whose names are hashes, by when they were written."""
    above, name = (
        [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", str(p))] for p in (path.parent, path.name)
    )
    return above, path.stat().st_mtime_ns if path.parent.name == "snapshots" else 0, name


def _instead_of_file(path: Path) -> str:
    """Name the checkpoint that was meant by another file of a run, or the folder by the config.json of a model."""
    if path.name == "config.json" and any(path.parent.glob("*.safetensors*")):
        return f"give its folder, {path.parent}"
    return instead_of(path)


def _check_no_state(path: Path, source: str) -> None:
    """Raise Refused, naming the latest checkpoint, for a saved state."""
    if is_state(path):
        instead = instead_of(path) or "give an epoch-NNN.apr of the run"
        raise Refused(f"{source}: is a saved state, from which a run is resumed; {instead}")


def open_contents(source: str) -> Contents:
    """Open tensors of any format for comparing. Raises InputNotFound, MalformedFile, Refused: cannot be read."""
    return format_of(source).contents(source, Path(source))


def validate(source: str) -> Checklist:
    """Make every check of a checkpoint of any format; an exception of one check does not keep the next from being made.

    Raises InputNotFound, and MalformedFile for a file of no format that apr knows: there is nothing to check in it."""
    checks, subject = Checklist(), Subject(source)
    form = format_of(source)
    _check_no_state(Path(source), source)
    form.check(checks, subject, Path(source))
    content_rows(checks, subject)
    return checks


def open_any(source: str) -> Checkpoint:
    """Open a checkpoint of any format.

    Files, config, names and shapes are checked, so that memory may be allocated for the sizes that
    the config names; the weights stay on disk. Raises InputNotFound listing what was looked for,
    MalformedFile, Refused.
    """
    checkpoint = format_of(source).read(Path(source), source)
    layers = checkpoint.cfg.num_layers
    if layers > len(checkpoint.tensors):  # before a table of a billion layers is made
        raise Refused(
            f"{source}: {plural(layers, 'layer')} in the config, but only {plural(len(checkpoint.tensors), 'tensor')}"
        )
    parameters(Layout(checkpoint.cfg), checkpoint)
    return checkpoint


@dataclass(frozen=True)
class HostModel:
    """A model in host memory: configuration, flat parameters (Layout order), tokenizer.

    sha256: of the weights, or the preset and seed that they were drawn from."""

    cfg: ModelConfig
    layout: Layout
    host: np.ndarray
    tokenizer: Tokenizer | None
    sha256: str

    def on(self, backend: ModuleType, dtype: str = "float32") -> Any:
        """Copy the parameters to a backend: a new flat buffer."""
        return upload(backend, self.host, dtype)


def open_host(name: str, dtype: str = "float32", seed: int | None = None) -> HostModel:
    """Read a checkpoint into host memory; or, given a seed, draw every parameter of a preset at random.

    Raises as open_any does."""
    if name in PRESETS and seed is not None:
        cfg = PRESETS[name]
        layout = Layout(cfg)
        host = np.zeros(layout.size, dtype if dtype == "float64" else "float32")
        layout.randomise(host, seed)
        return HostModel(cfg, layout, host, None, f"preset {name}, random weights of seed {seed}")
    checkpoint = open_any(name)
    layout = Layout(checkpoint.cfg)
    host = np.zeros(layout.size, dtype if dtype == "float64" else "float32")
    fill(layout, host, checkpoint)
    return HostModel(checkpoint.cfg, layout, host, checkpoint.tokenizer, checkpoint.sha256)
