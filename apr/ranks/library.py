"""libnccl through ctypes: the functions that ranks on GPUs use, with errors by name.

Names, numbers and layouts: nccl.h of 2.28 to 2.32. ncclConfig_t only grows, and says how long it is.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import byref, c_char, c_char_p, c_int, c_size_t, c_uint, c_void_p
from typing import Any

from ..common.errors import Refused
from ..common.packages import pip_install

# Older ones wait for ever in graphs over several nodes (2.28.9), and know no two ranks on one GPU.
OLDEST = (2, 30, 4)
# Path of a libnccl.so.2 to take instead of the one that pip has installed.
LIBRARY = "APR_NCCL"
# With it NCCL lets ranks share a GPU: for tests on one.
SHARED = "NCCL_MULTI_RANK_GPU_ENABLE"
TYPES = {"uint8": 1, "float32": 7, "float64": 8, "bfloat16": 9}
MAGIC, UNDEFINED, ZERO_BLOCKS, SYMMETRIC = 0xCAFEBEEF, -(1 << 31), 2, 1
_P = c_void_p


class UniqueId(ctypes.Structure):
    """ncclUniqueId: what ranks find each other by."""

    _fields_ = (("bytes", c_char * 128),)


class Config(ctypes.Structure):
    """ncclConfig_t of 2.28; fields that are not named keep NCCL's default."""

    _fields_ = (
        ("size", c_size_t), ("magic", c_uint), ("version", c_uint), ("blocking", c_int), ("cga_cluster", c_int),
        ("min_blocks", c_int), ("max_blocks", c_int), ("net", c_char_p), ("split_share", c_int), ("traffic", c_int),
        ("name", c_char_p), ("collnet", c_int), ("policy", c_int), ("shrink_share", c_int), ("nvls_blocks", c_int),
        ("channels", c_int), ("nvlink_centric", c_int),
    )  # fmt: skip

    def __init__(self, **given: Any) -> None:
        super().__init__()
        for name, kind in self._fields_:
            if kind is c_int:
                setattr(self, name, UNDEFINED)
        self.size, self.magic, self.version = ctypes.sizeof(Config), MAGIC, 22807
        for name, value in given.items():
            setattr(self, name, value)


_SIGNATURES: dict[str, list[Any]] = {
    "ncclGetVersion": [_P],
    "ncclGetUniqueId": [_P],
    "ncclCommInitRankConfig": [_P, c_int, UniqueId, c_int, _P],
    "ncclMemAlloc": [_P, c_size_t],
    "ncclCommWindowRegister": [_P, _P, c_size_t, _P, c_int],
    "ncclAlltoAll": [_P, _P, c_size_t, c_int, _P, _P],
    "ncclAllGather": [_P, _P, c_size_t, c_int, _P, _P],
    "ncclCommAbort": [_P],
}


class Library:
    """A loaded libnccl, or what a test puts in its place. Calls raise Refused with NCCL's words."""

    def __init__(self, library: Any) -> None:
        self.library = library

    def call(self, function: str, *args: Any) -> None:
        """Call and check. Raises Refused."""
        status = getattr(self.library, function)(*args)
        if status:
            raise Refused(f"{function}: {self._words(status)}")

    def _words(self, status: int) -> str:
        said = self.library.ncclGetErrorString(status).decode("ascii", "replace")
        last = (self.library.ncclGetLastError(None) or b"").decode("ascii", "replace").strip()
        words = f"{said} ({status})" + (f": {last}" if last else "")
        if "Duplicate GPU" in words:
            words += f"; give every rank a GPU of its own, or, for a test on one, set {SHARED}=1"
        return words

    def version(self) -> tuple[int, int, int]:
        """Read the version of the library, such as (2, 30, 4)."""
        n = c_int()
        self.call("ncclGetVersion", byref(n))
        return n.value // 10000, n.value // 100 % 100, n.value % 100

    def unique_id(self) -> bytes:
        """Make what all ranks of one communicator are given."""
        made = UniqueId()
        self.call("ncclGetUniqueId", byref(made))
        return bytes(made)

    def join(self, count: int, unique: bytes, rank: int, config: Config) -> c_void_p:
        """Make the communicator of this rank; returns when all ranks have called."""
        made = c_void_p()
        found = UniqueId.from_buffer_copy(unique)
        self.call("ncclCommInitRankConfig", byref(made), count, found, rank, byref(config))
        return made

    def memory(self, nbytes: int) -> int:
        """Allocate memory that other ranks may be given access to; returns its address."""
        made = c_void_p()
        self.call("ncclMemAlloc", byref(made), nbytes)
        assert made.value is not None
        return made.value

    def window(self, comm: c_void_p, address: int, nbytes: int) -> bool:
        """Let the copy engines of all ranks reach memory; False where NCCL has no such way here. All ranks call together."""
        made = c_void_p()
        self.call("ncclCommWindowRegister", comm, address, nbytes, byref(made), SYMMETRIC)
        return bool(made.value)


def load() -> Library:
    """Load NCCL: that of the variable APR_NCCL, or pip's. Raises Refused where there is none, or one that is too old."""
    given = os.environ.get(LIBRARY)
    try:
        if given is None:
            from cuda.pathfinder import load_nvidia_dynamic_lib

            given = str(load_nvidia_dynamic_lib("nccl").abs_path)
        library = ctypes.CDLL(given)
        for function in ("ncclGetErrorString", "ncclGetLastError"):
            getattr(library, function).restype = c_char_p
        found = Library(library)
        if found.version() < OLDEST:
            raise Refused(
                f"NCCL {dotted(found.version())} at {given} is too old: apr needs {dotted(OLDEST)} or newer; {_install()}, "
                f"or set {LIBRARY} to the path of a newer libnccl.so.2"
            )
        for function, types in _SIGNATURES.items():
            getattr(library, function).argtypes = types
    except (ImportError, RuntimeError, OSError, AttributeError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise Refused(
            f"several GPUs need NCCL (libnccl.so.2), and it cannot be loaded: {reason}; {_install()}"
        ) from e
    return found


def dotted(version: tuple[int, ...]) -> str:
    """Spell a version."""
    return ".".join(map(str, version))


def _install() -> str:
    return f"{pip_install('nvidia-nccl-cu13')} (cu12 for a driver of CUDA 12)"
