"""Commands that messages offer: whatever a file or a key is called, a shell that gets one runs that and nothing else."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import apr
from apr.checkpoints.registry import open_any
from apr.cli.main import COMMANDS
from apr.cli.run import read_prompts
from apr.common.errors import AprError
from apr.common.shell import jq_path, python, word
from apr.data.conversations.keys import looks_like
from apr.data.find import find_sources

RUN = "touch pwned"
# Each ends one way of quoting, of the shell or of Python, and runs something.
EVIL = [f"a'; {RUN}; '", f"a$({RUN})", "-'),open('pwned','w')#"]


def tar() -> bytes:
    out = io.BytesIO()
    tarfile.open(fileobj=out, mode="w").close()
    return out.getvalue()[:257] + b"ustar" + b"\xff" * 99


def adapter(path: Path) -> None:
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    (path / "adapter_model.safetensors").write_bytes(b"")


# What is written, the reader that refuses it, and the first word of the command that its message offers.
OFFERS: dict[str, tuple[str, Callable[[Path], object], Callable[[Path], object], str]] = {
    "tar": (".tar", lambda p: p.write_bytes(tar()), lambda p: find_sources([p]), "tar -xf "),
    "table": (".csv", lambda p: p.write_text("a,b\n1,2\n"), lambda p: find_sources([p]), "python3 -c "),
    "database": (
        ".db",
        lambda p: p.write_bytes(b"SQLite format 3\0"),
        lambda p: find_sources([p]),
        "sqlite3 ",
    ),
    "arrow": (".arrow", lambda p: p.write_bytes(b"ARROW1\0\0"), lambda p: find_sources([p]), "python3 -c "),
    "prompts": (".json", lambda p: p.write_text("[]"), read_prompts, "jq -r "),
    "adapter": ("", adapter, lambda p: open_any(str(p)), "apr merge "),
}


@pytest.mark.parametrize("name", EVIL)
@pytest.mark.parametrize("kind", OFFERS)
def test_no_name_is_run(kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suffix, make, read, first = OFFERS[kind]
    monkeypatch.chdir(tmp_path)
    path = Path(name + suffix)
    make(path)
    with pytest.raises(AprError) as e:
        read(path)
    command = first + str(e.value).split(first, 1)[1].split("; a table that is text")[0]
    # Stand-ins for the tools, which tell what they were given.
    (tmp_path / "bin").mkdir()
    for tool in ("apr", "jq", "sqlite3", "tar"):
        (tmp_path / "bin" / tool).write_text('#!/bin/sh\nfor x; do printf "%s\\0" "$x"; done >> got\n')
        (tmp_path / "bin" / tool).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    subprocess.run(["sh", "-c", command], env=env, cwd=tmp_path, capture_output=True, check=False)
    assert not (tmp_path / "pwned").exists()
    if first.startswith("python3"):
        assert kind != "table" or json.loads((tmp_path / "data.jsonl").read_text()) == {"a": "1", "b": "2"}
    else:
        got = (tmp_path / "got").read_text().split("\0")
        assert (f"./{path}" if name.startswith("-") else str(path)) in got


@pytest.mark.parametrize("name", EVIL)
def test_no_key_is_run(name: str, tmp_path: Path) -> None:
    turn = [
        {"from who": "a", "value": "b"},
        {"question": "a", "answer": "b"},
        "a",
        {"prompt": "a", "response": "b"},
    ]
    records = [{name: [t, t]} for t in turn] + [{f"text{name}": "a"}, {f"{name}": "Human: a\n\nAssistant: b"}]
    for record in records:
        for part in re.findall(r"(?:--map|--content-field|jq -c) .*", looks_like(record), re.DOTALL):
            subprocess.run(["sh", "-c", f"true {part}"], cwd=tmp_path, capture_output=True, check=False)
    assert not (tmp_path / "pwned").exists()


def test_words() -> None:
    assert word("runs/a b") == "'runs/a b'"
    assert word(Path("-rf")) == "./-rf"
    assert word("runs/demo") == "runs/demo"
    assert python("print(1)", "a b") == "python3 -c \"print(1)\" 'a b'"
    assert python("print('$HOME')") == """python3 -c 'print('"'"'$HOME'"'"')'"""
    assert (jq_path("data"), jq_path("a'b")) == (".data", """.["a'b"]""")


def _unquoted(path: Path) -> Iterator[str]:
    """Yield the places of a module where a command is written with a value that `word` did not quote."""
    command = re.compile(
        rf"(?:apr (?:{'|'.join(COMMANDS)})(?: [a-z-]+)?|tar -xf|jq -\w|sqlite3 -\w+) ['\"]?\.?$"
    )
    for node in ast.walk(ast.parse(path.read_text())):
        parts = node.values if isinstance(node, ast.JoinedStr) else []
        for text, value, after in zip(parts, parts[1:], [*parts[2:], None], strict=False):
            if not isinstance(value, ast.FormattedValue) or not isinstance(text, ast.Constant):
                continue
            is_title = isinstance(after, ast.Constant) and str(after.value).startswith(":")
            if command.search(str(text.value)) and not is_title and "word(" not in ast.unparse(value):
                yield f"{path.name}:{node.lineno}: {ast.unparse(value)}"


def test_every_command_quotes_its_words(tmp_path: Path) -> None:
    found = [place for path in Path(apr.__file__).parent.rglob("*.py") for place in _unquoted(path)]
    # Flags that apr itself spells.
    assert [f for f in found if not f.endswith(": {name}")] == []
    (tmp_path / "a.py").write_text(
        'f"see apr validate {path}"\nf"{p}: apr merge {word(p)} -o x"\nf"apr verify {p}: DONE"\n'
    )
    assert list(_unquoted(tmp_path / "a.py")) == ["a.py:1: {path}"]
