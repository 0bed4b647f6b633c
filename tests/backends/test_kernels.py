"""CUDA kernels without a GPU: the text that is compiled, declarations, and every variant under NVRTC 12 and 13."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nvrtc
import sass
from apr.backends.cuda import kernels
from apr.backends.cuda.arguments import Arguments, Regions, Scratch, out_of_memory
from apr.backends.cuda.kernels.signatures import parse
from apr.common.errors import DeviceError, Refused

# Bytes of registers a kernel may spill, or keep on its stack, for want of registers: at most this much under
# either compiler on any target. One that spills less than half of it has got better: lower the number.
ALLOWED: dict[tuple[str, str], int] = {
    ("attention_mma bfloat16 HEAD_DIM=128 DOCUMENTS=0", "attention_dkv_mma"): 40,
    # what functions that are called, not pasted in, keep for their callers
    **{(f"decode_pick {act}", "decode_pick"): 160 for act in ("float32", "bfloat16")},
}  # (title of the variant without target, kernel): bytes


# Compilation


@pytest.fixture(scope="session")
def compiled() -> Iterator[Callable[[int], dict[str, nvrtc.Result]]]:
    """compiled(12), compiled(13): results of all jobs by title; both versions work at the same time."""
    with ThreadPoolExecutor(len(nvrtc.FOLDERS)) as pool:
        runs: dict[int, Future[list[nvrtc.Result]]] = {
            major: pool.submit(nvrtc.compile_all, major, nvrtc.jobs())
            for major in nvrtc.FOLDERS
            if nvrtc.installed(major)
        }
        yield lambda major: {r.title: r for r in runs[major].result()}


@pytest.fixture(params=list(nvrtc.FOLDERS), ids=lambda m: f"nvrtc{m}")
def major(request: pytest.FixtureRequest) -> int:
    """Each version of NVRTC that is installed."""
    if nvrtc.installed(request.param) is None:
        pytest.skip(f"NVRTC {request.param} is not installed (make dev installs it on Linux x86-64)")
    return int(request.param)


def complaints(results: list[nvrtc.Result], allowed: dict[tuple[str, str], int]) -> list[str]:
    """What is wrong with compiled kernels: errors, spills, serialised wgmma, another target than asked for."""
    wrong = []
    for r in results:
        variant, target = r.title.rsplit(" ", 1)
        if not r.ok:
            wrong += [f"{r.title}: {line}" for line in r.log.splitlines() if "error" in line][:3]
            continue
        for u in nvrtc.usage(r.log):
            most = allowed.get((variant, u.kernel), 0)
            if not max(u.spilled, u.stack) <= most:
                wrong.append(
                    f"{r.title}: {u.kernel} spills {u.spilled} bytes, stack {u.stack}: at most {most}"
                )
            if u.target != target:
                wrong.append(f"{r.title}: {u.kernel} was compiled for {u.target}")
        wrong += [
            f"{r.title}: {line}"
            for line in r.log.splitlines()
            if re.search(r"\bC75\d\d\b|loses the left operand", line)
        ]
    return wrong


KEPT = """
    unsigned k_left[HEAD_DIM / 16][4], v_left[HEAD_DIM / 16][4];
    own.wait();
#pragma unroll
    for (int x = 0; x < HEAD_DIM / 4; x++) {
      const int row = threadIdx.x / 32 % 4 * 16 + lane / 4;
      const unsigned from = k_rows + cell(row + 8 * (x & 1), x / 4 * 2 + (x >> 1 & 1)) + lane % 4 * 4;
      k_left[x / 4][x % 4] = shared_get(from), v_left[x / 4][x % 4] = shared_get(from + DKV_OWN / 2);
    }
"""  # keys and values as left operands that outlive a step, which ptxas gets wrong
STEP = "    const auto step = [&](bool is_last) {\n      unsigned left"


def test_left_operands_that_ptxas_overwrites_are_seen(major: int) -> None:
    if sass.disassembler() is None:
        pytest.skip("nvdisasm is not installed (make dev installs it on Linux x86-64)")
    text = kernels.source("attention_wgmma")
    by_registers = "product<0>(d, a[k], along_k(b + k / 4 * B_ROWS * TILE_ROW + k % 4 * 32), k);"
    for old, new, count in (
        (STEP, KEPT + STEP, 1),
        ("(s, k_rows, now)", "(s, k_left, now)", 1),
        ("(dp, v_rows, dy_now)", "(dp, v_left, dy_now)", 1),
        ("// d (64 x HEAD_DIM) += a b", f"""template <int A_ROWS, int B_ROWS>
__device__ __forceinline__ void scores(float (&d)[B_ROWS / 2], const unsigned (&a)[HEAD_DIM / 16][4], unsigned b) {{
#pragma unroll
  for (int k = 0; k < HEAD_DIM / 16; k++) {by_registers}
  products_commit();
}}
// d (64 x HEAD_DIM) += a b""", 1),
    ):  # fmt: skip
        assert text.count(old) == count, old
        text = text.replace(old, new)
    defines = {"HEAD_DIM": 64, "DOCUMENTS": 0}
    job = nvrtc.Job("kept sm_90a", text, kernels.options("bfloat16", "sm_90a", defines))
    (result,) = nvrtc.compile_all(major, [job])
    assert result.ok, result.log
    assert "attention_dkv_wgmma: the loop at" in "\n".join(complaints([result], {}))


@pytest.mark.parametrize("module", kernels.modules())
def test_every_variant_compiles(module: str, major: int, compiled: Any) -> None:
    results = [r for title, r in compiled(major).items() if title.split()[0] == module]
    assert len(results) == sum(len(kernels.variants(module, t)) for t in nvrtc.TARGETS) > 0
    wrong = complaints(results, ALLOWED)
    assert not wrong, "\n".join(wrong)
    declared = set(kernels.signatures(module))
    for r in results:  # what the loader reads is what the compiler sees
        assert {u.kernel for u in nvrtc.usage(r.log)} == declared != set(), r.title


def test_spill_allowances_are_needed(compiled: Any) -> None:
    if not all(nvrtc.installed(m) for m in nvrtc.FOLDERS):
        pytest.skip("needs both versions of NVRTC")
    worst = dict.fromkeys(ALLOWED, 0)
    for r in (r for major in nvrtc.FOLDERS for r in compiled(major).values()):
        for u in nvrtc.usage(r.log):
            key = (r.title.rsplit(" ", 1)[0], u.kernel)
            if key in worst:
                worst[key] = max(worst[key], u.spilled, u.stack)
    assert {k: most for k, most in ALLOWED.items() if not worst[k] > most / 2} == {}


# The record


SMALL = ("bias", "rope", "swiglu")  # modules that compile fast


def test_the_record_is_what_the_compilers_say(major: int) -> None:
    oldest = [job for job in nvrtc.jobs(SMALL) if job.title.endswith(nvrtc.TARGETS[0])]
    work = [job for job in oldest if nvrtc.recorded(major, job)]
    assert oldest
    for job, result in zip(work, nvrtc.compile_now(major, work), strict=True):
        assert nvrtc.row_of(major, job, result) == nvrtc.record()[f"{major} {job.title}"], job.title


def test_the_record_answers_the_same_question_alone(major: int, monkeypatch: pytest.MonkeyPatch) -> None:
    job = nvrtc.Job("planted sm_90a", FINE, kernels.options("bfloat16", "sm_90a", {}))
    usages = [["planted", "sm_90a", 255, 0, 8, 16]]
    said = "ptxas info    : (C7508) Potential Performance Loss: wgmma"
    record = {f"{major} {job.title}": [nvrtc.question(major, job), usages, [said]]}
    monkeypatch.setattr(nvrtc, "record", lambda: record)
    (result,) = nvrtc.compile_all(major, [job])
    assert [list(astuple(u)) for u in nvrtc.usage(result.log)] == usages
    assert complaints([result], {}) == [
        "planted sm_90a: planted spills 16 bytes, stack 8: at most 0",
        f"planted sm_90a: {said}",
    ]
    assert nvrtc.row_of(major, job, result)[1:] == [usages, [said]]
    for other in (replace(job, text=job.text + " "), replace(job, options=(*job.options, "-DMORE"))):
        assert nvrtc.recorded(major, other) is None
    assert nvrtc.recorded(*(m for m in nvrtc.FOLDERS if m != major), job) is None
    for versions in ("another", ""):
        monkeypatch.setattr(nvrtc, "compilers", lambda major, versions=versions: versions)
        assert nvrtc.recorded(major, job) is None


def test_the_record_is_whole(major: int) -> None:
    missing = [job.title for job in nvrtc.on_record(major) if nvrtc.recorded(major, job) is None]
    if missing:
        pytest.skip(
            f"{len(missing)} jobs were compiled: write them down, python tests/support/nvrtc.py --record"
        )


SPILLING = """
extern "C" __global__ void __launch_bounds__(1024, 2) planted(float* y, const float* x) {
  float a[96];
  #pragma unroll
  for (int i = 0; i < 96; i++) a[i] = x[i * threadIdx.x];
  for (int k = 0; k < 9; k++)
    #pragma unroll
    for (int i = 0; i < 96; i++) a[i] = a[i] * a[(i * 7 + 3) % 96] + x[i + k];
  #pragma unroll
  for (int i = 0; i < 96; i++) y[i * 1024 + threadIdx.x] = a[i];
}
"""
# Both branches start asynchronous products into the same registers without waiting.
SERIAL = """
#define MMA(d) asm volatile("{wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, %4, %4, 1, 1, 1, 0, 0;}" \\
    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(x))
extern "C" __global__ void planted(float* y, long long x) {
  float d[4] = {};
  asm volatile("wgmma.fence.sync.aligned;");
  MMA(d);
  d[0] *= 2;
  MMA(d);
  asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;");
  for (int i = 0; i < 4; i++) y[i] = d[i];
}
"""
FINE = '#include <cuda_bf16.h>\nextern "C" __global__ void planted(ACT* x) { x[0] = x[1]; }'


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (FINE, r"^$"),
        (SPILLING, r"planted sm_90a: planted spills \d{3,} bytes, stack \d{3,}: at most 0"),
        (SERIAL, r"planted sm_90a: .*\(C75\d\d\) Potential Performance Loss: wgmma"),
        (FINE.replace("; }", " }"), r'planted sm_90a: planted.cu\(2\): error: expected a ";"'),
        (FINE.replace("bf16.h", "bf17.h"), r'cannot open source file "cuda_bf17.h"'),
    ],
    ids=["fine", "spill", "serial", "syntax", "header"],
)
def test_a_planted_fault_is_found(text: str, found: str, major: int) -> None:
    job = nvrtc.Job("planted sm_90a", text, kernels.options("bfloat16", "sm_90a", {}))
    assert re.search(found, "\n".join(complaints(nvrtc.compile_all(major, [job]), {})))


def test_allowances_and_targets_are_held(major: int) -> None:
    job = nvrtc.Job("planted sm_80", SPILLING, kernels.options("float32", "sm_90a", {}))
    results = nvrtc.compile_all(major, [job])
    assert complaints(results, {("planted", "planted"): 10**4}) == [
        "planted sm_80: planted was compiled for sm_90a"
    ]


# Text and variants


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of the one with the kernels."""
    monkeypatch.setattr(kernels, "FOLDER", tmp_path)
    kernels.source.cache_clear()
    kernels.signatures.cache_clear()
    yield tmp_path
    kernels.source.cache_clear()
    kernels.signatures.cache_clear()


def test_special_variants_have_a_module() -> None:
    assert set(kernels.SPECIAL) - set(kernels.modules()) == set()


def test_variants_are_all_combinations(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.variants("anything") == [("float32", {}), ("bfloat16", {})]
    few = kernels.Variants(("bfloat16",), {"A": (1, 2), "B": (3, 4)}, ("sm_90a",))
    monkeypatch.setitem(kernels.SPECIAL, "few", few)
    four = [("bfloat16", {"A": a, "B": b}) for a in (1, 2) for b in (3, 4)]
    assert kernels.variants("few") == kernels.variants("few", "sm_90a") == four
    assert kernels.variants("few", "sm_80") == []


def test_every_kernel_file_begins_with_a_comment() -> None:
    for path in [*kernels.FOLDER.glob("*.cu"), *kernels.FOLDER.glob("*.cuh")]:
        assert path.read_text().startswith(("//", "/*")), path.name


def test_headers_are_pasted_once_with_line_numbers(folder: Path, major: int) -> None:
    (folder / "a.cuh").write_text("#pragma once\nint a;\n")
    (folder / "b.cuh").write_text('#include "a.cuh"\nint b;\n')
    (folder / "m.cu").write_text(
        '// m\n#include "b.cuh"\n #include "a.cuh" // again\n#include <cuda_bf16.h>\nwrong\n'
    )
    text = kernels.source("m")
    assert text.count("int a;") == text.count("int b;") == text.count("<cuda_bf16.h>") == 1
    assert "pragma" not in text
    (result,) = nvrtc.compile_all(
        major, [nvrtc.Job("m sm_80", text, kernels.options("float32", "sm_80", {}))]
    )
    assert "m.cu(5): error" in result.log
    (folder / "b.cuh").write_text('#include "a.cuh"\nint b;\nwrong\n')
    kernels.source.cache_clear()
    assert kernels.source("m") != text  # what CuPy's cache looks at
    job = nvrtc.Job("m sm_80", kernels.source("m"), kernels.options("float32", "sm_80", {}))
    assert "b.cuh(3): error" in nvrtc.compile_all(major, [job])[0].log


@pytest.mark.parametrize("name", ["gone.cuh", "../gone.cuh", "/etc/passwd"])
def test_headers_outside_the_folder_are_refused(folder: Path, name: str) -> None:
    (folder.parent / "gone.cuh").write_text("")
    (folder / "m.cu").write_text(f'//\n#include "{name}"\n')
    with pytest.raises(ValueError, match=rf"m.cu:2: {name} does not exist in"):
        kernels.source("m")
    with pytest.raises(ValueError, match=r"kernel module: gone\.cu does not exist"):
        kernels.source("gone")


def test_arch_of_a_gpu() -> None:
    found = {c: kernels.arch_of(c) for c in [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]}
    assert list(found.values()) == ["sm_80", "sm_89", "sm_90a", "sm_100", "sm_120"]
    with pytest.raises(DeviceError, match=r"capability 7\.5, apr needs 8\.0 \(Ampere\) or newer"):
        kernels.arch_of((7, 5))


def test_options_name_the_variant() -> None:
    given = kernels.options("bfloat16", "sm_90a", {"HEAD_DIM": 64})
    assert {"-DACT=__nv_bfloat16", "-arch=sm_90a", "-DHEAD_DIM=64"} <= set(given)
    assert "-DACT=float" in kernels.options("float32", "sm_80", {})
    assert not any("fast" in o for o in given)


# Declarations

DECLARED = """
// extern "C" __global__ void commented(int out) is not read, nor /* extern "C" */
extern "C" __global__ void __launch_bounds__(32 * (4), 2) plain(
    act* __restrict__ y,   // (N,C), may be null (all, or none)
    float* r /* or null */, double *total,
    const act* __restrict__ x, act const *w, const unsigned char* bytes, // required
    int n, long long x_row, const float eps) { if (n) return; }
template <int V> __device__ void body(act* y, long long n) {}
#define KERNEL(NAME, V) \\
  extern "C" __launch_bounds__(256) __global__ void NAME##_##V( \\
      act* y, int* dw, /* null: unwanted */ \\
      long long n) { body<V>(y, n); }
KERNEL(made, 8)
KERNEL(made, 1);
"""


def test_declarations_are_read() -> None:
    found = parse(DECLARED, "x.cu")
    assert list(found) == ["plain", "made_8", "made_1"]
    plain = {p.name: p for p in found["plain"]}
    assert {n: (p.ctype, p.pointer, p.const) for n, p in plain.items()} == {
        "y": ("act", True, False),
        "r": ("float", True, False),
        "total": ("double", True, False),
        "x": ("act", True, True),
        "w": ("act", True, True),
        "bytes": ("unsigned char", True, True),
        "n": ("int", False, False),
        "x_row": ("long long", False, False),
        "eps": ("float", False, True),
    }
    assert [n for n, p in plain.items() if p.nullable] == ["y", "r", "x", "w", "bytes"]
    assert {n: p.gaps for n, p in plain.items() if p.gaps} == {"x": 1}
    assert [p.name for p in found["made_1"] if p.nullable] == ["dw"]
    assert found["made_8"] == found["made_1"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("(size_t n)", "parameter 'size_t n' is none of: pointer to act,"),
        ("(unsigned int* n)", "unsigned int"),
        ("(act** x)", "act"),
        ("(double x)", "parameter 'double x'"),
        ("(act)", "parameter 'act'"),
        ('(int n) {} extern "C" __global__ void f(float n)', "f is declared twice with different parameters"),
        ("<int V>(int n)", "cannot read the kernel declaration"),
    ],
)
def test_declarations_we_cannot_launch_are_refused(text: str, found: str) -> None:
    with pytest.raises(ValueError, match=rf"x\.cu: .*{re.escape(found)}"):
        parse(f'extern "C" __global__ void f{text} {{}}', "x.cu")


# Arguments

BF16 = np.dtype(ml_dtypes.bfloat16)
TAKES = """extern "C" __global__ void f(act* y, float* r, const act* x, unsigned char* b, int n, long long y_row,
    float eps)"""


def arguments(**given: Any) -> list[Any]:
    """f's arguments as they would be launched, some of them replaced."""
    usual = dict(
        y=np.zeros((4, 8), BF16)[:, 2:6],
        r=np.zeros(4, np.float32),
        x=np.zeros((4, 4), BF16),
        b=np.zeros(4, np.uint8),
        n=4,
        y_row=8,
        eps=1e-6,
    )
    return Arguments("f", parse(TAKES, "x.cu")["f"], "bfloat16", np.ndarray)(
        list({**usual, **given}.values())
    )


def test_arguments_get_their_c_types() -> None:
    y, r, x, _, n, y_row, eps = arguments(x=None)
    assert (y.shape, r.shape, x) == ((4, 4), (4,), None)
    assert (type(n), type(y_row), type(eps)) == (np.int32, np.int64, np.float32)
    assert (n, y_row, eps) == (4, 8, np.float32(1e-6))
    assert arguments(n=np.int64(-(2**31)), y_row=2**40, eps=1)[4:] == [-(2**31), 2**40, 1.0]
    assert np.isnan(arguments(eps=float("nan"))[6])
    assert arguments(eps=float("-inf"))[6] == -np.inf


@pytest.mark.parametrize(
    "y",
    [
        np.zeros((2, 3, 8), BF16)[..., 2:6],  # both leading axes walk the same rows
        np.zeros((2, 3, 4, 8), BF16)[:, :, 1:3],  # heads between others
        np.zeros((3, 8), BF16)[:1, :4],
        np.zeros((0, 8), BF16)[:, :4],
        np.zeros((), BF16),
    ],
    ids=["rows", "heads", "one", "none", "scalar"],
)
def test_one_gap_is_taken_where_the_kernel_is_told_of_it(y: Any) -> None:
    assert arguments(y=y)[0] is y


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (dict(more=1), TypeError, r"f takes 7 arguments \(y, r, x, b, n, y_row, eps\), not 8"),
        (dict(r=None), TypeError, "f: r must be an array, not None"),
        (dict(r=[0.0]), TypeError, "f: r must be an array on the device, not list"),
        (dict(r=np.zeros(4)), TypeError, "f: r must be float32, not float64"),
        (dict(y=np.zeros((4, 4), np.float16)), TypeError, "f: y must be bfloat16, not float16"),
        (dict(x=np.zeros((4, 8), BF16)[:, :4]), ValueError, r"f: x must be C-contiguous: shape \(4, 4\)"),
        (
            dict(y=np.zeros((4, 8), BF16)[:, ::2]),
            ValueError,
            r"f: y must have at most 1 gap\(s\), none in the last axis",
        ),
        (dict(y=np.zeros((4, 3, 8), BF16)[:2, :2, :4]), ValueError, r"f: y must have at most 1 gap"),
        (dict(y=np.zeros((8, 4), BF16)[::-1]), ValueError, r"f: y must have at most 1 gap"),
        (dict(n=1.0), TypeError, r"f: n must be a number for int, not 1.0 \(float\)"),
        (dict(n=True), TypeError, "f: n must be a number for int, not True"),
        (dict(n=np.float32(1)), TypeError, "f: n must be a number for int"),
        (dict(n=2**31), ValueError, "f: n: 2147483648 does not fit into int"),
        (dict(n=np.int64(-(2**31) - 1)), ValueError, "f: n: -2147483649 does not fit into int"),
        (dict(y_row=2**63), ValueError, "f: y_row: 9223372036854775808 does not fit into long long"),
        (dict(eps="1"), TypeError, "f: eps must be a number for float"),
        (dict(eps=1e39), ValueError, r"f: eps: 1e\+39 does not fit into float"),
        (dict(eps=10**400), ValueError, "does not fit into float"),
        (dict(eps=None), TypeError, "f: eps must be a number for float, not None"),
    ],
)
def test_wrong_arguments_are_named(given: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        arguments(**given)


def test_out_of_memory_says_what_there_is() -> None:
    error = out_of_memory(3 << 30, 100 << 30, 2 << 30, 139 << 30)
    assert isinstance(error, Refused)
    assert str(error).startswith(
        "out of GPU memory: 3.00 GiB more were asked for, apr holds 100.00 GiB, 2.00 of 139.00 GiB are free; "
    )
    assert "--micro-batch-size" in str(error)


# Scratch


class Device:
    """Buffers as a GPU would hand them out."""

    def __init__(self) -> None:
        self.capturing = False
        self.scratch = Scratch(4096, lambda n: np.zeros(n, np.uint8), lambda: self.capturing)


def test_scratch_slots_do_not_overlap() -> None:
    scratch = Device().scratch
    a = scratch((3, 5), "float32", "a")
    b = scratch(7, "uint8", "b")
    c = scratch((3,), "bfloat16", "c")
    a[:], b[:], c[:] = 1, 2, 3
    assert (a == 1).all()
    assert (b == 2).all()
    assert (c == 3).all()
    assert [x.shape for x in (a, b, c)] == [(3, 5), (7,), (3,)]
    assert [x.dtype for x in (a, b, c)] == [np.float32, np.uint8, BF16]
    assert scratch((3, 5), "float32", "a") is a
    assert np.shares_memory(scratch(16, np.int32, "a"), a)  # a slot keeps its place for all it can hold
    assert scratch.nbytes() == 4096


def test_scratch_grows_and_keeps_what_is_in_use() -> None:
    device = Device()
    small = device.scratch((64,), "float32", "a")
    beside = device.scratch((64,), "float32", "b")
    larger = device.scratch((128,), "float32", "a")  # moves behind b
    small[:], beside[:], larger[:] = 1, 2, 3
    assert not np.shares_memory(device.scratch((64,), "float32", "a"), small)
    huge = device.scratch((1500,), "float32", "c")
    huge[:] = 4
    assert (beside == 2).all()
    assert (larger == 3).all()
    assert device.scratch.nbytes() == 4096 + 12000
    again = device.scratch((64,), "float32", "b")
    assert not np.shares_memory(again, huge)
    assert np.shares_memory(again, huge.base)


def test_scratch_does_not_grow_during_capture() -> None:
    device = Device()
    device.scratch(1024, "uint8", "a")
    device.capturing = True
    device.scratch(1024, "uint8", "a")
    device.scratch(2048, "uint8", "b")
    with pytest.raises(RuntimeError, match=r"scratch 'b' needs 2304 bytes.*run the step once before"):
        device.scratch(2304, "uint8", "b")
    with pytest.raises(ValueError, match="scratch 'a': 7 bytes are not a whole number of float32"):
        device.scratch(7, "float32", "a")


def test_regions_are_aligned_and_disjoint() -> None:
    regions = Regions(4096)
    at = [regions.place(slot, n) for slot, n in [("a", 1), ("b", 257), ("c", 0), ("a", 256), ("d", 3000)]]
    assert at == [0, 256, 768, 0, 768]
    assert regions.place("e", 512) is None
    assert regions.place("a", 257) is None
