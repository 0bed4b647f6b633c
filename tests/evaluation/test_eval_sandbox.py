"""Programs are judged right, and whatever they try, they count as failed and harm nothing."""

from __future__ import annotations

import ctypes
import gzip
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from apr.common.errors import InputNotFound, MalformedFile, Refused, UsageError
from apr.evaluation import humaneval, sandbox, sandboxed, walls
from apr.evaluation.humaneval import (
    HumanEvalSettings,
    Problem,
    continuation,
    cut,
    pass_at_k,
    read_problems,
    run,
    summary,
)
from apr.evaluation.sandbox import Judgement, Limits, NoSandbox, Program, in_words, judge, judge_all, proven
from apr.evaluation.sandboxed import ALLOWED, FATAL, NOT_BITS, ONE_OF, plain
from processes import children_running

LAYERS = {"all layers": sandboxed.LAYERS, "audit hook alone": ()}
QUICK = 1.0  # seconds for a program that never ends
LONG = 60.0  # for one that ends by itself, however busy the machine is
TEST = "def check(candidate):\n    assert candidate(2) == 3\n    assert candidate(5) == 6\n"
RIGHT = "def answer(x):\n    return x + 1\n"
every_layer = pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)


@pytest.fixture(autouse=True)
def nothing_left(tmp_path_factory, monkeypatch):
    """No temporary folder and no process of a sandbox is left behind."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []
    assert children_running(sandbox.SCRIPT) == []


def each(complete):
    """Completions of jobs, one by one."""
    return lambda jobs: ((i, complete(*job)) for i, job in enumerate(jobs))


def said(source: str, layers=sandboxed.LAYERS, test: str = TEST, **limits) -> Judgement:
    return judge(Program(source, "answer", test), Limits(layers=layers, **{"seconds": LONG, **limits}))


@every_layer
def test_a_right_program_passes_and_a_wrong_one_does_not(layers):
    verdict = said(RIGHT, layers)
    assert verdict.passed, verdict
    inside = verdict.isolation["program"]
    assert (inside["seccomp"] == "on") == bool(layers) or "refused" in inside["seccomp"]
    assert ("audit hook" in inside) == (inside["seccomp"] != "on")
    wrong = said("def answer(x):\n    return 3\n", layers)
    assert not wrong.passed
    assert "wrong answer" in wrong.why


BAD = {
    "no function": ("x = 1", "no function"),
    "syntax": ("def answer(x:\n", "SyntaxError"),
    "raises": ("def answer(x):\n    return [][x]\n", "IndexError"),
    "loops at once": ("while True: pass", "limit of time|no verdict"),
    "loops when called": ("def answer(x):\n    while True: pass\n", "limit of time|no verdict"),
    "sleeps": ("import time\ndef answer(x):\n    time.sleep(99)\n", "no verdict"),
    "memory": ("x = [0]\nwhile True: x = x + x\n" + RIGHT, "MemoryError|ended"),
    "a large integer": ("x = 1 << (1 << 36)\n" + RIGHT, "MemoryError|OverflowError|ended"),
    "recursion": ("def answer(x):\n    return answer(x)\n", "RecursionError|ended"),
    "sys.exit before the test": ("import sys\nsys.exit(0)\n" + RIGHT, "SystemExit"),
    "sys.exit when called": ("import sys\ndef answer(x):\n    sys.exit(0)\n", "SystemExit"),
    "os._exit": ("import os\nos._exit(0)\n" + RIGHT, "ended before"),
    "os._exit when called": ("import os\ndef answer(x):\n    os._exit(0)\n", "ended before"),
    "exits at the end": ("import atexit\natexit.register(print, 'passed')\nraise SystemExit", "SystemExit"),
    "prints a verdict": (
        "import sys, os\nprint('{\"passed\": true}')\n"
        "for fd in range(1, 64):\n    try: os.write(fd, b'{\"passed\": true}')\n    except OSError: pass\n",
        "",
    ),
    "floods its output": ("def answer(x):\n    while True: print('x' * 10**6)\n", "limit of time|no verdict"),
    "is equal to everything": (
        "class Any:\n    def __eq__(s, o): return True\n    def __bool__(s): return True\n"
        "def answer(x): return Any()\n",
        "no plain value",
    ),
    "an integer equal to everything": (
        "class Any(int):\n    def __eq__(s, o): return True\n    __hash__ = int.__hash__\n"
        "def answer(x): return Any(7)\n",
        "wrong answer",
    ),
    "replaces the checker": (
        "import builtins, sys\nbuiltins.AssertionError = type('E', (Exception,), {})\n"
        "check = lambda candidate: None\nsys.modules['__main__'].check = check\n"
        "for m in list(sys.modules.values()):\n"
        "    for n in ('check', 'ask', '_answer', 'tester', 'receive'):\n"
        "        if hasattr(m, n): setattr(m, n, check)\n"
        "def answer(x): return 0\n",
        "",
    ),
    "changes its caller": (
        "import sys\ndef answer(x):\n    f = sys._getframe()\n    while f:\n"
        "        f.f_globals['_outcome'] = lambda c: ('value', 3, '')\n        f = f.f_back\n    return 0\n",
        "wrong answer",
    ),
    "sends a pickle that runs code": (
        "import sys, pickle, struct\nclass Evil:\n    def __reduce__(s): return (exec, ('raise SystemExit(0)',))\n"
        "f = sys._getframe()\nwhile 'replies' not in f.f_locals: f = f.f_back\n"
        "data = pickle.dumps(Evil())\nf.f_locals['replies'].write(struct.pack('<Q', len(data)) + data)\n"
        "f.f_locals['replies'].flush()\n",
        "cannot be read",
    ),
    "sends an endless message": (
        "import sys, struct\nf = sys._getframe()\nwhile 'replies' not in f.f_locals: f = f.f_back\n"
        "f.f_locals['replies'].write(struct.pack('<Q', 1 << 60))\nf.f_locals['replies'].flush()\n",
        "more than",
    ),
    "asks for input": ("def answer(x):\n    return input()\n", "EOFError"),
    "raises an assertion of its own": ("def answer(x):\n    raise AssertionError\n", "AssertionError"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_programs_fail(name):
    source, why = BAD[name]
    verdict = said(source, memory_bytes=256 << 20, seconds=QUICK if "no verdict" in why else LONG)
    assert not verdict.passed
    assert any(w in verdict.why for w in why.split("|")), verdict.why


TRY = "try:\n    {}\nexcept BaseException:\n    pass\n"
HARM = {
    "forks": "import os; os.fork()",
    "a fork bomb": "import os\n    while True: os.fork()",
    "threads": "import threading\n    while True: threading.Thread(target=print).start()",
    "starts a program": "import subprocess; subprocess.run(['touch', PATH])",
    "a shell": "import os; os.system('touch ' + PATH)",
    "the bare fork_exec": "import multiprocessing.util as u; u.spawnv_passfds('/bin/touch', ['touch', PATH], ())",
    # signal 0 does nothing, should the sandbox be broken
    "ends its parent": "import os; os.kill(os.getppid(), 0)",
    "ends everything": "import os; os.kill(-1, 0)",
    "deletes a file": "import os; os.remove(PATH)",
    "deletes a folder": "import shutil; shutil.rmtree(FOLDER)",
    "renames a file": "import os; os.rename(PATH, PATH + '2')",
    "empties a file": "import os; os.truncate(PATH, 0)",
    "makes a folder": "import os; os.mkdir(FOLDER + '/new')",
    "connects": "import socket; socket.create_connection(('127.0.0.1', PORT), 2).sendall(b'x')",
    "sends a packet": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
    "opens a page": "import urllib.request; urllib.request.urlopen('http://127.0.0.1:%d' % PORT)",
}  # fmt: skip
WRITES = {
    "overwrites a file": "open(PATH, 'w').write('x')",
    "appends to a file": "open(PATH, 'a').write('x')",
    "opens by number": "import os; os.write(os.open(PATH, os.O_RDWR), b'x')",
    "makes a file": "open(FOLDER + '/new', 'x')",
}


@pytest.fixture
def valuables(tmp_path):
    """Names for a program: a file, its folder, and a port somebody listens on; nothing may happen to them."""
    (tmp_path / "kept").write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        names = {"PATH": str(tmp_path / "kept"), "FOLDER": str(tmp_path), "PORT": server.getsockname()[1]}
        yield "".join(f"{k} = {v!r}\n" for k, v in names.items())
        assert [p.name for p in tmp_path.iterdir()] == ["kept"]
        assert (tmp_path / "kept").read_text() == "kept"
        with pytest.raises(BlockingIOError):
            server.accept()


@every_layer
@pytest.mark.parametrize("name", HARM)
def test_harm_is_stopped_and_counts_as_failed(name, layers, valuables):
    if not layers and name == "threads":
        pytest.skip("Python's audit hook does not see threads, which do no harm")
    verdict = said(valuables + TRY.format(HARM[name]) + RIGHT, layers)
    assert not verdict.passed, verdict
    assert "forbidden" in verdict.why or "ended" in verdict.why, verdict.why


@every_layer
@pytest.mark.parametrize("name", WRITES)
def test_no_file_is_written(name, layers, valuables):
    verdict = said(valuables + WRITES[name] + "\n" + RIGHT, layers)
    assert not verdict.passed
    assert "PermissionError" in verdict.why


# Each with what the system itself must offer; None: found on PATH.
WALLS = {
    "bubblewrap": (("namespace", "seccomp"), None),
    "a root of its own": (("namespace", "seccomp"), ""),
    "Landlock": (("landlock", "seccomp"), ""),
    "all of them": (sandboxed.LAYERS, None),
}
LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
BY_LIBC = (
    LIBC
    + "def raw(path):\n    fd = libc.open(os.fsencode(path), 0)\n    buffer = ctypes.create_string_buffer(1 << 20)\n"
    "    size = libc.read(fd, buffer, 1 << 20)\n    return buffer.raw[: max(0, size)]\n"
)
# Programs that look for SOLUTION, in the file PATH or the process PID and its environment, and return what they find.
PRYING = {
    "the file by its name": "def answer(x):\n    return open(PATH).read()\n",
    "the file past Python": BY_LIBC + "def answer(x):\n    return raw(PATH).decode()\n",
    "the file by its parent's command line": (
        "import os\ndef answer(x):\n    for a in open('/proc/%d/cmdline' % PID, 'rb').read().split(b'\\0'):\n"
        "        if os.path.isfile(a): return open(a).read()\n    return open(PATH).read()\n"
    ),
    "the file by way of another root": (
        BY_LIBC + "def answer(x):\n    roots = ['/proc/self/root', '/proc/1/root', '/proc/%d/root' % PID, '/proc/self/cwd/..']\n"
        "    return b''.join(raw(r + PATH) for r in roots).decode()\n"
    ),
    "the file past the top": (
        BY_LIBC + "def answer(x):\n    up = '/..' * 40\n"
        "    return (raw(up + PATH) + raw(os.path.dirname(os.__file__) + up + PATH) + raw('.' + up + PATH)).decode()\n"
    ),
    "open descriptors": (
        "import os\ndef answer(x):\n    found = b''\n    for fd in range(3, 300):\n        try: found += os.pread(fd, 9999, 0)\n"
        "        except OSError: pass\n    return found.decode()\n"
    ),
    "its folder": "import os\ndef answer(x):\n    return ' '.join(os.listdir(os.path.dirname(PATH)))\n",
    "packages that lie beside the library": (
        BY_LIBC + "def answer(x):\n    return raw(PACKAGE).decode()\n"
    ),
    "the code of apr": BY_LIBC + "def answer(x):\n    return raw(CODE).decode()\n",
}  # fmt: skip
MEMORY = {
    "the environment of another process": (
        BY_LIBC + "def answer(x):\n    return raw('/proc/%d/environ' % PID).decode()\n"
    ),
    "the memory of another process": (
        LIBC + "def answer(x):\n    fd = libc.open(b'/proc/%d/mem' % PID, 0)\n"
        "    buffer = ctypes.create_string_buffer(64)\n"
        "    libc.pread(fd, buffer, 64, ctypes.c_long(ADDRESS))\n    return buffer.raw.decode()\n"
    ),
    "the memory past /proc": (
        LIBC + "def answer(x):\n    buffer = ctypes.create_string_buffer(64)\n"
        "    ours = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 64)\n    theirs = (ctypes.c_void_p * 2)(ADDRESS, 64)\n"
        "    libc.syscall(310, PID, ours, 1, theirs, 1, 0)\n    return buffer.raw.decode()\n"
    ),
    "the tests": (
        BY_LIBC + "def answer(x):\n    found, near = b'', range(os.getpid() - 5, os.getpid() + 5)\n"
        "    for pid in {PID, *near} - {os.getpid()}:\n"
        "        found += raw('/proc/%d/environ' % pid) + raw('/proc/%d/mem' % pid) + raw('/proc/%d/maps' % pid)\n"
        "    return 'SOLUTION ' * bool(found)\n"
    ),
}  # fmt: skip


@pytest.fixture
def secrets(tmp_path, monkeypatch):
    """Names for a program that looks for SOLUTION: in a file, in this process, in a package."""
    monkeypatch.setenv("SOLUTION", "SOLUTION")
    (tmp_path / "SOLUTION.jsonl").write_text("SOLUTION " * 9)
    held = ctypes.create_string_buffer(b"SOLUTION " * 9)
    package = Path(walls.python_files()["hidden"][0]) / "apr_test_SOLUTION.py"
    package.write_text("SOLUTION")
    names = {
        "PATH": str(tmp_path / "SOLUTION.jsonl"),
        "PID": os.getpid(),
        "ADDRESS": ctypes.addressof(held),
        "PACKAGE": str(package),
        "CODE": sandbox.__file__,
    }
    try:
        yield "".join(f"{k} = {v!r}\n" for k, v in names.items())
    finally:
        package.unlink()


FOUND = "def check(candidate):\n    assert 'SOLUTION' in candidate(1) or 'def judge' in candidate(1)\n"


@pytest.mark.parametrize("wall", WALLS)
@pytest.mark.parametrize("name", {**PRYING, **MEMORY})
def test_a_program_sees_no_file_and_no_process_of_others(name, wall, secrets, monkeypatch):
    layers, bubblewrap = WALLS[wall]
    if bubblewrap is not None:
        monkeypatch.setattr(sandbox.shutil, "which", lambda program: None)
    verdict = said(secrets + {**PRYING, **MEMORY}[name], layers, test=FOUND)
    inside = verdict.isolation.get("program", {})
    if wall == "bubblewrap" and inside.get("namespace") != sandbox.BUBBLEWRAP:
        pytest.skip("bubblewrap is not found, or makes no namespaces here")
    if not sandbox.isolated(verdict.isolation):
        pytest.skip(f"this machine offers no {wall}: {inside}")
    assert not verdict.passed, verdict


@pytest.mark.parametrize("name", MEMORY)
def test_without_walls_processes_are_closed_all_the_same(name, secrets):
    """Where the kernel gives neither namespaces nor Landlock: no capability, and nobody can be read."""
    verdict = said(secrets + MEMORY[name], ("seccomp",), test=FOUND)
    assert not verdict.passed, verdict


def test_without_walls_an_audit_hook_hides_files(secrets):
    verdict = said(secrets + PRYING["the file by its name"], (), test=FOUND)
    assert "PermissionError" in verdict.why
    assert verdict.isolation["program"]["files"] == "hidden by an audit hook alone"


def test_a_secret_in_the_open_is_found_by_these_programs(secrets, monkeypatch, tmp_path):
    """The programs above do look in the right places."""
    files = walls.python_files()
    monkeypatch.setattr(
        sandbox,
        "_files",
        lambda: {"readable": [*files["readable"], str(tmp_path), sandbox.__file__], "hidden": []},
    )
    for name in (
        "the file by its name",
        "the file past Python",
        "the file past the top",
        "its folder",
        *list(PRYING)[-2:],
    ):
        verdict = said(secrets + PRYING[name], ("landlock", "seccomp"), test=FOUND)
        assert verdict.passed, (name, verdict)


def test_without_isolation_nothing_is_judged_unless_a_flag_says_so():
    for layers in ((), ("seccomp",), ("landlock",)):
        with pytest.raises(Refused, match="--allow-unsafe") as e:
            proven(Limits(LONG, layers=layers))
        assert e.value.exit_code == 5
        assert proven(Limits(LONG, layers=layers), allow_unsafe=True)["program"]
    with pytest.raises(Refused, match="--allow-unsafe"):
        run(
            each(lambda p, s: ("    return x + 1\n", 1)),
            [PROBLEM],
            HumanEvalSettings(limits=Limits(LONG, layers=())),
        )
    allowed = HumanEvalSettings(limits=Limits(LONG, layers=()), allow_unsafe=True)
    assert run(each(lambda p, s: ("    return x + 1\n", 1)), [PROBLEM], allowed)["passed"] == 1


def test_walls_with_a_gap_are_found_before_anything_is_judged(tmp_path, monkeypatch):
    (tmp_path / "benchmark.jsonl").write_text("x")
    assert proven(Limits(LONG), secret=str(tmp_path / "benchmark.jsonl"))
    files = walls.python_files()
    gap = {"readable": [*files["readable"], str(tmp_path)], "hidden": files["hidden"]}
    monkeypatch.setattr(sandbox, "_files", lambda: gap)
    with pytest.raises(NoSandbox, match="a file of this machine passed"):
        proven(Limits(LONG, layers=("landlock", "seccomp")), secret=str(tmp_path / "benchmark.jsonl"))
    monkeypatch.setattr(sandbox, "_files", lambda: {**gap, "readable": [*files["readable"], "/proc"]})
    with pytest.raises(NoSandbox, match="a process of this machine passed"):
        proven(Limits(LONG, layers=("landlock", "seccomp")))


def test_the_benchmark_is_the_secret(monkeypatch):
    asked = []
    monkeypatch.setattr(humaneval, "proven", lambda *args: asked.append(args) or {})
    run(each(lambda p, s: ("    return x + 1\n", 1)), [PROBLEM], HumanEvalSettings(benchmark="h.jsonl"))
    assert asked == [(Limits(), False, "h.jsonl")]


def test_a_bubblewrap_that_does_not_work_is_not_used(tmp_path, monkeypatch):
    for name, text in (("fails", "#!/bin/sh\nexit 1\n"), ("is none", "no program")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
        assert sandbox.bubblewrap(sys.executable, str(tmp_path / name)) == ()
    assert sandbox.bubblewrap(sys.executable, str(tmp_path / "nothing")) == ()
    assert sandbox.bubblewrap(sys.executable, None) == ()
    command = walls.bubblewrap_command("bwrap", walls.python_files(), ["/script"])
    assert command[:2] == ["bwrap", "--unshare-all"]
    at = command.index("/script")
    assert command[at - 1 : at + 2] == ["--ro-bind", "/script", "/script"]
    assert str(Path.home()) not in command


def test_the_memory_of_this_process_is_closed_while_programs_run():
    libc = ctypes.CDLL(None)

    def dumpable():
        return libc.prctl(sandbox.PR_GET_DUMPABLE, 0, 0, 0, 0)

    before = dumpable()
    with sandbox._memory_closed():
        assert dumpable() == 0
        with sandbox._memory_closed():
            assert dumpable() == 0
        assert dumpable() == 0
    assert dumpable() == before == 1


def test_no_reference_solution_is_kept(data):
    problems, solutions = canonical(data, 16)
    assert not any(solution in repr(vars(p)) for p, solution in zip(problems, solutions, strict=True))


@pytest.mark.parametrize("call", ["getpid", "fork", "kill"])
def test_system_calls_without_python(call):
    """ctypes reaches the kernel past every audit hook: the filter itself must hold."""
    number = {"getpid": ALLOWED["getpid"], "fork": FATAL["fork"], "kill": FATAL["kill"]}[call]
    source = f"import ctypes\nctypes.CDLL(None).syscall({number}, 0, 0)\n" + RIGHT
    verdict = said(source)
    if verdict.isolation.get("program", {}).get("seccomp", "on") != "on":
        pytest.skip("no seccomp here")
    assert verdict.passed == (call == "getpid"), verdict


def test_the_filter_names_no_call_twice():
    numbers = [*ALLOWED.values(), *FATAL.values(), *(r[0] for r in (*NOT_BITS.values(), *ONE_OF.values()))]
    assert len(set(numbers)) == len(numbers)


def test_modules_and_iterators_work_inside():
    source = (
        "import math, re, collections, itertools, functools, heapq, bisect, string, random, datetime, decimal, hashlib\n"
        "from typing import List\n"
        "def answer(x):\n    return (y for y in sorted(collections.Counter('aab').items()))\n"
    )
    test = "def check(candidate):\n    assert tuple(candidate(1)) == (('a', 2), ('b', 1))\n"
    verdict = said(source, test=test)
    assert verdict.passed, verdict


def test_exceptions_that_tests_expect_reach_them():
    test = (
        "def check(candidate):\n    try:\n        candidate(-1)\n    except ValueError as e:\n"
        "        assert str(e) == 'negative'\n    else:\n        assert False\n"
    )
    good = "def answer(x):\n    raise ValueError('negative')\n"
    assert said(good, test=test).passed
    assert not said(RIGHT, test=test).passed


def test_values_are_taken_for_what_built_in_types_say():
    class Text(str):
        def __eq__(self, other):
            return True

        __hash__ = str.__hash__

    for value, want in ((Text("a"), str), (np.float64(2.5), float), ({1: (2, [3])}, dict), (True, bool)):
        assert type(plain(value)) is want
    assert plain(Text("a")) != "b"
    with pytest.raises(TypeError, match="object"):
        plain(object())


def test_a_sandbox_that_lets_wrong_programs_pass_is_refused(monkeypatch):
    monkeypatch.setattr(sandbox, "judge", lambda program, limits: Judgement(True, "", {}))
    with pytest.raises(NoSandbox, match="passed"):
        proven(Limits())
    monkeypatch.setattr(sandbox, "judge", lambda program, limits: Judgement(False, "why", {}))
    with pytest.raises(NoSandbox, match="did not pass"):
        proven(Limits())


def test_a_python_that_does_not_start(monkeypatch):
    monkeypatch.setattr(sandbox.sys, "executable", "/no/such/python")
    with pytest.raises(NoSandbox, match="/no/such/python"):
        said(RIGHT)


def test_isolation_in_words():
    on = {"program": {"seccomp": "on", "namespace": "on"}}
    off = {"program": {"seccomp": "refused: x", "namespace": "refused: y", "audit hook": "on"}}
    assert "seccomp" in in_words(on)
    assert "a root of its own," in in_words(on)
    assert "bubblewrap" in in_words({"program": {"namespace": sandbox.BUBBLEWRAP}})
    assert "can be got around" in in_words(off)
    assert "refused: y" in in_words(off)


def canonical(data, step: int) -> tuple[list[Problem], list[str]]:
    path = data("human-eval/HumanEval.jsonl.gz")
    problems = read_problems(str(path))
    with gzip.open(path) as f:
        rows = [json.loads(line) for line in f]
    return problems[::step], [r["canonical_solution"] for r in rows[::step]]


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
def test_the_canonical_solutions_of_humaneval_pass(data, step):
    problems, solutions = canonical(data, step)
    programs = [
        Program(p.prompt + s, p.entry_point, p.test, p.prompt)
        for p, s in zip(problems, solutions, strict=True)
    ]
    verdicts = list(judge_all(programs, Limits(LONG), 2))
    assert [(p.task_id, v.why) for p, v in zip(problems, verdicts, strict=True) if not v.passed] == []
    assert len(verdicts) == (164 if step == 1 else 19)


def test_wrong_solutions_of_humaneval_fail(data):
    problems, _ = canonical(data, 16)
    programs = [Program(p.prompt + "    return None\n", p.entry_point, p.test, p.prompt) for p in problems]
    assert not any(v.passed for v in judge_all(programs, Limits(LONG), 2))


def test_pass_at_k_is_the_estimator_of_the_paper():
    from math import comb

    for n in (1, 2, 5, 20):
        for c in range(n + 1):
            for k in range(1, n + 1):
                assert abs(pass_at_k(n, c, k) - (1 - comb(n - c, k) / comb(n, k))) < 1e-12
    with pytest.raises(ValueError, match="pass@3"):
        pass_at_k(2, 1, 3)
    found = summary([True, False, False, False] * 5, 10)
    assert list(found) == ["1", "10"]
    assert found["1"]["value"] == pytest.approx(0.25)
    assert found["10"] == {"value": 1.0, "stderr": 0.0}
    assert summary([True], 1)["1"] == {"value": 1.0, "stderr": None}


def test_completions_are_cut_at_the_usual_places():
    text = "    return 1\n\n\ndef other():\n    pass\n"
    assert cut(text) == "    return 1\n\n"
    for stop in ("\nclass A:", "\n# x", "\nif x:", "\nprint(1)"):
        assert cut("    return 1" + stop) == "    return 1"
    assert cut("    if x:\n        return 1\n    return 2") == "    if x:\n        return 1\n    return 2"


def test_no_more_tokens_are_taken_than_a_stop_needs(tmp_path):
    from apr.tokenizer.training import train_tokenizer

    tokenizer = train_tokenizer(["    return x\n\ndef f"] * 3, 260, tmp_path)
    taken = []

    def stream():
        for i in tokenizer.encode("    return x\ndef f(y):\n    return 3\n"):
            taken.append(int(i))
            yield taken[-1]

    text, tokens = continuation(
        tokenizer, [int(i) for i in tokenizer.encode("def g():\n")], stream(), ["\ndef"]
    )
    assert text == "    return x"
    assert tokens == len(taken)
    assert "return 3" not in tokenizer.decode(taken)
    with pytest.raises(Refused, match="no token"):
        continuation(tokenizer, [1], iter(()), [])


PROBLEM = Problem("t/0", "def answer(x):\n", "answer", TEST)


def test_a_run_scores_programs_and_says_what_kept_them_in():
    programs = iter(["    return x + 1\n", "    return 0\n", "    return x + 1\n", "    return x + 1\n"])
    seeds = []

    def complete(prompt, seed):
        seeds.append(seed)
        return next(programs), 5

    other = Problem("t/1", "def answer(x):\n", "answer", TEST)
    result = run(
        each(complete), [PROBLEM, other], HumanEvalSettings(samples=2, temperature=0.5, limits=Limits(LONG))
    )
    assert len(set(seeds)) == 4
    assert result["pass_at_k"]["1"]["value"] == 0.75
    assert result["pass_at_k"]["2"]["value"] == 1.0
    assert [r["passed"] for r in result["rows"]] == [True, False, True, True]
    assert result["rows"][1]["why"]
    assert set(result["isolation"]) == {"program", "tests"}


@pytest.mark.parametrize(
    ("settings", "complete", "error", "words"),
    [
        (HumanEvalSettings(samples=0), None, UsageError, "--samples 0"),
        (HumanEvalSettings(samples=2), None, UsageError, "--temperature"),
        (HumanEvalSettings(limits=Limits(0)), None, UsageError, "--timeout"),
        (HumanEvalSettings(limits=Limits(1e10)), None, UsageError, "--timeout"),
        (HumanEvalSettings(limits=Limits(LONG)), lambda p, s: (" \n", 3), Refused, "empty"),
    ],
)
def test_no_score_without_programs(settings, complete, error, words):
    with pytest.raises(error, match=words):
        run(each(complete), [PROBLEM], settings)


def test_a_machine_that_cannot_judge_gives_no_score(monkeypatch):
    monkeypatch.setattr(sandbox.sys, "executable", "/no/such/python")
    with pytest.raises(NoSandbox):
        run(each(lambda p, s: ("    return x + 1\n", 1)), [PROBLEM], HumanEvalSettings())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no lines"),
        (b"{", ":1: not JSON"),
        (b"[1]\n", "not a JSON object"),
        (b'{"task_id": "a"}\n', "prompt"),
        (b"\x1f\x8bxx", "cannot be read"),
        (b"\xff\n", "not UTF-8 at byte 0"),
    ],
)
def test_broken_problem_files_are_named(tmp_path, content, words):
    path = tmp_path / "h.jsonl"
    path.write_bytes(content)
    with pytest.raises(MalformedFile, match=words) as e:
        read_problems(str(path))
    assert str(path) in str(e.value)
    with pytest.raises(InputNotFound):
        read_problems(str(tmp_path / "none"))
    row = json.dumps({"task_id": "a", "prompt": "p", "entry_point": "e", "test": "t"})
    path.write_text(row + "\n" + row)
    with pytest.raises(MalformedFile, match="twice"):
        read_problems(str(path))


def test_the_script_needs_nothing_but_python():
    """python -I -S has neither apr nor site-packages."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import runpy; runpy.run_path({str(sandbox.SCRIPT)!r})"],
        env={},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
