"""`apr run --chat`: a conversation on a terminal, or one message a line from a file or pipe."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from ..common.atomic import write_json
from ..common.errors import AprError, UsageError
from ..common.printable import json_line, printable
from ..common.units import plural
from ..inference.chat import Conversation
from .tables import spoken

HELP = """  /system TEXT  what the system's message says from now on; without TEXT: none
  /reset        forget the conversation, keep the system's message
  /save FILE    write the conversation as JSON
  /quit         end, as Ctrl-D does; Ctrl-C stops an answer"""


def chat(conversation: Conversation, prompt: str, as_json: bool) -> int:
    """Answer a prompt, or without one talk until the input ends; returns the exit code."""
    session = Session(conversation, quiet=as_json)
    if prompt:
        session.answer(prompt)
    else:
        session.run()
    if as_json:
        print(json_line({"messages": conversation.messages, "forgotten": conversation.forgotten}))
    return 1 if session.failed else 0


class Session:
    """Reads messages and commands, prints answers.

    quiet     nothing goes to the standard output
    terminal  standard input is a terminal
    failed    a message of a file or pipe had no answer
    """

    def __init__(self, conversation: Conversation, quiet: bool = False) -> None:
        self.conversation, self.quiet = conversation, quiet
        self.terminal = sys.stdin.isatty()
        self.failed = False

    def run(self) -> None:
        """Read and answer until the input ends or /quit."""
        if self.terminal:
            with suppress(ImportError):
                import readline  # noqa: F401 -- input() has a history and can be edited
            self._note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends")
        for line in self._lines():
            try:
                if line.startswith("/") and not line.startswith("//"):
                    if self._command(line):
                        return
                elif line.strip():
                    self.answer(line.removeprefix("/") if line.startswith("//") else line)
            except AprError as e:  # the conversation goes on as if it had not been said
                self._note(str(e))
                self.failed = self.failed or not self.terminal

    def _lines(self) -> Iterator[str]:
        if not self.terminal:
            for number, line in enumerate(sys.stdin):
                # A file saved on Windows begins with a byte order mark, which is no part of the first message.
                yield (line if number else line.removeprefix("\ufeff")).rstrip("\r\n")
            return
        while True:
            try:
                yield input("> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n(Ctrl-D or /quit ends)", file=sys.stderr)

    def answer(self, message: str) -> None:
        """Print the answer to a message as it comes. Raises Refused: it cannot be answered."""
        c, forgotten, stopped = self.conversation, self.conversation.forgotten, False
        with _stopping() as asked:
            pieces = c.say(message)
            for piece in pieces:
                forgotten = self._say_forgotten(forgotten)
                if not self.quiet:
                    print(spoken(piece), end="", flush=True)
                if asked.is_set():
                    stopped = True
                    pieces.close()  # type: ignore[attr-defined]
                    break
        if not self.quiet:
            print(flush=True)
        self._say_forgotten(forgotten)
        if stopped:
            self._note("(stopped)")
        elif c.latest is not None and c.latest.ended == "length":
            self._note(f"(cut after {plural(len(c.latest.new), 'token')}: --max-tokens)")
        elif c.latest is not None and c.latest.ended == "positions":
            self._note(f"(cut: the model reads {plural(c.positions, 'token')})")

    def _say_forgotten(self, before: int) -> int:
        now = self.conversation.forgotten
        if now > before:
            self._note(
                f"(the conversation no longer fits into {plural(self.conversation.positions, 'token')}: "
                f"{plural(now - before, 'message')} forgotten, the oldest)"
            )
        return now

    def _command(self, line: str) -> bool:
        """Run a /command; True for /quit. Raises UsageError for an unknown command, IOFailure."""
        name, _, rest = line.partition(" ")
        c, rest = self.conversation, rest.strip()
        if name in ("/quit", "/exit"):
            return True
        if name == "/help":
            self._note(HELP)
        elif name == "/reset":
            c.reset()
            self._note("(forgotten)")
        elif name == "/system":
            c.set_system(rest)
            self._note("(the system's message is set)" if rest else "(no system's message)")
        elif name == "/save" and rest:
            write_json(Path(rest), {"messages": c.messages})
            self._note(f"({plural(len(c.messages), 'message')} in {rest})")
        else:
            raise UsageError(
                f"{line.strip()}: no such command; /help lists them, and // begins a message with a slash"
            )
        return False

    def _note(self, text: str) -> None:
        print(printable(text), file=sys.stderr, flush=True)


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """Set the event upon Ctrl-C; interrupt upon the second. Outside the main thread there are no signals."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    old: Any = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, old)
