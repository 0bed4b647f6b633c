"""Read token ids and targets from a command line, a .json or a .npy file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.lib.format import read_array_header_1_0

from ..common.errors import InputNotFound, MalformedFile, Refused, UsageError
from ..common.files import opened, read_json
from ..model.transformer import IGNORED

# Beginning of a file of integers, whatever version of NumPy writes it.
NPY_MAGIC = b"\x93NUMPY\x01\x00"
# Raised by NumPy for a header that it cannot read, as Python's tokenizer and parser see it.
NPY_ERRORS = (
    Warning, ValueError, TypeError, EOFError, OSError, OverflowError, MemoryError, SyntaxError, TokenError,
)  # fmt: skip


def read_targets(text: str, ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Read targets (B,T) int32; "": the next tokens of ids (B,T). Raises as read_ids."""
    if not text:
        return np.concatenate([ids[:, 1:], np.full_like(ids[:, :1], IGNORED)], 1)
    targets = read_ids(text, vocab_size, "--targets", lowest=IGNORED)
    if targets.shape != ids.shape:
        raise UsageError(f"--targets has shape {targets.shape}, --tokens {ids.shape}; they must be equal")
    return targets


def read_ids(text: str, vocab_size: int, flag: str, lowest: int) -> np.ndarray:
    """Read ids (B,T) int32 of at least `lowest` from "1,2,3" or a .json or .npy file.

    Raises InputNotFound, MalformedFile, UsageError, Refused: an id outside the vocabulary."""
    path = Path(text)
    is_file = path.suffix in FILE_READERS
    if is_file and not os.path.isfile(path):
        raise InputNotFound(f"{flag} {text}: no such file")
    try:
        ids = np.array(FILE_READERS[path.suffix](path) if is_file else [int(x) for x in text.split(",")])
        if ids.dtype.kind not in "iu":
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        raise UsageError(
            f'{flag} {text}: expected whole numbers such as "1,2,3", or a file of them'
        ) from None
    ids = np.atleast_2d(ids)
    if ids.ndim != 2 or not ids.size:
        raise UsageError(f"{flag} {text}: shape {ids.shape}; expected one row or (B,T)")
    if ids.max() >= vocab_size or ids.min() < lowest:
        bad = ids.max() if ids.max() >= vocab_size else ids.min()
        where = f"{flag} {text}" if is_file else flag
        raise Refused(f"{where}: id {bad} is outside the model's vocabulary of {vocab_size}")
    return np.ascontiguousarray(ids, np.int32)


def _json_ids(path: Path) -> list[Any]:
    """Read one list of whole numbers or several.

    Not left to NumPy, which pads texts to the longest, and takes true and false for numbers."""
    value = read_json(path)
    rows = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    if not all(isinstance(row, list) and all(type(i) is int for i in row) for row in rows):
        raise MalformedFile(
            f"{path}: not an array of ids: write [1, 2, 3], or a list of such rows of equal length"
        )
    return rows


def _npy_ids(path: Path) -> np.ndarray:
    """Map a .npy file: a header that promises more than the file has is then an error, and takes no memory."""
    with opened(path) as (f, _):
        start = f.read(len(NPY_MAGIC))
        # Later versions are refused too: their headers may claim 4 GiB.
        if start != NPY_MAGIC:
            raise MalformedFile(
                f"{path}: not an array of ids: starts with {start!r}, not {NPY_MAGIC!r}; save one with numpy.save"
            )
        try:
            with warnings.catch_warnings():
                # NumPy warns of a header that it would not write itself.
                warnings.simplefilter("error")
                shape, is_fortran, dtype = read_array_header_1_0(f)
                if dtype.hasobject:
                    raise ValueError("an array of Python objects")
                order: Any = "F" if is_fortran else "C"
                return np.asarray(np.memmap(f, dtype, "r", f.tell(), shape, order))
        except NPY_ERRORS as e:
            raise MalformedFile(f"{path}: not an array of ids: {e}; save one with numpy.save") from None


FILE_READERS: dict[str, Callable[[Path], Any]] = {".json": _json_ids, ".npy": _npy_ids}
