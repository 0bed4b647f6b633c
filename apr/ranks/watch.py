"""Watch the ranks: heartbeats over TCP beside the communicator, which does not say that another process is gone.

Rank 0 listens; every other rank is connected to it. Each sends a line twice a second: how many meetings (calls of the
communicator) it has come to, and what it does. A closed connection is a rank that is lost, silence one that hangs.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.errors import AprError, RankLost
from ..common.printable import printable
from . import hello
from .environment import RESULT

BEAT_SECONDS = 0.5
# What the main thread of rank 0 waits in a meeting before another rank's failure is the end of the run.
MEETING_SECONDS = 0.3
# The same where it computes, or waits for a device, which waits for that rank.
FAILED_SECONDS = 3
CONNECT_SECONDS = 60


@dataclass
class Peer:
    """Another rank, as its heartbeats show it."""

    rank: int
    name: str
    link: socket.socket
    meetings: int = 0
    doing: str = "starting"
    is_timed: bool = False
    has_left: bool = False
    heard: float = field(default_factory=time.monotonic)
    moved: float = field(default_factory=time.monotonic)
    rest: bytes = b""


class RankFailed(AprError):
    """Carry the error of another rank."""

    def __init__(self, code: int, status: str, message: str) -> None:
        super().__init__(message)
        self.exit_code, self.status, self.since = code, status, time.monotonic()


class Watch:
    """Heartbeats of one rank. share: gives an object to all ranks, used once, to find each other."""

    def __init__(self, rank: int, count: int, share: Callable[[Any], list[Any]]) -> None:
        self.rank, self.limit = rank, 120.0
        self.meetings, self.doing, self.is_timed = 0, "starting", False
        # Since when the main thread is in a meeting.
        self.waiting: float | None = None
        self.write: Callable[[AprError], None] = lambda error: None
        self.hint: Callable[[], str] = str
        # What frees this process, where a device keeps it, before it ends.
        self.before_end: Callable[[], None] = lambda: None
        self.peers: list[Peer] = []
        self.failed: RankFailed | None = None
        # Of this rank itself, which writes it down in its own time.
        self.has_error = self.is_ending = False
        self._lock, self._judged = threading.Lock(), time.monotonic()
        self._connect(count, share)
        threading.Thread(target=self._run, name="heartbeats", daemon=True).start()

    # The main thread

    def report(self, error: AprError) -> None:
        """Tell rank 0 of an error of this rank, and wait until it ends the run."""
        self._send({"failed": [error.exit_code, error.status, str(error)]})
        while True:
            time.sleep(60)

    def leave(self) -> None:
        """Say that this rank is done: its connection may close."""
        self.is_ending = True
        self._send({"left": True})

    def end(self, code: int) -> None:
        """End all ranks with an exit code, this one last."""
        self.is_ending = True
        _record(code)
        self._send({"end": code})
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        self.before_end()
        os._exit(code)

    # Connections

    def _connect(self, count: int, share: Callable[[Any], list[Any]]) -> None:
        name = socket.gethostname()
        hosts = share(name)
        is_one = len(set(hosts)) == 1
        if self.rank:
            names, port, token = share(None)[0]
            link = _connection(names, port)
            hello.say(link, token, self.rank)
            self._add(0, hosts[0], link)
            return
        with socket.create_server(("127.0.0.1" if is_one else "", 0), backlog=count) as server:
            token = secrets.token_hex(16)
            # A host may know itself by a name that means another thing on the others, or by none.
            share((["127.0.0.1"] if is_one else [name, _address()], server.getsockname()[1], token))
            server.settimeout(CONNECT_SECONDS)
            while len(self.peers) < count - 1:
                try:
                    link, _ = server.accept()
                except TimeoutError:
                    missing = count - 1 - len(self.peers)
                    raise RankLost(
                        f"{missing} of {count} ranks did not connect to rank 0 on {name}"
                    ) from None
                link.settimeout(CONNECT_SECONDS)
                rank = hello.heard(link, token, count)
                if rank is None:
                    link.close()
                else:
                    self._add(rank, hosts[rank], link)

    def _add(self, rank: int, name: str, link: socket.socket) -> None:
        link.settimeout(CONNECT_SECONDS)
        self.peers.append(Peer(rank, name, link))

    def _send(self, message: dict[str, Any]) -> None:
        data = (json.dumps(message) + "\n").encode()
        for peer in self.peers:
            with suppress(OSError), self._lock:
                peer.link.sendall(data)

    # The thread

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer in self.peers:
                selector.register(peer.link, selectors.EVENT_READ, peer)
            due = 0.0
            while not self.is_ending:
                if time.monotonic() >= due:
                    due = time.monotonic() + BEAT_SECONDS
                    self._send({"meetings": self.meetings, "doing": self.doing, "is_timed": self.is_timed})
                for key, _ in selector.select(BEAT_SECONDS / 2):
                    if not self._read(key.data):
                        selector.unregister(key.fileobj)
                self._judge()

    def _read(self, peer: Peer) -> bool:
        """Take what a rank has sent; False where its connection is closed."""
        try:
            data = peer.link.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            if not peer.has_left and not self.is_ending:
                self._lost(peer, "was lost: its process has ended")
            return False
        peer.heard, peer.rest = time.monotonic(), peer.rest + data
        *lines, peer.rest = peer.rest.split(b"\n")
        for line in lines:
            self._take(peer, json.loads(line))
        return True

    def _take(self, peer: Peer, message: dict[str, Any]) -> None:
        if "end" in message:
            os._exit(message["end"])
        if "failed" in message:
            peer.has_left = True
            code, status, text = message["failed"]
            self.failed = self.failed or RankFailed(code, status, f"rank {peer.rank} ({peer.name}): {text}")
        elif "left" in message:
            peer.has_left = True
        else:
            if message["meetings"] != peer.meetings:
                peer.moved = time.monotonic()
            peer.meetings, peer.doing = message["meetings"], message["doing"]
            peer.is_timed = message["is_timed"]

    def _judge(self) -> None:
        """End the run where another rank has failed or hangs."""
        now = time.monotonic()
        # This process was stopped itself, or got no time: nobody else was silent.
        was_stopped, self._judged = now - self._judged > self.limit / 2, now
        if was_stopped:
            for peer in self.peers:
                peer.heard = peer.moved = now
            return
        is_waiting = self.waiting is not None and now - self.waiting > MEETING_SECONDS
        is_reason = self.failed is not None and self.rank == 0 and not self.has_error
        if self.failed and is_reason and (is_waiting or now - self.failed.since > FAILED_SECONDS):
            self._finish(self.failed)
        most = max([self.meetings, *(p.meetings for p in self.peers)])
        for peer in self.peers:
            if peer.has_left or self.is_ending:
                continue
            if now - peer.heard > self.limit:
                self._lost(peer, f"hangs: no heartbeat for {now - peer.heard:.0f} s")
            elif peer.is_timed and peer.meetings < most and now - peer.moved > self.limit:
                self._lost(peer, f"hangs: it has stood still for {now - peer.moved:.0f} s, the others wait")

    def _lost(self, peer: Peer, why: str) -> None:
        """End the run; where rank 0 is gone, the first of the others does."""
        if self.rank > 1:
            # Rank 1, or mpirun, ends this process.
            time.sleep(5)
        self._finish(
            RankLost(f"rank {peer.rank} ({peer.name}) {why}; its last word: {peer.doing}; {self.hint()}")
        )

    def _finish(self, error: AprError) -> None:
        self.is_ending = True
        # First of all: Open MPI ends this process 0.2 s after it has seen that another one is gone.
        _record(error.exit_code)
        with suppress(OSError):
            text = f"apr pretrain: {error}\n{error.status}\n"
            os.write(2, printable(text).encode())
        with suppress(Exception):
            self.write(error)
        self.end(error.exit_code)


def _connection(names: list[str], port: int) -> socket.socket:
    """Connect to the first of several names of a host that answers. Raises RankLost."""
    reasons = []
    for name in names:
        try:
            return socket.create_connection((name, port), CONNECT_SECONDS / 4)
        except OSError as e:
            reasons.append(f"{name}: {e}")
    raise RankLost(f"no connection to rank 0 for heartbeats: {'; '.join(reasons)}")


def _address() -> str:
    """Find the address of this host by which it would reach others; nothing is sent."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect(("192.0.2.1", 9))
        return str(s.getsockname()[0])
    return "127.0.0.1"


def _record(code: int) -> None:
    """Leave the exit code to the process that started the ranks, if one waits for it."""
    path = os.environ.get(RESULT)
    if path:
        with suppress(OSError):
            Path(path).write_text(str(code))
