"""The keys of a GGUF header that hold a tokenizer, from a tokenizer.json.

llama.cpp has two encoders for the vocabularies that apr reads: `gpt2`, byte-level BPE with merges and a named rule for
cutting text, and `llama`, SentencePiece BPE, where the better of two neighbours' merges is the one with the higher score.
"""

from __future__ import annotations

from typing import Any

from ..common.errors import Refused
from ..common.files import parse_json
from ..tokenizer.families import SPLIT, SPLIT_QWEN
from ..tokenizer.tokenizer import Tokenizer
from ..tokenizer.vocab_format import BYTE_LEVEL, SENTENCEPIECE

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType


def vocabulary_keys(
    text: str,
    source: str,
    vocab_size: int,
    eos_id: int | None,
    bos_id: int | None = None,
    pad_id: int | None = None,
    chat_template: str | None = None,
) -> dict[str, Any]:
    """Header keys and values for a tokenizer.json, padded to vocab_size tokens.

    Raises Refused, naming the rule, for a tokenizer that llama.cpp would run otherwise: its encoder has no such
    pre-tokenizer or normalizer, or there is no end of text (it would take id 11 for one)."""
    fields = parse_json(text, source)
    tokenizer = Tokenizer.from_json(text, source, eos_id)
    if tokenizer.eos_id is None:
        raise Refused(
            f"{source}: names no end of text, without which llama.cpp takes id 11 or 2 for it; import the tokenizer "
            "with --eos TOKEN (apr tokenize import-hf)"
        )
    tokens, kinds = _tokens(fields, vocab_size)
    model = fields["model"]
    out: dict[str, Any]
    if tokenizer.format == BYTE_LEVEL:
        out = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _pre(fields, source),
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.merges": [" ".join(pair) for pair in _merges(model)],
        }
    elif tokenizer.format == SENTENCEPIECE and model.get("type") == "BPE":
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
    else:
        raise Refused(
            f"{source}: a {model.get('type')} tokenizer of format {tokenizer.format}; apr writes byte-level and SentencePiece "
            "BPE into GGUF files; export --format hf"
        )
    before, after = _added_around(tokenizer)
    bos = bos_id if bos_id is not None else before if before is not None else tokenizer.eos_id
    out |= {
        "tokenizer.ggml.bos_token_id": bos,  # always: what llama.cpp takes in its place is an ordinary token
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.add_bos_token": before is not None,
        "tokenizer.ggml.add_eos_token": after is not None,
    }
    unk = next((i for i, t in enumerate(tokens) if t == model.get("unk_token")), None)
    for name, i in (("unknown", unk), ("padding", pad_id)):
        if i is not None:
            out[f"tokenizer.ggml.{name}_token_id"] = i
    if chat_template is not None:
        out["tokenizer.chat_template"] = chat_template
    return out


def _tokens(fields: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Text and type of each id below vocab_size; ids without a token get names that no token has."""
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
    """llama.cpp's name for the rule that cuts text."""
    for step in _steps(fields.get("normalizer"), "normalizers"):
        if step.get("type") != "NFC":  # llama.cpp normalizes nothing; text is nearly always in NFC already
            raise Refused(
                f"{source}: normalizer {step.get('type')!r}: llama.cpp has none; export --format hf"
            )
    steps = _steps(fields.get("pre_tokenizer"), "pretokenizers")
    rule = [(s.get("type"), _pattern(s)) for s in steps]
    last = steps[-1] if steps else {}
    whole = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    regex = last.get("use_regex", True)
    if whole and not regex and len(rule) == 2 and steps[0].get("behavior") == "Isolated":
        if rule[0] == ("Split", SPLIT_QWEN):
            return "qwen2"
        if rule[0] == ("Split", SPLIT):  # one rule, with and without looking up whole words before merging
            return "llama-bpe" if fields["model"].get("ignore_merges") else "dbrx"
    if whole and regex and len(rule) == 1:
        return "gpt-2"
    if whole and regex and len(rule) == 2 and rule[0][0] == "Digits" and steps[0].get("individual_digits"):
        return "smollm"
    raise Refused(
        f"{source}: cuts text by {rule}, a rule for which apr knows no pre-tokenizer of llama.cpp; export --format hf"
    )


def is_qwen2(text: str) -> bool:
    """Whether a tokenizer.json normalizes and cuts text as Qwen2's does."""
    fields = parse_json(text, "tokenizer.json")
    normal = [s.get("type") for s in _steps(fields.get("normalizer"), "normalizers")]
    try:
        return normal == ["NFC"] and _pre(fields, "tokenizer.json") == "qwen2"
    except Refused:
        return False


def _pattern(step: dict[str, Any]) -> str | None:
    pattern = step.get("pattern")
    return pattern.get("Regex", pattern.get("String")) if isinstance(pattern, dict) else None


def _steps(node: Any, key: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as a flat list."""
    if not isinstance(node, dict):
        return []
    if node.get("type") == "Sequence":
        return [s for part in node.get(key) or [] for s in _steps(part, key)]
    return [node]


def _scores(model: dict[str, Any], tokens: list[str]) -> list[float]:
    """Minus the rank of the first merge that makes a token: llama.cpp merges the neighbours of the highest score first."""
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


def _added_around(tokenizer: Tokenizer) -> tuple[int | None, int | None]:
    """The ids that encoding puts before and after a text."""
    bare, full = (tokenizer.encode("a", add_special_tokens=s).tolist() for s in (False, True))
    extra = len(full) - len(bare)
    if extra == 0:
        return None, None
    before = full[0] if full[1 : 1 + len(bare)] == bare else None
    after = (
        full[-1]
        if full[-1 - len(bare) : -1] == bare and len(full) > len(bare) + (before is not None)
        else None
    )
    return before, after
