"""Compiles every CUDA kernel as the run-time loader does, without a GPU: NVRTC 12 and 13 through ctypes.

    python tests/support/nvrtc.py [MODULE ...]      a table of registers, shared memory and spills
    python tests/support/nvrtc.py --record          compile what is not on record, and write the record anew

The two versions come from PyPI (the dev extra). Each runs in a process of its own: one process cannot hold
the builtins of both. What a compiler has said of a text is on record in tests/golden/nvrtc.json and not asked again: the
same text, the same options and the same compiler give the same answer, in minutes.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)] if __name__ == "__main__" else []

import sass  # noqa: E402
import wgmma_probe  # noqa: E402
from apr.backends.cuda import kernels  # noqa: E402
from apr.bisect.planted.kernel_faults import KERNEL_FAULTS, KernelFault  # noqa: E402

TARGETS = ("sm_80", "sm_90a", "sm_100")
RECORD = ROOT / "tests" / "golden" / "nvrtc.json"
BATCH = 16  # jobs that are compiled before the record is written
FOLDERS = {12: ("cuda_nvrtc/lib", "cuda_runtime/include"), 13: ("cu13/lib", "cu13/include")}

USUAL = re.compile(r"ptxas +(\.|info +: (\d+ bytes gmem|Compiling entry|Function prop|Used \d|Compile time))")


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


def jobs(modules: Iterable[str] | None = None, only: tuple[str, ...] = ()) -> list[Job]:
    """Every variant of every module (or of some) on every target of it, or on some."""
    found = []
    for module in kernels.modules() if modules is None else modules:
        for arch in only or TARGETS:
            for act, defines in kernels.variants(module, arch):
                what = " ".join([module, act, *(f"{k}={v}" for k, v in defines.items()), arch])
                found.append(Job(what, kernels.source(module), kernels.options(act, arch, defines)))
    return found


def title(fault: KernelFault, act: str) -> str:
    """Name the compilation of a planted fault."""
    return f"{fault.module} {fault.name} {act}"


def fault_jobs() -> list[Job]:
    """Every planted fault in its dtypes, for Hopper, attention for heads of 64."""
    found = []
    for fault in KERNEL_FAULTS.values():
        defines = dict.fromkeys(kernels.SPECIAL.get(fault.module, kernels.Variants()).defines, 64)
        text = fault.edited()
        found += [Job(title(fault, act), text, kernels.options(act, "sm_90a", defines)) for act in fault.acts]
    return found


def probe_jobs() -> list[Job]:
    """Every way in which a product takes its operands: tests/support/wgmma_probe.py."""
    text = wgmma_probe.text()
    return [
        Job(f"probe {i}", text, kernels.options("bfloat16", "sm_90a", defines))
        for i, defines in enumerate(wgmma_probe.VARIANTS)
    ]


def on_record(major: int) -> list[Job]:
    """What tests ask of a version: all variants of both, planted faults of the older, the probe of the newer."""
    return jobs() + (fault_jobs() if major == min(FOLDERS) else probe_jobs())


def as_cupy(options: tuple[str, ...], include: Path) -> tuple[str, ...]:
    """The options of a job with those that CuPy adds (compiler.py): its -arch lacks the letter and must
    not win."""
    plain = [o.rstrip("abcdefghijklmnopqrstuvwxyz") for o in options if o.startswith("-arch=")]
    more = (f"-I{include}", "-ftz=true", *plain, "--device-as-default-execution-space")
    return (*options, *more, "--ptxas-options=-v")


def compile_all(major: int, work: list[Job]) -> list[Result]:
    """Say what a compiler makes of jobs, by the record or by asking it. Raises RuntimeError when it cannot be used."""
    known = {job.title: recorded(major, job) for job in work}
    asked = iter(compile_now(major, [job for job in work if known[job.title] is None]))
    return [known[job.title] or next(asked) for job in work]


def compile_now(major: int, work: list[Job]) -> list[Result]:
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


# The record


@cache
def compilers(major: int) -> str:
    """Name the packages that an answer depends on, with their versions; "" where they cannot be told."""
    places = installed(major)
    if places is None:
        return ""
    folder = next(p for p in places[0].parents if p.name == "nvidia").parent
    names = sorted(p.stem for p in folder.glob("nvidia_cuda_*.dist-info"))
    own = [n for n in names if "nvdisasm" in n or ("_cu12" in n) == (major == 12)]
    return " ".join([*own, str(sass.disassembler() is not None)]) if len(own) >= len(FOLDERS) else ""


@cache
def record() -> dict[str, list[Any]]:
    """The record: version and title -> [hash of what was asked, usages, other lines]."""
    return dict(json.loads(RECORD.read_text())) if RECORD.exists() else {}


def question(major: int, job: Job) -> str:
    """Hash all that an answer depends on: text, options, compiler, and what looks at the machine code."""
    asked = [compilers(major), Path(sass.__file__).read_text(), job.text, *as_cupy(job.options, Path("."))]
    return hashlib.sha256("\0".join(asked).encode()).hexdigest()[:32]


def recorded(major: int, job: Job) -> Result | None:
    """What is on record of a job; None where the text, an option or the compiler is another."""
    asked, rows, others = record().get(f"{major} {job.title}", ("", [], []))
    if not compilers(major) or asked != question(major, job):
        return None
    return Result(job.title, True, "\n".join([*map(written, (Usage(*row) for row in rows)), *others]))


def written(u: Usage) -> str:
    """What `usage` reads, in ptxas' words."""
    return (
        f"ptxas info    : Compiling entry function '{u.kernel}' for '{u.target}'\n"
        f"ptxas         .     {u.stack} bytes stack frame, {u.spilled} bytes spill stores, 0 bytes spill loads\n"
        f"ptxas info    : Used {u.registers} registers, {u.shared} bytes smem"
    )


def row_of(major: int, job: Job, result: Result) -> list[Any]:
    """What goes on record of a result: no times, and every line that is not of ptxas' usual ones."""
    others = [x for x in result.log.splitlines() if x.strip("\0 ") and not USUAL.match(x)]
    return [question(major, job), [list(astuple(u)) for u in usage(result.log)], others]


def write_record() -> None:
    """Compile what is not on record, forget what is asked no more, and write the record, a few jobs at a time. Needs both
    versions."""
    work = [(m, job) for m in FOLDERS for job in on_record(m)]
    found = {f"{m} {job.title}": record()[f"{m} {job.title}"] for m, job in work if recorded(m, job)}
    missing = [(m, job) for m, job in work if f"{m} {job.title}" not in found]
    for at in range(0, len(missing), BATCH):
        some = missing[at : at + BATCH]
        for major in FOLDERS:
            these = [job for m, job in some if m == major]
            for job, result in zip(these, compile_now(major, these), strict=True):
                if result.ok:
                    found[f"{major} {job.title}"] = row_of(major, job, result)
                print(f"{major} {result.title}: {'compiled' if result.ok else result.log}", flush=True)
        lines = [
            f"{json.dumps(n)}: {json.dumps(row, separators=(',', ':'))}" for n, row in sorted(found.items())
        ]
        RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


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
    elif sys.argv[1:] == ["--record"]:
        write_record()
    else:
        print(*table(sys.argv[1:]), sep="\n")
