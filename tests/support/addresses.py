"""Elements at an address, for emulations of processor instructions that are written in Numba."""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic


def pointer(kind: Any) -> Any:
    """Make a function for compiled code: an address as a pointer to elements of a type."""
    to = types.CPointer(kind)

    @intrinsic
    def f(typing: Any, address: Any) -> Any:
        return to(types.uintp), lambda c, b, s, a: b.inttoptr(a[0], c.get_value_type(to))

    return f
