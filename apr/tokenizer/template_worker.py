"""Render one chat template in a process of its own. `template_process.py` starts this file with python -I -S.

A template is a program in a file of somebody else's. This process holds nothing but the template and the conversation; each
request gets a limit of CPU time and of memory, and whatever goes wrong is an answer, never a traceback.

Standard input: the length of a request, 8 bytes little endian, and its pickle: first (text, marks), then (messages,
variables) each time. Standard output: a letter of OK and the like, a length and UTF-8. The arguments are folders to import
jinja2 from.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import resource
import struct
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, ClassVar

OK, SYNTAX, REFUSED, TOO_MUCH = b"O", b"S", b"R", b"M"
MAX_ELEMENTS = 1_000_000  # that a multiplication inside a template may make
# Of one request; each grows with the conversation, so that a long one is not refused for its length.
CPU_SECONDS = 2
MEMORY_BYTES = 1 << 30
TEXT_BYTES = 64 << 20
BYTES_PER_SECOND = 1 << 20  # of a conversation, that a template may take a second longer for
MEMORY_PER_BYTE = 32
TEXT_PER_BYTE = 8
MAX_REASON = 8000  # characters of a template's own words that are passed on


def environment(marks: tuple[str, str] | None) -> Any:
    """Make jinja2's environment as transformers does: sandboxed, with tojson, generation and loop controls.

    marks: written before and behind the text of {% generation %} blocks; with marks, strftime_now is undefined."""
    import jinja2
    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """{% generation %} marks the words of the model, for training; the block itself is rendered as it stands."""

        tags: ClassVar[set[str]] = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Callable[[], str]) -> str:
            before, behind = marks or ("", "")
            return f"{before}{caller()}{behind}"

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            numbers = isinstance(left, int | float) and isinstance(right, int | float)
            if operator == "**" and (not numbers or abs(left) > 1000 or abs(right) > 100):
                raise jinja2.TemplateError(f"{left!r} ** {right!r} is too large")
            if operator == "*" and not numbers:
                parts = [len(x) if hasattr(x, "__len__") else abs(x) for x in (left, right)]
                if parts[0] * parts[1] > MAX_ELEMENTS:
                    raise jinja2.TemplateError(f"a multiplication makes more than {MAX_ELEMENTS} elements")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    def tojson(
        x: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    env = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    env.filters["tojson"] = tojson
    env.globals |= {"raise_exception": raise_exception} | ({} if marks else {"strftime_now": strftime_now})
    return env


def limit(kind: int, most: int) -> None:
    """Set a soft limit of this process, as far as the hard one lets it."""
    hard = resource.getrlimit(kind)[1]
    # Some systems refuse limits of memory; the time that the other side waits is limited in any case.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def bound(request_bytes: int) -> None:
    """Limit CPU time and memory anew for a request. Too much time ends the process, whatever the template is doing."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = used.ru_utime + used.ru_stime + CPU_SECONDS + request_bytes / BYTES_PER_SECOND
    limit(resource.RLIMIT_CPU, math.ceil(seconds))
    limit(resource.RLIMIT_AS, MEMORY_BYTES + MEMORY_PER_BYTE * request_bytes)


class Renderer:
    """Compiles the template of the first request, and renders the conversation of each later one."""

    def __init__(self) -> None:
        self._compiled: Any = None

    def answer(self, request: bytes) -> tuple[bytes, bytes]:
        """Answer a request: (OK and the text, or why there is none)."""
        compiling = self._compiled is None
        wrong = SYNTAX if compiling else REFUSED
        try:
            text = self._compile(request) if compiling else self._render(request)
            data = text.encode()
            most = TEXT_BYTES + TEXT_PER_BYTE * len(request)
            return (OK, data) if len(data) <= most else (TOO_MUCH, f"writes {len(data)} bytes".encode())
        except MemoryError:
            return TOO_MUCH, b"takes more memory than it may"
        except UnicodeEncodeError as e:
            return wrong, f"it writes {e.object[e.start]!a}, a lone surrogate".encode()
        except BaseException as e:
            return wrong, words(e)

    def _compile(self, request: bytes) -> str:
        text, marks = pickle.loads(request)
        self._compiled = environment(marks).from_string(text)
        return ""

    def _render(self, request: bytes) -> str:
        messages, variables = pickle.loads(request)
        return str(self._compiled.render(messages=messages, **variables))


def words(error: BaseException) -> bytes:
    """Put an error of a template into words, with its line where it has one of the template's own."""
    try:
        text = str(getattr(error, "msg", None) or error) or type(error).__name__
        if hasattr(error, "lineno") and hasattr(error, "message"):
            text = f"line {error.lineno}: {error.message}"
    except BaseException:
        text = type(error).__name__
    if len(text) > MAX_REASON:
        text = f"{text[: MAX_REASON // 2]} ... {text[-MAX_REASON // 2 :]}"
    return text.encode(errors="backslashreplace")


def main() -> None:
    """Answer requests until standard input ends."""
    sys.path += sys.argv[1:]
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    limit(resource.RLIMIT_CORE, 0)
    renderer = Renderer()
    while len(head := requests.read(8)) == 8:
        request = requests.read(struct.unpack("<Q", head)[0])
        bound(len(request))
        kind, data = renderer.answer(request)
        answers.write(kind + struct.pack("<Q", len(data)) + data)
        answers.flush()


if __name__ == "__main__":
    main()
