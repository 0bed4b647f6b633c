"""Refuse rules of a tokenizer.json that a GGUF header has no key for: llama.cpp would give texts other ids, without a word."""

from __future__ import annotations

from typing import Any

from ..common.errors import Refused
from ..common.files import parse_json, short
from ..common.units import plural
from ..tokenizer.tokenizer import Tokenizer
from ..tokenizer.vocab_format import FALLBACK_BYTES, SPACE_MARK, pattern_of, steps

OTHERWISE = "export --format hf"
# Options of the model that llama.cpp does not have. ignore_merges belongs to its rule llama-bpe, which gguf_vocab names.
OPTIONS = ("continuing_subword_prefix", "end_of_word_suffix")
# Of an added token: white space beside it becomes part of it, or it counts between word boundaries only.
FLAGS = ("lstrip", "rstrip", "single_word")
MAX_SPLIT = 256  # places at which a token is split to look for others


def check_rules(fields: dict[str, Any], is_sentencepiece: bool, source: str) -> None:
    """Raise Refused, naming the rule, for options of the model and of added tokens that llama.cpp does not have; of
    SentencePiece also for its normalizer, its pre-tokenizer and bytes."""
    model = fields["model"]
    for key in OPTIONS:
        if model.get(key):
            raise _refused(source, f"model.{key} = {short(model[key])}")
    for token in fields.get("added_tokens") or []:
        if flag := next((flag for flag in FLAGS if token.get(flag)), None):
            raise _refused(source, f"{flag} = true of the added token {token['content']!r}")
    _check_overlaps([token["content"] for token in fields.get("added_tokens") or []], source)
    if not is_sentencepiece:
        return
    if model.get("ignore_merges"):
        raise _refused(source, "model.ignore_merges = true")
    for key in ("normalizer", "pre_tokenizer"):
        for step in steps(fields.get(key), f"{source}: {key}"):
            if not _puts_marks(step):
                raise _refused(source, f"{key} {step.get('type')!r}")
    # The library looks for such a token as its normalizer leaves it, with a mark before it.
    puts_first = any(step.get("type") == "Prepend" for step in steps(fields.get("normalizer"), source))
    for token in fields.get("added_tokens") or []:
        if puts_first and token.get("normalized"):
            raise _refused(source, f"normalized = true of the added token {token['content']!r}")
    absent = sorted(set(FALLBACK_BYTES) - model["vocab"].keys())
    if absent:
        raise Refused(
            f"{source}: {len(absent)} of the byte pieces '<0x00>'..'<0xFF>' are missing, first {absent[0]!r}; llama.cpp would "
            f"abort at the first character that is not in the vocabulary. {OTHERWISE.capitalize()}"
        )
    if not model.get("byte_fallback"):
        raise Refused(
            f"{source}: model.byte_fallback is false: llama.cpp gives bytes for text without a token; {OTHERWISE}"
        )
    _check_reached(fields, source)


def _check_overlaps(tokens: list[str], source: str) -> None:
    """Raise Refused for an added token that begins within another and is no shorter: llama.cpp looks for the longest first,
    the library takes what begins first. Runs of one character are the same either way."""
    by_first: dict[str, list[str]] = {}
    for token in tokens:
        by_first.setdefault(token[:1], []).append(token)
    for a in tokens:
        for at in range(max(1, len(a) - MAX_SPLIT), len(a)):
            for b in by_first.get(a[at], ()):
                longer = b != a and len(b.encode()) >= len(a.encode())
                if longer and b.startswith(a[at:]) and len({*a, *b}) > 1:
                    raise _refused(
                        source, f"the added tokens {a!r} and {b!r} overlap, and the first one wins"
                    )


def _check_reached(fields: dict[str, Any], source: str) -> None:
    """Raise Refused for a token that no merge makes and two others do: llama.cpp has no merges, and joins any two such."""
    model = fields["model"]
    vocab = model["vocab"]
    apart = {token["content"] for token in fields.get("added_tokens") or []} | {
        *FALLBACK_BYTES,
        model.get("unk_token"),
    }
    made = {"".join(m.split(" ") if isinstance(m, str) else m) for m in model.get("merges") or []}
    for token in vocab.keys() - made - apart:
        if any(token[:at] in vocab and token[at:] in vocab for at in range(1, min(len(token), MAX_SPLIT))):
            raise _refused(source, f"no merge makes the token {token!r} of two others")


def space_note(text: str, source: str) -> str | None:
    """Say where llama.cpp puts a space that Metaspace does not put; None for other tokenizers."""
    for step in steps(parse_json(text, source).get("pre_tokenizer"), source):
        scheme = step.get("prepend_scheme", "always")
        if step.get("type") == "Metaspace" and scheme != "never" and step.get("add_prefix_space", True):
            behind = ", and before text behind a special token" if scheme == "first" else ""
            return (
                f"llama.cpp puts a space before a text that begins with one{behind}, which this tokenizer (Metaspace, "
                f"prepend_scheme {scheme!r}) does not: such texts get other ids there"
            )
    return None


def _refused(source: str, rule: str) -> Refused:
    return Refused(f"{source}: {rule}: llama.cpp has no such rule, so texts would get other ids; {OTHERWISE}")


def _puts_marks(step: dict[str, Any]) -> bool:
    """True for a step that puts U+2581 for spaces or cuts at them, and for NFC, which text nearly always is in."""
    kind, pattern = step.get("type"), pattern_of(step)
    return (
        (kind == "Metaspace" and step.get("replacement", SPACE_MARK) == SPACE_MARK)
        or (kind == "Prepend" and step.get("prepend") == SPACE_MARK)
        or (kind == "Replace" and (pattern, step.get("content")) == (" ", SPACE_MARK))
        or (kind == "Split" and pattern in (" ", SPACE_MARK))
        or kind == "NFC"
    )


def added_around(tokenizer: Tokenizer, bos_id: int | None, source: str) -> tuple[int | None, int | None]:
    """Find the ids that encoding puts before and after a text: the beginning and the end of a text, or None.

    Raises Refused for others, which no key of the header names."""
    bare, full = (tokenizer.encode("a", add_special_tokens=s).tolist() for s in (False, True))
    n = len(tokenizer.prefix_ids)
    before, after = full[:n], full[n + len(bare) :]
    bos = before[0] if bos_id is None and before else bos_id
    if full[n : n + len(bare)] != bare or before not in ([], [bos]) or after not in ([], [tokenizer.eos_id]):
        raise Refused(
            f"{source}: its post_processor puts {plural(len(full) - len(bare), 'id')} around a text, {before} before and "
            f"{after} behind; a GGUF file can say that {bos} comes before and {tokenizer.eos_id} behind: {OTHERWISE}"
        )
    return (before[0] if before else None), (after[0] if after else None)
