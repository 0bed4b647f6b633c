"""Import a checkpoint of another program as one APR file, bit for bit, with its side files and provenance.

After writing, the file is read back and compared with the source, element by element.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..common.atomic import try_output
from ..common.errors import InputNotFound, MalformedFile, Refused, UsageError
from ..common.files import sha256_of
from ..common.hub import download, is_hub
from ..common.run_paths import instead_of, is_state
from ..common.version import __version__
from ..model.params import Layout
from ..tokenizer.import_hf import read_tokenizer
from ..tokenizer.tokenizer import Tokenizer
from .apr2 import read_apr, write_apr
from .apr2_metadata import config_to_metadata, embed_tokenizer
from .checkpoint import (
    CONVERT,
    HF_FILES,
    OTHER_TOKENIZERS,
    SIDE_FILES,
    TOKENIZER,
    Checkpoint,
    parameters,
    require_rows,
)
from .hf import INDEX, SINGLE, TO_SAFETENSORS, shard_names
from .named_ids import end_of_text, special_id
from .names import check_name
from .readback import compare_written
from .registry import TITLES, format_of, open_any
from .tensors import TensorFile

PATTERNS = (*SIDE_FILES, TOKENIZER, SINGLE, INDEX, "model-*-of-*.safetensors")
PROVENANCE = "provenance"  # metadata key


def import_model(
    source: str,
    output: str | Path,
    revision: str | None = None,
    tokenizer: str | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Write an APR file of a checkpoint; returns figures for the user.

    source: a folder, a .safetensors file with config.json beside it, a GGUF file, or hf://org/name[@revision]. tokenizer: a
    folder with tokenizer.json, for a source without one. Weights keep their dtype and bits (Q8_0 becomes float32) and are
    compared with the source after writing. Raises Refused for an output that exists (unless force), and as open_any does."""
    output = Path(output)
    check_name(output, ".apr", "name a file that ends in .apr")
    if os.path.lexists(output) and not force:
        raise Refused(f"{output}: exists already; name another file, or --force to replace it")
    try_output(output)
    if is_hub(source):
        folder, revision = _downloaded(source, revision)
        place = str(folder)
    elif revision is not None:
        raise UsageError(f"--revision {revision} makes sense for hf://org/name only, not for {source}")
    else:
        place = source
        folder = Path(place) if os.path.isdir(place) else Path(place).parent
    try:
        title = TITLES[kind := format_of(place).kind]
    except MalformedFile:
        kind = ""
    if kind not in ("hf", "gguf"):
        instead = instead_of(Path(place))
        raise UsageError(
            f"{source}: import reads Hugging Face folders, .safetensors files and GGUF files"
            + (f"; {instead}" if (instead and kind != "apr") or is_state(Path(place)) else "")
        )
    checkpoint = open_any(place)
    tensors = parameters(Layout(checkpoint.cfg), checkpoint)
    meta = config_to_metadata(checkpoint.cfg)
    meta |= {"hf_config": checkpoint.metadata} if checkpoint.kind == "hf" else {}
    meta |= {"source": source, "original_format": "safetensors" if checkpoint.kind == "hf" else title}
    meta[PROVENANCE] = {
        "by": f"apr {__version__} import",
        "source": source,
        "revision": revision,
        "files": [_fingerprint(p) for p in _files(checkpoint, folder)],
    }
    meta[HF_FILES] = checkpoint.texts
    if checkpoint.chat_template is not None:
        meta["chat_template"] = checkpoint.chat_template
    tok = _embed(meta, checkpoint, folder, tokenizer)
    write_apr(output, meta, tensors)
    compared = compare_written(
        read_apr(output).tensors, checkpoint.tensors, checkpoint.cfg.tie_word_embeddings, output
    )
    return {
        "output": str(output),
        "source": source,
        "revision": revision,
        "parameters": Layout(checkpoint.cfg).num_parameters,
        "tensors": len(tensors),
        "dtypes": sorted({t.dtype.name for t in tensors.values()}),
        "compared_elements": compared,
        "tokenizer_ids": tok and tok.vocab_size,
        "eos_token": tok and tok.eos_token,
        "eos_token_id": tok and tok.eos_id,
        "chat_template": checkpoint.chat_template is not None,
        "files": meta[PROVENANCE]["files"],
        "notes": checkpoint.notes + (_unread(folder) if tok is None else []),
    }


def _downloaded(source: str, revision: str | None) -> tuple[Path, str]:
    """Download a model of the Hub, shards by the names that its index gives them; returns its folder and commit."""
    folder, commit = download(source, PATTERNS, revision)
    single, index = (os.path.lexists(folder / name) for name in (SINGLE, INDEX))
    more = [n for n in shard_names(folder / INDEX) if not os.path.lexists(folder / n)] if index else []
    if more:
        folder, commit = download(source, more, revision)
    if not single and not index:
        name = source.removeprefix("hf://").split("@")[0]
        raise InputNotFound(
            f"{source}: has neither {SINGLE} nor {INDEX}. Of pickles (.bin), {TO_SAFETENSORS.format(repr(name))}: import "
            "FOLDER; of GGUF files, download one and import it"
        )
    return folder, commit


def _files(checkpoint: Checkpoint, folder: Path) -> list[Path]:
    """List the files that a checkpoint was read from."""
    weights = (
        [checkpoint.tensors.path]
        if isinstance(checkpoint.tensors, TensorFile)
        else [folder / name for name in shard_names(folder / INDEX)]
    )
    if checkpoint.kind != "hf":
        return weights
    more = [folder / n for n in (INDEX, TOKENIZER) if os.path.lexists(folder / n)]
    return [
        *weights,
        *(folder / name for name in checkpoint.texts),
        *(p for p in more if len(weights) > 1 or p.name != INDEX),
    ]


def _fingerprint(path: Path) -> dict[str, Any]:
    digest, size = sha256_of(path)
    return {"name": path.name, "bytes": size, "sha256": digest}


def _unread(folder: Path) -> list[str]:
    """Name a vocabulary that is there but not read."""
    return [CONVERT.format(name) for name in OTHER_TOKENIZERS if os.path.lexists(folder / name)][:1]


def _embed(meta: dict[str, Any], checkpoint: Checkpoint, folder: Path, other: str | None) -> Tokenizer | None:
    """Put the tokenizer of a folder, or of `other`, into metadata."""
    if checkpoint.kind != "hf" and not other:
        tok = checkpoint.tokenizer
        if tok is not None:
            embed_tokenizer(meta, tok.json, tok.eos_id, checkpoint.metadata.get("tokenizer.bos_token_id"))
        return tok
    place = Path(other) if other else folder
    found = read_tokenizer(place)
    if found is None:
        if other:
            raise InputNotFound(f"--tokenizer {other}: holds no {TOKENIZER}")
        return None
    text, config = found
    eos = end_of_text(text, config, checkpoint.metadata)
    tok = Tokenizer.from_json(text, str(place / TOKENIZER), eos)
    require_rows(tok, checkpoint.cfg.vocab_size, str(place))
    embed_tokenizer(meta, text, tok.eos_id, special_id(text, config, checkpoint.metadata, "bos"))
    return tok
