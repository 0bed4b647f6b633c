"""Ship checklist of a checkpoint: all of `apr validate`, then reading, writing, export and speed.

A model that training never reached passes every check of its file. It must therefore predict one of several texts far
better than token frequencies do, and its own text must be no loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

from ..checkpoints.exporting import export_hf
from ..checkpoints.registry import open_any, validate
from ..common.finding import FAIL, Checklist, Fault, Skip
from ..common.shell import word
from ..common.units import plural
from ..tokenizer.import_hf import PROBE
from .reading import SAMPLE_TOKENS, SAMPLES, Specimen
from .texts import TEXTS

MAX_LOSS_SHARE = 0.9  # of the entropy of token frequencies
MIN_DISTINCT_TRIGRAMS, MAX_TOKEN_SHARE = 0.5, 0.4  # of a sample
MIN_SAMPLE_TOKENS = 8  # of a sample whose repetitions are counted
# The last LOOP_TOKENS of a sample must not repeat a piece of at most MAX_CYCLE_TOKENS.
MAX_CYCLE_TOKENS, LOOP_TOKENS = 16, 48


def qa(
    source: str,
    backend: ModuleType,
    dtype: str,
    text: str | None = None,
    min_tokens_per_sec: float = 1.0,
    tell: Callable[[str], None] = lambda text: None,
) -> Checklist:
    """Make all checks of a checkpoint. A check that cannot be made is SKIPPED with the reason, never passed.

    text                text that the model must know, instead of TEXTS
    min_tokens_per_sec  of writing; 0: the check of the speed is SKIPPED
    tell                is called with the work that begins

    Raises InputNotFound."""
    tell("validating")
    of_file = validate(source)
    texts = TEXTS if text is None else {"text": text}
    s = Specimen(source, backend, dtype, texts, tell)
    entropy = "of the entropy of token frequencies, on one text at least"
    checks = Checklist()
    for name, bound, check in (
        ("validate", "no check of the file fails", lambda: _file(source, of_file)),
        ("loads", "config, names and shapes agree", lambda: _loads(s)),
        ("tokenizer", "embedded, with an end of text", lambda: _tokenizer(s)),
        ("tokenizer round trip", "decode inverts encode", lambda: _round_trip(s)),
        ("logits finite", "no NaN or infinity", lambda: _finite(s)),
        ("logits vary", "they depend on the position", lambda: _vary(s)),
        ("loss on text", f"below {MAX_LOSS_SHARE} {entropy}", lambda: _loss(s)),
        (
            "writes no repetitions",
            f"at least {MIN_DISTINCT_TRIGRAMS:.0%} of trigrams distinct, no token above {MAX_TOKEN_SHARE:.0%}",
            lambda: _repetitions(s),
        ),
        (
            "writes no loop",
            f"the last {LOOP_TOKENS} tokens are no piece of at most {MAX_CYCLE_TOKENS} repeated",
            lambda: _loops(s),
        ),
        ("export and reload", "equal bits of all logits, equal tokenizer", lambda: _export(s)),
        ("speed", f"at least {min_tokens_per_sec:g} tokens/s", lambda: _speed(s, min_tokens_per_sec)),
    ):
        checks.ask(name, bound, check)
    return checks


def _file(source: str, of_file: Checklist) -> str:
    failed = [f.name for f in of_file.findings if f.verdict == FAIL]
    if failed:
        raise Fault(f"{', '.join(failed)}: see apr validate {word(source)}")
    return of_file.counts()


def _loads(s: Specimen) -> str:
    return f"{s.checkpoint.cfg.family}, weights {s.checkpoint.sha256[:12]}"


def _tokenizer(s: Specimen) -> str:
    if s.loaded.tokenizer_json is None:
        raise Fault("none in it: nobody could give it text; import or train with one")
    if s.loaded.tokenizer.eos_id is None:  # type: ignore[union-attr]
        raise Fault("it names no end of text, so no answer would end")
    return f"{plural(s.tokenizer.vocab_size, 'id')}, end of text {s.tokenizer.eos_token!r} ({s.tokenizer.eos_id})"


def _round_trip(s: Specimen) -> str:
    count = 0
    for name, text in {**s.texts, "probe": PROBE}.items():
        if why := s.tokenizer.check_round_trip(text):
            raise Fault(f"{name}: {why}")
        count += len(text)
    return f"{plural(count, 'character')} come back"


def _finite(s: Specimen) -> str:
    broken = [name for name, r in s.readings.items() if not r.is_finite]
    if broken:
        raise Fault(f"NaN or infinity on the {', '.join(broken)}")
    return f"{plural(sum(r.positions for r in s.readings.values()), 'position')}"


def _vary(s: Specimen) -> str:
    r = s.readings[s.best.name]
    figure = f"{r.choices} different most likely tokens at {plural(r.positions, 'position')}, spread {r.spread:.3g}"
    if not (r.choices > max(2, r.positions // 50) and r.spread > 1e-3):
        raise Fault(figure)
    return figure


def _loss(s: Specimen) -> str:
    figures: dict[bool, list[str]] = {True: [], False: []}
    for p in s.passages:
        loss = s.readings[p.name].loss
        figures[loss < MAX_LOSS_SHARE * p.entropy].append(f"{p.name} {loss:.3f} of {p.entropy:.3f}")
    parts = [
        f"{word}: {', '.join(figures[known])}"
        for known, word in ((True, "knows"), (False, "does not know"))
        if figures[known]
    ]
    figure = f"{'; '.join(parts)} nats/token"
    if not s.readings[s.best.name].loss < MAX_LOSS_SHARE * s.best.entropy:
        raise Fault(figure)
    return figure


def _repetitions(s: Specimen) -> str:
    texts = [t for t in s.samples[0] if len(t) >= MIN_SAMPLE_TOKENS]
    if not texts:
        raise Fault(f"each of {SAMPLES} texts ends within {MIN_SAMPLE_TOKENS} tokens")
    trigrams = [[tuple(t[i : i + 3]) for i in range(len(t) - 2)] for t in texts]
    distinct = sum(len(set(g)) for g in trigrams) / sum(map(len, trigrams))
    share = max(Counter(t).most_common(1)[0][1] / len(t) for t in texts)
    figure = f"{distinct:.0%} of trigrams distinct, the commonest token {share:.0%}"
    if not (distinct >= MIN_DISTINCT_TRIGRAMS and share <= MAX_TOKEN_SHARE):
        raise Fault(figure)
    return figure


def _loops(s: Specimen) -> str:
    ends = 0
    for tokens in s.samples[0]:
        ends += bool(tokens) and tokens[-1] in s.loaded.end_ids()
        if (period := cycle(tokens)) is not None:
            raise Fault(f"the last {LOOP_TOKENS} tokens repeat a piece of {period}")
    return (
        f"no text of {SAMPLES} ends in a loop; {ends} reached the end of text within {SAMPLE_TOKENS} tokens"
    )


def _export(s: Specimen) -> str:
    before = s.readings[s.best.name]
    s.tell("exporting and reading back")
    with TemporaryDirectory(prefix="apr-qa-") as folder:
        export_hf(s.checkpoint, Path(folder) / "hf")
        reloaded = open_any(str(Path(folder) / "hf"))
        after = s.read(s.best, reloaded.on(s.backend, s.dtype))
        tokenizer = reloaded.tokenizer
    if after.sha256 != before.sha256:
        raise Fault(f"other logits after export and reload: loss {after.loss:.6f}, before {before.loss:.6f}")
    if tokenizer is None or tokenizer.encode(PROBE).tolist() != s.tokenizer.encode(PROBE).tolist():
        raise Fault("another tokenizer after export and reload")
    return f"logits of {plural(after.positions, 'position')} have equal bits after Hugging Face export and reload"


def _speed(s: Specimen, min_tokens_per_sec: float) -> str:
    rate = s.samples[1]
    figure = f"{rate:.1f} tokens/s on {s.backend.name}, {s.dtype}"
    if min_tokens_per_sec <= 0:
        raise Skip(f"{figure}; no bound was given")
    if not rate >= min_tokens_per_sec:
        raise Fault(figure)
    return figure


def cycle(tokens: Sequence[int]) -> int | None:
    """Length of the piece that the last LOOP_TOKENS tokens repeat; None without one."""
    tail = list(tokens[-LOOP_TOKENS:])
    if len(tail) < LOOP_TOKENS:
        return None
    return next((p for p in range(1, MAX_CYCLE_TOKENS + 1) if tail[p:] == tail[:-p]), None)
