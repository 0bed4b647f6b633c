"""Is a checkpoint fit to ship? What `apr validate` asks, and then what the model does: read, write, export, speed.

A model that training never reached passes every check of its file. So it is given real text, of several kinds, and must
predict one of them far better than the frequencies of the tokens do; and what it writes must not be a loop.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.exporting import export_hf
from ..checkpoints.registry import open_any
from ..checkpoints.validate import validate
from ..common.errors import AprError
from ..common.finding import FAIL, Checklist, Fault, Skip
from ..inference.generate import generate
from ..model.config import ModelConfig
from ..model.cost import check_fits, memory
from ..model.transformer import Model
from ..tokenizer.import_hf import PROBE
from ..tokenizer.tokenizer import Tokenizer

WINDOW = 256  # tokens of a pass: all their logits exist at once
MOST_TOKENS = 4096  # of a text
LEAST_TOKENS = 48  # of a text, below which its frequencies say nothing
BELOW = 0.9  # of the entropy of token frequencies: the loss must be below
SAMPLES, NEW = 3, 96  # texts that are written, and tokens of each
TEMPERATURE = 0.8
DISTINCT = 0.5  # of the trigrams of what is written
COMMONEST = 0.4  # share of one token in what is written
LONGEST_CYCLE, CYCLE_TOKENS = 16, 48  # the last tokens must not repeat a piece of at most so many

TEXTS = {  # kinds of text that small models are trained on; one of them must be predictable
    "story": """Once upon a time there was a little girl named Lily. She lived in a small house near the forest with her \
mom and her dad. One day, Lily went outside to play in the garden. She saw a big red ball under the tree. "Mom, look!" \
she said. "I found a ball!" Her mom smiled and said, "That is a nice ball. Maybe it belongs to Tom." Lily was sad, because \
she wanted to keep the ball. But she knew that Tom would miss it. So she took the ball to his house and knocked on the \
door. Tom was very happy to see his ball again. He said, "Thank you, Lily! Do you want to play with me?" Lily smiled, and \
they played together in the park all day. At the end of the day, they were tired and went home. Lily was happy that she \
had made a new friend.""",
    "python": '''import os
import sys


class Reader:
    """Read lines from a file and count them."""

    def __init__(self, path, encoding="utf-8"):
        self.path = path
        self.encoding = encoding
        self.lines = []

    def read(self):
        """Return the list of lines, without line ends."""
        if not os.path.exists(self.path):
            raise FileNotFoundError(self.path)
        with open(self.path, encoding=self.encoding) as f:
            for line in f:
                line = line.rstrip("\\n")
                if not line or line.startswith("#"):
                    continue
                self.lines.append(line)
        return self.lines

    def __len__(self):
        return len(self.lines)


def main(argv=None):
    if argv is None:
        argv = sys.argv[1:]
    for name in argv:
        reader = Reader(name)
        reader.read()
        print(name, len(reader))
    return 0


if __name__ == "__main__":
    sys.exit(main())
''',
    "article": """The history of the city begins in the twelfth century, when the first stone bridge was built over the \
river. In the following years the town became an important centre of trade, and its population grew to more than ten \
thousand people. The old church, which was completed in 1348, is one of the largest buildings of its kind in the country. \
During the war the city was destroyed in part, but most of the houses in the old town were built again in the same style. \
Today the city is known for its university, which was founded in 1477, and for its many museums and parks. According to \
the last census, it has a population of about 90,000, of whom a third are students. The main industries are medicine, \
research and tourism. There is a railway station in the centre of the city, with trains to all the larger cities of the \
region.""",
}


@dataclass(frozen=True)
class Passage:
    """A text as the model sees it: ids (n,), with what its tokenizer puts before a text."""

    name: str
    ids: np.ndarray

    @property
    def entropy(self) -> float:
        """Nats per token of a predictor that knows how often each token occurs in this very text, and nothing else."""
        counts = np.array(list(Counter(self.ids.tolist()).values()), np.float64)
        p = counts / counts.sum()
        return float(-(p * np.log(p)).sum())


@dataclass
class Reading:
    """What the model made of a passage: mean loss in nats, all logits finite, figures of how they vary, their hash."""

    loss: float
    finite: bool
    choices: int  # different most likely tokens over the positions
    positions: int
    spread: float  # of each id's logit over the positions, root mean square over ids
    sha256: str


class Subject:
    """A checkpoint on a backend, opened once."""

    def __init__(
        self, source: str, backend: ModuleType, dtype: str, texts: dict[str, str], tell: Callable[[str], None]
    ) -> None:
        self.source, self.backend, self.dtype, self.texts, self.tell = source, backend, dtype, texts, tell

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return open_any(self.source)

    @property
    def loaded(self) -> Checkpoint:
        try:
            return self.checkpoint
        except AprError as e:
            raise Skip(f"it does not load: {e}") from None

    @property
    def cfg(self) -> ModelConfig:
        return self.loaded.cfg

    @cached_property
    def tokenizer(self) -> Tokenizer:
        try:
            tokenizer = self.loaded.tokenizer
        except AprError as e:
            raise Skip(f"its tokenizer cannot be used: {e}") from None
        if tokenizer is None:
            raise Skip("no tokenizer")
        return tokenizer

    @cached_property
    def passages(self) -> list[Passage]:
        most = MOST_TOKENS // (1 if len(self.texts) == 1 else 4)
        found = [
            Passage(n, self.tokenizer.encode(t, add_special_tokens=True)[:most].astype(np.int64))
            for n, t in self.texts.items()
        ]
        long = [p for p in found if len(p.ids) >= LEAST_TOKENS]
        if not long:
            raise Skip(f"the text has fewer than {LEAST_TOKENS} tokens; give a longer one with --text")
        return long

    @cached_property
    def weights(self) -> Any:
        self.tell("loading the weights")
        return self.loaded.on(self.backend, self.dtype)

    @cached_property
    def readings(self) -> dict[str, Reading]:
        return {p.name: self.read(p, self.weights) for p in self.passages}

    def read(self, passage: Passage, weights: Any) -> Reading:
        """One pass over a passage, in windows."""
        self.tell(f"reading the {passage.name}")
        window = min(WINDOW, self.cfg.max_position_embeddings, len(passage.ids))
        need = memory(
            self.cfg, self.backend, 1, window, self.dtype, train=False, loss_rows=window, optimizer=None
        )
        check_fits(need, self.backend, "check a smaller model")
        model = Model(self.cfg, self.backend, 1, window, self.dtype, train=False, loss_rows=window, w=weights)
        logits: list[np.ndarray] = []

        def keep(layer: int | None, name: str, x: Any) -> None:
            if name == "logits":
                logits.append(np.array(self.backend.to_host(x), np.float32)[:, : self.cfg.vocab_size])

        digest, total, count, finite = hashlib.sha256(), 0.0, 0, True
        choices: set[int] = set()
        squares, spreads = 0, 0.0
        ids = passage.ids
        for at in range(0, len(ids) - window + 1, window):
            part = ids[at : at + window]
            targets = np.full((1, window), -100, np.int32)
            targets[0, :-1] = part[1:]
            logits.clear()
            model.forward(part[None].astype(np.int32))
            model.loss(targets, tap=keep)
            rows = np.concatenate(logits)
            digest.update(rows.tobytes())
            finite = finite and bool(np.isfinite(rows).all())
            choices |= set(rows.argmax(1).tolist())
            spreads, squares = spreads + float(np.sqrt(rows.astype(np.float64).var(0).mean())), squares + 1
            wide = rows[:-1].astype(np.float64)
            top = wide.max(1, keepdims=True)
            losses = np.log(np.exp(wide - top).sum(1)) + top[:, 0] - wide[np.arange(window - 1), part[1:]]
            total, count = total + float(losses.sum()), count + window - 1
        return Reading(
            total / count, finite, len(choices), count + squares, spreads / squares, digest.hexdigest()
        )

    @cached_property
    def best(self) -> Passage:
        """The passage that the model knows best, against the entropy of its tokens."""
        readings = self.readings

        def rank(p: Passage) -> float:
            r = readings[p.name].loss / max(p.entropy, 1e-9)
            return r if math.isfinite(r) else math.inf

        return min(self.passages, key=rank)

    @cached_property
    def written(self) -> tuple[list[list[int]], float]:
        """Continuations of the first tokens of the best passage, and tokens per second with a key/value cache."""
        positions = self.cfg.max_position_embeddings
        prompt = self.best.ids[: max(1, min(24, positions // 4))].tolist()
        self.tell("writing")
        list(self._write(prompt, 0, 2))  # what is compiled at its first use is compiled here
        start, texts = time.perf_counter(), []
        for seed in range(SAMPLES):
            texts.append(self._write(prompt, seed, NEW))
        return texts, sum(map(len, texts)) / (time.perf_counter() - start)

    def _write(self, prompt: Sequence[int], seed: int, most: int) -> list[int]:
        eos = self.tokenizer.eos_id
        return list(
            generate(
                self.cfg, self.backend, self.weights, prompt, most,
                temperature=TEMPERATURE, seed=seed, eos_id=eos, dtype=self.dtype,
            )
        )  # fmt: skip


def qa(
    source: str,
    backend: ModuleType,
    dtype: str,
    text: str | None = None,
    min_tokens_per_sec: float = 1.0,
    tell: Callable[[str], None] = lambda text: None,
) -> Checklist:
    """The ship checklist of a checkpoint.

    text: what it must know, instead of TEXTS. min_tokens_per_sec: of writing; 0 leaves that row SKIPPED. tell: called with
    what is being done. A check that cannot be asked is SKIPPED with the reason, never passed. Raises InputNotFound."""
    tell("validating")
    valid = validate(source)
    checks = Checklist()
    s = Subject(source, backend, dtype, TEXTS if text is None else {"text": text}, tell)

    def whole() -> str:
        wrong = [r.name for r in valid.findings if r.verdict == FAIL]
        if wrong:
            raise Fault(f"{', '.join(wrong)}: see apr validate {source}")
        return valid.counts()

    def loads() -> str:
        loaded = s.checkpoint
        return f"{loaded.cfg.family}, weights {loaded.sha256[:12]}"

    def tokenizer() -> str:
        if s.loaded.tokenizer_json is None:
            raise Fault("none in it: nobody could give it text; import or train with one")
        if s.loaded.tokenizer.eos_id is None:  # type: ignore[union-attr]
            raise Fault("it names no end of text, so no answer would end")
        return f"{s.tokenizer.vocab_size:,} ids, end of text {s.tokenizer.eos_token!r} ({s.tokenizer.eos_id})"

    def round_trip() -> str:
        tok, count = s.tokenizer, 0
        for name, t in {**s.texts, "probe": PROBE}.items():
            if why := tok.check_round_trip(t):
                raise Fault(f"{name}: {why}")
            count += len(t)
        return f"{count:,} characters come back"

    def finite() -> str:
        wrong = [n for n, r in s.readings.items() if not r.finite]
        if wrong:
            raise Fault(f"NaN or infinity on the {', '.join(wrong)}")
        return f"{sum(r.positions for r in s.readings.values()):,} positions"

    def vary() -> str:
        r = s.readings[s.best.name]
        figure = f"{r.choices} different most likely tokens at {r.positions} positions, spread {r.spread:.3g}"
        if not (r.choices > max(2, r.positions // 50) and r.spread > 1e-3):
            raise Fault(figure)
        return figure

    def loss() -> str:
        figures = [f"{p.name} {s.readings[p.name].loss:.3f} of {p.entropy:.3f}" for p in s.passages]
        figure = f"{', '.join(figures)} nats/token"
        if not s.readings[s.best.name].loss < BELOW * s.best.entropy:
            raise Fault(figure)
        return figure

    def repeats() -> str:
        texts = [t for t in s.written[0] if len(t) >= 8]
        if not texts:
            raise Fault(f"each of {SAMPLES} texts ends within 8 tokens")
        grams = [[tuple(t[i : i + 3]) for i in range(len(t) - 2)] for t in texts]
        distinct = sum(len(set(g)) for g in grams) / sum(map(len, grams))
        share = max(Counter(t).most_common(1)[0][1] / len(t) for t in texts)
        figure = f"{distinct:.0%} of trigrams distinct, the commonest token {share:.0%}"
        if not (distinct >= DISTINCT and share <= COMMONEST):
            raise Fault(figure)
        return figure

    def endless() -> str:
        ends = 0
        for t in s.written[0]:
            ends += bool(t) and t[-1] == s.tokenizer.eos_id
            if (period := cycle(t)) is not None:
                raise Fault(f"the last {CYCLE_TOKENS} tokens repeat a piece of {period}")
        return f"no text of {SAMPLES} ends in a loop; {ends} reached the end of text within {NEW} tokens"

    def export() -> str:
        want = s.readings[s.best.name].sha256
        tell("exporting and reading back")
        with TemporaryDirectory(prefix="apr-qa-") as folder:
            export_hf(s.checkpoint, Path(folder) / "hf")
            again = open_any(str(Path(folder) / "hf"))
            got = s.read(s.best, again.on(backend, dtype))
            tok = again.tokenizer
        if got.sha256 != want:
            raise Fault(
                f"other logits after export and reload: loss {got.loss:.6f}, before {s.readings[s.best.name].loss:.6f}"
            )
        if tok is None or tok.encode(PROBE).tolist() != s.tokenizer.encode(PROBE).tolist():
            raise Fault("another tokenizer after export and reload")
        return f"logits of {got.positions} positions have equal bits after Hugging Face export and reload"

    def speed() -> str:
        rate = s.written[1]
        figure = f"{rate:.1f} tokens/s on {backend.name}, {dtype}"
        if min_tokens_per_sec <= 0:
            raise Skip(f"{figure}; no bound was given")
        if not rate >= min_tokens_per_sec:
            raise Fault(figure)
        return figure

    for name, bound, check in (
        ("validate", "no check of the file fails", whole),
        ("loads", "config, names and shapes agree", loads),
        ("tokenizer", "embedded, with an end of text", tokenizer),
        ("tokenizer round trip", "decode inverts encode", round_trip),
        ("logits finite", "no NaN or infinity", finite),
        ("logits vary", "they depend on the position", vary),
        ("loss on text", f"below {BELOW} of the entropy of token frequencies, on one text at least", loss),
        (
            "writes no repetitions",
            f"at least {DISTINCT:.0%} of trigrams distinct, no token above {COMMONEST:.0%}",
            repeats,
        ),
        (
            "writes no loop",
            f"the last {CYCLE_TOKENS} tokens are no piece of at most {LONGEST_CYCLE} repeated",
            endless,
        ),
        ("export and reload", "equal bits of all logits, equal tokenizer", export),
        ("speed", f"at least {min_tokens_per_sec:g} tokens/s", speed),
    ):
        checks.ask(name, bound, check)
    return checks


def cycle(tokens: Sequence[int]) -> int | None:
    """Length of the piece that the last CYCLE_TOKENS tokens repeat, None when they do not."""
    tail = list(tokens[-CYCLE_TOKENS:])
    if len(tail) < CYCLE_TOKENS:
        return None
    return next((p for p in range(1, LONGEST_CYCLE + 1) if tail[p:] == tail[:-p]), None)
