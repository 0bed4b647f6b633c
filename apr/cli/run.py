"""`apr run MODEL "prompt"`: generate text from a checkpoint, or answer messages with --chat.

Examples:
  apr run runs/demo/ckpt/epoch-010.apr "def read(path):" --temperature 0.7 --stop $'\\n\\n'
  apr run path/to/model --prompts questions.jsonl --json
  apr run path/to/model --chat --system "Answer briefly."
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..api import load
from ..common.errors import MalformedFile, Refused, UsageError
from ..common.files import opened, parse_json, read_text
from ..common.finding import FAIL, WRONG_EXIT, Finding
from ..common.options import TOO_MANY, device_option, dtype_option, json_option, option, parse, threads_option
from ..common.printable import json_line, printable
from ..common.shell import word
from ..common.units import plural
from ..data.find import COMPRESSIONS, JSONL_SUFFIXES
from ..data.sniff import TABLES, table_as_records
from ..inference.again import check
from ..inference.language_model import LanguageModel
from ..inference.sampling import Continuation, Sampling
from ..inference.streaming import Text
from .chat import chat
from .tables import spoken


@dataclass(frozen=True)
class Flags:
    """Options of `apr run`."""

    model: str = option("an .apr or GGUF file or a Hugging Face folder", positional=True, path=True)
    prompt: str = option(
        "text to continue (default: the standard input, where it is a pipe or a file); with --chat, a message to answer",
        "",
        positional=True,
    )
    prompts: str | None = option(
        'file of prompts to continue, several at once: one a line, or .jsonl with a "prompt" in each line; prompt number '
        "i, from 0, is drawn with --seed + i and gets the text that it gets alone",
        metavar="FILE",
        path=True,
    )
    batch_size: int = option(
        "with --prompts, most prompts at once; on the CPU more than 8 may differ in last bits",
        8,
        metavar="PROMPTS",
    )
    max_tokens: int = option("most new tokens", 128)
    temperature: float = option("0 always takes the most likely token", 0.8)
    top_k: int = option("draw from so many of the likeliest tokens only; 0: from all", 0, metavar="TOKENS")
    top_p: float = option(
        "draw from the fewest tokens that together have this probability", 1.0, metavar="PROBABILITY"
    )
    min_p: float = option(
        "draw from tokens at least so many times as likely as the likeliest; 0: from all",
        0.0,
        metavar="RATIO",
    )
    repetition_penalty: float = option(
        "above 1: tokens that occurred become less likely", 1.0, metavar="FACTOR"
    )
    stop: tuple[str, ...] = option(
        "text that ends the output and is no part of it; may be given several times", (), metavar="TEXT"
    )
    seed: int = option("seed of the draws", 42)
    chat: bool = option(
        "a conversation, by the checkpoint's chat template; /help there lists its commands", False
    )
    system: str | None = option("with --chat, text of the system message", metavar="TEXT")
    chat_template: str | None = option(
        "with --chat, file of a template to use instead of the checkpoint's own", metavar="FILE", path=True
    )
    device: str = device_option()
    dtype: str | None = dtype_option(
        "; int8: matrices rounded to 8 bits, faster and less exact",
        ("float32", "bfloat16", "int8"),
    )
    threads: int | None = threads_option()
    json: bool = json_option()


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code. Errors are raised."""
    f = _parse(args)
    sampling = Sampling(f.max_tokens, f.temperature, f.top_k, f.top_p, f.seed, f.min_p, f.repetition_penalty)
    if f.prompts is not None and (f.prompt or f.chat):
        raise UsageError("--prompts takes the place of a prompt and of --chat; give one of them")
    if not f.chat and (f.system is not None or f.chat_template is not None):
        raise UsageError("--system and --chat-template need --chat")
    prompts = None if f.prompts is None else read_prompts(Path(f.prompts))
    model = load(f.model, f.device, f.dtype, f.threads)
    if f.chat:
        template = None if f.chat_template is None else model.checkpoint.template(f.chat_template)
        conversation = model.conversation(sampling, f.stop, template)
        conversation.set_system(f.system or "")
        return chat(conversation, f.prompt, f.json)
    if prompts is not None:
        return _several(model, f, sampling, prompts)
    return _one(model, _with_prompt(f), sampling)


def _parse(args: Sequence[str]) -> Flags:
    """Read the command line. Raises UsageError."""
    try:
        return parse(Flags, args, "apr run", __doc__ or "")
    except UsageError as e:
        several = "; several prompts go into a file: --prompts FILE" if TOO_MANY in str(e) else ""
        raise UsageError(f"{e}{several}") from None


def _with_prompt(f: Flags) -> Flags:
    """Take the prompt from the standard input, where it is a pipe or a file and no other prompt is given.

    Raises MalformedFile."""
    if f.prompt or f.prompts is not None or f.chat or sys.stdin is None or sys.stdin.isatty():
        return f
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise MalformedFile(f"standard input: not UTF-8 at byte {e.start}; convert the prompt") from None
    except OSError:
        # A service's standard input may be closed, or be none that can be read.
        return f
    # The line end that a shell or an editor puts behind a text is no part of it.
    return replace(f, prompt=text.removesuffix("\n").removesuffix("\r"))


def read_prompts(path: Path) -> list[str]:
    """Read a prompt from each line, of a .jsonl file its "prompt"; empty lines are skipped.

    Raises InputNotFound, MalformedFile, Refused: no prompt."""
    suffix = path.suffix.lower()
    if suffix in (*TABLES, ".json", ".parquet", *COMPRESSIONS):
        with opened(path):
            pass  # one that is not there is named first
        advice = "write them so"
        if suffix in TABLES:
            advice = table_as_records(path)
        elif suffix == ".json":
            advice = (
                f"jq -r '.[]' {word(path)} > prompts.txt writes texts of an array, "
                f"jq -c '.[]' {word(path)} > prompts.jsonl objects"
            )
        raise Refused(f'{path}: prompts are lines of text, or of .jsonl objects with a "prompt"; {advice}')
    lines = [(n, line) for n, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    if not lines:
        raise Refused(f"{path}: no prompts in it")
    if suffix not in JSONL_SUFFIXES:
        return [line.removesuffix("\r") for _, line in lines]
    out = []
    for n, line in lines:
        prompt = parse_json(line, f"{path}, line {n}").get("prompt")
        if not isinstance(prompt, str):
            raise MalformedFile(
                f'{path}, line {n}: prompt = {prompt!r}; each line needs a "prompt" that is text'
            )
        out.append(prompt)
    return out


def _one(model: LanguageModel, f: Flags, sampling: Sampling) -> int:
    ids = model.encode_prompt(f.prompt)
    assert model.tokenizer is not None
    shown = model.tokenizer.decode(ids, skip_special=True)
    text, new, ended, first, start = "", [], list[Continuation](), 0.0, time.perf_counter()
    if not f.json:
        print(spoken(shown), end="", flush=True)
    for piece, token in model.stream(ids, sampling, f.stop, ended):
        if token is not None:
            new.append(token)
            first = first or time.perf_counter()
        text += piece
        if not f.json:
            print(spoken(piece), end="", flush=True)
    speed = _speed(len(ids), len(new), first - start, time.perf_counter() - first)
    if f.json:
        d = {"text": shown + text, "prompt_ids": ids, "ids": new, "ended": ended[0].ended, **speed}
        print(json_line(d))
    else:
        print(flush=True)
        _say(len(ids), len(new), speed, ended[0].ended)
    return _judged(check(model, ids, new, sampling, text, f.stop, ended[0].logits))


def _several(model: LanguageModel, f: Flags, sampling: Sampling, prompts: list[str]) -> int:
    start, done = time.perf_counter(), dict[int, Text]()
    shown = 0
    for i, result in model.each(prompts, sampling, f.stop, f.batch_size):
        done[i] = result
        while not f.json and shown in done:  # in the order of the file
            print(spoken(f"--- {shown + 1}\n{prompts[shown]}{done[shown].text}"), flush=True)
            shown += 1
    seconds = time.perf_counter() - start
    rows: list[dict[str, Any]] = [
        {
            "prompt": p,
            "text": done[i].text,
            "prompt_ids": done[i].prompt_ids,
            "ids": done[i].ids,
            "ended": done[i].ended,
        }
        for i, p in enumerate(prompts)
    ]
    total = sum(len(row["ids"]) for row in rows)
    if f.json:
        print(json_line({"results": rows, "seconds": seconds, "tokens_per_sec": total / seconds}))
    else:
        print(
            printable(
                f"{plural(len(rows), 'prompt')}, {plural(total, 'new token')}, {total / seconds:,.1f} tokens/s"
            ),
            file=sys.stderr,
        )
    # Prompt i is drawn with the seed + i.
    of = {i: replace(sampling, seed=sampling.seed + i) for i in {0, len(rows) - 1}}
    found = [
        check(model, (r := rows[i])["prompt_ids"], r["ids"], s, r["text"], f.stop) for i, s in of.items()
    ]
    return max(map(_judged, found))


def _judged(f: Finding) -> int:
    """Return the exit code of a finding about what was generated, and print a fault on the standard error stream."""
    if f.verdict != FAIL:
        return 0
    print(printable(f"{f.verdict}: {f.why}; `apr bisect` names the op that is wrong"), file=sys.stderr)
    return WRONG_EXIT


def _speed(prompt: int, new: int, reading: float, writing: float) -> dict[str, float | None]:
    """Divide tokens by seconds: of the prompt with the first new token, and of the others (None without any)."""
    rest = (new - 1) / writing if new > 1 and writing > 0 else None
    return {"prompt_tokens_per_sec": prompt / max(reading, 1e-9), "tokens_per_sec": rest}


def _say(prompt: int, new: int, speed: dict[str, float | None], ended: str) -> None:
    """Print speed and reason of the end on the standard error stream."""
    rest = speed["tokens_per_sec"]
    later = "" if rest is None else f" at {rest:,.1f} tokens/s"
    why = {
        "end": "end of text",
        "stop": "a stop string",
        "length": "--max-tokens",
        "positions": "no more positions",
    }
    read = f"prompt: {plural(prompt, 'token')} at {speed['prompt_tokens_per_sec']:,.1f} tokens/s"
    print(printable(f"{read}; {plural(new, 'new token')}{later}; ended by: {why[ended]}"), file=sys.stderr)
