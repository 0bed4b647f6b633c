"""NCCL played on host memory between processes that are connected over TCP, and a GPU played by the cpu backend."""

from __future__ import annotations

import ctypes
from contextlib import contextmanager

import numpy as np

from apr.ranks import library
from apr.ranks.nccl import Nccl
from apr.training import run, split

SIZES = {1: 1, 7: 4, 8: 8, 9: 2}


class Fake:
    """The functions of libnccl that are used. share: gives bytes to all ranks. calls: names, in order.

    What is moved must lie in windows that all ranks have opened, as copy engines need."""

    def __init__(self, share, rank, number=23004, error=""):
        self.share, self.rank, self.number, self.error = share, rank, number, error
        self.calls, self.held, self.windows = [], [], []

    def ncclGetVersion(self, made):
        made._obj.value = self.number
        return 0

    def ncclGetErrorString(self, status):
        return b"invalid usage"

    def ncclGetLastError(self, comm):
        return self.error.encode()

    def ncclGetUniqueId(self, made):
        ctypes.memset(made, 65 + self.rank, 128)
        return 0

    def ncclCommInitRankConfig(self, made, count, unique, rank, config):
        self.calls.append("join")
        if self.error:
            return 5
        assert bytes(unique) == b"A" * 128  # that of rank 0
        assert (config._obj.policy, config._obj.magic) == (library.ZERO_BLOCKS, 0xCAFEBEEF)
        assert config._obj.min_blocks == -(1 << 31)
        made._obj.value, self.count = 7, count
        return 0

    def ncclMemAlloc(self, made, nbytes):
        self.held.append(np.full(nbytes, 0xFF, np.uint8))
        made._obj.value = self.held[-1].ctypes.data
        return 0

    def ncclCommWindowRegister(self, comm, address, nbytes, made, flags):
        sizes = self.share(nbytes)
        assert set(sizes) == {nbytes}
        self.windows.append((address, address + nbytes))
        made._obj.value = 1
        return 0

    def _moved(self, name, comm, x, size, out, room, stream):
        assert comm.value == 7
        assert stream == Side.STREAM
        for at, n in ((x, size), (out, room)):
            assert any(a <= at and at + n <= b for a, b in self.windows), f"{name} outside of every window"
        self.calls.append(name)
        return self.share((name, ctypes.string_at(x, size)))

    def ncclAlltoAll(self, x, out, n, kind, comm, stream):
        each = n * SIZES[kind]
        found = self._moved("all-to-all", comm, x, each * self.count, out, each * self.count, stream)
        assert {name for name, _ in found} == {"all-to-all"}
        ctypes.memmove(out, b"".join(b[self.rank * each :][:each] for _, b in found), each * self.count)
        return 0

    def ncclAllGather(self, x, out, n, kind, comm, stream):
        each = n * SIZES[kind]
        found = self._moved("all-gather", comm, x, each, out, each * self.count, stream)
        assert {name for name, _ in found} == {"all-gather"}
        ctypes.memmove(out, b"".join(b for _, b in found), each * self.count)
        return 0

    def ncclCommAbort(self, comm):
        self.calls.append("abort")
        return 0


class Side:
    """A second stream of a host: everything is done when it is asked for. Moves outside of `beside` are a fault."""

    STREAM = 11

    def __init__(self):
        self.is_beside = False

    def tuned(self):
        return ""

    def current(self):
        return self.STREAM if self.is_beside else 0

    @contextmanager
    def beside(self):
        self.is_beside = True
        yield
        self.is_beside = False

    def join(self):
        assert not self.is_beside

    def array(self, address, size, dtype, owner):
        kind = np.dtype(dtype)
        x = np.frombuffer((ctypes.c_uint8 * (size * kind.itemsize)).from_address(address), kind)
        x[:] = 0
        return x

    def address(self, x):
        assert x.flags.c_contiguous
        return x.ctypes.data


def install(changed):
    """Let ranks that `--gpus` would have started compute on the CPU, and move through Fake. changed: replaces an attribute."""

    def attach(self, device, gpu):
        self.fake = Fake(self._share, self.rank)
        self._library = library.Library(self.fake)
        right(self, device, f"GPU-{self.rank}")

    right = Nccl.attach
    changed(Nccl, "attach", attach)
    changed(Nccl, "device", lambda self, asked: asked)
    changed(run, "check_ranks", lambda *a: None)
    changed(split, "_side", Side)
