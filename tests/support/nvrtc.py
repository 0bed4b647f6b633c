"""Compiles every CUDA kernel as the run-time loader does, without a GPU: NVRTC 12 and 13 through ctypes.

    python tests/support/nvrtc.py [MODULE ...]      a table of registers, shared memory and spills

The two versions come from PyPI (the dev extra). Each runs in a process of its own: one process cannot hold
the builtins of both.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)] if __name__ == "__main__" else []

import sass  # noqa: E402
from apr.backends.cuda import kernels  # noqa: E402

TARGETS = ("sm_80", "sm_90a", "sm_100")
FOLDERS = {12: ("cuda_nvrtc/lib", "cuda_runtime/include"), 13: ("cu13/lib", "cu13/include")}


@dataclass(frozen=True)
class Job:
    """One compilation."""

    title: str
    text: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """Whether it compiled, and what the compiler said."""

    title: str
    ok: bool
    log: str


@dataclass(frozen=True)
class Usage:
    """What ptxas reports of one kernel: registers, and bytes per thread or block."""

    kernel: str
    target: str
    registers: int
    shared: int
    stack: int
    spilled: int  # stores plus loads


def installed(major: int) -> tuple[Path, Path] | None:
    """(folder of libraries, folder of headers) of NVRTC 12 or 13, or None: where `make dev` puts it (see
    nvrtc.txt), or among the installed packages."""
    library, headers = FOLDERS[major]
    for place in (Path(sys.prefix, "nvrtc"), *sys.path):
        lib, include = Path(place, "nvidia", library), Path(place, "nvidia", headers)
        if (lib / f"libnvrtc.so.{major}").exists() and (include / "cuda_bf16.h").exists():
            return lib, include
    return None


def jobs(modules: Iterable[str] | None = None, targets: tuple[str, ...] = TARGETS) -> list[Job]:
    """Every variant of every module (or of some) on every target."""
    found = []
    for module in kernels.modules() if modules is None else modules:
        for arch in targets:
            for act, defines in kernels.variants(module, arch):
                what = " ".join([module, act, *(f"{k}={v}" for k, v in defines.items()), arch])
                found.append(Job(what, kernels.source(module), kernels.options(act, arch, defines)))
    return found


def as_cupy(options: tuple[str, ...], include: Path) -> tuple[str, ...]:
    """The options of a job with those that CuPy adds (compiler.py): its -arch lacks the letter and must
    not win."""
    plain = [o.rstrip("abcdefghijklmnopqrstuvwxyz") for o in options if o.startswith("-arch=")]
    more = (f"-I{include}", "-ftz=true", *plain, "--device-as-default-execution-space")
    return (*options, *more, "--ptxas-options=-v")


def compile_all(major: int, work: list[Job]) -> list[Result]:
    """Compile in a fresh process per core. Raises RuntimeError when NVRTC itself cannot be used."""
    share = max(1, (os.cpu_count() or 1) // len(FOLDERS))
    parts = [work[i::share] for i in range(share) if work[i::share]]
    running = []
    for part in parts:
        p = subprocess.Popen(
            [sys.executable, __file__, f"--worker={major}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append((p, part))
    found: dict[str, Result] = {}
    for p, part in running:
        out, err = p.communicate(json.dumps([asdict(job) for job in part]), timeout=900)
        if p.returncode:
            raise RuntimeError(f"NVRTC {major}: exit {p.returncode}: {err[-2000:]}")
        found |= {r["title"]: Result(**r) for r in json.loads(out)}
    return [found[job.title] for job in work]


class Compiler:
    """NVRTC of one version in this process."""

    def __init__(self, major: int) -> None:
        places = installed(major)
        if places is None:
            raise RuntimeError(f"NVRTC {major} is not installed")
        lib, self.include = places
        for builtins in lib.glob("libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
        self.nvrtc = ctypes.CDLL(str(lib / f"libnvrtc.so.{major}"))

    def __call__(self, job: Job) -> Result:
        """Compile one job to machine code."""
        program = ctypes.c_void_p()
        name = job.title.split()[0].encode() + b".cu"
        made = self.nvrtc.nvrtcCreateProgram(ctypes.byref(program), job.text.encode(), name, 0, None, None)
        assert made == 0, f"nvrtcCreateProgram: {made}"
        options = [o.encode() for o in as_cupy(job.options, self.include)]
        rc = self.nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        size = ctypes.c_size_t()
        self.nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        self.nvrtc.nvrtcGetProgramLog(program, log)
        lost = sass.lost_fragments(self._listing(program)) if rc == 0 and self._multiplies(job) else []
        self.nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
        return Result(job.title, rc == 0, "\n".join([log.value.decode(errors="replace"), *lost]))

    def _multiplies(self, job: Job) -> bool:  # by wgmma, and there is a tool to look at it
        return "-arch=sm_90a" in job.options and "wgmma" in job.text and sass.disassembler() is not None

    def _listing(self, program: ctypes.c_void_p) -> str:
        size = ctypes.c_size_t()
        self.nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        self.nvrtc.nvrtcGetCUBIN(program, code)
        return sass.listing(code.raw)


def usage(log: str) -> list[Usage]:
    """What ptxas says of each kernel, from a compiler's log."""
    found = []
    for part in log.split("Compiling entry function '")[1:]:
        name, target = part.split("'")[0], part.split("'")[2]

        def number(pattern: str, text: str = part) -> int:
            return sum(int(n) for n in re.findall(pattern, text)[:1])

        found.append(
            Usage(
                name,
                target,
                number(r"Used (\d+) registers"),
                number(r"(\d+) bytes smem"),
                number(r"(\d+) bytes stack frame"),
                number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            )
        )
    return found


def table(modules: list[str]) -> Iterable[str]:
    """Lines: what each kernel of each variant uses."""
    yield f"{'NVRTC':6}{'variant':64}{'kernel':40}{'regs':>5}{'smem':>8}{'stack':>6}{'spilled':>8}"
    work = jobs(modules or None)
    with ThreadPoolExecutor() as pool:
        runs = {major: pool.submit(compile_all, major, work) for major in FOLDERS if installed(major)}
    for major, run in runs.items():
        for r in run.result():
            yield from () if r.ok else (f"{major:<6}{r.title}: {r.log}",)
            for u in usage(r.log):
                yield f"{major:<6}{r.title:64}{u.kernel:40}{u.registers:5}{u.shared:8}{u.stack:6}{u.spilled:8}"


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("--worker="):
        compiler = Compiler(int(sys.argv[1].split("=")[1]))
        asked = [Job(j["title"], j["text"], tuple(j["options"])) for j in json.load(sys.stdin)]
        json.dump([asdict(compiler(job)) for job in asked], sys.stdout)
    else:
        print(*table(sys.argv[1:]), sep="\n")
