"""Keep the process that renders one chat template: start it, ask it, end it.

One process serves a template for as long as the template lives, a whole corpus of conversations for instance. What it may
take of time and memory is limited for each rendering, by itself (`template_worker.py`) and by the clock on the wall here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import selectors
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any, NoReturn

from ..common.errors import Refused
from ..common.packages import pip_install
from . import template_worker
from .template_worker import CPU_SECONDS, MEMORY_BYTES, OK, SYNTAX, TEXT_BYTES, TEXT_PER_BYTE, TOO_MUCH

SCRIPT = Path(template_worker.__file__)
# On the wall, for one rendering: far above the limit of CPU time, for machines that do much else.
WALL_SECONDS = 120.0
# Of the environment, all that a template's text may depend on, and what Python may need to start.
PASSED_ON = ("TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
PIPE_BYTES = 1 << 16
HEAD = struct.Struct("<cQ")


class TemplateStopped(Refused):
    """A chat template took more time or memory than any conversation needs; it is not asked again."""


class TemplateProcess:
    """Renders conversations with one template.

    text, marks  see template_worker
    source       file or model, for messages

    Raises Refused: jinja2 is missing, or the text is no template; TemplateStopped: compiling it takes too much."""

    def __init__(self, text: str, source: str, marks: tuple[str, str] | None) -> None:
        self._setup, self._source = (text, marks), source
        self._lock = threading.Lock()
        self._stopped = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        with self._lock:
            self._started()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what starts another process."""
        text, marks = self._setup
        return TemplateProcess, (text, self._source, marks)

    def render(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        """Render a conversation. Raises Refused with the template's own words, or jinja2's; TemplateStopped."""
        with self._lock:
            if self._stopped:
                raise TemplateStopped(self._stopped)
            if self._process is None or self._owner != os.getpid():
                self._started()
            kind, text = self._ask((messages, variables))
        if kind != OK:
            raise Refused(f"{self._source}: its chat template refuses the conversation: {text}")
        return text

    def _started(self) -> None:
        """Start the process, in every process that asks: a pipe has one reader."""
        folders = []
        for name in ("jinja2", "markupsafe"):
            found = importlib.util.find_spec(name)
            if found is None or found.origin is None:
                raise Refused(f"chat templates need {name}: {pip_install('jinja2')}")
            folders.append(str(Path(found.origin).parents[1]))
        self._owner = os.getpid()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(SCRIPT), *dict.fromkeys(folders)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={k: os.environ[k] for k in PASSED_ON if k in os.environ},
                # Ctrl-C is for the command, which may render once more before it ends.
                start_new_session=True,
            )
        except OSError as e:
            raise Refused(
                f"{sys.executable}: cannot be started for the chat template: {e.strerror or e}"
            ) from None
        weakref.finalize(self, _end, self._process, self._owner)
        kind, text = self._ask(self._setup)
        if kind != OK:
            self._close()
        if kind == SYNTAX:
            raise Refused(f"{self._source}: chat template, {text}")

    def _ask(self, request: Any) -> tuple[bytes, str]:
        """Send a request and read its answer. Raises TemplateStopped, Refused: values that cannot be sent."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            data = pickle.dumps(request)
        except Exception as e:
            raise Refused(f"{self._source}: its chat template cannot be given these messages: {e}") from None
        try:
            process.stdin.write(struct.pack("<Q", len(data)) + data)
            process.stdin.flush()
            deadline = time.monotonic() + WALL_SECONDS + len(data) / template_worker.BYTES_PER_SECOND
            most = TEXT_BYTES + TEXT_PER_BYTE * len(data) + PIPE_BYTES
            kind, answer = _read(process, most, deadline)
            text = answer.decode()
        except BaseException as e:
            self._close()
            # Anything else, Ctrl-C for instance: the next request finds a process of its own.
            if isinstance(e, TimeoutError):
                self._stop(f"gives no text within {WALL_SECONDS:g} s")
            if isinstance(e, EOFError | BrokenPipeError):
                self._stop(_ended(process.returncode))
            raise
        if kind == TOO_MUCH:
            self._close()
            self._stop(text)
        return kind, text

    def _stop(self, why: str) -> NoReturn:
        """Raise, now and at every later request."""
        self._stopped = (
            f"{self._source}: its chat template {why}; a template may take {CPU_SECONDS} s of CPU time, {MEMORY_BYTES >> 20} "
            f"MiB of memory and write {TEXT_BYTES >> 20} MiB of text"
        )
        raise TemplateStopped(self._stopped) from None

    def _close(self) -> None:
        if self._process is not None:
            _end(self._process, self._owner)
        self._process = None


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """End a process and close its pipes, where this is the process that started it."""
    if owner != os.getpid():
        return
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    # Without its standard input it ends by itself; a moment of its own lets it say how it ended.
    try:
        process.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _read(process: subprocess.Popen[bytes], most: int, deadline: float) -> tuple[bytes, bytes]:
    """Read an answer: (kind, its bytes). Raises EOFError, for one of more than `most` bytes too; TimeoutError."""
    assert process.stdout is not None
    descriptor, got, size = process.stdout.fileno(), bytearray(), HEAD.size
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while len(got) < size:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            part = os.read(descriptor, PIPE_BYTES)
            got += part
            if len(got) >= HEAD.size:
                size = HEAD.size + HEAD.unpack_from(got)[1]
            if not part or size > most:
                raise EOFError
    return bytes(got[:1]), bytes(got[HEAD.size :])


def _ended(code: int | None) -> str:
    """Describe the end of a process that gave no answer."""
    if code == -signal.SIGXCPU:
        return "takes more time than it may"
    return f"ends the process that renders it ({f'signal {-code}' if code and code < 0 else f'exit code {code}'})"
