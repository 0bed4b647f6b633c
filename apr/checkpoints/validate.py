"""Check the tensors and the tokenizer of a checkpoint: findings of independent checks.

Opening a checkpoint stops at the first thing wrong. A report says all that is wrong: a flipped byte in a weight turns the
row of the checksum red, and no other. validate_files.py checks what is particular to a format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..common.errors import AprError, Refused
from ..common.finding import Checklist, Fault, Skip
from ..common.units import plural
from ..model.config import ModelConfig
from ..model.params import Layout
from ..tokenizer.import_hf import PROBE
from ..tokenizer.tokenizer import Tokenizer
from .apr2_metadata import embed_tokenizer
from .tensors import BF16, CHUNK, EMBED, HEAD, INV_FREQ, is_float, same_bits

MAX_NAMES = 3  # names in a figure
MIN_ELEMENTS = 256  # of a matrix whose distribution says something
# Of normally distributed weights 10 % are below an eighth of their root mean square, of heavy-tailed ones more. Bits of
# bfloat16 read as float16 have their exponents squeezed into four values, so that nearly none are; bits of float16 read
# as bfloat16 have them stretched over a hundred decades, so that nearly all are.
MIN_SMALL, MAX_SMALL = 0.001, 0.8
MIN_RMS, MAX_RMS = 1e-7, 1e3  # root mean square of a matrix


@dataclass
class Subject:
    """Parts of a checkpoint that checks have found so far; None for what no check has found.

    eos   id of the end of text, as the configuration says it
    tied  tie_word_embeddings, as the configuration says it
    why   reason for tensors being None
    """

    source: str
    tensors: Mapping[str, np.ndarray] | None = None
    metadata: dict[str, Any] | None = None
    cfg: ModelConfig | None = None
    tokenizer_json: str | None = None
    eos: Any = None
    tied: bool | None = None
    why: str = "the tensors could not be read"
    notes: dict[str, Any] = field(default_factory=dict)

    def need_tensors(self) -> Mapping[str, np.ndarray]:
        """Return the tensors. Raises Skip."""
        if self.tensors is None:
            raise Skip(self.why)
        return self.tensors

    def need_cfg(self) -> ModelConfig:
        """Return the configuration. Raises Skip."""
        if self.cfg is None:
            raise Skip("the configuration could not be read")
        return self.cfg


def content_rows(checks: Checklist, s: Subject) -> None:
    """Check tensors against the configuration, values against what weights look like, and the tokenizer."""
    values: dict[str, Figures] = {}

    def of(name: str, x: np.ndarray) -> Figures:
        if name not in values:
            values[name] = figures_of(x)
        return values[name]

    def each(judge: Callable[[str, np.ndarray], str | None]) -> tuple[int, list[str]]:
        wrong, count = [], 0
        for name, x in s.need_tensors().items():
            if is_float(x.dtype):
                said = judge(name, x)
                count += 1
                wrong += [f"{name}: {said}"] if said else []
        return count, wrong

    def finite() -> str:
        def judge(name: str, x: np.ndarray) -> str | None:
            bad = of(name, x).not_finite
            return f"{bad:,} of {x.size:,}" if bad else None

        count, wrong = each(judge)
        if wrong:
            raise Fault(f"not finite: {few(wrong)}")
        return f"{plural(count, 'tensor')}, {plural(sum(x.size for x in s.need_tensors().values()), 'value')}"

    def varied() -> str:
        def judge(name: str, x: np.ndarray) -> str | None:
            v = of(name, x)
            if x.ndim < 2 or x.size < 2 or v.low != v.high:
                return None
            return "all zero" if v.low == 0 else f"all {v.low:g}"

        count, wrong = each(judge)
        if wrong:
            raise Fault(few(wrong))
        return f"{plural(count, 'tensor')}, none all zero or constant"

    def dtype_sane() -> str:
        smallest, largest = np.inf, 0.0

        def judge(name: str, x: np.ndarray) -> str | None:
            nonlocal smallest, largest
            v = of(name, x)
            if x.ndim < 2 or x.size < MIN_ELEMENTS or v.not_finite or v.low == v.high:
                return None
            smallest, largest = min(smallest, v.rms), max(largest, v.rms)
            if not MIN_RMS <= v.rms <= MAX_RMS:
                return f"root mean square {v.rms:.3g} as {x.dtype}"
            if not MIN_SMALL <= v.small <= MAX_SMALL:
                other = (
                    "bfloat16" if x.dtype == np.float16 else "float16" if x.dtype == BF16 else "another dtype"
                )
                return f"{v.small:.2%} below an eighth of the root mean square {v.rms:.3g}: bits of {other} read as {x.dtype}?"
            return None

        _, wrong = each(judge)
        if wrong:
            raise Fault(few(wrong))
        if largest == 0:
            raise Skip(f"no finite matrix of {MIN_ELEMENTS} elements or more")
        return f"root mean squares of matrices {smallest:.3g} to {largest:.3g}"

    def names() -> str:
        tensors, layout = s.need_tensors(), _layout(s)
        want = {slot.hf for slot in layout.in_order()} - {HEAD}  # the head: see tied head
        have = {n for n in tensors if not n.endswith(INV_FREQ)} - {HEAD}
        if s.cfg is not None and s.cfg.tie_word_embeddings and HEAD in tensors:
            have.add(EMBED)  # a tied pair may be stored under either name
        wrong = [
            f"{len(ns)} {what}: {few(sorted(ns))}"
            for ns, what in ((want - have, "missing"), (have - want, "unexpected"))
            if ns
        ]
        if wrong:
            raise Fault("; ".join(wrong))
        return f"{plural(len(have), 'tensor')}, as the configuration wants"

    def shapes() -> str:
        tensors, layout = s.need_tensors(), _layout(s)
        want = {slot.hf: slot.shape for slot in layout.in_order()}
        wrong = [
            f"{n} {list(tensors[n].shape)}, not {list(want[n])}"
            for n in want
            if n in tensors and tensors[n].shape != want[n]
        ]
        whole = [
            f"{n} is {tensors[n].dtype}" for n in want if n in tensors and not is_float(tensors[n].dtype)
        ]
        if wrong or whole:
            raise Fault(few(wrong + whole))
        return f"{sum(n in tensors for n in want)} as the configuration wants"

    def tied_head() -> str:
        tensors = s.need_tensors()
        if s.tied is None:
            raise Skip("the configuration could not be read")
        head, embed = tensors.get(HEAD), tensors.get(EMBED)
        same = head is not None and embed is not None and same_bits(head, embed)
        if s.tied:
            if head is not None and embed is not None and not same:
                raise Fault(f"tie_word_embeddings is true, but {HEAD} differs from {EMBED}")
            return "tied, " + ("stored once" if head is None or embed is None else "stored twice, equal bits")
        if head is None:
            raise Fault(f"tie_word_embeddings is false, but there is no {HEAD}")
        if same:
            raise Fault(
                f"tie_word_embeddings is false, but {HEAD} has the bits of {EMBED}: a tied model, stored twice"
            )
        return "not tied, a head of its own"

    def tokenizer() -> str:
        if "tokenizer" in s.notes:
            raise Fault(s.notes["tokenizer"])
        if s.tokenizer_json is None:
            if s.metadata is not None and s.metadata.get("tokenizer.vocabulary"):
                raise Skip("a vocabulary without the rules that cut text, as the original wrote them")
            raise Skip("none")
        tok = Tokenizer.from_json(s.tokenizer_json, s.source, s.eos if isinstance(s.eos, int | str) else None)
        if tok.byte_level and (why := tok.check_round_trip(PROBE)):
            raise Fault(f"loses text: {why}")
        listed = (s.metadata or {}).get("tokenizer.vocabulary")
        if listed is not None:
            other = _vocabulary_differs(listed, s.tokenizer_json)
            if other:
                raise Fault(other)
        return f"{plural(tok.vocab_size, 'id')}, end of text {tok.eos_token!r} ({tok.eos_id})"

    def fits() -> str:
        cfg = s.need_cfg()
        if s.tokenizer_json is None:
            raise Skip("no tokenizer")
        try:
            tok = Tokenizer.from_json(s.tokenizer_json, s.source)
        except AprError:
            raise Skip("the tokenizer cannot be read") from None
        if tok.vocab_size > cfg.vocab_size:
            raise Fault(f"{plural(tok.vocab_size, 'id')}, the model has {cfg.vocab_size:,}")
        return f"{tok.vocab_size:,} of {plural(cfg.vocab_size, 'id')} of the model"

    for name, bound, check in (
        ("names", "every parameter there, nothing left over", names),
        ("shapes", "as the configuration wants, floating point", shapes),
        ("tied head", "tie_word_embeddings agrees with the tensors", tied_head),
        ("finite values", "no NaN or infinity", finite),
        ("matrices vary", "no matrix is all zero or constant", varied),
        ("dtype sanity", "values distributed like weights, not like bits of another dtype", dtype_sane),
        ("tokenizer", "readable, gives text back, names an end of text that is an added token", tokenizer),
        ("tokenizer fits", "no more ids than the embedding has rows", fits),
    ):
        checks.ask(name, bound, check)


@dataclass(frozen=True)
class Figures:
    """Summary of a tensor: count of values that are not finite; of the others lowest, highest, root mean square, and the
    share below an eighth of the root mean square."""

    not_finite: int
    low: float
    high: float
    rms: float
    small: float


def figures_of(x: np.ndarray) -> Figures:
    """Summarise a tensor, CHUNK elements at a time."""
    flat, bad, squares, count = x.reshape(-1), 0, 0.0, 0
    low, high = np.inf, -np.inf
    for at in range(0, flat.size, CHUNK):
        part = flat[at : at + CHUNK].astype(np.float64)
        good = part[np.isfinite(part)]
        bad += part.size - good.size
        if good.size:
            low, high = min(low, float(good.min())), max(high, float(good.max()))
            squares += float(good @ good)
            count += good.size
    rms, small = (squares / max(count, 1)) ** 0.5, 0
    if x.ndim > 1 and rms > 0:
        for at in range(0, flat.size, CHUNK):
            part = flat[at : at + CHUNK].astype(np.float64)
            small += int(np.count_nonzero(np.abs(part) < rms / 8))
    return Figures(bad, low, high, rms, small / max(count, 1))


def _layout(s: Subject) -> Layout:
    cfg, tensors = s.need_cfg(), s.need_tensors()
    if cfg.num_layers > max(len(tensors), 1):
        raise Refused(
            f"{plural(cfg.num_layers, 'layer')} in the config, but only {plural(len(tensors), 'tensor')}"
        )
    return Layout(cfg)


def _vocabulary_differs(listed: Any, text: str) -> str | None:
    """Describe where the vocabulary in its own metadata key contradicts tokenizer.json; None when they agree."""
    meta: dict[str, Any] = {}
    embed_tokenizer(meta, text, None)
    want = meta["tokenizer.vocabulary"]
    if not isinstance(listed, list) or len(listed) != len(want):
        have = plural(len(listed) if isinstance(listed, list) else 0, "token")
        return f"tokenizer.vocabulary has {have}, tokenizer.json {len(want)}"
    at = next((i for i, (a, b) in enumerate(zip(listed, want, strict=True)) if a != b), None)
    return (
        None
        if at is None
        else f"id {at} is {listed[at]!r} in tokenizer.vocabulary, {want[at]!r} in tokenizer.json"
    )


def few(names: list[str]) -> str:
    """Join the first MAX_NAMES texts and count the others."""
    return "; ".join(names[:MAX_NAMES]) + (
        f"; and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    )
