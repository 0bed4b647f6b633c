"""Share small objects between ranks over TCP, where there is no MPI: every rank is connected to rank 0, which hands all on."""

from __future__ import annotations

import io
import os
import pickle
import re
import secrets
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import RankLost, UsageError
from ..common.files import read_text
from . import hello

SECONDS, GRACE_SECONDS = 120.0, 20.0
# Behind the port of torchrun's own store, which is taken; and of which a job of Slurm has one.
NEXT_PORT, FIRST_PORT, PORTS = 1, 20000, 10000
# {module: classes, and functions that make their values, of what ranks share}, in all versions of Python and NumPy.
_OF_NUMPY = ("scalar", "_reconstruct", "_frombuffer")
PLAIN: dict[str, tuple[str, ...]] = {
    "builtins": ("complex", "range", "slice", "set", "frozenset", "bytearray"),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
    "numpy": ("dtype", "ndarray"),
    **{f"numpy.{core}.{part}": _OF_NUMPY for core in ("core", "_core") for part in ("multiarray", "numeric")},
    "apr.training.settings": ("Settings",),
}


@dataclass(frozen=True)
class Meeting:
    """Place at which rank 0 listens: a file that it writes its address into, or a host and port that all know."""

    file: Path | None = None
    host: str = ""
    port: int = 0
    token: str = ""

    launcher: str = ""

    @classmethod
    def of(cls, env: Mapping[str, str]) -> Meeting | None:
        """Read it from the environment of torchrun and its like, or of Slurm; None where neither says. Raises UsageError."""
        if "MASTER_ADDR" in env and "WORLD_SIZE" in env:
            port = env.get("MASTER_PORT", "")
            if not port.isascii() or not port.isdigit() or not 0 < int(port) < 65535:
                raise UsageError(
                    f"MASTER_PORT={port or 'nothing'} is no port beside MASTER_ADDR; set both, or unset RANK"
                )
            token = env.get("TORCHELASTIC_RUN_ID", "") or f"{env['MASTER_ADDR']}:{port}"
            return cls(None, env["MASTER_ADDR"], int(port) + NEXT_PORT, token.replace(" ", "_"), "torchrun")
        nodes, job, step = (env.get(f"SLURM_{x}", "") for x in ("STEP_NODELIST", "JOB_ID", "STEP_ID"))
        if (
            "OMPI_COMM_WORLD_SIZE" in env
            or "PMI_SIZE" in env
            or not (nodes and job.isdigit() and step.isdigit())
        ):
            return None
        # node[07-09,12],other -> node07
        first = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
        host = "".join(part or "" for part in first.groups()) if first else nodes
        free = FIRST_PORT + (int(job) * 7 + int(step)) % PORTS
        return cls(None, host, free, f"slurm-{job}.{step}", "srun")


class Star:
    """Connections of one rank to rank 0, or of rank 0 to all others."""

    def __init__(self, rank: int, count: int, meeting: Meeting, seconds: float = SECONDS) -> None:
        self.rank, self.count = rank, count
        self._links: dict[int, socket.socket] = {}
        end = time.monotonic() + seconds
        if rank == 0:
            self._listen(meeting, end, seconds)
        else:
            self._links[0] = self._connect(meeting, end)

    def share(self, x: Any) -> list[Any]:
        """Give an object to all ranks; returns those of all, in the order of ranks. Raises RankLost."""
        own = pickle.dumps(x)
        try:
            if self.rank:
                _send(self._links[0], own)
                return list(_plain(_receive(self._links[0])))
            parts = [own, *(_receive(self._links[r]) for r in range(1, self.count))]
            every = pickle.dumps([_plain(p) for p in parts])
            for link in self._links.values():
                _send(link, every)
            return list(_plain(every))
        except (OSError, EOFError) as e:
            # Heartbeats tell of the rank by name, and end this process.
            time.sleep(GRACE_SECONDS)
            self.close()
            raise RankLost(f"a rank has closed its connection: {str(e) or type(e).__name__}") from None

    def close(self) -> None:
        """Close the connections."""
        for link in self._links.values():
            link.close()

    def _listen(self, meeting: Meeting, end: float, seconds: float) -> None:
        host = "127.0.0.1" if meeting.file else ""
        try:
            server = socket.create_server((host, meeting.port), backlog=self.count)
        except OSError as e:
            raise UsageError(
                f"rank 0 cannot listen at port {meeting.port}, one above MASTER_PORT: {e.strerror}; choose another MASTER_PORT"
            ) from None
        with server:
            token = meeting.token
            if meeting.file:
                token = secrets.token_hex(16)
                partial = meeting.file.with_suffix(".partial")
                partial.write_text(f"{server.getsockname()[1]} {token}")
                os.replace(partial, meeting.file)
            while len(self._links) < self.count - 1:
                server.settimeout(max(0.01, end - time.monotonic()))
                try:
                    link, _ = server.accept()
                except TimeoutError:
                    missing = [r for r in range(1, self.count) if r not in self._links]
                    self.close()
                    raise RankLost(
                        f"ranks {', '.join(map(str, missing))} of {self.count} did not come within {seconds:g} s"
                    ) from None
                self._admit(link, token)

    def _admit(self, link: socket.socket, token: str) -> None:
        """Keep the connection of a rank that knows the token; close others."""
        link.settimeout(5)
        rank = hello.heard(link, token, self.count)
        if rank is not None and rank not in self._links:
            _keep(link)
            self._links[rank] = link
        else:
            link.close()

    def _connect(self, meeting: Meeting, end: float) -> socket.socket:
        reason = "nothing listens there"
        while time.monotonic() < end:
            host, port, token = meeting.host, meeting.port, meeting.token
            if meeting.file:
                if not meeting.file.exists():
                    time.sleep(0.01)
                    continue
                number, token = read_text(meeting.file).split()
                host, port = "127.0.0.1", int(number)
            try:
                link = socket.create_connection((host, port), 5)
            except OSError as e:
                reason = str(e)
                time.sleep(0.05)
                continue
            hello.say(link, token, self.rank)
            _keep(link)
            return link
        where = meeting.file or f"{meeting.host}:{meeting.port}"
        raise RankLost(f"rank {self.rank} found no rank 0 at {where}: {reason}")


class _Plain(pickle.Unpickler):
    """Builds values, not whatever a pickle names: a token of launchers can be guessed, and then who connects first is a rank."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in PLAIN.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is no value that ranks share")
        return super().find_class(module, name)


def _plain(data: bytes) -> Any:
    """Read what another rank shares. Raises EOFError: what no rank sends."""
    try:
        return _Plain(io.BytesIO(data)).load()
    except Exception as e:  # damaged pickles raise almost anything
        raise EOFError(f"it sent what no rank sends: {e}") from None


def _keep(link: socket.socket) -> None:
    link.settimeout(None)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _send(link: socket.socket, data: bytes) -> None:
    link.sendall(struct.pack("<Q", len(data)) + data)


def _receive(link: socket.socket) -> bytes:
    (size,) = struct.unpack("<Q", _exactly(link, 8))
    return _exactly(link, size)


def _exactly(link: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = link.recv(min(1 << 20, size - len(data)))
        if not part:
            raise EOFError("it ended")
        data += part
    return bytes(data)
