"""A signal ends the work wherever it comes, also where Python drops what its handler raises."""

from __future__ import annotations

import ctypes
import signal
import time

import pytest

from apr.training.signals import StopRequest, handled, unswallowed


def in_callback() -> None:
    """Receive SIGTERM in a callback of C code."""
    ctypes.CFUNCTYPE(None)(lambda: signal.raise_signal(signal.SIGTERM))()


def in_finalizer() -> None:
    """Receive SIGTERM in the finalizer of an object."""

    class Ends:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    del [Ends()][0]


@pytest.mark.parametrize("place", [in_callback, in_finalizer])
def test_a_signal_that_python_drops_comes_again(place, monkeypatch, capfd):
    with handled(signal.default_int_handler), unswallowed(), pytest.raises(KeyboardInterrupt):  # noqa: PT012
        place()
        # The second signal comes here, a moment later.
        time.sleep(60)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGXCPU])
def test_a_closed_terminal_or_used_up_time_asks_once_for_a_stop(number):
    """Of a closed terminal the kernel sends SIGHUP, and so does the shell; nohup ignores it."""
    stop = StopRequest(says=False)
    with handled(stop):
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert stop.is_asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handled(stop):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_dropped_exceptions_are_told_as_before(monkeypatch):
    told = []
    monkeypatch.setattr("sys.unraisablehook", lambda u: told.append(u.exc_type))
    with unswallowed():
        ctypes.CFUNCTYPE(None)(lambda: 1 / 0)()
    assert told == [ZeroDivisionError]
