"""A process that has imported what `apr` imports, and forks: a fresh process without the second that its imports take.

A run compares its last checkpoint with what a fresh process makes of it, and tests make hundreds of small runs. What a
test has patched in its own process is not there in a fork of this one either, nor is any array, cache or thread. Numba
starts its threads in the fork. Commands that tests start as such go the long way.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SERVED = ("apr.verify.reload",)


class CleanProcess:
    """What stands for the module subprocess: runs `python -m MODULE ARGS` of modules that are served in a fork."""

    TimeoutExpired, SubprocessError = subprocess.TimeoutExpired, subprocess.SubprocessError

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def run(self, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command as subprocess.run does with capture_output and text. On a GPU it is a process of its own."""
        python, flag, module, *args = command
        if (python, flag) != (sys.executable, "-m") or module not in SERVED or "cuda" in str(args):
            return subprocess.run(command, **options)
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,
            )  # fmt: skip
        server = self._server
        assert server.stdin is not None
        assert server.stdout is not None
        asked = {"module": module, "args": args, "environ": dict(os.environ), "cwd": os.getcwd()}
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        timeout = options.get("timeout")
        try:
            if not select.select([server.stdout], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(command, timeout)
            code, out, err = json.loads(server.stdout.readline())
        except BaseException:  # a signal while it is waited for: the next one asks a server of its own
            self.end()
            raise
        return subprocess.CompletedProcess(command, code, out, err)

    def end(self) -> None:
        """End the server, and what it has at work with it."""
        if self._server is not None:
            os.killpg(self._server.pid, signal.SIGKILL)
            self._server.communicate()
            self._server = None


def serve() -> None:
    """Import what is served, and answer requests, one a line, until there are no more."""
    from numba.core.registry import cpu_target

    for module in SERVED:
        importlib.import_module(module)
    cpu_target.target_context.refresh()
    cpu_target.typing_context.refresh()
    for line in sys.stdin:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if not child:
                _become(json.loads(line), out.fileno(), err.fileno())
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            texts = [os.pread(f.fileno(), os.fstat(f.fileno()).st_size, 0).decode() for f in (out, err)]
        print(json.dumps([code, *texts]), flush=True)


def _become(asked: dict[str, Any], out: int, err: int) -> None:
    """Do what was asked, and end."""
    code: Any = 1
    with contextlib.suppress(BaseException):
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        try:
            os.environ.clear()
            os.environ.update(asked["environ"])
            os.chdir(asked["cwd"])
            code = importlib.import_module(asked["module"]).main(asked["args"])
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
