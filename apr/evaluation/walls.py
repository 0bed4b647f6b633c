"""Hide the files and processes of this machine from a program: a root of its own, or Landlock, or both.

What Python needs of the file system stays, to read; site-packages do not, since benchmarks lie there. Standard library
alone: `sandboxed.py` loads this file where neither the path of apr nor site-packages are there.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

# Beside the standard library: shared libraries, how they are found, time zones, and where output can be sent to nowhere.
SYSTEM = (
    "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store", "/gnu/store", "/etc/ld.so.cache", "/etc/localtime",
    "/usr/share/zoneinfo", "/dev/null",
)  # fmt: skip
PACKAGES = ("site-packages", "dist-packages")

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38
CAPABILITY_VERSION = 0x20080522

# System calls of Landlock, the same on every processor, and rights by its version (linux/landlock.h).
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
READ_FILE, READ_DIR = 1 << 2, 1 << 3
RIGHTS = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
NET_FROM, NET_RIGHTS = 4, 3  # binding and connecting TCP
SCOPES_FROM, SCOPES = 6, 3  # abstract sockets and signals
PATH_BENEATH = 1


class _Ruleset(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scopes", ctypes.c_uint64)]


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("rights", ctypes.c_uint64), ("parent", ctypes.c_int32)]


def python_files() -> dict[str, list[str]]:
    """List what Python needs of the file system: "readable" files and folders, and the "hidden" folders in them."""
    nominal = os.path.dirname(os.path.abspath(os.__file__))
    prefix = os.path.realpath(sys.base_prefix)
    wanted = [nominal, os.path.realpath(nominal), os.path.realpath(sys.executable)]
    wanted += [p for p in sys.path if p.endswith((".zip", "lib-dynload"))]
    wanted += SYSTEM
    wanted += sorted(glob.glob(os.path.join(glob.escape(prefix), "lib*", "*.so*")))
    readable: list[str] = []
    for path in wanted:
        if os.path.exists(path) and not any(_within(path, r) for r in readable):
            readable.append(path)
    hidden = [
        found
        for path in readable
        for name in PACKAGES
        for inner in (name, os.path.join("python*", name))
        for found in glob.glob(os.path.join(glob.escape(path), inner))
        if os.path.isdir(found) and not os.path.islink(found)
    ]
    return {"readable": readable, "hidden": hidden}


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def bubblewrap_command(program: str, files: dict[str, list[str]], more: list[str]) -> list[str]:
    """Make the command line that runs another one behind bubblewrap. more: further files to read."""
    command = [program, "--unshare-all", "--die-with-parent", "--cap-drop", "ALL", "--clearenv"]
    for path in [*files["readable"], *more]:
        command += ["--dev-bind" if path.startswith("/dev/") else "--ro-bind", path, path]
    for path in files["hidden"]:
        command += ["--tmpfs", path, "--remount-ro", path]
    return [*command, "--remount-ro", "/", "--chdir", "/", "--"]


def own_root(libc: Any, files: dict[str, list[str]]) -> str:
    """Move into namespaces of files, network, names and users with a root that holds `files` alone; the result in words.

    The working directory is covered by that root: it must be one of nobody else's."""
    if not sys.platform.startswith("linux"):
        return f"none on {sys.platform}"
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS):
        return f"refused: {os.strerror(ctypes.get_errno())}"
    try:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as f:
                f.write(text)
        _build(libc, os.getcwd(), files)
    except OSError as e:
        return f"refused: {e.filename or 'root'}: {e.strerror}"
    return "on"


def _build(libc: Any, root: str, files: dict[str, list[str]]) -> None:
    """Make `root` the root, with files bound below it. Raises OSError."""
    own = MS_NOSUID | MS_NODEV
    _mount(libc, "none", "/", None, MS_REC | MS_PRIVATE)
    _mount(libc, "tmpfs", root, "tmpfs", own, "mode=755")
    for path in files["readable"]:
        target = root + path
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            open(target, "w").close()
        _mount(libc, path, target, None, MS_BIND | MS_REC)
        # A mount of somebody else's keeps the flags it has; seccomp and Landlock refuse to write in any case.
        with contextlib.suppress(OSError):
            flags = os.statvfs(target).f_flag & (MS_NOSUID | MS_NODEV | 8)
            _mount(libc, None, target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | flags)
    for path in files["hidden"]:
        _mount(libc, "tmpfs", root + path, "tmpfs", own | MS_RDONLY)
    os.chdir(root)
    _mount(libc, None, root, None, MS_REMOUNT | MS_BIND | MS_RDONLY | own)
    # The old root comes to lie upon the new one, and is taken away from there.
    if libc.pivot_root(b".", b".") or libc.umount2(b".", MNT_DETACH):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "pivot_root")
    os.chdir("/")


def _mount(libc: Any, source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    def text(x: str | None) -> bytes | None:
        return None if x is None else os.fsencode(x)

    if libc.mount(text(source), text(target), text(kind), ctypes.c_ulong(flags), text(data)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), target)


def landlock(libc: Any, files: dict[str, list[str]]) -> str:
    """Give up every file but `files`, to read, and with them the processes of others; the result in words."""
    if not sys.platform.startswith("linux"):
        return f"none on {sys.platform}"
    version = libc.syscall(CREATE_RULESET, None, 0, 1)
    if version < 1:
        return f"refused: {os.strerror(ctypes.get_errno())}"
    handled = _Ruleset(
        sum(rights for since, rights in RIGHTS.items() if since <= version),
        NET_RIGHTS if version >= NET_FROM else 0,
        SCOPES if version >= SCOPES_FROM else 0,
    )
    size = 8 * (1 + (version >= NET_FROM) + (version >= SCOPES_FROM))
    ruleset = libc.syscall(CREATE_RULESET, ctypes.byref(handled), size, 0)
    if ruleset < 0:
        return f"refused: {os.strerror(ctypes.get_errno())}"
    for path, rights in _grants(files):
        try:
            parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        rule = _PathBeneath(rights, parent)
        libc.syscall(ADD_RULE, ruleset, PATH_BENEATH, ctypes.byref(rule), 0)
        os.close(parent)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    failed = libc.syscall(RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
    return f"refused: {os.strerror(ctypes.get_errno())}" if failed else "on"


def _grants(files: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    """Yield (path, rights). Landlock knows no exceptions: around a hidden folder, its neighbours are named one by one."""
    waiting = list(files["readable"])
    while waiting:
        path = waiting.pop()
        if path in files["hidden"]:
            continue
        if not os.path.isdir(path):
            yield path, READ_FILE
        elif any(_within(h, path) for h in files["hidden"]):
            # To list; what is in a file below stays closed unless it is named.
            yield path, READ_DIR
            with contextlib.suppress(OSError):
                waiting += [os.path.join(path, name) for name in os.listdir(path)]
        else:
            yield path, READ_FILE | READ_DIR


def drop_capabilities(libc: Any) -> None:
    """Give up what root may do beyond its own files, such as reading other processes."""
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    libc.capset(ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))


def reading_hook(files: dict[str, list[str]]) -> Callable[[str, tuple[Any, ...]], None]:
    """Make an audit hook that lets only `files` be opened. A path is judged as it is spelt."""
    readable = tuple(files["readable"])
    folders = tuple(path.rstrip("/") + "/" for path in readable)
    hidden = tuple(path.rstrip("/") + "/" for path in files["hidden"])

    # Bound early: a program that changes names of this module or of builtins changes nothing here.
    def refuse(
        event: str,
        args: tuple[Any, ...],
        kind: type = type,
        number: type = int,
        text: type = str,
        denied: type[Exception] = PermissionError,
    ) -> None:
        if event != "open" or kind(args[0]) is number:
            return
        path = args[0] if kind(args[0]) is text else ""
        inside = path in readable or (path.startswith(folders) and not path.startswith(hidden))
        if not inside or "/../" in path or path.endswith("/.."):
            raise denied(f"opening {args[0]!r} is not allowed here")

    return refuse
