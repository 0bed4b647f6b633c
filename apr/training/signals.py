"""Turn SIGINT, SIGTERM, SIGUSR1 and SIGHUP into a stop of the run that saves its state."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

# SIGHUP: the terminal is closed, or the connection to its machine is lost. SIGXCPU: the CPU time of `ulimit -t` is used up.
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU)
# Nobody who sends them twice asks for more: the kernel sends one and the shell another, or the kernel one each second.
REPEATED = (signal.SIGHUP, signal.SIGXCPU)


@contextmanager
def handled(
    handler: Callable[[int, FrameType | None], Any],
    numbers: tuple[int, ...] = STOPS,
) -> Iterator[None]:
    """Handle STOPS, or other signals, inside the block. A SIGHUP that is ignored, as by nohup, stays so.

    Does nothing outside the main thread: no other gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {
        n: signal.signal(n, handler)
        for n in numbers
        if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for n, previous in old.items():
            signal.signal(n, previous)


def interrupting() -> Any:
    """Raise KeyboardInterrupt at a signal of STOPS, also where a shell ignores SIGINT for background processes."""
    return handled(signal.default_int_handler)


@contextmanager
def unswallowed() -> Iterator[None]:
    """Send SIGTERM again where Python has dropped the KeyboardInterrupt of a signal.

    It drops what is raised in a callback of C code (LLVM's, while Numba loads a kernel) or in a finalizer, and tells
    sys.unraisablehook alone."""
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            previous(unraisable)
            return
        # Later, and not in the hook, which drops exceptions too.
        timer = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True
        timer.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = previous


class StopRequest:
    """A stop after the current step. The first signal asks for it, a second one raises KeyboardInterrupt.

    says: a line tells of it; of several ranks one does"""

    def __init__(self, says: bool = True) -> None:
        self.is_asked, self._says = False, says

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.is_asked and number in REPEATED:
            return
        if self.is_asked:
            raise KeyboardInterrupt
        self.is_asked = True
        self._say("press Ctrl-C again to stop at once without saving")

    def agreed(self, asked: Sequence[bool]) -> bool:
        """Tell whether any rank was asked. asked: of each"""
        if any(asked):
            self._say(f"rank {list(asked).index(True)} was asked to")
        return any(asked)

    def _say(self, more: str) -> None:
        if not self._says:
            return
        self._says = False
        # Not print: the signal may have come in the middle of one, which cannot be entered twice. The reader may be gone:
        # Ctrl-C ends both sides of `apr pretrain 2>&1 | tee log`.
        with suppress(OSError):
            os.write(2, f"\nstopping after this step; {more}\n".encode())
