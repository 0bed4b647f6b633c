"""Errors a user can meet. Each names the file, key and value, and the next thing to try.

Every class carries the exit code of the process; `apr.cli.main` prints the message alone,
without a traceback.
"""

import copyreg
from typing import Any

from .printable import printable

MOST = 4000  # characters of a message: it may quote a value of a file, which may be anything


class AprError(Exception):
    """Base of all errors that are answered with one line and an exit code.

    The message can be printed whatever a file put into it: what is no printable character is spelt out."""

    exit_code = 1
    status = "FAILED"

    def __init__(self, message: str = "") -> None:
        if len(message) > MOST:
            message = f"{message[: MOST - 1000]} ... {message[-900:]}"
        super().__init__(printable(message))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what is there, not what made it: a Pool of processes waits for ever for an error that cannot be made again."""
        return copyreg.__newobj__, (type(self), *self.args), vars(self)  # type: ignore[attr-defined]


class UsageError(AprError):
    """A flag or a combination of flags makes no sense."""

    exit_code = 2


class InputNotFound(AprError):
    """A file, folder, preset or device name that does not exist, or a download that cannot be had."""

    exit_code = 3


class MalformedFile(AprError):
    """A file that exists but is truncated, corrupted or in a format we do not read."""

    exit_code = 4


class Refused(AprError):
    """The input is readable, but training or loading it would be wrong."""

    exit_code = 5
    status = "REFUSED"


class Aborted(AprError):
    """A gate stopped a running job: non-finite, diverged."""

    exit_code = 6
    status = "ABORTED"


class IOFailure(AprError):
    """Writing failed: disk full, read-only folder."""

    exit_code = 7


class DeviceError(AprError):
    """A device or backend that is not there or cannot be used."""

    exit_code = 8


class RankLost(AprError):
    """Another rank has ended, or hangs."""

    exit_code = 10
    status = "RANK_LOST"


class Interrupted(AprError):
    """Ctrl-C or SIGTERM, after the state was saved."""

    exit_code = 130
    status = "INTERRUPTED"


_ALL: list[type[AprError]] = [AprError, *AprError.__subclasses__()]
STATUSES = frozenset(c.status for c in _ALL)  # of runs that an error ended
