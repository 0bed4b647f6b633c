"""`apr completion`: what TAB offers in bash, zsh and fish, and that the table behind it is that of the commands' options."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from apr.cli.completion import SHELLS, TABLE, script
from apr.cli.main import COMMANDS, main
from apr.model.presets import PRESETS
from apr.model.schedule import SCHEDULES

ROOT = Path(__file__).resolve().parents[2]


def shell(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """A folder with the three scripts and a file to complete."""
    folder = tmp_path_factory.mktemp("completion")
    for name in SHELLS:
        (folder / f"apr.{name}").write_text(script(name))
    (folder / "some corpus.txt").write_text("x")
    return folder


def bash(scripts: Path, *words: str) -> list[str]:
    """What the last word is completed to, in a bash that cannot start any program."""
    code = 'source apr.bash; PATH=/nonexistent; COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); _apr; '
    code += "printf '%s\\n' \"${COMPREPLY[@]}\""
    done = subprocess.run(
        [shell("bash"), "--norc", "-c", code, "x", "apr", *words], cwd=scripts, capture_output=True, text=True
    )
    assert done.stderr == ""
    return done.stdout.split("\n")[:-1] if done.stdout.strip() else []


def fish(scripts: Path, *words: str) -> list[str]:
    line = " ".join(["apr", *words])
    code = f"source apr.fish; set PATH; complete -C '{line}'"
    done = subprocess.run(
        [shell("fish"), "--no-config", "-c", code], cwd=scripts, capture_output=True, text=True, check=True
    )
    return [row.split("\t")[0] for row in done.stdout.splitlines()]


@pytest.mark.parametrize("complete", [bash, fish], ids=["bash", "fish"])
@pytest.mark.parametrize(
    ("words", "want"),
    [
        (["ver"], {"verify"}),
        (["tokenize", ""], {"train", "import-hf", "encode-corpus", "audit", "repair-manifest"}),
        (["tokenize", "enc"], {"encode-corpus"}),
        (["pretrain", "--num"], {"--num-steps"}),
        (["pretrain", "--schedule", ""], set(SCHEDULES)),
        (["pretrain", "--device", ""], {"auto", "cpu", "cuda"}),
        (["pretrain", "--model", ""], set(PRESETS)),
        (["pretrain", "--model", "qwen3"], {p for p in PRESETS if p.startswith("qwen3")}),
        (["pretrain", "--no-g"], {"--no-graph"}),
        (["tokenize", "train", "--norm"], {"--normalization"}),
        (["tokenize", "train", "x", "--normalization", ""], {"none", "nfc"}),
        (["trace", "llama"], {p for p in PRESETS if p.startswith("llama")}),
        (["bisect", "--seed", "3", "mis"], {"mistral-tiny"}),
        (["completion", ""], set(SHELLS)),
        (["eval", "verify", "--human"], {"--humaneval"}),
        (["pretrain", "--num-steps", ""], set()),
        (["nothing-such", "--"], set()),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else " ".join(sorted(x)),
)
def test_what_is_offered(scripts, complete, words, want):
    got = {
        word for word in complete(scripts, *words) if "corpus.txt" not in word and not word.startswith("apr.")
    }
    if words[-1] == "":
        got -= {"--help", "--version"}
    assert got == want


def test_every_command_and_every_option_is_offered(scripts):
    table = json.loads(TABLE.read_text())
    assert set(bash(scripts, "")) == {*COMMANDS, "--help", "--version"}
    for name, entry in table.items():
        want = {n for o in entry["options"] if not o["positional"] for n in o["names"] if n.startswith("--")}
        got = {word for word in bash(scripts, *name.split(), "--") if word.startswith("--")}
        assert got == want | {"--help"}, name
    assert {"apr " + name.split()[0] for name in table} == {"apr " + name for name in COMMANDS}


def test_a_value_behind_an_equals_sign(scripts):
    assert bash(scripts, "run", "--device", "=", "cu") == ["cuda"]  # as bash cuts --device=cu
    assert bash(scripts, "run", "--device", "=") == ["auto", "cpu", "cuda"]


def test_only_the_first_argument_of_trace_is_a_preset(scripts):
    assert bash(scripts, "trace", "--device", "cpu", "qwen3-t") == ["qwen3-tiny"]
    assert bash(scripts, "trace", "qwen3-tiny", "qwen") == []


def typed(argv: list[str], folder: Path, first: str, line: str) -> str:
    """What an interactive shell shows when `line`, which ends in a TAB, is typed.

    A command typed behind it shows when the shell has done with the TAB."""
    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.environ.update(TERM="dumb", HOME=str(folder))
        os.execv(argv[0], argv)

    def read(until: str) -> str:
        out = b""
        while not re.search(until, out.decode(errors="replace")):
            assert select.select([fd], [], [], 120)[0], out
            out += os.read(fd, 65536)
        return out.decode(errors="replace")

    try:
        os.write(fd, f"{first}; PS1=wh''at; echo rea''dy\n".encode())
        # With the prompt the shell reads keys itself; before, the terminal would take Ctrl-U for its own.
        read(r"(?s)ready\r?\n.*what")
        os.write(fd, f"{line}\x15echo do''ne\r".encode())
        return read("done")
    finally:
        os.close(fd)
        os.kill(pid, 9)
        os.waitpid(pid, 0)


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("apr pretrain --dev\t", "--device "),
        ("apr pretrain --corpus some\t", r"some\ corpus.txt"),
        ("apr trace qwen3-t\t", "qwen3-tiny "),
        ("apr tokenize repair\t", "repair-manifest "),
    ],
)
@pytest.mark.parametrize("name", ["bash", "zsh"])
def test_a_key_press_in_a_real_shell(scripts, name, line, want):
    first = {
        "bash": "source apr.bash",
        "zsh": "autoload -Uz compinit; compinit -u -D; source apr.zsh",
    }[name]
    flags = {"bash": ["--norc", "-i"], "zsh": ["-f", "-i"]}[name]
    assert want in typed([shell(name), *flags], scripts, first, line)


@pytest.mark.parametrize("name", SHELLS)
def test_the_script_is_sound_and_calls_nothing(scripts, name):
    path = shell(name)
    done = subprocess.run([path, "-n", str(scripts / f"apr.{name}")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_it_is_printed_fast_and_without_what_computes():
    """What takes its time are imports: none but of the standard library, and of few modules of apr."""
    code = (
        "import sys; before = set(sys.modules); from apr.cli.main import main; main(['completion', 'bash']); "
        "new = set(sys.modules) - before; rooms = {m.split('.')[0] for m in new}; "
        "others = rooms - sys.stdlib_module_names - {'apr'}; assert not others, others; "
        "own = {m for m in new if m.startswith('apr.')}; assert len(own) < 18, own; assert len(new) < 160, len(new)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("complete -o default -F _apr apr\n")


def test_the_command(capsys):
    assert main(["completion", "fish", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"shell": "fish", "script": script("fish")}
    assert main(["completion", "tcsh"]) == 2
    assert "bash, zsh, fish" in capsys.readouterr().err
    assert main(["completion"]) == 2
