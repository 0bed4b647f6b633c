"""Communicate between GPUs through NCCL: bytes alone, on copy engines where NCCL can, beside what the GPU computes."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from ctypes import c_void_p
from types import ModuleType
from typing import Any, Protocol

from ..common.errors import Refused
from . import library
from .watched import Watched

# bytes of a page of the memory that NCCL hands out
PAGE = 2 << 20
# How long a rank waits for NCCL to let go of the others before it ends.
ABORT_SECONDS = 1.0


class Device(Protocol):
    """The GPU of this rank: its second stream, and arrays in memory that NCCL has allocated."""

    def current(self) -> int:
        """Handle of the stream that work goes to now."""

    def beside(self) -> AbstractContextManager[None]:
        """Send work to the second stream."""

    def join(self) -> None:
        """Let the backend's stream wait for the second one."""

    def array(self, address: int, size: int, dtype: str, owner: Any) -> Any:
        """Wrap memory at an address."""

    def address(self, x: Any) -> int:
        """Find where an array begins."""


class Nccl(Watched):
    """Ranks with a GPU each. share: gives small objects to all ranks, over MPI or TCP.

    What is moved between GPUs is asked for on a stream, and done when that gets to it: only `share` waits for other ranks.
    """

    even = True

    def __init__(self, rank: int, count: int, share: Callable[[Any], list[Any]], words: str) -> None:
        hosts = share(socket.gethostname())
        super().__init__(rank, count, hosts, share)
        self.words, self._started_by = "NCCL", words
        self._library: Any = None
        self._comm = c_void_p()
        self._device: Any = None
        self.watch.before_end = self._abort

    def device(self, asked: str) -> str:
        """Name the GPU of this rank, where a --device is asked for. Raises Refused for one GPU for several ranks."""
        if os.environ.get(library.SHARED):
            return "cuda" if asked == "auto" else asked
        shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        if shown and "," not in shown and asked in ("auto", "cuda", "cuda:0"):
            # The launcher shows every rank its own GPU alone; that it is not another one's too is asked when they join.
            return "cuda:0"
        if ":" in asked and self.local > 1:
            raise Refused(
                f"--device {asked} is one GPU, and {self.local} ranks are on this machine: give --device cuda, and every rank "
                f"takes one of its own, or, for a test on one, set {library.SHARED}=1"
            )
        return asked if ":" in asked else f"cuda:{self.place}"

    def attach(self, device: Device, gpu: str) -> None:
        """Join the other ranks with the GPU of this one, gpu its UUID. Raises Refused."""
        found = library.load() if self._library is None else self._library
        said = self.share(
            (socket.gethostname(), gpu, found.version(), found.unique_id() if self.rank == 0 else b"")
        )
        for rank, (host, other, version, _) in enumerate(said):
            twin = next(r for r, (h, g, _, _) in enumerate(said) if (h, g) == (host, other))
            if twin != rank and not os.environ.get(library.SHARED):
                raise Refused(
                    f"ranks {twin} and {rank} have the same GPU ({other} on {host}): start as many ranks as there are GPUs, or, "
                    f"for a test on one, set {library.SHARED}=1"
                )
            if version != said[0][2]:
                raise Refused(
                    f"rank {rank} has NCCL {library.dotted(version)}, rank 0 {library.dotted(said[0][2])}: install one version"
                )
        config = library.Config(policy=library.ZERO_BLOCKS)
        self._comm = found.join(self.count, said[0][3], self.rank, config)
        self._library, self._device = found, device
        self.words = f"NCCL {library.dotted(found.version())}, {self._started_by}"

    def empty(self, be: ModuleType, size: int, dtype: str) -> Any:
        """Allocate an array of zeros that copy engines can move; all ranks call together."""
        nbytes = -(-size * (8 if dtype == "float64" else 4 if dtype == "float32" else 2) // PAGE) * PAGE
        address = self._library.memory(nbytes)
        self._library.window(self._comm, address, nbytes)
        return self._device.array(address, size, dtype, self)

    def beside(self) -> AbstractContextManager[None]:
        """See Communicator."""
        return self._device.beside()

    def join(self) -> None:
        """See Communicator."""
        self._device.join()

    def exchange(self, out: Any, x: Any, starts: Sequence[int], sizes: Sequence[int]) -> None:
        """See Communicator."""
        n, ends = sizes[0], [a + b for a, b in zip(starts, sizes, strict=True)]
        assert set(sizes) == {n}
        assert list(starts[1:]) == ends[:-1]
        self._move("ncclAlltoAll", x[starts[0] : ends[-1]], out, n)

    def gather(self, out: Any, x: Any, sizes: Sequence[int]) -> None:
        """See Communicator."""
        assert set(sizes) == {x.size}
        self._move("ncclAllGather", x, out, x.size)

    def to_first(self, part: Any, sizes: Sequence[int], room: Any) -> Any:
        """See Communicator."""
        out = room[: sum(sizes)]
        with self.beside():
            self.gather(out, part, sizes)
        self.join()
        return out if self.rank == 0 else None

    def _move(self, function: str, x: Any, out: Any, n: int) -> None:
        d = self._device
        kind = library.TYPES[x.dtype.name]
        self._library.call(function, d.address(x), d.address(out), n, kind, self._comm, d.current())

    def _abort(self) -> None:
        """Free kernels that wait for a rank that is gone. NCCL itself may wait for it: no longer than a moment."""
        if self._library is not None:
            comm, abort = self._comm, self._library.library.ncclCommAbort
            thread = threading.Thread(target=lambda: abort(comm), daemon=True)
            thread.start()
            thread.join(ABORT_SECONDS)
