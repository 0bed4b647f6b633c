"""Instruction data: conversations as a chat template renders them, a loss on the answers only, packed into windows.

A folder of packed windows holds, for each side, `ids.bin` (uint32) and `trained.bin` (uint8), both (rows, seq_length + 1),
and instruct.json. trained is 1 where a token is to be predicted: a token of an answer, or the one that ends its turn.
Several examples share a row. Behind each stands the separator, an id that occurs inside none of them, and attention stops
there (Model.document_end), so an example is computed as if it were alone. Where every id of the vocabulary occurs, a row
holds one example. What is left of a row is filled with the separator, and no loss is computed there.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer as Engine

from ...common.atomic import locked, write_json
from ...common.errors import InputNotFound, IOFailure, MalformedFile, Refused
from ...common.files import make_folder, read_json
from ...common.finding import Finding
from ...tokenizer.tokenizer import Tokenizer
from ..audit import Split
from ..corpus import Corpus
from ..documents import Document, Item, is_held_out
from ..find import find_sources
from ..guards import USUAL, Bounds, enforce, fits_model
from ..jsonl import read_jsonl
from ..manifest import figures
from ..seen import Seen
from ..shards import TokenShards
from ..source import Skipped, Source

if TYPE_CHECKING:
    from ...tokenizer.chat_template import ChatTemplate

FORMAT = "apr-instruct-1"
RECORD = "instruct.json"
IGNORED = -100
BATCH = 256  # examples that are encoded at once
ROWS = 1024  # rows that are written or scanned at once
EVERY_FIRST, SAMPLED = (
    16,
    256,
)  # the first so many examples, and then one of so many, must come back from their ids
OPEN, CLOSE = "\ufdd0", "\ufdd1"  # no characters: they mark answers in what a template renders
ROLES = ("system", "user", "assistant", "tool")
# The prompt that the Alpaca data was made for (Taori et al. 2023), for checkpoints without a chat template.
ALPACA = (
    "Below is an instruction that describes a task{with_input}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all
Spans = list[tuple[int, int]]  # characters [start, end) of a text


class Unsuitable(Exception):
    """Why an example cannot be trained on; becomes a Skipped under its name."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Example(Document):
    """One record. text: its content as JSON; messages, and prompt and response where it was written as those."""

    messages: tuple[dict[str, Any], ...] = ()
    prompt: str = ""
    response: str = ""


class Conversations(Corpus):
    """The examples of JSON Lines files, packed or not; what cannot be used is a Skipped with its line."""

    def _read(self, source: Source, advance: Callable[[int], None]) -> Iterator[Item]:
        return read_jsonl(source, _record, advance)


def _record(name: str, line: bytes) -> Item:
    """Parse a record. Numbers stay what they are: a template may write them."""
    try:
        return example_of(name, json.loads(line.decode()))
    except (ValueError, RecursionError) as e:
        return Skipped(name, "broken JSON", str(e))
    except Unsuitable as e:
        return Skipped(name, e.reason, e.detail)


def open_conversations(path: str) -> Conversations:
    """The JSON Lines files of a path. Raises InputNotFound, Refused: another kind of file."""
    found = find_sources([path])
    other = [s for s in found if s.kind != "jsonl"]
    if other and (len(other) == len(found) or not Path(path).is_dir()):
        raise Refused(
            f"--instruct {other[0].path}: not JSON Lines; give a .jsonl file (also .jsonl.gz, .jsonl.zst), one object a line: "
            '{"messages": [{"role": ..., "content": ...}, ...]} or {"prompt": ..., "response": ...}'
        )
    for source in other:  # a README beside the data
        found.remove(source)
    return Conversations(found)


def example_of(name: str, value: Any) -> Example:
    """The example in a record, whichever of the usual ways it is written in. Raises Unsuitable."""
    if not isinstance(value, dict):
        raise Unsuitable("not an object", f"the record is {type(value).__name__}")
    if "messages" in value:
        return _conversation(name, value)
    if "instruction" in value and "output" in value:
        instruction, more = _text(value, "instruction"), _text(value, "input") if value.get("input") else ""
        prompt = ALPACA.format(
            with_input=", paired with an input that provides further context" if more else "",
            instruction=instruction,
            input=f"### Input:\n{more}\n\n" if more else "",
        )
        asked = f"{instruction}\n\n{more}" if more else instruction
        return _pair(name, asked, prompt, _text(value, "output"))
    for key in ("response", "completion"):
        if "prompt" in value and key in value:
            prompt = _text(value, "prompt")
            return _pair(name, prompt, prompt, _text(value, key))
    keys = ", ".join(map(repr, list(value)[:10]))
    raise Unsuitable(
        "no field",
        f"there is {keys or 'nothing'}; wanted messages, or prompt and response, or instruction and output",
    )


def _text(value: dict[str, Any], key: str) -> str:
    text = value[key]
    if not isinstance(text, str):
        raise Unsuitable("not a string", f"{key} is {type(text).__name__}")
    _check_characters(text, key)
    return text


def _check_characters(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise Unsuitable("not Unicode", f"{where}: half a surrogate pair at character {e.start}") from None
    if OPEN in text or CLOSE in text:
        raise Unsuitable("not Unicode", f"{where}: U+FDD0 or U+FDD1, which are no characters")


def _pair(name: str, asked: str, prompt: str, response: str) -> Example:
    if not response.strip():
        raise Unsuitable("no answer", "the response is empty")
    messages = ({"role": "user", "content": asked}, {"role": "assistant", "content": response})
    return Example(name, _canonical([prompt, response]), messages, prompt, response)


def _conversation(name: str, value: dict[str, Any]) -> Example:
    messages = value["messages"]
    if not isinstance(messages, list) or not messages:
        raise Unsuitable("not a list", "messages is no list, or empty")
    if value.get("tools"):
        raise Unsuitable("tools", "the record has tools, which are not rendered")
    for i, m in enumerate(messages):
        if not isinstance(m, dict) or m.get("role") not in ROLES:
            role = m.get("role") if isinstance(m, dict) else m
            raise Unsuitable("role", f"messages[{i}] has role {role!r}, not one of {', '.join(ROLES)}")
        if not isinstance(m.get("content"), str):
            raise Unsuitable("not a string", f"messages[{i}].content is {type(m.get('content')).__name__}")
        _check_characters(m["content"], f"messages[{i}]")
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        raise Unsuitable("no answer", "no message of the assistant has text")
    return Example(name, _canonical(messages), tuple(messages))


def _canonical(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


# From an example to ids and which of them are the answers


class Renderer:
    """A chat template: the text of a conversation, and where the answers stand in it.

    They are what the template puts between {% generation %} and {% endgeneration %}, where it has those. Otherwise an answer
    is what the conversation up to and with it has more than the conversation before it with the generation prompt; both must
    be the beginning of the whole text. White space behind the special token that ends a turn is no part of an answer.
    Today's date is not there to be written: the same examples would be others tomorrow. Templates that ask whether it is
    have a date of their own."""

    def __init__(self, template: ChatTemplate, special: Iterable[str] = ()) -> None:
        self._marked = re.search(r"{%[-+]?\s*generation\s*[-+]?%}", template.text) is not None
        self._template = _marking(template)
        found = "|".join(re.escape(s) for s in sorted(special, key=len, reverse=True))
        self._special = re.compile(found) if found else None

    def _render(self, messages: list[dict[str, Any]], prompt: bool) -> str:
        try:
            return self._template.render(messages, prompt)
        except Refused as e:
            raise Unsuitable("refused by the template", str(e)) from None

    def __call__(self, example: Example) -> tuple[str, Spans]:
        """Text and answers. Raises Unsuitable; Refused: the beginning of a conversation is rendered otherwise than the whole."""
        messages = list(example.messages)
        whole = self._render(messages, False)
        if self._marked:
            return _unmark(whole)
        spans = []
        for k, m in enumerate(messages):
            if m["role"] != "assistant" or not m["content"].strip():
                continue
            before = self._render(messages[:k], True)
            after = whole if k + 1 == len(messages) else self._render(messages[: k + 1], False)
            for part in (before, after):
                if not whole.startswith(part):
                    self._refuse(example, k, part, whole)
            spans.append((len(before), len(before) + len(self._turn(after[len(before) :]))))
        return whole, spans

    def _turn(self, text: str) -> str:
        """Without white space behind the last special token: at that token generation stops."""
        found = list(self._special.finditer(text)) if self._special else []
        end = found[-1].end() if found else len(text)
        return text if text[end:].strip() else text[:end]

    @staticmethod
    def _refuse(example: Example, k: int, part: str, whole: str) -> None:
        at = next(
            (i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b),
            min(len(part), len(whole)),
        )
        raise Refused(
            f"{example.name}: the chat template writes a conversation up to message {k + 1} otherwise than as the beginning of "
            f"the whole: from character {at} on {part[at : at + 30]!r} for {whole[at : at + 30]!r}, so nothing says which tokens "
            "are that answer; put {% generation %} and {% endgeneration %} around the answers in the template "
            "(--chat-template FILE), or keep one answer to an example"
        )


def _marking(template: ChatTemplate) -> ChatTemplate:
    """The same template, writing OPEN and CLOSE around what stands in {% generation %} blocks, and no date of today."""
    from ...tokenizer.chat_template import ChatTemplate

    own = ChatTemplate(template.text, template.source, template.tokens)
    environment = own._compiled.environment
    environment.globals.pop("strftime_now", None)
    for extension in environment.extensions.values():
        if "generation" in extension.tags:
            extension._same = lambda caller: f"{OPEN}{caller()}{CLOSE}"
    return own


def _unmark(text: str) -> tuple[str, Spans]:
    """A rendered text without OPEN and CLOSE, and what stood between them."""
    out, spans, size = [], [], 0
    for i, part in enumerate(re.split(f"[{OPEN}{CLOSE}]", text)):
        if i % 2 and part:
            spans.append((size, size + len(part)))
        out.append(part)
        size += len(part)
    return "".join(out), spans


@dataclass(frozen=True)
class Encoded:
    """ids (n,) uint32, trained (n,) bool, and the bytes of UTF-8 of the answers, special tokens not counted."""

    ids: np.ndarray
    trained: np.ndarray
    answer_bytes: int


class Encoder:
    """From examples to ids: with a chat template, or, without one, prompt, response and the end of the text."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None = None) -> None:
        self.tokenizer = tokenizer
        self._engine = _engine(tokenizer)
        special = [text for text in tokenizer.special_tokens().values() if text]
        found = "|".join(re.escape(s) for s in sorted(special, key=len, reverse=True))
        self._special = re.compile(found) if found else None
        self._renderer = Renderer(template, special) if template else None
        self._samples = 0

    def __call__(self, examples: Sequence[Example]) -> list[Encoded | Skipped]:
        """Each example, in their order. Raises Refused: see Renderer; messages without a template; ids that do not give
        the text back."""
        out: list[Encoded | Skipped] = []
        texts: list[str] = []
        spans: list[Spans] = []
        for e in examples:
            try:
                text, found = self._text(e)
                if not any(a < b for a, b in found):
                    raise Unsuitable("no answer", "the template writes no answer of it")
                texts.append(text)
                spans.append(found)
                out.append(_PENDING)
            except Unsuitable as u:
                out.append(Skipped(e.name, u.reason, u.detail))
        encoded = iter(
            zip(self._engine.encode_batch(texts, add_special_tokens=False), texts, spans, strict=True)
        )
        return [
            self._finish(*next(encoded), e) if o is _PENDING else o
            for o, e in zip(out, examples, strict=True)
        ]

    def _text(self, e: Example) -> tuple[str, Spans]:
        for m in e.messages:
            if self._special and (found := self._special.search(m["content"])):
                raise Unsuitable(
                    "special token in its text", f"{found[0]!r} in a message would become the token itself"
                )
        if self._renderer:
            return self._renderer(e)
        if not e.response:
            raise Refused(
                f"{e.name}: has messages, and the checkpoint has no chat template to write them with; give one with "
                "--chat-template FILE, or write the examples as prompt and response"
            )
        return e.prompt + e.response, [(len(e.prompt), len(e.prompt) + len(e.response))]

    def _finish(self, row: Any, text: str, spans: Spans, e: Example) -> Encoded | Skipped:
        ids = np.array(row.ids, np.uint32)
        offsets = np.array(row.offsets, np.int64).reshape(-1, 2)
        start = offsets[:, 0]
        end = np.maximum(offsets[:, 1], start + 1)  # a token may stand for no character
        trained = np.zeros(ids.size, bool)
        size = 0
        for a, b in spans:
            trained |= (start < b) & (end > a)
            plain = self._special.sub("", text[a:b]) if self._special else text[a:b]
            size += len(plain.encode())
        self._check_round_trip(ids, text, e)
        if self._renderer is None:
            eos = self.tokenizer.eos_id
            if eos is None:
                raise Refused(
                    f"{self.tokenizer.source}: no end-of-text id, so nothing would end a response; give a tokenizer with one, or "
                    "a --chat-template"
                )
            ids, trained = np.append(ids, np.uint32(eos)), np.append(trained, True)
        trained[:1] = False  # nothing comes before the first token, so nothing predicts it
        if not trained.any():
            return Skipped(e.name, "no answer", "no token of an answer")
        return Encoded(ids, trained, size)

    def _check_round_trip(self, ids: np.ndarray, text: str, e: Example) -> None:
        self._samples += 1
        if self._samples > EVERY_FIRST and self._samples % SAMPLED:
            return
        back = self._engine.decode(ids.tolist(), skip_special_tokens=False)
        want = self.tokenizer.normalize(text)
        if not self.tokenizer.byte_level:  # others may lose white space around special tokens
            back = self.tokenizer.normalize(back)
            back, want = ("".join(x.replace("\u2581", " ").split()) for x in (back, want))
        if back != want:
            at = next(
                (i for i, (a, b) in enumerate(zip(back, want, strict=False)) if a != b),
                min(len(back), len(want)),
            )
            raise Refused(
                f"{e.name}: encode, then decode is not the text: character {at}: got {back[at : at + 20]!r}, want "
                f"{want[at : at + 20]!r}; is {self.tokenizer.source} the tokenizer of this checkpoint?"
            )


_PENDING = Skipped("", "", "")


def _engine(tokenizer: Tokenizer) -> Engine:
    """The encoder of a tokenizer; unlike the tokenizer's own, it reads special tokens in a text."""
    engine = Engine.from_str(tokenizer.json)
    engine.no_truncation()
    engine.no_padding()
    return engine


def fit(e: Encoded, room: int) -> Encoded | None:
    """An example in at most `room` tokens: what stands behind its last answer goes first, then its beginning. An answer
    whose beginning is cut off is not trained on (its bytes are counted in proportion). None where no whole answer is left."""
    if e.ids.size <= room:
        return e
    end = int(np.flatnonzero(e.trained)[-1]) + 1
    start = max(0, end - room)
    ids, trained = e.ids[start:end], e.trained[start:end].copy()
    if start and trained[0]:
        stops = np.flatnonzero(~trained)
        trained[: int(stops[0]) if stops.size else trained.size] = False
    kept = int(trained.sum())
    return Encoded(ids, trained, e.answer_bytes * kept // int(e.trained.sum())) if kept else None


def pack(sizes: np.ndarray, room: int) -> list[list[int]]:
    """Indices of examples by row so that the sizes of a row, int64 (n,), sum to at most `room`: each goes, the longest
    first, into the row that it fills best (best fit decreasing)."""
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # rows by what is left in them
    lefts: list[int] = []  # the keys of by_room, sorted
    for i in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[i])
        at = bisect.bisect_left(lefts, size)
        if at < len(lefts):
            left = lefts[at]
            row = by_room[left].pop()
            if not by_room[left]:
                del by_room[left], lefts[at]
        else:
            row, left = len(rows), room
            rows.append([])
        rows[row].append(i)
        if left > size:
            if left - size not in by_room:
                bisect.insort(lefts, left - size)
            by_room.setdefault(left - size, []).append(row)
    return rows


# The folder


@dataclass
class Manifest:
    """instruct.json. tokens: of examples, without what fills the rows; trained: those that a loss is computed for;
    audit: the figures of guards.plausible, of the trained tokens."""

    side: str
    seq_length: int
    separator: int | None
    tokenizer_sha256: str
    template_sha256: str | None
    vocab_size: int
    rows: int = 0
    examples: int = 0
    tokens: int = 0
    trained: int = 0
    answer_bytes: int = 0
    duplicates: int = 0
    cut: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_first: str = ""
    ids_sha256: str = ""
    trained_sha256: str = ""
    examples_sha256: str = ""  # of the SHA-256 of the ids and labels of each, in their order
    audit: dict[str, Any] = field(default_factory=dict)
    format: str = FORMAT


@dataclass(frozen=True)
class Prepared:
    """FOLDER/train and FOLDER/val, and what could not be used."""

    folder: Path
    left_out: str

    @property
    def sides(self) -> dict[str, Path]:
        """The folders of both sides."""
        return {side: self.folder / side for side in ("train", "val")}


def prepare_instruct(
    path: str,
    root: Path,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    seq_length: int,
    val_fraction: float,
    progress: Progress | None = None,
) -> Prepared:
    """Render, encode and pack the examples of a path into a folder below `root`, named by all that determines it; one that
    is there and whole is used again. Copies are dropped, and the side of an example follows from its content alone.

    Raises InputNotFound, Refused: nothing to train on, a side without examples; IOFailure."""
    corpus = open_conversations(path)
    key = _key(corpus, tokenizer, template, seq_length, val_fraction)
    folder = root / key[:16]
    if not all((folder / side / RECORD).is_file() for side in ("train", "val")):
        make_folder(folder)
        job = _Job(corpus, Encoder(tokenizer, template), folder, seq_length, val_fraction, progress)
        template_sha = hashlib.sha256(template.text.encode()).hexdigest() if template else None
        try:
            with locked(folder, "encoding into it"):
                job.run(template_sha)
        except OSError as e:
            raise IOFailure(
                f"{e.filename or folder}: cannot write: {e.strerror}; make room or set APR_CACHE"
            ) from e
    return Prepared(folder, _left_out(folder))


def _key(
    corpus: Conversations,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    seq_length: int,
    val_fraction: float,
) -> str:
    rendering = [template.text, template.tokens] if template else None
    made_by = [FORMAT, tokenizer.sha256, tokenizer.eos_token, rendering, seq_length, val_fraction]
    digest = hashlib.sha256(_canonical(made_by).encode())
    for source in corpus.sources:
        digest.update(source.compression.encode() + b"\0")
        with open(source.path, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()


def _left_out(folder: Path) -> str:
    m = _read(folder / "train" / RECORD)
    said = [f"{n:,} {reason}" for reason, n in sorted(m.skipped.items())]
    text = f"examples that cannot be used: {', '.join(said)}; the first: {m.skipped_first}" if said else ""
    cut = (
        f"{m.cut:,} examples longer than {m.seq_length} tokens lost the beginning of their context"
        if m.cut
        else ""
    )
    return "\n".join(filter(None, (text, cut)))


class _Job:
    """One making of a folder: examples are encoded into files one behind the other, then packed into rows."""

    def __init__(
        self,
        corpus: Conversations,
        encoder: Encoder,
        folder: Path,
        seq_length: int,
        val_fraction: float,
        progress: Progress | None,
    ) -> None:
        self.corpus, self.encoder, self.folder, self.progress = corpus, encoder, folder, progress
        self.room, self.val_fraction = seq_length + 1, val_fraction
        vocab = encoder.tokenizer.vocab_size
        self.sides = {side: _Spool(folder / side, vocab) for side in ("train", "val")}
        self.skipped: dict[str, int] = {}
        self.first = ""
        self.duplicates = self.cut = 0

    def run(self, template_sha: str | None) -> None:
        with contextlib.ExitStack() as stack:
            for spool in self.sides.values():
                stack.enter_context(spool)
            seen = stack.enter_context(contextlib.closing(Seen()))
            items = iter(self._examples())
            while batch := list(islice(items, BATCH)):
                for e, got in zip(batch, self.encoder(batch), strict=True):
                    self._take(e, got, seen)
                if self.progress:
                    self.progress("encode examples", self.corpus.bytes_read, self.corpus.total_bytes)
            self._check()
            inside = self.sides["train"].inside + self.sides["val"].inside
            separator = _separator(inside, self.encoder.tokenizer)
            for side, spool in self.sides.items():
                t = self.encoder.tokenizer
                m = Manifest(side, self.room - 1, separator, t.sha256, template_sha, t.vocab_size)
                m.duplicates, m.cut, m.skipped, m.skipped_first = (
                    self.duplicates,
                    self.cut,
                    self.skipped,
                    self.first,
                )
                spool.pack(m)

    def _examples(self) -> Iterator[Example]:
        for item in self.corpus:
            if isinstance(item, Skipped):
                self._skip(item)
            elif isinstance(item, Example):
                yield item

    def _take(self, e: Example, got: Encoded | Skipped, seen: Seen) -> None:
        if isinstance(got, Skipped):
            return self._skip(got)
        fitted = fit(got, self.room)
        if fitted is None:
            detail = f"{got.ids.size} tokens, and no whole answer in {self.room}"
            return self._skip(Skipped(e.name, "longer than --seq-length", detail))
        sha = hashlib.sha256(fitted.ids.tobytes() + fitted.trained.tobytes()).hexdigest()
        if not seen.add(sha):
            self.duplicates += 1
            return None
        self.cut += fitted is not got
        self.sides["val" if is_held_out(sha, self.val_fraction) else "train"].add(fitted, sha)
        return None

    def _skip(self, item: Skipped) -> None:
        self.skipped[item.reason] = self.skipped.get(item.reason, 0) + 1
        self.first = self.first or f"{item.name}: {item.reason}: {item.detail}"

    def _check(self) -> None:
        counts = {side: len(s.sizes) for side, s in self.sides.items()}
        total = sum(counts.values())
        if not total:
            why = f"; the first that cannot be used: {self.first}" if self.first else ""
            raise Refused(f"--instruct {self.corpus}: no example to train on{why}")
        for side, n in counts.items():
            if not n:
                raise Refused(
                    f"--instruct {self.corpus}: --val-fraction {self.val_fraction} of {total} examples leaves none for {side}; "
                    "give another fraction, or more examples"
                )


class _Spool:
    """Examples of one side as they come, on disk; then the packed rows."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self.folder = make_folder(folder)
        self.sizes: list[int] = []
        self.bytes = 0
        self.inside = np.zeros(vocab_size, np.int64)  # how often each id stands before the end of an example
        self._digest = hashlib.sha256()
        self._paths = [folder / "examples.ids", folder / "examples.trained"]

    def __enter__(self) -> _Spool:
        self._files = [p.open("wb") for p in self._paths]
        return self

    def __exit__(self, *error: object) -> None:
        for f, p in zip(self._files, self._paths, strict=True):
            f.close()
            p.unlink(missing_ok=True)

    def add(self, e: Encoded, sha256: str) -> None:
        """One more example."""
        self._files[0].write(e.ids.astype("<u4").data)
        self._files[1].write(e.trained.astype(np.uint8).data)
        self.sizes.append(e.ids.size)
        self.bytes += e.answer_bytes
        self._digest.update(bytes.fromhex(sha256))
        np.add.at(self.inside, e.ids[:-1], 1)

    def pack(self, m: Manifest) -> None:
        """Write ids.bin, trained.bin and instruct.json."""
        for f in self._files:
            f.flush()
        ids = np.memmap(self._paths[0], "<u4", "r")
        trained = np.memmap(self._paths[1], np.uint8, "r")
        sizes = np.array(self.sizes, np.int64)
        ends = np.cumsum(sizes)
        room = m.seq_length + 1
        costs = np.full(sizes.size, room)
        if m.separator is not None:
            costs = np.minimum(sizes + (ids[ends - 1] != m.separator), room)
        rows = pack(costs, room)
        counts = np.zeros(m.vocab_size, np.int64)
        shas = hashlib.sha256(), hashlib.sha256()
        with open(self.folder / "ids.bin", "wb") as a, open(self.folder / "trained.bin", "wb") as b:
            for first in range(0, len(rows), ROWS):
                some = rows[first : first + ROWS]
                x = np.full((len(some), room), m.separator or 0, "<u4")
                y = np.zeros((len(some), room), np.uint8)
                for r, row in enumerate(some):
                    at = 0
                    for i in row:
                        part = slice(int(ends[i] - sizes[i]), int(ends[i]))
                        x[r, at : at + sizes[i]], y[r, at : at + sizes[i]] = ids[part], trained[part]
                        y[r, at] = 0  # the row's token before belongs to another example
                        at += int(costs[i])
                counts += np.bincount(x[y > 0], minlength=m.vocab_size)
                for f, digest, part_ in ((a, shas[0], x), (b, shas[1], y)):
                    f.write(part_.data)
                    digest.update(part_.data)
        m.rows, m.examples, m.tokens, m.trained = len(rows), sizes.size, int(ends[-1]), int(counts.sum())
        m.answer_bytes, m.examples_sha256 = self.bytes, self._digest.hexdigest()
        m.ids_sha256, m.trained_sha256 = (d.hexdigest() for d in shas)
        m.audit = figures(counts, m.answer_bytes, None)
        write_json(self.folder / RECORD, asdict(m))


def _separator(inside: np.ndarray, tokenizer: Tokenizer) -> int | None:
    """The id that stands between examples: the end of a text, or else the highest id that occurs inside none. What follows
    it does not see it and nothing is trained on it, so any will do. None where every id occurs."""
    eos = tokenizer.eos_id
    free = np.flatnonzero(inside == 0)
    if eos is not None and not inside[eos]:
        return eos
    return int(free[-1]) if free.size else None


def _read(path: Path) -> Manifest:
    """instruct.json. Raises MalformedFile."""
    d = read_json(path)
    fields = set(Manifest.__dataclass_fields__)
    if not isinstance(d, dict) or d.get("format") != FORMAT or set(d) != fields:
        raise MalformedFile(
            f"{path}: not a record of {FORMAT}; remove its folder, and the next run makes it anew"
        )
    return Manifest(**d)


class InstructShards:
    """One side of a folder, opened read-only; it has what TokenShards has for a run's records. Of the figures, total_tokens,
    unigram_entropy and total_bytes are those of the trained tokens: what a loss of answers is compared with.

    verify: read all of it and compare it with instruct.json. Raises InputNotFound, MalformedFile, Refused: another tokenizer."""

    def __init__(self, folder: str | Path, tokenizer: Tokenizer | None = None, verify: bool = True) -> None:
        self.folder = Path(folder)
        path = self.folder / RECORD
        if not path.is_file():
            raise InputNotFound(f"{path}: no such file; give the instruction data with --instruct")
        m = self.manifest = _read(path)
        if tokenizer and tokenizer.sha256 != m.tokenizer_sha256:
            raise Refused(
                f"{path}: encoded with tokenizer {m.tokenizer_sha256[:12]}, {tokenizer.source} is {tokenizer.sha256[:12]}"
            )
        shape = (m.rows, m.seq_length + 1)
        self.ids = _mapped(self.folder / "ids.bin", "<u4", shape)
        self.trained = _mapped(self.folder / "trained.bin", "u1", shape)
        self.vocab_size, self.tokenizer_sha256 = m.vocab_size, m.tokenizer_sha256
        self.total_tokens, self.total_bytes, self.total_documents = m.trained, m.answer_bytes, m.examples
        self.unigram_entropy: float = m.audit["unigram_entropy_nats"]
        self.sha256 = hashlib.sha256(
            f"{m.seq_length} {m.separator} {m.ids_sha256}{m.trained_sha256}".encode()
        ).hexdigest()
        self.counts = np.zeros(m.rows, np.int64)  # targets of each row
        for first in range(0, m.rows, ROWS):
            self.counts[first : first + ROWS] = self.trained[first : first + ROWS, 1:].sum(1, dtype=np.int64)
        if verify:
            self.check()

    def check(self) -> None:
        """Raises MalformedFile where the files are not what instruct.json says."""
        m = self.manifest
        for name, array, want in (
            ("ids.bin", self.ids, m.ids_sha256),
            ("trained.bin", self.trained, m.trained_sha256),
        ):
            digest = hashlib.sha256()
            for first in range(0, m.rows, ROWS):
                digest.update(np.ascontiguousarray(array[first : first + ROWS]).data)
            if digest.hexdigest() != want:
                raise MalformedFile(
                    f"{self.folder / name}: sha256 is {digest.hexdigest()[:12]}, {RECORD} says {want[:12]}; remove "
                    f"{self.folder.parent}, and the next run makes it anew"
                )
        found = int(self.ids.max()) if m.rows else 0
        if found >= m.vocab_size:
            raise MalformedFile(f"{self.folder / 'ids.bin'}: id {found}, vocab_size is {m.vocab_size}")
        if int(self.counts.sum()) != m.trained:
            raise MalformedFile(
                f"{self.folder / RECORD}: trained = {m.trained}, the rows have {int(self.counts.sum())}"
            )


def _mapped(path: Path, dtype: str, shape: tuple[int, int]) -> np.ndarray:
    want = shape[0] * shape[1] * np.dtype(dtype).itemsize
    size = path.stat().st_size if path.is_file() else None
    if size != want or not want:
        raise MalformedFile(
            f"{path}: {'missing' if size is None else f'{size} bytes'}, {RECORD} says {want} bytes; remove {path.parents[1]}, "
            "and the next run makes it anew"
        )
    return np.memmap(path, dtype, "r", shape=shape).view(np.ndarray)


class InstructWindows:
    """The rows of one side, as Windows of token shards: same attributes, targets of what is not trained are IGNORED."""

    def __init__(self, shards: InstructShards, seq_length: int) -> None:
        if seq_length != shards.manifest.seq_length:
            raise Refused(
                f"{shards.folder}: packed for --seq-length {shards.manifest.seq_length}, not {seq_length}; give --instruct"
            )
        self.shards, self.seq_length = shards, seq_length
        self.first, self.count = 0, shards.manifest.rows
        self.targets = int(shards.counts.sum())  # of a pass over all windows

    def __len__(self) -> int:
        return self.count

    def targets_of(self, indices: np.ndarray) -> int:
        """Targets of the windows `indices` int64 (B,)."""
        return int(self.shards.counts[indices].sum())

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ids, targets) int32 (B, T) of the windows `indices` int64 (B,)."""
        rows = self.shards.ids[indices].astype(np.int32)
        targets = np.where(self.shards.trained[indices, 1:] > 0, rows[:, 1:], np.int32(IGNORED))
        return np.ascontiguousarray(rows[:, :-1]), targets


def trained_targets(targets: np.ndarray) -> int:
    """How many of targets (B,T) a loss is computed for."""
    return int(np.count_nonzero(targets >= 0))


def checked_piece(ids: np.ndarray, targets: np.ndarray, before: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """(ids, targets) from `before` positions before the first target of the first sequence on: a check of a few positions
    must see a loss. The same arrays where the sequences begin with targets."""
    start = max(0, int(np.argmax(targets[0] >= 0)) - before)
    return ids[:, start:], targets[:, start:]


def packed_windows(sides: Iterable[Split], seq_length: int) -> dict[str, InstructWindows]:
    """The windows of those sides that hold packed examples, by name."""
    found: dict[str, Any] = {side.name: side.shards for side in sides}
    return {
        name: InstructWindows(x, seq_length) for name, x in found.items() if isinstance(x, InstructShards)
    }


def is_instruct(folder: Path) -> bool:
    """Whether a folder holds one side of packed examples."""
    return (folder / RECORD).is_file()


def open_side(folder: Path, tokenizer: Tokenizer, verify: bool = True) -> TokenShards | InstructShards:
    """Shards or packed examples, whichever a folder holds."""
    return (InstructShards if is_instruct(folder) else TokenShards)(folder, tokenizer, verify)


def audit_instruct(
    folders: dict[str, Path], tokenizer: Tokenizer, model_vocab: int, bounds: Bounds = USUAL
) -> list[Split]:
    """Both sides opened and verified, and what the guards say of them. Raises MalformedFile, Refused."""
    sides = []
    for name, folder in folders.items():
        shards = InstructShards(folder, tokenizer)
        m = shards.manifest
        share = m.trained / m.tokens
        side = Split(name, folder, shards)  # type: ignore[arg-type]
        side.findings = [
            Finding.of(
                "sha256, ids and labels",
                True,
                f"{m.rows:,} rows, {m.tokens:,} tokens",
                "those of instruct.json",
            ),
            _round_trip(shards, tokenizer),
            fits_model(tokenizer, model_vocab),
            _answers(shards),
            Finding.of("trained tokens", share > 0, f"{100 * share:.1f} % of {m.tokens:,}", "more than none"),
        ]
        if m.audit["distinct_ids"] < 2:
            side.findings.append(Finding.of("distinct ids", False, "one id in all answers", "several"))
        sides.append(side)
    if {"train", "val"} <= folders.keys():
        shared = _shared(sides[0].shards, sides[1].shards)  # type: ignore[arg-type]
        sides[0].findings.append(Finding.of("documents on both sides", shared == 0, f"{shared:,}", "0"))
    enforce({side.folder: side.findings for side in sides})
    return sides


def _answers(shards: InstructShards) -> Finding:
    """Whether every row has a target, and no target crosses from one example into the next."""
    m, empty, crossed = shards.manifest, int((shards.counts == 0).sum()), 0
    if m.separator is not None:
        for first in range(0, m.rows, ROWS):
            ids, trained = shards.ids[first : first + ROWS], shards.trained[first : first + ROWS]
            crossed += int(((ids[:, :-1] == m.separator) & (trained[:, 1:] > 0)).sum())
    figure = f"{empty} rows without one, {crossed} behind the border of an example"
    return Finding.of(
        "answers", not empty and not crossed, figure, "a target in every row, none behind a border"
    )


def _pieces(shards: InstructShards, rows: Iterable[int]) -> Iterator[np.ndarray]:
    """The ids of the examples in some rows, each without the separator."""
    separator = shards.manifest.separator
    for r in rows:
        row = shards.ids[r]
        if separator is None:
            yield row
            continue
        ends = np.flatnonzero(row == separator)
        for piece in np.split(row, ends):
            piece = piece[piece != separator]
            if piece.size:
                yield piece


def _shared(a: InstructShards, b: InstructShards) -> int:
    """Examples that stand on both sides."""

    def digests(s: InstructShards) -> set[bytes]:
        return {hashlib.sha256(x.tobytes()).digest()[:16] for x in _pieces(s, range(s.manifest.rows))}

    return len(digests(a) & digests(b))


def _round_trip(shards: InstructShards, tokenizer: Tokenizer) -> Finding:
    """Whether examples, spread over the rows, have the same text again when what they decode to is encoded."""
    guard, bound = "decode(encode(decode(ids))) = decode(ids)", "the same text"
    if not tokenizer.byte_level:
        return Finding.of(
            guard, None, "", bound, "no byte-level vocabulary: asked of the text when it was encoded"
        )
    rows = sorted({shards.manifest.rows * k // SAMPLED for k in range(SAMPLED)})
    engine, count = _engine(tokenizer), 0
    for ids in islice(_pieces(shards, rows), SAMPLED):
        text = engine.decode(ids.tolist(), skip_special_tokens=False)
        again = engine.decode(engine.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
        if text != again and "\ufffd" not in text:  # a context may be cut inside a character
            return Finding.of(
                guard, False, f"{again[:40]!r} for {text[:40]!r}", bound, "not the ids of this tokenizer"
            )
        count += 1
    return Finding.of(guard, True, f"{count} examples", bound)
