"""Writing: what stands in the place of an output is a regular file or nothing, in every way of writing."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from apr.cli.main import main
from apr.common import atomic
from apr.common.atomic import (
    atomic_write,
    check_output,
    drawn,
    remove_leftovers,
    try_folder,
    try_output,
    write_figure,
    write_json,
    write_text,
    writing_several,
)
from apr.common.errors import IOFailure
from apr.training.metrics import MetricsLog


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(path.name)
    finally:
        os.chdir(here)


NO_OUTPUTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "folder": (lambda p: p.mkdir(), "is a folder"),
    "pipe": (os.mkfifo, "is a pipe"),
    "socket": (_socket, "is a socket"),
    "link to a device": (lambda p: p.symlink_to("/dev/full"), "is a link"),
    "link to a file": (lambda p: p.symlink_to("victim"), "is a link"),
    "dangling link": (lambda p: p.symlink_to("gone"), "is a link"),
    "circle of links": (lambda p: p.symlink_to(p.name), "is a link"),
}


WRITERS: dict[str, Callable[[Path], Any]] = {
    "text": lambda p: write_text(p, "x"),
    "json": lambda p: write_json(p, {}),
    "figure": lambda p: write_figure(p, Figure()),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kind", NO_OUTPUTS)
def test_what_is_no_file_is_never_replaced(tmp_path: Path, kind: str, writer: str) -> None:
    make, words = NO_OUTPUTS[kind]
    (tmp_path / "victim").write_text("as it was")
    path = tmp_path / "out"
    make(path)
    before, names = os.lstat(path), sorted(os.listdir(tmp_path))
    with pytest.raises(IOFailure, match=rf"out: cannot write: {words}"):
        WRITERS[writer](path)
    assert os.lstat(path).st_ino == before.st_ino
    assert os.lstat(path).st_mode == before.st_mode
    assert sorted(os.listdir(tmp_path)) == names
    assert (tmp_path / "victim").read_text() == "as it was"


def test_devices_are_refused_by_name() -> None:
    for device in ("/dev/null", "/dev/full"):
        with pytest.raises(IOFailure, match=f"{device}: cannot write: is a device"):
            check_output(device)


def test_what_appears_while_the_file_is_written_stays(tmp_path: Path) -> None:
    path = tmp_path / "out"

    def write() -> None:
        with atomic_write(path) as f:
            f.write(b"x")
            os.mkfifo(path)

    with pytest.raises(IOFailure, match="is a pipe"):
        write()
    assert os.listdir(tmp_path) == ["out"]
    assert path.is_fifo()


def test_files_are_replaced_and_folders_may_be_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "way").symlink_to("real")
    for text in ("one", "two"):
        write_text(tmp_path / "way" / "out", text)
        assert (tmp_path / "real" / "out").read_text() == text


def test_a_log_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.path.symlink_to("gone")
    with pytest.raises(IOFailure, match="is a link"):
        log.open(-1, -1)


def test_figures_have_the_format_of_their_name(tmp_path: Path) -> None:
    for name, begins in (
        ("a.png", b"\x89PNG"),
        ("a.svg", b"<?xml"),
        ("a", b"\x89PNG"),
        ("a.what", b"\x89PNG"),
    ):
        write_figure(tmp_path / name, Figure())
        assert (tmp_path / name).read_bytes().startswith(begins)


@pytest.mark.parametrize(
    "command",
    [
        ["import", "HF", "-o", "OUT", "--force"],
        ["export", "HF", "--format", "gguf", "-o", "OUT", "--force"],
        ["trace", "llama-tiny", "--tokens", "1,2,3", "-o", "OUT"],
    ],
)
def test_commands_leave_a_pipe_where_it_is(
    command: list[str], data: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out"
    os.mkfifo(path)
    names = {"HF": str(data("stories260K/hf")), "OUT": str(path)}
    assert main([names.get(word, word) for word in command]) == 7
    assert f"{path}: cannot write: is a pipe" in capsys.readouterr().err
    assert path.is_fifo()


def test_an_output_is_tried_without_a_trace(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("as it was")
    (tmp_path / "way").mkdir()
    for name in ("old", "new"):
        assert try_output(tmp_path / name) == tmp_path / name
    assert try_folder(tmp_path / "a" / "way") == tmp_path / "a" / "way"
    assert try_folder(tmp_path) == tmp_path
    assert sorted(os.listdir(tmp_path)) == ["old", "way"]
    assert (tmp_path / "old").read_text() == "as it was"


@pytest.mark.parametrize("kind", NO_OUTPUTS)
def test_what_is_no_output_is_said_before_the_work(tmp_path: Path, kind: str) -> None:
    make, words = NO_OUTPUTS[kind]
    make(tmp_path / "out")
    with pytest.raises(IOFailure, match=words):
        try_output(tmp_path / "out")
    if kind != "folder":
        with pytest.raises(IOFailure, match="is no folder"):
            try_folder(tmp_path / "out" / "deep")
    with pytest.raises(IOFailure, match="nope does not exist"):
        try_output("/nope/x")


def test_a_picture_fails_with_a_message_whatever_is_wrong(tmp_path: Path) -> None:
    def draw(path: Path) -> None:
        raise ImportError("no module named kiwisolver")

    with pytest.raises(IOFailure, match=r"p\.png: no picture: ImportError: no module named kiwisolver"):
        drawn(draw, tmp_path / "p.png")


# Commands of hours whose output cannot be written; none may begin to read or to compute.
TRIED = [
    ["import", "HF", "-o", "/nope/x"],
    ["export", "MODEL", "--format", "gguf", "-o", "/nope/x"],
    ["export", "MODEL", "-o", "/dev/null/x"],
    ["merge", "HF", "adapter", "-o", "/nope/x.apr"],
    ["eval", "HF", "--text", "TEXT", "--picture", "/nope/x"],
    ["eval", "HF", "--choices", "TEXT", "--output", "/nope/x"],
    ["trace", "llama-tiny", "--tokens", "1,2", "-o", "/nope/x"],
    ["bisect", "llama-tiny", "--picture", "/nope/x"],
    ["tokenize", "train", "TEXT", "-o", "/dev/null/x"],
    ["tokenize", "import-hf", "HF", "-o", "/dev/null/x"],
    ["tokenize", "audit", "HF", "--picture", "/nope/x"],
]


@pytest.mark.parametrize("command", TRIED, ids=lambda c: "-".join(c[:2]))
def test_outputs_are_tried_before_the_work(
    command: list[str],
    data: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Other inputs are not there, or no models: had they been read first, the error would be about them."""
    folder = tmp_path / "HF"
    folder.mkdir()
    names = {"HF": str(folder), "TEXT": str(tmp_path / "TEXT"), "MODEL": str(data("stories260K/hf"))}
    for begun in ("write_hf", "gguf.write_gguf"):
        monkeypatch.setattr(f"apr.checkpoints.exporting.{begun}", pytest.fail)
    assert main([names.get(word, word) for word in command]) == 7
    assert "/x" in capsys.readouterr().err


def test_a_failure_at_the_end_does_not_take_the_score(
    data: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*args: Any) -> None:
        raise IOFailure("disk full")

    (tmp_path / "t.txt").write_text("Once upon a time there was a little girl. " * 20)
    monkeypatch.setattr("apr.evaluation.loss.picture", full)
    command = ["eval", str(data("stories260K/hf")), "--text", str(tmp_path / "t.txt"), "--json"]
    assert main([*command, "--backend", "reference", "--picture", str(tmp_path / "p.png")]) == 7
    said = capsys.readouterr()
    assert json.loads(said.out)["tokens"] > 100
    assert "disk full" in said.err


# Processes that are killed

KILLED = """
import os, sys
from pathlib import Path
from apr.common.atomic import atomic_write, write_text, writing_several
folder = Path(sys.argv[1])
with writing_several(folder, ["a", "b", "last"]):
    write_text(folder / "a", "x")
    with atomic_write(folder / "b") as f:
        f.write(b"y" * 100)
        f.flush()
        if sys.argv[2] == "kill":
            os.kill(os.getpid(), 9)
        print("ready", flush=True)
        input()
    write_text(folder / "last", "x")
"""


def _start(folder: Path, what: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder), what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_what_a_killed_process_leaves_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "of somebody").write_text("else")
    with _start(tmp_path, "kill") as other:
        assert other.wait() == -9
    assert len(os.listdir(tmp_path)) == 4
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["of somebody"]


def test_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    with _start(tmp_path, "wait") as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        before = sorted(os.listdir(tmp_path))
        remove_leftovers(tmp_path)
        write_text(tmp_path / "mine", "x")
        assert sorted(os.listdir(tmp_path)) == sorted([*before, "mine"])
        other.communicate("\n")
    assert other.returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "last", "mine"]


def test_only_temporaries_of_ours_are_leftovers(tmp_path: Path) -> None:
    names = [".x.tmp", "x.1-deadbeef.tmp", ".x.1-dead.tmp", ".x.a-deadbeef.tmp", ".x.1-deadbeef.tmp.old"]
    for name in names:
        (tmp_path / name).write_text("")
    (tmp_path / "victim").write_text("as it was")
    (tmp_path / ".link.1-deadbeef.tmp").symlink_to("victim")
    (tmp_path / ".folder.1-deadbeef.tmp").mkdir()
    os.mkfifo(tmp_path / ".pipe.1-deadbeef.tmp")
    before = sorted(os.listdir(tmp_path))
    (tmp_path / ".x.1-deadbeef.tmp").write_text("")
    (tmp_path / ".writing.1-deadbeef.tmp").write_text("../victim\n/etc/hostname\na\0b\n..\n\ngone")
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before


def test_files_that_became_whole_stay(tmp_path: Path) -> None:
    for name in ("a", "last"):
        (tmp_path / name).write_text("")
    (tmp_path / ".writing.1-deadbeef.tmp").write_text("a\nlast")
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["a", "last"]


def test_an_error_removes_what_is_new_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("as it was")

    def write() -> None:
        with writing_several(tmp_path, ["a", "b", "last"]):
            write_text(tmp_path / "a", "x")
            raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        write()
    assert os.listdir(tmp_path) == ["b"]


def test_an_export_goes_over_what_a_killed_one_left(
    data: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (
        ".model.safetensors.99999-deadbeef.tmp",
        "model-00001-of-00002.safetensors",
        "tokenizer.json",
    ):
        (tmp_path / name).write_text("")
    listed = "model-00001-of-00002.safetensors\ntokenizer.json\nconfig.json"
    (tmp_path / ".writing.99999-deadbeef.tmp").write_text(listed)
    assert main(["export", str(data("stories260K/hf")), "-o", str(tmp_path)]) == 0
    assert (tmp_path / "model.safetensors").exists()
    assert not [name for name in os.listdir(tmp_path) if ".tmp" in name or "-of-" in name]


STOPPED = """
import os, signal, sys
from apr.checkpoints import hf, apr2, tensors
from apr.cli.main import main
def stop(*args):
    os.kill(os.getpid(), signal.SIGTERM)
    yield b""
hf.encode = apr2.encode = stop
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["import", "export"])
def test_sigterm_leaves_nothing(command: str, data: Callable[[str], Path], tmp_path: Path) -> None:
    args = [command, str(data("stories260K/hf")), "-o", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", STOPPED, *args], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, f"apr {command}: interrupted\n")
    left = tmp_path / "out" if command == "export" else tmp_path
    assert os.listdir(left) == []


@pytest.fixture
def asked(monkeypatch):
    """Names of the threads that asked the disk for the bytes of a file before its end; a call of 8 bytes is enough."""
    names: list[str] = []
    real = atomic.to_disk

    def ask(fd: int) -> None:
        names.append(threading.current_thread().name)
        real(fd)

    monkeypatch.setattr(atomic, "ASK_BYTES", 8)
    monkeypatch.setattr(atomic, "to_disk", ask)
    return names


def test_the_disk_is_asked_while_more_is_written(tmp_path, asked):
    path = tmp_path / "file"
    with atomic_write(path) as f:
        for i in range(50):
            f.write(b"%7d" % i)
    assert path.read_bytes() == b"".join(b"%7d" % i for i in range(50))
    assert asked
    assert {name.split("_")[0] for name in asked} == {"disk"}
    assert not [t for t in threading.enumerate() if t.name.startswith("disk")]


def test_what_is_written_once_is_not_asked_for_before_its_end(tmp_path, asked):
    write_text(tmp_path / "file", "short")
    assert asked == []


@pytest.mark.parametrize("writes", [1, 2, 40])
def test_a_disk_that_fails_meanwhile_leaves_the_file_before(tmp_path, monkeypatch, writes):
    """The system says so once, to the thread that asked: sound calls after it do not hide that bytes are lost."""
    path = tmp_path / "file"
    path.write_text("before")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic, "ASK_BYTES", 8)
    monkeypatch.setattr(atomic, "to_disk", full)
    with pytest.raises(IOFailure, match="No space left on device"), atomic_write(path) as f:  # noqa: PT012 -- the block is what is tested
        for _ in range(writes):
            f.write(b"12345678")
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["file"]
    assert not [t for t in threading.enumerate() if t.name.startswith("disk")]


def test_a_system_without_another_thread_is_asked_at_the_end(tmp_path, asked, monkeypatch):
    tried: list[threading.Thread] = []

    def no_thread(thread: threading.Thread) -> None:
        tried.append(thread)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    with atomic_write(tmp_path / "file") as f:
        for _ in range(40):
            f.write(b"12345678")
    assert (tmp_path / "file").read_bytes() == b"12345678" * 40
    assert len(tried) == 1
    assert asked == []


def test_a_folder_does_not_set_how_pictures_are_drawn(tmp_path, monkeypatch):
    """Matplotlib reads a matplotlibrc of the folder that it is imported in."""
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    with matplotlib.rc_context({"text.usetex": True}):
        drawn(lambda path: path.write_text(str(matplotlib.rcParams["text.usetex"])), tmp_path / "a.png")
        assert matplotlib.rcParams["text.usetex"]  # of the program that apr is a part of
    assert (tmp_path / "a.png").read_text() == "False"


def test_a_log_that_is_removed_in_a_run_is_written_again(tmp_path):
    """Each save looks: without the lines up to its step a state cannot be gone on from."""
    log = MetricsLog(tmp_path)
    log.open(-1, -1)
    for step, harm in enumerate((log.path.unlink, log.path.unlink, lambda: None)):
        log.write(step=step, val_loss=1.0)
        harm()
        log.sync()
        log.write(step=step, train_loss=1.0)
    (tmp_path / "other").write_text("{}")
    (tmp_path / "other").replace(log.path)
    log.sync()
    assert [line["step"] for line in log.lines()] == [0, 0, 1, 1, 2, 2]
    os.truncate(log.path, 20)
    with pytest.raises(IOFailure, match="was cut while the run writes it: 20 bytes, it had"):
        log.sync()
    log.close()
