"""Name the package that is missing or broken, and the command that installs it where this program finds it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from types import ModuleType

# Package: what its extra in setup.cfg asks of its version.
OPTIONAL = {
    "pyarrow": ">=20",
    "huggingface_hub": ">=0.30",
    "gguf": ">=0.17",
    "tensorboardX": ">=2.6",
    "wandb": ">=0.17",
    "trackio": ">=0.2",
    "mlflow": ">=2.10",
    "PyYAML": ">=6",
    "mpi4py": ">=4",
    "nvidia-nccl-cu12": ">=2.30.4",
    "nvidia-nccl-cu13": ">=2.30.4",
    "lm_eval": ">=0.4.3",
}
# Package of the default installation: its version in setup.cfg. It is imported by this name, with _ for -.
REQUIRED = {
    "numpy": ">=2.1.2",
    "numba": ">=0.62",
    "scipy-openblas64": ">=0.3.29",
    "ml_dtypes": ">=0.5",
    "tokenizers": ">=0.21",
    "zstandard": ">=0.22",
    "threadpoolctl": ">=3.5",
    "rich": ">=13.7",
    "matplotlib": ">=3.9",
    "jinja2": ">=3.1",
}
REASON_CHARS = 300  # characters of what a package says: NumPy says a page
_IMPORTED = {name.replace("-", "_"): name for name in REQUIRED}


def pip_install(*what: str) -> str:
    """Spell the command that installs packages, or an extra such as ".[cuda13]", into this process's environment.

    apr itself is on no package index, and the pip of the PATH may belong to another Python: so the packages by their own
    names, and the interpreter by its path."""
    python = sys.executable or "python3"
    below = os.path.relpath(python)
    python = python if below.startswith("..") else below
    return shlex.join(
        [python, "-m", "pip", "install", *(w + {**OPTIONAL, **REQUIRED}.get(w, "") for w in what)]
    )


def broken_package(error: BaseException) -> str | None:
    """Say which package of the default installation is missing or cannot be imported, when that is behind an error."""
    for e in _chain(error):
        if isinstance(e, ModuleNotFoundError) and e.name in _IMPORTED:
            missing = _IMPORTED[e.name]
            return f"the package {missing} is not installed: {pip_install(missing)}"
    found = next((name for e in _chain(error) if (name := _importing(e))), None)
    if found is None:
        return None
    # Others are compiled against NumPy, and say little where it is there in part.
    if "numpy" in sys.modules and not hasattr(sys.modules["numpy"], "ndarray"):
        found = "numpy"
    reason = " ".join(str(error).split()) or type(error).__name__
    reason = reason if len(reason) <= REASON_CHARS else f"{reason[:REASON_CHARS]} ..."
    return (
        f"the package {found} cannot be imported ({reason}); install it anew: "
        f"{pip_install('--force-reinstall', found)}"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _importing(e: BaseException) -> str | None:
    """Find the package whose import raised an error: the first, of several that import each other."""
    frame = e.__traceback__
    while frame is not None:
        package = _package(frame.tb_frame.f_globals.get("__name__"))
        # Code of a package that runs when it is used is no import, and may fail for other reasons.
        if package and frame.tb_frame.f_code.co_name == "<module>":
            return package
        frame = frame.tb_next
    if isinstance(e, ImportError):
        return _package(e.name)
    if isinstance(e, SyntaxError):
        return next((_IMPORTED[p] for p in (e.filename or "").split(os.sep) if p in _IMPORTED), None)
    # An installation in part, or of another version.
    if isinstance(e, AttributeError) and isinstance(e.obj, ModuleType):
        return _package(e.obj.__name__)
    return None


def _package(module: str | None) -> str | None:
    return _IMPORTED.get((module or "").split(".")[0])
