"""Translate a tokenizer.json to the keys of a GGUF header, and back.

llama.cpp has two encoders for the vocabularies that apr reads: `gpt2`, byte-level BPE with merges and a named rule for
cutting text, and `llama`, SentencePiece BPE, where the better of two neighbours' merges is the one with the higher score.
"""

from __future__ import annotations

import json
from typing import Any

from ..common.errors import AprError, MalformedFile, Refused
from ..common.files import parse_json, short
from ..common.units import plural
from ..tokenizer.families import FAMILIES, SPLIT, SPLIT_QWEN
from ..tokenizer.tokenizer import Tokenizer, library_spelling
from ..tokenizer.vocab_format import BYTE_LEVEL, FALLBACK_BYTES, SENTENCEPIECE, SPACE_MARK, pattern_of, steps
from .gguf_rules import OTHERWISE, added_around, check_rules

# Sum of the squares of the lengths of all tokens, which are split at every place; vocabularies in use have 1/50 of it.
MAX_SPLIT_CHARACTERS = 1 << 30
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2}  # llama.cpp's, where a header has no key
# Says which normalizer a tokenizer had that the name of its rule does not say; llama.cpp normalizes nothing.
NORMALIZER = "apr.tokenizer.normalizer"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType


def vocabulary_keys(
    text: str,
    source: str,
    vocab_size: int,
    eos_id: int | None,
    bos_id: int | None = None,
    pad_id: int | None = None,
    chat_template: str | None = None,
    eot_id: int | None = None,
) -> dict[str, Any]:
    """Translate a tokenizer.json to header keys and values, padded to vocab_size tokens. eot_id: ends a turn, not a text.

    Raises Refused, naming the rule, for a tokenizer that llama.cpp would run otherwise: its encoder has no such
    pre-tokenizer or normalizer, or there is no end of text (it would take id 11 for one)."""
    fields = parse_json(text, source)
    tokenizer = Tokenizer.from_json(text, source, eos_id)
    if tokenizer.eos_id is None:
        raise Refused(
            f"{source}: names no end of text, without which llama.cpp takes id 11 or 2 for it; import the tokenizer "
            "with --eos TOKEN (apr tokenize import-hf)"
        )
    model = fields["model"]
    if model["type"] != "BPE" or tokenizer.format not in (BYTE_LEVEL, SENTENCEPIECE):
        raise Refused(
            f"{source}: a {model['type']} tokenizer of format {tokenizer.format}; apr writes byte-level and SentencePiece "
            "BPE into GGUF files; export --format hf"
        )
    check_rules(fields, tokenizer.format == SENTENCEPIECE, source)
    before, after = added_around(tokenizer, bos_id, source)
    tokens, kinds = _tokens(fields, vocab_size)
    out: dict[str, Any]
    if tokenizer.format == BYTE_LEVEL:
        out = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _pre(fields, source),
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.merges": [" ".join(pair) for pair in _merges(model)],
        }
    else:
        scores = _scores(model, tokens)
        unknown = model.get("unk_token")
        kinds = [_sentencepiece_kind(t, k, unknown) for t, k in zip(tokens, kinds, strict=True)]
        out = {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.add_space_prefix": _adds_space(tokenizer, tokens),
        }
    is_nfc = any(step.get("type") == "NFC" for step in steps(fields.get("normalizer"), source))
    if is_nfc != _normalizes(out["tokenizer.ggml.pre"]):
        out[NORMALIZER] = "NFC" if is_nfc else "none"
    bos = bos_id if bos_id is not None else before if before is not None else tokenizer.eos_id
    out |= {
        "tokenizer.ggml.bos_token_id": bos,  # always: what llama.cpp takes in its place is an ordinary token
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.add_bos_token": before is not None,
        "tokenizer.ggml.add_eos_token": after is not None,
    }
    unk = next((i for i, t in enumerate(tokens) if t == model.get("unk_token")), None)
    for name, i in (("unknown", unk), ("padding", pad_id), ("eot", eot_id)):
        if i is not None:
            out[f"tokenizer.ggml.{name}_token_id"] = i
    if chat_template is not None:
        out["tokenizer.chat_template"] = chat_template
    return out


def _tokens(fields: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """List text and type of each id below vocab_size; ids without a token get names that no token has."""
    by_id = {i: (t, NORMAL) for t, i in fields["model"]["vocab"].items()}
    for added in fields.get("added_tokens") or []:
        by_id[added["id"]] = (added["content"], CONTROL if added.get("special") else USER_DEFINED)
    taken = {t for t, _ in by_id.values()}
    for i in range(vocab_size):
        if i not in by_id:
            name = f"[PAD{i}]"
            while name in taken:
                name = f"[{name}]"
            by_id[i] = (name, UNUSED)
    rows = [by_id[i] for i in range(vocab_size)]
    return [t for t, _ in rows], [k for _, k in rows]


def _merges(model: dict[str, Any]) -> list[list[str]]:
    return [m.split(" ") if isinstance(m, str) else m for m in model.get("merges") or []]


def _pre(fields: dict[str, Any], source: str) -> str:
    """Find llama.cpp's name for the rule that cuts text."""
    for step in steps(fields.get("normalizer"), f"{source}: normalizer"):
        if step.get("type") != "NFC":  # llama.cpp normalizes nothing; text is nearly always in NFC already
            raise Refused(
                f"{source}: normalizer {step.get('type')!r}: llama.cpp has none; export --format hf"
            )
    cuts = list(steps(fields.get("pre_tokenizer"), f"{source}: pre_tokenizer"))
    rule = [(s.get("type"), pattern_of(s)) for s in cuts]
    last = cuts[-1] if cuts else {}
    whole = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    regex = last.get("use_regex", True)
    looks_up = bool(fields["model"].get("ignore_merges"))
    if looks_up and rule[:1] != [("Split", SPLIT)]:
        raise Refused(
            f"{source}: model.ignore_merges is true, and llama.cpp looks up whole words under its rule llama-bpe alone; "
            f"{OTHERWISE}"
        )
    if whole and not regex and len(rule) == 2 and cuts[0].get("behavior") == "Isolated":
        if rule[0] == ("Split", SPLIT_QWEN):
            return "qwen2"
        if rule[0] == ("Split", SPLIT):  # one rule, with and without looking up whole words before merging
            return "llama-bpe" if looks_up else "dbrx"
    if whole and regex and len(rule) == 1:
        return "gpt-2"
    if whole and regex and len(rule) == 2 and rule[0][0] == "Digits" and cuts[0].get("individual_digits"):
        return "smollm"
    raise Refused(
        f"{source}: cuts text by {rule}, a rule for which apr knows no pre-tokenizer of llama.cpp; export --format hf"
    )


def is_qwen2(text: str) -> bool:
    """True for a tokenizer.json that normalizes and cuts text as Qwen2's does."""
    source = "tokenizer.json"
    fields = parse_json(text, source)
    try:
        normal = [s["type"] for s in steps(fields.get("normalizer"), source)]
        return normal == ["NFC"] and _pre(fields, source) == "qwen2"
    except AprError:
        return False


def _scores(model: dict[str, Any], tokens: list[str]) -> list[float]:
    """score = -rank of the first merge that makes a token: llama.cpp merges the neighbours of the highest score first."""
    rank: dict[str, int] = {}
    for i, (a, b) in enumerate(_merges(model)):
        rank.setdefault(a + b, i)
    return [-float(rank.get(t, len(rank))) for t in tokens]


def _sentencepiece_kind(token: str, kind: int, unknown: str | None) -> int:
    if token == unknown:
        return UNKNOWN
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return BYTE
    return kind


def _adds_space(tokenizer: Tokenizer, tokens: list[str]) -> bool:
    ids = tokenizer.encode("a")
    return bool(len(ids)) and tokens[int(ids[0])].startswith("\u2581")


# --- back to a tokenizer.json --------------------------------------------------------------------------------------

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
RULES: dict[
    str, dict[str, Any]
] = {  # llama.cpp's name of the rule -> the steps of tokenizer.json that follow it
    "qwen2": FAMILIES["qwen2"].steps,
    "llama-bpe": FAMILIES["llama3"].steps,
    "dbrx": FAMILIES["llama3"].steps,
    "gpt-2": FAMILIES["gpt2"].steps,
    "smollm": {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES],
        },
        "decoder": BYTES,
    },
}


NFC = {"type": "NFC"}


def _normalizes(pre: Any) -> bool:
    """True for a rule whose published tokenizers normalize to NFC."""
    return isinstance(pre, str) and pre in RULES and RULES[pre]["normalizer"] == NFC


def _normalizer(keys: dict[str, Any], source: str) -> dict[str, Any] | None:
    """Read the normalizer that apr wrote, or else that of the rule. Raises Refused for another."""
    said = keys.get(NORMALIZER, "NFC" if _normalizes(keys.get("tokenizer.ggml.pre")) else "none")
    if said not in ("NFC", "none"):
        raise Refused(f"{source}: {NORMALIZER} = {short(said)}; apr reads NFC and none")
    return NFC if said == "NFC" else None


def tokenizer_json(keys: dict[str, Any], source: str) -> str | None:
    """Translate the keys of a header to a tokenizer.json whose encoder gives the same ids; None without a vocabulary.

    Raises MalformedFile, and Refused naming a vocabulary or rule that apr does not write itself."""
    kind = keys.get("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return None
    pre = keys.get("tokenizer.ggml.pre", "default")
    if kind not in ("gpt2", "llama") or (kind == "gpt2" and pre not in tuple(RULES)):
        raise Refused(
            f"{source}: tokenizer {short(kind)}, cut by {short(pre)}; apr reads llama (SentencePiece BPE) and gpt2 "
            f"(byte-level BPE) cut by {', '.join(RULES)}: take the model's Hugging Face folder instead"
        )
    tokens, kinds = _rows(keys, source)
    control = {i for i, k in enumerate(kinds) if k in (CONTROL, UNKNOWN)}
    added = control | {i for i, k in enumerate(kinds) if k == USER_DEFINED}
    ordinary = [i for i, k in enumerate(kinds) if k not in (UNUSED, CONTROL, UNKNOWN, USER_DEFINED)]
    # The library numbers added tokens that are not in the vocabulary from its length on.
    behind = sorted(i for i in added if i > max(ordinary, default=-1))
    within = sorted({*ordinary, *added} - set(behind))
    if behind != list(range(len(within), len(within) + len(behind))):
        within = sorted({*ordinary, *added})
    vocab = {tokens[i]: i for i in within}
    model: dict[str, Any] = {"type": "BPE", "unk_token": None, "fuse_unk": False, "byte_fallback": False}
    if kind == "gpt2":
        steps = {**RULES[pre], "normalizer": _normalizer(keys, source)}
        model |= {
            "ignore_merges": pre == "llama-bpe",
            "vocab": vocab,
            "merges": _list_of(keys, "merges", str, source),
        }
    else:
        prefix = bool(keys.get("tokenizer.ggml.add_space_prefix", True))
        steps = _sentencepiece_steps(prefix, _normalizer(keys, source))
        unknown = next((t for t, k in zip(tokens, kinds, strict=True) if k == UNKNOWN), None)
        scores = _list_of(keys, "scores", float, source)
        if len(scores) != len(tokens):
            raise MalformedFile(
                f"{source}: {plural(len(tokens), 'token')}, {plural(len(scores), 'score')}; fetch the file again"
            )
        fallback = all(b in vocab for b in FALLBACK_BYTES)
        model |= {"unk_token": unknown, "fuse_unk": True, "byte_fallback": fallback, "vocab": vocab}
        if (work := sum(len(token) ** 2 for token in vocab)) > MAX_SPLIT_CHARACTERS:
            raise MalformedFile(
                f"{source}: tokens too long to split: {plural(work, 'character')} in all; fetch the file again"
            )
        model["merges"] = _merges_of(vocab, scores)
    first = kind == "llama" or pre == "llama-bpe"  # llama.cpp's default
    around = [
        tokens[i] if keys.get(f"tokenizer.ggml.add_{name}_token", default) and i is not None else None
        for name, default, i in (
            ("bos", first, special_of(keys, "bos", source)),
            ("eos", False, special_of(keys, "eos", source)),
        )
    ]
    d = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": i in control} for i in sorted(added)
        ],
        **{key: steps[key] for key in ("normalizer", "pre_tokenizer", "decoder")},
        "post_processor": _post_processor(around, vocab | {tokens[i]: i for i in added}),
        "model": model,
    }  # fmt: skip
    # As the library spells it: a tokenizer that apr trained has the bytes, and so the SHA-256, that it had.
    return library_spelling(json.dumps(d, ensure_ascii=False), source)


def special_of(keys: dict[str, Any], name: str, source: str) -> int | None:
    """Read the id of bos or eos, or what llama.cpp takes without the key. Raises MalformedFile for one that is no token."""
    i = keys.get(f"tokenizer.ggml.{name}_token_id")
    tokens = keys.get("tokenizer.ggml.tokens") or []
    kinds = keys.get("tokenizer.ggml.token_type")
    if i is None and keys.get("tokenizer.ggml.model") == "llama" and isinstance(kinds, list):
        default = SENTENCEPIECE_IDS.get(name, len(kinds))
        return default if default < min(len(tokens), len(kinds)) and kinds[default] == CONTROL else None
    if i is not None and (type(i) is not int or not 0 <= i < len(tokens)):
        raise MalformedFile(
            f"{source}: {name}_token_id = {short(i)} is no id of its {plural(len(tokens), 'token')}"
        )
    return i


def _list_of(keys: dict[str, Any], name: str, kind: type, source: str) -> list[Any]:
    value = keys.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, list) or not all(isinstance(x, kind) for x in value):
        raise MalformedFile(
            f"{source}: tokenizer.ggml.{name} is no list of {kind.__name__}; fetch the file again"
        )
    return value


def _rows(keys: dict[str, Any], source: str) -> tuple[list[str], list[int]]:
    """Read text and type of every token."""
    tokens = _list_of(keys, "tokens", str, source)
    kinds = (
        _list_of(keys, "token_type", int, source)
        if "tokenizer.ggml.token_type" in keys
        else [NORMAL] * len(tokens)
    )
    if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
        raise MalformedFile(
            f"{source}: {plural(len(tokens), 'token')}, {len(set(tokens))} of them distinct, "
            f"{plural(len(kinds), 'type')}; fetch the file again"
        )
    return tokens, kinds


def _sentencepiece_steps(prefix: bool, normalizer: dict[str, Any] | None) -> dict[str, Any]:
    """Make the steps that put U+2581 for spaces, one before a text if `prefix`, and undo that."""
    marks = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    spaces = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    before: list[dict[str, Any]] = [normalizer] if normalizer else []
    before += [{"type": "Prepend", "prepend": SPACE_MARK}] if prefix else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, marks]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
    }


def _merges_of(vocab: dict[str, int], scores: list[float]) -> list[list[str]]:
    """List every split of a token into two tokens, those of the highest score first, of one score the longest left part.

    llama.cpp and sentencepiece join the leftmost of those of one score, so what is left over of a run of spaces, the tokens of
    which all have one score in Llama 2 and Mistral, is at its right end."""
    merges: list[tuple[float, int, int, list[str]]] = []
    for token, i in vocab.items():
        for at in range(1, len(token)):
            a, b = token[:at], token[at:]
            if a in vocab and b in vocab:
                merges.append((-scores[i], -at, -len(b), [a, b]))
    return [pair for *_, pair in sorted(merges)]


def _post_processor(around: list[str | None], ids: dict[str, int]) -> dict[str, Any] | None:
    """Make the step that puts tokens before and after a text."""
    if around == [None, None]:
        return None
    before, after = ([{"SpecialToken": {"id": t, "type_id": 0}}] if t is not None else [] for t in around)
    single = [*before, {"Sequence": {"id": "A", "type_id": 0}}, *after]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in around if t is not None},
    }
