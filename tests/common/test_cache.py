"""A cache that cannot be written, one that is to stay as it is, and folders among temporary files."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest

from apr.backends.cuda.autotune import Algorithm, Cache, cache_file
from apr.backends.cuda.cublaslt import ALGORITHM_BYTES
from apr.common import temporary
from apr.common.atomic import write_text
from apr.common.cache import in_cache, throwaway_cache
from apr.common.errors import IOFailure
from apr.common.files import make_folder
from apr.common.host import cache_dir


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files, and no setting of a cache."""
    for name in ("APR_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "t").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))
    monkeypatch.setattr(temporary, "private_temporary", temporary.private_temporary.__wrapped__)
    monkeypatch.setattr("apr.common.cache.private_temporary", temporary.private_temporary)
    monkeypatch.setattr("apr.common.host.private_temporary", temporary.private_temporary)
    return tmp_path


def made(folder: Path) -> Path:
    """Find a file in a folder, or make it."""
    if not (folder / "x").exists():
        write_text(make_folder(folder) / "x", "x")
    return folder


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, places: Path) -> None:
    monkeypatch.setenv("HOME", "/h")
    assert cache_dir() == Path("/h/.cache/apr")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_dir() == Path("/h/.cache/apr")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_dir() == Path("/x/apr")
    monkeypatch.setenv("APR_CACHE", "/a")
    assert cache_dir() == Path("/a")


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, places: Path) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    assert places / "t" in cache_dir().parents
    for module in ("host", "cache"):
        monkeypatch.setattr(f"apr.common.{module}.private_temporary", lambda name: None)
    with pytest.raises(IOFailure, match="set APR_CACHE"):
        in_cache("corpora", made)


def test_a_cache_that_can_be_written(monkeypatch: pytest.MonkeyPatch, places: Path, capsys) -> None:
    monkeypatch.setenv("HOME", str(places / "h"))
    assert in_cache("corpora", made) == places / "h/.cache/apr/corpora"
    assert capsys.readouterr().err == ""
    assert not list((places / "t").iterdir())


def test_a_home_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, places: Path, capsys) -> None:
    """One note, and the same folder for the next process."""
    monkeypatch.setenv("HOME", "/proc/none")
    folder = in_cache("corpora", made)
    assert places / "t" in folder.parents
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "/proc/none/.cache/apr/corpora cannot be written" in err
    assert "APR_CACHE" in err
    assert in_cache("corpora", made) == folder
    # Only this user may write there: others could put anything into it.
    assert folder.parents[1].stat().st_mode & 0o777 == 0o700


def test_what_a_cache_that_cannot_be_written_has_is_used(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("HOME", "/proc/none")
    monkeypatch.setattr(Path, "is_dir", lambda self: True)
    assert in_cache("corpora", lambda folder: folder) == Path("/proc/none/.cache/apr/corpora")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("place", ["/proc/none", "{places}/file", "{places}/file/inner"])
def test_a_cache_that_was_named_and_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, places: Path, place: str
) -> None:
    (places / "file").write_text("")
    monkeypatch.setenv("APR_CACHE", place.format(places=places))
    with pytest.raises(IOFailure, match=r"APR_CACHE=.* cannot be written .*; set it to a folder that can"):
        in_cache("corpora", made)


def test_another_failure_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch, places: Path) -> None:
    monkeypatch.setenv("APR_CACHE", str(places / "a"))

    def full(folder: Path) -> None:
        raise IOFailure("disk full")

    with pytest.raises(IOFailure, match=r"^disk full$"):
        in_cache("corpora", full)


def test_nowhere_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/proc/none")
    monkeypatch.setattr("apr.common.cache.private_temporary", lambda name: None)
    with pytest.raises(IOFailure, match="set APR_CACHE to a folder that can"):
        in_cache("corpora", made)


@pytest.mark.parametrize("what", ["link", "file", "others"])
def test_a_folder_of_somebody_else_is_not_used(places: Path, what: str) -> None:
    theirs = places / "t" / f"apr-{os.getuid()}"
    (places / "elsewhere").mkdir()
    if what == "link":
        theirs.symlink_to(places / "elsewhere")
    elif what == "file":
        theirs.write_text("")
    else:
        theirs.mkdir()
        theirs.chmod(0o777)
    folder = temporary.private_temporary("numba")
    assert folder is not None
    assert theirs not in folder.parents
    assert not list((places / "elsewhere").iterdir())
    assert folder.parent.stat().st_mode & 0o777 == 0o700


def test_no_place_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/none")
    assert temporary.private_temporary("numba") is None
    with throwaway_cache("cublaslt"):
        assert cache_dir() == Path(os.devnull)
    assert "APR_CACHE" not in os.environ


def test_what_a_search_finds_while_nothing_is_to_be_written(
    monkeypatch: pytest.MonkeyPatch, places: Path, capsys
) -> None:
    """What is known is read, and what is new is gone."""
    monkeypatch.setenv("APR_CACHE", str(places / "a"))
    known, new = Algorithm(b"\1" * ALGORITHM_BYTES, 0, 1.0), Algorithm(b"\2" * ALGORITHM_BYTES, 0, 1.0)
    there = Cache(cache_file("GPU", "13.0"), "GPU", "13.0")
    there.put("a", known)
    there.save()
    before = {p: p.read_bytes() for p in (places / "a").rglob("*") if p.is_file()}
    with throwaway_cache("cublaslt"):
        copy = Cache(cache_file("GPU", "13.0"), "GPU", "13.0")
        assert (copy.get("a"), copy.get("b")) == (known, None)
        copy.put("b", new)
        copy.save()
        assert len(json.loads(copy.path.read_text())["algorithms"]) == 2
    assert {p: p.read_bytes() for p in (places / "a").rglob("*") if p.is_file()} == before
    assert os.environ["APR_CACHE"] == str(places / "a")
    assert not list((places / "t").iterdir())
    assert capsys.readouterr().err == ""
    # An error of the block goes on.
    with pytest.raises(FileNotFoundError), throwaway_cache("cublaslt"):
        raise FileNotFoundError


def test_matplotlib_has_a_place(monkeypatch: pytest.MonkeyPatch, places: Path) -> None:
    for name in ("MPLCONFIGDIR", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, "")  # so that what is set here is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(places))
    temporary.place_for_matplotlib()
    assert "MPLCONFIGDIR" not in os.environ
    monkeypatch.setenv("HOME", "/proc/none")
    temporary.place_for_matplotlib()
    assert Path(os.environ["MPLCONFIGDIR"]).parents[1] == places / "t"
    monkeypatch.setenv("MPLCONFIGDIR", "/somebody/chose")
    temporary.place_for_matplotlib()
    assert os.environ["MPLCONFIGDIR"] == "/somebody/chose"
