"""Run one program and its tests in two processes. `sandbox.py` starts this file with python -I -S, once in each role.

candidate  runs the program that a model wrote and answers calls of its function
tester     holds the tests, calls the function over a pipe, and alone says whether they passed

The program never shares a process with the tests: whatever it does to its own interpreter, to exit codes or to its
output, the one way to a good verdict is to send back the right values. What it sends is read by an unpickler that builds
plain values and nothing else.

Standard library alone, and `walls.py` beside this file: neither the path of apr nor site-packages are there.
"""

from __future__ import annotations

import builtins
import ctypes
import io
import itertools
import json
import os
import pickle
import platform
import resource
import struct
import sys
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

MAX_MESSAGE_BYTES = 16 << 20
MAX_ITEMS = 1_000_000  # taken of an iterator that the program returns
LAYERS = ("namespace", "landlock", "seccomp")
if __package__:
    from . import walls
else:
    # Without the path of apr, as a script: the file beside this one.
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    walls = __import__("walls")
    del sys.path[0]

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SIGKILL, EPERM = 9, 1

# System calls of Linux on x86-64 that computing in Python takes; every other one fails with EPERM, or, where no right
# answer could want it, ends the process.
ALLOWED = {
    "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
    "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "pread64": 17,
    "readv": 19, "writev": 20, "access": 21, "sched_yield": 24, "mremap": 25, "madvise": 28, "dup": 32, "nanosleep": 35,
    "getpid": 39, "exit": 60, "uname": 63, "getcwd": 79, "readlink": 89, "gettimeofday": 96, "getrlimit": 97,
    "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108,
    "getppid": 110, "sigaltstack": 131, "gettid": 186, "time": 201, "futex": 202, "sched_getaffinity": 204,
    "getdents64": 217, "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230,
    "exit_group": 231, "newfstatat": 262, "readlinkat": 267, "faccessat": 269, "set_robust_list": 273, "getrandom": 318,
    "membarrier": 324, "statx": 332, "rseq": 334, "faccessat2": 439,
}  # fmt: skip
FATAL = {
    "pipe": 22, "pipe2": 293, "socket": 41, "connect": 42, "accept": 43, "sendto": 44, "sendmsg": 46, "bind": 49,
    "listen": 50, "socketpair": 53, "clone": 56, "fork": 57, "vfork": 58, "execve": 59, "kill": 62, "truncate": 76,
    "ftruncate": 77, "rename": 82, "mkdir": 83, "rmdir": 84, "link": 86, "unlink": 87, "symlink": 88, "chmod": 90,
    "fchmod": 91, "chown": 92, "ptrace": 101, "setsid": 112, "tkill": 200, "tgkill": 234, "mkdirat": 258, "unlinkat": 263,
    "renameat": 264, "linkat": 265, "symlinkat": 266, "fchmodat": 268, "process_vm_readv": 310, "process_vm_writev": 311,
    "renameat2": 316, "execveat": 322, "io_uring_setup": 425, "clone3": 435,
}  # fmt: skip
O_TMPFILE = 0o20000000
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | O_TMPFILE
# Number, which argument, and either bits that it must not have or the values that it may have.
NOT_BITS = {"open": (2, 1, WRITING), "openat": (257, 2, WRITING)}
ONE_OF = {
    "ioctl": (16, 1, (0x5401, 0x5450, 0x5451)),  # is it a terminal; close on exec
    "fcntl": (72, 1, (0, 1, 2, 3, 1030)),  # copies and flags of descriptors, not who gets their signals
}
AUDIT_ARCH_X86_64, X32 = 0xC000003E, 0x40000000
SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO, SECCOMP_RET_KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
LOAD, EQUAL, ABOVE, BITS, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # classic BPF

# Without seccomp: events of Python's audit hook that end the process, and modules that the program does not get.
AUDITED = (
    "socket.", "subprocess.", "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "os.remove",
    "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.chflags",
    "os.setxattr", "os.removexattr", "os.utime", "os.mkfifo", "os.mknod", "shutil.", "tempfile.", "ctypes.", "pty.",
    "signal.pthread_kill", "resource.setrlimit", "resource.prlimit",
)  # fmt: skip
# Also with seccomp: what fails before any system call where walls hide the folder, and ends the process where they do not.
AUDITED_ALWAYS = ("shutil.",)
FORBIDDEN = 77  # exit code of a process that the audit hook ends
NO_IMPORT = ("_ctypes", "ctypes")


# Methods of the built-in types themselves, whatever a class derived from them overrides.
ELEMENTS: dict[type, Callable[[Any], Any]] = {
    list: list.__iter__,
    tuple: tuple.__iter__,
    set: set.__iter__,
    frozenset: frozenset.__iter__,
}
SAFE_EQUALS: dict[type, Callable[[Any], Any]] = {
    int: int.__pos__,
    float: float.__pos__,
    complex: complex.__pos__,
    str: str.__str__,
    bytes: lambda x: bytes.__getitem__(x, slice(None)),
    bytearray: lambda x: bytearray.__getitem__(x, slice(None)),
}


class _Instruction(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_ushort),
        ("yes", ctypes.c_ubyte),
        ("no", ctypes.c_ubyte),
        ("k", ctypes.c_uint),
    ]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.POINTER(_Instruction))]


def rules() -> list[tuple[int, int, int, int]]:
    """Make the filter as (code, jump if true, jump if false, k): over struct seccomp_data of linux/seccomp.h, in which the
    call's number is at 0, the architecture at 4 and argument i at 16 + 8 i."""
    deny = (RETURN, 0, 0, SECCOMP_RET_ERRNO | EPERM)
    allow = (RETURN, 0, 0, SECCOMP_RET_ALLOW)
    out = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, AUDIT_ARCH_X86_64), deny, (LOAD, 0, 0, 0), (ABOVE, 0, 1, X32), deny]
    for number in ALLOWED.values():
        out += [(EQUAL, 0, 1, number), allow]
    for number in FATAL.values():
        out += [(EQUAL, 0, 1, number), (RETURN, 0, 0, SECCOMP_RET_KILL_PROCESS)]
    for number, argument, bits in NOT_BITS.values():
        out += [(EQUAL, 0, 4, number), (LOAD, 0, 0, 16 + 8 * argument), (BITS, 0, 1, bits), deny, allow]
    for number, argument, values in ONE_OF.values():
        out += [(EQUAL, 0, 2 + 2 * len(values), number), (LOAD, 0, 0, 16 + 8 * argument)]
        for value in values:
            out += [(EQUAL, 0, 1, value), allow]
        out.append(deny)
    return [*out, deny]


def confine(job: Mapping[str, Any]) -> dict[str, str]:
    """Give up, for good, what computing does not need; returns the isolation in words.

    limits  cpu_seconds, memory_bytes, file_bytes
    layers  those of LAYERS to use where the system lets them
    files   what stays readable (walls.python_files)
    inside  the isolation that the process was started in, or ""
    """
    limits, layers, files = job["limits"], job["layers"], job["files"]
    libc = ctypes.CDLL(None, use_errno=True)
    found = dict.fromkeys(LAYERS, "not asked for")
    if "namespace" in layers:
        found["namespace"] = job["inside"] or walls.own_root(libc, files)
    if "landlock" in layers:
        found["landlock"] = walls.landlock(libc, files)
    if sys.platform == "linux":
        walls.drop_capabilities(libc)
        libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # no debugger, no /proc/PID/mem for others of this user
    for kind, most in (
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    if "seccomp" in layers:
        found["seccomp"] = _seccomp(libc)
    if not hides_files(found):
        sys.addaudithook(walls.reading_hook(files))
        found["files"] = "hidden by an audit hook alone"
    if found["seccomp"] != "on":
        sys.addaudithook(_refuse)
        found["audit hook"] = "on"
    sys.addaudithook(_end_always)
    return found


def hides_files(isolation: Mapping[str, str]) -> bool:
    """Tell from an isolation in words that the system itself hides the files and processes of the machine."""
    return isolation.get("namespace", "").startswith("on") or isolation.get("landlock") == "on"


def _seccomp(libc: Any) -> str:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return f"none for {sys.platform} on {platform.machine()}"
    listed = rules()
    code = (_Instruction * len(listed))(*[_Instruction(*r) for r in listed])
    program = _Program(len(listed), code)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0
    ):
        return f"refused: {os.strerror(ctypes.get_errno())}"
    return "on"


def _refuse(
    event: str,
    args: tuple[Any, ...],
    forbidden: tuple[str, ...] = AUDITED,
    imports: tuple[str, ...] = NO_IMPORT,
    writing: int = WRITING,
    end: Callable[[int], Any] = os._exit,
    denied: type[Exception] = PermissionError,
) -> None:
    """End the process upon a forbidden event: the audit hook.

    The defaults are bound early: a program that changes this module's names changes nothing here."""
    if event.startswith(forbidden) or (event == "import" and args[0] == "_posixsubprocess"):
        end(FORBIDDEN)
    if event == "import" and args[0] in imports:
        raise denied(f"{args[0]} is not allowed here")
    if event == "open" and isinstance(args[2], int) and args[2] & writing:
        raise denied(f"opening {args[0]!r} to write is not allowed here")


def _end_always(
    event: str,
    args: tuple[Any, ...],
    forbidden: tuple[str, ...] = AUDITED_ALWAYS,
    end: Callable[[int], Any] = os._exit,
) -> None:
    if event.startswith(forbidden):
        end(FORBIDDEN)


class Failure(Exception):
    """The program did not do what the tests ask."""


def send(pipe: BinaryIO, message: Any) -> None:
    """Write a length, 8 bytes little endian, and a pickle."""
    data = pickle.dumps(message, 4)
    pipe.write(struct.pack("<Q", len(data)) + data)
    pipe.flush()


class _Plain(pickle.Unpickler):
    """Builds plain values: of classes only those that a value cannot be written without."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "builtins" and name in ("complex", "range", "bytearray"):
            return getattr(builtins, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not a plain value")


def receive(pipe: BinaryIO) -> Any:
    """Read the next message. Raises Failure: the other side ended, or sent what is no plain value."""
    head = pipe.read(8)
    if len(head) < 8:
        raise Failure("the program ended before it answered")
    (size,) = struct.unpack("<Q", head)
    if size > MAX_MESSAGE_BYTES:
        raise Failure(f"the program answered with {size} bytes, more than {MAX_MESSAGE_BYTES}")
    data = pipe.read(size)
    try:
        return _Plain(io.BytesIO(data)).load()
    except Exception as e:
        raise Failure(f"the program's answer cannot be read: {e}") from None


def plain(value: Any) -> Any:
    """Copy a value of built-in types; an instance of a class derived from one is taken as that one, so that no method of its
    own is ever asked. Raises TypeError for anything else."""
    if value is None or type(value) in (bool, int, float, complex, str, bytes, range):
        return value
    if isinstance(value, dict):
        return {plain(k): plain(v) for k, v in dict.items(value)}
    for kind, elements in ELEMENTS.items():
        if isinstance(value, kind):
            return kind([plain(x) for x in elements(value)])
    for kind, same in SAFE_EQUALS.items():
        if isinstance(value, kind):
            return same(value)
    raise TypeError(f"returned a {type(value).__name__}, which is no plain value")


def _outcome(call: Callable[[], Any]) -> tuple[str, Any, str]:
    """Call and return (kind, value or name of an exception, text)."""
    try:
        value = call()
        if hasattr(type(value), "__next__"):
            return "iterator", [plain(x) for x in itertools.islice(value, MAX_ITEMS)], ""
        return "value", plain(value), ""
    except BaseException as e:
        return "raised", type(e).__name__, _text(e)


def _text(error: BaseException) -> str:
    try:
        return str(error)[:200]
    except BaseException:
        return ""


def candidate(calls: BinaryIO, replies: BinaryIO) -> None:
    """Run a program and answer calls of its function until there are no more."""
    job = receive(calls)
    send(replies, confine(job))
    names: dict[str, Any] = {"__name__": "candidate"}
    kind, what, text = _outcome(lambda: exec(compile(job["program"], "<program>", "exec"), names))
    function = names.get(job["entry_point"])
    if kind == "value" and not callable(function):
        kind, what, text = "raised", "NameError", f"no function {job['entry_point']}"
    send(replies, (kind, what, text))
    while kind != "raised":
        args, keywords = receive(calls)
        assert callable(function)
        send(replies, _outcome(lambda a=args, k=keywords: function(*a, **k)))  # type: ignore[misc]


def ask(calls: BinaryIO, replies: BinaryIO, *args: Any, **keywords: Any) -> Any:
    """Call the program's function. Raises what it raised: a built-in exception, or Failure."""
    try:
        send(calls, (args, keywords))
    except BrokenPipeError:
        raise Failure("the program ended before it was called") from None
    return _answer(receive(replies))


def _answer(reply: Any) -> Any:
    if not (isinstance(reply, tuple) and len(reply) == 3):
        raise Failure("the program's answer is none")
    kind, value, text = reply
    if kind == "raised":
        error = getattr(builtins, str(value), None)
        # An AssertionError of the program is not one of the tests; SystemExit and the like must not end the tests.
        if isinstance(error, type) and issubclass(error, Exception) and error is not AssertionError:
            raise error(text)
        raise Failure(f"{value}: {text}")
    return iter(value) if kind == "iterator" else value


def tester(calls: BinaryIO, replies: BinaryIO) -> None:
    """Read a job from standard input; write the verdict, one JSON object, to standard output."""
    verdict_pipe = os.fdopen(os.dup(1), "w")
    job = json.loads(sys.stdin.buffer.read())
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    # First: nobody reads the tests here once the program runs.
    own = confine(job)
    send(calls, {k: job[k] for k in ("program", "entry_point", "limits", "layers", "files", "inside")})
    verdict: dict[str, Any] = {"passed": False, "why": "", "isolation": {}}
    try:
        verdict["isolation"] = {"program": receive(replies), "tests": own}
        _answer(receive(replies))
        names: dict[str, Any] = {"__name__": "tests"}
        try:
            helpers = compile(job["prompt"], "<prompt>", "exec")
        except SyntaxError:  # a prompt that is no program by itself defines nothing that tests could use
            helpers = compile("", "<prompt>", "exec")
        exec(helpers, names)
        names[job["entry_point"]] = called = lambda *a, **k: ask(calls, replies, *a, **k)
        exec(compile(job["test"], "<tests>", "exec"), names)
        names["check"](called)
        verdict["passed"] = True
    except Failure as e:
        verdict["why"] = str(e)
    except AssertionError as e:
        verdict["why"] = f"wrong answer: {_text(e)}".rstrip(": ")
    except BaseException as e:
        verdict["why"] = f"{type(e).__name__}: {_text(e)}"
    verdict_pipe.write(json.dumps(verdict))
    verdict_pipe.flush()


if __name__ == "__main__":
    role, reading, writing = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with os.fdopen(reading, "rb") as incoming, os.fdopen(writing, "wb") as outgoing:
        if role == "tester":
            tester(outgoing, incoming)
        else:
            try:
                candidate(incoming, outgoing)
            except (Failure, BrokenPipeError):  # the tester has what it needs
                os._exit(0)
