"""Files beside a tokenizer.json: the added tokens that they state or name as special, and keys that apr does not honour."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..common.errors import Refused
from ..common.files import parse_json, read_text, short
from ..common.shell import word
from .vocab_format import SPACE_MARK, steps

TOKENIZER = "tokenizer.json"
CONFIG, ADDED, SPECIAL = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"
DECODER = "added_tokens_decoder"
# Of an added token, beside its id and its text.
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def vocabulary_of(fields: dict[str, Any]) -> dict[str, Any]:
    """Find the tokens of a tokenizer.json and their ids, as they stand there; none where it has no table of them."""
    model = fields.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    return vocab if isinstance(vocab, dict) else {}


def objects_beside(
    folder: Path, names: Iterable[str] = (CONFIG, ADDED, SPECIAL)
) -> dict[str, dict[str, Any]]:
    """Read the files beside a tokenizer.json that are there. Raises MalformedFile, InputNotFound."""
    paths = {name: folder / name for name in names}
    return {n: parse_json(read_text(p), str(p), unique=True) for n, p in paths.items() if os.path.lexists(p)}


def joined_config(objects: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Read tokenizer_config.json as transformers does: tokens of special_tokens_map.json come first, but only where it does not
    list its added tokens. objects: by names of files."""
    config = objects.get(CONFIG, {})
    return config if DECODER in config else {**config, **objects.get(SPECIAL, {})}


def named_special(config: Mapping[str, Any]) -> dict[str, dict[str, bool]]:
    """Collect the tokens that a joined_config names as special, by content, with the flags that it gives.

    One of the vocabulary that is no added token is cut up as ordinary text, and transformers makes each of them one."""
    out: dict[str, dict[str, bool]] = {}
    for key, value in config.items():
        if not key.endswith(("_token", "special_tokens")):
            continue
        is_table = isinstance(value, dict) and "content" not in value
        for token in value.values() if is_table else value if isinstance(value, list) else [value]:
            content, flags = (token.get("content"), token) if isinstance(token, dict) else (token, {})
            if isinstance(content, str):
                out.setdefault(content, {k: v for k, v in flags.items() if isinstance(v, bool)})
    return out


def check_honoured(config: Mapping[str, Any], fields: dict[str, Any], folder: Path) -> None:
    """Raise Refused for a key of tokenizer_config.json by which transformers gives other ids than tokenizer.json says."""
    path = folder / CONFIG
    if config.get("split_special_tokens"):
        raise Refused(
            f"{path}: split_special_tokens is set, which cuts up the special tokens that a chat "
            "template writes as if they were text; set it to false, or take it out"
        )
    files = config.get("fast_tokenizer_files") or []
    if other := [f for f in files if f != TOKENIZER] if isinstance(files, list) else [files]:
        raise Refused(
            f"{path}: fast_tokenizer_files names {short(other[-1])}, which transformers may read in the place of {TOKENIZER}; "
            f"give the right one the name {TOKENIZER}, and take the key out"
        )
    said, found = config.get("add_prefix_space"), _adds_space(fields, str(folder / TOKENIZER))
    if isinstance(said, bool) and found is not None and said != found:
        what = "puts a space before each text" if found else "puts no space before a text"
        raise Refused(
            f"{path}: add_prefix_space = {str(said).lower()}, but {TOKENIZER} {what}, and it depends on the version of "
            "transformers which of them holds; take the key out, or have AutoTokenizer.from_pretrained(FOLDER)."
            f"save_pretrained(FOLDER) write a {TOKENIZER} that agrees"
        )


def _adds_space(fields: dict[str, Any], source: str) -> bool | None:
    """Tell whether steps of a tokenizer.json put a space before a text; None where none of them is about spaces."""
    found: list[bool] = []
    for step in _steps(fields, source):
        kind = step["type"]
        if kind == "ByteLevel" and "add_prefix_space" in step:
            found.append(bool(step["add_prefix_space"]))
        elif kind == "Metaspace":
            found.append(step.get("prepend_scheme", "always") != "never")
        elif kind == "Prepend" or (kind == "Replace" and step.get("content") == SPACE_MARK):
            found.append(kind == "Prepend")
    return any(found) if found else None


def _steps(fields: dict[str, Any], source: str) -> Iterable[dict[str, Any]]:
    for key in ("normalizer", "pre_tokenizer"):
        yield from steps(fields.get(key), f"{source}: {key}")


def check_stated(fields: dict[str, Any], path: Path) -> None:
    """Raise Refused, naming the command that joins the files, for an added token that tokenizer.json lacks or has with other
    flags: its text would be other ids than transformers makes of it. And for what check_honoured refuses."""
    own = {t.get("content"): t for t in fields.get("added_tokens") or [] if isinstance(t, dict)}
    vocab = vocabulary_of(fields)
    objects = objects_beside(path.parent)
    config = joined_config(objects)
    check_honoured(config, fields, path.parent)
    stated = [t for t in (config.get(DECODER) or {}).values() if isinstance(t, dict)]
    for name, d in objects.items():
        contents: list[Any] = list(d)
        if name != ADDED:
            contents = [c for c in named_special({k: v for k, v in config.items() if k in d}) if c in vocab]
            contents += [t.get("content") for t in stated if name == CONFIG]
        if lost := next((c for c in contents if c not in own), None):
            raise _apart(path.with_name(name), f"the added token {short(lost)}, which {path.name} lacks")
    for token in (t for t in stated if t.get("content") in own):
        there = own[token["content"]]
        if flag := next((f for f in FLAGS if token.get(f, there.get(f)) != there.get(f)), None):
            what = f"{flag} = {str(token[flag]).lower()} of the added token {short(token['content'])}"
            raise _apart(path.with_name(CONFIG), f"{what}, which has another one in {path.name}")


def _apart(path: Path, what: str) -> Refused:
    join = f"apr tokenize import-hf {word(path.parent)} -o FOLDER"
    return Refused(f"{path}: states {what}; join the files: {join}")
