"""What surrounds ranks: folders of launchers, early signals, folders that one machine does not see, the page."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import pytest

from apr.cli import main as cli
from apr.common.errors import Refused
from apr.evidence.ranks import members, times
from apr.ranks import launch
from apr.report.ranks import rank_chart, rank_section
from apr.training import followed
from apr.training.signals import StopRequest


def test_folders_of_killed_launchers_go_at_the_next_start(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    elsewhere, begins = f"{gone.pid}-elsewhere", f"{gone.pid}-begins"
    for name in (f"{gone.pid}-a", f"{os.getppid()}-b", "of-somebody-else", elsewhere, begins):
        (tmp_path / f"{launch.FOLDERS}{name}").mkdir()
        (tmp_path / f"{launch.FOLDERS}{name}" / launch.HELD).touch()
    (tmp_path / f"{launch.FOLDERS}{begins}" / launch.HELD).unlink()
    # A launcher of another machine or container that has the same folder of temporary files: its number is free here.
    with (tmp_path / f"{launch.FOLDERS}{elsewhere}" / launch.HELD).open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with launch._folder() as own:
            left = {p.name.removeprefix(launch.FOLDERS) for p in tmp_path.iterdir()}
            assert os.path.basename(own).startswith(f"{launch.FOLDERS}{os.getpid()}-")
            assert {f"{os.getppid()}-b", "of-somebody-else", elsewhere, begins} < left
            assert f"{gone.pid}-a" not in left
            with pytest.raises(BlockingIOError):
                launch._is_free(tmp_path / own / launch.HELD)
    assert not os.path.exists(own)
    with launch._folder():
        assert not (tmp_path / f"{launch.FOLDERS}{elsewhere}").exists()


def test_a_signal_in_the_first_seconds_stops_a_training_and_kills_no_process(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_find", lambda name: lambda *args: os.kill(os.getpid(), signal.SIGUSR1))
    assert cli.main(["pretrain"]) == 130
    assert "apr pretrain:" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_one_rank_says_that_all_stop_and_says_it_once(capfd):
    first, other = StopRequest(says=True), StopRequest(says=False)
    other(signal.SIGUSR1, None)
    assert first.agreed([False, other.is_asked])
    first(signal.SIGUSR1, None)
    assert not StopRequest().agreed([False, False])
    said = capfd.readouterr().err
    assert said == "\nstopping after this step; rank 1 was asked to\n"
    with pytest.raises(KeyboardInterrupt):
        first(signal.SIGUSR1, None)


def test_a_folder_that_a_rank_does_not_see_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(followed, "SEEN_SECONDS", 0.3)
    (tmp_path / "config.json").write_text("{}")
    sha256 = hashlib.sha256(b"{}").hexdigest()
    followed.check_seen(tmp_path, sha256, 1)
    monkeypatch.setattr(followed, "SEEN_SECONDS", -1.0)
    followed.check_seen(tmp_path, sha256, 1)
    with pytest.raises(
        Refused, match=r"rank 3 finds another config\.json in it; give a --run-dir that all machines see"
    ):
        followed.check_seen(tmp_path, sha256[::-1], 3)
    with pytest.raises(Refused, match="rank 1 finds none in it"):
        followed.check_seen(tmp_path / "elsewhere", sha256, 1)


def test_the_page_shows_ranks_and_the_slowest_of_them(tmp_path):
    run = SimpleNamespace(ckpt=tmp_path / "ckpt")
    assert rank_section(run) is None
    assert rank_chart(run, 4.0) == []
    ranks = [{"host": f"node{r}", "uuid": f"GPU-{r}", "part": [[10 * r, 10 * r + 10]]} for r in range(3)]
    record = {
        "starts": [{"after_step": 0, "ranks": ranks[:2]}, {"after_step": 2, "ranks": ranks}, {"ranks": 7}],
        "seconds": {"4": [0.1, 0.3, 0.1], "2": [0.2, 0.2], "x": [1], "6": "none"},
    }
    (tmp_path / "ranks.json").write_text(json.dumps(record))
    assert [(step, len(r)) for step, r in members(tmp_path)] == [(0, 2), (2, 3)]
    assert times(tmp_path) == [(2, [0.2, 0.2]), (4, [0.1, 0.3, 0.1])]
    found = rank_section(run)
    assert found["starts"] == "2 ranks after step 0, 3 ranks after step 2"
    row = {"rank": 1, "host": "node1", "gpu": "GPU-1", "part": "33.3 %", "ms": "300.0", "beside": "3.00"}
    assert found["rows"][1] == row
    record["starts"].append({"after_step": 4, "ranks": ranks})
    (tmp_path / "ranks.json").write_text(json.dumps(record))
    assert [r["ms"] for r in rank_section(run)["rows"]] == ["", "", ""]
    (chart,) = rank_chart(run, 4.0)
    assert "slowest rank" in str(vars(chart))
