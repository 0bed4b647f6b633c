"""Export a checkpoint as a Hugging Face folder or a GGUF file; read back and compare what was written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..common.atomic import remove_leftovers, try_folder, try_output
from ..common.errors import IOFailure, Refused, UsageError
from ..common.files import parse_json
from ..model.params import Layout
from ..tokenizer.tokenizer import Tokenizer
from . import gguf
from .checkpoint import (
    CONFIG,
    TEMPLATE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Checkpoint,
    parameters,
    template_in,
)
from .gguf_reader import read_gguf
from .gguf_rules import space_note
from .gguf_vocab import is_qwen2, vocabulary_keys
from .hf import commonest_dtype, read_hf, write_hf
from .named_ids import special_id
from .names import FOLDER, check_name
from .other_readers import compare_folder, compare_gguf
from .readback import compare_written
from .side_files import turn_end, with_one_template
from .tensors import SAVED

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def export_hf(
    checkpoint: Checkpoint, folder: str | Path, dtype: str | None = None, max_shard_bytes: int = 5_000_000_000
) -> dict[str, Any]:
    """Write a folder that transformers loads; returns figures for the user.

    dtype: float32, bfloat16 or float16; None keeps each tensor's. The folder may exist but hold none of the files that are
    written. What was written is read back and compared. Raises Refused, UsageError, IOFailure."""
    folder = Path(folder)
    if dtype is not None and dtype not in SAVED:
        raise UsageError(f"--dtype {dtype}: a Hugging Face folder holds {', '.join(SAVED)}")
    tensors = parameters(Layout(checkpoint.cfg), checkpoint)
    texts = texts_for(checkpoint, tensors, dtype)
    _check_free(folder, [*texts, TOKENIZER])
    check_name(folder, FOLDER, "name a folder, or give --format gguf for one file")
    write_hf(folder, checkpoint.cfg, tensors, dtype, max_shard_bytes, checkpoint.tokenizer_json, texts)
    written = read_hf(folder)
    if written.cfg != checkpoint.cfg:
        raise IOFailure(f"{folder}: config.json does not say what was written; write it again")
    compared = compare_written(written.tensors, tensors, checkpoint.cfg.tie_word_embeddings, folder, dtype)
    apart = compare_folder(folder, tensors, checkpoint.cfg.tie_word_embeddings)
    files = sorted(
        p.name for p in folder.iterdir() if p.name in texts or p.name == TOKENIZER or ".safetensors" in p.name
    )
    return {
        "output": str(folder),
        "format": "hf",
        "dtypes": sorted({t.dtype.name for t in written.tensors.values()}),
        "tensors": len(tensors),
        "compared_elements": compared,
        "compared_apart": apart,
        "files": files,
        "note": _note(checkpoint),
    }


def _note(checkpoint: Checkpoint) -> str | None:
    """Write the note for whoever loads an exported folder."""
    if (
        checkpoint.cfg.family == "qwen2"
        and checkpoint.tokenizer_json is not None
        and not is_qwen2(checkpoint.tokenizer_json)
    ):
        return (
            "AutoTokenizer of transformers 5 takes Qwen2's rules for every qwen2 model; this tokenizer cuts text "
            "otherwise: load it with PreTrainedTokenizerFast.from_pretrained"
        )
    return None


def _check_free(folder: Path, names: list[str]) -> None:
    """Raise Refused when a folder holds weights or one of these files."""
    old = []
    if folder.is_dir():
        remove_leftovers(folder)
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
    try_folder(folder)


def texts_for(checkpoint: Checkpoint, tensors: Mapping[str, np.ndarray], dtype: str | None) -> dict[str, str]:
    """Collect the side files of an export: the originals, and replacements for a checkpoint that apr trained."""
    texts, config = with_one_template(checkpoint.texts), checkpoint.config
    kept = CONFIG in texts and config == parse_json(texts[CONFIG], CONFIG)
    name = dtype or commonest_dtype(tensors)
    tok = checkpoint.tokenizer
    if not kept:
        config = {
            **config,
            "torch_dtype": name,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }
        if tok is not None:
            ends = [tok.eos_id, *sorted(checkpoint.end_ids() - {tok.eos_id})]
            config |= {
                "eos_token_id": ends if len(ends) > 1 else tok.eos_id,
                "bos_token_id": checkpoint.metadata.get("tokenizer.bos_token_id"),
            }
    spoken, config = config, _for_older_readers(config)
    said = [key for key in ("dtype", "torch_dtype") if key in config]
    if not kept or config != spoken or any(config[key] != name for key in said) or (dtype and not said):
        config = {**config, **dict.fromkeys(said or ["torch_dtype"], name)}
        texts[CONFIG] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    if checkpoint.chat_template is not None and TOKENIZER_CONFIG in texts and template_in(texts) is None:
        texts[TEMPLATE] = checkpoint.chat_template
    if tok is not None and TOKENIZER_CONFIG not in texts:
        texts[TOKENIZER_CONFIG] = (
            json.dumps(_tokenizer_config(checkpoint, tok), indent=2, ensure_ascii=False) + "\n"
        )
    return texts


def _for_older_readers(config: dict[str, Any]) -> dict[str, Any]:
    """Repeat `rope_parameters` in the old keys: readers before transformers 5 take a theta of 10000 without a word."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return config
    old: dict[str, Any] = {"rope_theta": rope["rope_theta"]}
    if rope.get("rope_type", "default") != "default":
        old["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return config | {key: value for key, value in old.items() if config.get(key) is None}


def _tokenizer_config(checkpoint: Checkpoint, tok: Tokenizer) -> dict[str, Any]:
    d: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": checkpoint.cfg.max_position_embeddings,
    }
    if tok.eos_token is not None:
        d["eos_token"] = tok.eos_token if (end := turn_end(checkpoint)) is None else tok.decode([end])
    bos = checkpoint.metadata.get("tokenizer.bos_token_id")
    if isinstance(bos, int):
        d["bos_token"] = tok.decode([bos])
    if checkpoint.chat_template is not None and TEMPLATE not in checkpoint.texts:
        d["chat_template"] = checkpoint.chat_template
    return d


def export_gguf(
    checkpoint: Checkpoint, path: str | Path, dtype: str | None = None, force: bool = False
) -> dict[str, Any]:
    """Write a GGUF file for llama.cpp; returns figures for the user.

    The file is read back and compared: float types bit for bit, Q8_0 within half a step of each block's scale. Raises
    Refused for an output that exists (unless force) and for what llama.cpp would compute otherwise."""
    path = Path(path)
    check_name(path, ".gguf", "name a file that ends in .gguf, or leave --format out for a folder")
    if os.path.lexists(path) and (path.is_dir() or not force):
        kind = "is a folder" if path.is_dir() else "exists already"
        raise Refused(
            f"{path}: {kind}; --format gguf writes one file: name a new one, or --force to replace a file"
        )
    try_output(path)
    tensors = parameters(Layout(checkpoint.cfg), checkpoint)
    keys = None
    tok = checkpoint.tokenizer
    if tok is not None:
        keys = vocabulary_keys(
            tok.json,
            checkpoint.source,
            checkpoint.cfg.vocab_size,
            tok.eos_id,
            special_id(tok.json, checkpoint.tokenizer_config, checkpoint.config, "bos"),
            special_id(tok.json, checkpoint.tokenizer_config, checkpoint.config, "pad"),
            checkpoint.chat_template,
            turn_end(checkpoint),
        )
    types = gguf.write_gguf(
        path, checkpoint.cfg, tensors, dtype, keys, Path(checkpoint.source).stem or "model"
    )
    worst = check_gguf(path, checkpoint, dtype)
    apart = compare_gguf(path, checkpoint.cfg, tensors)
    window = checkpoint.cfg.sliding_window
    return {
        "output": str(path),
        "format": "gguf",
        "tensors": len(tensors),
        "types": types,
        "q8_0_worst_step": worst,
        "compared_apart": apart,
        "tokenizer": keys and keys["tokenizer.ggml.model"],
        "pre_tokenizer": keys and keys["tokenizer.ggml.pre"],
        "context_length": min(
            window or checkpoint.cfg.max_position_embeddings, checkpoint.cfg.max_position_embeddings
        ),
        "note": space_note(tok.json, checkpoint.source) if tok is not None else None,
    }


def check_gguf(path: Path, checkpoint: Checkpoint, dtype: str | None) -> float:
    """Read a GGUF file back: names, shapes and bits as written; the largest error of Q8_0 in steps of its block.

    Raises IOFailure, naming the first tensor that differs."""
    file, worst = read_gguf(path), 0.0
    want = parameters(Layout(checkpoint.cfg), checkpoint)
    if set(file.tensors) != set(want):
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
    """Parse "500MB", "5GB", "2GiB" or a plain number as bytes. Raises UsageError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].upper() not in UNITS:
        raise UsageError(f"{flag} {text}: expected a size such as 500MB, 5GB or 2GiB")
    size = int(float(found[1]) * UNITS[found[2].upper()])
    if size < 1:
        raise UsageError(f"{flag} {text}: must be at least 1 byte")
    return size
