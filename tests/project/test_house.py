"""The layout of apr/: which rooms there are, which room may import which, and how comments and docstrings speak.

Read from the source with ast and tokenize: nothing of apr is imported.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
APR = ROOT / "apr"

# Room: the rooms that it may import from, besides itself. The order is that of the layers.
FOUNDATION = ("common",)
ROOMS: dict[str, tuple[str, ...]] = {
    "common": (),
    "backends": FOUNDATION,
    "ranks": FOUNDATION,
    "tokenizer": FOUNDATION,
    "model": FOUNDATION,
    "data": (*FOUNDATION, "tokenizer"),
    "checkpoints": (*FOUNDATION, "tokenizer", "model", "ranks"),
    "inference": (*FOUNDATION, "tokenizer", "model", "checkpoints", "backends"),
    "bisect": (*FOUNDATION, "tokenizer", "model", "backends", "checkpoints", "data"),
    "evaluation": (*FOUNDATION, "tokenizer", "model", "backends", "checkpoints", "data", "bisect", "inference"),
    "evidence": (*FOUNDATION, "model", "checkpoints", "data", "ranks"),
    "report": (*FOUNDATION, "evidence"),
    "training": (
        *FOUNDATION, "tokenizer", "model", "backends", "checkpoints", "data", "inference", "bisect", "evaluation",
        "evidence", "report", "ranks",
    ),
    "verify": (
        *FOUNDATION, "tokenizer", "model", "backends", "checkpoints", "data", "inference", "bisect", "evaluation",
        "evidence", "report", "training", "ranks",
    ),
}  # fmt: skip
ROOMS["api"] = tuple(ROOMS)
ROOMS["cli"] = tuple(ROOMS)
ROOMS["__main__"] = ("cli",)
# Of the room training, only this module may import these rooms.
ORCHESTRATOR, ONLY_ORCHESTRATED = "apr.training.run", ("evidence", "report")
# Imports inside functions: what is optional, or too heavy for every command to load, and of apr what loads such a thing.
OPTIONAL = {
    "cupy", "cupy_backends", "cuda", "gguf", "huggingface_hub", "jinja2", "matplotlib", "numba", "pyarrow", "rich",
    "mpi4py", "scipy_openblas64", "readline", "tensorboardX", "tokenizers", "torch", "transformers", "wandb", "lm_eval",
    "yaml", "zstandard",
}  # fmt: skip
OPENERS = ("What", "Whether", "How", "Where", "Which", "The one", "The same")


def sources() -> list[Path]:
    """Every module of apr/."""
    return sorted(APR.rglob("*.py"))


def module(path: Path) -> str:
    """apr/data/shards.py -> apr.data.shards; a room's __init__ -> the room."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    """Every module of apr by its name."""
    return {module(p): p for p in sources()}


def room(name: str) -> str:
    """The room of a module: apr.data.shards -> data; apr itself -> ""."""
    return name.split(".")[1] if "." in name else ""


def imports(path: Path, tree: ast.AST | None = None) -> Iterator[tuple[ast.stmt, str]]:
    """(statement, module of apr or top-level package) of every import, at whatever depth, but for type checkers."""
    tree = tree or ast.parse(path.read_text())
    only_typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    known = modules()
    here = module(path).split(".") + (["__init__"] if path.name == "__init__.py" else [])
    for node in ast.walk(tree):
        if id(node) in only_typing:
            continue
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*here[: len(here) - node.level], *([node.module] if node.module else [])])
                if node.level
                else (node.module or "")
            )
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield node, inner if inner in known else base


def graph() -> dict[str, set[str]]:
    """The modules of apr that each module imports, at whatever depth."""
    known = modules()
    return {name: {to for _, to in imports(path) if to in known} - {name} for name, path in known.items()}


def forbidden() -> list[str]:
    """Imports against the table, as "apr.data.x -> apr.training.y"."""
    against = []
    for name, targets in graph().items():
        here = room(name)
        for target in sorted(targets):
            there = room(target)
            allowed = here in ("", there) or there in ROOMS.get(here, ())
            if name.startswith("apr.training.") and name != ORCHESTRATOR and there in ONLY_ORCHESTRATED:
                allowed = False
            if not allowed or (not here and target != "apr.common.version"):
                against.append(f"{name} -> {target}")
    return against


def circle() -> list[str]:
    """Modules of one import circle, in order, or nothing."""
    edges = graph()
    done: set[str] = set()

    def walk(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        for target in sorted(edges[name]):
            if found := walk(target, [*trail, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(edges) if (found := walk(name, []))), [])


def late_imports() -> list[str]:
    """Imports inside functions of what is neither optional nor heavy, as "file:line name"."""
    late, allowed = [], heavy()
    for path in sources():
        tree = ast.parse(path.read_text())
        inside = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            for node in ast.walk(function)
        }
        for node, name in imports(path, tree):
            lazy = path == APR / "__init__.py"  # `import apr` itself loads nothing
            if id(node) in inside and name.split(".")[0] not in OPTIONAL and name not in allowed and not lazy:
                late.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")
    return late


def heavy() -> set[str]:
    """Modules of apr that may be imported inside a function: those that load an optional or heavy package."""
    return {
        name
        for name, path in modules().items()
        if any(target.split(".")[0] in OPTIONAL for _, target in imports(path))
    }


def openers() -> list[str]:
    """Docstrings that do not open with a verb or a formula, as "file:line text"."""
    wrong = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if re.match(rf"({'|'.join(OPENERS)})\b", text):
                    line = getattr(node, "lineno", 1)
                    wrong.append(f"{path.relative_to(ROOT)}:{line} {text.splitlines()[0]}")
    return wrong


def comments_behind_brackets() -> list[str]:
    """Lines that hold a closing bracket and a comment, and nothing else: the comment belongs on the line above."""
    wrong = []
    for path in sources():
        for n, line in enumerate(path.read_text().splitlines(), 1):
            if re.match(r"\s*[)\]}]+[,:]?\s+#(?! (fmt: |noqa|type: ))", line):
                wrong.append(f"{path.relative_to(ROOT)}:{n} {line.strip()}")
    return wrong


def non_ascii_comments() -> list[str]:
    """Comments with characters beyond ASCII."""
    wrong = []
    for path in sources():
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            if token.type == tokenize.COMMENT and not token.string.isascii():
                wrong.append(f"{path.relative_to(ROOT)}:{token.start[0]} {token.string}")
    return wrong


OLD_NAMES = r"\b(arena|Arena|Want|Wants|KEPT|SAME|PIECE|MOST_[A-Z_]+|_parts|_up)\b"


def old_names() -> list[str]:
    """Names that have better ones, as "file:line name"."""
    wrong = []
    for path in sources():
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            if token.type == tokenize.NAME and re.fullmatch(OLD_NAMES, token.string):
                wrong.append(f"{path.relative_to(ROOT)}:{token.start[0]} {token.string}")
    return wrong


def loose() -> list[str]:
    """Modules that lie outside the rooms, rooms that are not in the table, and names with a leading underscore."""
    wrong = [p.name for p in APR.glob("*.py") if p.name not in ("__init__.py", "__main__.py", "api.py")]
    wrong += [p.name for p in APR.iterdir() if p.is_dir() and p.name not in ROOMS and p.name != "__pycache__"]
    wrong += [str(p.relative_to(ROOT)) for p in sources() if re.match(r"_(?!_)", p.name)]
    return wrong


# Files that may be longer, since they are one table or one kernel.
MAX_LINES = 400
LONG = {
    "apr/backends/cpu/kernels.py": "one kernel after the other",
    "apr/backends/reference.py": "the formula of one op after the other",
    "apr/backends/cuda/ops.py": "one launcher after the other",
    "apr/bisect/causes.py": "the table of causes",
    "apr/bisect/planted/faults.py": "the table of faults",
    "apr/bisect/planted/kernel_faults.py": "the table of edits",
    "apr/evidence/gates.py": "the table of gates",
}


def long_files() -> list[str]:
    """Files of more than MAX_LINES lines that are not in LONG, and entries of LONG that are not needed."""
    sizes = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in sources()}
    wrong = [f"{name}: {n} lines" for name, n in sizes.items() if n > MAX_LINES and name not in LONG]
    return wrong + [f"{name} is short enough" for name in LONG if sizes.get(name, 0) <= MAX_LINES]


# Calls that open a file by its name, or parse what a file holds; `opened(path)` of apr/common/files.py gives the handle
# `f`, parse_value the value of JSON.
OPENING = {
    "ParquetFile", "copy2", "copyfile", "copytree", "fdopen", "from_file", "fromfile", "genfromtxt", "loadtxt", "memmap",
    "open", "open_memmap", "read_bytes", "read_text", "safe_open",
}  # fmt: skip
PARSING = {
    "json.load",
    "json.loads",
    "np.load",
    "gzip.decompress",
    "zlib.decompress",
    "lzma.decompress",
    "bz2.decompress",
}
# module: functions that may, and why.
OPENERS_OF_FILES = {
    "apr.common.files": {"_open": "the one place", "parse_value": "the one place"},
    "apr.common.atomic": {
        "_try": "an output", "_open_temporary": "an output", "_remove_leftover": "a regular file, not followed",
        "locked": "a folder", "_sync_folder": "a folder",
    },
    "apr.common.cache": {"throwaway_cache": "our own cache"},
    "apr.common.cgroup": {"_text": "/proc and /sys"},
    "apr.tokenizer.template_worker": {"main": "the descriptors of our own process"},
    "apr.common.host": {"cpu_name": "/proc", "available_memory": "/proc and /sys"},
    "apr.common.provenance": {"code_sha256": "our own source"},
    "apr.backends.cuda.attention": {"tiles": "our own source"},
    "apr.backends.cuda.autotune": {"_read": "our own cache"},
    "apr.backends.cuda.device": {"__init__": "no file: a handle of cuBLASLt"},
    "apr.backends.cuda.kernels": {"_paste": "our own source"},
    "apr.cli": {"open_closed_streams": "/dev/null"},
    "apr.cli.completion": {"script": "our own table"},
    "apr.cli.inspect": {"_tokenizer": "JSON that Tokenizer has checked"},
    "apr.cli.main": {"_drop_output": "/dev/null"},
    "apr.cli.show": {"on_broken_pipe": "/dev/null"},
    "apr.cli.sweep": {"launch": "an output"},
    "apr.data.conversations.examples": {"_record": "a line of bounded length and number of values"},
    "apr.data.conversations.pack": {"pack": "outputs"},
    "apr.data.encode": {"_skipped_file": "an output"},
    "apr.data.plain": {
        "open_plain": "a reader that shares no code with the others; data/find.py has looked at the file",
        "_rows": "pyarrow reads by name; data/find.py has looked at the file",
        "value_of": "a record of bounded length and number of values",
    },
    "apr.data.parquet": {"_read": "pyarrow reads by name; data/find.py has looked at the file"},
    "apr.evaluation.loss": {"_sentencepiece": "JSON that Tokenizer has checked"},
    "apr.evaluation.sandbox": {"_verdict": "a bounded answer"},
    "apr.evaluation.sandboxed": {"tester": "descriptors of the sandbox", "": "descriptors of the sandbox"},
    "apr.evaluation.walls": {"own_root": "/proc/self", "_build": "a mount point", "landlock": "folders of Python's own"},
    "apr.evidence.end": {"in_fresh_process": "the answer of our own process"},
    "apr.ranks.launch": {"_folder": "our own folder", "_is_free": "a folder of ours", "start": "the exit code of our own ranks"},
    "apr.ranks.watch": {"_read": "a line of our own ranks"},
    "apr.report.page": {"_template": "our own template"},
    "apr.report.run_files": {"_lines": "lines of bounded length", "_parsed": "a line of bounded length"},
    "apr.tokenizer.identity": {"older_identities": "JSON that Tokenizer has checked"},
    "apr.tokenizer.tokenizer": {"sha256": "JSON that Tokenizer has checked"},
    "apr.tokenizer.import_hf": {"_made": "JSON that Tokenizer has checked"},
    "apr.training.loop": {"train": "no file: the log opens outputs"},
    "apr.training.metrics": {
        "open": "an output", "_repair": "an output", "write_sample": "an output", "read_lines": "lines of bounded length",
    },
}  # fmt: skip


def _calls(node: ast.AST, function: str = "") -> Iterator[tuple[str, ast.Call]]:
    """(innermost function, call) of every call below a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call):
            yield function, child
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from _calls(child, child.name if is_function else function)


def openings() -> list[str]:
    """Files that are opened or parsed elsewhere than in apr/common/files.py, as "module.function: call"."""
    wrong = []
    for name, path in modules().items():
        for function, call in _calls(ast.parse(path.read_text())):
            text = ast.unparse(call.func)
            plain = isinstance(call.func, ast.Name) and text != "open"  # such as our own read_text(path)
            is_handle = bool(call.args) and ast.unparse(call.args[0]) == "f"
            ours = text in ("Tokenizer.from_file",)
            opens = text.split(".")[-1] in OPENING and not (plain or is_handle or ours)
            # Raises RuntimeError for a link in a circle; of our own file there is none.
            opens |= text.endswith(".resolve") and "__file__" not in text
            if (opens or text in PARSING) and function not in OPENERS_OF_FILES.get(name, {}):
                wrong.append(f"{name}.{function}: {ast.unparse(call)[:80]}")
    return wrong


# Functions that may print what printable() has not gone over, and why.
PRINTERS = {
    "apr.backends.cuda.autotune.to_stderr": "our own cache",
    "apr.cli.chat.answer": "a model's text: spoken()",
    "apr.cli.completion.main": "our own script",
    "apr.cli.main.main": "our own usage",
    "apr.cli.tables.print_findings": "headers of ours",
    "apr.cli.tables.plain_table": "the titles of the caller's columns",
}


def _is_plain(node: ast.expr) -> bool:
    """True for what a terminal shows and does not obey, whatever a file holds: constants, JSON in ASCII, cells."""
    if isinstance(node, ast.Starred):
        node = node.value
    if isinstance(node, ast.IfExp):
        return _is_plain(node.body) and _is_plain(node.orelse)
    if isinstance(node, ast.BoolOp):
        return _is_plain(node.values[-1])
    if isinstance(node, ast.Call):
        name, options = ast.unparse(node.func), {k.arg for k in node.keywords}
        if name == "map":
            return ast.unparse(node.args[0]) == "cell"
        return name in ("printable", "spoken", "json_line", "cell") or (
            name == "json.dumps" and "ensure_ascii" not in options
        )
    # Names: tables, cells, and usage texts of ours.
    return isinstance(node, ast.Constant) or ast.unparse(node) in PLAIN_NAMES


PLAIN_NAMES = {"USAGE", "_usage()", "table", "text", "texts", "cells", "verdict", "f'apr {__version__}'", "e.status",
               "f'apr {name}: interrupted'", "f'apr {name}: out of memory; `apr plan` shows what a job needs'"}  # fmt: skip


def raw_prints() -> list[str]:
    """Texts that reach a terminal other than through printable() or cell(), as "module.function: call"."""
    wrong = []
    for name, path in modules().items():
        for function, call in _calls(ast.parse(path.read_text())):
            text = ast.unparse(call.func)
            prints = text == "print" or text.endswith(
                (".console.print", ".add_row", ".add_column", ".status")
            )
            prints |= text in ("console.print", "table.add_row", "console.status", "status.update")
            titles = [k.value for k in call.keywords if k.arg == "title"] if text == "Table" else []
            raw = [a for a in [*(call.args if prints else []), *titles] if not _is_plain(a)]
            if raw and f"{name}.{function}" not in PRINTERS:
                wrong.append(f"{name}.{function}: {ast.unparse(call)[:80]}")
            if text == "Text" and room(name) == "cli" and function != "cell":
                wrong.append(f"{name}.{function}: Text that cell() has not made")
    return wrong


def other_aprs() -> list[str]:
    """Functions that start a process of apr, and not with importing_this(): it may find another apr, or none."""
    wrong = []
    for name, path in modules().items():
        for f in [f for f in ast.walk(ast.parse(path.read_text())) if isinstance(f, ast.FunctionDef)]:
            texts = [n.value for n in ast.walk(f) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            starts = "sys.executable" in ast.unparse(f) and any(t.startswith("apr.") for t in texts)
            if starts and "importing_this(" not in ast.unparse(f):
                wrong.append(f"{name}.{f.name}")
    return wrong


CHECKS = [
    forbidden, circle, late_imports, openers, comments_behind_brackets, non_ascii_comments, old_names, loose, long_files,
    openings, raw_prints, other_aprs,
]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_house(check):
    wrong = check()
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong)


PLANTED = {  # check: a file of apr/, its text, and a part of what the check says
    forbidden: ("data/x.py", "from ..training import loop\n", "apr.data.x -> apr.training.loop"),
    circle: ("training/loop.py", "from ..training import rundir\n", "apr.training.loop"),
    late_imports: ("data/x.py", "def f():\n    from ..common import errors\n", "x.py:2 apr.common.errors"),
    openers: ("data/x.py", '"""What it is."""\n', "x.py:1 What it is."),
    comments_behind_brackets: ("data/x.py", "A = (\n    1,\n)  # a number\n", "x.py:3 )  # a number"),
    non_ascii_comments: ("data/x.py", "A = 1  # \u2264 2\n", "x.py:1"),
    old_names: ("data/x.py", "MOST_ROWS = 1\n", "x.py:1 MOST_ROWS"),
    loose: ("_hidden.py", "", "_hidden.py"),
    long_files: ("data/x.py", "A = 1\n" * (MAX_LINES + 1), "x.py: 401 lines"),
    openings: ("data/x.py", "def f(p):\n    return p.read_bytes()\n", "apr.data.x.f: p.read_bytes()"),
    raw_prints: ("data/x.py", "def f(name):\n    print(f'file {name}')\n", "apr.data.x.f: print(f'file"),
    other_aprs: ("data/x.py", "def f():\n    run([sys.executable, '-m', 'apr.cli.main'])\n", "apr.data.x.f"),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_a_planted_slip_is_seen(check, tmp_path, monkeypatch):
    monkeypatch.setattr("test_house.ROOT", tmp_path)
    monkeypatch.setattr("test_house.APR", tmp_path / "apr")
    monkeypatch.setattr("test_house.LONG", {})
    for name in ("common/errors.py", "data/batches.py", "training/loop.py", "training/rundir.py"):
        (tmp_path / "apr" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "apr" / name).write_text("")
    (tmp_path / "apr/training/rundir.py").write_text("from . import loop\n")
    assert not check()
    name, text, words = PLANTED[check]
    (tmp_path / "apr" / name).write_text(text)
    assert any(words in line for line in check()), check()


def test_no_test_imports_another():
    """What tests share lies in tests/support: a file of tests must run alone."""
    importing = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("*.py")
        if re.search(r"^\s*(from|import) test_\w+", path.read_text(), re.M)
    ]
    assert not importing
