"""Every tool can be started: what it imports is there, under that name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Of packages that only `make docs` installs.
NOT_HERE = {"docs_site.py"}
IMPORT = """
import importlib.util, sys
sys.path.insert(0, "tools")
for path in sys.argv[1:]:
    spec = importlib.util.spec_from_file_location("tool", path)
    # Dataclasses look their module up.
    sys.modules["tool"] = tool = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(tool)
    except BaseException as e:
        sys.exit(f"{path}: {type(e).__name__}: {e}")
"""


def imported(*paths: Path) -> str:
    """What is wrong with the first tool that cannot be imported, "" for none."""
    command = [sys.executable, "-c", IMPORT, *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stderr.strip() if done.returncode else ""


def test_every_tool_finds_what_it_imports() -> None:
    tools = [p for p in sorted((ROOT / "tools").glob("*.py")) if p.name not in NOT_HERE]
    assert len(tools) > 10
    assert imported(*tools) == ""


@pytest.mark.parametrize("line", ["from apr.data.batches import AHEAD", "import no_such_module"])
def test_a_tool_that_imports_what_is_gone_is_named(tmp_path: Path, line: str) -> None:
    tool = tmp_path / "broken.py"
    tool.write_text(line + "\n")
    assert imported(tool).startswith(f"{tool}: ")
