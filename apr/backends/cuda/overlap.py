"""Let products that nobody waits for, those of weight gradients, run beside the ops that follow, in a recorded pass.

They fill multiprocessors that the last tiles of other products leave idle. The same algorithms run on the same arrays, so every
bit stays. What an op reads and writes stands in its row of contract.py: before an op that would write what such a product still
reads, or touch what it writes, the backend's stream waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from ..contract import OPS

Array = Any
Bytes = tuple[int, int]  # addresses: of the first byte of an array, and behind its last one


class Streams(Protocol):
    """The backend's stream, and a second one."""

    def fork(self) -> None:
        """Let the second stream wait for all that the first one was asked for."""

    def mark(self) -> Any:
        """An event behind all that the second stream was asked for."""

    def wait(self, event: Any) -> None:
        """Let the first stream wait for an event."""


class Running(NamedTuple):
    """A product on the second stream: what it reads and writes, and the event behind it."""

    reads: list[Bytes]
    writes: list[Bytes]
    done: Any


class Overlap:
    """Products on a second stream, `running` those that the first has not waited for. Nothing runs there but inside `allowed`."""

    def __init__(self, streams: Streams, address: Callable[[Array], int]) -> None:
        self._streams, self._address = streams, address
        self._allowed = False
        self.running: list[Running] = []

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Let products run on the second stream inside, and be done at the end."""
        self._allowed = True
        try:
            yield
            self.join()
        finally:
            self._allowed = False
            self.running.clear()

    def run(self, product: Callable[[bool], None], write: Array, *reads: Array) -> None:
        """Call a product, told whether it runs on the second stream; it writes one array, and may add to it."""
        if not self._allowed:
            product(False)
            return
        self._streams.fork()
        product(True)
        self.running.append(Running(self._bytes(reads), self._bytes((write,)), self._streams.mark()))

    def before(self, writes: Iterable[Array | None], reads: Iterable[Array | None]) -> None:
        """Wait for the products that must be done before an op on these arrays."""
        if not self.running:
            return
        out, into = self._bytes(writes), self._bytes(reads)
        for i in reversed(range(len(self.running))):
            p = self.running[i]
            if _meet(out, p.reads) or _meet(out, p.writes) or _meet(into, p.writes):
                # the second stream keeps the order of its products
                self._streams.wait(p.done)
                del self.running[: i + 1]
                return

    def join(self) -> None:
        """Wait for all products."""
        if self.running:
            self._streams.wait(self.running[-1].done)
            self.running.clear()

    def before_call(self, function: str, args: Sequence[Any], more: Mapping[str, Any]) -> None:
        """Wait for the products that a function of the backend needs: an op those of its arrays, any other all."""
        if function not in OPS:
            self.join()
            return
        of = {a.name: a for a in OPS[function].arguments if a.axes}
        given = {**dict(zip(OPS[function].parameters, args, strict=False)), **more}
        sides = [
            [x for name, x in given.items() if name in of and (of[name].writes is not None) is out]
            for out in (True, False)
        ]
        self.before(*sides)

    def _bytes(self, arrays: Iterable[Array | None]) -> list[Bytes]:
        found = []
        for x in arrays:
            if x is not None:
                first = self._address(x)
                last = sum((n - 1) * abs(step) for n, step in zip(x.shape, x.strides, strict=True))
                found.append((first, first + last + x.itemsize))
        return found


def _meet(some: list[Bytes], others: list[Bytes]) -> bool:
    return any(a < d and c < b for a, b in some for c, d in others)
