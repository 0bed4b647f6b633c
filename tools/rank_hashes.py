"""Do several GPUs give the bits of one, however they move bytes, and does a rank that is lost end the others by name?

    python tools/rank_hashes.py --worlds 1,2 --record out.json
    python tools/rank_hashes.py --worlds 1,2,3,4 --shared          on one GPU, which all ranks share
    python tools/rank_hashes.py --worlds 1,2 --played              without a GPU: NCCL played on host memory

Ranks of one world are processes that run all its jobs, one after the other (tests/support/rank_jobs.py): a small model with
micro-batches that no number of ranks divides. Everything that a job computes (checkpoints, the last state, losses, norms)
becomes one hash, which must be that of one process. Then, in processes of their own, the last rank is killed and halted in the
middle of a recorded pass, and slow. Exit code 1 when anything is not as it must be.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np

from apr.checkpoints.apr2 import read_apr
from apr.common.provenance import circumstances
from apr.model.hf_config import to_hf
from apr.model.presets import PRESETS
from apr.ranks.environment import PLACE, RANK, RESULT, STARTED
from apr.ranks.library import SHARED

JOBS = ROOT / "tests/support/rank_jobs.py"
TIMEOUT = 4  # of --rank-timeout where a rank is halted
# Five micro-batches a step.
RECIPE = [
    "--lr", "3e-3", "--warmup-steps", "1", "--num-steps", "6", "--steps-per-epoch", "3", "--batch-size", "5",
    "--micro-batch-size", "1", "--val-batches", "2", "--val-fraction", "0.3", "--spot-check", "-1", "--keep-states", "5",
    "--seq-length", "64", "--cross-check", "3",
]  # fmt: skip


@dataclasses.dataclass
class Place:
    """Folder of a corpus, a model and the runs."""

    folder: Path
    device: str
    is_shared: bool
    is_played: bool

    def make(self) -> Place:
        """Write the corpus and the model."""
        (self.folder / "corpus").mkdir(parents=True)
        stdlib = Path(sysconfig.get_paths()["stdlib"])
        for source in sorted((stdlib / "json").glob("*.py")) + sorted((stdlib / "email").glob("*.py")):
            shutil.copy(source, self.folder / "corpus" / f"{source.parent.name}-{source.name}")
        sizes = {
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_layers": 3,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 64,
        }
        cfg = dataclasses.replace(
            PRESETS["qwen2-tiny"], vocab_size=1000, max_position_embeddings=128, **sizes
        )
        (self.folder / "model.json").write_text(json.dumps(to_hf(cfg)))
        return self

    def run(self, name: str, world: int) -> Path:
        """Name the folder of a run."""
        return self.folder / f"{name}-{world}"

    def job(
        self, name: str, world: int, *more: str, fault: str = "none", resumes: str = ""
    ) -> dict[str, Any]:
        """Describe a job of rank_jobs.py."""
        asked = ["--gpus", str(world)] if world > 1 else []
        if resumes:
            args = ["--resume", "--run-dir", resumes, *asked]
        else:
            text = ["--corpus", str(self.folder / "corpus"), "--device", self.device, *self.model(more)]
            args = [*text, *RECIPE, *asked, "--run-dir", str(self.run(name, world)), *more]
            args += ["--threads", "1"] if self.is_played else []
        return {"name": name, "args": args, "fault": fault}

    def model(self, more: tuple[str, ...]) -> list[str]:
        """Give --model where a job names no checkpoint to begin with."""
        return [] if "--init" in more else ["--model", str(self.folder / "model.json")]

    def start(self, name: str, world: int, jobs: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
        """Run jobs on the ranks of a world; returns outcomes, seconds of each, and what the ranks said of errors."""
        path, errors = self.folder / f"{name}.json", [self.folder / f"{name}-{r}.err" for r in range(world)]
        path.write_text(json.dumps(jobs))
        env = {
            **os.environ,
            "APR_CACHE": str(self.folder / "cache"),
            "OPENBLAS_NUM_THREADS": "1",
            "STACKS_AFTER": str(0.8 * seconds),
        }
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(JOBS.parent), env.get("PYTHONPATH", "")])
        if world > 1:
            env |= {STARTED: str(world), PLACE: f"{path}.at", RESULT: f"{path}.code"}
        # Kernels that wait share the GPU with those that are waited for.
        env |= {SHARED: "1", "NCCL_MAX_CTAS": "2"} if self.is_shared else {}
        command = [
            sys.executable,
            str(JOBS),
            str(path),
            *(["played"] if self.is_played and world > 1 else []),
        ]
        start, ended = time.time(), dict[int, float]()
        processes = [
            subprocess.Popen(
                command, env=env | ({RANK: str(r)} if world > 1 else {}), stderr=errors[r].open("wb")
            )
            for r in range(world)
        ]
        # Halted ones do not end by themselves.
        while 0 not in ended or (len(ended) < world and time.time() < max(ended.values()) + 3):
            ended |= {
                r: time.time() for r, p in enumerate(processes) if r not in ended and p.poll() is not None
            }
            if time.time() > start + seconds:
                break
            time.sleep(0.02)
        late = [r for r, p in enumerate(processes) if p.poll() is None]
        for p in processes:
            p.kill()
            p.wait()
        said = [e.read_text(errors="replace")[-2500:] for e in errors]
        found: dict[str, Any] = {
            "seconds": round(time.time() - start, 1),
            "codes": [p.returncode for p in processes],
            "late": late,
        }
        for key, end in (("outcomes", ".out"), ("seconds_of_jobs", ".seconds")):
            found[key] = json.loads(Path(f"{path}{end}").read_text()) if Path(f"{path}{end}").exists() else {}
        if (moment := Path(f"{path}.moment")).exists() and 0 in ended:
            found["seconds_to_the_end"] = round(ended[0] - float(moment.read_text()), 2)
        return found | {"errors": said}

    def replayed(self, world: int) -> dict[str, Any]:
        """Compute steps of a world's run again in one process, as `apr verify` does."""
        env = {
            **os.environ,
            "APR_CACHE": str(self.folder / "cache"),
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        }
        command = [
            "-m",
            "apr.cli.main",
            "verify",
            str(self.run("plain", world)),
            "--replay",
            "3",
            "--backend",
            "none",
            "--json",
        ]
        done = subprocess.run(
            [sys.executable, *command], env=env, capture_output=True, text=True, check=False
        )
        rows = json.loads(done.stdout).get("checks", []) if done.stdout.startswith("{") else []
        return next(
            (row for row in rows if row["check"] == "replay"),
            {"code": done.returncode, "said": done.stderr[-600:]},
        )


def digest(run: Path) -> str:
    """Hash everything that a run has computed: checkpoints, its last state, and the log but for times."""
    h = hashlib.sha256()
    states = sorted((run / "ckpt/state").glob("*.apr"))
    for file in [*sorted((run / "ckpt").glob("*.apr")), *states[-1:]]:
        for name, x in sorted(read_apr(file).tensors.items()):
            h.update(f"{file.name} {name}".encode() + np.asarray(x).tobytes())
    for line in (run / "metrics.jsonl").read_text().splitlines():
        h.update(
            json.dumps(
                {k: x for k, x in json.loads(line).items() if k not in ("wall_ms", "tokens_per_sec")}
            ).encode()
        )
    return h.hexdigest()[:16]


def jobs_of(p: Place, world: int, before: int) -> list[dict[str, Any]]:
    """List what a world does. before: the world whose stopped run it goes on with, 0: none"""
    jobs = [p.job("plain", world), p.job("no-graph", world, "--no-graph")]
    if world > 1:
        jobs.append(p.job("on-multiprocessors", world, fault="without_copy_engines"))
    if world > 2:
        return jobs
    jobs.append(p.job("stopped", world, fault="stop_asked"))
    if before:
        jobs.append(p.job(f"resumed-{before}", world, resumes=str(p.run("stopped", before))))
    base = str(p.run("plain", 1) / "ckpt/epoch-001.apr")
    jobs.append(p.job("lora", world, "--init", base, "--lora-rank", "4", "--bounds", "pretrained_share=9"))
    return jobs


def disturbed(
    p: Place, world: int, names: str, seconds: float, record: dict[str, Any], wrong: list[str]
) -> None:
    """Disturb the last rank of a world, once in each of the ways named; adds to the record, and to what is wrong."""
    for fault in filter(None, names.split(",")):
        name = {"killed": "killed_in_a_step", "halted": "halted_in_a_step", "slow": "a_slow_rank"}[fault]
        limits = ["--rank-timeout", str(TIMEOUT)] if fault != "slow" else ["--cross-check", "1"]
        found = p.start(fault, world, [p.job(fault, world, *limits, fault=name)], seconds)
        path = p.run(fault, world) / "verdict.json"
        verdict = json.loads(path.read_text()) if path.exists() else {"gates": []}
        found["verdict"] = {k: verdict.get(k) for k in ("status", "message")}
        slow = next((g for g in verdict["gates"] if g["id"] == "run.straggler"), {})
        if fault == "slow":
            found["straggler"] = {k: slow.get(k) for k in ("verdict", "measured", "step", "evaluations")}
            is_right = slow.get("verdict") == "SUSPECT" and f"rank {world - 1} " in slow["measured"]
        else:
            is_named = verdict.get("status") == "RANK_LOST" and f"rank {world - 1} (" in str(
                verdict["message"]
            )
            limit = 5 if fault == "killed" else TIMEOUT + 5
            is_right = is_named and found["codes"][0] == 10 and found.get("seconds_to_the_end", 99) < limit
        if not is_right:
            wrong.append(f"{fault}: {found}")
        record[fault] = found
        print(fault, json.dumps(found), flush=True)


def main() -> int:
    """Run all worlds, compare, and write the record."""
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--worlds", default="1,2", help="numbers of ranks; 1 is the first")
    a.add_argument("--shared", action="store_true", help="ranks share one GPU")
    a.add_argument("--played", action="store_true", help="no GPU: NCCL is played on host memory")
    a.add_argument(
        "--jobs", default="", help="only those whose first words are named here, with commas between"
    )
    a.add_argument(
        "--faults",
        default="killed,halted,slow",
        help="what happens to the last rank, in the first world of several",
    )
    a.add_argument("--seconds", type=float, default=60, help="of one world, at most")
    a.add_argument("--record", type=Path)
    f = a.parse_args()
    wrong, record = (
        list[str](),
        {**circumstances(), "shared": f.shared, "worlds": dict[str, Any](), "faults": dict[str, Any]()},
    )
    with tempfile.TemporaryDirectory(prefix="rank-hashes-") as folder:
        p = Place(Path(folder), "cpu" if f.played else "cuda", f.shared, f.played).make()
        worlds, before = [int(w) for w in f.worlds.split(",")], 0

        def write() -> None:
            if f.record:
                f.record.write_text(json.dumps(record | {"wrong": wrong}, indent=1) + "\n")

        for world in worlds:
            jobs = [
                j
                for j in jobs_of(p, world, before)
                if world == 1 or not f.jobs or j["name"].split("-")[0] in f.jobs
            ]
            found = p.start(f"world-{world}", world, jobs, f.seconds)
            runs = {j["name"]: Path(j["args"][j["args"].index("--run-dir") + 1]) for j in jobs}
            found["hashes"] = {n: digest(r) for n, r in runs.items() if found["outcomes"].get(n) == "DONE"}
            if all(found["outcomes"].get(n) for n in runs):
                del found["errors"]
            record["worlds"][str(world)] = found
            ones = record["worlds"]["1"]["hashes"]
            for name in runs:
                if name == "stopped":
                    continue
                want = ones.get("lora" if name == "lora" else "plain")
                # A job that is done nowhere has no hash to be equal.
                if want is None or found["hashes"].get(name) != want:
                    wrong.append(
                        f"{name} on {world}: {found['hashes'].get(name) or found['outcomes'].get(name)}"
                    )
            print(world, json.dumps(found), flush=True)
            write()
            before = world if "stopped" in runs else before
            if world > 1 and "replay" not in record:
                record["replay"] = p.replayed(world)
                print("replay", json.dumps(record["replay"]), flush=True)
                # On a GPU one process has other products in use, and is allowed a tolerance that it must not need.
                is_equal = "worst 0.0e+00" in record["replay"].get("measured", "")
                wrong += [] if is_equal else [f"replay: {record['replay']}"]
                if "stopped" in runs:
                    jobs = [p.job(f"resumed-{world}", 1, resumes=str(p.run("stopped", world)))]
                    found = p.start("back", 1, jobs, f.seconds)
                    found["hash"] = digest(p.run("stopped", world))
                    record["back"] = found
                    print("back on 1", json.dumps(found), flush=True)
                    wrong += [] if found["hash"] == ones.get("plain") else [f"resumed-{world} on 1: {found}"]
                disturbed(p, world, f.faults, f.seconds, record["faults"], wrong)
                write()
    print("wrong:", wrong or "nothing")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
