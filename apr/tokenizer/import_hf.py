"""Make a tokenizer folder from the files of Hugging Face models: tokenizer.json, or vocab.json and merges.txt.

The added tokens carry the end of text. Their ids come from the files that state them, else from the family; ids that
contradict each other, collide with the vocabulary or leave holes are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.errors import AprError, InputNotFound, MalformedFile, Refused, UsageError
from ..common.files import parse_json, read_text, short
from ..common.hub import download, is_hub
from ..common.units import plural
from .families import FAMILIES, Family
from .stated import (
    ADDED,
    CONFIG,
    DECODER,
    FLAGS,
    SPECIAL,
    TOKENIZER,
    check_honoured,
    joined_config,
    named_special,
    vocabulary_of,
)
from .tokenizer import Tokenizer, eos_of_config
from .vocab_format import added_tokens, check_id, steps, vocabulary_ids

VOCAB, MERGES = "vocab.json", "merges.txt"

# Two spaces, a line end, a tab, indentation, digits, other scripts, a combining accent: whatever drops one of these is noticed.
PROBE = "if x:  # 1234\r\n\treturn  'caf\u00e9 e\u0301 \u4e2d\u6587 \U0001f600'\n\n    don't "


def import_hf(
    source: str,
    out_dir: str | Path,
    family: str | None = None,
    revision: str | None = None,
    eos: str | None = None,
) -> Tokenizer:
    """Write the tokenizer of a Hugging Face model to a folder of ours, and return it.

    source   a tokenizer.json; a folder with one, or with vocab.json and merges.txt; a vocab.json with merges.txt beside
             it; or hf://org/name[@revision]. Of vocab.json and merges.txt the family must be said.
    family   a key of FAMILIES; a tokenizer.json that is exactly one family's is recognised
    eos      the token that ends a document; without it the family's, then that of tokenizer_config.json, then a
             special token with a known name

    Raises UsageError, InputNotFound, MalformedFile, IOFailure; Refused: files that contradict each other or the
    family, a vocabulary that its encoder does not speak, a folder that holds another tokenizer."""
    if family is not None and family not in FAMILIES:
        raise UsageError(f"family {family!r} is none of {', '.join(FAMILIES)}")
    files = _find(source, revision)
    main = files.objects[files.main]
    if files.whole:
        text, family = _from_tokenizer_json(files, main, family)
    else:
        text = _from_vocab(files, main, family)
    if eos is None:
        eos = FAMILIES[family].eos if family else eos_of_config(files.folder)
    tokenizer = Tokenizer(text, str(files.folder / files.main), eos)
    if tokenizer.byte_level and (why := tokenizer.check_round_trip(PROBE)):
        raise Refused(
            f"{source}: loses text: {why}; its pre-tokenizer or decoder does not go with byte-level ids"
        )
    tokenizer.made = _made(source, files, family, tokenizer)
    _check_target(Path(out_dir), files.folder, tokenizer)
    tokenizer.save(out_dir, files.objects.get(CONFIG, {}).get("chat_template"))
    return tokenizer


def read_tokenizer(folder: str | Path) -> tuple[str, dict[str, Any]] | None:
    """Read tokenizer.json with the added tokens that only the files beside it state, and tokenizer_config.json.

    None for a folder without tokenizer.json. Raises MalformedFile, Refused: files that contradict each other."""
    if not os.path.lexists(Path(folder) / TOKENIZER):
        return None
    files = _find(str(folder), None)
    text, _ = _from_tokenizer_json(files, files.objects[TOKENIZER], None)
    return text, joined_config(files.objects)


@dataclass
class _Files:
    """Files of a source: texts by file name, and the objects in those that are JSON."""

    folder: Path
    main: str
    revision: str | None = None
    texts: dict[str, str] = field(default_factory=dict)
    objects: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """True when the main file is a tokenizer.json; a vocab.json may have "model" among its tokens."""
        return self.main == TOKENIZER or isinstance(self.objects[self.main].get("model"), dict)

    def read(self, name: str) -> None:
        path = self.folder / name
        self.texts[name] = read_text(path, "give a tokenizer.json or the folder that holds one")
        if name != MERGES:
            self.objects[name] = parse_json(self.texts[name], str(path), unique=True)


def _find(source: str, revision: str | None) -> _Files:
    """Read the files of a source."""
    if is_hub(source):
        wanted = [TOKENIZER, VOCAB, MERGES, CONFIG, ADDED, SPECIAL]
        folder, revision = download(source, wanted, revision)
    elif revision is not None:
        raise UsageError(f"revision {revision!r} makes sense for hf://org/name only, not for {source}")
    else:
        folder = Path(source)
    main = next((name for name in (TOKENIZER, VOCAB) if os.path.lexists(folder / name)), None)
    if not folder.is_dir():
        folder, main = folder.parent, folder.name
    if main is None:
        raise InputNotFound(
            f"{source}: holds neither {TOKENIZER} nor {VOCAB} and {MERGES}. A model with tokenizer.model only must be "
            f"converted first: load it with the transformers library and save it, which writes {TOKENIZER}"
        )
    files = _Files(folder, main, revision)
    files.read(main)
    beside = [CONFIG, ADDED, SPECIAL] + ([] if files.whole else [MERGES, TOKENIZER])
    for name in beside:
        if name not in files.texts and os.path.lexists(folder / name):
            files.read(name)
    return files


def _from_tokenizer_json(files: _Files, fields: dict[str, Any], family: str | None) -> tuple[str, str | None]:
    """Complete tokenizer.json with the added tokens that only the files beside it state; returns (text, family)."""
    stated, config = _stated(files, family), joined_config(files.objects)
    path = str(files.folder / files.main)
    check_honoured(config, fields, files.folder)
    own = {t["id"]: t for t in added_tokens(fields, {}, path)}
    if family is None:
        family = next((name for name, f in FAMILIES.items() if _is_of(fields, stated, f, path)), None)
    elif difference := _rules_differ(fields, FAMILIES[family], path):
        raise Refused(
            f"{files.folder / files.main}: {difference} is not that of family {family}; name another or none"
        )
    special = named_special(config)
    listed = _of_file(CONFIG, files.objects.get(CONFIG, {}), files.folder / CONFIG, set())
    # As transformers has it: where both list a token, the flags are those of tokenizer_config.json.
    tokens = [_with_flags(t, listed.get(i), t["content"] in special) for i, t in own.items()]
    tokens += [stated[i] for i in sorted(stated.keys() - own.keys())]
    vocab, taken = vocabulary_of(fields), own.keys() | stated.keys()
    tokens += [
        _added(vocab[content], content, True, flags)
        for content, flags in special.items()
        if type(vocab.get(content)) is int and vocab[content] not in taken
    ]
    if tokens == list(own.values()):
        return files.texts[files.main], family
    merged = {**fields, "added_tokens": tokens}
    return json.dumps(merged, indent=2, ensure_ascii=False), family


def _with_flags(token: dict[str, Any], listed: dict[str, Any] | None, is_special: bool) -> dict[str, Any]:
    """Give an added token of tokenizer.json the flags by which tokenizer_config.json lists it."""
    if listed is None or all(listed[flag] == token.get(flag) for flag in FLAGS if flag != "special"):
        return token
    return {**token, **listed, "special": listed["special"] or is_special}


def _rules_differ(fields: dict[str, Any], family: Family, source: str) -> str | None:
    """Find which of normalizer and pre_tokenizer cuts text otherwise than the family's; None when both agree."""
    for key in ("normalizer", "pre_tokenizer"):
        rules = []
        for node in (fields.get(key), family.steps[key]):
            rules.append(
                [
                    (s["type"], s.get("pattern"), s.get("add_prefix_space"))
                    for s in steps(node, f"{source}: {key}")
                ]
            )
        if rules[0] != rules[1]:
            return key
    return None


def _is_of(fields: dict[str, Any], stated: dict[int, dict[str, Any]], family: Family, source: str) -> bool:
    vocab = vocabulary_of(fields)
    return (
        bool(vocab)
        and len(vocab) == family.base
        and {i: t["content"] for i, t in stated.items()} == {i: c for i, (c, _) in family.added.items()}
        and _rules_differ(fields, family, source) is None
    )


def _from_vocab(files: _Files, main: dict[str, Any], family_name: str | None) -> str:
    """Make the tokenizer.json of vocab.json, merges.txt and the family."""
    path = files.folder / files.main
    if family_name is None:
        raise UsageError(
            f"{path}: vocab.json and {MERGES} do not say how text is cut or which ids are special; name the family "
            f"with --family: {', '.join(FAMILIES)}"
        )
    if MERGES not in files.texts:
        raise InputNotFound(f"{files.folder / MERGES}: no such file; {files.main} needs it beside it")
    family = FAMILIES[family_name]
    vocab = vocabulary_ids(main, str(path))
    stated = _stated(files, family_name)
    if not stated:
        if len(vocab) != family.base:
            raise Refused(
                f"{path}: has {plural(len(vocab), 'token')}, {family_name} has {family.base:,}: its special ids would collide or "
                f"leave holes; name another family, or put the model's {CONFIG} beside it"
            )
        stated = {i: _added(i, content, special) for i, (content, special) in family.added.items()}
    fields: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [stated[i] for i in sorted(stated)],
        **family.steps,
        "model": {"type": "BPE", **family.options},
    }
    added_tokens(fields, vocab, str(path))
    ids = {*vocab.values(), *stated}
    if hole := next((i for i in range(len(ids)) if i not in ids), None):
        raise Refused(
            f"{path}: id {hole} has no token, neither there nor among the added tokens, whose ids end at {max(ids)}; "
            "take the vocabulary and the added tokens from the same model"
        )
    merges = _merges(files.texts[MERGES], vocab, files.folder / MERGES)
    if not family.options.get("ignore_merges"):
        _check_reached(vocab, merges, {t["content"] for t in stated.values()}, files.folder / MERGES)
    fields["model"]["vocab"] = dict(sorted(vocab.items(), key=lambda item: item[1]))
    fields["model"]["merges"] = merges
    return json.dumps(fields, indent=2, ensure_ascii=False)


def _merges(text: str, vocab: dict[str, int], path: Path) -> list[str]:
    """Read the lines of merges.txt, each two tokens whose join is a token. Raises MalformedFile with the line."""
    lines = text.split("\n")  # not splitlines: it also cuts at characters that tokens may hold
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if (number == 1 and line.startswith("#version")) or (number == len(lines) and not line):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or not all(parts):
            raise MalformedFile(
                f"{path}: line {number}: {short(line)} is not two tokens and a space; is the file whole?"
            )
        for token in (*parts, "".join(parts)):
            if token not in vocab:
                raise MalformedFile(
                    f"{path}: line {number}: {short(token)} is not in the vocabulary; is the file whole, and of the same model?"
                )
        if seen.setdefault(line, number) != number:
            raise MalformedFile(f"{path}: line {number}: {short(line)} is in line {seen[line]} already")
    return list(seen)


def _check_reached(vocab: dict[str, int], merges: list[str], added: set[str], path: Path) -> None:
    """Raise MalformedFile when tokens longer than a byte come of no merge: lines are missing."""
    made = {merge.replace(" ", "") for merge in merges}
    lost = [t for t in vocab if len(t) > 1 and t not in made and t not in added]
    if lost:
        raise MalformedFile(
            f"{path}: {plural(len(lost), 'token')} of the vocabulary without a merge, first "
            f"{short(lost[0])} (id {vocab[lost[0]]}); is "
            "the file whole, and of the same model?"
        )


def _stated(files: _Files, family: str | None) -> dict[int, dict[str, Any]]:
    """Collect the added tokens that the source's files state, by id; empty when none does.

    Raises Refused, naming both sides: two files, or a file and the family, contradict each other."""
    special = {content for content, s in FAMILIES[family].added.values() if s} if family else set()
    special |= named_special(joined_config(files.objects)).keys()
    by_file = {name: _of_file(name, d, files.folder / name, special) for name, d in files.objects.items()}
    out: dict[int, dict[str, Any]] = {}
    # Key: an id or a content. Value: the first file that pairs an id with a content.
    said: dict[Any, tuple[str, int, str]] = {}
    table = [
        (f"{files.folder / name}", i, t["content"])
        for name, tokens in by_file.items()
        for i, t in tokens.items()
    ]
    if family:
        table += [(f"family {family}", i, content) for i, (content, _) in FAMILIES[family].added.items()]
    for who, i, content in table:
        for key in (i, content):
            first = said.setdefault(key, (who, i, content))
            if first[1:] != (i, content):
                raise Refused(
                    f"{first[0]} says that {first[2]!r} has id {first[1]}, {who} that {content!r} has id {i}; take all files "
                    "from the same model, or name its family"
                )
    for tokens in by_file.values():
        for i, token in tokens.items():
            out.setdefault(i, token)
    return out


def _of_file(name: str, d: dict[str, Any], path: Path, special: set[str]) -> dict[int, dict[str, Any]]:
    """Collect the added tokens that one file states, by id. Raises MalformedFile."""
    if name == ADDED:
        return {check_id(i, f"{path}: {short(c)}"): _added(i, c, c in special) for c, i in d.items()}
    if name != CONFIG:
        found = added_tokens(d, {}, str(path)) if isinstance(d.get("model"), dict) else []
        return {t["id"]: t for t in found}
    table = d.get(DECODER) or {}
    if not isinstance(table, dict):
        raise MalformedFile(f"{path}: added_tokens_decoder is {short(table)}, not an object")
    out: dict[int, dict[str, Any]] = {}
    for key, value in table.items():
        where = f"{path}: added_tokens_decoder[{short(key)}]"
        if not re.fullmatch("0|[1-9][0-9]{0,9}", key):
            raise MalformedFile(f"{where}: the key is not an id")
        if not isinstance(value, dict) or not isinstance(value.get("content"), str):
            raise MalformedFile(f"{where} = {short(value)} has no content that is a string")
        i = check_id(int(key), where)
        out[i] = _added(i, value["content"], value.get("special", False), value)
        if wrong := next(
            (k for k, v in out[i].items() if k not in ("id", "content") and not isinstance(v, bool)), None
        ):
            raise MalformedFile(f"{where}: {wrong} = {short(out[i][wrong])} is neither true nor false")
    return out


def _added(i: int, content: str, special: bool, flags: dict[str, Any] | None = None) -> dict[str, Any]:
    """Spell an added token as tokenizer.json does."""
    flags = flags or {}
    return {
        "id": i,
        "content": content,
        **{key: flags.get(key, False) for key in ("single_word", "lstrip", "rstrip")},
        "normalized": flags.get("normalized", not special),
        "special": special,
    }


def _made(source: str, files: _Files, family: str | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """Describe origin and content for the manifest."""
    fields = json.loads(tokenizer.json)
    added = fields.get("added_tokens") or []
    rows = []
    for name, text in files.texts.items():
        data = text.encode()
        rows.append({"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    return {
        "by": "import",
        "source": source,
        "revision": files.revision,
        "family": family,
        "files": rows,
        "vocabulary": len(fields["model"]["vocab"]),
        "merges": tokenizer.merges,
        "added_tokens": len(added),
        "special_tokens": sum(t["special"] for t in added),
        "figures": tokenizer.figures,
    }


def _check_target(out: Path, source: Path, tokenizer: Tokenizer) -> None:
    """Raise Refused for a folder that holds another tokenizer or is the source."""
    if os.path.realpath(out) == os.path.realpath(source):
        raise Refused(
            f"{out}: is the source; importing into it would replace its {CONFIG}: choose another folder"
        )
    old = out / TOKENIZER
    if not os.path.lexists(old):
        return
    elsewhere = "choose another folder, or remove this one"
    try:
        there = read_text(old)
        eos = eos_of_config(out) if os.path.lexists(out / CONFIG) else tokenizer.eos_token
        sha256 = Tokenizer.from_json(there, str(old)).sha256
    except AprError as e:
        raise Refused(f"{out}: holds something already ({e}); {elsewhere}") from None
    if sha256 != tokenizer.sha256:
        raise Refused(
            f"{out}: holds another tokenizer, {sha256}; this one is {tokenizer.sha256}; {elsewhere}"
        )
    if eos != tokenizer.eos_token:
        raise Refused(
            f"{out}: holds this tokenizer with end of text {eos!r}, now it would be {tokenizer.eos_token!r}; {elsewhere}"
        )
