"""Work on large arrays piece by piece, on all cores: bounds time and memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

from ..backends import overlay
from ..common.host import cores
from .rule import Backend

T = TypeVar("T")
PIECE_ELEMENTS = 1 << 18  # in float64 they stay in a core's cache


def in_pieces(f: Callable[[slice], T], size: int, each: int = PIECE_ELEMENTS) -> list[T]:
    """Apply f to slices that cover range(size), on all cores; a matrix product inside f runs on one. NumPy releases the
    interpreter lock while it computes."""
    work = [slice(first, min(size, first + each)) for first in range(0, size, each)]
    # Inside a piece the cores are busy.
    if len(work) < 2 or getattr(_inside, "piece", False):
        return [f(at) for at in work]

    def one(at: slice) -> T:
        _inside.piece = True
        return f(at)

    with _blas().limit(limits=1, user_api="blas"):
        return list(_pool().map(one, work))


_inside = threading.local()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cores())


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def rounded_copy(x: np.ndarray, kind: Any) -> np.ndarray:
    """Convert x to another dtype, piece by piece."""
    if x.size <= PIECE_ELEMENTS or not x.flags.c_contiguous:
        return np.array(x, kind)
    out = np.empty(x.shape, kind)
    source, target = x.reshape(-1), out.reshape(-1)

    def piece(at: slice) -> None:
        target[at] = source[at]

    in_pieces(piece, x.size)
    return out


def in_parallel(be: Backend) -> Backend:
    """Wrap a backend of NumPy arrays: gradients of large matrices, and sums of squares, are computed piece by piece."""

    def linear_bwd(dx: Any, dw: Any, db: Any, dy: Any, x: Any, w: Any, adds: bool) -> None:
        if dw is None or dw.size <= PIECE_ELEMENTS:
            be.linear_bwd(dx, dw, db, dy, x, w, adds)
            return
        be.linear_bwd(dx, None, db, dy, x, w, adds)

        def piece(at: slice) -> None:
            be.linear_bwd(np.empty_like(dx), dw[at], None, dy[:, at], x, w[at], adds)

        in_pieces(piece, dw.shape[0], max(1, PIECE_ELEMENTS // dw.shape[1]))

    def add_sum_sq(total: Any, x: Any) -> None:
        def piece(at: slice) -> Any:
            part = np.zeros_like(total)
            be.add_sum_sq(part, x[at])
            return part

        total += sum(in_pieces(piece, x.size))

    return overlay(be, linear_bwd=linear_bwd, add_sum_sq=add_sum_sq)


def norm_of(x: np.ndarray) -> float:
    """Compute the L2 norm in float64, piece by piece."""
    return float(np.sqrt(sum(in_pieces(lambda at: float(np.square(x[at], dtype=np.float64).sum()), x.size))))
