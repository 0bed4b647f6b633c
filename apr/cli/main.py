"""`apr COMMAND`: find the sub-command, run it, turn errors into one line and an exit code."""

from __future__ import annotations

import difflib
import importlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

from ..common.errors import AprError, DeviceError, Interrupted, IOFailure, Refused
from ..common.hints import OTHER_COMMANDS
from ..common.packages import broken_package
from ..common.printable import printable
from ..common.version import __version__
from ..ranks.environment import refuse_several
from ..training.signals import handled, unswallowed
from . import open_closed_streams

COMMANDS = {
    "pretrain": "train a model; with no arguments: the demo job",
    "sweep": "train every run of a grid of settings, and compare them in one table",
    "run": "generate text from a checkpoint",
    "bisect": "find the op of the layer that is wrong: two sides in lockstep, op by op",
    "trace": "write every intermediate of one forward (and backward) pass to a file",
    "tokenize": "make tokenizers and token shards: train, import-hf, encode-corpus, audit, repair-manifest",
    "plan": "compute parameters, FLOPs and bytes of a job, before anything is allocated",
    "verify": "check the evidence of a run from outside: hashes, log, verdict, losses computed again",
    "import": "write a Hugging Face or GGUF checkpoint, local or hf://org/name, as an .apr file, bit for bit",
    "export": "write a checkpoint as a Hugging Face folder or a GGUF file",
    "merge": "make a LoRA adapter part of the weights it belongs to",
    "inspect": "show the content of a checkpoint",
    "validate": "make every check of a checkpoint, each with PASS or FAIL and its figure",
    "diff": "compare two checkpoints or traces, tensor by tensor, worst first",
    "eval": "score a checkpoint: loss on text or token shards, multiple choice, HumanEval",
    "qa": "judge if a checkpoint is fit to ship: tokenizer, logits, generation, export, speed",
    "report": "write a run as one self-contained HTML page, also while it is training",
    "completion": "print a script that completes commands and options in bash, zsh or fish",
}
# Of commands whose name is a word of Python.
MODULES = {"import": "import_"}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _usage() -> str:
    rows = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    return f"usage: apr COMMAND [options]\n\n{rows}\n\n`apr COMMAND --help` lists a command's options."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: the process's own); returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] in (["--version"], ["version"], ["-V"]):
        return _ended("--version", lambda: lambda: print(f"apr {__version__}"))
    if args[:1] == ["help"] and args[1:2] and args[1] in COMMANDS:
        return run_command(args[1], ["--help"])
    if not args or args[0] in ("-h", "--help", "help"):
        return _ended("--help", lambda: lambda: print(_usage())) or (0 if args else 2)
    if args[0] not in COMMANDS:
        meant = [OTHER_COMMANDS.get(args[0]), *difflib.get_close_matches(args[0], COMMANDS, 1, 0.7)]
        hint = next((f"; did you mean apr {name}?" for name in meant if name), "")
        print(printable(f"apr: unknown command {args[0]!r}{hint}\n\n{_usage()}"), file=sys.stderr)
        return 2
    return run_command(args[0], args[1:])


def run_command(name: str, args: Sequence[str]) -> int:
    """Run one sub-command with its own arguments; returns the exit code, of errors that of their class in errors.py."""
    return _ended(name, lambda: _find(name), args)


def _find(name: str) -> Callable[..., int | None]:
    """Import a command; only one works with several ranks. Raises UsageError."""
    if name != "pretrain":
        refuse_several(name, os.environ)
    found: Callable[..., int | None] = importlib.import_module(f"apr.cli.{MODULES.get(name, name)}").main
    return found


def _ended(name: str, find: Callable[[], Any], *args: Sequence[str]) -> int:
    """Call what is found, and return its exit code or that of its error."""
    open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A character that the terminal cannot show ends nothing.
        sys.stdout.reconfigure(errors="replace")
    output, signalled = _Noted(sys.stdout), list[int]()

    def interrupt(number: int, frame: FrameType | None) -> None:
        signalled.append(number)
        signal.default_int_handler(number, frame)

    sys.stdout = output
    try:
        command = find()
        # As Ctrl-C does, SIGTERM removes what is half written, and the end of the terminal. A SIGINT that is ignored stays so.
        numbers = [n for n in SIGNALS if n == signal.SIGTERM or signal.getsignal(n) != signal.SIG_IGN]
        # Slurm sends it before time is up, mpirun hands it on: in its first seconds a rank does not die of it either.
        numbers += [signal.SIGUSR1] if name == "pretrain" else []
        with handled(interrupt, tuple(numbers)), unswallowed():
            try:
                return command(*args) or 0
            finally:
                _flush()
    except BrokenPipeError:
        # The reader went away (`| head`): nothing is wrong.
        _drop_output()
        return 0
    except (Exception, KeyboardInterrupt) as e:
        # A package that is imported at that moment may turn the interruption into an error of its own, as NumPy does.
        explained = _explained(KeyboardInterrupt() if signalled and broken_package(e) else e)
        if explained is None:
            raise
        message, status, code = explained
        # A command that has printed its document, and then failed, has one already.
        if args and _wants_json(args[0]) and not output.is_used:
            with suppress(OSError):
                print(json.dumps({"error": message, "status": status, "exit_code": code}), flush=True)
        _say(f"apr {name}: {message}")
        if status != AprError.status:
            _say(status)
        if isinstance(e, OSError) and e.filename is None:
            _drop_output()
        return code
    finally:
        if sys.stdout is output:
            sys.stdout = output.stream


class _Noted:
    """Standard output that knows whether anything was written to it."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.is_used = stream, False

    def write(self, text: str) -> int:
        """Write text."""
        self.is_used = self.is_used or bool(text)
        return int(self.stream.write(text) or 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _explained(e: BaseException) -> tuple[str, str, int] | None:
    """Describe an error: a message, a status in one word, the exit code; None for a fault of apr's own."""
    if isinstance(e, AprError):
        return str(e), e.status, e.exit_code
    if isinstance(e, RuntimeError) and str(e) == "can't start new thread":
        text = "the system gives no more threads: raise `ulimit -u`, or the limits of processes and memory of its container"
        return text, Refused.status, Refused.exit_code
    if isinstance(e, MemoryError):
        return "out of memory; `apr plan` shows what a job needs", AprError.status, Refused.exit_code
    if isinstance(e, KeyboardInterrupt):
        return "interrupted", AprError.status, Interrupted.exit_code
    if broken := broken_package(e):
        return broken, AprError.status, DeviceError.exit_code
    if isinstance(e, OSError):
        place = os.fsdecode(e.filename) if isinstance(e.filename, str | bytes) else "output"
        return f"{place}: {e.strerror or e}", IOFailure.status, IOFailure.exit_code
    return None


def _wants_json(args: Sequence[str]) -> bool:
    """Tell from a command line that may be wrong if it asks for a JSON document."""
    return [a for a in args if a in ("--json", "--no-json")][-1:] == ["--json"]


def _flush() -> None:
    """Write what waits to be printed, unless an error has come that matters more. Raises OSError."""
    if sys.stdout and (sys.exception() is None or isinstance(sys.exception(), SystemExit)):
        sys.stdout.flush()


def _say(text: str) -> None:
    """Print a line on the standard error stream, if there is room for it."""
    with suppress(OSError):
        print(printable(text), file=sys.stderr)


def _drop_output() -> None:
    """Let what is printed from now on, and what waits to be, go nowhere: Python would try again when it ends, and fail."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                os.dup2(null, stream.fileno())
        os.close(null)


if __name__ == "__main__":
    sys.exit(main())
