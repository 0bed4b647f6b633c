"""Say hello on a new connection: a token that all ranks know, and the number of the rank."""

from __future__ import annotations

import secrets
import socket
from contextlib import suppress

LONGEST_HELLO = 256


def say(link: socket.socket, token: str, rank: int) -> None:
    """Send the hello of a rank. Raises OSError."""
    link.sendall(f"{token} {rank}\n".encode())


def heard(link: socket.socket, token: str, count: int) -> int | None:
    """Read a hello: the rank, from 1 to count - 1; None for another token, or no hello within the time of the connection."""
    hello = b""
    with suppress(OSError):
        while not hello.endswith(b"\n") and len(hello) < LONGEST_HELLO:
            hello += link.recv(1) or b"\n"
    said, _, rank = hello.decode("utf-8", "replace").strip().rpartition(" ")
    right = secrets.compare_digest(said.encode(), token.encode()) and rank.isascii() and rank.isdigit()
    return int(rank) if right and 0 < int(rank) < count else None
