"""Checkpoints in and out: Hugging Face to APR, APR to Hugging Face and GGUF, bit for bit, nothing left behind.

An imported file keeps, beside the weights, the texts of all small files of its source, so that export gives them back
as they were. After writing, what stands on the disk is compared with what it was made from, element by element.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import InputNotFound, IOFailure, MalformedFile, Refused, UsageError
from ..common.files import parse_json, read_text
from ..common.hub import download, is_hub
from ..common.version import __version__
from ..model.config import from_hf, to_hf
from ..model.params import Layout
from ..tokenizer.import_hf import read_tokenizer
from ..tokenizer.tokenizer import Tokenizer
from .apr2 import config_to_metadata, embed_tokenizer, read_apr, write_apr
from .gguf_vocab import is_qwen2, vocabulary_keys
from .hf import INDEX, SINGLE, commonest_dtype, read_hf, write_hf
from .opening import tokenizer_of
from .registry import HEAD, LoadedModel, load_model, parameters
from .tensors import CHUNK, SAVED, TensorFile, encode, saved_dtype

CONFIG, TOKENIZER, TOKENIZER_CONFIG, TEMPLATE = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
TEXTS = (  # small files of a Hugging Face folder that an APR file keeps as they are
    CONFIG,
    "generation_config.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    TEMPLATE,
)
PATTERNS = (*TEXTS, TOKENIZER, SINGLE, INDEX, "model-*-of-*.safetensors")
HF_FILES, PROVENANCE = "hf_files", "provenance"  # metadata keys
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Bundle:
    """A checkpoint and the small texts that belong to it.

    texts: by file name, of TEXTS, as they stood in its Hugging Face folder; empty for a checkpoint that apr trained."""

    loaded: LoadedModel
    texts: dict[str, str]

    @property
    def config(self) -> dict[str, Any]:
        """The config.json of the model: the original where there is one that still describes it."""
        if CONFIG in self.texts:
            config = parse_json(self.texts[CONFIG], f"{self.loaded.source}: {CONFIG}")
            if from_hf(config, self.loaded.source) == self.loaded.cfg:
                return config
        return to_hf(self.loaded.cfg)

    @property
    def tokenizer_config(self) -> dict[str, Any]:
        """The object in tokenizer_config.json; empty where there is none."""
        text = self.texts.get(TOKENIZER_CONFIG)
        return parse_json(text, f"{self.loaded.source}: {TOKENIZER_CONFIG}") if text is not None else {}

    @property
    def chat_template(self) -> str | None:
        """The chat template: chat_template.jinja, else that of tokenizer_config.json, else that of the metadata."""
        if TEMPLATE in self.texts:
            return self.texts[TEMPLATE]
        template = self.tokenizer_config.get("chat_template", self.loaded.metadata.get("chat_template"))
        if isinstance(template, list):  # several by name
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else None


def open_bundle(source: str) -> Bundle:
    """A checkpoint as load_model opens it, with the texts beside it or in it. Raises as load_model does."""
    loaded = load_model(source)
    if loaded.kind == "hf":
        folder = Path(source) if os.path.isdir(source) else Path(source).parent
        return Bundle(loaded, _texts(folder))
    kept = loaded.metadata.get(HF_FILES) or {}
    if not isinstance(kept, dict) or not all(isinstance(t, str) for t in kept.values()):
        raise MalformedFile(
            f"{source}: metadata {HF_FILES!r} is not an object of texts; import the model again"
        )
    return Bundle(loaded, {name: text for name, text in kept.items() if name in TEXTS})


def _texts(folder: Path) -> dict[str, str]:
    """The small files of a folder, those that are JSON checked to be. Raises MalformedFile."""
    texts = {name: read_text(folder / name) for name in TEXTS if os.path.lexists(folder / name)}
    for name, text in texts.items():
        if name.endswith(".json"):
            parse_json(text, str(folder / name))
    return texts


# --- import --------------------------------------------------------------------------------------------------------


def import_model(
    source: str,
    output: str | Path,
    revision: str | None = None,
    tokenizer: str | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Write an APR file of a Hugging Face checkpoint; returns figures for the user.

    source: a folder, a .safetensors file with config.json beside it, or hf://org/name[@revision]. tokenizer: a folder with
    tokenizer.json, where the source has none. Weights keep their dtype and bits, and are compared with the source after
    writing. Raises Refused for an output that exists (unless force), and as load_model does."""
    output = Path(output)
    if os.path.lexists(output) and not force:
        raise Refused(f"{output}: exists already; name another file, or --force to replace it")
    if is_hub(source):
        folder, revision = download(source, PATTERNS, revision)
        place = str(folder)
    elif revision is not None:
        raise UsageError(f"--revision {revision} makes sense for hf://org/name only, not for {source}")
    else:
        place = source
        folder = Path(place) if os.path.isdir(place) else Path(place).parent
    if os.path.isfile(place) and Path(place).suffix != ".safetensors":
        raise UsageError(f"{source}: import reads Hugging Face folders and .safetensors files")
    loaded = load_model(place)
    texts = _texts(folder)
    tensors = parameters(Layout(loaded.cfg), loaded)
    meta = {**config_to_metadata(loaded.cfg), "hf_config": loaded.metadata}
    meta |= {"source": source, "original_format": "safetensors"}
    meta[PROVENANCE] = {
        "by": f"apr {__version__} import",
        "source": source,
        "revision": revision,
        "files": [_fingerprint(p) for p in _files(loaded, folder, texts)],
    }
    meta[HF_FILES] = texts
    bundle = Bundle(loaded, texts)
    if bundle.chat_template is not None:
        meta["chat_template"] = bundle.chat_template
    tok = _embed(meta, loaded, folder, tokenizer)
    write_apr(output, meta, tensors)
    compared = compare_written(
        read_apr(output).tensors, loaded.tensors, loaded.cfg.tie_word_embeddings, output
    )
    return {
        "output": str(output),
        "source": source,
        "revision": revision,
        "parameters": Layout(loaded.cfg).num_parameters,
        "tensors": len(tensors),
        "dtypes": sorted({t.dtype.name for t in tensors.values()}),
        "compared_elements": compared,
        "tokenizer_ids": tok and tok.vocab_size,
        "eos_token": tok and tok.eos_token,
        "eos_token_id": tok and tok.eos_id,
        "chat_template": bundle.chat_template is not None,
        "files": meta[PROVENANCE]["files"],
    }


def _files(loaded: LoadedModel, folder: Path, texts: Mapping[str, str]) -> list[Path]:
    """The files that a checkpoint was read from."""
    weights = (
        [loaded.tensors.path]
        if isinstance(loaded.tensors, TensorFile)
        else sorted(folder.glob("*.safetensors"))
    )
    more = [folder / n for n in (INDEX, TOKENIZER) if os.path.lexists(folder / n)]
    return [
        *weights,
        *(folder / name for name in texts),
        *(p for p in more if len(weights) > 1 or p.name != INDEX),
    ]


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(1 << 20):
            digest.update(piece)
        size = f.tell()
    return {"name": path.name, "bytes": size, "sha256": digest.hexdigest()}


def _embed(meta: dict[str, Any], loaded: LoadedModel, folder: Path, other: str | None) -> Tokenizer | None:
    """Put the tokenizer of a folder, or of another one, into metadata."""
    place = Path(other) if other else folder
    found = read_tokenizer(place)
    if found is None:
        if other:
            raise InputNotFound(f"--tokenizer {other}: holds no {TOKENIZER}")
        return None
    text, config = found
    eos: str | int | None = _content(config.get("eos_token"))
    if eos is None:
        eos = _first(loaded.metadata.get("eos_token_id"))
    tok = Tokenizer.from_json(text, str(place / TOKENIZER), eos)
    if tok.vocab_size > loaded.cfg.vocab_size:
        raise Refused(f"{place}: its tokenizer has {tok.vocab_size} ids, the model {loaded.cfg.vocab_size}")
    embed_tokenizer(meta, text, tok.eos_id, special_id(text, config, loaded.metadata, "bos"))
    return tok


def special_id(
    text: str, tokenizer_config: Mapping[str, Any], config: Mapping[str, Any], name: str
) -> int | None:
    """Id of the token that tokenizer_config.json, or else config.json, names bos, pad or unk; None where it is no added token."""
    added = {t["content"]: t["id"] for t in parse_json(text, TOKENIZER).get("added_tokens") or []}
    said = _content(tokenizer_config.get(f"{name}_token"))
    if said is not None:
        return added.get(said)
    i = _first(config.get(f"{name}_token_id"))
    return i if i in added.values() else None


def _content(token: Any) -> str | None:
    """The text of a token, which tokenizer_config.json spells as a string or as {"content": ...}."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _first(ids: Any) -> int | None:
    ids = ids[0] if isinstance(ids, list) and ids else ids
    return ids if isinstance(ids, int) and not isinstance(ids, bool) else None


def compare_written(
    got: Mapping[str, np.ndarray],
    want: Mapping[str, np.ndarray],
    tied: bool,
    path: Path,
    dtype: str | None = None,
) -> int:
    """How many elements were compared: every tensor of `want`, as `dtype` would hold it, has the same bits in `got`.

    tied: the head is looked for under the name of the embedding. Raises IOFailure, naming the first that differs."""
    count = 0
    for name, source in want.items():
        there = got.get(name)
        if there is None and tied and name == HEAD:
            there = got["model.embed_tokens.weight"]
        if there is None:
            if name.endswith(".rotary_emb.inv_freq"):  # a table that the config determines
                continue
            raise IOFailure(
                f"{path}: tensor {name} was not written; the disk or memory is faulty: write it again"
            )
        flat, at = there.reshape(-1), 0
        for piece in encode(str(path), source, saved_dtype(source, dtype)):
            bits = np.frombuffer(piece, np.uint8)
            part = flat[at : at + min(CHUNK, flat.size - at)]
            if not np.array_equal(np.ascontiguousarray(part).view(np.uint8), bits):
                raise IOFailure(
                    f"{path}: tensor {name}, elements from {at} on, differ from the source after writing; the disk or "
                    "memory is faulty: write it again"
                )
            at += part.size
        if at != flat.size:
            raise IOFailure(
                f"{path}: tensor {name} has {flat.size} elements, the source {at}; write it again"
            )
        count += at
    return count


# --- export --------------------------------------------------------------------------------------------------------


def export_hf(
    bundle: Bundle, folder: str | Path, dtype: str | None = None, max_shard_bytes: int = 5_000_000_000
) -> dict[str, Any]:
    """Write a folder that transformers loads; returns figures for the user.

    dtype: float32, bfloat16 or float16; None keeps each tensor's. The folder may exist but hold none of the files that are
    written. What was written is read back and compared. Raises Refused, UsageError, IOFailure."""
    folder, loaded = Path(folder), bundle.loaded
    if dtype is not None and dtype not in SAVED:
        raise UsageError(f"--dtype {dtype}: a Hugging Face folder holds {', '.join(SAVED)}")
    tensors = parameters(Layout(loaded.cfg), loaded)
    texts = _texts_for(bundle, tensors, dtype)
    _check_free(folder, [*texts, TOKENIZER])
    write_hf(folder, loaded.cfg, tensors, dtype, max_shard_bytes, loaded.tokenizer_json, texts)
    written = read_hf(folder)
    if written.cfg != loaded.cfg:
        raise IOFailure(f"{folder}: config.json does not say what was written; write it again")
    compared = compare_written(written.tensors, tensors, loaded.cfg.tie_word_embeddings, folder, dtype)
    files = sorted(
        p.name for p in folder.iterdir() if p.name in texts or p.name == TOKENIZER or ".safetensors" in p.name
    )
    return {
        "output": str(folder),
        "format": "hf",
        "dtypes": sorted({t.dtype.name for t in written.tensors.values()}),
        "tensors": len(tensors),
        "compared_elements": compared,
        "files": files,
        "note": _note(loaded),
    }


def _note(loaded: LoadedModel) -> str | None:
    """What whoever loads an exported folder must know."""
    if (
        loaded.cfg.family == "qwen2"
        and loaded.tokenizer_json is not None
        and not is_qwen2(loaded.tokenizer_json)
    ):
        return (
            "AutoTokenizer of transformers 5 takes Qwen2's rules for every qwen2 model; this tokenizer cuts text "
            "otherwise: load it with PreTrainedTokenizerFast.from_pretrained"
        )
    return None


def _check_free(folder: Path, names: list[str]) -> None:
    """Refused when a folder holds weights or one of these files."""
    old = []
    if folder.is_dir():
        weights = (
            p.name for p in folder.iterdir() if ".safetensors" in p.name or p.name.startswith("pytorch_model")
        )
        old = sorted({*weights, *(n for n in names if os.path.lexists(folder / n))})
    elif os.path.lexists(folder):
        raise Refused(f"{folder}: is a file; --format hf writes a folder")
    if old:
        raise Refused(
            f"{folder}: already holds {', '.join(old[:5])}; name a new folder or remove the old model first"
        )


def _texts_for(bundle: Bundle, tensors: Mapping[str, np.ndarray], dtype: str | None) -> dict[str, str]:
    """The small files of an export: the originals, and what a checkpoint that apr trained needs in their place."""
    loaded, texts = bundle.loaded, dict(bundle.texts)
    config = bundle.config
    kept = CONFIG in texts and config == parse_json(texts[CONFIG], CONFIG)
    name = dtype or commonest_dtype(tensors)
    tok = tokenizer_of(loaded)
    if not kept:
        config = {
            **config,
            "torch_dtype": name,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }
        if tok is not None:
            config |= {
                "eos_token_id": tok.eos_id,
                "bos_token_id": loaded.metadata.get("tokenizer.bos_token_id"),
            }
    said = [key for key in ("dtype", "torch_dtype") if key in config]
    if not kept or any(config[key] != name for key in said) or (dtype and not said):
        config = {**config, **dict.fromkeys(said or ["torch_dtype"], name)}
        texts[CONFIG] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    if tok is not None and TOKENIZER_CONFIG not in texts:
        texts[TOKENIZER_CONFIG] = (
            json.dumps(_tokenizer_config(bundle, tok), indent=2, ensure_ascii=False) + "\n"
        )
    return texts


def _tokenizer_config(bundle: Bundle, tok: Tokenizer) -> dict[str, Any]:
    d: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": bundle.loaded.cfg.max_position_embeddings,
    }
    if tok.eos_token is not None:
        d["eos_token"] = tok.eos_token
    bos = bundle.loaded.metadata.get("tokenizer.bos_token_id")
    if isinstance(bos, int):
        d["bos_token"] = tok.decode([bos])
    if bundle.chat_template is not None and TEMPLATE not in bundle.texts:
        d["chat_template"] = bundle.chat_template
    return d


def export_gguf(
    bundle: Bundle, path: str | Path, dtype: str | None = None, force: bool = False
) -> dict[str, Any]:
    """Write a GGUF file for llama.cpp; returns figures for the user.

    The file is read back and compared: float types bit for bit, Q8_0 within half a step of each block's scale. Raises
    Refused for an output that exists (unless force) and for what llama.cpp would compute otherwise."""
    from . import gguf

    path, loaded = Path(path), bundle.loaded
    if os.path.lexists(path) and (path.is_dir() or not force):
        kind = "is a folder" if path.is_dir() else "exists already"
        raise Refused(
            f"{path}: {kind}; --format gguf writes one file: name a new one, or --force to replace a file"
        )
    tensors = parameters(Layout(loaded.cfg), loaded)
    keys = None
    tok = tokenizer_of(loaded)
    if tok is not None:
        config = bundle.config
        keys = vocabulary_keys(
            tok.json,
            loaded.source,
            loaded.cfg.vocab_size,
            tok.eos_id,
            special_id(tok.json, bundle.tokenizer_config, config, "bos"),
            special_id(tok.json, bundle.tokenizer_config, config, "pad"),
            bundle.chat_template,
        )
    types = gguf.write_gguf(path, loaded.cfg, tensors, dtype, keys, Path(loaded.source).stem or "model")
    worst = check_gguf(path, bundle, dtype)
    window = loaded.cfg.sliding_window
    return {
        "output": str(path),
        "format": "gguf",
        "tensors": len(tensors),
        "types": types,
        "q8_0_worst_step": worst,
        "tokenizer": keys and keys["tokenizer.ggml.model"],
        "pre_tokenizer": keys and keys["tokenizer.ggml.pre"],
        "context_length": min(
            window or loaded.cfg.max_position_embeddings, loaded.cfg.max_position_embeddings
        ),
    }


def check_gguf(path: Path, bundle: Bundle, dtype: str | None) -> float:
    """Read a GGUF file back: names, shapes and bits as written; the largest error of Q8_0 in steps of its block.

    Raises IOFailure, naming the first tensor that differs."""
    from . import gguf

    loaded, file, worst = bundle.loaded, gguf.read_gguf(path), 0.0
    want = parameters(Layout(loaded.cfg), loaded)
    if {n for n in file.tensors if n != gguf.ROPE_FREQS} != set(want):
        raise IOFailure(f"{path}: its tensors are not those that were written; write it again")
    for name, source in want.items():
        kind, got = gguf.type_of(source, dtype), file.tensors[name]
        if kind == "Q8_0":
            wide = source.astype(np.float32).reshape(-1, gguf.BLOCK)
            step = np.abs(wide).max(1, keepdims=True) / 127
            off = np.abs(got.reshape(wide.shape) - wide)
            rounded = 127 * np.abs(step.astype(np.float16).astype(np.float32) - step)  # the scale is float16
            good = file.kinds[name] == kind and bool((off <= 0.501 * step + rounded).all())
            worst = max(worst, float((off / np.where(step == 0, 1, step)).max()))
        else:
            expected = gguf.convert(name, source, kind)
            good = got.dtype == expected.dtype and got.tobytes() == expected.tobytes()
        if not good:
            raise IOFailure(
                f"{path}: tensor {name} differs from the checkpoint after writing; write it again"
            )
    return worst


def parse_size(text: str, flag: str = "--max-shard-size") -> int:
    """Bytes of "500MB", "5GB", "2GiB" or a plain number. Raises UsageError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].upper() not in UNITS:
        raise UsageError(f"{flag} {text}: expected a size such as 500MB, 5GB or 2GiB")
    size = int(float(found[1]) * UNITS[found[2].upper()])
    if size < 1:
        raise UsageError(f"{flag} {text}: must be at least 1 byte")
    return size
