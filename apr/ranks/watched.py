"""Ranks whose heartbeats are watched: what MPI and NCCL have in common."""

from __future__ import annotations

import atexit
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import TracebackType
from typing import Any, Self

from ..common.errors import AprError, Interrupted
from .watch import Watch


class Watched:
    """All ranks, which this process is one of. Within the block an error of one rank ends all of them.

    hosts: of all ranks. share: gives an object to all of them"""

    even = False

    def __init__(self, rank: int, count: int, hosts: list[str], share: Callable[[Any], list[Any]]) -> None:
        self.rank, self.count, self._share = rank, count, share
        self.local = hosts.count(hosts[rank])
        # Number of this rank among those of its machine.
        self.place = hosts[:rank].count(hosts[rank])
        self.watch = Watch(rank, count, share)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            if self.rank:
                # Of the launcher: while rank 0 ends the run, it alone is stopped.
                with suppress(ValueError):
                    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            self.share("done")
            self.watch.leave()
            return
        self.ends()
        if isinstance(error, KeyboardInterrupt):
            error = Interrupted("interrupted")
        if self.rank:
            known = error if isinstance(error, AprError) else AprError(f"{type(error).__name__}: {error}")
            if known is not error:
                traceback.print_exception(error)
            self.watch.report(known)
        code = getattr(error, "exit_code", None)
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else 1
        # When its message is printed: MPI kills all ranks as soon as one has ended with a code.
        atexit.register(self.watch.end, 1 if code is None else code)

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        """Count a call that all ranks come to."""
        self.watch.meetings += 1
        self.watch.waiting = time.monotonic()
        try:
            yield
        finally:
            self.watch.waiting = None

    def waits(self) -> AbstractContextManager[None]:
        """See Communicator."""
        return self._meeting()

    def share(self, x: Any) -> list[Any]:
        """See Communicator."""
        with self._meeting():
            return list(self._share(x))

    def device(self, asked: str) -> str:
        """See Communicator."""
        return asked

    def beside(self) -> AbstractContextManager[None]:
        """See Communicator."""
        return nullcontext()

    def join(self) -> None:
        """See Communicator."""

    def at(self, doing: str, is_timed: bool = False) -> None:
        """See Communicator."""
        self.watch.doing, self.watch.is_timed = doing, is_timed

    def ends(self) -> None:
        """See Communicator."""
        self.watch.has_error = True
        self.at("writing the end of the run")

    def limit(self, seconds: float) -> None:
        """See Communicator."""
        self.watch.limit = seconds

    def on_end(self, write: Callable[[AprError], None], hint: Callable[[], str]) -> None:
        """See Communicator."""
        self.watch.write, self.watch.hint = write, hint
