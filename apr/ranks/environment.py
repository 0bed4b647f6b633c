"""Read from the environment which of several ranks this process is: what mpirun, srun and torchrun say to those they start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..common.errors import UsageError

# Set by `--ranks N` and `--gpus N` for the processes that they start: N, and the file that the exit code goes into.
STARTED, RESULT = "APR_RANKS", "APR_RANKS_RESULT"
# Set by `--gpus N`: the number of the process, and the file that tells where rank 0 listens.
RANK, PLACE = "APR_RANK", "APR_RANKS_AT"


@dataclass(frozen=True)
class Source:
    """Variables of one launcher: of the rank, of the number of ranks, and one without which they mean nothing."""

    name: str
    rank: str
    count: str
    needs: str = ""


SOURCES = (
    Source("apr", RANK, STARTED, PLACE),
    Source("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    Source("MPICH, Intel MPI", "PMI_RANK", "PMI_SIZE"),
    # A batch script has the number of tasks too, and is none of them.
    Source("Slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID"),
    Source("torchrun", "RANK", "WORLD_SIZE", "MASTER_ADDR"),
)


@dataclass(frozen=True)
class Said:
    """Statement of a variable: so many ranks, of which this process is number `rank`."""

    variable: str
    rank: int
    count: int


def said(env: Mapping[str, str]) -> list[Said]:
    """List what the environment says. Raises UsageError where a number is none."""
    found = []
    for s in SOURCES:
        if s.rank not in env or s.count not in env or (s.needs and s.needs not in env):
            continue
        numbers = env[s.rank], env[s.count]
        if not all(n.isascii() and n.isdigit() for n in numbers) or not int(numbers[0]) < int(numbers[1]):
            raise UsageError(
                f"{s.rank}={numbers[0]} and {s.count}={numbers[1]} name no rank of {s.name}; unset them"
            )
        found.append(Said(s.count, *map(int, numbers)))
    return found


def several(env: Mapping[str, str]) -> list[Said]:
    """List what the environment says where it says that there are several ranks, [] for one process."""
    found = said(env)
    return found if any(s.count > 1 for s in found) else []


def check(found: list[Said], rank: int, count: int, words: str) -> None:
    """Raise UsageError where the environment and the communicator contradict each other. words: of the communicator"""
    for s in found:
        if (s.rank, s.count) != (rank, count):
            raise UsageError(
                f"{s.variable}={s.count} says rank {s.rank} of {s.count}, {words} says rank {rank} of {count}: "
                "every process would train by itself. Start with the mpirun of mpi4py's MPI "
                "(under Slurm `srun --mpi=pmix` or pmi2), or unset the variable"
            )


def refuse_several(command: str, env: Mapping[str, str]) -> None:
    """Raise UsageError where a command that is no training is started as several ranks."""
    for s in several(env):
        if s.count > 1:
            raise UsageError(
                f"apr {command} runs as one process, {s.variable}={s.count} says that this is rank {s.rank} of {s.count}; only "
                "`apr pretrain` works with several: start it without mpirun, srun or torchrun"
            )
