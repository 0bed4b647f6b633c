"""Keep the name of what is written true: no Hugging Face folder called model.gguf."""

from __future__ import annotations

from pathlib import Path

from ..common.errors import UsageError

FOLDER = ""
# Suffix of a format: what has it. A folder has none of them.
TITLES = {
    FOLDER: "a Hugging Face folder",
    ".apr": "an .apr file",
    ".gguf": "a GGUF file",
    ".safetensors": "a safetensors file",
    ".bin": "a file of PyTorch",
    ".pt": "a file of PyTorch",
    ".pth": "a file of PyTorch",
}


def check_name(path: Path, written: str, step: str) -> None:
    """Raise UsageError for a path with the suffix of another format than `written`; step: what to give instead."""
    suffix = path.suffix.lower()
    if suffix in TITLES and suffix not in (FOLDER, written):
        raise UsageError(
            f"{path}: is the name of {TITLES[suffix]}, and {TITLES[written]} would be written there; {step}"
        )
