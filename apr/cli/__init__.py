"""The `apr` command: one thin module per sub-command, imported only when it is asked for."""

import faulthandler
import os
import signal
import sys
from contextlib import suppress

PROGRAMS = ("apr", "-m", "main.py")  # sys.argv[0] of apr, and of python -m apr.cli.main


def end_at_signals() -> None:
    """End the process at SIGINT, SIGTERM and SIGHUP with one line, until a command handles them: while modules are imported
    there is nothing to clean up, and some of them drop exceptions. A SIGINT or SIGHUP that is ignored stays so."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)
    signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: object) -> None:
    try:
        os.write(2, b"apr: interrupted\n")
    finally:
        os._exit(130)


def open_closed_streams() -> None:
    """Open the null device in the place of standard streams that are closed, as daemons leave them.

    Otherwise the next files that are opened, shards and logs, get their numbers, and what is said there is written into them."""
    for number, (name, mode) in enumerate([("stdin", "r"), ("stdout", "w"), ("stderr", "w")]):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


if os.path.basename(sys.argv[0] if sys.argv else "") in PROGRAMS:
    end_at_signals()
    # Of a bus error, as when a mapped file becomes shorter while it is read, the place is said.
    with suppress(RuntimeError, OSError, ValueError):  # standard error is closed, or no file
        faulthandler.enable()
