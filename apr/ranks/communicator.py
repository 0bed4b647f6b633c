"""Move bytes between ranks. Nothing is added here: sums are the backend's, in the order of micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, Protocol

from ..common.errors import AprError


class Communicator(Protocol):
    """Ranks that work together, as one of them sees it. Every rank makes the same calls in the same order.

    rank, count   number of this rank, from 0, and of all
    local, place  ranks on this machine, and the number of this one among them
    even          all pieces that are moved must be of one size, side by side, in arrays of `empty`
    words         kind and version, for the record of a run
    """

    rank: int
    count: int
    local: int
    place: int
    even: bool
    words: str

    def device(self, asked: str) -> str:
        """Name the device of this rank, where a --device is asked for."""

    def empty(self, be: ModuleType, size: int, dtype: str) -> Any:
        """Make an array of zeros on the backend, of what is moved."""

    def exchange(self, out: Any, x: Any, starts: Sequence[int], sizes: Sequence[int]) -> None:
        """out[r] = the piece of rank r's x that begins at starts[own rank].  out (count, sizes[own rank]), x (n,)

        Piece r of x, sizes[r] elements from starts[r] on, goes to rank r."""

    def gather(self, out: Any, x: Any, sizes: Sequence[int]) -> None:
        """out = x of all ranks, one behind the other.  x (sizes[own rank],), out (sum of sizes,)"""

    def to_first(self, part: Any, sizes: Sequence[int], room: Any) -> Any:
        """Join the parts of all ranks on rank 0; None on the others. room (sum of sizes,): where `even` ranks join them."""

    def beside(self) -> AbstractContextManager[None]:
        """Move, and add, inside the block beside what the backend computes; it comes after what was asked for before."""

    def join(self) -> None:
        """Let what the backend is asked for from now on come after everything `beside`."""

    def share(self, x: Any) -> list[Any]:
        """Give a small object to all ranks; returns those of all, in the order of ranks."""

    def waits(self) -> AbstractContextManager[None]:
        """Wait, inside the block, for what the device can only finish when all ranks have come as far."""

    def at(self, doing: str, is_timed: bool = False) -> None:
        """Say what this rank does, for the message about a rank that hangs. is_timed: it may not take longer than the limit."""

    def ends(self) -> None:
        """Say that this process ends by an error of its own, in its own time: what other ranks report is no reason any more."""

    def limit(self, seconds: float) -> None:
        """Set the time after which a rank that says nothing, or stands still, is taken to hang."""

    def on_end(self, write: Callable[[AprError], None], hint: Callable[[], str]) -> None:
        """Set what writes the end of a run down where this process cannot go on, since another rank has failed or is gone.

        hint: says how to go on"""


class Alone:
    """One process: no call, no copy."""

    rank, count, local, place, even, words = 0, 1, 1, 0, False, "one process"

    def device(self, asked: str) -> str:
        """See Communicator."""
        return asked

    def empty(self, be: ModuleType, size: int, dtype: str) -> Any:
        """See Communicator."""
        return be.empty((size,), dtype)

    def exchange(self, out: Any, x: Any, starts: Sequence[int], sizes: Sequence[int]) -> None:
        """See Communicator."""
        raise AssertionError("one process has nobody to exchange with")

    def gather(self, out: Any, x: Any, sizes: Sequence[int]) -> None:
        """See Communicator."""
        raise AssertionError("one process has all parts")

    def to_first(self, part: Any, sizes: Sequence[int], room: Any) -> Any:
        """See Communicator."""
        return part

    def beside(self) -> AbstractContextManager[None]:
        """See Communicator."""
        return nullcontext()

    def join(self) -> None:
        """See Communicator."""

    def share(self, x: Any) -> list[Any]:
        """See Communicator."""
        return [x]

    def waits(self) -> AbstractContextManager[None]:
        """See Communicator."""
        return nullcontext()

    def at(self, doing: str, is_timed: bool = False) -> None:
        """See Communicator."""

    def ends(self) -> None:
        """See Communicator."""

    def limit(self, seconds: float) -> None:
        """See Communicator."""

    def on_end(self, write: Callable[[AprError], None], hint: Callable[[], str]) -> None:
        """See Communicator."""


ALONE = Alone()
