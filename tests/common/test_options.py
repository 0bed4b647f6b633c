"""Options declared once: ranges, placeholders, headings and paths follow from the declaration."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from apr.common.errors import UsageError
from apr.common.options import (
    absolute_paths,
    at_home,
    check_ranges,
    exactly_one,
    given,
    groups,
    option,
    parse,
)


@dataclass(frozen=True)
class Model:
    """Model: what is trained."""

    model: str | None = option("a preset or a file", path=True, names=("tiny",))
    init: str | None = option("a checkpoint", metavar="CHECKPOINT", path=True)


@dataclass(frozen=True)
class Flags(Model):
    """All options."""

    lr: float | None = option("peak rate", above=0, metavar="RATE")
    num_steps: int = option("steps", 10, at_least=1)
    beta: float = option("decay", 0.9, at_least=0, below=1)
    hours: float = option("time", 1.0, above=0, at_most=24)
    target: float | None = option("any finite number")
    quiet: bool = option("print nothing", False)
    out_dir: str | None = option("folder to write", path=True, may_change=True)


@pytest.mark.parametrize(
    ("name", "value", "bound"),
    [
        ("lr", 0.0, "above 0"),
        ("lr", -1, "above 0"),
        ("lr", math.nan, "above 0"),
        ("lr", math.inf, "a finite number"),
        ("num_steps", 0, "at least 1"),
        ("beta", -0.1, "at least 0 and below 1"),
        ("beta", 1.0, "at least 0 and below 1"),
        ("hours", 1e10, "above 0 and at most 24"),
        ("hours", math.nan, "above 0 and at most 24"),
        ("target", math.nan, "a finite number"),
        ("target", -math.inf, "a finite number"),
    ],
)
def test_a_number_out_of_its_range(name, value, bound):
    flag = "--" + name.replace("_", "-")
    with pytest.raises(UsageError, match=f"^{flag} = {value}: must be {bound}$"):
        check_ranges(Flags, {name: value})
    with pytest.raises(UsageError, match=f"must be {bound}$"):
        parse(Flags, [f"{flag}={value}"], "apr", "")


def test_numbers_within_their_ranges():
    edges = {
        "lr": 1e-300,
        "num_steps": 1,
        "beta": 0,
        "hours": 24,
        "target": -1e300,
        "quiet": False,
        "init": None,
    }
    check_ranges(Flags, edges | {"num_steps": 2**63 - 1})
    with pytest.raises(UsageError, match=f"^--num-steps = 1.*: must be at most {2**63 - 1}$"):
        check_ranges(Flags, edges | {"num_steps": 10**400})
    assert given(Flags, ["--beta", "0", "--num-steps", "1"], "apr", "") == {"beta": 0.0, "num_steps": 1}


def test_the_help_has_headings_and_placeholders(capsys):
    with pytest.raises(SystemExit):
        parse(Flags, ["--help"], "apr", "")
    text = capsys.readouterr().out
    assert "\nmodel:\n  what is trained\n" in text
    for row in ("--model MODEL", "--init CHECKPOINT", "--lr RATE", "--num-steps STEPS", "--out-dir PATH"):
        assert f"\n  {row} " in text, row
    assert [(heading, [f.name for f in fields]) for heading, fields in groups(Flags)] == [
        ("Model: what is trained", ["model", "init"]),
        ("", ["lr", "num_steps", "beta", "hours", "target", "quiet", "out_dir"]),
    ]


def test_paths_are_made_absolute_where_they_lead_somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "x"):
        (tmp_path / name).touch()
    values = {"model": "tiny", "init": "x", "out_dir": "x", "lr": 1.0}
    # A name is no path though a file is called so; a path that may change is of no use to a comparison.
    assert absolute_paths(Flags, values) == {**values, "init": str(tmp_path / "x")}
    assert absolute_paths(Flags, {"model": "x", "init": "gone"}) == {
        "model": str(tmp_path / "x"),
        "init": "gone",
    }


@dataclass(frozen=True)
class Sources:
    """Options with paths in other forms."""

    inputs: tuple[str, ...] = option("files", (), positional=True, path=True)
    mix: str | None = option(
        "paths in a text", inside=lambda text, change: ";".join(map(change, text.split(";")))
    )
    stop: str | None = option("no path")


def test_paths_begin_at_home_where_no_shell_has_looked(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    home = {"init": f"{tmp_path}/a", "out_dir": str(tmp_path)}
    assert given(Flags, ["--init=~/a", "--out-dir=~"], "apr", "") == home
    assert at_home(Flags, {"init": "~/a", "out_dir": "~", "lr": None}) == home | {"lr": None}
    assert given(Sources, ["~/a", "b~", "~no such user/x", "--mix=~/c;d", "--stop=~/"], "apr", "") == {
        "inputs": [f"{tmp_path}/a", "b~", "~no such user/x"],
        "mix": f"{tmp_path}/c;d",
        "stop": "~/",
    }


def test_exactly_one():
    exactly_one(Flags(init="x"), ("model", "init"), "which model")
    with pytest.raises(UsageError, match=r"say which model: give --model or --init, one of them$"):
        exactly_one(Flags(), ("model", "init"), "which model")
    with pytest.raises(UsageError, match="--model and --init were given"):
        exactly_one(Flags(model="tiny", init="x"), ("model", "init"), "which model")


def test_a_needed_option():
    @dataclass(frozen=True)
    class Write:
        """Options of a command that writes."""

        output: str = option("file to write", "", needed=True, short="o")

    assert parse(Write, ["-o", "x"], "apr", "") == Write("x")
    for args in ([], ["--output", ""]):
        with pytest.raises(UsageError, match=r"^--output or -o is needed: file to write;"):
            parse(Write, args, "apr", "")
